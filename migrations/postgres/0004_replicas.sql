-- Many replicas: what runs show is recorded while they are at work.

-- An event takes as many numbers as it has text, else one. `until` is the number after the last event of a row. Rows may
-- overlap: one that is written because the answer about another was lost says again what that one says. The default is for
-- rows of which it is not known; those are read by everybody.
ALTER TABLE run_events ADD COLUMN until bigint NOT NULL DEFAULT 9223372036854775807;

-- Before, each event took one number. One row for each run keeps what they showed in order, whatever their numbers are.
WITH whole AS (
    SELECT e.run_id, min(e.n) AS n, jsonb_agg(x.event ORDER BY e.n, x.place) FILTER (WHERE x.event IS NOT NULL) AS event
    FROM run_events e LEFT JOIN LATERAL jsonb_array_elements(e.event) WITH ORDINALITY AS x (event, place) ON true
    GROUP BY e.run_id
    HAVING count(DISTINCT e.n) > 1
)
UPDATE run_events e SET event = COALESCE(w.event, '[]') FROM whole w WHERE e.run_id = w.run_id AND e.n = w.n;
DELETE FROM run_events e WHERE EXISTS (SELECT FROM run_events b WHERE b.run_id = e.run_id AND b.n < e.n);

-- What somebody has not seen yet is what ends after what they have seen.
CREATE INDEX run_events_by_end ON run_events (run_id, until);

-- Requests whose answer was lost: each may have left something upstream that has no name here. Before, only runs that failed
-- for it were counted, by how they failed.
ALTER TABLE runs ADD COLUMN unheard integer NOT NULL DEFAULT 0;
UPDATE runs SET unheard = 1
WHERE status = 'failed' AND started_at IS NOT NULL AND upstream_run_id IS NULL
    AND error ->> 'code' IN ('replica_lost', 'stream_broken');

-- Whose runs there are: each replica looks for those of dead ones every second. A run changes hands rarely.
CREATE INDEX runs_by_owner ON runs (owner)
    WHERE status IN ('queued', 'in_progress', 'requires_action', 'cancelling');

-- What runs show while they are at work. `migrations/postgres` holds the same numbers and names, and the reasons.

ALTER TABLE run_events ADD COLUMN until INTEGER NOT NULL DEFAULT 9223372036854775807;

UPDATE run_events AS e SET event = (
    SELECT json_group_array(json(w.event)) FROM (
        SELECT b.event -> x.fullkey AS event
        FROM run_events b JOIN json_each(b.event) x
        WHERE b.run_id = e.run_id
        ORDER BY b.n, x.key
    ) w
)
WHERE (SELECT count(*) FROM run_events b WHERE b.run_id = e.run_id) > 1
    AND NOT EXISTS (SELECT 1 FROM run_events b WHERE b.run_id = e.run_id AND b.n < e.n);
DELETE FROM run_events AS e WHERE EXISTS (SELECT 1 FROM run_events b WHERE b.run_id = e.run_id AND b.n < e.n);

CREATE INDEX run_events_by_end ON run_events (run_id, until);

ALTER TABLE runs ADD COLUMN unheard INTEGER NOT NULL DEFAULT 0;
UPDATE runs SET unheard = 1
WHERE status = 'failed' AND started_at IS NOT NULL AND upstream_run_id IS NULL
    AND error ->> 'code' IN ('replica_lost', 'stream_broken');

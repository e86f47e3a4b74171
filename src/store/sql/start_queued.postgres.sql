-- Starts a queued run, if no run of its thread is active and none is queued before it.
--
-- While a run is queued, no admission starts a run of its thread, and only the head of the queue
-- can be started. The snapshot may be out of date in one way: it may lack a run that was just
-- admitted and goes first.
-- - If both runs are started at the same time, the index `runs_active` refuses one of them. Its
--   caller tries again later.
-- - If a run starts although another went before it by then, it started before that one was
--   admitted, as far as anyone can observe.
--
-- `seen` is the run as in the snapshot. `held` locks the run only if it may start: a lock is a
-- write, and the task of a queued run repeats this statement often. While the statement waited for
-- the row, the run may have moved to a fresh thread or changed hands. Then nothing is changed, and
-- the caller tries again.
WITH seen AS MATERIALIZED (
    SELECT r.id, r.thread_id,
        NOT EXISTS (SELECT FROM runs o WHERE o.thread_id = r.thread_id AND {active o})
            AND NOT EXISTS (
                SELECT FROM runs o
                WHERE o.thread_id = r.thread_id AND o.status = 'queued' AND (o.priority, o.seq) < (r.priority, r.seq)
            )
            -- A run that is queued on a thread which is being deleted can only be ended.
            AND NOT EXISTS (SELECT FROM threads o WHERE o.id = r.thread_id AND o.deletion IS NOT NULL)
        AS may_start
    FROM runs r
    WHERE r.id = :run AND r.fence = :fence AND r.queued_input IS NOT NULL
), held AS MATERIALIZED (
    SELECT r.id, r.thread_id, r.queued_input FROM runs r
    WHERE (SELECT s.may_start FROM seen s) AND r.id = :run AND r.fence = :fence AND r.queued_input IS NOT NULL
    FOR NO KEY UPDATE
), waiting AS MATERIALIZED (
    SELECT h.id, h.queued_input FROM held h JOIN seen s ON s.thread_id = h.thread_id
), started AS (
    UPDATE runs r SET status = 'in_progress', queued_input = NULL, (started_at, deadline_at) = (
            SELECT c.at, c.at + {ms r.timeout_ms} FROM (SELECT {clock} AS at) c
        )
    FROM waiting w
    WHERE r.id = :run
    RETURNING r.*
), bound AS (
    UPDATE threads t SET message_count = t.message_count + jsonb_array_length(w.queued_input),
        last_position = t.last_position + jsonb_array_length(w.queued_input),
        last_active_at = {clock}
    FROM started s, waiting w
    WHERE t.id = (SELECT o.thread_id FROM started o)
    RETURNING t.*
), said AS (
    INSERT INTO messages (id, thread_id, position, role, content, run_id, created_at)
    SELECT substr(m.item ->> 'id', 5)::uuid, t.id,
        t.last_position - jsonb_array_length(w.queued_input) + m.n, 'user', m.item -> 'content', w.id, {clock}
    FROM bound t, waiting w, jsonb_array_elements(w.queued_input) WITH ORDINALITY AS m (item, n)
)
SELECT {thread t}, {run r}, s.may_start, w.queued_input
FROM seen s
LEFT JOIN waiting w ON true
LEFT JOIN started r ON true
LEFT JOIN bound t ON true

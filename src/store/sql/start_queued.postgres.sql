-- Starts a queued run, if no run of its thread is active and none before it waits.
--
-- Once a run waits, no admission starts a run of its thread, and only the run at the head of the queue can be claimed. The
-- snapshot may be out of date in one way: it may lack a run that came just now and goes first. If both are claimed at once, the
-- index `runs_active` refuses one, which is told to come again; and a run that started although another went before it by then
-- has done so before that one came, as far as anybody can tell.
--
-- `seen` is the run as in the snapshot. It is locked only if it may start, since a lock is a write: a task that waits for its
-- turn asks again and again. While its row was waited for, the run may have moved to a fresh thread or changed hands: then
-- nothing is changed, and it is tried again.
WITH seen AS MATERIALIZED (
    SELECT r.id, r.thread_id,
        NOT EXISTS (SELECT FROM runs o WHERE o.thread_id = r.thread_id AND {active o})
            AND NOT EXISTS (
                SELECT FROM runs o
                WHERE o.thread_id = r.thread_id AND o.status = 'queued' AND (o.priority, o.seq) < (r.priority, r.seq)
            )
            -- What waits on a thread that is being deleted is only to be ended.
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

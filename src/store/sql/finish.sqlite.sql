-- Ends runs, as the Postgres function does. finish.function.sql explains the fields of an item and
-- the outcomes. One script handles all items, because a round trip to the connection's own thread
-- costs more than a statement there. This is the only writer, so only the second of two runs of
-- one thread is `held`. Changes to other messages than the new ones depend on fields of the item.
-- So a run that ended well reads no other messages.
CREATE TEMP TABLE IF NOT EXISTS ending (
    n                  INTEGER NOT NULL PRIMARY KEY,
    run                BLOB    NOT NULL,
    fence              INTEGER NOT NULL,
    status             TEXT    NOT NULL,
    error              TEXT,
    usage              TEXT,
    upstream_run       TEXT,
    upstream_thread    TEXT,
    reply              BLOB,
    reply_content      TEXT,
    reply_upstream_id  TEXT,
    reply_sync         TEXT,
    said_sync          TEXT    NOT NULL,
    run_outcome        TEXT,
    marks_said         INTEGER NOT NULL,
    synced             INTEGER NOT NULL,
    unsettled_run      TEXT,
    discard            INTEGER NOT NULL,
    keeps_said         INTEGER NOT NULL,
    first_offset       INTEGER NOT NULL,
    events             TEXT,
    end_offset         INTEGER NOT NULL,
    drops_log          INTEGER NOT NULL,
    unacknowledged     INTEGER NOT NULL,
    context_tokens     INTEGER,
    at                 INTEGER NOT NULL,
    outcome            TEXT,
    -- thread: the run's thread. input and said: the run's messages that are not in the transcript
    -- yet, and their number. removed and marked: how many of its messages are removed, and how
    -- many get another mark. first: the position of its first message. sent: how many missing
    -- messages before that one were sent with the run.
    thread             BLOB,
    input              TEXT,
    said               INTEGER NOT NULL DEFAULT 0,
    removed            INTEGER NOT NULL DEFAULT 0,
    marked             INTEGER NOT NULL DEFAULT 0,
    first              INTEGER,
    sent               INTEGER NOT NULL DEFAULT 0
) STRICT;

INSERT INTO ending (
    n, run, fence, status, error, usage, upstream_run, upstream_thread, reply, reply_content, reply_upstream_id, reply_sync,
    said_sync, run_outcome, marks_said, synced, unsettled_run, discard, keeps_said, first_offset, events, end_offset, drops_log,
    unacknowledged, context_tokens, at
)
WITH items AS MATERIALIZED (SELECT key AS n, value AS it FROM json_each(:items))
SELECT n, unhex(it ->> 'run', '-'), it ->> 'fence', it ->> 'status', nullif(it -> 'error', 'null'), nullif(it -> 'usage', 'null'),
    it ->> 'upstream_run', it ->> 'upstream_thread', unhex(it ->> 'reply', '-'), nullif(it -> 'reply_content', 'null'),
    it ->> 'reply_upstream_id', it ->> 'reply_sync', it ->> 'said_sync', it ->> 'run_outcome', it ->> 'marks_said',
    it ->> 'synced', nullif(it -> 'unsettled_run', 'null'), it ->> 'discard', it ->> 'keeps_said', it ->> 'first_offset', nullif(it -> 'events', 'null'),
    it ->> 'end_offset', it ->> 'drops_log', it ->> 'unacknowledged', it ->> 'context_tokens', {now}
FROM items;

UPDATE ending AS e SET outcome = CASE
    WHEN r.finished_at IS NULL AND r.rollback_pending AND NOT e.discard THEN 'must_discard'
    WHEN r.finished_at IS NULL THEN NULL
    WHEN r.status = e.status THEN 'finished'
    ELSE 'lost'
END, thread = r.thread_id
FROM runs r
WHERE r.id = e.run AND r.fence = e.fence;
UPDATE ending SET outcome = 'lost' WHERE thread IS NULL;
UPDATE ending AS e SET outcome = 'held'
WHERE e.outcome IS NULL
    AND EXISTS (SELECT 1 FROM ending o WHERE o.thread = e.thread AND o.outcome IS NULL AND o.n < e.n);
UPDATE ending AS e SET input = r.queued_input, said = json_array_length(r.queued_input)
FROM runs r
WHERE e.outcome IS NULL AND NOT e.discard AND r.id = e.run AND r.queued_input IS NOT NULL;

UPDATE runs AS r SET status = e.status, error = e.error, usage = e.usage,
    upstream_run_id = COALESCE(e.upstream_run, r.upstream_run_id),
    earlier_upstream_run_ids = iif(r.upstream_run_id <> e.upstream_run,
        json_insert(COALESCE(r.earlier_upstream_run_ids, '[]'), '$[#]', r.upstream_run_id), r.earlier_upstream_run_ids),
    unacknowledged_requests = r.unacknowledged_requests + e.unacknowledged, rollback_pending = e.discard,
    required_action = NULL, partial_reply = NULL, tool_outputs = NULL, queued_input = NULL, finished_at = e.at
FROM ending e
WHERE r.id = e.run AND e.outcome IS NULL;
INSERT INTO run_events AS l (run_id, first_offset, events, end_offset)
SELECT run, first_offset, events, end_offset FROM ending WHERE outcome IS NULL AND NOT drops_log
ON CONFLICT (run_id, first_offset) DO UPDATE SET events = excluded.events, end_offset = excluded.end_offset
    WHERE l.end_offset < excluded.end_offset;
DELETE FROM run_events
WHERE run_id IN (SELECT run FROM ending WHERE outcome IS NULL AND drops_log AND first_offset > 0);

-- The run's own messages mark where the earlier ones end, so they are removed after this.
UPDATE ending AS e SET first = {first_position_of e.run} WHERE e.outcome IS NULL AND e.synced;
UPDATE ending AS e SET sent = (
    SELECT count(*) FROM messages m
    WHERE m.thread_id = e.thread AND m.upstream_sync = 'missing' AND m.position < e.first
)
WHERE e.first IS NOT NULL;
UPDATE messages SET upstream_sync = 'present'
WHERE rowid IN (
    SELECT m.rowid FROM ending e CROSS JOIN messages m
    WHERE e.first IS NOT NULL AND m.thread_id = e.thread AND m.position < e.first
        AND (m.upstream_sync = 'missing' OR m.upstream_sync = 'unknown')
);
UPDATE ending AS e SET removed = (SELECT count(*) FROM messages m WHERE m.run_id = e.run)
WHERE e.outcome IS NULL AND e.discard AND NOT e.keeps_said;
DELETE FROM messages WHERE run_id IN (SELECT run FROM ending WHERE outcome IS NULL AND discard AND NOT keeps_said);
UPDATE ending AS e SET marked = (SELECT count(*) FROM messages m WHERE m.run_id = e.run)
WHERE e.outcome IS NULL AND e.marks_said;
UPDATE messages AS m SET upstream_sync = e.said_sync, run_outcome = e.run_outcome
FROM ending e
WHERE e.outcome IS NULL AND e.marks_said AND m.run_id = e.run;

UPDATE threads AS t SET
    message_count = t.message_count + e.said + (e.reply IS NOT NULL) - e.removed,
    last_position = t.last_position + e.said + (e.reply IS NOT NULL),
    unsynced_messages = t.unsynced_messages - e.sent + iif(e.said_sync = 'missing', e.said + e.marked, 0)
        + (e.reply_sync IS 'missing'),
    unsettled_run = COALESCE(e.unsettled_run, iif(e.synced, NULL, t.unsettled_run)),
    upstream_thread_id = COALESCE(e.upstream_thread, t.upstream_thread_id),
    input_tokens = t.input_tokens + COALESCE(e.usage ->> 'input_tokens', 0),
    cached_input_tokens = t.cached_input_tokens + COALESCE(e.usage ->> 'cached_input_tokens', 0),
    output_tokens = t.output_tokens + COALESCE(e.usage ->> 'output_tokens', 0),
    reasoning_tokens = t.reasoning_tokens + COALESCE(e.usage ->> 'reasoning_tokens', 0),
    context_tokens = COALESCE(e.context_tokens, t.context_tokens),
    last_active_at = e.at
FROM ending e
WHERE t.id = e.thread AND e.outcome IS NULL;
INSERT INTO messages (id, thread_id, position, role, content, run_id, upstream_sync, run_outcome, created_at)
SELECT unhex(substr(m.value ->> 'id', 5)), t.id, t.last_position - (e.reply IS NOT NULL) - e.said + 1 + m.key, 'user',
    m.value -> 'content', e.run, e.said_sync, e.run_outcome, e.at
FROM ending e CROSS JOIN threads t ON t.id = e.thread CROSS JOIN json_each(e.input) m
WHERE e.outcome IS NULL AND e.said > 0;
INSERT INTO messages (
    id, thread_id, position, role, content, run_id, upstream_message_id, upstream_sync, run_outcome, created_at
)
SELECT e.reply, t.id, t.last_position, 'assistant', e.reply_content, e.run, e.reply_upstream_id, e.reply_sync,
    e.run_outcome, e.at
FROM ending e CROSS JOIN threads t ON t.id = e.thread
WHERE e.outcome IS NULL AND e.reply IS NOT NULL;
UPDATE ending SET outcome = 'finished' WHERE outcome IS NULL;

SELECT e.outcome, {thread t}, {run r}, {message m}, {activity}
FROM ending e
LEFT JOIN runs r ON r.id = e.run AND e.outcome = 'finished'
LEFT JOIN threads t ON t.id = r.thread_id
LEFT JOIN messages m ON m.run_id = r.id AND m.role = 'assistant'
ORDER BY e.n;
DELETE FROM ending

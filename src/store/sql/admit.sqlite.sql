-- Admits runs, as the Postgres function does. admit.function.sql explains the fields of an item
-- and the outcomes. One script handles all items, because a round trip to the connection's own
-- thread costs more than a statement there. This is the only writer, and no two items have the
-- same key. So what one statement finds stays true for the next, and no item is `held`.
CREATE TEMP TABLE IF NOT EXISTS admitting (
    n                  INTEGER NOT NULL PRIMARY KEY,
    tenant             TEXT    NOT NULL,
    user_key           TEXT    NOT NULL,
    scope_kind         TEXT    NOT NULL,
    scope_name         TEXT    NOT NULL,
    max_age            INTEGER,
    max_idle           INTEGER,
    from_now           INTEGER,
    from_last_activity INTEGER,
    upstream           TEXT    NOT NULL,
    assistant          TEXT    NOT NULL,
    strategy           TEXT    NOT NULL,
    metadata           TEXT    NOT NULL,
    again              INTEGER NOT NULL,
    thread             BLOB    NOT NULL,
    run                BLOB    NOT NULL,
    message            BLOB    NOT NULL,
    message_name       TEXT    NOT NULL,
    content            TEXT    NOT NULL,
    timeout            INTEGER NOT NULL,
    replica            BLOB    NOT NULL,
    intent             BLOB,
    orphan_after         INTEGER NOT NULL,
    idempotency_key    TEXT,
    request_hash       BLOB,
    remember           INTEGER NOT NULL,
    max_messages       INTEGER NOT NULL,
    max_bytes          INTEGER NOT NULL,
    -- The time of the admission.
    at                 INTEGER NOT NULL,
    -- The outcome, once it is known, and the run that the answer reports.
    outcome            TEXT,
    answer             BLOB,
    -- The key's thread, its state, and the thread before a fresh one.
    known              BLOB,
    seen_upstream      TEXT,
    has_expired        INTEGER NOT NULL DEFAULT false,
    is_busy            INTEGER NOT NULL DEFAULT false,
    is_fresh           INTEGER NOT NULL DEFAULT false,
    previous           BLOB,
    -- The queued run that the message joins.
    joins              BLOB
) STRICT;

INSERT INTO admitting (
    n, tenant, user_key, scope_kind, scope_name, max_age, max_idle, from_now, from_last_activity, upstream, assistant,
    strategy, metadata, again, thread, run, message, message_name, content, timeout, replica, intent, orphan_after,
    idempotency_key, request_hash, remember, max_messages, max_bytes, at
)
WITH items AS MATERIALIZED (SELECT key AS n, value AS it FROM json_each(:items))
SELECT n, it ->> 'tenant', it ->> 'user_key', it ->> 'scope_kind', it ->> 'scope_name', it ->> 'max_age', it ->> 'max_idle',
    it ->> 'from_now', it ->> 'from_last_activity', it ->> 'upstream', it ->> 'assistant', it ->> 'strategy',
    it -> 'metadata', it ->> 'again', unhex(it ->> 'thread', '-'), unhex(it ->> 'run', '-'), unhex(it ->> 'message', '-'),
    it ->> 'message_name', it -> 'content', it ->> 'timeout', unhex(it ->> 'replica', '-'), unhex(it ->> 'intent', '-'),
    it ->> 'orphan_after', it ->> 'idempotency_key', unhex(it ->> 'request_hash'), it ->> 'remember', it ->> 'max_messages',
    it ->> 'max_bytes', {now}
FROM items;

-- Find items that an earlier try recorded: as a run of their own, or in a run that they have
-- joined.
UPDATE admitting SET outcome = 'recorded', answer = run WHERE :alone AND EXISTS (SELECT 1 FROM runs r WHERE r.id = run);
UPDATE admitting AS a SET answer = COALESCE(
    (SELECT m.run_id FROM messages m WHERE m.id = a.message),
    (
        SELECT q.id FROM threads t CROSS JOIN runs q
        WHERE {current_of a} AND q.thread_id = t.id AND q.status = 'queued'
            AND EXISTS (SELECT 1 FROM json_each(q.queued_input) e WHERE e.value ->> 'id' = a.message_name)
    )
)
WHERE :alone AND a.strategy = 'merge' AND a.outcome IS NULL;
UPDATE admitting SET outcome = 'merged' WHERE answer IS NOT NULL AND outcome IS NULL;

-- Refuse items whose idempotency key is in use.
DELETE FROM idempotency_keys AS k
WHERE k.rowid IN (
    SELECT k.rowid FROM admitting a CROSS JOIN idempotency_keys k
    WHERE a.outcome IS NULL AND a.idempotency_key IS NOT NULL AND {use_of a} AND {forgotten k, a.remember}
);
UPDATE admitting AS a SET outcome = 'repeated'
WHERE a.outcome IS NULL AND a.idempotency_key IS NOT NULL
    AND EXISTS (SELECT 1 FROM idempotency_keys k WHERE {use_of a});

-- Find the key's thread, and refuse what it does not take.
UPDATE admitting AS a SET
    known = t.id, seen_upstream = t.upstream, has_expired = COALESCE({expiry a.max_age, a.max_idle} <= a.at, false),
    is_busy = {busy}
FROM threads t
WHERE a.outcome IS NULL AND {current_of a};
UPDATE admitting SET outcome = 'other_upstream'
WHERE outcome IS NULL AND NOT has_expired AND seen_upstream <> upstream;
UPDATE admitting SET outcome = 'no_thread' WHERE outcome IS NULL AND again AND (known IS NULL OR has_expired);
UPDATE admitting AS a SET outcome = 'no_message'
WHERE a.outcome IS NULL AND a.again AND NOT a.is_busy
    AND (
        SELECT m.position FROM messages m WHERE m.thread_id = a.known AND m.role = 'user'
        ORDER BY m.position DESC LIMIT 1
    ) IS NULL;
UPDATE admitting AS a SET joins = (
    SELECT iif(
        q.assistant = a.assistant AND q.metadata = a.metadata AND q.rerun IS NULL
            AND json_array_length(q.queued_input) < a.max_messages
            AND octet_length(q.queued_input) + octet_length(a.content) <= a.max_bytes,
        q.id, NULL
    )
    FROM runs q
    WHERE q.thread_id = a.known AND q.status = 'queued'
    ORDER BY q.priority DESC, q.seq DESC
    LIMIT 1
)
WHERE a.outcome IS NULL AND a.strategy = 'merge' AND NOT a.has_expired;
UPDATE admitting SET outcome = 'busy'
WHERE outcome IS NULL AND strategy = 'reject' AND is_busy AND NOT has_expired;
UPDATE admitting SET is_busy = true WHERE again;

-- Create a fresh thread for a key that has none or whose thread has expired.
UPDATE threads SET lifecycle = 'archived', archived_at = a.at, due_at = a.at
FROM admitting a
WHERE threads.id = a.known AND a.outcome IS NULL AND a.has_expired;
UPDATE admitting AS a SET
    previous = COALESCE(a.known, (
        SELECT t.id FROM threads t
        WHERE t.tenant = a.tenant AND t.user_key = a.user_key AND t.scope_kind = a.scope_kind
            AND t.scope_name = a.scope_name AND t.lifecycle = 'archived'
        ORDER BY t.id DESC
        LIMIT 1
    )),
    known = a.thread, is_fresh = true, is_busy = false
WHERE a.outcome IS NULL AND (a.known IS NULL OR a.has_expired);
INSERT INTO threads (
    id, tenant, user_key, scope_kind, scope_name, upstream, lifecycle, previous_thread_id,
    message_count, last_position, run_count, created_at, last_active_at, max_age_ms, max_idle_ms, due_at
)
SELECT thread, tenant, user_key, scope_kind, scope_name, upstream, 'current', previous,
    1, 1, 1, at, at, from_now, from_last_activity,
    at + COALESCE(from_now, from_last_activity, min(COALESCE(max_age, max_idle), COALESCE(max_idle, max_age)))
FROM admitting
WHERE outcome IS NULL AND is_fresh;
INSERT INTO upstream_orphans (id, thread_id, upstream, kind, created_by, due_at)
SELECT intent, thread, upstream, 'thread', replica, at + orphan_after FROM admitting
WHERE outcome IS NULL AND is_fresh AND intent IS NOT NULL;

UPDATE runs SET queued_input =
    json_insert(queued_input, '$[#]', json_object('id', a.message_name, 'content', json(a.content)))
FROM admitting a
WHERE runs.id = a.joins;
-- A message with a limit for its thread replaces the thread's own limits.
UPDATE threads AS t SET
    run_count = t.run_count + (a.joins IS NULL),
    message_count = t.message_count + (a.joins IS NULL AND NOT a.is_busy),
    last_position = t.last_position + (a.joins IS NULL AND NOT a.is_busy),
    last_active_at = a.at,
    max_age_ms = CASE
        WHEN a.from_now IS NOT NULL THEN max(0, a.at - t.created_at + a.from_now)
        WHEN a.from_last_activity IS NULL THEN t.max_age_ms
    END,
    max_idle_ms = iif(a.from_now IS NULL, COALESCE(a.from_last_activity, t.max_idle_ms), NULL),
    due_at = COALESCE(a.at + COALESCE(a.from_now, a.from_last_activity), t.due_at)
FROM admitting a
WHERE t.id = a.known AND a.outcome IS NULL AND NOT a.is_fresh;

-- A run that goes before all queued runs gets a priority lower than any before: minus its own seq.
INSERT INTO runs (
    id, thread_id, seq, priority, status, strategy, assistant, metadata, queued_input, rerun, owner, fence,
    timeout_ms, created_at, started_at, deadline_at
)
SELECT a.run, t.id, t.run_count, iif(a.is_busy AND a.strategy IN ('interrupt', 'rollback'), -t.run_count, 0),
    iif(a.is_busy, 'queued', 'in_progress'), a.strategy, a.assistant, a.metadata,
    CASE WHEN a.again THEN '[]' WHEN a.is_busy THEN json_array(json_object('id', a.message_name, 'content', json(a.content))) END,
    iif(a.again, 'waiting', NULL), a.replica, 1,
    a.timeout, a.at, iif(a.is_busy, NULL, a.at), iif(a.is_busy, NULL, a.at + a.timeout)
FROM admitting a CROSS JOIN threads t ON t.id = a.known
WHERE a.outcome IS NULL AND a.joins IS NULL;
INSERT INTO messages (id, thread_id, position, role, content, run_id, created_at)
SELECT a.message, t.id, t.last_position, 'user', a.content, a.run, a.at
FROM admitting a CROSS JOIN threads t ON t.id = a.known
WHERE a.outcome IS NULL AND a.joins IS NULL AND NOT a.is_busy;
INSERT INTO idempotency_keys (tenant, user_key, scope_kind, scope_name, key, run_id, request_hash, created_at)
SELECT tenant, user_key, scope_kind, scope_name, idempotency_key, COALESCE(joins, run), request_hash, at
FROM admitting
WHERE outcome IS NULL AND idempotency_key IS NOT NULL;
UPDATE admitting SET answer = COALESCE(joins, run), outcome = iif(joins IS NULL, 'recorded', 'merged') WHERE outcome IS NULL;

SELECT a.outcome, a.seen_upstream, {thread t}, {run r}, (
    SELECT count(*) + 1 FROM runs q
    WHERE q.thread_id = r.thread_id AND q.status = 'queued' AND (q.priority, q.seq) < (r.priority, r.seq)
) AS queue_position
FROM admitting a
LEFT JOIN runs r ON r.id = a.answer
LEFT JOIN threads t ON t.id = r.thread_id
ORDER BY a.n;
DELETE FROM admitting

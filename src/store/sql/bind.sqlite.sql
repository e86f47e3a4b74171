-- Binds the threads of active runs to upstream threads, as the Postgres function does.
-- bind.function.sql explains the fields of an item and the outcomes. One script handles all items.
-- This is the only writer, so no item is `held`.
CREATE TEMP TABLE IF NOT EXISTS binding (
    n                  INTEGER NOT NULL PRIMARY KEY,
    run                BLOB    NOT NULL,
    fence              INTEGER NOT NULL,
    upstream_thread    TEXT    NOT NULL,
    intent             BLOB    NOT NULL,
    seeded             INTEGER NOT NULL,
    carried_users      INTEGER NOT NULL,
    orphan             BLOB    NOT NULL,
    outcome            TEXT,
    -- The run's thread. first: the position at which the run's messages begin, if earlier messages
    -- are to change. sent: how many of those were missing.
    thread             BLOB,
    first              INTEGER,
    sent               INTEGER NOT NULL DEFAULT 0
) STRICT;

INSERT INTO binding (n, run, fence, upstream_thread, intent, seeded, carried_users, orphan)
WITH items AS MATERIALIZED (SELECT key AS n, value AS it FROM json_each(:items))
SELECT n, unhex(it ->> 'run', '-'), it ->> 'fence', it ->> 'upstream_thread', unhex(it ->> 'intent', '-'), it ->> 'seeded',
    it ->> 'carried_users', unhex(it ->> 'orphan', '-')
FROM items;

UPDATE binding AS b SET thread = (SELECT r.thread_id FROM runs r WHERE {leased_by b} AND {at_work r});
UPDATE binding SET outcome = 'bound' WHERE thread IS NOT NULL;
-- The lease was lost: the upstream thread becomes an orphan that is to be deleted.
UPDATE upstream_orphans AS o SET upstream_id = b.upstream_thread, due_at = {now}
FROM binding b
WHERE o.id = b.intent AND b.outcome IS NULL;
UPDATE binding AS b SET outcome = iif({has_recorded b}, 'lost', 'unrecorded') WHERE b.outcome IS NULL;
DELETE FROM upstream_orphans WHERE id IN (SELECT intent FROM binding WHERE outcome = 'bound');

UPDATE binding AS b SET first = {first_position_of b.run} WHERE b.outcome = 'bound' AND b.seeded;
UPDATE binding AS b SET sent = (
    SELECT count(*) FROM messages m
    WHERE m.thread_id = b.thread AND m.upstream_sync = 'missing' AND m.position < b.first
)
WHERE b.first IS NOT NULL;
UPDATE messages SET upstream_message_id = NULL,
    upstream_sync = iif(upstream_sync IN ('missing', 'unknown'), 'present', upstream_sync)
WHERE rowid IN (
    SELECT m.rowid FROM binding b CROSS JOIN messages m
    WHERE b.first IS NOT NULL AND m.thread_id = b.thread AND m.position < b.first
        AND (m.upstream_sync IN ('missing', 'unknown') OR m.upstream_message_id IS NOT NULL)
);
INSERT INTO upstream_orphans (id, thread_id, upstream, kind, upstream_id, due_at)
SELECT b.orphan, t.id, t.upstream, 'thread', t.upstream_thread_id, {now}
FROM binding b CROSS JOIN threads t ON t.id = b.thread
WHERE b.first IS NOT NULL AND t.upstream_thread_id <> b.upstream_thread;

UPDATE threads AS t SET upstream_thread_id = b.upstream_thread,
    unsynced_messages = t.unsynced_messages - b.sent,
    unsettled_run = iif(b.seeded, NULL, t.unsettled_run),
    carried_user_messages = iif(b.seeded, b.carried_users, t.carried_user_messages)
FROM binding b
WHERE t.id = b.thread;

SELECT outcome FROM binding ORDER BY n;
DELETE FROM binding

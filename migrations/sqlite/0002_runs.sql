-- The whole life of a run. `migrations/postgres` holds the same numbers and names, and the reasons.

-- Position of the newest message there ever was.
ALTER TABLE threads ADD COLUMN last_position INTEGER NOT NULL DEFAULT 0;
-- Messages whose context is `missing`.
ALTER TABLE threads ADD COLUMN backlog INTEGER NOT NULL DEFAULT 0 CHECK (backlog >= 0);
ALTER TABLE threads ADD COLUMN leftover TEXT;
UPDATE threads SET last_position = message_count;

-- The place in the queue is (rank, seq). 0, or less for a run that goes before all that waited when it came.
ALTER TABLE runs ADD COLUMN rank INTEGER NOT NULL DEFAULT 0 CHECK (rank <= 0);
-- Its messages are to be removed when it ends, or were.
ALTER TABLE runs ADD COLUMN discard INTEGER NOT NULL DEFAULT 0 CHECK (discard IN (0, 1));
-- What it had said when it began to wait for tool outputs.
ALTER TABLE runs ADD COLUMN partial TEXT;
-- Outputs that came for it, until it waits again or ends.
ALTER TABLE runs ADD COLUMN tool_outputs TEXT
    CHECK (tool_outputs IS NULL OR status IN ('in_progress', 'cancelling'));
-- They may have been sent to the upstream.
ALTER TABLE runs ADD COLUMN outputs_sent INTEGER NOT NULL DEFAULT 0 CHECK (outputs_sent IN (0, 1));
ALTER TABLE runs DROP COLUMN idempotency_key;
ALTER TABLE runs DROP COLUMN request_hash;

DROP INDEX runs_queued;
CREATE INDEX runs_queued ON runs (thread_id, rank, seq) WHERE status = 'queued';

ALTER TABLE messages ADD COLUMN context TEXT NOT NULL DEFAULT 'present'
    CHECK (context IN ('present', 'missing', 'withheld', 'unknown'));
-- How its run ended, unless it completed.
ALTER TABLE messages ADD COLUMN ended TEXT CHECK (ended IN ('incomplete', 'failed', 'cancelled', 'expired'));

-- What may have to be sent again. The condition is spelled so that SQLite sees what implies it.
CREATE INDEX messages_unsettled ON messages (thread_id, position) WHERE context = 'missing' OR context = 'unknown';

-- Which run a caller's key stands for, within a conversation and across the threads that it had.
CREATE TABLE idempotency_keys (
    tenant       TEXT    NOT NULL,
    user_key     TEXT    NOT NULL,
    scope_kind   TEXT    NOT NULL,
    scope_name   TEXT    NOT NULL,
    key          TEXT    NOT NULL,
    run_id       BLOB    NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    request_hash BLOB    NOT NULL CHECK (length(request_hash) = 32),
    created_at   INTEGER NOT NULL,
    PRIMARY KEY (tenant, user_key, scope_kind, scope_name, key)
) STRICT;

CREATE INDEX idempotency_keys_by_run ON idempotency_keys (run_id);

-- `run_events`: `n` is the number of a row's first event, `event` the JSON array of them, which may be empty.

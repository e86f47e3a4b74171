-- The whole life of a run: places in the queue, interrupts, merges, tool calls, what is upstream and what is not,
-- idempotency keys.

-- Messages can be removed, so the number of the newest one and their count part ways. None of these columns is in an
-- index: an update of a thread still stays in its page.
ALTER TABLE threads
    -- Position of the newest message there ever was.
    ADD COLUMN last_position bigint NOT NULL DEFAULT 0,
    -- Messages whose context is `missing`.
    ADD COLUMN backlog bigint NOT NULL DEFAULT 0 CHECK (backlog >= 0),
    ADD COLUMN leftover jsonb;
UPDATE threads SET last_position = message_count;
ALTER TABLE threads ADD CONSTRAINT positions_suffice CHECK (last_position >= message_count);

ALTER TABLE runs
    -- The place in the queue is (rank, seq). 0, or less for a run that goes before all that waited when it came.
    ADD COLUMN rank bigint NOT NULL DEFAULT 0 CHECK (rank <= 0),
    -- Its messages are to be removed when it ends, or were.
    ADD COLUMN discard boolean NOT NULL DEFAULT false,
    -- What it had said when it began to wait for tool outputs.
    ADD COLUMN partial jsonb,
    -- Outputs that came for it, until it waits again or ends.
    ADD COLUMN tool_outputs jsonb,
    -- They may have been sent to the upstream.
    ADD COLUMN outputs_sent boolean NOT NULL DEFAULT false,
    -- Never used: a merged message has a key, but no run of its own. See `idempotency_keys`.
    DROP COLUMN idempotency_key,
    DROP COLUMN request_hash,
    ADD CONSTRAINT outputs_at_work CHECK (tool_outputs IS NULL OR status IN ('in_progress', 'cancelling'));

DROP INDEX runs_queued;
CREATE INDEX runs_queued ON runs (thread_id, rank, seq) WHERE status = 'queued';

ALTER TABLE messages
    ADD COLUMN context text NOT NULL DEFAULT 'present'
        CHECK (context IN ('present', 'missing', 'withheld', 'unknown')),
    -- How its run ended, unless it completed.
    ADD COLUMN ended text CHECK (ended IN ('incomplete', 'failed', 'cancelled', 'expired'));

-- What may have to be sent again. Empty for a thread on which all goes well.
CREATE INDEX messages_unsettled ON messages (thread_id, position) WHERE context = 'missing' OR context = 'unknown';

-- Which run a caller's key stands for, within a conversation and across the threads that it had.
CREATE TABLE idempotency_keys (
    tenant       text        COLLATE "C" NOT NULL,
    user_key     text        COLLATE "C" NOT NULL,
    scope_kind   text        COLLATE "C" NOT NULL,
    scope_name   text        COLLATE "C" NOT NULL,
    key          text        COLLATE "C" NOT NULL,
    run_id       uuid        NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    request_hash bytea       NOT NULL CHECK (octet_length(request_hash) = 32),
    created_at   timestamptz NOT NULL,
    PRIMARY KEY (tenant, user_key, scope_kind, scope_name, key)
);

CREATE INDEX idempotency_keys_by_run ON idempotency_keys (run_id);

-- A row holds events in a row: `n` is the number of the first, `event` the array of them, which may be empty.
COMMENT ON COLUMN run_events.event IS 'array of events, numbered from n';

-- Threads, runs, transcripts. `migrations/sqlite` holds the same numbers and names.
--
-- Written once, never edited after a release: a change is a further file.

-- Key texts are compared byte for byte, hence COLLATE "C".
--
-- Every message updates its thread's row (counters, last_active_at, sometimes upstream_thread_id). No index holds
-- any of these columns and each page keeps room, so that such an update stays in its page and touches no index.
CREATE TABLE threads (
    id                 uuid        PRIMARY KEY,
    tenant             text        COLLATE "C" NOT NULL,
    user_key           text        COLLATE "C" NOT NULL,
    scope_kind         text        COLLATE "C" NOT NULL CHECK (scope_kind IN ('user', 'session', 'topic')),
    -- Empty for the user scope.
    scope_name         text        COLLATE "C" NOT NULL CHECK ((scope_kind = 'user') = (scope_name = '')),
    upstream           text        NOT NULL,
    upstream_thread_id text,
    lifecycle          text        NOT NULL CHECK (lifecycle IN ('current', 'archived', 'deleting')),
    -- A name, not a reference: the thread before may be deleted first.
    previous_thread    uuid,
    metadata           jsonb       NOT NULL DEFAULT '{}',
    message_count      bigint      NOT NULL DEFAULT 0 CHECK (message_count >= 0),
    run_count          bigint      NOT NULL DEFAULT 0 CHECK (run_count >= 0),
    created_at         timestamptz NOT NULL,
    last_active_at     timestamptz NOT NULL,
    expires_at         timestamptz
) WITH (fillfactor = 70);

-- A key has at most one current thread.
CREATE UNIQUE INDEX threads_current ON threads (tenant, user_key, scope_kind, scope_name)
    WHERE lifecycle = 'current';

-- Queue, lock, idempotency record and history in one.
CREATE TABLE runs (
    id              uuid        PRIMARY KEY,
    thread_id       uuid        NOT NULL REFERENCES threads (id) ON DELETE CASCADE,
    -- 1 for the thread's first run, then without gaps: the place in the queue.
    seq             bigint      NOT NULL CHECK (seq > 0),
    status          text        NOT NULL CHECK (status IN (
                        'queued', 'in_progress', 'requires_action', 'cancelling',
                        'completed', 'incomplete', 'failed', 'cancelled', 'expired')),
    strategy        text        NOT NULL CHECK (strategy IN ('enqueue', 'reject', 'interrupt', 'rollback', 'merge')),
    assistant       text        NOT NULL,
    metadata        jsonb       NOT NULL DEFAULT '{}',
    -- The user's messages while the run waits; when it starts they move into `messages`.
    input           jsonb,
    idempotency_key text,
    request_hash    bytea,
    -- A replica's id. Its row may be gone.
    owner           uuid,
    fence           bigint      NOT NULL CHECK (fence > 0),
    timeout_ms      bigint      NOT NULL CHECK (timeout_ms >= 0),
    upstream_run_id text,
    required_action jsonb,
    error           jsonb,
    usage           jsonb,
    created_at      timestamptz NOT NULL,
    started_at      timestamptz,
    finished_at     timestamptz,
    deadline_at     timestamptz,
    UNIQUE (thread_id, seq),
    CONSTRAINT input_while_queued CHECK ((status = 'queued') = (input IS NOT NULL)),
    CONSTRAINT finished_when_final CHECK (
        (finished_at IS NULL) = (status IN ('queued', 'in_progress', 'requires_action', 'cancelling'))),
    CONSTRAINT deadline_once_started CHECK ((started_at IS NULL) = (deadline_at IS NULL))
);

-- The database itself refuses a second active run.
CREATE UNIQUE INDEX runs_active ON runs (thread_id)
    WHERE status IN ('in_progress', 'requires_action', 'cancelling');

-- Who waits, in order. Its size is that of the queue, not of the history.
CREATE INDEX runs_queued ON runs (thread_id, seq) WHERE status = 'queued';

-- What a dead replica may leave behind, in the order in which it is adopted.
CREATE INDEX runs_unfinished ON runs (thread_id, seq)
    WHERE status IN ('queued', 'in_progress', 'requires_action', 'cancelling');

-- The transcript.
CREATE TABLE messages (
    id                  uuid        NOT NULL UNIQUE,
    thread_id           uuid        NOT NULL REFERENCES threads (id) ON DELETE CASCADE,
    -- 1 for the thread's first message, then without gaps.
    position            bigint      NOT NULL CHECK (position > 0),
    role                text        NOT NULL CHECK (role IN ('user', 'assistant')),
    content             jsonb       NOT NULL,
    -- A name, not a reference: a transcript outlives its runs.
    run_id              uuid,
    upstream_message_id text,
    created_at          timestamptz NOT NULL,
    PRIMARY KEY (thread_id, position)
);

CREATE INDEX messages_by_run ON messages (run_id);

-- Sessions of gateway processes. Each renews its own row; HOT updates for the same reason as above.
CREATE TABLE replicas (
    id         uuid        PRIMARY KEY,
    address    text        NOT NULL,
    started_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL
) WITH (fillfactor = 50);

-- What a stream of a run showed, so that it can be resumed.
CREATE TABLE run_events (
    run_id     uuid        NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    n          bigint      NOT NULL CHECK (n >= 0),
    event      jsonb       NOT NULL,
    created_at timestamptz NOT NULL,
    PRIMARY KEY (run_id, n)
);

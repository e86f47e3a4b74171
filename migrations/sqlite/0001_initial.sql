-- Threads, runs, transcripts. `migrations/postgres` holds the same numbers and names, and the reasons.
--
-- Written once, never edited after a release: a change is a further file.
--
-- Ids are the 16 bytes of a UUID, times are milliseconds since 1970, JSON is text. Text compares byte for byte.

CREATE TABLE threads (
    id                 BLOB    NOT NULL PRIMARY KEY CHECK (length(id) = 16),
    tenant             TEXT    NOT NULL,
    user_key           TEXT    NOT NULL,
    scope_kind         TEXT    NOT NULL CHECK (scope_kind IN ('user', 'session', 'topic')),
    -- Empty for the user scope.
    scope_name         TEXT    NOT NULL CHECK ((scope_kind = 'user') = (scope_name = '')),
    upstream           TEXT    NOT NULL,
    upstream_thread_id TEXT,
    lifecycle          TEXT    NOT NULL CHECK (lifecycle IN ('current', 'archived', 'deleting')),
    -- A name, not a reference: the thread before may be deleted first.
    previous_thread    BLOB,
    metadata           TEXT    NOT NULL DEFAULT '{}',
    message_count      INTEGER NOT NULL DEFAULT 0 CHECK (message_count >= 0),
    run_count          INTEGER NOT NULL DEFAULT 0 CHECK (run_count >= 0),
    created_at         INTEGER NOT NULL,
    last_active_at     INTEGER NOT NULL,
    expires_at         INTEGER
) STRICT;

-- A key has at most one current thread.
CREATE UNIQUE INDEX threads_current ON threads (tenant, user_key, scope_kind, scope_name)
    WHERE lifecycle = 'current';

-- Queue, lock, idempotency record and history in one.
CREATE TABLE runs (
    id              BLOB    NOT NULL PRIMARY KEY CHECK (length(id) = 16),
    thread_id       BLOB    NOT NULL REFERENCES threads (id) ON DELETE CASCADE,
    -- 1 for the thread's first run, then without gaps: the place in the queue.
    seq             INTEGER NOT NULL CHECK (seq > 0),
    status          TEXT    NOT NULL CHECK (status IN (
                        'queued', 'in_progress', 'requires_action', 'cancelling',
                        'completed', 'incomplete', 'failed', 'cancelled', 'expired')),
    strategy        TEXT    NOT NULL CHECK (strategy IN ('enqueue', 'reject', 'interrupt', 'rollback', 'merge')),
    assistant       TEXT    NOT NULL,
    metadata        TEXT    NOT NULL DEFAULT '{}',
    -- The user's messages while the run waits; when it starts they move into `messages`.
    input           TEXT,
    idempotency_key TEXT,
    request_hash    BLOB,
    -- A replica's id. Its row may be gone.
    owner           BLOB,
    fence           INTEGER NOT NULL CHECK (fence > 0),
    timeout_ms      INTEGER NOT NULL CHECK (timeout_ms >= 0),
    upstream_run_id TEXT,
    required_action TEXT,
    error           TEXT,
    usage           TEXT,
    created_at      INTEGER NOT NULL,
    started_at      INTEGER,
    finished_at     INTEGER,
    deadline_at     INTEGER,
    UNIQUE (thread_id, seq),
    CONSTRAINT input_while_queued CHECK ((status = 'queued') = (input IS NOT NULL)),
    CONSTRAINT finished_when_final CHECK (
        (finished_at IS NULL) = (status IN ('queued', 'in_progress', 'requires_action', 'cancelling'))),
    CONSTRAINT deadline_once_started CHECK ((started_at IS NULL) = (deadline_at IS NULL))
) STRICT;

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
    id                  BLOB    NOT NULL UNIQUE CHECK (length(id) = 16),
    thread_id           BLOB    NOT NULL REFERENCES threads (id) ON DELETE CASCADE,
    -- 1 for the thread's first message, then without gaps.
    position            INTEGER NOT NULL CHECK (position > 0),
    role                TEXT    NOT NULL CHECK (role IN ('user', 'assistant')),
    content             TEXT    NOT NULL,
    -- A name, not a reference: a transcript outlives its runs.
    run_id              BLOB,
    upstream_message_id TEXT,
    created_at          INTEGER NOT NULL,
    PRIMARY KEY (thread_id, position)
) STRICT;

CREATE INDEX messages_by_run ON messages (run_id);

-- Sessions of gateway processes.
CREATE TABLE replicas (
    id         BLOB    NOT NULL PRIMARY KEY CHECK (length(id) = 16),
    address    TEXT    NOT NULL,
    started_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL
) STRICT;

-- What a stream of a run showed, so that it can be resumed.
CREATE TABLE run_events (
    run_id     BLOB    NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    n          INTEGER NOT NULL CHECK (n >= 0),
    event      TEXT    NOT NULL,
    created_at INTEGER NOT NULL,
    PRIMARY KEY (run_id, n)
) STRICT;

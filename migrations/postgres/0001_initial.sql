-- Threads, runs, transcripts, and what keeps them. `migrations/sqlite` holds the same numbers and names.
--
-- Written once, never edited after a release: a change is a further file. How to write one: docs/database.md.
--
-- There are no CHECK constraints, which would be compiled anew with every statement that inserts or updates: enumerations are
-- types, and the other rules are proved by tests/it/store_contract. There are foreign keys only where our own code cannot
-- hold the promise; what else hangs on a run or a thread is deleted along with it by the same transaction.

CREATE TYPE scope_kind AS ENUM ('user', 'session', 'topic');
CREATE TYPE thread_lifecycle AS ENUM ('current', 'archived', 'deleting');
-- What a deletion ends in.
CREATE TYPE thread_deletion AS ENUM ('archive', 'erase');
CREATE TYPE run_status AS ENUM (
    'queued', 'in_progress', 'requires_action', 'cancelling', 'completed', 'incomplete', 'failed', 'cancelled', 'expired'
);
CREATE TYPE run_strategy AS ENUM ('enqueue', 'reject', 'interrupt', 'rollback', 'merge');
CREATE TYPE message_role AS ENUM ('user', 'assistant');
-- Whether the upstream thread has a message. Missing ones are to be sent again, withheld ones never.
CREATE TYPE upstream_sync AS ENUM ('present', 'missing', 'withheld', 'unknown');
CREATE TYPE upstream_object AS ENUM ('thread', 'run');
CREATE TYPE api_access AS ENUM ('read', 'chat', 'admin', 'operator');

-- Which binaries a schema serves. Each migration adds its number and the oldest binary that still works with it, which a
-- binary goes by that does not know the migration.
CREATE TABLE schema_versions (
    version            bigint PRIMARY KEY,
    compatible_since   bigint NOT NULL
);
INSERT INTO schema_versions (version, compatible_since) VALUES (1, 1);

-- Key texts are compared byte for byte, hence COLLATE "C".
--
-- Every message updates its thread's row (counters, last_active_at, sometimes upstream_thread_id). No index holds any of these
-- columns and each page keeps room, so that such an update stays in its page and touches no index.
CREATE TABLE threads (
    id                      uuid             PRIMARY KEY,
    tenant                  text             COLLATE "C" NOT NULL,
    user_key                text             COLLATE "C" NOT NULL,
    scope_kind              scope_kind       NOT NULL,
    -- Empty for the user scope.
    scope_name              text             COLLATE "C" NOT NULL,
    upstream                text             NOT NULL,
    upstream_thread_id      text,
    lifecycle               thread_lifecycle NOT NULL,
    -- A name, not a reference: the thread before may be deleted first.
    previous_thread_id      uuid,
    metadata                jsonb            NOT NULL DEFAULT '{}',
    message_count           bigint           NOT NULL DEFAULT 0,
    -- Position of the newest message there ever was: messages can be removed.
    last_position           bigint           NOT NULL DEFAULT 0,
    -- Messages that are missing upstream.
    unsynced_messages       bigint           NOT NULL DEFAULT 0,
    run_count               bigint           NOT NULL DEFAULT 0,
    -- The run of which it is not known what it left upstream.
    unsettled_run           jsonb,
    created_at              timestamptz      NOT NULL,
    last_active_at          timestamptz      NOT NULL,
    -- When the conversation began that a rolled-over thread goes on with. NULL: with the thread itself. A request to delete
    -- means the conversation, whatever thread it is on by then.
    conversation_started_at timestamptz,
    -- Limits of its own replace the configured ones, both of them. When the thread expires follows from them and from
    -- created_at and last_active_at.
    max_age_ms              bigint,
    max_idle_ms             bigint,
    archived_at             timestamptz,
    -- When the janitor looks at the thread next: never before it is worth it, maybe too early. NULL: never.
    due_at                  timestamptz,
    -- Looks in a row that failed, and the last failure, for operators.
    attempts                bigint           NOT NULL DEFAULT 0,
    last_failure            text,
    -- It is to be rolled over before its next turn.
    rollover_pending        boolean          NOT NULL DEFAULT false,
    -- Last messages of the thread before with which its upstream thread begins, and how many of these are the user's.
    carried_messages        bigint           NOT NULL DEFAULT 0,
    carried_user_messages   bigint           NOT NULL DEFAULT 0,
    deletion                thread_deletion,
    -- The request that the deletion belongs to, if somebody made one.
    deletion_id             uuid,
    -- What is deleted upstream so far.
    upstream_cleanup        jsonb
) WITH (fillfactor = 70);

-- A key has at most one current thread.
CREATE UNIQUE INDEX threads_current ON threads (tenant, user_key, scope_kind, scope_name) WHERE lifecycle = 'current';
-- None of the others holds a column that a message writes. Ids sort by age, and lists are of a tenant, by id.
CREATE INDEX threads_by_key ON threads (tenant, user_key, scope_kind, scope_name, id);
CREATE INDEX threads_by_tenant ON threads (tenant, id);
CREATE INDEX threads_by_upstream ON threads (tenant, upstream, id);
CREATE INDEX threads_past ON threads (tenant, lifecycle, id) WHERE lifecycle <> 'current';
CREATE INDEX threads_by_previous ON threads (previous_thread_id) WHERE previous_thread_id IS NOT NULL;
CREATE INDEX threads_by_deletion ON threads (deletion_id) WHERE deletion_id IS NOT NULL;
CREATE INDEX threads_due ON threads (due_at) WHERE due_at IS NOT NULL;

-- Queue, lock and history in one.
CREATE TABLE runs (
    id                       uuid         PRIMARY KEY,
    thread_id                uuid         NOT NULL,
    -- 1 for the thread's first run, then without gaps.
    seq                      bigint       NOT NULL,
    -- The place in the queue is (priority, seq): 0, or less for a run that goes before all that waited when it came.
    priority                 bigint       NOT NULL DEFAULT 0,
    status                   run_status   NOT NULL,
    strategy                 run_strategy NOT NULL,
    assistant                text         NOT NULL,
    metadata                 jsonb        NOT NULL DEFAULT '{}',
    -- The user's messages while the run is queued; NULL from its start on, when they move into `messages`.
    queued_input             jsonb,
    -- A replica's id. Its row may be gone.
    owner                    uuid,
    fence                    bigint       NOT NULL,
    timeout_ms               bigint       NOT NULL,
    upstream_run_id          text,
    -- Where each of its rounds has an id of its own, the ids of those before: array of texts.
    earlier_upstream_run_ids jsonb,
    -- Requests whose answer was lost: each may have left something upstream that has no name here.
    unacknowledged_requests  bigint       NOT NULL DEFAULT 0,
    -- Its messages are to be removed when it ends, or were.
    rollback_pending         boolean      NOT NULL DEFAULT false,
    -- What it had said when it began to wait for tool outputs.
    partial_reply            jsonb,
    required_action          jsonb,
    -- Outputs that came for it, until it waits again or ends; and whether they may have been sent to the upstream.
    tool_outputs             jsonb,
    tool_outputs_sent        boolean      NOT NULL DEFAULT false,
    error                    jsonb,
    usage                    jsonb,
    created_at               timestamptz  NOT NULL,
    started_at               timestamptz,
    finished_at              timestamptz,
    deadline_at              timestamptz
);

-- A partial index whose predicate follows from the conditions of a statement may be read from end to end for it: that is the
-- cheapest plan while the index is thought to be tiny, and a connection keeps its plan. So only what looks runs up by their
-- thread says what `runs_active` and `runs_queued` say. What looks them up by id says the same by `queued_input` and
-- `finished_at`, and the predicate of `runs_by_owner` is spelled so that it follows from nothing but itself.

CREATE UNIQUE INDEX runs_by_thread ON runs (thread_id, seq);
-- The database itself refuses a second active run.
CREATE UNIQUE INDEX runs_active ON runs (thread_id) WHERE status IN ('in_progress', 'requires_action', 'cancelling');
-- The queue of a thread, in order.
CREATE INDEX runs_queued ON runs (thread_id, priority, seq) WHERE status = 'queued';
-- Whose unfinished runs there are: each replica looks for those of dead ones every second. A run changes hands rarely.
CREATE INDEX runs_by_owner ON runs (owner) WHERE COALESCE(finished_at, 'infinity') = 'infinity';

-- The transcript.
CREATE TABLE messages (
    id                  uuid          NOT NULL UNIQUE,
    thread_id           uuid          NOT NULL,
    -- 1 for the thread's first message, then ascending.
    position            bigint        NOT NULL,
    role                message_role  NOT NULL,
    content             jsonb         NOT NULL,
    -- A name, not a reference: a transcript outlives its runs.
    run_id              uuid,
    upstream_message_id text,
    upstream_sync       upstream_sync NOT NULL DEFAULT 'present',
    -- How its run ended, unless it completed.
    run_outcome         run_status,
    created_at          timestamptz   NOT NULL,
    PRIMARY KEY (thread_id, position)
);

CREATE INDEX messages_by_run ON messages (run_id);
-- What may have to be sent again. Empty for a thread on which all goes well.
CREATE INDEX messages_unsettled ON messages (thread_id, position)
    WHERE upstream_sync = 'missing' OR upstream_sync = 'unknown';

-- What a stream of a run showed, so that it can be resumed. An event takes as many offsets as its text has bytes, else one. Rows
-- may overlap: one that is written because the answer about another was lost says again what that one says.
CREATE TABLE run_events (
    run_id       uuid   NOT NULL,
    -- Offset of the first event of the row, and the one after its last.
    first_offset bigint NOT NULL,
    end_offset   bigint NOT NULL,
    -- Array of events, which may be empty.
    events       jsonb  NOT NULL,
    PRIMARY KEY (run_id, first_offset)
);

-- What a reader has not seen yet is what ends after what it has seen.
CREATE INDEX run_events_by_end ON run_events (run_id, end_offset);

-- Which run a caller's idempotency key stands for, within a conversation and across the threads that it had.
CREATE TABLE idempotency_keys (
    tenant       text        COLLATE "C" NOT NULL,
    user_key     text        COLLATE "C" NOT NULL,
    scope_kind   scope_kind  NOT NULL,
    scope_name   text        COLLATE "C" NOT NULL,
    key          text        COLLATE "C" NOT NULL,
    run_id       uuid        NOT NULL,
    -- SHA-256 of the request.
    request_hash bytea       NOT NULL,
    created_at   timestamptz NOT NULL,
    PRIMARY KEY (tenant, user_key, scope_kind, scope_name, key)
);

CREATE INDEX idempotency_keys_by_run ON idempotency_keys (run_id);
CREATE INDEX idempotency_keys_by_age ON idempotency_keys (created_at);

-- Sessions of gateway processes. Each renews its own row, which stays in its page as that of a thread does.
CREATE TABLE replicas (
    id         uuid        PRIMARY KEY,
    -- For operators.
    address    text        NOT NULL,
    expires_at timestamptz NOT NULL
) WITH (fillfactor = 50);

-- What is, or may be, at an upstream besides the threads' own: intended and never heard of again, given up, or responses of
-- runs that were pruned. A row that outlived its thread would never be looked at, hence the reference.
CREATE TABLE upstream_orphans (
    id          uuid            PRIMARY KEY,
    thread_id   uuid            NOT NULL REFERENCES threads (id) ON DELETE CASCADE,
    upstream    text            NOT NULL,
    kind        upstream_object NOT NULL,
    -- NULL: it was to be made, and nobody knows whether it was.
    upstream_id text,
    -- The replica that is making the upstream thread and will record its id here. While it lives nobody may take the thread
    -- for never made. NULL: nobody makes it (any more).
    created_by  uuid,
    -- When the janitor looks at it next. NULL: it goes with its thread.
    due_at      timestamptz,
    attempts    bigint          NOT NULL DEFAULT 0
);
CREATE INDEX upstream_orphans_by_thread ON upstream_orphans (thread_id);
CREATE INDEX upstream_orphans_due ON upstream_orphans (due_at) WHERE due_at IS NOT NULL;

-- Requests to delete, and what came of them. The key is kept until all is done.
CREATE TABLE deletions (
    id               uuid        PRIMARY KEY,
    tenant           text        COLLATE "C" NOT NULL,
    -- NULL once it is finished.
    user_key         text        COLLATE "C",
    -- Shows a finished receipt, which names nobody, to its user alone.
    user_fingerprint text        COLLATE "C",
    -- NULL: all that the user has.
    scope_kind       scope_kind,
    scope_name       text        COLLATE "C",
    archive          boolean     NOT NULL,
    requested_at     timestamptz NOT NULL,
    finished_at      timestamptz
);
CREATE INDEX deletions_unfinished ON deletions (tenant, user_key) WHERE finished_at IS NULL;
CREATE INDEX deletions_finished ON deletions (finished_at) WHERE finished_at IS NOT NULL;

-- One line of a receipt for each thread.
CREATE TABLE deleted_threads (
    deletion_id      uuid        NOT NULL REFERENCES deletions (id) ON DELETE CASCADE,
    thread_id        uuid        NOT NULL,
    upstream         text        NOT NULL,
    messages         bigint      NOT NULL,
    runs             bigint      NOT NULL,
    upstream_cleanup jsonb,
    finished_at      timestamptz NOT NULL,
    PRIMARY KEY (deletion_id, thread_id)
);

-- API keys. The key itself is not here: it is random enough that its SHA-256 tells nothing of it.
CREATE TABLE api_keys (
    id         uuid        PRIMARY KEY,
    -- The beginning of the key, by which it is found in lists and configurations.
    prefix     text        COLLATE "C" NOT NULL UNIQUE,
    hash       bytea       NOT NULL,
    tenant     text        COLLATE "C" NOT NULL,
    access     api_access  NOT NULL,
    label      text        NOT NULL,
    created_at timestamptz NOT NULL,
    revoked_at timestamptz
);

-- The key of the HMAC that stands for names where they must not be read, one for the database. The first process makes it.
CREATE TABLE fingerprint_key (
    id     smallint PRIMARY KEY,
    secret bytea    NOT NULL
);

-- Threads, runs, transcripts, and what keeps them. `migrations/postgres` holds the same numbers and names, and the reasons.
--
-- Written once, never edited after a release: a change is a further file. How to write one: docs/database.md.
--
-- Ids are the 16 bytes of a UUID, times are milliseconds since 1970, JSON is text. Text compares byte for byte.

CREATE TABLE schema_versions (
    version                  INTEGER NOT NULL PRIMARY KEY,
    compatible_since         INTEGER NOT NULL
) STRICT;
INSERT INTO schema_versions (version, compatible_since) VALUES (1, 1);

CREATE TABLE threads (
    id                       BLOB    NOT NULL PRIMARY KEY,
    tenant                   TEXT    NOT NULL,
    user_key                 TEXT    NOT NULL,
    scope_kind               TEXT    NOT NULL CHECK (scope_kind IN ('user', 'session', 'topic')),
    scope_name               TEXT    NOT NULL,
    upstream                 TEXT    NOT NULL,
    upstream_thread_id       TEXT,
    lifecycle                TEXT    NOT NULL CHECK (lifecycle IN ('current', 'archived', 'deleting')),
    previous_thread_id       BLOB,
    metadata                 TEXT    NOT NULL DEFAULT '{}',
    message_count            INTEGER NOT NULL DEFAULT 0,
    last_position            INTEGER NOT NULL DEFAULT 0,
    unsynced_messages        INTEGER NOT NULL DEFAULT 0,
    run_count                INTEGER NOT NULL DEFAULT 0,
    unsettled_run            TEXT,
    created_at               INTEGER NOT NULL,
    last_active_at           INTEGER NOT NULL,
    conversation_started_at  INTEGER,
    max_age_ms               INTEGER,
    max_idle_ms              INTEGER,
    archived_at              INTEGER,
    due_at                   INTEGER,
    attempts                 INTEGER NOT NULL DEFAULT 0,
    last_failure             TEXT,
    rollover_pending         INTEGER NOT NULL DEFAULT 0,
    carried_messages         INTEGER NOT NULL DEFAULT 0,
    carried_user_messages    INTEGER NOT NULL DEFAULT 0,
    deletion                 TEXT    CHECK (deletion IN ('archive', 'erase')),
    deletion_id              BLOB,
    upstream_cleanup         TEXT
) STRICT;

CREATE UNIQUE INDEX threads_current ON threads (tenant, user_key, scope_kind, scope_name) WHERE lifecycle = 'current';
CREATE INDEX threads_by_key ON threads (tenant, user_key, scope_kind, scope_name, id);
CREATE INDEX threads_by_tenant ON threads (tenant, id);
CREATE INDEX threads_by_upstream ON threads (tenant, upstream, id);
CREATE INDEX threads_past ON threads (tenant, lifecycle, id) WHERE lifecycle <> 'current';
CREATE INDEX threads_by_previous ON threads (previous_thread_id) WHERE previous_thread_id IS NOT NULL;
CREATE INDEX threads_by_deletion ON threads (deletion_id) WHERE deletion_id IS NOT NULL;
CREATE INDEX threads_due ON threads (due_at) WHERE due_at IS NOT NULL;

CREATE TABLE runs (
    id                       BLOB    NOT NULL PRIMARY KEY,
    thread_id                BLOB    NOT NULL,
    seq                      INTEGER NOT NULL,
    priority                 INTEGER NOT NULL DEFAULT 0,
    status                   TEXT    NOT NULL CHECK (status IN ('queued', 'in_progress', 'requires_action', 'cancelling', 'completed', 'incomplete', 'failed', 'cancelled', 'expired')),
    strategy                 TEXT    NOT NULL CHECK (strategy IN ('enqueue', 'reject', 'interrupt', 'rollback', 'merge')),
    assistant                TEXT    NOT NULL,
    metadata                 TEXT    NOT NULL DEFAULT '{}',
    queued_input             TEXT,
    owner                    BLOB,
    fence                    INTEGER NOT NULL,
    timeout_ms               INTEGER NOT NULL,
    upstream_run_id          TEXT,
    earlier_upstream_run_ids TEXT,
    unacknowledged_requests  INTEGER NOT NULL DEFAULT 0,
    rollback_pending         INTEGER NOT NULL DEFAULT 0,
    partial_reply            TEXT,
    required_action          TEXT,
    tool_outputs             TEXT,
    tool_outputs_sent        INTEGER NOT NULL DEFAULT 0,
    error                    TEXT,
    usage                    TEXT,
    created_at               INTEGER NOT NULL,
    started_at               INTEGER,
    finished_at              INTEGER,
    deadline_at              INTEGER
) STRICT;

-- First: of the indexes that serve a condition SQLite takes the one that was made last.
CREATE UNIQUE INDEX runs_by_thread ON runs (thread_id, seq);
CREATE UNIQUE INDEX runs_active ON runs (thread_id) WHERE status IN ('in_progress', 'requires_action', 'cancelling');
CREATE INDEX runs_queued ON runs (thread_id, priority, seq) WHERE status = 'queued';
CREATE INDEX runs_by_owner ON runs (owner) WHERE finished_at IS NULL;

CREATE TABLE messages (
    id                       BLOB    NOT NULL UNIQUE,
    thread_id                BLOB    NOT NULL,
    position                 INTEGER NOT NULL,
    role                     TEXT    NOT NULL CHECK (role IN ('user', 'assistant')),
    content                  TEXT    NOT NULL,
    run_id                   BLOB,
    upstream_message_id      TEXT,
    upstream_sync            TEXT    NOT NULL DEFAULT 'present' CHECK (upstream_sync IN ('present', 'missing', 'withheld', 'unknown')),
    run_outcome              TEXT    CHECK (run_outcome IN ('queued', 'in_progress', 'requires_action', 'cancelling', 'completed', 'incomplete', 'failed', 'cancelled', 'expired')),
    created_at               INTEGER NOT NULL,
    PRIMARY KEY (thread_id, position)
) STRICT;

CREATE INDEX messages_by_run ON messages (run_id);
CREATE INDEX messages_unsettled ON messages (thread_id, position)
    WHERE upstream_sync = 'missing' OR upstream_sync = 'unknown';

CREATE TABLE run_events (
    run_id                   BLOB    NOT NULL,
    first_offset             INTEGER NOT NULL,
    end_offset               INTEGER NOT NULL,
    events                   TEXT    NOT NULL,
    PRIMARY KEY (run_id, first_offset)
) STRICT;

CREATE INDEX run_events_by_end ON run_events (run_id, end_offset);

CREATE TABLE idempotency_keys (
    tenant                   TEXT    NOT NULL,
    user_key                 TEXT    NOT NULL,
    scope_kind               TEXT    NOT NULL CHECK (scope_kind IN ('user', 'session', 'topic')),
    scope_name               TEXT    NOT NULL,
    key                      TEXT    NOT NULL,
    run_id                   BLOB    NOT NULL,
    request_hash             BLOB    NOT NULL,
    created_at               INTEGER NOT NULL,
    PRIMARY KEY (tenant, user_key, scope_kind, scope_name, key)
) STRICT;

CREATE INDEX idempotency_keys_by_run ON idempotency_keys (run_id);
CREATE INDEX idempotency_keys_by_age ON idempotency_keys (created_at);

CREATE TABLE replicas (
    id                       BLOB    NOT NULL PRIMARY KEY,
    address                  TEXT    NOT NULL,
    expires_at               INTEGER NOT NULL
) STRICT;

CREATE TABLE upstream_orphans (
    id                       BLOB    NOT NULL PRIMARY KEY,
    thread_id                BLOB    NOT NULL REFERENCES threads (id) ON DELETE CASCADE,
    upstream                 TEXT    NOT NULL,
    kind                     TEXT    NOT NULL CHECK (kind IN ('thread', 'run')),
    upstream_id              TEXT,
    created_by               BLOB,
    due_at                   INTEGER,
    attempts                 INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX upstream_orphans_by_thread ON upstream_orphans (thread_id);
CREATE INDEX upstream_orphans_due ON upstream_orphans (due_at) WHERE due_at IS NOT NULL;

CREATE TABLE deletions (
    id                       BLOB    NOT NULL PRIMARY KEY,
    tenant                   TEXT    NOT NULL,
    user_key                 TEXT,
    user_fingerprint         TEXT,
    scope_kind               TEXT    CHECK (scope_kind IN ('user', 'session', 'topic')),
    scope_name               TEXT,
    archive                  INTEGER NOT NULL,
    requested_at             INTEGER NOT NULL,
    finished_at              INTEGER
) STRICT;
CREATE INDEX deletions_unfinished ON deletions (tenant, user_key) WHERE finished_at IS NULL;
CREATE INDEX deletions_finished ON deletions (finished_at) WHERE finished_at IS NOT NULL;

CREATE TABLE deleted_threads (
    deletion_id              BLOB    NOT NULL REFERENCES deletions (id) ON DELETE CASCADE,
    thread_id                BLOB    NOT NULL,
    upstream                 TEXT    NOT NULL,
    messages                 INTEGER NOT NULL,
    runs                     INTEGER NOT NULL,
    upstream_cleanup         TEXT,
    finished_at              INTEGER NOT NULL,
    PRIMARY KEY (deletion_id, thread_id)
) STRICT;

CREATE TABLE api_keys (
    id                       BLOB    NOT NULL PRIMARY KEY,
    prefix                   TEXT    NOT NULL UNIQUE,
    hash                     BLOB    NOT NULL,
    tenant                   TEXT    NOT NULL,
    access                   TEXT    NOT NULL CHECK (access IN ('read', 'chat', 'admin', 'operator')),
    label                    TEXT    NOT NULL,
    created_at               INTEGER NOT NULL,
    revoked_at               INTEGER
) STRICT;

CREATE TABLE fingerprint_key (
    id                       INTEGER NOT NULL PRIMARY KEY,
    secret                   BLOB    NOT NULL
) STRICT;

-- The life of a thread. `migrations/postgres` holds the same numbers and names, and the reasons.

ALTER TABLE threads ADD COLUMN max_age_ms INTEGER CHECK (max_age_ms >= 0);
ALTER TABLE threads ADD COLUMN max_idle_ms INTEGER CHECK (max_idle_ms >= 0);
UPDATE threads SET max_age_ms = max(0, expires_at - created_at) WHERE expires_at IS NOT NULL;
ALTER TABLE threads DROP COLUMN expires_at;

ALTER TABLE threads ADD COLUMN archived_at INTEGER;
-- When the janitor looks at the thread next. NULL: never.
ALTER TABLE threads ADD COLUMN due_at INTEGER;
-- Looks in a row that failed, and the last failure.
ALTER TABLE threads ADD COLUMN attempts INTEGER NOT NULL DEFAULT 0;
ALTER TABLE threads ADD COLUMN last_failure TEXT;
-- It is to be rolled over before its next turn.
ALTER TABLE threads ADD COLUMN rolls INTEGER NOT NULL DEFAULT 0 CHECK (rolls IN (0, 1));
-- Last messages of the thread before, with which its upstream thread begins; and how many of these are the user's.
ALTER TABLE threads ADD COLUMN carried INTEGER NOT NULL DEFAULT 0 CHECK (carried >= 0);
ALTER TABLE threads ADD COLUMN carried_users INTEGER NOT NULL DEFAULT 0 CHECK (carried_users >= 0);
-- What a deletion ends in, and the request that it belongs to.
ALTER TABLE threads ADD COLUMN deletion TEXT CHECK (deletion IN ('archive', 'erase'));
ALTER TABLE threads ADD COLUMN deletion_id BLOB;
-- What is deleted upstream so far.
ALTER TABLE threads ADD COLUMN removed TEXT;
UPDATE threads SET archived_at = last_active_at, due_at = last_active_at WHERE lifecycle = 'archived';

CREATE INDEX threads_due ON threads (due_at) WHERE due_at IS NOT NULL;
CREATE INDEX threads_by_key ON threads (tenant, user_key, scope_kind, scope_name, id);
CREATE INDEX threads_by_upstream ON threads (upstream, id);
CREATE INDEX threads_past ON threads (lifecycle, id) WHERE lifecycle <> 'current';
CREATE INDEX threads_by_previous ON threads (previous_thread) WHERE previous_thread IS NOT NULL;
CREATE INDEX threads_by_deletion ON threads (deletion_id) WHERE deletion_id IS NOT NULL;

-- Earlier ids of a run at the upstream, where each of its rounds has one of its own: JSON array of texts.
ALTER TABLE runs ADD COLUMN earlier_upstream_runs TEXT;

CREATE INDEX idempotency_keys_by_age ON idempotency_keys (created_at);

-- What is, or may be, at an upstream besides the threads' own.
CREATE TABLE remnants (
    id          BLOB    NOT NULL PRIMARY KEY CHECK (length(id) = 16),
    thread_id   BLOB    NOT NULL REFERENCES threads (id) ON DELETE CASCADE,
    upstream    TEXT    NOT NULL,
    kind        TEXT    NOT NULL CHECK (kind IN ('thread', 'run')),
    -- NULL: it was to be made, and nobody knows whether it was.
    upstream_id TEXT,
    created_at  INTEGER NOT NULL,
    -- When the janitor looks at it next. NULL: it goes with its thread.
    due_at      INTEGER,
    attempts    INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX remnants_by_thread ON remnants (thread_id);
CREATE INDEX remnants_due ON remnants (due_at) WHERE due_at IS NOT NULL;

-- Requests to delete, and what came of them. The key is kept until all is done.
CREATE TABLE deletions (
    id           BLOB    NOT NULL PRIMARY KEY CHECK (length(id) = 16),
    tenant       TEXT    NOT NULL,
    -- NULL once it is finished.
    user_key     TEXT,
    -- NULL: all that the user has.
    scope_kind   TEXT,
    scope_name   TEXT,
    archive      INTEGER NOT NULL CHECK (archive IN (0, 1)),
    requested_at INTEGER NOT NULL,
    finished_at  INTEGER
) STRICT;
CREATE INDEX deletions_unfinished ON deletions (tenant, user_key) WHERE finished_at IS NULL;
CREATE INDEX deletions_finished ON deletions (finished_at) WHERE finished_at IS NOT NULL;

-- One line of a receipt for each thread.
CREATE TABLE deleted_threads (
    deletion_id BLOB    NOT NULL REFERENCES deletions (id) ON DELETE CASCADE,
    thread_id   BLOB    NOT NULL,
    upstream    TEXT    NOT NULL,
    messages    INTEGER NOT NULL,
    runs        INTEGER NOT NULL,
    removed     TEXT,
    archived    INTEGER NOT NULL CHECK (archived IN (0, 1)),
    finished_at INTEGER NOT NULL,
    PRIMARY KEY (deletion_id, thread_id)
) STRICT;

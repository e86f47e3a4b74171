-- The life of a thread: expiry, archive, rollover, deletion, and what is left at the upstreams.

-- When a thread expires follows from its limits and from `created_at` and `last_active_at`, so that no message has to
-- write it and a new configuration holds at once. Limits of its own replace the configured ones, both of them.
ALTER TABLE threads
    ADD COLUMN max_age_ms  bigint CHECK (max_age_ms >= 0),
    ADD COLUMN max_idle_ms bigint CHECK (max_idle_ms >= 0);
UPDATE threads SET max_age_ms = GREATEST(0, EXTRACT(epoch FROM expires_at - created_at) * 1000)::bigint
    WHERE expires_at IS NOT NULL;
ALTER TABLE threads DROP COLUMN expires_at;

ALTER TABLE threads
    ADD COLUMN archived_at   timestamptz,
    -- When the janitor looks at the thread next; never before it is worth it, maybe too early: a message does not
    -- write it. NULL: never.
    ADD COLUMN due_at        timestamptz,
    -- Looks in a row that failed, and the last failure, for operators.
    ADD COLUMN attempts      bigint  NOT NULL DEFAULT 0,
    ADD COLUMN last_failure  text,
    -- It is to be rolled over before its next turn.
    ADD COLUMN rolls         boolean NOT NULL DEFAULT false,
    -- Last messages of the thread before, with which its upstream thread begins; and how many of these are the user's,
    -- as they stand upstream.
    ADD COLUMN carried       bigint  NOT NULL DEFAULT 0 CHECK (carried >= 0),
    ADD COLUMN carried_users bigint  NOT NULL DEFAULT 0 CHECK (carried_users >= 0),
    -- What a deletion ends in.
    ADD COLUMN deletion      text CHECK (deletion IN ('archive', 'erase')),
    -- The request that it belongs to, if somebody made one.
    ADD COLUMN deletion_id   uuid,
    -- What is deleted upstream so far.
    ADD COLUMN removed       jsonb;
UPDATE threads SET archived_at = last_active_at, due_at = now() WHERE lifecycle = 'archived';
ALTER TABLE threads
    ADD CONSTRAINT archived_has_time CHECK (lifecycle <> 'archived' OR archived_at IS NOT NULL),
    ADD CONSTRAINT deleting_has_end CHECK ((lifecycle = 'deleting') = (deletion IS NOT NULL));

-- None of these indexes holds a column that a message writes.
CREATE INDEX threads_due ON threads (due_at) WHERE due_at IS NOT NULL;
-- All threads of a user, and all that a key ever had: ids sort by age.
CREATE INDEX threads_by_key ON threads (tenant, user_key, scope_kind, scope_name, id);
CREATE INDEX threads_by_upstream ON threads (upstream, id);
CREATE INDEX threads_past ON threads (lifecycle, id) WHERE lifecycle <> 'current';
CREATE INDEX threads_by_previous ON threads (previous_thread) WHERE previous_thread IS NOT NULL;
CREATE INDEX threads_by_deletion ON threads (deletion_id) WHERE deletion_id IS NOT NULL;

-- Earlier ids of a run at the upstream, where each of its rounds has one of its own: array of texts.
ALTER TABLE runs ADD COLUMN earlier_upstream_runs jsonb;

CREATE INDEX idempotency_keys_by_age ON idempotency_keys (created_at);

-- What is, or may be, at an upstream besides the threads' own: intended and never heard of again, given up, or
-- responses of runs that were pruned.
CREATE TABLE remnants (
    id          uuid        PRIMARY KEY,
    thread_id   uuid        NOT NULL REFERENCES threads (id) ON DELETE CASCADE,
    upstream    text        NOT NULL,
    kind        text        NOT NULL CHECK (kind IN ('thread', 'run')),
    -- NULL: it was to be made, and nobody knows whether it was.
    upstream_id text,
    created_at  timestamptz NOT NULL,
    -- When the janitor looks at it next. NULL: it goes with its thread.
    due_at      timestamptz,
    attempts    bigint      NOT NULL DEFAULT 0
);
CREATE INDEX remnants_by_thread ON remnants (thread_id);
CREATE INDEX remnants_due ON remnants (due_at) WHERE due_at IS NOT NULL;

-- Requests to delete, and what came of them. The key is kept until all is done.
CREATE TABLE deletions (
    id           uuid        PRIMARY KEY,
    tenant       text        COLLATE "C" NOT NULL,
    -- NULL once it is finished.
    user_key     text        COLLATE "C",
    -- NULL: all that the user has.
    scope_kind   text        COLLATE "C",
    scope_name   text        COLLATE "C",
    archive      boolean     NOT NULL,
    requested_at timestamptz NOT NULL,
    finished_at  timestamptz
);
CREATE INDEX deletions_unfinished ON deletions (tenant, user_key) WHERE finished_at IS NULL;
CREATE INDEX deletions_finished ON deletions (finished_at) WHERE finished_at IS NOT NULL;

-- One line of a receipt for each thread.
CREATE TABLE deleted_threads (
    deletion_id uuid        NOT NULL REFERENCES deletions (id) ON DELETE CASCADE,
    thread_id   uuid        NOT NULL,
    upstream    text        NOT NULL,
    messages    bigint      NOT NULL,
    runs        bigint      NOT NULL,
    removed     jsonb,
    archived    boolean     NOT NULL,
    finished_at timestamptz NOT NULL,
    PRIMARY KEY (deletion_id, thread_id)
);

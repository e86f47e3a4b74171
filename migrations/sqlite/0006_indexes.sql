-- Indexes that serve one kind of look-up. `migrations/postgres` holds the same numbers and names, and the reasons.

DROP INDEX runs_unfinished;
CREATE INDEX runs_by_owner ON runs (owner) WHERE finished_at IS NULL;

CREATE INDEX threads_by_tenant ON threads (tenant, id);
DROP INDEX threads_by_upstream;
CREATE INDEX threads_by_upstream ON threads (tenant, upstream, id);
DROP INDEX threads_past;
CREATE INDEX threads_past ON threads (tenant, lifecycle, id) WHERE lifecycle <> 'current';

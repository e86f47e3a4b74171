-- Indexes that serve one kind of look-up, and no statement that looks for something else.
--
-- A partial index whose predicate follows from the conditions of a statement may be read from end to end for it: that is the
-- cheapest plan while the index is thought to be tiny, and a connection keeps its plan. So only what looks runs up by their
-- thread says what `runs_active` and `runs_queued` say. What looks them up by id says the same by `input` and `finished_at`,
-- and the predicate of `runs_by_owner` is spelled so that it follows from nothing but itself.

DROP INDEX runs_by_owner;
CREATE INDEX runs_by_owner ON runs (owner) WHERE COALESCE(finished_at, 'infinity') = 'infinity';
-- What is unfinished on a thread is found by `runs_active` and `runs_queued` together.
DROP INDEX runs_unfinished;

-- Lists are of a tenant, in the order of ids.
CREATE INDEX threads_by_tenant ON threads (tenant, id);
DROP INDEX threads_by_upstream;
CREATE INDEX threads_by_upstream ON threads (tenant, upstream, id);
DROP INDEX threads_past;
CREATE INDEX threads_past ON threads (tenant, lifecycle, id) WHERE lifecycle <> 'current';

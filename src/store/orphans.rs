//! Upstream orphans: threads and runs that are, or may be, at an upstream, and that no thread
//! uses.

use std::time::Duration;

use sqlx::FromRow;
use sqlx::types::Json;
use uuid::Uuid;

use super::params::params;
use super::rows::{corrupt, millis};
use super::statement::Statement;
use super::values::ORPHAN_AFTER;
use super::{RunLease, Store, StoreError};
use crate::domain::{OrphanId, RunId, ThreadId, UpstreamThreadId};

static LIST_OF_THREAD: Statement = Statement::new(
    "orphans.list_of_thread",
    "SELECT {upstream_orphan o}
    FROM upstream_orphans o
    WHERE o.thread_id = :thread
    ORDER BY o.id
    LIMIT :limit",
);

static LIST_OF_RUNS: Statement = Statement::new(
    "orphans.list_of_runs",
    "SELECT r.id, t.upstream, r.upstream_run_id, r.earlier_upstream_run_ids
    FROM threads t JOIN runs r ON r.thread_id = t.id
    WHERE t.id = :thread AND (r.upstream_run_id IS NOT NULL OR r.earlier_upstream_run_ids IS NOT NULL)
    ORDER BY r.seq
    LIMIT :limit",
);

static COUNT_UNACKNOWLEDGED: Statement = Statement::new(
    "orphans.count_unacknowledged",
    "SELECT CAST(COALESCE(sum(r.unacknowledged_requests), 0) AS bigint)
    FROM runs r
    WHERE r.thread_id = :thread",
);

static INTEND: Statement = Statement::new(
    "orphans.intend",
    "WITH lease AS MATERIALIZED (
        SELECT r.thread_id, r.owner FROM runs r WHERE {leased r} AND {at_work r} {lock_shared r}
    )
    INSERT INTO upstream_orphans (id, thread_id, upstream, kind, created_by, due_at)
    SELECT :intent, t.id, t.upstream, 'thread', l.owner, {now} + {ms :orphan_after}
    FROM lease l JOIN threads t ON t.id = l.thread_id
    WHERE true
    ON CONFLICT (id) DO UPDATE SET due_at = excluded.due_at",
);

static IS_MADE: Statement = Statement::new(
    "orphans.is_made",
    "SELECT EXISTS (
        SELECT 1 FROM upstream_orphans o JOIN replicas p ON p.id = o.created_by
        WHERE o.thread_id = :thread AND o.upstream_id IS NULL AND o.due_at > {now} AND p.expires_at > {now}
    )",
);

static RESOLVE_NOTHING: Statement = Statement::new(
    "orphans.resolve_nothing",
    "DELETE FROM upstream_orphans WHERE id = :intent",
);

static RESOLVE_UNUSED: Statement = Statement::new(
    "orphans.resolve_unused",
    "UPDATE upstream_orphans SET upstream_id = :upstream_id, due_at = {now} WHERE id = :intent",
);

// A request that was sent may still take effect, so `due_at` stays.
static RESOLVE_UNKNOWN: Statement = Statement::new(
    "orphans.resolve_unknown",
    "UPDATE upstream_orphans SET created_by = NULL WHERE id = :intent",
);

/// A thread on trial is a run's as long as the run is active.
const DUE_ORPHANS: &str = "SELECT {upstream_orphan o}
    FROM upstream_orphans o
    WHERE o.due_at <= {now}
        AND (o.upstream_id IS NULL OR o.upstream_id IS DISTINCT FROM (
            SELECT r.recovery -> 'trial' ->> 'thread' FROM runs r WHERE r.thread_id = o.thread_id AND {active r}
        ))
    ORDER BY o.due_at
    LIMIT :limit {0}";

static LIST_DUE: Statement = Statement::variant("orphans.list_due", DUE_ORPHANS, &[""]);

static LOCK_DUE: Statement =
    Statement::variant("orphans.lock_due", DUE_ORPHANS, &["{lock_if_free o}"]);

static LEASE_DUE: Statement = Statement::new(
    "orphans.lease_due",
    "UPDATE upstream_orphans SET created_by = NULL, due_at = {now} + {ms :lease} WHERE id {in :orphans}",
);

static FORGET: Statement = Statement::new(
    "orphans.forget",
    "DELETE FROM upstream_orphans WHERE id = :orphan AND upstream_id IS NOT DISTINCT FROM :knew",
);

static PUT_OFF: Statement = Statement::new(
    "orphans.put_off",
    "UPDATE upstream_orphans SET attempts = attempts + 1, due_at = {now} + {ms :after}
    WHERE id = :orphan AND upstream_id IS NOT DISTINCT FROM :knew",
);

static KEEP: Statement = Statement::new(
    "orphans.keep",
    "UPDATE upstream_orphans SET due_at = NULL
    WHERE id = :orphan AND upstream_id IS NOT DISTINCT FROM :knew",
);

pub(super) static STATEMENTS: &[&Statement] = &[
    &LIST_OF_THREAD,
    &LIST_OF_RUNS,
    &COUNT_UNACKNOWLEDGED,
    &INTEND,
    &IS_MADE,
    &RESOLVE_NOTHING,
    &RESOLVE_UNUSED,
    &RESOLVE_UNKNOWN,
    &LIST_DUE,
    &LOCK_DUE,
    &LEASE_DUE,
    &FORGET,
    &PUT_OFF,
    &KEEP,
];

impl Store {
    /// Returns up to `limit` upstream orphans of a thread. `with_runs`: also the ids that its runs
    /// have at the upstream.
    ///
    /// All ids of a run come together, since they are forgotten together. So the result may exceed
    /// the limit if a single run has more ids.
    pub async fn upstream_orphans(
        &self,
        thread: ThreadId,
        with_runs: bool,
        limit: u32,
    ) -> Result<Vec<UpstreamOrphan>, StoreError> {
        let mut c = self.backend.reader().await?;
        let values = params().set("thread", thread.uuid()).set("limit", limit);
        let rows: Vec<UpstreamOrphanRow> = c.all(&LIST_OF_THREAD, values).await?;
        let mut found = rows
            .into_iter()
            .map(UpstreamOrphan::try_from)
            .collect::<Result<Vec<_>, _>>()?;
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        if !with_runs || found.len() >= limit {
            return Ok(found);
        }
        let room = i64::try_from(limit - found.len()).unwrap_or(i64::MAX);
        let values = params().set("thread", thread.uuid()).set("limit", room);
        let runs: Vec<IdsOfRunRow> = c.all(&LIST_OF_RUNS, values).await?;
        for IdsOfRunRow {
            id: run,
            upstream,
            upstream_run_id,
            earlier_upstream_run_ids,
        } in runs
        {
            let of_run: Vec<_> = upstream_ids(upstream_run_id, earlier_upstream_run_ids)
                .map(|id| UpstreamOrphan {
                    name: OrphanName::Run(RunId::from_uuid(run)),
                    thread,
                    upstream: upstream.clone(),
                    kind: OrphanKind::Run,
                    upstream_id: Some(id),
                    attempts: 0,
                })
                .collect();
            if !found.is_empty() && found.len() + of_run.len() > limit {
                break;
            }
            found.extend(of_run);
        }
        Ok(found)
    }

    /// Records the intent to create an upstream thread for the thread of a run. Returns `false` if
    /// the lease was lost. Harmless to repeat.
    pub async fn intend(&self, lease: &RunLease, intent: OrphanId) -> Result<bool, StoreError> {
        let mut c = self.backend.vital_writer().await?;
        let values = params()
            .set("run", lease.run_id.uuid())
            .set("fence", lease.fence)
            .set("intent", intent.uuid())
            .set("orphan_after", millis(ORPHAN_AFTER));
        Ok(c.execute(&INTEND, values).await? == 1)
    }

    /// Returns whether a live replica is creating an upstream thread for the thread, and will
    /// record its id. That is so from [`intend`](Self::intend) until the new thread is bound or
    /// the intent [resolved](Self::resolve), for [`ORPHAN_AFTER`] at most.
    pub async fn makes_upstream_thread(&self, thread: ThreadId) -> Result<bool, StoreError> {
        let mut c = self.backend.reader().await?;
        let (makes,): (bool,) = c
            .one(&IS_MADE, params().set("thread", thread.uuid()))
            .await?;
        Ok(makes)
    }

    /// Records the outcome of an intent that did not end in a [bound](Store::bind_upstream_thread)
    /// upstream thread.
    pub async fn resolve(&self, intent: OrphanId, made: Made<'_>) -> Result<(), StoreError> {
        let mut c = self.backend.vital_writer().await?;
        let (statement, id) = match made {
            Made::Nothing => (&RESOLVE_NOTHING, None),
            Made::Unused(id) => (&RESOLVE_UNUSED, Some(id)),
            Made::Unknown => (&RESOLVE_UNKNOWN, None),
        };
        let id = id.map(UpstreamThreadId::as_str);
        c.execute(
            statement,
            params().set("intent", intent.uuid()).set("upstream_id", id),
        )
        .await?;
        Ok(())
    }

    /// Leases up to `limit` upstream orphans that are due: those that were given up, and intents
    /// without an outcome for a while. They are due again only after `lease`, as in
    /// [`lease_due_threads`](Self::lease_due_threads).
    pub async fn lease_upstream_orphans(
        &self,
        limit: u32,
        lease: Duration,
    ) -> Result<Vec<UpstreamOrphan>, StoreError> {
        let mut c = self.backend.writer().await?;
        c.begin().await?;
        let rows: Vec<UpstreamOrphanRow> = c.all(&LOCK_DUE, params().set("limit", limit)).await?;
        let orphans: Vec<Uuid> = rows.iter().map(|row| row.o_id).collect();
        c.execute(
            &LEASE_DUE,
            params().set("orphans", orphans).set("lease", millis(lease)),
        )
        .await?;
        c.commit().await?;
        rows.into_iter().map(UpstreamOrphan::try_from).collect()
    }

    /// Returns up to `limit` upstream orphans that are due, and changes nothing.
    pub async fn due_upstream_orphans(
        &self,
        limit: u32,
    ) -> Result<Vec<UpstreamOrphan>, StoreError> {
        let mut c = self.backend.reader().await?;
        let rows: Vec<UpstreamOrphanRow> = c.all(&LIST_DUE, params().set("limit", limit)).await?;
        rows.into_iter().map(UpstreamOrphan::try_from).collect()
    }

    /// Deletes the row of an upstream orphan (`after` is `None`), or sets when it is due next and
    /// counts the attempt. `knew` is the [`upstream_id`](UpstreamOrphan::upstream_id) that the
    /// caller read. If another process has recorded a different one since, nothing changes.
    pub async fn reschedule_upstream_orphan(
        &self,
        id: OrphanId,
        knew: Option<&str>,
        after: Option<Duration>,
    ) -> Result<(), StoreError> {
        let mut c = self.backend.writer().await?;
        let statement = if after.is_some() { &PUT_OFF } else { &FORGET };
        let values = params()
            .set("orphan", id.uuid())
            .set("knew", knew)
            .set("after", after.map(millis));
        c.execute(statement, values).await?;
        Ok(())
    }

    /// Keeps an upstream orphan until its thread is deleted, and reports it in the thread's
    /// receipt. For an orphan that cannot be deleted now: its upstream id is unknown, the server
    /// does not delete it, or deleting failed for too long.
    ///
    /// `knew` is the [`upstream_id`](UpstreamOrphan::upstream_id) that the caller read. If it has
    /// changed since, nothing changes.
    pub async fn keep_upstream_orphan(
        &self,
        id: OrphanId,
        knew: Option<&str>,
    ) -> Result<(), StoreError> {
        let mut c = self.backend.writer().await?;
        c.execute(&KEEP, params().set("orphan", id.uuid()).set("knew", knew))
            .await?;
        Ok(())
    }

    /// Returns how many requests for runs of a thread may have left something upstream under an id
    /// that the gateway never received. The process died, or the answer broke off, before the id
    /// arrived. The run then [ended](super::RunEnd::unacknowledged_requests), or its request was
    /// [sent again](Store::sends_again).
    pub async fn unacknowledged_requests(&self, thread: ThreadId) -> Result<u64, StoreError> {
        let mut c = self.backend.reader().await?;
        let (count,): (i64,) = c
            .one(&COUNT_UNACKNOWLEDGED, params().set("thread", thread.uuid()))
            .await?;
        Ok(count.try_into().unwrap_or(0))
    }
}

#[derive(FromRow)]
#[expect(clippy::struct_field_names, reason = "the names of the columns")]
struct UpstreamOrphanRow {
    o_id: Uuid,
    o_thread_id: Uuid,
    o_upstream: String,
    o_kind: String,
    o_upstream_id: Option<String>,
    o_attempts: i64,
}

impl TryFrom<UpstreamOrphanRow> for UpstreamOrphan {
    type Error = StoreError;

    fn try_from(row: UpstreamOrphanRow) -> Result<Self, StoreError> {
        Ok(Self {
            name: OrphanName::Row(OrphanId::from_uuid(row.o_id)),
            thread: ThreadId::from_uuid(row.o_thread_id),
            upstream: row.o_upstream,
            kind: match &*row.o_kind {
                "thread" => OrphanKind::Thread,
                "run" => OrphanKind::Run,
                _ => return Err(corrupt("the kind of an upstream orphan")),
            },
            upstream_id: row.o_upstream_id,
            attempts: row.o_attempts,
        })
    }
}

#[derive(FromRow)]
struct IdsOfRunRow {
    id: Uuid,
    upstream: String,
    upstream_run_id: Option<String>,
    earlier_upstream_run_ids: Option<Json<Vec<String>>>,
}

/// Returns all ids that a run has upstream, the earliest first.
pub(super) fn upstream_ids(
    newest: Option<String>,
    earlier: Option<Json<Vec<String>>>,
) -> impl Iterator<Item = String> {
    earlier
        .map(|json| json.0)
        .unwrap_or_default()
        .into_iter()
        .chain(newest)
}

/// An object that exists, or may exist, at an upstream.
#[derive(Clone, Debug, PartialEq)]
pub struct UpstreamOrphan {
    pub name: OrphanName,
    pub thread: ThreadId,
    pub upstream: String,
    pub kind: OrphanKind,
    /// `None`: it was to be created, and it is unknown whether it was.
    pub upstream_id: Option<String>,
    pub attempts: i64,
}

/// The outcome of an [intent](Store::intend).
#[derive(Clone, Copy, Debug)]
pub enum Made<'a> {
    Nothing,
    /// An upstream thread that no thread will use.
    Unused(&'a UpstreamThreadId),
    /// The answer was lost, so the upstream thread may exist. Its id will not be recorded.
    Unknown,
}

/// The place where an upstream orphan is recorded.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum OrphanName {
    Row(OrphanId),
    /// The row of a run that has the id.
    Run(RunId),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OrphanKind {
    Thread,
    /// A run or response.
    Run,
}

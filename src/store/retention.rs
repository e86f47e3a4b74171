//! When threads are due for the janitor, expiry, and pruning of what is past its retention.

use std::ops::AddAssign;
use std::time::Duration;

use serde_json::json;
use sqlx::FromRow;
use sqlx::types::Json;
use uuid::Uuid;

use super::deletion::{cancel_active, lock_unfinished};
use super::errors::Failed;
use super::orphans::upstream_ids;
use super::params::{Params, params};
use super::pool::Connection;
use super::rows::{At, ThreadRow, millis};
use super::runs::delete_runs;
use super::statement::Statement;
use super::{Store, StoreError};
use crate::domain::{Lifetimes, Limits, OrphanId, Thread, ThreadId, Timestamp};

const DUE_THREADS: &str = "SELECT {thread t}, {now} AS now, t.attempts
    FROM threads t
    WHERE t.due_at <= {now}
    ORDER BY t.due_at
    LIMIT :limit {0}";

static LIST_DUE: Statement = Statement::variant("retention.list_due", DUE_THREADS, &[""]);

static LOCK_DUE: Statement =
    Statement::variant("retention.lock_due", DUE_THREADS, &["{lock_if_free t}"]);

static LEASE_DUE: Statement = Statement::new(
    "retention.lease_due",
    "UPDATE threads SET due_at = {now} + {ms :lease} WHERE id {in :threads} RETURNING due_at",
);

static SCHEDULE: Statement = Statement::new(
    "retention.reschedule",
    "UPDATE threads SET
        due_at = CASE
            WHEN due_at = :claimed OR (:claimed IS NULL AND due_at > {now} + {ms :after})
                THEN {now} + {ms :after}
            ELSE due_at
        END,
        attempts = CASE WHEN {as text, :failure} IS NULL THEN 0 ELSE attempts + 1 END,
        last_failure = :failure
    WHERE id = :thread",
);

static LIST_FOR_REVIEW: Statement = Statement::new(
    "retention.list_for_changed_limits",
    "SELECT t.id FROM threads t WHERE t.id > :after ORDER BY t.id LIMIT :limit",
);

/// Makes threads of a page due at their expiry, if they are due later, or never.
static BRING_FORWARD: Statement = Statement::variant(
    "retention.bring_forward",
    "UPDATE threads AS t SET due_at = {0}
    WHERE t.id {in_found
        SELECT t.id FROM threads t
        WHERE t.id {in :page} AND t.lifecycle NOT IN ('archived', 'deleting')
            AND (t.due_at > {0} OR (t.due_at IS NULL AND {0} IS NOT NULL))
        ORDER BY t.id {lock t}
    }",
    &[
        "{expiry CASE t.scope_kind WHEN 'session' THEN :session_age ELSE :other_age END, \
       CASE t.scope_kind WHEN 'session' THEN :session_idle ELSE :other_idle END}",
    ],
);

static ARCHIVE_EXPIRED: Statement = Statement::new(
    "retention.archive_expired",
    "UPDATE threads AS t
    SET lifecycle = 'archived', archived_at = {now}, due_at = {now}, rollover_pending = false
    WHERE t.id = :thread AND t.lifecycle NOT IN ('archived', 'deleting')
        AND {expiry :max_age, :max_idle} <= {now}",
);

static SCHEDULE_EXPIRY: Statement = Statement::new(
    "retention.schedule_expiry",
    "UPDATE threads AS t SET due_at = {expiry :max_age, :max_idle}
    WHERE t.id = :thread AND t.lifecycle NOT IN ('archived', 'deleting')",
);

static DISCARD: Statement = Statement::new(
    "retention.discard",
    "UPDATE threads
    SET lifecycle = 'deleting', deletion = 'erase', due_at = {now}, attempts = 0, last_failure = NULL
    WHERE id = :thread AND lifecycle = 'archived' AND archived_at + {ms :keep} <= {now}",
);

impl Store {
    /// Returns up to `limit` due threads, longest overdue first, with the database's time. It
    /// changes nothing.
    pub async fn due_threads(&self, limit: u32) -> Result<Vec<DueThread>, StoreError> {
        let mut c = self.backend.reader().await?;
        let rows: Vec<DueRow> = c.all(&LIST_DUE, params().set("limit", limit)).await?;
        rows.into_iter().map(DueThread::try_from).collect()
    }

    /// Leases up to `limit` due threads: they are due again only after `lease`. Until then no
    /// other caller gets them. If the caller dies, another one gets them after that. Threads that
    /// another call is leasing at the same time are skipped.
    pub async fn lease_due_threads(
        &self,
        limit: u32,
        lease: Duration,
    ) -> Result<Vec<DueThread>, StoreError> {
        let mut c = self.backend.writer().await?;
        c.begin().await?;
        let rows: Vec<DueRow> = c.all(&LOCK_DUE, params().set("limit", limit)).await?;
        let mut due = rows
            .into_iter()
            .map(DueThread::try_from)
            .collect::<Result<Vec<_>, _>>()?;
        let threads: Vec<Uuid> = due.iter().map(|due| due.thread.id.uuid()).collect();
        let values = params().set("threads", threads).set("lease", millis(lease));
        let mut claimed: Vec<(At,)> = c.all(&LEASE_DUE, values).await?;
        c.commit().await?;
        // One statement set the same time for all of them.
        let claimed = claimed.pop().map(|(at,)| at.0);
        for due in &mut due {
            due.claimed = claimed;
        }
        Ok(due)
    }

    /// Records the outcome of processing a thread, and sets when it is due next. `after` is
    /// `None`: never. `failure`: the reason of a failed attempt, which is counted. Without a
    /// failure the count starts again at 0.
    ///
    /// `claimed` is [`DueThread::claimed`]. If the thread is due at another time by now, a caller,
    /// a message or a deletion has set that time, and it stays. A thread that was not leased may
    /// only become due earlier.
    pub async fn reschedule(
        &self,
        thread: ThreadId,
        claimed: Option<Timestamp>,
        after: Option<Duration>,
        failure: Option<&str>,
    ) -> Result<(), StoreError> {
        let mut c = self.backend.writer().await?;
        let values = params()
            .set("thread", thread.uuid())
            .set("claimed", claimed)
            .set("after", after.map(millis))
            .set("failure", failure);
        c.execute(&SCHEDULE, values).await?;
        Ok(())
    }

    /// Makes current threads due at their expiry by these lifetimes, which may have changed since
    /// the thread was created. A thread that is due earlier stays so. The call reads up to `limit`
    /// threads with ids above `after`.
    ///
    /// Returns the id of the last one; `None` if there are no more. Threads that are not current
    /// count towards the limit.
    pub async fn apply_changed_limits(
        &self,
        after: Option<ThreadId>,
        limit: u32,
        lifetimes: &Lifetimes,
    ) -> Result<Option<ThreadId>, StoreError> {
        let mut c = self.backend.writer().await?;
        let values = params()
            .set("after", after.map_or(Uuid::nil(), ThreadId::uuid))
            .set("limit", limit);
        let page: Vec<(Uuid,)> = c.all(&LIST_FOR_REVIEW, values).await?;
        let page: Vec<Uuid> = page.into_iter().map(|(id,)| id).collect();
        let Some(last) = page.last().copied() else {
            return Ok(None);
        };
        let values = params()
            .set("page", page)
            .set("session_age", lifetimes.sessions.max_age.map(millis))
            .set("session_idle", lifetimes.sessions.max_idle.map(millis))
            .set("other_age", lifetimes.others.max_age.map(millis))
            .set("other_idle", lifetimes.others.max_idle.map(millis));
        c.execute(&BRING_FORWARD, values).await?;
        Ok(Some(ThreadId::from_uuid(last)))
    }

    /// Archives a current thread if it has expired by its own limits or these, and makes it due at
    /// once. Returns `false` if it has not expired. Then it becomes due at its expiry.
    pub async fn expire(&self, thread: ThreadId, limits: Limits) -> Result<bool, StoreError> {
        let mut c = self.backend.writer().await?;
        let values = || {
            params()
                .set("thread", thread.uuid())
                .set("max_age", limits.max_age.map(millis))
                .set("max_idle", limits.max_idle.map(millis))
        };
        let is_archived = c.execute(&ARCHIVE_EXPIRED, values()).await? == 1;
        if !is_archived {
            c.execute(&SCHEDULE_EXPIRY, values()).await?;
        }
        Ok(is_archived)
    }

    /// Begins to erase a thread that has been archived for at least `keep`. Its active runs are to
    /// be cancelled, and it is due at once. Returns `false` if it is not such a thread.
    pub async fn discard(&self, thread: ThreadId, keep: Duration) -> Result<bool, StoreError> {
        let mut c = self.backend.writer().await?;
        c.begin().await?;
        // An archived thread takes no messages, so it gets no further unfinished runs.
        lock_unfinished(&mut c, vec![thread.uuid()]).await?;
        let values = params()
            .set("thread", thread.uuid())
            .set("keep", millis(keep));
        let is_begun = c.execute(&DISCARD, values).await? == 1;
        if is_begun {
            cancel_active(&mut c, vec![thread.uuid()]).await?;
        }
        c.commit().await?;
        Ok(is_begun)
    }
}

#[derive(FromRow)]
struct DueRow {
    #[sqlx(flatten)]
    thread: ThreadRow,
    now: At,
    attempts: i64,
}

impl TryFrom<DueRow> for DueThread {
    type Error = StoreError;

    fn try_from(row: DueRow) -> Result<Self, StoreError> {
        Ok(Self {
            thread: row.thread.try_into()?,
            now: row.now.0,
            attempts: row.attempts,
            claimed: None,
        })
    }
}

// Keep a session for a day after its end: its runs may still be orphans. Nothing else refers to
// it.
static DELETE_SESSIONS: Statement = Statement::new(
    "retention.delete_sessions",
    "DELETE FROM replicas WHERE expires_at < {now} - {ms 86400000}",
);

// Rows that are older than `:keep`, oldest first, up to `:limit`. Further conditions are
// subqueries for each row, never joins, so that the planner reads in the order of the key.

const OLD_KEYS: &str = "FROM idempotency_keys k
    WHERE k.created_at <= {now} - {ms :keep}
    ORDER BY k.created_at
    LIMIT :limit";

const OLD_EVENTS: &str = "FROM run_events e
    WHERE e.run_id < {id_after :keep}
        AND (SELECT r.finished_at FROM runs r WHERE r.id = e.run_id) <= {now} - {ms :keep}
    ORDER BY e.run_id
    LIMIT :limit";

const OLD_RUNS: &str = "FROM runs r
    WHERE r.id < {id_after :keep} AND r.finished_at <= {now} - {ms :keep}
        AND (SELECT t.unsettled_run ->> 'run' FROM threads t WHERE t.id = r.thread_id)
            IS DISTINCT FROM 'run_' || {hex r.id}
    ORDER BY r.id
    LIMIT :limit";

const OLD_RECEIPTS: &str = "FROM deletions d
    WHERE d.finished_at <= {now} - {ms :keep}
    ORDER BY d.finished_at
    LIMIT :limit";

const COUNT: &str = "SELECT count(*) FROM (SELECT 1 AS one {0}) x";

// A deleting statement is planned each time: a plan that was made while a table was small reads
// all of it.

static DELETE_OLD_KEYS: Statement = Statement::unprepared(
    "retention.delete_old_keys",
    "DELETE FROM idempotency_keys WHERE {rows k, {0}}",
    &[OLD_KEYS],
);

static DELETE_OLD_EVENTS: Statement = Statement::unprepared(
    "retention.delete_old_events",
    "DELETE FROM run_events WHERE {rows e, {0}}",
    &[OLD_EVENTS],
);

static DELETE_OLD_RECEIPTS: Statement = Statement::unprepared(
    "retention.delete_old_receipts",
    "DELETE FROM deletions WHERE {rows d, {0}}",
    &[OLD_RECEIPTS],
);

static LOCK_OLD_RUNS: Statement = Statement::unprepared(
    "retention.lock_old_runs",
    "SELECT r.id, r.thread_id, (SELECT t.upstream FROM threads t WHERE t.id = r.thread_id) AS upstream,
        r.upstream_run_id, r.earlier_upstream_run_ids
    {0} {lock_if_free r}",
    &[OLD_RUNS],
);

static ADD_ORPHANS: Statement = Statement::new(
    "retention.add_orphans",
    "INSERT INTO upstream_orphans (id, thread_id, upstream, kind, upstream_id)
    SELECT {uuid e.value ->> 'id'}, {uuid e.value ->> 'thread'}, e.value ->> 'upstream', 'run',
        e.value ->> 'upstream_id'
    FROM {each :orphans}",
);

static COUNT_OLD_KEYS: Statement =
    Statement::variant("retention.count_old_keys", COUNT, &[OLD_KEYS]);

static COUNT_OLD_EVENTS: Statement =
    Statement::variant("retention.count_old_events", COUNT, &[OLD_EVENTS]);

static COUNT_OLD_RUNS: Statement =
    Statement::variant("retention.count_old_runs", COUNT, &[OLD_RUNS]);

static COUNT_OLD_RECEIPTS: Statement =
    Statement::variant("retention.count_old_receipts", COUNT, &[OLD_RECEIPTS]);

pub(super) static STATEMENTS: &[&Statement] = &[
    &LIST_DUE,
    &LOCK_DUE,
    &LEASE_DUE,
    &SCHEDULE,
    &LIST_FOR_REVIEW,
    &BRING_FORWARD,
    &ARCHIVE_EXPIRED,
    &SCHEDULE_EXPIRY,
    &DISCARD,
    &DELETE_SESSIONS,
    &DELETE_OLD_KEYS,
    &DELETE_OLD_EVENTS,
    &DELETE_OLD_RECEIPTS,
    &LOCK_OLD_RUNS,
    &ADD_ORPHANS,
    &COUNT_OLD_KEYS,
    &COUNT_OLD_EVENTS,
    &COUNT_OLD_RUNS,
    &COUNT_OLD_RECEIPTS,
];

impl Store {
    /// Deletes what is past its retention, up to `limit` rows of each kind, and sessions that
    /// ended a day ago.
    pub async fn prune(&self, pruning: &Pruning, limit: u32) -> Result<Pruned, StoreError> {
        let mut c = self.backend.writer().await?;
        c.begin().await?;
        c.execute(&DELETE_SESSIONS, params()).await?;
        // Delete keys and events before the runs that they belong to, so that they are counted.
        let pruned = Pruned {
            idempotency_keys: remove(&mut c, &DELETE_OLD_KEYS, pruning.idempotency_keys, limit)
                .await?,
            events: remove(&mut c, &DELETE_OLD_EVENTS, pruning.events, limit).await?,
            runs: remove_runs(&mut c, pruning, limit).await?,
            receipts: remove(&mut c, &DELETE_OLD_RECEIPTS, pruning.receipts, limit).await?,
        };
        c.commit().await?;
        Ok(pruned)
    }

    /// Counts what [`prune`](Self::prune) would delete, up to `limit` of each kind.
    pub async fn prunable(&self, pruning: &Pruning, limit: u32) -> Result<Pruned, StoreError> {
        let mut c = self.backend.reader().await?;
        Ok(Pruned {
            idempotency_keys: count(&mut c, &COUNT_OLD_KEYS, pruning.idempotency_keys, limit)
                .await?,
            events: count(&mut c, &COUNT_OLD_EVENTS, pruning.events, limit).await?,
            runs: count(&mut c, &COUNT_OLD_RUNS, pruning.runs, limit).await?,
            receipts: count(&mut c, &COUNT_OLD_RECEIPTS, pruning.receipts, limit).await?,
        })
    }
}

async fn remove(
    c: &mut Connection,
    statement: &'static Statement,
    keep: Option<Duration>,
    limit: u32,
) -> Result<u64, Failed> {
    let Some(keep) = keep else { return Ok(0) };
    c.execute(statement, older_than(keep, limit)).await
}

async fn count(
    c: &mut Connection,
    statement: &'static Statement,
    keep: Option<Duration>,
    limit: u32,
) -> Result<u64, Failed> {
    let Some(keep) = keep else { return Ok(0) };
    let (found,): (i64,) = c.one(statement, older_than(keep, limit)).await?;
    Ok(found.unsigned_abs())
}

fn older_than<'a>(keep: Duration, limit: u32) -> Params<'a> {
    params().set("keep", millis(keep)).set("limit", limit)
}

async fn remove_runs(c: &mut Connection, pruning: &Pruning, limit: u32) -> Result<u64, StoreError> {
    let Some(keep) = pruning.runs else {
        return Ok(0);
    };
    let old: Vec<OldRunRow> = c.all(&LOCK_OLD_RUNS, older_than(keep, limit)).await?;
    let runs = old.iter().map(|run| run.id).collect();
    let mut orphans = vec![];
    for OldRunRow {
        thread_id,
        upstream,
        upstream_run_id,
        earlier_upstream_run_ids,
        ..
    } in old
    {
        if pruning.storing.contains(&upstream) {
            orphans.extend(
                upstream_ids(upstream_run_id, earlier_upstream_run_ids).map(|id| {
                    json!({
                        "id": OrphanId::new().uuid().simple().to_string(),
                        "thread": thread_id.simple().to_string(),
                        "upstream": upstream,
                        "upstream_id": id,
                    })
                }),
            );
        }
    }
    if !orphans.is_empty() {
        c.execute(&ADD_ORPHANS, params().json("orphans", Some(&orphans))?)
            .await?;
    }
    delete_runs(c, runs).await
}

/// A run, its thread's upstream, and the run's ids there.
#[derive(FromRow)]
struct OldRunRow {
    id: Uuid,
    thread_id: Uuid,
    upstream: String,
    upstream_run_id: Option<String>,
    earlier_upstream_run_ids: Option<Json<Vec<String>>>,
}

/// A thread that is due for the janitor.
#[derive(Clone, Debug, PartialEq)]
pub struct DueThread {
    pub thread: Thread,
    /// The database's time when the thread was read.
    pub now: Timestamp,
    /// The number of failed attempts in a row.
    pub attempts: i64,
    /// When the thread is due again, by the lease of the caller. `None`: the thread was not
    /// leased.
    pub claimed: Option<Timestamp>,
}

/// The retention of each kind of row. `None`: it is kept for ever.
#[derive(Clone, Debug, Default)]
pub struct Pruning {
    /// The retention of ended runs. Their messages stay.
    pub runs: Option<Duration>,
    pub events: Option<Duration>,
    pub idempotency_keys: Option<Duration>,
    pub receipts: Option<Duration>,
    /// The upstreams that store each run by itself. The ids of pruned runs there become upstream
    /// orphans.
    pub storing: Vec<String>,
}

/// The number of rows of each kind that were pruned.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Pruned {
    pub runs: u64,
    pub events: u64,
    pub idempotency_keys: u64,
    pub receipts: u64,
}

impl Pruned {
    /// Returns the largest of the numbers.
    pub fn most(&self) -> u64 {
        self.runs
            .max(self.events)
            .max(self.idempotency_keys)
            .max(self.receipts)
    }
}

impl AddAssign for Pruned {
    fn add_assign(&mut self, more: Self) {
        self.runs += more.runs;
        self.events += more.events;
        self.idempotency_keys += more.idempotency_keys;
        self.receipts += more.receipts;
    }
}

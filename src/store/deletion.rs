//! Requests to delete, from the request to its receipt.

use std::time::Duration;

use sqlx::FromRow;
use sqlx::types::Json;
use uuid::Uuid;

use super::params::{Params, params};
use super::pool::Connection;
use super::rows::{At, ThreadRow, millis};
use super::runs::delete_runs;
use super::statement::Statement;
use super::{OrphanName, Store, StoreError};
use crate::domain::{
    ConversationKey, Deletion, DeletionId, Lifecycle, Page, Removed, Scope, TenantKey, Thread,
    ThreadId, Timestamp, UserKey,
};

/// The most attempts to take threads while new runs keep arriving.
const MAX_ATTEMPTS: u32 = 10;

/// Condition on the threads `t` of a user. For the threads of a key it is `{of_key}`.
const OF_USER: &str = "t.tenant = :tenant AND t.user_key = :user";

static ADD: Statement = Statement::new(
    "deletion.add",
    "INSERT INTO deletions (
        id, tenant, user_key, user_fingerprint, scope_kind, scope_name, archive, requested_at
    )
    VALUES (:deletion, :tenant, :user, :fingerprint, {scope_kind}, :scope_name, :archive, {now})
    ON CONFLICT (id) DO NOTHING",
);

static LOCK_UNFINISHED_REQUEST: Statement = Statement::new(
    "deletion.lock_unfinished_request",
    "SELECT d.id, d.tenant, d.user_key, {text d.scope_kind} AS scope_kind, d.scope_name, d.archive
    FROM deletions d
    WHERE d.id = :deletion AND d.user_key IS NOT NULL {lock d}",
);

static LOCK_REQUESTS_OF_USER: Statement = Statement::new(
    "deletion.lock_requests_of_user",
    "SELECT d.id, d.tenant, d.user_key, {text d.scope_kind} AS scope_kind, d.scope_name, d.archive
    FROM deletions d
    WHERE d.tenant = (SELECT t.tenant FROM threads t WHERE t.id = :thread)
        AND d.user_key = (SELECT t.user_key FROM threads t WHERE t.id = :thread)
        AND d.finished_at IS NULL
    ORDER BY d.id {lock d}",
);

/// Finds the threads that a request begins with. A request that erases also takes archived
/// threads, and threads whose deletion ends in an archive or has no request.
///
/// A thread that a rollover created counts as old as the thread that it replaced. It has the
/// messages that waited there, and its upstream thread begins with the earlier conversation.
const FIND_THREADS: &str = "SELECT t.id FROM threads t
    WHERE {0}
        AND COALESCE(t.conversation_started_at, t.created_at)
            <= (SELECT d.requested_at FROM deletions d WHERE d.id = :deletion)
        AND (t.lifecycle = 'current' OR (:erases AND (
            t.lifecycle = 'archived' OR t.deletion = 'archive' OR t.deletion_id IS NULL
        )))
    ORDER BY t.scope_kind, t.scope_name, t.id
    LIMIT :limit";

static FIND_THREADS_OF_KEY: Statement =
    Statement::variant("deletion.find_threads_of_key", FIND_THREADS, &["{of_key}"]);

static FIND_THREADS_OF_USER: Statement =
    Statement::variant("deletion.find_threads_of_user", FIND_THREADS, &[OF_USER]);

static LOCK_UNFINISHED_RUNS: Statement = Statement::new(
    "deletion.lock_unfinished_runs",
    "SELECT r.id FROM runs r
    WHERE r.id {in_found {unfinished {in :threads}}} AND r.finished_at IS NULL
    ORDER BY r.id {lock r}",
);

static LOCK_THREADS: Statement = Statement::new(
    "deletion.lock_threads",
    "SELECT t.id FROM threads t
    WHERE t.id {in :threads} AND (t.lifecycle = 'current' OR (:erases AND (
        t.lifecycle = 'archived' OR t.deletion = 'archive' OR t.deletion_id IS NULL
    )))
    ORDER BY t.id {lock t}",
);

static HAS_OTHER_RUNS: Statement = Statement::new(
    "deletion.has_other_runs",
    "SELECT EXISTS (SELECT 1 FROM ({unfinished {in :threads}}) r WHERE NOT r.id {in :runs})",
);

static BEGIN: Statement = Statement::new(
    "deletion.begin",
    "UPDATE threads
    SET upstream_cleanup = CASE WHEN lifecycle <> 'current' THEN upstream_cleanup END,
        lifecycle = 'deleting', deletion = {as thread_deletion, :end}, deletion_id = :deletion,
        due_at = {now} + {ms :hold}, attempts = 0, last_failure = NULL, rollover_pending = false
    WHERE id {in :threads}",
);

static CANCEL_ACTIVE_RUNS: Statement = Statement::new(
    "deletion.cancel_active_runs",
    "UPDATE runs AS r SET status = 'cancelling'
    WHERE r.thread_id {in :threads} AND {active r} AND r.status <> 'cancelling'",
);

// The request also waits for threads that another request is erasing. So nothing of its target is
// left when it finishes.
static FINISH: Statement = Statement::new(
    "deletion.finish",
    "UPDATE deletions AS d SET finished_at = {now}, user_key = NULL, scope_kind = NULL, scope_name = NULL
    WHERE d.id = :deletion AND NOT EXISTS (SELECT 1 FROM threads t WHERE t.deletion_id = d.id)
        AND (d.archive OR NOT EXISTS (
            SELECT 1 FROM threads t
            WHERE t.tenant = d.tenant AND t.user_key = d.user_key
                AND (d.scope_kind IS NULL OR (t.scope_kind = d.scope_kind AND t.scope_name = d.scope_name))
                AND COALESCE(t.conversation_started_at, t.created_at) <= d.requested_at
        ))",
);

impl Store {
    /// Records a request to delete, and begins with up to `limit` threads. These take no messages
    /// any more, their active runs are to be cancelled, and they are due after the request's
    /// `hold`. A thread that was created after the request is not part of it.
    ///
    /// Returns the number of threads that it began with. Repeat the call with the same request
    /// until the number is 0. If the caller stops early, the deletion of a begun thread continues
    /// with the rest.
    ///
    /// An erasure takes over threads that are being archived, or erased because of their age.
    /// Threads that another request erases stay with that request; this one waits for them. A
    /// request without any thread is finished at once.
    pub async fn begin_deletion(
        &self,
        request: &DeletionRequest,
        limit: u32,
    ) -> Result<u64, StoreError> {
        let mut c = self.backend.writer().await?;
        c.begin().await?;
        let values = of_target(&request.tenant, &request.target)
            .set("deletion", request.id.uuid())
            .set("fingerprint", &request.fingerprint)
            .set("archive", request.end == Deletion::Archive);
        c.execute(&ADD, values).await?;
        let values = params().set("deletion", request.id.uuid());
        let requested: Option<RequestedRow> = c.optional(&LOCK_UNFINISHED_REQUEST, values).await?;
        let begun = match requested {
            Some(requested) => advance(&mut c, &requested, limit, request.hold).await?,
            None => 0,
        };
        c.commit().await?;
        Ok(begun)
    }
}

/// Begins with threads of a request. Finishes the request if there are none to begin with and none
/// being deleted.
async fn advance(
    c: &mut Connection,
    requested: &RequestedRow,
    limit: u32,
    hold: Duration,
) -> Result<u64, StoreError> {
    let begun = begin(c, requested, limit, hold).await?;
    if begun == 0 {
        c.execute(&FINISH, params().set("deletion", requested.id))
            .await?;
    }
    Ok(begun)
}

async fn begin(
    c: &mut Connection,
    requested: &RequestedRow,
    limit: u32,
    hold: Duration,
) -> Result<u64, StoreError> {
    for _ in 0..MAX_ATTEMPTS {
        c.begin().await?;
        if let Some(begun) = try_begin(c, requested, limit, hold).await? {
            c.commit().await?;
            return Ok(begun);
        }
        c.roll_back().await?;
    }
    Err(StoreError::Unavailable(
        "new runs arrived during every attempt".into(),
    ))
}

/// Begins with threads of a request. Runs are locked before their threads. Once the threads are
/// locked, no more runs can arrive.
///
/// Returns `None` if the target then has other runs or threads, or if threads have changed so that
/// they no longer match. The caller must roll back then.
async fn try_begin(
    c: &mut Connection,
    requested: &RequestedRow,
    limit: u32,
    hold: Duration,
) -> Result<Option<u64>, StoreError> {
    let find = match requested.scope_kind {
        Some(_) => &FIND_THREADS_OF_KEY,
        None => &FIND_THREADS_OF_USER,
    };
    let found = ids(c, find, requested.params().set("limit", limit)).await?;
    if found.is_empty() {
        return Ok(Some(0));
    }
    let runs = lock_unfinished(c, found.clone()).await?;
    let values = params()
        .set("threads", found.clone())
        .set("erases", !requested.archive);
    let threads = ids(c, &LOCK_THREADS, values).await?;
    // A rollover that committed while this transaction waited for its thread has put a fresh
    // thread in its place.
    let now = ids(c, find, requested.params().set("limit", limit)).await?;
    let values = params().set("threads", threads.clone()).set("runs", runs);
    let (has_others,): (bool,) = c.one(&HAS_OTHER_RUNS, values).await?;
    if has_others || threads.is_empty() || now != found {
        return Ok(None);
    }
    let end = if requested.archive {
        Deletion::Archive
    } else {
        Deletion::Erase
    };
    let values = params()
        .set("threads", threads.clone())
        .set("end", end.as_str())
        .set("deletion", requested.id)
        .set("hold", millis(hold));
    let begun = c.execute(&BEGIN, values).await?;
    cancel_active(c, threads).await?;
    Ok(Some(begun))
}

async fn ids(
    c: &mut Connection,
    statement: &'static Statement,
    values: Params<'_>,
) -> Result<Vec<Uuid>, StoreError> {
    let rows: Vec<(Uuid,)> = c.all(statement, values).await?;
    Ok(rows.into_iter().map(|(id,)| id).collect())
}

/// Locks the unfinished runs of threads, and returns their ids.
pub(super) async fn lock_unfinished(
    c: &mut Connection,
    threads: Vec<Uuid>,
) -> Result<Vec<Uuid>, StoreError> {
    ids(c, &LOCK_UNFINISHED_RUNS, params().set("threads", threads)).await
}

/// Marks the active runs of threads to be cancelled.
pub(super) async fn cancel_active(
    c: &mut Connection,
    threads: Vec<Uuid>,
) -> Result<(), StoreError> {
    c.execute(&CANCEL_ACTIVE_RUNS, params().set("threads", threads))
        .await?;
    Ok(())
}

fn of_target<'a>(tenant: &'a TenantKey, target: &'a DeletionTarget) -> Params<'a> {
    let scope = scope_of(target);
    params()
        .set("tenant", tenant.as_str())
        .set("user", target.user().as_str())
        .set("scope_kind", scope.map(Scope::kind))
        .set("scope_name", scope.map(Scope::name))
}

fn scope_of(target: &DeletionTarget) -> Option<&Scope> {
    match target {
        DeletionTarget::Key(key) => Some(&key.scope),
        DeletionTarget::User(_) => None,
    }
}

/// A request to delete that is not finished.
#[derive(FromRow)]
struct RequestedRow {
    id: Uuid,
    tenant: String,
    user_key: String,
    scope_kind: Option<String>,
    scope_name: Option<String>,
    archive: bool,
}

impl RequestedRow {
    fn params(&self) -> Params<'_> {
        params()
            .set("deletion", self.id)
            .set("tenant", &self.tenant)
            .set("user", &self.user_key)
            .set("scope_kind", self.scope_kind.as_deref())
            .set("scope_name", self.scope_name.as_deref())
            .set("erases", !self.archive)
    }
}

const COUNT: &str = "SELECT count(*) AS threads,
        CAST(COALESCE(sum(x.message_count), 0) AS bigint) AS messages,
        CAST(COALESCE(sum(x.run_count), 0) AS bigint) AS runs,
        CAST(COALESCE(sum(x.unfinished), 0) AS bigint) AS unfinished_runs
    FROM (
        SELECT t.message_count, t.run_count, (SELECT count(*) FROM ({unfinished = t.id}) r) AS unfinished
        FROM threads t
        WHERE {0} AND (t.lifecycle = 'current' OR :erases)
    ) x";

static COUNT_OF_KEY: Statement = Statement::variant("deletion.count_of_key", COUNT, &["{of_key}"]);

static COUNT_OF_USER: Statement = Statement::variant("deletion.count_of_user", COUNT, &[OF_USER]);

static READ: Statement = Statement::new(
    "deletion.read",
    "SELECT d.user_key, d.user_fingerprint, d.requested_at, d.finished_at, d.archive,
        (SELECT count(*) FROM deleted_threads x WHERE x.deletion_id = d.id) AS done,
        (SELECT count(*) FROM threads t WHERE t.deletion_id = d.id) AS pending,
        (SELECT count(*) FROM deleted_threads x WHERE x.deletion_id = d.id AND (
            x.upstream_cleanup ->> 'outcome' IN ('not_configured', 'not_supported', 'failed')
            OR x.upstream_cleanup ->> 'left' IS NOT NULL
            OR CAST(x.upstream_cleanup ->> 'unknown' AS bigint) > 0
        )) AS incomplete
    FROM deletions d
    WHERE d.id = :deletion AND d.tenant = :tenant",
);

static LIST_THREADS: Statement = Statement::new(
    "deletion.list_threads",
    "SELECT * FROM (
        SELECT x.thread_id, x.upstream, x.messages, x.runs, x.upstream_cleanup, x.finished_at, 0 AS attempts,
            NULL AS last_failure
        FROM deleted_threads x WHERE x.deletion_id = :deletion AND x.thread_id > :after
        UNION ALL
        SELECT t.id, t.upstream, t.message_count, t.run_count, t.upstream_cleanup, NULL, t.attempts,
            t.last_failure
        FROM threads t WHERE t.deletion_id = :deletion AND t.id > :after
    ) listed
    ORDER BY listed.thread_id
    LIMIT :limit",
);

static FIND_UNDER_WAY: Statement = Statement::new(
    "deletion.find_under_way",
    "SELECT d.id FROM deletions d
    WHERE d.tenant = :tenant AND d.user_key = :user AND d.finished_at IS NULL
        AND (d.scope_kind IS NULL OR (d.scope_kind = {scope_kind} AND d.scope_name = :scope_name))
    ORDER BY CASE WHEN EXISTS (SELECT 1 FROM threads t WHERE t.deletion_id = d.id) THEN 0 ELSE 1 END,
        d.requested_at, d.id
    LIMIT 1",
);

impl Store {
    /// Counts what a request to delete this target would take, and changes nothing. An erasure
    /// also takes what another request deletes already.
    pub async fn deletable(
        &self,
        tenant: &TenantKey,
        target: &DeletionTarget,
        end: Deletion,
    ) -> Result<Deletable, StoreError> {
        let mut c = self.backend.reader().await?;
        let statement = match target {
            DeletionTarget::Key(_) => &COUNT_OF_KEY,
            DeletionTarget::User(_) => &COUNT_OF_USER,
        };
        let values = of_target(tenant, target).set("erases", end == Deletion::Erase);
        Ok(c.one(statement, values).await?)
    }

    /// Returns the state of a request to delete, with a page of its threads by id, finished or
    /// not.
    pub async fn deletion(
        &self,
        tenant: &TenantKey,
        id: DeletionId,
        after: Option<ThreadId>,
        limit: u32,
    ) -> Result<Option<DeletionReport>, StoreError> {
        let mut c = self.backend.reader().await?;
        let values = params()
            .set("deletion", id.uuid())
            .set("tenant", tenant.as_str());
        let found: Option<DeletionRow> = c.optional(&READ, values).await?;
        let Some(found) = found else { return Ok(None) };
        let values = params()
            .set("deletion", id.uuid())
            .set("after", after.map_or(Uuid::nil(), ThreadId::uuid))
            .set("limit", i64::from(limit) + 1);
        let mut rows: Vec<DeletedThreadRow> = c.all(&LIST_THREADS, values).await?;
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let has_more = rows.len() > limit;
        rows.truncate(limit);
        Ok(Some(DeletionReport {
            id,
            user: found.user_key.and_then(|user| user.try_into().ok()),
            fingerprint: found.user_fingerprint,
            requested_at: found.requested_at.0,
            finished_at: found.finished_at.map(|at| at.0),
            archive: found.archive,
            done: found.done,
            pending: found.pending,
            incomplete: found.incomplete,
            threads: Page {
                data: rows.into_iter().map(DeletedThread::from).collect(),
                has_more,
            },
        }))
    }

    /// Returns the unfinished request to delete this target, or everything of its user. If there
    /// are several, it prefers one that has begun with threads.
    pub async fn deletion_under_way(
        &self,
        tenant: &TenantKey,
        target: &DeletionTarget,
    ) -> Result<Option<DeletionId>, StoreError> {
        let mut c = self.backend.reader().await?;
        let found: Option<(Uuid,)> = c
            .optional(&FIND_UNDER_WAY, of_target(tenant, target))
            .await?;
        Ok(found.map(|(id,)| DeletionId::from_uuid(id)))
    }
}

/// A request to delete, and its progress.
#[derive(FromRow)]
struct DeletionRow {
    user_key: Option<String>,
    user_fingerprint: Option<String>,
    requested_at: At,
    finished_at: Option<At>,
    archive: bool,
    done: i64,
    pending: i64,
    incomplete: i64,
}

#[derive(FromRow)]
struct DeletedThreadRow {
    thread_id: Uuid,
    upstream: String,
    messages: i64,
    runs: i64,
    upstream_cleanup: Option<Json<Removed>>,
    finished_at: Option<At>,
    attempts: i64,
    last_failure: Option<String>,
}

impl From<DeletedThreadRow> for DeletedThread {
    fn from(row: DeletedThreadRow) -> Self {
        Self {
            id: ThreadId::from_uuid(row.thread_id),
            upstream: row.upstream,
            messages: row.messages,
            runs: row.runs,
            removed: row.upstream_cleanup.map(|json| json.0).unwrap_or_default(),
            finished_at: row.finished_at.map(|at| at.0),
            attempts: row.attempts,
            last_failure: row.last_failure,
        }
    }
}

static FORGET_IDS_OF_RUNS: Statement = Statement::new(
    "deletion.forget_ids_of_runs",
    "UPDATE runs SET upstream_run_id = NULL, earlier_upstream_run_ids = NULL WHERE id {in :runs}",
);

static FORGET_ORPHANS: Statement = Statement::new(
    "deletion.forget_orphans",
    "DELETE FROM upstream_orphans WHERE thread_id = :thread AND id {in :orphans}",
);

static RECORD_CLEANUP: Statement = Statement::new(
    "deletion.record_cleanup",
    "UPDATE threads
    SET upstream_cleanup = :removed,
        upstream_thread_id = CASE WHEN :is_done THEN NULL ELSE upstream_thread_id END,
        unsettled_run = CASE WHEN :is_done THEN NULL ELSE unsettled_run END
    WHERE id = :thread",
);

static LOCK_THREAD: Statement = Statement::new(
    "deletion.lock_thread",
    "SELECT EXISTS ({unfinished = t.id}) AS is_busy, {thread t}
    FROM threads t
    WHERE t.id = :thread {lock t}",
);

static DELETE_MESSAGES: Statement = Statement::new(
    "deletion.delete_messages",
    "DELETE FROM messages
    WHERE {rows m, FROM messages m WHERE m.thread_id = :thread ORDER BY m.position LIMIT :limit}",
);

static LOCK_RUNS: Statement = Statement::new(
    "deletion.lock_runs",
    "SELECT r.id FROM runs r WHERE r.thread_id = :thread ORDER BY r.seq LIMIT :limit {lock_if_free r}",
);

static IS_EMPTY: Statement = Statement::new(
    "deletion.is_empty",
    "SELECT NOT EXISTS (SELECT 1 FROM messages m WHERE m.thread_id = :thread)
        AND NOT EXISTS (SELECT 1 FROM runs r WHERE r.thread_id = :thread)",
);

static ADD_RECEIPT: Statement = Statement::new(
    "deletion.add_receipt",
    "INSERT INTO deleted_threads (
        deletion_id, thread_id, upstream, messages, runs, upstream_cleanup, finished_at
    )
    SELECT d.id, t.id, t.upstream, t.message_count, t.run_count, t.upstream_cleanup, {now}
    FROM threads t, deletions d
    WHERE t.id = :thread AND d.id = (SELECT o.deletion_id FROM threads o WHERE o.id = :thread)
    ON CONFLICT (deletion_id, thread_id) DO NOTHING",
);

static ARCHIVE_THREAD: Statement = Statement::new(
    "deletion.archive_thread",
    "UPDATE threads
    SET lifecycle = 'archived', archived_at = {now}, deletion = NULL, deletion_id = NULL, due_at = {now},
        attempts = 0, last_failure = NULL
    WHERE id = :thread",
);

static DELETE_THREAD: Statement = Statement::new(
    "deletion.delete_thread",
    "DELETE FROM threads WHERE id = :thread",
);

pub(super) static STATEMENTS: &[&Statement] = &[
    &ADD,
    &LOCK_UNFINISHED_REQUEST,
    &LOCK_REQUESTS_OF_USER,
    &FIND_THREADS_OF_KEY,
    &FIND_THREADS_OF_USER,
    &LOCK_UNFINISHED_RUNS,
    &LOCK_THREADS,
    &HAS_OTHER_RUNS,
    &BEGIN,
    &CANCEL_ACTIVE_RUNS,
    &FINISH,
    &COUNT_OF_KEY,
    &COUNT_OF_USER,
    &READ,
    &LIST_THREADS,
    &FIND_UNDER_WAY,
    &FORGET_IDS_OF_RUNS,
    &FORGET_ORPHANS,
    &RECORD_CLEANUP,
    &LOCK_THREAD,
    &DELETE_MESSAGES,
    &LOCK_RUNS,
    &IS_EMPTY,
    &ADD_RECEIPT,
    &ARCHIVE_THREAD,
    &DELETE_THREAD,
];

impl Store {
    /// Records what was deleted of a thread upstream so far, and removes the upstream orphans in
    /// `forget`. Once `removed` has an outcome, the thread has neither an upstream thread nor an
    /// unsettled run.
    pub async fn removed(
        &self,
        thread: ThreadId,
        removed: &Removed,
        forget: &[OrphanName],
    ) -> Result<(), StoreError> {
        let (mut runs, mut orphans) = (vec![], vec![]);
        for name in forget {
            match name {
                OrphanName::Run(id) => runs.push(id.uuid()),
                OrphanName::Row(id) => orphans.push(id.uuid()),
            }
        }
        let mut c = self.backend.writer().await?;
        c.begin().await?;
        c.execute(&FORGET_IDS_OF_RUNS, params().set("runs", runs))
            .await?;
        let values = params()
            .set("thread", thread.uuid())
            .set("orphans", orphans);
        c.execute(&FORGET_ORPHANS, values).await?;
        let values = params()
            .set("thread", thread.uuid())
            .json("removed", Some(removed))?
            .set("is_done", removed.outcome.is_some());
        c.execute(&RECORD_CLEANUP, values).await?;
        c.commit().await?;
        Ok(())
    }

    /// Continues a deletion whose upstream part is done ([`Removed::outcome`]) and that has no
    /// unfinished run. A deletion that archives is finished by this call. One that erases removes
    /// up to `limit` messages and `limit` runs, and when none are left, the thread.
    ///
    /// Returns `true` when the deletion is finished and the receipt has its line, or if there is
    /// no such thread any more. Returns `false` if there is more to do, or if the deletion cannot
    /// continue yet. It finishes the user's requests that waited for this thread.
    pub async fn conclude(&self, thread: ThreadId, limit: u32) -> Result<bool, StoreError> {
        let mut c = self.backend.writer().await?;
        c.begin().await?;
        // Lock the requests first. If two threads are finished at the same time, the second
        // transaction then finds the first thread gone, and finishes the request that both belong
        // to.
        let values = params().set("thread", thread.uuid());
        let requests: Vec<RequestedRow> = c.all(&LOCK_REQUESTS_OF_USER, values).await?;
        let is_done = conclude_thread(&mut c, thread, limit).await?;
        if is_done {
            for requested in &requests {
                advance(&mut c, requested, limit, Duration::ZERO).await?;
            }
        }
        c.commit().await?;
        Ok(is_done)
    }
}

async fn conclude_thread(c: &mut Connection, id: ThreadId, limit: u32) -> Result<bool, StoreError> {
    let of_thread = || params().set("thread", id.uuid());
    let row: Option<ConcludedRow> = c.optional(&LOCK_THREAD, of_thread()).await?;
    // The thread is gone: an earlier call deleted it, and its answer was lost.
    let Some(row) = row else { return Ok(true) };
    let thread = Thread::try_from(row.thread)?;
    if row.is_busy || thread.lifecycle != Lifecycle::Deleting || thread.removed.outcome.is_none() {
        return Ok(false);
    }
    let archives = thread.deletion == Some(Deletion::Archive);
    if !archives && !empty(c, id, limit).await? {
        return Ok(false);
    }
    c.execute(&ADD_RECEIPT, of_thread()).await?;
    c.execute(
        if archives {
            &ARCHIVE_THREAD
        } else {
            &DELETE_THREAD
        },
        of_thread(),
    )
    .await?;
    Ok(true)
}

/// Deletes up to `limit` messages of a thread. If fewer were left, it deletes up to `limit` runs
/// too. Returns `false` if there may be more of either.
async fn empty(c: &mut Connection, thread: ThreadId, limit: u32) -> Result<bool, StoreError> {
    let step = || params().set("thread", thread.uuid()).set("limit", limit);
    if c.execute(&DELETE_MESSAGES, step()).await? >= u64::from(limit) {
        return Ok(false);
    }
    let runs = ids(c, &LOCK_RUNS, step()).await?;
    if delete_runs(c, runs).await? >= u64::from(limit) {
        return Ok(false);
    }
    // The deletion skips rows that another transaction has locked, and no foreign key keeps the
    // thread for them.
    let (is_empty,): (bool,) = c
        .one(&IS_EMPTY, params().set("thread", thread.uuid()))
        .await?;
    Ok(is_empty)
}

#[derive(FromRow)]
struct ConcludedRow {
    is_busy: bool,
    #[sqlx(flatten)]
    thread: ThreadRow,
}

/// A request to delete.
#[derive(Clone, Debug)]
pub struct DeletionRequest {
    pub id: DeletionId,
    pub tenant: TenantKey,
    pub target: DeletionTarget,
    /// The [fingerprint](crate::domain::Fingerprints) of the target's user.
    pub fingerprint: String,
    /// What becomes of the threads. `Archive` takes current threads only.
    pub end: Deletion,
    /// How long the threads are left to the caller before they are due for the janitor.
    pub hold: Duration,
}

/// The target of a request to delete.
#[derive(Clone, Debug)]
pub enum DeletionTarget {
    /// The key's current thread and all its earlier ones.
    Key(ConversationKey),
    /// All threads of a user.
    User(UserKey),
}

impl DeletionTarget {
    /// Returns the user whose threads are meant.
    pub const fn user(&self) -> &UserKey {
        match self {
            Self::Key(key) => &key.user,
            Self::User(user) => user,
        }
    }
}

/// What a request to delete would take, counted as in its receipt.
#[derive(Clone, Copy, Debug, Default, Eq, FromRow, PartialEq)]
pub struct Deletable {
    pub threads: i64,
    pub messages: i64,
    pub runs: i64,
    /// The number of the runs that would be cancelled.
    pub unfinished_runs: i64,
}

/// The state of a request to delete.
#[derive(Clone, Debug)]
pub struct DeletionReport {
    pub id: DeletionId,
    /// The user whose threads are deleted. `None` once the request is finished.
    pub user: Option<UserKey>,
    /// The user's fingerprint, which stays. `None`: an earlier version recorded the request.
    pub fingerprint: Option<String>,
    pub requested_at: Timestamp,
    pub finished_at: Option<Timestamp>,
    pub archive: bool,
    /// The number of threads that are done, and of those that are not.
    pub done: i64,
    pub pending: i64,
    /// The number of done threads of which something may remain at their upstream.
    pub incomplete: i64,
    pub threads: Page<DeletedThread>,
}

/// A thread in a receipt.
#[derive(Clone, Debug, PartialEq)]
pub struct DeletedThread {
    pub id: ThreadId,
    pub upstream: String,
    /// The number of messages that were deleted, or archived.
    pub messages: i64,
    pub runs: i64,
    pub removed: Removed,
    /// `None`: the thread is not done yet.
    pub finished_at: Option<Timestamp>,
    /// The number of failed attempts, and the reason of the last one.
    pub attempts: i64,
    pub last_failure: Option<String>,
}

//! Reading, listing and changing threads, for callers and operators.

use sqlx::FromRow;
use uuid::Uuid;

use super::paging::Span;
use super::params::{Params, params};
use super::pool::Connection;
use super::rows::{Found, RunRow, ThreadRow, ThreadWithActivity, millis, ttl_millis};
use super::statement::Statement;
use super::{Store, StoreError};
use crate::domain::{
    ConversationKey, Lifecycle, Limits, Metadata, NewLife, Page, PageRequest, Run, TenantKey,
    Thread, ThreadActivity, ThreadId, ThreadState, Timestamp, UserKey,
};

/// How far the time in a thread's id may be ahead of the database's: one day. Ids come from the
/// replicas' clocks.
const SKEW: chrono::TimeDelta = chrono::TimeDelta::days(1);

/// Conditions that pick the thread `t`, for statements that look one up [`by_name`].
pub(super) const BY_KEY: &[&str] = &["{newest_of_key}"];
pub(super) const BY_ID: &[&str] = &["t.id = :thread AND t.tenant = :tenant"];

const REPORT: &str = "
    SELECT {thread t}, {activity}, {run r}, (
        SELECT n.id FROM threads n WHERE n.previous_thread_id = t.id AND n.tenant = t.tenant
        ORDER BY n.id DESC
        LIMIT 1
    ) AS next_thread
    FROM threads t
    LEFT JOIN runs r ON r.id = (
        SELECT l.id FROM runs l WHERE l.thread_id = t.id ORDER BY l.seq DESC LIMIT 1
    )
    WHERE {0}";

static REPORT_BY_KEY: Statement = Statement::variant("threads.report_by_key", REPORT, BY_KEY);
static REPORT_BY_ID: Statement = Statement::variant("threads.report_by_id", REPORT, BY_ID);

static READ: Statement = Statement::new(
    "threads.read",
    "SELECT {thread t} FROM threads t WHERE t.id = :thread",
);

static READ_OF_TENANT: Statement = Statement::new(
    "threads.read_of_tenant",
    "SELECT {thread t} FROM threads t WHERE t.id = :thread AND t.tenant = :tenant",
);

static FIND_CURSOR: Statement = Statement::new(
    "threads.find_cursor",
    "SELECT EXISTS (
        SELECT 1 FROM threads t
        WHERE t.id = :cursor AND t.tenant = :tenant AND t.user_key = COALESCE(:user, t.user_key)
    )",
);

/// Lists threads. `{0}` chooses the index, `{1}` the bounds, and `{2}` the direction. The other
/// conditions filter the rows that are read.
const LIST: &str = "
    SELECT {thread t}, {activity}
    FROM {0} AND {1}
        AND ({as text, :user} IS NULL OR t.user_key = :user)
        AND ({as text, :upstream} IS NULL OR t.upstream = :upstream)
        AND ({as text, :lifecycle} IS NULL OR t.lifecycle = {as thread_lifecycle, :lifecycle})
        AND ({as timestamptz, :created_before} IS NULL OR t.created_at < :created_before)
        AND ({as timestamptz, :inactive_since} IS NULL OR t.last_active_at < :inactive_since)
        AND (NOT :idle OR (SELECT i.id FROM runs i WHERE i.thread_id = t.id AND {active i}) IS NULL)
    ORDER BY t.id {2}
    LIMIT :limit";

/// Bounds for an index that ends in the id: rows are read in the order of ids.
const IN_ORDER: &str = "t.id > :above AND t.id < :below";
/// Bounds for rows that are sorted after reading. Written so that no index of ids matches. With
/// such an index Postgres might read other threads of the tenant.
const SORTED: &str = "COALESCE(t.id > :above AND t.id < :below, false)";

const TENANT: &str = "threads t {by_index threads_by_tenant} WHERE t.tenant = :tenant";
static LIST_ALL: [Statement; 2] = [
    list("threads.list_all_upwards", &[TENANT, IN_ORDER, "ASC"]),
    list("threads.list_all_downwards", &[TENANT, IN_ORDER, "DESC"]),
];

const UPSTREAM: &str =
    "threads t {by_index threads_by_upstream} WHERE t.tenant = :tenant AND t.upstream = :upstream";
static LIST_OF_UPSTREAM: [Statement; 2] = [
    list(
        "threads.list_of_upstream_upwards",
        &[UPSTREAM, IN_ORDER, "ASC"],
    ),
    list(
        "threads.list_of_upstream_downwards",
        &[UPSTREAM, IN_ORDER, "DESC"],
    ),
];

/// The word `current` is written out, so that Postgres may use the index of current threads if
/// these are few.
const CURRENT: &str =
    "threads t {by_index threads_by_tenant} WHERE t.tenant = :tenant AND t.lifecycle = 'current'";
static LIST_CURRENT: [Statement; 2] = [
    list("threads.list_current_upwards", &[CURRENT, IN_ORDER, "ASC"]),
    list(
        "threads.list_current_downwards",
        &[CURRENT, IN_ORDER, "DESC"],
    ),
];

/// Archived threads, or those that are being deleted. The last condition is that of the index.
const PAST: &str = "threads t {by_index threads_past} WHERE t.tenant = :tenant
        AND t.lifecycle = {as thread_lifecycle, :lifecycle} AND t.lifecycle <> 'current'";
static LIST_PAST: [Statement; 2] = [
    list("threads.list_past_upwards", &[PAST, IN_ORDER, "ASC"]),
    list("threads.list_past_downwards", &[PAST, IN_ORDER, "DESC"]),
];

const USER: &str =
    "threads t {by_index threads_by_key} WHERE t.tenant = :tenant AND t.user_key = :user";
static LIST_OF_USER: [Statement; 2] = [
    list("threads.list_of_user_upwards", &[USER, SORTED, "ASC"]),
    list("threads.list_of_user_downwards", &[USER, SORTED, "DESC"]),
];

/// Threads that have an active run. The list is made from all active runs, whose number the
/// replicas limit.
const AT_WORK: &str = "runs w CROSS JOIN threads t
    WHERE {active w} AND (w.status = 'requires_action') = :requires_action
        AND t.id = w.thread_id AND t.tenant = :tenant";
static LIST_AT_WORK: [Statement; 2] = [
    list("threads.list_at_work_upwards", &[AT_WORK, SORTED, "ASC"]),
    list("threads.list_at_work_downwards", &[AT_WORK, SORTED, "DESC"]),
];

/// Makes a list, which is planned each time for the reason in [`Statement::unprepared`].
const fn list(name: &'static str, pieces: &'static [&'static str]) -> Statement {
    let mut statement = Statement::variant(name, LIST, pieces);
    statement.is_prepared = false;
    statement
}

static UPDATE: Statement = Statement::new(
    "threads.update",
    "UPDATE threads AS t SET metadata = COALESCE(:metadata, t.metadata),
        max_age_ms = CASE
            WHEN NOT :changes_life THEN t.max_age_ms
            WHEN {as bigint, :from_now} IS NOT NULL THEN {greatest 0, {ms_since_up t.created_at} + :from_now}
        END,
        max_idle_ms = CASE WHEN :changes_life THEN :from_last_activity ELSE t.max_idle_ms END,
        due_at = CASE
            WHEN NOT :changes_life THEN t.due_at
            WHEN {as bigint, :from_now} IS NOT NULL THEN {clock} + {ms :from_now}
            WHEN {as bigint, :from_last_activity} IS NOT NULL THEN t.last_active_at + {ms :from_last_activity}
            ELSE {earlier :max_age, :max_idle}
        END
    WHERE {current_of_key} AND COALESCE({expiry :max_age, :max_idle} > {clock}, true)
    RETURNING {returned_thread}",
);

pub(super) static STATEMENTS: &[&Statement] = &[
    &REPORT_BY_KEY,
    &REPORT_BY_ID,
    &READ,
    &READ_OF_TENANT,
    &FIND_CURSOR,
    &LIST_ALL[0],
    &LIST_ALL[1],
    &LIST_OF_UPSTREAM[0],
    &LIST_OF_UPSTREAM[1],
    &LIST_CURRENT[0],
    &LIST_CURRENT[1],
    &LIST_PAST[0],
    &LIST_PAST[1],
    &LIST_OF_USER[0],
    &LIST_OF_USER[1],
    &LIST_AT_WORK[0],
    &LIST_AT_WORK[1],
    &UPDATE,
];

impl Store {
    /// Returns everything that is recorded about one thread.
    pub async fn report(&self, name: ThreadName<'_>) -> Result<Option<ThreadReport>, StoreError> {
        let mut c = self.backend.reader().await?;
        let (statement, values) = by_name(name, &REPORT_BY_KEY, &REPORT_BY_ID);
        let row: Option<ReportRow> = c.optional(statement, values).await?;
        row.map(ThreadReport::try_from).transpose()
    }

    /// Returns any thread of any tenant. Not for requests of callers.
    pub async fn thread(&self, id: ThreadId) -> Result<Option<Thread>, StoreError> {
        let mut c = self.backend.reader().await?;
        let row: Option<ThreadRow> = c.optional(&READ, params().set("thread", id.uuid())).await?;
        row.map(Thread::try_from).transpose()
    }

    /// Returns a page of threads in the order of ids, which is by age.
    ///
    /// # Errors
    /// [`StoreError::UnknownCursor`] if `after` or `before` names no thread of the tenant.
    pub async fn threads(
        &self,
        filter: &ThreadFilter,
        page: &PageRequest<ThreadId>,
    ) -> Result<Page<(Thread, ThreadActivity)>, StoreError> {
        let mut c = self.backend.reader().await?;
        let tenant = || {
            params()
                .set("tenant", filter.tenant.as_str())
                .set("user", filter.user.as_ref().map(UserKey::as_str))
        };
        let cursor = page.after.or(page.before).map(ThreadId::uuid);
        if let Some(id) = cursor {
            let (is_known,): (bool,) = c.one(&FIND_CURSOR, tenant().set("cursor", id)).await?;
            if !is_known {
                return Err(StoreError::UnknownCursor);
            }
        }
        let span = Span::new(page, None);
        let below = cursor
            .filter(|_| !span.upwards)
            .into_iter()
            .chain(made_before(filter))
            .min();
        let values = tenant()
            .set(
                "above",
                cursor.filter(|_| span.upwards).unwrap_or(Uuid::nil()),
            )
            .set("below", below.unwrap_or(Uuid::max()))
            .set("upstream", filter.upstream.as_ref())
            .set("lifecycle", filter.lifecycle.map(Lifecycle::as_str))
            .set("idle", filter.state == Some(ThreadState::Idle))
            .set(
                "requires_action",
                filter.state == Some(ThreadState::RequiresAction),
            )
            .set("created_before", filter.created_before)
            .set("inactive_since", filter.inactive_since)
            .set("limit", span.fetch);
        let rows: Vec<ThreadWithActivity> = c.all(listing(filter, span.upwards), values).await?;
        span.page(rows)
    }

    /// Changes the key's current thread. `None` if there is none, or it has expired. A change is
    /// no activity: an idle thread stays as idle as it was. A thread whose new limit is shorter
    /// than its idle time has expired.
    pub async fn update_thread(
        &self,
        key: &ConversationKey,
        update: &ThreadUpdate,
    ) -> Result<Option<Thread>, StoreError> {
        let mut c = self.backend.writer().await?;
        let (from_now, from_last_activity) = ttl_millis(update.life.and_then(NewLife::own));
        let values = params()
            .key(key)
            .json("metadata", update.metadata.as_ref())?
            .set("changes_life", update.life.is_some())
            .set("from_now", from_now)
            .set("from_last_activity", from_last_activity)
            .set("max_age", update.limits.max_age.map(millis))
            .set("max_idle", update.limits.max_idle.map(millis));
        let row: Option<ThreadRow> = c.optional(&UPDATE, values).await?;
        row.map(Thread::try_from).transpose()
    }
}

/// Returns one of two statements, made with [`BY_KEY`] and [`BY_ID`], and its parameters, by the
/// kind of name.
pub(super) fn by_name<'a>(
    name: ThreadName<'a>,
    by_key: &'static Statement,
    by_id: &'static Statement,
) -> (&'static Statement, Params<'a>) {
    match name {
        ThreadName::Newest(key) => (by_key, params().key(key)),
        ThreadName::Id(tenant, id) => (
            by_id,
            params()
                .set("tenant", tenant.as_str())
                .set("thread", id.uuid()),
        ),
    }
}

/// Returns a thread of a tenant.
pub(super) async fn of_tenant(
    c: &mut Connection,
    tenant: &TenantKey,
    id: ThreadId,
) -> Result<Option<Thread>, StoreError> {
    let values = params()
        .set("tenant", tenant.as_str())
        .set("thread", id.uuid());
    let row: Option<ThreadRow> = c.optional(&READ_OF_TENANT, values).await?;
    row.map(Thread::try_from).transpose()
}

/// Returns the statement of a list whose index leaves the fewest rows to the other filters.
fn listing(filter: &ThreadFilter, upwards: bool) -> &'static Statement {
    let directions = match (filter.state, filter.lifecycle) {
        (Some(ThreadState::Active | ThreadState::RequiresAction), _) => &LIST_AT_WORK,
        _ if filter.user.is_some() => &LIST_OF_USER,
        (_, Some(Lifecycle::Archived | Lifecycle::Deleting)) => &LIST_PAST,
        _ if filter.upstream.is_some() => &LIST_OF_UPSTREAM,
        (_, Some(Lifecycle::Current)) => &LIST_CURRENT,
        _ => &LIST_ALL,
    };
    let [ascending, descending] = directions;
    if upwards { ascending } else { descending }
}

/// Returns a bound above the ids of all threads that match a filter by time.
fn made_before(filter: &ThreadFilter) -> Option<Uuid> {
    // A thread without activity since a time was created before it.
    let before = [filter.created_before, filter.inactive_since]
        .into_iter()
        .flatten()
        .min()?;
    let millis = u128::try_from(before.checked_add_signed(SKEW)?.timestamp_millis()).unwrap_or(0);
    Some(Uuid::from_u128(millis << 80))
}

/// The name of a thread.
#[derive(Clone, Copy, Debug)]
pub enum ThreadName<'a> {
    /// The key's current thread or, if it has none, its newest archived one.
    Newest(&'a ConversationKey),
    /// A thread of a tenant, by its id.
    Id(&'a TenantKey, ThreadId),
}

/// Everything that is recorded about one thread.
#[derive(Clone, Debug, PartialEq)]
pub struct ThreadReport {
    pub thread: Thread,
    pub activity: ThreadActivity,
    /// The run that was admitted last.
    pub last_run: Option<Run>,
    /// The newest thread that names this one as its previous thread.
    pub next_thread: Option<ThreadId>,
}

/// A filter of threads: those that match all fields that are set. Both times rely on ids. The time
/// in an id must be that of the thread's creation, or earlier, up to a day off. Ids that the
/// gateway makes are like that.
#[derive(Clone, Debug)]
pub struct ThreadFilter {
    pub tenant: TenantKey,
    pub user: Option<UserKey>,
    pub upstream: Option<String>,
    pub lifecycle: Option<Lifecycle>,
    pub state: Option<ThreadState>,
    pub created_before: Option<Timestamp>,
    /// Threads without activity since this time.
    pub inactive_since: Option<Timestamp>,
}

impl ThreadFilter {
    /// Matches all threads of a tenant.
    pub const fn all(tenant: TenantKey) -> Self {
        Self {
            tenant,
            user: None,
            upstream: None,
            lifecycle: None,
            state: None,
            created_before: None,
            inactive_since: None,
        }
    }
}

/// A change of a thread. `None`: the field stays.
#[derive(Clone, Debug, Default)]
pub struct ThreadUpdate {
    pub metadata: Option<Metadata>,
    pub life: Option<NewLife>,
    /// The configured limits of the key's scope.
    pub limits: Limits,
}

/// A row with everything in a thread's report.
#[derive(FromRow)]
struct ReportRow {
    #[sqlx(flatten)]
    thread: ThreadWithActivity,
    #[sqlx(flatten)]
    last_run: Found<RunRow>,
    next_thread: Option<Uuid>,
}

impl TryFrom<ReportRow> for ThreadReport {
    type Error = StoreError;

    fn try_from(row: ReportRow) -> Result<Self, StoreError> {
        let (thread, activity) = row.thread.into_parts()?;
        Ok(Self {
            thread,
            activity,
            last_run: row.last_run.0.map(Run::try_from).transpose()?,
            next_thread: row.next_thread.map(ThreadId::from_uuid),
        })
    }
}

#[cfg(test)]
mod tests {
    use sqlx::{AssertSqlSafe, Connection as _, SqliteConnection};

    use super::super::engine::Engine;
    use super::super::import::id_of;
    use super::*;
    use crate::domain::Timestamp;

    #[test]
    fn the_bound_of_a_time_is_above_the_ids_of_it_and_below_later_ones() {
        let time: Timestamp = "2026-11-22T09:00:00.123Z".parse().unwrap();
        let filter = ThreadFilter {
            created_before: Some(time),
            ..ThreadFilter::all(TenantKey::default())
        };
        let bound = made_before(&filter).unwrap();
        assert!(id_of(time).uuid() < bound);
        assert!(id_of(time + SKEW - chrono::TimeDelta::milliseconds(1)).uuid() < bound);
        assert!(id_of(time + SKEW + chrono::TimeDelta::milliseconds(1)).uuid() > bound);
        assert_eq!(
            made_before(&ThreadFilter {
                created_before: None,
                ..filter
            }),
            None
        );
    }

    /// Indexes by tenant are read in the order of ids. Threads of one user are sorted.
    #[tokio::test]
    async fn a_list_reads_no_thread_of_another_tenant() {
        let mut connection = SqliteConnection::connect("sqlite::memory:").await.unwrap();
        sqlx::migrate!("migrations/sqlite")
            .run(&mut connection)
            .await
            .unwrap();
        for (lists, is_sorted) in [
            (&LIST_ALL, false),
            (&LIST_OF_UPSTREAM, false),
            (&LIST_CURRENT, false),
            (&LIST_PAST, false),
            (&LIST_OF_USER, true),
        ] {
            for list in lists {
                let explain = format!("EXPLAIN QUERY PLAN {}", list.sent(Engine::Sqlite).sql);
                let plan: Vec<(i64, i64, i64, String)> = sqlx::query_as(AssertSqlSafe(explain))
                    .fetch_all(&mut connection)
                    .await
                    .unwrap();
                let sorts = plan
                    .iter()
                    .any(|step| step.3 == "USE TEMP B-TREE FOR ORDER BY");
                assert!(
                    plan[0].3.contains("(tenant=?") && sorts == is_sorted,
                    "{}\n{plan:#?}",
                    list.name
                );
            }
        }
    }
}

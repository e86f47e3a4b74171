//! The embedded store: one SQLite file, one process.
//!
//! There is one writing connection, so writing transactions come one after another and never meet; readers have
//! connections of their own and see what is committed.
//!
//! Parameters are written `$1`, not `?1`: the driver binds a script of several statements wrongly if one of them
//! leaves out a number of the `?` kind.

mod admit;
mod control;
mod deletion;
mod dialect;
mod end;
mod keeping;
mod keys;
mod life;
mod once;
mod open;
mod read;
mod record;
mod remnants;
mod replicas;
mod rollover;
mod threads;
mod tools;
mod turn;

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::{self, BoxStream, StreamExt};
use sqlx::migrate::Migrator;
use sqlx::types::Json;
use sqlx::{Connection, Sqlite, SqliteConnection, Transaction};
use tokio_util::sync::CancellationToken;

use super::errors::check_version;
use super::pool::{Pool, on};
use super::{
    Admission, Admitted, Answered, Binding, Bound, Claim, Closing, News, Orphan, Pause, Paused, Renewed,
    Repeated, Request, RunEnd, RunLease, RunProgress, Store, StoreError, ThreadName, ToolAnswer, Withdrawal,
    Withdrawn, Withholding,
};
use crate::config::StoreConfig;
use crate::domain::{
    Baseline, Context, ConversationKey, EventBatch, Message, MessageId, Page, PageRequest, ReplicaId, Run,
    RunId, ThreadId,
};

static MIGRATOR: Migrator = sqlx::migrate!("migrations/sqlite");

/// The present, in milliseconds since 1970, by SQLite's clock: the same at each place of a statement.
macro_rules! now {
    () => {
        "CAST(round(unixepoch('now', 'subsec') * 1000) AS INTEGER)"
    };
}
use now;

/// When the thread `t` expires; NULL if never. The parameters with these names hold the configured limits, in milliseconds.
/// Says what [`Lifetimes::expiry`](crate::domain::Lifetimes::expiry) says.
macro_rules! expiry {
    ($max_age:literal, $max_idle:literal) => {
        concat!(
            "CASE WHEN t.max_age_ms IS NULL AND t.max_idle_ms IS NULL THEN ",
            $crate::store::sqlite::earlier!($max_age, $max_idle),
            " ELSE ",
            $crate::store::sqlite::earlier!("t.max_age_ms", "t.max_idle_ms"),
            " END"
        )
    };
}
use expiry;

/// The earlier end of the thread `t` by two limits, or by the one that there is: `min` knows nothing if one of them is NULL.
macro_rules! earlier {
    ($max_age:literal, $max_idle:literal) => {
        concat!(
            "min(COALESCE(t.created_at + ",
            $max_age,
            ", t.last_active_at + ",
            $max_idle,
            "), COALESCE(t.last_active_at + ",
            $max_idle,
            ", t.created_at + ",
            $max_age,
            "))"
        )
    };
}
use earlier;

/// What to set of the thread `t` so that it lives as long as its caller wants, if that is said: parameters as made by
/// [`ttl_millis`](super::rows::ttl_millis). It is active now, too.
macro_rules! live_on {
    ($from_now:literal, $from_last_activity:literal) => {
        concat!(
            "last_active_at = ",
            $crate::store::sqlite::now!(),
            ",
            max_age_ms = CASE WHEN ",
            $from_now,
            " IS NOT NULL THEN max(0, ",
            $crate::store::sqlite::now!(),
            " - t.created_at + ",
            $from_now,
            ") WHEN ",
            $from_last_activity,
            " IS NULL THEN t.max_age_ms END,
            max_idle_ms = CASE WHEN ",
            $from_now,
            " IS NULL THEN COALESCE(",
            $from_last_activity,
            ", t.max_idle_ms) END,
            due_at = COALESCE(",
            $crate::store::sqlite::now!(),
            " + COALESCE(",
            $from_now,
            ", ",
            $from_last_activity,
            "), t.due_at)"
        )
    };
}
use live_on;

/// The store in a SQLite file.
#[derive(Clone, Debug)]
pub struct SqliteStore {
    writer: Arc<Pool<SqliteConnection>>,
    readers: Arc<Pool<SqliteConnection>>,
    /// Held for the life of the store: keeps a second process off the file.
    lock: Arc<File>,
    closed: CancellationToken,
}

impl SqliteStore {
    /// Opens the file, making it and its folder where they are missing. Does not look at the schema. Sessions of
    /// earlier processes end here: the lock proves that these are gone, so what they left can be adopted at once.
    ///
    /// Databases in memory are refused: the readers need a file. Use one in a temporary folder.
    ///
    /// # Errors
    /// [`StoreError::Open`] if the URL is not of the form `sqlite:<path>`, the file cannot be opened, or
    /// another process has it open.
    pub async fn open(config: &StoreConfig) -> Result<Self, StoreError> {
        let path = open::path(config)?;
        let lock = open::lock(&path)?;
        // The writer goes first: it makes the file, which readers cannot.
        let writer = open::writer(&path, config)?;
        on!(writer, c => replicas::forget(c)).map_err(|error| open::failed(&path, &error))?;
        let readers = open::readers(&path, config)?;
        Ok(Self {
            writer: Arc::new(writer),
            readers: Arc::new(readers),
            lock: Arc::new(lock),
            closed: CancellationToken::new(),
        })
    }

    /// Brings the schema up to date.
    ///
    /// # Errors
    /// [`StoreError::Schema`] if the database is newer than this program.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        on!(self.writer, c => migrate(c))
    }
}

async fn migrate(connection: &mut SqliteConnection) -> Result<(), StoreError> {
    Ok(MIGRATOR.run(connection).await?)
}

/// Begins a transaction that may write. Dropped before its commit, it leaves nothing behind.
async fn write(connection: &mut SqliteConnection) -> Result<Transaction<'_, Sqlite>, StoreError> {
    Ok(connection.begin_with("BEGIN IMMEDIATE").await?)
}

#[async_trait]
impl Store for SqliteStore {
    async fn ready(&self) -> Result<(), StoreError> {
        let known = MIGRATOR.iter().map(|migration| migration.version).max().unwrap_or(0);
        check_version(on!(self.readers, c => read::schema_version(c))?, known)
    }

    async fn admit(&self, admission: &Admission) -> Result<Admitted, StoreError> {
        on!(self.writer, c => admit::admit(c, admission))
    }

    async fn repeated(
        &self,
        key: &ConversationKey,
        idempotency_key: &str,
        remember: Duration,
    ) -> Result<Option<Repeated>, StoreError> {
        on!(self.writer, c => once::repeated(c, key, idempotency_key, remember))
    }

    async fn claim(&self, lease: &RunLease) -> Result<Claim, StoreError> {
        on!(self.writer, c => turn::claim(c, lease))
    }

    async fn displace(&self, lease: &RunLease, discard: bool) -> Result<Option<RunId>, StoreError> {
        on!(self.writer, c => control::displace(c, lease, discard))
    }

    async fn request_cancel(&self, key: &ConversationKey, id: RunId) -> Result<Option<Run>, StoreError> {
        on!(self.writer, c => control::request_cancel(c, key, id))
    }

    async fn take_queued(&self, replica: ReplicaId, id: RunId) -> Result<Option<RunLease>, StoreError> {
        on!(self.writer, c => read::take_queued(c, replica, id))
    }

    async fn pause(&self, lease: &RunLease, pause: &Pause) -> Result<Paused, StoreError> {
        on!(self.writer, c => tools::pause(c, lease, pause))
    }

    async fn answer_tools(
        &self,
        key: &ConversationKey,
        id: RunId,
        answer: &ToolAnswer,
    ) -> Result<Answered, StoreError> {
        on!(self.writer, c => tools::answer_tools(c, key, id, answer))
    }

    async fn sends_outputs(&self, lease: &RunLease) -> Result<bool, StoreError> {
        on!(self.writer, c => read::sends_outputs(c, lease))
    }

    async fn sends_again(&self, lease: &RunLease) -> Result<bool, StoreError> {
        on!(self.writer, c => read::sends_again(c, lease))
    }

    async fn requests(&self, replica: ReplicaId) -> Result<Vec<Request>, StoreError> {
        on!(self.readers, c => control::requests(c, replica))
    }

    async fn lost(&self, replica: ReplicaId, working: &[RunId]) -> Result<Vec<RunId>, StoreError> {
        on!(self.readers, c => control::lost(c, replica, working))
    }

    async fn bind_upstream_thread(
        &self,
        lease: &RunLease,
        binding: &Binding<'_>,
    ) -> Result<Bound, StoreError> {
        on!(self.writer, c => turn::bind_upstream_thread(c, lease, binding))
    }

    async fn withhold_earlier(&self, lease: &RunLease, what: &Withholding) -> Result<bool, StoreError> {
        on!(self.writer, c => turn::withhold_earlier(c, lease, what))
    }

    async fn earlier(
        &self,
        run: RunId,
        before: Option<i64>,
        limit: u32,
    ) -> Result<Page<Message>, StoreError> {
        on!(self.readers, c => read::earlier(c, run, before, limit))
    }

    async fn backlog(
        &self,
        run: RunId,
        before: Option<i64>,
        limit: u32,
    ) -> Result<Page<Message>, StoreError> {
        on!(self.readers, c => read::backlog(c, run, before, limit))
    }

    async fn baseline(&self, run: RunId) -> Result<Baseline, StoreError> {
        on!(self.readers, c => read::baseline(c, run))
    }

    async fn settled(
        &self,
        lease: &RunLease,
        run: RunId,
        found: Context,
        synced: bool,
    ) -> Result<bool, StoreError> {
        on!(self.writer, c => turn::settled(c, lease, run, found, synced))
    }

    async fn finish(&self, lease: &RunLease, end: &RunEnd) -> Result<Closing, StoreError> {
        on!(self.writer, c => end::finish(c, lease, end))
    }

    async fn withdraw(&self, lease: &RunLease, taken: &Withdrawal) -> Result<Withdrawn, StoreError> {
        on!(self.writer, c => end::withdraw(c, lease, taken))
    }

    async fn events(&self, run: RunId, from: i64) -> Result<Vec<EventBatch>, StoreError> {
        on!(self.readers, c => read::events(c, run, from))
    }

    async fn messages(
        &self,
        name: ThreadName<'_>,
        across: bool,
        page: &PageRequest<MessageId>,
    ) -> Result<Option<Page<Message>>, StoreError> {
        on!(self.readers, c => read::messages(c, name, across, page))
    }

    async fn transcript(&self, thread: ThreadId, after: i64, limit: u32) -> Result<Vec<Message>, StoreError> {
        on!(self.readers, c => read::transcript(c, thread, after, limit))
    }

    async fn runs(
        &self,
        key: &ConversationKey,
        page: &PageRequest<RunId>,
    ) -> Result<Option<Page<Run>>, StoreError> {
        on!(self.readers, c => read::runs(c, key, page))
    }

    async fn unfinished(&self, key: &ConversationKey) -> Result<Option<Vec<Run>>, StoreError> {
        on!(self.readers, c => read::unfinished(c, key))
    }

    async fn run(
        &self,
        key: &ConversationKey,
        id: RunId,
    ) -> Result<Option<(Run, Option<Message>)>, StoreError> {
        on!(self.readers, c => read::run(c, key, id))
    }

    async fn renew_replica(
        &self,
        id: ReplicaId,
        address: &str,
        ttl: Duration,
    ) -> Result<Renewed, StoreError> {
        on!(self.writer, c => replicas::renew(c, id, address, ttl))
    }

    async fn retire_replica(&self, id: ReplicaId) -> Result<(), StoreError> {
        on!(self.writer, c => replicas::retire(c, id))
    }

    async fn adopt_orphans(
        &self,
        id: ReplicaId,
        working: &[RunId],
        limit: u32,
    ) -> Result<Vec<Orphan>, StoreError> {
        on!(self.writer, c => replicas::adopt_orphans(c, id, working, limit))
    }

    async fn release(&self, leases: &[RunLease]) -> Result<(), StoreError> {
        on!(self.writer, c => replicas::release(c, leases))
    }

    async fn record(&self, progress: &[RunProgress]) -> Result<Vec<RunId>, StoreError> {
        on!(self.writer, c => record::record(c, progress))
    }

    /// There is nobody else.
    async fn tell(&self, _news: &[News]) -> Result<(), StoreError> {
        Ok(())
    }

    fn news(&self) -> BoxStream<'static, News> {
        stream::pending().take_until(self.closed.clone().cancelled_owned()).boxed()
    }

    async fn close(&self) {
        self.closed.cancel();
        // The readers first: the last connection to leave tidies the log away, which a reader may not.
        self.readers.close().await;
        self.writer.close().await;
        // Ends with the file handle at the latest.
        let _ = self.lock.unlock();
    }
}

/// Ids as a parameter that a statement can take apart: a list, in hexadecimal.
fn listed(runs: &[RunId]) -> Json<Vec<String>> {
    Json(runs.iter().map(|run| run.uuid().simple().to_string()).collect())
}

#[cfg(test)]
mod tests {
    use sqlx::AssertSqlSafe;

    use super::*;
    use crate::domain::{Lifecycle, TenantKey, ThreadState};
    use crate::store::ThreadFilter;
    use crate::store::paging::Span;

    /// What a plan says of a step that reads a whole table. Taking a list in a column apart is none.
    fn is_scan(step: &str) -> bool {
        step.starts_with("SCAN") && !step.contains("VIRTUAL TABLE") && step != "SCAN CONSTANT ROW"
    }

    #[tokio::test]
    async fn what_each_call_costs_does_not_grow_with_the_tables() {
        let mut connection = SqliteConnection::connect("sqlite::memory:").await.unwrap();
        MIGRATOR.run(&mut connection).await.unwrap();
        let scripts = [admit::ADMIT, end::FINISH, record::RECORD].into_iter().chain(read::ACROSS);
        for statement in scripts.flat_map(|script| script.split(';')) {
            let explain = AssertSqlSafe(format!("EXPLAIN QUERY PLAN {statement}"));
            let plan: Vec<(i64, i64, i64, String)> =
                sqlx::query_as(explain).fetch_all(&mut connection).await.unwrap();
            // To sort what one thread gave is fine: it is a page at most.
            let sorts = plan.iter().any(|step| step.3 == "USE TEMP B-TREE FOR ORDER BY");
            assert!(!sorts && !plan.iter().any(|step| is_scan(&step.3)), "{statement}\n{plan:#?}");
        }
    }

    /// 2 is FULL: the log is flushed with each commit.
    #[tokio::test]
    async fn a_commit_survives_a_power_loss_unless_configured_otherwise() {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("sqlite:{}", folder.path().join("a.db").display());
        let config = StoreConfig { url: Some(url.into()), ..StoreConfig::default() };
        let store = SqliteStore::open(&config).await.unwrap();
        let mut lent = store.writer.lend().await.unwrap();
        let level: i64 = sqlx::query_scalar("PRAGMA synchronous").fetch_one(lent.connection()).await.unwrap();
        lent.give_back(&Ok(()));
        assert_eq!(level, 2);
        store.close().await;
    }

    /// Lists of threads are read in the order of ids, from an index that holds the tenant's alone.
    #[tokio::test]
    async fn a_list_reads_no_thread_of_another_tenant() {
        let mut connection = SqliteConnection::connect("sqlite::memory:").await.unwrap();
        MIGRATOR.run(&mut connection).await.unwrap();
        let all = ThreadFilter::all(TenantKey::default());
        let time = "2026-11-22T09:00:00Z".parse().unwrap();
        let mut filters = vec![
            ThreadFilter { user: Some("alice".to_owned().try_into().unwrap()), ..all.clone() },
            ThreadFilter { upstream: Some("main".to_owned()), ..all.clone() },
            ThreadFilter { state: Some(ThreadState::Idle), ..all.clone() },
            ThreadFilter { created_before: Some(time), ..all.clone() },
            ThreadFilter { inactive_since: Some(time), ..all.clone() },
        ];
        for lifecycle in [Lifecycle::Current, Lifecycle::Archived, Lifecycle::Deleting] {
            filters.push(ThreadFilter { lifecycle: Some(lifecycle), ..all.clone() });
        }
        filters.push(all);
        for filter in &filters {
            for (ascending, after) in [(true, None), (false, None), (true, Some(ThreadId::new()))] {
                let page = PageRequest { limit: 10, ascending, after, before: None };
                let statement = threads::listing(filter, after, &Span::new(&page, None)).into_string();
                let explain = AssertSqlSafe(format!("EXPLAIN QUERY PLAN {statement}"));
                let plan: Vec<(i64, i64, i64, String)> =
                    sqlx::query_as(explain).fetch_all(&mut connection).await.unwrap();
                let first = &plan[0].3;
                let sorts = plan.iter().any(|step| step.3 == "USE TEMP B-TREE FOR ORDER BY");
                // What one user has is sorted.
                let is_sound = first.contains("(tenant=?") && (filter.user.is_some() || !sorts);
                assert!(is_sound, "{statement}\n{plan:#?}");
            }
        }
    }
}

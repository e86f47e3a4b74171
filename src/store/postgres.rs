//! The production store: Postgres 12 or newer, shared by any number of replicas.
//!
//! Isolation is READ COMMITTED, the server's default. Statements that change a run, messages that its thread counts,
//! and the thread lock them in this order; admission locks the thread and then only adds rows. An idempotency key comes last.
//! Those that take several requests to delete, runs or threads take them in this order, and each kind by id. So no two of them
//! wait for each other.

mod admit;
mod connect;
mod control;
mod deletion;
mod dialect;
mod end;
mod keeping;
mod keys;
mod life;
mod news;
mod once;
mod read;
mod record;
mod remnants;
mod replicas;
mod rollover;
mod threads;
mod tools;
mod turn;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use sqlx::migrate::{MigrateError, Migrator};
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection, Executor, PgConnection, Postgres, Transaction};
use std::fmt;
use tokio_util::sync::CancellationToken;

use super::errors::{check_version, denial};
use super::pool::{Dropped, Pool, Trust, on};
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

use read::Applied;

static MIGRATOR: Migrator = sqlx::migrate!("migrations/postgres");

/// When the thread `t` expires; NULL if never. The parameters with these names hold the configured limits, in milliseconds.
/// Says what [`Lifetimes::expiry`](crate::domain::Lifetimes::expiry) says.
macro_rules! expiry {
    ($max_age:literal, $max_idle:literal) => {
        concat!(
            "CASE WHEN t.max_age_ms IS NULL AND t.max_idle_ms IS NULL THEN ",
            $crate::store::postgres::earlier!($max_age, $max_idle),
            " ELSE ",
            $crate::store::postgres::earlier!("t.max_age_ms", "t.max_idle_ms"),
            " END"
        )
    };
}
use expiry;

/// The earlier end of the thread `t` by two limits, or by the one that there is.
macro_rules! earlier {
    ($max_age:literal, $max_idle:literal) => {
        concat!(
            "LEAST(t.created_at + ",
            $max_age,
            " * interval '1 millisecond', t.last_active_at + ",
            $max_idle,
            " * interval '1 millisecond')"
        )
    };
}
use earlier;

/// What to set of the thread `t` so that it lives as long as its caller wants, if that is said: parameters as made by
/// [`ttl_millis`](super::rows::ttl_millis). It is active now, too.
macro_rules! live_on {
    ($from_now:literal, $from_last_activity:literal) => {
        concat!(
            "last_active_at = clock_timestamp(),
            max_age_ms = CASE WHEN ",
            $from_now,
            " IS NOT NULL
                THEN GREATEST(0, ceil(EXTRACT(epoch FROM clock_timestamp() - t.created_at) * 1000)::bigint + ",
            $from_now,
            ")
                WHEN ",
            $from_last_activity,
            " IS NULL THEN t.max_age_ms END,
            max_idle_ms = CASE WHEN ",
            $from_now,
            " IS NULL THEN COALESCE(",
            $from_last_activity,
            ", t.max_idle_ms) END,
            due_at = COALESCE(clock_timestamp() + COALESCE(",
            $from_now,
            ", ",
            $from_last_activity,
            ") * interval '1 millisecond', t.due_at)"
        )
    };
}
use live_on;

/// Longest time for one step, once it has a connection: somewhat more than the server gives a statement.
const CALL_TIMEOUT: Duration = Duration::from_secs(12);

/// The store in a Postgres database.
#[derive(Clone)]
pub struct PostgresStore {
    /// Admissions, reads, and what else callers ask for. All that is called within a request, which is dropped when its
    /// caller leaves, belongs here.
    general: Arc<Pool<PgConnection>>,
    /// What ends runs and starts waiting ones: a flood of the rest cannot starve it. Only tasks of ours call it.
    vital: Arc<Pool<PgConnection>>,
    /// A connection that only keeps the session alive: no statement that is stuck can end it.
    session: Arc<Pool<PgConnection>>,
    trust: Arc<Trust>,
    /// The way to the server itself, where a pooler is in between.
    direct: PgConnectOptions,
    closed: CancellationToken,
}

impl fmt::Debug for PostgresStore {
    /// The driver's own text of the way to the server has the password in it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresStore").field("general", &self.general).finish_non_exhaustive()
    }
}

impl PostgresStore {
    /// Connects, waiting up to `startup_timeout` for a server that is not up yet. Does not look at the schema.
    ///
    /// Half of `max_connections` is set aside for what must not wait behind a flood: a turn needs it as often as the rest.
    /// Two more connections keep the session and hear what other replicas tell.
    ///
    /// # Errors
    /// [`StoreError::Open`] at once if waiting does not help: a bad URL, password or database name.
    /// [`StoreError::Unavailable`] when the time is up.
    pub async fn connect(config: &StoreConfig) -> Result<Self, StoreError> {
        let (options, direct) = connect::options(config)?;
        connect::wait_until_up(&options, config.startup_timeout).await?;
        if let Some(direct) = &direct {
            connect::wait_until_up(direct, config.startup_timeout).await?;
        }
        let vital = (config.max_connections / 2).max(1);
        let general = config.max_connections.saturating_sub(vital).max(1);
        let trust = Arc::new(Trust::default());
        let pool = |size, dropped| {
            let options = options.options.clone();
            Pool::new(options, Arc::clone(&trust), size, config.acquire_timeout, CALL_TIMEOUT, dropped)
        };
        Ok(Self {
            general: Arc::new(pool(general, Dropped::Settled)?),
            vital: Arc::new(pool(vital, Dropped::Closed)?),
            session: Arc::new(pool(1, Dropped::Closed)?),
            direct: direct.unwrap_or(options).options,
            trust,
            closed: CancellationToken::new(),
        })
    }

    /// Brings the schema up to date. Replicas that do so at once wait for each other. Where nothing is to be done, nothing but
    /// reading is: the role may be one that must not change the schema.
    ///
    /// # Errors
    /// [`StoreError::Schema`] if the database is newer than this program, [`StoreError::Open`] if the role may not do it.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        // A connection of its own: a migration may take longer than our statements are allowed to.
        let mut connection = self.direct.connect().await?;
        if !is_up_to_date(read::applied(&mut connection).await?)? {
            connection.execute("SET statement_timeout = 0").await?;
            if let Err(error) = MIGRATOR.run(&mut connection).await {
                return Err(match denial(&error) {
                    Some(what) => StoreError::Open(may_not_migrate(&mut connection, &what).await),
                    None => error.into(),
                });
            }
        }
        Ok(connection.close().await?)
    }
}

/// Compares what was applied to the database with what this program has.
fn is_up_to_date(applied: Vec<Applied>) -> Result<bool, MigrateError> {
    let count = applied.len();
    for Applied { version, checksum, success } in applied {
        let known = MIGRATOR.iter().find(|migration| migration.version == version);
        match known {
            _ if !success => return Err(MigrateError::Dirty(version)),
            None => return Err(MigrateError::VersionMissing(version)),
            Some(known) if *known.checksum != *checksum => {
                return Err(MigrateError::VersionMismatch(version));
            }
            Some(_) => {}
        }
    }
    Ok(count == MIGRATOR.iter().count())
}

/// What the role of this connection lacks, and who has it.
async fn may_not_migrate(connection: &mut PgConnection, what: &str) -> String {
    let names = read::role_and_schema(connection).await;
    let (role, schema) = names.unwrap_or_else(|_| ("<role>".to_owned(), "<schema>".to_owned()));
    format!(
        "the schema of the database is not up to date, and the role {role} may not change it ({what}): run `threadkeeper \
         migrate` with the role that owns the tables, or, as long as there are none, GRANT CREATE ON SCHEMA {schema} TO {role}"
    )
}

/// Begins a transaction. Dropped before its commit, it leaves nothing behind.
async fn write(connection: &mut PgConnection) -> Result<Transaction<'_, Postgres>, StoreError> {
    Ok(connection.begin().await?)
}

#[async_trait]
impl Store for PostgresStore {
    async fn ready(&self) -> Result<(), StoreError> {
        let known = MIGRATOR.iter().map(|migration| migration.version).max().unwrap_or(0);
        check_version(on!(self.general, c => read::schema_version(c))?, known)
    }

    async fn admit(&self, admission: &Admission) -> Result<Admitted, StoreError> {
        on!(self.general, c => admit::admit(c, admission))
    }

    async fn repeated(
        &self,
        key: &ConversationKey,
        idempotency_key: &str,
        remember: Duration,
    ) -> Result<Option<Repeated>, StoreError> {
        on!(self.general, c => once::repeated(c, key, idempotency_key, remember))
    }

    async fn claim(&self, lease: &RunLease) -> Result<Claim, StoreError> {
        on!(self.vital, c => turn::claim(c, lease))
    }

    async fn displace(&self, lease: &RunLease, discard: bool) -> Result<Option<RunId>, StoreError> {
        on!(self.vital, c => control::displace(c, lease, discard))
    }

    async fn request_cancel(&self, key: &ConversationKey, id: RunId) -> Result<Option<Run>, StoreError> {
        on!(self.general, c => control::request_cancel(c, key, id))
    }

    async fn take_queued(&self, replica: ReplicaId, id: RunId) -> Result<Option<RunLease>, StoreError> {
        on!(self.general, c => read::take_queued(c, replica, id))
    }

    async fn pause(&self, lease: &RunLease, pause: &Pause) -> Result<Paused, StoreError> {
        on!(self.vital, c => tools::pause(c, lease, pause))
    }

    async fn answer_tools(
        &self,
        key: &ConversationKey,
        id: RunId,
        answer: &ToolAnswer,
    ) -> Result<Answered, StoreError> {
        on!(self.general, c => tools::answer_tools(c, key, id, answer))
    }

    async fn sends_outputs(&self, lease: &RunLease) -> Result<bool, StoreError> {
        on!(self.vital, c => read::sends_outputs(c, lease))
    }

    async fn sends_again(&self, lease: &RunLease) -> Result<bool, StoreError> {
        on!(self.vital, c => read::sends_again(c, lease))
    }

    async fn requests(&self, replica: ReplicaId) -> Result<Vec<Request>, StoreError> {
        on!(self.vital, c => control::requests(c, replica))
    }

    async fn lost(&self, replica: ReplicaId, working: &[RunId]) -> Result<Vec<RunId>, StoreError> {
        on!(self.vital, c => control::lost(c, replica, working))
    }

    async fn bind_upstream_thread(
        &self,
        lease: &RunLease,
        binding: &Binding<'_>,
    ) -> Result<Bound, StoreError> {
        on!(self.vital, c => turn::bind_upstream_thread(c, lease, binding))
    }

    async fn withhold_earlier(&self, lease: &RunLease, what: &Withholding) -> Result<bool, StoreError> {
        on!(self.general, c => turn::withhold_earlier(c, lease, what))
    }

    async fn earlier(
        &self,
        run: RunId,
        before: Option<i64>,
        limit: u32,
    ) -> Result<Page<Message>, StoreError> {
        on!(self.general, c => read::earlier(c, run, before, limit))
    }

    async fn backlog(
        &self,
        run: RunId,
        before: Option<i64>,
        limit: u32,
    ) -> Result<Page<Message>, StoreError> {
        on!(self.general, c => read::backlog(c, run, before, limit))
    }

    async fn baseline(&self, run: RunId) -> Result<Baseline, StoreError> {
        on!(self.vital, c => read::baseline(c, run))
    }

    async fn settled(
        &self,
        lease: &RunLease,
        run: RunId,
        found: Context,
        synced: bool,
    ) -> Result<bool, StoreError> {
        on!(self.vital, c => turn::settled(c, lease, run, found, synced))
    }

    async fn finish(&self, lease: &RunLease, end: &RunEnd) -> Result<Closing, StoreError> {
        on!(self.vital, c => end::finish(c, lease, end))
    }

    async fn withdraw(&self, lease: &RunLease, taken: &Withdrawal) -> Result<Withdrawn, StoreError> {
        on!(self.vital, c => end::withdraw(c, lease, taken))
    }

    async fn events(&self, run: RunId, from: i64) -> Result<Vec<EventBatch>, StoreError> {
        on!(self.general, c => read::events(c, run, from))
    }

    async fn messages(
        &self,
        name: ThreadName<'_>,
        across: bool,
        page: &PageRequest<MessageId>,
    ) -> Result<Option<Page<Message>>, StoreError> {
        on!(self.general, c => read::messages(c, name, across, page))
    }

    async fn transcript(&self, thread: ThreadId, after: i64, limit: u32) -> Result<Vec<Message>, StoreError> {
        on!(self.general, c => read::transcript(c, thread, after, limit))
    }

    async fn runs(
        &self,
        key: &ConversationKey,
        page: &PageRequest<RunId>,
    ) -> Result<Option<Page<Run>>, StoreError> {
        on!(self.general, c => read::runs(c, key, page))
    }

    async fn unfinished(&self, key: &ConversationKey) -> Result<Option<Vec<Run>>, StoreError> {
        on!(self.general, c => read::unfinished(c, key))
    }

    async fn run(
        &self,
        key: &ConversationKey,
        id: RunId,
    ) -> Result<Option<(Run, Option<Message>)>, StoreError> {
        on!(self.general, c => read::run(c, key, id))
    }

    async fn renew_replica(
        &self,
        id: ReplicaId,
        address: &str,
        ttl: Duration,
    ) -> Result<Renewed, StoreError> {
        on!(self.session, c => replicas::renew(c, id, address, ttl))
    }

    async fn retire_replica(&self, id: ReplicaId) -> Result<(), StoreError> {
        on!(self.session, c => replicas::retire(c, id))
    }

    async fn adopt_orphans(
        &self,
        id: ReplicaId,
        working: &[RunId],
        limit: u32,
    ) -> Result<Vec<Orphan>, StoreError> {
        on!(self.vital, c => replicas::adopt_orphans(c, id, working, limit))
    }

    async fn release(&self, leases: &[RunLease]) -> Result<(), StoreError> {
        on!(self.vital, c => replicas::release(c, leases))
    }

    async fn record(&self, progress: &[RunProgress]) -> Result<Vec<RunId>, StoreError> {
        on!(self.vital, c => record::record(c, progress))
    }

    async fn tell(&self, news: &[News]) -> Result<(), StoreError> {
        on!(self.vital, c => news::tell(c, news))
    }

    fn news(&self) -> BoxStream<'static, News> {
        news::news(self.direct.clone(), Arc::clone(&self.trust), self.closed.clone())
    }

    async fn close(&self) {
        self.closed.cancel();
        tokio::join!(self.general.close(), self.vital.close(), self.session.close());
    }
}

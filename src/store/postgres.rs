//! The production store: Postgres 12 or newer, shared by any number of replicas.
//!
//! Isolation is READ COMMITTED, the server's default. Statements that change a run, messages that its thread counts,
//! and the thread lock them in this order; admission locks the thread and then only adds rows. An idempotency key comes last.
//! So no two of them wait for each other.

mod admit;
mod connect;
mod control;
mod end;
mod once;
mod read;
mod replicas;
mod tools;
mod turn;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::migrate::Migrator;
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection, Executor, PgConnection};

use super::errors::check_version;
use super::pool::{Pool, on};
use super::{
    Admission, Admitted, Answered, Claim, Closing, Orphan, Pause, Paused, Repeated, Request, RunEnd,
    RunLease, Store, StoreError, ToolAnswer,
};
use crate::config::StoreConfig;
use crate::domain::{
    Baseline, Context, ConversationKey, EventBatch, Message, MessageId, Page, PageRequest, ReplicaId, Run,
    RunId, Thread, ThreadActivity, ThreadId, UpstreamThreadId,
};

static MIGRATOR: Migrator = sqlx::migrate!("migrations/postgres");

/// Longest time for one step, once it has a connection: somewhat more than the server gives a statement.
const CALL_TIMEOUT: Duration = Duration::from_secs(12);

/// The store in a Postgres database.
#[derive(Clone, Debug)]
pub struct PostgresStore {
    /// Admissions, reads, and what else callers ask for.
    general: Arc<Pool<PgConnection>>,
    /// What ends runs, starts waiting ones and keeps sessions alive: a flood of the rest cannot starve it.
    vital: Arc<Pool<PgConnection>>,
    options: PgConnectOptions,
}

impl PostgresStore {
    /// Connects, waiting up to `startup_timeout` for a server that is not up yet. Does not look at the schema.
    ///
    /// A quarter of `max_connections`, at most 8, is set aside for what must not wait behind a flood.
    ///
    /// # Errors
    /// [`StoreError::Open`] at once if waiting does not help: a bad URL, password or database name.
    /// [`StoreError::Unavailable`] when the time is up.
    pub async fn connect(config: &StoreConfig) -> Result<Self, StoreError> {
        let options = connect::options(config)?;
        connect::wait_until_up(&options, config.startup_timeout).await?;
        let vital = (config.max_connections / 4).clamp(1, 8);
        let general = config.max_connections.saturating_sub(vital).max(1);
        Ok(Self {
            general: Arc::new(Pool::new(options.clone(), general, config.acquire_timeout, CALL_TIMEOUT)?),
            vital: Arc::new(Pool::new(options.clone(), vital, config.acquire_timeout, CALL_TIMEOUT)?),
            options,
        })
    }

    /// Brings the schema up to date. Replicas that do so at once wait for each other.
    ///
    /// # Errors
    /// [`StoreError::Schema`] if the database is newer than this program.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        // A connection of its own: a migration may take longer than our statements are allowed to.
        let mut connection = self.options.connect().await?;
        connection.execute("SET statement_timeout = 0").await?;
        MIGRATOR.run(&mut connection).await?;
        Ok(connection.close().await?)
    }
}

#[async_trait]
impl Store for PostgresStore {
    async fn ready(&self) -> Result<(), StoreError> {
        let known = MIGRATOR.iter().map(|migration| migration.version).max().unwrap_or(0);
        check_version(on!(self.vital, c => read::schema_version(c))?, known)
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

    async fn requests(&self, replica: ReplicaId) -> Result<Vec<Request>, StoreError> {
        on!(self.vital, c => control::requests(c, replica))
    }

    async fn lost(&self, replica: ReplicaId, working: &[RunId]) -> Result<Vec<RunId>, StoreError> {
        on!(self.vital, c => control::lost(c, replica, working))
    }

    async fn bind_upstream_thread(
        &self,
        lease: &RunLease,
        id: &UpstreamThreadId,
        rebuilt: bool,
    ) -> Result<bool, StoreError> {
        on!(self.vital, c => turn::bind_upstream_thread(c, lease, id, rebuilt))
    }

    async fn backlog(&self, run: RunId) -> Result<Vec<Message>, StoreError> {
        on!(self.vital, c => read::backlog(c, run))
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

    async fn events(&self, run: RunId, from: i64) -> Result<Vec<EventBatch>, StoreError> {
        on!(self.general, c => read::events(c, run, from))
    }

    async fn thread(&self, key: &ConversationKey) -> Result<Option<(Thread, ThreadActivity)>, StoreError> {
        on!(self.general, c => read::thread(c, key))
    }

    async fn messages(
        &self,
        key: &ConversationKey,
        page: &PageRequest<MessageId>,
    ) -> Result<Option<Page<Message>>, StoreError> {
        on!(self.general, c => read::messages(c, key, page))
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

    async fn renew_replica(&self, id: ReplicaId, address: &str, ttl: Duration) -> Result<(), StoreError> {
        on!(self.vital, c => replicas::renew(c, id, address, ttl))
    }

    async fn retire_replica(&self, id: ReplicaId) -> Result<(), StoreError> {
        on!(self.vital, c => replicas::retire(c, id))
    }

    async fn adopt_orphans(
        &self,
        id: ReplicaId,
        working: &[RunId],
        limit: u32,
    ) -> Result<Vec<Orphan>, StoreError> {
        on!(self.vital, c => replicas::adopt_orphans(c, id, working, limit))
    }

    async fn close(&self) {
        tokio::join!(self.general.close(), self.vital.close());
    }
}

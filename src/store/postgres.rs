//! The production store: Postgres 12 or newer, shared by any number of replicas.
//!
//! Isolation is READ COMMITTED, the server's default. Statements that change a thread and its runs lock the run
//! before the thread; admission locks the thread and then only adds a run. So no two of them wait for each other.

mod admit;
mod connect;
mod read;
mod replicas;
mod turn;

use std::time::Duration;

use async_trait::async_trait;
use sqlx::migrate::Migrator;
use sqlx::{Connection, Executor, PgPool};

use super::errors::check_version;
use super::{Admission, Admitted, Claim, Finished, Orphan, RunEnd, RunLease, Store, StoreError};
use crate::config::StoreConfig;
use crate::domain::{
    ConversationKey, Message, MessageId, Page, PageRequest, ReplicaId, Run, RunId, Thread, ThreadActivity,
    ThreadId, UpstreamThreadId,
};

static MIGRATOR: Migrator = sqlx::migrate!("migrations/postgres");

/// The store in a Postgres database.
#[derive(Clone, Debug)]
pub struct PostgresStore {
    /// Admissions and reads.
    general: PgPool,
    /// What ends runs, starts waiting ones and keeps sessions alive: a flood of the rest cannot starve it.
    vital: PgPool,
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
            general: connect::pool(&options, general, config.acquire_timeout),
            vital: connect::pool(&options, vital, config.acquire_timeout),
        })
    }

    /// Brings the schema up to date. Replicas that do so at once wait for each other.
    ///
    /// # Errors
    /// [`StoreError::Schema`] if the database is newer than this program.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        // A connection of its own: a migration may take longer than our statements are allowed to.
        let mut connection = self.vital.acquire().await?.detach();
        connection.execute("SET statement_timeout = 0").await?;
        MIGRATOR.run(&mut connection).await?;
        Ok(connection.close().await?)
    }
}

#[async_trait]
impl Store for PostgresStore {
    async fn ready(&self) -> Result<(), StoreError> {
        let known = MIGRATOR.iter().map(|migration| migration.version).max().unwrap_or(0);
        check_version(read::schema_version(&self.vital).await?, known)
    }

    async fn admit(&self, admission: &Admission) -> Result<Admitted, StoreError> {
        admit::admit(&self.general, admission).await
    }

    async fn claim(&self, lease: &RunLease) -> Result<Claim, StoreError> {
        turn::claim(&self.vital, lease).await
    }

    async fn bind_upstream_thread(
        &self,
        lease: &RunLease,
        id: &UpstreamThreadId,
    ) -> Result<bool, StoreError> {
        turn::bind_upstream_thread(&self.vital, lease, id).await
    }

    async fn finish(&self, lease: &RunLease, end: &RunEnd) -> Result<Option<Finished>, StoreError> {
        turn::finish(&self.vital, lease, end).await
    }

    async fn thread(&self, key: &ConversationKey) -> Result<Option<(Thread, ThreadActivity)>, StoreError> {
        read::thread(&self.general, key).await
    }

    async fn messages(
        &self,
        key: &ConversationKey,
        page: &PageRequest<MessageId>,
    ) -> Result<Option<Page<Message>>, StoreError> {
        read::messages(&self.general, key, page).await
    }

    async fn transcript(&self, thread: ThreadId, after: i64, limit: u32) -> Result<Vec<Message>, StoreError> {
        read::transcript(&self.general, thread, after, limit).await
    }

    async fn runs(
        &self,
        key: &ConversationKey,
        page: &PageRequest<RunId>,
    ) -> Result<Option<Page<Run>>, StoreError> {
        read::runs(&self.general, key, page).await
    }

    async fn run(
        &self,
        key: &ConversationKey,
        id: RunId,
    ) -> Result<Option<(Run, Option<Message>)>, StoreError> {
        read::run(&self.general, key, id).await
    }

    async fn renew_replica(&self, id: ReplicaId, address: &str, ttl: Duration) -> Result<(), StoreError> {
        replicas::renew(&self.vital, id, address, ttl).await
    }

    async fn retire_replica(&self, id: ReplicaId) -> Result<(), StoreError> {
        replicas::retire(&self.vital, id).await
    }

    async fn adopt_orphans(&self, id: ReplicaId, limit: u32) -> Result<Vec<Orphan>, StoreError> {
        replicas::adopt_orphans(&self.vital, id, limit).await
    }

    async fn close(&self) {
        tokio::join!(self.general.close(), self.vital.close());
    }
}

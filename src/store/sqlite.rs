//! The embedded store: one SQLite file, one process.
//!
//! There is one writing connection, so writing transactions come one after another and never meet; readers have
//! connections of their own and see what is committed.
//!
//! Parameters are written `$1`, not `?1`: the driver binds a script of several statements wrongly if one of them
//! leaves out a number of the `?` kind.

mod admit;
mod open;
mod read;
mod replicas;
mod turn;

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::migrate::Migrator;
use sqlx::{Connection, Sqlite, SqliteConnection, Transaction};

use super::errors::check_version;
use super::pool::{Pool, on};
use super::{Admission, Admitted, Claim, Finished, Orphan, RunEnd, RunLease, Store, StoreError};
use crate::config::StoreConfig;
use crate::domain::{
    ConversationKey, Message, MessageId, Page, PageRequest, ReplicaId, Run, RunId, Thread, ThreadActivity,
    ThreadId, UpstreamThreadId,
};

static MIGRATOR: Migrator = sqlx::migrate!("migrations/sqlite");

/// The present, in milliseconds since 1970, by SQLite's clock: the same at each place of a statement.
macro_rules! now {
    () => {
        "CAST(round(unixepoch('now', 'subsec') * 1000) AS INTEGER)"
    };
}
use now;

/// The store in a SQLite file.
#[derive(Clone, Debug)]
pub struct SqliteStore {
    writer: Arc<Pool<SqliteConnection>>,
    readers: Arc<Pool<SqliteConnection>>,
    /// Held for the life of the store: keeps a second process off the file.
    lock: Arc<File>,
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
        Ok(Self { writer: Arc::new(writer), readers: Arc::new(readers), lock: Arc::new(lock) })
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

    async fn claim(&self, lease: &RunLease) -> Result<Claim, StoreError> {
        on!(self.writer, c => turn::claim(c, lease))
    }

    async fn bind_upstream_thread(
        &self,
        lease: &RunLease,
        id: &UpstreamThreadId,
    ) -> Result<bool, StoreError> {
        on!(self.writer, c => turn::bind_upstream_thread(c, lease, id))
    }

    async fn finish(&self, lease: &RunLease, end: &RunEnd) -> Result<Option<Finished>, StoreError> {
        on!(self.writer, c => turn::finish(c, lease, end))
    }

    async fn thread(&self, key: &ConversationKey) -> Result<Option<(Thread, ThreadActivity)>, StoreError> {
        on!(self.readers, c => read::thread(c, key))
    }

    async fn messages(
        &self,
        key: &ConversationKey,
        page: &PageRequest<MessageId>,
    ) -> Result<Option<Page<Message>>, StoreError> {
        on!(self.readers, c => read::messages(c, key, page))
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

    async fn renew_replica(&self, id: ReplicaId, address: &str, ttl: Duration) -> Result<(), StoreError> {
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

    async fn close(&self) {
        // The readers first: the last connection to leave tidies the log away, which a reader may not.
        self.readers.close().await;
        self.writer.close().await;
        // Ends with the file handle at the latest.
        let _ = self.lock.unlock();
    }
}

//! Where the store's connections come from.

use std::fs::File;
use std::sync::Arc;

use sqlx::postgres::PgConnectOptions;

use super::errors::StoreError;
use super::pool::{Connection, Pool, ServerHealth};

/// The pools of connections to the database.
pub(super) enum Backend {
    /// A server that any number of replicas share.
    Postgres {
        /// Connections for callers: admissions, reads and other requests. A call inside an HTTP
        /// request belongs here, because it is dropped when the client leaves.
        general: Pool,
        /// Connections for the gateway's own work on runs, above all starting and ending them. A
        /// flood of requests cannot starve it. Only tasks of the gateway use them.
        vital: Pool,
        /// One connection that renews the replica's session. A stuck statement elsewhere cannot
        /// end the session.
        session: Pool,
        health: Arc<ServerHealth>,
        /// The address of the server itself, in case a pooler is in between.
        direct: Box<PgConnectOptions>,
    },
    /// A file that only this process uses. One connection writes, so write transactions run one
    /// after another and never conflict. The readers see committed data.
    Sqlite {
        writer: Pool,
        readers: Pool,
        /// A file lock, held for the life of the store. It keeps a second process off the database
        /// file.
        lock: File,
    },
}

impl Backend {
    /// Returns a connection for a caller's read.
    pub(super) async fn reader(&self) -> Result<Connection, StoreError> {
        match self {
            Self::Postgres { general, .. } => general.acquire().await,
            Self::Sqlite { readers, .. } => readers.acquire().await,
        }
    }

    /// Returns a connection for a caller's write.
    pub(super) async fn writer(&self) -> Result<Connection, StoreError> {
        match self {
            Self::Postgres { general, .. } => general.acquire().await,
            Self::Sqlite { writer, .. } => writer.acquire().await,
        }
    }

    /// Returns a connection for a read by a run's task. Such a read must not queue behind callers.
    pub(super) async fn vital_reader(&self) -> Result<Connection, StoreError> {
        match self {
            Self::Postgres { vital, .. } => vital.acquire().await,
            Self::Sqlite { readers, .. } => readers.acquire().await,
        }
    }

    /// Returns a connection for a write of a run's task, such as its start or end.
    pub(super) async fn vital_writer(&self) -> Result<Connection, StoreError> {
        match self {
            Self::Postgres { vital, .. } => vital.acquire().await,
            Self::Sqlite { writer, .. } => writer.acquire().await,
        }
    }

    /// Returns a connection for renewing this process's session.
    pub(super) async fn session_writer(&self) -> Result<Connection, StoreError> {
        match self {
            Self::Postgres { session, .. } => session.acquire().await,
            Self::Sqlite { writer, .. } => writer.acquire().await,
        }
    }
}

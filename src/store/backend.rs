//! Where the store's connections come from.

use std::fs::File;
use std::sync::Arc;

use sqlx::postgres::PgConnectOptions;

use super::errors::StoreError;
use super::pool::{Connection, Pool, ServerHealth};

/// Where the connections come from.
pub(super) enum Backend {
    /// A server that any number of replicas share.
    Postgres {
        /// Admissions, reads, and what else callers ask for. All that is called within a request, which is dropped when
        /// its caller leaves, belongs here.
        general: Pool,
        /// What ends runs and starts waiting ones: a flood of the rest cannot starve it. Only tasks of ours call it.
        vital: Pool,
        /// A connection that only keeps the session alive: no statement that is stuck can end it.
        session: Pool,
        health: Arc<ServerHealth>,
        /// The way to the server itself, where a pooler is in between.
        direct: Box<PgConnectOptions>,
    },
    /// A file of this process. One connection writes, so writing transactions come one after another and never meet; the
    /// readers see what is committed.
    Sqlite {
        writer: Pool,
        readers: Pool,
        /// Held for the life of the store: keeps a second process off the file.
        lock: File,
    },
}

impl Backend {
    /// For what a caller asks, which changes nothing.
    pub(super) async fn reader(&self) -> Result<Connection, StoreError> {
        match self {
            Self::Postgres { general, .. } => general.acquire().await,
            Self::Sqlite { readers, .. } => readers.acquire().await,
        }
    }

    /// For what a caller asks.
    pub(super) async fn writer(&self) -> Result<Connection, StoreError> {
        match self {
            Self::Postgres { general, .. } => general.acquire().await,
            Self::Sqlite { writer, .. } => writer.acquire().await,
        }
    }

    /// For what the task of a run reads, which must not wait behind what callers ask.
    pub(super) async fn vital_reader(&self) -> Result<Connection, StoreError> {
        match self {
            Self::Postgres { vital, .. } => vital.acquire().await,
            Self::Sqlite { readers, .. } => readers.acquire().await,
        }
    }

    /// For what starts and ends runs.
    pub(super) async fn vital_writer(&self) -> Result<Connection, StoreError> {
        match self {
            Self::Postgres { vital, .. } => vital.acquire().await,
            Self::Sqlite { writer, .. } => writer.acquire().await,
        }
    }

    /// For what keeps this process's session.
    pub(super) async fn session_writer(&self) -> Result<Connection, StoreError> {
        match self {
            Self::Postgres { session, .. } => session.acquire().await,
            Self::Sqlite { writer, .. } => writer.acquire().await,
        }
    }
}

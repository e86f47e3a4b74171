//! Threads, runs and transcripts of all tenants: the [`Store`], in Postgres or SQLite.
//!
//! Each method is one atomic step. All wall-clock time is the database's own: no method takes "now". Dropping a method's
//! future may leave the step done or not done, never half done.

mod admission;
mod api_keys;
mod binding;
mod connection;
mod deletion;
mod engine;
mod errors;
mod events;
mod finish;
mod functions;
mod import;
mod lane;
mod notifications;
mod orphans;
mod paging;
mod params;
mod pool;
mod postgres;
mod queue;
mod redaction;
mod replicas;
mod retention;
mod rollover;
mod rows;
mod runs;
mod schema;
mod sqlite;
mod statement;
mod sync;
mod threads;
mod tools;
mod transcript;
mod words;

use std::error::Error as StdError;
use std::fmt;
use std::fs::File;
use std::sync::Arc;

use secrecy::ExposeSecret;
use sqlx::postgres::PgConnectOptions;
use tokio_util::sync::CancellationToken;

use crate::config::{StoreConfig, Transcript};
use admission::Admissions;
use binding::Bindings;
use finish::Ends;
use lane::{Lane, Limits};
use pool::{Connection, Pool, ServerHealth};
use redaction::Redaction;

pub use admission::{
    Admission, Admitted, Idempotency, InputMessage, MAX_MERGED, MAX_MERGED_BYTES, Repeated,
};
pub use api_keys::{NewKey, StoredKey};
pub use binding::{Binding, Bound};
pub use deletion::{Deletable, DeletedThread, DeletionReport, DeletionRequest, DeletionTarget};
pub use engine::Engine;
pub use events::RunProgress;
pub use finish::{Closing, Finished, Reply, RunEnd, Withdrawal, Withdrawn};
pub use functions::functions_called_by;
pub use import::{Imported, ImportedMessage, ImportedThread};
pub use lane::NotWritten;
pub use notifications::Notification;
pub use orphans::{Made, ORPHAN_AFTER, OrphanKind, OrphanName, UpstreamOrphan};
pub use queue::{QueuedStart, RunLease, StartedRun};
pub use redaction::redacted_action;
pub use replicas::{OrphanedRun, Renewed};
pub use retention::{DueThread, Pruned, Pruning};
pub use rollover::{ExternalMessage, Rolled, Rollover};
pub use statement::Sent;
pub use sync::Withholding;
pub use threads::{ThreadFilter, ThreadName, ThreadReport, ThreadUpdate};
pub use tools::{Answered, Pause, Paused, Request, ToolAnswer, Waiting};
pub use transcript::PAGE_BYTES;

/// All statements as an engine is sent them. Some are for the other engine alone.
pub fn statements(engine: Engine) -> impl Iterator<Item = &'static Sent> {
    let all = [
        admission::STATEMENTS,
        api_keys::STATEMENTS,
        binding::STATEMENTS,
        deletion::STATEMENTS,
        events::STATEMENTS,
        finish::STATEMENTS,
        import::STATEMENTS,
        notifications::STATEMENTS,
        orphans::STATEMENTS,
        queue::STATEMENTS,
        replicas::STATEMENTS,
        retention::STATEMENTS,
        rollover::STATEMENTS,
        runs::STATEMENTS,
        schema::STATEMENTS,
        sync::STATEMENTS,
        threads::STATEMENTS,
        tools::STATEMENTS,
        transcript::STATEMENTS,
    ];
    let all = all
        .into_iter()
        .flatten()
        .filter(move |statement| statement.is_for(engine));
    all.map(move |statement| statement.sent(engine))
}

/// The database, with all that is stored in it. Cheap to share behind an `Arc`.
pub struct Store {
    backend: Arc<Backend>,
    admissions: Lane<Admissions>,
    bindings: Lane<Bindings>,
    ends: Lane<Ends>,
    redaction: Redaction,
    closed: CancellationToken,
}

/// Where the connections come from.
enum Backend {
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
    async fn reader(&self) -> Result<Connection, StoreError> {
        match self {
            Self::Postgres { general, .. } => general.acquire().await,
            Self::Sqlite { readers, .. } => readers.acquire().await,
        }
    }

    /// For what a caller asks.
    async fn writer(&self) -> Result<Connection, StoreError> {
        match self {
            Self::Postgres { general, .. } => general.acquire().await,
            Self::Sqlite { writer, .. } => writer.acquire().await,
        }
    }

    /// For what the task of a run reads, which must not wait behind what callers ask.
    async fn vital_reader(&self) -> Result<Connection, StoreError> {
        match self {
            Self::Postgres { vital, .. } => vital.acquire().await,
            Self::Sqlite { readers, .. } => readers.acquire().await,
        }
    }

    /// For what starts and ends runs.
    async fn vital_writer(&self) -> Result<Connection, StoreError> {
        match self {
            Self::Postgres { vital, .. } => vital.acquire().await,
            Self::Sqlite { writer, .. } => writer.acquire().await,
        }
    }

    /// For what keeps this process's session.
    async fn session_writer(&self) -> Result<Connection, StoreError> {
        match self {
            Self::Postgres { session, .. } => session.acquire().await,
            Self::Sqlite { writer, .. } => writer.acquire().await,
        }
    }
}

/// How much a lane may have on its way: one for what callers ask, and one for what runs at work need, which have connections
/// of their own.
fn lanes(config: &StoreConfig, backend: &Backend) -> (Limits, Limits) {
    let (batches, alone) = match backend {
        Backend::Postgres { .. } => (BATCHES, config.max_connections / 4),
        Backend::Sqlite { .. } => (1, 1),
    };
    let alone = usize::try_from(alone).unwrap_or(usize::MAX);
    let ours = Limits {
        batches,
        alone,
        patience: config.acquire_timeout,
        max_wait: None,
    };
    (
        Limits {
            max_wait: Some(config.max_wait),
            ..ours
        },
        ours,
    )
}

/// Batches of a lane that are on their way to Postgres at once: while one is being committed the next is carried out.
const BATCHES: usize = 2;

impl Store {
    /// Opens the database of `store.url`, whatever its schema.
    ///
    /// Postgres: waits up to `startup_timeout` for a server that is not up yet. Half of `max_connections` is set aside for
    /// what must not wait behind a flood: a turn needs it as often as the rest. Two more connections keep the session and
    /// receive notifications.
    ///
    /// SQLite: makes the file and its folder where they are missing. Sessions of earlier processes end here: the lock proves
    /// that these are gone, so their runs can be adopted at once. Databases in memory are refused, since readers need a file.
    ///
    /// # Errors
    /// [`StoreError::Open`] at once if waiting does not help: a bad URL, password or database name, a file that cannot be
    /// opened or that another process has open. [`StoreError::Unavailable`] when the time is up.
    pub async fn open(config: &StoreConfig) -> Result<Self, StoreError> {
        let url = config
            .url
            .as_ref()
            .ok_or_else(|| StoreError::Open("store.url is not set".to_owned()))?;
        let redaction = match config.transcript {
            Transcript::On => Redaction::Keep,
            Transcript::Off => Redaction::Redact,
        };
        let backend = match Engine::of(url.expose_secret())? {
            Engine::Postgres => postgres::open(config).await?,
            Engine::Sqlite => sqlite::open(config)?,
        };
        let backend = Arc::new(backend);
        let (callers, ours) = lanes(config, &backend);
        let store = Self {
            admissions: Lane::new(
                Admissions {
                    backend: Arc::clone(&backend),
                    redaction,
                },
                callers,
            ),
            bindings: Lane::new(
                Bindings {
                    backend: Arc::clone(&backend),
                },
                ours,
            ),
            ends: Lane::new(
                Ends {
                    backend: Arc::clone(&backend),
                    redaction,
                },
                ours,
            ),
            backend,
            redaction,
            closed: CancellationToken::new(),
        };
        if let Backend::Sqlite { .. } = &*store.backend {
            store
                .forget_sessions()
                .await
                .map_err(|error| sqlite::failed(config, &error))?;
        }
        Ok(store)
    }

    /// Nobody but this process has the file.
    async fn forget_sessions(&self) -> Result<(), StoreError> {
        let mut c = self.backend.writer().await?;
        if schema::is_ours(&mut c).await? {
            replicas::forget_sessions(&mut c).await
        } else {
            Ok(())
        }
    }

    /// Whether content is stored. If not, it is known only to the process that works on a run, until the run has ended.
    pub fn keeps_content(&self) -> bool {
        self.redaction.keeps_content()
    }

    /// Closes the connections; later calls fail.
    pub async fn close(&self) {
        self.closed.cancel();
        match &*self.backend {
            Backend::Postgres {
                general,
                vital,
                session,
                ..
            } => {
                tokio::join!(general.close(), vital.close(), session.close());
            }
            Backend::Sqlite {
                writer, readers, ..
            } => {
                // The readers first: the last connection to leave tidies the log away, which a reader may not.
                readers.close().await;
                writer.close().await;
            }
        }
        tokio::join!(
            self.admissions.close(),
            self.bindings.close(),
            self.ends.close()
        );
        if let Backend::Sqlite { lock, .. } = &*self.backend {
            // Ends with the file handle at the latest.
            let _ = lock.unlock();
        }
    }
}

impl fmt::Debug for Store {
    /// The driver's own text of the way to the server has the password in it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let engine = match &*self.backend {
            Backend::Postgres { .. } => "Postgres",
            Backend::Sqlite { .. } => "Sqlite",
        };
        f.debug_struct("Store")
            .field("engine", &engine)
            .field("redaction", &self.redaction)
            .finish_non_exhaustive()
    }
}

/// What goes wrong in the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database cannot be reached, has no free connection in time or is shutting down. Worth a retry.
    #[error("the database is not available")]
    Unavailable(#[source] Box<dyn StdError + Send + Sync>),
    /// The schema is not the one that this binary was built for.
    #[error("{0}")]
    Schema(String),
    /// The database cannot be opened as configured. The text says how to mend it.
    #[error("{0}")]
    Open(String),
    #[error("the cursor names nothing in this list")]
    UnknownCursor,
    /// A row holds what this binary cannot have written.
    #[error("the database holds something unreadable: {0}")]
    Corrupt(String),
    /// It was not sent: more comes than the database can take, and it would have waited for too long.
    #[error("more comes than the database can take")]
    Overloaded,
    #[error("a statement failed")]
    Statement(#[source] Box<dyn StdError + Send + Sync>),
}

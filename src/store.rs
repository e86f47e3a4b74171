//! Threads, runs and transcripts of all tenants: the [`Store`], in Postgres or SQLite.
//!
//! Each method is one atomic step. The database's clock gives all wall-clock time: no method takes "now".
//! If a caller drops a method's future, the step is either done or not done, never half done.

mod admission;
mod api_keys;
mod backend;
mod binding;
mod connection;
mod deletion;
mod engine;
mod errors;
mod events;
mod finish;
mod functions;
mod handle;
mod idempotency;
mod import;
mod lane;
mod notifications;
mod orphans;
mod paging;
mod params;
mod pool;
mod postgres;
mod queue;
mod recovery;
mod redaction;
mod replicas;
mod reruns;
mod retention;
mod rollover;
mod rows;
mod runs;
mod schema;
mod sqlite;
mod statement;
mod steps;
mod sync;
mod threads;
mod tools;
mod transcript;
mod values;
mod withdraw;
mod words;

use std::sync::Arc;

use secrecy::ExposeSecret;
use tokio_util::sync::CancellationToken;

use crate::config::{StoreConfig, Transcript};
use admission::Admissions;
use backend::Backend;
use binding::Bindings;
use finish::Ends;
use lane::{Lane, Limits};
use redaction::Redaction;

pub use admission::{Admission, Admitted, MAX_MERGED, MAX_MERGED_BYTES};
pub use api_keys::{NewKey, StoredKey};
pub use binding::{Binding, Bound};
pub use deletion::{Deletable, DeletedThread, DeletionReport, DeletionRequest, DeletionTarget};
pub use engine::Engine;
pub use errors::{NotWritten, StoreError};
pub use events::RunProgress;
pub use finish::{Closing, Finished, Reply, RunEnd};
pub use functions::functions_called_by;
pub use handle::Store;
pub use idempotency::Repeated;
pub use import::{Imported, ImportedMessage, ImportedThread};
pub use notifications::Notification;
pub use orphans::{Made, OrphanKind, OrphanName, UpstreamOrphan};
pub use paging::PAGE_BYTES;
pub use redaction::redacted_action;
pub use replicas::{OrphanedRun, Renewed};
pub use retention::{DueThread, Pruned, Pruning};
pub use rollover::{ExternalMessage, Rolled, Rollover};
pub use statement::Sent;
pub use sync::Withholding;
pub use threads::{ThreadFilter, ThreadName, ThreadReport, ThreadUpdate};
pub use tools::{Answered, Pause, Paused, Request, ToolAnswer, Waiting};
pub use values::{Idempotency, InputMessage, ORPHAN_AFTER, QueuedStart, RunLease, StartedRun};
pub use withdraw::{Withdrawal, Withdrawn};

/// Returns the statements of an engine, as the gateway sends them.
pub fn statements(engine: Engine) -> impl Iterator<Item = &'static Sent> {
    let all = [
        admission::STATEMENTS,
        api_keys::STATEMENTS,
        binding::STATEMENTS,
        deletion::STATEMENTS,
        events::STATEMENTS,
        finish::STATEMENTS,
        idempotency::STATEMENTS,
        import::STATEMENTS,
        notifications::STATEMENTS,
        orphans::STATEMENTS,
        queue::STATEMENTS,
        recovery::STATEMENTS,
        replicas::STATEMENTS,
        reruns::STATEMENTS,
        retention::STATEMENTS,
        rollover::STATEMENTS,
        runs::STATEMENTS,
        schema::STATEMENTS,
        sync::STATEMENTS,
        threads::STATEMENTS,
        tools::STATEMENTS,
        transcript::STATEMENTS,
        withdraw::STATEMENTS,
    ];
    let all = all
        .into_iter()
        .flatten()
        .filter(move |statement| statement.is_for(engine));
    all.map(move |statement| statement.sent(engine))
}

/// Returns the limits of the lanes: first of the callers' lane, then of the lanes that active runs
/// need. The two kinds use different pools.
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

/// The most batches of one lane that are sent to Postgres at the same time. While Postgres commits
/// one, it executes the next.
const BATCHES: usize = 2;

impl Store {
    /// Opens the database of `store.url`, whatever its schema.
    ///
    /// Postgres: waits up to `startup_timeout` for a server that is not up yet. Half of
    /// `max_connections` is reserved for the work of runs, which must not wait behind a flood of
    /// requests. It is half because a run needs these as often as the rest. Two more connections
    /// keep the session and receive notifications.
    ///
    /// SQLite: creates the file and its folder if they are missing. It deletes the sessions of
    /// earlier processes. The file lock proves that those processes are gone, so their runs can be
    /// adopted at once. A database in memory is refused, because the readers need a file.
    ///
    /// # Errors
    /// - [`StoreError::Open`], at once, if waiting does not help: a bad URL, password or database
    ///   name, or a file that cannot be opened or that another process has open.
    /// - [`StoreError::Unavailable`] when `startup_timeout` is over.
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

    /// Deletes all sessions: only this process has the file open.
    async fn forget_sessions(&self) -> Result<(), StoreError> {
        let mut c = self.backend.writer().await?;
        if schema::is_ours(&mut c).await? {
            replicas::forget_sessions(&mut c).await
        } else {
            Ok(())
        }
    }

    /// Returns whether content is stored. If not, only the process that works on a run knows its
    /// content, until the run ends.
    pub fn keeps_content(&self) -> bool {
        self.redaction.keeps_content()
    }

    /// Closes the connections. Later calls fail.
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
                // Close the readers first: the last connection to close cleans the write-ahead log
                // up, which a reader must not do.
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
            // If this fails, closing the file handle releases the lock.
            let _ = lock.unlock();
        }
    }
}

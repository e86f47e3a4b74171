//! The life of threads outside their runs: deletion, erasure, and the background work.

mod deletion;
mod janitor;
mod upstream_copy;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::{JanitorConfig, RetentionConfig};
use crate::domain::{Fingerprints, Lifetimes, RetentionPolicy};
use crate::runs::Runs;
use crate::store::{Pruning, Store};
use crate::upstream::{RateLimiter, Upstream};

pub use deletion::Target;
pub use janitor::{DryRun, PassSummary, Plan};

/// Manages expiry, archive and deletion of threads, and shares that work with the other replicas.
/// Clones share everything.
#[derive(Clone)]
pub struct Janitor {
    ctx: Arc<Context>,
}

/// The parts of a [`Janitor`].
pub struct JanitorParts {
    pub store: Arc<Store>,
    pub upstreams: BTreeMap<String, Arc<dyn Upstream>>,
    pub runs: Runs,
    pub fingerprints: Fingerprints,
    pub lifetimes: Lifetimes,
    pub archive: RetentionPolicy,
    pub retention: RetentionConfig,
    pub idempotency_ttl: Duration,
    pub janitor: JanitorConfig,
    /// Longest time that a request to delete waits for the deletion's end.
    pub patience: Duration,
    /// Tracks the tasks that requests leave running.
    pub tasks: TaskTracker,
    /// Cancelled when the process is to stop. Unfinished work is dropped; another replica or a
    /// later process resumes it.
    pub draining: CancellationToken,
}

struct Context {
    parts: JanitorParts,
    pace: RateLimiter,
    pruning: Pruning,
    /// Signals work that should not wait for the next pass.
    wake: Notify,
}

impl Janitor {
    /// Must be called inside a tokio runtime.
    pub fn new(parts: JanitorParts) -> Self {
        let pace = RateLimiter::new(parts.janitor.calls_per_second);
        let storing = parts
            .upstreams
            .iter()
            .filter(|(_, upstream)| upstream.capabilities().stores_runs);
        let pruning = Pruning {
            runs: Some(parts.retention.runs),
            events: Some(parts.retention.events),
            idempotency_keys: Some(parts.idempotency_ttl),
            receipts: Some(parts.retention.receipts),
            storing: storing.map(|(name, _)| name.clone()).collect(),
        };
        Self {
            ctx: Arc::new(Context {
                parts,
                pace,
                pruning,
                wake: Notify::new(),
            }),
        }
    }

    fn store(&self) -> &Store {
        &self.ctx.parts.store
    }
}

impl fmt::Debug for Janitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Janitor").finish_non_exhaustive()
    }
}

impl fmt::Debug for JanitorParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JanitorParts")
            .field("janitor", &self.janitor)
            .finish_non_exhaustive()
    }
}

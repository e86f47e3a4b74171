//! The life of threads beyond their turns: deletion, erasure, and the work in the background.

mod deletion;
mod janitor;
mod upstream;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::{JanitorConfig, RetentionConfig};
use crate::domain::{Fingerprints, Keeping, Lifetimes};
use crate::runs::Runs;
use crate::store::{Pruning, Store};
use crate::upstream::{RateLimiter, Upstream};

pub use deletion::Target;
pub use janitor::{Outlook, Plan, Tally};

/// Looks after the threads of all replicas, together with its peers. Clones share everything.
#[derive(Clone)]
pub struct Keeper {
    parts: Arc<Parts>,
}

/// What a [`Keeper`] is made of.
pub struct KeeperParts {
    pub store: Arc<Store>,
    pub upstreams: BTreeMap<String, Arc<dyn Upstream>>,
    pub runs: Runs,
    pub fingerprints: Fingerprints,
    pub lifetimes: Lifetimes,
    pub keeping: Keeping,
    pub retention: RetentionConfig,
    pub idempotency_ttl: Duration,
    pub janitor: JanitorConfig,
    /// How long a request to delete waits for its end.
    pub patience: Duration,
    /// Tracks what requests leave running.
    pub tasks: TaskTracker,
    /// Cancelled when the process is to stop: whatever is under way is left, and goes on elsewhere or later.
    pub draining: CancellationToken,
}

struct Parts {
    given: KeeperParts,
    pace: RateLimiter,
    pruning: Pruning,
    /// There is work that should not wait for the next look.
    nudge: Notify,
}

impl Keeper {
    /// Must be made inside a tokio runtime.
    pub fn new(given: KeeperParts) -> Self {
        let pace = RateLimiter::new(given.janitor.calls_per_second);
        let storing = given.upstreams.iter().filter(|(_, upstream)| upstream.capabilities().stores_runs);
        let pruning = Pruning {
            runs: Some(given.retention.runs),
            events: Some(given.retention.events),
            idempotency_keys: Some(given.idempotency_ttl),
            receipts: Some(given.retention.receipts),
            storing: storing.map(|(name, _)| name.clone()).collect(),
        };
        Self { parts: Arc::new(Parts { given, pace, pruning, nudge: Notify::new() }) }
    }

    fn store(&self) -> &Store {
        &self.parts.given.store
    }
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keeper").finish_non_exhaustive()
    }
}

impl fmt::Debug for KeeperParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeeperParts").field("janitor", &self.janitor).finish_non_exhaustive()
    }
}

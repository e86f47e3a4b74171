//! The context that all of `runs/` shares: the store, the upstreams, the settings, the tasks, and
//! the state of this process's runs.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Span;

use crate::config::{AssistantConfig, RunsConfig, SessionsConfig, ThreadsConfig};
use crate::domain::{
    ConversationKey, Fingerprints, Lifetimes, ReplicaId, RunId, TenantKey, ThreadId,
};
use crate::error::Error;
use crate::locks::{KeyedQueue, KeyedSemaphore};
use crate::runs::breaker::Breaker;
use crate::runs::notifications::Notifier;
use crate::runs::recovery_budget::RecoveryBudget;
use crate::runs::registry::RunRegistry;
use crate::store::Store;
use crate::upstream::Upstream;

/// Most comparisons of a transcript with its upstream thread at a time. Each may hold both sides
/// in memory.
const COMPARISONS: usize = 4;

pub(in crate::runs) const NO_THREAD: Error =
    Error::NotFound("this key has no conversation yet; post a message to start one");

/// The parts that [`Runs`](crate::runs::Runs) is built from.
pub struct RunsParts {
    pub store: Arc<Store>,
    /// Upstreams by name.
    pub upstreams: BTreeMap<String, ConfiguredUpstream>,
    pub settings: RunSettings,
    pub replica: ReplicaId,
    pub tasks: Tasks,
}

/// An upstream and its settings.
#[derive(Clone, Debug)]
pub struct ConfiguredUpstream {
    pub adapter: Arc<dyn Upstream>,
    /// `None`: requests always pass.
    pub breaker: Option<Arc<Breaker>>,
    /// Whether other programs may write to its threads.
    pub has_external_writers: bool,
    /// Whether it gets keys in clear instead of fingerprints.
    pub gets_keys: bool,
}

/// The settings of runs.
#[derive(Clone, Debug)]
pub struct RunSettings {
    /// Assistants by name.
    pub assistants: BTreeMap<String, AssistantConfig>,
    /// Name of the assistant for messages that name none.
    pub default_assistant: String,
    pub runs: RunsConfig,
    pub sessions: SessionsConfig,
    pub threads: ThreadsConfig,
    pub lifetimes: Lifetimes,
    pub fingerprints: Fingerprints,
    /// Longest wait of a new run for earlier runs to be recorded.
    pub admission_timeout: Duration,
    /// Pause between two reads of the requests about a replica's runs.
    pub attend_every: Duration,
}

/// The tasks of runs, and the signals that end them.
#[derive(Clone, Debug)]
pub struct Tasks {
    /// Tracks every run.
    pub tracker: TaskTracker,
    /// Cancelled when the gateway takes no new runs.
    pub draining: CancellationToken,
    /// Cancelled when active runs must end at once.
    pub stop: CancellationToken,
}

/// The context that all of `runs/` shares.
pub(in crate::runs) struct Context {
    pub(in crate::runs) store: Arc<Store>,
    pub(in crate::runs) upstreams: BTreeMap<String, ConfiguredUpstream>,
    pub(in crate::runs) config: RunSettings,
    pub(in crate::runs) replica: ReplicaId,
    pub(in crate::runs) tasks: Tasks,
    pub(in crate::runs) registry: RunRegistry,
    pub(in crate::runs) notifier: Notifier,
    /// Orders this process's runs of a thread.
    pub(in crate::runs) queue: KeyedQueue<ConversationKey, ThreadId>,
    /// Bounds the unfinished runs, in all and for each tenant.
    pub(in crate::runs) tenant_runs: KeyedSemaphore<TenantKey>,
    /// Bounds the bytes of messages whose runs have not started, for each conversation.
    pub(in crate::runs) queued_bytes: KeyedSemaphore<ConversationKey>,
    /// Bounds the comparisons of a transcript with its upstream thread.
    pub(in crate::runs) comparisons: Semaphore,
    pub(in crate::runs) recoveries: RecoveryBudget,
    /// The last time at which the store worked. Locked during a check, so that many questions
    /// cause one check.
    pub(in crate::runs) seen_ready: Mutex<Option<Instant>>,
}

impl Context {
    pub(in crate::runs) fn new(parts: RunsParts) -> Self {
        let RunsParts {
            store,
            upstreams,
            settings,
            replica,
            tasks,
        } = parts;
        let runs = &settings.runs;
        let each = runs
            .max_runs_per_tenant
            .map_or(usize::MAX, NonZeroUsize::get);
        Self {
            queue: KeyedQueue::new(runs.max_queue),
            tenant_runs: KeyedSemaphore::new(runs.max_runs.get(), each),
            queued_bytes: KeyedSemaphore::new(usize::MAX, runs.max_queue_bytes),
            store,
            upstreams,
            config: settings,
            replica,
            tasks,
            registry: RunRegistry::new(),
            notifier: Notifier::default(),
            comparisons: Semaphore::new(COMPARISONS),
            recoveries: RecoveryBudget::default(),
            seen_ready: Mutex::default(),
        }
    }

    /// Returns the adapter of the upstream of this name, if it is configured.
    pub(in crate::runs) fn upstream(&self, name: &str) -> Option<&Arc<dyn Upstream>> {
        self.upstreams.get(name).map(|upstream| &upstream.adapter)
    }

    /// Returns the breaker of the upstream of this name, if it has one.
    pub(in crate::runs) fn breaker(&self, upstream: &str) -> Option<&Arc<Breaker>> {
        self.upstreams.get(upstream)?.breaker.as_ref()
    }

    /// Returns the span of a run's log lines. It names the user and the key by their fingerprints.
    pub(in crate::runs) fn span_of(&self, run: RunId, key: &ConversationKey) -> Span {
        let fingerprints = &self.config.fingerprints;
        let user = fingerprints.user(&key.tenant, &key.user);
        tracing::info_span!("run", run.id = %run, user, key = fingerprints.conversation(key))
    }
}

impl fmt::Debug for RunsParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunsParts")
            .field("replica", &self.replica)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("replica", &self.replica)
            .finish_non_exhaustive()
    }
}

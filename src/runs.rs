//! The use cases: submit a message, read what became of it. HTTP is above, store and upstreams below.

mod drive;
mod end;
mod feed;
mod replica;
mod turn;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use rand::RngExt;
use tokio::sync::{Mutex, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use crate::config::{AssistantConfig, RunsConfig, SessionsConfig};
use crate::domain::{
    ConversationKey, Message, MessageId, Metadata, MultitaskStrategy, Page, PageRequest, ReplicaId, Run,
    RunId, Scope, Thread, ThreadActivity, ThreadId, UserContent,
};
use crate::error::Error;
use crate::locks::LockMap;
use crate::store::{Admission, InputMessage, Store};
use crate::upstream::Upstream;

pub use feed::{Feed, Outcome, RunEvent};
use replica::Standing;

/// Threads and runs of this replica. Clones share everything.
#[derive(Clone)]
pub struct Runs {
    parts: Arc<Parts>,
}

/// What [`Runs`] is made of.
pub struct RunsParts {
    pub store: Arc<dyn Store>,
    pub upstreams: BTreeMap<String, Arc<dyn Upstream>>,
    pub assistants: BTreeMap<String, AssistantConfig>,
    /// Name of the assistant of a message that names none.
    pub default_assistant: String,
    pub runs: RunsConfig,
    pub sessions: SessionsConfig,
    /// Longest wait for the runs before a new one to be recorded.
    pub admission_timeout: Duration,
    pub replica: ReplicaId,
    /// Tracks every run.
    pub tasks: TaskTracker,
    /// Cancelled when no new runs are taken.
    pub draining: CancellationToken,
    /// Cancelled when running turns must end at once.
    pub stop: CancellationToken,
}

struct Parts {
    given: RunsParts,
    locks: LockMap<ConversationKey>,
    standing: Standing,
    /// When the store was last seen to be in order. Locked while somebody looks, so that a flood of questions
    /// becomes one.
    seen_ready: Mutex<Option<Instant>>,
}

/// A user's message that asks for a run.
#[derive(Clone, Debug)]
pub struct NewMessage {
    pub content: UserContent,
    /// `None`: the default assistant.
    pub assistant: Option<String>,
    pub strategy: MultitaskStrategy,
    pub metadata: Metadata,
    /// `None`: the assistant's, else the configured one.
    pub timeout: Option<Duration>,
}

/// A run that was admitted.
#[derive(Clone, Debug)]
pub struct Submitted {
    pub thread: Thread,
    pub run: Run,
    pub feed: Feed,
}

impl Runs {
    pub fn new(parts: RunsParts) -> Self {
        let locks = LockMap::new(parts.runs.max_queue);
        let parts = Parts { given: parts, locks, standing: Standing::new(), seen_ready: Mutex::default() };
        Self { parts: Arc::new(parts) }
    }

    /// Admits a message: its run is durable, started or waiting, when this returns. The run goes on whatever
    /// becomes of the caller; if this future is dropped, the message may or may not have been admitted.
    pub async fn submit(&self, key: ConversationKey, new: NewMessage) -> Result<Submitted, Error> {
        let parts = &self.parts.given;
        // Keeps a stop from finding no task between this check and the spawn below.
        let _token = parts.tasks.token();
        if parts.draining.is_cancelled() {
            return Err(Error::Draining);
        }
        if self.parts.standing.has_lapsed() {
            return Err(Error::StoreUnavailable(None));
        }
        let name = new.assistant.unwrap_or_else(|| parts.default_assistant.clone());
        let Some(assistant) = parts.assistants.get(&name) else {
            let known: Vec<_> = parts.assistants.keys().map(String::as_str).collect();
            return Err(Error::Invalid(format!(
                "there is no assistant of this name; there are: {}",
                known.join(", ")
            )));
        };
        let timeout = new.timeout.or(assistant.timeout).unwrap_or(parts.runs.timeout);
        if timeout.is_zero() || timeout > parts.runs.max_timeout {
            let max = parts.runs.max_timeout.as_millis();
            return Err(Error::Invalid(format!("`timeout_ms` must be between 1 and {max}")));
        }
        let place = match new.strategy {
            MultitaskStrategy::Enqueue => self
                .parts
                .locks
                .join(key.clone())
                .map_err(|full| Error::QueueFull { limit: full.max_waiting })?,
            MultitaskStrategy::Reject => self.parts.locks.join_idle(key.clone()).ok_or(Error::ThreadBusy)?,
            MultitaskStrategy::Interrupt | MultitaskStrategy::Rollback | MultitaskStrategy::Merge => {
                return Err(Error::NotSupported(
                    "of the multitask strategies only `enqueue` and `reject` are supported yet",
                ));
            }
        };
        let admission = Admission {
            new_thread: ThreadId::new(),
            thread_ttl: matches!(key.scope, Scope::Session(_)).then_some(parts.sessions.ttl),
            key,
            upstream: assistant.upstream.clone(),
            run_id: RunId::new(),
            assistant: name,
            strategy: new.strategy,
            metadata: new.metadata,
            message: InputMessage { id: MessageId::new(), content: new.content.into_parts() },
            timeout,
            replica: parts.replica,
        };
        // From here on the work belongs to a task: a caller that leaves must not leave a recorded run undone.
        let (answer, answered) = oneshot::channel();
        let working = self.parts.standing.works_on(admission.run_id);
        parts.tasks.spawn(turn::conduct(self.clone(), working, place, admission, answer).in_current_span());
        answered.await.unwrap_or(Err(Error::Internal(None)))
    }

    /// The key's current thread and what it is doing.
    pub async fn thread(&self, key: &ConversationKey) -> Result<(Thread, ThreadActivity), Error> {
        self.store().thread(key).await?.ok_or(NO_THREAD)
    }

    /// A page of the current thread's transcript.
    pub async fn messages(
        &self,
        key: &ConversationKey,
        page: &PageRequest<MessageId>,
    ) -> Result<Page<Message>, Error> {
        self.store().messages(key, page).await?.ok_or(NO_THREAD)
    }

    /// A page of the current thread's runs.
    pub async fn runs(&self, key: &ConversationKey, page: &PageRequest<RunId>) -> Result<Page<Run>, Error> {
        self.store().runs(key, page).await?.ok_or(NO_THREAD)
    }

    /// One run and its reply, if it has one.
    pub async fn run(&self, key: &ConversationKey, id: RunId) -> Result<(Run, Option<Message>), Error> {
        self.store().run(key, id).await?.ok_or(Error::NotFound("this conversation has no such run"))
    }

    /// This replica takes new runs, and its store is in order, or was a second ago.
    pub async fn ready(&self) -> Result<(), Error> {
        if self.parts.given.draining.is_cancelled() {
            return Err(Error::Draining);
        }
        if self.parts.standing.has_lapsed() {
            return Err(Error::StoreUnavailable(None));
        }
        let mut seen = self.parts.seen_ready.lock().await;
        if seen.is_none_or(|seen| seen.elapsed() > READY_FOR) {
            *seen = None;
            self.store().ready().await?;
            *seen = Some(Instant::now());
        }
        Ok(())
    }

    fn store(&self) -> &dyn Store {
        &*self.parts.given.store
    }
}

impl fmt::Debug for Runs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runs").field("locks", &self.parts.locks).finish_non_exhaustive()
    }
}

impl fmt::Debug for RunsParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunsParts").field("replica", &self.replica).finish_non_exhaustive()
    }
}

/// How long the store counts as in order once it was seen to be.
const READY_FOR: Duration = Duration::from_secs(1);

const NO_THREAD: Error = Error::NotFound("this key has no conversation yet; post a message to start one");

/// Between half of `pause` and all of it.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(rand::rng().random_range(0.5..=1.0))
}

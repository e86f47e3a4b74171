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

use futures_util::future::join_all;
use rand::RngExt;
use tokio::sync::{Mutex, oneshot};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use crate::config::{AssistantConfig, RunsConfig, SessionsConfig};
use crate::domain::{
    ConversationKey, Message, MessageId, Metadata, MultitaskStrategy, Page, PageRequest, ReplicaId, Run,
    RunId, RunStatus, Scope, Thread, ThreadActivity, ThreadId, UserContent,
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
    /// Cancels the run, from its admission on; harmless once it has ended.
    pub cancel: CancellationToken,
}

/// A run that was admitted.
#[derive(Clone, Debug)]
pub struct Submitted {
    pub thread: Thread,
    pub run: Run,
    pub feed: Feed,
}

/// Which of a thread's runs are meant.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Which {
    /// The one at work.
    Active,
    /// Those that wait.
    Queued,
    /// Both.
    All,
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
        let run_timeout = new.timeout.or(assistant.timeout).unwrap_or(parts.runs.timeout);
        if run_timeout.is_zero() || run_timeout > parts.runs.max_timeout {
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
            timeout: run_timeout,
            replica: parts.replica,
        };
        // From here on the work belongs to a task: a caller that leaves must not leave a recorded run undone.
        let (answer, answered) = oneshot::channel();
        let working = self.parts.standing.works_on(admission.run_id, new.cancel);
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

    /// Cancels a run and waits, within a bound, for its end. A run that has ended is given as it is: a cancel that
    /// comes too late is no error.
    pub async fn cancel(&self, key: &ConversationKey, id: RunId) -> Result<(Run, Option<Message>), Error> {
        let (run, message) = self.run(key, id).await?;
        if run.status.is_final() {
            return Ok((run, message));
        }
        self.end_all(key, &[run]).await?;
        self.run(key, id).await
    }

    /// Cancels unfinished runs of the current thread and waits, within a bound, for their end; those that wait go
    /// first, so that none of them starts in between. Gives them as they are then, in order of admission.
    pub async fn cancel_some(&self, key: &ConversationKey, which: Which) -> Result<Vec<Run>, Error> {
        let unfinished = self.store().unfinished(key).await?.ok_or(NO_THREAD)?;
        let meant: Vec<Run> = unfinished
            .into_iter()
            .filter(|run| match which {
                Which::Active => run.status.is_active(),
                Which::Queued => run.status == RunStatus::Queued,
                Which::All => true,
            })
            .collect();
        self.end_all(key, &meant).await?;
        let mut ended = Vec::with_capacity(meant.len());
        for run in meant {
            ended.push(self.run(key, run.id).await?.0);
        }
        Ok(ended)
    }

    /// Tells the tasks of these runs to end, the last one first, and waits for them.
    async fn end_all(&self, key: &ConversationKey, runs: &[Run]) -> Result<(), Error> {
        let mut handles = Vec::with_capacity(runs.len());
        for run in runs.iter().rev() {
            match self.parts.standing.handle(run.id) {
                Some(handle) => handles.push(handle),
                // It has ended in the meantime, or it is another replica's.
                None if self.run(key, run.id).await?.0.status.is_final() => {}
                None => {
                    return Err(Error::NotSupported("a run of another replica cannot be cancelled here yet"));
                }
            }
        }
        let ends: Vec<_> = handles
            .into_iter()
            .map(|handle| {
                handle.cancel.cancel();
                handle.feed.ended()
            })
            .collect();
        let limit = self.parts.given.runs.settle_timeout + CANCEL_SLACK;
        if timeout(limit, join_all(ends)).await.is_err() {
            tracing::warn!("a cancelled run did not end in time");
        }
        Ok(())
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

/// How much longer than the settling a cancel waits for the end of its run.
const CANCEL_SLACK: Duration = Duration::from_secs(2);
/// How long the store counts as in order once it was seen to be.
const READY_FOR: Duration = Duration::from_secs(1);

const NO_THREAD: Error = Error::NotFound("this key has no conversation yet; post a message to start one");

/// Between half of `pause` and all of it.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(rand::rng().random_range(0.5..=1.0))
}

//! The use cases: submit a message, answer its function calls, follow or cancel its run, read what became of it. HTTP
//! is above, store and upstreams below.

mod execution;
mod log;
mod notifications;
mod reconcile;
mod registry;
mod replica;
mod service;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::mem;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use futures_util::Stream;
use rand::RngExt;
use tokio::sync::{Mutex, Semaphore, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{Instrument, Span};

use crate::config::{AssistantConfig, RunsConfig, SessionsConfig, ThreadsConfig, TtlFrom};
use crate::domain::{
    ConversationKey, Fingerprints, Lifetimes, Message, MessageId, Metadata, MultitaskStrategy, NewLife, Page,
    PageRequest, RemnantId, ReplicaId, Run, RunId, Scope, TenantKey, Thread, ThreadActivity, ThreadId,
    Timestamp, Ttl, UserContent, UserKey,
};
use crate::error::{Error, TooOften};
use crate::locks::{KeyedQueue, KeyedSemaphore, NoPermit, QueueFull, Share};
use crate::records;
use crate::store::{
    Admission, Idempotency, InputMessage, Repeated, Store, StoreError, ThreadFilter, ThreadName,
    ThreadReport, ThreadUpdate,
};
use crate::upstream::Upstream;

pub use execution::breaker::Breaker;
use execution::failure::Failure;
use execution::queue::{Held, run_task};
pub use execution::rollover::Renewed;
pub use log::writer::{Outcome, RunEvent};
use notifications::Notifier;
pub use reconcile::{Differences, Unverified, Verified};
use registry::RunRegistry;
pub use service::cancel::Which;
pub use service::subscription::{Answer, DELETED, RunSubscription};
pub use service::tool_outputs::NewOutputs;

/// Threads and runs of this replica. Clones share everything.
#[derive(Clone)]
pub struct Runs {
    parts: Arc<Parts>,
}

/// What [`Runs`] is made of.
pub struct RunsParts {
    pub store: Arc<Store>,
    pub upstreams: BTreeMap<String, Arc<dyn Upstream>>,
    /// By the names of the upstreams; without one, requests always pass.
    pub breakers: BTreeMap<String, Arc<Breaker>>,
    pub assistants: BTreeMap<String, AssistantConfig>,
    /// Name of the assistant of a message that names none.
    pub default_assistant: String,
    pub runs: RunsConfig,
    pub lifetimes: Lifetimes,
    pub sessions: SessionsConfig,
    pub threads: ThreadsConfig,
    /// Names of the upstreams to whose threads others may write.
    pub shared: BTreeSet<String>,
    /// Names of the upstreams that are told keys in clear; the others are told fingerprints.
    pub told_keys: BTreeSet<String>,
    pub fingerprints: Fingerprints,
    /// Longest wait for the runs before a new one to be recorded.
    pub admission_timeout: Duration,
    pub replica: ReplicaId,
    /// How often a replica looks for what others ask of its runs.
    pub attend_every: Duration,
    /// Tracks every run.
    pub tasks: TaskTracker,
    /// Cancelled when no new runs are taken.
    pub draining: CancellationToken,
    /// Cancelled when running turns must end at once.
    pub stop: CancellationToken,
}

struct Parts {
    given: RunsParts,
    locks: KeyedQueue<ConversationKey, ThreadId>,
    registry: RunRegistry,
    seats: KeyedSemaphore<TenantKey>,
    /// For the bytes of messages until their runs start.
    waiting: KeyedSemaphore<ConversationKey>,
    notifier: Notifier,
    /// Who compares a transcript with its upstream thread has one of these.
    comparing: Semaphore,
    /// When the store was last seen to be in order. Locked while somebody looks, so that a flood of questions
    /// becomes one.
    seen_ready: Mutex<Option<Instant>>,
}

/// A user's message that asks for a run.
#[derive(Debug)]
pub struct NewMessage {
    pub content: UserContent,
    /// `None`: the default assistant.
    pub assistant: Option<String>,
    /// It came with a user's own token, which may not choose every assistant.
    pub by_user: bool,
    pub strategy: MultitaskStrategy,
    pub metadata: Metadata,
    /// `None`: the assistant's, else the configured one.
    pub timeout: Option<Duration>,
    /// How long the thread is to live, from now on; `None`: as long as it would anyway.
    pub ttl: Option<Duration>,
    /// Cancels the run, from its admission on; harmless once it has ended. A message that joins a run of others, or
    /// repeats an earlier one, does not take that along.
    pub cancel: CancellationToken,
    pub idempotency: Option<Idempotency>,
    /// It is taken only as a repeat of an earlier one; the reason is told otherwise.
    pub only_repeats: Option<TooOften>,
    /// Of the memory for what callers send, while the content is in memory.
    pub share: Share,
}

/// A run that was admitted, now or, if `replayed`, by an earlier request with the same idempotency key.
#[derive(Clone, Debug)]
pub struct Submitted {
    pub thread: Thread,
    pub run: Run,
    pub follow: RunSubscription,
    pub replayed: bool,
}

impl Runs {
    pub fn new(parts: RunsParts) -> Self {
        let locks = KeyedQueue::new(parts.runs.max_queue);
        let each = parts.runs.max_runs_per_tenant.map_or(usize::MAX, NonZeroUsize::get);
        let seats = KeyedSemaphore::new(parts.runs.max_runs.get(), each);
        let waiting = KeyedSemaphore::new(usize::MAX, parts.runs.max_queue_bytes);
        let parts = Parts {
            given: parts,
            locks,
            registry: RunRegistry::new(),
            seats,
            waiting,
            notifier: Notifier::default(),
            comparing: Semaphore::new(reconcile::AT_A_TIME),
            seen_ready: Mutex::default(),
        };
        Self { parts: Arc::new(parts) }
    }

    /// Admits a message: its run is durable, started or waiting, when this returns. The run goes on whatever
    /// becomes of the caller; if this future is dropped, the message may or may not have been admitted.
    ///
    /// A message whose idempotency key was used before, with the same request, gets the run of then.
    pub async fn submit(&self, key: ConversationKey, mut new: NewMessage) -> Result<Submitted, Error> {
        let parts = &self.parts.given;
        // Keeps a stop from finding no task between this check and the spawn below.
        let _token = parts.tasks.token();
        self.takes_work()?;
        let (name, assistant) = self.assistant(new.assistant.as_deref(), new.by_user)?;
        let run_timeout = new.timeout.or(assistant.timeout).unwrap_or(parts.runs.timeout);
        if run_timeout.is_zero() || run_timeout > parts.runs.max_timeout {
            let max = parts.runs.max_timeout.as_millis();
            return Err(Error::Invalid(format!("`timeout_ms` must be between 1 and {max}")));
        }
        let held = match self.hold(&key, &mut new, &assistant.upstream) {
            Ok(held) => held,
            // What was taken before is told again, however busy this replica is.
            Err(refused) => return self.repeated(&key, new.idempotency.as_ref()).await?.ok_or(refused),
        };
        let admission = Admission {
            new_thread: ThreadId::new(),
            limits: parts.lifetimes.of(&key.scope),
            ttl: new.ttl.map(|ttl| self.ttl(&key, ttl)).transpose()?,
            key: key.clone(),
            upstream: assistant.upstream.clone(),
            run_id: RunId::new(),
            assistant: name.to_owned(),
            strategy: new.strategy,
            metadata: new.metadata,
            message: InputMessage { id: MessageId::new(), content: new.content.into_parts() },
            timeout: run_timeout,
            replica: parts.replica,
            intent: self.needs_thread(&assistant.upstream).then(RemnantId::new),
            idempotency: new.idempotency.clone(),
            idempotency_ttl: parts.runs.idempotency_ttl,
        };
        // From here on the work belongs to a task: a caller that leaves must not leave a recorded run undone.
        let (answer, answered) = oneshot::channel();
        let active = self.parts.registry.begins(admission.run_id, new.cancel);
        parts
            .tasks
            .spawn(run_task(self.clone(), active, held, Arc::new(admission), answer).in_current_span());
        match answered.await.unwrap_or(Err(Error::Internal(None))) {
            // Nothing of it was recorded, so its key stands for an earlier one or for nothing.
            Err(refused @ (Error::Overloaded | Error::StoreUnavailable(None))) => {
                self.repeated(&key, new.idempotency.as_ref()).await?.ok_or(refused)
            }
            answered => answered,
        }
    }

    /// What a message needs on its way to its run.
    ///
    /// # Errors
    /// There is no room for it, or it may not come now.
    fn hold(&self, key: &ConversationKey, new: &mut NewMessage, upstream: &str) -> Result<Held, Error> {
        if let Some(too_often) = new.only_repeats {
            return Err(too_often.into());
        }
        self.is_reachable(upstream)?;
        let seat = self.parts.seats.take(&key.tenant).map_err(|none| match none {
            NoPermit::Full => Error::Overloaded,
            NoPermit::KeyFull(limit) => Error::TooManyRuns { limit },
        })?;
        let bytes = new.content.size();
        let queued = self.parts.waiting.take_many(key, bytes).map_err(|_| match new.strategy {
            MultitaskStrategy::Reject => Error::ThreadBusy,
            _ => Error::QueueBytesFull { limit: self.parts.given.runs.max_queue_bytes },
        })?;
        let full = |full: QueueFull| Error::QueueFull { limit: full.max_waiting };
        let locks = &self.parts.locks;
        let place = match new.strategy {
            MultitaskStrategy::Enqueue | MultitaskStrategy::Merge => locks.join(key.clone()).map_err(full)?,
            MultitaskStrategy::Interrupt | MultitaskStrategy::Rollback => {
                locks.join_next(key.clone()).map_err(full)?
            }
            // Whether the thread is idle is for the store to say: it may be another one than those in line are on, and what
            // makes it busy may be an earlier copy of this request.
            MultitaskStrategy::Reject => locks.join(key.clone()).map_err(|_| Error::ThreadBusy)?,
        };
        Ok(Held { place, seat, queued, share: mem::take(&mut new.share) })
    }

    /// The assistant of this name, or the default one, as far as it may be chosen. One that may not be is answered like one
    /// that does not exist.
    fn assistant(&self, named: Option<&str>, by_user: bool) -> Result<(&str, &AssistantConfig), Error> {
        let RunsParts { assistants, default_assistant, .. } = &self.parts.given;
        let name = named.unwrap_or(default_assistant);
        let may_choose = |(name, assistant): &(&String, &AssistantConfig)| {
            !by_user || assistant.user_selectable || *name == default_assistant
        };
        if let Some((name, assistant)) = assistants.get_key_value(name).filter(may_choose) {
            return Ok((name, assistant));
        }
        let known: Vec<_> = assistants.iter().filter(may_choose).map(|(name, _)| name.as_str()).collect();
        let known = known.join(", ");
        Err(Error::Invalid(format!("there is no assistant of this name; there are: {known}")))
    }

    /// Changes the key's current thread: all of its metadata, or how long it lives; what is `None` stays.
    pub async fn update_thread(
        &self,
        key: &ConversationKey,
        metadata: Option<Metadata>,
        life: Option<NewLife>,
    ) -> Result<ThreadReport, Error> {
        let update = ThreadUpdate { metadata, life, limits: self.parts.given.lifetimes.of(&key.scope) };
        let thread = self.store().update_thread(key, &update).await?.ok_or(NO_THREAD)?;
        self.thread(ThreadName::Id(&key.tenant, thread.id)).await
    }

    /// The life that lasts so long.
    ///
    /// # Errors
    /// It is longer than a caller may ask for, or none.
    pub fn life(&self, key: &ConversationKey, ttl: Duration) -> Result<NewLife, Error> {
        self.ttl(key, ttl).map(NewLife::Own)
    }

    /// What a caller's `ttl_ms` means for a thread of that key.
    fn ttl(&self, key: &ConversationKey, ttl: Duration) -> Result<Ttl, Error> {
        let (sessions, max) = (&self.parts.given.sessions, self.parts.given.threads.max_ttl);
        if ttl.is_zero() || ttl > max {
            return Err(Error::Invalid(format!("`ttl_ms` must be between 1 and {}", max.as_millis())));
        }
        Ok(match (&key.scope, sessions.ttl_from) {
            (Scope::Session(_), TtlFrom::LastActivity) => Ttl::FromLastActivity(ttl),
            _ => Ttl::FromNow(ttl),
        })
    }

    /// The run that an idempotency key stands for, if it was used before.
    async fn repeated(
        &self,
        key: &ConversationKey,
        idempotency: Option<&Idempotency>,
    ) -> Result<Option<Submitted>, Error> {
        let earlier = self.earlier(key, idempotency).await?;
        // Its sender heard that it was not taken, and it is still being taken back.
        if earlier.as_ref().is_some_and(|earlier| self.parts.registry.is_refused(earlier.run.id)) {
            return Err(Error::StoreUnavailable(None));
        }
        Ok(earlier.map(|Repeated { thread, run, .. }| {
            let follow = RunSubscription::of(self, &thread, run.id);
            Submitted { thread, run, follow, replayed: true }
        }))
    }

    /// What an idempotency key stands for by now. An error if that is another request.
    async fn earlier(
        &self,
        key: &ConversationKey,
        idempotency: Option<&Idempotency>,
    ) -> Result<Option<Repeated>, Error> {
        let Some(used) = idempotency else { return Ok(None) };
        let remember = self.parts.given.runs.idempotency_ttl;
        let mut earlier = self.store().repeated(key, &used.key, remember).await?;
        match &mut earlier {
            Some(earlier) if earlier.request_hash != used.request_hash => {
                return Err(Error::IdempotencyMismatch);
            }
            Some(earlier) => self.parts.registry.give_arguments(&mut earlier.run),
            None => {}
        }
        Ok(earlier)
    }

    /// This replica takes new work.
    fn takes_work(&self) -> Result<(), Error> {
        if self.parts.given.draining.is_cancelled() {
            return Err(Error::Draining);
        }
        if self.parts.registry.has_lapsed() {
            return Err(Error::StoreUnavailable(None));
        }
        Ok(())
    }

    /// This process still has its threads to itself: one that was stopped for a while may not know yet that it has not.
    fn may_send(&self) -> Result<(), Failure> {
        if self.parts.registry.has_lapsed() { Err(Failure::LeaseLost) } else { Ok(()) }
    }

    /// The breaker of this upstream lets requests through.
    fn is_reachable(&self, upstream: &str) -> Result<(), Error> {
        match self.parts.given.breakers.get(upstream).map(|breaker| breaker.check()) {
            Some(Err(retry_after)) => Err(Error::UpstreamUnavailable { retry_after }),
            _ => Ok(()),
        }
    }

    /// Conversations have a thread of their own at this upstream.
    fn needs_thread(&self, upstream: &str) -> bool {
        self.parts.given.upstreams.get(upstream).is_some_and(|upstream| upstream.capabilities().has_threads)
    }

    /// A thread and what it is doing.
    pub async fn thread(&self, name: ThreadName<'_>) -> Result<ThreadReport, Error> {
        Ok(self.with_arguments(self.store().report(name).await?.ok_or(NO_THREAD)?))
    }

    /// A page of threads, by age.
    pub async fn threads(
        &self,
        filter: &ThreadFilter,
        page: &PageRequest<ThreadId>,
    ) -> Result<Page<(Thread, ThreadActivity)>, Error> {
        Ok(self.store().threads(filter, page).await?)
    }

    /// All that is held of a user, as lines of text.
    pub fn export(
        &self,
        tenant: TenantKey,
        user: UserKey,
    ) -> impl Stream<Item = Result<String, StoreError>> + Send + 'static {
        records::export(Arc::clone(&self.parts.given.store), records::What::User(tenant, user))
    }

    /// From then on no new message goes to the thread.
    pub fn expiry(&self, thread: &Thread) -> Option<Timestamp> {
        self.parts.given.lifetimes.expiry(thread)
    }

    /// A page of a thread's transcript, or of those of all threads that its key has and had.
    pub async fn messages(
        &self,
        name: ThreadName<'_>,
        across: bool,
        page: &PageRequest<MessageId>,
    ) -> Result<Page<Message>, Error> {
        self.store().messages(name, across, page).await?.ok_or(NO_THREAD)
    }

    /// A page of the current thread's runs.
    pub async fn runs(&self, key: &ConversationKey, page: &PageRequest<RunId>) -> Result<Page<Run>, Error> {
        let mut page = self.store().runs(key, page).await?.ok_or(NO_THREAD)?;
        for run in &mut page.data {
            self.parts.registry.give_arguments(run);
        }
        Ok(page)
    }

    /// One run and its reply, if it has one.
    pub async fn run(&self, key: &ConversationKey, id: RunId) -> Result<(Run, Option<Message>), Error> {
        let found = self.store().run(key, id).await?;
        let (mut run, message) = found.ok_or(Error::NotFound("this conversation has no such run"))?;
        self.parts.registry.give_arguments(&mut run);
        Ok((run, message))
    }

    /// Runs that tasks of this process work on, and conversations with somebody in line.
    pub fn load(&self) -> (usize, usize) {
        (self.parts.given.tasks.len(), self.parts.locks.len())
    }

    /// This replica is shutting down.
    pub fn is_draining(&self) -> bool {
        self.parts.given.draining.is_cancelled()
    }

    /// This replica takes new runs, and its store is in order, or was a second ago.
    pub async fn ready(&self) -> Result<(), Error> {
        self.takes_work()?;
        let mut seen = self.parts.seen_ready.lock().await;
        if seen.is_none_or(|seen| seen.elapsed() > READY_FOR) {
            *seen = None;
            self.store().ready().await?;
            *seen = Some(Instant::now());
        }
        Ok(())
    }

    fn store(&self) -> &Store {
        &self.parts.given.store
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

/// The span of all that is logged about a run. Whose it is stands there in fingerprints.
fn span_of(run: RunId, key: &ConversationKey, fingerprints: &Fingerprints) -> Span {
    let user = fingerprints.user(&key.tenant, &key.user);
    tracing::info_span!("run", run.id = %run, user, key = fingerprints.conversation(key))
}

const NO_THREAD: Error = Error::NotFound("this key has no conversation yet; post a message to start one");

/// Between half of `pause` and all of it.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(rand::rng().random_range(0.5..=1.0))
}

//! The use cases: submit a message, answer its function calls, follow or cancel its run, read what became of it. HTTP
//! is above, store and upstreams below.
//!
//! The rooms stand in this order, and each uses only what stands below it: `service` (what a caller may ask), `replica` (what
//! this process does as one of several), `execution` (one run, from its admission to its end), `reconcile`, `redaction`,
//! `context`, `registry`, `log`, `notifications`, `breaker`, `backoff`.

mod backoff;
mod breaker;
mod context;
mod execution;
mod log;
mod notifications;
mod reconcile;
mod redaction;
mod registry;
mod replica;
mod service;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::Stream;

use crate::domain::{
    ConversationKey, Message, MessageId, Metadata, NewLife, Page, PageRequest, Run, RunId,
    TenantKey, Thread, ThreadActivity, ThreadId, Timestamp, UserKey,
};
use crate::error::Error;
use crate::store::{RunLease, StoreError, ThreadFilter, ThreadName, ThreadReport};
use crate::upstream::RateLimiter;
use context::Context;
use replica::{flusher, messaging, session};
use service::{cancel, read, submit, subscription, threads, tool_outputs};

pub use breaker::Breaker;
pub use context::{ConfiguredUpstream, RunSettings, RunsParts, Tasks};
pub use log::event::{Outcome, RunEvent};
pub use log::offset::{EventOffset, FIRST_EVENT};
pub use reconcile::{Differences, Unverified, Verified};
pub use service::cancel::Which;
pub use service::read::Load;
pub use service::submit::NewMessage;
pub use service::subscription::{Answer, DELETED, RunSubscription, Submitted};
pub use service::threads::Renewed;
pub use service::tool_outputs::{NewOutputs, Resumed};

/// Threads and runs of this replica. Clones share everything.
#[derive(Clone)]
pub struct Runs {
    ctx: Arc<Context>,
}

impl Runs {
    pub fn new(parts: RunsParts) -> Self {
        Self {
            ctx: Arc::new(Context::new(parts)),
        }
    }
}

/// What a caller may ask.
impl Runs {
    /// Admits a message: its run is durable, started or waiting, when this returns. The run goes on whatever
    /// becomes of the caller; if this future is dropped, the message may or may not have been admitted.
    ///
    /// A message whose idempotency key was used before, with the same request, gets the run of then.
    pub async fn submit(&self, key: ConversationKey, new: NewMessage) -> Result<Submitted, Error> {
        submit::submit(&self.ctx, key, new).await
    }

    /// Hands a run the outputs of the function calls that it waits for. They are durable when this returns, and the run
    /// goes on.
    ///
    /// # Errors
    /// [`Error::Forbidden`] if a backend has to answer; [`Error::Invalid`] if the outputs are not one for each call;
    /// [`Error::RunNotWaiting`] if the run does not wait (any more).
    pub async fn answer_tools(
        &self,
        key: &ConversationKey,
        id: RunId,
        new: NewOutputs,
    ) -> Result<Resumed, Error> {
        tool_outputs::answer_tools(&self.ctx, key, id, new).await
    }

    /// Cancels a run and waits, within a bound, for its end. A run that has ended is given as it is: a cancel that
    /// comes too late is no error.
    pub async fn cancel(
        &self,
        key: &ConversationKey,
        id: RunId,
    ) -> Result<(Run, Option<Message>), Error> {
        cancel::cancel(&self.ctx, key, id).await
    }

    /// Cancels unfinished runs of the current thread and waits, within a bound, for their end. Gives them as they are then,
    /// in order of admission.
    pub async fn cancel_some(
        &self,
        key: &ConversationKey,
        which: Which,
    ) -> Result<Vec<Run>, Error> {
        cancel::cancel_some(&self.ctx, key, which).await
    }

    /// Has these runs cancelled, and waits, within a bound, for their end.
    pub async fn end_all(&self, key: &ConversationKey, runs: &[Run]) -> Result<(), Error> {
        cancel::end_all(&self.ctx, key, runs).await
    }

    /// A run of any of the key's threads and how to follow it.
    pub async fn follow(
        &self,
        key: &ConversationKey,
        id: RunId,
    ) -> Result<(Run, RunSubscription), Error> {
        subscription::follow(&self.ctx, key, id).await
    }

    /// One run and its reply, if it has one.
    pub async fn run(
        &self,
        key: &ConversationKey,
        id: RunId,
    ) -> Result<(Run, Option<Message>), Error> {
        read::run(&self.ctx, key, id).await
    }

    /// A page of the current thread's runs.
    pub async fn runs(
        &self,
        key: &ConversationKey,
        page: &PageRequest<RunId>,
    ) -> Result<Page<Run>, Error> {
        read::runs(&self.ctx, key, page).await
    }

    /// A page of a thread's transcript, or of those of all threads that its key has and had.
    pub async fn messages(
        &self,
        name: ThreadName<'_>,
        across: bool,
        page: &PageRequest<MessageId>,
    ) -> Result<Page<Message>, Error> {
        read::messages(&self.ctx, name, across, page).await
    }

    /// A thread and what it is doing.
    pub async fn thread(&self, name: ThreadName<'_>) -> Result<ThreadReport, Error> {
        read::thread(&self.ctx, name).await
    }

    /// A page of threads, by age.
    pub async fn threads(
        &self,
        filter: &ThreadFilter,
        page: &PageRequest<ThreadId>,
    ) -> Result<Page<(Thread, ThreadActivity)>, Error> {
        read::threads(&self.ctx, filter, page).await
    }

    /// All that is held of a user, as lines of text.
    pub fn export(
        &self,
        tenant: TenantKey,
        user: UserKey,
    ) -> impl Stream<Item = Result<String, StoreError>> + Send + use<> {
        read::export(&self.ctx, tenant, user)
    }

    /// From then on no new message goes to the thread.
    pub fn expiry(&self, thread: &Thread) -> Option<Timestamp> {
        self.ctx.config.lifetimes.expiry(thread)
    }

    /// The life that lasts so long.
    ///
    /// # Errors
    /// It is longer than a caller may ask for, or none.
    pub fn life(&self, key: &ConversationKey, ttl: Duration) -> Result<NewLife, Error> {
        threads::ttl(&self.ctx, key, ttl).map(NewLife::Own)
    }

    /// Changes the key's current thread: all of its metadata, or how long it lives; what is `None` stays.
    pub async fn update_thread(
        &self,
        key: &ConversationKey,
        metadata: Option<Metadata>,
        life: Option<NewLife>,
    ) -> Result<ThreadReport, Error> {
        threads::update_thread(&self.ctx, key, metadata, life).await
    }

    /// Archives the key's thread and starts a fresh one, at once or before the next turn.
    pub async fn roll_over(&self, key: &ConversationKey) -> Result<Renewed, Error> {
        threads::roll_over(&self.ctx, key).await
    }

    /// Compares a thread with its upstream thread, within `runs.settle_timeout`. A run that works on it meanwhile shows as a
    /// difference.
    ///
    /// # Errors
    /// The store or the upstream failed.
    pub async fn verify(
        &self,
        thread: &Thread,
        pace: &RateLimiter,
    ) -> Result<Verified, Unverified> {
        reconcile::verify(&self.ctx, thread, pace).await
    }

    /// Takes over what others wrote to the upstream thread, if its upstream is one to which they may. `by` is the lease of
    /// the run that has its turn on the thread, if there is one. How many messages.
    ///
    /// # Errors
    /// The store or the upstream failed; nothing was taken over then, or all of it.
    pub async fn reconcile(
        &self,
        thread: &Thread,
        by: Option<RunLease>,
        pace: &RateLimiter,
    ) -> Result<u64, Unverified> {
        reconcile::reconcile(&self.ctx, thread, by, pace).await
    }

    /// How much this process works on.
    pub fn load(&self) -> Load {
        read::load(&self.ctx)
    }

    /// This replica takes new runs, and its store is in order, or was a second ago.
    pub async fn ready(&self) -> Result<(), Error> {
        read::ready(&self.ctx).await
    }

    /// This replica is shutting down.
    pub fn is_draining(&self) -> bool {
        self.ctx.tasks.draining.is_cancelled()
    }
}

/// What this process does as one of several.
impl Runs {
    /// Says that this replica is alive for another `ttl`; the first call registers it and must have succeeded
    /// before the first run is submitted.
    ///
    /// # Errors
    /// The store failed, or did not answer within a third of `ttl`.
    pub async fn renew(&self, address: &str, ttl: Duration) -> Result<(), StoreError> {
        session::renew(&self.ctx, address, ttl).await
    }

    /// Keeps the session, takes over what nobody works on, and exchanges with the other replicas what they need to
    /// know, until the stop.
    pub async fn keep_session(self, address: String, ttl: Duration) {
        session::keep_session(&self.ctx, &address, ttl).await;
    }

    /// Records all that the runs of this process have shown up to now.
    pub async fn record_now(&self) {
        flusher::flush_now(&self.ctx).await;
    }

    /// Sends this process's notifications to the other replicas, and gives up the runs that it releases. Never ends; may be
    /// dropped.
    pub async fn deliver(&self) {
        messaging::deliver(&self.ctx).await;
    }

    /// Has all tasks let go of their runs, for other replicas or the next process to go on with, if these can know what
    /// that takes.
    pub fn let_go(&self) {
        session::let_go(&self.ctx);
    }

    /// Gives the session up: whatever this replica still owns can be adopted at once.
    pub async fn retire(&self) {
        session::retire(&self.ctx).await;
    }
}

impl fmt::Debug for Runs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runs")
            .field("queue", &self.ctx.queue)
            .finish_non_exhaustive()
    }
}

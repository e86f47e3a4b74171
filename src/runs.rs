//! The use cases: submit a message, answer its function calls, follow or cancel its run, read the
//! result. HTTP is above; the store and the upstreams are below.
//!
//! The modules have an order, and each uses only the modules after it:
//!
//! 1. `service`: what a caller may ask.
//! 2. `replica`: what this process does as one of several.
//! 3. `execution`: one run, from its admission to its end.
//! 4. `reconcile`, `redaction`, `context`, `registry`, `log`, `notifications`, `breaker`,
//!    `recovery_budget`, `backoff`.

mod backoff;
mod breaker;
mod context;
mod execution;
mod log;
mod notifications;
mod reconcile;
mod recovery_budget;
mod redaction;
mod registry;
mod replica;
mod service;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::Stream;

use crate::domain::{
    ConversationKey, Message, MessageId, Metadata, NewLife, Page, PageRequest, Reader, Run, RunId,
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

/// The threads and runs of this replica. Clones share everything.
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
    /// Admits a message. When this returns, its run is durable: started or queued. The run
    /// continues whatever happens to the caller. If this future is dropped, the message may or may
    /// not have been admitted.
    ///
    /// A repeated idempotency key with the same request gets the earlier run.
    pub async fn submit(&self, key: ConversationKey, new: NewMessage) -> Result<Submitted, Error> {
        submit::submit(&self.ctx, key, new).await
    }

    /// Hands a run the outputs of the function calls that it waits for. When this returns, the
    /// outputs are durable and the run continues.
    ///
    /// # Errors
    /// - [`Error::Forbidden`] if only a backend may answer the calls.
    /// - [`Error::Invalid`] if the outputs are not exactly one for each call.
    /// - [`Error::RunNotWaiting`] if the run does not wait, or no longer waits.
    pub async fn answer_tools(
        &self,
        key: &ConversationKey,
        id: RunId,
        new: NewOutputs,
    ) -> Result<Resumed, Error> {
        tool_outputs::answer_tools(&self.ctx, key, id, new).await
    }

    /// Cancels a run and waits, within a bound, for its end. Returns an ended run as it is: a late
    /// cancel is no error.
    pub async fn cancel(
        &self,
        key: &ConversationKey,
        id: RunId,
    ) -> Result<(Run, Option<Message>), Error> {
        cancel::cancel(&self.ctx, key, id).await
    }

    /// Cancels unfinished runs of the current thread and waits, within a bound, for their end.
    /// Returns them in order of admission.
    pub async fn cancel_some(
        &self,
        key: &ConversationKey,
        which: Which,
    ) -> Result<Vec<Run>, Error> {
        cancel::cancel_some(&self.ctx, key, which).await
    }

    /// Cancels these runs and waits, within a bound, for their end.
    pub async fn end_all(&self, key: &ConversationKey, runs: &[Run]) -> Result<(), Error> {
        cancel::end_all(&self.ctx, key, runs).await
    }

    /// Returns a run of any of the key's threads, and a subscription to it.
    pub async fn follow(
        &self,
        key: &ConversationKey,
        id: RunId,
    ) -> Result<(Run, RunSubscription), Error> {
        subscription::follow(&self.ctx, key, id).await
    }

    /// Returns a run and its reply, if it has one.
    pub async fn run(
        &self,
        key: &ConversationKey,
        id: RunId,
    ) -> Result<(Run, Option<Message>), Error> {
        read::run(&self.ctx, key, id).await
    }

    /// Returns a page of the current thread's runs.
    pub async fn runs(
        &self,
        key: &ConversationKey,
        page: &PageRequest<RunId>,
    ) -> Result<Page<Run>, Error> {
        read::runs(&self.ctx, key, page).await
    }

    /// Returns a page of a thread's transcript or, with `across`, of the transcripts of all
    /// threads that its key has and had.
    pub async fn messages(
        &self,
        name: ThreadName<'_>,
        across: bool,
        page: &PageRequest<MessageId>,
    ) -> Result<Page<Message>, Error> {
        read::messages(&self.ctx, name, across, page).await
    }

    /// Returns a thread and what it is doing.
    pub async fn thread(&self, name: ThreadName<'_>) -> Result<ThreadReport, Error> {
        read::thread(&self.ctx, name).await
    }

    /// Returns a page of threads, by age.
    pub async fn threads(
        &self,
        filter: &ThreadFilter,
        page: &PageRequest<ThreadId>,
    ) -> Result<Page<(Thread, ThreadActivity)>, Error> {
        read::threads(&self.ctx, filter, page).await
    }

    /// Streams everything that the store keeps of a user, as lines of text.
    pub fn export(
        &self,
        tenant: TenantKey,
        user: UserKey,
        reader: Reader,
    ) -> impl Stream<Item = Result<String, StoreError>> + Send + use<> {
        read::export(&self.ctx, tenant, user, reader)
    }

    /// Returns the instant from which the thread accepts no new message.
    pub fn expiry(&self, thread: &Thread) -> Option<Timestamp> {
        self.ctx.config.lifetimes.expiry(thread)
    }

    /// Returns a new lifetime of this length.
    ///
    /// # Errors
    /// The length is zero, or longer than a caller may ask for.
    pub fn life(&self, key: &ConversationKey, ttl: Duration) -> Result<NewLife, Error> {
        threads::ttl(&self.ctx, key, ttl).map(NewLife::Own)
    }

    /// Changes the key's current thread: all of its metadata, its lifetime, or both. `None`
    /// changes nothing.
    pub async fn update_thread(
        &self,
        key: &ConversationKey,
        metadata: Option<Metadata>,
        life: Option<NewLife>,
    ) -> Result<ThreadReport, Error> {
        threads::update_thread(&self.ctx, key, metadata, life).await
    }

    /// Archives the key's thread and starts a fresh one, at once or before the next run.
    pub async fn roll_over(&self, key: &ConversationKey) -> Result<Renewed, Error> {
        threads::roll_over(&self.ctx, key).await
    }

    /// Compares a thread with its upstream thread, within `runs.settle_timeout`. A run that works
    /// meanwhile shows as a difference.
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

    /// Copies messages that other writers added to the upstream thread into the transcript, if the
    /// configuration allows other writers there. `by` is the lease of the thread's active run, if
    /// there is one. Returns the number of messages.
    ///
    /// # Errors
    /// The store or the upstream failed. Then all messages were copied, or none.
    pub async fn reconcile(
        &self,
        thread: &Thread,
        by: Option<RunLease>,
        pace: &RateLimiter,
    ) -> Result<u64, Unverified> {
        reconcile::reconcile(&self.ctx, thread, by, pace).await
    }

    /// Returns how much this process works on.
    pub fn load(&self) -> Load {
        read::load(&self.ctx)
    }

    /// Checks that this replica takes new runs, and that its store works, or worked a second ago.
    pub async fn ready(&self) -> Result<(), Error> {
        read::ready(&self.ctx).await
    }

    /// Returns whether this replica is shutting down.
    pub fn is_draining(&self) -> bool {
        self.ctx.tasks.draining.is_cancelled()
    }
}

/// What this process does as one of several.
impl Runs {
    /// Renews the session of this replica for another `ttl`. The first call registers the replica;
    /// it must succeed before the first run is submitted.
    ///
    /// # Errors
    /// The store failed, or did not answer within a third of `ttl`.
    pub async fn renew(&self, address: &str, ttl: Duration) -> Result<(), StoreError> {
        session::renew(&self.ctx, address, ttl).await
    }

    /// Keeps the session, takes over orphans and strays, and exchanges notifications with the
    /// other replicas, until the stop.
    pub async fn keep_session(self, address: String, ttl: Duration) {
        session::keep_session(&self.ctx, &address, ttl).await;
    }

    /// Writes all events that this process's runs have shown up to now.
    pub async fn record_now(&self) {
        flusher::flush_now(&self.ctx).await;
    }

    /// Sends this process's notifications to the other replicas, and releases runs. Never returns;
    /// the future may be dropped.
    pub async fn deliver(&self) {
        messaging::deliver(&self.ctx).await;
    }

    /// Makes all tasks let go of their runs, so that other replicas or the next process can
    /// continue them. Does nothing if the store does not keep the content that this takes.
    pub fn let_go(&self) {
        session::let_go(&self.ctx);
    }

    /// Ends the session: another process can adopt this replica's runs at once.
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

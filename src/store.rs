//! Where the truth lives: the [`Store`] trait and its errors. The backends are in `store/`.
//!
//! Each method is one atomic step. All wall-clock time is the database's own: no method takes "now".
//! Dropping a method's future may leave the step done or not done, never half done.

mod backend;
mod columns;
mod discreet;
mod errors;
mod keys;
mod life;
mod paging;
mod pool;
mod postgres;
mod read;
mod rows;
mod shared;
mod sqlite;
mod threads;

use std::error::Error as StdError;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use serde::{Deserialize, Serialize};

use crate::domain::{
    Baseline, ContentPart, Context, ConversationKey, EventBatch, Leftover, Limits, Message, MessageId,
    Metadata, MultitaskStrategy, Page, PageRequest, ReplicaId, RequiredAction, Run, RunError, RunId,
    RunStatus, Thread, ThreadActivity, ThreadId, Timestamp, ToolOutput, Ttl, UpstreamRunId, UpstreamThreadId,
    Usage,
};

pub use backend::BackendKind;
pub use discreet::Discreet;
pub use keys::{Keys, NewKey, StoredKey};
pub use life::{
    Binding, Bound, Deletable, DeletedThread, DeletionReport, DeletionRequest, DeletionTarget, Due, Foreign,
    Imported, ImportedMessage, ImportedThread, Life, Made, Pruned, Pruning, Remnant, RemnantKind,
    RemnantName, Rolled, Rollover, ThreadFilter, ThreadName, ThreadReport, ThreadUpdate, UNHEARD_OF,
};
pub use postgres::PostgresStore;
pub use sqlite::SqliteStore;

/// So many bytes of content, and the rest of the message that reaches them, are read of a transcript at a time: messages
/// may have several MiB each, and what was read is in memory until its reader has taken it.
pub const PAGE_BYTES: usize = 4 * 1024 * 1024;

/// Threads, runs and transcripts of all tenants, in one database that several replicas may share.
#[async_trait]
pub trait Store: Life + Keys + Send + Sync + std::fmt::Debug {
    /// What is said is stored. If not, it is known to the process that works on the run alone, until the run has ended.
    fn keeps_content(&self) -> bool {
        true
    }

    /// The database answers and its schema is the one that this binary knows.
    async fn ready(&self) -> Result<(), StoreError>;

    /// Records a new run: resolves the key's current thread or creates it (an expired one is archived, and a
    /// fresh one that names it takes its place), and admits the run, all in one step.
    ///
    /// The run starts at once if the thread has no unfinished run. Otherwise its strategy decides:
    /// [`Enqueue`](MultitaskStrategy::Enqueue) queues it last; [`Interrupt`](MultitaskStrategy::Interrupt) and
    /// [`Rollback`](MultitaskStrategy::Rollback) queue it before all that wait (what is active is for
    /// [`displace`](Self::displace) to end); [`Merge`](MultitaskStrategy::Merge) adds the message to the last run in
    /// the queue if that has the same assistant and metadata and room for another message, and queues it as
    /// `Enqueue` does if not; [`Reject`](MultitaskStrategy::Reject) refuses it, and nothing is stored. A run that
    /// starts puts its message into the transcript in the same step.
    ///
    /// An idempotency key that is in use is refused with [`Admitted::Repeated`], and nothing is stored.
    async fn admit(&self, admission: &Admission) -> Result<Admitted, StoreError>;

    /// What an idempotency key of the conversation stands for. A use that is older than `remember` is forgotten by
    /// this call. So is one whose run failed with
    /// [`RunErrorCode::NotRecorded`](crate::domain::RunErrorCode::NotRecorded): its sender was told that the message
    /// was not taken, and a retry starts anew.
    async fn repeated(
        &self,
        key: &ConversationKey,
        idempotency_key: &str,
        remember: Duration,
    ) -> Result<Option<Repeated>, StoreError>;

    /// Starts a queued run if no run of its thread is active and none before it waits; its messages move into
    /// the transcript in the same step, and its deadline begins to count. What waits on a thread that is being deleted
    /// is not started any more.
    ///
    /// Repeating the call with the same lease is harmless: while the run is in progress it answers the same, so
    /// that an answer which was lost on its way does not strand a run that has started.
    async fn claim(&self, lease: &RunLease) -> Result<Claim, StoreError>;

    /// Marks the run that is active on the thread of a queued run, and was admitted before that one, to be cancelled;
    /// with `discard` also to be removed from the transcript when it ends. The run that is marked now or was
    /// already; `None` if none is active, or only one that was admitted later. Harmless to repeat.
    async fn displace(&self, lease: &RunLease, discard: bool) -> Result<Option<RunId>, StoreError>;

    /// Marks a run to be cancelled, if it is active. The run as it is afterwards; `None` if there is none.
    async fn request_cancel(&self, key: &ConversationKey, id: RunId) -> Result<Option<Run>, StoreError>;

    /// Takes a run that still waits over from whoever owns it, to end it. `None` if it does not wait (any more).
    async fn take_queued(&self, replica: ReplicaId, id: RunId) -> Result<Option<RunLease>, StoreError>;

    /// Lets a run in progress wait for tool outputs, and records what it said and showed so far. Harmless to repeat
    /// with the same pause, even if the outputs have come meanwhile: the run that is answered is in progress then.
    async fn pause(&self, lease: &RunLease, pause: &Pause) -> Result<Paused, StoreError>;

    /// Hands outputs to a run that waits for exactly the given calls: it is in progress again, and its owner finds the
    /// outputs with [`requests`](Self::requests), or is told by the caller.
    async fn answer_tools(
        &self,
        key: &ConversationKey,
        id: RunId,
        answer: &ToolAnswer,
    ) -> Result<Answered, StoreError>;

    /// Records that the outputs of a run are about to be sent to the upstream: whoever takes the run over from here on
    /// cannot know whether they were. `false` if the lease was lost.
    async fn sends_outputs(&self, lease: &RunLease) -> Result<bool, StoreError>;

    /// Records that a request of a run is about to be sent once more whose answer was lost: the one before may have left
    /// something upstream under an id that [nobody heard](Life::unheard_runs). `false` if the lease was lost.
    async fn sends_again(&self, lease: &RunLease) -> Result<bool, StoreError>;

    /// What others asked of active runs that the replica owns: those that are to be cancelled, and those that have
    /// outputs which are not [being sent](Self::sends_outputs) yet.
    async fn requests(&self, replica: ReplicaId) -> Result<Vec<Request>, StoreError>;

    /// Those of these runs that others have taken over from the replica.
    async fn lost(&self, replica: ReplicaId, working: &[RunId]) -> Result<Vec<RunId>, StoreError>;

    /// Records where the thread of a run lives upstream, and that what was [intended](Life::intend) is done. If the lease
    /// was lost, what was made becomes a remnant where its intent is still recorded. Harmless to repeat.
    async fn bind_upstream_thread(
        &self,
        lease: &RunLease,
        binding: &Binding<'_>,
    ) -> Result<Bound, StoreError>;

    /// Withholds messages before those of a run, for good: its upstream thread is to go on without them. `false` if the
    /// lease was lost. Harmless to repeat.
    async fn withhold_earlier(&self, lease: &RunLease, what: &Withholding) -> Result<bool, StoreError>;

    /// Up to `limit` messages of the thread of a run that stand before a position (`None`: before the run's own) and are
    /// not withheld, newest first. The page ends before its limit, with `has_more`, once it holds [`PAGE_BYTES`].
    async fn earlier(&self, run: RunId, before: Option<i64>, limit: u32)
    -> Result<Page<Message>, StoreError>;

    /// The same of those alone that the upstream thread of the run lacks.
    async fn backlog(&self, run: RunId, before: Option<i64>, limit: u32)
    -> Result<Page<Message>, StoreError>;

    /// Where a run's messages begin in the upstream thread, as far as the transcript knows.
    async fn baseline(&self, run: RunId) -> Result<Baseline, StoreError>;

    /// Records where the messages of an earlier run of the thread stand, now that what it left upstream was looked at:
    /// those of which it was not known. `synced`: what was missing before them went along with that run, and is there.
    /// The thread has no leftover any more. `false` if the lease was lost.
    async fn settled(
        &self,
        lease: &RunLease,
        run: RunId,
        found: Context,
        synced: bool,
    ) -> Result<bool, StoreError>;

    /// Ends a run: status, reply, counters, log, in one step. A run that never started has its messages moved into
    /// the transcript too, so that nothing a user said is dropped. A run that is discarded has its messages removed
    /// instead.
    ///
    /// Repeating the call with the same lease and end is harmless and answers the same.
    async fn finish(&self, lease: &RunLease, end: &RunEnd) -> Result<Closing, StoreError>;

    /// Takes a message back whose sender heard that it was not taken, although its run was recorded. A waiting run that
    /// others have [joined](MultitaskStrategy::Merge) goes on without it, and the message's idempotency key stands for
    /// nothing any more. Else the run ends as [`finish`](Self::finish) ends it. Harmless to repeat.
    async fn withdraw(&self, lease: &RunLease, taken: &Withdrawal) -> Result<Withdrawn, StoreError>;

    /// Records what runs at work have shown since it was last recorded, and where they are at their upstream: what
    /// whoever takes one over, or follows it on another replica, needs to know. Those of which it was recorded; one that
    /// is missing among them is being ended, or its lease was lost, or should be tried again. Each run comes once. Harmless
    /// to repeat, also with more events at the end: the batch of a run begins where the last one that is known to be
    /// recorded ends.
    async fn record(&self, progress: &[RunProgress]) -> Result<Vec<RunId>, StoreError>;

    /// The stored log of a run from number `from` on: batches in order, which may begin before `from`, and may say again
    /// what the one before has said. The last one is always among them: it tells where the log ends.
    async fn events(&self, run: RunId, from: i64) -> Result<Vec<EventBatch>, StoreError>;

    /// A page of a transcript by position, or `across` all threads that the key has and had, the oldest thread first, but
    /// for those that are being deleted; `None` if there is no such thread. It ends before its limit, with `has_more`, once
    /// it holds [`PAGE_BYTES`].
    ///
    /// # Errors
    /// [`StoreError::UnknownCursor`] if `after` or `before` names no message of it.
    async fn messages(
        &self,
        name: ThreadName<'_>,
        across: bool,
        page: &PageRequest<MessageId>,
    ) -> Result<Option<Page<Message>>, StoreError>;

    /// Up to `limit` messages of any thread that stand after a position (0: from the first on), oldest first: fewer, but
    /// one at least, if they hold [`PAGE_BYTES`]. None comes only if there is none.
    async fn transcript(&self, thread: ThreadId, after: i64, limit: u32) -> Result<Vec<Message>, StoreError>;

    /// A page of the runs of the key's newest thread by order of admission; `None` if the key has no thread.
    ///
    /// # Errors
    /// [`StoreError::UnknownCursor`] if `after` or `before` names no run of the thread.
    async fn runs(
        &self,
        key: &ConversationKey,
        page: &PageRequest<RunId>,
    ) -> Result<Option<Page<Run>>, StoreError>;

    /// The unfinished runs of the key's newest thread, in order of admission; `None` if the key has no thread.
    async fn unfinished(&self, key: &ConversationKey) -> Result<Option<Vec<Run>>, StoreError>;

    /// A run of any of the key's threads, archived ones included, and its reply if it has one.
    async fn run(
        &self,
        key: &ConversationKey,
        id: RunId,
    ) -> Result<Option<(Run, Option<Message>)>, StoreError>;

    /// Says that this replica is alive for another `ttl`. The first call registers it.
    async fn renew_replica(&self, id: ReplicaId, address: &str, ttl: Duration)
    -> Result<Renewed, StoreError>;

    /// Says that this replica is gone: what it still owns can be adopted at once.
    async fn retire_replica(&self, id: ReplicaId) -> Result<(), StoreError>;

    /// Gives unfinished runs up: they can be adopted at once. Leases that were lost are passed over.
    async fn release(&self, leases: &[RunLease]) -> Result<(), StoreError>;

    /// Tells all replicas that something is new. It may get lost, so nobody may depend on it.
    async fn tell(&self, news: &[News]) -> Result<(), StoreError>;

    /// What replicas [tell](Self::tell) each other, this one's own included, from the first poll on until the store is
    /// closed. What gets lost while there is no connection is made up for by [`News::Missed`].
    fn news(&self) -> BoxStream<'static, News>;

    /// Takes over up to `limit` unfinished runs that nobody works on, oldest first, each with a higher fence: those
    /// whose owner is not alive, and strays that are the caller's own but not among those it is `working` on.
    ///
    /// A stray is what a lost answer leaves behind. One that was taken over before is one at once; a young one of
    /// the first fence may be an admission under way, and is left alone for a minute.
    async fn adopt_orphans(
        &self,
        id: ReplicaId,
        working: &[RunId],
        limit: u32,
    ) -> Result<Vec<Orphan>, StoreError>;

    /// Closes the connections; later calls fail.
    async fn close(&self);
}

/// What goes wrong below the trait.
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
    #[error("a statement failed")]
    Statement(#[source] Box<dyn StdError + Send + Sync>),
}

/// The most messages that one waiting run takes in by [`MultitaskStrategy::Merge`].
pub const MAX_MERGED: usize = 32;
/// The most bytes of content that it takes in so, as JSON.
pub const MAX_MERGED_BYTES: usize = 12 * 1024 * 1024;

/// A message that asks for a run.
#[derive(Clone, Debug)]
pub struct Admission {
    pub key: ConversationKey,
    /// Id of the thread, should one have to be made.
    pub new_thread: ThreadId,
    /// How long a thread of this scope may be used, unless it has limits of its own.
    pub limits: Limits,
    /// How long the caller wants it to live, from now on.
    pub ttl: Option<Ttl>,
    /// Name of the assistant's upstream. A thread lives on the upstream of its first run.
    pub upstream: String,
    pub run_id: RunId,
    pub assistant: String,
    pub strategy: MultitaskStrategy,
    pub metadata: Metadata,
    pub message: InputMessage,
    /// How long the run may take once it has started.
    pub timeout: Duration,
    /// The replica that will work on it.
    pub replica: ReplicaId,
    pub idempotency: Option<Idempotency>,
}

/// What makes a repeated request known.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Idempotency {
    /// The caller's key, of the conversation's own.
    pub key: String,
    /// A hash of all that the request asks for.
    pub request_hash: [u8; 32],
}

/// An earlier use of an idempotency key.
#[derive(Clone, Debug, PartialEq)]
pub struct Repeated {
    pub request_hash: [u8; 32],
    pub thread: Thread,
    pub run: Run,
}

/// A user's message on its way into a run.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct InputMessage {
    pub id: MessageId,
    pub content: Vec<ContentPart>,
}

/// The right to write about a run. A run that changes hands gets a higher fence, and the old one is void.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct RunLease {
    pub run_id: RunId,
    pub fence: i64,
}

/// Messages before those of a run that are to be [withheld](Store::withhold_earlier).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Withholding {
    /// Those that stand before this position; `None`: all before the run's own.
    pub before: Option<i64>,
    /// Only those among them that the upstream thread lacks: the rest are in it, and stay.
    pub missing_only: bool,
    /// The thread still begins with so many messages of the thread before, if there are as many; `None`: as it does.
    pub carried: Option<u32>,
}

/// What a run at work has shown since it was last [recorded](Store::record).
#[derive(Clone, Debug, PartialEq)]
pub struct RunProgress {
    pub lease: RunLease,
    /// `None`: not known yet, or recorded before.
    pub upstream_run_id: Option<UpstreamRunId>,
    /// May be empty.
    pub events: EventBatch,
}

/// A session that was [renewed](Store::renew_replica).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Renewed {
    /// Other replicas are alive too.
    pub has_peers: bool,
    /// The time by the database's clock.
    pub now: Timestamp,
}

/// What replicas tell each other, so that nobody has to ask the database time and again.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum News {
    /// A run of the thread has ended: what waits may start.
    Thread(ThreadId),
    /// The run has gone on: there are more events, or it has ended.
    Run(RunId),
    /// Something was asked of an active run; its owner is to look for [`requests`](Store::requests).
    Asked(RunId),
    /// Somebody follows the run by what its owner [records](Store::record).
    Followed(RunId),
    /// There are runs to adopt.
    Orphans,
    /// Any of these may have been told and was not heard.
    Missed,
}

/// A run that may work now.
#[derive(Clone, Debug, PartialEq)]
pub struct Turn {
    pub lease: RunLease,
    pub thread: Thread,
    pub run: Run,
    pub input: Vec<InputMessage>,
}

/// What became of an [`Admission`].
#[derive(Clone, Debug, PartialEq)]
pub enum Admitted {
    Started(Box<Turn>),
    Queued {
        lease: RunLease,
        thread: Box<Thread>,
        run: Box<Run>,
        /// 1 for the run that goes next.
        position: i64,
    },
    /// The message is one of this waiting run's now.
    Merged {
        thread: Box<Thread>,
        run: Box<Run>,
    },
    /// Refused by the strategy: the thread has unfinished runs.
    Busy,
    /// Refused: the thread lives on the named upstream, not on the assistant's.
    OtherUpstream(String),
    /// Refused: the idempotency key is in use.
    Repeated,
}

/// What became of an attempt to start a queued run.
#[derive(Clone, Debug, PartialEq)]
pub enum Claim {
    Started(Box<Turn>),
    /// Another run is active or waits before it.
    NotYet,
    /// The lease is lost or the run is not queued any more.
    Lost,
}

/// A run that asks its caller for function calls.
#[derive(Clone, Debug, PartialEq)]
pub struct Pause {
    pub required_action: RequiredAction,
    /// Unset if it was not heard: calls that were found in a thread can be answered without.
    pub upstream_run_id: Option<UpstreamRunId>,
    /// The reply as far as it came.
    pub content: Vec<ContentPart>,
    pub usage: Option<Usage>,
    pub events: EventBatch,
}

/// What became of a [`Pause`].
#[derive(Clone, Debug, PartialEq)]
pub enum Paused {
    Waiting(Box<Waiting>),
    /// Somebody wants the run to end.
    Cancelling,
    /// The lease is lost or the run has ended.
    Lost,
}

/// A run that waits for tool outputs, and its thread.
#[derive(Clone, Debug, PartialEq)]
pub struct Waiting {
    pub thread: Thread,
    pub activity: ThreadActivity,
    pub run: Run,
}

/// Outputs for a run that waits.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolAnswer {
    /// What the run must still wait for.
    pub expected: RequiredAction,
    pub outputs: Vec<ToolOutput>,
    pub idempotency: Option<Idempotency>,
}

/// What became of a [`ToolAnswer`].
#[derive(Clone, Debug, PartialEq)]
pub enum Answered {
    /// The run goes on.
    Resumed(Box<Waiting>),
    /// The run does not wait for these calls (any more), or its deadline has passed.
    NotWaiting,
    /// The idempotency key is in use.
    Repeated,
}

/// What somebody asked of an active run.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    Cancel { run: RunId, discard: bool },
    Resume { run: RunId, outputs: Vec<ToolOutput> },
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct RunEnd {
    /// A final status.
    pub status: RunStatus,
    pub error: Option<RunError>,
    pub usage: Option<Usage>,
    pub upstream_run_id: Option<UpstreamRunId>,
    /// Requests, besides those [sent again](Store::sends_again), that may have left something upstream under an id that
    /// [nobody heard](Life::unheard_runs).
    pub unheard: u32,
    /// Where the thread stands upstream from now on, if this run moved it.
    pub upstream_thread_id: Option<UpstreamThreadId>,
    /// The reply, whole or, for a run that did not complete, as far as it came.
    pub reply: Option<Reply>,
    /// Where the run's user messages stand upstream.
    pub said: Context,
    /// All earlier messages that are not withheld are upstream now: the [backlog](Store::backlog) went along with the
    /// run, or the run began a new chain. What was missing or unknown is present, and an older leftover is void.
    pub synced: bool,
    /// What is not known of the run's traces upstream. Otherwise the thread keeps what it has.
    pub leftover: Option<Leftover>,
    /// The run's messages are to be removed, and nothing of them is left upstream, or `leftover` says what.
    pub discard: bool,
    /// The rest of the run's log.
    pub events: EventBatch,
    /// The record tells all that the log says: that the run has started, and the text of its reply. So `events` has none, and
    /// nothing is stored of the log; what was [recorded](Store::record) of it, up to `events.first`, is removed.
    pub drops_log: bool,
}

/// An assistant's message.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    pub id: MessageId,
    pub content: Vec<ContentPart>,
    pub upstream_message_id: Option<String>,
    pub context: Context,
}

/// What became of an attempt to end a run.
#[derive(Clone, Debug, PartialEq)]
pub enum Closing {
    Finished(Box<Finished>),
    /// Nothing changed: the run was marked to be discarded, and the end does not say that its traces are gone.
    MustDiscard,
    /// Nothing changed: the lease was lost.
    Lost,
}

/// A message that is to be taken back.
#[derive(Clone, Debug, PartialEq)]
pub struct Withdrawal {
    pub message: MessageId,
    pub idempotency_key: Option<String>,
    /// How its run ends if it holds no other message.
    pub end: RunEnd,
}

/// What became of a [`Withdrawal`].
#[derive(Clone, Debug, PartialEq)]
pub enum Withdrawn {
    /// The run has ended.
    Ended,
    /// The run waits on, with the messages of others.
    Shared {
        thread: Box<Thread>,
        run: Box<Run>,
        /// 1 for the run that goes next.
        position: i64,
    },
    /// There is no such run (yet), or the lease was lost.
    Lost,
}

/// A run that has ended, and its thread afterwards.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    pub thread: Thread,
    pub activity: ThreadActivity,
    pub run: Run,
    pub message: Option<Message>,
}

/// An unfinished run that was taken over.
#[derive(Clone, Debug, PartialEq)]
pub struct Orphan {
    pub lease: RunLease,
    pub previous_owner: Option<ReplicaId>,
    pub thread: Thread,
    /// Queued: never sent to the upstream. Otherwise: may have been.
    pub run: Run,
    /// Until the run's deadline, by the database's clock; zero if that has passed, or the run has not started.
    pub time_left: Duration,
    /// The messages of one that was at work, as they are in the transcript.
    pub input: Vec<InputMessage>,
    /// What a run that waited for tool outputs had said before.
    pub content: Vec<ContentPart>,
    /// Outputs that came for it since it waited.
    pub outputs: Option<Vec<ToolOutput>>,
    /// They may have been sent to the upstream.
    pub outputs_sent: bool,
    /// What it was to send is not known any more: it can only end.
    pub content_lost: bool,
}

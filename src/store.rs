//! Where the truth lives: the [`Store`] trait and its errors. The backends are in `store/`.
//!
//! Each method is one atomic step. All wall-clock time is the database's own: no method takes "now".
//! Dropping a method's future may leave the step done or not done, never half done.

mod backend;
mod errors;
mod pool;
mod postgres;
mod read;
mod rows;
mod sqlite;

use std::error::Error as StdError;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::domain::{
    ContentPart, ConversationKey, Message, MessageId, Metadata, MultitaskStrategy, Page, PageRequest,
    ReplicaId, Run, RunError, RunId, RunStatus, Thread, ThreadActivity, ThreadId, UpstreamRunId,
    UpstreamThreadId, Usage,
};

pub use backend::BackendKind;
pub use postgres::PostgresStore;
pub use sqlite::SqliteStore;

/// Threads, runs and transcripts of all tenants, in one database that several replicas may share.
#[async_trait]
pub trait Store: Send + Sync + std::fmt::Debug {
    /// The database answers and its schema is the one that this binary knows.
    async fn ready(&self) -> Result<(), StoreError>;

    /// Records a new run: resolves the key's current thread or creates it (an expired one is archived and a
    /// fresh one takes its place), and admits the run, all in one step.
    ///
    /// The run starts at once if the thread has no unfinished run, and is queued otherwise; with
    /// [`MultitaskStrategy::Reject`] it is refused instead of queued, and nothing is stored. A run that starts
    /// puts its message into the transcript in the same step.
    async fn admit(&self, admission: &Admission) -> Result<Admitted, StoreError>;

    /// Starts a queued run if no run of its thread is active and none before it waits; its messages move into
    /// the transcript in the same step, and its deadline begins to count.
    ///
    /// Repeating the call with the same lease is harmless: while the run is in progress it answers the same, so
    /// that an answer which was lost on its way does not strand a run that has started.
    async fn claim(&self, lease: &RunLease) -> Result<Claim, StoreError>;

    /// Records where the thread of a run lives upstream. `false` if the lease was lost.
    async fn bind_upstream_thread(&self, lease: &RunLease, id: &UpstreamThreadId)
    -> Result<bool, StoreError>;

    /// Ends a run: status, reply, counters, in one step. A run that never started has its messages moved into
    /// the transcript too, so that nothing a user said is dropped.
    ///
    /// Repeating the call with the same lease and end is harmless and answers the same. `None` if the lease
    /// was lost, in which case nothing changed.
    async fn finish(&self, lease: &RunLease, end: &RunEnd) -> Result<Option<Finished>, StoreError>;

    /// The key's current thread, even if it has expired and no message came since.
    async fn thread(&self, key: &ConversationKey) -> Result<Option<(Thread, ThreadActivity)>, StoreError>;

    /// A page of the current thread's transcript by position; `None` if the key has no thread.
    ///
    /// # Errors
    /// [`StoreError::UnknownCursor`] if `after` or `before` names no message of the thread.
    async fn messages(
        &self,
        key: &ConversationKey,
        page: &PageRequest<MessageId>,
    ) -> Result<Option<Page<Message>>, StoreError>;

    /// Up to `limit` messages of any thread that stand after a position (0: from the first on), oldest first.
    async fn transcript(&self, thread: ThreadId, after: i64, limit: u32) -> Result<Vec<Message>, StoreError>;

    /// A page of the current thread's runs by order of admission; `None` if the key has no thread.
    ///
    /// # Errors
    /// [`StoreError::UnknownCursor`] if `after` or `before` names no run of the thread.
    async fn runs(
        &self,
        key: &ConversationKey,
        page: &PageRequest<RunId>,
    ) -> Result<Option<Page<Run>>, StoreError>;

    /// The unfinished runs of the current thread, in order of admission; `None` if the key has no thread.
    async fn unfinished(&self, key: &ConversationKey) -> Result<Option<Vec<Run>>, StoreError>;

    /// A run of any of the key's threads, archived ones included, and its reply if it has one.
    async fn run(
        &self,
        key: &ConversationKey,
        id: RunId,
    ) -> Result<Option<(Run, Option<Message>)>, StoreError>;

    /// Says that this replica is alive for another `ttl`. The first call registers it.
    async fn renew_replica(&self, id: ReplicaId, address: &str, ttl: Duration) -> Result<(), StoreError>;

    /// Says that this replica is gone: what it still owns can be adopted at once.
    async fn retire_replica(&self, id: ReplicaId) -> Result<(), StoreError>;

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

/// A message that asks for a run.
#[derive(Clone, Debug)]
pub struct Admission {
    pub key: ConversationKey,
    /// Id of the thread, should one have to be made.
    pub new_thread: ThreadId,
    /// How long a new thread lives; `None`: for ever.
    pub thread_ttl: Option<Duration>,
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
    /// Refused by the strategy: the thread has unfinished runs.
    Busy,
    /// Refused: the thread lives on the named upstream, not on the assistant's.
    OtherUpstream(String),
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

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct RunEnd {
    /// A final status.
    pub status: RunStatus,
    pub error: Option<RunError>,
    pub usage: Option<Usage>,
    pub upstream_run_id: Option<UpstreamRunId>,
    /// Where the thread stands upstream from now on, if this run moved it.
    pub upstream_thread_id: Option<UpstreamThreadId>,
    /// The reply, whole or, for a run that did not complete, as far as it came.
    pub reply: Option<Reply>,
}

/// An assistant's message.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    pub id: MessageId,
    pub content: Vec<ContentPart>,
    pub upstream_message_id: Option<String>,
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
}

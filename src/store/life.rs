//! The life of threads: what callers and operators look at, expiry, rollover, deletion, and what is left upstream.

use std::ops::AddAssign;
use std::time::Duration;

use async_trait::async_trait;

use super::{RunLease, StoreError, Turn};
use crate::domain::{
    ContentPart, Context, ConversationKey, Deletion, DeletionId, Lifecycle, Lifetimes, Limits, Message,
    MessageId, Metadata, NewLife, Page, PageRequest, RemnantId, Removed, Role, Run, RunId, TenantKey, Thread,
    ThreadActivity, ThreadId, ThreadState, Timestamp, UpstreamThreadId, UserKey,
};

/// Threads as a whole. Like [`Store`](super::Store), whose other half it is, in one atomic step each.
#[async_trait]
pub trait Life: Send + Sync {
    /// All that the record says of one thread.
    async fn report(&self, name: ThreadName<'_>) -> Result<Option<ThreadReport>, StoreError>;

    /// Any thread of any tenant: not for what callers ask.
    async fn thread(&self, id: ThreadId) -> Result<Option<Thread>, StoreError>;

    /// A page of threads by id, which is by age.
    ///
    /// # Errors
    /// [`StoreError::UnknownCursor`] if `after` or `before` names no thread of the tenant.
    async fn threads(
        &self,
        filter: &ThreadFilter,
        page: &PageRequest<ThreadId>,
    ) -> Result<Page<(Thread, ThreadActivity)>, StoreError>;

    /// Up to `limit` runs of a thread that were admitted after the one numbered `after`, in that order.
    async fn runs_of(&self, thread: ThreadId, after: i64, limit: u32) -> Result<Vec<Run>, StoreError>;

    /// The unfinished runs of any thread, in order of admission.
    async fn unfinished_of(&self, thread: ThreadId) -> Result<Vec<Run>, StoreError>;

    /// Changes the key's current thread. An expired one, or none, is `None`. It is no activity: an idle thread stays as idle
    /// as it was, and one that is to live for less than it has been idle has expired.
    async fn update_thread(
        &self,
        key: &ConversationKey,
        update: &ThreadUpdate,
    ) -> Result<Option<Thread>, StoreError>;

    /// Adds a thread from elsewhere. Nothing happens if it is there already. One without an id is there if its key has or
    /// had a thread on the same upstream: with the same upstream thread, if it names one; else the current one, or, if it
    /// is archived, one of the same age.
    async fn import_thread(&self, thread: &ImportedThread) -> Result<Imported, StoreError>;

    /// Adds messages from elsewhere at the end of a thread's transcript, in their order; those whose id is known, in any
    /// thread, are passed over. How many were added: none if there is no such thread, or it is being deleted. They count as
    /// `present` at the upstream if the thread has an upstream thread, else as `missing`: they go along with the thread's
    /// next turn. It is no activity of the thread.
    async fn import_messages(
        &self,
        thread: ThreadId,
        messages: &[ImportedMessage],
    ) -> Result<u64, StoreError>;

    /// Threads at which it is time to look, those that wait longest first, with the database's time. Nothing is changed.
    async fn due(&self, limit: u32) -> Result<Vec<Due>, StoreError>;

    /// The same, and they are due again only after `lease`: until then nobody else gets them, and if whoever got them
    /// dies, somebody else does then. Those that another call is just taking are passed over.
    async fn claim_due(&self, limit: u32, lease: Duration) -> Result<Vec<Due>, StoreError>;

    /// Says how the look at a thread ended, and sets when it is due next; `after` is `None`: never. `failure`: why the look
    /// failed, which is counted; else the count begins anew.
    ///
    /// `claimed` is what [`Due::claimed`] said. If the thread is due at another time by now, somebody else has set that
    /// meanwhile (a caller, a message, a deletion), and it stays. A thread that nobody claimed may only become due earlier.
    async fn schedule(
        &self,
        thread: ThreadId,
        claimed: Option<Timestamp>,
        after: Option<Duration>,
        failure: Option<&str>,
    ) -> Result<(), StoreError>;

    /// Looks through up to `limit` threads whose id comes after `after` and makes each current one due when it expires, or now
    /// if it has, by these lifetimes: they may be other ones than when it was made. One that is due earlier stays so. The last
    /// one's id; `None` if there are no more.
    async fn review(
        &self,
        after: Option<ThreadId>,
        limit: u32,
        lifetimes: &Lifetimes,
    ) -> Result<Option<ThreadId>, StoreError>;

    /// Archives a current thread if it has expired by its own limits or these, and makes it due at once. `false` if not: then
    /// it is due when it does.
    async fn expire(&self, thread: ThreadId, limits: Limits) -> Result<bool, StoreError>;

    /// Begins to erase an archived thread if it has been one for `keep`: its active runs are to be cancelled, and it is due at
    /// once. `false` if not.
    async fn discard(&self, thread: ThreadId, keep: Duration) -> Result<bool, StoreError>;

    /// Records a request to delete, and begins with up to `limit` threads: they take no message any more, their active
    /// runs are to be cancelled, and they are due after the request's `hold`. A thread that came after the request is not meant. To be
    /// repeated with the same request until none is left to begin with; how many it was this time. What is begun goes on with
    /// the rest by itself, should nobody repeat it.
    ///
    /// An erasure takes over threads that are being archived, or erased because of their age; what another request erases
    /// stays that one's, and is waited for. A request without any thread is finished at once.
    async fn begin_deletion(&self, request: &DeletionRequest, limit: u32) -> Result<u64, StoreError>;

    /// What a request to delete this target would take. Nothing is changed. An erasure also takes what another request
    /// deletes already.
    async fn deletable(
        &self,
        tenant: &TenantKey,
        target: &DeletionTarget,
        end: Deletion,
    ) -> Result<Deletable, StoreError>;

    /// What came of a request to delete, with a page of its threads by id: those that are done and those that are not.
    async fn deletion(
        &self,
        tenant: &TenantKey,
        id: DeletionId,
        after: Option<ThreadId>,
        limit: u32,
    ) -> Result<Option<DeletionReport>, StoreError>;

    /// The request to delete this target, or all that its user has, that is not finished: one that has begun with threads,
    /// if there are several.
    async fn deletion_under_way(
        &self,
        tenant: &TenantKey,
        target: &DeletionTarget,
    ) -> Result<Option<DeletionId>, StoreError>;

    /// Up to `limit` things of a thread that are or may be upstream besides its upstream thread. `with_runs`: the ids
    /// that its runs have there too, all of a run or none, be it more than the limit.
    async fn remnants(
        &self,
        thread: ThreadId,
        with_runs: bool,
        limit: u32,
    ) -> Result<Vec<Remnant>, StoreError>;

    /// Records what was deleted of a thread upstream so far, and forgets these remnants. If that has an outcome, the thread
    /// has no upstream thread any more, nor a leftover.
    async fn removed(
        &self,
        thread: ThreadId,
        removed: &Removed,
        forget: &[RemnantName],
    ) -> Result<(), StoreError>;

    /// Goes on with a deletion whose upstream part is done ([`Removed::outcome`]) and of which no run is unfinished: one
    /// that ends in an archive has its end; one that erases removes up to `limit` messages and as many runs, and
    /// when none are left, the thread. `true` when it is finished, and the receipt has its line, or if there is no such thread
    /// any more; `false` if there is more to do, or it is not time for it. Finishes the user's requests that waited for it.
    async fn conclude(&self, thread: ThreadId, limit: u32) -> Result<bool, StoreError>;

    /// Records that an upstream thread is about to be made for the thread of a run. `false` if the lease was lost. Harmless to
    /// repeat.
    async fn intend(&self, lease: &RunLease, intent: RemnantId) -> Result<bool, StoreError>;

    /// Whether a replica that is alive makes an upstream thread for the thread, and will record its id: from
    /// [`intend`](Self::intend) until that is bound or [resolved](Self::resolve), for [`UNHEARD_OF`] at most.
    async fn makes_upstream_thread(&self, thread: ThreadId) -> Result<bool, StoreError>;

    /// Records what an intent came to, other than an upstream thread that is [bound](super::Store::bind_upstream_thread).
    async fn resolve(&self, intent: RemnantId, made: Made<'_>) -> Result<(), StoreError>;

    /// Remnants at which it is time to look: those that were given up, and intents that nobody heard of for a while. They
    /// are due again only after `lease`, as in [`claim_due`](Self::claim_due).
    async fn claim_remnants(&self, limit: u32, lease: Duration) -> Result<Vec<Remnant>, StoreError>;

    /// The same without changing anything.
    async fn due_remnants(&self, limit: u32) -> Result<Vec<Remnant>, StoreError>;

    /// Forgets a remnant (`after` is `None`), or sets when to look at it next, and counts the look. Nothing changes if its
    /// [`upstream_id`](Remnant::upstream_id) is another one than the look `knew`: then somebody has named it meanwhile.
    async fn schedule_remnant(
        &self,
        id: RemnantId,
        knew: Option<&str>,
        after: Option<Duration>,
    ) -> Result<(), StoreError>;

    /// Nothing can be done about a remnant for now: nobody knows its id upstream, the server does not delete it, or that
    /// failed for too long. It goes with its thread, whose receipt tells of it. Nothing changes if its
    /// [`upstream_id`](Remnant::upstream_id) is another one than the look `knew`.
    async fn keep_remnant(&self, id: RemnantId, knew: Option<&str>) -> Result<(), StoreError>;

    /// How many requests for runs of a thread may have left something upstream under an id that nobody heard: the process
    /// died, or the answer broke off, before it was told, and the run [ended](super::RunEnd::unheard) or was
    /// [sent again](super::Store::sends_again).
    async fn unheard_runs(&self, thread: ThreadId) -> Result<u64, StoreError>;

    /// Archives a thread and puts a fresh one in its place, which names it and takes its metadata, what is left of its
    /// limits, and all its unfinished runs along; of a run at work also its messages. See [`Rolled`]. Harmless to repeat, as
    /// long as the run is in progress.
    async fn roll_over(&self, rollover: &Rollover) -> Result<Rolled, StoreError>;

    /// Up to `limit` of the messages of the thread before that a thread begins with, but for those that are withheld, from a
    /// position in that thread (`None`: from its end) backwards, newest first. The page ends before its limit, with `has_more`,
    /// once it holds [`PAGE_BYTES`](super::PAGE_BYTES). Fewer, or none, once that thread is to be erased.
    async fn carried(
        &self,
        thread: ThreadId,
        before: Option<i64>,
        limit: u32,
    ) -> Result<Page<Message>, StoreError>;

    /// Puts messages that others wrote to the upstream thread into the transcript, each behind the one it names, and those
    /// behind the same one in their order. Those that the thread has by their id upstream are passed over. How many. Nothing
    /// if the thread has an active run other than the one of the lease `by`, or if that lease was lost.
    async fn insert_foreign(
        &self,
        thread: ThreadId,
        by: Option<RunLease>,
        messages: &[Foreign],
    ) -> Result<u64, StoreError>;

    /// Removes what is past its time, up to `limit` of each kind, and sessions that ended a day ago.
    async fn prune(&self, pruning: &Pruning, limit: u32) -> Result<Pruned, StoreError>;

    /// How much [`prune`](Self::prune) would find, up to `limit` of each kind.
    async fn prunable(&self, pruning: &Pruning, limit: u32) -> Result<Pruned, StoreError>;
}

/// Which thread is meant.
#[derive(Clone, Copy, Debug)]
pub enum ThreadName<'a> {
    /// The key's current one, or else the newest that is archived.
    Newest(&'a ConversationKey),
    /// Any one of a tenant.
    Id(&'a TenantKey, ThreadId),
}

/// All that the record says of one thread.
#[derive(Clone, Debug, PartialEq)]
pub struct ThreadReport {
    pub thread: Thread,
    pub activity: ThreadActivity,
    /// The one that was admitted last.
    pub last_run: Option<Run>,
    /// The newest thread that names it as the one before.
    pub next_thread: Option<ThreadId>,
}

/// Which threads are meant: those that fit all that is set. Both times count on ids which say when a thread was made, or
/// earlier, up to a day off: so do those that are made here.
#[derive(Clone, Debug)]
pub struct ThreadFilter {
    pub tenant: TenantKey,
    pub user: Option<UserKey>,
    pub upstream: Option<String>,
    pub lifecycle: Option<Lifecycle>,
    pub state: Option<ThreadState>,
    pub created_before: Option<Timestamp>,
    /// Without any activity since.
    pub inactive_since: Option<Timestamp>,
}

impl ThreadFilter {
    /// All threads of a tenant.
    pub const fn all(tenant: TenantKey) -> Self {
        Self {
            tenant,
            user: None,
            upstream: None,
            lifecycle: None,
            state: None,
            created_before: None,
            inactive_since: None,
        }
    }
}

/// What is to be changed of a thread.
#[derive(Clone, Debug, Default)]
pub struct ThreadUpdate {
    pub metadata: Option<Metadata>,
    pub life: Option<NewLife>,
    /// The configured limits of the key's scope.
    pub limits: Limits,
}

/// A thread from elsewhere.
#[derive(Clone, Debug)]
pub struct ImportedThread {
    /// `None`: it is known by its key, and gets an id that says when it was made. One that is given should say so too, as
    /// lists are in the order of ids.
    pub id: Option<ThreadId>,
    pub key: ConversationKey,
    pub upstream: String,
    pub upstream_thread_id: Option<UpstreamThreadId>,
    /// `Current` or `Archived`.
    pub lifecycle: Lifecycle,
    pub previous_thread: Option<ThreadId>,
    pub metadata: Metadata,
    /// `None`: now.
    pub created_at: Option<Timestamp>,
    /// `None`: when it was archived, else now. Never before it was made.
    pub last_active_at: Option<Timestamp>,
    /// `None`: now, if it is archived.
    pub archived_at: Option<Timestamp>,
    /// Its own.
    pub limits: Limits,
    /// The configured ones of its scope: they say when it is due.
    pub configured: Limits,
}

/// What became of a thread from elsewhere.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Imported {
    Added(ThreadId),
    /// It was there already, and it is this one.
    Known(ThreadId),
    /// Refused: the key has another current thread.
    Taken(ThreadId),
    /// Refused: the id belongs to a thread of another key.
    OtherKey,
}

/// A message from elsewhere.
#[derive(Clone, Debug)]
pub struct ImportedMessage {
    pub id: MessageId,
    pub role: Role,
    pub content: Vec<ContentPart>,
    pub upstream_message_id: Option<String>,
    /// `None`, or `Unknown`, which cannot be looked up: where it stands follows from the thread.
    pub context: Option<Context>,
    pub created_at: Option<Timestamp>,
}

/// A thread at which it is time to look.
#[derive(Clone, Debug, PartialEq)]
pub struct Due {
    pub thread: Thread,
    /// The database's time of the look.
    pub now: Timestamp,
    /// Looks in a row that failed.
    pub attempts: i64,
    /// When it is due again, by the claim of whoever looks at it; `None`: nobody claimed it.
    pub claimed: Option<Timestamp>,
}

/// A request to delete.
#[derive(Clone, Debug)]
pub struct DeletionRequest {
    pub id: DeletionId,
    pub tenant: TenantKey,
    pub target: DeletionTarget,
    /// The [fingerprint](crate::domain::Fingerprints) of the target's user.
    pub fingerprint: String,
    /// `Archive` takes current threads alone.
    pub end: Deletion,
    /// How long the threads are left to whoever asked, before they are due.
    pub hold: Duration,
}

/// What is to be deleted.
#[derive(Clone, Debug)]
pub enum DeletionTarget {
    /// The key's current thread and all that it had before.
    Key(ConversationKey),
    /// All that a user has.
    User(UserKey),
}

impl DeletionTarget {
    /// Whose it is.
    pub const fn user(&self) -> &UserKey {
        match self {
            Self::Key(key) => &key.user,
            Self::User(user) => user,
        }
    }
}

/// What a request to delete would take, as its receipt would count it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Deletable {
    pub threads: i64,
    pub messages: i64,
    pub runs: i64,
    /// Those of the runs that would be cancelled.
    pub unfinished_runs: i64,
}

/// What came of a request to delete.
#[derive(Clone, Debug)]
pub struct DeletionReport {
    pub id: DeletionId,
    /// Of whom; not known any more once it is finished.
    pub user: Option<UserKey>,
    /// The same as a fingerprint, which stays; `None`: an earlier version recorded the request.
    pub fingerprint: Option<String>,
    pub requested_at: Timestamp,
    pub finished_at: Option<Timestamp>,
    pub archive: bool,
    /// Threads that are done, and threads that are not.
    pub done: i64,
    pub pending: i64,
    /// Those that are done of which something may remain at their upstream.
    pub incomplete: i64,
    pub threads: Page<DeletedThread>,
}

/// A thread in a receipt.
#[derive(Clone, Debug, PartialEq)]
pub struct DeletedThread {
    pub id: ThreadId,
    pub upstream: String,
    /// Deleted from the record, or in it if that is an archive.
    pub messages: i64,
    pub runs: i64,
    pub removed: Removed,
    /// `None`: not done yet.
    pub finished_at: Option<Timestamp>,
    /// Tries that failed, and why the last one did.
    pub attempts: i64,
    pub last_failure: Option<String>,
}

/// Something that is, or may be, at an upstream.
#[derive(Clone, Debug, PartialEq)]
pub struct Remnant {
    pub name: RemnantName,
    pub thread: ThreadId,
    pub upstream: String,
    pub kind: RemnantKind,
    /// `None`: it was to be made, and nobody knows whether it was.
    pub upstream_id: Option<String>,
    pub attempts: i64,
}

/// How long an intent is left to the process that makes the upstream thread. That process gives up before.
pub const UNHEARD_OF: Duration = Duration::from_mins(10);

/// What an [intent](Life::intend) came to.
#[derive(Clone, Copy, Debug)]
pub enum Made<'a> {
    Nothing,
    /// An upstream thread that nobody will use.
    Unused(&'a UpstreamThreadId),
    /// The answer was lost, so it may exist. Nobody will record its id.
    Unknown,
}

/// Where a remnant is recorded.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum RemnantName {
    Row(RemnantId),
    /// An id that a run has upstream.
    Run(RunId),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RemnantKind {
    Thread,
    /// A run or response.
    Run,
}

/// An upstream thread that was made for a run's thread.
#[derive(Clone, Copy, Debug)]
pub struct Binding<'a> {
    pub id: &'a UpstreamThreadId,
    /// What was intended, and is done now.
    pub intent: RemnantId,
    /// It was made with the transcript, so it holds all earlier messages that are not withheld, under new ids: what was
    /// missing or unknown is present, the ids of messages upstream and the leftover are void. The upstream thread that
    /// the thread had before becomes a remnant.
    pub seeded: bool,
    /// How many of the user's messages of the thread before it begins with.
    pub carried_users: u32,
}

/// What became of a [`Binding`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Bound {
    /// The thread of the run lives there now.
    Done,
    /// The lease was lost. The record has the id all the same: as a remnant, or as the thread's own since an earlier call.
    Lost,
    /// The lease was lost, and the record has no place for the id: whoever made the upstream thread has to delete it.
    Unrecorded,
}

/// A thread that is to be rolled over.
#[derive(Clone, Copy, Debug)]
pub struct Rollover {
    pub thread: ThreadId,
    /// The run that does it at the beginning of its turn; `None`: a caller wants it.
    pub by: Option<RunLease>,
    pub new_thread: ThreadId,
    /// How many of its last messages the fresh one begins with.
    pub carry_over: u32,
    /// The configured limits of its scope: a fresh thread does not live longer than the old one would have by age.
    pub limits: Limits,
}

/// What became of a rollover.
#[derive(Clone, Debug, PartialEq)]
pub enum Rolled {
    /// The fresh thread, and the turn of the run that did it.
    Done { thread: Box<Thread>, turn: Option<Box<Turn>> },
    /// A run is active: it happens before the next turn.
    Later(Box<Thread>),
    /// The thread is not current any more, or the lease was lost.
    Lost,
}

/// A message that somebody else wrote to an upstream thread.
#[derive(Clone, Debug, PartialEq)]
pub struct Foreign {
    pub id: MessageId,
    /// The position of the message it comes after; 0: it comes first.
    pub after: i64,
    pub role: Role,
    pub content: Vec<ContentPart>,
    pub upstream_message_id: Option<String>,
    pub created_at: Option<Timestamp>,
}

/// What is past its time. `None`: it is kept for ever.
#[derive(Clone, Debug, Default)]
pub struct Pruning {
    /// Runs that have ended. Their messages stay.
    pub runs: Option<Duration>,
    pub events: Option<Duration>,
    pub idempotency_keys: Option<Duration>,
    pub receipts: Option<Duration>,
    /// Upstreams that store each run by itself: the ids that pruned runs have there become remnants.
    pub storing: Vec<String>,
}

/// What was removed because it was past its time.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Pruned {
    pub runs: u64,
    pub events: u64,
    pub idempotency_keys: u64,
    pub receipts: u64,
}

impl Pruned {
    /// The largest of the numbers.
    pub fn most(&self) -> u64 {
        self.runs.max(self.events).max(self.idempotency_keys).max(self.receipts)
    }
}

impl AddAssign for Pruned {
    fn add_assign(&mut self, more: Self) {
        self.runs += more.runs;
        self.events += more.events;
        self.idempotency_keys += more.idempotency_keys;
        self.receipts += more.receipts;
    }
}

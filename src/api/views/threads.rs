//! Wire types of threads: statistics, receipts of deletions, and the work of the janitor.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;
use utoipa::openapi::schema::{ObjectBuilder, Type};

use super::{ListView, RunView};
use crate::domain::{
    Deletion, DeletionId, Lifecycle, LifecycleTask, MessageId, Metadata, Page, Removed, Role, Run,
    RunError, RunId, RunStatus, Thread, ThreadActivity, ThreadId, ThreadState, Timestamp,
    UpstreamOutcome, UpstreamThreadId, Usage,
};
use crate::lifecycle::{DryRun, PassSummary, Plan};
use crate::runs::{Runs, Verified};
use crate::store::{
    Deletable, DeletedThread, DeletionReport, Pruned, ThreadReport, UpstreamOrphan,
};

/// The body of `PATCH …/thread`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::api) struct PatchThread {
    /// New metadata of the thread. It replaces all of the old.
    pub(in crate::api) metadata: Option<Metadata>,
    /// Time to live of the thread, from now on. `null`: as configured.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<u64>, minimum = 1)]
    pub(in crate::api) ttl_ms: TtlMs,
}

/// The field `ttl_ms`, which tells an absent value from `null`.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::api) enum TtlMs {
    #[default]
    Absent,
    Null,
    Given(u64),
}

fn given<'de, D: Deserializer<'de>>(deserializer: D) -> Result<TtlMs, D::Error> {
    Ok(Option::deserialize(deserializer)?.map_or(TtlMs::Null, TtlMs::Given))
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Thread)]
pub(in crate::api) struct ThreadView {
    id: ThreadId,
    key: KeyView,
    state: ThreadState,
    queue_depth: i64,
    lifecycle: Lifecycle,
    upstream: String,
    #[schema(required)]
    upstream_thread_id: Option<UpstreamThreadId>,
    #[schema(required)]
    previous_thread: Option<ThreadId>,
    message_count: i64,
    /// The tokens of all its runs, as the upstream counted them.
    usage: Usage,
    run_count: i64,
    created_at: DateTime<Utc>,
    last_active_at: DateTime<Utc>,
    #[schema(required)]
    expires_at: Option<DateTime<Utc>>,
    #[schema(required)]
    archived_at: Option<DateTime<Utc>>,
    metadata: Metadata,
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ThreadKey)]
struct KeyView {
    tenant: String,
    user: String,
    /// `user`, `session:<id>` or `topic:<name>`.
    #[schema(pattern = "^(user|session:.+|topic:.+)$")]
    scope: String,
}

impl ThreadView {
    pub(in crate::api) fn new(runs: &Runs, thread: Thread, activity: ThreadActivity) -> Self {
        let expires_at = runs.expiry(&thread);
        Self {
            id: thread.id,
            key: KeyView::of(&thread),
            state: activity.state,
            queue_depth: activity.queue_depth,
            lifecycle: thread.lifecycle,
            upstream: thread.upstream,
            upstream_thread_id: thread.upstream_thread_id,
            previous_thread: thread.previous_thread,
            message_count: thread.message_count,
            usage: thread.usage,
            run_count: thread.run_count,
            created_at: thread.created_at,
            last_active_at: thread.last_active_at,
            expires_at,
            archived_at: thread.archived_at,
            metadata: thread.metadata,
        }
    }
}

impl KeyView {
    fn of(thread: &Thread) -> Self {
        Self {
            tenant: thread.key.tenant.as_str().to_owned(),
            user: thread.key.user.as_str().to_owned(),
            scope: thread.key.scope.to_string(),
        }
    }
}

/// A thread with its last run, as the database has it.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ThreadReport)]
pub(in crate::api) struct ReportView {
    #[serde(flatten)]
    thread: ThreadView,
    #[schema(required)]
    next_thread: Option<ThreadId>,
    /// Whether the thread will be rolled over before its next run.
    rollover_pending: bool,
    #[schema(required)]
    last_run: Option<LastRunView>,
    /// The comparison with the upstream thread. Present only if `verify` asked for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    verified: Option<VerifiedView>,
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(as = LastRun)]
struct LastRunView {
    id: RunId,
    status: RunStatus,
    #[schema(required)]
    error: Option<RunError>,
    created_at: DateTime<Utc>,
    #[schema(required)]
    finished_at: Option<DateTime<Utc>>,
}

impl ReportView {
    pub(in crate::api) fn new(
        runs: &Runs,
        report: ThreadReport,
        verified: Option<Verified>,
    ) -> Self {
        let rollover_pending = report.thread.rolls;
        Self {
            thread: ThreadView::new(runs, report.thread, report.activity),
            next_thread: report.next_thread,
            rollover_pending,
            last_run: report.last_run.map(|run| LastRunView {
                id: run.id,
                status: run.status,
                error: run.error,
                created_at: run.created_at,
                finished_at: run.finished_at,
            }),
            verified: verified.map(VerifiedView::from),
        }
    }
}

/// How the transcript compares with the upstream thread.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Verification)]
struct VerifiedView {
    upstream_thread: Existence,
    /// Whether the transcript and the upstream thread have the same messages; `null` if unknown.
    #[schema(required)]
    in_step: Option<bool>,
    /// Number of messages in the upstream thread.
    #[schema(required)]
    messages: Option<usize>,
    /// Messages of the transcript that the upstream thread lacks.
    missing: Vec<MessageId>,
    /// Messages that other programs wrote into the upstream thread.
    external: Vec<ExternalMessageView>,
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ExternalMessage)]
struct ExternalMessageView {
    upstream_message_id: String,
    role: Role,
    /// Position of the message that it follows; 0 if it is the first.
    after_position: i64,
}

/// Whether the upstream thread exists.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum Existence {
    Found,
    /// The gateway has not created one yet.
    None,
    Gone,
    /// The server does not list the messages of a thread.
    CannotTell,
}

impl From<Verified> for VerifiedView {
    fn from(verified: Verified) -> Self {
        let without = |upstream_thread, in_step| Self {
            upstream_thread,
            in_step,
            messages: None,
            missing: Vec::new(),
            external: Vec::new(),
        };
        match verified {
            Verified::NoThread => without(Existence::None, None),
            Verified::Gone => without(Existence::Gone, Some(false)),
            Verified::CannotTell => without(Existence::CannotTell, None),
            Verified::Compared(found) => Self {
                upstream_thread: Existence::Found,
                in_step: Some(found.missing.is_empty() && found.external.is_empty()),
                messages: Some(found.held),
                missing: found.missing,
                external: found
                    .external
                    .into_iter()
                    .map(|(after_position, entry)| ExternalMessageView {
                        upstream_message_id: entry.id,
                        role: entry.role,
                        after_position,
                    })
                    .collect(),
            },
        }
    }
}

/// The receipt of a deletion.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Deletion)]
pub(in crate::api) struct DeletionView {
    id: DeletionId,
    status: DeletionStatus,
    /// Whether the request archived the threads, so that their transcripts stay.
    archive: bool,
    requested_at: DateTime<Utc>,
    #[schema(required)]
    finished_at: Option<DateTime<Utc>>,
    threads_done: i64,
    threads_pending: i64,
    /// Those of the done threads of which something may remain at their upstream.
    threads_incomplete: i64,
    threads: ListView<DeletedThreadView>,
}

/// What a request would delete. The gateway changed nothing.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = DeletionOutlook)]
pub(in crate::api) struct DeletableView {
    #[schema(schema_with = always_true)]
    dry_run: bool,
    /// Whether the request would archive the threads, so that their transcripts stay.
    archive: bool,
    threads: i64,
    /// Messages of these threads.
    messages: i64,
    /// Runs of these threads.
    runs: i64,
    /// Those of the runs that the request would cancel.
    unfinished_runs: i64,
}

fn always_true() -> ObjectBuilder {
    ObjectBuilder::new()
        .schema_type(Type::Boolean)
        .enum_values(Some([true]))
}

impl DeletableView {
    pub(in crate::api) fn new(found: Deletable, archive: bool) -> Self {
        let Deletable {
            threads,
            messages,
            runs,
            unfinished_runs,
        } = found;
        Self {
            dry_run: true,
            archive,
            threads,
            messages,
            runs,
            unfinished_runs,
        }
    }
}

/// What the gateway deleted of one thread, here and upstream.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = DeletedThread)]
struct DeletedThreadView {
    thread_id: ThreadId,
    status: DeletionStatus,
    #[schema(required)]
    finished_at: Option<DateTime<Utc>>,
    /// Messages deleted from the database.
    messages: i64,
    /// Runs deleted from the database.
    runs: i64,
    upstream: String,
    /// What was deleted at the upstream.
    #[serde(flatten)]
    removed: RemovedView,
    /// Failed tries in a row.
    attempts: i64,
    /// Why the last try failed. For a done thread: why the gateway gave something up.
    #[schema(required)]
    last_failure: Option<String>,
}

#[derive(Debug, Serialize, ToSchema)]
#[expect(clippy::struct_field_names, reason = "the names on the wire")]
#[schema(as = Removed)]
struct RemovedView {
    #[schema(required)]
    upstream_thread_id: Option<UpstreamThreadId>,
    /// What happened to the upstream thread; `null` if its deletion is not done yet. The thread may
    /// remain there if the server does not offer its deletion (`not_supported`), if the deletion failed
    /// for `janitor.give_up_after` (`failed`), or if the configuration no longer names the server
    /// (`not_configured`).
    #[schema(required)]
    upstream_outcome: Option<UpstreamOutcome>,
    /// Items or messages deleted one by one.
    upstream_items: u64,
    /// Deleted stored responses.
    upstream_responses: u64,
    /// Further upstream threads of this thread that were deleted.
    upstream_other_threads: u64,
    /// Threads and responses that may remain under unknown ids, because the answers of the calls that
    /// created them were lost.
    upstream_unknown: u64,
    /// Upstream threads that may remain, because the server does not delete them, or because the
    /// gateway gave their deletion up.
    upstream_left_threads: u64,
    /// Items that may remain, for the same reasons.
    upstream_left_items: u64,
    /// Responses that may remain, for the same reasons.
    upstream_left_responses: u64,
    /// Until when the gateway repeats what fails; `null` if nothing failed yet, or if the deletion is done.
    #[schema(required)]
    upstream_tried_until: Option<DateTime<Utc>>,
}

impl From<DeletionReport> for DeletionView {
    fn from(report: DeletionReport) -> Self {
        Self {
            id: report.id,
            status: status(report.finished_at),
            archive: report.archive,
            requested_at: report.requested_at,
            finished_at: report.finished_at,
            threads_done: report.done,
            threads_pending: report.pending,
            threads_incomplete: report.incomplete,
            threads: ListView::new(
                report.threads,
                |thread| thread.id.to_string(),
                DeletedThreadView::from,
            ),
        }
    }
}

impl From<DeletedThread> for DeletedThreadView {
    fn from(thread: DeletedThread) -> Self {
        Self {
            thread_id: thread.id,
            status: status(thread.finished_at),
            finished_at: thread.finished_at,
            messages: thread.messages,
            runs: thread.runs,
            upstream: thread.upstream,
            attempts: thread.attempts,
            last_failure: thread
                .last_failure
                .or_else(|| thread.removed.failure.clone()),
            removed: thread.removed.into(),
        }
    }
}

impl From<Removed> for RemovedView {
    fn from(removed: Removed) -> Self {
        Self {
            upstream_thread_id: removed.upstream_thread_id,
            upstream_outcome: removed.outcome,
            upstream_items: removed.items,
            upstream_responses: removed.responses,
            upstream_other_threads: removed.other_threads,
            upstream_unknown: removed.unknown,
            upstream_left_threads: removed.left.threads,
            upstream_left_items: removed.left.items,
            upstream_left_responses: removed.left.responses,
            upstream_tried_until: removed.tried_until,
        }
    }
}

/// Progress of a deletion.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum DeletionStatus {
    InProgress,
    Completed,
}

const fn status(finished_at: Option<Timestamp>) -> DeletionStatus {
    if finished_at.is_some() {
        DeletionStatus::Completed
    } else {
        DeletionStatus::InProgress
    }
}

/// What a pass of the janitor did.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = CleanupTally)]
pub(in crate::api) struct TallyView {
    dry_run: bool,
    expired: u64,
    upstream_cleared: u64,
    discarded: u64,
    deleted: u64,
    upstream_orphans_deleted: u64,
    failed: u64,
    pruned: PrunedView,
    has_more: bool,
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Pruned)]
struct PrunedView {
    runs: u64,
    events: u64,
    idempotency_keys: u64,
    receipts: u64,
}

impl From<Pruned> for PrunedView {
    fn from(pruned: Pruned) -> Self {
        let Pruned {
            runs,
            events,
            idempotency_keys,
            receipts,
        } = pruned;
        Self {
            runs,
            events,
            idempotency_keys,
            receipts,
        }
    }
}

impl From<PassSummary> for TallyView {
    fn from(summary: PassSummary) -> Self {
        Self {
            dry_run: false,
            expired: summary.expired,
            upstream_cleared: summary.cleared,
            discarded: summary.discarded,
            deleted: summary.deleted,
            upstream_orphans_deleted: summary.upstream_orphans,
            failed: summary.failed,
            pruned: summary.pruned.into(),
            has_more: summary.has_more,
        }
    }
}

/// What a pass of the janitor would do.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = CleanupOutlook)]
pub(in crate::api) struct OutlookView {
    dry_run: bool,
    threads: Vec<PlanView>,
    upstream_orphans: Vec<UpstreamOrphanView>,
    /// Rows that the janitor would delete, counted up to a thousand of each kind.
    would_prune: PrunedView,
    has_more: bool,
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(as = PlannedChore)]
struct PlanView {
    thread_id: ThreadId,
    key: KeyView,
    lifecycle: Lifecycle,
    action: ThreadAction,
    reason: String,
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(as = UpstreamOrphan)]
struct UpstreamOrphanView {
    thread_id: ThreadId,
    upstream: String,
    #[schema(required)]
    upstream_id: Option<String>,
    action: OrphanAction,
    reason: &'static str,
}

/// What the janitor would do with a thread.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum ThreadAction {
    Archive,
    DeleteUpstream,
    Erase,
    None,
}

/// What the janitor would do with an upstream orphan.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum OrphanAction {
    Delete,
    FindAndDelete,
}

impl From<DryRun> for OutlookView {
    fn from(dry_run_of: DryRun) -> Self {
        Self {
            dry_run: true,
            threads: dry_run_of.plans.into_iter().map(PlanView::from).collect(),
            upstream_orphans: dry_run_of
                .upstream_orphans
                .into_iter()
                .map(UpstreamOrphanView::from)
                .collect(),
            would_prune: dry_run_of.prunable.into(),
            has_more: dry_run_of.has_more,
        }
    }
}

impl From<Plan> for PlanView {
    fn from(Plan { thread, task }: Plan) -> Self {
        let (action, reason) = match task {
            LifecycleTask::Expire { since } => (
                ThreadAction::Archive,
                format!("it expired at {}", since.to_rfc3339()),
            ),
            LifecycleTask::ClearUpstream => (
                ThreadAction::DeleteUpstream,
                "it is archived, and nothing needs its upstream copy any more".to_owned(),
            ),
            LifecycleTask::Discard { since } => (
                ThreadAction::Erase,
                format!(
                    "the retention of its archive ended at {}",
                    since.to_rfc3339()
                ),
            ),
            LifecycleTask::Delete(Deletion::Archive) => (
                ThreadAction::Archive,
                "a request asked to archive it".to_owned(),
            ),
            LifecycleTask::Delete(Deletion::Erase) => {
                (ThreadAction::Erase, "its deletion has begun".to_owned())
            }
            LifecycleTask::Nothing { .. } => (ThreadAction::None, "it is not time yet".to_owned()),
        };
        Self {
            thread_id: thread.id,
            key: KeyView::of(&thread),
            lifecycle: thread.lifecycle,
            action,
            reason,
        }
    }
}

impl From<UpstreamOrphan> for UpstreamOrphanView {
    fn from(orphan: UpstreamOrphan) -> Self {
        let (action, reason) = match orphan.upstream_id {
            Some(_) => (OrphanAction::Delete, "no thread uses it any more"),
            None => (
                OrphanAction::FindAndDelete,
                "the answer to the call that creates it was lost",
            ),
        };
        Self {
            thread_id: orphan.thread,
            upstream: orphan.upstream,
            upstream_id: orphan.upstream_id,
            action,
            reason,
        }
    }
}

/// Returns a page of threads.
pub(in crate::api) fn list(
    runs: &Runs,
    page: Page<(Thread, ThreadActivity)>,
) -> ListView<ThreadView> {
    ListView::new(
        page,
        |(thread, _)| thread.id.to_string(),
        |(thread, activity)| ThreadView::new(runs, thread, activity),
    )
}

/// Returns all runs that a request cancelled, as a list without further pages.
pub(in crate::api) fn cancelled(runs: Vec<Run>) -> ListView<RunView> {
    ListView::new(
        Page {
            data: runs,
            has_more: false,
        },
        |run| run.id.to_string(),
        RunView::from,
    )
}

//! What the store keeps, as values: threads, runs, messages, and pages of them.

use super::run::text_enum;
use super::{
    ContentPart, ConversationKey, Deletion, Limits, MessageId, Metadata, MultitaskStrategy,
    Removed, RequiredAction, RunError, RunId, RunStatus, ThreadId, Timestamp, UnsettledRun,
    UpstreamRunId, UpstreamSync, UpstreamThreadId, Usage,
};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

text_enum!(
    /// Where a thread stands in its life.
    Lifecycle {
        /// The one that new messages of its key go to.
        Current = "current",
        /// Read only.
        Archived = "archived",
        /// On its way out.
        Deleting = "deleting",
    }
);

/// The gateway's own conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Thread {
    pub id: ThreadId,
    pub key: ConversationKey,
    /// Name of the configured upstream that it lives on.
    pub upstream: String,
    /// `None` until the first run made it.
    pub upstream_thread_id: Option<UpstreamThreadId>,
    pub lifecycle: Lifecycle,
    pub previous_thread: Option<ThreadId>,
    pub metadata: Metadata,
    /// Messages in the transcript.
    pub message_count: i64,
    /// Runs ever admitted, waiting ones included.
    pub run_count: i64,
    pub created_at: Timestamp,
    pub last_active_at: Timestamp,
    /// Its own; if there are any, the configured ones do not count. See [`Lifetimes::expiry`](super::Lifetimes::expiry).
    pub limits: Limits,
    pub archived_at: Option<Timestamp>,
    /// What its deletion ends in, if it is being deleted.
    pub deletion: Option<Deletion>,
    /// It is to be rolled over before its next turn.
    pub rolls: bool,
    /// Last messages of the thread before with which its upstream thread begins, or is to begin.
    pub carried: i64,
    /// What was deleted of it upstream.
    pub removed: Removed,
    /// Messages of the transcript that its upstream thread lacks.
    pub backlog: i64,
    /// What an earlier run may have left at the upstream, if that is not known yet.
    pub unsettled_run: Option<UnsettledRun>,
}

/// What a thread is doing; derived from its runs, never stored.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ThreadActivity {
    pub state: ThreadState,
    /// Runs that wait for their turn.
    pub queue_depth: i64,
}

text_enum!(
    ThreadState {
        Idle = "idle",
        Active = "active",
        RequiresAction = "requires_action",
    }
);

impl ThreadState {
    /// The state of a thread, given the status of the one run that holds it, if any.
    pub const fn of(active: Option<RunStatus>) -> Self {
        match active {
            None => Self::Idle,
            Some(RunStatus::RequiresAction) => Self::RequiresAction,
            Some(_) => Self::Active,
        }
    }
}

/// One turn.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    pub id: RunId,
    pub thread_id: ThreadId,
    /// 1 for the thread's first run, then without gaps, in order of admission.
    pub seq: i64,
    pub status: RunStatus,
    pub strategy: MultitaskStrategy,
    /// Name of the assistant profile.
    pub assistant: String,
    pub metadata: Metadata,
    pub upstream_run_id: Option<UpstreamRunId>,
    pub required_action: Option<RequiredAction>,
    pub error: Option<RunError>,
    pub usage: Option<Usage>,
    pub created_at: Timestamp,
    pub started_at: Option<Timestamp>,
    pub finished_at: Option<Timestamp>,
    /// When the run is given up; set when it starts.
    pub deadline_at: Option<Timestamp>,
    /// Its messages are removed from the transcript when it ends, or were.
    pub discarded: bool,
}

text_enum!(
    Role {
        User = "user",
        Assistant = "assistant",
    }
);

/// One entry of the transcript.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    pub id: MessageId,
    pub thread_id: ThreadId,
    /// 1 for the thread's first message, then ascending; a gap is where messages were rolled back.
    pub position: i64,
    pub role: Role,
    pub content: Vec<ContentPart>,
    pub run_id: Option<RunId>,
    pub upstream_message_id: Option<String>,
    pub sync: UpstreamSync,
    /// How its run ended, if it did not complete.
    pub ended: Option<RunStatus>,
    pub created_at: Timestamp,
}

/// Which part of a list is wanted. `after` and `before` exclude the row they name; at most one is set.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PageRequest<Id> {
    /// 1 to 100.
    pub limit: u32,
    /// Oldest first.
    pub ascending: bool,
    /// Rows that come after this one in the chosen order.
    pub after: Option<Id>,
    /// Rows that come before this one in the chosen order, those nearest to it, still in the chosen order.
    pub before: Option<Id>,
}

/// Part of a list.
#[derive(Clone, Debug, PartialEq)]
pub struct Page<T> {
    pub data: Vec<T>,
    /// More rows follow in the direction of travel.
    pub has_more: bool,
}

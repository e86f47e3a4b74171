//! The store's records as values: threads, runs, messages, and pages of them.

use super::run::text_enum;
use super::{
    ContentPart, ConversationKey, Deletion, Limits, MessageId, Metadata, MultitaskStrategy, Reader,
    Removed, RequiredAction, Rerun, RunError, RunId, RunRecovery, RunStatus, ThreadId, Timestamp,
    UnsettledRun, UpstreamRunId, UpstreamSync, UpstreamThreadId, Usage,
};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

text_enum!(
    /// The stage of a thread's life.
    Lifecycle {
        /// The thread that new messages of its key go to.
        Current = "current",
        /// Read only.
        Archived = "archived",
        /// A deletion is under way.
        Deleting = "deleting",
    }
);

/// The gateway's own conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Thread {
    pub id: ThreadId,
    pub key: ConversationKey,
    /// Name of the configured upstream.
    pub upstream: String,
    /// `None` until the first run makes the upstream thread.
    pub upstream_thread_id: Option<UpstreamThreadId>,
    pub lifecycle: Lifecycle,
    pub previous_thread: Option<ThreadId>,
    pub metadata: Metadata,
    /// Messages in the transcript.
    pub message_count: i64,
    /// Runs ever admitted, queued ones included.
    pub run_count: i64,
    pub created_at: Timestamp,
    pub last_active_at: Timestamp,
    /// The thread's own limits. If it has any, the configured limits do not apply. See
    /// [`Lifetimes::expiry`](super::Lifetimes::expiry).
    pub limits: Limits,
    pub archived_at: Option<Timestamp>,
    /// How the deletion of the thread ends, if one is under way.
    pub deletion: Option<Deletion>,
    /// Whether a rollover replaces the thread before its next run.
    pub rolls: bool,
    /// Number of the previous thread's last messages with which the upstream thread begins, or
    /// will begin.
    pub carried: i64,
    /// What the gateway deleted of the thread at the upstream.
    pub removed: Removed,
    /// Number of unsynced messages.
    pub unsynced_messages: i64,
    /// What an earlier run may have left at the upstream, while that is not known.
    pub unsettled_run: Option<UnsettledRun>,
    /// The usage of all runs that had one.
    pub usage: Usage,
    /// Tokens of the newest run with a usage, input and output.
    pub context_tokens: i64,
}

/// What a thread is doing. Derived from its runs, never stored.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ThreadActivity {
    pub state: ThreadState,
    /// Queued runs.
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
    /// Returns the state of a thread whose active run, if any, has this status.
    pub const fn of(active: Option<RunStatus>) -> Self {
        match active {
            None => Self::Idle,
            Some(RunStatus::RequiresAction) => Self::RequiresAction,
            Some(_) => Self::Active,
        }
    }
}

/// A message and its reply, function calls included.
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
    /// `None`: the run has a message of its own.
    pub rerun: Option<Rerun>,
    pub upstream_run_id: Option<UpstreamRunId>,
    pub required_action: Option<RequiredAction>,
    pub error: Option<RunError>,
    pub usage: Option<Usage>,
    pub recovery: Option<RunRecovery>,
    pub created_at: Timestamp,
    pub started_at: Option<Timestamp>,
    pub finished_at: Option<Timestamp>,
    /// The deadline of the run; set when the run starts.
    pub deadline_at: Option<Timestamp>,
    /// Whether the end of the run removes its messages from the transcript, or has removed them.
    pub discarded: bool,
}

text_enum!(
    Role {
        User = "user",
        Assistant = "assistant",
    }
);

/// A message of the transcript.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    pub id: MessageId,
    pub thread_id: ThreadId,
    /// 1 for the thread's first message, then ascending. A rollback of messages leaves a gap.
    pub position: i64,
    pub role: Role,
    pub content: Vec<ContentPart>,
    pub run_id: Option<RunId>,
    pub upstream_message_id: Option<String>,
    pub sync: UpstreamSync,
    /// How the message's run ended, if it did not complete.
    pub ended: Option<RunStatus>,
    pub created_at: Timestamp,
}

impl Message {
    /// Returns what this reader may see of the message.
    #[must_use]
    pub fn seen_by(mut self, reader: Reader) -> Self {
        if reader == Reader::EndUser {
            for part in &mut self.content {
                if let ContentPart::ToolCall { tool_call } = part {
                    tool_call.output = None;
                }
            }
        }
        self
    }
}

/// The part of a list that a caller asks for. `after` and `before` exclude the row that they name.
/// At most one of them is set.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PageRequest<Id> {
    /// 1 to 100.
    pub limit: u32,
    /// Oldest first.
    pub ascending: bool,
    /// Asks for rows after this one in the chosen order.
    pub after: Option<Id>,
    /// Asks for the rows right before this one, in the chosen order.
    pub before: Option<Id>,
}

/// A part of a list.
#[derive(Clone, Debug, PartialEq)]
pub struct Page<T> {
    pub data: Vec<T>,
    /// Whether more rows follow in the direction of travel.
    pub has_more: bool,
}

//! What a run is: its status, its strategy, how it failed.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

macro_rules! text_enum {
    // No `literal`: `ToSchema` does not see into what was captured as one.
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:tt),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, Deserialize, Serialize, utoipa::ToSchema)]
        pub enum $name {
            $($(#[$variant_doc])* #[serde(rename = $text)] $variant),+
        }

        impl $name {
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl FromStr for $name {
            /// The text that is none of the names.
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                Self::ALL.iter().copied().find(|it| it.as_str() == text).ok_or_else(|| text.to_owned())
            }
        }
    };
}
pub(crate) use text_enum;

text_enum!(
    /// Where a run stands.
    RunStatus {
        /// Recorded, waiting for its turn on the thread.
        Queued = "queued",
        /// At work.
        InProgress = "in_progress",
        /// Waits for the caller's tool outputs; holds the thread.
        RequiresAction = "requires_action",
        /// A cancel is under way; holds the thread.
        Cancelling = "cancelling",
        Completed = "completed",
        /// Ended before the reply was whole, by a limit of the model.
        Incomplete = "incomplete",
        Failed = "failed",
        Cancelled = "cancelled",
        /// Reached its deadline.
        Expired = "expired",
    }
);

impl RunStatus {
    /// Nothing happens to the run any more.
    pub const fn is_final(self) -> bool {
        !self.is_active() && !matches!(self, Self::Queued)
    }

    /// The run holds its thread.
    pub const fn is_active(self) -> bool {
        matches!(
            self,
            Self::InProgress | Self::RequiresAction | Self::Cancelling
        )
    }
}

text_enum!(
    /// What a new message does on a busy thread.
    MultitaskStrategy {
        /// Waits its turn.
        Enqueue = "enqueue",
        /// Is refused.
        Reject = "reject",
        /// Cancels the active run and goes next.
        Interrupt = "interrupt",
        /// Cancels the active run, removes its message and reply, and goes next.
        Rollback = "rollback",
        /// Joins the run that waits last.
        Merge = "merge",
    }
);

text_enum!(
    /// Why a run did not complete, as a stable word.
    RunErrorCode {
        /// The upstream refused or broke the call before it accepted the run.
        UpstreamError = "upstream_error",
        /// The upstream accepted the run and then reported that it failed.
        UpstreamFailed = "upstream_failed",
        /// The connection to the upstream broke in the middle of the reply.
        StreamBroken = "stream_broken",
        /// The upstream was silent for too long.
        UpstreamTimeout = "upstream_timeout",
        /// The upstream thread is gone.
        UpstreamThreadGone = "upstream_thread_gone",
        /// The thread stayed locked at the upstream by something that is not ours until the deadline.
        UpstreamBusy = "upstream_busy",
        /// The deadline passed.
        DeadlineExceeded = "deadline_exceeded",
        /// So many calls to the upstream failed that none is made for a while.
        UpstreamUnavailable = "upstream_unavailable",
        /// The database failed while the message was recorded, and its sender was told that it was not taken.
        NotRecorded = "not_recorded",
        /// The reply grew past the configured limit.
        ReplyTooLarge = "reply_too_large",
        /// The gateway was stopped before the run ended.
        GatewayStopped = "gateway_stopped",
        /// The gateway process that worked on the run died.
        ReplicaLost = "replica_lost",
        /// The assistant or upstream that the run needs is no longer configured.
        NotConfigured = "not_configured",
        /// The gateway failed in a way it should not.
        Internal = "internal",
    }
);

/// Why a run did not complete. The message is safe to show to the caller.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
pub struct RunError {
    pub code: RunErrorCode,
    pub message: String,
}

/// Tokens that the upstream counted for a run.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
pub struct Usage {
    pub input_tokens: u64,
    pub output_tokens: u64,
    pub total_tokens: u64,
}

impl std::ops::Add for Usage {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            input_tokens: self.input_tokens.saturating_add(other.input_tokens),
            output_tokens: self.output_tokens.saturating_add(other.output_tokens),
            total_tokens: self.total_tokens.saturating_add(other.total_tokens),
        }
    }
}

/// The function calls that a run waits for.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
pub struct RequiredAction {
    pub tool_calls: Vec<ToolCall>,
}

impl RequiredAction {
    /// Their ids tell: what they say is not stored everywhere.
    pub fn has_same_calls(&self, other: &Self) -> bool {
        self.tool_calls
            .iter()
            .map(|call| &call.id)
            .eq(other.tool_calls.iter().map(|call| &call.id))
    }

    /// Each of the calls has one of the outputs, and none is left over.
    pub fn is_answered_by(&self, outputs: &[ToolOutput]) -> bool {
        let calls = &self.tool_calls;
        outputs.len() == calls.len()
            && calls.iter().all(|call| {
                outputs
                    .iter()
                    .filter(|it| it.tool_call_id == call.id)
                    .count()
                    == 1
            })
    }
}

#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
pub struct ToolCall {
    /// What the output must name.
    pub id: String,
    pub name: String,
    /// As the model wrote them: usually, not surely, a JSON object.
    pub arguments: String,
}

/// The answer to a function call.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ToolOutput {
    /// The call's id.
    pub tool_call_id: String,
    pub output: String,
}

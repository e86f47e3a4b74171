//! A run's status and strategy, its error, and its usage.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

macro_rules! text_enum {
    // No `literal`: `ToSchema` cannot read a token that was captured as one.
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
            /// The text, which is none of the names.
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                Self::ALL.iter().copied().find(|it| it.as_str() == text).ok_or_else(|| text.to_owned())
            }
        }
    };
}
pub(crate) use text_enum;

text_enum!(
    /// The status of a run.
    RunStatus {
        /// Recorded; waits for its start on the thread.
        Queued = "queued",
        /// Works on the reply.
        InProgress = "in_progress",
        /// Waits for the caller's tool outputs; still holds the thread.
        RequiresAction = "requires_action",
        /// A cancel is under way; still holds the thread.
        Cancelling = "cancelling",
        Completed = "completed",
        /// A limit of the model ended the reply early.
        Incomplete = "incomplete",
        Failed = "failed",
        Cancelled = "cancelled",
        /// Reached its deadline.
        Expired = "expired",
    }
);

impl RunStatus {
    /// Returns whether the run has ended.
    pub const fn is_final(self) -> bool {
        !self.is_active() && !matches!(self, Self::Queued)
    }

    /// Returns whether the run holds its thread.
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
        /// Waits for its start behind the other runs.
        Enqueue = "enqueue",
        /// Is refused.
        Reject = "reject",
        /// Cancels the active run and starts next.
        Interrupt = "interrupt",
        /// Cancels the active run, removes its message and reply, and starts next.
        Rollback = "rollback",
        /// Joins the last run of the queue.
        Merge = "merge",
    }
);

text_enum!(
    /// What a run without a message of its own found at its start. Such a run answers the last
    /// messages of the user again, which then count as its own.
    Rerun {
        /// It has not looked yet.
        Waiting = "waiting",
        /// The upstream thread lacked the messages, and was to get them.
        Missing = "missing",
        /// The upstream thread lacked the messages, and was not to get them.
        Withheld = "withheld",
        /// The upstream thread ended with the messages.
        Present = "present",
        /// The upstream thread had a reply to the messages, which the new one replaces.
        Answered = "answered",
    }
);

impl Rerun {
    /// Returns whether the upstream thread had the messages.
    pub const fn is_upstream(self) -> bool {
        matches!(self, Self::Present | Self::Answered)
    }
}

text_enum!(
    /// Why a run did not complete, as a stable code.
    RunErrorCode {
        /// The upstream failed, refused the request for a reason that the gateway does not know, or cannot
        /// be reached.
        UpstreamError = "upstream_error",
        /// The upstream takes no more requests for a while.
        UpstreamRateLimited = "upstream_rate_limited",
        /// The gateway's account at the upstream is used up. Its operator must act.
        UpstreamQuotaExhausted = "upstream_quota_exhausted",
        /// The upstream does not accept the gateway's key. The operator must act.
        UpstreamUnauthorized = "upstream_unauthorized",
        /// The upstream does not know what the configuration names, or does not take it. The operator must
        /// act.
        UpstreamMisconfigured = "upstream_misconfigured",
        /// A content policy of the upstream refused the message or the conversation.
        ContentRefused = "content_refused",
        /// The upstream refuses this message, even alone.
        MessageRefused = "message_refused",
        /// The conversation is too long for the model or the upstream.
        ContextFull = "context_full",
        /// The upstream accepted the run and then reported that it failed, or completed it without a
        /// reply.
        UpstreamFailed = "upstream_failed",
        /// The connection to the upstream broke in the middle of the reply.
        StreamBroken = "stream_broken",
        /// The upstream was silent for too long.
        UpstreamTimeout = "upstream_timeout",
        /// The upstream thread is gone.
        UpstreamThreadGone = "upstream_thread_gone",
        /// The upstream thread stayed locked until the deadline, by something outside the gateway.
        UpstreamBusy = "upstream_busy",
        /// The deadline passed.
        DeadlineExceeded = "deadline_exceeded",
        /// Many calls to the upstream failed, so the gateway makes none for a while.
        UpstreamUnavailable = "upstream_unavailable",
        /// A run without a message of its own found no message that it could send.
        NothingToRun = "nothing_to_run",
        /// The database failed while the gateway recorded the message. The caller got an error.
        NotRecorded = "not_recorded",
        /// The reply grew past the configured limit.
        ReplyTooLarge = "reply_too_large",
        /// The gateway was stopped before the run ended.
        GatewayStopped = "gateway_stopped",
        /// The gateway process that worked on the run died.
        ReplicaLost = "replica_lost",
        /// The assistant or upstream that the run needs is no longer configured.
        NotConfigured = "not_configured",
        /// The gateway failed because of a defect.
        Internal = "internal",
    }
);

/// Why a run did not complete. The message is safe to show to the caller.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
pub struct RunError {
    pub code: RunErrorCode,
    pub message: String,
    /// The upstream's own code for the failure, if it gave one that is safe to show.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub upstream_code: Option<String>,
    /// The HTTP status with which the upstream refused the request or failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub upstream_status: Option<u16>,
}

impl RunError {
    /// Returns an error of which the upstream said nothing.
    pub fn new(code: RunErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            upstream_code: None,
            upstream_status: None,
        }
    }
}

/// Tokens that the upstream counted for a run.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
pub struct Usage {
    pub input_tokens: u64,
    pub output_tokens: u64,
    pub total_tokens: u64,
    /// The input tokens that the upstream had in a cache; absent if it does not count them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cached_input_tokens: Option<u64>,
    /// The output tokens that the model thought with; absent if the upstream does not count them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning_tokens: Option<u64>,
}

impl std::ops::Add for Usage {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            input_tokens: self.input_tokens.saturating_add(other.input_tokens),
            output_tokens: self.output_tokens.saturating_add(other.output_tokens),
            total_tokens: self.total_tokens.saturating_add(other.total_tokens),
            cached_input_tokens: sum(self.cached_input_tokens, other.cached_input_tokens),
            reasoning_tokens: sum(self.reasoning_tokens, other.reasoning_tokens),
        }
    }
}

fn sum(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.saturating_add(other)),
        (one, other) => one.or(other),
    }
}

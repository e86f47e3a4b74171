//! A run's status and strategy, its function calls, and its error.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::Value;
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

/// The calls that a run waits for.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct RequiredAction {
    pub tool_calls: Vec<ToolCall>,
}

impl RequiredAction {
    /// Compares the calls by their ids, because the store may not keep their content.
    pub fn has_same_calls(&self, other: &Self) -> bool {
        self.tool_calls
            .iter()
            .map(|call| &call.id)
            .eq(other.tool_calls.iter().map(|call| &call.id))
    }

    /// Returns whether each call has exactly one output and no output is left over.
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

text_enum!(
    /// What a call asks its caller for.
    ToolCallType {
        /// The output of a function.
        Function = "function",
        /// The output of a custom tool, whose arguments are free text.
        Custom = "custom",
        /// The approval of a call that the upstream makes to an MCP server.
        McpApproval = "mcp_approval",
        /// A screenshot, after an action on a computer.
        Computer = "computer",
        /// The output of a command.
        LocalShell = "local_shell",
        /// The outputs of shell commands.
        Shell = "shell",
        /// The result of a change to a file.
        ApplyPatch = "apply_patch",
    }
);

impl ToolCallType {
    /// Checks that an answer has the form that calls of this type take.
    ///
    /// # Errors
    /// The form.
    pub fn check(self, answer: &CallAnswer) -> Result<(), &'static str> {
        let (is_right, form) = match (self, answer) {
            (Self::McpApproval, answer) => (
                matches!(answer, CallAnswer::Approval { .. }),
                "`approve`, which is true or false",
            ),
            (_, CallAnswer::Approval { .. }) => (false, "`output`, and no `approve`"),
            (Self::Function | Self::Custom, CallAnswer::Output { .. }) => (true, ""),
            (Self::Computer, CallAnswer::Output { output, .. }) => (
                matches!(output, OutputContent::Parts(parts)
                    if matches!(parts[..], [OutputPart::InputImage { .. }])),
                "an `output` of one part, which is an `input_image`: the screenshot",
            ),
            (Self::LocalShell, CallAnswer::Output { output, .. }) => (
                matches!(output, OutputContent::Text(_)),
                "an `output` that is a string",
            ),
            (Self::Shell, CallAnswer::Output { output, .. }) => (
                output.as_json().is_some_and(|it| is_shell_output(&it)),
                "an `output` that is a JSON text: a list of \
                 `{\"stdout\", \"stderr\", \"outcome\": {\"type\": \"exit\", \"exit_code\"}}`",
            ),
            (Self::ApplyPatch, CallAnswer::Output { output, .. }) => (
                output.as_json().is_some_and(|it| is_patch_output(&it)),
                "an `output` that is a JSON text: `{\"status\", \"output\"}`, and the status is \
                 `completed` or `failed`",
            ),
        };
        if is_right { Ok(()) } else { Err(form) }
    }

    #[expect(
        clippy::trivially_copy_pass_by_ref,
        reason = "serde passes a reference"
    )]
    const fn is_function(&self) -> bool {
        matches!(self, Self::Function)
    }
}

impl Default for ToolCallType {
    /// Returns the type of a stored call without one.
    fn default() -> Self {
        Self::Function
    }
}

/// A call that the caller has to answer.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct ToolCall {
    /// The id that the answer to this call must name.
    pub id: String,
    // A function has no stored type: the store compares the text of calls, and the first version
    // stored none.
    #[serde(
        rename = "type",
        default,
        skip_serializing_if = "ToolCallType::is_function"
    )]
    pub kind: ToolCallType,
    pub name: String,
    /// The arguments as the model wrote them: usually, not always, a JSON object. Of a call of
    /// type `computer`, `local_shell`, `shell` or `apply_patch`, the action as JSON.
    pub arguments: String,
    /// The label of the MCP server that an approval is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_label: Option<String>,
    /// The safety checks of a call of type `computer`. The answer must list those that the caller
    /// acknowledges.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pending_safety_checks: Vec<Value>,
}

/// The answer to a call.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ToolOutput {
    /// The call's id.
    pub tool_call_id: String,
    /// The call's type.
    #[serde(rename = "type", default)]
    pub kind: ToolCallType,
    #[serde(flatten)]
    pub answer: CallAnswer,
}

impl ToolOutput {
    /// Makes the output of a function that is a text.
    pub fn text(call: impl Into<String>, text: impl Into<String>) -> Self {
        Self {
            tool_call_id: call.into(),
            kind: ToolCallType::Function,
            answer: CallAnswer::text(text),
        }
    }
}

/// What the caller answers to a call.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(untagged)]
pub enum CallAnswer {
    Output {
        output: OutputContent,
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        acknowledged_safety_checks: Vec<Value>,
    },
    Approval {
        approve: bool,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
}

impl CallAnswer {
    /// Makes an answer that is a text.
    pub fn text(text: impl Into<String>) -> Self {
        Self::Output {
            output: OutputContent::Text(text.into()),
            acknowledged_safety_checks: Vec::new(),
        }
    }
}

/// The content of an output: a text, or parts.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(untagged)]
pub enum OutputContent {
    Text(String),
    Parts(Vec<OutputPart>),
}

impl OutputContent {
    /// Returns the value of a JSON text.
    pub fn as_json(&self) -> Option<Value> {
        match self {
            Self::Text(text) => serde_json::from_str(text).ok(),
            Self::Parts(_) => None,
        }
    }
}

fn is_shell_output(value: &Value) -> bool {
    let is_chunk = |chunk: &Value| {
        chunk["stdout"].is_string() && chunk["stderr"].is_string() && chunk["outcome"].is_object()
    };
    value
        .as_array()
        .is_some_and(|chunks| chunks.iter().all(is_chunk))
}

fn is_patch_output(value: &Value) -> bool {
    let output = &value["output"];
    matches!(value["status"].as_str(), Some("completed" | "failed"))
        && (output.is_null() || output.is_string())
}

/// A part of an output.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum OutputPart {
    InputText {
        text: String,
    },
    /// An image, by its URL or by the id of a file at the upstream.
    InputImage {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        image_url: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        file_id: Option<String>,
        /// `auto`, `low` or `high`; the upstream's default where absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        detail: Option<String>,
    },
    /// A file, by its id at the upstream, by its URL, or as a data URL.
    InputFile {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        file_id: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        file_url: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        file_data: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        filename: Option<String>,
    },
}

impl OutputPart {
    /// Returns whether an image or a file is named in exactly one way.
    pub fn names_one_place(&self) -> bool {
        let places: [&Option<String>; 3] = match self {
            Self::InputText { .. } => return true,
            Self::InputImage {
                image_url, file_id, ..
            } => [image_url, file_id, &None],
            Self::InputFile {
                file_id,
                file_url,
                file_data,
                ..
            } => [file_id, file_url, file_data],
        };
        places.iter().filter(|place| place.is_some()).count() == 1
    }
}

//! The calls that a run asks its caller to answer, and the answers.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::run::text_enum;

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

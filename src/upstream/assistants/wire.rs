//! The shapes of Assistants v2, as far as the gateway reads them. An optional field of another
//! shape counts as absent.

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use crate::domain::{
    ContentPart, File, ImageFile, ImageUrl, MadeCall, Role, RunError, RunErrorCode, RunStatus,
    Timestamp, ToolCall, ToolCallType, Usage, kept,
};
use crate::upstream::classify::ErrorDetail;
use crate::upstream::error::UpstreamError;
use crate::upstream::wire::{annotations, failure_code, lenient, pieces, usage};

/// Most characters of a text of a message.
const MAX_TEXT: usize = 256_000;

#[derive(Debug, Deserialize)]
pub(super) struct RunObject {
    pub(super) id: String,
    #[serde(default, deserialize_with = "lenient")]
    pub(super) status: Option<String>,
    #[serde(default, deserialize_with = "lenient")]
    metadata: Option<Map<String, Value>>,
    #[serde(default, deserialize_with = "lenient")]
    required_action: Option<RequiredAction>,
    #[serde(default, deserialize_with = "lenient")]
    last_error: Option<Map<String, Value>>,
    #[serde(default, deserialize_with = "lenient")]
    incomplete_details: Option<Map<String, Value>>,
    #[serde(default, deserialize_with = "lenient")]
    usage: Option<Map<String, Value>>,
}

impl RunObject {
    /// Returns the status in the gateway's words; `None` for an unknown one, which counts as
    /// unfinished.
    pub(super) fn run_status(&self) -> Option<RunStatus> {
        self.status
            .as_deref()
            .and_then(|status| status.parse().ok())
    }

    pub(super) fn has_ended(&self) -> bool {
        self.run_status().is_some_and(RunStatus::is_final)
    }

    pub(super) fn is_cancelling(&self) -> bool {
        self.run_status() == Some(RunStatus::Cancelling)
    }

    /// Returns true if the run waits for the outputs of function calls.
    pub(super) fn waits_for_outputs(&self) -> bool {
        self.run_status() == Some(RunStatus::RequiresAction)
    }

    /// Returns true if the run waits for exactly these calls, and there is at least one.
    pub(super) fn waits_for(&self, calls: &[ToolCall]) -> bool {
        let asked: Vec<&str> = self
            .required_action
            .iter()
            .flat_map(RequiredAction::ids)
            .collect();
        let known = |id: &&str| calls.iter().any(|call| call.id == **id);
        self.waits_for_outputs()
            && !asked.is_empty()
            && asked.len() == calls.len()
            && asked.iter().all(known)
    }

    pub(super) fn tag(&self, name: &str) -> Option<&str> {
        self.metadata.as_ref()?.get(name)?.as_str()
    }

    /// Returns the code for which the run failed or is incomplete.
    pub(super) fn failure_code(&self) -> Option<String> {
        failure_code(self.last_error.as_ref(), self.incomplete_details.as_ref())
    }

    /// Returns the error for which the run failed.
    pub(super) fn error_detail(&self) -> Option<ErrorDetail> {
        Some(ErrorDetail::from_object(self.last_error.as_ref()?))
    }

    /// Returns the failure as a refusal of the request.
    pub(super) fn refusal(&self) -> Option<UpstreamError> {
        self.error_detail()?.refusal()
    }

    pub(super) fn usage(&self) -> Option<Usage> {
        self.usage
            .as_ref()
            .and_then(|counts| usage(counts, "prompt_tokens", "completion_tokens"))
    }

    /// Returns the calls that the run waits for; none if their form is unknown.
    pub(super) fn into_tool_calls(self) -> Vec<ToolCall> {
        let (kind, calls) = self
            .required_action
            .map(RequiredAction::into_calls)
            .unwrap_or_default();
        let call = |call: WireToolCall| {
            let function = call.function.unwrap_or_default();
            ToolCall {
                id: call.id,
                kind,
                name: call.name.unwrap_or(function.name),
                arguments: call.arguments.unwrap_or(function.arguments),
                server_label: call.server_label,
                ..ToolCall::default()
            }
        };
        calls.into_iter().map(call).collect()
    }

    /// Returns the error of a run that waits for something that the gateway does not know.
    pub(super) fn unknown_action(&self) -> Option<RunError> {
        let action = self.required_action.as_ref()?;
        let named = action.kind.as_deref().filter(|kind| {
            kind.len() <= 64 && kind.bytes().all(|it| it.is_ascii_lowercase() || it == b'_')
        });
        (self.waits_for_outputs() && action.calls().is_empty()).then(|| {
            let message = format!(
                "the upstream waits for an action of type `{}`, which the gateway does not know",
                named.unwrap_or("unknown")
            );
            RunError::new(RunErrorCode::UpstreamFailed, message)
        })
    }
}

#[derive(Debug, Deserialize)]
struct RequiredAction {
    #[serde(rename = "type", default, deserialize_with = "lenient")]
    kind: Option<String>,
    #[serde(default, deserialize_with = "lenient")]
    submit_tool_outputs: Option<ToolCalls>,
    /// Foundry's action for calls to MCP servers.
    #[serde(default, deserialize_with = "lenient")]
    submit_tool_approval: Option<ToolCalls>,
}

impl RequiredAction {
    fn calls(&self) -> &[WireToolCall] {
        let calls = self
            .submit_tool_outputs
            .as_ref()
            .or(self.submit_tool_approval.as_ref());
        calls.map(|it| &it.tool_calls[..]).unwrap_or_default()
    }

    fn into_calls(self) -> (ToolCallType, Vec<WireToolCall>) {
        match (self.submit_tool_outputs, self.submit_tool_approval) {
            (Some(calls), _) => (ToolCallType::Function, calls.tool_calls),
            (None, Some(calls)) => (ToolCallType::McpApproval, calls.tool_calls),
            (None, None) => Default::default(),
        }
    }

    fn ids(&self) -> impl Iterator<Item = &str> {
        self.calls().iter().map(|call| call.id.as_str())
    }
}

#[derive(Debug, Deserialize)]
struct ToolCalls {
    tool_calls: Vec<WireToolCall>,
}

/// A call of a function, or a call to an MCP server that needs an approval.
#[derive(Debug, Deserialize)]
struct WireToolCall {
    id: String,
    #[serde(default)]
    function: Option<WireFunction>,
    #[serde(default, deserialize_with = "lenient")]
    name: Option<String>,
    #[serde(default, deserialize_with = "lenient")]
    arguments: Option<String>,
    #[serde(default, deserialize_with = "lenient")]
    server_label: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
struct WireFunction {
    name: String,
    #[serde(default)]
    arguments: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct MessageObject {
    pub(super) id: String,
    #[serde(default, deserialize_with = "lenient")]
    pub(super) run_id: Option<String>,
    #[serde(default, deserialize_with = "lenient")]
    created_at: Option<i64>,
    #[serde(default, deserialize_with = "lenient")]
    metadata: Option<Map<String, Value>>,
    #[serde(default)]
    role: Option<String>,
    #[serde(default)]
    content: Option<Vec<Value>>,
    #[serde(default, deserialize_with = "lenient")]
    attachments: Option<Vec<Attachment>>,
}

/// A file of a message.
#[derive(Debug, Deserialize)]
struct Attachment {
    #[serde(default, deserialize_with = "lenient")]
    file_id: Option<String>,
}

impl MessageObject {
    /// Returns the role; `None` for a role that the gateway's conversations do not have.
    pub(super) fn speaker(&self) -> Option<Role> {
        self.role.as_deref().unwrap_or("assistant").parse().ok()
    }

    pub(super) fn created_at(&self) -> Option<Timestamp> {
        Timestamp::from_timestamp(self.created_at?, 0)
    }

    /// Returns true if the message belongs to the reply. A server that names no role sends no
    /// other messages.
    pub(super) fn is_reply(&self) -> bool {
        self.role.as_deref().is_none_or(|role| role == "assistant")
    }

    pub(super) fn tag(&self, name: &str) -> Option<&str> {
        self.metadata.as_ref()?.get(name)?.as_str()
    }

    /// Returns the parts of known types that are not empty and, of a user's message, the attached
    /// files after them.
    pub(super) fn into_parts(self) -> Vec<ContentPart> {
        let files = if self.is_reply() {
            Vec::new()
        } else {
            self.attachments.unwrap_or_default()
        };
        let parts = self.content.unwrap_or_default();
        let files = files.into_iter().filter_map(|file| {
            let file_id = Some(file.file_id?);
            let file = File {
                file_id,
                ..File::default()
            };
            Some(ContentPart::File { file })
        });
        parts
            .into_iter()
            .filter_map(part)
            .chain(files)
            .filter(|part| part.size() > 0)
            .collect()
    }

    /// Returns the types of the parts.
    pub(super) fn kinds(&self) -> impl Iterator<Item = &str> {
        let parts = self.content.iter().flatten();
        parts.filter_map(|part| part.get("type")?.as_str())
    }
}

/// Returns the calls of a step that the server has answered itself.
pub(super) fn hosted_calls(step: &Value) -> Vec<MadeCall> {
    let calls = step["step_details"]["tool_calls"].as_array();
    let call = |call: &Value| {
        let kind = call["type"].as_str().filter(|kind| *kind != "function")?;
        let is_name = kind.bytes().all(|it| it.is_ascii_lowercase() || it == b'_');
        let detail = &call[kind];
        let arguments = match &detail["input"] {
            Value::String(input) => kept(input),
            _ if detail.is_object() => kept(&detail.to_string()),
            _ => String::new(),
        };
        let logs = detail["outputs"].as_array().into_iter().flatten();
        let logs: Vec<&str> = logs.filter_map(|output| output["logs"].as_str()).collect();
        (is_name && kind.len() <= 64).then(|| MadeCall {
            id: call["id"].as_str().unwrap_or_default().to_owned(),
            kind: kind.to_owned(),
            name: String::new(),
            arguments,
            output: (!logs.is_empty()).then(|| kept(&logs.join("\n"))),
        })
    };
    calls.into_iter().flatten().filter_map(call).collect()
}

fn part(value: Value) -> Option<ContentPart> {
    match serde_json::from_value(value).ok()? {
        WirePart::Text { text } => Some(ContentPart::Text {
            text: text.value.unwrap_or_default(),
            annotations: annotations(text.annotations.as_ref()),
            message: 0,
            phase: None,
        }),
        WirePart::ImageFile { image_file } => Some(ContentPart::ImageFile {
            image_file: ImageFile {
                file_id: image_file.file_id,
                detail: image_file.detail,
            },
        }),
        WirePart::ImageUrl { image_url } => Some(ContentPart::ImageUrl {
            image_url: ImageUrl {
                url: image_url.url,
                detail: image_url.detail,
            },
        }),
        WirePart::Refusal { refusal } => Some(ContentPart::refusal(refusal)),
        WirePart::Unknown => None,
    }
}

#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum WirePart {
    Text {
        text: WireText,
    },
    ImageFile {
        image_file: WireImageFile,
    },
    ImageUrl {
        image_url: WireImageUrl,
    },
    Refusal {
        refusal: String,
    },
    #[serde(other)]
    Unknown,
}

#[derive(Debug, Deserialize)]
struct WireText {
    #[serde(default)]
    value: Option<String>,
    #[serde(default)]
    annotations: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct WireImageFile {
    file_id: String,
    #[serde(default)]
    detail: Option<String>,
}

#[derive(Debug, Deserialize)]
struct WireImageUrl {
    url: String,
    #[serde(default)]
    detail: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct MessageDelta {
    pub(super) id: String,
    pub(super) delta: Delta,
}

#[derive(Debug, Deserialize)]
pub(super) struct Delta {
    #[serde(default)]
    pub(super) content: Option<Vec<DeltaPart>>,
}

/// A piece of a part. Images are not streamed; they come with the completed message.
#[derive(Debug, Deserialize)]
pub(super) struct DeltaPart {
    #[serde(default)]
    pub(super) index: u64,
    #[serde(default)]
    pub(super) text: Option<StreamedText>,
    #[serde(default)]
    pub(super) refusal: Option<Box<RawValue>>,
}

/// Text as JSON, because a character may be cut in two.
#[derive(Debug, Deserialize)]
pub(super) struct StreamedText {
    #[serde(default)]
    pub(super) value: Option<Box<RawValue>>,
}

/// Returns a message for a request. The server takes files beside the content, as attachments, and
/// gives them to its file search.
pub(super) fn message(role: Role, parts: &[ContentPart], metadata: Value) -> Value {
    let mut message = json!({"role": role, "content": content(parts)});
    message["metadata"] = metadata;
    let files: Vec<Value> = parts
        .iter()
        .filter_map(attached)
        .map(|id| json!({"file_id": id, "tools": [{"type": "file_search"}]}))
        .collect();
    if !files.is_empty() {
        message["attachments"] = files.into();
    }
    message
}

/// Returns the id of a file that the server can attach.
fn attached(part: &ContentPart) -> Option<&str> {
    match part {
        ContentPart::File { file } => file.file_id.as_deref(),
        _ => None,
    }
}

/// Returns the content of a message: a bare string for a single text, else parts. Unlike in
/// answers, a text part holds a plain string. A note stands for a file that the server cannot
/// attach, and for content that is nothing but files.
fn content(parts: &[ContentPart]) -> Value {
    if let [ContentPart::Text { text, .. }] = parts
        && text.len() <= MAX_TEXT
    {
        return text.as_str().into();
    }
    let note = |name: Option<&str>| {
        let name = name.map_or_else(String::new, |name| format!(" {name}"));
        json!({"type": "text", "text": format!("[file{name}]")})
    };
    let part = |part: &ContentPart| match part {
        ContentPart::File { file } => vec![note(file.filename.as_deref())],
        ContentPart::Text { text, .. } | ContentPart::Refusal { refusal: text, .. } => {
            pieces(text, MAX_TEXT)
                .into_iter()
                .map(|text| json!({"type": "text", "text": text}))
                .collect()
        }
        // Only replies of another protocol have it.
        ContentPart::GeneratedImage { generated_image } => {
            vec![json!({"type": "text", "text": generated_image.id})]
        }
        // The server's threads hold no calls.
        ContentPart::ToolCall { tool_call } => {
            vec![json!({"type": "text", "text": tool_call.note()})]
        }
        ContentPart::ImageUrl { image_url } => {
            vec![json!({"type": "image_url", "image_url": image_url})]
        }
        ContentPart::ImageFile { image_file } => {
            vec![json!({"type": "image_file", "image_file": image_file})]
        }
    };
    let inline = parts.iter().filter(|part| attached(part).is_none());
    let content: Vec<Value> = inline.flat_map(part).collect();
    if content.is_empty() {
        vec![note(None)].into()
    } else {
        content.into()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::upstream::mutation::mutated;
    use crate::upstream::wire::List;

    #[test]
    fn content_of_a_message_takes_the_shape_of_requests() {
        let text = |text: &str| ContentPart::text(text);
        let url = |detail: Option<&str>| ContentPart::ImageUrl {
            image_url: ImageUrl {
                url: "https://i/1.png".to_owned(),
                detail: detail.map(str::to_owned),
            },
        };
        let file = ContentPart::ImageFile {
            image_file: ImageFile {
                file_id: "file_1".to_owned(),
                detail: None,
            },
        };
        assert_eq!(content(&[text("a")]), json!("a"));
        let long = content(&[text(&"é".repeat(MAX_TEXT + 1))]);
        assert_eq!(long[0]["text"], "é".repeat(MAX_TEXT));
        assert_eq!(long[1], json!({"type": "text", "text": "é"}));
        assert_eq!(
            content(&[text("a"), url(Some("low")), url(None), file]),
            json!([
                {"type": "text", "text": "a"},
                {"type": "image_url", "image_url": {"url": "https://i/1.png", "detail": "low"}},
                {"type": "image_url", "image_url": {"url": "https://i/1.png"}},
                {"type": "image_file", "image_file": {"file_id": "file_1"}},
            ])
        );
    }

    #[test]
    fn odd_fields_of_a_run_do_not_make_it_unreadable() {
        let run: RunObject = serde_json::from_value(json!({
            "id": "run_1", "status": 7, "metadata": [], "required_action": "x", "last_error": "boom",
            "incomplete_details": null, "usage": {"prompt_tokens": -1}, "instructions": null,
        }))
        .unwrap();
        assert!(
            run.run_status().is_none() && run.usage().is_none() && run.failure_code().is_none()
        );
        assert!(run.into_tool_calls().is_empty());
    }

    #[test]
    fn an_unknown_action_is_named_and_not_quoted() {
        let named = |kind: Value| {
            let action = json!({"type": kind, "submit_dance": {}});
            let run =
                json!({"id": "run_1", "status": "requires_action", "required_action": action});
            let run: RunObject = serde_json::from_value(run).unwrap();
            run.unknown_action().unwrap().message
        };
        assert!(named(json!("submit_dance")).contains("`submit_dance`"));
        for odd in [json!("Dance, please."), json!(7), json!("x".repeat(65))] {
            assert!(named(odd).contains("`unknown`"));
        }
    }

    #[test]
    fn parts_that_we_do_not_know_are_left_out() {
        let message: MessageObject = serde_json::from_value(json!({
            "id": "msg_1", "content": [
                {"type": "text", "text": {"value": "a", "annotations": [{"type": "file_citation"}]}},
                {"type": "hologram", "hologram": 1},
                {"type": "image_file", "image_file": {"file_id": "f", "detail": "auto"}},
                {"type": "refusal", "refusal": "no"},
                7,
            ],
        }))
        .unwrap();
        assert!(message.is_reply());
        let Value::Object(citation) = json!({"type": "file_citation"}) else {
            unreachable!()
        };
        assert_eq!(
            message.into_parts(),
            [
                ContentPart::Text {
                    text: "a".to_owned(),
                    annotations: vec![citation],
                    message: 0,
                    phase: None,
                },
                ContentPart::ImageFile {
                    image_file: ImageFile {
                        file_id: "f".to_owned(),
                        detail: Some("auto".to_owned())
                    }
                },
                ContentPart::refusal("no"),
            ]
        );
    }

    fn answers() -> Vec<Value> {
        let run = json!({
            "id": "run_1", "object": "thread.run", "status": "requires_action", "metadata": {"tag": "x"},
            "required_action": {"type": "submit_tool_outputs", "submit_tool_outputs": {"tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
            ]}},
            "last_error": {"code": "server_error", "message": "m"}, "incomplete_details": {"reason": "max_tokens"},
            "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
        });
        let message = json!({
            "id": "msg_1", "object": "thread.message", "created_at": 1_700_000_000, "role": "assistant",
            "run_id": "run_1", "metadata": {}, "content": [
                {"type": "text", "text": {"value": "a", "annotations": []}},
                {"type": "image_url", "image_url": {"url": "u", "detail": "low"}},
                {"type": "image_file", "image_file": {"file_id": "f"}},
                {"type": "refusal", "refusal": "no"},
            ],
        });
        let list = json!({"object": "list", "data": [message, run], "has_more": true});
        vec![run, message, list]
    }

    proptest! {
        #[test]
        fn an_answer_that_is_nearly_real_is_read_or_refused(answer in mutated(answers())) {
            let text = answer.to_string();
            if let Ok(run) = serde_json::from_str::<RunObject>(&text) {
                let calls = serde_json::from_str::<RunObject>(&text).map(RunObject::into_tool_calls).unwrap_or_default();
                let _ = (run.run_status(), run.usage(), run.tag("tag"), run.has_ended(), run.is_cancelling());
                prop_assert!(!run.waits_for(&calls) || run.waits_for_outputs());
                prop_assert!(run.failure_code().is_none_or(|code| code.len() <= 64));
            }
            if let Ok(message) = serde_json::from_str::<MessageObject>(&text) {
                let _ = (message.speaker(), message.created_at(), message.tag("tag"), message.is_reply());
                let size: usize = message.into_parts().iter().map(ContentPart::size).sum();
                prop_assert!(size <= text.len());
            }
            if let Ok(list) = serde_json::from_str::<List<RunObject>>(&text) {
                let _ = list.next(|run| &run.id);
            }
            if let Ok(list) = serde_json::from_str::<List<MessageObject>>(&text) {
                let _ = list.next(|message| &message.id);
            }
        }
    }
}

//! The shapes of Conversations + Responses, as far as the gateway reads them. An optional field
//! of another shape counts as absent.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use crate::domain::{
    CallAnswer, ContentPart, File, GeneratedImage, ImageFile, ImageUrl, MadeCall, Message,
    OutputContent, OutputPart, Phase, Role, RunStatus, ToolCall, ToolCallType, ToolOutput, Usage,
    answer_calls, append_messages, kept, messages_of, says_something,
};
use crate::upstream::classify::{Damage, ErrorDetail};
use crate::upstream::error::UpstreamError;
use crate::upstream::wire::{annotations, failure_code, lenient, pieces, usage};

/// Most characters of a text of a message.
const MAX_TEXT: usize = 10_485_760;

/// The outer fields of an event. The inner ones are parsed when its type is known.
#[derive(Debug, Deserialize)]
pub(super) struct Envelope<'a> {
    #[serde(rename = "type", default, deserialize_with = "lenient")]
    pub(super) kind: Option<String>,
    #[serde(default, deserialize_with = "lenient")]
    pub(super) sequence_number: Option<u64>,
    #[serde(borrow, default)]
    pub(super) response: Option<&'a RawValue>,
    #[serde(borrow, default)]
    pub(super) delta: Option<&'a RawValue>,
    #[serde(borrow, default)]
    pub(super) item: Option<&'a RawValue>,
    #[serde(default, deserialize_with = "lenient")]
    pub(super) output_index: Option<u64>,
    #[serde(default, deserialize_with = "lenient")]
    pub(super) content_index: Option<u64>,
}

impl Envelope<'_> {
    /// Returns the JSON text of the response that the event holds. A server that does not stream
    /// sends the response itself, as the only event, whose text is `data`.
    pub(super) fn response_in<'a>(&'a self, data: &'a str) -> Option<&'a str> {
        let is_response = || {
            let head = serde_json::from_str::<ResponseHead>(data);
            head.is_ok_and(|head| head.run_status().is_some())
        };
        match self.response {
            Some(response) => Some(response.get()),
            None => (self.kind.is_none() && is_response()).then_some(data),
        }
    }
}

/// The fields of a response that are read before it has ended.
#[derive(Debug, Deserialize)]
pub(super) struct ResponseHead {
    pub(super) id: String,
    #[serde(default, deserialize_with = "lenient")]
    status: Option<String>,
    /// The response on which this one builds: null if the server says that there is none, `None` if
    /// it says nothing.
    #[serde(default, deserialize_with = "present")]
    pub(super) previous_response_id: Option<Value>,
}

/// Reads a field that is there, so that null differs from an absent field.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

impl ResponseHead {
    /// Returns the status in the gateway's words; `None` if there is none, or an unknown one.
    pub(super) fn run_status(&self) -> Option<RunStatus> {
        self.status
            .as_deref()
            .and_then(|status| status.parse().ok())
    }
}

/// A response that has ended.
#[derive(Debug, Deserialize)]
pub(super) struct ResponseObject {
    #[serde(default, deserialize_with = "lenient")]
    error: Option<Map<String, Value>>,
    #[serde(default, deserialize_with = "lenient")]
    incomplete_details: Option<Map<String, Value>>,
    #[serde(default, deserialize_with = "lenient")]
    output: Option<Vec<Value>>,
    #[serde(default, deserialize_with = "lenient")]
    usage: Option<Map<String, Value>>,
}

/// The head of an item that a response begins.
#[derive(Debug, Deserialize)]
pub(super) struct ItemHead {
    #[serde(default, deserialize_with = "lenient")]
    pub(super) phase: Option<Phase>,
}

/// The content of a response, or of a part of a conversation.
#[derive(Debug, Default)]
pub(super) struct Output {
    pub(super) content: Vec<ContentPart>,
    /// The types of the other items, and of the parts that the gateway cannot read.
    pub(super) unread: Vec<String>,
    /// The id of the last message.
    pub(super) message_id: Option<String>,
    /// Calls without an answer.
    pub(super) open_calls: Vec<ToolCall>,
}

impl ResponseObject {
    /// Returns the code for which the response failed or is incomplete.
    pub(super) fn failure_code(&self) -> Option<String> {
        failure_code(self.error.as_ref(), self.incomplete_details.as_ref())
    }

    /// Returns the error for which the response failed.
    pub(super) fn error_detail(&self) -> Option<ErrorDetail> {
        Some(ErrorDetail::from_object(self.error.as_ref()?))
    }

    /// Returns the failure as a refusal of the request, if the response called no tool.
    pub(super) fn refusal(&self) -> Option<UpstreamError> {
        let called = self.output.iter().flatten().any(|item| {
            !matches!(
                item.get("type").and_then(Value::as_str),
                Some("message" | "reasoning")
            )
        });
        self.error_detail()?.refusal().filter(|_| !called)
    }

    /// Returns the damage of the conversation, if the response failed for it before it produced
    /// output.
    pub(super) fn damage(&self) -> Option<Damage> {
        let has_output = self
            .output
            .as_ref()
            .is_some_and(|output| !output.is_empty());
        self.error_detail()?.damage().filter(|_| !has_output)
    }

    pub(super) fn usage(&self) -> Option<Usage> {
        self.usage
            .as_ref()
            .and_then(|counts| usage(counts, "input_tokens", "output_tokens"))
    }

    pub(super) fn into_output(self) -> Output {
        Output::of(&self.output.unwrap_or_default())
    }
}

impl Output {
    /// Returns whether there is more than calls.
    pub(super) fn says_something(&self) -> bool {
        says_something(&self.content)
    }

    pub(super) fn of(items: &[Value]) -> Self {
        let mut output = Self {
            open_calls: open_calls(items),
            ..Self::default()
        };
        for item in items {
            let is =
                |field: &str, wanted: &str| item.get(field).and_then(Value::as_str) == Some(wanted);
            if is("type", "image_generation_call") {
                output.content.extend(generated_image(item));
                continue;
            }
            if is_answer(item) {
                answer_made(&mut output.content, item);
                continue;
            }
            if !is("type", "message") {
                let call = call_of(item).map(|call| MadeCall::from(&call));
                let tool_call = call.or_else(|| hosted_call(item));
                let part = tool_call.map(|tool_call| ContentPart::ToolCall { tool_call });
                output.content.extend(part);
                output.unread.extend(kind(item));
                continue;
            }
            if item.get("role").is_some() && !is("role", "assistant") {
                continue;
            }
            output.message_id = item.get("id").and_then(Value::as_str).map(str::to_owned);
            let parts = item
                .get("content")
                .and_then(Value::as_array)
                .into_iter()
                .flatten();
            let phase = item
                .get("phase")
                .and_then(|phase| phase.as_str()?.parse().ok());
            let mut message = Vec::new();
            for it in parts {
                match part(it, phase) {
                    Some(part) if part.size() > 0 => message.push(part),
                    Some(_) => {}
                    None => output.unread.extend(kind(it)),
                }
            }
            append_messages(&mut output.content, message);
        }
        output
    }
}

fn kind(object: &Value) -> Option<String> {
    object.get("type")?.as_str().map(str::to_owned)
}

fn part(part: &Value, phase: Option<Phase>) -> Option<ContentPart> {
    let text = |field: &str| part.get(field).and_then(Value::as_str).map(str::to_owned);
    match part.get("type").and_then(Value::as_str)? {
        "output_text" => text("text").map(|text| ContentPart::Text {
            text,
            annotations: annotations(part.get("annotations")),
            message: 0,
            phase,
        }),
        "refusal" => text("refusal").map(ContentPart::refusal),
        _ => None,
    }
}

/// Longest URL of a generated picture.
const MAX_PICTURE_URL: usize = 8 * 1024;

/// Returns a picture that the model made, without the picture itself, which has megabytes. Most
/// servers write it as base64 where others write its URL.
fn generated_image(item: &Value) -> Option<ContentPart> {
    let id = item.get("id")?.as_str()?.to_owned();
    let result = item.get("result").and_then(Value::as_str);
    let url = result
        .filter(|result| result.starts_with("https://") || result.starts_with("http://"))
        .filter(|url| url.len() <= MAX_PICTURE_URL)
        .map(str::to_owned);
    let is_made = result.is_some_and(|result| !result.is_empty());
    let generated_image = GeneratedImage { id, url };
    is_made.then_some(ContentPart::GeneratedImage { generated_image })
}

/// Returns the call, if the item is one that the server answers itself.
fn hosted_call(item: &Value) -> Option<MadeCall> {
    let text = |field: &str| match item.get(field)? {
        Value::String(text) => Some(kept(text)),
        Value::Null => None,
        other => Some(kept(&other.to_string())),
    };
    let wire_type = item.get("type")?.as_str()?;
    let kind = wire_type.strip_suffix("_call").filter(|kind| {
        kind.len() <= 64 && kind.bytes().all(|it| it.is_ascii_lowercase() || it == b'_')
    })?;
    Some(MadeCall {
        id: text("id")?,
        kind: kind.to_owned(),
        name: text("name").unwrap_or_default(),
        arguments: ["arguments", "action", "queries", "code", "input"]
            .into_iter()
            .find_map(text)
            .unwrap_or_default(),
        output: ["output", "outputs", "results", "error"]
            .into_iter()
            .find_map(text),
    })
}

/// Gives a call of the content the output that the item holds.
fn answer_made(content: &mut [ContentPart], item: &Value) {
    let id = item.get("call_id").or(item.get("approval_request_id"));
    let Some(id) = id.and_then(Value::as_str) else {
        return;
    };
    let answer = match (
        item.get("approve").and_then(Value::as_bool),
        item.get("output"),
    ) {
        (Some(approve), _) => {
            let reason = item.get("reason").and_then(Value::as_str);
            let reason = reason.map(str::to_owned);
            CallAnswer::Approval { approve, reason }
        }
        (None, Some(Value::String(text))) => CallAnswer::text(text),
        (None, Some(output)) => match serde_json::from_value(output.clone()) {
            Ok(output) => CallAnswer::Output {
                output,
                acknowledged_safety_checks: Vec::new(),
            },
            Err(_) => CallAnswer::text("[an output of another form]"),
        },
        (None, None) => return,
    };
    let output = ToolOutput {
        tool_call_id: id.to_owned(),
        kind: ToolCallType::Function,
        answer,
    };
    answer_calls(content, &[output]);
}

/// Returns the known parts of a message, of the user or of the assistant.
pub(super) fn said(item: &Value) -> Vec<ContentPart> {
    match item.get("content") {
        Some(Value::String(text)) => vec![ContentPart::text(text)],
        Some(Value::Array(parts)) => parts
            .iter()
            .filter_map(|it| part(it, None).or_else(|| input_part_said(it)))
            .collect(),
        _ => Vec::new(),
    }
}

fn input_part_said(part: &Value) -> Option<ContentPart> {
    let text = |field: &str| part.get(field).and_then(Value::as_str).map(str::to_owned);
    match part.get("type").and_then(Value::as_str)? {
        "input_text" | "text" => text("text").map(ContentPart::text),
        "input_image" => {
            let detail = text("detail");
            let by_url = text("image_url").map(|url| ContentPart::ImageUrl {
                image_url: ImageUrl {
                    url,
                    detail: detail.clone(),
                },
            });
            let by_file = || {
                text("file_id").map(|file_id| ContentPart::ImageFile {
                    image_file: ImageFile { file_id, detail },
                })
            };
            by_url.or_else(by_file)
        }
        "input_file" => {
            let file = File {
                file_id: text("file_id"),
                file_url: text("file_url"),
                file_data: text("file_data"),
                filename: text("filename"),
            };
            let has_source = file.sources().next().is_some();
            has_source.then_some(ContentPart::File { file })
        }
        _ => None,
    }
}

/// The types of calls that a client answers, each with the type of the answer and the field that
/// tells what to do.
const CALLS: [(ToolCallType, &str, &str, &str); 7] = [
    (
        ToolCallType::Function,
        "function_call",
        "function_call_output",
        "arguments",
    ),
    (
        ToolCallType::Custom,
        "custom_tool_call",
        "custom_tool_call_output",
        "input",
    ),
    (
        ToolCallType::McpApproval,
        "mcp_approval_request",
        "mcp_approval_response",
        "arguments",
    ),
    (
        ToolCallType::Computer,
        "computer_call",
        "computer_call_output",
        "action",
    ),
    (
        ToolCallType::LocalShell,
        "local_shell_call",
        "local_shell_call_output",
        "action",
    ),
    (
        ToolCallType::Shell,
        "shell_call",
        "shell_call_output",
        "action",
    ),
    (
        ToolCallType::ApplyPatch,
        "apply_patch_call",
        "apply_patch_call_output",
        "operation",
    ),
];

/// The output of a call that nobody answered.
const NO_OUTPUT: &str = r#"{"error":"the call was not answered"}"#;
const NOT_ANSWERED: &str = "the call was not answered";
/// A picture of one pixel: the screenshot of a call that nobody answered.
const NO_SCREENSHOT: &str = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==";

/// Returns the call, if the item is one that a client has to answer.
pub(super) fn call_of(item: &Value) -> Option<ToolCall> {
    let text = |field: &str| item.get(field).and_then(Value::as_str).map(str::to_owned);
    let wire_type = item.get("type")?.as_str()?;
    let (kind, _, _, told_in) = CALLS.into_iter().find(|(_, call, ..)| *call == wire_type)?;
    let id = if kind == ToolCallType::McpApproval {
        "id"
    } else {
        "call_id"
    };
    // A computer may be asked for several actions at once.
    let told = item.get(told_in).or_else(|| item.get("actions"));
    Some(ToolCall {
        id: text(id)?,
        kind,
        name: text("name").unwrap_or_else(|| match kind {
            ToolCallType::Function | ToolCallType::Custom | ToolCallType::McpApproval => {
                String::new()
            }
            // These tools have no names.
            kind => kind.as_str().to_owned(),
        }),
        arguments: match told {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Null) | None => String::new(),
            Some(told) => told.to_string(),
        },
        server_label: text("server_label"),
        pending_safety_checks: item
            .get("pending_safety_checks")
            .and_then(Value::as_array)
            .cloned()
            .unwrap_or_default(),
    })
}

/// Returns the item that answers a call.
pub(super) fn answer_item(output: &ToolOutput) -> Value {
    let answer = CALLS.into_iter().find(|(kind, ..)| *kind == output.kind);
    let wire_type = answer.map_or("function_call_output", |(_, _, answer, _)| answer);
    let id = output.tool_call_id.as_str();
    let (content, checks) = match &output.answer {
        CallAnswer::Approval { approve, reason } => {
            let mut item =
                json!({"type": wire_type, "approval_request_id": id, "approve": approve});
            if let Some(reason) = reason {
                item["reason"] = reason.as_str().into();
            }
            return item;
        }
        CallAnswer::Output {
            output,
            acknowledged_safety_checks,
        } => (output, acknowledged_safety_checks),
    };
    let mut item = json!({"type": wire_type, "call_id": id});
    match output.kind {
        ToolCallType::Computer => {
            item["output"] = screenshot(content);
            if !checks.is_empty() {
                item["acknowledged_safety_checks"] = checks.as_slice().into();
            }
        }
        ToolCallType::Shell => item["output"] = content.as_json().unwrap_or_else(|| json!([])),
        ToolCallType::ApplyPatch => {
            let result = content.as_json().unwrap_or_default();
            for field in ["status", "output"] {
                if !result[field].is_null() {
                    item[field] = result[field].clone();
                }
            }
        }
        _ => item["output"] = json!(content),
    }
    item
}

fn screenshot(content: &OutputContent) -> Value {
    let mut image = json!({"type": "computer_screenshot"});
    if let OutputContent::Parts(parts) = content
        && let [
            OutputPart::InputImage {
                image_url, file_id, ..
            },
        ] = &parts[..]
    {
        for (field, place) in [("image_url", image_url), ("file_id", file_id)] {
            if let Some(place) = place {
                image[field] = place.as_str().into();
            }
        }
    }
    image
}

/// Returns the item that closes a call which nobody answered.
pub(super) fn closing_item(call: &ToolCall) -> Value {
    let answer = match call.kind {
        ToolCallType::Function | ToolCallType::Custom | ToolCallType::LocalShell => {
            CallAnswer::text(NO_OUTPUT)
        }
        ToolCallType::McpApproval => CallAnswer::Approval {
            approve: false,
            reason: Some(NOT_ANSWERED.to_owned()),
        },
        // The server accepts a call with checks only together with them. Nothing was done.
        ToolCallType::Computer => CallAnswer::Output {
            output: OutputContent::Parts(vec![OutputPart::InputImage {
                image_url: Some(NO_SCREENSHOT.to_owned()),
                file_id: None,
                detail: None,
            }]),
            acknowledged_safety_checks: call.pending_safety_checks.clone(),
        },
        ToolCallType::Shell => {
            let outcome = json!({"type": "exit", "exit_code": 1});
            let chunk = json!({"stdout": "", "stderr": NOT_ANSWERED, "outcome": outcome});
            CallAnswer::text(json!([chunk]).to_string())
        }
        ToolCallType::ApplyPatch => {
            CallAnswer::text(json!({"status": "failed", "output": NOT_ANSWERED}).to_string())
        }
    };
    answer_item(&ToolOutput {
        tool_call_id: call.id.clone(),
        kind: call.kind,
        answer,
    })
}

/// Returns the calls that have no answer among `items`, in the order of `items`.
pub(super) fn open_calls(items: &[Value]) -> Vec<ToolCall> {
    let answered = answered_calls(items);
    items
        .iter()
        .filter_map(call_of)
        .filter(|call| !answered.contains(&call.id.as_str()))
        .collect()
}

/// Returns true if the item answers a call.
pub(super) fn is_answer(item: &Value) -> bool {
    let kind = item.get("type").and_then(Value::as_str);
    kind.is_some_and(|kind| CALLS.iter().any(|(_, _, answer, _)| *answer == kind))
}

/// Returns the ids of the calls that have an answer among `items`.
pub(super) fn answered_calls(items: &[Value]) -> Vec<&str> {
    items
        .iter()
        .filter(|item| is_answer(item))
        .filter_map(|item| {
            let id = item.get("call_id").or(item.get("approval_request_id"));
            id?.as_str()
        })
        .collect()
}

/// Returns a user's message as an input item. A single text is a bare string.
pub(super) fn message_item(parts: &[ContentPart]) -> Value {
    let content: Value = match parts {
        [ContentPart::Text { text, .. }] if text.len() <= MAX_TEXT => text.as_str().into(),
        parts => parts.iter().flat_map(input_parts).collect(),
    };
    json!({"type": "message", "role": "user", "content": content})
}

/// Returns the messages of an earlier run as input items. An assistant's message is a bare string,
/// because its parts would need ids that another server gave.
pub(super) fn history_of(message: &Message) -> Vec<Value> {
    if message.role == Role::User {
        return vec![message_item(&message.content)];
    }
    let calls = message.content.iter().filter_map(ContentPart::as_call);
    let numbers: BTreeMap<&str, usize> = calls.enumerate().map(|(n, it)| (&*it.id, n)).collect();
    let items = |parts: &[ContentPart]| {
        let note = match parts {
            [ContentPart::ToolCall { tool_call }] => {
                if let Some(kind) = tool_call.sendable() {
                    let number = numbers.get(&*tool_call.id).copied().unwrap_or_default();
                    // Another id than before: the thread may have the call already.
                    let id = format!("call_{}_{number}", message.id.uuid().simple());
                    return call_items(tool_call, kind, &id);
                }
                tool_call.note()
            }
            _ => String::new(),
        };
        let text: String = parts.iter().filter_map(text_said).collect();
        let text = note + &text;
        if text.is_empty() {
            return Vec::new();
        }
        let content: Value = if text.len() <= MAX_TEXT {
            text.into()
        } else {
            let part = |text| json!({"type": "output_text", "text": text});
            pieces(&text, MAX_TEXT).into_iter().map(part).collect()
        };
        let mut item = json!({"type": "message", "role": "assistant", "content": content});
        if let Some(phase) = parts.iter().find_map(|part| part.origin()?.phase) {
            item["phase"] = phase.as_str().into();
        }
        vec![item]
    };
    messages_of(&message.content).flat_map(items).collect()
}

/// Returns a call and its output as items. No server takes one without the other.
fn call_items(call: &MadeCall, kind: ToolCallType, id: &str) -> Vec<Value> {
    let wire = CALLS.into_iter().find(|(it, ..)| *it == kind);
    let Some((_, asked, answered, told_in)) = wire else {
        return Vec::new();
    };
    let output = call.output.as_deref().unwrap_or(NO_OUTPUT);
    vec![
        json!({"type": asked, "call_id": id, "name": call.name, told_in: call.arguments}),
        json!({"type": answered, "call_id": id, "output": output}),
    ]
}

/// Returns true if the item is a call that the item after it answers.
pub(super) fn is_call_of_history(item: &Value) -> bool {
    let wire_type = item.get("type").and_then(Value::as_str);
    wire_type.is_some_and(|wire_type| CALLS.iter().any(|(_, call, ..)| *call == wire_type))
}

fn text_said(part: &ContentPart) -> Option<&str> {
    match part {
        ContentPart::Text { text, .. } | ContentPart::Refusal { refusal: text, .. } => Some(text),
        _ => None,
    }
}

fn input_parts(part: &ContentPart) -> Vec<Value> {
    let part = match part {
        ContentPart::Text { text, .. } | ContentPart::Refusal { refusal: text, .. } => {
            let part = |text| json!({"type": "input_text", "text": text});
            return pieces(text, MAX_TEXT).into_iter().map(part).collect();
        }
        // Only replies have it, and this is a user's message.
        ContentPart::GeneratedImage { generated_image } => {
            json!({"type": "input_text", "text": generated_image.id})
        }
        ContentPart::ToolCall { tool_call } => {
            json!({"type": "input_text", "text": tool_call.note()})
        }
        ContentPart::ImageUrl { image_url } => json!({
            "type": "input_image", "image_url": image_url.url,
            "detail": image_url.detail.as_deref().unwrap_or("auto"),
        }),
        ContentPart::File { file } => {
            let mut part = json!(file);
            part["type"] = "input_file".into();
            part
        }
        ContentPart::ImageFile { image_file } => json!({
            "type": "input_image", "file_id": image_file.file_id,
            "detail": image_file.detail.as_deref().unwrap_or("auto"),
        }),
    };
    vec![part]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::upstream::mutation::mutated;
    use crate::upstream::wire::{Created, List};

    fn answers() -> Vec<Value> {
        let items = json!([
            {"type": "message", "id": "msg_1", "role": "user", "content": [
                {"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": "u", "detail": "low"}]},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"type": "function_call", "call_id": "call_1", "id": "fc_1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "call_1", "output": "1"},
            {"type": "custom_tool_call", "call_id": "call_2", "name": "h", "input": "x"},
            {"type": "message", "id": "msg_2", "role": "assistant", "status": "completed", "content": [
                {"type": "output_text", "text": "b", "annotations": []}, {"type": "refusal", "refusal": "no"}]},
        ]);
        let response = json!({
            "id": "resp_1", "object": "response", "status": "completed", "output": items,
            "error": {"code": "server_error", "message": "No tool output found for function call call_1."},
            "incomplete_details": {"reason": "max_output_tokens"},
            "usage": {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3},
        });
        let event = json!({"type": "response.completed", "sequence_number": 7, "output_index": 0, "content_index": 0,
                           "response": response, "delta": "x"});
        vec![
            json!({"object": "list", "data": items, "has_more": true}),
            response,
            event,
        ]
    }

    proptest! {
        #[test]
        fn an_answer_that_is_nearly_real_is_read_or_refused(answer in mutated(answers())) {
            let text = answer.to_string();
            let items = |value: &Value| value.as_array().cloned().unwrap_or_default();
            for items in [items(&answer["data"]), items(&answer["output"]), vec![answer.clone()]] {
                let output = Output::of(&items);
                prop_assert!(output.open_calls.len() <= items.len());
                prop_assert!(output.content.iter().map(ContentPart::size).sum::<usize>() <= text.len());
                prop_assert!(answered_calls(&items).len() <= items.len());
                for item in &items {
                    let _ = (said(item), call_of(item).map(|call| closing_item(&call)));
                }
            }
            if let Ok(response) = serde_json::from_str::<ResponseObject>(&text) {
                let _ = (response.damage(), response.usage());
                prop_assert!(response.failure_code().is_none_or(|code| code.len() <= 64));
                let _ = response.into_output();
            }
            if let Ok(head) = serde_json::from_str::<ResponseHead>(&text) {
                let _ = head.run_status();
            }
            if let Ok(envelope) = serde_json::from_str::<Envelope<'_>>(&text) {
                prop_assert!(envelope.response.is_none_or(|raw| raw.get().len() <= text.len()));
            }
            if let Ok(list) = serde_json::from_str::<List<Value>>(&text) {
                let _ = list.next(|item| item["id"].as_str().unwrap_or_default());
            }
            let _ = serde_json::from_str::<Created>(&text).map(Created::into_thread);
        }
    }

    #[test]
    fn content_of_a_message_takes_the_shape_of_input_items() {
        let text = |text: &str| ContentPart::text(text);
        assert_eq!(
            message_item(&[text("a")]),
            json!({"type": "message", "role": "user", "content": "a"})
        );
        let url = ContentPart::ImageUrl {
            image_url: ImageUrl {
                url: "https://i/1.png".to_owned(),
                detail: None,
            },
        };
        let file = ContentPart::ImageFile {
            image_file: ImageFile {
                file_id: "file_1".to_owned(),
                detail: Some("low".to_owned()),
            },
        };
        assert_eq!(
            message_item(&[text("a"), url, file])["content"],
            json!([
                {"type": "input_text", "text": "a"},
                {"type": "input_image", "image_url": "https://i/1.png", "detail": "auto"},
                {"type": "input_image", "file_id": "file_1", "detail": "low"},
            ])
        );
    }

    #[test]
    fn a_call_is_open_until_it_has_an_output_wherever_that_stands() {
        let items = [
            json!({"type": "function_call_output", "call_id": "call_1", "output": "1"}),
            json!({"type": "function_call", "call_id": "call_1", "id": "fc_1", "name": "f", "arguments": "{}"}),
            json!({"type": "function_call", "call_id": "call_2", "id": "fc_2", "name": "g", "arguments": "{}"}),
            json!({"type": "custom_tool_call", "call_id": "call_3", "name": "h", "input": "x"}),
            json!({"type": "function_call", "id": "fc_4"}),
            json!(7),
        ];
        let open = open_calls(&items);
        let ids: Vec<&str> = open.iter().map(|call| call.id.as_str()).collect();
        assert_eq!(ids, ["call_2", "call_3"]);
        assert_eq!(open[1].arguments, "x");
    }

    #[test]
    fn each_type_of_call_is_closed_by_an_answer_of_its_form() {
        let told = |kind: &str, field: &str| {
            let action = json!({"type": "x"});
            json!({"type": kind, "id": "id_1", "call_id": "call_1", "name": "n", field: action})
        };
        let not = "the call was not answered";
        let check = json!({"id": "check_1"});
        let mut computer = told("computer_call", "actions");
        computer["pending_safety_checks"] = json!([check]);
        for (call, closed) in [
            (
                told("function_call", "arguments"),
                json!({"type": "function_call_output", "call_id": "call_1", "output": NO_OUTPUT}),
            ),
            (
                told("custom_tool_call", "input"),
                json!({"type": "custom_tool_call_output", "call_id": "call_1", "output": NO_OUTPUT}),
            ),
            (
                told("mcp_approval_request", "arguments"),
                json!({"type": "mcp_approval_response", "approval_request_id": "id_1", "approve": false, "reason": not}),
            ),
            (
                computer,
                json!({"type": "computer_call_output", "call_id": "call_1",
                "output": {"type": "computer_screenshot", "image_url": NO_SCREENSHOT}, "acknowledged_safety_checks": [check]}),
            ),
            (
                told("local_shell_call", "action"),
                json!({"type": "local_shell_call_output", "call_id": "call_1", "output": NO_OUTPUT}),
            ),
            (
                told("shell_call", "action"),
                json!({"type": "shell_call_output", "call_id": "call_1",
                "output": [{"stdout": "", "stderr": not, "outcome": {"type": "exit", "exit_code": 1}}]}),
            ),
            (
                told("apply_patch_call", "operation"),
                json!({"type": "apply_patch_call_output", "call_id": "call_1", "status": "failed", "output": not}),
            ),
        ] {
            let open = call_of(&call).unwrap();
            assert_eq!(open.arguments, r#"{"type":"x"}"#, "{call}");
            let answer = closing_item(&open);
            assert_eq!(answer, closed);
            assert_eq!(open_calls(&[call, answer]), []);
        }
    }
}

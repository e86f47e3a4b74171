//! The shapes of Conversations + Responses, as far as the gateway reads them. An optional field
//! of another shape counts as absent.

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use crate::domain::{
    ContentPart, File, ImageFile, ImageUrl, Message, Role, RunStatus, ToolCall, Usage,
};
use crate::upstream::classify::{Damage, ErrorDetail};
use crate::upstream::error::UpstreamError;
use crate::upstream::wire::{failure_code, lenient, usage};

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
    #[serde(default, deserialize_with = "lenient")]
    pub(super) output_index: Option<u64>,
    #[serde(default, deserialize_with = "lenient")]
    pub(super) content_index: Option<u64>,
}

/// The fields of a response that are read before it has ended.
#[derive(Debug, Deserialize)]
pub(super) struct ResponseHead {
    pub(super) id: String,
    #[serde(default, deserialize_with = "lenient")]
    status: Option<String>,
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

/// The content of a response, or of a part of a conversation.
#[derive(Debug, Default)]
pub(super) struct Output {
    pub(super) content: Vec<ContentPart>,
    /// The id of the last message.
    pub(super) message_id: Option<String>,
    /// Function calls without an output.
    pub(super) open_calls: Vec<ToolCall>,
}

impl ResponseObject {
    /// Returns the code for which the response failed or is incomplete.
    pub(super) fn failure_code(&self) -> Option<String> {
        failure_code(self.error.as_ref(), self.incomplete_details.as_ref())
    }

    /// Returns the failure, if it may pass and the response called no tool.
    pub(super) fn passing(&self) -> Option<UpstreamError> {
        let called = self.output.iter().flatten().any(|item| {
            !matches!(
                item.get("type").and_then(Value::as_str),
                Some("message" | "reasoning")
            )
        });
        ErrorDetail::from_object(self.error.as_ref()?)
            .passing()
            .filter(|_| !called)
    }

    /// Returns the damage of the conversation, if the response failed for it before it produced
    /// output.
    pub(super) fn damage(&self) -> Option<Damage> {
        let has_output = self
            .output
            .as_ref()
            .is_some_and(|output| !output.is_empty());
        ErrorDetail::from_object(self.error.as_ref()?)
            .damage()
            .filter(|_| !has_output)
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
    pub(super) fn of(items: &[Value]) -> Self {
        let open_calls = open_calls(items)
            .into_iter()
            .map(|open| open.call)
            .collect();
        let mut output = Self {
            open_calls,
            ..Self::default()
        };
        for item in items {
            let is =
                |field: &str, wanted: &str| item.get(field).and_then(Value::as_str) == Some(wanted);
            if !is("type", "message") || (item.get("role").is_some() && !is("role", "assistant")) {
                continue;
            }
            output.message_id = item.get("id").and_then(Value::as_str).map(str::to_owned);
            let parts = item
                .get("content")
                .and_then(Value::as_array)
                .into_iter()
                .flatten();
            output.content.extend(parts.filter_map(part));
        }
        output
    }
}

fn part(part: &Value) -> Option<ContentPart> {
    let text = |field: &str| part.get(field).and_then(Value::as_str).map(str::to_owned);
    match part.get("type").and_then(Value::as_str)? {
        "output_text" => text("text").map(|text| ContentPart::Text { text }),
        "refusal" => text("refusal").map(|refusal| ContentPart::Refusal { refusal }),
        _ => None,
    }
}

/// Returns the known parts of a message, of the user or of the assistant.
pub(super) fn said(item: &Value) -> Vec<ContentPart> {
    match item.get("content") {
        Some(Value::String(text)) => vec![ContentPart::Text { text: text.clone() }],
        Some(Value::Array(parts)) => parts
            .iter()
            .filter_map(|it| part(it).or_else(|| input_part_said(it)))
            .collect(),
        _ => Vec::new(),
    }
}

fn input_part_said(part: &Value) -> Option<ContentPart> {
    let text = |field: &str| part.get(field).and_then(Value::as_str).map(str::to_owned);
    match part.get("type").and_then(Value::as_str)? {
        "input_text" | "text" => text("text").map(|text| ContentPart::Text { text }),
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

/// A call that blocks the conversation until it has an output.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct OpenCall {
    pub(super) call: ToolCall,
    /// The tool is a custom tool, and the output is an item of another type.
    pub(super) custom: bool,
}

impl OpenCall {
    /// Returns the item that closes the call.
    pub(super) fn output(&self, output: &str) -> Value {
        output_item(&self.call.id, output, self.custom)
    }
}

/// Returns the item that answers a call. `custom`: the call is of a custom tool.
pub(super) fn output_item(call: &str, output: &str, custom: bool) -> Value {
    let kind = if custom {
        "custom_tool_call_output"
    } else {
        "function_call_output"
    };
    json!({"type": kind, "call_id": call, "output": output})
}

/// Returns the ids of open calls of custom tools among `items`.
pub(super) fn custom_calls(items: &[Value]) -> Vec<String> {
    open_calls(items)
        .into_iter()
        .filter(|open| open.custom)
        .map(|open| open.call.id)
        .collect()
}

/// Returns true if the item is a call that the client has to answer.
pub(super) fn is_call(item: &Value) -> bool {
    let kind = item.get("type").and_then(Value::as_str);
    matches!(kind, Some("function_call" | "custom_tool_call"))
}

/// Returns the calls that have no output among `items`, in the order of `items`.
pub(super) fn open_calls(items: &[Value]) -> Vec<OpenCall> {
    let text =
        |item: &Value, field: &str| item.get(field).and_then(Value::as_str).map(str::to_owned);
    let answered = answered_calls(items);
    let open = |item: &Value| {
        let (custom, arguments) = match text(item, "type")?.as_str() {
            "function_call" => (false, "arguments"),
            "custom_tool_call" => (true, "input"),
            _ => return None,
        };
        let id = text(item, "call_id").filter(|id| !answered.contains(&id.as_str()))?;
        let name = text(item, "name").unwrap_or_default();
        let arguments = text(item, arguments).unwrap_or_default();
        Some(OpenCall {
            call: ToolCall {
                id,
                name,
                arguments,
            },
            custom,
        })
    };
    items.iter().filter_map(open).collect()
}

/// Returns the ids of the calls that have an output among `items`.
pub(super) fn answered_calls(items: &[Value]) -> Vec<&str> {
    let is_output = |item: &&Value| {
        let kind = item.get("type").and_then(Value::as_str);
        matches!(
            kind,
            Some("function_call_output" | "custom_tool_call_output")
        )
    };
    items
        .iter()
        .filter(is_output)
        .filter_map(|item| item.get("call_id")?.as_str())
        .collect()
}

/// Returns a user's message as an input item. A single text is a bare string.
pub(super) fn message_item(parts: &[ContentPart]) -> Value {
    let content: Value = match parts {
        [ContentPart::Text { text }] => text.as_str().into(),
        parts => parts.iter().map(input_part).collect(),
    };
    json!({"type": "message", "role": "user", "content": content})
}

/// Returns a message of an earlier run as an input item. An assistant's message is a bare string,
/// because its parts would need ids that another server gave.
pub(super) fn history_item(message: &Message) -> Value {
    match message.role {
        Role::User => message_item(&message.content),
        Role::Assistant => {
            let text: String = message
                .content
                .iter()
                .filter_map(|part| match part {
                    ContentPart::Text { text } | ContentPart::Refusal { refusal: text } => {
                        Some(text.as_str())
                    }
                    ContentPart::ImageUrl { .. }
                    | ContentPart::ImageFile { .. }
                    | ContentPart::File { .. } => None,
                })
                .collect();
            json!({"type": "message", "role": "assistant", "content": text})
        }
    }
}

fn input_part(part: &ContentPart) -> Value {
    match part {
        ContentPart::Text { text } | ContentPart::Refusal { refusal: text } => {
            json!({"type": "input_text", "text": text})
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
    }
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
                prop_assert!(custom_calls(&items).len() + answered_calls(&items).len() <= items.len());
                for item in &items {
                    let _ = (said(item), is_call(item));
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
        let text = |text: &str| ContentPart::Text {
            text: text.to_owned(),
        };
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
        assert_eq!(
            open.iter()
                .map(|open| open.call.id.as_str())
                .collect::<Vec<_>>(),
            ["call_2", "call_3"]
        );
        assert_eq!(open[1].call.arguments, "x");
        let outputs: Vec<Value> = open.iter().map(|open| open.output("{}")).collect();
        assert_eq!(
            outputs,
            [
                json!({"type": "function_call_output", "call_id": "call_2", "output": "{}"}),
                json!({"type": "custom_tool_call_output", "call_id": "call_3", "output": "{}"}),
            ]
        );
    }
}

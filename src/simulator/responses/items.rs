//! Items: reading them from requests, and what a sequence of them means for the next turn.

use serde_json::{Value, json};

use crate::simulator::error::ApiError;
use crate::simulator::fields::{Fields, within, wrong_type, wrong_value};
use crate::simulator::plan::Complaint;
use crate::simulator::state::Server;
use crate::simulator::stats::Line;
use crate::simulator::words;

const MAX_TEXT: usize = 10_485_760;

/// What a conversation or a chain amounts to so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Context {
    /// `call_id` of function calls without an output, oldest first.
    pub(super) open_calls: Vec<String>,
    /// User messages.
    pub(super) turns: usize,
    /// Text of the newest user message.
    pub(super) user_text: String,
    /// Outputs of functions since then.
    pub(super) outputs: Vec<String>,
    pub(super) words: u64,
    /// A reasoning item whose successor has not come yet.
    reasoning: Option<String>,
    /// A reasoning item whose successor is missing.
    orphan: Option<String>,
}

impl Context {
    pub(super) fn of<'a>(items: impl IntoIterator<Item = &'a Value>) -> Self {
        let mut context = Self::default();
        items.into_iter().for_each(|item| context.absorb(item));
        context
    }

    /// Takes in the next item.
    pub(super) fn absorb(&mut self, item: &Value) {
        let kind = item["type"].as_str().unwrap_or_default();
        let by_model = match kind {
            "message" => item["role"] == "assistant",
            kind => !kind.ends_with("_output"),
        };
        if let Some(reasoning) = self.reasoning.take().filter(|_| !by_model) {
            self.orphan.get_or_insert(reasoning);
        }
        let id = |name: &str| item[name].as_str().unwrap_or_default().to_owned();
        match kind {
            "message" => {
                let text = text(item);
                self.words += words::count(&text);
                if item["role"] == "user" {
                    self.turns += 1;
                    self.user_text = text;
                    self.outputs.clear();
                }
            }
            "function_call" => self.open_calls.push(id("call_id")),
            "function_call_output" => {
                let call = id("call_id");
                self.open_calls.retain(|open| *open != call);
                self.outputs.push(text(item));
            }
            "reasoning" => self.reasoning = Some(id("id")),
            _ => {}
        }
    }

    /// Takes in the input of a new turn, or says why the turn cannot be.
    pub(super) fn accept(&mut self, input: &[Value]) -> Result<(), ApiError> {
        for item in input {
            if item["type"] == "function_call_output" {
                let call = item["call_id"].as_str().unwrap_or_default();
                if !self.open_calls.iter().any(|open| open == call) {
                    return Err(bad_input(format!(
                        "No tool call found for function call output with call_id {call}."
                    )));
                }
            }
            self.absorb(item);
        }
        if !self.open_calls.is_empty() {
            return Err(bad_input(self.complaint(Complaint::OpenCall)));
        }
        if self.orphan.is_some() || self.reasoning.is_some() {
            return Err(bad_input(self.complaint(Complaint::Reasoning)));
        }
        Ok(())
    }

    /// The words for what is wrong, or would be.
    pub(super) fn complaint(&self, complaint: Complaint) -> String {
        match complaint {
            Complaint::OpenCall => {
                let call = self.open_calls.first().map_or("call_0", String::as_str);
                format!("No tool output found for function call {call}.")
            }
            Complaint::Reasoning => {
                let id = self.orphan.as_ref().or(self.reasoning.as_ref()).map_or("rs_0", String::as_str);
                format!("Item '{id}' of type 'reasoning' was provided without its required following item.")
            }
        }
    }
}

/// The input of a response: a text, or items at `path`.
pub(super) fn read_input(server: &Server, input: Value, path: &str) -> Result<Vec<Value>, ApiError> {
    match input {
        Value::String(text) => {
            within(path, &text, MAX_TEXT)?;
            Ok(vec![message(&server.id("msg"), "user", &[json!({"type": "input_text", "text": text})])])
        }
        Value::Array(list) => read_items(server, list, path),
        other => Err(wrong_type(path, "a string or an array", &other)),
    }
}

/// The items of an array at `path`, in the shape in which they are stored.
pub(super) fn read_items(server: &Server, list: Vec<Value>, path: &str) -> Result<Vec<Value>, ApiError> {
    let numbered = list.into_iter().enumerate();
    let items = numbered.map(|(n, item)| read_item(server, item, format!("{path}[{n}]")));
    let items: Vec<Value> = items.collect::<Result<_, _>>()?;
    for (n, item) in items.iter().enumerate() {
        if items[..n].iter().any(|other| id(other) == id(item)) {
            return Err(duplicate(id(item)));
        }
    }
    Ok(items)
}

/// The ids that a client gave to the items of an input. Others are new, and need not be searched for.
pub(super) fn given_ids(input: &Value) -> Vec<String> {
    let items = input.as_array().map(Vec::as_slice).unwrap_or_default();
    items.iter().map(|item| id(item).to_owned()).filter(|id| !id.is_empty()).collect()
}

/// Refuses ids that are there already.
pub(super) fn refuse_duplicates(ids: &[String], present: &[Value]) -> Result<(), ApiError> {
    for given in ids {
        if present.iter().any(|item| id(item) == given) {
            return Err(duplicate(given));
        }
    }
    Ok(())
}

fn duplicate(id: &str) -> ApiError {
    bad_input(format!(
        "Duplicate item found with id {id}. Remove duplicate items from your input and try again."
    ))
}

fn read_item(server: &Server, item: Value, at: String) -> Result<Value, ApiError> {
    let Some(map) = item.as_object() else { return Err(wrong_type(&at, "an object", &item)) };
    let kind = map.get("type").and_then(Value::as_str).unwrap_or("message").to_owned();
    match kind.as_str() {
        "message" => read_message(server, item, at),
        "function_call" => {
            let known =
                ["type", "id", "call_id", "name", "namespace", "arguments", "status", "created_by", "caller"];
            let mut fields = Fields::of_value(item, at, &known)?;
            Ok(json!({
                "type": kind,
                "id": fields.text("id")?.unwrap_or_else(|| server.id("fc")),
                "call_id": fields.needed_text("call_id")?,
                "name": fields.needed_text("name")?,
                "arguments": fields.needed_text("arguments")?,
                "status": fields.text("status")?.unwrap_or_else(|| "completed".to_owned()),
            }))
        }
        "function_call_output" => {
            let known =
                ["type", "id", "call_id", "name", "namespace", "output", "status", "created_by", "caller"];
            let mut fields = Fields::of_value(item, at, &known)?;
            let call = fields.needed_text("call_id")?;
            within(&fields.path("call_id"), &call, 64)?;
            let path = fields.path("output");
            let output = fields.needed("output")?;
            match &output {
                Value::String(text) => within(&path, text, MAX_TEXT)?,
                Value::Array(_) => {}
                other => return Err(wrong_type(&path, "a string or an array", other)),
            }
            Ok(json!({
                "type": kind,
                "id": fields.text("id")?.unwrap_or_else(|| server.id("fco")),
                "call_id": call,
                "output": output,
                "status": fields.text("status")?.unwrap_or_else(|| "completed".to_owned()),
            }))
        }
        "item_reference" => {
            let mut fields = Fields::of_value(item, at, &["type", "id"])?;
            let id = fields.needed_text("id")?;
            Err(ApiError::not_found(format!("Item with id '{id}' not found.")))
        }
        // Kinds that only the model or its tools make: passed through as they are.
        _ => {
            let mut item = item;
            if !item["id"].is_string() {
                item["id"] = server.id("item").into();
            }
            Ok(item)
        }
    }
}

fn read_message(server: &Server, item: Value, at: String) -> Result<Value, ApiError> {
    let mut fields = Fields::of_value(item, at, &["type", "id", "role", "content", "status", "phase"])?;
    let role = fields.needed_text("role")?;
    if !["user", "assistant", "system", "developer"].contains(&role.as_str()) {
        return Err(wrong_value(
            &fields.path("role"),
            &role,
            "'user', 'assistant', 'system' and 'developer'",
        ));
    }
    let path = fields.path("content");
    let content = match fields.needed("content")? {
        Value::String(text) => {
            within(&path, &text, MAX_TEXT)?;
            let part = if role == "assistant" {
                json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
            } else {
                json!({"type": "input_text", "text": text})
            };
            vec![part]
        }
        Value::Array(parts) => {
            for (n, part) in parts.iter().enumerate() {
                let kind = part["type"].as_str().unwrap_or_default();
                if !["input_text", "input_image", "input_file", "output_text", "refusal"].contains(&kind) {
                    let known = "'input_text', 'input_image', 'input_file', 'output_text' and 'refusal'";
                    return Err(wrong_value(&format!("{path}[{n}].type"), kind, known));
                }
                within(&format!("{path}[{n}].text"), part["text"].as_str().unwrap_or_default(), MAX_TEXT)?;
            }
            parts
        }
        other => return Err(wrong_type(&path, "a string or an array", &other)),
    };
    let id = fields.text("id")?.unwrap_or_else(|| server.id("msg"));
    Ok(message(&id, &role, &content))
}

/// A completed message item.
fn message(id: &str, role: &str, content: &[Value]) -> Value {
    json!({"type": "message", "id": id, "status": "completed", "role": role, "content": content})
}

pub(super) fn id(item: &Value) -> &str {
    item["id"].as_str().unwrap_or_default()
}

/// Role and text of a message item; `None` for other kinds. What an assistant says is the same whether it comes in one
/// message or in several.
pub(super) fn line(item: &Value) -> Option<Line> {
    let role = item["role"].as_str().filter(|_| item["type"] == "message")?;
    let text = if role == "assistant" { joined(item, "") } else { text(item) };
    Some((role.to_owned(), text))
}

/// The text of a message or of a function's output.
pub(super) fn text(item: &Value) -> String {
    joined(item, " ")
}

fn joined(item: &Value, between: &str) -> String {
    let content = if item["content"].is_null() { &item["output"] } else { &item["content"] };
    match content {
        Value::String(text) => text.clone(),
        Value::Array(parts) => {
            let texts =
                parts.iter().filter_map(|part| part["text"].as_str().or_else(|| part["refusal"].as_str()));
            texts.collect::<Vec<_>>().join(between)
        }
        _ => String::new(),
    }
}

fn bad_input(text: String) -> ApiError {
    ApiError::invalid(text).param("input")
}

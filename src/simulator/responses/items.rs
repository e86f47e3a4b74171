//! Reads items from requests.

use serde_json::{Value, json};

use crate::simulator::state::Server;
use crate::simulator::state::items::{bad_input, id};
use crate::simulator::wire::error::ApiError;
use crate::simulator::wire::fields::{Fields, within, wrong_type, wrong_value};

const MAX_TEXT: usize = 10_485_760;

/// Reads the input of a response: a text, or items at `path`.
pub(super) fn read_input(
    server: &Server,
    input: Value,
    path: &str,
) -> Result<Vec<Value>, ApiError> {
    match input {
        Value::String(text) => {
            within(path, &text, MAX_TEXT)?;
            Ok(vec![message(
                &server.id("msg"),
                "user",
                &[json!({"type": "input_text", "text": text})],
            )])
        }
        Value::Array(list) => read_items(server, list, path),
        other => Err(wrong_type(path, "a string or an array", &other)),
    }
}

/// Reads the items of an array at `path`, and returns them in the stored shape.
pub(super) fn read_items(
    server: &Server,
    list: Vec<Value>,
    path: &str,
) -> Result<Vec<Value>, ApiError> {
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

/// Returns the ids that a client gave to items of an input. Generated ids are new and need no
/// check.
pub(super) fn given_ids(input: &Value) -> Vec<String> {
    let items = input.as_array().map(Vec::as_slice).unwrap_or_default();
    items
        .iter()
        .map(|item| id(item).to_owned())
        .filter(|id| !id.is_empty())
        .collect()
}

/// Refuses ids that exist already.
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
    let Some(map) = item.as_object() else {
        return Err(wrong_type(&at, "an object", &item));
    };
    let kind = map
        .get("type")
        .and_then(Value::as_str)
        .unwrap_or("message")
        .to_owned();
    match kind.as_str() {
        "message" => read_message(server, item, at),
        "function_call" => {
            let known = [
                "type",
                "id",
                "call_id",
                "name",
                "namespace",
                "arguments",
                "status",
                "created_by",
                "caller",
            ];
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
            let known = [
                "type",
                "id",
                "call_id",
                "name",
                "namespace",
                "output",
                "status",
                "created_by",
                "caller",
            ];
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
        "custom_tool_call_output"
        | "local_shell_call_output"
        | "computer_call_output"
        | "shell_call_output"
        | "apply_patch_call_output" => read_output(server, item, at, &kind),
        "mcp_approval_response" => {
            let known = ["type", "id", "approval_request_id", "approve", "reason"];
            let mut fields = Fields::of_value(item, at, &known)?;
            let approve = fields.flag("approve")?;
            Ok(json!({
                "type": kind,
                "id": fields.text("id")?.unwrap_or_else(|| server.id("mcpa")),
                "approval_request_id": fields.needed_text("approval_request_id")?,
                "approve": approve.ok_or_else(|| fields.missing("approve"))?,
                "reason": fields.text("reason")?,
            }))
        }
        "item_reference" => {
            let mut fields = Fields::of_value(item, at, &["type", "id"])?;
            let id = fields.needed_text("id")?;
            Err(ApiError::not_found(format!(
                "Item with id '{id}' not found."
            )))
        }
        // Kinds that only the model or its tools create are stored unchanged.
        _ => {
            let mut item = item;
            if !item["id"].is_string() {
                item["id"] = server.id("item").into();
            }
            Ok(item)
        }
    }
}

/// Reads the output of a call other than a function's.
fn read_output(server: &Server, item: Value, at: String, kind: &str) -> Result<Value, ApiError> {
    let more: &[&str] = match kind {
        "computer_call_output" => &["acknowledged_safety_checks"],
        "shell_call_output" => &["max_output_length"],
        _ => &[],
    };
    let known = [&["type", "id", "call_id", "output", "status"], more].concat();
    let mut fields = Fields::of_value(item, at, &known)?;
    let mut read = json!({"type": kind});
    read["id"] = fields
        .text("id")?
        .unwrap_or_else(|| server.id("out"))
        .into();
    let call = fields.needed_text("call_id")?;
    within(&fields.path("call_id"), &call, 64)?;
    read["call_id"] = call.into();
    for field in more {
        if let Some(value) = fields.any(field) {
            read[*field] = value;
        }
    }
    if kind == "apply_patch_call_output" {
        let status = fields.needed_text("status")?;
        if status != "completed" && status != "failed" {
            let path = fields.path("status");
            return Err(wrong_value(&path, &status, "'completed' and 'failed'"));
        }
        read["status"] = status.into();
        read["output"] = fields.text("output")?.into();
        return Ok(read);
    }
    let path = fields.path("output");
    let output = fields.needed("output")?;
    let (is_right, wanted) = match kind {
        "custom_tool_call_output" => (
            output.is_string() || output.is_array(),
            "a string or an array",
        ),
        "computer_call_output" => (
            output["type"] == "computer_screenshot"
                && output["image_url"].is_string() != output["file_id"].is_string(),
            "a screenshot",
        ),
        "shell_call_output" => (
            output.as_array().is_some_and(|chunks| {
                chunks.iter().all(|chunk| {
                    chunk["stdout"].is_string()
                        && chunk["stderr"].is_string()
                        && chunk["outcome"]["type"].is_string()
                })
            }),
            "an array of outputs",
        ),
        _ => (output.is_string(), "a string"),
    };
    if !is_right {
        return Err(wrong_type(&path, wanted, &output));
    }
    read["output"] = output;
    Ok(read)
}

fn read_message(server: &Server, item: Value, at: String) -> Result<Value, ApiError> {
    let mut fields = Fields::of_value(
        item,
        at,
        &["type", "id", "role", "content", "status", "phase"],
    )?;
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
                if ![
                    "input_text",
                    "input_image",
                    "input_file",
                    "output_text",
                    "refusal",
                ]
                .contains(&kind)
                {
                    let known =
                        "'input_text', 'input_image', 'input_file', 'output_text' and 'refusal'";
                    return Err(wrong_value(&format!("{path}[{n}].type"), kind, known));
                }
                within(
                    &format!("{path}[{n}].text"),
                    part["text"].as_str().unwrap_or_default(),
                    MAX_TEXT,
                )?;
            }
            parts
        }
        other => return Err(wrong_type(&path, "a string or an array", &other)),
    };
    let id = fields.text("id")?.unwrap_or_else(|| server.id("msg"));
    Ok(message(&id, &role, &content))
}

/// Returns a completed message item.
fn message(id: &str, role: &str, content: &[Value]) -> Value {
    json!({"type": "message", "id": id, "status": "completed", "role": role, "content": content})
}

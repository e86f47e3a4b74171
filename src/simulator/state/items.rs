//! Stored items: their text, and what a sequence of them means for the next response.

use serde_json::Value;

use crate::simulator::behaviour::plan::{Complaint, Poison};
use crate::simulator::behaviour::words;
use crate::simulator::state::stats::Line;
use crate::simulator::wire::error::ApiError;

/// The state of a conversation or chain so far.
#[derive(Clone, Debug, Default)]
pub(in crate::simulator) struct Context {
    /// Calls without an answer, oldest first.
    open_calls: Vec<OpenCall>,
    /// Number of user messages.
    pub(in crate::simulator) turns: usize,
    /// Text of the newest user message.
    pub(in crate::simulator) user_text: String,
    /// Answers to calls since the newest user message.
    pub(in crate::simulator) outputs: Vec<String>,
    pub(in crate::simulator) words: u64,
    /// A reasoning item whose successor has not come yet.
    reasoning: Option<String>,
    /// A reasoning item whose successor is missing.
    orphan: Option<String>,
    /// What the newest messages of the user are refused for once they are history.
    new_poison: Option<Poison>,
    /// What the history is refused for.
    poison: Option<Poison>,
}

impl Context {
    pub(in crate::simulator) fn of<'a>(items: impl IntoIterator<Item = &'a Value>) -> Self {
        let mut context = Self::default();
        items.into_iter().for_each(|item| context.absorb(item));
        context
    }

    /// Adds the next item.
    pub(in crate::simulator) fn absorb(&mut self, item: &Value) {
        let kind = item["type"].as_str().unwrap_or_default();
        let by_model = match kind {
            "message" => item["role"] == "assistant",
            kind => !is_answer(kind),
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
                    let poison = Poison::of_text(&text);
                    self.new_poison = poison.or(self.new_poison.take());
                    self.user_text = text;
                    self.outputs.clear();
                } else if let Some(poison) = self.new_poison.take() {
                    self.poison.get_or_insert(poison);
                }
            }
            "mcp_approval_request" => self.open_calls.push(OpenCall::new(kind, id("id"))),
            kind if CALLS.contains(&kind) => {
                self.open_calls.push(OpenCall::new(kind, id("call_id")));
            }
            kind if is_answer(kind) => {
                let call = answered(item).to_owned();
                self.open_calls.retain(|open| open.id != call);
                self.outputs.push(text(item));
            }
            "reasoning" => self.reasoning = Some(id("id")),
            _ => {}
        }
    }

    /// Adds the input of a new response, or returns why the response cannot be made.
    pub(in crate::simulator) fn accept(&mut self, input: &[Value]) -> Result<(), ApiError> {
        for item in input {
            let kind = item["type"].as_str().unwrap_or_default();
            if is_answer(kind) {
                let call = answered(item);
                let open = self
                    .open_calls
                    .iter()
                    .find(|open| open.id == call && open.answer() == kind);
                let Some(open) = open else {
                    let what = kind
                        .replace('_', " ")
                        .replace("tool call output", "call output");
                    return Err(bad_input(format!(
                        "No tool call found for {what} with call_id {call}."
                    )));
                };
                let checks = &item["acknowledged_safety_checks"];
                if open.kind == "computer_call" && !checks.is_array() {
                    return Err(bad_input(format!(
                        "Computer call {call} has pending safety checks that were not acknowledged."
                    )));
                }
            }
            self.absorb(item);
        }
        if let Some(poison) = &self.poison {
            return Err(poison.refusal());
        }
        if !self.open_calls.is_empty() {
            return Err(bad_input(self.complaint(Complaint::OpenCall)));
        }
        if self.orphan.is_some() || self.reasoning.is_some() {
            return Err(bad_input(self.complaint(Complaint::Reasoning)));
        }
        Ok(())
    }

    /// Returns the words of a complaint about the damage, or about damage that does not exist.
    pub(in crate::simulator) fn complaint(&self, complaint: Complaint) -> String {
        match complaint {
            Complaint::OpenCall => {
                let call = self.open_calls.first();
                let id = call.map_or("call_0", |call| &call.id);
                match call.map_or("function_call", |call| call.kind) {
                    "mcp_approval_request" => {
                        format!("The following MCP approval requests do not have an approval: {id}")
                    }
                    kind => format!("No tool output found for {} {id}.", kind.replace('_', " ")),
                }
            }
            Complaint::Reasoning => {
                let id = self
                    .orphan
                    .as_ref()
                    .or(self.reasoning.as_ref())
                    .map_or("rs_0", String::as_str);
                format!(
                    "Item '{id}' of type 'reasoning' was provided without its required following item."
                )
            }
        }
    }
}

/// The types of items that are calls of the client's tools.
const CALLS: [&str; 7] = [
    "function_call",
    "custom_tool_call",
    "mcp_approval_request",
    "computer_call",
    "local_shell_call",
    "shell_call",
    "apply_patch_call",
];

/// A call that waits for its answer.
#[derive(Clone, Debug)]
struct OpenCall {
    kind: &'static str,
    id: String,
}

impl OpenCall {
    fn new(kind: &str, id: String) -> Self {
        let kind = CALLS.into_iter().find(|known| *known == kind);
        Self {
            kind: kind.unwrap_or("function_call"),
            id,
        }
    }

    /// Returns the type of the item that answers the call.
    fn answer(&self) -> String {
        match self.kind {
            "mcp_approval_request" => "mcp_approval_response".to_owned(),
            kind => format!("{kind}_output"),
        }
    }
}

fn is_answer(kind: &str) -> bool {
    kind.ends_with("_output") || kind == "mcp_approval_response"
}

/// Returns the id of the call that the item answers; empty if it answers none.
pub(in crate::simulator) fn answered(item: &Value) -> &str {
    let id = match item["type"].as_str() {
        Some("mcp_approval_response") => &item["approval_request_id"],
        Some(kind) if is_answer(kind) => &item["call_id"],
        _ => &Value::Null,
    };
    id.as_str().unwrap_or_default()
}

/// Returns the item's id; empty if it has none.
pub(in crate::simulator) fn id(item: &Value) -> &str {
    item["id"].as_str().unwrap_or_default()
}

/// Returns role and text of a message item; `None` for other kinds. The text of an assistant is
/// the same in one message or in several.
pub(in crate::simulator) fn line(item: &Value) -> Option<Line> {
    let role = item["role"]
        .as_str()
        .filter(|_| item["type"] == "message")?;
    let text = if role == "assistant" {
        joined(item, "")
    } else {
        text(item)
    };
    Some((role.to_owned(), text))
}

/// Returns the text of a message or of an answer to a call.
pub(in crate::simulator) fn text(item: &Value) -> String {
    match item["type"].as_str() {
        Some("mcp_approval_response") if item["approve"] == true => "approved".to_owned(),
        Some("mcp_approval_response") => "declined".to_owned(),
        Some("computer_call_output") => "a screenshot".to_owned(),
        Some("shell_call_output") => item["output"][0]["stdout"]
            .as_str()
            .unwrap_or_default()
            .to_owned(),
        _ => joined(item, " "),
    }
}

fn joined(item: &Value, between: &str) -> String {
    let content = if item["content"].is_null() {
        &item["output"]
    } else {
        &item["content"]
    };
    match content {
        Value::String(text) => text.clone(),
        Value::Array(parts) => {
            let texts = parts
                .iter()
                .filter_map(|part| part["text"].as_str().or_else(|| part["refusal"].as_str()));
            texts.collect::<Vec<_>>().join(between)
        }
        _ => String::new(),
    }
}

/// Returns the refusal of an input.
pub(in crate::simulator) fn bad_input(text: String) -> ApiError {
    ApiError::invalid(text).param("input")
}

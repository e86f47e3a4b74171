//! Stored items: their text, and what a sequence of them means for the next response.

use serde_json::Value;

use crate::simulator::behaviour::plan::Complaint;
use crate::simulator::behaviour::words;
use crate::simulator::state::stats::Line;
use crate::simulator::wire::error::ApiError;

/// The state of a conversation or chain so far.
#[derive(Clone, Debug, Default)]
pub(in crate::simulator) struct Context {
    /// `call_id` of function calls without an output, oldest first.
    pub(in crate::simulator) open_calls: Vec<String>,
    /// Number of user messages.
    pub(in crate::simulator) turns: usize,
    /// Text of the newest user message.
    pub(in crate::simulator) user_text: String,
    /// Outputs of functions since the newest user message.
    pub(in crate::simulator) outputs: Vec<String>,
    pub(in crate::simulator) words: u64,
    /// A reasoning item whose successor has not come yet.
    reasoning: Option<String>,
    /// A reasoning item whose successor is missing.
    orphan: Option<String>,
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

    /// Adds the input of a new response, or returns why the response cannot be made.
    pub(in crate::simulator) fn accept(&mut self, input: &[Value]) -> Result<(), ApiError> {
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

    /// Returns the words of a complaint about the damage, or about damage that does not exist.
    pub(in crate::simulator) fn complaint(&self, complaint: Complaint) -> String {
        match complaint {
            Complaint::OpenCall => {
                let call = self.open_calls.first().map_or("call_0", String::as_str);
                format!("No tool output found for function call {call}.")
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

/// Returns the text of a message or of a function's output.
pub(in crate::simulator) fn text(item: &Value) -> String {
    joined(item, " ")
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

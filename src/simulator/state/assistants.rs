//! Wire objects of Assistants, and the server's data about them.

use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::simulator::behaviour::plan::{Plan, Poison};
use crate::simulator::behaviour::words;
use crate::simulator::state::stats::{Line, ThreadView, view};
use crate::simulator::state::table::Row;
use crate::simulator::wire::error::ApiError;
use crate::simulator::wire::fields::Metadata;

/// Messages of a thread, as documented. Beyond it the oldest ones are dropped.
const MAX_MESSAGES: usize = 100_000;
/// Runs that a thread lists.
const MAX_RUNS: usize = 10_000;

#[derive(Debug, Serialize)]
pub(in crate::simulator) struct Thread {
    pub(in crate::simulator) id: String,
    pub(in crate::simulator) object: &'static str,
    pub(in crate::simulator) created_at: i64,
    pub(in crate::simulator) metadata: Metadata,
    pub(in crate::simulator) tool_resources: Value,
    #[serde(skip)]
    pub(in crate::simulator) messages: Vec<Message>,
    /// Ids, oldest first.
    #[serde(skip)]
    pub(in crate::simulator) runs: Vec<String>,
    /// Ids of the runs that have not ended.
    #[serde(skip)]
    pub(in crate::simulator) active: Vec<String>,
    /// User messages that were added and not deleted.
    #[serde(skip)]
    pub(in crate::simulator) turns: usize,
    /// Words of all messages that were added and not deleted.
    #[serde(skip)]
    pub(in crate::simulator) words: u64,
}

impl Thread {
    pub(in crate::simulator) fn new(
        id: String,
        created_at: i64,
        metadata: Metadata,
        tool_resources: Option<Value>,
    ) -> Self {
        Self {
            id,
            object: "thread",
            created_at,
            metadata,
            tool_resources: tool_resources.unwrap_or_else(|| json!({})),
            messages: Vec::new(),
            runs: Vec::new(),
            active: Vec::new(),
            turns: 0,
            words: 0,
        }
    }

    pub(in crate::simulator) fn push(&mut self, message: Message) {
        if message.role == "user" {
            self.turns += 1;
        }
        self.words += words::count(&message.text());
        self.messages.push(message);
        if self.messages.len() > MAX_MESSAGES {
            self.messages.drain(..MAX_MESSAGES / 10);
        }
    }

    /// Removes a message without a trace.
    pub(in crate::simulator) fn remove(&mut self, id: &str) {
        self.messages.retain(|message| message.id != id);
        self.turns = self
            .messages
            .iter()
            .filter(|message| message.role == "user")
            .count();
        self.words = self
            .messages
            .iter()
            .map(|message| words::count(&message.text()))
            .sum();
    }

    /// Refuses a run with these new messages if a message of the history says so.
    pub(in crate::simulator) fn refuse_poisoned(&self, new: &[Message]) -> Result<(), ApiError> {
        let mut asked = None;
        for message in self.messages.iter().chain(new) {
            if message.role == "user" {
                asked = Poison::of_text(&message.text()).or(asked);
            } else if let Some(poison) = asked {
                return Err(poison.refusal());
            }
        }
        Ok(())
    }

    pub(in crate::simulator) fn push_run(&mut self, run: &str) {
        self.runs.push(run.to_owned());
        self.active.push(run.to_owned());
        if self.runs.len() > MAX_RUNS {
            self.runs.drain(..MAX_RUNS / 10);
        }
    }

    /// Returns the message; searches from the newest.
    pub(in crate::simulator) fn message_mut(&mut self, id: &str) -> Option<&mut Message> {
        self.messages
            .iter_mut()
            .rev()
            .find(|message| message.id == id)
    }

    /// Returns the text of the newest user message; empty if there is none.
    pub(in crate::simulator) fn last_user_text(&self) -> String {
        self.messages
            .iter()
            .rev()
            .find(|message| message.role == "user")
            .map(Message::text)
            .unwrap_or_default()
    }

    pub(in crate::simulator) fn lines(&self) -> Vec<Line> {
        self.messages.iter().map(Message::line).collect()
    }

    pub(in crate::simulator) fn view(&self) -> ThreadView {
        view(&self.id, &self.metadata, self.lines(), &self.active, false)
    }
}

impl Row for Thread {
    fn is_busy(&self) -> bool {
        !self.active.is_empty()
    }
}

#[derive(Clone, Debug, Serialize)]
pub(in crate::simulator) struct Message {
    pub(in crate::simulator) id: String,
    pub(in crate::simulator) object: &'static str,
    pub(in crate::simulator) created_at: i64,
    pub(in crate::simulator) thread_id: String,
    pub(in crate::simulator) status: &'static str,
    pub(in crate::simulator) incomplete_details: Option<Value>,
    pub(in crate::simulator) completed_at: Option<i64>,
    pub(in crate::simulator) incomplete_at: Option<i64>,
    pub(in crate::simulator) role: String,
    /// Parts in the shape of answers.
    pub(in crate::simulator) content: Vec<Value>,
    pub(in crate::simulator) assistant_id: Option<String>,
    pub(in crate::simulator) run_id: Option<String>,
    pub(in crate::simulator) attachments: Option<Value>,
    pub(in crate::simulator) metadata: Metadata,
}

impl Message {
    /// Returns the text and refusal parts together.
    pub(in crate::simulator) fn text(&self) -> String {
        match self.texts().as_slice() {
            [text] => (*text).to_owned(),
            texts => texts.join(" ").trim().to_owned(),
        }
    }

    fn texts(&self) -> Vec<&str> {
        let texts = self.content.iter();
        texts
            .map(|part| {
                part["text"]["value"]
                    .as_str()
                    .or(part["refusal"].as_str())
                    .unwrap_or_default()
            })
            .collect()
    }

    /// Returns role and text. The text of an assistant is the same in one message or in several.
    fn line(&self) -> Line {
        let text = if self.role == "assistant" {
            self.texts().concat()
        } else {
            self.text()
        };
        (self.role.clone(), text)
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(in crate::simulator) enum RunStatus {
    Queued,
    InProgress,
    RequiresAction,
    Cancelling,
    Cancelled,
    Failed,
    Completed,
    Incomplete,
    Expired,
}

impl RunStatus {
    pub(in crate::simulator) const fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::InProgress => "in_progress",
            Self::RequiresAction => "requires_action",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
            Self::Completed => "completed",
            Self::Incomplete => "incomplete",
            Self::Expired => "expired",
        }
    }

    pub(in crate::simulator) const fn is_final(self) -> bool {
        !matches!(
            self,
            Self::Queued | Self::InProgress | Self::RequiresAction | Self::Cancelling
        )
    }
}

#[derive(Debug, Serialize)]
pub(in crate::simulator) struct Run {
    pub(in crate::simulator) id: String,
    pub(in crate::simulator) object: &'static str,
    pub(in crate::simulator) created_at: i64,
    pub(in crate::simulator) thread_id: String,
    pub(in crate::simulator) assistant_id: String,
    pub(in crate::simulator) status: RunStatus,
    pub(in crate::simulator) required_action: Option<Value>,
    pub(in crate::simulator) last_error: Option<Value>,
    pub(in crate::simulator) expires_at: Option<i64>,
    pub(in crate::simulator) started_at: Option<i64>,
    pub(in crate::simulator) cancelled_at: Option<i64>,
    pub(in crate::simulator) failed_at: Option<i64>,
    pub(in crate::simulator) completed_at: Option<i64>,
    pub(in crate::simulator) incomplete_details: Option<Value>,
    pub(in crate::simulator) usage: Option<Value>,
    pub(in crate::simulator) metadata: Metadata,
    #[serde(flatten)]
    pub(in crate::simulator) settings: Settings,
    #[serde(skip)]
    pub(in crate::simulator) work: Work,
}

/// Settings that the caller may choose for one run.
#[derive(Clone, Debug, Serialize)]
pub(in crate::simulator) struct Settings {
    pub(in crate::simulator) model: String,
    pub(in crate::simulator) instructions: String,
    pub(in crate::simulator) tools: Vec<Value>,
    pub(in crate::simulator) temperature: f64,
    pub(in crate::simulator) top_p: f64,
    pub(in crate::simulator) max_prompt_tokens: Option<u64>,
    pub(in crate::simulator) max_completion_tokens: Option<u64>,
    pub(in crate::simulator) truncation_strategy: Value,
    pub(in crate::simulator) tool_choice: Value,
    pub(in crate::simulator) parallel_tool_calls: bool,
    pub(in crate::simulator) response_format: Value,
}

/// The server's data about a run.
#[derive(Debug)]
pub(in crate::simulator) struct Work {
    /// The time of expiry.
    pub(in crate::simulator) deadline: Instant,
    /// Cancels the generation of the run.
    pub(in crate::simulator) cancel: CancellationToken,
    /// Cancelled when the run's world ends.
    pub(in crate::simulator) end: CancellationToken,
    pub(in crate::simulator) plan: Plan,
    /// A generation works on the run.
    pub(in crate::simulator) generating: bool,
    /// The run of another client, made by `start_foreign_run`.
    pub(in crate::simulator) foreign: bool,
    pub(in crate::simulator) steps: Vec<Step>,
    /// Ids of the function calls that wait for outputs.
    pub(in crate::simulator) calls: Vec<String>,
    /// The outputs of functions so far.
    pub(in crate::simulator) outputs: Vec<String>,
    /// Tokens generated so far.
    pub(in crate::simulator) tokens: u64,
}

impl Row for Run {
    fn is_busy(&self) -> bool {
        !self.status.is_final()
    }
}

#[derive(Clone, Debug, Serialize)]
#[expect(
    clippy::struct_field_names,
    reason = "`step_details` is its name on the wire"
)]
pub(in crate::simulator) struct Step {
    pub(in crate::simulator) id: String,
    pub(in crate::simulator) object: &'static str,
    pub(in crate::simulator) created_at: i64,
    pub(in crate::simulator) assistant_id: String,
    pub(in crate::simulator) thread_id: String,
    pub(in crate::simulator) run_id: String,
    pub(in crate::simulator) r#type: &'static str,
    pub(in crate::simulator) status: &'static str,
    pub(in crate::simulator) step_details: Value,
    pub(in crate::simulator) last_error: Option<Value>,
    pub(in crate::simulator) expired_at: Option<i64>,
    pub(in crate::simulator) cancelled_at: Option<i64>,
    pub(in crate::simulator) failed_at: Option<i64>,
    pub(in crate::simulator) completed_at: Option<i64>,
    pub(in crate::simulator) metadata: Metadata,
    pub(in crate::simulator) usage: Option<Value>,
}

//! Wire objects of conversations and responses, and the server's data about them.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::simulator::state::items::{self, Context};
use crate::simulator::state::stats::{Line, ThreadView, view};
use crate::simulator::state::table::Row;
use crate::simulator::wire::fields::Metadata;
use crate::simulator::wire::sse::EventLog;

/// Items of a conversation. Beyond it the oldest ones are dropped.
const MAX_ITEMS: usize = 100_000;

#[derive(Debug, Serialize)]
pub(in crate::simulator) struct Conversation {
    pub(in crate::simulator) id: String,
    pub(in crate::simulator) object: &'static str,
    pub(in crate::simulator) created_at: i64,
    pub(in crate::simulator) metadata: Metadata,
    #[serde(skip)]
    pub(in crate::simulator) items: Vec<Value>,
    #[serde(skip)]
    pub(in crate::simulator) context: Context,
    /// Ids of the active responses.
    #[serde(skip)]
    pub(in crate::simulator) active: Vec<String>,
    /// Time until which the lock outlives its response.
    #[serde(skip)]
    pub(in crate::simulator) locked_until: Option<Instant>,
    /// The response of another client, made by `start_foreign_run`.
    #[serde(skip)]
    pub(in crate::simulator) foreign: Option<String>,
    #[serde(skip)]
    pub(in crate::simulator) deleted: bool,
}

impl Conversation {
    pub(in crate::simulator) fn context(&self) -> &Context {
        &self.context
    }

    pub(in crate::simulator) fn items(&self) -> &[Value] {
        &self.items
    }

    pub(in crate::simulator) fn is_deleted(&self) -> bool {
        self.deleted
    }

    pub(in crate::simulator) fn append<'a>(&mut self, items: impl IntoIterator<Item = &'a Value>) {
        for item in items {
            self.context.absorb(item);
            self.items.push(item.clone());
        }
        if self.items.len() > MAX_ITEMS {
            self.items.drain(..MAX_ITEMS / 10);
        }
    }

    pub(in crate::simulator) fn begin(&mut self, response: &str) {
        self.active.push(response.to_owned());
    }

    pub(in crate::simulator) fn end(&mut self, response: &str, locked_until: Option<Instant>) {
        self.active.retain(|active| active != response);
        self.locked_until = locked_until;
    }

    pub(in crate::simulator) fn is_locked(&self) -> bool {
        self.foreign.is_some()
            || !self.active.is_empty()
            || self
                .locked_until
                .is_some_and(|until| until > Instant::now())
    }

    pub(in crate::simulator) fn lines(&self) -> Vec<Line> {
        self.items.iter().filter_map(items::line).collect()
    }

    pub(in crate::simulator) fn view(&self) -> ThreadView {
        view(
            &self.id,
            &self.metadata,
            self.lines(),
            &self.active,
            self.deleted,
        )
    }
}

impl Row for Conversation {
    fn is_busy(&self) -> bool {
        !self.active.is_empty()
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(in crate::simulator) enum ResponseStatus {
    Queued,
    InProgress,
    Completed,
    Incomplete,
    Failed,
    Cancelled,
}

impl ResponseStatus {
    pub(in crate::simulator) const fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::InProgress => "in_progress",
            Self::Completed => "completed",
            Self::Incomplete => "incomplete",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    pub(in crate::simulator) const fn is_final(self) -> bool {
        !matches!(self, Self::Queued | Self::InProgress)
    }
}

#[derive(Clone, Debug, Serialize)]
pub(in crate::simulator) struct Response {
    pub(in crate::simulator) id: String,
    pub(in crate::simulator) object: &'static str,
    pub(in crate::simulator) created_at: i64,
    pub(in crate::simulator) status: ResponseStatus,
    pub(in crate::simulator) completed_at: Option<i64>,
    pub(in crate::simulator) error: Option<Value>,
    pub(in crate::simulator) incomplete_details: Option<Value>,
    pub(in crate::simulator) output: Vec<Value>,
    pub(in crate::simulator) conversation: Option<Value>,
    pub(in crate::simulator) previous_response_id: Option<String>,
    pub(in crate::simulator) background: bool,
    pub(in crate::simulator) store: bool,
    pub(in crate::simulator) usage: Option<Value>,
    pub(in crate::simulator) metadata: Metadata,
    #[serde(flatten)]
    pub(in crate::simulator) settings: Settings,
}

/// Settings that the caller may choose for one response; they are echoed.
#[derive(Clone, Debug, Serialize)]
pub(in crate::simulator) struct Settings {
    pub(in crate::simulator) model: String,
    pub(in crate::simulator) instructions: Option<String>,
    pub(in crate::simulator) tools: Vec<Value>,
    pub(in crate::simulator) tool_choice: Value,
    pub(in crate::simulator) parallel_tool_calls: bool,
    pub(in crate::simulator) temperature: f64,
    pub(in crate::simulator) top_p: f64,
    pub(in crate::simulator) max_output_tokens: Option<u64>,
    pub(in crate::simulator) max_tool_calls: Option<u64>,
    pub(in crate::simulator) truncation: String,
    pub(in crate::simulator) service_tier: String,
    pub(in crate::simulator) reasoning: Value,
    pub(in crate::simulator) text: Value,
}

/// A response that clients can read.
#[derive(Debug)]
pub(in crate::simulator) struct StoredResponse {
    pub(in crate::simulator) response: Response,
    pub(in crate::simulator) input: Vec<Value>,
    /// The context of the chain after it.
    pub(in crate::simulator) context: Context,
    /// The conversation, or the first response of the chain.
    pub(in crate::simulator) lane: String,
    /// The events of a background response that was created with `stream`.
    pub(in crate::simulator) log: Option<Arc<EventLog>>,
    pub(in crate::simulator) cancel: CancellationToken,
    /// A cancel call gets no answer.
    pub(in crate::simulator) stuck_cancel: bool,
}

impl Row for StoredResponse {
    fn is_busy(&self) -> bool {
        !self.response.status.is_final()
    }
}

pub(in crate::simulator) fn usage(read: u64, made: u64, reasoning: u64) -> Value {
    json!({
        "input_tokens": read, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": made, "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": read + made,
    })
}

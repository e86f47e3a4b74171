//! Wire objects and what the server knows beside them.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::items::Context;
use crate::simulator::fields::Metadata;
use crate::simulator::sse::EventLog;
use crate::simulator::state::Row;

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
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::InProgress => "in_progress",
            Self::Completed => "completed",
            Self::Incomplete => "incomplete",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    pub(super) const fn is_final(self) -> bool {
        !matches!(self, Self::Queued | Self::InProgress)
    }
}

#[derive(Clone, Debug, Serialize)]
pub(in crate::simulator) struct Response {
    pub(super) id: String,
    pub(super) object: &'static str,
    pub(super) created_at: i64,
    pub(super) status: ResponseStatus,
    pub(super) completed_at: Option<i64>,
    pub(super) error: Option<Value>,
    pub(super) incomplete_details: Option<Value>,
    pub(super) output: Vec<Value>,
    pub(super) conversation: Option<Value>,
    pub(super) previous_response_id: Option<String>,
    pub(super) background: bool,
    pub(super) store: bool,
    pub(super) usage: Option<Value>,
    pub(super) metadata: Metadata,
    #[serde(flatten)]
    pub(super) settings: Settings,
}

/// What the caller may set for one response; echoed.
#[derive(Clone, Debug, Serialize)]
pub(in crate::simulator) struct Settings {
    pub(super) model: String,
    pub(super) instructions: Option<String>,
    pub(super) tools: Vec<Value>,
    pub(super) tool_choice: Value,
    pub(super) parallel_tool_calls: bool,
    pub(super) temperature: f64,
    pub(super) top_p: f64,
    pub(super) max_output_tokens: Option<u64>,
    pub(super) max_tool_calls: Option<u64>,
    pub(super) truncation: String,
    pub(super) service_tier: String,
    pub(super) reasoning: Value,
    pub(super) text: Value,
}

/// A response that can be read back.
#[derive(Debug)]
pub(in crate::simulator) struct StoredResponse {
    pub(super) response: Response,
    pub(super) input: Vec<Value>,
    /// Where a chain stands after it.
    pub(super) context: Context,
    /// The conversation, or the first response of the chain.
    pub(super) lane: String,
    /// The events of a background response that was created with `stream`.
    pub(super) log: Option<Arc<EventLog>>,
    pub(super) cancel: CancellationToken,
    /// A cancel call has no answer.
    pub(super) stuck_cancel: bool,
}

impl Row for StoredResponse {
    fn is_busy(&self) -> bool {
        !self.response.status.is_final()
    }
}

pub(super) fn usage(read: u64, made: u64, reasoning: u64) -> Value {
    json!({
        "input_tokens": read, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": made, "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": read + made,
    })
}

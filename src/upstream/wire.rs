//! What both protocols' wire types need.

use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use crate::domain::{RunError, RunErrorCode, RunStatus, UpstreamThreadId, Usage};
use crate::upstream::classify::token;
use crate::upstream::error::UpstreamError;

/// A thread or conversation that was made.
#[derive(Debug, Deserialize)]
pub(super) struct Created {
    id: String,
}

impl Created {
    pub(super) fn into_thread(self) -> Result<UpstreamThreadId, UpstreamError> {
        if self.id.is_empty() {
            return Err(UpstreamError::Protocol("a new thread has no id".to_owned()));
        }
        Ok(UpstreamThreadId(self.id))
    }
}

/// A page of a list.
#[derive(Debug, Deserialize)]
pub(super) struct List<T> {
    pub(super) data: Vec<T>,
    #[serde(default, deserialize_with = "lenient")]
    pub(super) has_more: Option<bool>,
}

impl<T> List<T> {
    /// After which element the next page begins; `None`: this is the last one, or its last element has no id.
    pub(super) fn next<'a>(&'a self, id: impl FnOnce(&'a T) -> &'a str) -> Option<String> {
        let last = self.data.last().filter(|_| self.has_more != Some(false))?;
        Some(id(last).to_owned()).filter(|id| !id.is_empty())
    }
}

/// Why a run with this status did not complete: our words and, in brackets, the upstream's code, which has passed
/// [`token`].
pub(super) fn failure(status: RunStatus, code: Option<String>) -> Option<RunError> {
    let what = match status {
        RunStatus::Failed => "the upstream reported that the run failed",
        RunStatus::Incomplete => "the upstream ended the reply before it was whole",
        RunStatus::Cancelled => "the run was cancelled at the upstream",
        RunStatus::Expired => "the run expired at the upstream",
        _ => return None,
    };
    let message = code.map_or_else(|| what.to_owned(), |code| format!("{what} ({code})"));
    Some(RunError {
        code: RunErrorCode::UpstreamFailed,
        message,
    })
}

/// The word that says why a run failed or is incomplete.
pub(super) fn failure_code(
    error: Option<&Map<String, Value>>,
    incomplete_details: Option<&Map<String, Value>>,
) -> Option<String> {
    let code = error.and_then(|error| error.get("code"));
    let reason = || incomplete_details.and_then(|details| details.get("reason"));
    code.or_else(reason)?.as_str().and_then(token)
}

/// The tokens of a run; `None` if what came in or went out is not told.
pub(super) fn usage(counts: &Map<String, Value>, input: &str, output: &str) -> Option<Usage> {
    let count = |name: &str| counts.get(name).and_then(Value::as_u64);
    let (input_tokens, output_tokens) = (count(input)?, count(output)?);
    let total_tokens =
        count("total_tokens").unwrap_or_else(|| input_tokens.saturating_add(output_tokens));
    Some(Usage {
        input_tokens,
        output_tokens,
        total_tokens,
    })
}

/// Reads any value; what does not have the form of `T` counts as absent.
pub(super) fn lenient<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: serde::de::DeserializeOwned,
{
    Ok(serde_json::from_value(Value::deserialize(deserializer)?).ok())
}

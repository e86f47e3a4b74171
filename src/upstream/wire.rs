//! Wire types that both protocols use.

use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use crate::domain::{
    Annotation, RunError, RunErrorCode, RunStatus, UpstreamThreadId, Usage, size_of_annotation,
};
use crate::upstream::classify::{ErrorDetail, run_code_of};
use crate::upstream::error::UpstreamError;
use crate::upstream::error_detail::token;

/// A thread or conversation that was created.
#[derive(Debug, Deserialize)]
pub(super) struct Created {
    id: String,
}

impl Created {
    pub(super) fn into_thread(self) -> Result<UpstreamThreadId, UpstreamError> {
        if self.id.is_empty() {
            return Err(UpstreamError::Protocol(
                "the answer about a new thread has no id".to_owned(),
            ));
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
    /// Returns the cursor of the next page. Returns `None` on the last page, or if its last
    /// element has no id.
    pub(super) fn next<'a>(&'a self, id: impl FnOnce(&'a T) -> &'a str) -> Option<String> {
        let last = self.data.last().filter(|_| self.has_more != Some(false))?;
        Some(id(last).to_owned()).filter(|id| !id.is_empty())
    }
}

/// Returns why a run with this status did not complete: the gateway's own words and, in brackets,
/// the upstream's code, as [`failure_code`] returns it.
pub(super) fn failure(status: RunStatus, code: Option<String>) -> Option<RunError> {
    let what = match status {
        RunStatus::Failed => "the upstream reported that the run failed",
        RunStatus::Incomplete => "the upstream ended the reply before it was whole",
        RunStatus::Cancelled => "the run was cancelled at the upstream",
        RunStatus::Expired => "the run expired at the upstream",
        _ => return None,
    };
    let message = code
        .as_ref()
        .map_or_else(|| what.to_owned(), |code| format!("{what} ({code})"));
    let run_code = code
        .as_deref()
        .filter(|_| status == RunStatus::Failed)
        .and_then(run_code_of);
    Some(RunError {
        upstream_code: code,
        ..RunError::new(run_code.unwrap_or(RunErrorCode::UpstreamFailed), message)
    })
}

/// Splits a text into pieces of at most `max` characters.
pub(super) fn pieces(text: &str, max: usize) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut rest = text;
    // No text has more characters than bytes.
    while rest.len() > max
        && let Some((at, _)) = rest.char_indices().nth(max)
    {
        let (piece, more) = rest.split_at(at);
        pieces.push(piece);
        rest = more;
    }
    pieces.push(rest);
    pieces
}

/// Returns the code for which a run failed or is incomplete.
pub(super) fn failure_code(
    error: Option<&Map<String, Value>>,
    incomplete_details: Option<&Map<String, Value>>,
) -> Option<String> {
    let reason = || token(incomplete_details?.get("reason")?.as_str()?);
    error
        .and_then(|error| ErrorDetail::from_object(error).word())
        .or_else(reason)
}

/// Returns the tokens of a run; `None` if the input or output count is missing. `input` and `output`
/// name the counts.
pub(super) fn usage(counts: &Map<String, Value>, input: &str, output: &str) -> Option<Usage> {
    let count = |name: &str| counts.get(name).and_then(Value::as_u64);
    let detail = |of: &str, name: &str| counts.get(of)?.get(name)?.as_u64();
    let (input_tokens, output_tokens) = (count(input)?, count(output)?);
    let total_tokens =
        count("total_tokens").unwrap_or_else(|| input_tokens.saturating_add(output_tokens));
    let cached = [
        "input_tokens_details",
        "prompt_tokens_details",
        "prompt_token_details",
    ]
    .iter()
    .find_map(|of| detail(of, "cached_tokens"));
    let reasoning = ["output_tokens_details", "completion_tokens_details"]
        .iter()
        .find_map(|of| detail(of, "reasoning_tokens"));
    Some(Usage {
        input_tokens,
        output_tokens,
        total_tokens,
        cached_input_tokens: cached,
        reasoning_tokens: reasoning,
    })
}

/// Most annotations of one text, and most bytes of them as JSON.
const MAX_ANNOTATIONS: usize = 128;
const MAX_ANNOTATION_BYTES: usize = 64 * 1024;

/// Returns the annotations of a text, as many as there is room for.
pub(super) fn annotations(annotations: Option<&Value>) -> Vec<Annotation> {
    let mut room = MAX_ANNOTATION_BYTES;
    annotations
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_object)
        .take(MAX_ANNOTATIONS)
        .take_while(|annotation| {
            let left = room.checked_sub(size_of_annotation(annotation));
            room = left.unwrap_or_default();
            left.is_some()
        })
        .cloned()
        .collect()
}

/// Returns why a run that the upstream completed has no reply. `instead`: the types of what it
/// produced.
pub(super) fn without_reply<'a>(instead: impl IntoIterator<Item = &'a str>) -> RunError {
    const MOST: usize = 5;
    let mut kinds: Vec<String> = Vec::new();
    for kind in instead.into_iter().filter_map(token) {
        if kinds.len() < MOST && !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    let instead = if kinds.is_empty() {
        "no items".to_owned()
    } else {
        format!("only `{}`", kinds.join("`, `"))
    };
    let message =
        format!("the upstream completed the run without a reply; its output has {instead}");
    RunError::new(RunErrorCode::UpstreamFailed, message)
}

/// Deserialises a value of any form. A form other than that of `T` counts as absent.
pub(super) fn lenient<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: serde::de::DeserializeOwned,
{
    Ok(serde_json::from_value(Value::deserialize(deserializer)?).ok())
}

//! What both protocols' wire types need.

use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use super::UpstreamError;
use crate::domain::{UpstreamThreadId, Usage};

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

/// The tokens of a run; `None` if what came in or went out is not told.
pub(super) fn usage(counts: &Map<String, Value>, input: &str, output: &str) -> Option<Usage> {
    let count = |name: &str| counts.get(name).and_then(Value::as_u64);
    let (input_tokens, output_tokens) = (count(input)?, count(output)?);
    let total_tokens = count("total_tokens").unwrap_or_else(|| input_tokens.saturating_add(output_tokens));
    Some(Usage { input_tokens, output_tokens, total_tokens })
}

/// Reads any value; what does not have the form of `T` counts as absent.
pub(super) fn lenient<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: serde::de::DeserializeOwned,
{
    Ok(serde_json::from_value(Value::deserialize(deserializer)?).ok())
}

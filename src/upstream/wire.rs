//! What both protocols' wire types need.

use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::UpstreamError;
use crate::domain::UpstreamThreadId;

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

/// Reads any value; what does not have the form of `T` counts as absent.
pub(super) fn lenient<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: serde::de::DeserializeOwned,
{
    Ok(serde_json::from_value(Value::deserialize(deserializer)?).ok())
}

//! The adapter's type, and the calls that its files share.

use std::time::Duration;

use http::Method;
use serde::de::DeserializeOwned;

use crate::config::UpstreamConfig;
use crate::upstream::client::{Answer, UpstreamClient};
use crate::upstream::error::UpstreamError;
use crate::upstream::rate_limiter::RateLimiter;
use crate::upstream::retrying_client::RetryingClient;

/// An upstream that speaks Assistants v2.
#[derive(Clone, Debug)]
pub struct AssistantsUpstream {
    pub(super) client: UpstreamClient,
    pub(super) lock_window: Duration,
}

impl AssistantsUpstream {
    pub fn new(client: UpstreamClient, config: &UpstreamConfig) -> Self {
        Self {
            client: client.with_header("openai-beta", "assistants=v2"),
            lock_window: config.lock_window,
        }
    }

    pub(super) fn retrying<'a>(&'a self, limiter: Option<&'a RateLimiter>) -> RetryingClient<'a> {
        RetryingClient {
            client: &self.client,
            limiter,
        }
    }

    /// Sends one call without a body, and repeats it while it fails in a way that may pass.
    pub(super) async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &[&str],
        query: &[(&str, &str)],
    ) -> Result<Answer<T>, UpstreamError> {
        self.retrying(None).make(method, path, query).await
    }
}

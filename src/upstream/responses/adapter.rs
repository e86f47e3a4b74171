//! The adapter's type, and the calls that its files share.

use std::time::Duration;

use http::Method;
use serde_json::Value;

use super::stream::StreamDecoder;
use super::stream_resume::resuming;
use crate::config::UpstreamConfig;
use crate::domain::UpstreamRunId;
use crate::upstream::classify::Rejection;
use crate::upstream::client::{SseStream, UpstreamClient};
use crate::upstream::error::UpstreamError;
use crate::upstream::port::EventStream;
use crate::upstream::rate_limiter::RateLimiter;
use crate::upstream::relay::{public, relay};
use crate::upstream::retrying_client::{RetryingClient, is_missing};

/// An upstream that speaks Responses.
#[derive(Clone, Debug)]
pub struct ResponsesUpstream {
    pub(super) client: UpstreamClient,
    /// The server has conversations. If not, each thread is a chain of responses.
    pub(super) conversations: bool,
    pub(super) background: bool,
    pub(super) lock_window: Duration,
}

impl ResponsesUpstream {
    pub fn new(client: UpstreamClient, config: &UpstreamConfig) -> Self {
        Self {
            client,
            conversations: config.conversations,
            background: config.background,
            lock_window: config.lock_window,
        }
    }

    pub(super) fn retrying<'a>(&'a self, limiter: Option<&'a RateLimiter>) -> RetryingClient<'a> {
        RetryingClient {
            client: &self.client,
            limiter,
        }
    }

    /// Sends the request for a response. The stream of a background response survives broken
    /// connections.
    pub(super) async fn open(&self, body: &Value) -> Result<SseStream, Rejection> {
        let events = self
            .client
            .events(Method::POST, &["responses"], &[], Some(body))
            .await?;
        Ok(if self.background {
            resuming(self.client.clone(), events)
        } else {
            events
        })
    }

    /// Decodes the events of a response.
    pub(super) async fn read(&self, events: SseStream) -> Result<EventStream, UpstreamError> {
        let turn = StreamDecoder::new(!self.conversations);
        Ok(public(relay(events, turn, self.client.max_bytes()).await?))
    }

    /// Returns the response as it is stored; `None` if it is not stored. A response that is not
    /// in the background is stored only when it has ended well.
    pub(super) async fn response(
        &self,
        id: &UpstreamRunId,
        limiter: Option<&RateLimiter>,
    ) -> Result<Option<Value>, UpstreamError> {
        match self
            .retrying(limiter)
            .get(&["responses", id.as_str()])
            .await
        {
            Ok(response) => Ok(Some(response)),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

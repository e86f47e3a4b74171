//! The adapter's type, and the calls that its files share.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use http::Method;
use serde_json::Value;

use super::stream::{Previous, StreamDecoder};
use super::stream_resume::resuming;
use crate::config::UpstreamConfig;
use crate::domain::{UpstreamRunId, UpstreamThreadId};
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
    /// The server ignores `previous_response_id`, so each request of a chain holds the history.
    pub(super) ignores_previous: Arc<AtomicBool>,
}

impl ResponsesUpstream {
    pub fn new(client: UpstreamClient, config: &UpstreamConfig) -> Self {
        Self {
            client,
            conversations: config.conversations,
            background: config.background,
            lock_window: config.lock_window,
            ignores_previous: Arc::default(),
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

    /// Returns what a response that follows `thread` must build on: in a chain, the last response.
    pub(super) fn previous(&self, thread: Option<&UpstreamThreadId>) -> Option<Previous> {
        let last = thread.filter(|_| !self.conversations)?;
        Some(Previous {
            id: last.as_str().to_owned(),
            is_ignored: Arc::clone(&self.ignores_previous),
        })
    }

    /// Decodes the events of a response. `previous`: the response on which it must build.
    pub(super) async fn read(
        &self,
        events: SseStream,
        previous: Option<Previous>,
    ) -> Result<EventStream, UpstreamError> {
        let turn = StreamDecoder::new(!self.conversations).after(previous);
        Ok(public(relay(events, turn, &self.client).await?))
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

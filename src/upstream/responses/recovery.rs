//! Finds out the fate of a request or stream that broke.

use std::time::Duration;

use futures_util::{StreamExt, stream};
use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::adapter::ResponsesUpstream;
use super::cleanup::MAX_PAGES;
use super::run_items::{end_of, own_part, what_followed};
use super::stream_resume::{as_event, retelling};
use super::wire::Output;
use crate::domain::{UnsettledRun, UpstreamRunId, UpstreamThreadId};
use crate::upstream::error::UpstreamError;
use crate::upstream::port::{Ended, EventStream, Recovered, UpstreamEvent};
use crate::upstream::retry::{FIRST_WAIT, next_backoff};

/// The traces of the request that a conversation holds.
enum Look {
    /// The request and the reply to it.
    Reply(Box<Ended>),
    /// Only the request.
    Sent,
    Nothing,
    /// The place where the request would begin cannot be found.
    Lost,
}

impl ResponsesUpstream {
    pub(super) async fn trace(
        &self,
        sent: &UnsettledRun,
        failure: &UpstreamError,
    ) -> Result<Recovered, UpstreamError> {
        if self.conversations && sent.thread.is_none() {
            return Ok(Recovered::Absent);
        }
        let mut accepted = sent.upstream_run.as_ref();
        if let Some(id) = accepted {
            match self.response(id, None).await? {
                // This response made the calls. The id of the response to their outputs is
                // unknown.
                Some(response) if asked_for(&response, sent) => accepted = None,
                Some(response) if self.goes_on_or_is_over(&response) => {
                    return self.running(id, &response).await.map(Recovered::Running);
                }
                _ => {}
            }
        }
        let conversation = sent.thread.as_ref().filter(|_| self.conversations);
        let may_still_work = accepted.is_some() || !attempt_is_over(failure);
        // A background response that is not stored is gone.
        let is_gone = self.background && accepted.is_some();
        // Without an id and without a conversation, waiting would never show anything.
        let can_be_seen = accepted.is_some() || conversation.is_some();
        let waits = may_still_work && can_be_seen && !is_gone;
        let look = match self
            .wait_and_look(conversation, sent, accepted, waits)
            .await?
        {
            Found::Response(id, response) => {
                return self.running(&id, &response).await.map(Recovered::Running);
            }
            Found::Items(look) => look,
        };
        // A response that is not in the background has stopped by now, or its result is in the
        // conversation.
        let has_stopped = !may_still_work || (conversation.is_some() && !self.background);
        Ok(match look {
            // The calls among the items may be those of an earlier response, which the lost
            // request was to answer.
            Look::Reply(ended) if accepted.is_some() && !ended.tool_calls.is_empty() => {
                Recovered::Unknown
            }
            Look::Reply(ended) => {
                Recovered::Running(stream::iter([Ok(UpstreamEvent::Ended(ended))]).boxed())
            }
            Look::Nothing if accepted.is_none() && has_stopped => Recovered::Absent,
            Look::Nothing | Look::Sent | Look::Lost => Recovered::Unknown,
        })
    }

    /// Looks until there is a reply. If `waits`, it looks for as long as a response can continue
    /// after its connection is gone. The process that opened the connection may be paused and
    /// keep it open, or the request may still be on its way.
    async fn wait_and_look(
        &self,
        conversation: Option<&UpstreamThreadId>,
        sent: &UnsettledRun,
        accepted: Option<&UpstreamRunId>,
        waits: bool,
    ) -> Result<Found, UpstreamError> {
        let until = Instant::now()
            + if waits {
                self.lock_window
            } else {
                Duration::ZERO
            };
        let mut wait = FIRST_WAIT;
        loop {
            let is_last = Instant::now() >= until;
            if let Some(id) = accepted
                && waits
                && let Some(response) = self.response(id, None).await?
                && as_event(&response).1
            {
                return Ok(Found::Response(id.clone(), response));
            }
            let look = match conversation {
                Some(conversation) => self.look(conversation, sent).await?,
                None => Look::Nothing,
            };
            if is_last || matches!(look, Look::Reply(_)) {
                return Ok(Found::Items(look));
            }
            sleep(wait.min(until.saturating_duration_since(Instant::now()))).await;
            wait = next_backoff(wait);
        }
    }

    async fn look(
        &self,
        conversation: &UpstreamThreadId,
        sent: &UnsettledRun,
    ) -> Result<Look, UpstreamError> {
        let anchor = sent.baseline.anchor.as_deref();
        let newest = match self.newest(conversation, anchor, MAX_PAGES).await {
            Ok(newest) => newest,
            // Everything that was sent to the conversation is gone with it.
            Err(UpstreamError::ThreadGone) => return Ok(Look::Nothing),
            Err(error) => return Err(error),
        };
        let Some(since_anchor) = newest.since_anchor() else {
            return Ok(Look::Lost);
        };
        let own = own_part(since_anchor, sent.baseline.skip);
        Ok(match what_followed(own, sent) {
            None => Look::Nothing,
            Some(reply) => end_of(reply).map_or(Look::Sent, |ended| Look::Reply(Box::new(ended))),
        })
    }

    /// Streams a response, from its beginning if it continues.
    async fn running(
        &self,
        id: &UpstreamRunId,
        response: &Value,
    ) -> Result<EventStream, UpstreamError> {
        let events = retelling(self.client.clone(), id.clone(), response);
        self.read(events, None).await
    }

    /// Returns true if the response has ended, or continues although nobody reads it.
    fn goes_on_or_is_over(&self, response: &Value) -> bool {
        self.background || response["background"] == true || as_event(response).1
    }
}

enum Found {
    Response(UpstreamRunId, Value),
    Items(Look),
}

/// Returns true if the response made the calls that the request was to answer.
fn asked_for(response: &Value, sent: &UnsettledRun) -> bool {
    let items = response["output"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    let asked = Output::of(items).open_calls;
    !sent.open_calls.is_empty()
        && asked
            .iter()
            .any(|call| sent.open_calls.iter().any(|it| it.id == call.id))
}

/// Returns true if the server itself reported how the request failed, so it no longer works on
/// it. A proxy cannot report that.
const fn attempt_is_over(failure: &UpstreamError) -> bool {
    match failure {
        UpstreamError::Broken { .. } | UpstreamError::Protocol(_) => false,
        UpstreamError::Unavailable { .. } => !failure.breaks_off(),
        UpstreamError::Busy { .. }
        | UpstreamError::ThreadGone
        | UpstreamError::Refused { .. }
        | UpstreamError::RateLimited { .. }
        | UpstreamError::NotOffered { .. }
        | UpstreamError::Connect => true,
    }
}

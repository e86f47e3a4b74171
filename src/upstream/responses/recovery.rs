//! What became of a request or stream that broke.

use futures_util::{StreamExt, stream};
use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::ResponsesUpstream;
use super::part::{end_of, own_part, what_followed};
use super::settling::MAX_PAGES;
use super::source::{as_event, polling};
use super::turn::Turn;
use super::wire::Output;
use crate::domain::{Leftover, UpstreamRunId, UpstreamThreadId};
use crate::upstream::patience::{FIRST_WAIT, longer};
use crate::upstream::relay::{public, relay};
use crate::upstream::{Ended, EventStream, Recovered, UpstreamError, UpstreamEvent};

/// What a conversation holds of what was sent.
enum Look {
    /// It, and what it led to.
    Reply(Box<Ended>),
    /// It alone.
    Sent,
    Nothing,
    /// The place where it would begin cannot be found.
    Lost,
}

impl ResponsesUpstream {
    pub(super) async fn trace(
        &self,
        sent: &Leftover,
        failure: &UpstreamError,
    ) -> Result<Recovered, UpstreamError> {
        if self.conversations && sent.thread.is_none() {
            return Ok(Recovered::Absent);
        }
        let mut accepted = sent.upstream_run.as_ref();
        if let Some(id) = accepted {
            match self.response(id, None).await? {
                // The response that asked. The one that its answers led to is not known.
                Some(response) if asked_for(&response, sent) => accepted = None,
                Some(response) if self.goes_on_or_is_over(&response) => {
                    return self.running(id, &response).await.map(Recovered::Running);
                }
                _ => {}
            }
        }
        let Some(conversation) = sent.thread.as_ref().filter(|_| self.conversations) else {
            let is_over = accepted.is_none() && attempt_is_over(failure);
            return Ok(if is_over { Recovered::Absent } else { Recovered::Unknown });
        };
        let may_still_work = !(accepted.is_none() && attempt_is_over(failure));
        let look = if may_still_work && !self.background {
            self.wait_and_look(conversation, sent, accepted).await?
        } else {
            Found::Items(self.look(conversation, sent).await?)
        };
        let look = match look {
            Found::Response(id, response) => {
                return self.running(&id, &response).await.map(Recovered::Running);
            }
            Found::Items(look) => look,
        };
        Ok(match look {
            // Calls among the items may be those of an earlier response, which the lost one was to answer.
            Look::Reply(ended) if accepted.is_some() && !ended.tool_calls.is_empty() => Recovered::Unknown,
            Look::Reply(ended) => Recovered::Running(stream::iter([Ok(UpstreamEvent::Ended(ended))]).boxed()),
            Look::Nothing if accepted.is_none() && !(may_still_work && self.background) => Recovered::Absent,
            Look::Nothing | Look::Sent | Look::Lost => Recovered::Unknown,
        })
    }

    /// Looks until there is a reply, for as long as a response can go on whose connection is gone.
    async fn wait_and_look(
        &self,
        conversation: &UpstreamThreadId,
        sent: &Leftover,
        accepted: Option<&UpstreamRunId>,
    ) -> Result<Found, UpstreamError> {
        let until = Instant::now() + self.lock_window;
        let mut wait = FIRST_WAIT;
        loop {
            let is_last = Instant::now() >= until;
            if let Some(id) = accepted
                && let Some(response) = self.response(id, None).await?
                && as_event(&response).1
            {
                return Ok(Found::Response(id.clone(), response));
            }
            let look = self.look(conversation, sent).await?;
            if is_last || matches!(look, Look::Reply(_)) {
                return Ok(Found::Items(look));
            }
            sleep(wait.min(until.saturating_duration_since(Instant::now()))).await;
            wait = longer(wait);
        }
    }

    async fn look(&self, conversation: &UpstreamThreadId, sent: &Leftover) -> Result<Look, UpstreamError> {
        let anchor = sent.baseline.anchor.as_deref();
        let newest = match self.newest(conversation, anchor, MAX_PAGES).await {
            Ok(newest) => newest,
            // With the conversation all that was sent to it is gone.
            Err(UpstreamError::ThreadGone) => return Ok(Look::Nothing),
            Err(error) => return Err(error),
        };
        let Some(since_anchor) = newest.since_anchor() else { return Ok(Look::Lost) };
        let own = own_part(since_anchor, sent.baseline.skip);
        Ok(match what_followed(own, sent) {
            None => Look::Nothing,
            Some(reply) => end_of(reply).map_or(Look::Sent, |ended| Look::Reply(Box::new(ended))),
        })
    }

    /// What is still to come of a response.
    async fn running(&self, id: &UpstreamRunId, response: &Value) -> Result<EventStream, UpstreamError> {
        let events = polling(self.client.clone(), id.clone(), response);
        Ok(public(relay(events, Turn::new(!self.conversations)).await?))
    }

    /// It has ended, or works on although nobody listens.
    fn goes_on_or_is_over(&self, response: &Value) -> bool {
        self.background || response["background"] == true || as_event(response).1
    }
}

enum Found {
    Response(UpstreamRunId, Value),
    Items(Look),
}

/// The response made the calls that were to be answered.
fn asked_for(response: &Value, sent: &Leftover) -> bool {
    let items = response["output"].as_array().map(Vec::as_slice).unwrap_or_default();
    let asked = Output::of(items).open_calls;
    !sent.open_calls.is_empty() && asked.iter().any(|call| sent.open_calls.iter().any(|it| it.id == call.id))
}

/// The server itself has told how the request failed, so it no longer works on it. What stands in front of a server
/// cannot say that.
const fn attempt_is_over(failure: &UpstreamError) -> bool {
    match failure {
        UpstreamError::Unavailable { status, .. } => !matches!(status, 408 | 502 | 504),
        UpstreamError::Broken { .. } | UpstreamError::Protocol(_) => false,
        UpstreamError::Busy { .. }
        | UpstreamError::ThreadGone
        | UpstreamError::Refused { .. }
        | UpstreamError::RateLimited { .. }
        | UpstreamError::Resting { .. }
        | UpstreamError::Connect => true,
    }
}

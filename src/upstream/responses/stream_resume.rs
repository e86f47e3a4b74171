//! Streams the events of a background response across broken connections.

use std::time::Duration;

use futures_util::{StreamExt, stream};
use http::Method;
use serde_json::{Value, json};
use tokio::time::sleep;

use super::stream::tells_error;
use super::wire::{Envelope, ResponseHead};
use crate::domain::{RunStatus, UpstreamRunId};
use crate::upstream::client::{SseStream, UpstreamClient};
use crate::upstream::error::UpstreamError;
use crate::upstream::relay::out_of_sight;
use crate::upstream::retry::{FIRST_WAIT, asked_wait, may_pass, next_backoff};
use crate::upstream::retrying_client::is_missing;
use crate::upstream::sse::SseEvent;

/// Consecutive tries that bring nothing new.
const MAX_TRIES: u32 = 5;

/// Streams the events of a response that begin in `events`. If the stream breaks after the
/// response's id is known, it is opened again after the last event. If the server cannot do that,
/// the response is polled until it has ended. No event is yielded twice.
pub(super) fn resuming(client: UpstreamClient, events: SseStream) -> SseStream {
    ResumableStream {
        events: Some(events),
        ..ResumableStream::new(client)
    }
    .into_stream()
}

/// Streams a response that was just read as `response`: first that it exists, then all its events
/// from the first on. If it has ended, or if the server does not repeat events, only its end
/// follows.
pub(super) fn retelling(client: UpstreamClient, id: UpstreamRunId, response: &Value) -> SseStream {
    let (first, is_over) = as_event(response);
    let resumed = ResumableStream {
        response: Some(id),
        again: Again::All,
        over: is_over,
        ..ResumableStream::new(client)
    };
    stream::iter([Ok(first)])
        .chain(resumed.into_stream())
        .boxed()
}

/// The events that the server can repeat after the stream has closed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Again {
    /// The events after the last one, if that had a number.
    Rest,
    /// The same, and all events if there was none yet.
    All,
    /// None: the response is polled.
    Nothing,
}

struct ResumableStream {
    client: UpstreamClient,
    events: Option<SseStream>,
    response: Option<UpstreamRunId>,
    /// Number of the last event.
    last: Option<u64>,
    again: Again,
    /// Events up to this number are repeats.
    seen: Option<u64>,
    /// A new event came since the last break.
    progress: bool,
    failures: u32,
    wait: Duration,
    /// The last event that matters has come.
    over: bool,
}

impl ResumableStream {
    fn new(client: UpstreamClient) -> Self {
        Self {
            client,
            events: None,
            response: None,
            last: None,
            again: Again::Rest,
            seen: None,
            progress: true,
            failures: 0,
            wait: FIRST_WAIT,
            over: false,
        }
    }

    fn into_stream(self) -> SseStream {
        stream::unfold(self, |mut resumed| async move {
            resumed.next().await.map(|event| (event, resumed))
        })
        .boxed()
    }

    async fn next(&mut self) -> Option<Result<SseEvent, UpstreamError>> {
        let mut broken = UpstreamError::Broken { timeout: false };
        loop {
            if let Some(events) = &mut self.events {
                match events.next().await {
                    // An error in the place of a repeated event: the server cannot repeat it.
                    // That says nothing of the response.
                    Some(Ok(event)) if !self.progress && is_error(&event) => {
                        self.again = Again::Nothing;
                    }
                    Some(Ok(event)) => {
                        if self.note(&event) {
                            return Some(Ok(event));
                        }
                        continue;
                    }
                    None if self.over => return None,
                    // A stream that ends without a new event has no more events.
                    None if !self.progress => self.again = Again::Nothing,
                    None => {}
                    Some(Err(error))
                        if self.over || !matches!(error, UpstreamError::Broken { .. }) =>
                    {
                        return Some(Err(error));
                    }
                    Some(Err(error)) => broken = error,
                }
                self.events = None;
            }
            if self.over {
                return None;
            }
            let event = self.go_on(broken.clone()).await;
            match event.transpose() {
                None => {}
                Some(Ok(event)) => return Some(Ok(event)),
                Some(Err(error)) => {
                    self.over = true;
                    return Some(Err(out_of_sight(error)));
                }
            }
        }
    }

    /// Records an event. Returns false if it is a repeat.
    fn note(&mut self, event: &SseEvent) -> bool {
        let Ok(envelope) = serde_json::from_str::<Envelope<'_>>(&event.data) else {
            return true;
        };
        let number = envelope.sequence_number;
        if number
            .zip(self.seen)
            .is_some_and(|(number, seen)| number <= seen)
        {
            return false;
        }
        self.last = number.or(self.last);
        (self.progress, self.failures, self.wait) = (true, 0, FIRST_WAIT);
        if let Some(response) = envelope.response_in(&event.data)
            && let Ok(head) = serde_json::from_str::<ResponseHead>(response)
        {
            self.over |= head.run_status().is_some_and(RunStatus::is_final);
            self.response.get_or_insert(UpstreamRunId(head.id));
        }
        // The whole response in the place of its events: the server does not stream it.
        if envelope.response.is_none() && envelope.response_in(&event.data).is_some() {
            self.again = Again::Nothing;
        }
        let kind = kind(&envelope, event);
        self.over |= matches!(
            kind,
            "response.completed" | "response.incomplete" | "response.failed" | "response.cancelled"
        ) || tells_error(kind, event);
        true
    }

    /// Opens the stream again, or returns the response's end as an event. `error`: how the stream
    /// broke.
    async fn go_on(&mut self, mut error: UpstreamError) -> Result<Option<SseEvent>, UpstreamError> {
        let Some(id) = self.response.clone() else {
            return Err(error);
        };
        loop {
            self.failures += 1;
            if self.failures > MAX_TRIES {
                return Err(error);
            }
            if self.failures > 1 {
                sleep(asked_wait(&error).unwrap_or(self.wait)).await;
                self.wait = next_backoff(self.wait);
            }
            let streams = match self.again {
                Again::Rest => self.last.is_some(),
                Again::All => true,
                Again::Nothing => false,
            };
            let tried = if streams {
                self.open(&id).await.map(|()| None)
            } else {
                self.poll(&id).await.map(Some)
            };
            match tried {
                Ok(event) => return Ok(event),
                // No answer yet. The caller limits the time.
                Err(UpstreamError::Broken { timeout: true }) => {
                    self.failures = self.failures.saturating_sub(1);
                }
                Err(next) if may_pass(&next) => error = next,
                // The server cannot stream it again: it refused, or its answer is not an event
                // stream.
                Err(next) if streams && is_no(&next) => {
                    tracing::debug!(
                        "the upstream cannot stream a response again; polling it instead"
                    );
                    self.again = Again::Nothing;
                    self.failures = 0;
                }
                // The fate of a response that is gone has to be found out elsewhere.
                Err(next) if is_missing(&next) => return Err(error),
                Err(next) => return Err(next),
            }
        }
    }

    /// Opens the stream after the last event, or from the first one on.
    async fn open(&mut self, id: &UpstreamRunId) -> Result<(), UpstreamError> {
        let after = self.last.map(|last| last.to_string());
        let starting_after = after.as_deref().map(|last| ("starting_after", last));
        let query: Vec<_> = [("stream", "true")]
            .into_iter()
            .chain(starting_after)
            .collect();
        let events = self
            .client
            .events(Method::GET, &["responses", id.as_str()], &query, None)
            .await?;
        tracing::debug!("resumed the stream of a response");
        (self.events, self.seen, self.progress) = (Some(events), self.last, false);
        Ok(())
    }

    /// Polls the response until it has ended.
    async fn poll(&mut self, id: &UpstreamRunId) -> Result<SseEvent, UpstreamError> {
        loop {
            let path = ["responses", id.as_str()];
            let answer = self.client.json::<Value>(Method::GET, &path, &[]).await?;
            let (event, is_over) = as_event(&answer.value);
            if is_over {
                self.over = true;
                return Ok(event);
            }
            self.failures = 0;
            sleep(answer.poll_after.unwrap_or(self.wait)).await;
            self.wait = next_backoff(self.wait);
        }
    }
}

/// Returns the event that matches the state of a response, and whether it is the last one.
pub(super) fn as_event(response: &Value) -> (SseEvent, bool) {
    let status: Option<RunStatus> = response["status"]
        .as_str()
        .and_then(|status| status.parse().ok());
    let ended = status.filter(|status| status.is_final());
    let kind = ended.map_or("in_progress", RunStatus::as_str);
    let data = json!({"type": format!("response.{kind}"), "response": response}).to_string();
    (SseEvent { name: None, data }, ended.is_some())
}

fn kind<'a>(envelope: &'a Envelope<'_>, event: &'a SseEvent) -> &'a str {
    envelope
        .kind
        .as_deref()
        .or(event.name.as_deref())
        .unwrap_or_default()
}

fn is_error(event: &SseEvent) -> bool {
    let envelope = serde_json::from_str::<Envelope<'_>>(&event.data);
    envelope.map_or(event.name.as_deref() == Some("error"), |envelope| {
        tells_error(kind(&envelope, event), event)
    })
}

/// Returns true if the server will not do it.
const fn is_no(error: &UpstreamError) -> bool {
    matches!(
        error,
        UpstreamError::Refused { .. } | UpstreamError::ThreadGone | UpstreamError::Protocol(_)
    )
}

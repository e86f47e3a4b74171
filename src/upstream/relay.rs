//! Translates a protocol's event stream into the gateway's events. A decoder for each protocol
//! reads the events; this loop does the rest.

use std::collections::VecDeque;
use std::time::Duration;

use futures_util::stream::BoxStream;
use futures_util::{FutureExt, StreamExt, stream};
use tokio::task::coop::consume_budget;

use crate::upstream::classify::{ErrorDetail, Rejection};
use crate::upstream::client::{SseStream, UpstreamClient};
use crate::upstream::error::UpstreamError;
use crate::upstream::port::{EventStream, UpstreamEvent};
use crate::upstream::sse::SseEvent;

/// Time that the rest of the body may take to arrive after the last event.
const DRAIN_TIME: Duration = Duration::from_millis(250);
/// Events that are read after the last one that matters.
const DRAIN_EVENTS: usize = 64;

/// Bytes that each place of a reply, such as a part of a message, counts at least. So the limit on
/// the reply also bounds the number of places, among which the decoder searches.
pub(super) const PLACE_COST: usize = 1024;

/// The decoder of one protocol.
pub(super) trait Decoder: Send + 'static {
    /// Decodes one event and appends its meaning to `out`. It is not called again after an error
    /// or an `Ended`. Returns `None` if the event does not have the form of the protocol.
    fn decode(
        &mut self,
        event: &SseEvent,
        out: &mut VecDeque<UpstreamEvent>,
    ) -> Option<Result<(), Rejection>>;

    /// Returns the bytes of the reply that the decoder keeps until the end.
    fn held(&self) -> usize;

    fn notes(&mut self) -> &mut StreamNotes;

    /// Decodes one event. Skips an event that cannot be read, because a later event may hold the
    /// whole reply.
    fn read(
        &mut self,
        event: &SseEvent,
        out: &mut VecDeque<UpstreamEvent>,
    ) -> Result<(), Rejection> {
        let read = self.decode(event, out);
        self.notes().has_gap |= read.is_none();
        read.unwrap_or(Ok(()))
    }
}

/// What is known of a stream besides the reply.
#[derive(Debug, Default)]
pub(super) struct StreamNotes {
    /// An event could not be read, so the reply may lack a piece.
    pub(super) has_gap: bool,
    /// An error that the stream told, until it is logged.
    pub(super) error: Option<ErrorDetail>,
}

impl StreamNotes {
    /// Returns the error of a stream that ends here, without an `Ended`.
    pub(super) fn unended(&self) -> UpstreamError {
        if self.has_gap {
            unreadable()
        } else {
            UpstreamError::Broken { timeout: false }
        }
    }
}

/// Returns the error of a reply that has a gap.
pub(super) fn unreadable() -> UpstreamError {
    UpstreamError::Protocol(
        "an event of the stream does not have the form of the protocol".to_owned(),
    )
}

/// The events of one run. Their errors carry details for the adapters only.
pub(super) type RunEvents = BoxStream<'static, Result<UpstreamEvent, Rejection>>;

/// Drops the details that are for the adapters only.
pub(super) fn public(events: RunEvents) -> EventStream {
    events
        .map(|event| event.map_err(UpstreamError::from))
        .boxed()
}

/// Translates an error of a question about a run that the upstream has accepted. The error does
/// not refuse the run; it means that the run's state is unknown for the moment.
pub(super) fn out_of_sight(error: UpstreamError) -> UpstreamError {
    if error.is_ambiguous() {
        error
    } else {
        UpstreamError::Broken { timeout: false }
    }
}

/// Translates an error that occurred before anything was sent.
pub(super) fn unsent(error: UpstreamError) -> UpstreamError {
    match error {
        UpstreamError::Broken { .. }
        | UpstreamError::Unavailable {
            no_retry: false, ..
        } => UpstreamError::Connect,
        error => error,
    }
}

/// Reads until the first event that means something, and returns the stream from there on. A
/// refusal that arrives as an event thus becomes the error of the call.
///
/// The stream ends after `Ended` or after an error. It is an error if the decoder keeps more bytes
/// of the reply than the client may read. After `Ended` the rest of the body is read for a moment,
/// so that the connection can be used again. An error that the stream tells is logged.
pub(super) async fn relay(
    events: SseStream,
    decoder: impl Decoder,
    client: &UpstreamClient,
) -> Result<RunEvents, Rejection> {
    relay_within(events, decoder, client.max_bytes(), Some(client.clone())).await
}

/// Does the same with a limit on the bytes. `log`: the client that logs the errors.
pub(super) async fn relay_within(
    events: SseStream,
    decoder: impl Decoder,
    limit: usize,
    log: Option<UpstreamClient>,
) -> Result<RunEvents, Rejection> {
    let mut relay = Relay {
        events,
        decoder,
        limit,
        log,
        out: VecDeque::new(),
        state: State::Reading,
    };
    let broken = || Err(UpstreamError::Broken { timeout: false }.into());
    let first = relay.next().await.unwrap_or_else(broken)?;
    let rest = stream::unfold(relay, |mut relay| async move {
        relay.next().await.map(|event| (event, relay))
    });
    Ok(stream::iter([Ok(first)]).chain(rest).boxed())
}

struct Relay<D> {
    events: SseStream,
    decoder: D,
    limit: usize,
    log: Option<UpstreamClient>,
    out: VecDeque<UpstreamEvent>,
    state: State,
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum State {
    Reading,
    /// `Ended` was yielded.
    Draining,
    Done,
}

impl<D: Decoder> Relay<D> {
    async fn next(&mut self) -> Option<Result<UpstreamEvent, Rejection>> {
        loop {
            if let Some(event) = self.out.pop_front() {
                if matches!(event, UpstreamEvent::Ended(_)) {
                    self.out.clear();
                    // Usually the rest has arrived already. Then the connection is free even if
                    // the caller does not poll again.
                    let over = self.drain().now_or_never().is_some();
                    self.state = if over { State::Done } else { State::Draining };
                }
                return Some(Ok(event));
            }
            match self.state {
                State::Reading => {}
                State::Draining => {
                    self.state = State::Done;
                    let _ = tokio::time::timeout(DRAIN_TIME, self.drain()).await;
                    return None;
                }
                State::Done => return None,
            }
            // One read of the socket may hold thousands of events. Other futures of the task, such as
            // the run's deadline, get their turn in between.
            consume_budget().await;
            let read = match self.events.next().await {
                Some(Ok(event)) => self.decoder.read(&event, &mut self.out),
                Some(Err(UpstreamError::Broken { timeout: false })) | None => {
                    Err(self.decoder.notes().unended().into())
                }
                Some(Err(error)) => Err(error.into()),
            };
            if let Some(told) = self.decoder.notes().error.take()
                && let Some(client) = &self.log
            {
                client.log_told(&told);
            }
            let read = read.and_then(|()| {
                if self.decoder.held() > self.limit {
                    Err(too_long())
                } else {
                    Ok(())
                }
            });
            if let Err(error) = read {
                self.state = State::Done;
                self.out.clear();
                return Some(Err(error));
            }
        }
    }

    /// Reads to the end of the body, up to a number of events.
    async fn drain(&mut self) {
        for _ in 0..DRAIN_EVENTS {
            if !matches!(self.events.next().await, Some(Ok(_))) {
                return;
            }
        }
    }
}

fn too_long() -> Rejection {
    UpstreamError::Protocol("a reply is longer than the limit".to_owned()).into()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::domain::{RunStatus, UpstreamRunId};
    use crate::upstream::port::Ended;

    const LIMIT: usize = 100;

    /// `#x` accepts, `+x` is text, `!` the end, `-` an error, `*` ten bytes to keep, `_` cannot be
    /// read; all else means nothing.
    #[derive(Default)]
    struct Toy {
        held: usize,
        notes: StreamNotes,
    }

    impl Decoder for Toy {
        fn decode(
            &mut self,
            event: &SseEvent,
            out: &mut VecDeque<UpstreamEvent>,
        ) -> Option<Result<(), Rejection>> {
            match event.data.split_at(1) {
                ("#", id) => out.push_back(UpstreamEvent::Accepted(UpstreamRunId(id.to_owned()))),
                ("+", text) => out.push_back(UpstreamEvent::Text(text.into())),
                ("!", _) => out.push_back(UpstreamEvent::Ended(Box::new(Ended {
                    status: RunStatus::Completed,
                    error: None,
                    content: Vec::new(),
                    upstream_message_id: None,
                    usage: None,
                    tool_calls: Vec::new(),
                    thread: None,
                    refusal: None,
                }))),
                ("*", _) => self.held += 10,
                ("-", _) => return Some(Err(UpstreamError::Busy { blocking_run: None }.into())),
                ("_", _) => return None,
                _ => {}
            }
            Some(Ok(()))
        }

        fn held(&self) -> usize {
            self.held
        }

        fn notes(&mut self) -> &mut StreamNotes {
            &mut self.notes
        }
    }

    fn events(data: &[&str]) -> stream::Iter<std::vec::IntoIter<Result<SseEvent, UpstreamError>>> {
        let events: Vec<_> = data
            .iter()
            .map(|data| {
                Ok(SseEvent {
                    name: None,
                    data: (*data).to_owned(),
                })
            })
            .collect();
        stream::iter(events)
    }

    fn shape(event: &Result<UpstreamEvent, Rejection>) -> String {
        match event {
            Ok(UpstreamEvent::Accepted(id)) => format!("#{id}"),
            Ok(UpstreamEvent::Text(delta)) => format!("+{}", delta.text),
            Ok(UpstreamEvent::Ended(_)) => "!".to_owned(),
            Err(refusal) => refusal.error.to_string(),
        }
    }

    async fn shapes(stream: RunEvents) -> Vec<String> {
        stream.map(|event| shape(&event)).collect().await
    }

    #[tokio::test]
    async fn nothing_follows_the_end() {
        let stream = relay_within(
            events(&["?", "#1", "+a", "!", "+b", "-"]).boxed(),
            Toy::default(),
            LIMIT,
            None,
        )
        .await
        .unwrap();
        assert_eq!(shapes(stream).await, ["#1", "+a", "!"]);
    }

    #[tokio::test]
    async fn an_error_before_anything_else_is_the_error_of_the_call() {
        let error = relay_within(events(&["?", "-"]).boxed(), Toy::default(), LIMIT, None)
            .await
            .err()
            .unwrap()
            .error;
        assert!(matches!(error, UpstreamError::Busy { .. }));
        let error = relay_within(events(&["?"]).boxed(), Toy::default(), LIMIT, None)
            .await
            .err()
            .unwrap()
            .error;
        assert!(matches!(error, UpstreamError::Broken { timeout: false }));
    }

    #[tokio::test]
    async fn a_stream_without_an_end_and_with_a_gap_cannot_be_used() {
        let stream = relay_within(
            events(&["#1", "_", "+a"]).boxed(),
            Toy::default(),
            LIMIT,
            None,
        )
        .await
        .unwrap();
        assert_eq!(
            shapes(stream).await,
            [
                "#1",
                "+a",
                "the upstream's answer cannot be used: an event of the stream does not have the form of the protocol"
            ]
        );
    }

    #[tokio::test]
    async fn a_stream_without_an_end_is_broken() {
        let stream = relay_within(events(&["#1", "+a"]).boxed(), Toy::default(), LIMIT, None)
            .await
            .unwrap();
        assert_eq!(
            shapes(stream).await,
            ["#1", "+a", "the connection to the upstream broke"]
        );
    }

    #[tokio::test]
    async fn a_reply_that_is_never_shown_has_a_limit() {
        let pulled = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&pulled);
        let more = stream::repeat_with(move || {
            count.fetch_add(1, Ordering::Relaxed);
            Ok(SseEvent {
                name: None,
                data: "*".to_owned(),
            })
        });
        let stream = relay_within(
            events(&["#1"]).chain(more).boxed(),
            Toy::default(),
            LIMIT,
            None,
        )
        .await
        .unwrap();
        assert_eq!(
            shapes(stream).await,
            [
                "#1",
                "the upstream's answer cannot be used: a reply is longer than the limit"
            ]
        );
        assert_eq!(pulled.load(Ordering::Relaxed), 11);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_never_ends_delays_the_end_only_for_those_who_ask_on() {
        let started = tokio::time::Instant::now();
        let body = events(&["#1", "!"]).chain(stream::pending()).boxed();
        let mut stream = relay_within(body, Toy::default(), LIMIT, None)
            .await
            .unwrap();
        assert_eq!(shape(&stream.next().await.unwrap()), "#1");
        assert_eq!(shape(&stream.next().await.unwrap()), "!");
        assert_eq!(started.elapsed(), Duration::ZERO);
        assert!(stream.next().await.is_none());
        assert_eq!(started.elapsed(), DRAIN_TIME);
    }

    #[tokio::test]
    async fn a_body_that_goes_on_and_on_is_given_up() {
        let more = stream::repeat_with(|| {
            Ok(SseEvent {
                name: None,
                data: "?".to_owned(),
            })
        });
        let stream = relay_within(
            events(&["#1", "!"]).chain(more).boxed(),
            Toy::default(),
            LIMIT,
            None,
        )
        .await
        .unwrap();
        assert_eq!(shapes(stream).await, ["#1", "!"]);
    }
}

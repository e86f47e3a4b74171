//! A run's events as a `text/event-stream`.

use std::convert::Infallible;
use std::time::Duration;

use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use serde_json::{Value, json};
use tokio_util::sync::DropGuard;

use super::views::{MessageView, RunView};
use crate::domain::{Run, RunId, RunStatus, ThreadId};
use crate::runs::RunEvent;

/// When a client shall come back whose stream ended before its run.
const RECONNECT_AFTER: Duration = Duration::from_secs(1);

/// The events of a run, each with its number.
type Events = BoxStream<'static, (i64, RunEvent)>;

/// Streams until the run has ended, or waits for tool outputs. Each event's id is `<run>:<n>`. `on_drop` lives
/// as long as the stream, unless that ends because of a wait: leaving to make function calls is no disconnect.
pub(super) fn until_answered(
    run: &Run,
    scope: &str,
    events: Events,
    on_drop: Option<DropGuard>,
    keep_alive: Duration,
) -> Response {
    let answered = stream::unfold(Some((events, on_drop)), |state| async move {
        let (mut events, on_drop) = state?;
        let Some((n, event)) = events.next().await else {
            // This process stops, and others go on with the run: that is no disconnect.
            drop(on_drop.map(DropGuard::disarm));
            return None;
        };
        let rest = if matches!(event, RunEvent::RequiresAction(_)) {
            drop(on_drop.map(DropGuard::disarm));
            None
        } else {
            Some((events, on_drop))
        };
        Some(((n, event), rest))
    });
    stream_of(run, scope, None, answered.boxed(), true, keep_alive)
}

/// Streams until the run has ended.
/// `seen`: the number of the event that its reader saw last.
pub(super) fn until_ended(
    run: &Run,
    scope: &str,
    seen: Option<i64>,
    events: Events,
    keep_alive: Duration,
) -> Response {
    stream_of(run, scope, seen, events, false, keep_alive)
}

/// `a_wait_ends_it`: so does an event by which the run asks for tool outputs. A stream that ends otherwise says where its
/// run can be followed on.
fn stream_of(
    run: &Run,
    scope: &str,
    seen: Option<i64>,
    events: Events,
    a_wait_ends_it: bool,
    keep_alive: Duration,
) -> Response {
    let (run, thread) = (run.id, run.thread_id);
    let rest = format!("{scope}/runs/{run}/events");
    let events = stream::unfold(Some((events, seen, rest)), move |state| async move {
        let (mut events, last, rest) = state?;
        let Some((n, event)) = events.next().await else {
            return Some((Ok::<_, Infallible>(reconnect(run, last, &rest)), None));
        };
        let is_last = match event {
            RunEvent::Ended(_) => true,
            RunEvent::RequiresAction(_) => a_wait_ends_it,
            _ => false,
        };
        let next = (!is_last).then_some((events, Some(n), rest));
        Some((Ok(render(run, thread, n, &event)), next))
    });
    let sse = Sse::new(events).keep_alive(KeepAlive::new().interval(keep_alive).text("keep-alive"));
    // Without the hint, a reverse proxy may hold the events back until its buffer is full.
    let unbuffered = (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    ([unbuffered], sse).into_response()
}

/// The last event of a stream that ends before its run: this process stops, and others go on with the run. It has no id, so
/// a client that reconnects by itself asks for what it has not seen.
fn reconnect(run: RunId, last: Option<i64>, rest: &str) -> Event {
    let after = last.map(|n| format!("{run}:{n}"));
    Event::default()
        .event("stream.reconnect")
        .retry(RECONNECT_AFTER)
        .data(json!({"events": rest, "after": after}).to_string())
}

fn render(run: RunId, thread: ThreadId, n: i64, event: &RunEvent) -> Event {
    let (name, data): (&str, Value) = match event {
        RunEvent::Queued { position } => {
            ("run.queued", json!({"run_id": run, "thread_id": thread, "position": position}))
        }
        RunEvent::Started => ("run.started", json!({"run_id": run, "thread_id": thread})),
        RunEvent::Delta(text) => ("message.delta", json!({"text": **text})),
        RunEvent::RequiresAction(action) => (
            "run.requires_action",
            json!({"run_id": run, "thread_id": thread, "tool_calls": action.tool_calls}),
        ),
        RunEvent::MessageCompleted(message) => {
            ("message.completed", json!({"message": MessageView::from((**message).clone())}))
        }
        RunEvent::Ended(outcome) => {
            let name = match outcome.run.status {
                RunStatus::Completed => "run.completed",
                RunStatus::Incomplete => "run.incomplete",
                RunStatus::Cancelled => "run.cancelled",
                RunStatus::Expired => "run.expired",
                _ => "run.failed",
            };
            (name, json!({"run": RunView::from(outcome.run.clone())}))
        }
    };
    Event::default().id(format!("{run}:{n}")).event(name).data(data.to_string())
}

//! A run's events as a `text/event-stream`.

use std::convert::Infallible;
use std::time::Duration;

use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio_util::sync::DropGuard;

use super::views::{MessageView, RunView};
use crate::domain::{RunId, RunStatus, ThreadId};
use crate::runs::{RunEvent, Submitted};

/// Streams the run from its first event to its last. Each event's id is `<run>:<n>`, counted from 0. `on_drop` lives
/// as long as the stream.
pub(super) fn follow(submitted: &Submitted, on_drop: Option<DropGuard>, keep_alive: Duration) -> Response {
    let (run, thread) = (submitted.run.id, submitted.thread.id);
    let events = submitted.feed.follow(0).map(move |(n, event)| {
        let _alive = &on_drop;
        Ok::<_, Infallible>(render(run, thread, n, &event))
    });
    let sse = Sse::new(events).keep_alive(KeepAlive::new().interval(keep_alive).text("keep-alive"));
    // Without the hint, a reverse proxy may hold the events back until its buffer is full.
    let unbuffered = (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    ([unbuffered], sse).into_response()
}

fn render(run: RunId, thread: ThreadId, n: usize, event: &RunEvent) -> Event {
    let (name, data): (&str, Value) = match event {
        RunEvent::Queued { position } => {
            ("run.queued", json!({"run_id": run, "thread_id": thread, "position": position}))
        }
        RunEvent::Started => ("run.started", json!({"run_id": run, "thread_id": thread})),
        RunEvent::Delta(text) => ("message.delta", json!({"text": **text})),
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

//! Sends the events of a run as a `text/event-stream`.

use std::borrow::Cow;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use serde::Serialize;
use tokio_util::sync::DropGuard;
use utoipa::openapi::schema::{ObjectBuilder, OneOfBuilder, Schema, Type};
use utoipa::openapi::{Ref, RefOr};
use utoipa::{PartialSchema, ToSchema};

use super::views::{MessageView, RequiredActionView, RunView};
use crate::domain::{
    Phase, Reader, Recovery, RequiredAction, Run, RunId, RunStatus, TextDelta, ThreadId,
};
use crate::locks::Permit;
use crate::runs::{RunEvent, RunSubscription};

/// Pause before a client reconnects whose stream ended before its run.
const RECONNECT_AFTER: Duration = Duration::from_secs(1);

/// The events of a run, each with its number.
type Events = BoxStream<'static, (i64, RunEvent)>;

/// Streams from event `from` on, until the run has ended or waits for tool outputs. Each event's id is
/// `<run>:<n>`. Dropping the stream drops the guard `on_drop`, which cancels the run, and gives back the
/// permit. Once the run waits for tool outputs, dropping the stream no longer cancels it.
pub(super) fn until_answered(
    run: &Run,
    scope: &str,
    follow: RunSubscription,
    from: i64,
    reader: Reader,
    (on_drop, seat): (Option<DropGuard>, Option<Permit<RunId>>),
    keep_alive: Duration,
) -> Response {
    let events = follow.events(from).inspect(move |_| _ = &seat).boxed();
    let guarded = stream::unfold((events, on_drop), |(mut events, mut on_drop)| async move {
        let next = events.next().await;
        // `None`: this process stops, and another replica goes on with the run, which must not be cancelled.
        if matches!(next, None | Some((_, RunEvent::RequiresAction(_)))) {
            on_drop.take().map(DropGuard::disarm);
        }
        next.map(|event| (event, (events, on_drop)))
    });
    stream_of(
        run,
        scope,
        None,
        guarded.boxed(),
        reader,
        Some(follow),
        keep_alive,
    )
}

/// Streams until the run has ended. `seen` is the number of the last event that the reader has seen.
pub(super) fn until_ended(
    run: &Run,
    scope: &str,
    seen: Option<i64>,
    events: Events,
    reader: Reader,
    keep_alive: Duration,
) -> Response {
    stream_of(run, scope, seen, events, reader, None, keep_alive)
}

/// The state of a stream.
struct Place {
    events: Events,
    /// Number of the last event that the reader has seen.
    last: Option<i64>,
    /// The function calls of that event, if it is `run.requires_action`.
    asked: Option<Arc<RequiredAction>>,
    /// Path of the run's events, for a reader that reconnects.
    rest: String,
    ends_at_wait: Option<RunSubscription>,
}

/// Builds the stream. With `ends_at_wait`, it also ends when the run waits for tool outputs. A stream
/// that ends before its run ends with `stream.reconnect`.
fn stream_of(
    run: &Run,
    scope: &str,
    seen: Option<i64>,
    events: Events,
    reader: Reader,
    ends_at_wait: Option<RunSubscription>,
    keep_alive: Duration,
) -> Response {
    let (run, thread) = (run.id, run.thread_id);
    let rest = format!("{scope}/runs/{run}/events");
    let place = Place {
        events,
        last: seen,
        asked: None,
        rest,
        ends_at_wait,
    };
    let events = stream::unfold(Some(place), move |place| async move {
        let mut place = place?;
        // The event with the calls went out already. Checking whether they are answered may take long.
        if let (Some(asked), Some(follow)) = (place.asked.take(), &place.ends_at_wait)
            && follow.waits_for(&asked).await
        {
            return None;
        }
        let Some((n, event)) = place.events.next().await else {
            return Some((
                Ok::<_, Infallible>(reconnect(run, place.last, &place.rest)),
                None,
            ));
        };
        let rendered = render(run, thread, n, &event, reader);
        place.last = Some(n);
        let next = match event {
            RunEvent::Ended(_) => None,
            RunEvent::RequiresAction(asked) => Some(Place {
                asked: Some(asked),
                ..place
            }),
            _ => Some(place),
        };
        Some((Ok(rendered), next))
    });
    let sse = Sse::new(events).keep_alive(KeepAlive::new().interval(keep_alive).text("keep-alive"));
    sse.into_response()
}

/// Returns the last event of a stream that ends before its run, because this process stops and another
/// replica goes on with the run. The event has no id, so that a client that reconnects by itself asks
/// for the first event that it has not seen.
fn reconnect(run: RunId, last: Option<i64>, rest: &str) -> Event {
    let after = last.map(|n| format!("{run}:{n}"));
    let data = text(&Reconnect {
        events: rest,
        after,
    });
    Event::default()
        .event(RECONNECT)
        .retry(RECONNECT_AFTER)
        .data(data)
}

fn render(run: RunId, thread: ThreadId, n: i64, event: &RunEvent, reader: Reader) -> Event {
    let (run_id, thread_id) = (run, thread);
    let (name, data) = match event {
        RunEvent::Queued { position } => (
            QUEUED,
            text(&Queued {
                run_id,
                thread_id,
                position: *position,
            }),
        ),
        RunEvent::Started => (STARTED, text(&Started { run_id, thread_id })),
        RunEvent::Recovered(recovery) => (
            RECOVERED,
            text(&Recovered {
                run_id,
                thread_id,
                recovered: recovery,
            }),
        ),
        RunEvent::Delta(TextDelta {
            origin,
            text: delta,
        }) => (
            DELTA,
            text(&Delta {
                text: delta,
                message: (origin.message > 0).then_some(origin.message),
                phase: origin.phase,
            }),
        ),
        RunEvent::RequiresAction(action) => (
            REQUIRES_ACTION,
            text(&RequiresAction {
                run_id,
                thread_id,
                action: RequiredAction::clone(action).into(),
            }),
        ),
        RunEvent::MessageCompleted(message) => (
            MESSAGE_COMPLETED,
            text(&MessageCompleted {
                message: MessageView::new((**message).clone(), reader),
            }),
        ),
        RunEvent::Ended(outcome) => {
            let name = match outcome.run.status {
                RunStatus::Completed => "run.completed",
                RunStatus::Incomplete => "run.incomplete",
                RunStatus::Cancelled => "run.cancelled",
                RunStatus::Expired => "run.expired",
                _ => "run.failed",
            };
            (
                name,
                text(&Ended {
                    run: RunView::from(outcome.run.clone()),
                }),
            )
        }
    };
    Event::default()
        .id(format!("{run}:{n}"))
        .event(name)
        .data(data)
}

fn text(data: &impl Serialize) -> String {
    serde_json::to_string(data).unwrap_or_default()
}

const QUEUED: &str = "run.queued";
const STARTED: &str = "run.started";
const RECOVERED: &str = "run.recovered";
const DELTA: &str = "message.delta";
const REQUIRES_ACTION: &str = "run.requires_action";
const MESSAGE_COMPLETED: &str = "message.completed";
const ENDS: [&str; 5] = [
    "run.completed",
    "run.incomplete",
    "run.failed",
    "run.cancelled",
    "run.expired",
];
const RECONNECT: &str = "stream.reconnect";

#[derive(Serialize, ToSchema)]
struct Queued {
    run_id: RunId,
    thread_id: ThreadId,
    /// Position in the queue; 1 is the next run.
    #[schema(minimum = 1)]
    position: i64,
}

#[derive(Serialize, ToSchema)]
struct Started {
    run_id: RunId,
    thread_id: ThreadId,
}

#[derive(Serialize, ToSchema)]
#[expect(clippy::struct_field_names, reason = "the run has the same name")]
struct Recovered<'a> {
    run_id: RunId,
    thread_id: ThreadId,
    recovered: &'a Recovery,
}

#[derive(Serialize, ToSchema)]
struct Delta<'a> {
    text: &'a str,
    /// The number of the message in its run, from 0; 0 where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<u32>,
    /// What the message is for, if the upstream says it.
    #[serde(skip_serializing_if = "Option::is_none")]
    phase: Option<Phase>,
}

#[derive(Serialize, ToSchema)]
struct RequiresAction {
    run_id: RunId,
    thread_id: ThreadId,
    #[serde(flatten)]
    action: RequiredActionView,
}

#[derive(Serialize, ToSchema)]
struct MessageCompleted {
    /// The reply, which is in the transcript now.
    message: MessageView,
}

#[derive(Serialize, ToSchema)]
struct Ended {
    run: RunView,
}

/// The stream ends because this replica stops, and the run goes on.
#[derive(Serialize, ToSchema)]
struct Reconnect<'a> {
    /// The path at which the client can read the next events.
    events: &'a str,
    /// The id to send in `Last-Event-ID`; `null`: send none.
    #[schema(required)]
    after: Option<String>,
}

/// Any event of a stream with its fields: `event`, `data`, and `id`, which `stream.reconnect` lacks.
pub(super) struct EventView;

impl ToSchema for EventView {
    fn name() -> Cow<'static, str> {
        "Event".into()
    }

    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        fn add<T: ToSchema>(schemas: &mut Vec<(String, RefOr<Schema>)>) {
            T::schemas(schemas);
            schemas.push((T::name().into_owned(), T::schema()));
        }
        add::<Queued>(schemas);
        add::<Started>(schemas);
        add::<Recovered<'_>>(schemas);
        add::<Delta<'_>>(schemas);
        add::<RequiresAction>(schemas);
        add::<MessageCompleted>(schemas);
        add::<Ended>(schemas);
        add::<Reconnect<'_>>(schemas);
    }
}

impl PartialSchema for EventView {
    fn schema() -> RefOr<Schema> {
        fn event<T: ToSchema>(names: &[&str]) -> ObjectBuilder {
            let name = ObjectBuilder::new()
                .schema_type(Type::String)
                .enum_values(Some(names.to_vec()));
            ObjectBuilder::new()
                .property("event", name)
                .property("data", Ref::from_schema_name(T::name()))
                .required("event")
                .required("data")
        }
        let with_id = |event: ObjectBuilder| {
            let id = ObjectBuilder::new()
                .schema_type(Type::String)
                .pattern(Some("^run_[0-9a-f]{32}:[0-9]+$"))
                .description(Some("The value for `Last-Event-ID`. Opaque."));
            event.property("id", id).required("id")
        };
        OneOfBuilder::new()
            .item(with_id(event::<Queued>(&[QUEUED])))
            .item(with_id(event::<Started>(&[STARTED])))
            .item(with_id(event::<Recovered<'_>>(&[RECOVERED])))
            .item(with_id(event::<Delta<'_>>(&[DELTA])))
            .item(with_id(event::<RequiresAction>(&[REQUIRES_ACTION])))
            .item(with_id(event::<MessageCompleted>(&[MESSAGE_COMPLETED])))
            .item(with_id(event::<Ended>(&ENDS)))
            .item(event::<Reconnect<'_>>(&[RECONNECT]))
            .into()
    }
}

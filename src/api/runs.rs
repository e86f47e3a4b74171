//! `…/runs` and below: runs a thread again, lists, shows, cancels and streams runs, and takes tool
//! outputs.

use axum::extract::State;
use axum::http::{HeaderName, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use futures_util::StreamExt;
use serde_json::json;

use super::authorize::OnlyRepeats;
use super::caller::Caller;
use super::extract::{ApiConversation, ApiJson, ApiOptions, ApiPage, ApiRun, LastEventId};
use super::forwarded::Prefix;
use super::messages::{NewRun, submit};
use super::openapi::Doc;
use super::problem::{
    NOT_FOUND, NOTHING_TO_RUN, OTHER_REPLICA, QUEUE_FULL, RUN_NOT_WAITING, THREAD_BUSY,
    TOO_MANY_READERS, TOO_MANY_RUNS,
};
use super::run_response::{Asked, ResponseMode, answer, answer_doc, scope_of};
use super::sse;
use super::sse::EventView;
use super::state::AppState;
use super::views::{ListView, MessageView, PostOutputs, PostRun, RunAndMessageView, RunView};
use crate::domain::RunId;
use crate::error::Error;
use crate::runs::{NewOutputs, Resumed};

pub(super) fn create_doc() -> Doc {
    let doc = Doc::new("runs", "create_run", "Runs the assistant again without a new message.")
        .about(
            "Answers the last messages of the user, with the options and in the forms of a message. They \
             are not added again. A reply to them stays in the transcript, and the model no longer knows it.",
        )
        .optional_body::<PostRun>();
    answer_doc(doc).refuses(&[THREAD_BUSY, NOTHING_TO_RUN, QUEUE_FULL, TOO_MANY_RUNS])
}

/// Answers the last messages of the user again, in one of the three forms of [`answer`].
pub(super) async fn create(
    State(state): State<AppState>,
    Caller(caller): Caller,
    only_repeats: Option<Extension<OnlyRepeats>>,
    ApiConversation(key): ApiConversation,
    asked: Asked,
    ApiOptions(body, idempotency, share): ApiOptions<PostRun>,
) -> Result<Response, Error> {
    let new = NewRun {
        content: None,
        options: body,
        only_repeats,
        idempotency,
        share,
    };
    submit(&state, &caller, key, &asked, new).await
}

pub(super) fn list_doc() -> Doc {
    Doc::new(
        "runs",
        "list_runs",
        "Lists the runs of the conversation's thread.",
    )
    .page::<RunId>()
    .lists::<RunView>("A page of runs.")
    .refuses(&[NOT_FOUND])
}

pub(super) async fn list(
    State(state): State<AppState>,
    ApiConversation(key): ApiConversation,
    ApiPage(page, _): ApiPage<RunId>,
) -> Result<Json<ListView<RunView>>, Error> {
    let page = state.runs.runs(&key, &page).await?;
    Ok(Json(ListView::new(
        page,
        |run| run.id.to_string(),
        RunView::from,
    )))
}

pub(super) fn show_doc() -> Doc {
    Doc::new(
        "runs",
        "get_run",
        "Shows one run with its reply, if it has one.",
    )
    .gives::<RunAndMessageView>(StatusCode::OK, "The run.")
    .refuses(&[NOT_FOUND])
}

pub(super) async fn show(
    State(state): State<AppState>,
    Caller(caller): Caller,
    ApiConversation(key): ApiConversation,
    ApiRun(id): ApiRun,
) -> Result<Json<RunAndMessageView>, Error> {
    let (run, message) = state.runs.run(&key, id).await?;
    Ok(Json(RunAndMessageView {
        run: run.into(),
        message: message.map(|message| MessageView::new(message, caller.reader())),
    }))
}

pub(super) fn cancel_doc() -> Doc {
    Doc::new(
        "runs",
        "cancel_run",
        "Cancels a run and answers with its end.",
    )
    .about("A run that has ended already stays as it is.")
    .gives::<RunAndMessageView>(
        StatusCode::OK,
        "The run after its end, or, if that takes too long, its present state.",
    )
    .refuses(&[NOT_FOUND])
}

/// Cancels a run and answers with its end.
pub(super) async fn cancel(
    State(state): State<AppState>,
    Caller(caller): Caller,
    ApiConversation(key): ApiConversation,
    ApiRun(id): ApiRun,
) -> Result<Json<RunAndMessageView>, Error> {
    let (run, message) = state.runs.cancel(&key, id).await?;
    Ok(Json(RunAndMessageView {
        run: run.into(),
        message: message.map(|message| MessageView::new(message, caller.reader())),
    }))
}

pub(super) fn tool_outputs_doc() -> Doc {
    let doc = Doc::new("runs", "submit_tool_outputs", "Sends a run the outputs of its function calls.")
        .about(
            "One request has all outputs. The run then goes on, and the gateway answers as it answers a \
             message. A user's own token may send outputs only to a run of an assistant whose \
             configuration has `client_tools = true`.",
        )
        .body::<PostOutputs>();
    answer_doc(doc).refuses(&[RUN_NOT_WAITING, OTHER_REPLICA])
}

/// Sends a run the outputs of its function calls, and answers from there as for a message.
pub(super) async fn tool_outputs(
    State(state): State<AppState>,
    Caller(caller): Caller,
    only_repeats: Option<Extension<OnlyRepeats>>,
    ApiConversation(key): ApiConversation,
    ApiRun(id): ApiRun,
    asked: Asked,
    ApiJson(body, idempotency, _share): ApiJson<PostOutputs>,
) -> Result<Response, Error> {
    let new = NewOutputs {
        outputs: body.tool_outputs,
        by_user: caller.user.is_some(),
        idempotency,
        only_repeats: only_repeats.map(|Extension(OnlyRepeats(why))| why),
    };
    let Resumed { submitted, from } = state.runs.answer_tools(&key, id, new).await?;
    let form = ResponseMode {
        stream: body.stream,
        asked: &asked,
        reader: caller.reader(),
        on_drop: None,
    };
    answer(&state, &key, submitted, from, form).await
}

pub(super) fn events_doc() -> Doc {
    let last = json!({"type": "string", "pattern": "^(run_[0-9a-f]{32}:[0-9]{1,19})?$"});
    Doc::new(
        "runs",
        "stream_run_events",
        "Streams the events of a run, from the first one to its end.",
    )
    .header(
        &HeaderName::from_static("last-event-id"),
        &last,
        "The id of the last event that the caller has seen: the stream begins after it.",
    )
    .streams::<EventView>(
        "text/event-stream",
        "The events of the run. The schema shows the fields of one event, with `data` parsed as JSON.",
    )
    .gives_nothing(
        StatusCode::NO_CONTENT,
        "The run has ended, and the caller has seen its last event.",
    )
    .refuses(&[NOT_FOUND, TOO_MANY_READERS])
}

/// Streams the events of a run to its end, from the first event or after the last one that the caller
/// has seen. A caller that has seen the end gets a 204, which makes an `EventSource` stop.
pub(super) async fn events(
    State(state): State<AppState>,
    Caller(caller): Caller,
    ApiConversation(key): ApiConversation,
    ApiRun(id): ApiRun,
    uri: Uri,
    prefix: Prefix,
    LastEventId(last): LastEventId,
) -> Result<Response, Error> {
    let (run, follow) = state.runs.follow(&key, id).await?;
    let limit = state.server.max_readers_per_run.get();
    let seat = state
        .readers
        .take(&id)
        .map_err(|_| Error::TooManyReaders { limit })?;
    let from = match last {
        None => 0,
        Some((of, n)) if of == id => n.saturating_add(1),
        Some((of, _)) => {
            return Err(Error::Malformed(format!(
                "`last-event-id` names the run {of}, and the path names the run {id}: send an id of this \
                 stream, or none"
            )));
        }
    };
    let events = if run.status.is_final() {
        let Some(rest) = follow.rest(from).await? else {
            return Ok(StatusCode::NO_CONTENT.into_response());
        };
        rest
    } else {
        follow.events(from)
    };
    let events = events.inspect(move |_| _ = &seat).boxed();
    let scope = scope_of(&prefix, &uri);
    Ok(sse::until_ended(
        &run,
        &scope,
        last.map(|(_, n)| n),
        events,
        caller.reader(),
        state.server.stream_keep_alive,
    ))
}

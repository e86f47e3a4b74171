//! `…/runs` and below

use axum::extract::State;
use axum::http::{HeaderName, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use futures_util::StreamExt;
use serde_json::json;

use super::authorize::OnlyRepeats;
use super::caller::Caller;
use super::extract::{ApiConversation, ApiJson, ApiPage, ApiRun, LastEventId};
use super::forwarded::Prefix;
use super::openapi::Doc;
use super::problem::{NOT_FOUND, OTHER_REPLICA, RUN_NOT_WAITING, TOO_MANY_READERS};
use super::run_response::{Asked, ResponseMode, answer, answer_doc, scope_of};
use super::sse;
use super::sse::EventView;
use super::state::AppState;
use super::views::{ListView, PostOutputs, RunAndMessageView, RunView};
use crate::domain::RunId;
use crate::error::Error;
use crate::runs::{NewOutputs, Resumed};

pub(super) fn list_doc() -> Doc {
    Doc::new(
        "runs",
        "list_runs",
        "The runs of the conversation's thread.",
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
    Doc::new("runs", "get_run", "One run with its reply, if it has one.")
        .gives::<RunAndMessageView>(StatusCode::OK, "The run.")
        .refuses(&[NOT_FOUND])
}

pub(super) async fn show(
    State(state): State<AppState>,
    ApiConversation(key): ApiConversation,
    ApiRun(id): ApiRun,
) -> Result<Json<RunAndMessageView>, Error> {
    let (run, message) = state.runs.run(&key, id).await?;
    Ok(Json(RunAndMessageView {
        run: run.into(),
        message: message.map(Into::into),
    }))
}

pub(super) fn cancel_doc() -> Doc {
    Doc::new(
        "runs",
        "cancel_run",
        "Cancels a run and tells how it ended.",
    )
    .about("One that had ended is told as it is.")
    .gives::<RunAndMessageView>(
        StatusCode::OK,
        "The run as it ended, or, after a bounded wait, as it is.",
    )
    .refuses(&[NOT_FOUND])
}

/// Cancels a run and tells how it ended.
pub(super) async fn cancel(
    State(state): State<AppState>,
    ApiConversation(key): ApiConversation,
    ApiRun(id): ApiRun,
) -> Result<Json<RunAndMessageView>, Error> {
    let (run, message) = state.runs.cancel(&key, id).await?;
    Ok(Json(RunAndMessageView {
        run: run.into(),
        message: message.map(Into::into),
    }))
}

pub(super) fn tool_outputs_doc() -> Doc {
    let doc = Doc::new("runs", "submit_tool_outputs", "Answers the function calls of a run, which goes on.")
        .about(
            "All outputs at once. Answered like a message. A user's own token may send them only for a run of an \
             assistant whose configuration has `client_tools = true`.",
        )
        .body::<PostOutputs>();
    answer_doc(doc).refuses(&[RUN_NOT_WAITING, OTHER_REPLICA])
}

/// Hands a run the outputs of its function calls, and answers like a message from there on.
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
        on_drop: None,
    };
    answer(&state, &key, submitted, from, form).await
}

pub(super) fn events_doc() -> Doc {
    let last = json!({"type": "string", "pattern": "^(run_[0-9a-f]{32}:[0-9]{1,19})?$"});
    Doc::new(
        "runs",
        "stream_run_events",
        "The run's events, from the first one to its end.",
    )
    .header(
        &HeaderName::from_static("last-event-id"),
        &last,
        "The id of the event that the caller saw last: the stream goes on after it.",
    )
    .streams::<EventView>(
        "text/event-stream",
        "Each event with its fields, `data` as JSON.",
    )
    .gives_nothing(StatusCode::NO_CONTENT, "The caller has seen the end.")
    .refuses(&[NOT_FOUND, TOO_MANY_READERS])
}

/// The run's events, from the first one or after the one that the caller saw last, to its end. A caller that saw the
/// end hears that nothing more will come (204), so that an `EventSource` stops asking.
pub(super) async fn events(
    State(state): State<AppState>,
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
                "`last-event-id` names the run {of}, the path {id}"
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
        state.server.stream_keep_alive,
    ))
}

//! `…/runs` and below

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use futures_util::stream;

use super::extract::{ApiConversation, ApiJson, ApiPage, ApiRun, LastEventId};
use super::turn::{Form, answer, scope_of};
use super::views::{ListView, PostOutputs, RunAndMessageView, RunView};
use super::{AppState, sse};
use crate::domain::RunId;
use crate::error::Error;
use crate::runs::NewOutputs;

pub(super) async fn list(
    State(state): State<AppState>,
    ApiConversation(key): ApiConversation,
    ApiPage(page, _): ApiPage<RunId>,
) -> Result<Json<ListView<RunView>>, Error> {
    let page = state.runs.runs(&key, &page).await?;
    Ok(Json(ListView::new(page, |run| run.id.to_string(), RunView::from)))
}

pub(super) async fn show(
    State(state): State<AppState>,
    ApiConversation(key): ApiConversation,
    ApiRun(id): ApiRun,
) -> Result<Json<RunAndMessageView>, Error> {
    let (run, message) = state.runs.run(&key, id).await?;
    Ok(Json(RunAndMessageView { run: run.into(), message: message.map(Into::into) }))
}

/// Cancels a run and tells how it ended.
pub(super) async fn cancel(
    State(state): State<AppState>,
    ApiConversation(key): ApiConversation,
    ApiRun(id): ApiRun,
) -> Result<Json<RunAndMessageView>, Error> {
    let (run, message) = state.runs.cancel(&key, id).await?;
    Ok(Json(RunAndMessageView { run: run.into(), message: message.map(Into::into) }))
}

/// Hands a run the outputs of its function calls, and answers like a message from there on.
pub(super) async fn tool_outputs(
    State(state): State<AppState>,
    ApiConversation(key): ApiConversation,
    ApiRun(id): ApiRun,
    uri: Uri,
    headers: HeaderMap,
    ApiJson(body, idempotency): ApiJson<PostOutputs>,
) -> Result<Response, Error> {
    let new = NewOutputs { outputs: body.tool_outputs, idempotency };
    let (submitted, from) = state.runs.answer_tools(&key, id, new).await?;
    let form = Form { stream: body.stream, headers: &headers, uri: &uri, on_drop: None };
    answer(&state, &key, submitted, from, form).await
}

/// The run's events, from the first one or after the one that the caller saw last, to its end. A caller that saw the
/// end hears that nothing more will come (204), so that an `EventSource` stops asking.
pub(super) async fn events(
    State(state): State<AppState>,
    ApiConversation(key): ApiConversation,
    ApiRun(id): ApiRun,
    uri: Uri,
    LastEventId(last): LastEventId,
) -> Result<Response, Error> {
    let (run, follow) = state.runs.follow(&key, id).await?;
    let limit = state.server.max_readers.get();
    let seat = state.readers.take(&id).map_err(|_| Error::TooManyReaders { limit })?;
    let from = match last {
        None => 0,
        Some((of, n)) if of == id => n.saturating_add(1),
        Some((of, _)) => {
            return Err(Error::Malformed(format!("`last-event-id` names the run {of}, the path {id}")));
        }
    };
    let mut events = follow.events(from);
    if run.status.is_final() {
        let Some(first) = events.next().await else { return Ok(StatusCode::NO_CONTENT.into_response()) };
        events = stream::iter([first]).chain(events).boxed();
    }
    let events = events.inspect(move |_| _ = &seat).boxed();
    Ok(sse::until_ended(&run, scope_of(&uri), last.map(|(_, n)| n), events, state.server.keep_alive))
}

//! `/v1/users/{user}`: all data of a user.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use futures_util::{StreamExt, stream};

use super::caller::Caller;
use super::deletions::{HowToDelete, deleted, deleted_doc};
use super::extract::{ApiConversation, ApiPage, ApiQuery};
use super::forwarded::Prefix;
use super::openapi::Doc;
use super::state::AppState;
use super::views::{ListView, ThreadView, list_threads};
use crate::domain::ThreadId;
use crate::error::Error;
use crate::export_import::Line;
use crate::lifecycle::Target;
use crate::store::ThreadFilter;

pub(super) fn threads_doc() -> Doc {
    Doc::new("users", "list_user_threads", "Lists all threads of a user.")
        .about("The list includes archived threads, and threads that are being deleted.")
        .page::<ThreadId>()
        .lists::<ThreadView>("A page of threads.")
}

/// Lists all threads of a user, including archived ones and those that are being deleted.
pub(super) async fn threads(
    State(state): State<AppState>,
    ApiConversation(key): ApiConversation,
    ApiPage(page, _): ApiPage<ThreadId>,
) -> Result<Json<ListView<ThreadView>>, Error> {
    let filter = ThreadFilter {
        user: Some(key.user),
        ..ThreadFilter::all(key.tenant)
    };
    Ok(Json(list_threads(
        &state.runs,
        state.runs.threads(&filter, &page).await?,
    )))
}

pub(super) fn delete_doc() -> Doc {
    deleted_doc(Doc::new(
        "users",
        "delete_user",
        "Erases all data of a user, here and upstream.",
    ))
}

/// Erases all data of a user, here and upstream. Answers 202 if that takes longer than the caller waits.
pub(super) async fn delete(
    State(state): State<AppState>,
    ApiConversation(key): ApiConversation,
    ApiQuery(how): ApiQuery<HowToDelete>,
    prefix: Prefix,
    headers: HeaderMap,
) -> Result<Response, Error> {
    deleted(
        &state,
        Target::User(key.tenant, key.user),
        &how,
        &prefix,
        &headers,
    )
    .await
}

pub(super) fn export_doc() -> Doc {
    Doc::new(
        "users",
        "export_user",
        "Exports all data of a user, line by line.",
    )
    .about("The last line counts the others. An export without it was cut off.")
    .streams::<Line>("application/x-ndjson", "Each line is a JSON object.")
}

/// Streams all data of a user, line by line, as fast as the caller reads.
pub(super) async fn export(
    State(state): State<AppState>,
    Caller(caller): Caller,
    ApiConversation(key): ApiConversation,
) -> Result<Response, Error> {
    let mut lines = state
        .runs
        .export(key.tenant, key.user, caller.reader())
        .boxed();
    // Reads the first line before the answer begins, so that an unavailable store is a problem document.
    let first = lines.next().await.transpose()?;
    let lines = stream::iter(first.map(Ok)).chain(lines);
    let headers = [(header::CONTENT_TYPE, "application/x-ndjson")];
    Ok((headers, Body::from_stream(lines)).into_response())
}

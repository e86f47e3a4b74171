//! Calls for operators: threads of all users, and a pass of the janitor at once.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Datelike, Utc};
use serde::Deserialize;
use utoipa::IntoParams;

use super::caller::Caller;
use super::extract::{ApiId, ApiPage, ApiQuery};
use super::openapi::Doc;
use super::problem::{DRAINING, NOT_FOUND, UPSTREAM_ERROR, UPSTREAM_TIMEOUT};
use super::state::AppState;
use super::threads::{Verify, show_named};
use super::views::{
    ListView, MessageView, OutlookView, ReportView, TallyView, ThreadView, list_threads,
};
use crate::domain::{Lifecycle, MessageId, ThreadId, ThreadState, UserKey};
use crate::error::Error;
use crate::store::{ThreadFilter, ThreadName};

/// Selects the threads that match every parameter that is set.
#[derive(Debug, Deserialize, IntoParams)]
pub(super) struct Filter {
    /// Threads of this user.
    #[param(inline, value_type = Option<UserKey>)]
    user: Option<String>,
    /// Threads on the upstream with this name.
    #[param(pattern = r"^[^\u0000]*$")]
    upstream: Option<String>,
    lifecycle: Option<Lifecycle>,
    state: Option<ThreadState>,
    created_before: Option<DateTime<Utc>>,
    inactive_since: Option<DateTime<Utc>>,
}

pub(super) fn threads_doc() -> Doc {
    Doc::new(
        "operators",
        "list_threads",
        "Lists threads of all users of the tenant.",
    )
    .about("The answer has the threads that match every parameter that is set.")
    .page::<ThreadId>()
    .query::<Filter>()
    .lists::<ThreadView>("A page of threads.")
}

pub(super) async fn threads(
    State(state): State<AppState>,
    Caller(caller): Caller,
    ApiPage(page, wanted): ApiPage<ThreadId, Filter>,
) -> Result<Json<ListView<ThreadView>>, Error> {
    let user = wanted.user.map(UserKey::try_from).transpose();
    let filter = ThreadFilter {
        user: user.map_err(|error| Error::Malformed(format!("`user`: {error}")))?,
        upstream: wanted.upstream.map(without_nul).transpose()?,
        lifecycle: wanted.lifecycle,
        state: wanted.state,
        created_before: within_the_calendar("created_before", wanted.created_before)?,
        inactive_since: within_the_calendar("inactive_since", wanted.inactive_since)?,
        ..ThreadFilter::all(caller.tenant)
    };
    Ok(Json(list_threads(
        &state.runs,
        state.runs.threads(&filter, &page).await?,
    )))
}

/// Refuses years that RFC 3339 does not know. The parser takes them, but not every database does.
fn within_the_calendar(
    name: &str,
    time: Option<DateTime<Utc>>,
) -> Result<Option<DateTime<Utc>>, Error> {
    if time.is_some_and(|time| !(0..=9999).contains(&time.year())) {
        return Err(Error::Malformed(format!(
            "`{name}`: the year must be between 0000 and 9999"
        )));
    }
    Ok(time)
}

/// Refuses NUL characters, which a text of Postgres cannot hold.
fn without_nul(upstream: String) -> Result<String, Error> {
    if upstream.contains('\0') {
        return Err(Error::Malformed(
            "`upstream` must not contain NUL characters".to_owned(),
        ));
    }
    Ok(upstream)
}

pub(super) fn thread_doc() -> Doc {
    Doc::new(
        "operators",
        "get_thread_by_id",
        "Shows the statistics of any thread, archived or not.",
    )
    .query::<Verify>()
    .gives::<ReportView>(StatusCode::OK, "The thread.")
    .refuses(&[NOT_FOUND, UPSTREAM_ERROR, UPSTREAM_TIMEOUT])
}

/// Shows the statistics of one thread.
pub(super) async fn thread(
    State(state): State<AppState>,
    Caller(caller): Caller,
    ApiId(id): ApiId<ThreadId>,
    ApiQuery(query): ApiQuery<Verify>,
) -> Result<Json<ReportView>, Error> {
    show_named(&state, ThreadName::Id(&caller.tenant, id), &query).await
}

pub(super) fn messages_doc() -> Doc {
    Doc::new(
        "operators",
        "list_messages_by_id",
        "Lists the transcript of any thread, archived or not.",
    )
    .page::<MessageId>()
    .lists::<MessageView>("A page of messages.")
    .refuses(&[NOT_FOUND])
}

/// Lists the transcript of one thread.
pub(super) async fn messages(
    State(state): State<AppState>,
    Caller(caller): Caller,
    ApiId(id): ApiId<ThreadId>,
    ApiPage(page, _): ApiPage<MessageId>,
) -> Result<Json<ListView<MessageView>>, Error> {
    let page = state
        .runs
        .messages(ThreadName::Id(&caller.tenant, id), false, &page)
        .await?;
    Ok(Json(ListView::new(
        page,
        |message| message.id.to_string(),
        |message| MessageView::new(message, caller.reader()),
    )))
}

/// Bounds of a pass of the janitor.
#[derive(Debug, Deserialize, IntoParams)]
pub(super) struct Cleanup {
    /// `true`: change nothing, and answer with what the janitor would do, and why.
    #[serde(default)]
    dry_run: bool,
    /// Most threads to work on; 100 if absent.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
}

pub(super) fn cleanup_doc() -> Doc {
    Doc::new("operators", "clean_up", "Runs a pass of the janitor now.")
        .about("The pass goes on if the caller leaves.")
        .query::<Cleanup>()
        .gives_one_of::<TallyView, OutlookView>(
            StatusCode::OK,
            "What the janitor did. With `dry_run`: what it would do, and why.",
        )
        .refuses(&[DRAINING])
}

/// Runs a pass of the janitor now. The pass goes on if the caller leaves.
pub(super) async fn cleanup(
    State(state): State<AppState>,
    ApiQuery(query): ApiQuery<Cleanup>,
) -> Result<Response, Error> {
    let limit = query.limit.unwrap_or(100);
    if !(1..=1000).contains(&limit) {
        return Err(Error::Malformed(
            "`limit` must be between 1 and 1000".to_owned(),
        ));
    }
    if query.dry_run {
        return Ok(Json(OutlookView::from(state.janitor.dry_run_of(limit).await?)).into_response());
    }
    Ok(Json(TallyView::from(state.janitor.clean_up(limit).await?)).into_response())
}

//! What operators ask: threads of all users, and clean-up now.

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

/// Which threads are wanted: those that fit all that is set.
#[derive(Debug, Deserialize, IntoParams)]
pub(super) struct Filter {
    /// Of this user.
    #[param(inline, value_type = Option<UserKey>)]
    user: Option<String>,
    /// On the upstream of this name.
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
        "Threads of all users of the tenant.",
    )
    .about("Those that fit all that is set.")
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

/// Years that RFC 3339 knows. Others can be written too, and not every database takes them.
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

/// Postgres knows no such text.
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
        "The statistics of any thread, archived ones, too.",
    )
    .query::<Verify>()
    .gives::<ReportView>(StatusCode::OK, "The thread.")
    .refuses(&[NOT_FOUND, UPSTREAM_ERROR, UPSTREAM_TIMEOUT])
}

/// The statistics of one thread.
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
        "The transcript of any thread, archived ones, too.",
    )
    .page::<MessageId>()
    .lists::<MessageView>("A page of messages.")
    .refuses(&[NOT_FOUND])
}

/// The transcript of one thread.
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
        MessageView::from,
    )))
}

/// How much is to be cleaned up.
#[derive(Debug, Deserialize, IntoParams)]
pub(super) struct Cleanup {
    /// Only tell what would be done, and why.
    #[serde(default)]
    dry_run: bool,
    /// Threads; 100 if absent.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
}

pub(super) fn cleanup_doc() -> Doc {
    Doc::new(
        "operators",
        "clean_up",
        "Does the work in the background now.",
    )
    .about("What it began goes on if the caller leaves.")
    .query::<Cleanup>()
    .gives_one_of::<TallyView, OutlookView>(
        StatusCode::OK,
        "What was done; with `dry_run` what would be done, and why.",
    )
    .refuses(&[DRAINING])
}

/// Has the janitor look now. What it began goes on if the caller leaves.
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

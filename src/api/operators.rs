//! What operators ask: threads of all users, and clean-up now.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;

use super::AppState;
use super::extract::{ApiId, ApiPage, ApiQuery};
use super::guard::Caller;
use super::threads::{Verify, show_named};
use super::views::{ListView, MessageView, OutlookView, ReportView, TallyView, ThreadView, list_threads};
use crate::domain::{Lifecycle, MessageId, ThreadId, ThreadState, Timestamp, UserKey};
use crate::error::Error;
use crate::store::{ThreadFilter, ThreadName};

/// Which threads are wanted: those that fit all that is set.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Filter {
    user: Option<String>,
    upstream: Option<String>,
    lifecycle: Option<Lifecycle>,
    state: Option<ThreadState>,
    created_before: Option<Timestamp>,
    inactive_since: Option<Timestamp>,
}

pub(super) async fn threads(
    State(state): State<AppState>,
    Caller(caller): Caller,
    ApiPage(page, wanted): ApiPage<ThreadId, Filter>,
) -> Result<Json<ListView<ThreadView>>, Error> {
    let user = wanted.user.map(UserKey::try_from).transpose();
    let filter = ThreadFilter {
        user: user.map_err(|error| Error::Malformed(format!("`user`: {error}")))?,
        upstream: wanted.upstream,
        lifecycle: wanted.lifecycle,
        state: wanted.state,
        created_before: wanted.created_before,
        inactive_since: wanted.inactive_since,
        ..ThreadFilter::all(caller.tenant)
    };
    Ok(Json(list_threads(&state.runs, state.runs.threads(&filter, &page).await?)))
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

/// The transcript of one thread.
pub(super) async fn messages(
    State(state): State<AppState>,
    Caller(caller): Caller,
    ApiId(id): ApiId<ThreadId>,
    ApiPage(page, _): ApiPage<MessageId>,
) -> Result<Json<ListView<MessageView>>, Error> {
    let page = state.runs.messages(ThreadName::Id(&caller.tenant, id), false, &page).await?;
    Ok(Json(ListView::new(page, |message| message.id.to_string(), MessageView::from)))
}

/// How much is to be cleaned up.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Cleanup {
    /// Only tell what would be done, and why.
    #[serde(default)]
    dry_run: bool,
    /// Threads: 1 to 1000.
    limit: Option<u32>,
}

/// Has the janitor look now. What it began goes on if the caller leaves.
pub(super) async fn cleanup(
    State(state): State<AppState>,
    ApiQuery(query): ApiQuery<Cleanup>,
) -> Result<Response, Error> {
    let limit = query.limit.unwrap_or(100);
    if !(1..=1000).contains(&limit) {
        return Err(Error::Malformed("`limit` must be between 1 and 1000".to_owned()));
    }
    if query.dry_run {
        return Ok(Json(OutlookView::from(state.keeper.outlook(limit).await?)).into_response());
    }
    Ok(Json(TallyView::from(state.keeper.clean_up(limit).await?)).into_response())
}

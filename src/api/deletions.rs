//! `/v1/deletions`: what came of requests to delete.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::AppState;
use super::extract::{ApiId, ApiPage};
use super::guard::Caller;
use super::prefer::Prefer;
use super::views::DeletionView;
use crate::domain::{DeletionId, ThreadId};
use crate::error::Error;
use crate::life::{NO_DELETION, Target};

/// Deletes, and tells what came of it, or where to ask for that.
pub(super) async fn deleted(
    state: &AppState,
    target: Target,
    headers: &HeaderMap,
) -> Result<Response, Error> {
    let report = state.keeper.delete_all(target, Prefer::of(headers).patience()).await?;
    let status = if report.finished_at.is_some() { StatusCode::OK } else { StatusCode::ACCEPTED };
    let place = [(header::LOCATION, format!("/v1/deletions/{}", report.id))];
    Ok((status, place, Json(DeletionView::from(report))).into_response())
}

/// The receipt, with a page of its threads.
pub(super) async fn show(
    State(state): State<AppState>,
    Caller(caller): Caller,
    ApiId(id): ApiId<DeletionId>,
    ApiPage(page, _): ApiPage<ThreadId>,
) -> Result<Json<DeletionView>, Error> {
    if page.before.is_some() {
        return Err(Error::Malformed("this list takes `after` and `limit`, oldest first".to_owned()));
    }
    let report = state.keeper.report(&caller.tenant, id, page.after, page.limit).await?;
    // Whose it was is not known any more once it is done.
    if caller.user.is_some() && caller.user != report.user {
        return Err(NO_DELETION);
    }
    Ok(Json(report.into()))
}

//! `…/thread` and below

use axum::Json;
use axum::extract::State;

use super::AppState;
use super::extract::{ApiKey, ApiWhich};
use super::views::{ListView, RunView, ThreadView};
use crate::domain::Page;
use crate::error::Error;

pub(super) async fn show(
    State(state): State<AppState>,
    ApiKey(key): ApiKey,
) -> Result<Json<ThreadView>, Error> {
    let (thread, activity) = state.runs.thread(&key).await?;
    Ok(Json(ThreadView::new(thread, activity)))
}

/// Cancels runs of the thread and tells how they ended.
pub(super) async fn cancel(
    State(state): State<AppState>,
    ApiKey(key): ApiKey,
    ApiWhich(which): ApiWhich,
) -> Result<Json<ListView<RunView>>, Error> {
    let runs = state.runs.cancel_some(&key, which).await?;
    Ok(Json(ListView::new(Page { data: runs, has_more: false }, |run| run.id.to_string(), RunView::from)))
}

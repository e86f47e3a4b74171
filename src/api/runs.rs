//! `…/runs` and below

use axum::Json;
use axum::extract::State;

use super::AppState;
use super::extract::{ApiKey, ApiPage, ApiRun};
use super::views::{ListView, RunAndMessageView, RunView};
use crate::domain::RunId;
use crate::error::Error;

pub(super) async fn list(
    State(state): State<AppState>,
    ApiKey(key): ApiKey,
    ApiPage(page): ApiPage<RunId>,
) -> Result<Json<ListView<RunView>>, Error> {
    let page = state.runs.runs(&key, &page).await?;
    Ok(Json(ListView::new(page, |run| run.id.to_string(), RunView::from)))
}

pub(super) async fn show(
    State(state): State<AppState>,
    ApiKey(key): ApiKey,
    ApiRun(id): ApiRun,
) -> Result<Json<RunAndMessageView>, Error> {
    let (run, message) = state.runs.run(&key, id).await?;
    Ok(Json(RunAndMessageView { run: run.into(), message: message.map(Into::into) }))
}

/// Cancels a run and tells how it ended.
pub(super) async fn cancel(
    State(state): State<AppState>,
    ApiKey(key): ApiKey,
    ApiRun(id): ApiRun,
) -> Result<Json<RunAndMessageView>, Error> {
    let (run, message) = state.runs.cancel(&key, id).await?;
    Ok(Json(RunAndMessageView { run: run.into(), message: message.map(Into::into) }))
}

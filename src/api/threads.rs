//! `…/thread`

use axum::Json;
use axum::extract::State;

use super::AppState;
use super::extract::ApiKey;
use super::views::ThreadView;
use crate::error::Error;

pub(super) async fn show(
    State(state): State<AppState>,
    ApiKey(key): ApiKey,
) -> Result<Json<ThreadView>, Error> {
    let (thread, activity) = state.runs.thread(&key).await?;
    Ok(Json(ThreadView::new(thread, activity)))
}

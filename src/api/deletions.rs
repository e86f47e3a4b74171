//! `/v1/deletions`: what came of requests to delete.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use utoipa::IntoParams;

use super::caller::Caller;
use super::extract::{ApiId, ApiPage};
use super::forwarded::Prefix;
use super::openapi::Doc;
use super::prefer::Prefer;
use super::problem::NOT_FOUND;
use super::state::AppState;
use super::views::{DeletableView, DeletionView};
use crate::domain::{Deletion, DeletionId, ThreadId};
use crate::error::Error;
use crate::lifecycle::Target;

/// How to delete.
#[derive(Debug, Deserialize, IntoParams)]
pub(super) struct HowToDelete {
    /// The current threads become archives: their transcripts stay here, read only, and nothing stays upstream.
    #[serde(default)]
    archive: bool,
    /// Nothing is deleted: the answer tells what would be.
    #[serde(default)]
    dry_run: bool,
}

/// Deletes, and tells what came of it, or where to ask for that; or tells what would be deleted.
pub(super) async fn deleted(
    state: &AppState,
    target: Target,
    how: &HowToDelete,
    prefix: &Prefix,
    headers: &HeaderMap,
) -> Result<Response, Error> {
    let end = if how.archive {
        Deletion::Archive
    } else {
        Deletion::Erase
    };
    if how.dry_run {
        let found = state.janitor.deletable(target, end).await?;
        return Ok(Json(DeletableView::new(found, how.archive)).into_response());
    }
    let report = state
        .janitor
        .delete_all(target, end, Prefer::of(headers).patience())
        .await?;
    let status = if report.finished_at.is_some() {
        StatusCode::OK
    } else {
        StatusCode::ACCEPTED
    };
    let place = [(
        header::LOCATION,
        format!("{}/v1/deletions/{}", prefix.0, report.id),
    )];
    Ok((status, place, Json(DeletionView::from(report))).into_response())
}

/// What deletions have in common.
pub(super) fn deleted_doc(doc: Doc) -> Doc {
    doc.query::<HowToDelete>()
        .prefer()
        .gives_one_of::<DeletionView, DeletableView>(
            StatusCode::OK,
            "The receipt: all is deleted here, and upstream but for what it counts as left. With `dry_run`: what would be deleted.",
        )
        .gives::<DeletionView>(
            StatusCode::ACCEPTED,
            "It takes longer than the caller waits (10 s), and goes on in the background.",
        )
        .with_some(StatusCode::OK, &header::LOCATION)
        .with(StatusCode::ACCEPTED, &[&header::LOCATION])
}

pub(super) fn show_doc() -> Doc {
    Doc::new("deletions", "get_deletion", "What came of a request to delete.")
        .about(
            "Of its threads this shows a page, oldest first. It names no user; a user's own token opens it, before it is \
             completed and afterwards.",
        )
        .page_after::<ThreadId>()
        .gives::<DeletionView>(StatusCode::OK, "The receipt.")
        .refuses(&[NOT_FOUND])
}

/// The receipt, with a page of its threads.
pub(super) async fn show(
    State(state): State<AppState>,
    Caller(caller): Caller,
    ApiId(id): ApiId<DeletionId>,
    ApiPage(page, _): ApiPage<ThreadId>,
) -> Result<Json<DeletionView>, Error> {
    Ok(Json(
        state
            .janitor
            .report_to(&caller, id, page.after, page.limit)
            .await?
            .into(),
    ))
}

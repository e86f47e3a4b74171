//! `/v1/deletions`: receipts of deletions, and the answer that all requests to delete share.

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
    /// `true`: archive the current threads. Their transcripts stay here, read only. Nothing stays
    /// upstream.
    #[serde(default)]
    archive: bool,
    /// `true`: delete nothing, and answer with what the request would delete.
    #[serde(default)]
    dry_run: bool,
}

/// Deletes and answers with the receipt. With `dry_run`, answers with what it would delete. Answers 202
/// with the path of the receipt if the deletion takes longer than the caller waits.
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

/// Describes what all requests to delete take and give.
pub(super) fn deleted_doc(doc: Doc) -> Doc {
    doc.query::<HowToDelete>()
        .prefer()
        .gives_one_of::<DeletionView, DeletableView>(
            StatusCode::OK,
            "The receipt: everything is deleted here, and upstream except what the receipt counts as left. \
             With `dry_run`: what the request would delete.",
        )
        .gives::<DeletionView>(
            StatusCode::ACCEPTED,
            "The receipt so far: the deletion takes longer than the caller waits (10 s), and goes on in \
             the background.",
        )
        .with_some(StatusCode::OK, &header::LOCATION)
        .with(StatusCode::ACCEPTED, &[&header::LOCATION])
}

pub(super) fn show_doc() -> Doc {
    Doc::new("deletions", "get_deletion", "Shows the receipt of a deletion.")
        .about(
            "The receipt has a page of the deleted threads, oldest first. It names no user. A token of the \
             deleted user opens it, before and after the deletion is completed.",
        )
        .page_after::<ThreadId>()
        .gives::<DeletionView>(StatusCode::OK, "The receipt.")
        .refuses(&[NOT_FOUND])
}

/// Shows the receipt, with a page of its threads.
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

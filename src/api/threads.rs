//! `…/thread` and below: a conversation's thread as a whole.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use utoipa::{IntoParams, ToSchema};

use super::deletions::{HowToDelete, deleted, deleted_doc};
use super::extract::{ApiConversation, ApiJson, ApiQuery, ApiWhich, WhichQuery};
use super::forwarded::Prefix;
use super::messages::metadata_within;
use super::openapi::Doc;
use super::problem::{NOT_FOUND, UPSTREAM_ERROR, UPSTREAM_TIMEOUT};
use super::state::AppState;
use super::views::{ListView, PatchThread, ReportView, RunView, TtlMs, cancelled};
use crate::domain::NewLife;
use crate::error::Error;
use crate::lifecycle::Target;
use crate::runs::Renewed;
use crate::store::ThreadName;
use crate::upstream::RateLimiter;

/// What the statistics are to be compared with.
#[derive(Debug, Deserialize, IntoParams)]
pub(super) struct Verify {
    /// Compares the transcript with the upstream thread.
    #[param(inline)]
    verify: Option<Against>,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Against {
    Upstream,
}

pub(super) fn show_doc() -> Doc {
    Doc::new(
        "threads",
        "get_thread",
        "The thread: ids, state, counts, last run, expiry.",
    )
    .about("From the record alone unless a comparison is asked for.")
    .query::<Verify>()
    .gives::<ReportView>(StatusCode::OK, "The thread.")
    .refuses(&[NOT_FOUND, UPSTREAM_ERROR, UPSTREAM_TIMEOUT])
}

/// The statistics of the thread, from the record alone unless a comparison is asked for.
pub(super) async fn show(
    State(state): State<AppState>,
    ApiConversation(key): ApiConversation,
    ApiQuery(query): ApiQuery<Verify>,
) -> Result<Json<ReportView>, Error> {
    show_named(&state, ThreadName::Newest(&key), &query).await
}

/// The statistics of any thread.
pub(super) async fn show_named(
    state: &AppState,
    name: ThreadName<'_>,
    query: &Verify,
) -> Result<Json<ReportView>, Error> {
    let report = state.runs.thread(name).await?;
    let verified = match query.verify {
        None => None,
        Some(Against::Upstream) => Some(
            state
                .runs
                .verify(&report.thread, &RateLimiter::UNBOUND)
                .await?,
        ),
    };
    Ok(Json(ReportView::new(&state.runs, report, verified)))
}

pub(super) fn update_doc() -> Doc {
    Doc::new(
        "threads",
        "update_thread",
        "Changes metadata, all of it, or how long the thread lives.",
    )
    .body::<PatchThread>()
    .gives::<ReportView>(StatusCode::OK, "The thread as it is now.")
    .refuses(&[NOT_FOUND])
}

/// Changes metadata, all of it, or how long the thread lives.
pub(super) async fn update(
    State(state): State<AppState>,
    ApiConversation(key): ApiConversation,
    ApiJson(body, ..): ApiJson<PatchThread>,
) -> Result<Json<ReportView>, Error> {
    let life = match body.ttl_ms {
        TtlMs::Absent => None,
        TtlMs::Null => Some(NewLife::AsConfigured),
        TtlMs::Given(ttl) => Some(state.runs.life(&key, Duration::from_millis(ttl))?),
    };
    let metadata = metadata_within(&state, body.metadata)?;
    let report = state.runs.update_thread(&key, metadata, life).await?;
    Ok(Json(ReportView::new(&state.runs, report, None)))
}

pub(super) fn delete_doc() -> Doc {
    let doc = Doc::new(
        "threads",
        "delete_thread",
        "Deletes the conversation, here and upstream.",
    )
    .about(
        "What runs or waits is cancelled. A message that comes meanwhile starts a fresh thread.",
    );
    deleted_doc(doc).refuses(&[NOT_FOUND])
}

/// Deletes the conversation; 202 if it takes longer than the caller waits.
pub(super) async fn delete(
    State(state): State<AppState>,
    ApiConversation(key): ApiConversation,
    ApiQuery(how): ApiQuery<HowToDelete>,
    prefix: Prefix,
    headers: HeaderMap,
) -> Result<Response, Error> {
    deleted(&state, Target::Conversation(key), &how, &prefix, &headers).await
}

pub(super) fn roll_over_doc() -> Doc {
    Doc::new("threads", "roll_over_thread", "Archives the thread and starts a fresh one.")
        .about(
            "The fresh one begins with the last messages, which the model is told, and all runs that wait.",
        )
        .gives::<ReportView>(StatusCode::OK, "The fresh thread.")
        .gives::<ReportView>(StatusCode::ACCEPTED, "The thread: that has to wait for a run.")
        .refuses(&[NOT_FOUND, UPSTREAM_ERROR, UPSTREAM_TIMEOUT])
}

/// Archives the thread and starts a fresh one; 202 if that has to wait for a run.
pub(super) async fn roll_over(
    State(state): State<AppState>,
    ApiConversation(key): ApiConversation,
) -> Result<Response, Error> {
    let (status, thread) = match state.runs.roll_over(&key).await? {
        Renewed::Now(thread) => (StatusCode::OK, thread),
        Renewed::Later(thread) => (StatusCode::ACCEPTED, thread),
    };
    let report = state
        .runs
        .thread(ThreadName::Id(&key.tenant, thread.id))
        .await?;
    Ok((status, Json(ReportView::new(&state.runs, report, None))).into_response())
}

pub(super) fn cancel_doc() -> Doc {
    Doc::new(
        "threads",
        "cancel_runs",
        "Cancels runs of the thread and tells how they ended.",
    )
    .query::<WhichQuery>()
    .lists::<RunView>("The runs that were cancelled.")
    .refuses(&[NOT_FOUND])
}

/// Cancels runs of the thread and tells how they ended.
pub(super) async fn cancel(
    State(state): State<AppState>,
    ApiConversation(key): ApiConversation,
    ApiWhich(which): ApiWhich,
) -> Result<Json<ListView<RunView>>, Error> {
    Ok(Json(cancelled(state.runs.cancel_some(&key, which).await?)))
}

//! `/healthz` and `/readyz`: whether the process lives, and whether it may take traffic.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde_json::{Value, json};

use super::openapi::Doc;
use super::problem::{DRAINING, STORE_UNAVAILABLE};
use super::state::AppState;
use crate::error::Error;

pub(super) fn healthz_doc() -> Doc {
    let schema = json!({"type": "object", "required": ["status"], "properties": {"status": {"const": "ok"}}});
    Doc::new("health", "healthz", "The process answers.").gives_as(
        StatusCode::OK,
        "application/json",
        &schema,
        "The process lives.",
    )
}

/// Answers 200 while the process lives. It does not look at the database, because an outage of the
/// database must not restart replicas.
pub(super) async fn healthz() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

pub(super) fn readyz_doc() -> Doc {
    let schema = json!({"type": "object", "required": ["status"], "properties": {"status": {"const": "ready"}}});
    Doc::new("health", "readyz", "The process may take traffic.")
        .about(
            "The database answers, its schema fits this version, and the process is not shutting down.",
        )
        .gives_as(
            StatusCode::OK,
            "application/json",
            &schema,
            "The process may take traffic.",
        )
        .refuses(&[DRAINING, STORE_UNAVAILABLE])
}

/// Answers 200 if the store answers, its schema fits, and the replica is not shutting down.
pub(super) async fn readyz(State(state): State<AppState>) -> Result<Json<Value>, Error> {
    match state.runs.ready().await {
        Ok(()) => Ok(Json(json!({"status": "ready"}))),
        // The load balancer must choose another replica, so every error of the store is a 503.
        Err(Error::Internal(Some(cause))) => match cause.downcast() {
            Ok(store) => Err(Error::StoreUnavailable(Some(*store))),
            Err(other) => Err(Error::Internal(Some(other))),
        },
        Err(other) => Err(other),
    }
}

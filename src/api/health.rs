//! Is the process alive, and may it take traffic.

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
        "It lives.",
    )
}

/// The process answers. Depends on nothing else, so that a database outage restarts no replica.
pub(super) async fn healthz() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

pub(super) fn readyz_doc() -> Doc {
    let schema = json!({"type": "object", "required": ["status"], "properties": {"status": {"const": "ready"}}});
    Doc::new("health", "readyz", "The process may take traffic.")
        .about(
            "The store answers, its schema is the right one, and the process is not shutting down.",
        )
        .gives_as(StatusCode::OK, "application/json", &schema, "It may.")
        .refuses(&[DRAINING, STORE_UNAVAILABLE])
}

/// The store answers, its schema is ours, and the replica is not shutting down.
pub(super) async fn readyz(State(state): State<AppState>) -> Result<Json<Value>, Error> {
    match state.runs.ready().await {
        Ok(()) => Ok(Json(json!({"status": "ready"}))),
        // Whatever is wrong with the store, the load balancer is to look elsewhere.
        Err(Error::Internal(Some(cause))) => match cause.downcast() {
            Ok(store) => Err(Error::StoreUnavailable(Some(*store))),
            Err(other) => Err(Error::Internal(Some(other))),
        },
        Err(other) => Err(other),
    }
}

//! Is the process alive, and may it take traffic.

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::AppState;
use crate::error::Error;

/// The process answers. Depends on nothing else, so that a database outage restarts no replica.
pub(super) async fn healthz() -> Json<Value> {
    Json(json!({"status": "ok"}))
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

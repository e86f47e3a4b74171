//! What handlers reach.

use std::sync::Arc;

use axum::extract::FromRef;

use super::limits::Limits;
use crate::auth::Auth;
use crate::config::ServerConfig;
use crate::domain::RunId;
use crate::lifecycle::Janitor;
use crate::locks::{Budget, KeyedSemaphore};
use crate::runs::Runs;

/// What handlers reach.
#[derive(Clone, Debug)]
pub struct AppState {
    pub runs: Runs,
    pub janitor: Janitor,
    pub auth: Arc<Auth>,
    pub limits: Arc<Limits>,
    /// For those who follow a run's events.
    pub readers: Arc<KeyedSemaphore<RunId>>,
    /// Memory for the bodies of requests.
    pub bodies: Budget,
    pub server: Arc<ServerConfig>,
    /// Addresses of clients are logged.
    pub logs_clients: bool,
}

impl FromRef<AppState> for Arc<ServerConfig> {
    fn from_ref(state: &AppState) -> Self {
        Arc::clone(&state.server)
    }
}

//! The state that handlers share.

use std::sync::Arc;

use axum::extract::FromRef;

use super::limits::Limits;
use crate::auth::Auth;
use crate::config::ServerConfig;
use crate::domain::RunId;
use crate::lifecycle::Janitor;
use crate::locks::{Budget, KeyedSemaphore};
use crate::runs::Runs;

/// The state that handlers share.
#[derive(Clone, Debug)]
pub struct AppState {
    pub runs: Runs,
    pub janitor: Janitor,
    pub auth: Arc<Auth>,
    pub limits: Arc<Limits>,
    /// Permits for readers of a run's events.
    pub readers: Arc<KeyedSemaphore<RunId>>,
    /// Memory for the bodies of requests.
    pub bodies: Budget,
    pub server: Arc<ServerConfig>,
    /// Whether the log has the addresses of clients.
    pub logs_clients: bool,
}

impl FromRef<AppState> for Arc<ServerConfig> {
    fn from_ref(state: &AppState) -> Self {
        Arc::clone(&state.server)
    }
}

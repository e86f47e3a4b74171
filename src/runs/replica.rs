//! This process among its peers: it keeps its session alive and takes over what dead replicas left unfinished.

use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};
use tracing::Instrument;

use super::{Runs, turn};
use crate::domain::RunStatus;
use crate::store::{Orphan, StoreError};

/// Orphans taken at a time.
const ADOPT_BATCH: u32 = 64;

impl Runs {
    /// Registers this replica. Must have succeeded before the first run is submitted.
    pub async fn register(&self, address: &str, session_ttl: Duration) -> Result<(), StoreError> {
        let parts = &self.parts.given;
        parts.store.renew_replica(parts.replica, address, session_ttl).await
    }

    /// Renews the session three times in its life and looks for orphans as often, until the stop; then gives
    /// the session up.
    pub async fn keep_session(self, address: String, session_ttl: Duration) {
        let parts = &self.parts.given;
        let mut ticks = interval(session_ttl / 3);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = parts.stop.cancelled() => break,
                _ = ticks.tick() => {}
            }
            if let Err(error) = self.register(&address, session_ttl).await {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "cannot renew this replica's session"
                );
                continue;
            }
            if !parts.draining.is_cancelled() {
                self.adopt().await;
            }
        }
    }

    /// Gives the session up: whatever this replica still owns can be adopted at once.
    pub async fn retire(&self) {
        let parts = &self.parts.given;
        if let Err(error) = parts.store.retire_replica(parts.replica).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "cannot give up this replica's session");
        }
    }

    /// Takes over the runs of dead replicas: those that waited wait on here, those at work are ended.
    async fn adopt(&self) {
        let parts = &self.parts.given;
        loop {
            let orphans = match parts.store.adopt_orphans(parts.replica, ADOPT_BATCH).await {
                Ok(orphans) => orphans,
                Err(error) => {
                    tracing::error!(
                        error = &error as &dyn std::error::Error,
                        "cannot look for orphaned runs"
                    );
                    return;
                }
            };
            let is_last = orphans.len() < ADOPT_BATCH as usize;
            for Orphan { lease, thread, run } in orphans {
                let span = tracing::info_span!("run", run.id = %run.id, key = %thread.key.fingerprint());
                span.in_scope(
                    || tracing::warn!(status = %run.status, "took over a run whose replica is gone"),
                );
                if run.status == RunStatus::Queued {
                    parts.tasks.spawn(turn::resume_queued(self.clone(), lease, thread, run).instrument(span));
                } else {
                    parts.tasks.spawn(turn::bury(self.clone(), lease, thread, run).instrument(span));
                }
            }
            if is_last {
                return;
            }
        }
    }
}

//! This process among its peers: it keeps its session alive, and does what others ask of its runs.

use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};

use crate::domain::set_clock;
use crate::error::Chain;
use crate::runs::Runs;
use crate::store::{News, Request, StoreError};

/// Longest time for the last word to the store.
const RETIRE_TIMEOUT: Duration = Duration::from_secs(2);
/// How often all are asked to let go while the session has lapsed: a run may just have begun.
const LET_GO_EVERY: Duration = Duration::from_millis(50);

impl Runs {
    /// Says that this replica is alive for another `ttl`; the first call registers it and must have succeeded
    /// before the first run is submitted.
    ///
    /// The session counts as lapsed here a tenth of `ttl` before it does in the database, and is counted from before the
    /// call: what has to stop by then has stopped when others may begin.
    ///
    /// # Errors
    /// The store failed, or did not answer within a third of `ttl`.
    pub async fn renew(&self, address: &str, ttl: Duration) -> Result<(), StoreError> {
        let begun = Instant::now();
        let parts = &self.parts.given;
        let renewed = timeout(ttl / 3, parts.store.renew_replica(parts.replica, address, ttl)).await;
        let renewed = renewed.unwrap_or_else(|_| Err(StoreError::Unavailable("no answer in time".into())))?;
        self.parts.notifier.set_peers(renewed.has_peers);
        set_clock(renewed.now);
        self.parts.registry.renewed(begun + ttl * 9 / 10);
        Ok(())
    }

    /// Keeps the session, takes over what nobody works on, and exchanges with the other replicas what they need to
    /// know, until the stop.
    pub async fn keep_session(self, address: String, ttl: Duration) {
        let work = async {
            tokio::join!(
                self.keep_renewing(&address, ttl),
                self.watch_session(),
                self.attend(ttl),
                self.take_over(ttl),
                self.record(),
                self.listen(),
                self.deliver(),
            )
        };
        tokio::select! {
            biased;
            () = self.parts.given.stop.cancelled() => {}
            _ = work => {}
        }
    }

    async fn keep_renewing(&self, address: &str, ttl: Duration) {
        let mut ticks = interval(ttl / 3);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut stops = false;
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                // It says, too, whether there are others: who started while this one did not hear yet has told that in vain.
                () = self.parts.notifier.missed.notified() => {}
                // Who stops wants to know whether there are others to go on.
                () = self.parts.given.draining.cancelled(), if !stops => stops = true,
            }
            let lapsed = self.parts.registry.has_lapsed();
            if lapsed {
                // If the store was away, the others could not renew either, and are not dead.
                self.parts.registry.trust_from(Instant::now() + ttl);
            }
            match self.renew(address, ttl).await {
                Ok(()) if lapsed => {
                    tracing::warn!("this replica has a session again; others may have taken over its runs");
                }
                Ok(()) => {}
                Err(error) => {
                    tracing::error!(error = %Chain(&error), "cannot renew this replica's session");
                }
            }
        }
    }

    /// Has all runs let go when the session lapses: from then on others may go on with them.
    async fn watch_session(&self) {
        let registry = &self.parts.registry;
        loop {
            sleep_until(registry.good_until()).await;
            if !registry.has_lapsed() {
                continue;
            }
            tracing::error!(
                runs = registry.runs().len(),
                "this replica's session could not be renewed in time; letting go of its runs"
            );
            while registry.has_lapsed() {
                registry.let_go();
                sleep(LET_GO_EVERY).await;
            }
        }
    }

    /// Gives the session up: whatever this replica still owns can be adopted at once.
    pub async fn retire(&self) {
        let parts = &self.parts.given;
        let last = async {
            // What cannot be told is found by the others all the same.
            let _ = self.deliver_once().await;
            parts.store.retire_replica(parts.replica).await?;
            parts.store.tell(&[News::Orphans]).await
        };
        match timeout(RETIRE_TIMEOUT, last).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(error = %Chain(&error), "cannot give up this replica's session");
            }
            Err(_) => tracing::warn!("cannot give up this replica's session in time"),
        }
    }

    /// Has all tasks let go of their runs, for other replicas or the next process to go on with, if these can know what
    /// that takes.
    pub fn let_go(&self) {
        if self.store().keeps_content() {
            self.parts.registry.let_go();
        }
    }

    /// Does what others ask of the runs that this process works on, when it hears of it and as often as it renews its
    /// session.
    async fn attend(&self, ttl: Duration) {
        let limit = ttl / 3;
        loop {
            self.look_for_requests(limit).await;
            self.give_up_lost(limit).await;
            tokio::select! {
                () = self.parts.notifier.asked.notified() => {}
                () = sleep(limit) => {}
            }
        }
    }

    async fn look_for_requests(&self, limit: Duration) {
        let parts = &self.parts.given;
        let requests = match timeout(limit, parts.store.requests(parts.replica)).await {
            Ok(Ok(requests)) => requests,
            Ok(Err(error)) => {
                return tracing::error!(error = %Chain(&error), "cannot ask what others want of our runs");
            }
            Err(_) => return tracing::error!("cannot ask in time what others want of our runs"),
        };
        for request in requests {
            match request {
                Request::Cancel { run, discard } => {
                    if let Some(handle) = self.parts.registry.handle(run) {
                        handle.cancel.request(discard);
                    }
                }
                Request::Resume { run, outputs } => {
                    if let Some(handle) = self.parts.registry.handle(run) {
                        handle.answer(outputs);
                    }
                }
            }
        }
    }

    /// Tells the tasks of runs that others have taken over, one that was to be cancelled in line among them.
    async fn give_up_lost(&self, limit: Duration) {
        let (parts, active) = (&self.parts.given, self.parts.registry.runs());
        if active.is_empty() {
            return;
        }
        // What cannot be asked now is asked again with the next renewal.
        if let Ok(Ok(lost)) = timeout(limit, parts.store.lost(parts.replica, &active)).await {
            for handle in lost.into_iter().filter_map(|run| self.parts.registry.handle(run)) {
                handle.let_go();
            }
        }
    }
}

//! This process among its peers: it keeps its session alive, does what others ask of its runs, and takes over those
//! that nobody works on.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::failure::Failure;
use super::feed::{Feed, FeedWriter};
use super::{Runs, turn, work};
use crate::domain::{RunId, RunStatus, ToolOutput};
use crate::error::Chain;
use crate::store::{Orphan, Request, StoreError};

/// Orphans taken at a time.
const ADOPT_BATCH: u32 = 64;
/// The events of a run that changes hands are numbered on from here, as a power of two for each change: beyond all
/// that the one before can have shown.
const EVENTS_PER_FENCE: u32 = 32;
/// Longest time for the last word to the store.
const RETIRE_TIMEOUT: Duration = Duration::from_secs(2);

/// What this process knows of its own standing.
#[derive(Debug)]
pub(super) struct Standing {
    /// Runs that a task of this process works on, from before they are recorded until their end is.
    working: Arc<Mutex<HashMap<RunId, Handle>>>,
    /// Until when the session is surely good, by this process's own clock.
    good_until: Mutex<Instant>,
}

/// What others in this process can do about a run that it works on.
#[derive(Clone, Debug)]
pub(super) struct Handle {
    /// Tells this task's entry from a later one of the same run.
    serial: u64,
    pub(super) cancel: Cancel,
    pub(super) feed: Feed,
    outputs: Arc<watch::Sender<Vec<ToolOutput>>>,
    lost: CancellationToken,
}

impl Handle {
    /// Hands the run outputs of its function calls. Those that it does not wait for (any more) are passed over.
    pub(super) fn answer(&self, outputs: Vec<ToolOutput>) {
        self.outputs.send_replace(outputs);
    }
}

/// Somebody wants a run to end.
#[derive(Clone, Debug)]
pub(super) struct Cancel {
    token: CancellationToken,
    discard: Arc<AtomicBool>,
}

impl Cancel {
    pub(super) fn new(token: CancellationToken) -> Self {
        Self { token, discard: Arc::default() }
    }

    /// `discard`: and its messages to be removed.
    pub(super) fn request(&self, discard: bool) {
        self.discard.fetch_or(discard, Ordering::SeqCst);
        self.token.cancel();
    }

    pub(super) async fn requested(&self) {
        self.token.cancelled().await;
    }

    pub(super) fn discards(&self) -> bool {
        self.discard.load(Ordering::SeqCst)
    }
}

/// Says, while it lives, that this process works on a run.
#[derive(Debug)]
pub(super) struct Working {
    run: RunId,
    serial: u64,
    pub(super) cancel: Cancel,
    pub(super) feed: FeedWriter,
    /// What was [handed](Handle::answer) last.
    pub(super) outputs: watch::Receiver<Vec<ToolOutput>>,
    /// Cancelled when others have taken the run over.
    pub(super) lost: CancellationToken,
    all: Arc<Mutex<HashMap<RunId, Handle>>>,
}

impl Standing {
    pub(super) fn new() -> Self {
        Self { working: Arc::default(), good_until: Mutex::new(Instant::now()) }
    }

    /// Says that a task works on a run under a lease with this fence.
    pub(super) fn works_on(&self, run: RunId, fence: i64, cancel: CancellationToken) -> Working {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let (cancel, feed) = (Cancel::new(cancel), FeedWriter::new((fence - 1) << EVENTS_PER_FENCE));
        let (sender, outputs) = watch::channel(Vec::new());
        let (feed_end, lost) = (feed.feed(), CancellationToken::new());
        let handle = Handle {
            serial,
            cancel: cancel.clone(),
            feed: feed_end,
            outputs: Arc::new(sender),
            lost: lost.clone(),
        };
        lock(&self.working).insert(run, handle);
        Working { run, serial, cancel, feed, outputs, lost, all: Arc::clone(&self.working) }
    }

    /// The runs that tasks of this process work on.
    fn runs(&self) -> Vec<RunId> {
        lock(&self.working).keys().copied().collect()
    }

    pub(super) fn handle(&self, run: RunId) -> Option<Handle> {
        lock(&self.working).get(&run).cloned()
    }

    /// Others may take this process for dead.
    pub(super) fn has_lapsed(&self) -> bool {
        Instant::now() >= *lock(&self.good_until)
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        let mut all = lock(&self.all);
        // A run that was lost and taken over again has another task's entry by now.
        if all.get(&self.run).is_some_and(|handle| handle.serial == self.serial) {
            all.remove(&self.run);
        }
    }
}

impl Runs {
    /// Says that this replica is alive for another `ttl`; the first call registers it and must have succeeded
    /// before the first run is submitted.
    ///
    /// # Errors
    /// The store failed, or did not answer within a third of `ttl`.
    pub async fn renew(&self, address: &str, ttl: Duration) -> Result<(), StoreError> {
        let begun = Instant::now();
        let parts = &self.parts.given;
        let renewed = timeout(ttl / 3, parts.store.renew_replica(parts.replica, address, ttl)).await;
        renewed.unwrap_or_else(|_| Err(StoreError::Unavailable("no answer in time".into())))?;
        *lock(&self.parts.standing.good_until) = begun + ttl;
        Ok(())
    }

    /// Renews the session three times in its life and looks for orphans as often, until the stop.
    ///
    /// After a renewal that came too late, orphans are left alone for one session's time: if the store was away,
    /// the others could not renew either, and are not dead.
    pub async fn keep_session(self, address: String, ttl: Duration) {
        let parts = &self.parts.given;
        let mut ticks = interval(ttl / 3);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut adopt_from = Instant::now();
        loop {
            tokio::select! {
                biased;
                () = parts.stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let lapsed = self.parts.standing.has_lapsed();
            if let Err(error) = self.renew(&address, ttl).await {
                tracing::error!(
                    error = %Chain(&error),
                    "cannot renew this replica's session"
                );
                continue;
            }
            if lapsed {
                tracing::warn!(
                    "this replica's session was renewed late; others may have taken over its runs"
                );
                adopt_from = Instant::now() + ttl;
            }
            self.attend(ttl / 3).await;
            self.give_up_lost(ttl / 3).await;
            while Instant::now() >= adopt_from && !parts.draining.is_cancelled() && self.adopt(ttl / 3).await
            {
                if self.renew(&address, ttl).await.is_err() {
                    break;
                }
            }
        }
    }

    /// Gives the session up: whatever this replica still owns can be adopted at once.
    pub async fn retire(&self) {
        let parts = &self.parts.given;
        match timeout(RETIRE_TIMEOUT, parts.store.retire_replica(parts.replica)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(
                    error = %Chain(&error),
                    "cannot give up this replica's session"
                );
            }
            Err(_) => tracing::warn!("cannot give up this replica's session in time"),
        }
    }

    /// Does what other replicas asked of the runs that this one works on.
    async fn attend(&self, limit: Duration) {
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
                    if let Some(handle) = self.parts.standing.handle(run) {
                        handle.cancel.request(discard);
                    }
                }
                Request::Resume { run, outputs } => {
                    if let Some(handle) = self.parts.standing.handle(run) {
                        handle.answer(outputs);
                    }
                }
            }
        }
    }

    /// Tells the tasks of runs that others have taken over, one that was to be cancelled in line among them.
    async fn give_up_lost(&self, limit: Duration) {
        let (parts, working) = (&self.parts.given, self.parts.standing.runs());
        if working.is_empty() {
            return;
        }
        // What cannot be asked now is asked again with the next renewal.
        if let Ok(Ok(lost)) = timeout(limit, parts.store.lost(parts.replica, &working)).await {
            for handle in lost.into_iter().filter_map(|run| self.parts.standing.handle(run)) {
                handle.lost.cancel();
            }
        }
    }

    /// Takes over runs that nobody works on: those that waited, in line or for tool outputs, wait on here, those at
    /// work are ended. `true` if there may be more.
    async fn adopt(&self, limit: Duration) -> bool {
        let parts = &self.parts.given;
        let working = self.parts.standing.runs();
        let adopted = timeout(limit, parts.store.adopt_orphans(parts.replica, &working, ADOPT_BATCH)).await;
        // What an answer that is given up had taken over, the next look finds as strays.
        let orphans =
            match adopted.unwrap_or_else(|_| Err(StoreError::Unavailable("no answer in time".into()))) {
                Ok(orphans) => orphans,
                Err(error) => {
                    tracing::error!(error = %Chain(&error), "cannot look for orphaned runs");
                    return false;
                }
            };
        let may_be_more = orphans.len() == ADOPT_BATCH as usize;
        let mut never_start = Vec::new();
        for orphan in orphans {
            let Orphan { lease, thread, run, .. } = &orphan;
            let working = self.parts.standing.works_on(run.id, lease.fence, CancellationToken::new());
            let span = tracing::info_span!("run", run.id = %run.id, key = %thread.key.fingerprint());
            span.in_scope(|| tracing::warn!(status = %run.status, "took over a run that nobody worked on"));
            // Its admission failed as far as its sender knows, so it must not run.
            let was_refused = orphan.previous_owner == Some(parts.replica) && lease.fence == 2;
            if run.status == RunStatus::Queued && orphan.content_lost && !was_refused {
                never_start.push((working, orphan));
                continue;
            }
            let runs = self.clone();
            let task = async move {
                match orphan.run.status {
                    RunStatus::Queued if !was_refused => turn::resume_queued(runs, working, orphan).await,
                    RunStatus::RequiresAction => work::resume_waiting(runs, working, orphan).await,
                    RunStatus::InProgress if orphan.outputs.is_some() && !orphan.content_lost => {
                        work::resume_waiting(runs, working, orphan).await;
                    }
                    _ if was_refused => work::bury(runs, working, orphan, Failure::NotRecorded).await,
                    _ => work::bury(runs, working, orphan, Failure::ReplicaLost).await,
                }
            };
            parts.tasks.spawn(task.instrument(span));
        }
        if !never_start.is_empty() {
            parts.tasks.spawn(turn::give_up(self.clone(), never_start));
        }
        may_be_more
    }
}

/// Nothing in here panics half-way through a change.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

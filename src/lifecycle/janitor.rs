//! The background work. Replicas share it by leasing small batches of threads that are due.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::{StreamExt, stream};
use rand::RngExt;
use tokio::time::{Instant, sleep, timeout};
use tracing::Instrument;

use super::Janitor;
use crate::domain::{Deletion, Lifecycle, LifecycleTask, Limits, Thread, Timestamp};
use crate::error::{Chain, Error};
use crate::runs::Unverified;
use crate::store::{DueThread, OrphanName, Pruned, StoreError, UpstreamOrphan};
use crate::upstream::UpstreamError;

/// Lease of a thread. If the replica dies, another one can take the thread after that time.
const LEASE: Duration = Duration::from_mins(5);
/// Longest time of one attempt at a thread. An attempt that takes longer is retried later like a
/// failed one, and resumes. A thread that is too close to the end of its lease is not begun, so
/// that no other replica works on it at the same time.
const ITEM_TIMEOUT: Duration = Duration::from_mins(4);
/// Pause before an attempt's result is recorded again after a database outage.
const RECORD_AGAIN: Duration = Duration::from_secs(1);
/// First back-off after a failure. It doubles with each consecutive one.
const FIRST_BACK_OFF: Duration = Duration::from_secs(15);
/// Longest back-off after failures.
const LONGEST_BACK_OFF: Duration = Duration::from_hours(1);
/// Rows of each kind that one statement prunes.
const PRUNE_BATCH: u32 = 1000;
/// Messages, and runs, of a thread that one statement erases.
const ERASE_BATCH: u32 = 1000;
/// Threads of one batch in the review of limits after the start.
const REVIEW_BATCH: u32 = 1000;
/// Pause between two batches of that review.
const REVIEW_PAUSE: Duration = Duration::from_millis(100);
/// Longest time for pruning in one pass, so that threads are not kept waiting. The next pass,
/// which follows at once, prunes the rest.
const PRUNE_TIME: Duration = Duration::from_secs(20);

/// The results of a pass.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct PassSummary {
    /// Threads that had expired and are now archived.
    pub expired: u64,
    /// Archived threads whose upstream copy is now deleted.
    pub cleared: u64,
    /// Archived threads whose retention is over and that are being erased.
    pub discarded: u64,
    /// Deletions that are finished.
    pub deleted: u64,
    /// Upstream orphans that were found and deleted.
    pub upstream_orphans: u64,
    /// Threads and upstream orphans that failed. They are tried again.
    pub failed: u64,
    pub pruned: Pruned,
    /// The pass did not do all that was due.
    pub has_more: bool,
}

/// The tasks that a pass would do.
#[derive(Clone, Debug)]
pub struct DryRun {
    pub plans: Vec<Plan>,
    pub upstream_orphans: Vec<UpstreamOrphan>,
    pub prunable: Pruned,
    pub has_more: bool,
}

/// The task for one thread.
#[derive(Clone, Debug)]
pub struct Plan {
    pub thread: Thread,
    pub task: LifecycleTask,
}

/// The reason why the work on a thread stopped half-way. It is tried again.
#[derive(Debug, thiserror::Error)]
pub(super) enum JanitorError {
    #[error("the database failed")]
    Store(#[from] StoreError),
    #[error("the upstream `{name}` failed: {error}")]
    Upstream {
        name: String,
        #[source]
        error: UpstreamError,
    },
    #[error("{0} runs of the thread have not ended yet")]
    RunsGoOn(usize),
    #[error("messages that other clients wrote to the upstream thread cannot be read: {0}")]
    Unverified(#[from] Unverified),
    #[error("an upstream thread is being created for the thread")]
    Underway,
    #[error("the time limit for one attempt was reached")]
    TimeIsUp,
    #[error("the thread's runs could not be cancelled: {0}")]
    Cancel(String),
}

impl Janitor {
    /// Runs passes until the process is to stop.
    pub async fn work(self) {
        let draining = self.ctx.parts.draining.clone();
        // Dropped work is resumed when its lease is taken again.
        let work = async {
            self.apply_changed_limits().await;
            loop {
                match self.run_pass(u32::MAX).await {
                    Ok(summary) if summary.has_more => continue,
                    Ok(_) => {}
                    Err(error) => {
                        tracing::warn!(error = %Chain(&error), "the janitor cannot finish its pass");
                    }
                }
                let pause = self
                    .ctx
                    .parts
                    .janitor
                    .interval
                    .mul_f64(rand::rng().random_range(0.5..=1.5));
                tokio::select! {
                    () = sleep(pause) => {}
                    () = self.ctx.wake.notified() => {}
                }
            }
        };
        tokio::select! {
            () = draining.cancelled() => {}
            () = work => {}
        }
    }

    /// Applies the configured limits to threads that were created under other limits.
    async fn apply_changed_limits(&self) {
        let mut after = None;
        loop {
            match self
                .store()
                .apply_changed_limits(after, REVIEW_BATCH, &self.ctx.parts.lifetimes)
                .await
            {
                Ok(None) => return,
                Ok(last) => after = last,
                Err(error) => {
                    tracing::warn!(error = %Chain(&error), "the janitor cannot apply changed limits to the threads");
                }
            }
            sleep(REVIEW_PAUSE).await;
        }
    }

    /// Does the work that is due, for up to `most` threads.
    ///
    /// # Errors
    /// The store failed. The work until then is done.
    pub async fn run_pass(&self, most: u32) -> Result<PassSummary, StoreError> {
        let counts = Arc::new(Counts::default());
        let mut left = most;
        loop {
            let batch = self.ctx.parts.janitor.batch_size.get().min(left);
            if batch == 0 {
                break;
            }
            let due = self.store().lease_due_threads(batch, LEASE).await?;
            let got = u32::try_from(due.len()).unwrap_or(u32::MAX);
            self.process_all(due, &counts).await;
            left = left.saturating_sub(got);
            // A thread that was just archived is due again.
            if got == 0 {
                break;
            }
        }
        self.look_for_upstream_orphans(&counts).await?;
        let (pruned, pruned_all) = self.prune().await?;
        let summary = PassSummary {
            pruned,
            has_more: left == 0 || !pruned_all,
            ..counts.summary()
        };
        if summary != PassSummary::default() {
            tracing::info!(?summary, "the janitor finished a pass");
        }
        Ok(summary)
    }

    /// Prunes expired rows, batch by batch, until none is left or the time is over. Returns true
    /// if none is left.
    async fn prune(&self) -> Result<(Pruned, bool), StoreError> {
        let begun = Instant::now();
        let mut pruned = Pruned::default();
        while begun.elapsed() < PRUNE_TIME {
            let batch = Instant::now();
            let now = self.store().prune(&self.ctx.pruning, PRUNE_BATCH).await?;
            pruned += now;
            if now.most() < u64::from(PRUNE_BATCH) {
                return Ok((pruned, true));
            }
            // Uses at most half of the connection's time: the connection may be the only one that
            // writes.
            sleep(batch.elapsed()).await;
        }
        Ok((pruned, false))
    }

    /// Does a [`run_pass`](Self::run_pass) on request. It continues if the caller does not wait.
    ///
    /// # Errors
    /// The store failed, or the process stops.
    pub async fn clean_up(&self, most: u32) -> Result<PassSummary, Error> {
        let (janitor, draining) = (self.clone(), self.ctx.parts.draining.clone());
        let work = async move {
            tokio::select! {
                () = draining.cancelled() => Err(Error::Draining),
                summary = janitor.run_pass(most) => summary.map_err(Error::from),
            }
        };
        self.ctx
            .parts
            .tasks
            .spawn(work.in_current_span())
            .await
            .map_err(|_| Error::Internal(None))?
    }

    /// Returns what [`run_pass`](Self::run_pass) would do. Changes nothing.
    pub async fn dry_run_of(&self, most: u32) -> Result<DryRun, StoreError> {
        let parts = &self.ctx.parts;
        let due = self.store().due_threads(most).await?;
        let has_more = u32::try_from(due.len()).is_ok_and(|got| got == most);
        let plan = |due: DueThread| {
            let task = LifecycleTask::of(&due.thread, due.now, &parts.lifetimes, parts.archive);
            Plan {
                thread: due.thread,
                task,
            }
        };
        let plans = due
            .into_iter()
            .map(plan)
            .filter(|plan| !matches!(plan.task, LifecycleTask::Nothing { .. }));
        Ok(DryRun {
            plans: plans.collect(),
            upstream_orphans: self.store().due_upstream_orphans(most).await?,
            prunable: self
                .store()
                .prunable(&self.ctx.pruning, PRUNE_BATCH)
                .await?,
            has_more,
        })
    }

    async fn process_all(&self, due: Vec<DueThread>, counts: &Counts) {
        let at_once = self.ctx.parts.janitor.concurrency.get() as usize;
        let claimed = Instant::now();
        let tend = |due: DueThread| async move {
            if claimed.elapsed() + ITEM_TIMEOUT > LEASE {
                return;
            }
            let span = tracing::info_span!("janitor", thread.id = %due.thread.id);
            self.process(due, counts).instrument(span).await;
        };
        stream::iter(due).for_each_concurrent(at_once, tend).await;
    }

    /// Does the work that is due for one thread, and schedules the next. A failed thread waits
    /// longer each time, so that others go first.
    pub(super) async fn process(&self, due: DueThread, counts: &Counts) {
        let id = due.thread.id;
        let DueThread {
            attempts, claimed, ..
        } = due;
        let done = timeout(ITEM_TIMEOUT, self.task(due, counts))
            .await
            .unwrap_or(Err(JanitorError::TimeIsUp));
        let (after, trouble) = match done {
            Ok(Next::Look(after)) => (after, None),
            Ok(Next::Settled) => return,
            Err(trouble) => {
                counts.failed.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(error = %Chain(&trouble), attempts, "the janitor failed to process a thread");
                (Some(back_off(attempts)), Some(trouble.to_string()))
            }
        };
        retry_until_ok(|| {
            self.store()
                .reschedule(id, claimed, after, trouble.as_deref())
        })
        .await;
    }

    async fn task(&self, due: DueThread, counts: &Counts) -> Result<Next, JanitorError> {
        let DueThread {
            thread,
            now,
            attempts,
            ..
        } = due;
        let (id, policy) = (thread.id, self.ctx.parts.archive);
        match LifecycleTask::of(&thread, now, &self.ctx.parts.lifetimes, policy) {
            LifecycleTask::Nothing { until } => Ok(Next::Look(until.map(|until| from(now, until)))),
            LifecycleTask::Expire { .. } => {
                let limits = self.ctx.parts.lifetimes.of(&thread.key.scope);
                if self.store().expire(id, limits).await? {
                    counts.expired.fetch_add(1, Ordering::Relaxed);
                }
                Ok(Next::Settled)
            }
            LifecycleTask::ClearUpstream => {
                let unfinished = self.store().unfinished_of(id).await?;
                if !unfinished.is_empty() {
                    // These runs began before the thread was archived, and end by themselves.
                    return Ok(Next::Look(Some(FIRST_BACK_OFF)));
                }
                let cleared = async {
                    self.ctx
                        .parts
                        .runs
                        .reconcile(&thread, None, &self.ctx.pace)
                        .await?;
                    self.clear_upstream(&thread, attempts).await
                };
                match cleared.await {
                    Ok(()) => {
                        counts.cleared.fetch_add(1, Ordering::Relaxed);
                    }
                    // It is tried again when the thread is erased.
                    Err(trouble)
                        if attempts >= tries_within(self.ctx.parts.janitor.give_up_after) =>
                    {
                        tracing::warn!(
                            error = %Chain(&trouble),
                            "the upstream copy of an archived thread stays until the thread is erased"
                        );
                    }
                    Err(trouble) => return Err(trouble),
                }
                let limits = Limits {
                    max_age: policy.transcript,
                    max_idle: None,
                };
                let archived_at = thread.archived_at.unwrap_or(now);
                Ok(Next::Look(
                    limits
                        .end(archived_at, archived_at)
                        .map(|until| from(now, until)),
                ))
            }
            LifecycleTask::Discard { .. } => {
                if let Some(keep) = policy.transcript
                    && self.store().discard(id, keep).await?
                {
                    counts.discarded.fetch_add(1, Ordering::Relaxed);
                }
                Ok(Next::Settled)
            }
            LifecycleTask::Delete(end) => {
                self.delete(&thread, end, attempts).await?;
                counts.deleted.fetch_add(1, Ordering::Relaxed);
                Ok(Next::Settled)
            }
        }
    }

    /// Does one deletion from its present state to its end. Another replica may finish it first.
    async fn delete(
        &self,
        thread: &Thread,
        end: Deletion,
        attempts: i64,
    ) -> Result<(), JanitorError> {
        loop {
            self.end_runs(thread).await?;
            // Reads the thread again: a run may have moved its upstream thread, or left an
            // orphan.
            let now = self.store().thread(thread.id).await?;
            let Some(now) = now.filter(|it| it.lifecycle == Lifecycle::Deleting) else {
                return Ok(());
            };
            if end == Deletion::Archive
                && let Err(error) = self
                    .ctx
                    .parts
                    .runs
                    .reconcile(&now, None, &self.ctx.pace)
                    .await
            {
                if attempts < tries_within(self.ctx.parts.janitor.give_up_after) {
                    return Err(error.into());
                }
                tracing::warn!(error = %Chain(&error), "a thread is archived without messages that other clients wrote to it");
            }
            self.clear_upstream(&now, attempts).await?;
            if self.store().conclude(thread.id, ERASE_BATCH).await? {
                return Ok(());
            }
        }
    }

    /// Ends the unfinished runs of a thread, and waits for them within a bound.
    async fn end_runs(&self, thread: &Thread) -> Result<(), JanitorError> {
        let unfinished = self.store().unfinished_of(thread.id).await?;
        if unfinished.is_empty() {
            return Ok(());
        }
        let ended = self.ctx.parts.runs.end_all(&thread.key, &unfinished).await;
        ended.map_err(|error| JanitorError::Cancel(error.to_string()))?;
        match self.store().unfinished_of(thread.id).await?.len() {
            0 => Ok(()),
            left => Err(JanitorError::RunsGoOn(left)),
        }
    }

    /// Deletes known and possible upstream orphans of all threads.
    async fn look_for_upstream_orphans(&self, counts: &Counts) -> Result<(), StoreError> {
        loop {
            let batch = self.ctx.parts.janitor.batch_size.get();
            let orphans = self.store().lease_upstream_orphans(batch, LEASE).await?;
            let got = orphans.len();
            let at_once = self.ctx.parts.janitor.concurrency.get() as usize;
            let claimed = Instant::now();
            let one = |orphan: UpstreamOrphan| async move {
                let OrphanName::Row(id) = orphan.name else {
                    return;
                };
                if claimed.elapsed() + ITEM_TIMEOUT > LEASE {
                    return;
                }
                let (attempts, knew) = (orphan.attempts, orphan.upstream_id.as_deref());
                let done = timeout(ITEM_TIMEOUT, self.clear_upstream_orphan(&orphan))
                    .await
                    .unwrap_or(Err(JanitorError::TimeIsUp));
                match done {
                    Ok(removed) => {
                        let deleted = removed.responses + removed.other_threads;
                        counts
                            .upstream_orphans
                            .fetch_add(deleted, Ordering::Relaxed);
                        if removed.unknown > 0 || !removed.left.is_empty() {
                            retry_until_ok(|| self.store().keep_upstream_orphan(id, knew)).await;
                        } else {
                            retry_until_ok(|| {
                                self.store().reschedule_upstream_orphan(id, knew, None)
                            })
                            .await;
                        }
                    }
                    Err(trouble) => {
                        counts.failed.fetch_add(1, Ordering::Relaxed);
                        tracing::warn!(
                            thread.id = %orphan.thread,
                            error = %Chain(&trouble),
                            attempts,
                            "the janitor could not delete an upstream orphan"
                        );
                        if attempts >= tries_within(self.ctx.parts.janitor.give_up_after) {
                            // It is tried again when the thread is erased.
                            retry_until_ok(|| self.store().keep_upstream_orphan(id, knew)).await;
                        } else {
                            let after = Some(back_off(attempts));
                            retry_until_ok(|| {
                                self.store().reschedule_upstream_orphan(id, knew, after)
                            })
                            .await;
                        }
                    }
                }
            };
            stream::iter(orphans)
                .for_each_concurrent(at_once, one)
                .await;
            if got < batch as usize {
                return Ok(());
            }
        }
    }
}

/// Records the result of a leased task. Waits for a database that is away, because without a
/// record the task stays leased for the whole lease. Dropping it has the same price.
async fn retry_until_ok<Recorded>(record: impl Fn() -> Recorded)
where
    Recorded: Future<Output = Result<(), StoreError>>,
{
    let begun = Instant::now();
    while let Err(error) = record().await {
        let is_away = matches!(error, StoreError::Unavailable(_));
        tracing::warn!(error = %Chain(&error), "cannot record the result of an attempt");
        if !is_away || begun.elapsed() + ITEM_TIMEOUT > LEASE {
            return;
        }
        sleep(RECORD_AGAIN).await;
    }
}

/// The next time at which a thread is due.
enum Next {
    /// After that time; `None`: never.
    Look(Option<Duration>),
    /// The store has scheduled it.
    Settled,
}

/// The counters behind a [`PassSummary`].
#[derive(Debug, Default)]
pub(super) struct Counts {
    expired: AtomicU64,
    cleared: AtomicU64,
    discarded: AtomicU64,
    deleted: AtomicU64,
    upstream_orphans: AtomicU64,
    failed: AtomicU64,
}

impl Counts {
    fn summary(&self) -> PassSummary {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        PassSummary {
            expired: of(&self.expired),
            cleared: of(&self.cleared),
            discarded: of(&self.discarded),
            deleted: of(&self.deleted),
            upstream_orphans: of(&self.upstream_orphans),
            failed: of(&self.failed),
            pruned: Pruned::default(),
            has_more: false,
        }
    }
}

/// Returns the time from `now` to `until`, plus a millisecond against rounding, so that it never
/// ends before `until`.
fn from(now: Timestamp, until: Timestamp) -> Duration {
    (until - now).to_std().unwrap_or_default() + Duration::from_millis(1)
}

/// Returns the back-off after `attempts` consecutive failures and one more: a random time between
/// half of the wait and all of it.
fn back_off(attempts: i64) -> Duration {
    let doublings = u32::try_from(attempts).unwrap_or(u32::MAX).min(16);
    let wait = FIRST_BACK_OFF
        .saturating_mul(2_u32.saturating_pow(doublings))
        .min(LONGEST_BACK_OFF);
    wait.mul_f64(rand::rng().random_range(0.5..=1.0))
}

/// Returns how many consecutive tries fit into a time, with the waits between them.
fn tries_within(time: Duration) -> i64 {
    let (mut left, mut wait, mut tries) = (time, FIRST_BACK_OFF, 0);
    while wait < LONGEST_BACK_OFF && left >= wait {
        left -= wait;
        wait *= 2;
        tries += 1;
    }
    if wait < LONGEST_BACK_OFF {
        return tries;
    }
    tries + i64::try_from(left.as_secs() / LONGEST_BACK_OFF.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tries_take_the_time_that_they_are_given() {
        for (time, tries) in [
            (0, 0),
            (14, 0),
            (15, 1),
            (44, 1),
            (45, 2),
            (3825, 8),
            (7424, 8),
            (7425, 9),
        ] {
            assert_eq!(tries_within(Duration::from_secs(time)), tries, "{time}");
        }
        assert_eq!(tries_within(Duration::from_hours(7 * 24)), 174);
    }

    #[test]
    fn the_wait_after_failures_grows_to_a_bound() {
        let mut longest = Duration::ZERO;
        for attempts in 0..100 {
            let wait = back_off(attempts);
            assert!(
                wait >= FIRST_BACK_OFF / 2 && wait <= LONGEST_BACK_OFF,
                "{attempts}: {wait:?}"
            );
            longest = longest.max(wait);
        }
        assert!(back_off(0) <= FIRST_BACK_OFF && longest > LONGEST_BACK_OFF / 2);
        assert!(back_off(i64::MAX) >= LONGEST_BACK_OFF / 2);
    }
}

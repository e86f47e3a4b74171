//! The work in the background, shared with the other replicas by claiming small batches of threads at which it is time to
//! look.

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

/// How long a replica has a thread to itself. If it dies with it, another one gets it after that.
const LEASE: Duration = Duration::from_mins(5);
/// How long it works on it at a time; what takes longer waits like what failed, and goes on where it was. What cannot be
/// begun with early enough for that is left until the lease is over: nobody comes upon work that still goes on.
const ITEM_TIMEOUT: Duration = Duration::from_mins(4);
/// How soon the database is asked again that was away as a look was to be recorded.
const RECORD_AGAIN: Duration = Duration::from_secs(1);
/// The first wait after a failure; it doubles with each one in a row.
const FIRST_BACK_OFF: Duration = Duration::from_secs(15);
const LONGEST_BACK_OFF: Duration = Duration::from_hours(1);
/// Rows of each kind removed at a time.
const PRUNE_BATCH: u32 = 1000;
/// Messages, and runs, of a thread removed at a time.
const ERASE_BATCH: u32 = 1000;
/// Threads looked through at a time after the start.
const REVIEW_BATCH: u32 = 1000;
/// The rest between two of these.
const REVIEW_PAUSE: Duration = Duration::from_millis(100);
/// Longest time for pruning at a look, so that threads have their turn. What is left then is pruned at the next look,
/// which follows at once.
const PRUNE_TIME: Duration = Duration::from_secs(20);

/// What a look did.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct PassSummary {
    /// Threads that had expired and are archived now.
    pub expired: u64,
    /// Archived threads whose upstream copy is deleted now.
    pub cleared: u64,
    /// Archived threads that were kept for long enough and are being erased.
    pub discarded: u64,
    /// Deletions that are finished.
    pub deleted: u64,
    /// Upstream threads that nobody used, found and deleted.
    pub upstream_orphans: u64,
    /// Threads and upstream orphans with which something went wrong. They are tried again.
    pub failed: u64,
    pub pruned: Pruned,
    /// There was more than the look was to do.
    pub has_more: bool,
}

/// What a look would do.
#[derive(Clone, Debug)]
pub struct DryRun {
    pub plans: Vec<Plan>,
    pub upstream_orphans: Vec<UpstreamOrphan>,
    pub prunable: Pruned,
    pub has_more: bool,
}

/// What it would do about one thread.
#[derive(Clone, Debug)]
pub struct Plan {
    pub thread: Thread,
    pub task: LifecycleTask,
}

/// Why the work on a thread stopped half-way. It is tried again.
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
    #[error("{0} of its runs have not ended yet")]
    RunsGoOn(usize),
    #[error("what others wrote to its upstream thread cannot be read: {0}")]
    Unverified(#[from] Unverified),
    #[error("an upstream thread is being made for it")]
    Underway,
    #[error("the time for one look was over")]
    TimeIsUp,
    #[error("its runs could not be cancelled: {0}")]
    Cancel(String),
}

impl Janitor {
    /// Looks after threads until the process is to stop.
    pub async fn work(self) {
        let draining = self.ctx.parts.draining.clone();
        // Whatever is dropped here goes on in the next claim of it.
        let work = async {
            self.apply_changed_limits().await;
            loop {
                match self.run_pass(u32::MAX).await {
                    Ok(summary) if summary.has_more => continue,
                    Ok(_) => {}
                    Err(error) => {
                        tracing::warn!(error = %Chain(&error), "the janitor cannot work now")
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

    /// Lets the configured limits of today hold for threads that were made under others.
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
                    tracing::warn!(error = %Chain(&error), "the janitor cannot look through the threads now");
                }
            }
            sleep(REVIEW_PAUSE).await;
        }
    }

    /// Does what there is to do, about up to `most` threads.
    ///
    /// # Errors
    /// The store failed. What was done until then is done.
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
            // What was archived just now is due again.
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
            tracing::info!(?summary, "the janitor looked after threads");
        }
        Ok(summary)
    }

    /// Removes what is past its time, batch by batch, until nothing is left or the time for it is over. Whether nothing is
    /// left.
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
            // At most half of the time of a connection, which may be the only one that writes.
            sleep(batch.elapsed()).await;
        }
        Ok((pruned, false))
    }

    /// A [`run_pass`](Self::run_pass) that somebody asked for. It goes on if they do not wait for it.
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

    /// What [`run_pass`](Self::run_pass) would do. Nothing is changed.
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

    /// Does what there is to do about one thread, and says when to look again. A failure is its own: it waits longer
    /// each time, and others go first.
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
                tracing::warn!(error = %Chain(&trouble), attempts, "the janitor could not finish with a thread");
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
                    // They came before it was archived, and end in their own time.
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
                    // It is tried anew when the thread is erased.
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

    /// One deletion, from wherever it stands to its end, which may be somebody else's doing.
    async fn delete(
        &self,
        thread: &Thread,
        end: Deletion,
        attempts: i64,
    ) -> Result<(), JanitorError> {
        loop {
            self.end_runs(thread).await?;
            // As it is now: a run may have moved it upstream, or left something.
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
                tracing::warn!(error = %Chain(&error), "a thread is archived without what others wrote to it");
            }
            self.clear_upstream(&now, attempts).await?;
            if self.store().conclude(thread.id, ERASE_BATCH).await? {
                return Ok(());
            }
        }
    }

    /// Ends what still runs on a thread, and waits for it, within a bound.
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

    /// Deletes what is, or may be, at the upstreams besides the threads' own.
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
                            "the janitor could not delete something at an upstream"
                        );
                        if attempts >= tries_within(self.ctx.parts.janitor.give_up_after) {
                            // It is tried anew when the thread is erased.
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

/// Records what came of a claim. A database that is away is waited for: what is not recorded stays claimed for the whole
/// lease. May be dropped at any point, for the same price.
async fn retry_until_ok<Recorded>(record: impl Fn() -> Recorded)
where
    Recorded: Future<Output = Result<(), StoreError>>,
{
    let begun = Instant::now();
    while let Err(error) = record().await {
        let is_away = matches!(error, StoreError::Unavailable(_));
        tracing::warn!(error = %Chain(&error), "cannot record what came of a look");
        if !is_away || begun.elapsed() + ITEM_TIMEOUT > LEASE {
            return;
        }
        sleep(RECORD_AGAIN).await;
    }
}

/// When to look at a thread again.
enum Next {
    /// After that time; `None`: never.
    Look(Option<Duration>),
    /// The store knows.
    Settled,
}

/// A [`PassSummary`] in the making.
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

/// Never before `until`: a millisecond is added for what rounding takes.
fn from(now: Timestamp, until: Timestamp) -> Duration {
    (until - now).to_std().unwrap_or_default() + Duration::from_millis(1)
}

/// The wait after so many failures in a row and one more, between half of it and all.
fn back_off(attempts: i64) -> Duration {
    let doublings = u32::try_from(attempts).unwrap_or(u32::MAX).min(16);
    let wait = FIRST_BACK_OFF
        .saturating_mul(2_u32.saturating_pow(doublings))
        .min(LONGEST_BACK_OFF);
    wait.mul_f64(rand::rng().random_range(0.5..=1.0))
}

/// How many tries in a row fit into a time with the waits between them.
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

//! Deletes a thread's data at its upstream, in steps that can be repeated.
//!
//! A step ends when the server says that the object is deleted or gone, or that it does not
//! delete such objects. The receipt records the last case. After any other failure the step is
//! tried again, for `janitor.give_up_after` from the first of consecutive failures. Then the
//! deletion continues without that step, and the receipt records that too.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use super::Janitor;
use super::janitor::JanitorError;
use crate::domain::{
    Deletion, Lifecycle, Limits, Removed, Thread, ThreadId, UpstreamOutcome, UpstreamRunId,
    UpstreamThreadId, now,
};
use crate::error::Chain;
use crate::store::{OrphanKind, OrphanName, UpstreamOrphan};
use crate::upstream::{Disposal, Items, Upstream, UpstreamError};

/// Runs and upstream orphans of a thread that are deleted before the progress is recorded.
const BATCH: u32 = 20;
/// Consecutive failed steps after which an attempt ends, or, once failures are given up, no
/// further step is tried.
const MAX_FAILURES: usize = 3;
/// Longest time for the steps of one attempt. It is shorter than the attempt's own limit, so that
/// the progress is recorded.
const STEPS: Duration = Duration::from_mins(3);
/// Longest time that an attempt waits for an upstream thread that is being created.
const MAKING_PATIENCE: Duration = Duration::from_secs(8);
/// Pause between two checks whether the upstream thread has been created.
const MAKING_POLL: Duration = Duration::from_millis(100);

impl Janitor {
    /// Deletes everything of a thread at its upstream: stored runs and orphaned upstream threads,
    /// and last its own upstream thread. The runs of the thread must have ended. Progress is
    /// recorded on the way, so that the next attempt resumes. `attempts`: consecutive failed
    /// attempts before this one.
    ///
    /// # Errors
    /// [`JanitorError::Underway`] while an upstream thread is being created for an interrupted
    /// run: its id is known as soon as the upstream answers. [`JanitorError::Upstream`] if a step
    /// failed and is to be tried again.
    pub(super) async fn clear_upstream(
        &self,
        thread: &Thread,
        attempts: i64,
    ) -> Result<(), JanitorError> {
        self.wait_for_making(thread.id).await?;
        let mut removed = thread.removed.clone();
        if attempts == 0 {
            removed.tried_until = None;
        }
        let mut own = thread.upstream_thread_id.clone();
        // The deletion for an archive was given up. The erasure is another try.
        if attempts == 0
            && removed.outcome == Some(UpstreamOutcome::Failed)
            && thread.deletion == Some(Deletion::Erase)
        {
            (removed.outcome, removed.failure) = (None, None);
            removed.left.threads = removed.left.threads.saturating_sub(1);
            own = own.or_else(|| removed.upstream_thread_id.clone());
        }
        let Some(upstream) = self.ctx.parts.upstreams.get(&thread.upstream) else {
            removed.upstream_thread_id = thread
                .upstream_thread_id
                .clone()
                .or(removed.upstream_thread_id);
            removed
                .outcome
                .get_or_insert(UpstreamOutcome::NotConfigured);
            return Ok(self.store().removed(thread.id, &removed, &[]).await?);
        };
        let capabilities = upstream.capabilities();
        if capabilities.stores_runs && removed == Removed::default() {
            removed.unknown = self.store().unacknowledged_requests(thread.id).await?;
        }
        removed.upstream_thread_id = thread
            .upstream_thread_id
            .clone()
            .or(removed.upstream_thread_id);
        let look = Look::begin(&removed);
        self.clear_upstream_orphans(thread, &**upstream, &mut removed, look)
            .await?;
        let outcome = match &own {
            None => removed
                .outcome
                .unwrap_or(match &removed.upstream_thread_id {
                    // Another replica worked on the thread and finished first, and its record was
                    // overwritten.
                    Some(_) => UpstreamOutcome::AlreadyGone,
                    None => UpstreamOutcome::None,
                }),
            Some(id) => match self.dispose(&**upstream, id, &mut removed, look).await {
                Ok(Disposal::Deleted) => UpstreamOutcome::Deleted,
                // A chain consists of nothing but its responses.
                Ok(Disposal::AlreadyGone) if !capabilities.has_threads && removed.responses > 0 => {
                    UpstreamOutcome::Deleted
                }
                Ok(Disposal::AlreadyGone) => UpstreamOutcome::AlreadyGone,
                Ok(Disposal::NotSupported) => UpstreamOutcome::NotSupported,
                Err(_) if look.is_only_long(&removed) => {
                    return self.goes_on(thread, removed).await;
                }
                Err(error) if self.gives_up(thread, &mut removed, &error) => {
                    UpstreamOutcome::Failed
                }
                Err(error) => {
                    // The receipt also counts the items that were deleted before the failure.
                    self.store().removed(thread.id, &removed, &[]).await?;
                    return Err(JanitorError::Upstream {
                        name: thread.upstream.clone(),
                        error,
                    });
                }
            },
        };
        // Objects that an earlier attempt left are counted already.
        if own.is_some()
            && matches!(
                outcome,
                UpstreamOutcome::NotSupported | UpstreamOutcome::Failed
            )
        {
            if capabilities.has_threads {
                removed.left.threads += 1;
            } else {
                // The end of a chain is one of its responses.
                removed.left.responses = removed.left.responses.max(1);
            }
        }
        removed.outcome = Some(outcome);
        removed.tried_until = None;
        self.store().removed(thread.id, &removed, &[]).await?;
        if !removed.left.is_empty() {
            tracing::warn!(
                thread.id = %thread.id,
                upstream = thread.upstream,
                outcome = outcome.as_str(),
                left = ?removed.left,
                failure = removed.failure,
                "data of a thread may remain at its upstream"
            );
        }
        Ok(())
    }

    /// Deletes the upstream orphans and stored runs of a thread. A step that fails does not hold
    /// up the others.
    async fn clear_upstream_orphans(
        &self,
        thread: &Thread,
        upstream: &dyn Upstream,
        removed: &mut Removed,
        look: Look,
    ) -> Result<(), JanitorError> {
        let with_runs = upstream.capabilities().stores_runs;
        let (mut failed, mut last, mut failures) = (Vec::new(), None, 0);
        loop {
            let limit = BATCH + u32::try_from(failed.len()).unwrap_or(u32::MAX);
            let mut orphans = self
                .store()
                .upstream_orphans(thread.id, with_runs, limit)
                .await?;
            orphans.retain(|orphan| !failed.contains(&orphan.name));
            if orphans.is_empty() {
                break;
            }
            for orphan in &orphans {
                if failures >= MAX_FAILURES {
                    // Failures are given up; otherwise the loop would have ended before.
                    leave(orphan, removed);
                    continue;
                }
                match self
                    .delete_upstream_orphan(upstream, orphan, removed, look)
                    .await
                {
                    Ok(()) => failures = 0,
                    Err(JanitorError::Upstream { .. }) if look.is_only_long(removed) => {
                        return self.goes_on(thread, removed.clone()).await;
                    }
                    Err(JanitorError::Upstream { error, .. })
                        if self.gives_up(thread, removed, &error) =>
                    {
                        failures += 1;
                        leave(orphan, removed);
                    }
                    Err(trouble @ JanitorError::Upstream { .. }) => {
                        failed.push(orphan.name.clone());
                        last = Some(trouble);
                        if failed.len() >= MAX_FAILURES {
                            break;
                        }
                    }
                    Err(trouble) => return Err(trouble),
                }
            }
            if failed.len() >= MAX_FAILURES {
                break;
            }
            // An orphan without an id in the list may have got one since.
            orphans.retain(|orphan| !failed.contains(&orphan.name));
            let (nameless, known): (Vec<_>, Vec<_>) = orphans
                .into_iter()
                .partition(|it| it.kind == OrphanKind::Thread && it.upstream_id.is_none());
            let mut names: Vec<OrphanName> = known.into_iter().map(|orphan| orphan.name).collect();
            names.dedup();
            self.store().removed(thread.id, removed, &names).await?;
            for orphan in nameless {
                if let OrphanName::Row(id) = orphan.name {
                    self.store()
                        .reschedule_upstream_orphan(id, None, None)
                        .await?;
                }
            }
        }
        let Some(trouble) = last else { return Ok(()) };
        self.store().removed(thread.id, removed, &[]).await?;
        Err(trouble)
    }

    /// Ends an attempt that had too little time for all of its steps.
    async fn goes_on(&self, thread: &Thread, mut removed: Removed) -> Result<(), JanitorError> {
        removed.tried_until = None;
        self.store().removed(thread.id, &removed, &[]).await?;
        Err(JanitorError::TimeIsUp)
    }

    /// Returns true if a failed step is not tried again. A step for an archived thread is always
    /// tried again, because an archive has no receipt.
    fn gives_up(&self, thread: &Thread, removed: &mut Removed, error: &UpstreamError) -> bool {
        let now = now();
        if removed.tried_until.is_none() {
            let patience = self.ctx.parts.janitor.give_up_after;
            // A time beyond the calendar never comes.
            removed.tried_until = Limits {
                max_age: Some(patience),
                max_idle: None,
            }
            .end(now, now);
        }
        let is_over = removed.tried_until.is_some_and(|until| until <= now);
        if thread.lifecycle != Lifecycle::Deleting || !is_over {
            return false;
        }
        removed.failure = Some(error.to_string());
        tracing::warn!(
            thread.id = %thread.id,
            upstream = thread.upstream,
            error = %Chain(error),
            "a deletion at an upstream failed for too long and is given up"
        );
        true
    }

    /// Deletes an upstream thread. Items that were deleted before a failure count too.
    async fn dispose(
        &self,
        upstream: &dyn Upstream,
        id: &UpstreamThreadId,
        removed: &mut Removed,
        look: Look,
    ) -> Result<Disposal, UpstreamError> {
        let mut items = Items::default();
        let disposal = look
            .bound(upstream.delete_thread(id, &self.ctx.pace, &mut items))
            .await;
        removed.items += items.deleted;
        if disposal.is_ok() {
            removed.left.items += items.left;
        }
        disposal
    }

    /// Waits within a bound until no upstream thread is being created for the thread.
    async fn wait_for_making(&self, thread: ThreadId) -> Result<(), JanitorError> {
        let until = Instant::now() + MAKING_PATIENCE;
        loop {
            if !self.store().makes_upstream_thread(thread).await? {
                return Ok(());
            }
            if Instant::now() >= until {
                return Err(JanitorError::Underway);
            }
            sleep(MAKING_POLL).await;
        }
    }

    /// Deletes one upstream orphan of a thread that is not deleted itself. Returns what was
    /// deleted, and what could not be found.
    pub(super) async fn clear_upstream_orphan(
        &self,
        orphan: &UpstreamOrphan,
    ) -> Result<Removed, JanitorError> {
        let Some(upstream) = self.ctx.parts.upstreams.get(&orphan.upstream) else {
            tracing::warn!(
                thread.id = %orphan.thread,
                upstream = orphan.upstream,
                "data may remain at an upstream that the configuration no longer names"
            );
            return Ok(Removed::default());
        };
        let mut removed = Removed::default();
        let look = Look::begin(&removed);
        self.delete_upstream_orphan(&**upstream, orphan, &mut removed, look)
            .await?;
        if !removed.left.is_empty() {
            tracing::warn!(
                thread.id = %orphan.thread,
                upstream = orphan.upstream,
                "an unused upstream thread remains: the server does not support its deletion"
            );
        }
        if removed.unknown > 0 {
            tracing::warn!(
                thread.id = %orphan.thread,
                upstream = orphan.upstream,
                "an upstream thread may exist that cannot be found: the answer to its creation was lost, \
                 and the server does not list threads"
            );
        }
        Ok(removed)
    }

    async fn delete_upstream_orphan(
        &self,
        upstream: &dyn Upstream,
        orphan: &UpstreamOrphan,
        removed: &mut Removed,
        look: Look,
    ) -> Result<(), JanitorError> {
        let pace = &self.ctx.pace;
        let failed = |error| JanitorError::Upstream {
            name: orphan.upstream.clone(),
            error,
        };
        let unused = match (orphan.kind, &orphan.upstream_id) {
            (OrphanKind::Run, Some(id)) => {
                let id = UpstreamRunId(id.clone());
                match look
                    .bound(upstream.delete_run(&id, pace))
                    .await
                    .map_err(failed)?
                {
                    Disposal::Deleted => removed.responses += 1,
                    Disposal::AlreadyGone => {}
                    Disposal::NotSupported => removed.left.responses += 1,
                }
                return Ok(());
            }
            (OrphanKind::Run, None) => return Ok(()),
            (OrphanKind::Thread, Some(id)) => vec![UpstreamThreadId(id.clone())],
            (OrphanKind::Thread, None) => {
                let found = look
                    .bound(upstream.find_threads(orphan.thread, pace))
                    .await
                    .map_err(failed)?;
                let Some(found) = found else {
                    removed.unknown += 1;
                    return Ok(());
                };
                self.unused(orphan, found).await?
            }
        };
        for id in unused {
            match self
                .dispose(upstream, &id, removed, look)
                .await
                .map_err(failed)?
            {
                Disposal::Deleted => removed.other_threads += 1,
                Disposal::AlreadyGone => {}
                Disposal::NotSupported => removed.left.threads += 1,
            }
        }
        Ok(())
    }

    /// Returns the upstream threads in `found` that the gateway's thread does not use and is not
    /// about to use.
    ///
    /// The caller lists `found` first and the record is read here. A thread's creation is
    /// recorded as intended before it happens. So each thread in the list is in use, intended, or
    /// an orphan.
    async fn unused(
        &self,
        intent: &UpstreamOrphan,
        mut found: Vec<UpstreamThreadId>,
    ) -> Result<Vec<UpstreamThreadId>, JanitorError> {
        // Only a run creates threads. Without an unfinished run, another intent is as old as this
        // one.
        let at_work = !self.store().unfinished_of(intent.thread).await?.is_empty();
        let others = self
            .store()
            .upstream_orphans(intent.thread, false, BATCH)
            .await?;
        if at_work
            && others
                .iter()
                .any(|other| other.upstream_id.is_none() && other.name != intent.name)
        {
            return Err(JanitorError::Underway);
        }
        let used = self
            .store()
            .thread(intent.thread)
            .await?
            .and_then(|thread| thread.upstream_thread_id);
        found.retain(|id| Some(id) != used.as_ref());
        Ok(found)
    }
}

/// The time limit of one attempt at the upstream.
#[derive(Clone, Copy)]
struct Look {
    until: Instant,
    /// Objects that were deleted before the attempt.
    before: u64,
}

impl Look {
    fn begin(removed: &Removed) -> Self {
        Self {
            until: Instant::now() + STEPS,
            before: deleted(removed),
        }
    }

    async fn bound<T>(
        self,
        step: impl Future<Output = Result<T, UpstreamError>>,
    ) -> Result<T, UpstreamError> {
        timeout_at(self.until, step)
            .await
            .unwrap_or(Err(UpstreamError::Broken { timeout: true }))
    }

    /// Returns true if the time is over and the attempt deleted something.
    fn is_only_long(self, removed: &Removed) -> bool {
        Instant::now() >= self.until && deleted(removed) > self.before
    }
}

fn deleted(removed: &Removed) -> u64 {
    removed.items + removed.responses + removed.other_threads
}

/// Counts an upstream orphan whose deletion is given up.
fn leave(orphan: &UpstreamOrphan, removed: &mut Removed) {
    match (orphan.kind, &orphan.upstream_id) {
        (OrphanKind::Run, Some(_)) => removed.left.responses += 1,
        (OrphanKind::Run, None) => {}
        (OrphanKind::Thread, Some(_)) => removed.left.threads += 1,
        (OrphanKind::Thread, None) => removed.unknown += 1,
    }
}

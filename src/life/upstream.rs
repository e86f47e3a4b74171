//! Deleting what a thread has at its upstream, in steps that can be repeated.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::Keeper;
use super::janitor::Trouble;
use crate::domain::{Removed, Thread, ThreadId, UpstreamOutcome, UpstreamRunId, UpstreamThreadId};
use crate::store::{Remnant, RemnantKind, RemnantName};
use crate::upstream::Upstream;

/// Runs and remnants of a thread handled between two records of what is done.
const BATCH: u32 = 20;
/// How long a look waits for an upstream thread that is being made, and how often it asks.
const MAKING_PATIENCE: Duration = Duration::from_secs(8);
const MAKING_POLL: Duration = Duration::from_millis(100);

impl Keeper {
    /// Deletes all that a thread has at its upstream: stored runs, threads that were made for it and given up, last its
    /// own. What is done is recorded as it goes, so that whoever goes on does not begin anew. Its runs have ended.
    ///
    /// # Errors
    /// [`Trouble::Underway`] while an upstream thread is being made for one of its runs that was cut off: its id is known
    /// as soon as that is answered.
    pub(super) async fn clear_upstream(&self, thread: &Thread) -> Result<(), Trouble> {
        self.wait_for_making(thread.id).await?;
        let mut removed = thread.removed.clone();
        let Some(upstream) = self.parts.given.upstreams.get(&thread.upstream) else {
            removed.upstream_thread_id = thread.upstream_thread_id.clone().or(removed.upstream_thread_id);
            removed.outcome.get_or_insert(UpstreamOutcome::NotConfigured);
            return Ok(self.store().removed(thread.id, &removed, &[]).await?);
        };
        let failed = |error| Trouble::Upstream { name: thread.upstream.clone(), error };
        let capabilities = upstream.capabilities();
        if capabilities.stores_runs && removed == Removed::default() {
            removed.unknown = self.store().unheard_runs(thread.id).await?;
        }
        removed.upstream_thread_id = thread.upstream_thread_id.clone().or(removed.upstream_thread_id);
        loop {
            let remnants = self.store().remnants(thread.id, capabilities.stores_runs, BATCH).await?;
            if remnants.is_empty() {
                break;
            }
            for remnant in &remnants {
                self.delete_remnant(&**upstream, remnant, &mut removed).await?;
            }
            // What had no id when it was listed may have been given one since.
            let (nameless, known): (Vec<_>, Vec<_>) = remnants
                .into_iter()
                .partition(|it| it.kind == RemnantKind::Thread && it.upstream_id.is_none());
            let mut names: Vec<RemnantName> = known.into_iter().map(|remnant| remnant.name).collect();
            names.dedup();
            self.store().removed(thread.id, &removed, &names).await?;
            for remnant in nameless {
                if let RemnantName::Row(id) = remnant.name {
                    self.store().schedule_remnant(id, None, None).await?;
                }
            }
        }
        let outcome = match &thread.upstream_thread_id {
            None => removed.outcome.unwrap_or(match &removed.upstream_thread_id {
                // Another one that works on it was faster, and what it recorded was written over.
                Some(_) => UpstreamOutcome::AlreadyGone,
                None => UpstreamOutcome::None,
            }),
            Some(id) => {
                let deleted = upstream.delete_thread(id, &self.parts.pace, &mut removed.items).await;
                let was_there = match deleted {
                    Ok(was_there) => was_there,
                    Err(error) => {
                        // What was deleted of it until then is in the receipt, too.
                        self.store().removed(thread.id, &removed, &[]).await?;
                        return Err(failed(error));
                    }
                };
                // A chain is nothing but its responses.
                let is_chain = !capabilities.has_threads && removed.responses > 0;
                if was_there || is_chain { UpstreamOutcome::Deleted } else { UpstreamOutcome::AlreadyGone }
            }
        };
        removed.outcome = Some(outcome);
        Ok(self.store().removed(thread.id, &removed, &[]).await?)
    }

    /// Waits until nobody makes an upstream thread for the thread any more, within a bound.
    async fn wait_for_making(&self, thread: ThreadId) -> Result<(), Trouble> {
        let until = Instant::now() + MAKING_PATIENCE;
        loop {
            if !self.store().makes_upstream_thread(thread).await? {
                return Ok(());
            }
            if Instant::now() >= until {
                return Err(Trouble::Underway);
            }
            sleep(MAKING_POLL).await;
        }
    }

    /// Deletes one remnant of a thread that goes on. What was deleted, or cannot be found.
    pub(super) async fn clear_remnant(&self, remnant: &Remnant) -> Result<Removed, Trouble> {
        let Some(upstream) = self.parts.given.upstreams.get(&remnant.upstream) else {
            tracing::warn!(
                thread.id = %remnant.thread,
                upstream = remnant.upstream,
                "something may be left at an upstream that the configuration does not name any more"
            );
            return Ok(Removed::default());
        };
        let mut removed = Removed::default();
        self.delete_remnant(&**upstream, remnant, &mut removed).await?;
        if removed.unknown > 0 {
            tracing::warn!(
                thread.id = %remnant.thread,
                upstream = remnant.upstream,
                "a thread may have been made at the upstream that nobody can find there: the call's answer was lost, \
                 and the server does not list threads"
            );
        }
        Ok(removed)
    }

    async fn delete_remnant(
        &self,
        upstream: &dyn Upstream,
        remnant: &Remnant,
        removed: &mut Removed,
    ) -> Result<(), Trouble> {
        let pace = &self.parts.pace;
        let failed = |error| Trouble::Upstream { name: remnant.upstream.clone(), error };
        let unused = match (remnant.kind, &remnant.upstream_id) {
            (RemnantKind::Run, Some(id)) => {
                let was_there = upstream.delete_run(&UpstreamRunId(id.clone()), pace).await;
                removed.responses += u64::from(was_there.map_err(failed)?);
                return Ok(());
            }
            (RemnantKind::Run, None) => return Ok(()),
            (RemnantKind::Thread, Some(id)) => vec![UpstreamThreadId(id.clone())],
            (RemnantKind::Thread, None) => {
                let found = upstream.find_threads(remnant.thread, pace).await.map_err(failed)?;
                let Some(found) = found else {
                    removed.unknown += 1;
                    return Ok(());
                };
                self.unused(remnant, found).await?
            }
        };
        for id in unused {
            let was_there = upstream.delete_thread(&id, pace, &mut removed.items).await;
            removed.other_threads += u64::from(was_there.map_err(failed)?);
        }
        Ok(())
    }

    /// Those of the upstream threads which were made for a thread that it does not use, nor is about to.
    ///
    /// They were listed before the record is asked here, and what is made is recorded as intended before it is made: so
    /// whatever is in the list is in use, intended, or left.
    async fn unused(
        &self,
        intent: &Remnant,
        mut found: Vec<UpstreamThreadId>,
    ) -> Result<Vec<UpstreamThreadId>, Trouble> {
        // Only a run makes threads; without one, another intent is as old as this one.
        let at_work = !self.store().unfinished_of(intent.thread).await?.is_empty();
        let others = self.store().remnants(intent.thread, false, BATCH).await?;
        if at_work && others.iter().any(|other| other.upstream_id.is_none() && other.name != intent.name) {
            return Err(Trouble::Underway);
        }
        let used = self.store().thread(intent.thread).await?.and_then(|thread| thread.upstream_thread_id);
        found.retain(|id| Some(id) != used.as_ref());
        Ok(found)
    }
}

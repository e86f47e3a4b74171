//! Taking over runs that nobody works on: those of replicas that died, and those that were given up.

use std::time::Duration;

use tokio::time::{sleep, timeout};
use tracing::Instrument;

use crate::domain::{Message, RunStatus};
use crate::error::Chain;
use crate::runs::execution::prepare::include_history;
use crate::runs::execution::{finish, queue, task};
use crate::runs::log::writer::STARTED;
use crate::runs::registry::{ActiveRun, Refused};
use crate::runs::service::subscription::stored_log;
use crate::runs::{RunEvent, Runs, jittered, span_of};
use crate::store::{News, Orphan, Store, StoreError};

/// Orphans taken at a time.
const ADOPT_BATCH: u32 = 64;
/// How often orphans are looked for, as a share of a session's time, and the bounds of that.
const LOOKS_PER_SESSION: u32 = 10;
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// What is stored of a run that is taken over, besides itself.
#[derive(Clone, Debug, Default)]
pub(in crate::runs) struct Before {
    pub(in crate::runs) log: StoredLog,
    /// What its thread lacked before. If the run was sent, this went along.
    pub(in crate::runs) backlog: Vec<Message>,
}

/// What is stored of the log of a run.
#[derive(Clone, Debug, Default)]
pub(in crate::runs) struct StoredLog {
    /// The number after it.
    pub(in crate::runs) end: i64,
    /// What the round that the run is in has said.
    pub(in crate::runs) text: String,
}

impl Before {
    async fn of(store: &Store, orphan: &Orphan) -> Result<Self, StoreError> {
        if orphan.run.status == RunStatus::Queued {
            return Ok(Self { log: StoredLog { end: STARTED, ..StoredLog::default() }, ..Self::default() });
        }
        let run = orphan.run.id;
        let backlog = if orphan.thread.backlog > 0 { include_history(store, run).await? } else { Vec::new() };
        Ok(Self { log: stored_log(store, run).await?, backlog })
    }
}

impl Runs {
    /// Looks for runs that nobody works on, when it hears of some and a few times in a session's time.
    pub(in crate::runs) async fn take_over(&self, ttl: Duration) {
        let pause = (ttl / LOOKS_PER_SESSION).clamp(SHORTEST_PAUSE, LONGEST_PAUSE);
        let mut told = self.parts.notifier.subscribe(News::Orphans);
        loop {
            tokio::select! {
                () = told.changed() => {}
                () = sleep(jittered(pause)) => {}
            }
            while self.may_adopt() && self.adopt(ttl / 3).await {}
        }
    }

    fn may_adopt(&self) -> bool {
        let registry = &self.parts.registry;
        !self.parts.given.draining.is_cancelled() && !registry.has_lapsed() && registry.trusts_sessions()
    }

    /// Takes over runs that nobody works on. `true` if there may be more.
    async fn adopt(&self, limit: Duration) -> bool {
        let parts = &self.parts.given;
        let _taking = self.parts.registry.taking.lock().await;
        let active = self.parts.registry.runs();
        let adopted = timeout(limit, parts.store.adopt_orphans(parts.replica, &active, ADOPT_BATCH)).await;
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
            let run = orphan.run.id;
            let span = span_of(run, &orphan.thread.key, &parts.fingerprints);
            // One that cannot be read is found again as a stray.
            let Ok(Ok(before)) = timeout(limit, Before::of(&parts.store, &orphan)).await else { continue };
            let active = self.parts.registry.goes_on(orphan.lease, before.log.end);
            span.in_scope(
                || tracing::warn!(status = %orphan.run.status, "took over a run that nobody worked on"),
            );
            let was_refused = self.parts.registry.was_refused(run);
            if orphan.run.status == RunStatus::Queued && orphan.content_lost && was_refused.is_none() {
                never_start.push((active, orphan));
                continue;
            }
            let task = go_on(self.clone(), active, orphan, before, was_refused);
            parts.tasks.spawn(task.instrument(span));
        }
        if !never_start.is_empty() {
            parts.tasks.spawn(queue::give_up(self.clone(), never_start));
        }
        may_be_more
    }
}

/// Goes on with a run where the one before left it, or ends it.
async fn go_on(runs: Runs, active: ActiveRun, orphan: Orphan, before: Before, was_refused: Option<Refused>) {
    if let Some(refused) = was_refused {
        // Its sender heard that it was not taken, so it must not run.
        let withdrawn = finish::withdraw(&runs, &orphan.lease, &refused).await;
        return queue::go_on_for_others(runs, active, orphan.lease, withdrawn).await;
    }
    if orphan.run.status != RunStatus::Queued && before.log.end <= STARTED {
        // The one before had no time to record that. Its text is numbered from there, whoever tells it.
        active.log.push(RunEvent::Started);
    }
    match orphan.run.status {
        RunStatus::Queued => queue::resume_queued(runs, active, orphan).await,
        RunStatus::RequiresAction => task::resume_waiting(runs, active, orphan, before).await,
        RunStatus::InProgress
            if !orphan.content_lost && (orphan.outputs.is_some() || !orphan.input.is_empty()) =>
        {
            if orphan.outputs.is_some() {
                task::resume_waiting(runs, active, orphan, before).await;
            } else {
                task::resume_at_work(runs, active, orphan, before).await;
            }
        }
        _ => task::close_orphan(runs, active, orphan, before).await,
    }
}

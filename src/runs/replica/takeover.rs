//! Takeover of orphans and strays: runs of dead replicas, and runs that were released.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{sleep, timeout};
use tracing::Instrument;

use crate::domain::{Rerun, RunStatus};
use crate::error::Chain;
use crate::runs::backoff::jittered;
use crate::runs::context::Context;
use crate::runs::execution::history::sent_with;
use crate::runs::execution::progress::StoredProgress;
use crate::runs::execution::task;
use crate::runs::execution::withdraw::withdraw;
use crate::runs::log::event::RunEvent;
use crate::runs::log::offset::STARTED;
use crate::runs::log::stored::StoredLog;
use crate::runs::registry::{ActiveRun, Refused};
use crate::store::{Notification, OrphanedRun, Store, StoreError};

/// Most orphans of one adoption.
const ADOPT_BATCH: u32 = 64;
/// Number of searches for orphans within the time to live of a session; below, the bounds of the
/// pause.
const LOOKS_PER_SESSION: u32 = 10;
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Takes over orphans and strays: after each notification, and a few times within a session's time
/// to live.
pub(in crate::runs) async fn take_over(ctx: &Arc<Context>, ttl: Duration) {
    let pause = (ttl / LOOKS_PER_SESSION).clamp(SHORTEST_PAUSE, LONGEST_PAUSE);
    let mut told = ctx.notifier.subscribe(Notification::Orphans);
    loop {
        tokio::select! {
            () = told.changed() => {}
            () = sleep(jittered(pause)) => {}
        }
        while may_adopt(ctx) && adopt(ctx, ttl / 3).await {}
    }
}

fn may_adopt(ctx: &Context) -> bool {
    let registry = &ctx.registry;
    !ctx.tasks.draining.is_cancelled() && !registry.has_lapsed() && registry.trusts_sessions()
}

/// Takes over orphans and strays. Returns whether there may be more.
async fn adopt(ctx: &Arc<Context>, limit: Duration) -> bool {
    let _taking = ctx.registry.taking.lock().await;
    let active = ctx.registry.runs();
    let adopted = timeout(
        limit,
        ctx.store.adopt_orphans(ctx.replica, &active, ADOPT_BATCH),
    )
    .await;
    // If the answer comes too late, the adopted runs are strays, which the next search finds.
    let orphans = match adopted
        .unwrap_or_else(|_| Err(StoreError::Unavailable("no answer in time".into())))
    {
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
        let span = ctx.span_of(run, &orphan.thread.key);
        // A run whose log cannot be read is a stray, which a later search finds.
        let Ok(Ok(stored)) = timeout(limit, stored_progress(&ctx.store, &orphan)).await else {
            continue;
        };
        let active = ctx.registry.goes_on(orphan.lease, stored.log.end);
        span.in_scope(
            || tracing::warn!(status = %orphan.run.status, "took over a run without a live owner"),
        );
        let was_refused = ctx.registry.was_refused(run);
        if orphan.run.status == RunStatus::Queued && orphan.content_lost && was_refused.is_none() {
            never_start.push((active, orphan));
            continue;
        }
        let task = resume(Arc::clone(ctx), active, orphan, stored, was_refused);
        ctx.tasks.tracker.spawn(task.instrument(span));
    }
    if !never_start.is_empty() {
        let ctx = Arc::clone(ctx);
        let tasks = ctx.tasks.tracker.clone();
        tasks.spawn(async move { task::close_queued_orphans(&ctx, never_start).await });
    }
    may_be_more
}

/// Reads the stored progress of a run that is taken over.
async fn stored_progress(
    store: &Store,
    orphan: &OrphanedRun,
) -> Result<StoredProgress, StoreError> {
    if orphan.run.status == RunStatus::Queued {
        let log = StoredLog {
            end: STARTED,
            ..StoredLog::default()
        };
        return Ok(StoredProgress {
            log,
            ..StoredProgress::default()
        });
    }
    let run = orphan.run.id;
    let unsynced = if orphan.thread.unsynced_messages > 0 {
        sent_with(store, run).await?
    } else {
        Vec::new()
    };
    Ok(StoredProgress {
        log: StoredLog::read(store, run).await?,
        unsynced,
    })
}

/// Continues a run where the previous process left it, or ends it.
async fn resume(
    ctx: Arc<Context>,
    active: ActiveRun,
    orphan: OrphanedRun,
    stored: StoredProgress,
    was_refused: Option<Refused>,
) {
    if let Some(refused) = was_refused {
        // Its caller got the error that it was not recorded, so it must not run.
        let withdrawn = withdraw(&ctx, &orphan.lease, &refused).await;
        return task::continue_for_others(&ctx, active, orphan.lease, withdrawn).await;
    }
    if orphan.run.status != RunStatus::Queued && stored.log.end <= STARTED {
        // The previous process had no time to store this event. The text is numbered from here, at
        // any process.
        active.log.push(RunEvent::Started);
    }
    match orphan.run.status {
        RunStatus::Queued => {
            let OrphanedRun {
                lease, thread, run, ..
            } = orphan;
            task::resume_queued(&ctx, active, lease, &thread, &run).await;
        }
        RunStatus::RequiresAction => task::resume_waiting(&ctx, active, orphan, stored).await,
        RunStatus::InProgress if !orphan.content_lost && orphan.outputs.is_some() => {
            task::resume_waiting(&ctx, active, orphan, stored).await;
        }
        RunStatus::InProgress
            if !orphan.content_lost
                && (!orphan.input.is_empty() || orphan.run.rerun == Some(Rerun::Waiting)) =>
        {
            task::resume_running(&ctx, active, orphan, stored).await;
        }
        _ => task::close_orphan(&ctx, active, orphan, stored).await,
    }
}

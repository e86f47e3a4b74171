//! Cancels runs: those of this process through their tasks, other runs through the store.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{sleep, timeout};
use tracing::Instrument;

use super::read;
use crate::domain::{ConversationKey, EventBatch, Message, Run, RunId, RunStatus, Step, ThreadId};
use crate::error::Error;
use crate::runs::backoff::jittered;
use crate::runs::context::{Context, NO_THREAD};
use crate::runs::execution::outcome::end_without_output;
use crate::runs::log::offset::others_from;
use crate::store::{Notification, RunEnd, StoreError};

/// Time beyond `runs.settle_timeout` for which a cancel waits for the end of its run.
const SLACK: Duration = Duration::from_secs(2);
/// Pause between two reads of a run of another process.
const POLL: Duration = Duration::from_millis(200);

/// A choice among a thread's runs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Which {
    /// The active run.
    Active,
    /// The queued runs.
    Queued,
    /// Both.
    All,
}

/// Cancels a run and waits, within a bound, for its end. Returns an ended run as it is: a late
/// cancel is no error.
pub(in crate::runs) async fn cancel(
    ctx: &Arc<Context>,
    key: &ConversationKey,
    id: RunId,
) -> Result<(Run, Option<Message>), Error> {
    let (run, message) = read::run(ctx, key, id).await?;
    if run.status.is_final() {
        return Ok((run, message));
    }
    end_all(ctx, key, &[run]).await?;
    read::run(ctx, key, id).await
}

/// Cancels unfinished runs of the current thread and waits, within a bound, for their end. Cancels
/// queued runs first, so that none of them starts in between. Returns the runs in order of
/// admission.
pub(in crate::runs) async fn cancel_some(
    ctx: &Arc<Context>,
    key: &ConversationKey,
    which: Which,
) -> Result<Vec<Run>, Error> {
    let unfinished = ctx.store.unfinished(key).await?.ok_or(NO_THREAD)?;
    let meant: Vec<Run> = unfinished
        .into_iter()
        .filter(|run| match which {
            Which::Active => run.status.is_active(),
            Which::Queued => run.status == RunStatus::Queued,
            Which::All => true,
        })
        .collect();
    end_all(ctx, key, &meant).await?;
    let mut ended = Vec::with_capacity(meant.len());
    for run in meant {
        ended.push(read::run(ctx, key, run.id).await?.0);
    }
    Ok(ended)
}

/// Cancels these runs and waits for their end. Begins with the queued runs, the last one first.
pub(in crate::runs) async fn end_all(
    ctx: &Arc<Context>,
    key: &ConversationKey,
    runs: &[Run],
) -> Result<(), Error> {
    let (active, waiting): (Vec<&Run>, Vec<&Run>) =
        runs.iter().partition(|run| run.status.is_active());
    let mut ends = Vec::with_capacity(runs.len());
    for run in waiting.into_iter().rev().chain(active) {
        ask_to_end(ctx, key, run).await?;
        ends.push(has_ended(ctx, key, run.id));
    }
    // A replica that misses the notification reads the request when it renews its session.
    let limit = ctx.config.runs.settle_timeout + SLACK + ctx.config.attend_every;
    if timeout(limit, join_all(ends)).await.is_err() {
        tracing::warn!("a cancelled run did not end in time");
    }
    Ok(())
}

/// Requests the end of a run. Ends a queued run of another process at once.
async fn ask_to_end(ctx: &Arc<Context>, key: &ConversationKey, run: &Run) -> Result<(), Error> {
    let handle = ctx.registry.handle(run.id);
    if run.status == RunStatus::Queued && handle.is_none() {
        // A task does this: if the caller disconnects, the run must not stay taken but unfinished.
        let ending = end_waiting(Arc::clone(ctx), run.id, run.thread_id).in_current_span();
        let ended = ctx.tasks.tracker.spawn(ending).await;
        if ended.map_err(|error| Error::Internal(Some(error.into())))?? {
            return Ok(());
        }
    }
    // Record the request first, so that a process that takes the run over knows of it.
    if run.status.is_active() || handle.is_none() {
        ctx.store.request_cancel(key, run.id).await?;
    }
    match handle {
        Some(handle) => handle.cancel.request(false),
        None => ctx.notifier.notify(Notification::Asked(run.id)),
    }
    Ok(())
}

/// Takes a queued run from another process and ends it. Returns `false` if the run is no longer
/// queued.
async fn end_waiting(ctx: Arc<Context>, run: RunId, thread: ThreadId) -> Result<bool, StoreError> {
    let _taking = ctx.registry.taking.lock().await;
    let Some(lease) = ctx.store.take_queued(ctx.replica, run).await? else {
        return Ok(false);
    };
    let status = RunStatus::Queued
        .on(Step::Cancel)
        .unwrap_or(RunStatus::Cancelled);
    // Beyond all numbers that its owner can have shown.
    let events = EventBatch {
        first: others_from(&lease),
        events: Vec::new(),
    };
    ctx.store
        .finish(
            &lease,
            RunEnd {
                events,
                ..end_without_output(status, None)
            },
        )
        .await?;
    // The owner has lost the run, and the run's readers need to read its end from the store.
    for notification in [
        Notification::Asked(run),
        Notification::Run(run),
        Notification::Thread(thread),
    ] {
        ctx.notifier.notify(notification);
    }
    Ok(true)
}

/// Waits for the end of the run.
async fn has_ended(ctx: &Context, key: &ConversationKey, id: RunId) {
    if let Some(handle) = ctx.registry.handle(id)
        && handle.log.ended().await.is_some()
    {
        return;
    }
    let mut notifications = ctx.notifier.subscribe(Notification::Run(id));
    loop {
        match ctx.store.run(key, id).await {
            Ok(Some((run, _))) if !run.status.is_final() => {}
            Ok(_) => return,
            Err(_) => sleep(POLL).await,
        }
        tokio::select! {
            () = notifications.changed() => {}
            () = sleep(jittered(POLL)) => {}
        }
    }
}

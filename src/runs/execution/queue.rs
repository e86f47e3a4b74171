//! A recorded run's wait for its turn: in this process's queue, then for memory, then until the store lets it start.

use std::time::Duration;

use tokio::time::sleep;

use super::failure::stopped;
use super::finish::{RunResult, finish_queued_run};
use super::outcome::end_without_output;
use crate::domain::{
    ConversationKey, MultitaskStrategy, Run, RunStatus, Step, TenantKey, Thread, ThreadId,
};
use crate::error::Chain;
use crate::locks::{Permit, Share, Ticket};
use crate::runs::backoff::jittered;
use crate::runs::context::Context;
use crate::runs::log::event::RunEvent;
use crate::runs::redaction;
use crate::runs::registry::ActiveRun;
use crate::store::{Notification, QueuedStart, RunLease, StartedRun};

/// The first pause before a run that is first in its queue asks the store again while a run of another queue is active on its
/// thread. It doubles up to the longest, since the process that ends that run tells this one.
const FIRST_CLAIM_POLL: Duration = Duration::from_millis(100);
const LONGEST_CLAIM_POLL: Duration = Duration::from_secs(1);

/// What a message holds on its way to its run.
pub(in crate::runs) struct Reservation {
    /// Its place among the runs of its key.
    pub(in crate::runs) ticket: Ticket<ConversationKey, ThreadId>,
    /// Of the unfinished runs of its tenant. Held until the run has ended.
    pub(in crate::runs) tenant_run: Permit<TenantKey>,
    /// Of the bytes that may wait on a thread. Held until the run starts.
    pub(in crate::runs) queued_bytes: Permit<ConversationKey>,
    /// Of the memory for what callers send.
    pub(in crate::runs) memory: Share,
}

/// How a run's wait ended.
pub(in crate::runs) enum Waited {
    Started(Box<StartedRun>),
    /// The run will not start here.
    Over(RunResult),
}

/// Waits until the run starts, or need not wait any longer. `reservation`: `None` for a run without a place in this process's
/// queue.
pub(in crate::runs) async fn wait_for_start(
    ctx: &Context,
    active: &ActiveRun,
    mut reservation: Option<&mut Reservation>,
    lease: RunLease,
    thread: &Thread,
    run: &Run,
) -> Waited {
    let why = {
        let mut pause = FIRST_CLAIM_POLL;
        let mut freed = ctx.notifier.subscribe(Notification::Thread(thread.id));
        cancel_active_run(ctx, run, &lease).await;
        loop {
            if let Some(Reservation { ticket, memory, .. }) = reservation.as_deref_mut() {
                let turn = async {
                    ticket.turn().await;
                    memory.take_again().await;
                };
                tokio::select! {
                    biased;
                    why = called_off(ctx, active) => break why,
                    () = turn => {}
                }
            }
            // Not to be dropped half-way: the run may have started by then.
            match redaction::start_queued(ctx, &lease).await {
                Ok(QueuedStart::Started(started)) => {
                    active.log.push(RunEvent::Started);
                    return Waited::Started(started);
                }
                Ok(QueuedStart::Lost) => return Waited::Over(RunResult::LetGo),
                Ok(QueuedStart::NotYet) => cancel_active_run(ctx, run, &lease).await,
                Err(error) => {
                    tracing::warn!(error = %Chain(&error), "cannot start a waiting run yet");
                    pause = LONGEST_CLAIM_POLL;
                }
            }
            tokio::select! {
                biased;
                why = called_off(ctx, active) => break why,
                () = freed.changed() => {}
                () = sleep(jittered(pause)) => pause = (pause * 2).min(LONGEST_CLAIM_POLL),
            }
        }
    };
    let end = match why {
        CalledOff::LetGo => return Waited::Over(RunResult::LetGo),
        CalledOff::Cancelled => {
            let status = RunStatus::Queued
                .on(Step::Cancel)
                .unwrap_or(RunStatus::Cancelled);
            end_without_output(status, None)
        }
        CalledOff::Stopped => {
            // All that wait end now: in the order of the queue, so that their messages come into the transcript in that order.
            if let Some(reservation) = reservation {
                reservation.ticket.turn().await;
            }
            end_without_output(RunStatus::Failed, Some(stopped()))
        }
    };
    Waited::Over(finish_queued_run(ctx, active, &lease, thread, run, end).await)
}

/// Why a run need not wait any longer.
enum CalledOff {
    /// The process stops.
    Stopped,
    /// Somebody wants it to end.
    Cancelled,
    /// Others have taken it over, or shall.
    LetGo,
}

/// Resolves when a run need not wait any longer.
async fn called_off(ctx: &Context, active: &ActiveRun) -> CalledOff {
    tokio::select! {
        biased;
        () = active.lost.cancelled() => CalledOff::LetGo,
        () = ctx.tasks.stop.cancelled() => CalledOff::Stopped,
        () = active.cancel.requested() => CalledOff::Cancelled,
        () = others_take_over(ctx) => CalledOff::LetGo,
    }
}

/// Resolves when this process stops and other replicas can go on with what waits.
async fn others_take_over(ctx: &Context) {
    if !ctx.store.keeps_content() {
        std::future::pending::<()>().await;
    }
    ctx.tasks.draining.cancelled().await;
    ctx.notifier.has_peers().await;
}

/// Has the run that is active before this one cancelled, if that is what this one's strategy wants. What cannot be
/// asked now is asked again with the next try to start.
async fn cancel_active_run(ctx: &Context, run: &Run, lease: &RunLease) {
    let discard = match run.strategy {
        MultitaskStrategy::Interrupt => false,
        MultitaskStrategy::Rollback => true,
        MultitaskStrategy::Enqueue | MultitaskStrategy::Reject | MultitaskStrategy::Merge => return,
    };
    match ctx.store.cancel_active(lease, discard).await {
        // Another replica's run is ended by that replica, which looks for such requests.
        Ok(Some(active)) => match ctx.registry.handle(active) {
            Some(handle) => handle.cancel.request(discard),
            None => ctx.notifier.notify(Notification::Asked(active)),
        },
        Ok(None) => {}
        Err(error) => {
            tracing::warn!(error = %Chain(&error), "cannot have the active run cancelled yet");
        }
    }
}

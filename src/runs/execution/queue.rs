//! The wait of a recorded run for its start: in this process's queue, then for memory, then for
//! the store.

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

/// First pause between two claims of the start by the first run of a queue. A run that is not in
/// this queue is active on its thread then. The pause doubles up to the longest one, because the
/// process that ends the active run notifies this one.
const FIRST_CLAIM_POLL: Duration = Duration::from_millis(100);
const LONGEST_CLAIM_POLL: Duration = Duration::from_secs(1);

/// The permits, the ticket and the memory of a message on its way to its run.
pub(in crate::runs) struct Reservation {
    /// The run's place in the queue of its key.
    pub(in crate::runs) ticket: Ticket<ConversationKey, ThreadId>,
    /// A permit of the tenant's unfinished runs, held until the run has ended.
    pub(in crate::runs) tenant_run: Permit<TenantKey>,
    /// Permits of the conversation's queued bytes, held until the run starts.
    pub(in crate::runs) queued_bytes: Permit<ConversationKey>,
    /// A share of the memory budget for bodies.
    pub(in crate::runs) memory: Share,
}

/// The end of a run's wait.
pub(in crate::runs) enum Waited {
    Started(Box<StartedRun>),
    /// The run does not start here.
    Over(RunResult),
}

/// Waits until the run starts, or until it need not wait any longer. `reservation`: `None` for a
/// run without a ticket in this process's queue.
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
            // This future must not be dropped half-way, because the run may have started by then.
            match redaction::start_queued(ctx, &lease).await {
                Ok(QueuedStart::Started(started)) => {
                    active.log.push(RunEvent::Started);
                    return Waited::Started(started);
                }
                Ok(QueuedStart::Lost) => return Waited::Over(RunResult::LetGo),
                Ok(QueuedStart::NotYet) => cancel_active_run(ctx, run, &lease).await,
                Err(error) => {
                    tracing::warn!(error = %Chain(&error), "cannot start a queued run yet");
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
            // All queued runs end now. They end in the order of the queue, so that their messages
            // enter the transcript in that order.
            if let Some(reservation) = reservation {
                reservation.ticket.turn().await;
            }
            end_without_output(RunStatus::Failed, Some(stopped()))
        }
    };
    Waited::Over(finish_queued_run(ctx, active, &lease, thread, run, end).await)
}

/// The reason why a run need not wait any longer.
enum CalledOff {
    /// The process stops.
    Stopped,
    /// A request to end the run came.
    Cancelled,
    /// Another process has taken the run over, or should.
    LetGo,
}

/// Waits until the run need not wait any longer, and returns the reason.
async fn called_off(ctx: &Context, active: &ActiveRun) -> CalledOff {
    tokio::select! {
        biased;
        () = active.lost.cancelled() => CalledOff::LetGo,
        () = ctx.tasks.stop.cancelled() => CalledOff::Stopped,
        () = active.cancel.requested() => CalledOff::Cancelled,
        () = others_take_over(ctx) => CalledOff::LetGo,
    }
}

/// Waits until this process stops and another replica can take over the queued runs.
async fn others_take_over(ctx: &Context) {
    if !ctx.store.keeps_content() {
        std::future::pending::<()>().await;
    }
    ctx.tasks.draining.cancelled().await;
    ctx.notifier.has_peers().await;
}

/// Cancels the active run of the thread if this run's strategy says so. The next try to start
/// repeats a failed request.
async fn cancel_active_run(ctx: &Context, run: &Run, lease: &RunLease) {
    let discard = match run.strategy {
        MultitaskStrategy::Interrupt => false,
        MultitaskStrategy::Rollback => true,
        MultitaskStrategy::Enqueue | MultitaskStrategy::Reject | MultitaskStrategy::Merge => return,
    };
    match ctx.store.cancel_active(lease, discard).await {
        // If the active run is another replica's, that replica reads this as a request and ends
        // the run.
        Ok(Some(active)) => match ctx.registry.handle(active) {
            Some(handle) => handle.cancel.request(discard),
            None => ctx.notifier.notify(Notification::Asked(active)),
        },
        Ok(None) => {}
        Err(error) => {
            tracing::warn!(error = %Chain(&error), "cannot cancel the active run yet");
        }
    }
}

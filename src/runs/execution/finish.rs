//! Ends a run: settles what it left at the upstream, commits its end, then announces it.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::time::sleep;

use super::failure::{Failure, internal, stopped};
use super::outcome::{
    LocalOutcome, UpstreamState, decide_outcome, end_without_output, text_not_yet_streamed, told_by,
};
use super::progress::{Delivery, Progress};
use super::recover::unsettled_run;
use super::round_context::RoundEnd;
use super::settle::{Removal, take_away};
use super::store_retry::retry_until_ok;
use super::trial;
use crate::domain::{
    EventBatch, MultitaskStrategy, Rerun, Run, RunStatus, Thread, ThreadActivity, ThreadState,
    UnsettledRun,
};
use crate::error::Chain;
use crate::runs::backoff::jittered;
use crate::runs::context::Context;
use crate::runs::log::event::{Outcome, RunEvent};
use crate::runs::log::offset::FIRST_EVENT;
use crate::runs::registry::ActiveRun;
use crate::store::{Closing, Finished, Notification, RunEnd, RunLease, StartedRun, StoreError};
use crate::upstream::{Settled, UpstreamError, drain};

/// Time to settle a run's traces at the upstream after the process got the order to stop.
const LAST_SETTLE_TIMEOUT: Duration = Duration::from_secs(2);
/// Number of refusals of the database after which a simpler end is tried.
const MAX_REFUSALS: u32 = 3;
/// First and longest pause between two tries to write an end. The pause doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// The result of a task's work on a run.
pub(in crate::runs) enum RunResult {
    /// The run has ended.
    Ended(Box<Outcome>),
    /// The run has not ended: another task, of this process or another, continues it.
    LetGo,
}

/// Ends a run that ended at the upstream, or failed on the way there. First settles the run's
/// traces at the upstream, then commits the end with the knowledge of what is there.
pub(in crate::runs) async fn finish_run(
    ctx: &Context,
    active: &ActiveRun,
    started: &StartedRun,
    result: Result<RoundEnd, Failure>,
    mut progress: Progress,
) -> RunResult {
    let (result, rest) = match result {
        Ok(RoundEnd { ended, rest }) => (Ok(ended), Some(rest)),
        // A caller who did not want to wait gets a conflict instead of the deadline, and nothing
        // of the run is kept.
        Err(Failure::Deadline)
            if progress.busy && started.run.strategy == MultitaskStrategy::Reject =>
        {
            (Err(Failure::Conflict { blocking_run: None }), None)
        }
        Err(failure) => (Err(failure), None),
    };
    let retry_after = match &result {
        Ok(ended) => ended.refusal.as_ref().and_then(UpstreamError::retry_after),
        Err(failure) => failure.retry_after(),
    };
    // If the upstream ended the run, the readers have seen all its text.
    let mut shown = result.is_err().then(|| progress.shown());
    if matches!(result, Err(Failure::LeaseLost)) {
        return RunResult::LetGo;
    }
    let mut local = LocalOutcome::of(result, &mut progress);
    local.discard |= active.cancel.discards() && local.status == RunStatus::Cancelled;
    let mut upstream = UpstreamState::Clean;
    let mut has_to_settle = !local.is_clean();
    let finished = loop {
        if has_to_settle {
            let Some(settled) = settle(ctx, active, started, &progress, &local).await else {
                return RunResult::LetGo;
            };
            upstream = match conclude(ctx, active, started, &mut progress, &local, settled).await {
                Ok(upstream) => upstream,
                Err(failure) => {
                    tracing::warn!(
                        error = failure.name(),
                        "cannot record the end of a recovery"
                    );
                    return RunResult::LetGo;
                }
            };
        }
        let no_events = EventBatch {
            first: FIRST_EVENT,
            events: Vec::new(),
        };
        let mut end = decide_outcome(&local, &upstream, &progress, no_events);
        // The run begins a new chain, without the replies that its own replaces.
        if progress.rerun == Some(Rerun::Answered)
            && end.upstream_thread_id.is_some()
            && retry_until_ok(|| ctx.store.withhold_replaced(&started.lease))
                .await
                .is_err()
        {
            return RunResult::LetGo;
        }
        if let (Some(shown), Some(reply)) = (shown.take(), &end.reply) {
            for rest in text_not_yet_streamed(&shown, reply).into_deltas() {
                active.log.push(RunEvent::Delta(rest));
            }
        }
        match told_by(&end)
            .filter(|_| ctx.store.keeps_content())
            .and_then(|text| active.log.retold(&text))
        {
            Some(none) => (end.events, end.drops_log) = (none, true),
            None => end.events = active.log.rest(),
        }
        match finish_in_store(ctx, &started.lease, end).await {
            Closed::Finished(finished) => break Some(finished),
            // The run was to be discarded before, and only the store knew.
            Closed::MustDiscard => {
                (local.discard, local.status, local.error) = (true, RunStatus::Cancelled, None);
                has_to_settle = true;
            }
            Closed::Stopped => break None,
            Closed::LeaseLost => return RunResult::LetGo,
        }
    };
    let result = match finished {
        Some(finished) => ended(*finished, retry_after),
        None => outcome_without_content(ctx, &started.thread, &started.run),
    };
    if let (RunResult::Ended(_), Some(rest)) = (&result, rest) {
        drain(rest).await;
    }
    result
}

/// Concludes a recovery that the run's stream did not conclude. If the upstream has answered after
/// all, the recovery stands. Otherwise it is given up: what is in the upstream thread on trial is
/// deleted with it, so the gateway's thread has nothing of the run.
async fn conclude(
    ctx: &Context,
    active: &ActiveRun,
    started: &StartedRun,
    progress: &mut Progress,
    local: &LocalOutcome,
    upstream: UpstreamState,
) -> Result<UpstreamState, Failure> {
    let Some(recovery) = progress.recovery.as_ref().filter(|it| !it.answered) else {
        return Ok(upstream);
    };
    let is_bound = recovery
        .trial
        .as_ref()
        .is_some_and(|trial| started.thread.upstream_thread_id.as_ref() == Some(&trial.thread));
    let has_answer = match &upstream {
        UpstreamState::Clean => true,
        UpstreamState::Seen { settled, .. } => {
            settled.said && settled.status == Some(RunStatus::Completed) && !local.discard
        }
        UpstreamState::None | UpstreamState::Unknown(_) => false,
    };
    if is_bound || has_answer || progress.has_answer {
        trial::accept(ctx, started, &active.log, progress).await?;
        return Ok(upstream);
    }
    let was_on_trial = recovery.trial.is_some();
    trial::give_up(ctx, started, progress).await?;
    Ok(if was_on_trial && progress.delivery > Delivery::NotSent {
        UpstreamState::Seen {
            settled: Settled::default(),
            removed: false,
        }
    } else {
        upstream
    })
}

/// Ends a run that never started.
pub(in crate::runs) async fn finish_queued_run(
    ctx: &Context,
    active: &ActiveRun,
    lease: &RunLease,
    thread: &Thread,
    run: &Run,
    end: RunEnd,
) -> RunResult {
    let mut end = RunEnd {
        events: active.log.rest(),
        discard: active.cancel.discards(),
        ..end
    };
    loop {
        return match finish_in_store(ctx, lease, end.clone()).await {
            Closed::Finished(finished) => ended(*finished, None),
            // The run started just now without this process knowing, and a rollback wants it
            // removed.
            Closed::MustDiscard if !end.discard => {
                end.discard = true;
                continue;
            }
            Closed::Stopped => outcome_without_content(ctx, thread, run),
            Closed::LeaseLost | Closed::MustDiscard => RunResult::LetGo,
        };
    }
}

fn ended(finished: Finished, retry_after: Option<Duration>) -> RunResult {
    let Finished {
        thread,
        activity,
        run,
        message,
    } = finished;
    RunResult::Ended(Box::new(Outcome {
        thread,
        activity,
        run,
        message,
        retry_after,
    }))
}

/// Ends what still works of the run at the upstream, within a bound, and removes it if the run is
/// discarded. Returns `None` if the task had to let go of the run: then the next owner
/// settles the traces.
async fn settle(
    ctx: &Context,
    active: &ActiveRun,
    started: &StartedRun,
    progress: &Progress,
    local: &LocalOutcome,
) -> Option<UpstreamState> {
    if ctx.registry.has_lapsed() {
        return None;
    }
    tokio::select! {
        biased;
        () = active.lost.cancelled() => None,
        upstream = look(ctx, started, progress, local) => upstream,
    }
}

async fn look(
    ctx: &Context,
    started: &StartedRun,
    progress: &Progress,
    local: &LocalOutcome,
) -> Option<UpstreamState> {
    if progress.delivery == Delivery::NotSent {
        return Some(UpstreamState::None);
    }
    // The run cannot end without this, so it waits for the store. A process that stops before that
    // leaves the run to its next owner: it must not record that the upstream took nothing.
    let stopped = async {
        ctx.tasks.stop.cancelled().await;
        sleep(LAST_SETTLE_TIMEOUT).await;
    };
    let left = tokio::select! {
        left = unsettled_run(ctx, started, progress) => left,
        () = stopped => return None,
    };
    let Ok(left) = left else {
        return Some(UpstreamState::None);
    };
    let left = UnsettledRun {
        remove: local.discard,
        ..left
    };
    let Some(upstream) = ctx.upstream(&started.thread.upstream) else {
        return Some(UpstreamState::Unknown(left));
    };
    // A panic in here must not prevent the run's end.
    let look = take_away(
        ctx,
        &started.lease,
        &**upstream,
        &left,
        Removal::IfDiscarded,
    );
    let seen = tokio::select! {
        seen = AssertUnwindSafe(look).catch_unwind() => seen,
        () = settling_time_is_over(ctx) => {
            tracing::warn!("settling the run at the upstream took too long");
            return Some(UpstreamState::Unknown(left));
        }
    };
    Some(match seen {
        // The gateway looks again before it uses the thread again.
        Ok(Ok(settled)) if settled.unsure => UpstreamState::Unknown(left),
        Ok(Ok(settled)) => UpstreamState::Seen {
            settled,
            removed: left.remove,
        },
        Ok(Err(failure)) => {
            tracing::warn!(
                error = failure.name(),
                "cannot settle the run at the upstream"
            );
            UpstreamState::Unknown(left)
        }
        Err(_) => {
            tracing::error!("settling the run at the upstream panicked");
            UpstreamState::Unknown(left)
        }
    })
}

/// Waits until the time to settle a run's traces at the upstream is over.
async fn settling_time_is_over(ctx: &Context) {
    let last_moment = async {
        ctx.tasks.stop.cancelled().await;
        sleep(LAST_SETTLE_TIMEOUT).await;
    };
    tokio::select! {
        () = sleep(ctx.config.runs.settle_timeout) => {}
        () = last_moment => {}
    }
}

/// The result of the attempt to commit an end.
enum Closed {
    Finished(Box<Finished>),
    MustDiscard,
    /// The run is no longer this process's.
    LeaseLost,
    /// The process must stop while the database is unavailable.
    Stopped,
}

/// Commits the end and retries without a limit: a run that ended at the upstream must not stay
/// open here. Replaces an end that the database refuses several times by a bare failure.
async fn finish_in_store(ctx: &Context, lease: &RunLease, end: RunEnd) -> Closed {
    let mut end = Arc::new(end);
    let mut pause = FIRST_PAUSE;
    let mut refusals = 0;
    loop {
        let error = match ctx.store.finish(lease, Arc::clone(&end)).await {
            Ok(Closing::Finished(finished)) => return Closed::Finished(finished),
            Ok(Closing::MustDiscard) => return Closed::MustDiscard,
            Ok(Closing::Lost) => return Closed::LeaseLost,
            Err(error) => error,
        };
        tracing::error!(error = %Chain(&error), "cannot record the end of a run yet");
        if ctx.tasks.stop.is_cancelled() {
            return Closed::Stopped;
        }
        refusals += u32::from(!matches!(error, StoreError::Unavailable(_)));
        if refusals == MAX_REFUSALS {
            // A run that is to be discarded must stay so, or the store asks for it again.
            let (unacknowledged_requests, discard, unsettled_run) = (
                end.unacknowledged_requests,
                end.discard,
                end.unsettled_run.clone(),
            );
            let bare = end_without_output(RunStatus::Failed, Some(internal()));
            end = Arc::new(RunEnd {
                unacknowledged_requests,
                unsettled_run,
                discard,
                ..bare
            });
        } else if refusals == 2 * MAX_REFUSALS {
            end = Arc::new(RunEnd {
                unsettled_run: None,
                ..(*end).clone()
            });
        }
        sleep(jittered(pause)).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Returns the result of a run whose end could not be written before the process had to stop. Lets
/// go of the run if another process can continue it.
fn outcome_without_content(ctx: &Context, thread: &Thread, run: &Run) -> RunResult {
    if ctx.store.keeps_content() {
        return RunResult::LetGo;
    }
    RunResult::Ended(Box::new(Outcome {
        thread: thread.clone(),
        activity: ThreadActivity {
            state: ThreadState::Active,
            queue_depth: 0,
        },
        run: Run {
            status: RunStatus::Failed,
            error: Some(stopped()),
            ..run.clone()
        },
        message: None,
        retry_after: None,
    }))
}

/// Announces the end of the run to its readers, and to the runs that wait for its thread. Releases
/// a run that its task let go of, so that another process can continue it.
pub(in crate::runs) fn announce(ctx: &Context, active: &ActiveRun, result: RunResult) {
    let notifier = &ctx.notifier;
    let RunResult::Ended(outcome) = result else {
        return notifier.release(active.lease);
    };
    let (thread, run) = (outcome.thread.id, outcome.run.id);
    let others_wait = outcome.activity.queue_depth > 0;
    if let Some(message) = &outcome.message {
        active
            .log
            .push(RunEvent::MessageCompleted(Arc::new(message.clone())));
    }
    active.log.push(RunEvent::Ended(Arc::new(*outcome)));
    if active.log.is_public() {
        notifier.notify(Notification::Run(run));
    }
    if others_wait {
        notifier.notify(Notification::Thread(thread));
    }
}

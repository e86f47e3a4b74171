//! Trials: a new upstream thread replaces the old one only when the upstream has answered in it.
//!
//! Until then the thread keeps its binding, and the run's record names the trial. So a process that
//! takes the run over finds the request, and a trial without an answer changes nothing.

use std::sync::Arc;

use super::failure::Failure;
use super::progress::Progress;
use super::store_retry::{back_off, retry_until_ok, write_until_ok};
use crate::domain::{Rerun, RunRecovery, Trial};
use crate::runs::context::Context;
use crate::runs::log::event::RunEvent;
use crate::runs::log::writer::RunLogWriter;
use crate::store::{Binding, Bound, Made, StartedRun, Withholding};

/// Records a recovery without an upstream thread of its own: the next response begins a new chain.
pub(in crate::runs) async fn begin(
    ctx: &Context,
    started: &StartedRun,
    progress: &mut Progress,
    recovery: RunRecovery,
) -> Result<(), Failure> {
    record(ctx, started, &recovery).await?;
    progress.recovery = Some(recovery);
    Ok(())
}

/// Makes the recovery of the run final, because the upstream has answered: withholds the messages
/// that were left out, and binds the thread to its new upstream thread. Does nothing if there is no
/// recovery, or if it is final.
///
/// The future may be dropped at any await. Then a part may be recorded, and the end of the run
/// repeats the call.
pub(in crate::runs) async fn accept(
    ctx: &Context,
    started: &StartedRun,
    log: &RunLogWriter,
    progress: &mut Progress,
) -> Result<(), Failure> {
    let Some(recovery) = progress.recovery.as_ref().filter(|it| !it.answered) else {
        return Ok(());
    };
    let mut recovery = recovery.clone();
    progress.has_answer = true;
    if recovery.omitted.any {
        let omitted = Withholding {
            before: recovery.omitted.before,
            missing_only: false,
            carried: Some(recovery.omitted.carried),
        };
        tracing::warn!(
            thread.id = %started.thread.id,
            first_position = omitted.before,
            "the upstream thread begins later than the conversation; its older messages are withheld from the model"
        );
        write_until_ok(|| ctx.store.withhold_earlier(&started.lease, &omitted)).await?;
    }
    if let Some(trial) = &recovery.trial {
        let binding = Binding {
            id: trial.thread.clone(),
            intent: trial.orphan,
            seeded: true,
            carried_users: trial.carried_users,
        };
        let bound = retry_until_ok(|| {
            ctx.store
                .bind_upstream_thread(&started.lease, binding.clone())
        })
        .await?;
        if bound != Bound::Done {
            return Err(Failure::LeaseLost);
        }
        if progress.rerun == Some(Rerun::Answered) {
            retry_until_ok(|| ctx.store.withhold_replaced(&started.lease)).await?;
        }
        progress.holds_input = false;
    }
    recovery.answered = true;
    if recovery.recovery.is_some() {
        record(ctx, started, &recovery).await?;
        if let Some(refusal) = progress.ladder.answered() {
            write_until_ok(|| ctx.store.record_refusal(&started.lease, &refusal)).await?;
        }
    }
    if let Some(told) = &recovery.recovery {
        tracing::warn!(
            cause = told.cause.as_str(),
            history = told.history.as_str(),
            messages_left_out = told.messages_left_out,
            parts_replaced = told.parts_replaced,
            "the upstream refused the conversation and answered it in a new thread"
        );
        log.push(RunEvent::Recovered(Arc::new(told.clone())));
    }
    progress.recovery = Some(recovery);
    Ok(())
}

/// Gives a recovery up that the upstream did not answer. The thread keeps its binding, and the
/// janitor deletes the upstream thread on trial.
pub(in crate::runs) async fn give_up(
    ctx: &Context,
    started: &StartedRun,
    progress: &mut Progress,
) -> Result<(), Failure> {
    let Some(recovery) = progress.recovery.take_if(|it| !it.answered) else {
        return Ok(());
    };
    progress.has_answer = false;
    progress
        .thread
        .clone_from(&started.thread.upstream_thread_id);
    if let Some(Trial { thread, orphan, .. }) = &recovery.trial {
        while let Err(error) = ctx.store.resolve(*orphan, Made::Unused(thread)).await {
            back_off(error).await?;
        }
    }
    Ok(())
}

async fn record(
    ctx: &Context,
    started: &StartedRun,
    recovery: &RunRecovery,
) -> Result<(), Failure> {
    write_until_ok(|| async {
        let recorded = ctx.store.record_recovery(&started.lease, recovery).await?;
        Ok(recorded == Bound::Done)
    })
    .await
}

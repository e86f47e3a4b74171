//! The store's calls about runs under `store.transcript = "off"`: this process holds in its
//! registry the content that the store does not keep.

use std::sync::Arc;

use super::context::Context;
use crate::domain::{ConversationKey, MultitaskStrategy, RunId, RunStatus};
use crate::store::{
    Admission, Admitted, Answered, NotWritten, Pause, Paused, QueuedStart, Rolled, Rollover,
    RunLease, StartedRun, StoreError, ToolAnswer, Withdrawal, Withdrawn, redacted_action,
};

/// Records a message and its run. Moves the content of a message that joins another run to that
/// run.
pub(in crate::runs) async fn admit(
    ctx: &Context,
    admission: &Arc<Admission>,
) -> Result<Admitted, NotWritten> {
    if ctx.store.keeps_content() {
        return ctx.store.admit(Arc::clone(admission)).await;
    }
    let Admission {
        run_id, message, ..
    } = &**admission;
    let registry = &ctx.registry;
    let (strategy, may_join) = strategy_now(ctx, admission)
        .await
        .map_err(NotWritten::Unsent)?;
    // Add the content before the message is recorded, because the run that it joins may start
    // right after.
    let own = registry.unstored(*run_id).filter(|_| !admission.again);
    if let Some(own) = &own {
        own.add(message);
    }
    let admitted = ctx
        .store
        .admit(Admission {
            strategy,
            ..(**admission).clone()
        })
        .await;
    let joined: &[RunId] = match &admitted {
        Ok(Admitted::Started(_) | Admitted::Queued { .. }) => return admitted,
        Ok(Admitted::Merged { run, .. }) => &[run.id],
        Ok(
            Admitted::Busy
            | Admitted::OtherUpstream(_)
            | Admitted::Repeated
            | Admitted::NoThread
            | Admitted::NoMessage,
        ) => &[],
        // The message may have joined one of these runs, which would know it by its id.
        Err(_) => &may_join,
    };
    for unstored in joined.iter().filter_map(|run| registry.unstored(*run)) {
        unstored.add(message);
    }
    // If its own run was recorded in spite of the error, it only continues for messages that
    // joined it.
    if let Some(own) = own {
        own.remove(message.id);
    }
    admitted
}

/// Returns the strategy that the message gets, and the runs that it may join. It cannot join a run
/// that waits in another process, because that process would not get the message's content.
async fn strategy_now(
    ctx: &Context,
    admission: &Admission,
) -> Result<(MultitaskStrategy, Vec<RunId>), StoreError> {
    if admission.strategy != MultitaskStrategy::Merge {
        return Ok((admission.strategy, Vec::new()));
    }
    let unfinished = ctx
        .store
        .unfinished(&admission.key)
        .await?
        .unwrap_or_default();
    let waiting = unfinished
        .iter()
        .filter(|run| run.status == RunStatus::Queued);
    let waiting: Vec<RunId> = waiting.map(|run| run.id).collect();
    let is_held = |run: &RunId| {
        let unstored = ctx.registry.unstored(*run);
        unstored.is_some_and(|unstored| !unstored.lock().input.is_empty())
    };
    Ok(if waiting.iter().all(is_held) {
        (MultitaskStrategy::Merge, waiting)
    } else {
        (MultitaskStrategy::Enqueue, Vec::new())
    })
}

/// Starts a queued run if no run is before it.
pub(in crate::runs) async fn start_queued(
    ctx: &Context,
    lease: &RunLease,
) -> Result<QueuedStart, StoreError> {
    let mut claim = ctx.store.start_queued(lease).await?;
    if let QueuedStart::Started(started) = &mut claim {
        complete(ctx, started);
    }
    Ok(claim)
}

/// Gives a run without a message of its own the last messages of the user.
pub(in crate::runs) async fn take_last_messages(
    ctx: &Context,
    lease: &RunLease,
) -> Result<QueuedStart, StoreError> {
    let mut taken = ctx.store.take_last_messages(lease).await?;
    if let QueuedStart::Started(started) = &mut taken {
        complete(ctx, started);
    }
    Ok(taken)
}

/// Replaces a full thread with a fresh one.
pub(in crate::runs) async fn roll_over(
    ctx: &Context,
    rollover: &Rollover,
) -> Result<Rolled, StoreError> {
    let mut rolled = ctx.store.roll_over(rollover).await?;
    if let Rolled::Done {
        turn: Some(started),
        ..
    } = &mut rolled
    {
        complete(ctx, started);
    }
    Ok(rolled)
}

fn complete(ctx: &Context, started: &mut StartedRun) {
    if !ctx.store.keeps_content() {
        ctx.registry.give_input(started);
    }
}

/// Makes a run wait for the outputs of its calls.
pub(in crate::runs) async fn pause(
    ctx: &Context,
    lease: &RunLease,
    pause: &Pause,
) -> Result<Paused, StoreError> {
    if !ctx.store.keeps_content()
        && let Some(unstored) = ctx.registry.unstored(lease.run_id)
    {
        unstored.lock().asked = Some(pause.required_action.clone());
    }
    let mut paused = ctx.store.pause(lease, pause).await?;
    if let Paused::Waiting(waiting) = &mut paused {
        ctx.registry.give_arguments(&mut waiting.run);
    }
    Ok(paused)
}

/// Records the outputs of a run's calls. Without a transcript the store does not keep the outputs,
/// so the caller passes them on.
pub(in crate::runs) async fn answer_tools(
    ctx: &Context,
    key: &ConversationKey,
    id: RunId,
    answer: &ToolAnswer,
) -> Result<Answered, StoreError> {
    if !ctx.store.keeps_content() {
        let unstored = ctx.registry.unstored(id);
        let is_asked = unstored
            .is_some_and(|unstored| unstored.lock().asked.as_ref() == Some(&answer.expected));
        // The store has the calls without arguments, so it would accept any arguments.
        if !is_asked && redacted_action(&answer.expected) != answer.expected {
            return Ok(Answered::NotWaiting);
        }
    }
    ctx.store.answer_tools(key, id, answer).await
}

/// Withdraws a message whose caller got the error that it was not recorded.
pub(in crate::runs) async fn withdraw(
    ctx: &Context,
    lease: &RunLease,
    taken: &Withdrawal,
) -> Result<Withdrawn, StoreError> {
    let withdrawn = ctx.store.withdraw(lease, taken).await?;
    if let (Withdrawn::Shared { .. }, Some(unstored)) =
        (&withdrawn, ctx.registry.unstored(lease.run_id))
    {
        unstored.remove(taken.message);
    }
    Ok(withdrawn)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{RequiredAction, ToolCall};

    #[test]
    fn redacted_calls_do_not_tell_their_arguments() {
        let call = ToolCall {
            id: "c".to_owned(),
            name: "f".to_owned(),
            arguments: "planted".to_owned(),
            ..ToolCall::default()
        };
        let redacted = redacted_action(&RequiredAction {
            tool_calls: vec![call.clone()],
        });
        assert_eq!(
            redacted.tool_calls,
            [ToolCall {
                arguments: String::new(),
                ..call
            }]
        );
    }
}

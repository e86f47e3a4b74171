//! Takes the outputs of a run's function calls.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tracing::Instrument;

use super::idempotency::{earlier, repeated};
use super::read::{self, is_reachable, takes_work};
use super::subscription::{RunSubscription, Submitted, follow};
use crate::domain::{
    CallAnswer, ConversationKey, MessageId, OutputContent, RequiredAction, Run, RunId, RunStatus,
    Thread, ToolCallType, ToolOutput,
};
use crate::error::{Chain, Error, TooOften};
use crate::runs::backoff::jittered;
use crate::runs::context::Context;
use crate::runs::log::offset::{EventOffset, FIRST_EVENT};
use crate::runs::redaction;
use crate::store::{Answered, Idempotency, Notification, StoreError, ThreadName, ToolAnswer};

/// Pause before the next check of outputs whose answer was lost.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// Time after which lost outputs can no longer be recorded: it exceeds every statement's time
/// limit.
const LATEST: Duration = Duration::from_secs(20);

/// Outputs of all functions that a run asked for.
#[derive(Clone, Debug)]
pub struct NewOutputs {
    pub outputs: Vec<ToolOutput>,
    /// Whether they came with a user's own token, which may not answer the calls of every
    /// assistant.
    pub by_user: bool,
    pub idempotency: Option<Idempotency>,
    /// If set, the outputs are accepted only as a repeat of earlier ones, and refused for this
    /// reason otherwise.
    pub only_repeats: Option<TooOften>,
}

/// A run that continues with the outputs of its function calls.
#[derive(Clone, Debug)]
pub struct Resumed {
    pub submitted: Submitted,
    /// Number of the first event after the wait.
    pub from: EventOffset,
}

const BACKEND_ANSWERS: Error = Error::Forbidden(
    "only a backend with an API key may send the outputs of this run's function calls; \
     a user's own token may, if the assistant's configuration has `client_tools = true`",
);

/// Hands a run the outputs of the function calls that it waits for. When this returns, the outputs
/// are durable and the run continues.
///
/// # Errors
/// - [`Error::Forbidden`] if only a backend may answer the calls.
/// - [`Error::Invalid`] if the outputs are not exactly one for each call.
/// - [`Error::RunNotWaiting`] if the run does not wait, or no longer waits.
pub(in crate::runs) async fn answer_tools(
    ctx: &Arc<Context>,
    key: &ConversationKey,
    id: RunId,
    new: NewOutputs,
) -> Result<Resumed, Error> {
    let _token = ctx.tasks.tracker.token();
    takes_work(ctx)?;
    if new.by_user {
        let (run, _) = read::run(ctx, key, id).await?;
        let assistant = ctx.config.assistants.get(&run.assistant);
        if !assistant.is_some_and(|assistant| assistant.client_tools) {
            return Err(BACKEND_ANSWERS);
        }
    }
    if let Some(earlier) = repeated(ctx, key, new.idempotency.as_ref()).await? {
        return after_outputs(earlier, &new.outputs).await;
    }
    if let Some(too_often) = new.only_repeats {
        return Err(too_often.into());
    }
    let (run, follow) = follow(ctx, key, id).await?;
    let expected = match &run.required_action {
        Some(action) if run.status == RunStatus::RequiresAction => action.clone(),
        _ => return not_waiting(ctx, key, &run, &follow, new).await,
    };
    if let Some(wrong) = wrong(&new.outputs, &expected) {
        return Err(Error::Invalid(wrong));
    }
    let outputs = typed(new.outputs.clone(), &expected)?;
    if !ctx.store.keeps_content() && ctx.registry.handle(id).is_none() {
        return Err(Error::OtherReplica);
    }
    let thread = read::thread(ctx, ThreadName::Id(&key.tenant, run.thread_id))
        .await?
        .thread;
    is_reachable(ctx, &thread.upstream)?;
    takes_parts(ctx, &thread.upstream, &outputs)?;
    // Read this before the outputs are recorded: if the read fails, the caller gets an error and
    // nothing has changed.
    let from = follow.after(&new.outputs).await?.unwrap_or(FIRST_EVENT);
    let mut answer = ToolAnswer {
        expected,
        outputs,
        idempotency: new.idempotency.clone(),
    };
    if !ctx.store.keeps_content() {
        answer.idempotency.get_or_insert_with(own_key);
    }
    let handing = hand_over(Arc::clone(ctx), key.clone(), id, answer);
    let answered = if ctx.store.keeps_content() {
        handing.await?
    } else {
        // The store does not keep the outputs, so a task hands them over even if the caller
        // disconnects.
        let task = ctx.tasks.tracker.spawn(handing.in_current_span());
        task.await
            .map_err(|error| Error::Internal(Some(error.into())))??
    };
    if let Handover::Taken(thread, run) = answered {
        let submitted = Submitted {
            thread: *thread,
            run: *run,
            follow,
            replayed: false,
        };
        return Ok(Resumed { submitted, from });
    }
    let (run, _) = read::run(ctx, key, id).await?;
    not_waiting(ctx, key, &run, &follow, new).await
}

/// Answers for a run that does not wait for these outputs: another request with the same
/// idempotency key was faster, or the outputs are too late.
async fn not_waiting(
    ctx: &Arc<Context>,
    key: &ConversationKey,
    run: &Run,
    follow: &RunSubscription,
    new: NewOutputs,
) -> Result<Resumed, Error> {
    if let Some(earlier) = repeated(ctx, key, new.idempotency.as_ref()).await? {
        return after_outputs(earlier, &new.outputs).await;
    }
    let were_asked_for = follow.after(&new.outputs).await?.is_some();
    Err(Error::RunNotWaiting(why_not_waiting(
        run.status,
        were_asked_for,
    )))
}

/// Returns an earlier request with the same outputs, and the number from which the run continued
/// with them. Without a stored log, readers begin at the first event.
async fn after_outputs(earlier: Submitted, outputs: &[ToolOutput]) -> Result<Resumed, Error> {
    let from = earlier.follow.after(outputs).await?.unwrap_or(FIRST_EVENT);
    Ok(Resumed {
        submitted: earlier,
        from,
    })
}

/// Returns why a run with this status does not wait for the outputs.
fn why_not_waiting(status: RunStatus, were_asked_for: bool) -> String {
    match status {
        RunStatus::Expired => {
            "the outputs came after the run's deadline; post a new message to continue".to_owned()
        }
        status if were_asked_for && status != RunStatus::Cancelled => {
            format!("these calls already have their outputs; the run is {status}")
        }
        status if status.is_final() => format!("the run has ended ({status}) and takes no outputs"),
        RunStatus::RequiresAction => {
            "the run now waits for other calls; read the run to see which".to_owned()
        }
        status => format!("the run is {status} and does not wait for outputs"),
    }
}

/// The result of handing outputs over.
enum Handover {
    /// The run took them.
    Taken(Box<Thread>, Box<Run>),
    /// The run did not wait for them, or no longer.
    NotTaken,
    /// Not known.
    Unknown,
}

impl Handover {
    fn taken(thread: Thread, run: Run) -> Self {
        Self::Taken(Box::new(thread), Box::new(run))
    }
}

/// Records outputs and lets the run continue with them.
async fn hand_over(
    ctx: Arc<Context>,
    key: ConversationKey,
    id: RunId,
    answer: ToolAnswer,
) -> Result<Handover, StoreError> {
    let error = match redaction::answer_tools(&ctx, &key, id, &answer).await {
        Ok(Answered::Resumed(waiting)) => {
            pass_on(&ctx, id, answer.outputs);
            return Ok(Handover::taken(waiting.thread, waiting.run));
        }
        Ok(Answered::Repeated | Answered::NotWaiting) => return Ok(Handover::NotTaken),
        Err(error) => error,
    };
    let is_lost = matches!(error, StoreError::Unavailable(_)) && !ctx.store.keeps_content();
    let (true, Some(used)) = (is_lost, answer.idempotency.clone()) else {
        return Err(error);
    };
    // Outputs that the store takes late need a task that outlives the caller's request.
    let patience = ctx.config.admission_timeout;
    let tasks = ctx.tasks.tracker.clone();
    let finding = find_out(ctx, key, id, answer, used, patience).in_current_span();
    match timeout(patience, tasks.spawn(finding)).await {
        Ok(Ok(found @ (Handover::Taken(..) | Handover::NotTaken))) => Ok(found),
        _ => Err(error),
    }
}

/// Hands recorded outputs to the run's task. Notifies the owner if the run is another replica's;
/// that replica reads the outputs as a request.
fn pass_on(ctx: &Context, id: RunId, outputs: Vec<ToolOutput>) {
    match ctx.registry.handle(id) {
        Some(handle) => handle.answer(outputs),
        None => ctx.notifier.notify(Notification::Asked(id)),
    }
}

/// Finds out whether the store recorded outputs that it does not keep, and hands them over to the
/// run. While the caller waits, it records them again, which their idempotency key allows once.
/// Afterwards it only looks.
async fn find_out(
    ctx: Arc<Context>,
    key: ConversationKey,
    id: RunId,
    answer: ToolAnswer,
    used: Idempotency,
    patience: Duration,
) -> Handover {
    let begun = Instant::now();
    loop {
        tokio::select! {
            biased;
            () = ctx.tasks.draining.cancelled() => return Handover::Unknown,
            () = sleep(jittered(LOOK_AGAIN)) => {}
        }
        let is_awaited = begun.elapsed() < patience;
        let found = if is_awaited {
            match redaction::answer_tools(&ctx, &key, id, &answer).await {
                Ok(Answered::Resumed(waiting)) => Ok(Handover::taken(waiting.thread, waiting.run)),
                Ok(Answered::NotWaiting) => Ok(Handover::NotTaken),
                Ok(Answered::Repeated) => taken_before(&ctx, &key, &used).await,
                Err(error) => Err(error.into()),
            }
        } else {
            taken_before(&ctx, &key, &used).await
        };
        match found {
            Ok(taken @ Handover::Taken(..)) => {
                pass_on(&ctx, id, answer.outputs);
                return taken;
            }
            Ok(_) if is_awaited => return Handover::NotTaken,
            Ok(_) if begun.elapsed() > LATEST => return Handover::Unknown,
            Ok(_) | Err(Error::StoreUnavailable(_)) => {}
            Err(error) => {
                tracing::error!(error = %Chain(&error), "cannot find out whether tool outputs were recorded");
                return Handover::Unknown;
            }
        }
    }
}

/// Returns whether the outputs with this idempotency key were recorded.
async fn taken_before(
    ctx: &Context,
    key: &ConversationKey,
    used: &Idempotency,
) -> Result<Handover, Error> {
    let earlier = earlier(ctx, key, Some(used)).await?;
    Ok(earlier.map_or(Handover::NotTaken, |it| Handover::taken(it.thread, it.run)))
}

/// Returns what is wrong with outputs for these calls.
fn wrong(outputs: &[ToolOutput], expected: &RequiredAction) -> Option<String> {
    if expected.is_answered_by(outputs) {
        return None;
    }
    let expected: Vec<&str> = expected
        .tool_calls
        .iter()
        .map(|call| call.id.as_str())
        .collect();
    let given: Vec<&str> = outputs
        .iter()
        .map(|output| output.tool_call_id.as_str())
        .collect();
    let list = |ids: Vec<&str>| {
        ids.iter()
            .map(|id| format!("`{id}`"))
            .collect::<Vec<_>>()
            .join(", ")
    };
    let missing: Vec<&str> = expected
        .iter()
        .copied()
        .filter(|id| !given.contains(id))
        .collect();
    let unknown: Vec<&str> = given
        .iter()
        .copied()
        .filter(|id| !expected.contains(id))
        .collect();
    Some(if !unknown.is_empty() {
        format!(
            "`tool_outputs` names calls that the run does not wait for: {}; it waits for {}",
            list(unknown),
            list(expected)
        )
    } else if !missing.is_empty() {
        format!(
            "`tool_outputs` must answer all calls at once; missing: {}",
            list(missing)
        )
    } else {
        "`tool_outputs` answers a call more than once".to_owned()
    })
}

/// Gives each output the type of its call.
///
/// # Errors
/// [`Error::Invalid`] with the form that a call takes, if its output has another.
fn typed(
    mut outputs: Vec<ToolOutput>,
    expected: &RequiredAction,
) -> Result<Vec<ToolOutput>, Error> {
    for output in &mut outputs {
        let call = expected
            .tool_calls
            .iter()
            .find(|call| call.id == output.tool_call_id);
        output.kind = call.map_or_else(ToolCallType::default, |call| call.kind);
        output.kind.check(&output.answer).map_err(|form| {
            Error::Invalid(format!(
                "`tool_outputs`: the call `{}` of type `{}` takes {form}",
                output.tool_call_id, output.kind
            ))
        })?;
    }
    Ok(outputs)
}

/// Checks that an upstream takes the form of the outputs.
fn takes_parts(ctx: &Context, upstream: &str, outputs: &[ToolOutput]) -> Result<(), Error> {
    let is_list = |output: &ToolOutput| {
        matches!(
            output.answer,
            CallAnswer::Output {
                output: OutputContent::Parts(_),
                ..
            }
        )
    };
    let upstream = ctx.upstream(upstream);
    if upstream.is_some_and(|it| !it.capabilities().takes_output_parts)
        && outputs.iter().any(is_list)
    {
        return Err(Error::Invalid(
            "`tool_outputs`: each `output` must be a string, because this kind of upstream takes \
             no parts"
                .to_owned(),
        ));
    }
    Ok(())
}

/// Makes an idempotency key for outputs without one, so that a lost answer can be looked up. A
/// caller's key never has a space.
fn own_key() -> Idempotency {
    Idempotency {
        key: format!("own {}", MessageId::new()),
        request_hash: [0; 32],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ToolCall;

    #[test]
    fn what_is_wrong_is_told() {
        let call = |id: &str| ToolCall {
            id: id.to_owned(),
            ..ToolCall::default()
        };
        let action = RequiredAction {
            tool_calls: vec![call("a"), call("b")],
        };
        let outputs = |ids: &[&str]| -> Vec<ToolOutput> {
            ids.iter().map(|id| ToolOutput::text(*id, "")).collect()
        };
        assert_eq!(wrong(&outputs(&["b", "a"]), &action), None);
        for (ids, told) in [
            (&["a"][..], "missing: `b`"),
            (&[], "missing: `a`, `b`"),
            (&["a", "b", "c"], "does not wait for: `c`"),
            (&["a", "b", "b"], "more than once"),
        ] {
            assert!(
                wrong(&outputs(ids), &action).unwrap().contains(told),
                "{ids:?}"
            );
        }
    }
}

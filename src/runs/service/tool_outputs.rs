//! Answers to the function calls of a run.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tracing::Instrument;

use super::idempotency::{earlier, repeated};
use super::read::{self, is_reachable, takes_work};
use super::subscription::{RunSubscription, Submitted, follow};
use crate::domain::{
    ConversationKey, MessageId, RequiredAction, Run, RunId, RunStatus, Thread, ToolOutput,
};
use crate::error::{Chain, Error, TooOften};
use crate::runs::backoff::jittered;
use crate::runs::context::Context;
use crate::runs::log::offset::{EventOffset, FIRST_EVENT};
use crate::runs::redaction;
use crate::store::{Answered, Idempotency, Notification, StoreError, ThreadName, ToolAnswer};

/// How soon to ask again what became of outputs whose answer was lost.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// They cannot be taken any more so long after: it is past any statement's time limit.
const LATEST: Duration = Duration::from_secs(20);

/// Outputs of the functions that a run asked for: all at once.
#[derive(Clone, Debug)]
pub struct NewOutputs {
    pub outputs: Vec<ToolOutput>,
    /// They came with a user's own token, which may not answer the calls of every assistant.
    pub by_user: bool,
    pub idempotency: Option<Idempotency>,
    /// They are taken only as a repeat of earlier ones; the reason is told otherwise.
    pub only_repeats: Option<TooOften>,
}

/// A run that goes on with the outputs of its function calls.
#[derive(Clone, Debug)]
pub struct Resumed {
    pub submitted: Submitted,
    /// The first event after the wait.
    pub from: EventOffset,
}

const BACKEND_ANSWERS: Error = Error::Forbidden(
    "the outputs of this run's function calls come from a backend, which has an API key: a user's own token may send them \
     only where the assistant's configuration has `client_tools = true`",
);

/// Hands a run the outputs of the function calls that it waits for. They are durable when this returns, and the run goes on.
///
/// # Errors
/// [`Error::Forbidden`] if a backend has to answer; [`Error::Invalid`] if the outputs are not one for each call;
/// [`Error::RunNotWaiting`] if the run does not wait (any more).
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
    if !ctx.store.keeps_content() && ctx.registry.handle(id).is_none() {
        return Err(Error::OtherReplica);
    }
    let thread = read::thread(ctx, ThreadName::Id(&key.tenant, run.thread_id))
        .await?
        .thread;
    is_reachable(ctx, &thread.upstream)?;
    // Before they are taken: where this cannot be read the caller is refused, and nothing has happened.
    let from = follow.after(&new.outputs).await?.unwrap_or(FIRST_EVENT);
    let mut answer = ToolAnswer {
        expected,
        outputs: new.outputs.clone(),
        idempotency: new.idempotency.clone(),
    };
    if !ctx.store.keeps_content() {
        answer.idempotency.get_or_insert_with(own_key);
    }
    let handing = hand_over(Arc::clone(ctx), key.clone(), id, answer);
    let answered = if ctx.store.keeps_content() {
        handing.await?
    } else {
        // The store could not give them again: a caller that leaves must not take them along half-way.
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

/// The run does not wait for these outputs: another request with the same idempotency key was faster, or they
/// are too late.
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

/// An earlier request with the same outputs, from where these let the run go on. If the log is gone by now, that is the end.
async fn after_outputs(earlier: Submitted, outputs: &[ToolOutput]) -> Result<Resumed, Error> {
    let from = earlier.follow.after(outputs).await?.unwrap_or(FIRST_EVENT);
    Ok(Resumed {
        submitted: earlier,
        from,
    })
}

/// Why a run with this status does not wait for the outputs of calls.
fn why_not_waiting(status: RunStatus, were_asked_for: bool) -> String {
    match status {
        RunStatus::Expired => {
            "the outputs came after the run's deadline; post a new message to go on".to_owned()
        }
        status if were_asked_for && status != RunStatus::Cancelled => {
            format!("these calls were answered already; the run is {status}")
        }
        status if status.is_final() => format!("the run has ended ({status}) and takes no outputs"),
        RunStatus::RequiresAction => {
            "the run waits for other calls by now; ask for the run to see which".to_owned()
        }
        status => format!("the run is {status} and waits for no outputs"),
    }
}

/// What became of outputs.
enum Handover {
    /// The run took them.
    Taken(Box<Thread>, Box<Run>),
    /// It did not wait for them (any more).
    NotTaken,
    /// It cannot be told.
    Unknown,
}

impl Handover {
    fn taken(thread: Thread, run: Run) -> Self {
        Self::Taken(Box::new(thread), Box::new(run))
    }
}

/// Records outputs and lets the run go on with them.
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
    // The outputs may have to wait for the store longer than their sender does.
    let patience = ctx.config.admission_timeout;
    let tasks = ctx.tasks.tracker.clone();
    let finding = find_out(ctx, key, id, answer, used, patience).in_current_span();
    match timeout(patience, tasks.spawn(finding)).await {
        Ok(Ok(found @ (Handover::Taken(..) | Handover::NotTaken))) => Ok(found),
        _ => Err(error),
    }
}

/// Hands outputs that were taken to the run's task. Another replica's run is resumed by that replica, which looks for such
/// requests.
fn pass_on(ctx: &Context, id: RunId, outputs: Vec<ToolOutput>) {
    match ctx.registry.handle(id) {
        Some(handle) => handle.answer(outputs),
        None => ctx.notifier.notify(Notification::Asked(id)),
    }
}

/// Finds out whether outputs were taken that the store could not give again, and hands them over. For as long as their
/// sender waits that is done by giving them again, which their idempotency key lets happen once; then only by looking.
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
                tracing::error!(error = %Chain(&error), "cannot tell whether tool outputs were taken");
                return Handover::Unknown;
            }
        }
    }
}

/// Whether the outputs that came with this key were taken.
async fn taken_before(
    ctx: &Context,
    key: &ConversationKey,
    used: &Idempotency,
) -> Result<Handover, Error> {
    let earlier = earlier(ctx, key, Some(used)).await?;
    Ok(earlier.map_or(Handover::NotTaken, |it| Handover::taken(it.thread, it.run)))
}

/// What is wrong with outputs for these calls.
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

/// A key for outputs that have none of their caller's, by which it can be told what became of them if the answer is lost. No
/// caller's key has a blank.
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
            name: "f".to_owned(),
            arguments: String::new(),
        };
        let action = RequiredAction {
            tool_calls: vec![call("a"), call("b")],
        };
        let outputs = |ids: &[&str]| -> Vec<ToolOutput> {
            ids.iter()
                .map(|id| ToolOutput {
                    tool_call_id: (*id).to_owned(),
                    output: String::new(),
                })
                .collect()
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

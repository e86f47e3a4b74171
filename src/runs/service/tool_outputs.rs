//! Answers to the function calls of a run.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tracing::Instrument;

use crate::domain::{ConversationKey, MessageId, RequiredAction, Run, RunId, RunStatus, Thread, ToolOutput};
use crate::error::{Chain, Error, TooOften};
use crate::runs::RunSubscription;
use crate::runs::{Runs, Submitted, jittered};
use crate::store::{Answered, Idempotency, News, StoreError, ThreadName, ToolAnswer};

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

const BACKEND_ANSWERS: Error = Error::Forbidden(
    "the outputs of this run's function calls come from a backend, which has an API key: a user's own token may send them \
     only where the assistant's configuration has `client_tools = true`",
);

impl Runs {
    /// Hands a run the outputs of the function calls that it waits for. They are durable when this returns, and the run goes
    /// on; the number is that of the first event after the wait.
    ///
    /// # Errors
    /// [`Error::Forbidden`] if a backend has to answer; [`Error::Invalid`] if the outputs are not one for each call;
    /// [`Error::RunNotWaiting`] if the run does not wait (any more).
    pub async fn answer_tools(
        &self,
        key: &ConversationKey,
        id: RunId,
        new: NewOutputs,
    ) -> Result<(Submitted, i64), Error> {
        let _token = self.parts.given.tasks.token();
        self.takes_work()?;
        if new.by_user {
            let (run, _) = self.run(key, id).await?;
            let assistant = self.parts.given.assistants.get(&run.assistant);
            if !assistant.is_some_and(|assistant| assistant.client_tools) {
                return Err(BACKEND_ANSWERS);
            }
        }
        if let Some(earlier) = self.repeated(key, new.idempotency.as_ref()).await? {
            return after_outputs(earlier, &new.outputs).await;
        }
        if let Some(too_often) = new.only_repeats {
            return Err(too_often.into());
        }
        let (run, follow) = self.follow(key, id).await?;
        let expected = match &run.required_action {
            Some(action) if run.status == RunStatus::RequiresAction => action.clone(),
            _ => return self.not_waiting(key, &run, &follow, new).await,
        };
        if let Some(wrong) = wrong(&new.outputs, &expected) {
            return Err(Error::Invalid(wrong));
        }
        if !self.store().keeps_content() && self.parts.registry.handle(id).is_none() {
            return Err(Error::OtherReplica);
        }
        let thread = self.thread(ThreadName::Id(&key.tenant, run.thread_id)).await?.thread;
        self.is_reachable(&thread.upstream)?;
        // Before they are taken: where this cannot be read the caller is refused, and nothing has happened.
        let from = follow.after(&new.outputs).await?.unwrap_or(0);
        let mut answer =
            ToolAnswer { expected, outputs: new.outputs.clone(), idempotency: new.idempotency.clone() };
        if !self.store().keeps_content() {
            answer.idempotency.get_or_insert_with(own_key);
        }
        let handing = hand_over(self.clone(), key.clone(), id, answer);
        let answered = if self.store().keeps_content() {
            handing.await?
        } else {
            // The store could not give them again: a caller that leaves must not take them along half-way.
            let task = self.parts.given.tasks.spawn(handing.in_current_span());
            task.await.map_err(|error| Error::Internal(Some(error.into())))??
        };
        if let Some((thread, run)) = answered {
            return Ok((Submitted { thread, run, follow, replayed: false }, from));
        }
        let (run, _) = self.run(key, id).await?;
        self.not_waiting(key, &run, &follow, new).await
    }

    /// The run does not wait for these outputs: another request with the same idempotency key was faster, or they
    /// are too late.
    async fn not_waiting(
        &self,
        key: &ConversationKey,
        run: &Run,
        follow: &RunSubscription,
        new: NewOutputs,
    ) -> Result<(Submitted, i64), Error> {
        if let Some(earlier) = self.repeated(key, new.idempotency.as_ref()).await? {
            return after_outputs(earlier, &new.outputs).await;
        }
        let were_asked_for = follow.after(&new.outputs).await?.is_some();
        Err(Error::RunNotWaiting(why_not_waiting(run.status, were_asked_for)))
    }
}

/// An earlier request with the same outputs, from where these let the run go on. If the log is gone by now, that is the end.
async fn after_outputs(earlier: Submitted, outputs: &[ToolOutput]) -> Result<(Submitted, i64), Error> {
    let from = earlier.follow.after(outputs).await?.unwrap_or(0);
    Ok((earlier, from))
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

/// The run that took outputs, and its thread. `None`: it did not wait for them (any more).
type TakenBy = Option<(Thread, Run)>;

/// Records outputs and lets the run go on with them.
async fn hand_over(
    runs: Runs,
    key: ConversationKey,
    id: RunId,
    answer: ToolAnswer,
) -> Result<TakenBy, StoreError> {
    let error = match runs.answer_in_store(&key, id, &answer).await {
        Ok(Answered::Resumed(waiting)) => {
            pass_on(&runs, id, answer.outputs);
            return Ok(Some((waiting.thread, waiting.run)));
        }
        Ok(Answered::Repeated | Answered::NotWaiting) => return Ok(None),
        Err(error) => error,
    };
    let is_lost = matches!(error, StoreError::Unavailable(_)) && !runs.store().keeps_content();
    let (true, Some(used)) = (is_lost, answer.idempotency.clone()) else { return Err(error) };
    // The outputs may have to wait for the store longer than their sender does.
    let patience = runs.parts.given.admission_timeout;
    let finding = find_out(runs.clone(), key, id, (answer, used), patience).in_current_span();
    match timeout(patience, runs.parts.given.tasks.spawn(finding)).await {
        Ok(Ok(Some(taken))) => Ok(taken),
        _ => Err(error),
    }
}

/// Hands outputs that were taken to the run's task. Another replica's run is resumed by that replica, which looks for such
/// requests.
fn pass_on(runs: &Runs, id: RunId, outputs: Vec<ToolOutput>) {
    match runs.parts.registry.handle(id) {
        Some(handle) => handle.answer(outputs),
        None => runs.parts.notifier.notify(News::Asked(id)),
    }
}

/// Finds out whether outputs were taken that the store could not give again, and hands them over. For as long as their
/// sender waits that is done by giving them again, which their idempotency key lets happen once; then only by looking.
/// `None`: it cannot be told.
async fn find_out(
    runs: Runs,
    key: ConversationKey,
    id: RunId,
    (answer, used): (ToolAnswer, Idempotency),
    patience: Duration,
) -> Option<TakenBy> {
    let begun = Instant::now();
    loop {
        tokio::select! {
            biased;
            () = runs.parts.given.draining.cancelled() => return None,
            () = sleep(jittered(LOOK_AGAIN)) => {}
        }
        let is_awaited = begun.elapsed() < patience;
        let found = if is_awaited {
            match runs.answer_in_store(&key, id, &answer).await {
                Ok(Answered::Resumed(waiting)) => Ok(Some((waiting.thread, waiting.run))),
                Ok(Answered::NotWaiting) => Ok(None),
                Ok(Answered::Repeated) => taken_before(&runs, &key, &used).await,
                Err(error) => Err(error.into()),
            }
        } else {
            taken_before(&runs, &key, &used).await
        };
        match found {
            Ok(Some(taken)) => {
                pass_on(&runs, id, answer.outputs);
                return Some(Some(taken));
            }
            Ok(None) if is_awaited => return Some(None),
            Ok(None) if begun.elapsed() > LATEST => return None,
            Ok(None) | Err(Error::StoreUnavailable(_)) => {}
            Err(error) => {
                tracing::error!(error = %Chain(&error), "cannot tell whether tool outputs were taken");
                return None;
            }
        }
    }
}

/// The run, if the outputs that came with this key were taken.
async fn taken_before(runs: &Runs, key: &ConversationKey, used: &Idempotency) -> Result<TakenBy, Error> {
    let earlier = runs.earlier(key, Some(used)).await?;
    Ok(earlier.map(|it| (it.thread, it.run)))
}

/// What is wrong with outputs for these calls.
fn wrong(outputs: &[ToolOutput], expected: &RequiredAction) -> Option<String> {
    if expected.is_answered_by(outputs) {
        return None;
    }
    let expected: Vec<&str> = expected.tool_calls.iter().map(|call| call.id.as_str()).collect();
    let given: Vec<&str> = outputs.iter().map(|output| output.tool_call_id.as_str()).collect();
    let list = |ids: Vec<&str>| ids.iter().map(|id| format!("`{id}`")).collect::<Vec<_>>().join(", ");
    let missing: Vec<&str> = expected.iter().copied().filter(|id| !given.contains(id)).collect();
    let unknown: Vec<&str> = given.iter().copied().filter(|id| !expected.contains(id)).collect();
    Some(if !unknown.is_empty() {
        format!(
            "`tool_outputs` names calls that the run does not wait for: {}; it waits for {}",
            list(unknown),
            list(expected)
        )
    } else if !missing.is_empty() {
        format!("`tool_outputs` must answer all calls at once; missing: {}", list(missing))
    } else {
        "`tool_outputs` answers a call more than once".to_owned()
    })
}

/// A key for outputs that have none of their caller's, by which it can be told what became of them if the answer is lost. No
/// caller's key has a blank.
fn own_key() -> Idempotency {
    Idempotency { key: format!("own {}", MessageId::new()), request_hash: [0; 32] }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ToolCall;

    #[test]
    fn what_is_wrong_is_told() {
        let call = |id: &str| ToolCall { id: id.to_owned(), name: "f".to_owned(), arguments: String::new() };
        let action = RequiredAction { tool_calls: vec![call("a"), call("b")] };
        let outputs = |ids: &[&str]| -> Vec<ToolOutput> {
            ids.iter()
                .map(|id| ToolOutput { tool_call_id: (*id).to_owned(), output: String::new() })
                .collect()
        };
        assert_eq!(wrong(&outputs(&["b", "a"]), &action), None);
        for (ids, told) in [
            (&["a"][..], "missing: `b`"),
            (&[], "missing: `a`, `b`"),
            (&["a", "b", "c"], "does not wait for: `c`"),
            (&["a", "b", "b"], "more than once"),
        ] {
            assert!(wrong(&outputs(ids), &action).unwrap().contains(told), "{ids:?}");
        }
    }
}

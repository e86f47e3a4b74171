//! `store.transcript = "off"`: what the store does not keep of a run is held by this process for as long as it works on the
//! run, in the run's entry of the registry.
//!
//! Content that is lost with a process is never replaced by something empty: a run that cannot say what it was to say ends,
//! and a message that the upstream lacks is withheld from it for good.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::domain::{ConversationKey, MessageId, MultitaskStrategy, RequiredAction, Run, RunId, RunStatus};
use crate::runs::Runs;
use crate::runs::registry::RunRegistry;
use crate::store::{
    Admission, Admitted, Answered, Claim, InputMessage, NotWritten, Pause, Paused, Rolled, Rollover,
    RunLease, StartedRun, StoreError, ThreadReport, ToolAnswer, Withdrawal, Withdrawn, redacted_action,
};

/// What is held of an unfinished run.
#[derive(Clone, Default)]
pub(in crate::runs) struct Unstored(Arc<Mutex<Content>>);

#[derive(Default)]
struct Content {
    /// What the user says, or is to say.
    input: Vec<InputMessage>,
    /// The calls that the run asked for last.
    asked: Option<RequiredAction>,
}

impl Unstored {
    /// A message is one of the run's now, if it was not yet.
    fn add(&self, message: &InputMessage) {
        let mut content = self.lock();
        if content.input.iter().all(|it| it.id != message.id) {
            content.input.push(message.clone());
        }
    }

    fn remove(&self, message: MessageId) {
        self.lock().input.retain(|it| it.id != message);
    }

    /// Nothing in here panics half-way through a change.
    fn lock(&self) -> MutexGuard<'_, Content> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Unstored {
    /// Without what is held.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Unstored")
    }
}

impl RunRegistry {
    fn unstored(&self, run: RunId) -> Option<Unstored> {
        self.handle(run).map(|handle| handle.unstored)
    }

    /// Gives a turn what it is to say. What is not known here stays empty.
    fn give_input(&self, turn: &mut StartedRun) {
        // A message that has only just joined is held under the run that it would have had by itself. It is added here before
        // it is removed there: so who looks here last does not miss it.
        let others = self.handles().into_iter().map(|handle| handle.unstored);
        let all: Vec<Unstored> = others.chain(self.unstored(turn.run.id)).collect();
        for message in turn.input.iter_mut().filter(|message| message.content.is_empty()) {
            let known = all.iter().find_map(|unstored| {
                let content = unstored.lock();
                content.input.iter().find(|it| it.id == message.id).map(|it| it.content.clone())
            });
            message.content = known.unwrap_or_default();
        }
    }

    /// Gives a run the arguments of the calls that it waits for, if they are known here.
    pub(in crate::runs) fn give_arguments(&self, run: &mut Run) {
        let Some(action) = &mut run.required_action else { return };
        let Some(unstored) = self.unstored(run.id) else { return };
        let content = unstored.lock();
        if let Some(asked) = content.asked.as_ref().filter(|asked| redacted_action(asked) == *action) {
            action.clone_from(asked);
        }
    }
}

/// What the store does for a run, with what only this process holds.
impl Runs {
    pub(in crate::runs) async fn admit(&self, admission: &Arc<Admission>) -> Result<Admitted, NotWritten> {
        if self.store().keeps_content() {
            return self.store().admit(Arc::clone(admission)).await;
        }
        let Admission { run_id, message, .. } = &**admission;
        let registry = &self.parts.registry;
        let (strategy, may_join) = self.strategy(admission).await.map_err(NotWritten::Unsent)?;
        // First of all: once it is recorded, the run that it joins may start at any time.
        let own = registry.unstored(*run_id);
        if let Some(own) = &own {
            own.add(message);
        }
        let admitted = self.store().admit(Admission { strategy, ..(**admission).clone() }).await;
        let joined: &[RunId] = match &admitted {
            Ok(Admitted::Started(_) | Admitted::Queued { .. }) => return admitted,
            Ok(Admitted::Merged { run, .. }) => &[run.id],
            Ok(Admitted::Busy | Admitted::OtherUpstream(_) | Admitted::Repeated) => &[],
            // The run that it joined, if it did, knows it by its id.
            Err(_) => &may_join,
        };
        for unstored in joined.iter().filter_map(|run| registry.unstored(*run)) {
            unstored.add(message);
        }
        // Should its own run be recorded all the same, that goes on only if others have joined it.
        if let Some(own) = own {
            own.remove(message.id);
        }
        admitted
    }

    /// A message cannot join a run that waits in another process, which would not hear what it says. With the runs that it
    /// may join.
    async fn strategy(&self, admission: &Admission) -> Result<(MultitaskStrategy, Vec<RunId>), StoreError> {
        if admission.strategy != MultitaskStrategy::Merge {
            return Ok((admission.strategy, Vec::new()));
        }
        let unfinished = self.store().unfinished(&admission.key).await?.unwrap_or_default();
        let waiting = unfinished.iter().filter(|run| run.status == RunStatus::Queued);
        let waiting: Vec<RunId> = waiting.map(|run| run.id).collect();
        let is_held = |run: &RunId| {
            let unstored = self.parts.registry.unstored(*run);
            unstored.is_some_and(|unstored| !unstored.lock().input.is_empty())
        };
        Ok(if waiting.iter().all(is_held) {
            (MultitaskStrategy::Merge, waiting)
        } else {
            (MultitaskStrategy::Enqueue, Vec::new())
        })
    }

    pub(in crate::runs) async fn claim(&self, lease: &RunLease) -> Result<Claim, StoreError> {
        let mut claim = self.store().claim(lease).await?;
        if let Claim::Started(turn) = &mut claim {
            self.complete(turn);
        }
        Ok(claim)
    }

    pub(in crate::runs) async fn roll_over_in_store(
        &self,
        rollover: &Rollover,
    ) -> Result<Rolled, StoreError> {
        let mut rolled = self.store().roll_over(rollover).await?;
        if let Rolled::Done { turn: Some(turn), .. } = &mut rolled {
            self.complete(turn);
        }
        Ok(rolled)
    }

    fn complete(&self, turn: &mut StartedRun) {
        if !self.store().keeps_content() {
            self.parts.registry.give_input(turn);
        }
    }

    pub(in crate::runs) async fn pause(&self, lease: &RunLease, pause: &Pause) -> Result<Paused, StoreError> {
        if !self.store().keeps_content()
            && let Some(unstored) = self.parts.registry.unstored(lease.run_id)
        {
            unstored.lock().asked = Some(pause.required_action.clone());
        }
        let mut paused = self.store().pause(lease, pause).await?;
        if let Paused::Waiting(waiting) = &mut paused {
            self.parts.registry.give_arguments(&mut waiting.run);
        }
        Ok(paused)
    }

    /// The caller hands the outputs over: the store could not give them again.
    pub(in crate::runs) async fn answer_in_store(
        &self,
        key: &ConversationKey,
        id: RunId,
        answer: &ToolAnswer,
    ) -> Result<Answered, StoreError> {
        if !self.store().keeps_content() {
            let unstored = self.parts.registry.unstored(id);
            let is_asked =
                unstored.is_some_and(|unstored| unstored.lock().asked.as_ref() == Some(&answer.expected));
            // What is stored are calls without their arguments, which any arguments would fit.
            if !is_asked && redacted_action(&answer.expected) != answer.expected {
                return Ok(Answered::NotWaiting);
            }
        }
        self.store().answer_tools(key, id, answer).await
    }

    pub(in crate::runs) async fn withdraw_in_store(
        &self,
        lease: &RunLease,
        taken: &Withdrawal,
    ) -> Result<Withdrawn, StoreError> {
        let withdrawn = self.store().withdraw(lease, taken).await?;
        if let (Withdrawn::Shared { .. }, Some(unstored)) =
            (&withdrawn, self.parts.registry.unstored(lease.run_id))
        {
            unstored.remove(taken.message);
        }
        Ok(withdrawn)
    }

    /// Gives the last run of a thread the arguments of its calls.
    pub(in crate::runs) fn with_arguments(&self, mut report: ThreadReport) -> ThreadReport {
        if let Some(run) = &mut report.last_run {
            self.parts.registry.give_arguments(run);
        }
        report
    }
}

#[cfg(test)]
mod tests {
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::domain::{ContentPart, ToolCall};

    fn message(text: &str) -> InputMessage {
        InputMessage { id: MessageId::new(), content: vec![ContentPart::Text { text: text.to_owned() }] }
    }

    #[test]
    fn message_is_added_once() {
        let (unstored, said) = (Unstored::default(), message("one"));
        unstored.add(&said);
        unstored.add(&said);
        assert_eq!(unstored.lock().input.len(), 1);
        unstored.remove(said.id);
        assert_eq!(unstored.lock().input, []);
    }

    #[test]
    fn content_goes_with_the_task_of_its_run() {
        let registry = RunRegistry::new();
        let run = RunId::new();
        let active = registry.begins(run, CancellationToken::new());
        registry.unstored(run).unwrap().add(&message("one"));
        let active = registry.goes_on_for_others(active);
        assert_eq!(registry.unstored(run).unwrap().lock().input.len(), 1, "others have joined it");
        drop(active);
        assert!(registry.unstored(run).is_none());
    }

    #[test]
    fn what_is_held_is_not_printed() {
        let registry = RunRegistry::new();
        let run = RunId::new();
        let _working = registry.begins(run, CancellationToken::new());
        registry.unstored(run).unwrap().add(&message("planted"));
        assert!(!format!("{registry:?}").contains("planted"));
    }

    #[test]
    fn redacted_calls_do_not_tell_their_arguments() {
        let call = ToolCall { id: "c".to_owned(), name: "f".to_owned(), arguments: "planted".to_owned() };
        let redacted = redacted_action(&RequiredAction { tool_calls: vec![call.clone()] });
        assert_eq!(redacted.tool_calls, [ToolCall { arguments: String::new(), ..call }]);
    }
}

//! The mode in which nothing that is said is stored (`store.transcript = "off"`): a store around another one. All rules
//! of that mode are here.
//!
//! What is written arrives below without its content: messages are rows whose list of parts is empty, pieces of text and
//! the arguments and outputs of function calls are empty texts, so that ids, numbers and counts stay what they are. What
//! this process needs of it again is held in memory for as long as the run is unfinished and its own.
//!
//! What is lost with a process is never replaced by something empty: a run that cannot say what it was to say ends, and
//! a message that the upstream lacks is withheld from it for good.

mod blank;
mod life;
#[cfg(test)]
mod tests;

use std::collections::hash_map::{Entry, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::stream::BoxStream;

use super::{
    Admission, Admitted, Answered, Binding, Bound, Claim, Closing, InputMessage, News, Orphan, Pause, Paused,
    Renewed, Repeated, Request, RunEnd, RunLease, RunProgress, Store, StoreError, ThreadName, ToolAnswer,
    Turn, Withdrawal, Withdrawn, Withholding,
};
use crate::domain::{
    Baseline, Context, ConversationKey, EventBatch, Message, MessageId, MultitaskStrategy, Page, PageRequest,
    ReplicaId, RequiredAction, Run, RunId, RunStatus, ThreadId,
};
use blank::{blank_action, blank_events, blank_input, blank_leftover, blank_outputs, blank_reply, lasting};

/// A store to which no content comes through.
pub struct Discreet {
    inner: Arc<dyn Store>,
    held: Mutex<HashMap<RunId, Held>>,
}

/// What is held for an unfinished run of this process.
#[derive(Default)]
struct Held {
    /// What the user says, or is to say.
    input: Vec<InputMessage>,
    /// The calls that it asked for last.
    asked: Option<RequiredAction>,
    /// When its own message was refused. Others may have joined it all the same, or may do so now.
    refused: Option<Instant>,
}

/// How long something is held for a run that may not exist. Its admission has arrived by then, or never does.
const REFUSED_FOR: Duration = Duration::from_mins(10);

impl Discreet {
    pub fn new(inner: Arc<dyn Store>) -> Self {
        Self { inner, held: Mutex::default() }
    }

    /// A message cannot join a run that waits in another process, which would not hear what it says. With the runs that it
    /// may join.
    async fn strategy(&self, admission: &Admission) -> Result<(MultitaskStrategy, Vec<RunId>), StoreError> {
        if admission.strategy != MultitaskStrategy::Merge {
            return Ok((admission.strategy, Vec::new()));
        }
        let unfinished = self.inner.unfinished(&admission.key).await?.unwrap_or_default();
        let held = self.held();
        let waiting = unfinished.iter().filter(|run| run.status == RunStatus::Queued);
        let waiting: Vec<RunId> = waiting.map(|run| run.id).collect();
        let all_are_ours = waiting.iter().all(|run| held.contains_key(run));
        Ok(if all_are_ours {
            (MultitaskStrategy::Merge, waiting)
        } else {
            (MultitaskStrategy::Enqueue, Vec::new())
        })
    }

    /// The message of an admission is one of a waiting run's now. That may have ended by now; and it may have found the
    /// message already.
    fn joins(&self, run: RunId, message: &InputMessage) {
        if let Some(Held { input, .. }) = self.held().get_mut(&run)
            && input.iter().all(|it| it.id != message.id)
        {
            input.push(message.clone());
        }
    }

    /// The message is not one of that run's any more: its sender heard that it was not taken.
    fn leaves(&self, run: RunId, message: MessageId) {
        let (mut held, now) = (self.held(), Instant::now());
        held.retain(|_, it| it.refused.is_none_or(|since| !it.input.is_empty() || now - since < REFUSED_FOR));
        if let Some(own) = held.get_mut(&run) {
            own.input.retain(|it| it.id != message);
            own.refused = Some(now);
        }
    }

    /// No run was made of the message. One that an earlier try made goes on with those that have joined it.
    fn is_not_taken(&self, run: RunId, message: MessageId) {
        let mut held = self.held();
        if let Entry::Occupied(mut own) = held.entry(run) {
            own.get_mut().input.retain(|it| it.id != message);
            if own.get().input.is_empty() {
                own.remove();
            }
        }
    }

    /// Gives a turn what it is to say. What is not known here stays empty.
    fn give_input(&self, turn: &mut Turn) {
        let held = self.held();
        let own = held.get(&turn.run.id);
        for message in &mut turn.input {
            // One that has only just joined is held under the run that it would have had by itself.
            let mut known = own.into_iter().chain(held.values()).flat_map(|it| &it.input);
            if let Some(said) = known.find(|it| it.id == message.id) {
                message.content.clone_from(&said.content);
            }
        }
    }

    /// Gives a run the arguments of the calls that it waits for, if they are known here.
    fn give_arguments(&self, run: &mut Run) {
        let Some(action) = &mut run.required_action else { return };
        let held = self.held();
        let asked = held.get(&run.id).and_then(|it| it.asked.as_ref());
        if let Some(asked) = asked.filter(|asked| blank_action(asked) == *action) {
            action.clone_from(asked);
        }
    }

    fn give_all_arguments(&self, runs: &mut [Run]) {
        for run in runs {
            self.give_arguments(run);
        }
    }

    fn forget(&self, run: RunId) {
        self.held().remove(&run);
    }

    /// Passes on whether the lease was good. Without it the run is somebody else's.
    fn if_held(&self, lease: &RunLease, is_held: bool) -> bool {
        if !is_held {
            self.forget(lease.run_id);
        }
        is_held
    }

    /// Nothing in here panics half-way through a change.
    fn held(&self) -> MutexGuard<'_, HashMap<RunId, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Discreet {
    /// Without what is held.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Discreet").field("inner", &self.inner).finish_non_exhaustive()
    }
}

#[async_trait]
impl Store for Discreet {
    fn keeps_content(&self) -> bool {
        false
    }

    async fn ready(&self) -> Result<(), StoreError> {
        self.inner.ready().await
    }

    async fn admit(&self, admission: &Admission) -> Result<Admitted, StoreError> {
        let Admission { run_id, message, .. } = admission;
        let (strategy, may_join) = self.strategy(admission).await?;
        let blank = Admission { strategy, message: blank_input(message), ..admission.clone() };
        // First of all: once it is recorded, the run that it joins may start at any time.
        // Tried again, it may have been joined by others since the first time.
        self.held().entry(*run_id).or_default();
        self.joins(*run_id, message);
        let mut admitted = self.inner.admit(&blank).await;
        match &mut admitted {
            Ok(Admitted::Started(turn)) => self.give_input(turn),
            Ok(Admitted::Queued { .. }) => {}
            Ok(Admitted::Merged { run, .. }) => {
                self.joins(run.id, message);
                self.is_not_taken(*run_id, message.id);
            }
            Ok(Admitted::Busy | Admitted::OtherUpstream(_) | Admitted::Repeated) => {
                self.is_not_taken(*run_id, message.id);
            }
            Err(_) => {
                // The run that it joined, if it did, knows it by its id.
                for run in may_join {
                    self.joins(run, message);
                }
                // Should it be recorded all the same, it goes on only if others have joined it.
                self.leaves(*run_id, message.id);
            }
        }
        admitted
    }

    async fn repeated(
        &self,
        key: &ConversationKey,
        idempotency_key: &str,
        remember: Duration,
    ) -> Result<Option<Repeated>, StoreError> {
        let mut repeated = self.inner.repeated(key, idempotency_key, remember).await?;
        if let Some(repeated) = &mut repeated {
            self.give_arguments(&mut repeated.run);
        }
        Ok(repeated)
    }

    async fn claim(&self, lease: &RunLease) -> Result<Claim, StoreError> {
        let mut claim = self.inner.claim(lease).await?;
        match &mut claim {
            Claim::Started(turn) => self.give_input(turn),
            Claim::NotYet => {}
            Claim::Lost => self.forget(lease.run_id),
        }
        Ok(claim)
    }

    async fn displace(&self, lease: &RunLease, discard: bool) -> Result<Option<RunId>, StoreError> {
        self.inner.displace(lease, discard).await
    }

    async fn request_cancel(&self, key: &ConversationKey, id: RunId) -> Result<Option<Run>, StoreError> {
        let mut run = self.inner.request_cancel(key, id).await?;
        if let Some(run) = &mut run {
            self.give_arguments(run);
        }
        Ok(run)
    }

    async fn take_queued(&self, replica: ReplicaId, id: RunId) -> Result<Option<RunLease>, StoreError> {
        self.inner.take_queued(replica, id).await
    }

    async fn pause(&self, lease: &RunLease, pause: &Pause) -> Result<Paused, StoreError> {
        let Pause { required_action, upstream_run_id, content: _, usage, events } = pause;
        let blank = Pause {
            required_action: blank_action(required_action),
            upstream_run_id: upstream_run_id.clone(),
            content: Vec::new(),
            usage: *usage,
            events: blank_events(events),
        };
        self.held().entry(lease.run_id).or_default().asked = Some(required_action.clone());
        let mut paused = self.inner.pause(lease, &blank).await?;
        match &mut paused {
            Paused::Waiting(waiting) => self.give_arguments(&mut waiting.run),
            Paused::Cancelling => {}
            Paused::Lost => self.forget(lease.run_id),
        }
        Ok(paused)
    }

    /// The caller hands the outputs over.
    async fn answer_tools(
        &self,
        key: &ConversationKey,
        id: RunId,
        answer: &ToolAnswer,
    ) -> Result<Answered, StoreError> {
        let ToolAnswer { expected, outputs, idempotency } = answer;
        // As it is stored: without the arguments that were put back here.
        let is_put_back = self.held().get(&id).is_some_and(|it| it.asked.as_ref() == Some(expected));
        let blank = ToolAnswer {
            expected: if is_put_back { blank_action(expected) } else { expected.clone() },
            outputs: blank_outputs(outputs),
            idempotency: idempotency.clone(),
        };
        self.inner.answer_tools(key, id, &blank).await
    }

    async fn sends_outputs(&self, lease: &RunLease) -> Result<bool, StoreError> {
        Ok(self.if_held(lease, self.inner.sends_outputs(lease).await?))
    }

    async fn sends_again(&self, lease: &RunLease) -> Result<bool, StoreError> {
        Ok(self.if_held(lease, self.inner.sends_again(lease).await?))
    }

    /// Outputs are not handed over in this way: what is stored of them says nothing.
    async fn requests(&self, replica: ReplicaId) -> Result<Vec<Request>, StoreError> {
        let mut requests = self.inner.requests(replica).await?;
        requests.retain(|request| !matches!(request, Request::Resume { .. }));
        Ok(requests)
    }

    async fn lost(&self, replica: ReplicaId, working: &[RunId]) -> Result<Vec<RunId>, StoreError> {
        let lost = self.inner.lost(replica, working).await?;
        for run in &lost {
            self.forget(*run);
        }
        Ok(lost)
    }

    async fn bind_upstream_thread(
        &self,
        lease: &RunLease,
        binding: &Binding<'_>,
    ) -> Result<Bound, StoreError> {
        let bound = self.inner.bind_upstream_thread(lease, binding).await?;
        self.if_held(lease, bound == Bound::Done);
        Ok(bound)
    }

    async fn withhold_earlier(&self, lease: &RunLease, what: &Withholding) -> Result<bool, StoreError> {
        Ok(self.if_held(lease, self.inner.withhold_earlier(lease, what).await?))
    }

    async fn earlier(
        &self,
        run: RunId,
        before: Option<i64>,
        limit: u32,
    ) -> Result<Page<Message>, StoreError> {
        self.inner.earlier(run, before, limit).await
    }

    async fn backlog(
        &self,
        _run: RunId,
        _before: Option<i64>,
        _limit: u32,
    ) -> Result<Page<Message>, StoreError> {
        Ok(Page { data: Vec::new(), has_more: false })
    }

    async fn baseline(&self, run: RunId) -> Result<Baseline, StoreError> {
        self.inner.baseline(run).await
    }

    async fn settled(
        &self,
        lease: &RunLease,
        run: RunId,
        found: Context,
        synced: bool,
    ) -> Result<bool, StoreError> {
        Ok(self.if_held(lease, self.inner.settled(lease, run, lasting(found), synced).await?))
    }

    async fn finish(&self, lease: &RunLease, end: &RunEnd) -> Result<Closing, StoreError> {
        let blank = RunEnd {
            status: end.status,
            error: end.error.clone(),
            usage: end.usage,
            upstream_run_id: end.upstream_run_id.clone(),
            unheard: end.unheard,
            upstream_thread_id: end.upstream_thread_id.clone(),
            reply: end.reply.as_ref().map(blank_reply),
            said: lasting(end.said),
            synced: end.synced,
            leftover: end.leftover.as_ref().map(blank_leftover),
            discard: end.discard,
            events: blank_events(&end.events),
            // What is not stored of the reply cannot be told again.
            drops_log: false,
        };
        let mut closing = self.inner.finish(lease, &blank).await?;
        match &mut closing {
            Closing::Finished(finished) => {
                if let (Some(message), Some(reply)) = (&mut finished.message, &end.reply)
                    && message.id == reply.id
                {
                    message.content.clone_from(&reply.content);
                }
                self.forget(lease.run_id);
            }
            Closing::MustDiscard => {}
            Closing::Lost => self.forget(lease.run_id),
        }
        Ok(closing)
    }

    async fn withdraw(&self, lease: &RunLease, taken: &Withdrawal) -> Result<Withdrawn, StoreError> {
        let withdrawn = self.inner.withdraw(lease, taken).await?;
        match &withdrawn {
            Withdrawn::Ended => self.forget(lease.run_id),
            Withdrawn::Shared { .. } => self.leaves(lease.run_id, taken.message),
            Withdrawn::Lost => {}
        }
        Ok(withdrawn)
    }

    async fn record(&self, progress: &[RunProgress]) -> Result<Vec<RunId>, StoreError> {
        let blank = |progress: &RunProgress| RunProgress {
            events: blank_events(&progress.events),
            ..progress.clone()
        };
        self.inner.record(&progress.iter().map(blank).collect::<Vec<_>>()).await
    }

    async fn events(&self, run: RunId, from: i64) -> Result<Vec<EventBatch>, StoreError> {
        self.inner.events(run, from).await
    }

    async fn messages(
        &self,
        name: ThreadName<'_>,
        across: bool,
        page: &PageRequest<MessageId>,
    ) -> Result<Option<Page<Message>>, StoreError> {
        self.inner.messages(name, across, page).await
    }

    async fn transcript(&self, thread: ThreadId, after: i64, limit: u32) -> Result<Vec<Message>, StoreError> {
        self.inner.transcript(thread, after, limit).await
    }

    async fn runs(
        &self,
        key: &ConversationKey,
        page: &PageRequest<RunId>,
    ) -> Result<Option<Page<Run>>, StoreError> {
        let mut runs = self.inner.runs(key, page).await?;
        if let Some(page) = &mut runs {
            self.give_all_arguments(&mut page.data);
        }
        Ok(runs)
    }

    async fn unfinished(&self, key: &ConversationKey) -> Result<Option<Vec<Run>>, StoreError> {
        let mut runs = self.inner.unfinished(key).await?;
        if let Some(runs) = &mut runs {
            self.give_all_arguments(runs);
        }
        Ok(runs)
    }

    async fn run(
        &self,
        key: &ConversationKey,
        id: RunId,
    ) -> Result<Option<(Run, Option<Message>)>, StoreError> {
        let mut found = self.inner.run(key, id).await?;
        if let Some((run, _)) = &mut found {
            self.give_arguments(run);
        }
        Ok(found)
    }

    async fn renew_replica(
        &self,
        id: ReplicaId,
        address: &str,
        ttl: Duration,
    ) -> Result<Renewed, StoreError> {
        self.inner.renew_replica(id, address, ttl).await
    }

    async fn retire_replica(&self, id: ReplicaId) -> Result<(), StoreError> {
        self.inner.retire_replica(id).await
    }

    async fn release(&self, leases: &[RunLease]) -> Result<(), StoreError> {
        for lease in leases {
            self.forget(lease.run_id);
        }
        self.inner.release(leases).await
    }

    async fn tell(&self, news: &[News]) -> Result<(), StoreError> {
        self.inner.tell(news).await
    }

    fn news(&self) -> BoxStream<'static, News> {
        self.inner.news()
    }

    /// A run that waits for outputs needs nothing of before. One that is to be sent does, and so does one that may have to
    /// be sent again.
    async fn adopt_orphans(
        &self,
        id: ReplicaId,
        working: &[RunId],
        limit: u32,
    ) -> Result<Vec<Orphan>, StoreError> {
        let mut orphans = self.inner.adopt_orphans(id, working, limit).await?;
        for orphan in &mut orphans {
            self.forget(orphan.run.id);
            orphan.content_lost = orphan.outputs.is_some()
                || matches!(orphan.run.status, RunStatus::Queued | RunStatus::InProgress);
        }
        Ok(orphans)
    }

    async fn close(&self) {
        self.inner.close().await;
    }
}

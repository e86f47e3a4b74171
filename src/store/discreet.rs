//! The mode in which nothing that is said is stored (`store.transcript = "off"`): a store around another one. All rules
//! of that mode are here.
//!
//! What is written arrives below without its content: messages are rows whose list of parts is empty, pieces of text and
//! the arguments and outputs of function calls are empty texts, so that ids, numbers and counts stay what they are. What
//! this process needs of it again is held in memory for as long as the run is unfinished and its own.
//!
//! What is lost with a process is never replaced by something empty: a run that cannot say what it was to say ends, and
//! a message that the upstream lacks is withheld from it for good.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::BoxStream;

use super::{
    Admission, Admitted, Answered, Binding, Claim, Closing, DeletionReport, DeletionRequest, DeletionTarget,
    Due, Foreign, Imported, ImportedMessage, ImportedThread, InputMessage, Keys, Life, NewKey, News, Orphan,
    Pause, Paused, Pruned, Pruning, Remnant, RemnantName, Renewed, Repeated, Reply, Request, Rolled,
    Rollover, RunEnd, RunLease, RunProgress, Store, StoreError, StoredKey, ThreadFilter, ThreadName,
    ThreadReport, ThreadUpdate, ToolAnswer, Turn,
};
use crate::domain::{
    Baseline, Context, ConversationKey, DeletionId, EventBatch, Leftover, Lifetimes, Limits, LoggedEvent,
    Message, MessageId, MultitaskStrategy, Page, PageRequest, RemnantId, Removed, ReplicaId, RequiredAction,
    Run, RunId, RunStatus, TenantKey, Thread, ThreadActivity, ThreadId, ToolCall, ToolOutput,
    UpstreamThreadId,
};

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
}

impl Discreet {
    pub fn new(inner: Arc<dyn Store>) -> Self {
        Self { inner, held: Mutex::default() }
    }

    /// A message cannot join a run that waits in another process, which would not hear what it says.
    async fn strategy(&self, admission: &Admission) -> Result<MultitaskStrategy, StoreError> {
        if admission.strategy != MultitaskStrategy::Merge {
            return Ok(admission.strategy);
        }
        let unfinished = self.inner.unfinished(&admission.key).await?.unwrap_or_default();
        let held = self.held();
        let mut waiting = unfinished.iter().filter(|run| run.status == RunStatus::Queued);
        let all_are_ours = waiting.all(|run| held.contains_key(&run.id));
        Ok(if all_are_ours { MultitaskStrategy::Merge } else { MultitaskStrategy::Enqueue })
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

fn blank_input(message: &InputMessage) -> InputMessage {
    InputMessage { id: message.id, content: Vec::new() }
}

fn blank_calls(calls: &[ToolCall]) -> Vec<ToolCall> {
    let blank = |ToolCall { id, name, arguments: _ }: &ToolCall| ToolCall {
        id: id.clone(),
        name: name.clone(),
        arguments: String::new(),
    };
    calls.iter().map(blank).collect()
}

fn blank_action(RequiredAction { tool_calls }: &RequiredAction) -> RequiredAction {
    RequiredAction { tool_calls: blank_calls(tool_calls) }
}

fn blank_outputs(outputs: &[ToolOutput]) -> Vec<ToolOutput> {
    let blank = |ToolOutput { tool_call_id, output: _ }: &ToolOutput| ToolOutput {
        tool_call_id: tool_call_id.clone(),
        output: String::new(),
    };
    outputs.iter().map(blank).collect()
}

/// Each event keeps its number.
fn blank_events(EventBatch { first, events }: &EventBatch) -> EventBatch {
    let blank = |event: &LoggedEvent| match event {
        LoggedEvent::Queued { position } => LoggedEvent::Queued { position: *position },
        LoggedEvent::Started => LoggedEvent::Started,
        LoggedEvent::RequiresAction(action) => LoggedEvent::RequiresAction(blank_action(action)),
        LoggedEvent::Omitted { .. } | LoggedEvent::Delta(_) => LoggedEvent::Omitted { units: event.units() },
    };
    EventBatch { first: *first, events: events.iter().map(blank).collect() }
}

fn blank_leftover(left: &Leftover) -> Leftover {
    Leftover { open_calls: blank_calls(&left.open_calls), ..left.clone() }
}

/// What is missing upstream cannot be sent again.
fn lasting(context: Context) -> Context {
    match context {
        Context::Missing => Context::Withheld,
        Context::Present | Context::Withheld | Context::Unknown => context,
    }
}

fn blank_reply(reply: &Reply) -> Reply {
    let Reply { id, content: _, upstream_message_id, context } = reply;
    Reply {
        id: *id,
        content: Vec::new(),
        upstream_message_id: upstream_message_id.clone(),
        context: lasting(*context),
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
        let blank = Admission {
            strategy: self.strategy(admission).await?,
            message: blank_input(message),
            ..admission.clone()
        };
        // First of all: once it is recorded, the run that it joins may start at any time.
        self.held().insert(*run_id, Held { input: vec![message.clone()], asked: None });
        let mut admitted = self.inner.admit(&blank).await;
        match &mut admitted {
            Ok(Admitted::Started(turn)) => self.give_input(turn),
            Ok(Admitted::Queued { .. }) => {}
            Ok(Admitted::Merged { run, .. }) => {
                self.joins(run.id, message);
                self.forget(*run_id);
            }
            // A run whose admission was not answered never starts.
            Ok(Admitted::Busy | Admitted::OtherUpstream(_) | Admitted::Repeated) | Err(_) => {
                self.forget(*run_id);
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
    ) -> Result<bool, StoreError> {
        Ok(self.if_held(lease, self.inner.bind_upstream_thread(lease, binding).await?))
    }

    async fn withhold_earlier(&self, lease: &RunLease) -> Result<bool, StoreError> {
        Ok(self.if_held(lease, self.inner.withhold_earlier(lease).await?))
    }

    async fn backlog(&self, _run: RunId) -> Result<Vec<Message>, StoreError> {
        Ok(Vec::new())
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

#[async_trait]
impl Keys for Discreet {
    async fn add_key(&self, key: &NewKey) -> Result<(), StoreError> {
        self.inner.add_key(key).await
    }

    async fn keys(&self, tenant: Option<&TenantKey>) -> Result<Vec<StoredKey>, StoreError> {
        self.inner.keys(tenant).await
    }

    async fn good_keys(&self) -> Result<Vec<NewKey>, StoreError> {
        self.inner.good_keys().await
    }

    async fn revoke_key(&self, prefix: &str) -> Result<Option<StoredKey>, StoreError> {
        self.inner.revoke_key(prefix).await
    }
}

#[async_trait]
impl Life for Discreet {
    async fn report(&self, name: ThreadName<'_>) -> Result<Option<ThreadReport>, StoreError> {
        let mut report = self.inner.report(name).await?;
        if let Some(ThreadReport { last_run: Some(run), .. }) = &mut report {
            self.give_arguments(run);
        }
        Ok(report)
    }

    async fn thread(&self, id: ThreadId) -> Result<Option<Thread>, StoreError> {
        self.inner.thread(id).await
    }

    async fn threads(
        &self,
        filter: &ThreadFilter,
        page: &PageRequest<ThreadId>,
    ) -> Result<Page<(Thread, ThreadActivity)>, StoreError> {
        self.inner.threads(filter, page).await
    }

    async fn runs_of(&self, thread: ThreadId, after: i64, limit: u32) -> Result<Vec<Run>, StoreError> {
        let mut runs = self.inner.runs_of(thread, after, limit).await?;
        self.give_all_arguments(&mut runs);
        Ok(runs)
    }

    async fn unfinished_of(&self, thread: ThreadId) -> Result<Vec<Run>, StoreError> {
        let mut runs = self.inner.unfinished_of(thread).await?;
        self.give_all_arguments(&mut runs);
        Ok(runs)
    }

    async fn update_thread(
        &self,
        key: &ConversationKey,
        update: &ThreadUpdate,
    ) -> Result<Option<Thread>, StoreError> {
        self.inner.update_thread(key, update).await
    }

    async fn import_thread(&self, thread: &ImportedThread) -> Result<Imported, StoreError> {
        self.inner.import_thread(thread).await
    }

    async fn import_messages(
        &self,
        thread: ThreadId,
        messages: &[ImportedMessage],
    ) -> Result<u64, StoreError> {
        let blank = |message: &ImportedMessage| {
            let ImportedMessage { id, role, content: _, upstream_message_id, context, created_at } = message;
            ImportedMessage {
                id: *id,
                role: *role,
                content: Vec::new(),
                upstream_message_id: upstream_message_id.clone(),
                context: context.map(lasting),
                created_at: *created_at,
            }
        };
        let messages: Vec<ImportedMessage> = messages.iter().map(blank).collect();
        self.inner.import_messages(thread, &messages).await
    }

    async fn due(&self, limit: u32) -> Result<Vec<Due>, StoreError> {
        self.inner.due(limit).await
    }

    async fn claim_due(&self, limit: u32, lease: Duration) -> Result<Vec<Due>, StoreError> {
        self.inner.claim_due(limit, lease).await
    }

    async fn schedule(
        &self,
        thread: ThreadId,
        after: Option<Duration>,
        failure: Option<&str>,
    ) -> Result<(), StoreError> {
        self.inner.schedule(thread, after, failure).await
    }

    async fn review(
        &self,
        after: Option<ThreadId>,
        limit: u32,
        lifetimes: &Lifetimes,
    ) -> Result<Option<ThreadId>, StoreError> {
        self.inner.review(after, limit, lifetimes).await
    }

    async fn expire(&self, thread: ThreadId, limits: Limits) -> Result<bool, StoreError> {
        self.inner.expire(thread, limits).await
    }

    async fn discard(&self, thread: ThreadId, keep: Duration) -> Result<bool, StoreError> {
        self.inner.discard(thread, keep).await
    }

    async fn begin_deletion(&self, request: &DeletionRequest, limit: u32) -> Result<u64, StoreError> {
        self.inner.begin_deletion(request, limit).await
    }

    async fn deletion(
        &self,
        tenant: &TenantKey,
        id: DeletionId,
        after: Option<ThreadId>,
        limit: u32,
    ) -> Result<Option<DeletionReport>, StoreError> {
        self.inner.deletion(tenant, id, after, limit).await
    }

    async fn deletion_under_way(
        &self,
        tenant: &TenantKey,
        target: &DeletionTarget,
    ) -> Result<Option<DeletionId>, StoreError> {
        self.inner.deletion_under_way(tenant, target).await
    }

    async fn remnants(
        &self,
        thread: ThreadId,
        with_runs: bool,
        limit: u32,
    ) -> Result<Vec<Remnant>, StoreError> {
        self.inner.remnants(thread, with_runs, limit).await
    }

    async fn removed(
        &self,
        thread: ThreadId,
        removed: &Removed,
        forget: &[RemnantName],
    ) -> Result<(), StoreError> {
        self.inner.removed(thread, removed, forget).await
    }

    async fn conclude(&self, thread: ThreadId, limit: u32) -> Result<bool, StoreError> {
        self.inner.conclude(thread, limit).await
    }

    async fn intend(&self, lease: &RunLease, intent: RemnantId) -> Result<bool, StoreError> {
        Ok(self.if_held(lease, self.inner.intend(lease, intent).await?))
    }

    async fn resolve(&self, intent: RemnantId, made: Option<&UpstreamThreadId>) -> Result<(), StoreError> {
        self.inner.resolve(intent, made).await
    }

    async fn claim_remnants(&self, limit: u32, lease: Duration) -> Result<Vec<Remnant>, StoreError> {
        self.inner.claim_remnants(limit, lease).await
    }

    async fn due_remnants(&self, limit: u32) -> Result<Vec<Remnant>, StoreError> {
        self.inner.due_remnants(limit).await
    }

    async fn schedule_remnant(&self, id: RemnantId, after: Option<Duration>) -> Result<(), StoreError> {
        self.inner.schedule_remnant(id, after).await
    }

    async fn keep_remnant(&self, id: RemnantId) -> Result<(), StoreError> {
        self.inner.keep_remnant(id).await
    }

    async fn unheard_runs(&self, thread: ThreadId) -> Result<u64, StoreError> {
        self.inner.unheard_runs(thread).await
    }

    /// Nothing can be carried over.
    async fn roll_over(&self, rollover: &Rollover) -> Result<Rolled, StoreError> {
        let mut rolled = self.inner.roll_over(&Rollover { carry_over: 0, ..*rollover }).await?;
        if let Rolled::Done { turn: Some(turn), .. } = &mut rolled {
            self.give_input(turn);
        }
        Ok(rolled)
    }

    async fn carried(&self, _thread: ThreadId) -> Result<Vec<Message>, StoreError> {
        Ok(Vec::new())
    }

    async fn insert_foreign(
        &self,
        thread: ThreadId,
        by: Option<RunId>,
        messages: &[Foreign],
    ) -> Result<u64, StoreError> {
        let blank = |message: &Foreign| {
            let Foreign { id, after, role, content: _, upstream_message_id, created_at } = message;
            Foreign {
                id: *id,
                after: *after,
                role: *role,
                content: Vec::new(),
                upstream_message_id: upstream_message_id.clone(),
                created_at: *created_at,
            }
        };
        let messages: Vec<Foreign> = messages.iter().map(blank).collect();
        self.inner.insert_foreign(thread, by, &messages).await
    }

    async fn prune(&self, pruning: &Pruning, limit: u32) -> Result<Pruned, StoreError> {
        self.inner.prune(pruning, limit).await
    }

    async fn prunable(&self, pruning: &Pruning, limit: u32) -> Result<Pruned, StoreError> {
        self.inner.prunable(pruning, limit).await
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::config::StoreConfig;
    use crate::domain::{ContentPart, Metadata, Role, Scope, UpstreamRunId, UserKey};
    use crate::store::SqliteStore;

    struct World {
        store: Discreet,
        inner: Arc<dyn Store>,
        key: ConversationKey,
        replica: ReplicaId,
        _folder: TempDir,
    }

    fn text(text: &str) -> Vec<ContentPart> {
        vec![ContentPart::Text { text: text.to_owned() }]
    }

    fn action(arguments: &str) -> RequiredAction {
        let call = ToolCall { id: "call".to_owned(), name: "f".to_owned(), arguments: arguments.to_owned() };
        RequiredAction { tool_calls: vec![call] }
    }

    fn pause(arguments: &str) -> Pause {
        Pause {
            required_action: action(arguments),
            upstream_run_id: Some(UpstreamRunId("up".to_owned())),
            content: text("so far"),
            usage: None,
            events: EventBatch {
                first: 0,
                events: vec![
                    LoggedEvent::Started,
                    LoggedEvent::Delta("so far".to_owned()),
                    LoggedEvent::RequiresAction(action(arguments)),
                ],
            },
        }
    }

    fn end(status: RunStatus) -> RunEnd {
        RunEnd {
            status,
            error: None,
            usage: None,
            upstream_run_id: None,
            unheard: 0,
            upstream_thread_id: None,
            reply: None,
            said: Context::Present,
            synced: false,
            leftover: None,
            discard: false,
            events: EventBatch { first: 3, events: vec![LoggedEvent::Delta("more".to_owned())] },
        }
    }

    impl World {
        async fn new() -> Self {
            let folder = TempDir::new().unwrap();
            let url = format!("sqlite:{}", folder.path().join("t.db").display());
            let config = StoreConfig { url: Some(url.into()), ..StoreConfig::default() };
            let inner = SqliteStore::open(&config).await.unwrap();
            inner.migrate().await.unwrap();
            let inner: Arc<dyn Store> = Arc::new(inner);
            let user = UserKey::try_from("alice".to_owned()).unwrap();
            let key = ConversationKey { tenant: TenantKey::default(), user, scope: Scope::User };
            let store = Discreet::new(Arc::clone(&inner));
            Self { store, inner, key, replica: ReplicaId::new(), _folder: folder }
        }

        fn admission(&self, strategy: MultitaskStrategy, said: &str) -> Admission {
            Admission {
                key: self.key.clone(),
                new_thread: ThreadId::new(),
                limits: Limits::NONE,
                ttl: None,
                upstream: "main".to_owned(),
                run_id: RunId::new(),
                assistant: "default".to_owned(),
                strategy,
                metadata: Metadata::default(),
                message: InputMessage { id: MessageId::new(), content: text(said) },
                timeout: Duration::from_mins(1),
                replica: self.replica,
                idempotency: None,
            }
        }

        async fn start(&self, said: &str) -> Turn {
            match self.store.admit(&self.admission(MultitaskStrategy::Enqueue, said)).await.unwrap() {
                Admitted::Started(turn) => *turn,
                other => panic!("{other:?}"),
            }
        }

        async fn queue(&self, said: &str) -> (RunLease, Run) {
            match self.store.admit(&self.admission(MultitaskStrategy::Enqueue, said)).await.unwrap() {
                Admitted::Queued { lease, run, .. } => (lease, *run),
                other => panic!("{other:?}"),
            }
        }

        /// The texts of what a queued run says once it starts.
        async fn claim(&self, lease: &RunLease) -> Vec<Vec<ContentPart>> {
            match self.store.claim(lease).await.unwrap() {
                Claim::Started(turn) => turn.input.into_iter().map(|message| message.content).collect(),
                other => panic!("{other:?}"),
            }
        }

        fn held(&self) -> usize {
            self.store.held().len()
        }
    }

    #[tokio::test]
    async fn what_a_run_says_is_held_until_it_ends() {
        let world = World::new().await;
        let turn = world.start("one").await;
        assert_eq!(turn.input[0].content, text("one"));
        let (lease, run) = world.queue("two").await;
        let merge = world.admission(MultitaskStrategy::Merge, "three");
        let merged = world.store.admit(&merge).await.unwrap();
        assert!(matches!(merged, Admitted::Merged { run: into, .. } if into.id == run.id));
        assert_eq!(
            world.store.admit(&world.admission(MultitaskStrategy::Reject, "no")).await.unwrap(),
            Admitted::Busy
        );
        assert_eq!(world.held(), 2, "one for each run");
        let below = world.inner.transcript(turn.thread.id, 0, 10).await.unwrap();
        assert_eq!(below.iter().map(|it| it.content.len()).collect::<Vec<_>>(), [0]);

        let reply = Reply {
            id: MessageId::new(),
            content: text("reply"),
            upstream_message_id: None,
            context: Context::Missing,
        };
        let whole = RunEnd { reply: Some(reply), ..end(RunStatus::Completed) };
        for _ in 0..2 {
            let Closing::Finished(finished) = world.store.finish(&turn.lease, &whole).await.unwrap() else {
                panic!("it was at work")
            };
            let message = finished.message.unwrap();
            assert_eq!((message.content, message.context), (text("reply"), Context::Withheld));
        }
        for _ in 0..2 {
            assert_eq!(world.claim(&lease).await, [text("two"), text("three")]);
        }
        let below = world.inner.transcript(turn.thread.id, 0, 10).await.unwrap();
        assert!(below.len() == 4 && below.iter().all(|it| it.content.is_empty()), "{below:#?}");
        assert!(world.store.backlog(run.id).await.unwrap().is_empty());
        let left = Leftover {
            run: run.id,
            thread: None,
            upstream_run: None,
            open_calls: action("secret").tool_calls,
            baseline: Baseline::default(),
            inputs: 2,
            synced: false,
            remove: false,
        };
        let cut = RunEnd { said: Context::Unknown, leftover: Some(left), ..end(RunStatus::Cancelled) };
        let Closing::Finished(finished) = world.store.finish(&lease, &cut).await.unwrap() else {
            panic!("it was at work")
        };
        assert_eq!(finished.thread.leftover.unwrap().open_calls, action("").tool_calls);
        assert_eq!(world.held(), 0);
    }

    /// The run that a message joins may start before the admission is answered.
    #[tokio::test]
    async fn a_message_that_is_just_joining_is_found() {
        let world = World::new().await;
        let turn = world.start("one").await;
        let (lease, run) = world.queue("two").await;
        let merge = world.admission(MultitaskStrategy::Merge, "three");
        let blank = Admission { message: blank_input(&merge.message), ..merge.clone() };
        let held = Held { input: vec![merge.message.clone()], asked: None };
        world.store.held().insert(merge.run_id, held);
        world.inner.admit(&blank).await.unwrap();
        world.store.finish(&turn.lease, &end(RunStatus::Completed)).await.unwrap();
        assert_eq!(world.claim(&lease).await, [text("two"), text("three")]);
        world.store.joins(run.id, &merge.message);
        world.store.forget(merge.run_id);
        assert_eq!(world.claim(&lease).await, [text("two"), text("three")]);
        world.store.finish(&lease, &end(RunStatus::Completed)).await.unwrap();
        // Nor does one that comes too late stay.
        world.store.joins(run.id, &merge.message);
        assert_eq!(world.held(), 0);
    }

    #[tokio::test]
    async fn calls_are_told_whole_and_compared_as_they_are_stored() {
        let world = World::new().await;
        let turn = world.start("one").await;
        for _ in 0..2 {
            let Paused::Waiting(waiting) = world.store.pause(&turn.lease, &pause("secret")).await.unwrap()
            else {
                panic!("it is in progress")
            };
            assert_eq!(waiting.run.required_action, Some(action("secret")));
        }
        let seen = |run: Option<(Run, Option<Message>)>| run.unwrap().0.required_action;
        let run = turn.run.id;
        assert_eq!(seen(world.store.run(&world.key, run).await.unwrap()), Some(action("secret")));
        assert_eq!(seen(world.inner.run(&world.key, run).await.unwrap()), Some(action("")));
        let batches = world.inner.events(run, 0).await.unwrap();
        let logged = [
            LoggedEvent::Started,
            LoggedEvent::Omitted { units: 6 },
            LoggedEvent::RequiresAction(action("")),
        ];
        assert_eq!(batches, [EventBatch { first: 0, events: logged.to_vec() }]);

        let output = ToolOutput { tool_call_id: "call".to_owned(), output: "cold".to_owned() };
        let answer = |expected| ToolAnswer { expected, outputs: vec![output.clone()], idempotency: None };
        let other = world.store.answer_tools(&world.key, run, &answer(action("other"))).await.unwrap();
        assert_eq!(other, Answered::NotWaiting);
        let taken = world.store.answer_tools(&world.key, run, &answer(action("secret"))).await.unwrap();
        assert!(matches!(taken, Answered::Resumed(_)), "{taken:?}");
        assert!(matches!(&world.inner.requests(world.replica).await.unwrap()[..], [Request::Resume { .. }]));
        assert_eq!(world.store.requests(world.replica).await.unwrap(), [], "there is nothing to hand over");
    }

    #[tokio::test]
    async fn what_is_taken_over_has_lost_what_it_was_to_send() {
        let world = World::new().await;
        let turn = world.start("one").await;
        let (queued, _) = world.queue("two").await;
        world.store.pause(&turn.lease, &pause("secret")).await.unwrap();
        // Another process on the same record.
        let other = Discreet::new(Arc::clone(&world.inner));
        let heir = ReplicaId::new();
        let orphans = other.adopt_orphans(heir, &[], 9).await.unwrap();
        let lost: Vec<_> = orphans.iter().map(|it| (it.run.status, it.content_lost)).collect();
        assert_eq!(lost, [(RunStatus::RequiresAction, false), (RunStatus::Queued, true)]);
        assert_eq!(orphans[0].content, [], "what it had said is not known either");
        // Outputs that come now reach it, unless this process ends before it has sent them.
        let output = ToolOutput { tool_call_id: "call".to_owned(), output: "cold".to_owned() };
        let answer = ToolAnswer { expected: action(""), outputs: vec![output], idempotency: None };
        let taken = other.answer_tools(&world.key, turn.run.id, &answer).await.unwrap();
        assert!(matches!(taken, Answered::Resumed(_)), "{taken:?}");
        let again = other.adopt_orphans(heir, &[], 1).await.unwrap();
        assert!(again[0].content_lost);
        // The first process hears that its runs are gone, and forgets them.
        assert_eq!(world.held(), 2);
        assert_eq!(world.store.claim(&queued).await.unwrap(), Claim::Lost);
        assert_eq!(world.store.lost(world.replica, &[turn.run.id]).await.unwrap(), [turn.run.id]);
        assert_eq!(world.held(), 0);
    }

    #[tokio::test]
    async fn what_comes_from_elsewhere_is_not_stored_either() {
        let world = World::new().await;
        let turn = world.start("one").await;
        world.store.finish(&turn.lease, &end(RunStatus::Completed)).await.unwrap();
        let imported = ImportedMessage {
            id: MessageId::new(),
            role: Role::User,
            content: text("imported"),
            upstream_message_id: None,
            context: Some(Context::Missing),
            created_at: None,
        };
        let thread = turn.thread.id;
        assert_eq!(world.store.import_messages(thread, &[imported]).await.unwrap(), 1);
        let foreign = Foreign {
            id: MessageId::new(),
            after: 1,
            role: Role::User,
            content: text("foreign"),
            upstream_message_id: Some("item".to_owned()),
            created_at: None,
        };
        assert_eq!(world.store.insert_foreign(thread, None, &[foreign]).await.unwrap(), 1);
        let below = world.inner.transcript(thread, 0, 10).await.unwrap();
        let below: Vec<_> = below.iter().map(|message| (message.content.len(), message.context)).collect();
        assert_eq!(below, [(0, Context::Present), (0, Context::Present), (0, Context::Withheld)]);
    }

    #[tokio::test]
    async fn a_refused_message_is_forgotten() {
        let world = World::new().await;
        world.start("one").await;
        let other =
            Admission { upstream: "other".to_owned(), ..world.admission(MultitaskStrategy::Enqueue, "two") };
        assert_eq!(world.store.admit(&other).await.unwrap(), Admitted::OtherUpstream("main".to_owned()));
        assert_eq!(world.held(), 1);
        world.inner.close().await;
        assert!(world.store.admit(&world.admission(MultitaskStrategy::Enqueue, "three")).await.is_err());
        assert_eq!(world.held(), 1, "it never starts");
    }

    #[test]
    fn what_is_held_is_not_printed() {
        let world = tokio::runtime::Runtime::new().unwrap().block_on(async {
            let world = World::new().await;
            world.start("planted").await;
            world
        });
        assert!(!format!("{:?}", world.store).contains("planted"));
    }
}

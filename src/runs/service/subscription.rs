//! Subscriptions to runs. A subscription reads the live log where a task of this process works on
//! the run, and the store otherwise. It continues across takeovers.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use tokio::time::{Instant, sleep};

use super::read;
use crate::domain::{
    ConversationKey, EventBatch, LoggedEvent, Message, ReplyText, RequiredAction, Run, RunId,
    RunStatus, Thread, ToolOutput,
};
use crate::error::{Chain, Error};
use crate::runs::backoff::jittered;
use crate::runs::context::{Context, NO_THREAD};
use crate::runs::log::event::{Outcome, RunEvent};
use crate::runs::log::offset::{EventOffset, FIRST_EVENT, numbered};
use crate::runs::log::stored::seen_from;
use crate::runs::log::writer::{RunLog, told};
use crate::runs::notifications::Subscription;
use crate::store::{Notification, StoreError, ThreadName, ThreadReport, Waiting};

/// First pause between two reads of a run of another process. The pause doubles up to the longest
/// one, because that process also sends notifications.
const FIRST_POLL: Duration = Duration::from_millis(100);
const LONGEST_POLL: Duration = Duration::from_secs(1);
/// Pause between two notifications to a run's owner that a reader here follows the run.
const TELL_OWNER_EVERY: Duration = Duration::from_secs(1);

/// The answer if a run disappears while somebody follows it.
pub const DELETED: Error = Error::NotFound("the run was deleted while this request read it");

/// A subscription to a run.
#[derive(Clone)]
pub struct RunSubscription {
    ctx: Arc<Context>,
    thread: Thread,
    run: RunId,
    /// The log of the task that worked on the run at first. It is kept, because the run may end
    /// before the first read.
    live: Option<RunLog>,
}

/// A run that was admitted now or, if `replayed`, by an earlier request with the same idempotency
/// key.
#[derive(Clone, Debug)]
pub struct Submitted {
    pub thread: Thread,
    pub run: Run,
    pub follow: RunSubscription,
    pub replayed: bool,
}

/// What a caller can wait for.
#[derive(Clone, Debug)]
pub enum Answer {
    /// The run has ended.
    Ended(Arc<Outcome>),
    /// The run waits for tool outputs.
    RequiresAction(Box<Waiting>),
}

impl RunSubscription {
    /// Subscribes to a run with a task in this process.
    pub(in crate::runs) fn live(
        ctx: &Arc<Context>,
        thread: &Thread,
        run: RunId,
        log: RunLog,
    ) -> Self {
        Self {
            ctx: Arc::clone(ctx),
            thread: thread.clone(),
            run,
            live: Some(log),
        }
    }

    /// Subscribes to any run.
    pub(in crate::runs) fn of(ctx: &Arc<Context>, thread: &Thread, run: RunId) -> Self {
        let live = ctx.registry.handle(run).map(|handle| handle.log);
        Self {
            ctx: Arc::clone(ctx),
            thread: thread.clone(),
            run,
            live,
        }
    }

    /// Streams the events from number `from` on, each with its number, up to and including
    /// `Ended`. The stream ends early only if this process stops, or if the run was deleted. It
    /// may be dropped at any point, which does not affect the run.
    pub fn events(&self, from: EventOffset) -> BoxStream<'static, (EventOffset, RunEvent)> {
        let reader = Reader::new(self.clone(), from);
        stream::unfold(reader, |mut reader| async move {
            reader.next().await.map(|event| (event, reader))
        })
        .boxed()
    }

    /// Returns the events of an ended run, read at once. `None`: there is no event from number
    /// `from` on.
    pub async fn rest(
        &self,
        from: EventOffset,
    ) -> Result<Option<BoxStream<'static, (EventOffset, RunEvent)>>, Error> {
        Ok(match self.read(from).await? {
            Recorded::Gone => return Err(DELETED),
            Recorded::Whole(events) if events.is_empty() => None,
            Recorded::Whole(events) if self.live.is_none() => Some(stream::iter(events).boxed()),
            // The task has all text that was shown; the store may not.
            Recorded::Whole(_) | Recorded::SoFar(_) => Some(self.events(from)),
        })
    }

    /// Waits until the run answers a caller who has seen everything before number `from`: it ends,
    /// or asks for tool outputs that it still waits for. Returns `None` where
    /// [`events`](Self::events) would end early.
    pub async fn answer(&self, mut from: EventOffset) -> Option<Answer> {
        let mut reader = None;
        loop {
            let live = match &self.live {
                // This skips the pieces of text.
                Some(log) if reader.is_none() && from >= log.first() => {
                    log.clone().answer(from).await
                }
                _ => None,
            };
            let (number, event) = if let Some(event) = live {
                event
            } else {
                let by_record = || {
                    Reader::new(
                        Self {
                            live: None,
                            ..self.clone()
                        },
                        from,
                    )
                };
                reader.get_or_insert_with(by_record).next().await?
            };
            match event {
                RunEvent::Ended(outcome) => return Some(Answer::Ended(outcome)),
                RunEvent::RequiresAction(asked) => {
                    if let Some(waiting) = self.waiting(&asked).await {
                        return Some(Answer::RequiresAction(Box::new(waiting)));
                    }
                }
                _ => {}
            }
            from = number + 1;
        }
    }

    /// Returns whether the run waits for outputs of exactly these calls. Waits while the store is
    /// down, as the run does.
    pub async fn waits_for(&self, asked: &RequiredAction) -> bool {
        self.run_that_waits_for(asked).await.is_some()
    }

    async fn run_that_waits_for(&self, asked: &RequiredAction) -> Option<Run> {
        let (mut run, _) = self
            .insist(|| self.ctx.store.run(&self.thread.key, self.run))
            .await?;
        self.ctx.registry.give_arguments(&mut run);
        let waits_for = run
            .required_action
            .as_ref()
            .filter(|_| run.status == RunStatus::RequiresAction);
        waits_for
            .is_some_and(|action| action.has_same_calls(asked))
            .then_some(run)
    }

    async fn waiting(&self, asked: &RequiredAction) -> Option<Waiting> {
        let run = self.run_that_waits_for(asked).await?;
        let name = ThreadName::Id(&self.thread.key.tenant, run.thread_id);
        let ThreadReport {
            thread, activity, ..
        } = self.insist(|| self.ctx.store.report(name)).await?;
        Some(Waiting {
            thread,
            activity,
            run,
        })
    }

    /// Asks the store until it answers. Returns `None` also if this process stops.
    async fn insist<T, Asked>(&self, ask: impl Fn() -> Asked) -> Option<T>
    where
        Asked: Future<Output = Result<Option<T>, StoreError>>,
    {
        loop {
            match ask().await {
                Ok(found) => return found,
                Err(error) => {
                    tracing::warn!(error = %Chain(&error), "cannot read a run that asks for tool outputs");
                }
            }
            tokio::select! {
                biased;
                () = self.ctx.tasks.stop.cancelled() => return None,
                () = sleep(jittered(FIRST_POLL)) => {}
            }
        }
    }

    /// Returns the number after the run's latest request for the calls that these outputs answer.
    /// `None`: no event asks for them.
    pub(in crate::runs) async fn after(
        &self,
        outputs: &[ToolOutput],
    ) -> Result<Option<EventOffset>, StoreError> {
        let is_meant = |action: &RequiredAction| action.is_answered_by(outputs);
        if let Some(asked) = self.live.as_ref().and_then(|log| log.asked(is_meant)) {
            return Ok(Some(asked + 1));
        }
        let batches = self.ctx.store.events(self.run, FIRST_EVENT).await?;
        let asks = |(_, event): &(EventOffset, LoggedEvent)| matches!(event, LoggedEvent::RequiresAction(it) if is_meant(it));
        Ok(numbered(batches)
            .filter(asks)
            .last()
            .map(|(number, _)| number + 1))
    }

    async fn read(&self, from: EventOffset) -> Result<Recorded, Error> {
        let store = &self.ctx.store;
        // Read the run first: if it has ended, the log that is read afterwards is complete.
        let Some((run, message)) = store.run(&self.thread.key, self.run).await? else {
            return Ok(Recorded::Gone);
        };
        let mut batches = store.events(self.run, from).await?;
        if let Some(message) = &message
            && run.status == RunStatus::Completed
            && self.is_retold(message, &batches, from).await?
        {
            batches = vec![RunEvent::retell(ReplyText::of(&message.content))];
        }
        let mut next = batches.iter().map(EventBatch::end).max().unwrap_or(from);
        let mut events = seen_from(from, batches);
        if !run.status.is_final() {
            return Ok(Recorded::SoFar(events));
        }
        if let Some(message) = &message {
            events.push_back((next, RunEvent::MessageCompleted(Arc::new(message.clone()))));
            next += 1;
        }
        let name = ThreadName::Id(&self.thread.key.tenant, run.thread_id);
        let Some(ThreadReport {
            thread, activity, ..
        }) = store.report(name).await?
        else {
            return Ok(Recorded::Gone);
        };
        let outcome = Outcome {
            thread,
            activity,
            run,
            message,
            retry_after: None,
        };
        events.push_back((next, RunEvent::Ended(Arc::new(outcome))));
        events.retain(|(n, _)| *n >= from);
        Ok(Recorded::Whole(events))
    }

    /// Returns whether the log of a completed run with this reply can be rebuilt from the run's
    /// record. Then the store has no events of it, or only those of a late
    /// [record](crate::store::Store::record). `batches`: the stored events from number `from` on.
    async fn is_retold(
        &self,
        reply: &Message,
        batches: &[EventBatch],
        from: EventOffset,
    ) -> Result<bool, StoreError> {
        // A reply without content means that the store keeps no content.
        if reply.content.is_empty() {
            return Ok(false);
        }
        let text = ReplyText::of(&reply.content);
        let retold = RunEvent::retell(text.clone());
        let whole = retold.end();
        let stored = batches.iter().map(EventBatch::end).max();
        if stored.is_none() {
            // An older log with more numbers, `MessageCompleted` and `Ended` among them, was
            // removed because of its age.
            return Ok(from <= whole + 2);
        }
        let all = self.ctx.store.events(self.run, FIRST_EVENT).await?;
        // A write that was under way during the removal left a later part of the log.
        if all.iter().all(|batch| batch.first > retold.first) {
            return Ok(true);
        }
        if stored >= Some(whole) {
            return Ok(false);
        }
        let stored = seen_from(FIRST_EVENT, all);
        let mut events = stored.iter().map(|(_, event)| event);
        let begins = matches!(events.next(), Some(RunEvent::Started));
        Ok(begins && told(events).is_some_and(|told| text.starts_with(&told)))
    }
}

/// What the store has of a run from some number on.
enum Recorded {
    SoFar(VecDeque<(EventOffset, RunEvent)>),
    /// All events up to the end; empty if the reader has seen the end.
    Whole(VecDeque<(EventOffset, RunEvent)>),
    /// The run no longer exists.
    Gone,
}

/// A reader's position in a run, across all processes that work on the run one after the other.
struct Reader {
    follow: RunSubscription,
    /// The next number to read.
    next: EventOffset,
    live: Option<BoxStream<'static, (EventOffset, RunEvent)>>,
    read: VecDeque<(EventOffset, RunEvent)>,
    over: bool,
    notifications: Option<Subscription>,
    pause: Duration,
    told_owner: Option<Instant>,
}

impl Reader {
    fn new(follow: RunSubscription, from: EventOffset) -> Self {
        Self {
            follow,
            next: from,
            live: None,
            read: VecDeque::new(),
            over: false,
            notifications: None,
            pause: FIRST_POLL,
            told_owner: None,
        }
    }

    async fn next(&mut self) -> Option<(EventOffset, RunEvent)> {
        loop {
            let event = match (self.read.pop_front(), &mut self.live) {
                (Some(event), _) => Some(event),
                (None, Some(live)) => live.next().await,
                (None, None) => None,
            };
            if let Some((number, event)) = event {
                self.next = number + 1;
                self.over |= matches!(event, RunEvent::Ended(_));
                return Some((number, event));
            }
            self.live = None;
            if self.over {
                return None;
            }
            self.find().await;
        }
    }

    /// Finds the next events of the run, or waits until another search is worthwhile.
    async fn find(&mut self) {
        let registry = &self.follow.ctx.registry;
        let log = self
            .follow
            .live
            .take()
            .or_else(|| registry.handle(self.follow.run).map(|it| it.log));
        if let Some(log) = log.as_ref().filter(|log| self.next >= log.first()) {
            self.live = Some(log.follow(self.next).boxed());
            return;
        }
        let notification = Notification::Run(self.follow.run);
        // Subscribe before the read, so that no notification falls between the two.
        let subscription = self
            .notifications
            .get_or_insert_with(|| self.follow.ctx.notifier.subscribe(notification));
        match (self.follow.read(self.next).await, &log) {
            // This process took the run over: the store has the events before.
            (Ok(Recorded::SoFar(events)), Some(log)) => {
                self.read = events
                    .into_iter()
                    .filter(|(n, _)| *n < log.first())
                    .collect();
                self.live = Some(log.follow(log.first()).boxed());
                return;
            }
            (Ok(Recorded::SoFar(events)), None) => {
                if self
                    .told_owner
                    .is_none_or(|told| told.elapsed() >= TELL_OWNER_EVERY)
                {
                    self.told_owner = Some(Instant::now());
                    self.follow
                        .ctx
                        .notifier
                        .notify(Notification::Followed(self.follow.run));
                }
                if !events.is_empty() {
                    (self.read, self.pause) = (events, FIRST_POLL);
                    return;
                }
            }
            (Ok(Recorded::Whole(events)), _) => {
                (self.read, self.over) = (events, true);
                return;
            }
            (Ok(Recorded::Gone), _) => {
                self.over = true;
                return;
            }
            (Err(error), _) => {
                tracing::warn!(error = %Chain(&error), "cannot read the events of a run yet");
            }
        }
        let stop = &self.follow.ctx.tasks.stop;
        tokio::select! {
            biased;
            () = stop.cancelled() => self.over = true,
            () = subscription.changed() => self.pause = FIRST_POLL,
            () = sleep(jittered(self.pause)) => self.pause = (self.pause * 2).min(LONGEST_POLL),
        }
    }
}

impl std::fmt::Debug for RunSubscription {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RunSubscription")
            .field("run", &self.run)
            .field("live", &self.live.is_some())
            .finish_non_exhaustive()
    }
}

/// Returns a run of any of the key's threads, and a subscription to it.
pub(in crate::runs) async fn follow(
    ctx: &Arc<Context>,
    key: &ConversationKey,
    id: RunId,
) -> Result<(Run, RunSubscription), Error> {
    let (run, _) = read::run(ctx, key, id).await?;
    let name = ThreadName::Id(&key.tenant, run.thread_id);
    let thread = ctx.store.report(name).await?.ok_or(NO_THREAD)?.thread;
    let follow = RunSubscription::of(ctx, &thread, id);
    Ok((run, follow))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use futures_util::FutureExt;
    use tempfile::TempDir;
    use tokio_util::sync::CancellationToken;
    use tokio_util::task::TaskTracker;

    use super::*;
    use crate::config::{Config, StoreConfig};
    use crate::domain::{
        ContentPart, Fingerprints, Lifetimes, Limits, MessageId, Metadata, MultitaskStrategy,
        ReplicaId, RunStatus, Scope, TenantKey, ThreadId, ToolCall, ToolOutput, UpstreamRunId,
        UserKey,
    };
    use crate::runs::context::{RunSettings, RunsParts, Tasks};
    use crate::runs::execution::outcome::end_without_output;
    use crate::store::{
        Admission, Admitted, InputMessage, Pause, Paused, Reply, RunEnd, RunLease, StartedRun,
        Store, ToolAnswer,
    };

    /// A process and a database of its own, with a run that has asked for outputs once.
    struct World {
        ctx: Arc<Context>,
        store: Arc<Store>,
        turn: StartedRun,
        _folder: TempDir,
    }

    /// The first events of the run's log: numbers 0 to 2.
    fn begun() -> Vec<LoggedEvent> {
        vec![
            LoggedEvent::Started,
            delta("a"),
            LoggedEvent::RequiresAction(action("1")),
        ]
    }

    fn delta(text: &str) -> LoggedEvent {
        LoggedEvent::Delta(text.into())
    }

    fn action(id: &str) -> RequiredAction {
        let call = ToolCall {
            id: id.to_owned(),
            name: "f".to_owned(),
            arguments: "{}".to_owned(),
            ..ToolCall::default()
        };
        RequiredAction {
            tool_calls: vec![call],
        }
    }

    fn outputs(id: &str) -> Vec<ToolOutput> {
        vec![ToolOutput::text(id, "")]
    }

    /// Returns the number after the run's latest request for call 1.
    async fn after(follow: &RunSubscription) -> i64 {
        follow.after(&outputs("1")).await.unwrap().unwrap()
    }

    fn text(text: &str) -> Vec<ContentPart> {
        vec![ContentPart::text(text)]
    }

    impl World {
        async fn new() -> Self {
            Self::that_logged(begun()).await
        }

        async fn that_logged(events: Vec<LoggedEvent>) -> Self {
            let folder = TempDir::new().unwrap();
            let url = format!("sqlite:{}", folder.path().join("t.db").display());
            let settings = StoreConfig {
                url: Some(url.into()),
                ..StoreConfig::default()
            };
            let store = Store::open(&settings).await.unwrap();
            store.migrate().await.unwrap();
            let store: Arc<Store> = Arc::new(store);
            let config = Config::default();
            let ctx = Arc::new(Context::new(RunsParts {
                store: Arc::clone(&store),
                upstreams: BTreeMap::new(),
                settings: RunSettings {
                    assistants: BTreeMap::new(),
                    default_assistant: String::new(),
                    runs: config.runs,
                    sessions: config.sessions,
                    threads: config.threads,
                    lifetimes: Lifetimes::default(),
                    fingerprints: Fingerprints::new(&[7; 32]),
                    admission_timeout: Duration::from_secs(5),
                    attend_every: Duration::from_secs(3),
                },
                replica: ReplicaId::new(),
                tasks: Tasks {
                    tracker: TaskTracker::new(),
                    draining: CancellationToken::new(),
                    stop: CancellationToken::new(),
                },
            }));
            let user = UserKey::try_from("alice".to_owned()).unwrap();
            let admission = Admission {
                key: ConversationKey {
                    tenant: TenantKey::default(),
                    user,
                    scope: Scope::User,
                },
                new_thread: ThreadId::new(),
                limits: Limits::NONE,
                ttl: None,
                upstream: "main".to_owned(),
                run_id: RunId::new(),
                assistant: "default".to_owned(),
                strategy: MultitaskStrategy::Enqueue,
                metadata: Metadata::default(),
                message: InputMessage {
                    id: MessageId::new(),
                    content: text("hello"),
                },
                timeout: Duration::from_mins(1),
                replica: ReplicaId::new(),
                intent: None,
                idempotency: None,
                again: false,
                idempotency_ttl: Duration::ZERO,
            };
            let Admitted::Started(turn) = store.admit(admission.clone()).await.unwrap() else {
                panic!("the thread is free")
            };
            let world = Self {
                ctx,
                store,
                turn: *turn,
                _folder: folder,
            };
            world
                .pause(&world.turn.lease, EventBatch { first: 0, events })
                .await;
            world
        }

        async fn pause(&self, lease: &RunLease, events: EventBatch) {
            let pause = Pause {
                required_action: action("1"),
                upstream_run_id: Some(UpstreamRunId("run".to_owned())),
                content: text("a"),
                usage: None,
                events,
                wait: Duration::from_mins(1),
            };
            let paused = self.store.pause(lease, &pause).await.unwrap();
            assert!(matches!(paused, Paused::Waiting(_)), "{paused:?}");
        }

        fn follow(&self) -> RunSubscription {
            RunSubscription::of(&self.ctx, &self.turn.thread, self.turn.run.id)
        }

        /// Ends the run with a log that continues at `first`.
        async fn finish(&self, lease: &RunLease, first: i64, events: Vec<LoggedEvent>) {
            let reply = Reply {
                id: MessageId::new(),
                content: text("ab"),
                upstream_message_id: None,
                sync: crate::domain::UpstreamSync::Present,
            };
            let events = EventBatch { first, events };
            let end = end_without_output(RunStatus::Completed, None);
            self.store
                .finish(
                    lease,
                    RunEnd {
                        reply: Some(reply),
                        events,
                        ..end
                    },
                )
                .await
                .unwrap();
        }
    }

    /// Returns a short name of an event.
    fn word(event: &RunEvent) -> String {
        match event {
            RunEvent::Queued { position } => format!("queued {position}"),
            RunEvent::Started => "started".to_owned(),
            RunEvent::Delta(delta) => delta.text.to_string(),
            RunEvent::RequiresAction(action) => format!("asks {}", action.tool_calls[0].id),
            RunEvent::MessageCompleted(message) => format!("message {}", message.role),
            RunEvent::Recovered(_) => "recovered".to_owned(),
            RunEvent::Ended(outcome) => outcome.run.status.to_string(),
        }
    }

    async fn read(follow: &RunSubscription, from: i64) -> Vec<(i64, String)> {
        follow
            .events(from)
            .map(|(n, event)| (n, word(&event)))
            .collect()
            .await
    }

    fn numbered_from(first: i64, words: &[&str]) -> Vec<(i64, String)> {
        (first..)
            .zip(words.iter().map(|word| (*word).to_owned()))
            .collect()
    }

    #[tokio::test]
    async fn a_run_that_has_ended_is_read_from_the_record() {
        let world = World::new().await;
        world.finish(&world.turn.lease, 3, vec![delta("b")]).await;
        let whole = numbered_from(
            0,
            &[
                "started",
                "a",
                "asks 1",
                "b",
                "message assistant",
                "completed",
            ],
        );
        let follow = world.follow();
        for from in 0..8 {
            let rest: Vec<_> = whole.iter().filter(|(n, _)| *n >= from).cloned().collect();
            assert_eq!(read(&follow, from).await, rest, "{from}");
        }
        for from in [0, 3] {
            assert!(
                matches!(follow.answer(from).await, Some(Answer::Ended(_))),
                "{from}"
            );
        }
        assert!(follow.answer(6).await.is_none(), "the end was seen before");
    }

    #[tokio::test]
    async fn that_nothing_comes_any_more_is_told_only_by_the_record() {
        let world = World::new().await;
        world.finish(&world.turn.lease, 3, vec![delta("b")]).await;
        let follow = world.follow();
        let rest: Vec<_> = follow
            .rest(4)
            .await
            .unwrap()
            .unwrap()
            .map(|(n, event)| (n, word(&event)))
            .collect()
            .await;
        assert_eq!(rest, numbered_from(4, &["message assistant", "completed"]));
        assert!(
            follow.rest(6).await.unwrap().is_none(),
            "the reader has seen the end"
        );
        let gone = RunSubscription::of(&world.ctx, &world.turn.thread, RunId::new());
        assert!(matches!(gone.rest(6).await, Err(Error::NotFound(_))));
        world.store.close().await;
        assert!(matches!(
            follow.rest(6).await,
            Err(Error::StoreUnavailable(_))
        ));
    }

    #[tokio::test]
    async fn a_caller_is_not_asked_for_what_was_given() {
        let world = World::new().await;
        let (follow, key, run) = (world.follow(), &world.turn.thread.key, world.turn.run.id);
        assert!(matches!(
            follow.answer(0).await,
            Some(Answer::RequiresAction(_))
        ));
        assert!(follow.waits_for(&action("1")).await && !follow.waits_for(&action("2")).await);
        let answer = ToolAnswer {
            expected: action("1"),
            outputs: outputs("1"),
            idempotency: None,
        };
        world.store.answer_tools(key, run, &answer).await.unwrap();
        assert!(!follow.waits_for(&action("1")).await);
        let answered = follow.answer(0);
        let ends = async {
            world.finish(&world.turn.lease, 3, vec![delta("b")]).await;
        };
        let (answered, ()) = tokio::join!(answered, ends);
        assert!(matches!(answered, Some(Answer::Ended(_))), "{answered:?}");
    }

    #[tokio::test]
    async fn a_run_of_another_process_is_polled_until_it_ends() {
        let world = World::new().await;
        let follow = world.follow();
        let mut events = follow.events(1);
        for wanted in numbered_from(1, &["a", "asks 1"]) {
            let (n, event) = events.next().await.unwrap();
            assert_eq!((n, word(&event)), wanted);
        }
        assert!(events.next().now_or_never().is_none());
        world.finish(&world.turn.lease, 3, vec![]).await;
        let rest: Vec<_> = events.map(|(n, event)| (n, word(&event))).collect().await;
        assert_eq!(rest, numbered_from(3, &["message assistant", "completed"]));
    }

    #[tokio::test]
    async fn a_run_that_changed_hands_is_read_from_the_record_and_then_live() {
        let world = World::new().await;
        // Text continues at its number. Other events come beyond all numbers that can have been
        // shown.
        let (key, run, others) = (&world.turn.thread.key, world.turn.run.id, 1 << 32);
        let follow = {
            let lease = world
                .store
                .adopt_orphans(ReplicaId::new(), &[], 1)
                .await
                .unwrap()
                .remove(0)
                .lease;
            let active = world.ctx.registry.goes_on(lease, 3);
            let follow = world.follow();
            assert_eq!(after(&follow).await, 3, "from the store");
            assert!(follow.answer(3).now_or_never().is_none());

            // The run asks for the same call again. The live log and the store both have this
            // event; the reader sees it once.
            let answer = ToolAnswer {
                expected: action("1"),
                outputs: outputs("1"),
                idempotency: None,
            };
            world.store.answer_tools(key, run, &answer).await.unwrap();
            active.log.push(RunEvent::Delta("b".into()));
            let asks = RunEvent::RequiresAction(action("1").into());
            world
                .pause(&lease, active.log.unstored(Some(asks.clone())))
                .await;
            let by_record = RunSubscription {
                live: None,
                ..follow.clone()
            };
            assert_eq!(after(&by_record).await, others + 1, "the latest request");
            active.log.push(asks);
            active.log.all_stored();
            active.log.push(RunEvent::Delta("c".into()));
            assert_eq!(after(&follow).await, others + 1);
            let live = [
                numbered_from(3, &["b"]),
                numbered_from(others, &["asks 1", "c"]),
            ]
            .concat();
            let mut events = follow.events(1);
            for wanted in [numbered_from(1, &["a", "asks 1"]), live.clone()].concat() {
                let (n, event) = events.next().await.unwrap();
                assert_eq!((n, word(&event)), wanted);
            }
            assert!(events.next().now_or_never().is_none());
            let (n, event) = follow.events(3).next().await.unwrap();
            assert_eq!((n, word(&event)), live[0]);
            assert!(matches!(
                follow.answer(1).await,
                Some(Answer::RequiresAction(_))
            ));
            follow
        };
        // The task is gone. The next owner sends the text that the task had not stored.
        let mut rest = follow.events(others + 1);
        assert_eq!(
            rest.next().await.map(|(n, event)| (n, word(&event))),
            Some((others + 1, "c".to_owned()))
        );
        assert!(rest.next().now_or_never().is_none());
        let lease = world
            .store
            .adopt_orphans(ReplicaId::new(), &[], 1)
            .await
            .unwrap()
            .remove(0)
            .lease;
        world.finish(&lease, others + 1, vec![delta("cd")]).await;
        let rest: Vec<_> = rest.map(|(n, event)| (n, word(&event))).collect().await;
        assert_eq!(
            rest[0],
            (others + 2, "d".to_owned()),
            "text that was shown is not shown again"
        );
        assert_eq!(rest.last().unwrap().1, "completed");
        assert!(matches!(
            follow.answer(others + 1).await,
            Some(Answer::Ended(_))
        ));
    }

    #[tokio::test]
    async fn a_reader_goes_on_where_its_run_is_taken_over() {
        let world = World::new().await;
        let mut events = world.follow().events(0);
        for _ in begun() {
            events.next().await.unwrap();
        }
        let lease = RunLease {
            run_id: world.turn.run.id,
            fence: 2,
        };
        let active = world.ctx.registry.goes_on(lease, 3);
        active.log.push(RunEvent::Delta("b".into()));
        let (n, event) = tokio::time::timeout(Duration::from_secs(10), events.next())
            .await
            .unwrap()
            .unwrap();
        assert_eq!((n, word(&event)), (3, "b".to_owned()));
        drop(active);
        assert!(
            events.next().now_or_never().is_none(),
            "the reader waits for the next owner"
        );
        world.ctx.tasks.stop.cancel();
        assert!(events.next().await.is_none(), "the process stops");
    }

    #[tokio::test]
    async fn a_record_that_cannot_be_read_is_not_passed_over() {
        let world = World::new().await;
        let lease = RunLease {
            run_id: world.turn.run.id,
            fence: 2,
        };
        let active = world.ctx.registry.goes_on(lease, 3);
        active.log.push(RunEvent::Delta("b".into()));
        let follow = world.follow();
        world.store.close().await;
        let mut whole = follow.events(0);
        assert!(
            whole.next().now_or_never().is_none(),
            "the events before the live log are missing"
        );
        assert!(follow.events(3).next().await.is_some());
    }

    #[tokio::test]
    async fn the_calls_that_outputs_answer_are_found() {
        let world = World::new().await;
        let follow = world.follow();
        assert_eq!(follow.after(&outputs("1")).await.unwrap(), Some(3));
        assert_eq!(follow.after(&outputs("2")).await.unwrap(), None);
        world.store.close().await;
        assert!(
            follow.after(&outputs("1")).await.is_err(),
            "a failed read does not mean that no call exists"
        );
    }

    /// If the store keeps no content, its record has the ids of calls and not their arguments.
    #[tokio::test]
    async fn calls_are_known_by_their_ids() {
        let mut asked = action("1");
        asked.tool_calls[0].arguments.clear();
        let world = World::that_logged(vec![
            LoggedEvent::Started,
            LoggedEvent::RequiresAction(asked),
        ])
        .await;
        assert_eq!(after(&world.follow()).await, 2);
    }
}

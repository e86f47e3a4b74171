//! What happens during a run, as a log that any number of readers follow at their own pace.
//!
//! A reader holds a position in the log, not a queue of its own: a slow one costs nothing and stalls nobody. The
//! log lives as long as the run's task or its last reader, and is bounded by the limit on replies.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::stream::{self, Stream};
use tokio::sync::watch;

use crate::domain::{EventBatch, LoggedEvent, Message, RequiredAction, Run, Thread, ThreadActivity};

/// One event of a run.
#[derive(Clone, Debug)]
pub enum RunEvent {
    /// The run waits. 1: it goes next.
    Queued { position: i64 },
    /// The run has its turn.
    Started,
    /// More text of the reply.
    Delta(Arc<str>),
    /// The run waits for tool outputs.
    RequiresAction(Arc<RequiredAction>),
    /// The reply is in the transcript.
    MessageCompleted(Arc<Message>),
    /// The run has ended; the last event.
    Ended(Arc<Outcome>),
}

/// How a run ended, and its thread afterwards.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub thread: Thread,
    pub activity: ThreadActivity,
    pub run: Run,
    pub message: Option<Message>,
    /// When the upstream asked to come back.
    pub retry_after: Option<Duration>,
}

/// The writing end of a run's log. Dropped without an [`Ended`](RunEvent::Ended), it leaves the log broken off.
#[derive(Debug)]
pub(super) struct FeedWriter {
    /// Number of the first event.
    first: i64,
    events: Arc<Mutex<Vec<RunEvent>>>,
    length: watch::Sender<usize>,
    /// How many of the events are stored.
    stored: Mutex<usize>,
}

impl FeedWriter {
    /// A log whose first event has this number. One who takes a run over counts on where nobody before can have come to.
    pub(super) fn new(first: i64) -> Self {
        Self { first, events: Arc::default(), length: watch::Sender::new(0), stored: Mutex::new(0) }
    }

    /// Appends an event and wakes the readers.
    pub(super) fn push(&self, event: RunEvent) {
        let mut events = lock(&self.events);
        events.push(event);
        self.length.send_replace(events.len());
    }

    /// The events that are not stored yet, and `last` if there is one, which is about to be pushed.
    pub(super) fn unstored(&self, last: Option<LoggedEvent>) -> EventBatch {
        let stored = *lock(&self.stored);
        let events = lock(&self.events);
        let more = events[stored..].iter().filter_map(RunEvent::logged);
        EventBatch { first: self.first + number(stored), events: more.chain(last).collect() }
    }

    /// All events up to now are stored.
    pub(super) fn all_stored(&self) {
        *lock(&self.stored) = lock(&self.events).len();
    }

    /// A reading end.
    pub(super) fn feed(&self) -> Feed {
        Feed { first: self.first, events: Arc::clone(&self.events), length: self.length.subscribe() }
    }
}

impl RunEvent {
    /// As it is stored; `None` for what the record tells anyway.
    fn logged(&self) -> Option<LoggedEvent> {
        match self {
            Self::Queued { position } => Some(LoggedEvent::Queued { position: *position }),
            Self::Started => Some(LoggedEvent::Started),
            Self::Delta(text) => Some(LoggedEvent::Delta((**text).to_owned())),
            Self::RequiresAction(action) => Some(LoggedEvent::RequiresAction((**action).clone())),
            Self::MessageCompleted(_) | Self::Ended(_) => None,
        }
    }
}

impl From<LoggedEvent> for RunEvent {
    fn from(event: LoggedEvent) -> Self {
        match event {
            LoggedEvent::Queued { position } => Self::Queued { position },
            LoggedEvent::Started => Self::Started,
            LoggedEvent::Delta(text) => Self::Delta(text.into()),
            LoggedEvent::RequiresAction(action) => Self::RequiresAction(Arc::new(action)),
        }
    }
}

/// The reading end of a run's log.
#[derive(Clone, Debug)]
pub(super) struct Feed {
    first: i64,
    events: Arc<Mutex<Vec<RunEvent>>>,
    length: watch::Receiver<usize>,
}

impl Feed {
    /// Number of the first event that this log can give.
    pub(super) fn first(&self) -> i64 {
        self.first
    }

    /// The events from number `from` on, each with its number, up to and including the last one of the run. Ends
    /// without that one if the log breaks off. May be dropped at any point.
    pub(super) fn follow(&self, from: i64) -> impl Stream<Item = (i64, RunEvent)> + Send + use<> {
        let start = usize::try_from(from - self.first).unwrap_or(0);
        stream::unfold((self.clone(), start), |(mut feed, next)| async move {
            if next > 0 && matches!(feed.get(next - 1), Some(RunEvent::Ended(_))) {
                return None;
            }
            feed.length.wait_for(|length| *length > next).await.ok()?;
            let event = feed.get(next)?;
            Some(((feed.first + number(next), event), (feed, next + 1)))
        })
    }

    /// Waits for the end of the run. `None` if the log breaks off: the run's task is gone without having told it.
    pub(super) async fn ended(mut self) -> Option<Arc<Outcome>> {
        loop {
            let known = *self.length.borrow_and_update();
            if let Some(RunEvent::Ended(outcome)) = known.checked_sub(1).and_then(|last| self.get(last)) {
                return Some(outcome);
            }
            self.length.changed().await.ok()?;
        }
    }

    /// Waits for the next event from number `from` on that answers a caller: the run waits for tool outputs, or has
    /// ended. `None` if the log breaks off before.
    pub(super) async fn answer(mut self, from: i64) -> Option<RunEvent> {
        let mut next = usize::try_from(from - self.first).unwrap_or(0);
        loop {
            let known = *self.length.borrow_and_update();
            let found = {
                let events = lock(&self.events);
                let new = events.get(next..known).unwrap_or_default();
                new.iter().find(|it| matches!(it, RunEvent::RequiresAction(_) | RunEvent::Ended(_))).cloned()
            };
            if found.is_some() {
                return found;
            }
            next = next.max(known);
            self.length.changed().await.ok()?;
        }
    }

    /// The number of the event by which the run asked for these calls.
    pub(super) fn asked(&self, action: &RequiredAction) -> Option<i64> {
        let events = lock(&self.events);
        let at =
            events.iter().rposition(|it| matches!(it, RunEvent::RequiresAction(it) if **it == *action))?;
        Some(self.first + number(at))
    }

    fn get(&self, n: usize) -> Option<RunEvent> {
        lock(&self.events).get(n).cloned()
    }
}

fn number(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// Nothing in here panics half-way through a change.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use futures_util::{FutureExt, StreamExt};
    use proptest::prelude::*;

    use super::*;
    use crate::domain::{
        ConversationKey, Lifecycle, Limits, Metadata, MultitaskStrategy, Removed, RunId, RunStatus, Scope,
        TenantKey, ThreadId, ThreadState, ToolCall, UserKey,
    };

    /// Where a run that changed hands once is numbered on from.
    const FIRST: i64 = 1 << 32;

    fn delta(text: &str) -> LoggedEvent {
        LoggedEvent::Delta(text.to_owned())
    }

    fn asks(id: &str) -> LoggedEvent {
        let call = ToolCall { id: id.to_owned(), name: "f".to_owned(), arguments: "{}".to_owned() };
        LoggedEvent::RequiresAction(RequiredAction { tool_calls: vec![call] })
    }

    fn action(id: &str) -> RequiredAction {
        match asks(id) {
            LoggedEvent::RequiresAction(action) => action,
            other => unreachable!("{other:?}"),
        }
    }

    fn push(writer: &FeedWriter, events: &[LoggedEvent]) {
        for event in events {
            writer.push(event.clone().into());
        }
    }

    /// Of any run: that it is the last event is all that matters here.
    fn ended() -> RunEvent {
        let (now, id) = (DateTime::UNIX_EPOCH, ThreadId::new());
        let user = UserKey::try_from("alice".to_owned()).unwrap();
        let thread = Thread {
            id,
            key: ConversationKey { tenant: TenantKey::default(), user, scope: Scope::User },
            upstream: String::new(),
            upstream_thread_id: None,
            lifecycle: Lifecycle::Current,
            previous_thread: None,
            metadata: Metadata::default(),
            message_count: 1,
            run_count: 1,
            created_at: now,
            last_active_at: now,
            limits: Limits::NONE,
            archived_at: None,
            deletion: None,
            rolls: false,
            carried: 0,
            removed: Removed::default(),
            backlog: 0,
            leftover: None,
        };
        let run = Run {
            id: RunId::new(),
            thread_id: id,
            seq: 1,
            status: RunStatus::Completed,
            strategy: MultitaskStrategy::Enqueue,
            assistant: String::new(),
            metadata: Metadata::default(),
            upstream_run_id: None,
            required_action: None,
            error: None,
            usage: None,
            created_at: now,
            started_at: Some(now),
            finished_at: Some(now),
            deadline_at: Some(now),
            discarded: false,
        };
        let activity = ThreadActivity { state: ThreadState::Idle, queue_depth: 0 };
        RunEvent::Ended(Arc::new(Outcome { thread, activity, run, message: None, retry_after: None }))
    }

    /// What can be read at once, the end as `None`, and whether the stream has ended.
    fn read(feed: &Feed, from: i64) -> (Vec<(i64, Option<LoggedEvent>)>, bool) {
        let mut events = std::pin::pin!(feed.follow(from));
        let mut read = Vec::new();
        loop {
            match events.next().now_or_never() {
                Some(Some((n, event))) => read.push((n, event.logged())),
                Some(None) => return (read, true),
                None => return (read, false),
            }
        }
    }

    fn an_event() -> impl Strategy<Value = LoggedEvent> {
        prop_oneof![
            any::<i64>().prop_map(|position| LoggedEvent::Queued { position }),
            Just(LoggedEvent::Started),
            ".*".prop_map(LoggedEvent::Delta),
            ".*".prop_map(|id| asks(&id)),
        ]
    }

    proptest! {
        #[test]
        fn what_is_stored_comes_back_as_it_was(event in an_event()) {
            prop_assert_eq!(RunEvent::from(event.clone()).logged(), Some(event));
        }

        #[test]
        fn any_reader_sees_each_event_under_its_number(
            events in proptest::collection::vec(an_event(), 0..9),
            first in prop_oneof![Just(0), Just(FIRST)],
            from in -2..12_i64,
        ) {
            let writer = FeedWriter::new(first);
            let before = writer.feed();
            push(&writer, &events);
            let all = (first..).zip(events.into_iter().map(Some));
            let wanted: Vec<_> = all.filter(|(n, _)| *n >= first + from).collect();
            for feed in [before, writer.feed()] {
                prop_assert_eq!(feed.first(), first);
                prop_assert_eq!(read(&feed, first + from), (wanted.clone(), false));
            }
        }
    }

    #[test]
    fn the_record_tells_the_end() {
        assert_eq!(ended().logged(), None);
    }

    #[tokio::test]
    async fn a_reader_waits_for_what_comes_and_stops_at_the_end() {
        let writer = FeedWriter::new(FIRST);
        let mut events = std::pin::pin!(writer.feed().follow(FIRST));
        assert!(events.next().now_or_never().is_none());
        push(&writer, &[LoggedEvent::Started]);
        assert_eq!(events.next().await.unwrap().0, FIRST);
        assert!(events.next().now_or_never().is_none());
        let end = writer.feed().ended();
        writer.push(ended());
        assert!(matches!(events.next().await.unwrap(), (n, RunEvent::Ended(_)) if n == FIRST + 1));
        assert!(events.next().await.is_none());
        assert!(end.await.is_some());
        assert_eq!(
            read(&writer.feed(), FIRST),
            (vec![(FIRST, Some(LoggedEvent::Started)), (FIRST + 1, None)], true)
        );
        assert_eq!(read(&writer.feed(), FIRST + 2), (vec![], true), "it has seen the end");
    }

    #[tokio::test]
    async fn a_log_that_breaks_off_ends_its_readers() {
        let writer = FeedWriter::new(FIRST);
        push(&writer, &[LoggedEvent::Started, delta("a")]);
        let feed = writer.feed();
        drop(writer);
        let seen = vec![(FIRST, Some(LoggedEvent::Started)), (FIRST + 1, Some(delta("a")))];
        assert_eq!(read(&feed, FIRST), (seen, true));
        assert!(feed.clone().ended().await.is_none());
        assert!(feed.clone().answer(FIRST).await.is_none());
        // What it did tell before counts.
        let writer = FeedWriter::new(FIRST);
        let (one, other) = (writer.feed(), writer.feed());
        writer.push(ended());
        drop(writer);
        assert!(one.ended().await.is_some() && other.answer(FIRST).await.is_some());
    }

    #[test]
    fn what_is_not_stored_goes_on_where_the_last_batch_ended() {
        let writer = FeedWriter::new(FIRST);
        let batch = |first, events: &[LoggedEvent]| EventBatch { first, events: events.to_vec() };
        assert_eq!(writer.unstored(None), batch(FIRST, &[]));
        push(&writer, &[LoggedEvent::Started, delta("a")]);
        assert_eq!(writer.unstored(None), batch(FIRST, &[LoggedEvent::Started, delta("a")]));
        let whole = batch(FIRST, &[LoggedEvent::Started, delta("a"), asks("1")]);
        for _ in 0..2 {
            assert_eq!(writer.unstored(Some(asks("1"))), whole, "to ask stores nothing");
        }
        push(&writer, &[asks("1")]);
        writer.all_stored();
        assert_eq!(writer.unstored(None), batch(FIRST + 3, &[]));
        push(&writer, &[delta("b")]);
        assert_eq!(writer.unstored(Some(asks("2"))), batch(FIRST + 3, &[delta("b"), asks("2")]));
        push(&writer, &[asks("2")]);
        writer.all_stored();
        // The end has a number and no place in the batch: nothing comes after it.
        push(&writer, &[delta("c")]);
        writer.push(ended());
        assert_eq!(writer.unstored(None), batch(FIRST + 5, &[delta("c")]));
    }

    #[tokio::test]
    async fn a_caller_is_answered_by_what_comes_from_its_place_on() {
        let writer = FeedWriter::new(FIRST);
        push(&writer, &[LoggedEvent::Started, asks("1"), delta("a"), asks("2"), delta("b")]);
        for (from, wanted) in [(0, "1"), (FIRST, "1"), (FIRST + 1, "1"), (FIRST + 2, "2"), (FIRST + 3, "2")] {
            let answer = writer.feed().answer(from).await.unwrap();
            assert_eq!(answer.logged(), Some(asks(wanted)), "{from}");
        }
        for from in [FIRST + 4, FIRST + 5, FIRST + 9] {
            let mut answer = Box::pin(writer.feed().answer(from));
            assert!((&mut answer).now_or_never().is_none(), "{from}: it is answered by an earlier event");
        }
        let mut late = Box::pin(writer.feed().answer(FIRST + 4));
        push(&writer, &[delta("c")]);
        assert!((&mut late).now_or_never().is_none());
        writer.push(ended());
        assert_eq!(late.await.unwrap().logged(), None);
        assert_eq!(writer.feed().answer(FIRST + 2).await.unwrap().logged(), Some(asks("2")));
    }

    #[test]
    fn the_last_time_that_calls_were_asked_for_counts() {
        let writer = FeedWriter::new(FIRST);
        push(&writer, &[LoggedEvent::Started, asks("1"), delta("a"), asks("1"), asks("2")]);
        let feed = writer.feed();
        assert_eq!(feed.asked(&action("1")), Some(FIRST + 3));
        assert_eq!(feed.asked(&action("2")), Some(FIRST + 4));
        assert_eq!(feed.asked(&action("3")), None);
    }
}

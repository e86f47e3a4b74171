//! The log of an active run, which any number of readers follow at their own speed.
//!
//! A reader holds a position in the log, not a queue of its own. So a slow reader costs nothing
//! and delays nobody. The log lives as long as the run's task or its last reader. The limit on the
//! size of replies bounds it.
//!
//! The [offset](super::offset) of an event is its number.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::stream::{self, Stream};
use tokio::sync::watch;
use tokio::time::Instant;

use super::event::{Outcome, RunEvent};
use super::offset::{STARTED, length};
use crate::domain::{EventBatch, LoggedEvent, ReplyText, RequiredAction, UpstreamRunId};

/// Shortest pause between two writes of a run's log: at first, and while a reader on another
/// replica follows it.
pub(in crate::runs) const OFTEN: Duration = Duration::from_millis(100);
/// Longest pause between two writes. The pause doubles with each write until then.
const SELDOM: Duration = Duration::from_secs(1);
/// Time for which a reader on another replica counts after it announced itself. It announces
/// itself more often.
const FOLLOWED: Duration = Duration::from_secs(3);

/// The unstored part of a run: its id at the upstream, and events.
pub(in crate::runs) type Unrecorded = (Option<UpstreamRunId>, EventBatch);

/// The writing end of a run's log. If it is dropped without an [`Ended`](RunEvent::Ended), the log
/// breaks off.
#[derive(Debug)]
pub(in crate::runs) struct RunLogWriter {
    log: Arc<Mutex<Log>>,
    length: watch::Sender<usize>,
}

#[derive(Debug)]
struct Log {
    /// Number of the first event that this log can give.
    first: i64,
    /// Events, each with its number.
    events: Vec<(i64, RunEvent)>,
    /// Next free number.
    next: i64,
    /// Lowest number of an event that is neither text nor the start.
    others_from: i64,
    /// Number before which everything is stored.
    stored: i64,
    /// Number before which some of it may be stored, because a write of it was begun.
    maybe_stored: i64,
    /// Start of the wait of the oldest event, or id, that is not stored.
    waiting_since: Option<Instant>,
    /// Longest such wait while no reader on another replica follows.
    pause: Duration,
    /// Time until which a reader on another replica follows, as far as is known.
    followed_until: Option<Instant>,
    /// The run's id at the upstream, if it is not stored yet.
    upstream_run: Option<UpstreamRunId>,
    /// Whether some of the log was stored while the run worked, so that readers on other replicas
    /// may have it.
    is_public: bool,
}

impl Log {
    /// Returns the number that the event gets.
    fn number_of(&self, event: &RunEvent) -> i64 {
        match event {
            RunEvent::Delta(delta) => self.next + length(&delta.text) - 1,
            RunEvent::Started => self.next.max(STARTED),
            _ => self.next.max(self.others_from),
        }
    }

    fn push(&mut self, event: RunEvent) {
        let number = self.number_of(&event);
        if event.logged().is_some() {
            self.waiting_since.get_or_insert_with(Instant::now);
        }
        self.events.push((number, event));
        self.next = number + 1;
    }

    /// Returns the index of the first event with this number or a higher one.
    fn place(&self, number: i64) -> usize {
        self.events.partition_point(|(n, _)| *n < number)
    }

    fn unstored(&self, last: Option<RunEvent>) -> EventBatch {
        let new = &self.events[self.place(self.stored)..];
        let last = last.map(|last| (self.number_of(&last), last));
        let mut first = None;
        let mut next = self.stored;
        let mut events = Vec::new();
        for (number, event) in new.iter().chain(&last) {
            let Some(logged) = event.logged() else { break };
            let begins = number + 1 - logged.units();
            if first.is_none() {
                first = Some(begins);
            } else if begins > next {
                events.push(LoggedEvent::Omitted {
                    units: begins - next,
                });
            }
            events.push(logged);
            next = number + 1;
        }
        EventBatch {
            first: first.unwrap_or(self.stored),
            events,
        }
    }

    fn stored_to(&mut self, end: i64) {
        self.stored = self.stored.max(end);
        self.maybe_stored = self.maybe_stored.max(end);
        let is_whole = self.events[self.place(self.stored)..]
            .iter()
            .all(|(_, event)| event.logged().is_none());
        let is_waiting = !is_whole || self.upstream_run.is_some();
        self.waiting_since = is_waiting.then(Instant::now);
    }
}

impl RunLogWriter {
    /// Creates the log of a new run.
    pub(in crate::runs) fn new() -> Self {
        Self::resumed(0, 0)
    }

    /// Creates the log of a run that was taken over. `stored`: the number after the stored events.
    /// `others_from`: lowest number of an event that is not text.
    pub(in crate::runs) fn resumed(stored: i64, others_from: i64) -> Self {
        let log = Log {
            first: stored,
            events: Vec::new(),
            next: stored,
            others_from,
            stored,
            maybe_stored: stored,
            waiting_since: None,
            pause: OFTEN,
            followed_until: None,
            upstream_run: None,
            is_public: others_from > 0,
        };
        Self {
            log: Arc::new(Mutex::new(log)),
            length: watch::Sender::new(0),
        }
    }

    /// Appends an event and wakes the readers.
    pub(in crate::runs) fn push(&self, event: RunEvent) {
        let mut log = lock(&self.log);
        log.push(event);
        self.length.send_replace(log.events.len());
    }

    /// Notes the run's id at the upstream.
    pub(in crate::runs) fn accepted(&self, id: &UpstreamRunId) {
        let mut log = lock(&self.log);
        log.upstream_run = Some(id.clone());
        log.waiting_since.get_or_insert_with(Instant::now);
    }

    /// Returns the events that are not stored yet, and `last`, an event that is about to be
    /// pushed.
    pub(in crate::runs) fn unstored(&self, last: Option<RunEvent>) -> EventBatch {
        lock(&self.log).unstored(last)
    }

    /// Returns the events that are not stored yet, where only the end follows them. The end, which
    /// comes from the run's record, gets its number from the end of this batch.
    pub(in crate::runs) fn rest(&self) -> EventBatch {
        let log = lock(&self.log);
        let mut rest = log.unstored(None);
        let end = rest.end();
        if end < log.others_from {
            rest.events.push(LoggedEvent::Omitted {
                units: log.others_from - end,
            });
        }
        rest
    }

    /// Returns an empty batch if the run's record is enough to rebuild the log: the run started at
    /// once, in this process, and its text is `text`, each piece of the same message. Then no event
    /// needs to be stored. The batch begins behind the events that may be stored.
    pub(in crate::runs) fn retold(&self, text: &ReplyText) -> Option<EventBatch> {
        let log = lock(&self.log);
        let mut events = log.events.iter().map(|(_, event)| event);
        if log.first > 0 || log.others_from > 0 || !matches!(events.next(), Some(RunEvent::Started))
        {
            return None;
        }
        let told = told(events)?;
        (told == *text).then(|| EventBatch {
            first: log.maybe_stored,
            events: Vec::new(),
        })
    }

    /// Notes that all events up to now are stored.
    pub(in crate::runs) fn all_stored(&self) {
        let mut log = lock(&self.log);
        let end = log.next;
        log.stored_to(end);
    }

    /// Returns whether readers on other replicas may have events of this log.
    pub(in crate::runs) fn is_public(&self) -> bool {
        lock(&self.log).is_public
    }

    /// Returns a reading end.
    pub(in crate::runs) fn reader(&self) -> RunLog {
        RunLog {
            log: Arc::clone(&self.log),
            length: self.length.subscribe(),
        }
    }
}

/// Returns the text of the events; `None` if one is not text.
pub(in crate::runs) fn told<'a>(
    events: impl IntoIterator<Item = &'a RunEvent>,
) -> Option<ReplyText> {
    let mut text = ReplyText::default();
    for event in events {
        let RunEvent::Delta(delta) = event else {
            return None;
        };
        text.push(delta.origin, &delta.text);
    }
    Some(text)
}

/// The reading end of a run's log.
#[derive(Clone, Debug)]
pub(in crate::runs) struct RunLog {
    log: Arc<Mutex<Log>>,
    length: watch::Receiver<usize>,
}

impl RunLog {
    /// Returns the number of the first event that this log can give.
    pub(in crate::runs) fn first(&self) -> i64 {
        lock(&self.log).first
    }

    /// Streams the events from number `from` on, each with its number, up to and including
    /// `Ended`. If the log breaks off, the stream ends without `Ended`. The stream may be dropped
    /// at any point.
    pub(in crate::runs) fn follow(
        &self,
        from: i64,
    ) -> impl Stream<Item = (i64, RunEvent)> + Send + use<> {
        let start = lock(&self.log).place(from);
        stream::unfold(
            (self.clone(), start),
            move |(mut reader, mut next)| async move {
                if next > 0 && matches!(reader.get(next - 1), Some((_, RunEvent::Ended(_)))) {
                    return None;
                }
                loop {
                    reader.length.wait_for(|length| *length > next).await.ok()?;
                    let (number, event) = reader.get(next)?;
                    next += 1;
                    // The previous owner may have shown this reader more than it stored. Then this
                    // log has to catch up with the reader first.
                    if number >= from {
                        return Some(((number, event.cut(number, from)), (reader, next)));
                    }
                    if matches!(event, RunEvent::Ended(_)) {
                        return None;
                    }
                }
            },
        )
    }

    /// Waits for the end of the run. Returns `None` if the log breaks off, because the run's task
    /// is gone.
    pub(in crate::runs) async fn ended(mut self) -> Option<Arc<Outcome>> {
        loop {
            let known = *self.length.borrow_and_update();
            if let Some((_, RunEvent::Ended(outcome))) =
                known.checked_sub(1).and_then(|last| self.get(last))
            {
                return Some(outcome);
            }
            self.length.changed().await.ok()?;
        }
    }

    /// Waits for the next event from number `from` on that can answer a caller: the end of the
    /// run, or a request for tool outputs that nothing follows yet. Returns the event with its
    /// number; `None` if the log breaks off before.
    pub(in crate::runs) async fn answer(mut self, from: i64) -> Option<(i64, RunEvent)> {
        loop {
            self.length.borrow_and_update();
            // An event after the request shows that the calls were answered.
            let last = lock(&self.log).events.last().cloned();
            if let Some((number, event)) = last
                && number >= from
                && matches!(event, RunEvent::RequiresAction(_) | RunEvent::Ended(_))
            {
                return Some((number, event));
            }
            self.length.changed().await.ok()?;
        }
    }

    /// Returns the number of the latest request for tool outputs that `is_meant` accepts.
    pub(in crate::runs) fn asked(&self, is_meant: impl Fn(&RequiredAction) -> bool) -> Option<i64> {
        let asks = |event: &RunEvent| matches!(event, RunEvent::RequiresAction(it) if is_meant(it));
        lock(&self.log)
            .events
            .iter()
            .rev()
            .find(|(_, event)| asks(event))
            .map(|(number, _)| *number)
    }

    /// Returns the unstored part, if there is one. The caller writes it.
    pub(in crate::runs) fn unrecorded(&self) -> Option<Unrecorded> {
        let mut log = lock(&self.log);
        log.waiting_since?;
        let events = log.unstored(None);
        log.maybe_stored = log.maybe_stored.max(events.end());
        Some((log.upstream_run.clone(), events))
    }

    /// Returns the unstored part if it has waited for long enough. The upstream id of the run is
    /// urgent, because a process that takes the run over needs it. Text is urgent only for a
    /// reader on another replica. After a takeover the upstream sends a long text again.
    pub(in crate::runs) fn overdue(&self) -> Option<Unrecorded> {
        {
            let log = lock(&self.log);
            let now = Instant::now();
            let is_urgent =
                log.upstream_run.is_some() || log.followed_until.is_some_and(|until| now < until);
            let pause = if is_urgent { OFTEN } else { log.pause };
            log.waiting_since.filter(|since| now - *since >= pause)?;
        }
        self.unrecorded()
    }

    /// Notes that a reader on another replica follows the run.
    pub(in crate::runs) fn followed(&self) {
        lock(&self.log).followed_until = Some(Instant::now() + FOLLOWED);
    }

    /// Notes that the upstream id and the events are stored.
    pub(in crate::runs) fn recorded(
        &self,
        upstream_run: Option<&UpstreamRunId>,
        events: &EventBatch,
    ) {
        let mut log = lock(&self.log);
        if log.upstream_run.as_ref() == upstream_run {
            log.upstream_run = None;
        }
        log.stored_to(events.end());
        log.pause = (log.pause * 2).min(SELDOM);
        log.is_public = true;
    }

    fn get(&self, place: usize) -> Option<(i64, RunEvent)> {
        lock(&self.log).events.get(place).cloned()
    }
}

/// No code panics between the two halves of a change, so the poison can be ignored.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use futures_util::{FutureExt, StreamExt};
    use proptest::prelude::*;

    use super::*;
    use crate::domain::reply_texts;
    use crate::domain::{
        ContentPart, ConversationKey, Lifecycle, Limits, MadeCall, Metadata, MultitaskStrategy,
        Origin, Removed, Run, RunId, RunStatus, Scope, TenantKey, TextDelta, Thread,
        ThreadActivity, ThreadId, ThreadState, ToolCall, Usage, UserKey,
    };
    use crate::runs::log::stored::seen_from;

    /// First number of an event that is not text, in a run that changed hands once.
    const FIRST: i64 = 1 << 32;

    fn delta(text: &str) -> LoggedEvent {
        LoggedEvent::Delta(text.into())
    }

    fn asks(id: &str) -> LoggedEvent {
        let call = ToolCall {
            id: id.to_owned(),
            name: "f".to_owned(),
            arguments: "{}".to_owned(),
            ..ToolCall::default()
        };
        LoggedEvent::RequiresAction(RequiredAction {
            tool_calls: vec![call],
        })
    }

    fn action(id: &str) -> RequiredAction {
        match asks(id) {
            LoggedEvent::RequiresAction(action) => action,
            other => unreachable!("{other:?}"),
        }
    }

    fn told(event: LoggedEvent) -> RunEvent {
        RunEvent::of(event).unwrap()
    }

    fn push(writer: &RunLogWriter, events: &[LoggedEvent]) {
        for event in events {
            writer.push(told(event.clone()));
        }
    }

    /// Returns the end of any run: the tests only need a last event.
    fn ended() -> RunEvent {
        let (now, id) = (DateTime::UNIX_EPOCH, ThreadId::new());
        let user = UserKey::try_from("alice".to_owned()).unwrap();
        let thread = Thread {
            id,
            key: ConversationKey {
                tenant: TenantKey::default(),
                user,
                scope: Scope::User,
            },
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
            unsynced_messages: 0,
            unsettled_run: None,
            usage: Usage::default(),
            context_tokens: 0,
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
            recovery: None,
            created_at: now,
            started_at: Some(now),
            finished_at: Some(now),
            deadline_at: Some(now),
            rerun: None,
            discarded: false,
        };
        let activity = ThreadActivity {
            state: ThreadState::Idle,
            queue_depth: 0,
        };
        RunEvent::Ended(Arc::new(Outcome {
            thread,
            activity,
            run,
            message: None,
            retry_after: None,
        }))
    }

    /// Returns the events that can be read at once, the end as `None`, and whether the stream has
    /// ended.
    fn read(reader: &RunLog, from: i64) -> (Vec<(i64, Option<LoggedEvent>)>, bool) {
        let mut events = std::pin::pin!(reader.follow(from));
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
            (0..2_u32, ".+").prop_map(|(message, text)| LoggedEvent::Delta(TextDelta {
                origin: Origin {
                    message,
                    phase: None
                },
                text: text.into(),
            })),
            ".*".prop_map(|id| asks(&id)),
        ]
    }

    proptest! {
        #[test]
        fn what_is_stored_comes_back_as_it_was(event in an_event()) {
            prop_assert_eq!(told(event.clone()).logged(), Some(event));
        }

        #[test]
        fn any_reader_sees_each_event_under_its_number(
            events in proptest::collection::vec(an_event(), 0..9),
            first in prop_oneof![Just(2), Just(FIRST)],
            at in 0..12_usize,
        ) {
            let writer = RunLogWriter::resumed(first, 0);
            let before = writer.reader();
            push(&writer, &events);
            let all: Vec<_> = events.iter().scan(first, |next, event| {
                *next += event.units();
                Some((*next - 1, Some(event.clone())))
            }).collect();
            let from = at.checked_sub(1).and_then(|at| all.get(at)).map_or(first - 2, |(n, _)| *n + 1);
            let wanted: Vec<_> = all.into_iter().filter(|(n, _)| *n >= from).collect();
            for reader in [before, writer.reader()] {
                prop_assert_eq!(reader.first(), first);
                prop_assert_eq!(read(&reader, from), (wanted.clone(), false));
            }
        }

        #[test]
        fn whoever_goes_on_with_a_text_gives_its_rest_to_all_readers(
            text in ".{1,20}", stored in 0..20_usize, seen in 0..20_usize,
        ) {
            let boundary = |at: usize| text.floor_char_boundary(at.min(text.len()));
            let (stored, seen) = (boundary(stored), boundary(seen));
            // The previous owner stored less, or more, than this reader has seen.
            let writer = RunLogWriter::resumed(2 + length(&text[..stored]), FIRST);
            // One reader subscribes before the log has an event.
            let (before, from) = (writer.reader(), 2 + length(&text[..seen]));
            let mut early = Box::pin(before.follow(from));
            prop_assert!(early.next().now_or_never().is_none());
            let rest = &text[stored..];
            if !rest.is_empty() {
                push(&writer, &[delta(rest)]);
            }
            push(&writer, &[asks("1")]);
            let (events, _) = read(&writer.reader(), from);
            for (number, event) in &events {
                let told = early.next().now_or_never().flatten().map(|(n, event)| (n, event.logged()));
                prop_assert_eq!(told, Some((*number, event.clone())));
            }
            let new: String = events.iter().filter_map(|(_, event)| match event {
                Some(LoggedEvent::Delta(delta)) => Some(&*delta.text),
                _ => None,
            }).collect();
            prop_assert_eq!(&new, &text[stored.max(seen)..]);
            prop_assert_eq!(events.last(), Some(&(FIRST, Some(asks("1")))), "beyond all that was shown before");
        }
    }

    /// Returns each byte of text with its number and its message.
    fn bytes(events: impl IntoIterator<Item = (i64, RunEvent)>) -> Vec<(i64, Origin, u8)> {
        let bytes = |(number, event)| match event {
            RunEvent::Delta(TextDelta { origin, text }) => {
                let begins = number + 1 - length(&text);
                let numbered = (begins..).zip(text.bytes());
                numbered.map(|(n, byte)| (n, origin, byte)).collect()
            }
            _ => Vec::new(),
        };
        events.into_iter().flat_map(bytes).collect()
    }

    proptest! {
        #[test]
        fn log_is_told_again_byte_for_byte_with_its_messages(
            pieces in reply_texts::pieces(), other in reply_texts::pieces(), is_same in any::<bool>(),
            calls in proptest::collection::vec(0..8_usize, 0..4),
        ) {
            let writer = RunLogWriter::new();
            writer.push(RunEvent::Started);
            pieces.iter().cloned().for_each(|delta| writer.push(RunEvent::Delta(delta)));
            let (text, other) = (reply_texts::text_of(&pieces), reply_texts::text_of(&other));
            let reply = if is_same { text.clone() } else { other };
            prop_assert_eq!(writer.retold(&reply).is_some(), reply == text);
            // The record holds the reply as content, with the calls of tools between the texts.
            let mut content = text.clone().into_parts();
            for at in calls {
                let tool_call = MadeCall { id: at.to_string(), ..MadeCall::default() };
                content.insert(at.min(content.len()), ContentPart::ToolCall { tool_call });
            }
            let batch = RunEvent::retell(ReplyText::of(&content));
            for from in 0..=batch.end() {
                // A reader has seen whole characters.
                if text.plain().is_char_boundary(usize::try_from(from - 2).unwrap_or_default()) {
                    let mut live = std::pin::pin!(writer.reader().follow(from));
                    let live = std::iter::from_fn(|| live.next().now_or_never().flatten());
                    prop_assert_eq!(bytes(live), bytes(seen_from(from, vec![batch.clone()])));
                }
            }
        }
    }

    #[test]
    fn the_record_tells_the_end() {
        assert_eq!(ended().logged(), None);
    }

    #[tokio::test]
    async fn a_reader_waits_for_what_comes_and_stops_at_the_end() {
        let writer = RunLogWriter::resumed(FIRST, FIRST);
        let mut events = std::pin::pin!(writer.reader().follow(FIRST));
        assert!(events.next().now_or_never().is_none());
        push(&writer, &[LoggedEvent::Started]);
        assert_eq!(events.next().await.unwrap().0, FIRST);
        assert!(events.next().now_or_never().is_none());
        let end = writer.reader().ended();
        writer.push(ended());
        assert!(matches!(events.next().await.unwrap(), (n, RunEvent::Ended(_)) if n == FIRST + 1));
        assert!(events.next().await.is_none());
        assert!(end.await.is_some());
        assert_eq!(
            read(&writer.reader(), FIRST),
            (
                vec![(FIRST, Some(LoggedEvent::Started)), (FIRST + 1, None)],
                true
            )
        );
        assert_eq!(
            read(&writer.reader(), FIRST + 2),
            (vec![], true),
            "it has seen the end"
        );
    }

    #[tokio::test]
    async fn a_log_that_breaks_off_ends_its_readers() {
        let writer = RunLogWriter::resumed(FIRST, FIRST);
        push(&writer, &[LoggedEvent::Started, delta("a")]);
        let reader = writer.reader();
        drop(writer);
        let seen = vec![
            (FIRST, Some(LoggedEvent::Started)),
            (FIRST + 1, Some(delta("a"))),
        ];
        assert_eq!(read(&reader, FIRST), (seen, true));
        assert!(reader.clone().ended().await.is_none());
        assert!(reader.clone().answer(FIRST).await.is_none());
        // An end before the drop counts.
        let writer = RunLogWriter::resumed(FIRST, FIRST);
        let (one, other) = (writer.reader(), writer.reader());
        writer.push(ended());
        drop(writer);
        assert!(one.ended().await.is_some() && other.answer(FIRST).await.is_some());
    }

    #[test]
    fn what_is_not_stored_goes_on_where_the_last_batch_ended() {
        let writer = RunLogWriter::resumed(FIRST, FIRST);
        let batch = |first, events: &[LoggedEvent]| EventBatch {
            first,
            events: events.to_vec(),
        };
        assert_eq!(writer.unstored(None), batch(FIRST, &[]));
        push(&writer, &[LoggedEvent::Started, delta("a")]);
        assert_eq!(
            writer.unstored(None),
            batch(FIRST, &[LoggedEvent::Started, delta("a")])
        );
        let whole = batch(FIRST, &[LoggedEvent::Started, delta("a"), asks("1")]);
        for _ in 0..2 {
            assert_eq!(
                writer.unstored(Some(told(asks("1")))),
                whole,
                "asking stores nothing"
            );
        }
        push(&writer, &[asks("1")]);
        writer.all_stored();
        assert_eq!(writer.unstored(None), batch(FIRST + 3, &[]));
        push(&writer, &[delta("b")]);
        assert_eq!(
            writer.unstored(Some(told(asks("2")))),
            batch(FIRST + 3, &[delta("b"), asks("2")])
        );
        push(&writer, &[asks("2")]);
        writer.all_stored();
        // The end has a number but is not in the batch: nothing follows it.
        push(&writer, &[delta("c")]);
        writer.push(ended());
        assert_eq!(writer.unstored(None), batch(FIRST + 5, &[delta("c")]));
    }

    #[tokio::test]
    async fn the_beginning_of_a_run_has_fixed_numbers() {
        let writer = RunLogWriter::new();
        push(&writer, &[LoggedEvent::Started, delta("ab")]);
        let numbers: Vec<_> = read(&writer.reader(), 0)
            .0
            .into_iter()
            .map(|(n, _)| n)
            .collect();
        assert_eq!(numbers, [1, 3]);
        assert_eq!(writer.unstored(None).first, 1);
        let writer = RunLogWriter::new();
        push(
            &writer,
            &[
                LoggedEvent::Queued { position: 1 },
                LoggedEvent::Started,
                delta("ab"),
            ],
        );
        let numbers: Vec<_> = read(&writer.reader(), 0)
            .0
            .into_iter()
            .map(|(n, _)| n)
            .collect();
        assert_eq!(numbers, [0, 1, 3]);
    }

    #[test]
    fn numbers_that_are_passed_over_are_stored_as_such() {
        let writer = RunLogWriter::resumed(5, FIRST);
        push(&writer, &[delta("ab"), asks("1"), delta("c")]);
        let gap = LoggedEvent::Omitted { units: FIRST - 7 };
        let stored = EventBatch {
            first: 5,
            events: vec![delta("ab"), gap, asks("1"), delta("c")],
        };
        assert_eq!(writer.rest(), stored);
        let cut_off = RunLogWriter::resumed(5, FIRST);
        assert_eq!(
            (cut_off.unstored(None).end(), cut_off.rest().end()),
            (5, FIRST),
            "the end gets its number there"
        );
        assert_eq!(
            (writer.unstored(None), stored.end()),
            (stored.clone(), FIRST + 2)
        );
    }

    #[tokio::test]
    async fn what_is_recorded_while_more_comes_is_not_recorded_again() {
        let writer = RunLogWriter::new();
        let (reader, id) = (writer.reader(), UpstreamRunId("up".to_owned()));
        push(&writer, &[LoggedEvent::Started, delta("ab")]);
        writer.accepted(&id);
        let (upstream_run, first) = reader.unrecorded().unwrap();
        assert_eq!(upstream_run.as_ref(), Some(&id));
        push(&writer, &[delta("cd")]);
        assert!(!writer.is_public());
        reader.recorded(upstream_run.as_ref(), &first);
        assert!(writer.is_public());
        let (upstream_run, rest) = reader.unrecorded().unwrap();
        assert_eq!(
            (upstream_run, rest.first, &*rest.events),
            (None, 4, &[delta("cd")][..])
        );
        reader.recorded(None, &rest);
        assert!(reader.unrecorded().is_none());
    }

    /// Returns how long a piece of text waits until it is stored.
    async fn recorded_after(writer: &RunLogWriter, reader: &RunLog) -> Duration {
        push(writer, &[delta("a")]);
        let begun = Instant::now();
        loop {
            if let Some((upstream_run, events)) = reader.overdue() {
                reader.recorded(upstream_run.as_ref(), &events);
                return begun.elapsed();
            }
            tokio::time::advance(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn log_that_nobody_else_follows_is_recorded_less_and_less_often() {
        let writer = RunLogWriter::new();
        let reader = writer.reader();
        push(&writer, &[LoggedEvent::Started]);
        for wait in [100, 200, 400, 800, 1000, 1000] {
            assert_eq!(
                recorded_after(&writer, &reader).await,
                Duration::from_millis(wait)
            );
        }
        // An upstream id waits less, whatever else there is.
        push(&writer, &[delta("b")]);
        tokio::time::advance(Duration::from_millis(50)).await;
        assert!(reader.overdue().is_none());
        writer.accepted(&UpstreamRunId("up".to_owned()));
        assert_eq!(recorded_after(&writer, &reader).await, OFTEN / 2);
        assert_eq!(recorded_after(&writer, &reader).await, SELDOM);
        // So does text that a reader on another replica follows, for as long as the reader
        // announces itself.
        push(&writer, &[delta("c")]);
        tokio::time::advance(OFTEN).await;
        assert!(reader.overdue().is_none());
        reader.followed();
        for wait in [Duration::ZERO, OFTEN, OFTEN] {
            assert_eq!(recorded_after(&writer, &reader).await, wait);
        }
        tokio::time::advance(FOLLOWED).await;
        assert_eq!(recorded_after(&writer, &reader).await, SELDOM);
        assert!(reader.unrecorded().is_none());
        push(&writer, &[delta("d")]);
        assert!(
            reader.unrecorded().is_some(),
            "the last write of a process does not wait"
        );
    }

    #[tokio::test]
    async fn log_is_told_again_only_if_it_is_a_start_and_the_text() {
        let writer = RunLogWriter::new();
        let text = |text: &str| super::told(&[RunEvent::Delta(text.into())]).unwrap();
        let retold = |writer: &RunLogWriter, words: &str| writer.retold(&text(words));
        assert_eq!(retold(&writer, ""), None);
        push(&writer, &[LoggedEvent::Started, delta("ab"), delta("c")]);
        let nothing = EventBatch {
            first: 0,
            events: Vec::new(),
        };
        assert_eq!(retold(&writer, "abc"), Some(nothing));
        // A write whose answer has not come may have stored them.
        let (_, written) = writer.reader().unrecorded().unwrap();
        assert_eq!(
            retold(&writer, "abc").map(|rest| rest.first),
            Some(written.end())
        );
        assert_eq!(
            RunEvent::retell(text("abc")).end(),
            writer.unstored(None).end()
        );
        for other in ["ab", "abcd", "xbc"] {
            assert_eq!(retold(&writer, other), None);
        }
        writer.all_stored();
        assert_eq!(
            retold(&writer, "abc").map(|rest| rest.first),
            Some(5),
            "the number from which stored events are removed"
        );
        push(&writer, &[asks("1")]);
        assert_eq!(retold(&writer, "abc"), None);
        let queued = RunLogWriter::new();
        push(
            &queued,
            &[
                LoggedEvent::Queued { position: 1 },
                LoggedEvent::Started,
                delta("abc"),
            ],
        );
        assert_eq!(retold(&queued, "abc"), None);
        // Another process had the run before, and may have shown events to readers.
        for taken_over in [
            RunLogWriter::resumed(0, FIRST),
            RunLogWriter::resumed(2, FIRST),
        ] {
            push(&taken_over, &[LoggedEvent::Started, delta("abc")]);
            assert_eq!(retold(&taken_over, "abc"), None);
        }
    }

    #[tokio::test]
    async fn a_caller_is_answered_by_what_comes_from_its_place_on() {
        let writer = RunLogWriter::resumed(FIRST, FIRST);
        let waits = |from| writer.reader().answer(from).now_or_never().is_none();
        push(&writer, &[LoggedEvent::Started]);
        assert!(waits(0));
        let early = writer.reader().answer(0);
        push(&writer, &[asks("1")]);
        let (number, event) = early.await.unwrap();
        assert_eq!((number, event.logged()), (FIRST + 1, Some(asks("1"))));
        assert!(waits(FIRST + 2), "an earlier event answers it");
        // A later event shows that the calls were answered.
        push(&writer, &[delta("a")]);
        assert!(waits(0));
        push(&writer, &[asks("2")]);
        for from in [0, FIRST + 1, FIRST + 3] {
            let (_, event) = writer.reader().answer(from).await.unwrap();
            assert_eq!(event.logged(), Some(asks("2")), "{from}");
        }
        let late = writer.reader().answer(FIRST + 4);
        push(&writer, &[delta("b"), delta("c")]);
        assert!(waits(FIRST + 3));
        writer.push(ended());
        assert!(matches!(late.await.unwrap(), (_, RunEvent::Ended(_))));
        assert!(matches!(
            writer.reader().answer(0).await.unwrap(),
            (_, RunEvent::Ended(_))
        ));
    }

    /// The previous owner may have shown its caller more than it stored.
    #[tokio::test]
    async fn a_caller_is_not_answered_by_what_it_has_seen() {
        let writer = RunLogWriter::resumed(5, 0);
        let answer = writer.reader().answer(9);
        push(&writer, &[asks("1")]);
        assert!(answer.now_or_never().is_none());
        push(&writer, &[delta("abc"), asks("2")]);
        let (number, event) = writer.reader().answer(9).await.unwrap();
        assert_eq!((number, event.logged()), (9, Some(asks("2"))));
    }

    #[test]
    fn the_last_time_that_calls_were_asked_for_counts() {
        let writer = RunLogWriter::resumed(FIRST, FIRST);
        push(
            &writer,
            &[
                LoggedEvent::Started,
                asks("1"),
                delta("a"),
                asks("1"),
                asks("2"),
            ],
        );
        let reader = writer.reader();
        assert_eq!(reader.asked(|it| *it == action("1")), Some(FIRST + 3));
        assert_eq!(reader.asked(|it| *it == action("2")), Some(FIRST + 4));
        assert_eq!(reader.asked(|it| *it == action("3")), None);
    }
}

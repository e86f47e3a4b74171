//! What happens during a run, as a log that any number of readers follow at their own pace.
//!
//! A reader holds a position in the log, not a queue of its own: a slow one costs nothing and stalls nobody. The
//! log lives as long as the run or its last reader, and is bounded by the limit on replies.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::stream::{self, Stream};
use tokio::sync::watch;

use crate::domain::{Message, Run, Thread, ThreadActivity};

/// One event of a run.
#[derive(Clone, Debug)]
pub enum RunEvent {
    /// The run waits. 1: it goes next.
    Queued { position: i64 },
    /// The run has its turn.
    Started,
    /// More text of the reply.
    Delta(Arc<str>),
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
#[derive(Debug, Default)]
pub(super) struct FeedWriter {
    events: Arc<Mutex<Vec<RunEvent>>>,
    length: watch::Sender<usize>,
}

impl FeedWriter {
    /// Appends an event and wakes the readers.
    pub(super) fn push(&self, event: RunEvent) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.push(event);
        self.length.send_replace(events.len());
    }

    /// A reading end.
    pub(super) fn feed(&self) -> Feed {
        Feed { events: Arc::clone(&self.events), length: self.length.subscribe() }
    }
}

/// The reading end of a run's log.
#[derive(Clone, Debug)]
pub struct Feed {
    events: Arc<Mutex<Vec<RunEvent>>>,
    length: watch::Receiver<usize>,
}

impl Feed {
    /// The events from number `from` on (0 is the first), each with its number, up to and including the last one
    /// of the run. May be dropped at any point.
    pub fn follow(&self, from: usize) -> impl Stream<Item = (usize, RunEvent)> + Send + use<> {
        stream::unfold((self.clone(), from), |(mut feed, next)| async move {
            if next > 0 && matches!(feed.get(next - 1), Some(RunEvent::Ended(_))) {
                return None;
            }
            feed.length.wait_for(|length| *length > next).await.ok()?;
            let event = feed.get(next)?;
            Some(((next, event), (feed, next + 1)))
        })
    }

    /// Waits for the end of the run. `None` if the log breaks off: the run's task is gone without having told it.
    pub async fn ended(mut self) -> Option<Arc<Outcome>> {
        loop {
            let last = {
                let known = *self.length.borrow_and_update();
                known.checked_sub(1).and_then(|last| self.get(last))
            };
            if let Some(RunEvent::Ended(outcome)) = last {
                return Some(outcome);
            }
            self.length.changed().await.ok()?;
        }
    }

    fn get(&self, n: usize) -> Option<RunEvent> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).get(n).cloned()
    }
}

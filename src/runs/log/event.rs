//! The events of a run, as its readers see them.

use std::sync::Arc;
use std::time::Duration;

use super::offset::{STARTED, length};
use crate::domain::{
    EventBatch, LoggedEvent, Message, Recovery, ReplyText, RequiredAction, Run, TextDelta, Thread,
    ThreadActivity,
};

/// One event of a run.
#[derive(Clone, Debug)]
pub enum RunEvent {
    /// The run waits in the queue; at position 1 it starts next.
    Queued { position: i64 },
    /// The run has started.
    Started,
    /// The upstream refused the request at first, and has answered in a new thread.
    Recovered(Arc<Recovery>),
    /// More text of the reply.
    Delta(TextDelta),
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
    /// The wait that the upstream asked for.
    pub retry_after: Option<Duration>,
}

impl RunEvent {
    /// Returns the log of a run whose reply has this text, where the run's record alone is enough
    /// to rebuild it. See [`RunLogWriter::retold`](super::writer::RunLogWriter::retold).
    pub(in crate::runs) fn retell(text: ReplyText) -> EventBatch {
        let deltas = text.into_deltas().map(LoggedEvent::Delta);
        EventBatch {
            first: STARTED,
            events: [LoggedEvent::Started].into_iter().chain(deltas).collect(),
        }
    }

    /// Returns the stored form; `None` if the run's record has the event anyway.
    pub(in crate::runs) fn logged(&self) -> Option<LoggedEvent> {
        match self {
            Self::Queued { position } => Some(LoggedEvent::Queued {
                position: *position,
            }),
            Self::Started => Some(LoggedEvent::Started),
            Self::Recovered(recovery) => Some(LoggedEvent::Recovered((**recovery).clone())),
            Self::Delta(text) => Some(LoggedEvent::Delta(text.clone())),
            Self::RequiresAction(action) => Some(LoggedEvent::RequiresAction((**action).clone())),
            Self::MessageCompleted(_) | Self::Ended(_) => None,
        }
    }

    /// Returns a stored event as its readers see it; `None` for skipped numbers.
    pub(in crate::runs) fn of(event: LoggedEvent) -> Option<Self> {
        match event {
            LoggedEvent::Queued { position } => Some(Self::Queued { position }),
            LoggedEvent::Started => Some(Self::Started),
            LoggedEvent::Recovered(recovery) => Some(Self::Recovered(Arc::new(recovery))),
            LoggedEvent::Delta(text) => Some(Self::Delta(text)),
            LoggedEvent::RequiresAction(action) => Some(Self::RequiresAction(Arc::new(action))),
            LoggedEvent::Omitted { .. } => None,
        }
    }

    /// Cuts off the text that a reader has seen who read everything before number `from`. `number`
    /// is the event's own number.
    pub(in crate::runs) fn cut(self, number: i64, from: i64) -> Self {
        let Self::Delta(TextDelta { origin, text }) = &self else {
            return self;
        };
        let begins = number + 1 - length(text);
        match usize::try_from(from - begins) {
            Ok(seen @ 1..) => {
                let seen = text.ceil_char_boundary(seen.min(text.len()));
                Self::Delta(TextDelta {
                    origin: *origin,
                    text: text[seen..].into(),
                })
            }
            _ => self,
        }
    }
}

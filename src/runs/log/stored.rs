//! The stored part of the log of a run.

use std::collections::VecDeque;

use super::event::RunEvent;
use super::offset::{EventOffset, FIRST_EVENT, numbered};
use crate::domain::{EventBatch, ReplyText, RunId};
use crate::store::{Store, StoreError};

/// The stored log of a run that changes hands.
#[derive(Clone, Debug, Default)]
pub(in crate::runs) struct StoredLog {
    /// The offset after the stored events.
    pub(in crate::runs) end: EventOffset,
    /// The text of the run's current round.
    pub(in crate::runs) text: ReplyText,
}

impl StoredLog {
    /// Reads the stored log of a run.
    pub(in crate::runs) async fn read(store: &Store, run: RunId) -> Result<Self, StoreError> {
        let batches = store.events(run, FIRST_EVENT).await?;
        let end = batches
            .iter()
            .map(EventBatch::end)
            .max()
            .unwrap_or(FIRST_EVENT);
        let mut text = ReplyText::default();
        let mut next = FIRST_EVENT;
        for (offset, event) in numbered(batches) {
            if offset < next {
                continue;
            }
            match RunEvent::of(event).map(|event| event.cut(offset, next)) {
                Some(RunEvent::Delta(piece)) => text.push(piece.origin, &piece.text),
                Some(RunEvent::RequiresAction(_)) => text.clear(),
                _ => {}
            }
            next = offset + 1;
        }
        Ok(Self { end, text })
    }
}

/// Returns the events that a reader still has to see who has seen everything before `from`.
pub(in crate::runs) fn seen_from(
    from: EventOffset,
    batches: Vec<EventBatch>,
) -> VecDeque<(EventOffset, RunEvent)> {
    let mut next = from;
    let mut events = VecDeque::new();
    for (offset, event) in numbered(batches) {
        if offset < next {
            continue;
        }
        if let Some(event) = RunEvent::of(event) {
            events.push_back((offset, event.cut(offset, next)));
            next = offset + 1;
        }
    }
    events
}

//! Where an event stands in the log of a run.
//!
//! An event's offset is the last number that it [takes](LoggedEvent::units): text takes one for each byte, everything else
//! one. That a run waits in its queue always stands at 0, that it has started at 1, so its text begins at 2. A process that
//! takes a run over gives the text the numbers that it had. What else it tells stands beyond all that the process before it
//! can have shown.

use crate::domain::{EventBatch, LoggedEvent};
use crate::store::RunLease;

/// Where an event stands in the log of a run. A reader who has seen all before an offset reads on from it.
pub type EventOffset = i64;

/// The offset from which a reader sees the whole log.
pub const FIRST_EVENT: EventOffset = 0;

/// Where [`RunEvent::Started`](super::event::RunEvent::Started) stands.
pub(in crate::runs) const STARTED: EventOffset = 1;

/// Each change of hands moves events other than text on by 2 to this power.
const BITS_PER_FENCE: u32 = 32;

/// The lowest offset of an event other than text, in a run under this lease.
pub(in crate::runs) fn others_from(lease: &RunLease) -> EventOffset {
    (lease.fence - 1) << BITS_PER_FENCE
}

/// How many numbers a text takes.
pub(in crate::runs) fn length(text: &str) -> i64 {
    i64::try_from(text.len()).unwrap_or(i64::MAX)
}

/// The events of these batches, each with its offset. Batches may leave gaps, and may overlap.
pub(in crate::runs) fn numbered(
    batches: Vec<EventBatch>,
) -> impl Iterator<Item = (EventOffset, LoggedEvent)> {
    batches
        .into_iter()
        .flat_map(|EventBatch { first, events }| {
            events.into_iter().scan(first, |next, event| {
                *next += event.units();
                Some((*next - 1, event))
            })
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_may_leave_a_gap() {
        let delta = |text: &str| LoggedEvent::Delta(text.to_owned());
        let batch = |first, events: &[&str]| EventBatch {
            first,
            events: events.iter().map(|text| delta(text)).collect(),
        };
        let all: Vec<_> =
            numbered(vec![batch(0, &["a", "b"]), batch(2, &[]), batch(7, &["c"])]).collect();
        assert_eq!(all, [(0, delta("a")), (1, delta("b")), (7, delta("c"))]);
    }
}

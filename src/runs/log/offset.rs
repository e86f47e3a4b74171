//! Offsets: the numbers of events in the log of a run.
//!
//! An event's offset is the last number that it [takes](LoggedEvent::units). A text takes one
//! number for each byte, any other event takes one.
//!
//! - `Queued` is always at 0 and `Started` at 1, so the text begins at 2.
//! - After a takeover, the text keeps the numbers that it had.
//! - Other events of the new owner get numbers beyond all that the previous owner can have shown.

use crate::domain::{EventBatch, LoggedEvent};
use crate::store::RunLease;

/// The number of an event in the log of a run. A reader who has seen everything before an offset
/// resumes from it.
pub type EventOffset = i64;

/// The first offset. A reader from here sees the whole log.
pub const FIRST_EVENT: EventOffset = 0;

/// Offset of [`RunEvent::Started`](super::event::RunEvent::Started).
pub(in crate::runs) const STARTED: EventOffset = 1;

/// Bits of an offset below the fence: each takeover moves events other than text on by 2 to this
/// power.
const BITS_PER_FENCE: u32 = 32;

/// Returns the lowest offset of an event other than text, in a run under this lease.
pub(in crate::runs) fn others_from(lease: &RunLease) -> EventOffset {
    (lease.fence - 1) << BITS_PER_FENCE
}

/// Returns how many numbers a text takes.
pub(in crate::runs) fn length(text: &str) -> i64 {
    i64::try_from(text.len()).unwrap_or(i64::MAX)
}

/// Returns the events of the batches, each with its offset. Batches may leave gaps, and may
/// overlap.
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
        let delta = |text: &str| LoggedEvent::Delta(text.into());
        let batch = |first, events: &[&str]| EventBatch {
            first,
            events: events.iter().map(|text| delta(text)).collect(),
        };
        let all: Vec<_> =
            numbered(vec![batch(0, &["a", "b"]), batch(2, &[]), batch(7, &["c"])]).collect();
        assert_eq!(all, [(0, delta("a")), (1, delta("b")), (7, delta("c"))]);
    }
}

//! The answers to many messages: latencies and rates.

use std::time::Duration;

use tokio::time::Instant;

use super::figures::{Durations, count};

/// The times of a message and of its answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    /// `None` if the connection broke.
    pub(crate) status: Option<u16>,
    pub(crate) since: Instant,
    /// When the first piece of a streamed reply arrived.
    pub(crate) first: Option<Instant>,
    pub(crate) until: Instant,
}

/// The answers to many messages.
#[derive(Debug, Default)]
pub(crate) struct Answers {
    /// Latencies of the messages with a reply.
    pub(crate) taken: Durations,
    /// Times to the first piece of streamed replies.
    pub(crate) first: Durations,
    /// Latencies of refused messages: 413, 429, 401, 503.
    pub(crate) refused: Durations,
    /// Latencies of failed messages: 502, 504.
    pub(crate) failed: Durations,
    /// Number of turns that completed within the time.
    turns: usize,
    time: Duration,
    /// Number of messages with another answer, or with none.
    pub(crate) odd: usize,
}

impl Answers {
    /// Collects the answers of a time. Latencies are those of messages that were sent within the
    /// time, whenever the answer came. The [rate](Self::rate) counts all replies that came within
    /// the time.
    pub(crate) fn within(
        from: Instant,
        time: Duration,
        asked: impl Iterator<Item = Asked>,
    ) -> Self {
        let (mut taken, mut first, mut refused, mut failed) = (vec![], vec![], vec![], vec![]);
        let (mut turns, mut odd) = (0, 0);
        let within = from..=from + time;
        for one in asked {
            turns += usize::from(one.status == Some(200) && within.contains(&one.until));
            if !within.contains(&one.since) {
                continue;
            }
            let took = one.until - one.since;
            match one.status {
                Some(200) => {
                    taken.push(took);
                    first.extend(one.first.map(|first| first - one.since));
                }
                Some(401 | 413 | 429 | 503) => refused.push(took),
                Some(502 | 504) => failed.push(took),
                _ => odd += 1,
            }
        }
        let [taken, first, refused, failed] =
            [taken, first, refused, failed].map(|durations| durations.into_iter().collect());
        Self {
            taken,
            first,
            refused,
            failed,
            turns,
            time,
            odd,
        }
    }

    /// Returns the number of sent messages.
    pub(crate) fn len(&self) -> usize {
        self.taken.len() + self.refused.len() + self.failed.len() + self.odd
    }

    /// Returns the rate of sent messages, per second.
    pub(crate) fn offered(&self) -> f64 {
        count(self.len()) / self.time.as_secs_f64()
    }

    /// Returns the rate of completed turns, per second.
    pub(crate) fn rate(&self) -> f64 {
        count(self.turns) / self.time.as_secs_f64()
    }
}

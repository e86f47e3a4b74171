//! What comes of messages.

use std::time::Duration;

use tokio::time::Instant;

use super::figures::{Durations, count};

/// When a message was sent, and when it was answered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    /// `None`: the connection broke.
    pub(crate) status: Option<u16>,
    pub(crate) since: Instant,
    /// When the first piece of a reply came, if that came as a stream.
    pub(crate) first: Option<Instant>,
    pub(crate) until: Instant,
}

/// What came of many messages.
#[derive(Debug, Default)]
pub(crate) struct Answers {
    /// How long those took that were answered with a reply.
    pub(crate) taken: Durations,
    /// How long it took to the first piece of those replies that came as a stream.
    pub(crate) first: Durations,
    /// The same as `taken` for those that were refused: 413, 429, 401, 503.
    pub(crate) refused: Durations,
    /// The same for those that failed: 502, 504.
    pub(crate) failed: Durations,
    /// Turns that were made within the time.
    turns: usize,
    time: Duration,
    /// What was answered otherwise, or not at all.
    pub(crate) odd: usize,
}

impl Answers {
    /// Latencies are those of messages sent within the time, whenever they were answered.
    /// The [rate](Self::rate) counts all replies that came within the time.
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

    /// Messages that were sent.
    pub(crate) fn len(&self) -> usize {
        self.taken.len() + self.refused.len() + self.failed.len() + self.odd
    }

    /// Messages a second.
    pub(crate) fn offered(&self) -> f64 {
        count(self.len()) / self.time.as_secs_f64()
    }

    /// Turns a second.
    pub(crate) fn rate(&self) -> f64 {
        count(self.turns) / self.time.as_secs_f64()
    }
}

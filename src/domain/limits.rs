//! How long something may be used.

use std::time::Duration;

use super::Timestamp;

/// Limits on the use of a thread; `None` is no limit.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Limits {
    /// Longest time since the thread's creation.
    pub max_age: Option<Duration>,
    /// Longest time since the thread's last activity.
    pub max_idle: Option<Duration>,
}

impl Limits {
    pub const NONE: Self = Self {
        max_age: None,
        max_idle: None,
    };

    /// Returns the instant at which the use ends.
    pub fn end(self, created_at: Timestamp, last_active_at: Timestamp) -> Option<Timestamp> {
        let after = |start: Timestamp, limit: Option<Duration>| {
            // A limit that ends beyond the calendar is no limit.
            limit.and_then(|limit| {
                start.checked_add_signed(chrono::TimeDelta::from_std(limit).ok()?)
            })
        };
        match (
            after(created_at, self.max_age),
            after(last_active_at, self.max_idle),
        ) {
            (Some(by_age), Some(by_idle)) => Some(by_age.min(by_idle)),
            (by_age, by_idle) => by_age.or(by_idle),
        }
    }
}

//! How long a thread may be used, and what happens to it afterwards.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::run::text_enum;
use super::{Lifecycle, Scope, Thread, Timestamp, UpstreamThreadId};

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

/// The limits of threads that have no limits of their own.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Lifetimes {
    pub sessions: Limits,
    /// Threads of users and topics.
    pub others: Limits,
}

impl Lifetimes {
    pub const fn of(&self, scope: &Scope) -> Limits {
        match scope {
            Scope::Session(_) => self.sessions,
            Scope::User | Scope::Topic(_) => self.others,
        }
    }

    /// Returns the instant from which the thread accepts no new message.
    pub fn expiry(&self, thread: &Thread) -> Option<Timestamp> {
        let limits = if thread.limits == Limits::NONE {
            self.of(&thread.key.scope)
        } else {
            thread.limits
        };
        limits.end(thread.created_at, thread.last_active_at)
    }
}

/// How long a caller wants a thread to live: from now on, or from its last activity on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ttl {
    FromNow(Duration),
    FromLastActivity(Duration),
}

/// A new lifetime for a thread.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum NewLife {
    /// The configured limits.
    AsConfigured,
    Own(Ttl),
}

impl NewLife {
    pub const fn own(self) -> Option<Ttl> {
        match self {
            Self::AsConfigured => None,
            Self::Own(ttl) => Some(ttl),
        }
    }
}

text_enum!(
    /// How the deletion of a thread ends.
    Deletion {
        /// The transcript stays, read only. Everything at the upstream is deleted.
        Archive = "archive",
        /// Nothing of the thread stays.
        Erase = "erase",
    }
);

text_enum!(
    /// How the deletion of an upstream thread ended.
    UpstreamOutcome {
        Deleted = "deleted",
        /// The server did not have it, or no longer.
        AlreadyGone = "already_gone",
        /// There was no upstream thread.
        None = "none",
        /// The configuration no longer names its upstream, so the gateway could not delete it.
        NotConfigured = "not_configured",
        /// The server has no request to delete it, so it may remain there.
        NotSupported = "not_supported",
        /// Its deletion failed for as long as `janitor.give_up_after`, so it may remain there.
        Failed = "failed",
    }
);

/// What the gateway deleted of a thread at its upstream.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Removed {
    pub upstream_thread_id: Option<UpstreamThreadId>,
    /// `None`: not deleted yet.
    pub outcome: Option<UpstreamOutcome>,
    /// Items or messages of the thread that were deleted one by one.
    pub items: u64,
    /// Stored responses that were deleted.
    pub responses: u64,
    /// Other upstream threads that were made for this thread and are no longer used, or never
    /// were.
    pub other_threads: u64,
    /// Upstream threads and responses that may exist because the answer to their creation was
    /// lost, and for which the server offers no search.
    pub unknown: u64,
    /// What the server does not delete, or did not delete before the gateway gave up.
    #[serde(skip_serializing_if = "Left::is_empty")]
    pub left: Left,
    /// The time at which the gateway gives up a failing deletion. The first failure in a row sets
    /// it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tried_until: Option<Timestamp>,
    /// Why the last step failed that the gateway gave up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}

/// What may remain of a thread at its upstream.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Left {
    /// Upstream threads, the thread's own included.
    pub threads: u64,
    pub items: u64,
    pub responses: u64,
}

impl Left {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The janitor's next task for a thread.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LifecycleTask {
    /// The thread has expired: archive it.
    Expire { since: Timestamp },
    /// The thread is archived: delete its upstream copy, which is no longer needed.
    ClearUpstream,
    /// The thread's retention is over: erase it.
    Discard { since: Timestamp },
    /// A deletion of the thread is under way: continue it.
    Delete(Deletion),
    /// Nothing before `until`; `None`: nothing ever.
    Nothing { until: Option<Timestamp> },
}

/// How long, and where, archived threads are kept.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RetentionPolicy {
    /// Retention of the transcript; `None`: for ever.
    pub transcript: Option<Duration>,
    /// Whether the upstream copy is kept as long as the transcript.
    pub upstream: bool,
}

impl LifecycleTask {
    /// Returns the janitor's task for a thread at `now`.
    pub fn of(
        thread: &Thread,
        now: Timestamp,
        lifetimes: &Lifetimes,
        keeping: RetentionPolicy,
    ) -> Self {
        match (thread.lifecycle, thread.deletion) {
            (Lifecycle::Deleting, deletion) => Self::Delete(deletion.unwrap_or(Deletion::Erase)),
            (Lifecycle::Current, _) => match lifetimes.expiry(thread) {
                Some(since) if since <= now => Self::Expire { since },
                until => Self::Nothing { until },
            },
            (Lifecycle::Archived, _) => {
                let limits = Limits {
                    max_age: keeping.transcript,
                    max_idle: None,
                };
                let archived_at = thread.archived_at.unwrap_or(thread.last_active_at);
                match limits.end(archived_at, archived_at) {
                    Some(since) if since <= now => Self::Discard { since },
                    _ if !keeping.upstream && thread.removed.outcome.is_none() => {
                        Self::ClearUpstream
                    }
                    until => Self::Nothing { until },
                }
            }
        }
    }
}

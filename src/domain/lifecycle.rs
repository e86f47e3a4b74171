//! How long a thread may be used, and what happens to it afterwards.

use std::time::Duration;

use super::{Deletion, Lifecycle, Limits, Scope, Thread, Timestamp};

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

//! How long a thread may be used, and what becomes of it afterwards.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::run::text_enum;
use super::{Lifecycle, Scope, Thread, Timestamp, UpstreamThreadId};

/// How long something may be used; without a limit, for ever.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Limits {
    /// From its creation.
    pub max_age: Option<Duration>,
    /// From its last activity.
    pub max_idle: Option<Duration>,
}

impl Limits {
    pub const NONE: Self = Self {
        max_age: None,
        max_idle: None,
    };

    /// From that instant on it is not used any more.
    pub fn end(self, created_at: Timestamp, last_active_at: Timestamp) -> Option<Timestamp> {
        let after = |start: Timestamp, limit: Option<Duration>| {
            // What lies beyond the calendar never comes.
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

/// The limits of threads that have none of their own.
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

    /// From that instant on no new message goes to the thread.
    pub fn expiry(&self, thread: &Thread) -> Option<Timestamp> {
        let limits = if thread.limits == Limits::NONE {
            self.of(&thread.key.scope)
        } else {
            thread.limits
        };
        limits.end(thread.created_at, thread.last_active_at)
    }
}

/// How long a caller wants a thread to live: this long from now on, or from its last activity on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ttl {
    FromNow(Duration),
    FromLastActivity(Duration),
}

/// How long a thread is to live from now on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum NewLife {
    /// By the configured limits again.
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
    /// What the deletion of a thread ends in.
    Deletion {
        /// Its transcript stays, read only; upstream all is gone.
        Archive = "archive",
        /// Nothing of it stays.
        Erase = "erase",
    }
);

text_enum!(
    /// What became of an upstream thread that was to be deleted.
    UpstreamOutcome {
        Deleted = "deleted",
        /// The server did not have it (any more).
        AlreadyGone = "already_gone",
        /// There never was one.
        None = "none",
        /// The configuration does not name its upstream any more, so nothing could be done there.
        NotConfigured = "not_configured",
        /// The server does not offer its deletion, so it may remain there.
        NotSupported = "not_supported",
        /// Its deletion failed for as long as `janitor.give_up_after`, so it may remain there.
        Failed = "failed",
    }
);

/// What was deleted of a thread at its upstream.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Removed {
    pub upstream_thread_id: Option<UpstreamThreadId>,
    /// `None`: not deleted yet.
    pub outcome: Option<UpstreamOutcome>,
    /// Items or messages of it that were deleted one by one.
    pub items: u64,
    /// Stored responses.
    pub responses: u64,
    /// Further threads that were made for it and never used, or given up.
    pub other_threads: u64,
    /// Threads and responses that may have been made for it, by a call whose answer was lost, and that the server cannot be
    /// asked for.
    pub unknown: u64,
    /// What the server does not delete, or did not until it was given up.
    #[serde(skip_serializing_if = "Left::is_empty")]
    pub left: Left,
    /// What fails is given up then. Set by the first failure in a row.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tried_until: Option<Timestamp>,
    /// Why the last step that was given up had failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}

/// What may remain of a thread at its upstream.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Left {
    /// Upstream threads, its own included.
    pub threads: u64,
    pub items: u64,
    pub responses: u64,
}

impl Left {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What the janitor does about a thread.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LifecycleTask {
    /// It has expired: archive it.
    Expire { since: Timestamp },
    /// It is archived: delete its upstream copy, which is not needed any more.
    ClearUpstream,
    /// It was archived for long enough: erase it.
    Discard { since: Timestamp },
    /// A deletion is under way: go on with it.
    Delete(Deletion),
    /// Nothing before that time; `None`: nothing any more.
    Nothing { until: Option<Timestamp> },
}

/// For how long archived threads are kept, and where.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RetentionPolicy {
    /// `None`: for ever.
    pub transcript: Option<Duration>,
    /// The upstream copy is kept as long as the transcript.
    pub upstream: bool,
}

impl LifecycleTask {
    /// What is to be done about a thread at a time.
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

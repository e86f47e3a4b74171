//! How the deletion of a thread ends, and what it removed.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::run::text_enum;
use super::{Timestamp, UpstreamThreadId};

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

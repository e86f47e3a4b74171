//! The recovery of a run whose request the upstream refused: what was at fault, and what the model
//! no longer knows.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::run::text_enum;
use super::{OrphanId, UpstreamThreadId};

text_enum!(
    /// Why the upstream refused the request of a run that was answered later.
    RecoveryCause {
        /// The upstream no longer had the thread.
        ThreadGone = "thread_gone",
        /// The upstream did not accept the thread any more.
        ThreadRefused = "thread_refused",
        /// The conversation was too long for the model or the server.
        ContextFull = "context_full",
        /// A picture or file of an earlier message could not be used.
        MediaUnusable = "media_unusable",
        /// The upstream did not say why.
        Unknown = "unknown",
    }
);

text_enum!(
    /// The part of the earlier conversation that the model got with a recovered run. Ordered from
    /// the largest to the smallest.
    #[derive(Ord, PartialOrd)]
    HistoryKept {
        /// All of it, in a new upstream thread.
        All = "all",
        /// All of it, with notes in the place of pictures and files.
        WithoutMedia = "without_media",
        /// The newer half.
        NewerHalf = "newer_half",
        /// The last few messages.
        LastMessages = "last_messages",
        /// Nothing.
        Nothing = "nothing",
    }
);

/// How a run was answered after the upstream had refused its request: with a new upstream thread,
/// and maybe with less of the conversation.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
pub struct Recovery {
    pub cause: RecoveryCause,
    pub history: HistoryKept,
    /// Number of earlier messages that the model no longer knows.
    pub messages_left_out: u32,
    /// Number of pictures and files of earlier messages that the model knows only as a note.
    pub parts_replaced: u32,
}

/// The recovery of a run, and what the gateway still has to do for it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct RunRecovery {
    /// What to tell about it. `None`: the thread had no upstream thread yet, so nothing was refused.
    pub recovery: Option<Recovery>,
    /// The upstream has answered, so the recovery stands.
    pub answered: bool,
    pub trial: Option<Trial>,
    pub omitted: Omitted,
}

impl RunRecovery {
    /// Returns the upstream thread on trial, if the upstream has not answered in it.
    pub fn open_trial(&self) -> Option<&Trial> {
        self.trial.as_ref().filter(|_| !self.answered)
    }

    /// Returns what to tell about a recovery that stands.
    pub fn told(&self) -> Option<&Recovery> {
        self.recovery.as_ref().filter(|_| self.answered)
    }
}

/// An upstream thread that replaces the one of the gateway's thread as soon as the upstream has
/// answered in it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Trial {
    pub thread: UpstreamThreadId,
    /// The record of the upstream thread while nothing else names it.
    pub orphan: OrphanId,
    /// Number of user messages with which it begins.
    pub users: u32,
    /// Number of those that come from the previous thread.
    pub carried_users: u32,
}

/// The earlier messages that a request leaves out, and that are withheld from the model from then
/// on.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Omitted {
    /// There are such messages.
    pub any: bool,
    /// The position before which messages of the thread are left out; `None`: all of them.
    pub before: Option<i64>,
    /// Number of the previous thread's messages that are sent.
    pub carried: u32,
}

/// A refusal that a thread has recovered from, and the history with which it did. The next recovery
/// from the same refusal begins with that history.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct KnownRefusal {
    pub status: u16,
    pub code: Option<String>,
    pub cure: HistoryKept,
}

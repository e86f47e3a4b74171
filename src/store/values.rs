//! What several topics of the store hand each other.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::errors::StoreError;
use super::rows::MessageRow;
use crate::domain::{ContentPart, MessageId, OrphanId, Run, RunId, Thread};

/// The right to write about a run. A run that changes hands gets a higher fence, and the old one is void.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct RunLease {
    pub run_id: RunId,
    pub fence: i64,
}

/// A run that may work now.
#[derive(Clone, Debug, PartialEq)]
pub struct StartedRun {
    pub lease: RunLease,
    pub thread: Thread,
    pub run: Run,
    pub input: Vec<InputMessage>,
    /// It is recorded under this id that the thread's upstream thread is about to be made.
    pub intent: Option<OrphanId>,
}

/// What became of an attempt to start a queued run.
#[derive(Clone, Debug, PartialEq)]
pub enum QueuedStart {
    Started(Box<StartedRun>),
    /// Another run is active or waits before it.
    NotYet,
    /// The lease is lost or the run is not queued any more.
    Lost,
}

/// A user's message on its way into a run.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct InputMessage {
    pub id: MessageId,
    pub content: Vec<ContentPart>,
}

/// What makes a repeated request known.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Idempotency {
    /// The caller's key, of the conversation's own.
    pub key: String,
    /// A hash of all that the request asks for.
    pub request_hash: [u8; 32],
}

impl TryFrom<MessageRow> for InputMessage {
    type Error = StoreError;

    fn try_from(row: MessageRow) -> Result<Self, StoreError> {
        Ok(Self {
            id: MessageId::from_uuid(row.m_id),
            content: row.m_content.0,
        })
    }
}

/// How long an intent is left to the process that makes the upstream thread. That process gives up before.
pub const ORPHAN_AFTER: Duration = Duration::from_mins(10);

//! What several topics of the store hand each other.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::errors::StoreError;
use super::rows::MessageRow;
use crate::domain::{ContentPart, MessageId, OrphanId, Run, RunId, Thread};

/// The right to write about a run. A run that changes hands gets a higher fence, and leases with
/// the old fence become void.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct RunLease {
    pub run_id: RunId,
    pub fence: i64,
}

/// A run that has started, with its lease and its input.
#[derive(Clone, Debug, PartialEq)]
pub struct StartedRun {
    pub lease: RunLease,
    pub thread: Thread,
    pub run: Run,
    pub input: Vec<InputMessage>,
    /// The id of the recorded intent to create the thread's upstream thread.
    pub intent: Option<OrphanId>,
}

/// The outcome of an attempt to start a queued run.
#[derive(Clone, Debug, PartialEq)]
pub enum QueuedStart {
    Started(Box<StartedRun>),
    /// Another run is active, or is queued before it.
    NotYet,
    /// The lease was lost, or the run is not queued any more.
    Lost,
}

/// A user's message that is to join a run.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct InputMessage {
    pub id: MessageId,
    pub content: Vec<ContentPart>,
}

/// The mark by which a repeated request is recognised.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Idempotency {
    /// The caller's idempotency key, unique within the conversation.
    pub key: String,
    /// A hash of the whole request.
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

/// How long an intent is left to the process that creates the upstream thread: 10 minutes. That
/// process gives up before.
pub const ORPHAN_AFTER: Duration = Duration::from_mins(10);

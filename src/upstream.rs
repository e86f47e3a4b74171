//! The port to a hosted conversation API: the [`Upstream`] trait in the gateway's words. The adapters are in
//! `upstream/`.

mod assistants;
mod classify;
mod client;
mod patience;
mod relay;
mod responses;
mod sse;
mod tags;
mod wire;

use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::BoxStream;

use crate::config::AssistantConfig;
use crate::domain::{
    ContentPart, ConversationKey, Message, Metadata, RunError, RunId, RunStatus, Timestamp, ToolCall,
    UpstreamRunId, UpstreamThreadId, Usage,
};
use crate::store::InputMessage;

pub use assistants::AssistantsUpstream;
pub use client::{InvalidUpstream, UpstreamClient};
pub use responses::ResponsesUpstream;

/// One configured upstream server.
#[async_trait]
pub trait Upstream: Send + Sync + std::fmt::Debug {
    /// Makes a thread that carries the ownership tags and holds `history`, oldest first. `None` where threads are
    /// chains of responses: there the first run makes it, and has to be given the history.
    ///
    /// If it fails or is dropped half-way, a thread that nobody knows may be left.
    async fn create_thread(
        &self,
        owner: &Ownership,
        history: &[Message],
    ) -> Result<Option<UpstreamThreadId>, UpstreamError>;

    /// Appends the input and starts a run, in one request, and streams its events.
    ///
    /// An error means that the upstream did not accept the run, or that this cannot be known
    /// ([`UpstreamError::is_ambiguous`]). The stream ends with [`UpstreamEvent::Ended`] or an error. Dropping it
    /// stops reading; what then goes on upstream is for [`settle`](Self::settle) to end.
    async fn start(&self, request: StartRun<'_>) -> Result<EventStream, UpstreamError>;

    /// Sees to it that a run which did not end cleanly no longer works on its thread and has left nothing behind
    /// that would break the next turn: an active run is found (by id, or by our tag in its metadata), cancelled
    /// and waited for; function calls that nobody will answer are closed. Harmless to repeat. The caller bounds
    /// it in time and may drop it.
    async fn settle(&self, leftover: &Leftover) -> Result<(), UpstreamError>;
}

/// The events of one run. To be asked until it gives `None`: past [`UpstreamEvent::Ended`] it reads what is left of
/// the answer, for a second at most, so that the connection can serve the next call.
pub type EventStream = BoxStream<'static, Result<UpstreamEvent, UpstreamError>>;

/// Whose thread it is, for the upstream's metadata.
#[derive(Clone, Debug)]
pub struct Ownership {
    pub key: ConversationKey,
    pub thread: crate::domain::ThreadId,
    pub expires_at: Option<Timestamp>,
}

/// A turn to start.
#[derive(Clone, Debug)]
pub struct StartRun<'a> {
    pub run: RunId,
    /// `None` only for the first run of a chain.
    pub thread: Option<&'a UpstreamThreadId>,
    /// Whose thread it is: a chain of responses has no thread upstream that could say so.
    pub owner: &'a Ownership,
    /// What a chain that has to begin anew is told before the input; otherwise empty.
    pub history: &'a [Message],
    pub assistant: &'a AssistantConfig,
    pub input: &'a [InputMessage],
    pub metadata: &'a Metadata,
}

/// What a run may have left behind.
#[derive(Clone, Debug)]
pub struct Leftover {
    pub thread: Option<UpstreamThreadId>,
    pub run: RunId,
    pub upstream_run: Option<UpstreamRunId>,
    /// Function calls that the run asked for and nobody will answer.
    pub open_calls: Vec<ToolCall>,
}

/// What happens during a run.
#[derive(Clone, Debug, PartialEq)]
pub enum UpstreamEvent {
    /// The upstream has accepted the run.
    Accepted(UpstreamRunId),
    /// More text of the reply. Never empty.
    Text(String),
    /// The last event.
    Ended(Box<Ended>),
}

/// How a run ended at the upstream.
#[derive(Clone, Debug, PartialEq)]
pub struct Ended {
    /// `Completed`, `Incomplete`, `Failed`, `Cancelled`, `Expired`, or `RequiresAction` with `tool_calls`.
    pub status: RunStatus,
    /// Why it failed or is incomplete.
    pub error: Option<RunError>,
    /// The authoritative reply, which may differ from the text that was streamed; empty if there is none.
    pub content: Vec<ContentPart>,
    pub upstream_message_id: Option<String>,
    pub usage: Option<Usage>,
    pub tool_calls: Vec<ToolCall>,
    /// Where the thread stands from now on, if the run moved it (chains of responses).
    pub thread: Option<UpstreamThreadId>,
}

/// Why an upstream call failed. No text here repeats credentials, content or what the upstream wrote in prose.
#[derive(Clone, Debug, thiserror::Error)]
pub enum UpstreamError {
    /// Someone else's run holds the thread. Nothing was appended; safe to try again.
    #[error("the upstream thread is held by another run")]
    Busy { blocking_run: Option<UpstreamRunId> },
    /// A 404 that names the thread.
    #[error("the upstream thread is gone")]
    ThreadGone,
    /// A 4xx, or a redirect: our request, key or account was refused. `code` is a word of at most 64 characters.
    #[error("the upstream refused the request with status {status}{}", code.as_ref().map(|c| format!(" ({c})")).unwrap_or_default())]
    Refused { status: u16, code: Option<String> },
    /// A 429. `quota`: waiting does not help.
    #[error("the upstream limits the rate")]
    RateLimited { retry_after: Option<Duration>, quota: bool },
    /// A 5xx, or a failure told where a run was expected.
    #[error("the upstream failed with status {status}")]
    Unavailable { status: u16, retry_after: Option<Duration> },
    /// No connection could be made, so nothing was sent.
    #[error("the upstream cannot be reached")]
    Connect,
    /// The connection broke, or went silent for too long, after the request was sent.
    #[error("the connection to the upstream broke")]
    Broken { timeout: bool },
    /// The answer is not what the protocol says.
    #[error("the upstream answered something unreadable: {0}")]
    Protocol(String),
}

impl UpstreamError {
    /// The upstream may have accepted what was sent.
    pub const fn is_ambiguous(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::Broken { .. } | Self::Protocol(_))
    }
}

//! The port to a hosted conversation API: the [`Upstream`] trait in the gateway's words. The adapters are in
//! `upstream/`.

mod assistants;
mod calls;
mod classify;
mod client;
mod density;
mod finding;
#[cfg(test)]
mod mutation;
mod pace;
mod patience;
mod probe;
mod relay;
mod report;
mod responses;
mod sse;
mod tags;
mod wire;

use std::time::Duration;

use async_trait::async_trait;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;

use crate::config::AssistantConfig;
use crate::domain::{
    ContentPart, KeyNames, Leftover, Message, Metadata, Role, RunError, RunId, RunStatus, ThreadId,
    Timestamp, ToolCall, ToolOutput, UpstreamRunId, UpstreamThreadId, Usage,
};
use crate::store::InputMessage;

pub use assistants::AssistantsUpstream;
pub use client::{InvalidUpstream, UpstreamClient};
pub use pace::Pace;
pub use probe::{Finding, Probe, Verdict, probe};
pub use responses::ResponsesUpstream;

/// One configured upstream server.
#[async_trait]
pub trait Upstream: Send + Sync + std::fmt::Debug {
    /// What the server can do.
    fn capabilities(&self) -> Capabilities;

    /// Makes a thread that carries the ownership tags and holds `history`, oldest first. `None` where threads are
    /// chains of responses: there the first run makes it, and has to be given the history.
    ///
    /// If it fails in a way that is [ambiguous](UpstreamError::is_ambiguous), or is dropped half-way, a thread that nobody
    /// knows may be left.
    async fn create_thread(
        &self,
        owner: &Ownership,
        history: &[Message],
    ) -> Result<Option<UpstreamThreadId>, UpstreamError>;

    /// Appends history and input and starts a run, in one request, and streams its events. What an earlier turn broke
    /// in the thread (open calls, a reasoning item without what it led to) is mended on the way, in the order of the protocols.
    ///
    /// An error means that the upstream did not accept the run, or that this cannot be known, or that it has it already
    /// ([`UpstreamError::is_ambiguous`]; then [`recover`](Self::recover) tells more). The stream ends with
    /// [`UpstreamEvent::Ended`] or an error. Dropping it stops reading; what then goes on upstream is for
    /// [`settle`](Self::settle) to end. A stream that breaks is resumed by itself where the server can do that.
    async fn start(&self, request: StartRun<'_>) -> Result<EventStream, UpstreamError>;

    /// Answers the function calls that a run waits for, all at once, and streams what follows. Errors as for
    /// [`start`](Self::start).
    async fn answer_tools(&self, request: AnswerTools<'_>) -> Result<EventStream, UpstreamError>;

    /// Finds out what became of a request or stream that failed in a way that leaves it open. If it was an
    /// [`answer_tools`](Self::answer_tools) that was not accepted yet, `sent` names the run or response that asked and,
    /// in `open_calls`, the calls that were to be answered; else `open_calls` is empty. The caller bounds it in time
    /// and may drop it.
    ///
    /// Who asks need not have sent it: whoever takes a run over from another process asks with a broken connection as the
    /// failure, and with the run's id if that was told in time. That process may be stopped only, and hold the connection
    /// open, and its request may still be on its way for a moment. What the upstream lets see of that is waited for; the
    /// rest is met by [`start`](Self::start), which is refused with [`UpstreamError::Busy`] while the thread is locked. So
    /// whoever sends after [`Recovered::Absent`] and meets that asks here once more before the next try.
    ///
    /// # Errors
    /// It could not be found out for the moment.
    async fn recover(&self, sent: &Leftover, failure: &UpstreamError) -> Result<Recovered, UpstreamError>;

    /// Waits until it is worth trying again on a thread that something else holds. `cancel`: ends it, if the server
    /// can and the blocker is known; one of our own runs, left over from an earlier turn, is always ended. The
    /// caller bounds it in time and may drop it.
    async fn clear(
        &self,
        thread: &UpstreamThreadId,
        blocking: Option<&UpstreamRunId>,
        cancel: bool,
    ) -> Result<(), UpstreamError>;

    /// Sees to it that a run which did not end cleanly no longer works on its thread and has left nothing behind
    /// that would break the next turn: an active run is found (by id, or by our tag in its metadata), cancelled
    /// and waited for; function calls that nobody will answer are closed. Tells what the thread holds of the run.
    /// Harmless to repeat. The caller bounds it in time and may drop it.
    async fn settle(&self, leftover: &Leftover) -> Result<Settled, UpstreamError>;

    /// Removes from the thread all that a settled run left there: the user's messages, the reply, and what lies
    /// between. Where threads are chains nothing is to be done: the chain simply does not move. Harmless to repeat. The
    /// caller bounds it in time and may drop it.
    ///
    /// # Errors
    /// [`UpstreamError::Refused`] with 404, 405 or 501 if the server does not delete messages, among others.
    async fn remove(&self, leftover: &Leftover) -> Result<(), UpstreamError>;

    /// Deletes an upstream thread and all that is in it, and makes sure that it is gone: runs that work on it are ended,
    /// what outlives its thread is deleted one by one before it, which counts in `items` as it happens. Where threads
    /// are chains, the response of that id. Harmless to repeat; may be dropped.
    ///
    /// # Errors
    /// It is not known to be gone, and another try may end otherwise.
    async fn delete_thread(
        &self,
        thread: &UpstreamThreadId,
        pace: &Pace,
        items: &mut Items,
    ) -> Result<Disposal, UpstreamError>;

    /// Deletes a run that the server stores by itself ([`Capabilities::stores_runs`]), and ends it before if it is still
    /// at work. Harmless to repeat; may be dropped.
    ///
    /// # Errors
    /// It is not known to be gone, and another try may end otherwise.
    async fn delete_run(&self, run: &UpstreamRunId, pace: &Pace) -> Result<Disposal, UpstreamError>;

    /// A page of the messages of a thread, oldest first, from its beginning or after the one of that id. `None` where it
    /// cannot be asked for: threads are chains, or the server has no such list.
    ///
    /// # Errors
    /// [`UpstreamError::ThreadGone`] if there is no such thread.
    async fn history(
        &self,
        thread: &UpstreamThreadId,
        after: Option<&str>,
        pace: &Pace,
    ) -> Result<Option<HistoryPage>, UpstreamError>;

    /// The upstream threads that were made for a thread of ours, by the tags that they carry. `None` where the server
    /// cannot list threads, or has so many that none was found among the newest 5000.
    async fn find_threads(
        &self,
        of: ThreadId,
        pace: &Pace,
    ) -> Result<Option<Vec<UpstreamThreadId>>, UpstreamError>;
}

/// What an upstream server can do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Capabilities {
    /// How long a thread can stay locked after its run has ended.
    pub lock_window: Duration,
    /// Threads are things of their own at the server. If not, they are chains of responses.
    pub has_threads: bool,
    /// Runs are kept apart from their thread, and are not deleted with it.
    pub stores_runs: bool,
    /// A run goes on though nobody reads it, and only who has heard its id can end it.
    pub goes_on_unread: bool,
}

/// What became of something that was to be deleted at the server.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Disposal {
    Deleted,
    /// The server did not have it (any more).
    AlreadyGone,
    /// The server does not offer the deletion, so it may still be there.
    NotSupported,
}

/// The items of an upstream thread that was to be deleted.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Items {
    /// Deleted one by one.
    pub deleted: u64,
    /// Listed by a server that does not delete them, at least so many.
    pub left: u64,
}

/// Messages of an upstream thread in a row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HistoryPage {
    pub entries: Vec<HistoryEntry>,
    /// Where the next page begins; `None`: this was the last one.
    pub next: Option<String>,
}

/// A message as an upstream thread holds it.
#[derive(Clone, Debug, PartialEq)]
pub struct HistoryEntry {
    pub id: String,
    pub role: Role,
    /// What of it the gateway can hold; parts of other kinds are left out.
    pub content: Vec<ContentPart>,
    pub created_at: Option<Timestamp>,
    /// It carries our tag, so it is ours.
    pub is_tagged: bool,
}

/// The events of one run. To be asked until it gives `None`: past [`UpstreamEvent::Ended`] it reads what is left of
/// the answer, for a second at most, so that the connection can serve the next call.
pub type EventStream = BoxStream<'static, Result<UpstreamEvent, UpstreamError>>;

/// Reads what is left of an answer, so that its connection can be used again. The stream itself bounds that.
pub async fn drain(rest: EventStream) {
    rest.for_each(|_| std::future::ready(())).await;
}

/// Whose thread it is, for the upstream's metadata.
#[derive(Clone, Debug)]
pub struct Ownership {
    /// In clear or in fingerprints, as the upstream may know them.
    pub names: KeyNames,
    pub thread: ThreadId,
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
    /// Earlier messages that the thread lacks, oldest first: they are sent before the input.
    pub history: &'a [Message],
    pub assistant: &'a AssistantConfig,
    pub input: &'a [InputMessage],
    pub metadata: &'a Metadata,
}

/// Answers to the function calls of a run.
#[derive(Clone, Debug)]
pub struct AnswerTools<'a> {
    pub run: RunId,
    /// `None` for the first run of a chain.
    pub thread: Option<&'a UpstreamThreadId>,
    pub owner: &'a Ownership,
    /// The run, or the response that made the calls. `None` if the calls were found in the thread alone: then the thread
    /// is enough to answer them.
    pub upstream_run: Option<&'a UpstreamRunId>,
    pub assistant: &'a AssistantConfig,
    pub outputs: &'a [ToolOutput],
    pub metadata: &'a Metadata,
}

/// What became of a request or stream that failed.
#[expect(missing_debug_implementations, reason = "a stream has none")]
pub enum Recovered {
    /// The upstream has the run, and this tells it to its end. Its texts, if there are any, are those of the current
    /// round from its beginning, whatever was told before, and may stop short of the end; that holds the whole reply, and
    /// where rounds share a run, what earlier rounds said before it. It may name no run, where only the thread tells of it.
    Running(EventStream),
    /// The upstream provably does not have it: it can be sent again.
    Absent,
    /// It cannot be told; it must not be sent again.
    Unknown,
}

/// What the thread holds of a run that did not end cleanly.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settled {
    /// The user's messages are in the thread, and with them the history that went along.
    pub said: bool,
    /// They are not, but might still come in: what was cut off just now may not have stopped yet.
    pub unsure: bool,
    /// How the run ended, if the upstream can say: `Completed` if a cancel came too late.
    pub status: Option<RunStatus>,
    pub usage: Option<Usage>,
    /// The reply, as far as the thread holds it; empty if it holds none.
    pub content: Vec<ContentPart>,
    pub upstream_message_id: Option<String>,
    /// Where the thread stands from now on, if the run moved it after all (chains of responses).
    pub thread: Option<UpstreamThreadId>,
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

impl Ended {
    /// The run waits for the outputs of function calls.
    pub fn asks(&self) -> bool {
        self.status == RunStatus::RequiresAction && !self.tool_calls.is_empty()
    }
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
    /// A 4xx, a redirect, or a 501: our request, key or account was refused. `code` is a word of at most 64 characters.
    /// `missing`: the server says, in whatever words, that what was asked for is not there.
    #[error("the upstream refused the request with status {status}{}", in_brackets(code.as_deref()))]
    Refused { status: u16, code: Option<String>, missing: bool },
    /// The server has no such path, so no turn can begin with it as it is configured. `remedy`: what the operator does.
    #[error("the upstream has no `{path}`; the operator of the gateway can mend that: {remedy}")]
    NotOffered { path: &'static str, remedy: &'static str },
    /// A 429. `quota`: waiting does not help. `code` as for [`Refused`](Self::Refused).
    #[error("the upstream limits the rate{}", in_brackets(code.as_deref()))]
    RateLimited { retry_after: Option<Duration>, quota: bool, code: Option<String> },
    /// A 5xx but 501, or an error in a stream which says that waiting helps. `no_retry`: the server says that trying again
    /// does not help. `code` as for [`Refused`](Self::Refused).
    #[error("the upstream failed with status {status}{}", in_brackets(code.as_deref()))]
    Unavailable { status: u16, retry_after: Option<Duration>, no_retry: bool, code: Option<String> },
    /// Nothing was sent: no connection could be made, or what has to be asked first had no answer.
    #[error("the upstream cannot be reached")]
    Connect,
    /// The connection broke after the request was sent. `timeout`: we gave it up ourselves, and it says nothing of what
    /// the upstream does: a request that may have been taken is never sent again after that.
    #[error("{}", if *timeout { "the upstream did not answer in time" } else { "the connection to the upstream broke" })]
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

    /// The connection broke, or somebody between us and the server lost it or gave it up: proxies say so with 502 and 504,
    /// Cloudflare with 520 and 524, some servers with 408. None of that tells what the server does.
    pub const fn breaks_off(&self) -> bool {
        matches!(self, Self::Broken { .. } | Self::Unavailable { status: 408 | 502 | 504 | 520 | 524, .. })
    }

    /// The server was not reached, broke off, or is broken as it says. A refusal, a limit on the rate and silence say nothing
    /// of the kind.
    pub const fn tells_outage(&self) -> bool {
        matches!(
            self,
            Self::Connect | Self::Broken { timeout: false } | Self::Unavailable { status: 500.., .. }
        )
    }
}

fn in_brackets(code: Option<&str>) -> String {
    code.map(|code| format!(" ({code})")).unwrap_or_default()
}

//! The trait that every adapter implements, in the gateway's words.

use std::time::Duration;

use async_trait::async_trait;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;

use crate::config::AssistantConfig;
use crate::domain::{
    ContentPart, KeyNames, Message, Metadata, Role, RunError, RunId, RunStatus, TextDelta,
    ThreadId, Timestamp, ToolCall, ToolOutput, UnsettledRun, UpstreamRunId, UpstreamThreadId,
    Usage,
};
use crate::store::InputMessage;
use crate::upstream::error::UpstreamError;
use crate::upstream::rate_limiter::RateLimiter;
use crate::upstream::retry::jittered_delay;

/// One configured upstream server.
///
/// A new adapter needs:
///
/// 1. `wire.rs`: the shapes of the answers that it reads. `upstream/wire.rs` has lists, usage and
///    failures.
/// 2. `request.rs`: the bodies of requests, from `body_of` and the tags beside it in
///    `upstream/tags.rs`.
/// 3. `stream.rs`: a `Decoder` (`upstream/relay.rs`) that translates each event of a stream.
///    `StreamedParts` assembles the reply.
/// 4. The three methods of this trait without a default: `capabilities`, `start` and
///    `answer_tools`.
/// 5. For [`Capabilities::has_threads`] also `create_thread`, `settle`, `remove` and
///    `delete_thread`. For [`Capabilities::stores_runs`] also `delete_run`. A claimed capability
///    without its method fails with a protocol error.
/// 6. Where the server can tell more: `recover`, `clear`, `history` (with `history_page`),
///    `find_threads` (with `find`).
/// 7. A kind in the configuration, and a branch in `app.rs` and in `probe.rs`. `config/check.rs`
///    holds the kind's reserved parameters and what an assistant of it needs. `config/tools.rs`
///    holds the forms of its tools.
///
/// `UpstreamClient`, `RetryingClient` and `relay` provide connections, time limits, retries, size
/// limits, and the classification of refusals.
#[async_trait]
pub trait Upstream: Send + Sync + std::fmt::Debug {
    /// Returns what the server can do.
    fn capabilities(&self) -> Capabilities;

    /// Creates a thread at the server with the ownership tags and `history`, oldest first.
    ///
    /// Returns `None`, as the default does, where threads are chains of responses. There the
    /// first run creates the chain and gets the history.
    ///
    /// An [ambiguous](UpstreamError::is_ambiguous) failure, or a dropped future, may leave a
    /// thread whose id the gateway does not know.
    async fn create_thread(
        &self,
        _owner: &Ownership,
        _history: &[Message],
    ) -> Result<Option<UpstreamThreadId>, UpstreamError> {
        self.capabilities()
            .no_threads("create_thread")
            .map(|()| None)
    }

    /// Appends history and input, starts a run, all in one request, and streams the run's events.
    /// The adapter repairs what an earlier run broke in the thread: calls without an output, and
    /// reasoning without the item that must follow it.
    ///
    /// An error has one of three meanings: the server did not accept the run, nobody can know, or
    /// the server has the run already. [`UpstreamError::is_ambiguous`] tells the last two from
    /// the first. [`recover`](Self::recover) finds out more.
    ///
    /// The stream ends with [`UpstreamEvent::Ended`] or an error. An adapter resumes a broken
    /// stream where the server can. Dropping the stream only stops the reading;
    /// [`settle`](Self::settle) ends a run that continues at the server.
    async fn start(&self, request: StartRun<'_>) -> Result<EventStream, UpstreamError>;

    /// Answers all calls that a run waits for, and streams the events that follow.
    /// Errors have the same meanings as for [`start`](Self::start).
    async fn answer_tools(&self, request: AnswerTools<'_>) -> Result<EventStream, UpstreamError>;

    /// Finds out the fate of a request or stream that failed and left it open. The caller bounds
    /// the time, and may drop the future.
    ///
    /// For an [`answer_tools`](Self::answer_tools) that was not accepted yet, `sent` names the
    /// run that made the calls, and its `open_calls` are the calls to answer. Otherwise
    /// `open_calls` is empty.
    ///
    /// The caller may be another process than the sender:
    ///
    /// - A process that takes a run over passes a broken connection as the failure, and the run's
    ///   id if the store has it.
    /// - The sender may only be paused, so its request may still arrive. The adapter waits for
    ///   what the server shows of it.
    /// - A request that arrives later meets the lock of the thread: [`start`](Self::start) is
    ///   refused with [`UpstreamError::Busy`]. A caller that sends after [`Recovered::Absent`]
    ///   and is refused so calls `recover` once more before its next try.
    ///
    /// The default is [`Recovered::Unknown`], so that nothing is sent twice.
    ///
    /// # Errors
    /// The fate cannot be found out for the moment.
    async fn recover(
        &self,
        _sent: &UnsettledRun,
        _failure: &UpstreamError,
    ) -> Result<Recovered, UpstreamError> {
        Ok(Recovered::Unknown)
    }

    /// Returns why the server can take no user's message with this content; `None` if it may.
    fn refuses(&self, _content: &[ContentPart]) -> Option<&'static str> {
        None
    }

    /// Waits until a try on a thread that another run holds may succeed. With `cancel` the
    /// adapter ends the blocking run, if it is known and the server can. The adapter always ends
    /// a blocking run that carries the gateway's tag: an earlier run left it behind.
    ///
    /// The default waits between 0.5 and 1 second. The caller bounds the time, and may drop the
    /// future.
    async fn clear(
        &self,
        _thread: &UpstreamThreadId,
        _blocking: Option<&UpstreamRunId>,
        _cancel: bool,
    ) -> Result<(), UpstreamError> {
        jittered_delay().await;
        Ok(())
    }

    /// Makes sure that a run which did not end cleanly no longer works, and left nothing that
    /// breaks the next run. The adapter finds an active run by its id or by the gateway's tag,
    /// cancels it, and waits for its end. It closes calls that nobody will answer.
    ///
    /// Returns what the thread holds of the run; by default nothing.
    ///
    /// Safe to repeat. The caller bounds the time, and may drop the future.
    async fn settle(&self, _unsettled_run: &UnsettledRun) -> Result<Settled, UpstreamError> {
        self.capabilities()
            .no_threads("settle")
            .map(|()| Settled::default())
    }

    /// Removes all items of a settled run from its thread: the user's messages, the reply, and
    /// the items between them. In a chain of responses there is nothing to remove, because a
    /// run that is removed does not move the chain.
    ///
    /// Safe to repeat. The caller bounds the time, and may drop the future.
    ///
    /// # Errors
    /// [`UpstreamError::Refused`] with 404, 405 or 501 if the server does not delete
    /// messages, among others.
    async fn remove(&self, _unsettled_run: &UnsettledRun) -> Result<(), UpstreamError> {
        self.capabilities().no_threads("remove")
    }

    /// Deletes a thread with its content, and makes sure that it is gone. The adapter first ends
    /// the active runs of the thread. Then it deletes, one by one, the items that would outlive
    /// the thread, and counts them in `items`. Of a chain it deletes the response with that id.
    ///
    /// Safe to repeat, and to drop.
    ///
    /// # Errors
    /// The thread may still be there; another try may succeed.
    async fn delete_thread(
        &self,
        _thread: &UpstreamThreadId,
        _limiter: &RateLimiter,
        _items: &mut Items,
    ) -> Result<Disposal, UpstreamError> {
        self.capabilities()
            .no_threads("delete_thread")
            .map(|()| Disposal::AlreadyGone)
    }

    /// Deletes a run that the server stores apart from its thread
    /// ([`Capabilities::stores_runs`]), and ends it first if it is active. By default a run is
    /// deleted with its thread.
    ///
    /// Safe to repeat, and to drop.
    ///
    /// # Errors
    /// The run may still be there; another try may succeed.
    async fn delete_run(
        &self,
        _run: &UpstreamRunId,
        _limiter: &RateLimiter,
    ) -> Result<Disposal, UpstreamError> {
        if self.capabilities().stores_runs {
            Err(unwritten("delete_run"))
        } else {
            Ok(Disposal::AlreadyGone)
        }
    }

    /// Returns a page of a thread's messages, oldest first, from its beginning or after the
    /// message `after`. Returns `None`, as the default does, where threads are chains or the
    /// server has no such list.
    ///
    /// # Errors
    /// [`UpstreamError::ThreadGone`] if there is no such thread.
    async fn history(
        &self,
        _thread: &UpstreamThreadId,
        _after: Option<&str>,
        _limiter: &RateLimiter,
    ) -> Result<Option<HistoryPage>, UpstreamError> {
        Ok(None)
    }

    /// Returns the threads at the server that carry the tags of the gateway's thread `of`.
    /// Returns `None` if the server cannot list threads, or if none of its newest 5000 matches.
    /// The default returns an empty list where threads are chains, and `None` elsewhere.
    async fn find_threads(
        &self,
        _of: ThreadId,
        _limiter: &RateLimiter,
    ) -> Result<Option<Vec<UpstreamThreadId>>, UpstreamError> {
        Ok(if self.capabilities().has_threads {
            None
        } else {
            Some(Vec::new())
        })
    }
}

/// What an upstream server can do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub struct Capabilities {
    /// Longest time that a thread stays locked after its run has ended.
    pub lock_window: Duration,
    /// The server has threads as objects of their own. If not, threads are chains of responses.
    pub has_threads: bool,
    /// The server stores runs apart from their thread, and does not delete them with it.
    pub stores_runs: bool,
    /// A run continues although nobody reads its stream, and only its id lets a caller end it.
    pub goes_on_unread: bool,
    /// The output of a call may be a list of parts.
    pub takes_output_parts: bool,
    /// A failed run leaves its messages in the thread, and a further run needs no message of its
    /// own.
    pub runs_without_input: bool,
}

impl Capabilities {
    /// Succeeds for an upstream without threads. The default bodies of [`Upstream`] are right for
    /// no other.
    fn no_threads(self, method: &str) -> Result<(), UpstreamError> {
        if self.has_threads {
            Err(unwritten(method))
        } else {
            Ok(())
        }
    }
}

/// Returns the error for a capability that an adapter claims without implementing its method.
fn unwritten(method: &str) -> UpstreamError {
    UpstreamError::Protocol(format!(
        "the adapter of this upstream does not implement `{method}`"
    ))
}

/// The result of a deletion at the server.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Disposal {
    Deleted,
    /// The server no longer had it, or never did.
    AlreadyGone,
    /// The server does not offer the deletion, so it may still be there.
    NotSupported,
}

/// Returns the error of making a thread that did not get its whole history. Such a thread is of no
/// use. `deleted`: the result of its deletion.
pub(super) fn without_history(
    error: UpstreamError,
    deleted: &Result<Disposal, UpstreamError>,
) -> UpstreamError {
    match deleted {
        Ok(Disposal::Deleted | Disposal::AlreadyGone) => error,
        Ok(Disposal::NotSupported) | Err(_) => UpstreamError::Protocol(
            "a new thread could neither get its history nor be deleted".to_owned(),
        ),
    }
}

/// Counts of the items of an upstream thread that was to be deleted.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Items {
    /// Items that were deleted one by one.
    pub deleted: u64,
    /// Items that the server lists but does not delete; a lower bound.
    pub left: u64,
}

/// Consecutive messages of an upstream thread.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HistoryPage {
    pub entries: Vec<HistoryEntry>,
    /// The cursor of the next page; `None` on the last page.
    pub next: Option<String>,
}

/// A message as an upstream thread holds it.
#[derive(Clone, Debug, PartialEq)]
pub struct HistoryEntry {
    pub id: String,
    pub role: Role,
    /// The parts that the gateway can hold; other kinds are left out.
    pub content: Vec<ContentPart>,
    pub created_at: Option<Timestamp>,
    /// The message carries the gateway's tag, so the gateway wrote it.
    pub is_tagged: bool,
}

/// The events of one run. Poll it until it yields `None`: after [`UpstreamEvent::Ended`] it reads
/// the rest of the answer for a bounded moment, so that the connection can serve the next call.
pub type EventStream = BoxStream<'static, Result<UpstreamEvent, UpstreamError>>;

/// Reads the rest of an answer, so that its connection can be used again. The stream itself
/// bounds the time.
pub async fn drain(rest: EventStream) {
    rest.for_each(|_| std::future::ready(())).await;
}

/// The owner of a thread, for the upstream's metadata.
#[derive(Clone, Debug)]
pub struct Ownership {
    /// The names in clear or as fingerprints, as the configuration allows the upstream to see
    /// them.
    pub names: KeyNames,
    pub thread: ThreadId,
    pub expires_at: Option<Timestamp>,
}

/// A run to start.
#[derive(Clone, Debug)]
pub struct StartRun<'a> {
    pub run: RunId,
    /// `None` only for the first run of a chain.
    pub thread: Option<&'a UpstreamThreadId>,
    /// The owner of the thread. A chain of responses has no upstream thread to carry it.
    pub owner: &'a Ownership,
    /// Earlier messages that the thread lacks, oldest first. They are sent before the input.
    pub history: &'a [Message],
    pub assistant: &'a AssistantConfig,
    /// Empty only for a thread that has the messages already
    /// ([`Capabilities::runs_without_input`]).
    pub input: &'a [InputMessage],
    pub metadata: &'a Metadata,
}

/// Answers to the calls of a run.
#[derive(Clone, Debug)]
pub struct AnswerTools<'a> {
    pub run: RunId,
    /// `None` for the first run of a chain.
    pub thread: Option<&'a UpstreamThreadId>,
    pub owner: &'a Ownership,
    /// The run, or the response, that made the calls. `None` if the gateway found the calls only
    /// in the thread; then the thread is enough to answer them.
    pub upstream_run: Option<&'a UpstreamRunId>,
    pub assistant: &'a AssistantConfig,
    pub outputs: &'a [ToolOutput],
    pub metadata: &'a Metadata,
}

/// The fate of a request or stream that failed.
#[expect(missing_debug_implementations, reason = "a stream has none")]
pub enum Recovered {
    /// The upstream has the run, and this stream relays it to its end.
    ///
    /// - Its texts, if any, are those of the current round from its beginning, whatever was
    ///   relayed before. They may stop short of the end.
    /// - The end holds the whole reply. Where rounds share a run, that includes the texts of
    ///   earlier rounds.
    /// - It may name no run, where only the thread holds traces of it.
    Running(EventStream),
    /// The upstream provably does not have the request. It can be sent again.
    Absent,
    /// Nobody can know. It must not be sent again.
    Unknown,
}

/// The traces that the thread holds of a run that did not end cleanly.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settled {
    /// The user's messages are in the thread, and the history that was sent with them.
    pub said: bool,
    /// The user's messages are not in the thread but may still arrive: a request that was just
    /// cut off may not have stopped yet.
    pub unsure: bool,
    /// The run's final status, if the upstream knows it; `Completed` if a cancel came too late.
    pub status: Option<RunStatus>,
    pub usage: Option<Usage>,
    /// The part of the reply that the thread holds; empty if it holds none.
    pub content: Vec<ContentPart>,
    pub upstream_message_id: Option<String>,
    /// The new end of the chain, if the run moved it after all (chains of responses).
    pub thread: Option<UpstreamThreadId>,
}

impl Settled {
    /// Returns whether the upstream thread keeps history that was sent with the run, also after
    /// the run's own messages are removed. A chain continues from before the run, so it keeps none.
    pub fn has_history_of(&self, left: &UnsettledRun) -> bool {
        left.synced && self.said && self.thread.is_none()
    }
}

/// An event of a run.
#[derive(Clone, Debug, PartialEq)]
pub enum UpstreamEvent {
    /// The upstream has accepted the run.
    Accepted(UpstreamRunId),
    /// The next text of the reply. Never empty.
    Text(TextDelta),
    /// The last event.
    Ended(Box<Ended>),
}

/// The end of a run at the upstream.
#[derive(Clone, Debug, PartialEq)]
pub struct Ended {
    /// `Completed`, `Incomplete`, `Failed`, `Cancelled`, `Expired`, or `RequiresAction` with
    /// `tool_calls`.
    pub status: RunStatus,
    /// The reason why the run failed or is incomplete. Of a completed run without content, the reason
    /// why it has none.
    pub error: Option<RunError>,
    /// The authoritative reply, which may differ from the streamed text; empty if there is none. Its
    /// messages are numbered from 0.
    pub content: Vec<ContentPart>,
    pub upstream_message_id: Option<String>,
    pub usage: Option<Usage>,
    pub tool_calls: Vec<ToolCall>,
    /// The new end of the chain, if the run moved it (chains of responses).
    pub thread: Option<UpstreamThreadId>,
    /// The failure as a refusal of the request, if the run said nothing, called no tool and failed
    /// for a cause that may pass, such as a rate limit, or that another thread or a shorter history may avoid.
    pub refusal: Option<UpstreamError>,
}

impl Ended {
    /// Returns true if the run waits for the outputs of function calls.
    pub fn asks(&self) -> bool {
        self.status == RunStatus::RequiresAction && !self.tool_calls.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The smallest possible adapter.
    #[derive(Debug)]
    struct Least(Capabilities);

    #[async_trait]
    impl Upstream for Least {
        fn capabilities(&self) -> Capabilities {
            self.0
        }

        async fn start(&self, _: StartRun<'_>) -> Result<EventStream, UpstreamError> {
            Err(UpstreamError::Connect)
        }

        async fn answer_tools(&self, _: AnswerTools<'_>) -> Result<EventStream, UpstreamError> {
            Err(UpstreamError::Connect)
        }
    }

    fn least(has_threads: bool, stores_runs: bool) -> Least {
        Least(Capabilities {
            lock_window: Duration::ZERO,
            has_threads,
            stores_runs,
            goes_on_unread: false,
            takes_output_parts: false,
            runs_without_input: false,
        })
    }

    #[tokio::test]
    async fn adapter_of_three_methods_keeps_nothing_upstream() {
        let (upstream, limiter) = (least(false, false), RateLimiter::UNBOUND);
        let (thread, run) = (
            UpstreamThreadId("t_1".to_owned()),
            UpstreamRunId("r_1".to_owned()),
        );
        let deleted = upstream
            .delete_thread(&thread, &limiter, &mut Items::default())
            .await;
        assert_eq!(deleted.unwrap(), Disposal::AlreadyGone);
        assert_eq!(
            upstream.delete_run(&run, &limiter).await.unwrap(),
            Disposal::AlreadyGone
        );
        assert_eq!(
            upstream.history(&thread, None, &limiter).await.unwrap(),
            None
        );
        assert_eq!(
            upstream
                .find_threads(ThreadId::new(), &limiter)
                .await
                .unwrap(),
            Some(Vec::new())
        );
    }

    #[tokio::test]
    async fn claimed_capability_without_its_method_fails() {
        let (upstream, limiter) = (least(true, true), RateLimiter::UNBOUND);
        let (thread, run) = (
            UpstreamThreadId("t_1".to_owned()),
            UpstreamRunId("r_1".to_owned()),
        );
        let deleted = upstream
            .delete_thread(&thread, &limiter, &mut Items::default())
            .await;
        assert!(matches!(deleted, Err(UpstreamError::Protocol(_))));
        assert!(matches!(
            upstream.delete_run(&run, &limiter).await,
            Err(UpstreamError::Protocol(_))
        ));
        assert_eq!(
            upstream
                .find_threads(ThreadId::new(), &limiter)
                .await
                .unwrap(),
            None
        );
    }
}

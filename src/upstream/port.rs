//! The port that every adapter implements, in the gateway's words.

use std::time::Duration;

use async_trait::async_trait;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;

use crate::config::AssistantConfig;
use crate::domain::{
    ContentPart, KeyNames, Message, Metadata, Role, RunError, RunId, RunStatus, ThreadId,
    Timestamp, ToolCall, ToolOutput, UnsettledRun, UpstreamRunId, UpstreamThreadId, Usage,
};
use crate::store::InputMessage;
use crate::upstream::error::UpstreamError;
use crate::upstream::rate_limiter::RateLimiter;
use crate::upstream::retry::jittered_delay;

/// One configured upstream server.
///
/// What a new adapter writes:
///
/// 1. `wire.rs`: the shapes of the answers that it reads. `upstream/wire.rs` has lists, usage and failures.
/// 2. `request.rs`: the bodies of requests, from `body_of` and the tags beside it in `upstream/tags.rs`.
/// 3. `stream.rs`: a `Decoder` (`upstream/relay.rs`), which says what each event of a stream means. `StreamedParts`
///    puts the reply together.
/// 4. Of this trait the three methods without a body: `capabilities`, `start` and `answer_tools`.
/// 5. For [`Capabilities::has_threads`] also `create_thread`, `settle`, `remove` and `delete_thread`; for
///    [`Capabilities::stores_runs`] also `delete_run`. A capability whose method is missing fails as a protocol error.
/// 6. Where the server can tell more: `recover`, `clear`, `history` (with `history_page`), `find_threads` (with `find`).
/// 7. A kind in the configuration (`config/check.rs` has its reserved parameters and what an assistant needs,
///    `config/tools.rs` the forms of its tools), and a branch in `app.rs` and in `probe.rs`.
///
/// `UpstreamClient`, `RetryingClient` and `relay` bring the connections, the time limits, the retries, the limits on
/// sizes, and the meaning of refusals.
#[async_trait]
pub trait Upstream: Send + Sync + std::fmt::Debug {
    /// What the server can do.
    fn capabilities(&self) -> Capabilities;

    /// A thread at the server with the ownership tags and `history`, oldest first. `None` where threads are chains of
    /// responses: the first run makes the chain, and gets the history. `None` is the default.
    ///
    /// An [ambiguous](UpstreamError::is_ambiguous) failure, or a dropped future, may leave a thread that nobody knows.
    async fn create_thread(
        &self,
        _owner: &Ownership,
        _history: &[Message],
    ) -> Result<Option<UpstreamThreadId>, UpstreamError> {
        self.capabilities()
            .no_threads("create_thread")
            .map(|()| None)
    }

    /// Appends history and input, starts a run, in one request, and streams its events. An adapter repairs what an earlier
    /// turn broke in the thread: calls without an output, reasoning without what it led to.
    ///
    /// An error has one of three meanings: the server did not accept the run; this cannot be known; or the server has it
    /// already. [`UpstreamError::is_ambiguous`] tells the last two from the first, and [`recover`](Self::recover) tells more.
    ///
    /// The stream ends with [`UpstreamEvent::Ended`] or an error. An adapter resumes a broken stream where the server can.
    /// Dropping the stream only stops the reading; [`settle`](Self::settle) ends what goes on at the server.
    async fn start(&self, request: StartRun<'_>) -> Result<EventStream, UpstreamError>;

    /// Answers all function calls that a run waits for, and streams what follows. Errors as for [`start`](Self::start).
    async fn answer_tools(&self, request: AnswerTools<'_>) -> Result<EventStream, UpstreamError>;

    /// The fate of a request or stream that failed and left it open. The caller bounds the time, and may drop the future.
    ///
    /// For an [`answer_tools`](Self::answer_tools) that was not accepted yet, `sent` names the run that asked, and its
    /// `open_calls` are the calls to be answered. Otherwise `open_calls` is empty.
    ///
    /// The caller may be another process than the sender. A process that takes a run over gives a broken connection as the
    /// failure, and the run's id if the store has it. The sender may only be stopped, so its request may still arrive. The
    /// adapter waits for what the server shows of it. [`start`](Self::start) meets the rest: it is refused with
    /// [`UpstreamError::Busy`] while the thread is locked. A caller that sends after [`Recovered::Absent`] and meets that
    /// asks here once more before its next try.
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

    /// Waits until a try on a thread that another run holds may succeed. `cancel`: the adapter ends the blocking run, if it
    /// is known and the server can. The adapter always ends one of our own runs that an earlier turn left behind.
    ///
    /// The default waits for a moment. The caller bounds the time, and may drop the future.
    async fn clear(
        &self,
        _thread: &UpstreamThreadId,
        _blocking: Option<&UpstreamRunId>,
        _cancel: bool,
    ) -> Result<(), UpstreamError> {
        jittered_delay().await;
        Ok(())
    }

    /// Makes sure that a run which did not end cleanly no longer works, and left nothing that breaks the next turn. The
    /// adapter finds an active run by its id or by our tag, cancels it, and waits for its end. It closes function calls
    /// that nobody will answer. The result tells what the thread holds of the run; by default nothing.
    ///
    /// Harmless to repeat. The caller bounds the time, and may drop the future.
    async fn settle(&self, _unsettled_run: &UnsettledRun) -> Result<Settled, UpstreamError> {
        self.capabilities()
            .no_threads("settle")
            .map(|()| Settled::default())
    }

    /// Removes all that a settled run left in its thread: the user's messages, the reply, and the items between them. A chain
    /// of responses has nothing to remove, for it does not move.
    ///
    /// Harmless to repeat. The caller bounds the time, and may drop the future.
    ///
    /// # Errors
    /// [`UpstreamError::Refused`] with 404, 405 or 501 if the server does not delete messages, among others.
    async fn remove(&self, _unsettled_run: &UnsettledRun) -> Result<(), UpstreamError> {
        self.capabilities().no_threads("remove")
    }

    /// Deletes a thread with its content, and makes sure that it is gone. The adapter first ends the runs at work there, then
    /// deletes one by one what outlives the thread, and counts that in `items`. Of a chain it deletes the response of that id.
    ///
    /// Harmless to repeat; may be dropped.
    ///
    /// # Errors
    /// The thread may still be there, and another try may end otherwise.
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

    /// Deletes a run that the server stores by itself ([`Capabilities::stores_runs`]); ends it first if it is at work. By
    /// default a run goes with its thread.
    ///
    /// Harmless to repeat; may be dropped.
    ///
    /// # Errors
    /// The run may still be there, and another try may end otherwise.
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

    /// A page of a thread's messages, oldest first, from its beginning or after the message `after`. `None`, the default,
    /// where threads are chains, or the server has no such list.
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

    /// The threads at the server that carry the tags of a thread of ours. `None` if the server cannot list threads, or none
    /// is among its newest 5000. The default finds none where threads are chains, and else cannot list.
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

impl Capabilities {
    /// The default bodies of [`Upstream`] serve an upstream without threads, and no other.
    fn no_threads(self, method: &str) -> Result<(), UpstreamError> {
        if self.has_threads {
            Err(unwritten(method))
        } else {
            Ok(())
        }
    }
}

/// The error of a capability that an adapter claims without the method for it.
fn unwritten(method: &str) -> UpstreamError {
    UpstreamError::Protocol(format!("the adapter of this upstream has no `{method}`"))
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The least that an adapter can be.
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

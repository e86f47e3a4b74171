//! How runs end: cleanly or not, what they leave upstream, and the commit before the announcement.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::time::{sleep, timeout};

use super::feed::FeedWriter;
use super::{Outcome, RunEvent, Runs, jittered};
use crate::domain::{
    ContentPart, MessageId, Run, RunError, RunErrorCode, RunStatus, Thread, ThreadActivity, ThreadState,
    ToolCall,
};
use crate::store::{Finished, Reply, RunEnd, RunLease, StoreError};
use crate::upstream::{Ended, Leftover, Upstream, UpstreamError};

/// How long to try to end what a run left upstream once the process is told to stop.
const LAST_SETTLE_TIMEOUT: Duration = Duration::from_secs(2);

/// Ends what the run left upstream, within a bound; what cannot be ended is logged.
pub(super) async fn settle(runs: &Runs, upstream: &dyn Upstream, leftover: &Leftover) {
    let parts = &runs.parts.given;
    let whole = parts.runs.settle_timeout;
    let limit = if parts.stop.is_cancelled() { whole.min(LAST_SETTLE_TIMEOUT) } else { whole };
    // A panic in here must not keep the run from ending.
    let settled = AssertUnwindSafe(upstream.settle(leftover)).catch_unwind();
    match timeout(limit, settled).await {
        Ok(Ok(Ok(()))) => {}
        Ok(Err(_)) => tracing::error!("ending what the run left upstream panicked"),
        Ok(Ok(Err(error))) => {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "what the run left upstream could not be ended"
            );
        }
        Err(_) => tracing::warn!("what the run left upstream could not be ended in time"),
    }
}

/// Commits the end, then announces it.
pub(super) async fn finish(
    runs: &Runs,
    lease: &RunLease,
    end: RunEnd,
    thread: &Thread,
    run: &Run,
    retry_after: Option<Duration>,
    feed: &FeedWriter,
) {
    let Some(finished) = finish_in_store(runs, lease, end).await else {
        lease_lost(runs, thread, run, feed).await;
        return;
    };
    let Finished { thread, activity, run, message } = finished;
    announce(feed, Outcome { thread, activity, run, message, retry_after });
}

/// Commits the end of a run, for as long as it takes: a run that has ended upstream must not stay open here. An end
/// that the database does not take is replaced by a bare failure. `None` if the run is not ours to end, or if the
/// process is told to stop while the database is away.
pub(super) async fn finish_in_store(runs: &Runs, lease: &RunLease, mut end: RunEnd) -> Option<Finished> {
    let parts = &runs.parts.given;
    let mut pause = Duration::from_millis(50);
    loop {
        match parts.store.finish(lease, &end).await {
            Ok(finished) => return finished,
            Err(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "cannot record the end of a run yet"
                );
                if parts.stop.is_cancelled() {
                    return None;
                }
                if !matches!(error, StoreError::Unavailable(_)) {
                    end = failed_end(RunStatus::Failed, internal());
                }
                sleep(jittered(pause)).await;
                pause = (pause * 2).min(Duration::from_secs(2));
            }
        }
    }
}

/// Announces the end of a run that somebody else writes about now: as it is recorded, or, if it has not ended yet,
/// as a failure to follow it. The latter alone among all events is not committed.
pub(super) async fn lease_lost(runs: &Runs, thread: &Thread, run: &Run, feed: &FeedWriter) {
    tracing::error!("the lease of a run was lost");
    let store = &runs.parts.given.store;
    let activity = match store.thread(&thread.key).await {
        Ok(Some((_, activity))) => activity,
        _ => ThreadActivity { state: ThreadState::Active, queue_depth: 0 },
    };
    let (run, message) = match store.run(&thread.key, run.id).await {
        Ok(Some((run, message))) if run.status.is_final() => (run, message),
        _ => {
            let error = RunError {
                code: RunErrorCode::ReplicaLost,
                message: "another gateway process took the run over; ask for the run to learn how it ends"
                    .to_owned(),
            };
            (Run { status: RunStatus::Failed, error: Some(error), ..run.clone() }, None)
        }
    };
    announce(feed, Outcome { thread: thread.clone(), activity, run, message, retry_after: None });
}

fn announce(feed: &FeedWriter, outcome: Outcome) {
    if let Some(message) = &outcome.message {
        feed.push(RunEvent::MessageCompleted(Arc::new(message.clone())));
    }
    feed.push(RunEvent::Ended(Arc::new(outcome)));
}

pub(super) fn end_of(ended: Ended) -> RunEnd {
    let reply = (!ended.content.is_empty()).then(|| Reply {
        id: MessageId::new(),
        content: ended.content,
        upstream_message_id: ended.upstream_message_id,
    });
    let (status, error) = match ended.status {
        RunStatus::RequiresAction => (RunStatus::Failed, Some(tool_calls_not_supported(&ended.tool_calls))),
        status if status.is_final() => (status, ended.error),
        status => {
            let message = format!("the upstream ended the run with the status {status}, which is none");
            (RunStatus::Failed, Some(RunError { code: RunErrorCode::UpstreamFailed, message }))
        }
    };
    RunEnd {
        status,
        error,
        usage: ended.usage,
        upstream_run_id: None,
        upstream_thread_id: ended.thread,
        reply,
    }
}

fn tool_calls_not_supported(calls: &[ToolCall]) -> RunError {
    let names: Vec<_> = calls.iter().map(|call| call.name.as_str()).collect();
    RunError {
        code: RunErrorCode::ToolCallsNotSupported,
        message: format!(
            "the model asked for function calls ({}), which this version cannot hand to the caller: remove the functions from the assistant",
            names.join(", ")
        ),
    }
}

pub(super) fn failed_end(status: RunStatus, error: RunError) -> RunEnd {
    RunEnd {
        status,
        error: Some(error),
        usage: None,
        upstream_run_id: None,
        upstream_thread_id: None,
        reply: None,
    }
}

pub(super) fn internal() -> RunError {
    let message = "something went wrong inside the gateway".to_owned();
    RunError { code: RunErrorCode::Internal, message }
}

pub(super) fn stopped() -> RunError {
    RunError {
        code: RunErrorCode::GatewayStopped,
        message: "the gateway was stopped before the run ended".to_owned(),
    }
}

pub(super) fn partial(text: String) -> Option<Reply> {
    (!text.is_empty()).then(|| Reply {
        id: MessageId::new(),
        content: vec![ContentPart::Text { text }],
        upstream_message_id: None,
    })
}

/// Why a turn did not reach its end at the upstream.
pub(super) enum Failure {
    Upstream(UpstreamError),
    LeaseLost,
    Store,
    Deadline,
    Stopped,
    ReplyTooLarge,
    NotConfigured,
    Panic,
}

impl Failure {
    pub(super) fn name(&self) -> String {
        match self {
            Self::Upstream(error) => error.to_string(),
            Self::LeaseLost => "lease lost".to_owned(),
            Self::Store => "the store failed".to_owned(),
            Self::Deadline => "deadline".to_owned(),
            Self::Stopped => "the gateway is stopping".to_owned(),
            Self::ReplyTooLarge => "the reply is too large".to_owned(),
            Self::NotConfigured => "not configured".to_owned(),
            Self::Panic => "panic".to_owned(),
        }
    }

    /// The upstream may still work on the run, or keep traces of it.
    pub(super) fn may_leave_something(&self) -> bool {
        match self {
            Self::Upstream(error) => error.is_ambiguous(),
            Self::Deadline | Self::Stopped | Self::ReplyTooLarge | Self::Panic => true,
            Self::LeaseLost | Self::Store | Self::NotConfigured => false,
        }
    }

    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Upstream(
                UpstreamError::RateLimited { retry_after, quota: false }
                | UpstreamError::Unavailable { retry_after, .. },
            ) => *retry_after,
            _ => None,
        }
    }

    /// The end of the run. `busy`: it was waiting for the upstream thread to be free.
    pub(super) fn end(self, busy: bool) -> RunEnd {
        let (code, message) = match self {
            Self::Upstream(error) => {
                let code = match error {
                    UpstreamError::ThreadGone => RunErrorCode::UpstreamThreadGone,
                    UpstreamError::Busy { .. } => RunErrorCode::UpstreamBusy,
                    UpstreamError::Broken { .. } => RunErrorCode::StreamBroken,
                    _ => RunErrorCode::UpstreamError,
                };
                (code, error.to_string())
            }
            Self::Deadline if busy => (
                RunErrorCode::UpstreamBusy,
                "the upstream thread was held by another run until the deadline".to_owned(),
            ),
            Self::Deadline => {
                let message = "the run did not end before its deadline".to_owned();
                return failed_end(
                    RunStatus::Expired,
                    RunError { code: RunErrorCode::DeadlineExceeded, message },
                );
            }
            Self::Stopped => return failed_end(RunStatus::Failed, stopped()),
            Self::ReplyTooLarge => {
                (RunErrorCode::ReplyTooLarge, "the reply grew past the configured limit".to_owned())
            }
            Self::NotConfigured => (
                RunErrorCode::NotConfigured,
                "the run's assistant or the thread's upstream is no longer configured".to_owned(),
            ),
            Self::LeaseLost | Self::Store | Self::Panic => return failed_end(RunStatus::Failed, internal()),
        };
        failed_end(RunStatus::Failed, RunError { code, message })
    }
}

//! How runs end: cleanly or not, what they leave upstream, and the commit before the announcement.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::time::sleep;

use super::feed::FeedWriter;
use super::{Outcome, RunEvent, Runs, jittered};
use crate::domain::{
    ContentPart, MessageId, Run, RunError, RunErrorCode, RunStatus, Thread, ThreadActivity, ThreadState,
    ToolCall,
};
use crate::error::Chain;
use crate::store::{Finished, Reply, RunEnd, RunLease, StoreError};
use crate::upstream::{Ended, Leftover, Upstream, UpstreamError};

/// How long to try to end what a run left upstream once the process is told to stop.
const LAST_SETTLE_TIMEOUT: Duration = Duration::from_secs(2);
/// How often the database may refuse an end before a simpler one is tried.
const MAX_REFUSALS: u32 = 3;

/// Ends what the run left upstream, within a bound; what cannot be ended is logged.
pub(super) async fn settle(runs: &Runs, upstream: &dyn Upstream, leftover: &Leftover) {
    let parts = &runs.parts.given;
    let limit = async {
        let last_moment = async {
            parts.stop.cancelled().await;
            sleep(LAST_SETTLE_TIMEOUT).await;
        };
        tokio::select! {
            () = sleep(parts.runs.settle_timeout) => {}
            () = last_moment => {}
        }
    };
    // A panic in here must not keep the run from ending.
    let settled = AssertUnwindSafe(upstream.settle(leftover)).catch_unwind();
    tokio::select! {
        settled = settled => match settled {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(error = %Chain(&error), "what the run left upstream could not be ended");
            }
            Err(_) => tracing::error!("ending what the run left upstream panicked"),
        },
        () = limit => tracing::warn!("what the run left upstream could not be ended in time"),
    }
}

/// What became of the attempt to commit an end.
pub(super) enum Closed {
    Finished(Box<Finished>),
    /// The run is not ours to end.
    LeaseLost,
    /// The process is told to stop while the database is away.
    Stopped,
}

/// Commits the end. Nothing is announced yet.
pub(super) async fn finish(
    runs: &Runs,
    lease: &RunLease,
    end: RunEnd,
    thread: &Thread,
    run: &Run,
    retry_after: Option<Duration>,
) -> Outcome {
    match finish_in_store(runs, lease, end).await {
        Closed::Finished(finished) => {
            let Finished { thread, activity, run, message } = *finished;
            Outcome { thread, activity, run, message, retry_after }
        }
        Closed::LeaseLost => lease_lost(runs, thread, run).await,
        Closed::Stopped => uncommitted(thread, run, stopped()),
    }
}

/// Commits the end of a run, for as long as it takes: a run that has ended upstream must not stay open here. An end
/// that the database refuses time and again is replaced by a bare failure.
pub(super) async fn finish_in_store(runs: &Runs, lease: &RunLease, mut end: RunEnd) -> Closed {
    let parts = &runs.parts.given;
    let mut pause = Duration::from_millis(50);
    let mut refusals = 0;
    loop {
        let error = match parts.store.finish(lease, &end).await {
            Ok(Some(finished)) => return Closed::Finished(Box::new(finished)),
            Ok(None) => return Closed::LeaseLost,
            Err(error) => error,
        };
        tracing::error!(error = %Chain(&error), "cannot record the end of a run yet");
        if parts.stop.is_cancelled() {
            return Closed::Stopped;
        }
        refusals += u32::from(!matches!(error, StoreError::Unavailable(_)));
        if refusals == MAX_REFUSALS {
            end = failed_end(RunStatus::Failed, internal());
        }
        sleep(jittered(pause)).await;
        pause = (pause * 2).min(Duration::from_secs(2));
    }
}

/// The outcome of a run that somebody else writes about now: as it is recorded, or, if it has not ended yet, as a
/// failure to follow it.
pub(super) async fn lease_lost(runs: &Runs, thread: &Thread, run: &Run) -> Outcome {
    tracing::error!("the lease of a run was lost");
    let error = RunError {
        code: RunErrorCode::ReplicaLost,
        message: "another gateway process took the run over; ask for the run to learn how it ends".to_owned(),
    };
    let as_far_as_known = uncommitted(thread, run, error);
    match runs.parts.given.store.run(&thread.key, run.id).await {
        Ok(Some((run, message))) if run.status.is_final() => Outcome { run, message, ..as_far_as_known },
        _ => as_far_as_known,
    }
}

/// An end that could not be committed.
fn uncommitted(thread: &Thread, run: &Run, error: RunError) -> Outcome {
    Outcome {
        thread: thread.clone(),
        activity: ThreadActivity { state: ThreadState::Active, queue_depth: 0 },
        run: Run { status: RunStatus::Failed, error: Some(error), ..run.clone() },
        message: None,
        retry_after: None,
    }
}

/// Tells the readers of the log how the run ended.
pub(super) fn announce(feed: &FeedWriter, outcome: Outcome) {
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

/// The end of a run that somebody wanted to end. That is no error.
pub(super) fn cancelled_end() -> RunEnd {
    RunEnd { error: None, ..failed_end(RunStatus::Cancelled, internal()) }
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
    Cancelled,
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
            Self::Cancelled => "cancelled".to_owned(),
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
            Self::Deadline | Self::Cancelled | Self::Stopped | Self::ReplyTooLarge | Self::Panic => true,
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
                    UpstreamError::Broken { timeout: true } => RunErrorCode::UpstreamTimeout,
                    UpstreamError::Broken { timeout: false } => RunErrorCode::StreamBroken,
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
            Self::Cancelled => return cancelled_end(),
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

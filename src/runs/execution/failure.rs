//! The reasons why a run did not reach its end at the upstream, and the status that follows from
//! each.

use std::time::Duration;

use crate::domain::{RunError, RunErrorCode, RunStatus, UpstreamRunId};
use crate::runs::registry::RunRegistry;
use crate::upstream::UpstreamError;

const BREAKER_OPEN: &str =
    "most requests to the upstream fail, so the gateway sends none to it for a while";

const NOTHING_TO_RUN: &str =
    "there is no message of the user that the gateway could send again: post a message";

/// The reason why a run did not reach its end at the upstream.
pub(in crate::runs) enum Failure {
    Upstream(UpstreamError),
    /// The upstream refused the message even without a history.
    MessageRefused(UpstreamError),
    /// Most requests to the upstream failed lately, so the gateway did not send this one.
    BreakerOpen {
        retry_after: Duration,
    },
    /// Something outside the gateway holds the upstream thread, and the caller did not want to
    /// wait.
    Conflict {
        blocking_run: Option<UpstreamRunId>,
    },
    LeaseLost,
    Store,
    Deadline,
    /// The outputs of the run's function calls did not arrive in time.
    NoOutputs,
    Cancelled,
    Stopped,
    /// The process that worked on the run died.
    ReplicaLost,
    /// The caller got the error that the message was not recorded.
    NotRecorded,
    ReplyTooLarge,
    /// A run without a message of its own found no message that it could send.
    NothingToRun,
    NotConfigured,
    Panic,
}

impl Failure {
    pub(in crate::runs) fn name(&self) -> String {
        match self {
            Self::Upstream(error) | Self::MessageRefused(error) => error.to_string(),
            Self::BreakerOpen { .. } => BREAKER_OPEN.to_owned(),
            Self::Conflict { .. } => "the upstream thread is busy".to_owned(),
            Self::LeaseLost => "lease lost".to_owned(),
            Self::Store => "the store failed".to_owned(),
            Self::Deadline => "deadline".to_owned(),
            Self::NoOutputs => "no tool outputs".to_owned(),
            Self::Cancelled => "cancelled".to_owned(),
            Self::Stopped => "the gateway is stopping".to_owned(),
            Self::ReplicaLost => "the run's process died".to_owned(),
            Self::NotRecorded => "the caller was told that the message was not recorded".to_owned(),
            Self::ReplyTooLarge => "the reply is too large".to_owned(),
            Self::NothingToRun => NOTHING_TO_RUN.to_owned(),
            Self::NotConfigured => "not configured".to_owned(),
            Self::Panic => "panic".to_owned(),
        }
    }

    /// Returns whether the gateway cut the run off, so that the run may have reached its end at
    /// the upstream.
    pub(in crate::runs) fn cuts_off(&self) -> bool {
        match self {
            Self::Upstream(error) => error.is_ambiguous(),
            Self::Deadline
            | Self::NoOutputs
            | Self::Cancelled
            | Self::Stopped
            | Self::ReplicaLost
            | Self::NotRecorded
            | Self::Store
            | Self::Panic => true,
            Self::MessageRefused(_)
            | Self::BreakerOpen { .. }
            | Self::Conflict { .. }
            | Self::LeaseLost
            | Self::ReplyTooLarge
            | Self::NothingToRun
            | Self::NotConfigured => false,
        }
    }

    pub(in crate::runs) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Upstream(error) => error.retry_after(),
            Self::BreakerOpen { retry_after } => Some(*retry_after),
            _ => None,
        }
    }

    /// Returns the end of a run that waited for a busy upstream thread when this failure happened.
    pub(in crate::runs) fn end_while_thread_busy(self) -> (RunStatus, Option<RunError>) {
        if !matches!(self, Self::Deadline) {
            return self.end();
        }
        let message = "another run held the upstream thread until the deadline".to_owned();
        (
            RunStatus::Failed,
            Some(RunError::new(RunErrorCode::UpstreamBusy, message)),
        )
    }

    /// Returns the end of a run that had this failure.
    pub(in crate::runs) fn end(self) -> (RunStatus, Option<RunError>) {
        let failed = |code, message: String| {
            let error = RunError::new(code, message);
            (RunStatus::Failed, Some(error))
        };
        match self {
            Self::Upstream(error) => {
                let message = error.to_string();
                told_by_upstream(&error, error.run_code(), message)
            }
            Self::MessageRefused(error) => {
                let message = format!("the upstream refuses this message even alone: {error}");
                told_by_upstream(&error, RunErrorCode::MessageRefused, message)
            }
            Self::BreakerOpen { .. } => {
                failed(RunErrorCode::UpstreamUnavailable, BREAKER_OPEN.to_owned())
            }
            Self::Conflict { blocking_run } => {
                let by = blocking_run.map_or_else(String::new, |id| format!(" `{id}`"));
                let message = format!(
                    "another run{by}, which is not the gateway's, holds the upstream thread"
                );
                failed(RunErrorCode::UpstreamBusy, message)
            }
            Self::Deadline => expired("the run did not end before its deadline"),
            Self::NoOutputs => expired(
                "the outputs of the run's function calls did not arrive within `runs.tool_outputs_timeout`, or before \
                 the run's deadline",
            ),
            Self::Cancelled => (RunStatus::Cancelled, None),
            Self::Stopped => (RunStatus::Failed, Some(stopped())),
            Self::ReplicaLost => {
                let message = "the gateway process that worked on the run stopped or died before the reply was complete";
                failed(RunErrorCode::ReplicaLost, message.to_owned())
            }
            Self::NotRecorded => {
                let message =
                    "the database failed while the message was recorded; the caller got an error";
                failed(RunErrorCode::NotRecorded, message.to_owned())
            }
            Self::ReplyTooLarge => failed(
                RunErrorCode::ReplyTooLarge,
                "the reply is larger than `runs.max_reply_bytes`".to_owned(),
            ),
            Self::NothingToRun => failed(RunErrorCode::NothingToRun, NOTHING_TO_RUN.to_owned()),
            Self::NotConfigured => failed(
                RunErrorCode::NotConfigured,
                "the run's assistant or the thread's upstream is no longer configured".to_owned(),
            ),
            Self::LeaseLost | Self::Store | Self::Panic => (RunStatus::Failed, Some(internal())),
        }
    }
}

fn told_by_upstream(
    error: &UpstreamError,
    code: RunErrorCode,
    message: String,
) -> (RunStatus, Option<RunError>) {
    let error = RunError {
        upstream_code: error.code().map(str::to_owned),
        upstream_status: error.status(),
        ..RunError::new(code, message)
    };
    (RunStatus::Failed, Some(error))
}

fn expired(message: &str) -> (RunStatus, Option<RunError>) {
    let error = RunError::new(RunErrorCode::DeadlineExceeded, message);
    (RunStatus::Expired, Some(error))
}

pub(in crate::runs) fn internal() -> RunError {
    RunError::new(RunErrorCode::Internal, "the gateway failed during the run")
}

pub(in crate::runs) fn stopped() -> RunError {
    RunError::new(
        RunErrorCode::GatewayStopped,
        "the gateway was stopped before the run ended",
    )
}

/// Checks that this process's session is good, so that no other process works on its threads. A
/// process that was suspended for a while may not know that its session has lapsed.
pub(in crate::runs) fn may_send(registry: &RunRegistry) -> Result<(), Failure> {
    if registry.has_lapsed() {
        Err(Failure::LeaseLost)
    } else {
        Ok(())
    }
}

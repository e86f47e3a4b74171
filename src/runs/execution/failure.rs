//! Why a turn did not reach its end at the upstream, and how its run ends by that.

use std::time::Duration;

use crate::domain::{RunError, RunErrorCode, RunStatus, UpstreamRunId};
use crate::runs::registry::RunRegistry;
use crate::upstream::UpstreamError;

const BREAKER_OPEN: &str = "most requests to the upstream fail, so none is sent to it for a while";

/// Why a turn did not reach its end at the upstream.
pub(in crate::runs) enum Failure {
    Upstream(UpstreamError),
    /// Most requests to the upstream failed lately, so this one was not made.
    BreakerOpen {
        retry_after: Duration,
    },
    /// Something that is not ours holds the upstream thread, and the caller did not want to wait.
    Conflict {
        blocking_run: Option<UpstreamRunId>,
    },
    LeaseLost,
    Store,
    Deadline,
    Cancelled,
    Stopped,
    /// The process that worked on it died.
    ReplicaLost,
    /// Its sender heard that the message was not taken.
    NotRecorded,
    ReplyTooLarge,
    NotConfigured,
    Panic,
}

impl Failure {
    pub(in crate::runs) fn name(&self) -> String {
        match self {
            Self::Upstream(error) => error.to_string(),
            Self::BreakerOpen { .. } => BREAKER_OPEN.to_owned(),
            Self::Conflict { .. } => "the upstream thread is busy".to_owned(),
            Self::LeaseLost => "lease lost".to_owned(),
            Self::Store => "the store failed".to_owned(),
            Self::Deadline => "deadline".to_owned(),
            Self::Cancelled => "cancelled".to_owned(),
            Self::Stopped => "the gateway is stopping".to_owned(),
            Self::ReplicaLost => "its process died".to_owned(),
            Self::NotRecorded => "not recorded, as far as its sender knows".to_owned(),
            Self::ReplyTooLarge => "the reply is too large".to_owned(),
            Self::NotConfigured => "not configured".to_owned(),
            Self::Panic => "panic".to_owned(),
        }
    }

    /// Something else than the upstream ended the run, so that one may have reached its end there all the same.
    pub(in crate::runs) fn cuts_off(&self) -> bool {
        match self {
            Self::Upstream(error) => error.is_ambiguous(),
            Self::Deadline
            | Self::Cancelled
            | Self::Stopped
            | Self::ReplicaLost
            | Self::NotRecorded
            | Self::Store
            | Self::Panic => true,
            Self::BreakerOpen { .. }
            | Self::Conflict { .. }
            | Self::LeaseLost
            | Self::ReplyTooLarge
            | Self::NotConfigured => false,
        }
    }

    pub(in crate::runs) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Upstream(
                UpstreamError::RateLimited {
                    retry_after,
                    quota: false,
                    ..
                }
                | UpstreamError::Unavailable { retry_after, .. },
            ) => *retry_after,
            Self::BreakerOpen { retry_after } => Some(*retry_after),
            _ => None,
        }
    }

    /// How a run ends by it that was waiting for the upstream thread to be free.
    pub(in crate::runs) fn end_while_thread_busy(self) -> (RunStatus, Option<RunError>) {
        if !matches!(self, Self::Deadline) {
            return self.end();
        }
        let message = "the upstream thread was held by another run until the deadline".to_owned();
        (
            RunStatus::Failed,
            Some(RunError {
                code: RunErrorCode::UpstreamBusy,
                message,
            }),
        )
    }

    /// How a run ends by it.
    pub(in crate::runs) fn end(self) -> (RunStatus, Option<RunError>) {
        let failed = |code, message: String| (RunStatus::Failed, Some(RunError { code, message }));
        match self {
            Self::Upstream(error) => {
                let code = match error {
                    UpstreamError::ThreadGone => RunErrorCode::UpstreamThreadGone,
                    UpstreamError::Busy { .. } => RunErrorCode::UpstreamBusy,
                    UpstreamError::Broken { timeout: true } => RunErrorCode::UpstreamTimeout,
                    UpstreamError::Broken { timeout: false } => RunErrorCode::StreamBroken,
                    _ => RunErrorCode::UpstreamError,
                };
                failed(code, error.to_string())
            }
            Self::BreakerOpen { .. } => {
                failed(RunErrorCode::UpstreamUnavailable, BREAKER_OPEN.to_owned())
            }
            Self::Conflict { blocking_run } => {
                let by = blocking_run.map_or_else(String::new, |id| format!(" `{id}`"));
                let message = format!(
                    "the upstream thread is held by another run{by} that is not the gateway's"
                );
                failed(RunErrorCode::UpstreamBusy, message)
            }
            Self::Deadline => {
                let message = "the run did not end before its deadline".to_owned();
                (
                    RunStatus::Expired,
                    Some(RunError {
                        code: RunErrorCode::DeadlineExceeded,
                        message,
                    }),
                )
            }
            Self::Cancelled => (RunStatus::Cancelled, None),
            Self::Stopped => (RunStatus::Failed, Some(stopped())),
            Self::ReplicaLost => {
                let message = "the gateway process that worked on the run died; the reply, if there was one, is lost";
                failed(RunErrorCode::ReplicaLost, message.to_owned())
            }
            Self::NotRecorded => {
                let message =
                    "the database failed while the message was recorded; its sender was told so";
                failed(RunErrorCode::NotRecorded, message.to_owned())
            }
            Self::ReplyTooLarge => failed(
                RunErrorCode::ReplyTooLarge,
                "the reply grew past the configured limit".to_owned(),
            ),
            Self::NotConfigured => failed(
                RunErrorCode::NotConfigured,
                "the run's assistant or the thread's upstream is no longer configured".to_owned(),
            ),
            Self::LeaseLost | Self::Store | Self::Panic => (RunStatus::Failed, Some(internal())),
        }
    }
}

pub(in crate::runs) fn internal() -> RunError {
    RunError {
        code: RunErrorCode::Internal,
        message: "the gateway failed in the middle of the run".to_owned(),
    }
}

pub(in crate::runs) fn stopped() -> RunError {
    RunError {
        code: RunErrorCode::GatewayStopped,
        message: "the gateway was stopped before the run ended".to_owned(),
    }
}

/// This process still has its threads to itself. A process that was stopped for a while may not know yet that it has not.
pub(in crate::runs) fn may_send(registry: &RunRegistry) -> Result<(), Failure> {
    if registry.has_lapsed() {
        Err(Failure::LeaseLost)
    } else {
        Ok(())
    }
}

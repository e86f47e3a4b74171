//! The reasons why an upstream call fails.

use std::time::Duration;

use crate::domain::{RunErrorCode, UpstreamRunId};

/// What a refusal is about, as far as the server's words tell.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RefusalCause {
    /// The account or the configuration: key, permission, model, parameter, region, an unknown
    /// path. No change of the input helps.
    Configuration,
    /// A content policy or filter.
    Policy,
    /// The thread or the previous response: of another server or kind, not usable for this
    /// organisation, blocked by an open call or approval, damaged.
    Thread,
    /// The input is too long for the model or the server.
    Size,
    /// A picture or file cannot be fetched, read or found.
    Media,
    /// The words do not tell.
    Unknown,
}

/// The reason why an upstream call failed. No text here repeats credentials, content or prose of
/// the upstream.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum UpstreamError {
    /// Another run holds the thread. Nothing was appended; the request can be sent again.
    #[error("the upstream thread is held by another run")]
    Busy { blocking_run: Option<UpstreamRunId> },
    /// A 404, or a 400, that names the thread.
    #[error("the upstream thread is gone")]
    ThreadGone,
    /// A 4xx, a redirect, or a 501: the server refused the request, the key or the account.
    ///
    /// `code` is the server's error code, at most 64 characters. `missing`: the error says that
    /// the requested object does not exist.
    #[error("the upstream refused the request with status {status}{}", in_brackets(code.as_deref()))]
    Refused {
        status: u16,
        code: Option<String>,
        missing: bool,
        cause: RefusalCause,
    },
    /// The server has no path that every run needs, so no run can begin with this configuration.
    /// `remedy` tells the operator what to change.
    #[error("the upstream has no `{path}`; the operator of the gateway can fix this: {remedy}")]
    NotOffered {
        path: &'static str,
        remedy: &'static str,
    },
    /// A 429, or another refusal that speaks of a rate or of money. `quota`: waiting does not
    /// help. `code` as for [`Refused`](Self::Refused).
    #[error("{}{}", if *quota { "the quota at the upstream is used up" } else { "the upstream limits the rate" }, in_brackets(code.as_deref()))]
    RateLimited {
        status: u16,
        retry_after: Option<Duration>,
        quota: bool,
        code: Option<String>,
    },
    /// A 5xx except 501, a 408, or an error in a stream for which waiting helps. `no_retry`: the
    /// server says that another try does not help. `code` as for [`Refused`](Self::Refused).
    #[error("the upstream failed with status {status}{}", in_brackets(code.as_deref()))]
    Unavailable {
        status: u16,
        retry_after: Option<Duration>,
        no_retry: bool,
        code: Option<String>,
    },
    /// Nothing was sent: no connection could be made, or a question that must come first got no
    /// answer.
    #[error("the upstream cannot be reached")]
    Connect,
    /// The connection broke after the request was sent. `timeout`: the gateway gave the request
    /// up. That says nothing about the upstream, so a request that the upstream may have accepted
    /// is never sent again after it.
    #[error("{}", if *timeout { "the upstream did not answer in time" } else { "the connection to the upstream broke" })]
    Broken { timeout: bool },
    /// The answer does not follow the protocol.
    #[error("the upstream's answer cannot be used: {0}")]
    Protocol(String),
}

impl UpstreamError {
    /// Returns true if the upstream may have accepted the request.
    pub const fn is_ambiguous(&self) -> bool {
        matches!(
            self,
            Self::Unavailable { .. } | Self::Broken { .. } | Self::Protocol(_)
        )
    }

    /// Returns the HTTP status of the answer. For an error in a stream it is the status that the
    /// error stands for.
    pub const fn status(&self) -> Option<u16> {
        match self {
            Self::Refused { status, .. }
            | Self::RateLimited { status, .. }
            | Self::Unavailable { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// Returns the server's error code.
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Refused { code, .. }
            | Self::RateLimited { code, .. }
            | Self::Unavailable { code, .. } => code.as_deref(),
            _ => None,
        }
    }

    /// Returns the code of a run that failed for this error.
    pub const fn run_code(&self) -> RunErrorCode {
        match self {
            Self::ThreadGone => RunErrorCode::UpstreamThreadGone,
            Self::Busy { .. } => RunErrorCode::UpstreamBusy,
            Self::Broken { timeout: true } => RunErrorCode::UpstreamTimeout,
            Self::Broken { timeout: false } => RunErrorCode::StreamBroken,
            Self::RateLimited { quota: true, .. } => RunErrorCode::UpstreamQuotaExhausted,
            Self::RateLimited { .. } | Self::Unavailable { status: 429, .. } => {
                RunErrorCode::UpstreamRateLimited
            }
            Self::NotOffered { .. } => RunErrorCode::UpstreamMisconfigured,
            Self::Refused { status, cause, .. } => match cause {
                RefusalCause::Configuration if matches!(status, 401 | 403) => {
                    RunErrorCode::UpstreamUnauthorized
                }
                RefusalCause::Configuration => RunErrorCode::UpstreamMisconfigured,
                RefusalCause::Policy => RunErrorCode::ContentRefused,
                RefusalCause::Size => RunErrorCode::ContextFull,
                RefusalCause::Thread | RefusalCause::Media | RefusalCause::Unknown => {
                    RunErrorCode::UpstreamError
                }
            },
            Self::Unavailable { .. } | Self::Connect | Self::Protocol(_) => {
                RunErrorCode::UpstreamError
            }
        }
    }

    /// Returns true if the connection broke, or if something between the gateway and the server
    /// lost or gave up the request. Proxies report that with 502 and 504, Cloudflare with 520 and
    /// 524, some servers with 408. None of them says what the server does.
    pub const fn breaks_off(&self) -> bool {
        matches!(
            self,
            Self::Broken { .. }
                | Self::Unavailable {
                    status: 408 | 502 | 504 | 520 | 524,
                    ..
                }
        )
    }

    /// Returns how long the server asks to wait, if waiting helps.
    pub const fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::RateLimited {
                retry_after,
                quota: false,
                ..
            }
            | Self::Unavailable { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// Returns true if the server was not reached, broke off, or reports an internal failure.
    /// Refusals, rate limits and timeouts are no signs of an outage.
    pub const fn tells_outage(&self) -> bool {
        matches!(
            self,
            Self::Connect
                | Self::Broken { timeout: false }
                | Self::Unavailable { status: 500.., .. }
        )
    }
}

/// Returns the result, or `nothing` if the thread is gone, because its content is gone with it.
pub(super) fn unless_gone<T>(
    result: Result<T, UpstreamError>,
    nothing: T,
) -> Result<T, UpstreamError> {
    match result {
        Err(UpstreamError::ThreadGone) => Ok(nothing),
        other => other,
    }
}

fn in_brackets(code: Option<&str>) -> String {
    code.map(|code| format!(" ({code})")).unwrap_or_default()
}

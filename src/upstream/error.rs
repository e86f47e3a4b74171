//! Why an upstream call failed.

use std::time::Duration;

use crate::domain::UpstreamRunId;

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
    Refused {
        status: u16,
        code: Option<String>,
        missing: bool,
    },
    /// The server has no such path, so no turn can begin with it as it is configured. `remedy`: what the operator does.
    #[error("the upstream has no `{path}`; the operator of the gateway can mend that: {remedy}")]
    NotOffered {
        path: &'static str,
        remedy: &'static str,
    },
    /// A 429. `quota`: waiting does not help. `code` as for [`Refused`](Self::Refused).
    #[error("the upstream limits the rate{}", in_brackets(code.as_deref()))]
    RateLimited {
        retry_after: Option<Duration>,
        quota: bool,
        code: Option<String>,
    },
    /// A 5xx but 501, or an error in a stream which says that waiting helps. `no_retry`: the server says that trying again
    /// does not help. `code` as for [`Refused`](Self::Refused).
    #[error("the upstream failed with status {status}{}", in_brackets(code.as_deref()))]
    Unavailable {
        status: u16,
        retry_after: Option<Duration>,
        no_retry: bool,
        code: Option<String>,
    },
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
        matches!(
            self,
            Self::Unavailable { .. } | Self::Broken { .. } | Self::Protocol(_)
        )
    }

    /// The connection broke, or somebody between us and the server lost it or gave it up: proxies say so with 502 and 504,
    /// Cloudflare with 520 and 524, some servers with 408. None of that tells what the server does.
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

    /// The server was not reached, broke off, or is broken as it says. A refusal, a limit on the rate and silence say nothing
    /// of the kind.
    pub const fn tells_outage(&self) -> bool {
        matches!(
            self,
            Self::Connect
                | Self::Broken { timeout: false }
                | Self::Unavailable { status: 500.., .. }
        )
    }
}

/// The result, or `nothing` if the thread is gone: all that was asked for went with it.
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

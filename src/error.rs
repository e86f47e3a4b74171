//! [`Error`], the one error of the service. It is free of HTTP: `api/problem.rs` alone turns it into
//! an answer.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use crate::config::Rate;
use crate::domain::{Access, Run};
use crate::store::StoreError;
use crate::upstream::UpstreamError;

/// Why the gateway refused a request, or failed to serve it. Display texts are safe for the caller.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The gateway cannot read the request.
    #[error("{0}")]
    Malformed(String),
    /// The gateway can read the request, which asks for something impossible.
    #[error("{0}")]
    Invalid(String),
    #[error("the body must be JSON: send the header `content-type: application/json`")]
    UnsupportedMediaType,
    #[error("the body is larger than {limit} bytes: send a smaller one")]
    PayloadTooLarge { limit: usize },
    #[error("the body arrived too slowly: send it without pauses, or over a faster connection")]
    BodyTimeout,
    /// The bodies of other requests use all memory that this replica has for bodies.
    #[error(
        "the large bodies of other requests use all memory of this replica for bodies: send the request \
         again later"
    )]
    BodiesFull,
    /// The request has neither a key nor a token.
    #[error("the request has no key or token: send one in the header `authorization: Bearer …`")]
    Unauthenticated,
    /// The gateway refuses the key or token of the request. The text gives the reason in fixed words
    /// without quotation marks.
    #[error("the key or token is refused: {0}")]
    InvalidToken(&'static str),
    #[error(
        "the gateway cannot fetch the keys of the token issuer at present: send the request again later"
    )]
    IssuerUnavailable,
    /// The key or token is good, but its scope is too small.
    #[error("this request needs the scope `{0}`: send a key or token that has it")]
    InsufficientScope(Access),
    /// The caller may not do that. The text gives the reason.
    #[error("{0}")]
    Forbidden(&'static str),
    /// A user or a tenant sent too many messages or requests.
    #[error("{0}")]
    RateLimited(TooOften),
    #[error(
        "this tenant has {limit} unfinished runs at this replica, the most that it may have: send the \
         message again when one has ended"
    )]
    TooManyRuns { limit: usize },
    #[error(
        "{limit} readers follow the events of this run at this replica, the most that may: try again when \
         one has left"
    )]
    TooManyReaders { limit: usize },
    /// This replica has its most unfinished runs, or messages arrive faster than it records them.
    #[error(
        "this replica has as much work as it can take, and stored nothing new: send the request again later"
    )]
    Overloaded,
    #[error("{0}")]
    NotFound(&'static str),
    #[error("this path does not take this method: the header `allow` names those that it takes")]
    MethodNotAllowed,
    #[error(
        "the thread is busy with another run: send the message again when that run has ended, or with \
         another `multitask_strategy`"
    )]
    ThreadBusy,
    #[error(
        "the thread has no message of the user that a run could answer: post a message to `…/messages`"
    )]
    NothingToRun,
    #[error(
        "this conversation is on the upstream `{thread}`, and the assistant `{assistant}` on another: \
         choose an assistant of `{thread}`"
    )]
    OtherUpstream { thread: String, assistant: String },
    #[error(
        "the thread's queue is full, with {limit} runs: send the message again when one has ended"
    )]
    QueueFull { limit: usize },
    #[error(
        "the thread's queue is full, because its messages may have {limit} bytes together: send the \
         message again when a run has ended"
    )]
    QueueBytesFull { limit: usize },
    /// Another request used the idempotency key.
    #[error("another request of this conversation used this idempotency key: use a new one")]
    IdempotencyMismatch,
    /// Tool outputs for a run that does not wait for them, or not any more.
    #[error("{0}")]
    RunNotWaiting(String),
    /// Tool outputs for a run of another replica, without a transcript that could hand them over.
    #[error(
        "this gateway stores no transcript, so only the replica that works on the run can take its tool \
         outputs, and this is another replica: send them again on a new connection"
    )]
    OtherReplica,
    #[error(
        "most requests to the upstream failed lately, so the gateway sends it none for a while, and \
         stored nothing: send the request again later"
    )]
    UpstreamUnavailable { retry_after: Duration },
    /// A call to the upstream failed, which the request needed.
    #[error("a call to the upstream failed: {0}")]
    UpstreamFailed(#[source] UpstreamError),
    #[error(
        "the upstream did not say in time which messages its thread has, and nothing was changed: send the \
         request again later"
    )]
    UpstreamTooSlow,
    /// The run failed or expired.
    #[error("{}", run.error.as_ref().map_or("the run did not complete", |error| error.message.as_str()))]
    RunFailed {
        run: Box<Run>,
        retry_after: Option<Duration>,
    },
    #[error(
        "this replica of the gateway is shutting down: send the request again, on a new connection"
    )]
    Draining,
    // Ends like the text of its source, which the log then does not repeat.
    #[error("send the request again later, because the database is not available")]
    StoreUnavailable(#[source] Option<StoreError>),
    #[error(
        "the database failed while the gateway merged the message into a queued run, which may hold it \
         now: send it again only with the same `idempotency-key`, or read the messages first"
    )]
    MaybeMerged(#[source] StoreError),
    #[error("the gateway has a defect: report it with the `request_id`, which its log has too")]
    Internal(#[source] Option<Box<dyn StdError + Send + Sync>>),
}

/// A message or request that a rate does not allow now.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TooOften {
    /// Owner of the rate: `user` or `tenant`.
    pub whose: &'static str,
    /// What the rate limits: `messages` or `requests`.
    pub what: &'static str,
    pub rate: Rate,
    pub retry_after: Duration,
}

impl fmt::Display for TooOften {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            whose,
            what,
            rate,
            retry_after,
        } = self;
        let wait = whole_seconds(*retry_after);
        write!(
            f,
            "too many {what}: each {whose} may send {rate}; send this one again in {wait} s"
        )
    }
}

impl From<TooOften> for Error {
    fn from(too_often: TooOften) -> Self {
        Self::RateLimited(too_often)
    }
}

/// Rounds up to whole seconds, at least one: a caller that comes back early is refused again.
pub fn whole_seconds(time: Duration) -> u64 {
    (time.as_secs() + u64::from(time.subsec_nanos() > 0)).max(1)
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Unavailable(_) => Self::StoreUnavailable(Some(error)),
            StoreError::Overloaded => Self::Overloaded,
            StoreError::UnknownCursor => Self::Invalid(
                "`after` or `before` names no entry of this list: leave it out to begin at the first page"
                    .to_owned(),
            ),
            other => Self::Internal(Some(Box::new(other))),
        }
    }
}

/// Shows an error with all its causes on one line, for the log.
pub struct Chain<'a>(pub &'a dyn StdError);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut told = self.0.to_string();
        f.write_str(&told)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            let text = error.to_string();
            // Some libraries repeat their cause in their own text.
            if !told.ends_with(&text) {
                write!(f, ": {text}")?;
            }
            told = text;
            cause = error.source();
        }
        Ok(())
    }
}

impl fmt::Debug for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

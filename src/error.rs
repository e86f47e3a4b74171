//! The one error of the service, free of HTTP. `api/problem.rs` alone turns it into an answer.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use crate::config::Rate;
use crate::domain::{Access, Run};
use crate::store::StoreError;
use crate::upstream::UpstreamError;

/// Why a request was not answered as asked. Display texts are safe to show to the caller.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request cannot be read.
    #[error("{0}")]
    Malformed(String),
    /// The request can be read and asks for what cannot be.
    #[error("{0}")]
    Invalid(String),
    #[error("the body must be JSON: send the header `content-type: application/json`")]
    UnsupportedMediaType,
    #[error("the body is larger than {limit} bytes")]
    PayloadTooLarge { limit: usize },
    #[error("the body did not arrive in time")]
    BodyTimeout,
    /// The bodies of others have all memory that there is for bodies.
    #[error(
        "other requests with large bodies are at work, as many as this replica has memory for; send it again later"
    )]
    BodiesFull,
    /// Neither a key nor a token was presented.
    #[error("send a key or token: `authorization: Bearer …`")]
    Unauthenticated,
    /// A key or token was presented and is refused. The text says why, in fixed words without quotation marks.
    #[error("the key or token is refused: {0}")]
    InvalidToken(&'static str),
    #[error("the keys of whoever issues tokens cannot be had at present")]
    IssuerUnavailable,
    /// The key or token is good, and its scope is too small.
    #[error("this needs the scope `{0}`")]
    InsufficientScope(Access),
    /// Who asks may not do that.
    #[error("{0}")]
    Forbidden(&'static str),
    /// Too many messages or requests of a user or a tenant.
    #[error("{0}")]
    RateLimited(TooOften),
    #[error("{limit} runs of this tenant are unfinished here already")]
    TooManyRuns { limit: usize },
    #[error("{limit} readers follow this run here already")]
    TooManyReaders { limit: usize },
    /// More runs than it may have, or messages come faster than they can be recorded.
    #[error("this replica has as much work as it can take; nothing new was stored")]
    Overloaded,
    #[error("{0}")]
    NotFound(&'static str),
    #[error("this path does not take this method; see the `allow` header")]
    MethodNotAllowed,
    #[error("the thread is busy with another run")]
    ThreadBusy,
    #[error(
        "this conversation lives on the upstream `{thread}`, the assistant `{assistant}` on another: choose an assistant of `{thread}`"
    )]
    OtherUpstream { thread: String, assistant: String },
    #[error("the thread's queue is full: {limit} runs wait already")]
    QueueFull { limit: usize },
    #[error(
        "the thread's queue is full: the messages that wait on it may have {limit} bytes together"
    )]
    QueueBytesFull { limit: usize },
    /// The idempotency key was used for another request.
    #[error(
        "this idempotency key was used for another request of this conversation; use a new one"
    )]
    IdempotencyMismatch,
    /// Outputs for a run that does not wait for them (any more).
    #[error("{0}")]
    RunNotWaiting(String),
    /// Outputs for a run of another replica, to which they cannot be handed over.
    #[error(
        "nothing that is said is stored here, so outputs can be taken only by the replica that works on the run, and this is another one: send them again on a new connection"
    )]
    OtherReplica,
    #[error(
        "most requests to the upstream fail, so none is sent to it for a while; nothing was stored"
    )]
    UpstreamUnavailable { retry_after: Duration },
    /// A call to the upstream that a request needed.
    #[error("the upstream did not answer as it should: {0}")]
    UpstreamFailed(#[source] UpstreamError),
    #[error("the upstream did not tell in time what it holds of the thread; nothing was changed")]
    UpstreamTooSlow,
    /// The run ended without a reply that could be called one.
    #[error("{}", run.error.as_ref().map_or("the run did not complete", |error| error.message.as_str()))]
    RunFailed {
        run: Box<Run>,
        retry_after: Option<Duration>,
    },
    #[error("the gateway is shutting down")]
    Draining,
    #[error("the database is not available")]
    StoreUnavailable(#[source] Option<StoreError>),
    #[error(
        "the database failed while the message was added to a run that waits, and it may be there: send it again only with the same `idempotency-key`, or look at the messages first"
    )]
    MaybeMerged(#[source] StoreError),
    #[error("something went wrong inside the gateway; the log has the request id")]
    Internal(#[source] Option<Box<dyn StdError + Send + Sync>>),
}

/// More than a rate allows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TooOften {
    /// `user` or `tenant`.
    pub whose: &'static str,
    /// `messages` or `requests`.
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
            "too many {what}: each {whose} may send {rate}; come back in {wait} s"
        )
    }
}

impl From<TooOften> for Error {
    fn from(too_often: TooOften) -> Self {
        Self::RateLimited(too_often)
    }
}

/// At least one, and rounded up: coming back early helps nobody.
pub fn whole_seconds(time: Duration) -> u64 {
    (time.as_secs() + u64::from(time.subsec_nanos() > 0)).max(1)
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Unavailable(_) => Self::StoreUnavailable(Some(error)),
            StoreError::Overloaded => Self::Overloaded,
            StoreError::UnknownCursor => Self::Invalid(
                "`after` or `before` names nothing in this list; drop it to start over".to_owned(),
            ),
            other => Self::Internal(Some(Box::new(other))),
        }
    }
}

/// An error with all its causes on one line, for the log.
pub struct Chain<'a>(pub &'a dyn StdError);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut told = self.0.to_string();
        f.write_str(&told)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            let text = error.to_string();
            // Some libraries tell their cause in their own text.
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

//! Errors as RFC 9457 problem documents: the only place where an [`Error`] becomes HTTP.

use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::domain::{MultitaskStrategy, Run, RunErrorCode, RunId, ThreadId};
use crate::error::{Chain, Error};
use crate::store::StoreError;

/// Before the name of each problem type.
const TYPE_PREFIX: &str = "urn:threadkeeper:problem:";

/// A problem on its way to the middleware that completes it.
#[derive(Clone)]
struct Problem {
    name: &'static str,
    title: &'static str,
    status: StatusCode,
    detail: String,
    retry_after: Option<Duration>,
    run: Option<(RunId, ThreadId, RunErrorCode)>,
}

#[derive(Serialize)]
struct Document<'a> {
    r#type: String,
    title: &'a str,
    status: u16,
    detail: &'a str,
    request_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    run_id: Option<RunId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    thread_id: Option<ThreadId>,
    /// The run's own error code.
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<RunErrorCode>,
}

impl IntoResponse for Error {
    /// Status and problem; `complete` writes the body, since only it knows the request's id.
    fn into_response(self) -> Response {
        log(&self);
        let problem = Problem::from(&self);
        let mut response = problem.status.into_response();
        response.extensions_mut().insert(problem);
        response
    }
}

/// Gives a problem its body. Other answers pass as they are.
pub(super) fn complete(mut response: Response, request_id: &str) -> Response {
    let Some(problem) = response.extensions_mut().remove::<Problem>() else { return response };
    let document = Document {
        r#type: format!("{TYPE_PREFIX}{}", problem.name),
        title: problem.title,
        status: problem.status.as_u16(),
        detail: &problem.detail,
        request_id,
        run_id: problem.run.map(|(run, _, _)| run),
        thread_id: problem.run.map(|(_, thread, _)| thread),
        code: problem.run.map(|(_, _, code)| code),
    };
    let body = serde_json::to_vec(&document).unwrap_or_default();
    let (mut parts, _) = response.into_parts();
    parts.headers.remove(header::CONTENT_LENGTH);
    parts.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    if problem.status == StatusCode::UNAUTHORIZED {
        parts.headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    if let Some(wait) = problem.retry_after {
        // Whole seconds, rounded up: coming back early helps nobody.
        let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
        parts.headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
    }
    Response::from_parts(parts, body.into())
}

fn log(error: &Error) {
    match error {
        Error::Internal(_) => tracing::error!(error = %Chain(error), "the request failed"),
        Error::StoreUnavailable(_) => {
            tracing::warn!(error = %Chain(error), "the request failed");
        }
        // Only the name: the text may quote the request.
        _ => tracing::debug!(problem = Problem::from(error).name, "the request was refused"),
    }
}

impl From<&Error> for Problem {
    fn from(error: &Error) -> Self {
        let kind = match error {
            Error::Malformed(_) => INVALID_REQUEST,
            Error::Invalid(_) | Error::OtherUpstream { .. } => UNPROCESSABLE,
            Error::UnsupportedMediaType => {
                ("unsupported-media-type", "Unsupported media type", StatusCode::UNSUPPORTED_MEDIA_TYPE)
            }
            Error::PayloadTooLarge { .. } => {
                ("payload-too-large", "Payload too large", StatusCode::PAYLOAD_TOO_LARGE)
            }
            Error::BodyTimeout => ("request-timeout", "Request timeout", StatusCode::REQUEST_TIMEOUT),
            Error::Unauthenticated => UNAUTHENTICATED,
            Error::IssuerUnavailable => {
                ("issuer-unavailable", "Issuer unavailable", StatusCode::SERVICE_UNAVAILABLE)
            }
            Error::Forbidden(_) => ("forbidden", "Forbidden", StatusCode::FORBIDDEN),
            Error::RateLimited { .. } => ("rate-limited", "Too many requests", StatusCode::TOO_MANY_REQUESTS),
            Error::TooManyRuns { .. } => ("too-many-runs", "Too many runs", StatusCode::TOO_MANY_REQUESTS),
            Error::TooManyReaders { .. } => {
                ("too-many-readers", "Too many readers", StatusCode::TOO_MANY_REQUESTS)
            }
            Error::Overloaded => ("overloaded", "Overloaded", StatusCode::SERVICE_UNAVAILABLE),
            Error::NotFound(_) => ("not-found", "Not found", StatusCode::NOT_FOUND),
            Error::MethodNotAllowed => {
                ("method-not-allowed", "Method not allowed", StatusCode::METHOD_NOT_ALLOWED)
            }
            Error::ThreadBusy => THREAD_BUSY,
            Error::QueueFull { .. } => ("queue-full", "Queue full", StatusCode::TOO_MANY_REQUESTS),
            Error::IdempotencyMismatch => {
                ("idempotency-mismatch", "Idempotency mismatch", StatusCode::UNPROCESSABLE_ENTITY)
            }
            Error::RunNotWaiting(_) => ("run-not-waiting", "Run not waiting", StatusCode::CONFLICT),
            Error::OtherReplica => ("other-replica", "Other replica", StatusCode::MISDIRECTED_REQUEST),
            Error::UpstreamUnavailable { .. } | Error::UpstreamFailed(_) => UPSTREAM_ERROR,
            Error::RunFailed { run, .. } => of_run(run),
            Error::Draining => DRAINING,
            Error::StoreUnavailable(_) => STORE_UNAVAILABLE,
            Error::Internal(_) => INTERNAL,
        };
        let (name, title, status) = kind;
        let retry_after = match error {
            Error::ThreadBusy
            | Error::QueueFull { .. }
            | Error::OtherReplica
            | Error::IssuerUnavailable
            | Error::TooManyRuns { .. }
            | Error::TooManyReaders { .. }
            | Error::Overloaded
            | Error::StoreUnavailable(_) => Some(Duration::from_secs(1)),
            Error::Draining => Some(Duration::from_secs(2)),
            Error::RunFailed { .. } if [DRAINING, REPLICA_LOST, STORE_UNAVAILABLE].contains(&kind) => {
                Some(Duration::from_secs(2))
            }
            Error::RunFailed { .. } if kind == THREAD_BUSY => Some(Duration::from_secs(1)),
            Error::UpstreamUnavailable { retry_after } | Error::RateLimited { retry_after, .. } => {
                Some(*retry_after)
            }
            Error::RunFailed { retry_after, .. } => *retry_after,
            _ => None,
        };
        let run = match error {
            Error::RunFailed { run, .. } => {
                run.error.as_ref().map(|error| (run.id, run.thread_id, error.code))
            }
            _ => None,
        };
        let detail = match error {
            Error::StoreUnavailable(Some(StoreError::Schema(text))) => text.clone(),
            other => other.to_string(),
        };
        Self { name, title, status, detail, retry_after, run }
    }
}

type Kind = (&'static str, &'static str, StatusCode);

const INVALID_REQUEST: Kind = ("invalid-request", "Invalid request", StatusCode::BAD_REQUEST);
const UNPROCESSABLE: Kind = ("invalid-request", "Invalid request", StatusCode::UNPROCESSABLE_ENTITY);
const UNAUTHENTICATED: Kind = ("unauthenticated", "Unauthenticated", StatusCode::UNAUTHORIZED);
const THREAD_BUSY: Kind = ("thread-busy", "Thread busy", StatusCode::CONFLICT);
const STORE_UNAVAILABLE: Kind = ("store-unavailable", "Store unavailable", StatusCode::SERVICE_UNAVAILABLE);
const DRAINING: Kind = ("draining", "Shutting down", StatusCode::SERVICE_UNAVAILABLE);
const REPLICA_LOST: Kind = ("replica-lost", "Replica lost", StatusCode::SERVICE_UNAVAILABLE);
const INTERNAL: Kind = ("internal", "Internal error", StatusCode::INTERNAL_SERVER_ERROR);
const UPSTREAM_ERROR: Kind = ("upstream-error", "Upstream error", StatusCode::BAD_GATEWAY);
const UPSTREAM_TIMEOUT: Kind = ("upstream-timeout", "Upstream timeout", StatusCode::GATEWAY_TIMEOUT);

fn of_run(run: &Run) -> Kind {
    match run.error.as_ref().map(|error| error.code) {
        // The caller did not want to wait, and nothing of its message was kept.
        Some(RunErrorCode::UpstreamBusy) if run.strategy == MultitaskStrategy::Reject => THREAD_BUSY,
        Some(RunErrorCode::DeadlineExceeded | RunErrorCode::UpstreamBusy | RunErrorCode::UpstreamTimeout) => {
            UPSTREAM_TIMEOUT
        }
        Some(RunErrorCode::GatewayStopped) => DRAINING,
        Some(RunErrorCode::ReplicaLost) => REPLICA_LOST,
        Some(RunErrorCode::NotRecorded) => STORE_UNAVAILABLE,
        Some(RunErrorCode::Internal | RunErrorCode::NotConfigured) => INTERNAL,
        Some(
            RunErrorCode::UpstreamError
            | RunErrorCode::UpstreamFailed
            | RunErrorCode::UpstreamUnavailable
            | RunErrorCode::UpstreamThreadGone
            | RunErrorCode::StreamBroken
            | RunErrorCode::ReplyTooLarge,
        )
        | None => UPSTREAM_ERROR,
    }
}

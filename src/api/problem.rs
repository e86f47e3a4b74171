//! Turns an [`Error`] into an RFC 9457 problem document. No other file maps errors to HTTP.

use std::collections::BTreeSet;
use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa::openapi::schema::{ObjectBuilder, Type};

use crate::domain::{MultitaskStrategy, Run, RunErrorCode, RunId, ThreadId};
use crate::error::{Chain, Error, TooOften, whole_seconds};
use crate::store::StoreError;

/// Prefix of each problem type.
const TYPE_PREFIX: &str = "urn:threadkeeper:problem:";
/// Pause before the next message where a rate limit of the upstream ended a run and the upstream
/// named no pause.
const RATE_LIMIT_PAUSE: Duration = Duration::from_secs(10);

/// A problem without its body, which [`complete`] writes.
#[derive(Clone)]
struct Problem {
    kind: Kind,
    detail: String,
    /// Value of `WWW-Authenticate` (RFC 6750).
    challenge: Option<String>,
    retry_after: Option<Duration>,
    run: Option<(RunId, ThreadId, RunErrorCode)>,
    upstream_code: Option<String>,
    upstream_status: Option<u16>,
}

/// A problem document (RFC 9457).
#[derive(Serialize, ToSchema)]
#[schema(as = Problem)]
pub(super) struct Document<'a> {
    #[schema(schema_with = any_type)]
    r#type: String,
    title: &'a str,
    #[schema(minimum = 400, maximum = 599)]
    status: u16,
    /// What is wrong, and how to mend it.
    detail: &'a str,
    /// The id of the request, as in the header `x-request-id` and in the gateway's log.
    request_id: &'a str,
    /// The run that failed. Present only if one did, like `thread_id` and `code`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    run_id: Option<RunId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    thread_id: Option<ThreadId>,
    /// The error code of the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    code: Option<RunErrorCode>,
    /// The upstream's own code for its refusal or failure, if it gave one that is safe to show.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    upstream_code: Option<&'a str>,
    /// The HTTP status with which the upstream refused the request or failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    upstream_status: Option<u16>,
}

/// Returns the schema of the field `type`: the list of all problem types.
fn any_type() -> ObjectBuilder {
    let names = KINDS.iter().map(|kind| kind.urn()).collect::<BTreeSet<_>>();
    ObjectBuilder::new()
        .schema_type(Type::String)
        .enum_values(Some(names))
}

impl IntoResponse for Error {
    /// Returns status and problem without a body. `complete` writes the body, because it has the
    /// request's id.
    fn into_response(self) -> Response {
        log(&self);
        let problem = Problem::from(&self);
        let mut response = problem.kind.status.into_response();
        response.extensions_mut().insert(problem);
        response
    }
}

/// Writes the body of a problem. Other answers pass unchanged.
pub(super) fn complete(mut response: Response, request_id: &str) -> Response {
    let Some(problem) = response.extensions_mut().remove::<Problem>() else {
        return response;
    };
    let document = Document {
        r#type: problem.kind.urn(),
        title: problem.kind.title,
        status: problem.kind.status.as_u16(),
        detail: &problem.detail,
        request_id,
        run_id: problem.run.map(|(run, _, _)| run),
        thread_id: problem.run.map(|(_, thread, _)| thread),
        code: problem.run.map(|(_, _, code)| code),
        upstream_code: problem.upstream_code.as_deref(),
        upstream_status: problem.upstream_status,
    };
    let body = serde_json::to_vec(&document).unwrap_or_default();
    let (mut parts, _) = response.into_parts();
    parts.headers.remove(header::CONTENT_LENGTH);
    parts.headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/problem+json"),
    );
    if let Some(challenge) = problem
        .challenge
        .and_then(|text| HeaderValue::try_from(text).ok())
    {
        parts.headers.insert(header::WWW_AUTHENTICATE, challenge);
    }
    if let Some(wait) = problem.retry_after {
        parts
            .headers
            .insert(header::RETRY_AFTER, HeaderValue::from(whole_seconds(wait)));
    }
    Response::from_parts(parts, body.into())
}

fn log(error: &Error) {
    match error {
        Error::Internal(_) => tracing::error!(error = %Chain(error), "the request failed"),
        Error::StoreUnavailable(_) | Error::MaybeMerged(_) => {
            tracing::warn!(error = %Chain(error), "the request failed");
        }
        // The log gets the name alone, because the text may quote the request.
        _ => tracing::debug!(
            problem = Problem::from(error).kind.name,
            "the request was refused"
        ),
    }
}

impl From<&Error> for Problem {
    fn from(error: &Error) -> Self {
        let kind = match error {
            Error::Malformed(_) => INVALID_REQUEST,
            Error::Invalid(_) | Error::OtherUpstream { .. } => UNPROCESSABLE,
            Error::UnsupportedMediaType => UNSUPPORTED_MEDIA_TYPE,
            Error::PayloadTooLarge { .. } => PAYLOAD_TOO_LARGE,
            Error::BodyTimeout => REQUEST_TIMEOUT,
            Error::Unauthenticated | Error::InvalidToken(_) => UNAUTHENTICATED,
            Error::IssuerUnavailable => ISSUER_UNAVAILABLE,
            Error::InsufficientScope(_) | Error::Forbidden(_) => FORBIDDEN,
            Error::RateLimited(_) => RATE_LIMITED,
            Error::TooManyRuns { .. } => TOO_MANY_RUNS,
            Error::TooManyReaders { .. } => TOO_MANY_READERS,
            Error::Overloaded | Error::BodiesFull => OVERLOADED,
            Error::NotFound(_) => NOT_FOUND,
            Error::MethodNotAllowed => METHOD_NOT_ALLOWED,
            Error::ThreadBusy => THREAD_BUSY,
            Error::NothingToRun => NOTHING_TO_RUN,
            Error::QueueFull { .. } | Error::QueueBytesFull { .. } => QUEUE_FULL,
            Error::IdempotencyMismatch => IDEMPOTENCY_MISMATCH,
            Error::RunNotWaiting(_) => RUN_NOT_WAITING,
            Error::OtherReplica => OTHER_REPLICA,
            Error::UpstreamUnavailable { .. } | Error::UpstreamFailed(_) => UPSTREAM_ERROR,
            Error::UpstreamTooSlow => UPSTREAM_TIMEOUT,
            Error::RunFailed { run, .. } => of_run(run),
            Error::Draining => DRAINING,
            Error::StoreUnavailable(_) => STORE_UNAVAILABLE,
            Error::MaybeMerged(_) => MAYBE_MERGED,
            Error::Internal(_) => INTERNAL,
        };
        let retry_after = match error {
            Error::ThreadBusy
            | Error::QueueFull { .. }
            | Error::QueueBytesFull { .. }
            | Error::OtherReplica
            | Error::IssuerUnavailable
            | Error::TooManyRuns { .. }
            | Error::TooManyReaders { .. }
            | Error::Overloaded
            | Error::StoreUnavailable(_)
            | Error::MaybeMerged(_) => Some(Duration::from_secs(1)),
            Error::Draining | Error::BodiesFull => Some(Duration::from_secs(2)),
            // Of these runs nothing was kept, so the same request may be sent again.
            Error::RunFailed { .. } if kind == STORE_UNAVAILABLE => Some(Duration::from_secs(2)),
            Error::RunFailed { .. } if kind == THREAD_BUSY => Some(Duration::from_secs(1)),
            // The run has ended, and its key gives this answer again. The upstream asks for a pause
            // before a new message.
            Error::RunFailed { retry_after, .. } if kind == UPSTREAM_RATE_LIMITED => {
                Some(retry_after.unwrap_or(RATE_LIMIT_PAUSE))
            }
            Error::UpstreamUnavailable { retry_after }
            | Error::RateLimited(TooOften { retry_after, .. }) => Some(*retry_after),
            Error::RunFailed { retry_after, .. } => *retry_after,
            _ => None,
        };
        let run = match error {
            Error::RunFailed { run, .. } => run
                .error
                .as_ref()
                .map(|error| (run.id, run.thread_id, error.code)),
            _ => None,
        };
        let (upstream_code, upstream_status) = match error {
            Error::RunFailed { run, .. } => run.error.as_ref().map_or((None, None), |error| {
                (error.upstream_code.clone(), error.upstream_status)
            }),
            Error::UpstreamFailed(error) => (error.code().map(str::to_owned), error.status()),
            _ => (None, None),
        };
        let detail = match error {
            Error::StoreUnavailable(Some(StoreError::Schema(text))) => text.clone(),
            other => other.to_string(),
        };
        let challenge = match error {
            Error::Unauthenticated => Some("Bearer".to_owned()),
            Error::InvalidToken(why) => Some(format!(
                "Bearer error=\"invalid_token\", error_description=\"{why}\""
            )),
            Error::InsufficientScope(needs) => Some(format!(
                "Bearer error=\"insufficient_scope\", scope=\"{needs}\""
            )),
            _ => None,
        };
        Self {
            kind,
            detail,
            challenge,
            retry_after,
            run,
            upstream_code,
            upstream_status,
        }
    }
}

/// A type of problem.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Kind {
    pub(super) name: &'static str,
    title: &'static str,
    pub(super) status: StatusCode,
    /// When the gateway answers with it, in one sentence for `/openapi.json`.
    pub(super) when: &'static str,
}

impl Kind {
    /// Returns the value of the field `type`.
    pub(super) fn urn(self) -> String {
        format!("{TYPE_PREFIX}{}", self.name)
    }
}

/// Defines a constant for each kind of problem, and the list of all kinds.
macro_rules! kinds {
    ($(#[doc = $when:literal] $constant:ident = $name:literal, $title:literal, $status:ident;)+) => {
        $(
            #[doc = $when]
            pub(super) const $constant: Kind =
                Kind { name: $name, title: $title, status: StatusCode::$status, when: $when.trim_ascii() };
        )+

        pub(super) const KINDS: &[Kind] = &[$($constant),+];
    };
}

kinds! {
    /// The gateway cannot read the request.
    INVALID_REQUEST = "invalid-request", "Invalid request", BAD_REQUEST;
    /// The request asks for something impossible.
    UNPROCESSABLE = "invalid-request", "Invalid request", UNPROCESSABLE_ENTITY;
    /// The request has no key or token, or one that opens nothing.
    UNAUTHENTICATED = "unauthenticated", "Unauthenticated", UNAUTHORIZED;
    /// The key or token does not open this, or only a backend may answer these function calls.
    FORBIDDEN = "forbidden", "Forbidden", FORBIDDEN;
    /// The thing does not exist, or the caller may not see it.
    NOT_FOUND = "not-found", "Not found", NOT_FOUND;
    /// The path does not take this method.
    METHOD_NOT_ALLOWED = "method-not-allowed", "Method not allowed", METHOD_NOT_ALLOWED;
    /// The body arrived too slowly.
    REQUEST_TIMEOUT = "request-timeout", "Request timeout", REQUEST_TIMEOUT;
    /// With strategy `reject`: another run is unfinished, or another program holds the upstream thread.
    THREAD_BUSY = "thread-busy", "Thread busy", CONFLICT;
    /// The run does not wait for these tool outputs, or not any more.
    RUN_NOT_WAITING = "run-not-waiting", "Run not waiting", CONFLICT;
    /// There is no message of the user that the gateway could send again.
    NOTHING_TO_RUN = "nothing-to-run", "Nothing to run", CONFLICT;
    /// The body is larger than `server.max_body_bytes`.
    PAYLOAD_TOO_LARGE = "payload-too-large", "Payload too large", PAYLOAD_TOO_LARGE;
    /// The header `content-type` does not name JSON.
    UNSUPPORTED_MEDIA_TYPE = "unsupported-media-type", "Unsupported media type", UNSUPPORTED_MEDIA_TYPE;
    /// The gateway stores no transcript, and another replica works on the run that the tool outputs are for.
    OTHER_REPLICA = "other-replica", "Other replica", MISDIRECTED_REQUEST;
    /// Another request used the `Idempotency-Key`.
    IDEMPOTENCY_MISMATCH = "idempotency-mismatch", "Idempotency mismatch", UNPROCESSABLE_ENTITY;
    /// A content policy of the upstream refused the message or the conversation.
    CONTENT_REFUSED = "content-refused", "Content refused", UNPROCESSABLE_ENTITY;
    /// The upstream refuses this message, even alone.
    MESSAGE_REFUSED = "message-refused", "Message refused", UNPROCESSABLE_ENTITY;
    /// The conversation is too long for the model or the upstream.
    CONTEXT_FULL = "context-full", "Context full", UNPROCESSABLE_ENTITY;
    /// A user or tenant sent more messages, or more other requests, than `limits` allows.
    RATE_LIMITED = "rate-limited", "Too many requests", TOO_MANY_REQUESTS;
    /// The tenant has `runs.max_runs_per_tenant` unfinished runs at this replica.
    TOO_MANY_RUNS = "too-many-runs", "Too many runs", TOO_MANY_REQUESTS;
    /// `server.max_readers_per_run` readers follow the events of this run.
    TOO_MANY_READERS = "too-many-readers", "Too many readers", TOO_MANY_REQUESTS;
    /// Too many runs wait on the thread, or their messages together are too large.
    QUEUE_FULL = "queue-full", "Queue full", TOO_MANY_REQUESTS;
    /// The gateway has a defect.
    INTERNAL = "internal", "Internal error", INTERNAL_SERVER_ERROR;
    /// The upstream refused, failed or broke off, or gets no requests because most of them failed lately.
    UPSTREAM_ERROR = "upstream-error", "Upstream error", BAD_GATEWAY;
    /// The upstream takes no more requests for a while.
    UPSTREAM_RATE_LIMITED = "upstream-rate-limited", "Upstream rate limited", SERVICE_UNAVAILABLE;
    /// This replica is shutting down.
    DRAINING = "draining", "Shutting down", SERVICE_UNAVAILABLE;
    /// The gateway cannot fetch the keys of the token issuer at present.
    ISSUER_UNAVAILABLE = "issuer-unavailable", "Issuer unavailable", SERVICE_UNAVAILABLE;
    /// Too many unfinished runs or large bodies, or messages arrive faster than the replica records them.
    OVERLOADED = "overloaded", "Overloaded", SERVICE_UNAVAILABLE;
    /// The database is away or has no free connection, or this replica has lost its session.
    STORE_UNAVAILABLE = "store-unavailable", "Store unavailable", SERVICE_UNAVAILABLE;
    /// The database failed while a message was merged into a queued run, which may hold it now.
    MAYBE_MERGED = "maybe-merged", "Maybe merged", SERVICE_UNAVAILABLE;
    /// The process that worked on the run died, and the upstream does not know a better end.
    REPLICA_LOST = "replica-lost", "Replica lost", SERVICE_UNAVAILABLE;
    /// The run met its deadline, its upstream thread stayed busy, or the upstream was too slow or silent.
    UPSTREAM_TIMEOUT = "upstream-timeout", "Upstream timeout", GATEWAY_TIMEOUT;
}

fn of_run(run: &Run) -> Kind {
    match run.error.as_ref().map(|error| error.code) {
        // The caller did not want to wait, and the gateway kept nothing of its message.
        Some(RunErrorCode::UpstreamBusy) if run.strategy == MultitaskStrategy::Reject => {
            THREAD_BUSY
        }
        Some(
            RunErrorCode::DeadlineExceeded
            | RunErrorCode::UpstreamBusy
            | RunErrorCode::UpstreamTimeout,
        ) => UPSTREAM_TIMEOUT,
        Some(RunErrorCode::GatewayStopped) => DRAINING,
        Some(RunErrorCode::ReplicaLost) => REPLICA_LOST,
        Some(RunErrorCode::NothingToRun) => NOTHING_TO_RUN,
        Some(RunErrorCode::NotRecorded) => STORE_UNAVAILABLE,
        Some(RunErrorCode::UpstreamRateLimited) => UPSTREAM_RATE_LIMITED,
        Some(RunErrorCode::ContentRefused) => CONTENT_REFUSED,
        Some(RunErrorCode::MessageRefused) => MESSAGE_REFUSED,
        Some(RunErrorCode::ContextFull) => CONTEXT_FULL,
        Some(RunErrorCode::Internal | RunErrorCode::NotConfigured) => INTERNAL,
        Some(
            RunErrorCode::UpstreamError
            | RunErrorCode::UpstreamQuotaExhausted
            | RunErrorCode::UpstreamUnauthorized
            | RunErrorCode::UpstreamMisconfigured
            | RunErrorCode::UpstreamFailed
            | RunErrorCode::UpstreamUnavailable
            | RunErrorCode::UpstreamThreadGone
            | RunErrorCode::StreamBroken
            | RunErrorCode::ReplyTooLarge,
        )
        | None => UPSTREAM_ERROR,
    }
}

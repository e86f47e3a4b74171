//! The outermost middleware. It gives each request its id, its span and its log line, and writes the
//! body of problems.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use axum::extract::{ConnectInfo, MatchedPath, Request, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use tracing::Instrument;
use tracing::field::Empty;
use uuid::Uuid;

use super::forwarded::{self, Prefix};
use super::problem;
use crate::config::ServerConfig;

pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const MAX_REQUEST_ID: usize = 128;
/// Header that tells nginx and similar proxies not to buffer events.
const BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// The part of the configuration that the middleware needs.
#[derive(Clone, Debug, Default)]
pub(super) struct Observed {
    pub(super) server: Arc<ServerConfig>,
    /// Whether the log has the addresses of clients.
    pub(super) logs_clients: bool,
}

/// Gives the request an id, and its log lines a span with that id. Writes the id into problems and into
/// the answer's header. The id is the caller's `x-request-id` if that is usable.
pub(super) async fn observe(
    State(Observed {
        server,
        logs_clients,
    }): State<Observed>,
    mut request: Request,
    next: Next,
) -> Response {
    let id = request_id(&request);
    let peer = request
        .extensions()
        .get()
        .map(|ConnectInfo(peer): &ConnectInfo<SocketAddr>| peer.ip());
    // Without a socket there is no peer, and so no trusted proxy.
    let known = peer.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    let prefix = Prefix::of(known, request.headers(), &server);
    let client = peer
        .filter(|_| logs_clients)
        .map(|peer| forwarded::client(peer, request.headers(), &server));
    request.extensions_mut().insert(prefix);
    // The path contains keys, which must not be logged. Its pattern does not.
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or("none", MatchedPath::as_str)
        .to_owned();
    let span = tracing::info_span!(
        "request",
        request_id = %id,
        method = %request.method(),
        route,
        client = client.map(tracing::field::display),
        caller = Empty,
        refused = Empty,
    );
    async move {
        let started = Instant::now();
        let mut response = problem::complete(next.run(request).await, &id);
        let status = response.status().as_u16();
        let duration_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        if route == "/healthz" || route == "/readyz" {
            tracing::debug!(status, duration_ms, "answered");
        } else {
            tracing::info!(status, duration_ms, "answered");
        }
        harden(response.headers_mut());
        if let Ok(value) = HeaderValue::from_str(&id) {
            response.headers_mut().insert(REQUEST_ID, value);
        }
        response
    }
    .instrument(span)
    .await
}

/// Adds headers that forbid caches to store answers, and browsers to guess their type. A stream of
/// events must not be compressed or buffered either, because proxies would delay the events.
fn harden(headers: &mut HeaderMap) {
    let is_stream = headers
        .get(CONTENT_TYPE)
        .is_some_and(|kind| kind == "text/event-stream");
    let caching = if is_stream {
        "no-store, no-transform"
    } else {
        "no-store"
    };
    headers.insert(CACHE_CONTROL, HeaderValue::from_static(caching));
    if is_stream {
        headers.insert(BUFFERING, HeaderValue::from_static("no"));
    }
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
}

fn request_id(request: &Request) -> String {
    let usable = |text: &&str| {
        (1..=MAX_REQUEST_ID).contains(&text.len())
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.:/+=@".contains(&b))
    };
    let given = request
        .headers()
        .get(REQUEST_ID)
        .and_then(|value| value.to_str().ok())
        .filter(usable);
    given.map_or_else(|| format!("req_{}", Uuid::now_v7().simple()), str::to_owned)
}

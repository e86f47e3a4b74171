//! The HTTP client of one upstream server. Apart from `report.rs` and `auth/jwks.rs` the only
//! file that names reqwest.
//!
//! It never follows a redirect, uses no proxy from the environment, does not decompress, and
//! keeps the server's prose out of errors and logs.
//!
//! A stream has no time limit, neither for its length nor for silence before or in it. A silent
//! server may be thinking, and a limit would lose its work. The caller ends a stream. Any other
//! answer must arrive as a whole within a time limit, so that an answer that trickles in does not
//! last for ever. TCP keep-alive finds a peer that has vanished.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::BoxStream;
use futures_util::{Stream, StreamExt, stream};
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::Value;
use tokio::time::timeout;
use url::Url;

use crate::config::{AuthScheme, UpstreamConfig};
use crate::upstream::classify::{ErrorDetail, Rejection, classify};
use crate::upstream::error::UpstreamError;
use crate::upstream::memory_limit::{Size, SizeBudget, is_dense};
use crate::upstream::refusal_cause;
use crate::upstream::report::{Report, chain};
use crate::upstream::retry::{LONGEST_WAIT, SHORTEST_WAIT};
use crate::upstream::sse::{self, SseEvent};
use crate::upstream::surrogates::without_lone_halves;

/// Idle connections that the pool keeps for the next call.
const POOL_IDLE_CONNECTIONS: usize = 256;
/// Silence on a connection after which TCP sends a keep-alive probe.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Time between two keep-alive probes.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// Unanswered keep-alive probes after which the connection counts as broken.
const KEEP_ALIVE_PROBES: u32 = 3;
/// Bytes of an error's body that are read.
const MAX_ERROR_BYTES: usize = 64 * 1024;
/// Headers that the connection owns and the configuration cannot set.
const CONNECTION_HEADERS: [&str; 5] = [
    "connection",
    "content-length",
    "host",
    "te",
    "transfer-encoding",
];

/// A client for one upstream server. Cheap to clone; clones share their connections.
#[derive(Clone)]
pub struct UpstreamClient {
    name: String,
    report: Arc<Report>,
    http: reqwest::Client,
    /// The base URL, with the configured query parameters.
    base_url: Url,
    headers: HeaderMap,
    call_timeout: Duration,
    max_bytes: usize,
    /// The log gets the server's own words about a refusal.
    logs_words: bool,
}

/// The events of one answer. Dropping the stream closes the connection.
pub(super) type SseStream = BoxStream<'static, Result<SseEvent, UpstreamError>>;

impl fmt::Debug for UpstreamClient {
    /// Shows the name alone, because URL and headers may hold secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UpstreamClient")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// The reason why a configured upstream cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
pub enum InvalidUpstream {
    #[error("upstream `{upstream}`: the base URL {reason}")]
    BaseUrl {
        upstream: String,
        reason: &'static str,
    },
    #[error("upstream `{upstream}`: the header `{header}` {reason}")]
    Header {
        upstream: String,
        header: String,
        reason: &'static str,
    },
    #[error(
        "upstream `{upstream}`: the API key has characters that a header cannot carry, such as a line break"
    )]
    ApiKey { upstream: String },
    #[error(
        "upstream `{upstream}`: this machine has no CA certificates, so an https server cannot be verified; install \
         the package `ca-certificates`, or let SSL_CERT_FILE name a bundle of certificates in PEM form"
    )]
    NoRootCertificates { upstream: String },
    #[error("upstream `{upstream}`: the HTTP client cannot be built")]
    Client { upstream: String },
}

/// A JSON answer.
#[derive(Debug)]
pub(super) struct Answer<T> {
    pub(super) value: T,
    /// The pause that the server asks for before the next question about an unfinished run,
    /// within bounds.
    pub(super) poll_after: Option<Duration>,
    pub(super) size: Size,
}

impl UpstreamClient {
    /// Prepares the client. It opens no connection.
    pub fn new(name: &str, config: &UpstreamConfig) -> Result<Self, InvalidUpstream> {
        let base_url = base_url(name, config)?;
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("threadkeeper/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .no_proxy()
            // One connection for each run. Over HTTP/2 all runs would share one connection and
            // its limit of streams.
            .http1_only()
            .connect_timeout(config.connect_timeout)
            .tcp_nodelay(true)
            .tcp_keepalive(KEEP_ALIVE)
            .tcp_keepalive_interval(KEEP_ALIVE_INTERVAL)
            .tcp_keepalive_retries(KEEP_ALIVE_PROBES)
            .pool_max_idle_per_host(POOL_IDLE_CONNECTIONS)
            .pool_idle_timeout(config.pool_idle_timeout);
        if base_url.scheme() == "http" {
            // No redirect is followed, so this client never speaks TLS and must not fail for lack
            // of certificates.
            builder = builder.tls_certs_only([]);
        }
        let http = builder.build().map_err(|error| {
            let upstream = name.to_owned();
            if chain(&error).any(|cause| cause.contains("No CA certificates")) {
                InvalidUpstream::NoRootCertificates { upstream }
            } else {
                InvalidUpstream::Client { upstream }
            }
        })?;
        Ok(Self {
            name: name.to_owned(),
            report: Arc::new(Report::new(name)),
            http,
            base_url,
            headers: fixed_headers(name, config)?,
            logs_words: config.log_upstream_errors,
            call_timeout: config.call_timeout,
            max_bytes: config.max_event_bytes,
        })
    }

    /// Returns the most bytes that may be assembled from one stream. That is the limit of one
    /// event, because the last event can repeat the whole reply.
    pub(super) const fn max_bytes(&self) -> usize {
        self.max_bytes
    }

    /// Returns a budget for content that is kept of several answers.
    pub(super) fn size_budget(&self) -> SizeBudget {
        SizeBudget::new(self.max_bytes)
    }

    /// Translates the failure of a call that every conversation begins with. If the server does
    /// not have `path`, logs the remedy for the operator and returns it with the error.
    pub(super) fn needs(
        &self,
        path: &'static str,
        remedy: &'static str,
        error: UpstreamError,
    ) -> UpstreamError {
        if !matches!(
            error,
            UpstreamError::Refused {
                status: 404 | 405 | 501,
                ..
            }
        ) {
            return error;
        }
        tracing::warn!(
            upstream.name = self.name,
            error = %error,
            "the upstream has no `{path}`, so no conversation can begin there: {remedy}"
        );
        UpstreamError::NotOffered { path, remedy }
    }

    /// Returns why no connection can be made, or `None` if one can. The text names hosts, so it
    /// is for the operator alone.
    pub(super) async fn obstacle(&self) -> Option<String> {
        let answer = timeout(
            self.call_timeout,
            self.http.get(self.base_url.clone()).send(),
        )
        .await;
        let error = answer.ok()?.err()?;
        Some(chain(&error).skip(1).collect::<Vec<_>>().join(": "))
    }

    /// Adds a header to every request, unless the configuration sets it.
    pub(super) fn with_header(mut self, name: &'static str, value: &'static str) -> Self {
        self.headers
            .entry(HeaderName::from_static(name))
            .or_insert(HeaderValue::from_static(value));
        self
    }

    /// Sends one request and reads the JSON answer, up to the configured event size.
    ///
    /// `segments` are percent-encoded. `query` is added to the configured parameters.
    pub(super) async fn json<T: DeserializeOwned>(
        &self,
        method: Method,
        segments: &[&str],
        query: &[(&str, &str)],
    ) -> Result<Answer<T>, UpstreamError> {
        in_time(self.call_timeout, self.ask(method, segments, query, None)).await
    }

    /// Sends one request that creates something from `body`, and waits for its answer without a
    /// time limit, because a request that was given up must not be repeated. The caller bounds
    /// the time.
    pub(super) async fn make<T: DeserializeOwned>(
        &self,
        segments: &[&str],
        body: &Value,
    ) -> Result<T, UpstreamError> {
        Ok(self
            .ask(Method::POST, segments, &[], Some(body))
            .await?
            .value)
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        segments: &[&str],
        query: &[(&str, &str)],
        body: Option<&Value>,
    ) -> Result<Answer<T>, UpstreamError> {
        let response = self
            .send(method, segments, query, body, "application/json")
            .await?;
        let poll_after = response
            .headers()
            .get("openai-poll-after-ms")
            .and_then(|value| value.to_str().ok()?.parse().ok())
            .map(|ms| Duration::from_millis(ms).clamp(SHORTEST_WAIT, LONGEST_WAIT));
        let body = self.read(response, self.max_bytes).await?.ok_or_else(|| {
            UpstreamError::Protocol(format!("an answer is longer than {} bytes", self.max_bytes))
        })?;
        if is_dense(&body) {
            return Err(UpstreamError::Protocol(
                "an answer has too many values".to_owned(),
            ));
        }
        refuse_told_error(&body)?;
        let value = std::str::from_utf8(&body)
            .ok()
            .and_then(|text| serde_json::from_str(&without_lone_halves(text)).ok())
            .ok_or_else(|| {
                UpstreamError::Protocol("an answer is not the expected JSON".to_owned())
            })?;
        Ok(Answer {
            value,
            poll_after,
            size: Size::of(&body),
        })
    }

    /// Sends one request whose answer has no content that matters.
    pub(super) async fn done(
        &self,
        method: Method,
        segments: &[&str],
    ) -> Result<(), UpstreamError> {
        let call = async {
            let response = self
                .send(method, segments, &[], None, "application/json")
                .await?;
            // The body is read to its end, so that the connection can serve the next call.
            let body = self.read(response, self.max_bytes).await?;
            body.map_or(Ok(()), |body| refuse_told_error(&body))
        };
        in_time(self.call_timeout, call).await
    }

    /// Sends one request and streams the events of the answer for as long as the caller reads.
    ///
    /// Some servers and proxies do not stream. If the answer is JSON, a whole object of the
    /// protocol or an error in spite of the good status, the stream is that one event.
    pub(super) async fn events(
        &self,
        method: Method,
        segments: &[&str],
        query: &[(&str, &str)],
        body: Option<&Value>,
    ) -> Result<SseStream, Rejection> {
        let is_question = method == Method::GET;
        let response = self
            .send(method, segments, query, body, "text/event-stream")
            .await?;
        if has_type(response.headers(), "text/event-stream") {
            return Ok(sse::events(
                chunks(response, Arc::clone(&self.report)),
                self.max_bytes,
            ));
        }
        if !has_type(response.headers(), "application/json") {
            return Err(not_a_stream());
        }
        let whole = self.read(response, self.max_bytes);
        // A question can be asked again.
        let whole = if is_question {
            in_time(self.call_timeout, whole).await?
        } else {
            whole.await?
        };
        if let Some(body) = whole
            && !is_dense(&body)
            && let Ok(data) = String::from_utf8(body)
            && (is_whole_run(&data) || tells_error(&data))
        {
            return Ok(stream::iter([Ok(SseEvent { name: None, data })]).boxed());
        }
        Err(not_a_stream())
    }

    /// Sends one request. An answer that is not a success is an error. Only the caller limits the
    /// time.
    async fn send(
        &self,
        method: Method,
        segments: &[&str],
        query: &[(&str, &str)],
        body: Option<&Value>,
        accept: &'static str,
    ) -> Result<reqwest::Response, Rejection> {
        let url = self.url(segments, query)?;
        let mut headers = self.headers.clone();
        headers.insert(ACCEPT, HeaderValue::from_static(accept));
        // Such a call may ask whether an object exists, or for a call that the server may not
        // offer.
        let is_question = method != Method::POST;
        let mut request = self.http.request(method, url).headers(headers);
        if let Some(body) = body {
            let json = HeaderValue::from_static("application/json");
            request = request.header(CONTENT_TYPE, json).body(body.to_string());
        }
        let response = request
            .send()
            .await
            .map_err(|error| self.report.failure(&error))?;
        let status = response.status();
        tracing::debug!(
            upstream.name = self.name,
            http.status = status.as_u16(),
            upstream.request_id = self.request_id(response.headers()),
            "the upstream answered"
        );
        if status.is_success() {
            Ok(response)
        } else {
            Err(self.refusal(status, response, segments, is_question).await)
        }
    }

    /// Reads the whole body. Returns `None` if it is longer than `limit`.
    async fn read(
        &self,
        mut response: reqwest::Response,
        limit: usize,
    ) -> Result<Option<Vec<u8>>, UpstreamError> {
        let announced = response
            .content_length()
            .and_then(|length| usize::try_from(length).ok());
        if announced.is_some_and(|length| length > limit) {
            return Ok(None);
        }
        let mut body = Vec::new();
        while let Some(chunk) = response
            .chunk()
            .await
            .map_err(|error| self.report.failure(&error))?
        {
            if body.len() + chunk.len() > limit {
                return Ok(None);
            }
            if body.capacity() - body.len() < chunk.len() {
                // Doubles the capacity, up to the limit.
                let wanted = (2 * body.len()).clamp(body.len() + chunk.len(), limit);
                body.reserve_exact(wanted - body.len());
            }
            body.extend_from_slice(&chunk);
        }
        Ok(Some(body))
    }

    async fn refusal(
        &self,
        status: StatusCode,
        response: reqwest::Response,
        segments: &[&str],
        is_question: bool,
    ) -> Rejection {
        let headers = response.headers().clone();
        // If the body cannot be read, or is too long for an error's, the status alone decides.
        let body = in_time(self.call_timeout, self.read(response, MAX_ERROR_BYTES)).await;
        let body = body.ok().flatten().unwrap_or_default();
        let refusal = classify(
            status,
            &headers,
            &body,
            segments.last().copied().unwrap_or_default(),
        );
        let code = match &refusal.error {
            // Cases that a run meets in normal operation and handles.
            UpstreamError::Busy { .. } | UpstreamError::ThreadGone => return refusal,
            UpstreamError::Refused { .. } if refusal.damage.is_some() => return refusal,
            UpstreamError::Refused {
                status: 404 | 405 | 501,
                ..
            } if is_question => return refusal,
            UpstreamError::Refused { code, .. }
            | UpstreamError::RateLimited { code, .. }
            | UpstreamError::Unavailable { code, .. } => code.as_deref(),
            _ => None,
        };
        let code = code.filter(|code| !self.repeats_secret(code));
        let words = self.logs_words.then(|| self.without_secrets(&body));
        self.report.refusal(
            status.as_u16(),
            code,
            &refusal.error,
            refusal_cause::hint(&ErrorDetail::from_body(&body), &refusal.error),
            words.as_deref(),
        );
        refusal
    }

    /// Logs an error that a stream told, like a refusal by a status.
    pub(super) fn log_told(&self, detail: &ErrorDetail) {
        let error = detail.told();
        let code = match &error {
            UpstreamError::Busy { .. } | UpstreamError::ThreadGone => return,
            _ if detail.damage().is_some() => return,
            UpstreamError::Refused { code, .. }
            | UpstreamError::RateLimited { code, .. }
            | UpstreamError::Unavailable { code, .. } => code.as_deref(),
            _ => None,
        };
        let code = code.filter(|code| !self.repeats_secret(code));
        let words = self
            .logs_words
            .then(|| self.without_secrets(detail.messages().as_bytes()));
        self.report.refusal(
            StatusCode::OK.as_u16(),
            code,
            &error,
            refusal_cause::hint(detail, &error),
            words.as_deref(),
        );
    }

    /// Returns the server's id of the request, if it is safe to log: a server may echo what it
    /// was sent.
    fn request_id<'a>(&self, headers: &'a HeaderMap) -> Option<&'a str> {
        ["x-request-id", "apim-request-id", "x-ms-request-id"]
            .into_iter()
            .find_map(|name| headers.get(name)?.to_str().ok())
            .filter(|id| id.len() <= 128 && id.bytes().all(|byte| byte.is_ascii_graphic()))
            .filter(|id| !self.repeats_secret(id))
    }

    /// Returns the beginning of the server's words for the operator, without what each request
    /// carries as a secret and without what looks like a key.
    fn without_secrets(&self, body: &[u8]) -> String {
        /// Bytes that are shown.
        const LONGEST: usize = 1024;
        // Longer than what is shown, so that no secret is cut in two before it is found.
        let body = String::from_utf8_lossy(&body[..body.len().min(4 * LONGEST)]);
        let mut shown = String::new();
        let mut after_scheme = false;
        let ends =
            |c: char| c.is_whitespace() || matches!(c, '"' | '\'' | '`' | '<' | '>' | ',' | ';');
        for piece in body.split_inclusive(ends) {
            let word = piece.trim_end_matches(ends);
            let end = piece[word.len()..].replace(char::is_control, " ");
            let is_secret = after_scheme || looks_like_key(word) || self.repeats_secret(word);
            after_scheme = word.eq_ignore_ascii_case("bearer") || (after_scheme && word.is_empty());
            let word = if is_secret && !word.is_empty() {
                "[hidden]"
            } else {
                word
            };
            if shown.len() + word.len() + end.len() > LONGEST {
                shown.push('…');
                break;
            }
            shown.extend(word.chars().filter(|c| !c.is_control()));
            shown.push_str(&end);
        }
        shown
    }

    /// Returns true if the text contains a piece of a secret that each request carries.
    fn repeats_secret(&self, text: &str) -> bool {
        /// Length of a piece in bytes. Shorter common pieces occur by chance.
        const PIECE: usize = 8;
        let headers = self
            .headers
            .values()
            .filter(|value| value.is_sensitive())
            .map(HeaderValue::as_bytes);
        let query: Vec<_> = self
            .base_url
            .query_pairs()
            .map(|(_, value)| value.into_owned())
            .collect();
        let mut secrets = headers.chain(query.iter().map(String::as_bytes));
        secrets.any(|secret| {
            secret
                .windows(PIECE)
                .any(|piece| text.as_bytes().windows(PIECE).any(|other| other == piece))
        })
    }

    fn url(&self, segments: &[&str], query: &[(&str, &str)]) -> Result<Url, UpstreamError> {
        // A URL drops such segments, and the call would reach another resource.
        if segments
            .iter()
            .any(|segment| matches!(*segment, "" | "." | ".."))
        {
            return Err(UpstreamError::Protocol(
                "an id is empty, `.` or `..`, and cannot be part of a path".to_owned(),
            ));
        }
        let mut url = self.base_url.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(segments);
        }
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        Ok(url)
    }
}

fn base_url(upstream: &str, config: &UpstreamConfig) -> Result<Url, InvalidUpstream> {
    let invalid = |reason| InvalidUpstream::BaseUrl {
        upstream: upstream.to_owned(),
        reason,
    };
    let mut url = config.base_url.clone();
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err(invalid(
            "must begin with http:// or https:// and name a host",
        ));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(invalid(
            "must not hold credentials: use `api_key` or `headers`",
        ));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(invalid("must not have a query or fragment: use `query`"));
    }
    if !config.query.is_empty() {
        let query = config
            .query
            .iter()
            .map(|(name, value)| (name, value.expose_secret()));
        url.query_pairs_mut().extend_pairs(query);
    }
    Ok(url)
}

/// Builds the header of the API key and the configured headers, which may replace it.
fn fixed_headers(upstream: &str, config: &UpstreamConfig) -> Result<HeaderMap, InvalidUpstream> {
    let mut headers = HeaderMap::new();
    if let Some(key) = &config.api_key {
        let (name, prefix) = match config.auth {
            AuthScheme::Bearer => (AUTHORIZATION, "Bearer "),
            AuthScheme::ApiKey => (HeaderName::from_static("api-key"), ""),
        };
        let value = secret_header(prefix, key).ok_or_else(|| InvalidUpstream::ApiKey {
            upstream: upstream.to_owned(),
        })?;
        headers.insert(name, value);
    }
    for (header, value) in &config.headers {
        let invalid = |reason| InvalidUpstream::Header {
            upstream: upstream.to_owned(),
            header: header.clone(),
            reason,
        };
        let name = HeaderName::try_from(header.as_str())
            .map_err(|_| invalid("is not a valid header name"))?;
        if CONNECTION_HEADERS.contains(&name.as_str()) {
            return Err(invalid(
                "belongs to the connection and cannot be configured",
            ));
        }
        let value = secret_header("", value)
            .ok_or_else(|| invalid("has a value that a header cannot carry"))?;
        headers.insert(name, value);
    }
    Ok(headers)
}

/// Returns true if the word has the form of a key or token: letters and digits, without a gap.
fn looks_like_key(word: &str) -> bool {
    const SHORTEST: usize = 20;
    let has = |is: fn(&u8) -> bool| word.bytes().any(|byte| is(&byte));
    word.contains("sk-")
        || (word.len() >= SHORTEST && has(u8::is_ascii_digit) && has(u8::is_ascii_alphabetic))
}

fn secret_header(prefix: &str, secret: &SecretString) -> Option<HeaderValue> {
    let mut value = HeaderValue::try_from(format!("{prefix}{}", secret.expose_secret())).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// Runs a call, and gives it up after `limit`.
async fn in_time<T>(
    limit: Duration,
    call: impl Future<Output = Result<T, UpstreamError>>,
) -> Result<T, UpstreamError> {
    timeout(limit, call)
        .await
        .unwrap_or(Err(UpstreamError::Broken { timeout: true }))
}

/// Returns the body as it arrives.
fn chunks(
    response: reqwest::Response,
    report: Arc<Report>,
) -> impl Stream<Item = Result<Bytes, UpstreamError>> + Send + 'static {
    stream::try_unfold((response, report), |(mut response, report)| async move {
        let chunk = response
            .chunk()
            .await
            .map_err(|error| report.failure(&error))?;
        Ok(chunk.map(|chunk| (chunk, (response, report))))
    })
}

/// Fails if an answer with a good status holds an error, because then nothing was done. An object
/// with an id is an object of the protocol, and its `error` field belongs to it.
fn refuse_told_error(body: &[u8]) -> Result<(), UpstreamError> {
    #[derive(Deserialize)]
    struct Object {
        id: Option<IgnoredAny>,
    }
    if body.len() <= MAX_ERROR_BYTES
        && let Ok(text) = std::str::from_utf8(body)
        && serde_json::from_str::<Object>(text).is_ok_and(|object| object.id.is_none())
        && ErrorDetail::of_event(None, text).is_some()
    {
        return Err(UpstreamError::Protocol(
            "the answer has a good status but holds an error".to_owned(),
        ));
    }
    Ok(())
}

/// Returns true if the JSON text is a run or a response.
fn not_a_stream() -> Rejection {
    UpstreamError::Protocol("the answer is not an event stream".to_owned()).into()
}

fn is_whole_run(json: &str) -> bool {
    #[derive(Deserialize)]
    struct Run {
        #[serde(rename = "id")]
        _id: String,
        #[serde(rename = "status")]
        _status: String,
    }
    serde_json::from_str::<Run>(json).is_ok()
}

fn tells_error(json: &str) -> bool {
    json.len() <= MAX_ERROR_BYTES
        && ErrorDetail::of_event(None, &without_lone_halves(json)).is_some()
}

fn has_type(headers: &HeaderMap, wanted: &str) -> bool {
    headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok()?.split(';').next())
        .is_some_and(|kind| kind.trim().eq_ignore_ascii_case(wanted))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::config::UpstreamKind;

    fn config(base_url: &str) -> UpstreamConfig {
        UpstreamConfig {
            api_key: Some("sk-hidden".to_owned().into()),
            ..UpstreamConfig::new(UpstreamKind::Responses, base_url.parse().unwrap())
        }
    }

    #[test]
    fn paths_are_joined_below_the_base() {
        for base in ["http://h/api/v1", "http://h/api/v1/"] {
            let client = UpstreamClient::new("u", &config(base)).unwrap();
            let url = client
                .url(&["threads", "a/b?c#d%2F", "runs"], &[("limit", "1")])
                .unwrap();
            assert_eq!(
                url.as_str(),
                "http://h/api/v1/threads/a%2Fb%3Fc%23d%252F/runs?limit=1"
            );
        }
        let client = UpstreamClient::new("u", &config("http://h")).unwrap();
        assert_eq!(
            client.url(&["threads"], &[]).unwrap().as_str(),
            "http://h/threads"
        );
    }

    #[test]
    fn an_id_cannot_move_the_path() {
        let client = UpstreamClient::new("u", &config("http://h/v1")).unwrap();
        for id in ["", ".", ".."] {
            assert!(
                matches!(
                    client.url(&["threads", id], &[]),
                    Err(UpstreamError::Protocol(_))
                ),
                "{id:?}"
            );
        }
    }

    #[test]
    fn configured_query_parameters_stand_on_every_url() {
        let mut config = config("http://h/v1");
        config.query = BTreeMap::from([("api-version".to_owned(), "2025 05".to_owned().into())]);
        let client = UpstreamClient::new("u", &config).unwrap();
        assert_eq!(
            client.url(&["x"], &[]).unwrap().as_str(),
            "http://h/v1/x?api-version=2025+05"
        );
        assert_eq!(
            client.url(&["x"], &[("a", "b")]).unwrap().as_str(),
            "http://h/v1/x?api-version=2025+05&a=b"
        );
    }

    #[test]
    fn what_cannot_work_is_refused_without_repeating_secrets() {
        let refused = |config: &UpstreamConfig| {
            let text = UpstreamClient::new("mine", config).unwrap_err().to_string();
            assert!(
                text.starts_with("upstream `mine`: ") && !text.contains("hidden"),
                "{text}"
            );
            text
        };
        for base in [
            "ftp://h/",
            "http://me:hidden@h/",
            "http://h/?key=hidden",
            "http://h/#hidden",
        ] {
            assert!(refused(&config(base)).contains("base URL"), "{base}");
        }
        let mut bad = config("http://h");
        bad.api_key = Some("hidden\n".to_owned().into());
        assert!(refused(&bad).contains("API key"));
        for (name, value) in [("x y", "1"), ("x", "hidden\n"), ("Content-Length", "1")] {
            let mut bad = config("http://h");
            bad.headers = BTreeMap::from([(name.to_owned(), value.to_owned().into())]);
            assert!(refused(&bad).contains(name), "{name}");
        }
    }

    #[test]
    fn the_key_is_in_no_debug_output() {
        let mut config = config("http://h/hidden");
        config.query = BTreeMap::from([("key".to_owned(), "hidden".to_owned().into())]);
        config.headers = BTreeMap::from([("x-key".to_owned(), "hidden".to_owned().into())]);
        let client = UpstreamClient::new("u", &config).unwrap();
        assert!(!format!("{client:?} {:?}", client.headers).contains("hidden"));
    }

    #[test]
    fn a_request_id_that_repeats_a_secret_is_not_logged() {
        let mut config = config("http://h");
        config.headers = BTreeMap::from([("x-key".to_owned(), "planted-header".to_owned().into())]);
        config.query = BTreeMap::from([("key".to_owned(), "planted query".to_owned().into())]);
        let client = UpstreamClient::new("u", &config).unwrap();
        let id = |text: &str| {
            let headers = HeaderMap::from_iter([(
                HeaderName::from_static("x-request-id"),
                HeaderValue::from_str(text).unwrap(),
            )]);
            client.request_id(&headers).map(str::to_owned)
        };
        assert_eq!(
            id("req_0123456789abcdef").as_deref(),
            Some("req_0123456789abcdef")
        );
        for repeated in [
            "sk-hidden",
            "id:sk-hidden:1",
            "k-hidden",
            "planted-",
            "anted-header",
            "two words",
        ] {
            assert_eq!(id(repeated), None, "{repeated}");
        }
    }

    #[test]
    fn a_configured_header_wins_over_ours() {
        let mut config = config("http://h");
        let ours = UpstreamClient::new("u", &config)
            .unwrap()
            .with_header("openai-beta", "assistants=v2");
        assert_eq!(ours.headers["openai-beta"], "assistants=v2");
        config.headers = BTreeMap::from([("OpenAI-Beta".to_owned(), "other".to_owned().into())]);
        let theirs = UpstreamClient::new("u", &config)
            .unwrap()
            .with_header("openai-beta", "assistants=v2");
        assert_eq!(theirs.headers["openai-beta"], "other");
    }
}

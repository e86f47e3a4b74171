//! Extractors whose refusals are problem documents, like every other error.

use std::sync::Arc;

use axum::body::HttpBody;
use axum::extract::{FromRef, FromRequest, FromRequestParts, Query, RawPathParams, Request};
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use axum::http::{HeaderMap, Uri};
use serde::de::{DeserializeOwned, IgnoredAny};
use sha2::{Digest, Sha256};
use utoipa::{IntoParams, ToSchema};

use super::caller::Caller;
use super::keys::Named;
use super::state::AppState;
use super::{body, canonical};
use crate::config::ServerConfig;
use crate::domain::{ConversationKey, PageRequest, RunId};
use crate::error::Error;
use crate::locks::Share;
use crate::runs::Which;
use crate::store::Idempotency;
use crate::wording;

/// The conversation that the request names, in the caller's tenant.
#[derive(Debug)]
pub(super) struct ApiConversation(pub(super) ConversationKey);

impl<S: Send + Sync> FromRequestParts<S> for ApiConversation {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Error> {
        let Caller(principal) = Caller::from_request_parts(parts, state).await?;
        // The guard adds none for a route without keys.
        let Named { user, scope, .. } = parts
            .extensions
            .get()
            .cloned()
            .ok_or(Error::Internal(None))?;
        Ok(Self(ConversationKey {
            tenant: principal.tenant,
            user,
            scope,
        }))
    }
}

/// The run that the path names.
#[derive(Debug)]
pub(super) struct ApiRun(pub(super) RunId);

impl<S: Send + Sync> FromRequestParts<S> for ApiRun {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Error> {
        let params = path_params(parts, state).await?;
        let text = params
            .iter()
            .find(|(key, _)| *key == "run")
            .map_or("", |(_, value)| value);
        text.parse()
            .map(Self)
            .map_err(|error| Error::Malformed(format!("the run id in the path: {error}")))
    }
}

pub(super) async fn path_params<S: Send + Sync>(
    parts: &mut Parts,
    state: &S,
) -> Result<RawPathParams, Error> {
    RawPathParams::from_request_parts(parts, state)
        .await
        .map_err(|_| Error::Malformed("the path must be percent-encoded UTF-8".to_owned()))
}

/// Highest number of an event in `last-event-id`; a higher one is read as this. Half of the range is
/// left, so that adding to it cannot overflow.
const LAST_EVENT: i64 = i64::MAX / 2;

/// The header `last-event-id`, `<run>:<n>`: the last event that the caller has seen.
#[derive(Debug)]
pub(super) struct LastEventId(pub(super) Option<(RunId, i64)>);

impl<S: Send + Sync> FromRequestParts<S> for LastEventId {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Error> {
        let Some(value) = parts.headers.get("last-event-id") else {
            return Ok(Self(None));
        };
        let text = value.to_str().unwrap_or_default();
        let number = |n: &str| {
            n.parse::<u64>()
                .ok()
                .map(|n| i64::try_from(n).map_or(LAST_EVENT, |n| n.min(LAST_EVENT)))
        };
        let read = |(run, n): (&str, &str)| Some((run.parse().ok()?, number(n)?));
        match text.split_once(':').and_then(read) {
            Some(last) => Ok(Self(Some(last))),
            // An `EventSource` that has seen no event sends an empty one.
            None if text.is_empty() => Ok(Self(None)),
            None => Err(Error::Malformed(
                "`last-event-id` must be the `id` of an event of this run, as the stream sent it"
                    .to_owned(),
            )),
        }
    }
}

/// The body, a JSON object; the request's idempotency key and hash; and the body's share of memory. The
/// handler must keep the share as long as the content of the body.
#[derive(Debug)]
pub(super) struct ApiJson<T>(
    pub(super) T,
    pub(super) Option<Idempotency>,
    pub(super) Share,
);

impl<T: DeserializeOwned> FromRequest<AppState> for ApiJson<T> {
    type Rejection = Error;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, Error> {
        read_body(request, state, false).await
    }
}

/// As [`ApiJson`], where a request without a body stands for an object without fields.
#[derive(Debug)]
pub(super) struct ApiOptions<T>(
    pub(super) T,
    pub(super) Option<Idempotency>,
    pub(super) Share,
);

impl<T: DeserializeOwned> FromRequest<AppState> for ApiOptions<T> {
    type Rejection = Error;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, Error> {
        let ApiJson(value, idempotency, share) = read_body(request, state, true).await?;
        Ok(Self(value, idempotency, share))
    }
}

async fn read_body<T: DeserializeOwned>(
    request: Request,
    state: &AppState,
    is_optional: bool,
) -> Result<ApiJson<T>, Error> {
    if !(is_json(&request) || (is_optional && HttpBody::is_end_stream(request.body()))) {
        return Err(Error::UnsupportedMediaType);
    }
    let idempotency_key = idempotency_key(request.headers())?;
    let path = request.uri().path();
    let named = request.extensions().get::<Named>();
    let path = named
        .map_or(path.into(), |named| named.path(path))
        .into_owned();
    let (mut body, share) = body::read(request.into_body(), &state.server, &state.bodies).await?;
    if is_optional && body.is_empty() {
        body = b"{}".to_vec();
    }
    let value = parsed(&body)?;
    let idempotency = idempotency_key.map(|key| {
        // Hashes the canonical form, so that blanks and the order of fields do not matter.
        let mut hash = Sha256::new();
        hash.update(path.as_bytes());
        hash.update([0]);
        canonical::hash(&body, &mut hash);
        Idempotency {
            key,
            request_hash: hash.finalize().into(),
        }
    });
    Ok(ApiJson(value, idempotency, share))
}

/// Parses a body.
fn parsed<T: DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    // Serde would also read an array as the fields of a struct in their order.
    if body
        .trim_ascii_start()
        .first()
        .is_some_and(|first| *first != b'{')
    {
        return Err(Error::Malformed(
            "the body must be a JSON object".to_owned(),
        ));
    }
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let value: T = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        if inner.is_data() {
            let at = if path == "." {
                String::new()
            } else {
                format!("`{path}`: ")
            };
            Error::Invalid(format!("{at}{}", told(&inner.to_string())))
        } else if inner.to_string().starts_with("expected value")
            && serde_json::from_slice::<IgnoredAny>(body).is_ok()
        {
            // Serde says so if a list, for example, stands where one of several words must be.
            Error::Invalid(format!("`{path}`: must be a string"))
        } else {
            not_json(&inner)
        }
    })?;
    deserializer.end().map_err(|error| not_json(&error))?;
    Ok(value)
}

fn not_json(error: &serde_json::Error) -> Error {
    let (line, column) = (error.line(), error.column());
    Error::Malformed(format!(
        "the body is not JSON: {} (line {line}, column {column})",
        told(&error.to_string())
    ))
}

/// Returns what is wrong, from the text of a parser's error.
fn told(error: &str) -> String {
    wording::plain(error).unwrap_or_else(|| wording::without_place(error).to_owned())
}

/// Reads the header `idempotency-key`: 1 to 255 visible ASCII characters.
fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Error> {
    let mut values = headers.get_all("idempotency-key").iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    if values.next().is_some() {
        return Err(Error::Malformed(
            "send the header `idempotency-key` once".to_owned(),
        ));
    }
    let key = value.to_str().unwrap_or_default();
    if (1..=255).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Ok(Some(key.to_owned()));
    }
    Err(Error::Malformed(
        "`idempotency-key` must have 1 to 255 visible ASCII characters: send a UUID, for example"
            .to_owned(),
    ))
}

fn is_json(request: &Request) -> bool {
    let essence = request
        .headers()
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let essence = essence
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    essence == "application/json"
        || (essence.starts_with("application/") && essence.ends_with("+json"))
}

/// A page of a list, and `More`, the other parameters of the query. `limit` is 1 to
/// `server.max_page_size`, 20 if absent. `order` is `asc` or `desc`, `desc` (newest first) if absent.
#[derive(Debug)]
pub(super) struct ApiPage<Id, More = Nothing>(pub(super) PageRequest<Id>, pub(super) More);

/// A query without other parameters.
#[derive(Debug, serde::Deserialize)]
pub(super) struct Nothing {}

#[derive(serde::Deserialize, IntoParams)]
pub(super) struct PageQuery {
    /// Most entries of the page; 20 if absent.
    #[param(minimum = 1, maximum = 100)]
    limit: Option<u32>,
    /// Order of the entries; `desc` (newest first) if absent.
    #[param(inline)]
    order: Option<Order>,
    /// Id of an entry: the page begins after it. Not together with `before`.
    after: Option<String>,
    /// Id of an entry: the page ends before it. Not together with `after`.
    before: Option<String>,
}

#[derive(serde::Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Order {
    Asc,
    Desc,
}

impl<S, Id, More> FromRequestParts<S> for ApiPage<Id, More>
where
    S: Send + Sync,
    Arc<ServerConfig>: FromRef<S>,
    Id: std::str::FromStr<Err: std::fmt::Display>,
    More: DeserializeOwned,
{
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Error> {
        let page: PageQuery = query(parts)?;
        let most = Arc::<ServerConfig>::from_ref(state).max_page_size;
        let limit = page.limit.unwrap_or(most.min(20));
        if !(1..=most).contains(&limit) {
            return Err(Error::Malformed(format!(
                "`limit` must be between 1 and {most}"
            )));
        }
        if page.after.is_some() && page.before.is_some() {
            return Err(Error::Malformed(
                "send `after` or `before`, not both".to_owned(),
            ));
        }
        let cursor = |name: &str, text: Option<String>| {
            text.map(|text| {
                text.parse::<Id>()
                    .map_err(|error| Error::Malformed(format!("`{name}`: {error}")))
            })
            .transpose()
        };
        let request = PageRequest {
            limit,
            ascending: matches!(page.order, Some(Order::Asc)),
            after: cursor("after", page.after)?,
            before: cursor("before", page.before)?,
        };
        Ok(Self(request, query(parts)?))
    }
}

/// The parameters of the query.
#[derive(Debug)]
pub(super) struct ApiQuery<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for ApiQuery<T> {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Error> {
        query(parts).map(Self)
    }
}

/// The id that the path names.
#[derive(Debug)]
pub(super) struct ApiId<Id>(pub(super) Id);

impl<S, Id> FromRequestParts<S> for ApiId<Id>
where
    S: Send + Sync,
    Id: std::str::FromStr<Err: std::fmt::Display>,
{
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Error> {
        let params = path_params(parts, state).await?;
        let text = params.iter().next().map_or("", |(_, value)| value);
        text.parse()
            .map(Self)
            .map_err(|error| Error::Malformed(format!("the id in the path: {error}")))
    }
}

/// The runs of a thread that a request means: `which` = `active` (if absent), `queued` or `all`.
#[derive(Debug)]
pub(super) struct ApiWhich(pub(super) Which);

#[derive(serde::Deserialize, IntoParams)]
pub(super) struct WhichQuery {
    /// The runs to cancel; `active` if absent.
    #[param(inline)]
    which: Option<WhichWord>,
}

#[derive(serde::Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum WhichWord {
    Active,
    Queued,
    All,
}

impl<S: Send + Sync> FromRequestParts<S> for ApiWhich {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Error> {
        let query: WhichQuery = query(parts)?;
        Ok(Self(match query.which {
            None | Some(WhichWord::Active) => Which::Active,
            Some(WhichWord::Queued) => Which::Queued,
            Some(WhichWord::All) => Which::All,
        }))
    }
}

fn query<T: DeserializeOwned>(parts: &Parts) -> Result<T, Error> {
    read(parts.uri.query().unwrap_or_default())
}

fn read<T: DeserializeOwned>(query: &str) -> Result<T, Error> {
    let uri = Uri::builder().path_and_query(format!("/?{query}")).build();
    let uri = uri.map_err(|_| Error::Malformed("the query is not a valid query".to_owned()))?;
    Query::try_from_uri(&uri)
        .map(|Query(query)| query)
        .map_err(|rejection| {
            let text = rejection.body_text();
            // The text is `…: name: what is wrong`. The guard refused unknown names already.
            let text = text
                .strip_prefix("Failed to deserialize query string: ")
                .unwrap_or(&text);
            Error::Malformed(match text.split_once(": ") {
                Some((name, error)) => format!("the query parameter `{name}`: {}", told(error)),
                None => format!("the query: {}", told(text)),
            })
        })
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::{HeaderValue, StatusCode};
    use axum::response::IntoResponse;
    use axum::routing::get;
    use axum::{Json, Router};
    use futures_util::FutureExt;
    use http_body_util::BodyExt;
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use tower::ServiceExt;

    use super::super::SCOPES;
    use super::super::keys::Place;
    use super::super::views::{PatchThread, PostMessage, PostOutputs};
    use super::*;
    use crate::domain::{KeyText, UserContent};
    use crate::testing::{Words, damaged, mutated};

    /// Sends a request to a route below each kind of conversation, which answers with the key that it
    /// read. Returns status and body.
    fn key_of(path: &[u8]) -> Option<(StatusCode, Value)> {
        let tell = async |params: RawPathParams| {
            let named = Named::read(
                Place::Path,
                Some(&params),
                &HeaderMap::new(),
                KeyText::MAX_BYTES,
            )?;
            let named = named.ok_or(Error::Internal(None))?;
            Ok::<_, Error>(Json(json!([
                named.user.as_str(),
                named.scope.kind(),
                named.scope.name()
            ])))
        };
        let scopes = SCOPES
            .iter()
            .filter(|scope| Place::of(scope) == Place::Path);
        let router: Router = scopes.fold(Router::new(), |router, scope| {
            router.route(&format!("{scope}/thread"), get(tell))
        });
        // An invalid address does not reach the router.
        let uri = Uri::try_from(path).ok()?;
        let request = Request::builder().uri(uri).body(Body::empty()).unwrap();
        let answer = async {
            let response = router.oneshot(request).await.unwrap();
            let status = response.status();
            let body = response.into_body().collect().await.unwrap().to_bytes();
            (status, serde_json::from_slice(&body).unwrap_or_default())
        };
        answer.now_or_never()
    }

    /// Keys as a path may have them: each byte as it is, if possible, or percent-encoded.
    fn spelled() -> impl Strategy<Value = (String, Vec<u8>)> {
        let text = "\\PC{1,40}|[./%?#;:@ ]{1,6}|\\.{1,2}|[a-z]{250,258}|[\\x00-\\x1fa]{1,3}";
        (text, prop::collection::vec(0..3_u8, 1..20)).prop_map(|(text, ways)| {
            let mut spelled = Vec::new();
            for (byte, way) in text.bytes().zip(ways.iter().cycle()) {
                let is_plain = byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@".contains(&byte);
                match way {
                    0 if is_plain => spelled.push(byte),
                    1 => spelled.extend(format!("%{byte:02x}").bytes()),
                    _ => spelled.extend(format!("%{byte:02X}").bytes()),
                }
            }
            (text, spelled)
        })
    }

    const WORDS: Words = Words {
        texts: &[
            "text",
            "image_url",
            "refusal",
            "enqueue",
            "rollback",
            "continue",
            "\0",
            "threadkeeper_x",
        ],
        keys: &[
            "content",
            "type",
            "text",
            "metadata",
            "stream",
            "timeout_ms",
            "ttl_ms",
            "tool_outputs",
            "output",
            "tool_call_id",
            "assistant",
            "multitask_strategy",
        ],
    };

    fn bodies() -> Vec<Value> {
        vec![
            json!({"content": "hello", "assistant": "default", "multitask_strategy": "enqueue", "stream": true,
                "on_disconnect": "cancel", "metadata": {"a": "b"}, "timeout_ms": 5, "ttl_ms": 7}),
            json!({"content": [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": "u"}},
                {"type": "image_file", "image_file": {"file_id": "f", "detail": "low"}}]}),
            json!({"tool_outputs": [{"tool_call_id": "call_1", "output": "4"}], "stream": false}),
            json!({"metadata": {"a": "b", "c": ""}, "ttl_ms": null}),
        ]
    }

    /// Each body is read within the rules of the domain, or refused with 400 or 422. A second reading
    /// has the same result.
    fn is_read_or_refused(body: &[u8]) -> Result<(), TestCaseError> {
        let refused = |error: Error| {
            let is_typed = matches!(error, Error::Malformed(_) | Error::Invalid(_));
            let status = error.into_response().status();
            is_typed
                && [StatusCode::BAD_REQUEST, StatusCode::UNPROCESSABLE_ENTITY].contains(&status)
        };
        match parsed::<PostMessage>(body) {
            Ok(message) => {
                let size: usize = message
                    .content
                    .0
                    .iter()
                    .map(crate::domain::ContentPart::size)
                    .sum();
                prop_assert!(size <= body.len());
                let _ = UserContent::try_from(message.content.0);
                prop_assert!(
                    message
                        .metadata
                        .is_none_or(|metadata| metadata.iter().count() <= 10)
                );
            }
            Err(error) => prop_assert!(refused(error)),
        }
        match parsed::<PostOutputs>(body) {
            Ok(outputs) => {
                let outputs = serde_json::to_string(&outputs.tool_outputs).unwrap();
                prop_assert!(!outputs.contains("\\u0000"));
            }
            Err(error) => prop_assert!(refused(error)),
        }
        match parsed::<PatchThread>(body) {
            Ok(patch) => prop_assert!(
                patch
                    .metadata
                    .is_none_or(|metadata| metadata.iter().count() <= 10)
            ),
            Err(error) => prop_assert!(refused(error)),
        }
        Ok(())
    }

    #[test]
    fn bodies_that_are_cut_off_deep_huge_or_odd_are_refused() {
        for body in bodies() {
            let text = body.to_string();
            for end in 0..text.len() {
                is_read_or_refused(&text.as_bytes()[..end]).unwrap();
                assert!(
                    parsed::<PostMessage>(&text.as_bytes()[..end]).is_err(),
                    "{}",
                    &text[..end]
                );
            }
        }
        for content in [
            "[".repeat(100_000),
            "{\"a\":".repeat(100_000),
            format!("[{}", "[],".repeat(100_000)),
            "1e999999".to_owned(),
            "9".repeat(10_000),
            "-1".to_owned(),
            r#""\ud800""#.to_owned(),
            r#""\udc00\ud800""#.to_owned(),
            r#""a", "content": "b""#.to_owned(),
        ] {
            for field in [
                "content",
                "metadata",
                "ttl_ms",
                "timeout_ms",
                "tool_outputs",
            ] {
                let body = format!("{{\"content\": \"a\", \"{field}\": {content}}}");
                is_read_or_refused(body.as_bytes()).unwrap();
                assert!(
                    parsed::<PostMessage>(body.as_bytes()).is_err(),
                    "{field}: {content:.60}"
                );
            }
        }
    }

    proptest! {
        #[test]
        fn a_key_is_read_from_its_path_byte_for_byte((user, path) in spelled(), (name, tail) in spelled(), kind in 0..3_u8) {
            let mut path = [b"/v1/users/", path.as_slice()].concat();
            if kind > 0 {
                path.extend(if kind == 1 { b"/sessions/".as_slice() } else { b"/topics/" });
                path.extend(tail);
            }
            path.extend(b"/thread");
            let (status, told) = key_of(&path).unwrap();
            let is_key = |text: &str| {
                let fits = (1..=256).contains(&text.len()) && !text.chars().any(char::is_control);
                fits && ![".", ".."].contains(&text)
            };
            if is_key(&user) && (kind == 0 || is_key(&name)) {
                let (kind, name) = [("user", ""), ("session", &name), ("topic", &name)][usize::from(kind)];
                prop_assert_eq!(status, StatusCode::OK);
                prop_assert_eq!(told, json!([user, kind, name]));
            } else {
                prop_assert_eq!(status, StatusCode::BAD_REQUEST);
            }
        }

        #[test]
        fn no_path_is_too_odd(path in prop::collection::vec(
            prop_oneof![
                Just(b"/v1/users/".to_vec()), Just(b"/thread".to_vec()), Just(b"/sessions/".to_vec()), Just(b"/topics/".to_vec()),
                Just(b"%".to_vec()), Just(b"%zz".to_vec()), Just(b"%ff".to_vec()), Just(b"%00".to_vec()), Just(b"%2f".to_vec()),
                Just(b"..".to_vec()), Just(b"//".to_vec()), prop::collection::vec(any::<u8>(), 0..4),
            ],
            0..12,
        )) {
            if let Some((status, told)) = key_of(&[b"/v1/users/", path.concat().as_slice()].concat()) {
                let expected = [StatusCode::OK, StatusCode::BAD_REQUEST, StatusCode::NOT_FOUND];
                prop_assert!(expected.contains(&status), "{}", status);
                prop_assert_eq!(status == StatusCode::OK, told.is_array());
            }
        }

        #[test]
        fn headers_of_any_bytes_are_read_or_refused(
            value in prop_oneof![
                prop::collection::vec(any::<u8>(), 0..300),
                "run_[0-9a-f]{32}:-?[0-9]{0,22}".prop_map(String::into_bytes),
            ],
        ) {
            let Ok(value) = HeaderValue::from_bytes(&value) else { return Ok(()) };
            let request = Request::builder().header("last-event-id", &value).header("idempotency-key", &value);
            let (mut parts, ()) = request.body(()).unwrap().into_parts();
            match LastEventId::from_request_parts(&mut parts, &()).now_or_never().unwrap() {
                Ok(LastEventId(Some((run, n)))) => {
                    let begin = [run.to_string().as_str(), ":"].concat();
                    prop_assert!((0..=LAST_EVENT).contains(&n) && value.to_str().unwrap().starts_with(&begin));
                }
                // A header with unreadable bytes counts as an empty one.
                Ok(LastEventId(None)) => prop_assert!(value.to_str().unwrap_or_default().is_empty()),
                Err(error) => prop_assert!(matches!(error, Error::Malformed(_))),
            }
            match idempotency_key(&parts.headers) {
                Ok(key) => prop_assert!(key.is_some_and(|key| key.as_bytes() == value.as_bytes() && key.len() <= 255)),
                Err(error) => prop_assert!(matches!(error, Error::Malformed(_))),
            }
        }

        #[test]
        fn bodies_that_are_nearly_right_are_read_or_refused(body in mutated(bodies(), WORDS)) {
            is_read_or_refused(body.to_string().as_bytes())?;
        }

        #[test]
        fn bodies_of_any_bytes_are_read_or_refused(
            body in prop_oneof![
                prop::sample::select(bodies()).prop_flat_map(|body| damaged(body.to_string().into_bytes())),
                prop::collection::vec(any::<u8>(), 0..200),
            ],
        ) {
            is_read_or_refused(&body)?;
        }
    }
}

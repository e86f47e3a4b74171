//! Our extractors: what they refuse is a problem document like every other error.

use axum::extract::{FromRequest, FromRequestParts, Query, RawPathParams, Request};
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use axum::http::{HeaderMap, Uri};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use tokio::time::timeout;

use super::AppState;
use super::guard::Caller;
use crate::domain::{ConversationKey, InvalidKey, PageRequest, RunId, Scope};
use crate::error::Error;
use crate::runs::Which;
use crate::store::Idempotency;

/// The conversation that the path names, among those of the caller's tenant.
#[derive(Debug)]
pub(super) struct ApiConversation(pub(super) ConversationKey);

impl<S: Send + Sync> FromRequestParts<S> for ApiConversation {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Error> {
        let Caller(principal) = Caller::from_request_parts(parts, state).await?;
        let params = path_params(parts, state).await?;
        let named =
            |name: &str| params.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_owned());
        let user = named("user").ok_or(Error::Internal(None))?;
        let scope = match (named("session"), named("topic")) {
            (Some(name), _) => Scope::Session(name.try_into().map_err(invalid("session"))?),
            (None, Some(name)) => Scope::Topic(name.try_into().map_err(invalid("topic"))?),
            (None, None) => Scope::User,
        };
        let user = user.try_into().map_err(invalid("user"))?;
        Ok(Self(ConversationKey { tenant: principal.tenant, user, scope }))
    }
}

fn invalid(name: &'static str) -> impl Fn(InvalidKey) -> Error {
    move |error| Error::Malformed(format!("the {name} key in the path: {error}"))
}

/// The run that the path names.
#[derive(Debug)]
pub(super) struct ApiRun(pub(super) RunId);

impl<S: Send + Sync> FromRequestParts<S> for ApiRun {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Error> {
        let params = path_params(parts, state).await?;
        let text = params.iter().find(|(key, _)| *key == "run").map_or("", |(_, value)| value);
        text.parse().map(Self).map_err(|error| Error::Malformed(format!("the run id in the path: {error}")))
    }
}

async fn path_params<S: Send + Sync>(parts: &mut Parts, state: &S) -> Result<RawPathParams, Error> {
    RawPathParams::from_request_parts(parts, state)
        .await
        .map_err(|_| Error::Malformed("the path is not percent-encoded UTF-8".to_owned()))
}

/// Up to where a caller has seen a run's events: the header `last-event-id`, `<run>:<n>`.
#[derive(Debug)]
pub(super) struct LastEventId(pub(super) Option<(RunId, i64)>);

impl<S: Send + Sync> FromRequestParts<S> for LastEventId {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Error> {
        let Some(value) = parts.headers.get("last-event-id") else { return Ok(Self(None)) };
        let text = value.to_str().unwrap_or_default();
        let number = |n: &str| n.parse().ok().filter(|n: &i64| *n >= 0);
        let read = |(run, n): (&str, &str)| Some((run.parse().ok()?, number(n)?));
        match text.split_once(':').and_then(read) {
            Some(last) => Ok(Self(Some(last))),
            // What an `EventSource` sends that has seen no event.
            None if text.is_empty() => Ok(Self(None)),
            None => Err(Error::Malformed(
                "`last-event-id` must be the id of an event of this run, as the stream showed it".to_owned(),
            )),
        }
    }
}

/// A JSON object as the body, which has to arrive within `server.body_read_timeout`; and what makes the request known
/// should it be repeated.
#[derive(Debug)]
pub(super) struct ApiJson<T>(pub(super) T, pub(super) Option<Idempotency>);

impl<T: DeserializeOwned> FromRequest<AppState> for ApiJson<T> {
    type Rejection = Error;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, Error> {
        if !is_json(&request) {
            return Err(Error::UnsupportedMediaType);
        }
        let idempotency_key = idempotency_key(request.headers())?;
        let path = request.uri().path().to_owned();
        let limit = state.server.max_body_bytes;
        let body = Limited::new(request.into_body(), limit).collect();
        let body = match timeout(state.server.body_read_timeout, body).await {
            Err(_) => return Err(Error::BodyTimeout),
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(error)) if error.is::<LengthLimitError>() => return Err(Error::PayloadTooLarge { limit }),
            Ok(Err(_)) => return Err(Error::Malformed("the body broke off".to_owned())),
        };
        // Serde would also take a struct's fields as an array in their order, which nobody means.
        if body.trim_ascii_start().first().is_some_and(|first| *first != b'{') {
            return Err(Error::Malformed("the body must be a JSON object".to_owned()));
        }
        let mut deserializer = serde_json::Deserializer::from_slice(&body);
        let value: T = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
            let path = error.path().to_string();
            let inner = error.into_inner();
            if inner.is_data() {
                let at = if path == "." { String::new() } else { format!("`{path}`: ") };
                Error::Invalid(format!("{at}{inner}"))
            } else {
                Error::Malformed(format!("the body is not JSON: {inner}"))
            }
        })?;
        deserializer.end().map_err(|error| Error::Malformed(format!("the body is not JSON: {error}")))?;
        let idempotency = idempotency_key.map(|key| {
            // By meaning, not by spelling: blanks and the order of fields do not matter.
            let canonical = serde_json::from_slice::<serde_json::Value>(&body).map(|body| body.to_string());
            let mut hash = Sha256::new();
            hash.update(path.as_bytes());
            hash.update([0]);
            hash.update(canonical.unwrap_or_default().as_bytes());
            Idempotency { key, request_hash: hash.finalize().into() }
        });
        Ok(Self(value, idempotency))
    }
}

/// The header `idempotency-key`: 1 to 255 visible ASCII characters.
fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Error> {
    let mut values = headers.get_all("idempotency-key").iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(Error::Malformed("give one `idempotency-key`, not several".to_owned()));
    }
    let key = value.to_str().unwrap_or_default();
    if (1..=255).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Ok(Some(key.to_owned()));
    }
    Err(Error::Malformed(
        "`idempotency-key` must have 1 to 255 visible ASCII characters, such as a UUID".to_owned(),
    ))
}

fn is_json(request: &Request) -> bool {
    let essence =
        request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = essence.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
}

/// Which page of a list is wanted: `limit` 1 to 100 (20), `order` `asc` or `desc` (newest first), `after`, `before`; and
/// what else the query may hold.
#[derive(Debug)]
pub(super) struct ApiPage<Id, More = Nothing>(pub(super) PageRequest<Id>, pub(super) More);

/// A query that holds nothing else.
#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Nothing {}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct PageQuery {
    limit: Option<u32>,
    order: Option<Order>,
    after: Option<String>,
    before: Option<String>,
}

const PAGE_FIELDS: [&str; 4] = ["limit", "order", "after", "before"];

#[derive(serde::Deserialize)]
#[serde(rename_all = "lowercase")]
enum Order {
    Asc,
    Desc,
}

impl<S, Id, More> FromRequestParts<S> for ApiPage<Id, More>
where
    S: Send + Sync,
    Id: std::str::FromStr<Err: std::fmt::Display>,
    More: DeserializeOwned,
{
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Error> {
        let given = parts.uri.query().unwrap_or_default();
        let some = |of_page: bool| {
            let pairs = url::form_urlencoded::parse(given.as_bytes());
            let wanted = pairs.filter(|(name, _)| PAGE_FIELDS.contains(&&**name) == of_page);
            url::form_urlencoded::Serializer::new(String::new()).extend_pairs(wanted).finish()
        };
        let page: PageQuery = read(&some(true))?;
        let limit = page.limit.unwrap_or(20);
        if !(1..=100).contains(&limit) {
            return Err(Error::Malformed("`limit` must be between 1 and 100".to_owned()));
        }
        if page.after.is_some() && page.before.is_some() {
            return Err(Error::Malformed("give `after` or `before`, not both".to_owned()));
        }
        let cursor = |name: &str, text: Option<String>| {
            text.map(|text| {
                text.parse::<Id>().map_err(|error| Error::Malformed(format!("`{name}`: {error}")))
            })
            .transpose()
        };
        let request = PageRequest {
            limit,
            ascending: matches!(page.order, Some(Order::Asc)),
            after: cursor("after", page.after)?,
            before: cursor("before", page.before)?,
        };
        Ok(Self(request, read(&some(false))?))
    }
}

/// What the query holds.
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
        text.parse().map(Self).map_err(|error| Error::Malformed(format!("the id in the path: {error}")))
    }
}

/// Which of a thread's runs are meant: `which` = `active` (if absent), `queued` or `all`.
#[derive(Debug)]
pub(super) struct ApiWhich(pub(super) Which);

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct WhichQuery {
    which: Option<WhichWord>,
}

#[derive(serde::Deserialize)]
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
    let uri = uri.map_err(|_| Error::Malformed("the query cannot be read".to_owned()))?;
    Query::try_from_uri(&uri)
        .map(|Query(query)| query)
        .map_err(|rejection| Error::Malformed(format!("the query: {}", rejection.body_text())))
}

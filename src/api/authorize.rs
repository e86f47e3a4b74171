//! Who may use which route.

use std::sync::{Arc, OnceLock};

use axum::extract::{Extension, Request};
use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::caller::Caller;
use super::extract::path_params;
use super::keys::{Named, Place};
use super::limits::Counted;
use super::openapi::Doc;
use super::prefer::REPLAYED;
use super::state::AppState;
use crate::domain::{Access, Principal};
use crate::error::{Error, TooOften};

/// So many characters are shown of a name that is not known.
const SHOWN: usize = 64;

/// There is no room for another message: the request is good only as a repeat of one that was taken.
#[derive(Clone, Copy, Debug)]
pub(super) struct OnlyRepeats(pub(super) TooOften);

/// What a route asks of its callers.
#[derive(Clone, Debug)]
pub(super) struct Asks {
    pub(super) needs: Access,
    pub(super) counted: Counted,
    pub(super) keys: Place,
    pub(super) query: Query,
}

/// The parameters that a route's query may have.
///
/// They are read out of the route's description, which takes a while to make. So that waits for the first query.
#[derive(Clone, Debug)]
pub(super) struct Query {
    describe: fn() -> Doc,
    names: Arc<OnceLock<Vec<String>>>,
}

impl Query {
    pub(super) fn of(describe: fn() -> Doc) -> Self {
        Self {
            describe,
            names: Arc::default(),
        }
    }

    /// Refuses what nobody would heed: it may be what keeps a request from doing harm, or a piece of a key.
    fn check(&self, query: &str) -> Result<(), Error> {
        let mut seen = Vec::new();
        for (name, _) in url::form_urlencoded::parse(query.as_bytes()) {
            let known = self.names.get_or_init(|| (self.describe)().query_names());
            if !known.iter().any(|it| *it == name) {
                let name = name.chars().take(SHOWN).collect::<String>();
                let known = known
                    .iter()
                    .map(|it| format!("`{it}`"))
                    .collect::<Vec<_>>()
                    .join(", ");
                let known = if known.is_empty() {
                    "this request takes none".to_owned()
                } else {
                    format!("this request takes {known}")
                };
                return Err(Error::Malformed(format!(
                    "there is no query parameter `{name}` here: {known} (a `?` within a key is written `%3F`)"
                )));
            }
            if seen.contains(&name) {
                return Err(Error::Malformed(format!(
                    "the query parameter `{name}` is given twice"
                )));
            }
            seen.push(name);
        }
        Ok(())
    }
}

/// Lets a request through whose caller may do what the route is for, and which asks for nothing that the route does not
/// know; its handler finds the [`Caller`], and whom it is about ([`Named`]).
pub(super) async fn guard(
    Extension(Asks {
        needs,
        counted,
        keys,
        query,
    }): Extension<Asks>,
    Extension(state): Extension<AppState>,
    request: Request,
    next: Next,
) -> Result<Response, Error> {
    let (mut parts, body) = request.into_parts();
    let principal = identify(&state, &parts.headers).await?;
    tracing::Span::current().record("caller", &principal.name);
    if principal.access < needs {
        return Err(Error::InsufficientScope(needs));
    }
    let named = named(keys, &mut parts, state.server.max_key_bytes).await;
    // What is no key is nobody's.
    let user = named
        .as_ref()
        .ok()
        .and_then(Option::as_ref)
        .map(|named| &named.user);
    if let (Some(own), Some(user)) = (&principal.user, user)
        && own != user
    {
        return Err(Error::Forbidden(
            "these are the conversations of another user",
        ));
    }
    let tenant = principal.tenant.clone();
    let user = user.cloned().or_else(|| principal.user.clone());
    let (mut left, taken) = state.limits.take(counted, &tenant, user.as_ref());
    let (mut as_repeat, mut refused) = (None, taken.err());
    if let Some(too_often) = refused
        && counted == Counted::Message
        && parts.headers.contains_key("idempotency-key")
    {
        // Whoever lost an answer gets it, as with any other request.
        let (request, taken) = state.limits.take(Counted::Request, &tenant, user.as_ref());
        if taken.is_ok() {
            (as_repeat, refused) = (Some(request), None);
            parts.extensions.insert(OnlyRepeats(too_often));
        }
    }
    let asked = refused
        .map_or(named, |too_often| Err(too_often.into()))
        .and_then(|named| {
            query.check(parts.uri.query().unwrap_or_default())?;
            Ok(named)
        });
    let mut response = match asked {
        Ok(named) => {
            parts.extensions.insert(Caller(principal));
            if let Some(named) = named {
                parts.extensions.insert(named);
            }
            next.run(Request::from_parts(parts, body)).await
        }
        Err(error) => error.into_response(),
    };
    if response.headers().contains_key(REPLAYED)
        && let Some(request) = as_repeat.or_else(|| state.limits.was_repeat(&tenant, user.as_ref()))
    {
        left = request;
    }
    left.tell(response.headers_mut());
    Ok(response)
}

/// Who asks. Why a key or token is refused goes into the request's own line of the log: a line for it alone would let callers
/// whom nobody knows write twice as much.
async fn identify(state: &AppState, headers: &HeaderMap) -> Result<Principal, Error> {
    let identified = match token(headers) {
        Ok(token) => state.auth.identify(token).await,
        Err(error) => Err(error),
    };
    if let Err(Error::InvalidToken(why)) = identified {
        tracing::Span::current().record("refused", why);
    }
    identified
}

/// Whom the request is about.
async fn named(place: Place, parts: &mut Parts, limit: usize) -> Result<Option<Named>, Error> {
    let params = match place {
        Place::Path => Some(path_params(parts, &()).await?),
        _ => None,
    };
    Named::read(place, params.as_ref(), &parts.headers, limit)
}

/// What stands behind `Bearer`, if anything does.
fn token(headers: &HeaderMap) -> Result<Option<&str>, Error> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    // Which of several counts would be a guess.
    if values.next().is_some() {
        return Err(Error::InvalidToken(
            "the header `authorization` is there more than once",
        ));
    }
    let text = value
        .to_str()
        .map_err(|_| Error::InvalidToken("it has characters that no key or token has"))?;
    let token = text
        .split_once(' ')
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    Ok(token
        .map(|(_, token)| token.trim())
        .filter(|token| !token.is_empty()))
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_token_is_a_piece_of_its_header_or_none(
            lines in prop::collection::vec(
                prop_oneof![
                    prop::collection::vec(any::<u8>(), 0..40),
                    "[Bb]earer[ \\t]{0,3}[!-~]{0,20} ?[!-~]{0,3}".prop_map(String::into_bytes),
                ],
                0..3,
            ),
        ) {
            let mut headers = HeaderMap::new();
            for value in lines.iter().filter_map(|line| HeaderValue::from_bytes(line).ok()) {
                headers.append(AUTHORIZATION, value);
            }
            let given: Vec<_> = headers.get_all(AUTHORIZATION).iter().collect();
            match token(&headers) {
                Ok(Some(token)) => {
                    prop_assert_eq!(given.len(), 1);
                    let value = given[0].to_str().unwrap();
                    prop_assert!(!token.is_empty() && token.trim() == token && value.trim_end().ends_with(token));
                    prop_assert!(value[..7].eq_ignore_ascii_case("bearer "));
                }
                Ok(None) => prop_assert!(given.len() <= 1),
                Err(error) => prop_assert!(matches!(error, Error::InvalidToken(_))),
            }
        }
    }
}

//! Reads the keys of the conversation that a request names. They are in its path, or in its headers for
//! callers behind proxies that rewrite paths.

use std::borrow::Cow;
use std::fmt::Write as _;

use axum::extract::RawPathParams;
use axum::http::{HeaderMap, HeaderName};

use crate::domain::{InvalidKey, Scope, UserKey};
use crate::error::Error;

pub(super) const USER: HeaderName = HeaderName::from_static("threadkeeper-user");
pub(super) const SESSION: HeaderName = HeaderName::from_static("threadkeeper-session");
pub(super) const TOPIC: HeaderName = HeaderName::from_static("threadkeeper-topic");

/// Path of the conversation whose keys are in headers. It has the same resources below it as the paths
/// with keys.
pub(super) const CONVERSATION: &str = "/v1/conversation";
/// Paths of a user, with the key in the path and in a header. Both have the same resources below them.
pub(super) const USERS: [&str; 2] = ["/v1/users/{user}", "/v1/user"];

/// Where a route finds its keys.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Place {
    /// The route has no keys.
    Nowhere,
    Path,
    /// In headers that name a conversation.
    Conversation,
    /// In a header that names a user.
    User,
}

impl Place {
    pub(super) fn of(path: &str) -> Self {
        let is_below = |root: &str| {
            path.strip_prefix(root)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        if path.contains("{user}") {
            Self::Path
        } else if is_below(CONVERSATION) {
            Self::Conversation
        } else if is_below(USERS[1]) {
            Self::User
        } else {
            Self::Nowhere
        }
    }
}

/// The conversation or user that a request names.
#[derive(Clone, Debug)]
pub(super) struct Named {
    pub(super) user: UserKey,
    pub(super) scope: Scope,
    in_headers: bool,
}

impl Named {
    /// Reads the keys, of at most `limit` bytes each. `params` are the parameters of the path.
    ///
    /// # Errors
    /// [`Error::Malformed`]: a key is missing, invalid, or also in another place.
    pub(super) fn read(
        place: Place,
        params: Option<&RawPathParams>,
        headers: &HeaderMap,
        limit: usize,
    ) -> Result<Option<Self>, Error> {
        let in_headers = match place {
            Place::Nowhere => return Ok(None),
            Place::Path => false,
            Place::Conversation | Place::User => true,
        };
        let misplaced: &[HeaderName] = match place {
            Place::Path => &[USER, SESSION, TOPIC],
            Place::User => &[SESSION, TOPIC],
            _ => &[],
        };
        if let Some(name) = misplaced.iter().find(|name| headers.contains_key(*name)) {
            return Err(Error::Malformed(if in_headers {
                format!(
                    "this path is about all conversations of a user: leave the header `{name}` out"
                )
            } else {
                format!("this path has its keys in the path: leave the header `{name}` out")
            }));
        }
        let source = if in_headers {
            Source::Headers(headers)
        } else {
            Source::Path(params)
        };
        let user = source.key(&USER, limit)?;
        let scope = match (source.key(&SESSION, limit)?, source.key(&TOPIC, limit)?) {
            (Some(_), Some(_)) => {
                return Err(Error::Malformed(format!(
                    "send the header `{SESSION}` or `{TOPIC}`, not both"
                )));
            }
            (Some(session), None) => Scope::Session(session),
            (None, Some(topic)) => Scope::Topic(topic),
            (None, None) => Scope::User,
        };
        let user = user.ok_or_else(|| {
            Error::Malformed(format!(
                "the user is missing: send the header `{USER}` with your id of the user"
            ))
        })?;
        Ok(Some(Self {
            user,
            scope,
            in_headers,
        }))
    }

    /// Returns the path by which requests are compared. A path whose keys are in headers becomes the same
    /// path with its keys in it.
    pub(super) fn path<'a>(&self, path: &'a str) -> Cow<'a, str> {
        let rest = path
            .strip_prefix(CONVERSATION)
            .or_else(|| path.strip_prefix(USERS[1]));
        match rest.filter(|_| self.in_headers) {
            None => path.into(),
            Some(rest) => {
                let scope = match &self.scope {
                    Scope::User => String::new(),
                    Scope::Session(key) => format!("/sessions/{}", encoded(key.as_str())),
                    Scope::Topic(key) => format!("/topics/{}", encoded(key.as_str())),
                };
                format!("/v1/users/{}{scope}{rest}", encoded(self.user.as_str())).into()
            }
        }
    }
}

/// The source of the keys.
enum Source<'a> {
    Path(Option<&'a RawPathParams>),
    Headers(&'a HeaderMap),
}

impl Source<'_> {
    /// Returns the key in a header, or in the path parameter with the last word of the header's name.
    fn key<K: TryFrom<String, Error = InvalidKey>>(
        &self,
        name: &HeaderName,
        limit: usize,
    ) -> Result<Option<K>, Error> {
        let kind = name.as_str().rsplit('-').next().unwrap_or_default();
        let text = match self {
            Self::Headers(headers) => in_header(headers, name)?,
            Self::Path(params) => {
                let found = params.and_then(|params| params.iter().find(|(name, _)| *name == kind));
                found.map(|(_, value)| value.to_owned())
            }
        };
        let key = match text {
            Some(text) if text.len() > limit => Err(InvalidKey::TooLong {
                limit,
                bytes: text.len(),
            }),
            text => text.map(K::try_from).transpose(),
        };
        key.map_err(|error| {
            Error::Malformed(match self {
                Self::Headers(_) => format!("the header `{name}`: {error}"),
                Self::Path(_) => format!("the {kind} key in the path: {error}"),
            })
        })
    }
}

/// Returns the decoded text of a header. Its value is percent-encoded UTF-8, in which visible ASCII other
/// than `%` and `,` may stand for itself. A bare comma is refused: proxies write one between two headers
/// that they join.
fn in_header(headers: &HeaderMap, name: &HeaderName) -> Result<Option<String>, Error> {
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    if values.next().is_some() {
        return Err(Error::Malformed(format!("send the header `{name}` once")));
    }
    let text = decoded(value.as_bytes()).ok_or_else(|| {
        Error::Malformed(format!(
            "the header `{name}` must be percent-encoded UTF-8, as `encodeURIComponent` writes it"
        ))
    })?;
    Ok(Some(text))
}

fn decoded(value: &[u8]) -> Option<String> {
    let mut bytes = Vec::with_capacity(value.len());
    let mut rest = value.iter();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let mut digit = || char::from(*rest.next()?).to_digit(16);
                u8::try_from(digit()? * 16 + digit()?).ok()?
            }
            b',' => return None,
            byte if byte.is_ascii_graphic() => *byte,
            _ => return None,
        });
    }
    String::from_utf8(bytes).ok()
}

/// Encodes a key as a path segment that no client or proxy rewrites.
fn encoded(key: &str) -> String {
    key.bytes().fold(String::new(), |mut encoded, byte| {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            // Writing to a string cannot fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
        encoded
    })
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
    use proptest::prelude::*;
    use url::Url;

    use super::*;
    use crate::domain::KeyText;

    fn headers(lines: &[(HeaderName, &str)]) -> HeaderMap {
        lines
            .iter()
            .map(|(name, value)| (name.clone(), HeaderValue::from_str(value).unwrap()))
            .collect()
    }

    fn read(place: Place, lines: &[(HeaderName, &str)]) -> Result<Option<Named>, Error> {
        Named::read(place, None, &headers(lines), KeyText::MAX_BYTES)
    }

    /// Texts that a caller may use as a key, and texts that some programs read as steps in a path.
    fn texts() -> impl Strategy<Value = String> {
        "\\PC{1,40}|(\\.|%2e|%2E|%|/|\\\\|;|\\?|#|:|@| |~|\\.\\.;){1,4}|[a-z]{256}"
    }

    proptest! {
        /// The crate `url` has the rules of browsers, Node, curl and most proxies.
        #[test]
        fn a_key_stays_where_it_is_in_a_path(text in texts()) {
            let Ok(key) = KeyText::try_from(text.clone()) else {
                prop_assert!([".", ".."].contains(&text.as_str()), "{}", text);
                return Ok(());
            };
            let segment = encoded(key.as_str());
            for path in [format!("/v1/users/{segment}/thread"), format!("/v1/users/{segment}")] {
                let url = Url::parse(&format!("http://gateway{path}?a=b")).unwrap();
                prop_assert_eq!(url.path(), &path);
                prop_assert_eq!(url.query(), Some("a=b"));
                // A second parser on the way reads the same.
                prop_assert_eq!(Url::parse(url.as_str()).unwrap(), url);
            }
        }

        #[test]
        fn a_key_is_read_from_its_header_byte_for_byte(text in texts(), topic in texts()) {
            let (user, topic_value) = (encoded(&text), encoded(&topic));
            let lines = [(USER, user.as_str()), (TOPIC, topic_value.as_str())];
            let is_key = |text: &String| KeyText::try_from(text.clone()).is_ok();
            match read(Place::Conversation, &lines) {
                Ok(named) => {
                    let named = named.unwrap();
                    prop_assert_eq!(named.user.as_str(), text);
                    prop_assert_eq!(named.scope.name(), topic);
                    let path = format!("/v1/users/{user}/topics/{topic_value}/messages");
                    prop_assert_eq!(named.path("/v1/conversation/messages"), path);
                }
                Err(error) => {
                    prop_assert!(matches!(error, Error::Malformed(_)) && !(is_key(&text) && is_key(&topic)));
                }
            }
        }

        #[test]
        fn headers_of_any_bytes_are_read_or_refused(value in prop::collection::vec(any::<u8>(), 0..40)) {
            let Ok(value) = HeaderValue::from_bytes(&value) else { return Ok(()) };
            let headers = HeaderMap::from_iter([(USER, value)]);
            match Named::read(Place::User, None, &headers, KeyText::MAX_BYTES) {
                Ok(named) => prop_assert!(!named.unwrap().user.as_str().is_empty()),
                Err(error) => prop_assert!(matches!(error, Error::Malformed(_))),
            }
        }
    }

    #[test]
    fn keys_stand_in_one_place() {
        for (place, lines, is_read) in [
            (Place::Conversation, &[(USER, "a")][..], true),
            (Place::Conversation, &[(USER, "a"), (SESSION, "s")], true),
            (Place::Conversation, &[(USER, "a"), (TOPIC, "t")], true),
            (
                Place::Conversation,
                &[(USER, "a"), (TOPIC, "t"), (SESSION, "s")],
                false,
            ),
            (Place::Conversation, &[(TOPIC, "t")], false),
            (Place::Conversation, &[], false),
            (Place::User, &[(USER, "a")], true),
            (Place::User, &[(USER, "a"), (SESSION, "s")], false),
            (Place::User, &[(USER, "a"), (TOPIC, "t")], false),
            (Place::User, &[], false),
            (Place::User, &[(USER, "a,b")], false),
            (Place::User, &[(USER, "a b")], false),
            (Place::User, &[(USER, "a%2")], false),
            (Place::User, &[(USER, "%ff")], false),
            (Place::User, &[(USER, "%2E%2e")], false),
            (Place::User, &[(USER, "")], false),
            (Place::Path, &[(USER, "a")], false),
            (Place::Path, &[(SESSION, "a")], false),
        ] {
            assert_eq!(read(place, lines).is_ok(), is_read, "{place:?} {lines:?}");
        }
        let mut twice = headers(&[(USER, "a")]);
        twice.append(USER, HeaderValue::from_static("a"));
        assert!(
            Named::read(Place::User, None, &twice, KeyText::MAX_BYTES).is_err(),
            "twice"
        );
        assert!(read(Place::Nowhere, &[]).unwrap().is_none());
    }
}

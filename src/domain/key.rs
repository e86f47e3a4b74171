//! The key of a conversation: tenant, user and scope, parsed once at the edge.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{ObjectBuilder, Schema, Type};
use utoipa::{PartialSchema, ToSchema};

/// Longest key part, in bytes of UTF-8.
const MAX_KEY_BYTES: usize = 256;

/// The reason why a text is not a key.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum InvalidKey {
    #[error("a key must not be empty")]
    Empty,
    #[error("a key is at most {limit} bytes of UTF-8, this one has {bytes}")]
    TooLong { limit: usize, bytes: usize },
    #[error("a key must not contain control characters (found U+{0:04X})")]
    ControlCharacter(u32),
    /// `.` or `..`.
    #[error(
        "a key must not be `{0}`: clients and proxies resolve it as a step in a path, even percent-encoded"
    )]
    Step(&'static str),
}

/// Path segments that clients and proxies remove together with the segment before, even if they
/// are percent-encoded. Keys are segments of paths.
const STEPS: [&str; 2] = [".", ".."];

/// The text of one key part: 1 to 256 bytes of UTF-8 without control characters, not `.` or `..`,
/// compared byte for byte.
///
/// Nothing is trimmed, folded or normalised: `Alice` and `alice` are two keys.
#[derive(Clone, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyText(String);

impl KeyText {
    /// Longest key part, in bytes.
    pub const MAX_BYTES: usize = MAX_KEY_BYTES;

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for KeyText {
    type Error = InvalidKey;

    fn try_from(raw: String) -> Result<Self, InvalidKey> {
        if raw.is_empty() {
            return Err(InvalidKey::Empty);
        }
        if raw.len() > MAX_KEY_BYTES {
            return Err(InvalidKey::TooLong {
                limit: MAX_KEY_BYTES,
                bytes: raw.len(),
            });
        }
        if let Some(step) = STEPS.into_iter().find(|step| raw == *step) {
            return Err(InvalidKey::Step(step));
        }
        match raw.chars().find(|c| c.is_control()) {
            Some(c) => Err(InvalidKey::ControlCharacter(u32::from(c))),
            None => Ok(Self(raw)),
        }
    }
}

impl ToSchema for KeyText {}

impl PartialSchema for KeyText {
    fn schema() -> RefOr<Schema> {
        // JSON Schema counts characters, and a text never has more characters than bytes.
        ObjectBuilder::new()
            .schema_type(Type::String)
            .min_length(Some(1))
            .max_length(Some(MAX_KEY_BYTES))
            .pattern(Some(r"^(?!\.{1,2}$)[^\u0000-\u001f\u007f-\u009f]*$"))
            .into()
    }
}

impl From<KeyText> for String {
    fn from(key: KeyText) -> Self {
        key.0
    }
}

macro_rules! key_part {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
        #[serde(transparent)]
        pub struct $name(KeyText);

        impl $name {
            pub fn as_str(&self) -> &str {
                self.0.as_str()
            }
        }

        impl ToSchema for $name {}

        impl PartialSchema for $name {
            fn schema() -> RefOr<Schema> {
                KeyText::schema()
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidKey;

            fn try_from(raw: String) -> Result<Self, InvalidKey> {
                KeyText::try_from(raw).map(Self)
            }
        }
    };
}

key_part!(
    /// An application that uses the gateway. Two tenants share no conversations.
    TenantKey
);
key_part!(
    /// The caller's own id of a user.
    UserKey
);
key_part!(
    /// The caller's own id of a session of a user.
    SessionKey
);
key_part!(
    /// The caller's own name of a topic of a user.
    TopicKey
);

impl Default for TenantKey {
    /// The tenant of a deployment that has only one: `default`.
    fn default() -> Self {
        Self(KeyText("default".to_owned()))
    }
}

/// Which of a user's conversations a key means.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Scope {
    /// The user's one conversation.
    User,
    /// A conversation that expires.
    Session(SessionKey),
    /// A conversation about one topic.
    Topic(TopicKey),
}

impl Scope {
    /// Returns the kind as the store spells it: `user`, `session` or `topic`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Session(_) => "session",
            Self::Topic(_) => "topic",
        }
    }

    /// Returns the session's or topic's name; empty for the user scope, as no name of a session or
    /// topic is.
    pub fn name(&self) -> &str {
        match self {
            Self::User => "",
            Self::Session(key) => key.as_str(),
            Self::Topic(key) => key.as_str(),
        }
    }

    /// The inverse of [`kind`](Self::kind) and [`name`](Self::name). Returns `None` for parts that
    /// they never return.
    pub fn from_parts(kind: &str, name: String) -> Option<Self> {
        match kind {
            "user" if name.is_empty() => Some(Self::User),
            "session" => SessionKey::try_from(name).ok().map(Self::Session),
            "topic" => TopicKey::try_from(name).ok().map(Self::Topic),
            _ => None,
        }
    }
}

impl fmt::Display for Scope {
    /// Writes the form of the API: `user`, `session:<id>`, `topic:<name>`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User => f.write_str("user"),
            other => write!(f, "{}:{}", other.kind(), other.name()),
        }
    }
}

/// The full key of a conversation. At most one current thread has it.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ConversationKey {
    pub tenant: TenantKey,
    pub user: UserKey,
    pub scope: Scope,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::Fingerprints;

    proptest! {
        #[test]
        fn a_scope_survives_its_stored_form(kind in 0..3_u8, name in "[^.\\p{Cc}][^\\p{Cc}]{0,39}") {
            let scope = match kind {
                0 => Scope::User,
                1 => Scope::Session(SessionKey::try_from(name).unwrap()),
                _ => Scope::Topic(TopicKey::try_from(name).unwrap()),
            };
            prop_assert_eq!(Scope::from_parts(scope.kind(), scope.name().to_owned()), Some(scope));
        }

        /// Holds wherever the parts begin and end, and for every kind of scope.
        #[test]
        fn no_two_keys_are_taken_for_each_other(
            texts in prop::collection::vec("[ab:/%]{1,3}|[^.\\p{Cc}]{1,3}", 3),
            kinds in (0..3_u8, 0..3_u8),
            cut in 0..3_usize,
        ) {
            let part = |text: &str| KeyText::try_from(text.to_owned()).unwrap();
            let key = |[tenant, user, name]: [&str; 3], kind: u8| ConversationKey {
                tenant: TenantKey(part(tenant)),
                user: UserKey(part(user)),
                scope: match kind {
                    0 => Scope::User,
                    1 => Scope::Session(SessionKey(part(name))),
                    _ => Scope::Topic(TopicKey(part(name))),
                },
            };
            // The other key has the same text, divided at another place.
            let moved = texts[1].chars().take(cut).collect::<String>();
            let (longer, shorter) = (format!("{}{moved}", texts[0]), texts[1][moved.len()..].to_owned());
            let one = key([&texts[0], &texts[1], &texts[2]], kinds.0);
            let mut others = vec![key([&texts[0], &texts[1], &texts[2]], kinds.1), key([&texts[1], &texts[0], &texts[2]], kinds.0)];
            if !shorter.is_empty() {
                others.push(key([&longer, &shorter, &texts[2]], kinds.1));
            }
            let stored = |key: &ConversationKey| {
                [key.tenant.as_str(), key.user.as_str(), key.scope.kind(), key.scope.name()].map(str::to_owned)
            };
            let by = Fingerprints::new(&[7; 32]);
            let hashed = |key: &ConversationKey| std::collections::HashSet::from([key.clone()]);
            for other in others {
                let same = one == other;
                prop_assert_eq!(stored(&one) == stored(&other), same);
                prop_assert_eq!(by.conversation(&one) == by.conversation(&other), same);
                prop_assert_eq!(hashed(&one).contains(&other), same);
                prop_assert_eq!(one.cmp(&other).is_eq(), same);
                prop_assert!(one.scope == other.scope || one.scope.to_string() != other.scope.to_string());
            }
        }

        #[test]
        fn any_text_is_either_kept_as_it_is_or_refused_for_the_stated_reason(raw in "\\PC{0,300}|[\\x00-\\x7f]{0,20}|\\.{1,3}") {
            match KeyText::try_from(raw.clone()) {
                Ok(key) => prop_assert_eq!(key.as_str(), raw),
                Err(InvalidKey::Empty) => prop_assert!(raw.is_empty()),
                Err(InvalidKey::TooLong { bytes, .. }) => prop_assert!(bytes > MAX_KEY_BYTES && bytes == raw.len()),
                Err(InvalidKey::Step(step)) => prop_assert!(STEPS.contains(&step) && step == raw),
                Err(InvalidKey::ControlCharacter(_)) => prop_assert!(raw.chars().any(char::is_control)),
            }
        }
    }
}

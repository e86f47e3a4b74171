//! Pairs of text that a caller attaches. Their limits leave room at the upstream for the gateway's
//! own pairs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{ObjectBuilder, Schema, Type};
use utoipa::{PartialSchema, ToSchema};

/// Most pairs. The upstreams take 16, and the gateway needs up to six of them for its own tags.
const MAX_PAIRS: usize = 10;
const MAX_KEY_CHARS: usize = 64;
const MAX_VALUE_CHARS: usize = 512;
/// Prefix of the keys of the gateway's own pairs.
const RESERVED_PREFIX: &str = "threadkeeper_";

/// The reason why a map is not metadata.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum InvalidMetadata {
    #[error("metadata has at most {limit} pairs, this has {pairs}")]
    TooManyPairs { limit: usize, pairs: usize },
    #[error("a metadata key must not be empty")]
    EmptyKey,
    /// Has the first 64 characters of the key.
    #[error(
        "a metadata key has at most {MAX_KEY_CHARS} characters; the one that begins with `{0}` has more"
    )]
    LongKey(String),
    #[error("metadata must not contain NUL characters; {}", in_pair(.0))]
    Nul(String),
    #[error("metadata keys that begin with `{RESERVED_PREFIX}` are reserved; rename `{0}`")]
    Reserved(String),
    #[error("a metadata value has at most {MAX_VALUE_CHARS} characters; that of `{0}` has more")]
    LongValue(String),
}

/// Returns whether the key or the value of this pair has the NUL character, as the end of a
/// sentence.
fn in_pair(key: &str) -> String {
    if key.contains('\0') {
        format!("the key `{}` does", key.replace('\0', "\\0"))
    } else {
        format!("the value of `{key}` does")
    }
}

/// Pairs of text: at most 10, keys of 1 to 64 characters, values of at most 512 characters. No NUL
/// characters.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(
    try_from = "BTreeMap<String, String>",
    into = "BTreeMap<String, String>"
)]
pub struct Metadata(BTreeMap<String, String>);

impl Metadata {
    /// Most pairs.
    pub const MAX_PAIRS: usize = MAX_PAIRS;

    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
    }
}

impl ToSchema for Metadata {}

impl PartialSchema for Metadata {
    fn schema() -> RefOr<Schema> {
        let text = || ObjectBuilder::new().schema_type(Type::String);
        let key = text()
            .min_length(Some(1))
            .max_length(Some(MAX_KEY_CHARS))
            .pattern(Some(format!(r"^(?!{RESERVED_PREFIX})[^\u0000]*$")));
        let value = text()
            .max_length(Some(MAX_VALUE_CHARS))
            .pattern(Some(r"^[^\u0000]*$"));
        ObjectBuilder::new()
            .description(Some("Pairs of strings."))
            .max_properties(Some(MAX_PAIRS))
            .property_names(Some(key))
            .additional_properties(Some(Schema::from(value)))
            .into()
    }
}

impl TryFrom<BTreeMap<String, String>> for Metadata {
    type Error = InvalidMetadata;

    fn try_from(pairs: BTreeMap<String, String>) -> Result<Self, InvalidMetadata> {
        if pairs.len() > MAX_PAIRS {
            return Err(InvalidMetadata::TooManyPairs {
                limit: MAX_PAIRS,
                pairs: pairs.len(),
            });
        }
        for (key, value) in &pairs {
            if key.is_empty() {
                return Err(InvalidMetadata::EmptyKey);
            }
            if key.chars().count() > MAX_KEY_CHARS {
                return Err(InvalidMetadata::LongKey(
                    key.chars().take(MAX_KEY_CHARS).collect(),
                ));
            }
            if key.contains('\0') || value.contains('\0') {
                return Err(InvalidMetadata::Nul(key.clone()));
            }
            if key.starts_with(RESERVED_PREFIX) {
                return Err(InvalidMetadata::Reserved(key.clone()));
            }
            if value.chars().count() > MAX_VALUE_CHARS {
                return Err(InvalidMetadata::LongValue(key.clone()));
            }
        }
        Ok(Self(pairs))
    }
}

impl From<Metadata> for BTreeMap<String, String> {
    fn from(metadata: Metadata) -> Self {
        metadata.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pairs_are_kept_as_they_are_or_refused_for_the_stated_reason(
            pairs in prop::collection::btree_map(
                "[a\\x00é]{0,3}|\\PC{60,70}|threadkeeper_?[a-z]{0,2}",
                "\\PC{0,4}|[\\x00-\\x02]{0,2}|é{510,514}",
                0..13,
            ),
        ) {
            let json = serde_json::to_string(&pairs).unwrap();
            let read = serde_json::from_str::<Metadata>(&json);
            let long = |text: &str, most| text.chars().count() > most;
            match Metadata::try_from(pairs.clone()) {
                Ok(metadata) => {
                    prop_assert!(pairs.len() <= MAX_PAIRS);
                    for (key, value) in &pairs {
                        prop_assert!(!key.is_empty() && !long(key, MAX_KEY_CHARS) && !long(value, MAX_VALUE_CHARS));
                        prop_assert!(!key.contains('\0') && !value.contains('\0'));
                        prop_assert!(!key.starts_with(RESERVED_PREFIX));
                    }
                    prop_assert_eq!(serde_json::to_string(&metadata).unwrap(), json);
                    prop_assert_eq!(read.ok(), Some(metadata.clone()));
                    prop_assert_eq!(BTreeMap::from(metadata), pairs);
                }
                Err(why) => {
                    prop_assert!(read.is_err());
                    match why {
                        InvalidMetadata::TooManyPairs { limit, pairs: count } => {
                            prop_assert!(count == pairs.len() && count > limit);
                        },
                        InvalidMetadata::EmptyKey => prop_assert!(pairs.contains_key("")),
                        InvalidMetadata::LongKey(shown) => prop_assert!(
                            shown.chars().count() == MAX_KEY_CHARS
                                && pairs.keys().any(|key| long(key, MAX_KEY_CHARS) && key.starts_with(&shown))
                        ),
                        InvalidMetadata::Nul(ref key) => {
                            prop_assert!(key.contains('\0') || pairs[key].contains('\0'));
                            prop_assert!(why.to_string().contains("NUL"));
                        },
                        InvalidMetadata::Reserved(key) => prop_assert!(key.starts_with(RESERVED_PREFIX)),
                        InvalidMetadata::LongValue(key) => prop_assert!(long(&pairs[&key], MAX_VALUE_CHARS)),
                    }
                }
            }
        }
    }
}

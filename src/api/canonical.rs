//! The canonical form of JSON: without blanks, and with sorted fields. Two bodies of the same meaning
//! have one form. It is hashed piece by piece, so that a body of many MiB is not copied.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::{fmt, io};

use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Number;
use sha2::{Digest, Sha256};

/// Adds the canonical form of a JSON text to a hash. A text that is not JSON adds nothing.
pub(super) fn hash(text: &[u8], hash: &mut Sha256) {
    if let Ok(value) = serde_json::from_slice::<Canonical<'_>>(text) {
        // Writing to a hash cannot fail.
        drop(serde_json::to_writer(Hashed(hash), &value));
    }
}

/// A JSON value. It borrows texts without escapes from the body.
#[derive(Serialize)]
#[serde(untagged)]
enum Canonical<'a> {
    Null,
    Bool(bool),
    Number(Number),
    Text(Cow<'a, str>),
    List(Vec<Canonical<'a>>),
    Object(BTreeMap<Text<'a>, Canonical<'a>>),
}

#[derive(Eq, Ord, PartialEq, PartialOrd, Serialize)]
struct Text<'a>(Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Canonical::deserialize(deserializer)? {
            Canonical::Text(text) => Ok(Self(text)),
            _ => Err(serde::de::Error::custom("a field's name is a text")),
        }
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Canonical<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyValue)
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Canonical<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Canonical<'de>, E> {
        Ok(Canonical::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Canonical<'de>, E> {
        Ok(Canonical::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Canonical<'de>, E> {
        Ok(Canonical::Number(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Canonical<'de>, E> {
        Ok(Canonical::Number(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Canonical<'de>, E> {
        Ok(Number::from_f64(value).map_or(Canonical::Null, Canonical::Number))
    }

    fn visit_str<E>(self, text: &str) -> Result<Canonical<'de>, E> {
        Ok(Canonical::Text(Cow::Owned(text.to_owned())))
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Canonical<'de>, E> {
        Ok(Canonical::Text(Cow::Borrowed(text)))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Canonical<'de>, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element()? {
            values.push(value);
        }
        Ok(Canonical::List(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Canonical<'de>, A::Error> {
        let mut fields = BTreeMap::new();
        while let Some((name, value)) = object.next_entry()? {
            fields.insert(name, value);
        }
        Ok(Canonical::Object(fields))
    }
}

/// A writer that hashes.
struct Hashed<'a>(&'a mut Sha256);

impl io::Write for Hashed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::testing::{Words, mutated};

    fn hashed(text: &str) -> Vec<u8> {
        let mut hash = Sha256::new();
        super::hash(text.as_bytes(), &mut hash);
        hash.finalize().to_vec()
    }

    #[test]
    fn spelling_does_not_matter_and_meaning_does() {
        let hash = hashed(r#"{"a":[1,"x"],"b":null}"#);
        assert_eq!(
            hashed(" { \"b\" : null,\n\"a\" : [ 1 , \"\\u0078\" ] } "),
            hash
        );
        assert_ne!(hashed(r#"{"a":[1,"y"],"b":null}"#), hash);
        assert_ne!(hashed(r#"{"a":["x",1],"b":null}"#), hash);
    }

    proptest! {
        /// The database has hashes that earlier versions made this way.
        #[test]
        fn it_is_how_serde_json_writes_a_value(
            value in mutated(
                vec![json!({"content": "a\"\\/\n\u{1f}é", "n": [1, -2, 3.5, 1e300, u64::MAX], "o": {"b": true, "a": null}})],
                Words { texts: &["", "text"], keys: &["content", "n", "z"] },
            ),
        ) {
            let text = serde_json::to_string_pretty(&value).unwrap();
            let again: Value = serde_json::from_str(&text).unwrap();
            prop_assert_eq!(hashed(&text), Sha256::digest(again.to_string().as_bytes()).to_vec());
        }
    }
}

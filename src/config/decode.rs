//! From the tree of written values to typed settings. The field decides what text from the environment means: a
//! number, a duration, a list in JSON, or just text.

use std::cell::RefCell;
use std::fmt;

use serde::de::{self, DeserializeOwned, DeserializeSeed, IntoDeserializer, Visitor};
use serde::forward_to_deserialize_any;

use super::tree::{Node, Value};

const WHOLE_NUMBER: &str = "a whole number, 0 or more";
const TRUE_OR_FALSE: &str = "true or false";

/// A key that no field has.
pub(super) struct UnknownKey {
    pub(super) path: Vec<String>,
    /// The names that would have been right in that place.
    pub(super) known: &'static [&'static str],
}

/// The first value that does not fit. Holds no part of the value.
#[derive(Debug)]
pub(super) struct DecodeError {
    pub(super) path: Vec<String>,
    placed: bool,
    pub(super) fault: Fault,
}

#[derive(Debug)]
pub(super) enum Fault {
    /// It should be `expected`.
    Unfit { expected: String },
    /// It should be one of these words.
    UnknownWord { known: &'static [&'static str], nearest: Option<&'static str> },
    /// The table lacks this field.
    Missing(&'static str),
    /// A type's own words.
    Other(String),
}

/// Reads `T` from the tree. The keys that were not understood come along, also with an error.
pub(super) fn decode<T: DeserializeOwned>(tree: &Node) -> (Result<T, DecodeError>, Vec<UnknownKey>) {
    let unknown = RefCell::new(Vec::new());
    let result = T::deserialize(Decoder { node: tree, path: Vec::new(), unknown: &unknown });
    (result, unknown.into_inner())
}

/// The names of the fields of a struct, as they are written in a file.
pub(super) fn fields_of<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut names: &'static [&'static str] = &[];
    // It always fails: only the names are wanted.
    let _ = T::deserialize(FieldNames(&mut names));
    names
}

/// The known name that was probably meant.
pub(super) fn nearest<'a>(written: &str, known: &[&'a str]) -> Option<&'a str> {
    let written = written.to_ascii_lowercase().replace('-', "_");
    let (distance, best) = known
        .iter()
        .map(|name| (strsim::osa_distance(&written, &name.replace('-', "_")), *name))
        .min_by_key(|(distance, _)| *distance)?;
    if distance <= (written.len() / 3).max(1) {
        return Some(best);
    }
    let related = |name: &&&str| {
        written.len().min(name.len()) >= 3
            && (name.starts_with(&*written)
                || written.starts_with(**name)
                || name.ends_with(&format!("_{written}")))
    };
    known.iter().find(related).copied()
}

struct Decoder<'a> {
    node: &'a Node,
    path: Vec<String>,
    unknown: &'a RefCell<Vec<UnknownKey>>,
}

impl<'a> Decoder<'a> {
    fn child(&self, key: &str, node: &'a Node) -> Self {
        let mut path = self.path.clone();
        path.push(key.to_owned());
        Self { node, path, unknown: self.unknown }
    }

    /// Raw text as JSON; `None` if the node is not raw.
    fn json(&self) -> Option<Result<Node, serde_json::Error>> {
        let Value::Raw(text) = &self.node.value else { return None };
        Some(serde_json::from_str(text).map(|json| Node::from_json(self.node.origin.as_ref(), json)))
    }

    fn raw(&self) -> Option<&'a str> {
        match &self.node.value {
            Value::Raw(text) => Some(text),
            _ => None,
        }
    }

    /// Goes on with another node in the place of this one.
    fn with<'b>(&'b self, node: &'b Node) -> Decoder<'b> {
        Decoder { node, path: self.path.clone(), unknown: self.unknown }
    }
}

macro_rules! numbers {
    ($($method:ident $visit:ident $number:ty, $name:expr;)+) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
            match self.raw() {
                Some(text) => match text.trim().replace('_', "").parse::<$number>() {
                    Ok(number) => visitor.$visit(number),
                    Err(_) => Err(DecodeError::unfit($name)),
                },
                None => self.deserialize_any(visitor),
            }
        }
    )+};
}

impl<'de> de::Deserializer<'de> for Decoder<'_> {
    type Error = DecodeError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        match &self.node.value {
            Value::Table(fields) => {
                visitor.visit_map(Fields { decoder: &self, entries: fields.iter(), value: None })
            }
            Value::List(items) => {
                visitor.visit_seq(Items { decoder: &self, items: items.iter().enumerate() })
            }
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Integer(value) => match u64::try_from(*value) {
                Ok(value) => visitor.visit_u64(value),
                Err(_) => visitor.visit_i64(*value),
            },
            Value::Float(value) => visitor.visit_f64(*value),
            Value::Text(text) => visitor.visit_str(text),
            Value::Raw(text) => match self.json() {
                Some(Ok(node)) => self.with(&node).deserialize_any(visitor),
                _ => visitor.visit_str(text),
            },
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        match self.raw().map(|text| text.trim().to_ascii_lowercase()).as_deref() {
            Some("true" | "1") => visitor.visit_bool(true),
            Some("false" | "0") => visitor.visit_bool(false),
            Some(_) => Err(DecodeError::unfit(TRUE_OR_FALSE)),
            None => self.deserialize_any(visitor),
        }
    }

    numbers! {
        deserialize_i8 visit_i64 i64, "a whole number";
        deserialize_i16 visit_i64 i64, "a whole number";
        deserialize_i32 visit_i64 i64, "a whole number";
        deserialize_i64 visit_i64 i64, "a whole number";
        deserialize_u8 visit_u64 u64, WHOLE_NUMBER;
        deserialize_u16 visit_u64 u64, WHOLE_NUMBER;
        deserialize_u32 visit_u64 u64, WHOLE_NUMBER;
        deserialize_u64 visit_u64 u64, WHOLE_NUMBER;
        deserialize_f32 visit_f64 f64, "a number";
        deserialize_f64 visit_f64 f64, "a number";
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        match self.raw() {
            Some(text) => visitor.visit_str(text),
            None => self.deserialize_any(visitor),
        }
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        match self.node.value {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        match self.json() {
            Some(Ok(node)) if matches!(node.value, Value::List(_)) => {
                self.with(&node).deserialize_any(visitor)
            }
            Some(_) => Err(DecodeError::unfit("a list written as JSON, [\"a\", \"b\"]")),
            None => self.deserialize_any(visitor),
        }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        match self.json() {
            Some(Ok(node)) if matches!(node.value, Value::Table(_)) => {
                self.with(&node).deserialize_any(visitor)
            }
            Some(_) => Err(DecodeError::unfit("a table written as JSON, {\"a\": \"b\"}")),
            None => self.deserialize_any(visitor),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        known: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        let Value::Table(fields) = &self.node.value else {
            return Err(DecodeError::unfit("a table of settings, each with its own name"));
        };
        for key in fields.keys().filter(|key| !known.contains(&key.as_str())) {
            let path = self.path.iter().cloned().chain([key.clone()]).collect();
            self.unknown.borrow_mut().push(UnknownKey { path, known });
        }
        self.deserialize_any(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        known: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        match &self.node.value {
            Value::Text(word) | Value::Raw(word) => visitor.visit_enum(word.trim().into_deserializer()),
            _ => Err(Fault::UnknownWord { known, nearest: None }.into()),
        }
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        visitor.visit_unit()
    }

    forward_to_deserialize_any! {
        i128 u128 char bytes byte_buf unit unit_struct tuple tuple_struct identifier
    }
}

struct Fields<'a> {
    decoder: &'a Decoder<'a>,
    entries: std::collections::btree_map::Iter<'a, String, Node>,
    value: Option<(&'a String, &'a Node)>,
}

impl<'de> de::MapAccess<'de> for Fields<'_> {
    type Error = DecodeError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, DecodeError> {
        self.value = self.entries.next();
        self.value.map(|(key, _)| seed.deserialize(key.as_str().into_deserializer())).transpose()
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, DecodeError> {
        let (key, node) = self.value.take().ok_or_else(|| DecodeError::unfit("a key before its value"))?;
        let child = self.decoder.child(key, node);
        let path = child.path.clone();
        seed.deserialize(child).map_err(|error| error.at(path))
    }
}

struct Items<'a> {
    decoder: &'a Decoder<'a>,
    items: std::iter::Enumerate<std::slice::Iter<'a, Node>>,
}

impl<'de> de::SeqAccess<'de> for Items<'_> {
    type Error = DecodeError;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, DecodeError> {
        let Some((index, node)) = self.items.next() else { return Ok(None) };
        let child = self.decoder.child(&index.to_string(), node);
        let path = child.path.clone();
        seed.deserialize(child).map(Some).map_err(|error| error.at(path))
    }
}

impl DecodeError {
    /// `expected` may be in the words of the serialization library.
    fn unfit(expected: &str) -> Self {
        let expected = match expected {
            "u8" | "u16" | "u32" | "u64" | "usize" => WHOLE_NUMBER,
            "a boolean" => TRUE_OR_FALSE,
            "a string" | "path string" => "text",
            "a map" => "a table",
            "a sequence" => "a list",
            other => other,
        };
        Fault::Unfit { expected: expected.to_owned() }.into()
    }

    /// The innermost place wins.
    fn at(mut self, path: Vec<String>) -> Self {
        if !self.placed {
            self.placed = true;
            self.path = path;
        }
        self
    }
}

impl From<Fault> for DecodeError {
    fn from(fault: Fault) -> Self {
        Self { path: Vec::new(), placed: false, fault }
    }
}

impl de::Error for DecodeError {
    fn custom<T: fmt::Display>(text: T) -> Self {
        Fault::Other(text.to_string()).into()
    }

    fn invalid_type(_found: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::unfit(&expected.to_string())
    }

    fn invalid_value(_found: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::unfit(&expected.to_string())
    }

    fn unknown_variant(word: &str, known: &'static [&'static str]) -> Self {
        Fault::UnknownWord { known, nearest: nearest(word, known) }.into()
    }

    fn missing_field(field: &'static str) -> Self {
        Fault::Missing(field).into()
    }
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:?}", self.path.join("."), self.fault)
    }
}

impl std::error::Error for DecodeError {}

struct FieldNames<'a>(&'a mut &'static [&'static str]);

impl<'de> de::Deserializer<'de> for FieldNames<'_> {
    type Error = DecodeError;

    fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, DecodeError> {
        Err(de::Error::custom("only for the names of the fields"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        *self.0 = fields;
        self.deserialize_any(visitor)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_found_and_far_ones_are_not() {
        let known = ["listen", "max_connections", "max_body_bytes", "timeout", "api_key"];
        for (written, meant) in [
            ("lissten", Some("listen")),
            ("max-connections", Some("max_connections")),
            ("MAX_CONNECTIONS", Some("max_connections")),
            ("apikey", Some("api_key")),
            ("key", Some("api_key")),
            ("time", Some("timeout")),
            ("colour", None),
        ] {
            assert_eq!(nearest(written, &known), meant, "{written}");
        }
        assert_eq!(nearest("x", &[]), None);
    }

    #[test]
    fn a_struct_tells_its_fields() {
        assert_eq!(fields_of::<crate::config::SessionsConfig>(), ["ttl", "ttl_from"]);
    }
}

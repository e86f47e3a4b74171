//! Settings as they were written, before they have types: one tree, each node knowing where it came from.

use std::collections::BTreeMap;
use std::sync::Arc;

use secrecy::zeroize::Zeroizing;
use toml::de::{DeTable, DeValue};

use super::problem::{Origin, Problem};

/// A written value and its place. No `Debug`: it holds secrets in the clear.
pub(super) struct Node {
    /// `None` only for tables that nobody wrote out.
    pub(super) origin: Option<Origin>,
    pub(super) value: Value,
}

pub(super) enum Value {
    Table(BTreeMap<String, Node>),
    List(Vec<Node>),
    Null,
    Bool(bool),
    Integer(i64),
    Float(f64),
    Text(Zeroizing<String>),
    /// Text from outside of the file, such as an environment variable's: what it means is up to the field.
    Raw(Zeroizing<String>),
}

impl Node {
    pub(super) fn empty_table() -> Self {
        Self { origin: None, value: Value::Table(BTreeMap::new()) }
    }

    /// Reads a TOML document as far as it can be read. The problems are its syntax errors.
    pub(super) fn from_toml(name: &str, text: &str) -> (Self, Vec<Problem>) {
        let name: Arc<str> = name.into();
        let (table, errors) = DeTable::parse_recoverable(text);
        let lines = Lines { name, text };
        let problems = errors
            .iter()
            .map(|error| Problem {
                path: String::new(),
                origin: Some(lines.origin(error.span().map_or(0, |span| span.start))),
                what: format!("this is not TOML: {}", error.message()),
                hint: None,
            })
            .collect();
        (Self { origin: None, value: lines.table(table.get_ref()) }, problems)
    }

    /// Reads JSON text, all of it from `origin`.
    pub(super) fn from_json(origin: Option<&Origin>, json: serde_json::Value) -> Self {
        let value = match json {
            serde_json::Value::Null => Value::Null,
            serde_json::Value::Bool(value) => Value::Bool(value),
            serde_json::Value::Number(number) => number
                .as_i64()
                .map_or_else(|| Value::Float(number.as_f64().unwrap_or(f64::INFINITY)), Value::Integer),
            serde_json::Value::String(text) => Value::text(text),
            serde_json::Value::Array(items) => {
                Value::List(items.into_iter().map(|item| Self::from_json(origin, item)).collect())
            }
            serde_json::Value::Object(fields) => Value::Table(
                fields.into_iter().map(|(key, field)| (key, Self::from_json(origin, field))).collect(),
            ),
        };
        Self { origin: origin.cloned(), value }
    }

    /// The node at `path`, or the nearest one above it.
    pub(super) fn nearest(&self, path: &[String]) -> &Self {
        let mut node = self;
        for key in path {
            match &node.value {
                Value::Table(fields) if fields.contains_key(key) => node = &fields[key],
                _ => break,
            }
        }
        node
    }

    pub(super) fn get(&self, path: &[String]) -> Option<&Self> {
        path.iter().try_fold(self, |node, key| match &node.value {
            Value::Table(fields) => fields.get(key),
            _ => None,
        })
    }

    /// Takes out the node at `path`, or the one above it that holds the path within itself (JSON text). False if
    /// only the root is left to take.
    pub(super) fn remove(&mut self, path: &[String]) -> bool {
        let Some((key, rest)) = path.split_first() else { return false };
        let Value::Table(fields) = &mut self.value else { return false };
        let Some(child) = fields.get_mut(key) else { return false };
        if child.remove(rest) {
            return true;
        }
        fields.remove(key);
        true
    }

    /// Takes out and returns the node at `path`.
    pub(super) fn take(&mut self, path: &[String]) -> Option<Self> {
        let (last, above) = path.split_last()?;
        let table = above.iter().try_fold(self, |node, key| match &mut node.value {
            Value::Table(fields) => fields.get_mut(key),
            _ => None,
        });
        match &mut table?.value {
            Value::Table(fields) => fields.remove(last),
            _ => None,
        }
    }

    /// Takes out the node at `path`, if there is one.
    pub(super) fn remove_exact(&mut self, path: &[String]) {
        if self.get(path).is_some() {
            self.remove(path);
        }
    }

    /// Puts `node` at `path`, in place of what was there. Tables on the way are made.
    ///
    /// # Errors
    ///
    /// The length of the part of `path` that names a value which cannot hold fields. Nothing is changed then.
    pub(super) fn insert(&mut self, path: &[String], node: Self) -> Result<(), usize> {
        let mut place = self;
        for (depth, key) in path.iter().enumerate() {
            let Value::Table(fields) = &mut place.value else { return Err(depth) };
            place = fields.entry(key.clone()).or_insert_with(Self::empty_table);
        }
        *place = node;
        Ok(())
    }
}

impl Value {
    pub(super) fn text(text: String) -> Self {
        Self::Text(Zeroizing::new(text))
    }

    pub(super) fn raw(text: String) -> Self {
        Self::Raw(Zeroizing::new(text))
    }

    /// What it is, in words, for a message.
    pub(super) const fn kind(&self) -> &'static str {
        match self {
            Self::Table(_) => "a table",
            Self::List(_) => "a list",
            Self::Null => "null",
            Self::Bool(_) => "true or false",
            Self::Integer(_) | Self::Float(_) => "a number",
            Self::Text(_) | Self::Raw(_) => "text",
        }
    }
}

/// Turns byte offsets into lines.
struct Lines<'a> {
    name: Arc<str>,
    text: &'a str,
}

impl Lines<'_> {
    fn origin(&self, offset: usize) -> Origin {
        let before = &self.text.as_bytes()[..offset.min(self.text.len())];
        let line = 1 + before.split(|byte| *byte == b'\n').count().saturating_sub(1);
        Origin::File { name: Arc::clone(&self.name), line }
    }

    fn table(&self, table: &DeTable<'_>) -> Value {
        let fields = table.iter().map(|(key, field)| {
            let node =
                Node { origin: Some(self.origin(key.span().start)), value: self.value(field.get_ref()) };
            (key.get_ref().to_string(), node)
        });
        Value::Table(fields.collect())
    }

    fn value(&self, value: &DeValue<'_>) -> Value {
        match value {
            DeValue::String(text) => Value::text(text.to_string()),
            DeValue::Integer(digits) => {
                let parsed = i64::from_str_radix(digits.as_str(), digits.radix());
                parsed.map_or(Value::Float(f64::INFINITY), Value::Integer)
            }
            DeValue::Float(digits) => Value::Float(digits.as_str().parse().unwrap_or(f64::NAN)),
            DeValue::Boolean(value) => Value::Bool(*value),
            DeValue::Datetime(time) => Value::text(time.to_string()),
            DeValue::Array(items) => Value::List(
                items
                    .iter()
                    .map(|item| Node {
                        origin: Some(self.origin(item.span().start)),
                        value: self.value(item.get_ref()),
                    })
                    .collect(),
            ),
            DeValue::Table(table) => self.table(table),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(dotted: &str) -> Vec<String> {
        dotted.split('.').map(str::to_owned).collect()
    }

    #[test]
    fn nodes_know_their_lines() {
        let (tree, problems) = Node::from_toml("g.toml", "a = 1\n\n[b]\nc = [\n  2,\n]\n");
        assert!(problems.is_empty());
        let line = |dotted: &str| match &tree.get(&path(dotted)).unwrap().origin {
            Some(Origin::File { name, line }) => (name.to_string(), *line),
            _ => panic!("no line"),
        };
        assert_eq!(line("a"), ("g.toml".to_owned(), 1));
        assert_eq!(line("b.c"), ("g.toml".to_owned(), 4));
    }

    #[test]
    fn all_syntax_errors_are_found_and_none_repeats_the_value() {
        let (tree, problems) =
            Node::from_toml("g.toml", "a = hunter2hunter2\nb = 1\nc = \"hunter2hunter2\nd = 2\n");
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(!format!("{problems:?}").contains("hunter2"));
        assert!(tree.get(&path("b")).is_some());
    }

    #[test]
    fn insert_and_remove_meet_in_the_middle() {
        let mut tree = Node::empty_table();
        let leaf = || Node { origin: None, value: Value::Bool(true) };
        assert_eq!(tree.insert(&path("a.b"), leaf()), Ok(()));
        assert_eq!(tree.insert(&path("a.b.c"), leaf()), Err(2));
        assert!(tree.get(&path("a.b")).is_some());
        // The path goes on inside of the value.
        assert!(tree.remove(&path("a.b.c")));
        assert!(tree.get(&path("a.b")).is_none());
        assert!(tree.get(&path("a")).is_some());
        assert!(!tree.remove(&[]));
    }
}

//! Untyped settings as they were written: one JSON value, and the origin of each part of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use secrecy::zeroize::Zeroize;
use serde_json::Value;
use toml::de::{DeTable, DeValue};

use super::problem::{Origin, Problem};

/// Stand-in for numbers that JSON lacks, such as `nan`. Null would look like a setting that is left out.
const NO_JSON_NUMBER: f64 = f64::MAX;

/// The settings of all sources together. It has no `Debug`, because it contains secrets in clear.
pub(super) struct Tree {
    root: Value,
    /// Origins by dotted path. A part without an entry has the origin of the part that contains it.
    origins: BTreeMap<String, Origin>,
}

impl Tree {
    pub(super) fn empty() -> Self {
        Self {
            root: Value::Object(serde_json::Map::new()),
            origins: BTreeMap::new(),
        }
    }

    /// Reads a TOML document as far as possible. The problems are its syntax errors.
    pub(super) fn from_toml(name: &str, text: &str) -> (Self, Vec<Problem>) {
        let (table, errors) = DeTable::parse_recoverable(text);
        let mut file = File {
            name: name.into(),
            text,
            origins: BTreeMap::new(),
        };
        let root = file.table("", table.get_ref());
        let problems = errors
            .iter()
            .map(|error| Problem {
                path: String::new(),
                origin: Some(file.origin(error.span().map_or(0, |span| span.start))),
                what: format!("this is not TOML: {}", error.message()),
                hint: None,
            })
            .collect();
        (
            Self {
                root,
                origins: file.origins,
            },
            problems,
        )
    }

    pub(super) fn root(&self) -> &Value {
        &self.root
    }

    pub(super) fn get(&self, path: &[impl AsRef<str>]) -> Option<&Value> {
        path.iter()
            .map(AsRef::as_ref)
            .try_fold(&self.root, |value, key| match value {
                Value::Object(fields) => fields.get(key),
                Value::Array(items) => items.get(key.parse::<usize>().ok()?),
                _ => None,
            })
    }

    /// Returns the origin of the value at `path`. `None` if there is no value.
    pub(super) fn origin(&self, path: &[impl AsRef<str>]) -> Option<&Origin> {
        self.get(path)?;
        let dotted = dotted(path);
        let mut place = dotted.as_str();
        loop {
            match self.origins.get(place) {
                Some(origin) => return Some(origin),
                None => place = place.rsplit_once('.')?.0,
            }
        }
    }

    /// Returns the text of a variable or flag at `path`. Its field decides how to read it.
    pub(super) fn raw(&self, path: &[String]) -> Option<&str> {
        let origin = self.origins.get(&dotted(path))?;
        self.get(path)?
            .as_str()
            .filter(|_| !matches!(origin, Origin::File { .. }))
    }

    /// Puts `value` at `path`, and replaces the old value. Creates missing tables with the same origin.
    ///
    /// # Errors
    ///
    /// A part of `path` is a value that is not a table. Returns the length of this part, and changes nothing.
    pub(super) fn insert(
        &mut self,
        path: &[String],
        value: Value,
        origin: Option<Origin>,
    ) -> Result<(), usize> {
        let mut place = &mut self.root;
        let mut made = path.len();
        for (depth, key) in path.iter().enumerate() {
            let Value::Object(fields) = place else {
                return Err(depth);
            };
            if !fields.contains_key(key) {
                made = made.min(depth + 1);
            }
            place = fields
                .entry(key.clone())
                .or_insert_with(|| Value::Object(serde_json::Map::new()));
        }
        wipe(&mut std::mem::replace(place, value));
        let (dotted_path, below) = (dotted(path), dotted(path) + ".");
        self.origins
            .retain(|place, _| *place != dotted_path && !place.starts_with(&below));
        if let Some(origin) = origin {
            self.origins
                .extend((made..=path.len()).map(|depth| (dotted(&path[..depth]), origin.clone())));
        }
        Ok(())
    }

    /// Changes the value at `path`, and keeps its origin. Returns whether there is a value.
    pub(super) fn replace(&mut self, path: &[String], value: Value) -> bool {
        let place = path
            .iter()
            .try_fold(&mut self.root, |place, key| match place {
                Value::Object(fields) => fields.get_mut(key),
                Value::Array(items) => items.get_mut(key.parse::<usize>().ok()?),
                _ => None,
            });
        place
            .map(|place| wipe(&mut std::mem::replace(place, value)))
            .is_some()
    }

    /// Removes the value at `path`, or the list that contains it. Returns false if only the root is left.
    pub(super) fn remove(&mut self, path: &[String]) -> bool {
        let Some((last, above)) = path.split_last() else {
            return false;
        };
        let table = above
            .iter()
            .try_fold(&mut self.root, |value, key| value.get_mut(key));
        match table
            .and_then(Value::as_object_mut)
            .and_then(|fields| fields.remove(last))
        {
            Some(mut value) => {
                wipe(&mut value);
                true
            }
            None => self.remove(above),
        }
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        wipe(&mut self.root);
    }
}

/// Overwrites all texts in memory, because some are secrets.
fn wipe(value: &mut Value) {
    match value {
        Value::String(text) => text.zeroize(),
        Value::Array(items) => items.iter_mut().for_each(wipe),
        Value::Object(fields) => fields.values_mut().for_each(wipe),
        _ => {}
    }
}

/// Returns the type of a value in words, for a message.
pub(super) const fn kind(value: &Value) -> &'static str {
    match value {
        Value::Object(_) => "a table",
        Value::Array(_) => "a list",
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
    }
}

fn dotted(path: &[impl AsRef<str>]) -> String {
    path.iter().map(AsRef::as_ref).collect::<Vec<_>>().join(".")
}

/// A document that is being turned into a tree.
struct File<'a> {
    name: Arc<str>,
    text: &'a str,
    origins: BTreeMap<String, Origin>,
}

impl File<'_> {
    fn origin(&self, offset: usize) -> Origin {
        let before = &self.text.as_bytes()[..offset.min(self.text.len())];
        let line = 1 + before
            .split(|byte| *byte == b'\n')
            .count()
            .saturating_sub(1);
        Origin::File {
            name: Arc::clone(&self.name),
            line,
        }
    }

    fn table(&mut self, path: &str, table: &DeTable<'_>) -> Value {
        let fields = table.iter().map(|(key, field)| {
            let name = key.get_ref().to_string();
            let value = self.part(path, &name, key.span().start, field.get_ref());
            (name, value)
        });
        Value::Object(fields.collect())
    }

    fn part(&mut self, above: &str, key: &str, offset: usize, value: &DeValue<'_>) -> Value {
        let path = if above.is_empty() {
            key.to_owned()
        } else {
            format!("{above}.{key}")
        };
        let value = match value {
            DeValue::String(text) => Value::from(text.as_ref()),
            DeValue::Integer(digits) => i64::from_str_radix(digits.as_str(), digits.radix())
                .map_or(Value::from(NO_JSON_NUMBER), Value::from),
            DeValue::Float(digits) => {
                let number = digits
                    .as_str()
                    .parse()
                    .ok()
                    .filter(|number: &f64| number.is_finite());
                Value::from(number.unwrap_or(NO_JSON_NUMBER))
            }
            DeValue::Boolean(value) => Value::from(*value),
            DeValue::Datetime(time) => Value::from(time.to_string()),
            DeValue::Array(items) => {
                let items = items.iter().enumerate();
                let item = |(index, item): (usize, &toml::Spanned<DeValue<'_>>)| {
                    self.part(&path, &index.to_string(), item.span().start, item.get_ref())
                };
                Value::Array(items.map(item).collect())
            }
            DeValue::Table(table) => self.table(&path, table),
        };
        self.origins.insert(path, self.origin(offset));
        value
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
        let (tree, problems) = Tree::from_toml("g.toml", "a = 1\n\n[b]\nc = [\n  2,\n]\n");
        assert!(problems.is_empty());
        let line = |dotted: &str| match tree.origin(&path(dotted)) {
            Some(Origin::File { name, line }) => (name.to_string(), *line),
            _ => panic!("no line"),
        };
        assert_eq!(line("a"), ("g.toml".to_owned(), 1));
        assert_eq!(line("b.c"), ("g.toml".to_owned(), 4));
        assert_eq!(line("b.c.0"), ("g.toml".to_owned(), 5));
        assert_eq!(tree.origin(&path("b.d")), None, "nothing is written there");
    }

    #[test]
    fn all_syntax_errors_are_found_and_none_repeats_the_value() {
        let (tree, problems) = Tree::from_toml(
            "g.toml",
            "a = hunter2hunter2\nb = 1\nc = \"hunter2hunter2\nd = 2\n",
        );
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(!format!("{problems:?}").contains("hunter2"));
        assert!(tree.get(&path("b")).is_some());
    }

    #[test]
    fn numbers_that_json_lacks_are_not_taken_for_nothing() {
        let (tree, _) = Tree::from_toml(
            "g.toml",
            "a = nan\nb = -inf\nc = 99999999999999999999\nd = 1_0.5",
        );
        for number in ["a", "b", "c", "d"] {
            assert!(!tree.get(&path(number)).unwrap().is_null(), "{number}");
        }
        assert_eq!(tree.get(&path("d")), Some(&Value::from(10.5)));
    }

    #[test]
    fn insert_and_remove_meet_in_the_middle() {
        let mut tree = Tree::empty();
        let leaf = || Value::from(true);
        assert_eq!(tree.insert(&path("a.b"), leaf(), None), Ok(()));
        assert_eq!(tree.insert(&path("a.b.c"), leaf(), None), Err(2));
        assert!(tree.get(&path("a.b")).is_some());
        // A list is removed as a whole.
        assert_eq!(
            tree.insert(&path("a.c"), Value::from(vec![1, 2]), None),
            Ok(())
        );
        assert!(tree.remove(&path("a.c.0")));
        assert!(tree.get(&path("a.c")).is_none());
        assert!(tree.get(&path("a.b")).is_some());
        assert!(tree.remove(&path("a.b")));
        assert!(tree.get(&path("a.b")).is_none());
        assert!(tree.get(&path("a")).is_some());
        assert!(!tree.remove(&[]));
    }

    #[test]
    fn what_is_inserted_has_one_origin() {
        let (mut tree, _) = Tree::from_toml("g.toml", "[a]\nb = { c = 1 }\n");
        let variable = Origin::Variable("A__B".to_owned());
        assert_eq!(tree.raw(&path("a.b")), None);
        assert_eq!(
            tree.insert(&path("a.b"), Value::from("{}"), Some(variable.clone())),
            Ok(())
        );
        assert_eq!(tree.raw(&path("a.b")), Some("{}"));
        assert!(tree.replace(&path("a.b"), serde_json::json!({ "c": "text" })));
        assert_eq!(tree.origin(&path("a.b.c")), Some(&variable));
        assert_eq!(tree.raw(&path("a.b.c")), None, "it is text already");
        assert_eq!(
            tree.insert(&path("a.d.e"), Value::from(1), Some(variable.clone())),
            Ok(())
        );
        assert_eq!(
            tree.origin(&path("a.d")),
            Some(&variable),
            "it is made for the value in it"
        );
        assert!(matches!(tree.origin(&path("a")), Some(Origin::File { .. })));
    }
}

//! Shared by the tests of several modules: JSON and bytes that are valid except in a few places.

use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Map, Value};

/// Words that mean something to the reader of the JSON.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Words {
    pub(crate) texts: &'static [&'static str],
    pub(crate) keys: &'static [&'static str],
}

/// JSON of any shape. Its texts and keys are often `words`.
pub(crate) fn any_json(words: Words) -> impl Strategy<Value = Value> {
    let text = prop_oneof![
        "\\PC{0,8}",
        prop::sample::select(words.texts).prop_map(str::to_owned)
    ];
    let key = prop_oneof![
        "[a-z]{0,3}",
        prop::sample::select(words.keys).prop_map(str::to_owned)
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        text.prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 4, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((key.clone(), inner), 0..4)
                .prop_map(|pairs| Value::Object(Map::from_iter(pairs))),
        ]
    })
}

/// One of `real`, with some of its values replaced by any JSON, or removed.
pub(crate) fn mutated(real: Vec<Value>, words: Words) -> impl Strategy<Value = Value> {
    let changes = prop::collection::vec((any::<Index>(), prop::option::of(any_json(words))), 0..4);
    (prop::sample::select(real), changes).prop_map(|(mut value, changes)| {
        for (place, change) in changes {
            let mut at = place.index(count(&value));
            replace(&mut value, &mut at, change.as_ref());
        }
        value
    })
}

/// Returns the number of values, the whole included.
fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(values) => values.iter().map(count).sum(),
        Value::Object(fields) => fields.values().map(count).sum(),
        _ => 0,
    }
}

/// Replaces the value after `at` others, or removes it if `by` is `None`. Never removes the whole.
fn replace(value: &mut Value, at: &mut usize, by: Option<&Value>) {
    if *at == 0 {
        if let Some(by) = by {
            *value = by.clone();
        }
        *at = usize::MAX;
        return;
    }
    *at -= 1;
    match value {
        Value::Array(values) => {
            for n in 0..values.len() {
                if *at == 0 && by.is_none() {
                    values.remove(n);
                    *at = usize::MAX;
                }
                if *at == usize::MAX {
                    return;
                }
                replace(&mut values[n], at, by);
            }
        }
        Value::Object(fields) => {
            let keys: Vec<String> = fields.keys().cloned().collect();
            for key in keys {
                if *at == 0 && by.is_none() {
                    fields.remove(&key);
                    *at = usize::MAX;
                }
                if *at == usize::MAX {
                    return;
                }
                if let Some(field) = fields.get_mut(&key) {
                    replace(field, at, by);
                }
            }
        }
        _ => {}
    }
}

/// `bytes` with some of them replaced, removed or repeated.
pub(crate) fn damaged(bytes: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![
        any::<u8>(),
        prop::sample::select(&b"\n\r:{}[]\",\\ \0\xff"[..])
    ];
    let changes = prop::collection::vec((any::<Index>(), prop::option::of(byte)), 0..8);
    (changes, any::<Index>(), any::<Index>()).prop_map(move |(changes, from, to)| {
        let mut bytes = bytes.clone();
        for (at, change) in changes {
            let at = at.index(bytes.len());
            match change {
                Some(byte) => bytes[at] = byte,
                None => drop(bytes.remove(at)),
            }
        }
        let (from, to) = (from.index(bytes.len()), to.index(bytes.len()));
        if from < to {
            bytes.extend_from_within(from..to);
        }
        bytes
    })
}

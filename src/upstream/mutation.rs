//! For tests: JSON that is what the protocols send, but for a few places.

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Map, Value};

use super::relay::{Dialect, relay};
use super::sse::events;

/// JSON of any shape. Texts are often words that mean something in one of the protocols.
pub(super) fn any_json() -> impl Strategy<Value = Value> {
    let text = prop_oneof![
        "\\PC{0,8}",
        prop::sample::select(
            &[
                "completed",
                "failed",
                "cancelled",
                "requires_action",
                "assistant",
                "user",
                "message",
                "text",
                "refusal",
                "output_text",
                "function_call",
                "custom_tool_call_output",
                "reasoning",
                "error",
                "response.completed",
                "response.output_text.delta",
                "thread.run",
                "thread.message",
                "id_1",
            ][..]
        )
        .prop_map(str::to_owned),
    ];
    let key = prop_oneof![
        "[a-z]{0,3}",
        prop::sample::select(
            &[
                "id", "type", "status", "role", "content", "text", "value", "delta", "index", "response",
                "output", "error", "code", "message", "usage", "data", "call_id", "has_more", "object",
                "refusal",
            ][..]
        )
        .prop_map(str::to_owned),
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

/// One of `real`, with some of its values replaced by any others, or left out.
pub(super) fn mutated(real: Vec<Value>) -> impl Strategy<Value = Value> {
    let changes = prop::collection::vec((any::<Index>(), prop::option::of(any_json())), 0..4);
    (prop::sample::select(real), changes).prop_map(|(mut value, changes)| {
        for (place, change) in changes {
            let mut at = place.index(count(&value));
            replace(&mut value, &mut at, change.as_ref());
        }
        value
    })
}

/// How many values there are, the whole included.
fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(values) => values.iter().map(count).sum(),
        Value::Object(fields) => fields.values().map(count).sum(),
        _ => 0,
    }
}

/// Replaces the value that is met after `at` others, or takes it out if nothing is to replace it. The whole stays.
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

/// All that a stream of these bytes means in `dialect`: as text, the error at its end included.
pub(super) fn read_to_the_end(pieces: Vec<Vec<u8>>, dialect: impl Dialect, limit: usize) -> Vec<String> {
    let bytes = stream::iter(pieces.into_iter().map(|piece| Ok(Bytes::from(piece))));
    let read = async {
        match relay(events(bytes, limit), dialect, limit).await {
            Ok(events) => events.map(|event| format!("{event:?}")).collect().await,
            Err(refusal) => vec![format!("{refusal:?}")],
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(read)
}

/// `bytes` with some of them replaced or left out, and some repeated, in pieces.
pub(super) fn damaged(bytes: Vec<u8>) -> impl Strategy<Value = Vec<Vec<u8>>> {
    let byte = prop_oneof![any::<u8>(), prop::sample::select(&b"\n\r:{}[]\",\\ \0\xff"[..])];
    let changes = prop::collection::vec((any::<Index>(), prop::option::of(byte)), 0..8);
    (changes, any::<Index>(), any::<Index>(), 1_usize..200).prop_map(move |(changes, from, to, piece)| {
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
        bytes.chunks(piece).map(<[u8]>::to_vec).collect()
    })
}

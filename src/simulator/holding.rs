//! What the server still holds, for tests that prove that nothing is left.

use serde::Serialize;
use serde_json::Value;

use super::state::World;
use super::{assistants, responses};

/// The search for a text in everything that is stored.
#[derive(Debug)]
pub(super) struct Search<'a> {
    text: &'a str,
    places: Vec<String>,
}

/// Where the text is, in words.
pub(super) fn places(world: &World, text: &str) -> Vec<String> {
    let mut search = Search { text, places: Vec::new() };
    assistants::search(world, &mut search);
    responses::search(world, &mut search);
    search.places
}

impl Search<'_> {
    /// Looks into an object.
    pub(super) fn look(&mut self, place: impl FnOnce() -> String, object: &impl Serialize) {
        let object = serde_json::to_value(object).expect("the simulator's objects are plain JSON");
        if holds(&object, self.text) {
            self.places.push(place());
        }
    }

    /// Looks into JSON texts.
    pub(super) fn look_into_text(&mut self, place: impl FnOnce() -> String, json: &str) {
        let escaped = Value::from(self.text).to_string();
        if json.contains(escaped.trim_matches('"')) {
            self.places.push(place());
        }
    }
}

fn holds(value: &Value, text: &str) -> bool {
    match value {
        Value::String(string) => string.contains(text),
        Value::Array(values) => values.iter().any(|value| holds(value, text)),
        Value::Object(map) => map.iter().any(|(key, value)| key.contains(text) || holds(value, text)),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_text_is_found_at_any_depth() {
        let object = json!({"a": [1, {"b": "the \"needle\"\n"}], "pin": null});
        for (text, expected) in [("needle", true), ("\"needle\"\n", true), ("pin", true), ("thread", false)] {
            assert_eq!(holds(&object, text), expected, "{text}");
            let mut search = Search { text, places: Vec::new() };
            search.look_into_text(|| "here".to_owned(), &object.to_string());
            assert_eq!(search.places.len(), usize::from(expected), "{text}");
        }
    }
}

//! Searches the server's content for a text, for tests that prove that nothing remains.

use serde::Serialize;
use serde_json::Value;

use crate::simulator::state::World;
use crate::simulator::state::items;

/// The search for a text in everything that is stored.
#[derive(Debug)]
struct Search<'a> {
    text: &'a str,
    places: Vec<String>,
}

/// Returns the places of the text, in words.
pub(super) fn places(world: &World, text: &str) -> Vec<String> {
    let mut search = Search {
        text,
        places: Vec::new(),
    };
    search_threads(world, &mut search);
    search_conversations(world, &mut search);
    search.places
}

/// Returns the ids of items that outlived their deleted conversations.
pub(super) fn leaked_items(world: &World) -> Vec<String> {
    let deleted = world
        .conversations
        .iter()
        .filter(|(_, conversation)| conversation.is_deleted());
    let leaked = deleted.flat_map(|(_, conversation)| conversation.items());
    leaked.map(|item| items::id(item).to_owned()).collect()
}

fn search_threads(world: &World, search: &mut Search<'_>) {
    for (id, thread) in world.threads.iter() {
        search.look(|| format!("thread {id}"), thread);
        for message in &thread.messages {
            search.look(|| format!("message {} of thread {id}", message.id), message);
        }
    }
    for (id, run) in world.runs.iter() {
        search.look(|| format!("run {id}"), run);
        for step in &run.work.steps {
            search.look(|| format!("step {} of run {id}", step.id), step);
        }
    }
}

fn search_conversations(world: &World, search: &mut Search<'_>) {
    for (id, conversation) in world.conversations.iter() {
        let kind = if conversation.is_deleted() {
            "leaked item"
        } else {
            "item"
        };
        if !conversation.is_deleted() {
            search.look(|| format!("conversation {id}"), conversation);
        }
        for item in conversation.items() {
            search.look(
                || format!("{kind} {} of conversation {id}", items::id(item)),
                item,
            );
        }
    }
    for (id, stored) in world.responses.iter() {
        search.look(|| format!("response {id}"), &stored.response);
        search.look(|| format!("input of response {id}"), &stored.input);
        if let Some(log) = &stored.log {
            search.look_into_text(|| format!("events of response {id}"), &log.text());
        }
    }
}

impl Search<'_> {
    /// Searches an object.
    fn look(&mut self, place: impl FnOnce() -> String, object: &impl Serialize) {
        let object = serde_json::to_value(object).expect("the simulator's objects are plain JSON");
        if holds(&object, self.text) {
            self.places.push(place());
        }
    }

    /// Searches JSON texts.
    fn look_into_text(&mut self, place: impl FnOnce() -> String, json: &str) {
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
        Value::Object(map) => map
            .iter()
            .any(|(key, value)| key.contains(text) || holds(value, text)),
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
        for (text, expected) in [
            ("needle", true),
            ("\"needle\"\n", true),
            ("pin", true),
            ("thread", false),
        ] {
            assert_eq!(holds(&object, text), expected, "{text}");
            let mut search = Search {
                text,
                places: Vec::new(),
            };
            search.look_into_text(|| "here".to_owned(), &object.to_string());
            assert_eq!(search.places.len(), usize::from(expected), "{text}");
        }
    }
}

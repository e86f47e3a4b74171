//! Checks requests, answers and events against the published specifications. `tests/specs` keeps
//! the parts of them that are needed. The module [`contract`](super::contract) reads the
//! gateway's own document.
//!
//! Where a specification and real servers disagree, the schema is amended here, each time with
//! the reason.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use jsonschema::Validator;
use serde_json::{Value, json};

static ASSISTANTS: LazyLock<Document> = LazyLock::new(|| {
    Document::load(
        include_str!("../../specs/assistants.json"),
        &[
            Exception::Null(
                "ListMessagesResponse/properties/first_id",
                "null on an empty page",
            ),
            Exception::Null(
                "ListMessagesResponse/properties/last_id",
                "null on an empty page",
            ),
            Exception::Null(
                "ListRunsResponse/properties/first_id",
                "null on an empty page",
            ),
            Exception::Null(
                "ListRunsResponse/properties/last_id",
                "null on an empty page",
            ),
            Exception::Null(
                "ListRunStepsResponse/properties/first_id",
                "null on an empty page",
            ),
            Exception::Null(
                "ListRunStepsResponse/properties/last_id",
                "null on an empty page",
            ),
        ],
    )
});

static RESPONSES: LazyLock<Document> = LazyLock::new(|| {
    Document::load(
        include_str!("../../specs/responses.json"),
        &[
            Exception::Null(
                "Response/allOf/2/properties/usage",
                "null until the response has ended",
            ),
            Exception::Null(
                "ConversationItemList/properties/first_id",
                "null on an empty page",
            ),
            Exception::Null(
                "ConversationItemList/properties/last_id",
                "null on an empty page",
            ),
            Exception::Null(
                "ResponseItemList/properties/first_id",
                "null on an empty page",
            ),
            Exception::Null(
                "ResponseItemList/properties/last_id",
                "null on an empty page",
            ),
            Exception::Error(
                "DELETE /responses/{response_id}",
                "404",
                "declared as a bare error, sent in an `error` wrapper like all others",
            ),
            Exception::Error(
                "POST /responses/{response_id}/cancel",
                "404",
                "as for DELETE",
            ),
        ],
    )
});

/// The specification of threads, messages and runs.
pub(crate) fn assistants() -> &'static Document {
    &ASSISTANTS
}

/// The specification of conversations and responses.
pub(crate) fn responses() -> &'static Document {
    &RESPONSES
}

/// One document. It has the request and the answers of each operation, by its name (`GET
/// /threads/{thread_id}`), and the schemas that these refer to.
pub(crate) struct Document {
    root: Value,
    /// The places of the schemas that others refer to.
    definitions: &'static [&'static str],
    validators: Mutex<HashMap<String, Arc<Validator>>>,
}

/// An error of the document, with the reason to believe that it is one.
enum Exception {
    /// The schema at this place below `$defs` also allows null.
    Null(&'static str, &'static str),
    /// The answer of the operation with this status is the usual error body.
    Error(&'static str, &'static str, &'static str),
}

impl Document {
    fn load(text: &str, exceptions: &[Exception]) -> Self {
        let mut root: Value = serde_json::from_str(text).expect("the document is JSON");
        for exception in exceptions {
            match exception {
                Exception::Null(place, reason) => {
                    let schema = root.pointer_mut(&format!("/$defs/{place}"));
                    let schema = schema.unwrap_or_else(|| {
                        panic!("{place} ({reason}): the document no longer has this")
                    });
                    *schema = json!({"anyOf": [schema.take(), {"type": "null"}]});
                }
                Exception::Error(operation, status, reason) => {
                    let error = root["error"].clone();
                    let answer = root["operations"][*operation]["responses"].get_mut(*status);
                    *answer.unwrap_or_else(|| {
                        panic!("{operation} ({reason}): the document no longer has this")
                    }) = error;
                }
            }
        }
        Self::new(root, &["$defs"])
    }

    pub(super) fn new(root: Value, definitions: &'static [&'static str]) -> Self {
        Self {
            root,
            definitions,
            validators: Mutex::default(),
        }
    }

    /// Returns the path template that matches a concrete path below the base:
    /// `/threads/{thread_id}/runs`.
    pub(crate) fn template(&self, method: &str, path: &str) -> Option<String> {
        let operations = self.root["operations"].as_object()?;
        let templates = operations
            .keys()
            .filter_map(|key| key.strip_prefix(method)?.strip_prefix(' '));
        // A placeholder may stand for an empty text, but not at the end.
        let matches = |template: &&str| {
            if path.ends_with('/') {
                return path == *template;
            }
            let (mut of_path, mut of_template) = (path.split('/'), template.split('/'));
            let fits = |(a, b): (&str, &str)| a == b || b.starts_with('{');
            of_path.by_ref().zip(of_template.by_ref()).all(fits)
                && path.split('/').count() == template.split('/').count()
        };
        // The template with the fewest placeholders wins: `/threads/runs` before
        // `/threads/{thread_id}`.
        templates
            .filter(matches)
            .min_by_key(|template| template.matches('{').count())
            .map(str::to_owned)
    }

    /// Checks a request's JSON body. `Null` means that there is no body.
    pub(crate) fn check_request(
        &self,
        method: &str,
        template: &str,
        body: &Value,
    ) -> Result<(), String> {
        let key = format!("{method} {template}");
        let operation = self.operation(&key)?;
        match (operation.get("request"), body) {
            (None, Value::Null) => Ok(()),
            (None, _) => Err(format!("{key} takes no body")),
            // A body may be left out if no field of it is required.
            (Some(schema), Value::Null) => {
                self.check(&format!("{key} request"), schema, &json!({}))
            }
            (Some(schema), body) => self.check(&format!("{key} request"), schema, body),
        }
    }

    /// Checks an answer's JSON body. A status that the document does not declare must have the
    /// usual error body.
    pub(crate) fn check_response(
        &self,
        method: &str,
        template: &str,
        status: u16,
        body: &Value,
    ) -> Result<(), String> {
        let key = format!("{method} {template}");
        let declared = self.operation(&key)?["responses"].get(status.to_string());
        match declared {
            // The document declares the status without a body, so any body passes.
            Some(Value::Null) => Ok(()),
            Some(schema) => self.check(&format!("{key} {status}"), schema, body),
            None if status >= 400 => self.check("error", &self.root["error"], body),
            None => Err(format!("{key} does not answer with status {status}")),
        }
    }

    /// Checks an event's payload by the event's name. Assistants events are named in the `event:`
    /// line, others in the payload, too.
    pub(crate) fn check_event(&self, name: &str, data: &Value) -> Result<(), String> {
        let event = &self.root["event"];
        let mut branches = Vec::new();
        self.branches(event, &mut branches);
        for branch in branches {
            let property = |property: &str| branch["properties"][property]["enum"][0].as_str();
            if property("event") == Some(name) {
                return self.check(
                    &format!("event {name}"),
                    &branch["properties"]["data"],
                    data,
                );
            }
            if property("type") == Some(name) {
                return self.check(&format!("event {name}"), branch, data);
            }
        }
        Err(format!("there is no event {name}"))
    }

    /// Collects the members of a union, at any depth.
    fn branches<'a>(&'a self, schema: &'a Value, found: &mut Vec<&'a Value>) {
        if let Some(name) = schema["$ref"]
            .as_str()
            .and_then(|name| name.strip_prefix("#/$defs/"))
        {
            self.branches(&self.root["$defs"][name], found);
        } else if let Some(members) = schema["anyOf"].as_array() {
            for member in members {
                self.branches(member, found);
            }
        } else {
            found.push(schema);
        }
    }

    pub(super) fn operation(&self, key: &str) -> Result<&Value, String> {
        self.root["operations"]
            .get(key)
            .ok_or_else(|| format!("there is no operation {key}"))
    }

    /// Returns the value that `value` refers to, or `value` itself.
    pub(super) fn resolved<'a>(&'a self, value: &'a Value) -> &'a Value {
        let place = value["$ref"]
            .as_str()
            .and_then(|reference| reference.strip_prefix('#'));
        place.map_or(value, |place| {
            self.root
                .pointer(place)
                .expect("the reference has a target")
        })
    }

    pub(super) fn component(&self, kind: &str, name: &str) -> &Value {
        &self.root["components"][kind][name]
    }

    /// The names of all components of a kind.
    pub(super) fn names_of(&self, kind: &str) -> impl Iterator<Item = &str> {
        self.root["components"][kind]
            .as_object()
            .into_iter()
            .flatten()
            .map(|(name, _)| name.as_str())
    }

    /// Validates an instance. Each `what` has one validator, which is kept.
    pub(super) fn check(&self, what: &str, schema: &Value, instance: &Value) -> Result<(), String> {
        let validator = {
            let mut validators = self
                .validators
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let make = || {
                let mut whole = json!({"allOf": [schema]});
                for place in self.definitions {
                    whole[place] = self.root[place].clone();
                }
                Arc::new(
                    jsonschema::draft202012::new(&whole).expect("the document's schemas are valid"),
                )
            };
            Arc::clone(validators.entry(what.to_owned()).or_insert_with(make))
        };
        let errors: Vec<String> = validator
            .iter_errors(instance)
            .map(|error| format!("at '{}': {error}", error.instance_path()))
            .collect();
        if errors.is_empty() {
            Ok(())
        } else {
            Err(format!("{what}: {}\nin {instance}", errors.join("; ")))
        }
    }
}

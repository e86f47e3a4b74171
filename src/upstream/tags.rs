//! The gateway's own entries in the upstream's metadata, and the parts of a request that both
//! adapters build alike.

use chrono::SecondsFormat;
use serde_json::{Map, Value};

use crate::config::{AssistantConfig, UpstreamKind, reserved_parameters};
use crate::domain::{MessageId, Metadata, RunId};
use crate::upstream::port::Ownership;

/// The tag by which the gateway finds a run again.
pub(super) const RUN_TAG: &str = "threadkeeper_run";
/// The tag of a user's message.
pub(super) const MESSAGE_TAG: &str = "threadkeeper_message";
/// The tag by which the gateway finds an upstream thread again.
pub(super) const THREAD_TAG: &str = "threadkeeper_thread";

/// Returns the tags for the owner of a thread: up to five pairs, each value no longer than a key
/// may be (256 bytes).
pub(super) fn thread_tags(owner: &Ownership) -> Map<String, Value> {
    let mut tags = Map::new();
    tags.insert(THREAD_TAG.to_owned(), owner.thread.to_string().into());
    let mut tag = |name: &str, value: String| {
        tags.insert(format!("threadkeeper_{name}"), Value::String(value))
    };
    tag("tenant", owner.names.tenant.clone());
    tag("user", owner.names.user.clone());
    if let Some((kind, name)) = &owner.names.scope {
        tag(kind, name.clone());
    }
    if let Some(expires_at) = owner.expires_at {
        tag(
            "expires_at",
            expires_at.to_rfc3339_opts(SecondsFormat::Secs, true),
        );
    }
    tags
}

/// Returns the caller's pairs and the gateway's tag, which no pair of the caller can replace.
pub(super) fn run_tags(run: RunId, metadata: &Metadata) -> Map<String, Value> {
    let mut tags: Map<String, Value> = metadata
        .iter()
        .map(|(key, value)| (key.to_owned(), value.into()))
        .collect();
    tags.insert(RUN_TAG.to_owned(), run.to_string().into());
    tags
}

/// Returns the tags of a message. `run`: the run that the message belongs to, if any.
pub(super) fn message_tags(run: Option<RunId>, message: MessageId) -> Map<String, Value> {
    let mut tags = Map::new();
    if let Some(run) = run {
        tags.insert(RUN_TAG.to_owned(), run.to_string().into());
    }
    tags.insert(MESSAGE_TAG.to_owned(), message.to_string().into());
    tags
}

/// Returns the base of a request: the assistant as it is configured. Parameters without a value,
/// and those that the gateway sets itself, are left out.
pub(super) fn body_of(assistant: &AssistantConfig, kind: UpstreamKind) -> Map<String, Value> {
    let reserved = reserved_parameters(kind);
    let parameters = assistant.parameters.iter();
    let mut body: Map<String, Value> = parameters
        .filter(|(key, value)| !value.is_null() && !reserved.contains(&key.as_str()))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    let mut set = |name: &str, value: Value| body.insert(name.to_owned(), value);
    if let Some(model) = &assistant.model {
        set("model", model.as_str().into());
    }
    if let Some(instructions) = &assistant.instructions {
        set("instructions", instructions.as_str().into());
    }
    if !assistant.tools.is_empty() {
        set("tools", assistant.tools.clone().into());
    }
    body
}

/// Returns the owner of a session's thread, for the tests of the adapters.
#[cfg(test)]
pub(super) fn an_owner() -> Ownership {
    use crate::domain::{KeyNames, ThreadId};

    Ownership {
        names: KeyNames {
            tenant: "default".to_owned(),
            user: "auth0|5f7c".to_owned(),
            scope: Some(("session", "s 1".to_owned())),
        },
        thread: ThreadId::new(),
        expires_at: Some("2026-11-22T09:00:00.25Z".parse().unwrap()),
    }
}

/// Returns a message of an earlier run, for the tests of the adapters.
#[cfg(test)]
pub(super) fn a_message(role: crate::domain::Role, text: &str) -> crate::domain::Message {
    use crate::domain::{ContentPart, Message, ThreadId, UpstreamSync};

    Message {
        id: MessageId::new(),
        thread_id: ThreadId::new(),
        position: 1,
        role,
        content: vec![ContentPart::text(text)],
        run_id: None,
        upstream_message_id: None,
        sync: UpstreamSync::Missing,
        ended: None,
        created_at: "2026-11-22T09:00:00Z".parse().unwrap(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_thread_carries_its_owner_and_expiry() {
        let mut owner = an_owner();
        let expected = json!({
            "threadkeeper_tenant": "default", "threadkeeper_user": "auth0|5f7c", "threadkeeper_session": "s 1",
            "threadkeeper_thread": owner.thread.to_string(), "threadkeeper_expires_at": "2026-11-22T09:00:00Z",
        });
        assert_eq!(Value::Object(thread_tags(&owner)), expected);

        owner.names.scope = None;
        owner.expires_at = None;
        let keys: Vec<String> = thread_tags(&owner).keys().cloned().collect();
        assert_eq!(
            keys,
            [
                "threadkeeper_tenant",
                "threadkeeper_thread",
                "threadkeeper_user"
            ]
        );
    }

    #[test]
    fn reserved_and_null_parameters_are_left_out() {
        let configured = json!({"stream": false, "store": false, "temperature": 1, "top_p": null});
        let parameters_for = |kind| {
            let mut assistant = AssistantConfig::default();
            assistant
                .parameters
                .clone_from(configured.as_object().unwrap());
            Value::Object(body_of(&assistant, kind))
        };
        assert_eq!(
            parameters_for(UpstreamKind::Responses),
            json!({"temperature": 1})
        );
        assert_eq!(
            parameters_for(UpstreamKind::Assistants),
            json!({"store": false, "temperature": 1})
        );
    }
}

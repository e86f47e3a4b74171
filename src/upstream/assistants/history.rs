//! Converts a message of a thread to an entry of its history.

use super::wire::MessageObject;
use crate::upstream::port::HistoryEntry;
use crate::upstream::tags::{MESSAGE_TAG, RUN_TAG};

pub(super) fn entry(message: MessageObject) -> Option<HistoryEntry> {
    Some(HistoryEntry {
        role: message.speaker()?,
        created_at: message.created_at(),
        is_tagged: [RUN_TAG, MESSAGE_TAG]
            .iter()
            .any(|name| message.tag(name).is_some()),
        id: message.id.clone(),
        content: message.into_parts(),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::domain::{ContentPart, Role};

    fn read(message: Value) -> Option<HistoryEntry> {
        entry(serde_json::from_value(message).unwrap())
    }

    #[test]
    fn a_message_becomes_an_entry() {
        let message = json!({
            "id": "msg_1", "created_at": 1_795_000_000, "role": "user", "metadata": {"threadkeeper_message": "m"},
            "content": [{"type": "text", "text": {"value": "a", "annotations": []}}, {"type": "hologram"}],
        });
        let expected = HistoryEntry {
            id: "msg_1".to_owned(),
            role: Role::User,
            content: vec![ContentPart::text("a")],
            created_at: Some("2026-11-18T11:06:40Z".parse().unwrap()),
            is_tagged: true,
        };
        assert_eq!(read(message), Some(expected));
    }

    #[test]
    fn what_a_message_does_not_say_is_left_open() {
        let entry =
            read(json!({"id": "msg_1", "created_at": "now", "metadata": {"a": "b"}})).unwrap();
        assert_eq!(
            (entry.role, entry.created_at, entry.is_tagged),
            (Role::Assistant, None, false)
        );
        assert_eq!(entry.content, []);
        assert_eq!(read(json!({"id": "msg_1", "role": "moderator"})), None);
    }
}

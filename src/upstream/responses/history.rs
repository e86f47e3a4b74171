//! Converts an item of a conversation to an entry of its history.

use serde_json::Value;

use super::run_items::id_of;
use super::wire::said;
use crate::domain::Timestamp;
use crate::upstream::port::HistoryEntry;

/// Returns the item as an entry, if it is a message of the user or of the assistant. Items carry
/// no tags.
pub(super) fn entry(item: &Value) -> Option<HistoryEntry> {
    let text = |field: &str| item.get(field)?.as_str();
    text("type").filter(|kind| *kind == "message")?;
    Some(HistoryEntry {
        id: id_of(item)?.to_owned(),
        role: text("role")?.parse().ok()?,
        content: said(item),
        created_at: item
            .get("created_at")
            .and_then(Value::as_i64)
            .and_then(|at| Timestamp::from_timestamp(at, 0)),
        is_tagged: false,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::domain::{ContentPart, File, ImageFile, ImageUrl, Role};

    #[test]
    fn messages_of_user_and_assistant_become_entries() {
        let text = |text: &str| ContentPart::text(text);
        let asked = entry(&json!({
            "type": "message", "id": "msg_1", "role": "user", "created_at": 1_795_000_000, "content": [
                {"type": "input_text", "text": "a"},
                {"type": "input_image", "image_url": "https://i/1.png", "detail": "low"},
                {"type": "input_image", "file_id": "file_1", "image_url": null, "detail": null},
                {"type": "input_file", "file_id": "file_2"},
                7,
            ],
        }))
        .unwrap();
        assert_eq!(
            (asked.id.as_str(), asked.role, asked.is_tagged),
            ("msg_1", Role::User, false)
        );
        assert_eq!(
            asked.created_at,
            Some("2026-11-18T11:06:40Z".parse().unwrap())
        );
        let (url, detail) = ("https://i/1.png".to_owned(), Some("low".to_owned()));
        assert_eq!(
            asked.content,
            [
                text("a"),
                ContentPart::ImageUrl {
                    image_url: ImageUrl { url, detail }
                },
                ContentPart::ImageFile {
                    image_file: ImageFile {
                        file_id: "file_1".to_owned(),
                        detail: None
                    }
                },
                ContentPart::File {
                    file: File {
                        file_id: Some("file_2".to_owned()),
                        ..File::default()
                    }
                },
            ]
        );
        let said = entry(&json!({"type": "message", "id": "msg_2", "role": "assistant", "content": [
            {"type": "output_text", "text": "b", "annotations": []}, {"type": "refusal", "refusal": "c"},
        ]}))
        .unwrap();
        assert_eq!((said.role, said.created_at), (Role::Assistant, None));
        assert_eq!(said.content, [text("b"), ContentPart::refusal("c")]);
        let bare =
            entry(&json!({"type": "message", "id": "msg_3", "role": "user", "content": "d"}))
                .unwrap();
        assert_eq!(bare.content, [text("d")]);
    }

    #[test]
    fn other_items_are_left_out() {
        for item in [
            json!({"type": "message", "id": "msg_1", "role": "system", "content": []}),
            json!({"type": "message", "role": "user", "content": []}),
            json!({"type": "reasoning", "id": "rs_1", "summary": []}),
            json!({"type": "function_call", "id": "fc_1", "role": "user"}),
            json!(7),
        ] {
            assert_eq!(entry(&item), None, "{item}");
        }
    }
}

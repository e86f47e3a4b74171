//! The content of a message: a list of parts. Requests, the transcript and answers share its
//! shape.

use std::fmt;

use serde::de::{self, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

/// Most parts of one message.
pub const MAX_PARTS: usize = 64;

/// One part of a message.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ContentPart {
    Text {
        text: String,
    },
    ImageUrl {
        image_url: ImageUrl,
    },
    /// A file that the caller uploaded to the upstream before.
    ImageFile {
        image_file: ImageFile,
    },
    /// A document, such as a PDF.
    File {
        file: File,
    },
    /// The model declined to answer. Only replies have it.
    Refusal {
        refusal: String,
    },
}

impl<'de> Deserialize<'de> for ContentPart {
    /// Written by hand. A derived implementation reads a part twice, and its errors lack the place
    /// of the mistake inside the part.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(PartVisitor)
    }
}

struct PartVisitor;

impl<'de> Visitor<'de> for PartVisitor {
    type Value = ContentPart;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with a `type`")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<ContentPart, A::Error> {
        let (mut kind, mut text, mut image_url, mut image_file, mut file, mut refusal) =
            (None, None, None, None, None, None);
        while let Some(name) = fields.next_key::<String>()? {
            match name.as_str() {
                "type" => once(&mut kind, "type", fields.next_value()?)?,
                "text" => once(&mut text, "text", fields.next_value()?)?,
                "image_url" => once(&mut image_url, "image_url", fields.next_value()?)?,
                "image_file" => once(&mut image_file, "image_file", fields.next_value()?)?,
                "file" => once(&mut file, "file", fields.next_value()?)?,
                "refusal" => once(&mut refusal, "refusal", fields.next_value()?)?,
                other => {
                    return Err(de::Error::unknown_field(
                        other,
                        &["type", SENT[0], SENT[1], SENT[2], SENT[3]],
                    ));
                }
            }
        }
        match (
            kind.ok_or_else(|| de::Error::missing_field("type"))?,
            text,
            image_url,
            image_file,
            file,
            refusal,
        ) {
            (Kind::Text, Some(text), None, None, None, None) => Ok(ContentPart::Text { text }),
            (Kind::ImageUrl, None, Some(image_url), None, None, None) => {
                Ok(ContentPart::ImageUrl { image_url })
            }
            (Kind::ImageFile, None, None, Some(image_file), None, None) => {
                Ok(ContentPart::ImageFile { image_file })
            }
            (Kind::File, None, None, None, Some(file), None) => Ok(ContentPart::File { file }),
            (Kind::Refusal, None, None, None, None, Some(refusal)) => {
                Ok(ContentPart::Refusal { refusal })
            }
            _ => Err(de::Error::custom(
                "a part must have its `type` and exactly one more field, which is named like the type",
            )),
        }
    }
}

enum Kind {
    Text,
    ImageUrl,
    ImageFile,
    File,
    Refusal,
}

/// The types of parts that callers can send. Error texts offer only these.
const SENT: [&str; 4] = ["text", "image_url", "image_file", "file"];

impl<'de> Deserialize<'de> for Kind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match String::deserialize(deserializer)?.as_str() {
            "text" => Ok(Self::Text),
            "image_url" => Ok(Self::ImageUrl),
            "image_file" => Ok(Self::ImageFile),
            "file" => Ok(Self::File),
            "refusal" => Ok(Self::Refusal),
            other => Err(de::Error::unknown_variant(other, &SENT)),
        }
    }
}

/// Reads content that is a string or a list of parts.
pub fn text_or_parts<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<ContentPart>, D::Error> {
    struct StringOrParts;

    impl<'de> Visitor<'de> for StringOrParts {
        type Value = Vec<ContentPart>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a string or a list of content parts")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
            Ok(vec![ContentPart::Text {
                text: text.to_owned(),
            }])
        }

        fn visit_seq<A: SeqAccess<'de>>(self, parts: A) -> Result<Self::Value, A::Error> {
            Vec::deserialize(de::value::SeqAccessDeserializer::new(parts))
        }
    }

    deserializer.deserialize_any(StringOrParts)
}

fn once<T, E: de::Error>(field: &mut Option<T>, name: &'static str, value: T) -> Result<(), E> {
    match field.replace(value) {
        None => Ok(()),
        Some(_) => Err(E::duplicate_field(name)),
    }
}

impl ContentPart {
    /// Returns the text of a text part.
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text { text } => Some(text),
            _ => None,
        }
    }

    /// Returns the bytes of the part's text, URL, file id or data.
    pub fn size(&self) -> usize {
        match self {
            Self::Text { text } => text.len(),
            Self::Refusal { refusal } => refusal.len(),
            Self::ImageUrl { image_url } => image_url.url.len(),
            Self::ImageFile { image_file } => image_file.file_id.len(),
            Self::File { file } => file.texts().map(str::len).sum(),
        }
    }
}

#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageUrl {
    pub url: String,
    /// `auto`, `low` or `high`; the upstream's default where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageFile {
    pub file_id: String,
    /// `auto`, `low` or `high`; the upstream's default where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// A file: exactly one of `file_id`, `file_url` and `file_data`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct File {
    /// Id of a file that the caller uploaded to the upstream before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file_url: Option<String>,
    /// The content as a data URL: `data:application/pdf;base64,…`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file_data: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filename: Option<String>,
}

impl File {
    /// Returns the id, the URL and the data, as far as the file has them.
    pub fn sources(&self) -> impl Iterator<Item = &str> {
        let sources = [&self.file_id, &self.file_url, &self.file_data];
        sources.into_iter().flatten().map(String::as_str)
    }

    fn texts(&self) -> impl Iterator<Item = &str> {
        self.sources().chain(self.filename.as_deref())
    }
}

/// The reason why content cannot be a user's message.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum InvalidContent {
    #[error("content must not be empty")]
    Empty,
    #[error("content has at most {limit} parts, this has {parts}")]
    TooManyParts { limit: usize, parts: usize },
    #[error("a part of type `refusal` is for replies only; remove it from the message")]
    Refusal,
    #[error("a `file` must have exactly one of `file_id`, `file_url` and `file_data`")]
    File,
    #[error("content must not contain NUL characters")]
    Nul,
}

/// The content of a user's message: 1 to 64 parts, no refusal, and at least one text, image or file
/// that is not empty.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct UserContent(Vec<ContentPart>);

impl UserContent {
    /// Most parts of one message.
    pub const MAX_PARTS: usize = MAX_PARTS;

    /// Returns the bytes of all parts' texts, URLs and file ids.
    pub fn size(&self) -> usize {
        self.0.iter().map(ContentPart::size).sum()
    }

    pub fn parts(&self) -> &[ContentPart] {
        &self.0
    }

    pub fn into_parts(self) -> Vec<ContentPart> {
        self.0
    }
}

impl TryFrom<Vec<ContentPart>> for UserContent {
    type Error = InvalidContent;

    fn try_from(parts: Vec<ContentPart>) -> Result<Self, InvalidContent> {
        if parts.len() > MAX_PARTS {
            return Err(InvalidContent::TooManyParts {
                limit: MAX_PARTS,
                parts: parts.len(),
            });
        }
        let mut empty = true;
        for part in &parts {
            let texts: [&str; 2] = match part {
                ContentPart::File { file } => {
                    let mut sources = file.sources();
                    match (sources.next(), sources.next()) {
                        (Some(source), None) => [source, file.filename.as_deref().unwrap_or("")],
                        _ => return Err(InvalidContent::File),
                    }
                }
                ContentPart::Text { text } => [text, ""],
                ContentPart::ImageUrl { image_url } => {
                    [&image_url.url, image_url.detail.as_deref().unwrap_or("")]
                }
                ContentPart::ImageFile { image_file } => [
                    &image_file.file_id,
                    image_file.detail.as_deref().unwrap_or(""),
                ],
                ContentPart::Refusal { .. } => return Err(InvalidContent::Refusal),
            };
            if texts.iter().any(|text| text.contains('\0')) {
                return Err(InvalidContent::Nul);
            }
            empty &= texts[0].is_empty();
        }
        if empty {
            Err(InvalidContent::Empty)
        } else {
            Ok(Self(parts))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::testing::{Words, mutated};

    const WORDS: Words = Words {
        texts: &[
            "text",
            "image_url",
            "image_file",
            "file",
            "refusal",
            "auto",
            "\0",
        ],
        keys: &[
            "type",
            "text",
            "image_url",
            "image_file",
            "file",
            "refusal",
            "url",
            "file_id",
            "file_url",
            "file_data",
            "filename",
            "detail",
        ],
    };

    proptest! {
        #[test]
        fn parts_are_kept_as_they_are_or_refused(
            parts in prop::collection::vec(
                mutated(
                    vec![
                        json!({"type": "text", "text": "a"}),
                        json!({"type": "text", "text": ""}),
                        json!({"type": "image_url", "image_url": {"url": "u", "detail": "low"}}),
                        json!({"type": "image_file", "image_file": {"file_id": "f"}}),
                        json!({"type": "file", "file": {"file_data": "d", "filename": "n"}}),
                        json!({"type": "refusal", "refusal": "no"}),
                    ],
                    WORDS,
                ),
                0..70,
            ),
        ) {
            // One invalid part would make the whole list invalid.
            let parts: Vec<ContentPart> =
                parts.into_iter().filter_map(|part| serde_json::from_value(part).ok()).collect();
            for part in &parts {
                let text = serde_json::to_string(part).unwrap();
                prop_assert_eq!(&serde_json::from_str::<ContentPart>(&text).unwrap(), part);
                prop_assert!(part.size() <= text.len());
            }
            let text = serde_json::to_string(&parts).unwrap();
            match UserContent::try_from(parts.clone()) {
                Ok(content) => {
                    prop_assert!((1..=MAX_PARTS).contains(&parts.len()) && !text.contains("\\u0000"));
                    prop_assert!(parts.iter().any(|part| part.size() > 0));
                    prop_assert_eq!(content.into_parts(), parts);
                }
                Err(InvalidContent::Empty) => prop_assert!(parts.iter().all(|part| part.size() == 0)),
                Err(InvalidContent::TooManyParts { limit, parts: count }) => {
                    prop_assert!(count == parts.len() && count > limit);
                },
                Err(InvalidContent::Refusal) => {
                    let is_refusal = |part: &ContentPart| matches!(part, ContentPart::Refusal { .. });
                    prop_assert!(parts.iter().any(is_refusal));
                }
                Err(InvalidContent::File) => {
                    let is_bad = |part: &ContentPart| matches!(
                        part, ContentPart::File { file } if file.sources().count() != 1
                    );
                    prop_assert!(parts.iter().any(is_bad));
                }
                Err(InvalidContent::Nul) => prop_assert!(text.contains("\\u0000")),
            }
        }
    }
}

//! The content of a message: a list of parts. Requests, the transcript and answers share its
//! shape.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::made_call::{MAX_ALL_OUTPUTS, MadeCall, kept_answer};
use super::run::text_enum;
use super::tool_call::{ToolCall, ToolOutput};

/// Most parts of one message.
pub const MAX_PARTS: usize = 64;

text_enum!(
    /// What a message of a reply is for.
    Phase {
        /// The model says what it is about to do.
        Commentary = "commentary",
        /// The answer itself.
        FinalAnswer = "final_answer",
    }
);

/// The message of a reply that a part belongs to. A run may write several messages.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Origin {
    /// The number of the message in its run, from 0.
    pub message: u32,
    /// `None` if the upstream does not say it.
    pub phase: Option<Phase>,
}

/// A citation, or a file that the text names, as the upstream wrote it.
pub type Annotation = Map<String, Value>;

/// One part of a message.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ContentPart {
    Text {
        text: String,
        /// The citations of the text, as the upstream wrote them. Only replies have them.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        #[schema(value_type = Vec<Object>, required = false)]
        annotations: Vec<Annotation>,
        /// The number of the message in its run, from 0; 0 where absent. Only replies have it.
        #[serde(skip_serializing_if = "is_first")]
        #[schema(required = false)]
        message: u32,
        /// What the message is for, if the upstream says it. Only replies have it.
        #[serde(skip_serializing_if = "Option::is_none")]
        phase: Option<Phase>,
    },
    ImageUrl {
        image_url: ImageUrl,
    },
    /// A file at the upstream. A caller can upload one there before.
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
        /// The number of the message in its run, from 0; 0 where absent.
        #[serde(skip_serializing_if = "is_first")]
        #[schema(required = false)]
        message: u32,
    },
    /// A picture that the model made. Only replies have it.
    GeneratedImage {
        generated_image: GeneratedImage,
    },
    /// A call of a tool that the model made. Only replies have it.
    ToolCall {
        tool_call: MadeCall,
    },
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes it so")]
const fn is_first(message: &u32) -> bool {
    *message == 0
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
        let (mut generated_image, mut tool_call, mut annotations, mut message, mut phase) =
            (None, None, None, None, None);
        while let Some(name) = fields.next_key::<String>()? {
            match name.as_str() {
                "type" => once(&mut kind, "type", fields.next_value()?)?,
                "text" => once(&mut text, "text", fields.next_value()?)?,
                "image_url" => once(&mut image_url, "image_url", fields.next_value()?)?,
                "image_file" => once(&mut image_file, "image_file", fields.next_value()?)?,
                "file" => once(&mut file, "file", fields.next_value()?)?,
                "refusal" => once(&mut refusal, "refusal", fields.next_value()?)?,
                "generated_image" => {
                    once(
                        &mut generated_image,
                        "generated_image",
                        fields.next_value()?,
                    )?;
                }
                "tool_call" => once(&mut tool_call, "tool_call", fields.next_value()?)?,
                "annotations" => once(&mut annotations, "annotations", fields.next_value()?)?,
                "message" => once(&mut message, "message", fields.next_value()?)?,
                "phase" => once(&mut phase, "phase", fields.next_value()?)?,
                other => {
                    return Err(de::Error::unknown_field(
                        other,
                        &["type", SENT[0], SENT[1], SENT[2], SENT[3]],
                    ));
                }
            }
        }
        let kind = kind.ok_or_else(|| de::Error::missing_field("type"))?;
        let of_text = annotations.is_some() || phase.is_some();
        let of_message = of_text || message.is_some();
        match (
            kind,
            text,
            image_url,
            image_file,
            file,
            refusal,
            (generated_image, tool_call),
        ) {
            (Kind::Text, Some(text), None, None, None, None, (None, None)) => {
                Ok(ContentPart::Text {
                    text,
                    annotations: annotations.unwrap_or_default(),
                    message: message.unwrap_or_default(),
                    phase,
                })
            }
            (Kind::Refusal, None, None, None, None, Some(refusal), (None, None)) if !of_text => {
                Ok(ContentPart::Refusal {
                    refusal,
                    message: message.unwrap_or_default(),
                })
            }
            (Kind::ImageUrl, None, Some(image_url), None, None, None, (None, None))
                if !of_message =>
            {
                Ok(ContentPart::ImageUrl { image_url })
            }
            (Kind::ImageFile, None, None, Some(image_file), None, None, (None, None))
                if !of_message =>
            {
                Ok(ContentPart::ImageFile { image_file })
            }
            (Kind::File, None, None, None, Some(file), None, (None, None)) if !of_message => {
                Ok(ContentPart::File { file })
            }
            (Kind::GeneratedImage, None, None, None, None, None, (Some(generated_image), None))
                if !of_message =>
            {
                Ok(ContentPart::GeneratedImage { generated_image })
            }
            (Kind::ToolCall, None, None, None, None, None, (None, Some(tool_call)))
                if !of_message =>
            {
                Ok(ContentPart::ToolCall { tool_call })
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
    GeneratedImage,
    ToolCall,
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
            "generated_image" => Ok(Self::GeneratedImage),
            "tool_call" => Ok(Self::ToolCall),
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
            Ok(vec![ContentPart::text(text)])
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
    /// Returns whether the part is a picture or file.
    pub const fn is_media(&self) -> bool {
        matches!(
            self,
            Self::ImageUrl { .. } | Self::ImageFile { .. } | Self::File { .. }
        )
    }

    /// Returns whether the part is something that the model said or made, and no call.
    pub const fn is_said(&self) -> bool {
        !matches!(self, Self::ToolCall { .. })
    }

    /// Returns the call of a call part.
    pub const fn as_call(&self) -> Option<&MadeCall> {
        match self {
            Self::ToolCall { tool_call } => Some(tool_call),
            _ => None,
        }
    }

    /// Returns a part of text alone.
    pub fn text(text: impl Into<String>) -> Self {
        Self::text_of(text, Origin::default())
    }

    /// Returns a text of this message.
    pub fn text_of(text: impl Into<String>, origin: Origin) -> Self {
        Self::Text {
            text: text.into(),
            annotations: Vec::new(),
            message: origin.message,
            phase: origin.phase,
        }
    }

    /// Returns a refusal in the first message.
    pub fn refusal(refusal: impl Into<String>) -> Self {
        Self::Refusal {
            refusal: refusal.into(),
            message: 0,
        }
    }

    /// Returns the text of a text part.
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text { text, .. } => Some(text),
            _ => None,
        }
    }

    /// Returns the message that the part belongs to. A picture belongs to that of its neighbours, a
    /// call to none.
    pub fn origin(&self) -> Option<Origin> {
        match *self {
            Self::Text { message, phase, .. } => Some(Origin { message, phase }),
            Self::Refusal { message, .. } => Some(Origin {
                message,
                phase: None,
            }),
            _ => None,
        }
    }

    /// Returns the bytes of the part that come from the model: the output of a call does not.
    pub fn size_made(&self) -> usize {
        self.as_call()
            .map_or_else(|| self.size(), MadeCall::size_asked)
    }

    /// Returns the bytes of the part's text, URL or id, and of its annotations.
    pub fn size(&self) -> usize {
        match self {
            Self::Text {
                text, annotations, ..
            } => text.len() + annotations.iter().map(size_of_annotation).sum::<usize>(),
            Self::Refusal { refusal, .. } => refusal.len(),
            Self::ImageUrl { image_url } => image_url.url.len(),
            Self::ImageFile { image_file } => image_file.file_id.len(),
            Self::File { file } => file.texts().map(str::len).sum(),
            Self::GeneratedImage { generated_image } => {
                generated_image.id.len() + generated_image.url.as_ref().map_or(0, String::len)
            }
            Self::ToolCall { tool_call } => tool_call.size(),
        }
    }
}

/// Returns the bytes of an annotation as JSON.
pub fn size_of_annotation(annotation: &Annotation) -> usize {
    serde_json::to_string(annotation).map_or(0, |json| json.len())
}

/// Appends further messages of a run to its content. Their numbers follow those of the content.
pub fn append_messages(content: &mut Vec<ContentPart>, mut more: Vec<ContentPart>) {
    number_messages(&mut more, next_message(content));
    content.append(&mut more);
}

/// Returns the number of the message that follows `content`.
pub fn next_message(content: &[ContentPart]) -> u32 {
    let numbers = content
        .iter()
        .filter_map(|part| Some(part.origin()?.message));
    numbers.max().map_or(0, |last| last.saturating_add(1))
}

/// Changes the numbers of the messages so that the lowest is `first`.
pub fn number_messages(content: &mut [ContentPart], first: u32) {
    let numbers = content
        .iter()
        .filter_map(|part| Some(part.origin()?.message));
    let Some(lowest) = numbers.min() else {
        return;
    };
    for part in content {
        if let ContentPart::Text { message, .. } | ContentPart::Refusal { message, .. } = part {
            *message = (*message - lowest).saturating_add(first);
        }
    }
}

/// Returns the messages of a reply, in order. A call stands alone.
pub fn messages_of(content: &[ContentPart]) -> impl Iterator<Item = &[ContentPart]> {
    content.chunk_by(|one, next| match (one.origin(), next.origin()) {
        (Some(one), Some(next)) => one.message == next.message,
        _ => one.is_said() && next.is_said(),
    })
}

/// Returns whether the content has more than calls.
pub fn says_something(content: &[ContentPart]) -> bool {
    content.iter().any(ContentPart::is_said)
}

/// Adds the calls that the content does not have.
pub fn add_calls(content: &mut Vec<ContentPart>, calls: &[ToolCall]) {
    for call in calls {
        let is_there = |part: &ContentPart| part.as_call().is_some_and(|made| made.id == call.id);
        if !content.iter().any(is_there) {
            let tool_call = MadeCall::from(call);
            content.push(ContentPart::ToolCall { tool_call });
        }
    }
}

/// Adds the outputs to the calls of the content that have none.
pub fn answer_calls(content: &mut [ContentPart], outputs: &[ToolOutput]) {
    let made = content.iter().filter_map(ContentPart::as_call);
    let mut held: usize = made.map(|call| call.size() - call.size_asked()).sum();
    for part in content {
        let ContentPart::ToolCall { tool_call } = part else {
            continue;
        };
        let answer = outputs.iter().find(|it| it.tool_call_id == tool_call.id);
        let Some(answer) = answer.filter(|_| tool_call.output.is_none()) else {
            continue;
        };
        let output = kept_answer(&answer.answer);
        held += output.len();
        let has_room = held <= MAX_ALL_OUTPUTS;
        tool_call.output = Some(if has_room {
            output
        } else {
            "[The output is not kept.]".to_owned()
        });
    }
}

/// Returns a reply as the upstream has it, with the calls of the run that are in no message there.
/// `known`: what the gateway has of the reply.
pub fn with_calls_of(known: &[ContentPart], mut held: Vec<ContentPart>) -> Vec<ContentPart> {
    if held.iter().any(|part| !part.is_said()) || known.iter().all(ContentPart::is_said) {
        return held;
    }
    let said: Vec<&ContentPart> = known.iter().filter(|part| part.is_said()).collect();
    let is_same =
        |(one, other): (&&ContentPart, &ContentPart)| match (one.as_text(), other.as_text()) {
            (Some(one), Some(other)) => one == other,
            _ => *one == other,
        };
    if said.len() <= held.len() && said.iter().zip(&held).all(is_same) {
        let rest = held.split_off(said.len());
        return [known.to_vec(), rest].concat();
    }
    let calls = known.iter().filter(|part| !part.is_said()).cloned();
    calls.chain(held).collect()
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

/// A picture that the model made. The gateway does not keep the picture itself.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GeneratedImage {
    /// The upstream's id of the call that made the picture.
    pub id: String,
    /// The picture's URL, if the upstream gave one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
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
    #[error("a part of type `{0}` is for replies only; remove it from the message")]
    PartOfReply(&'static str),
    #[error(
        "the fields `annotations`, `message` and `phase` of a text are for replies only; remove them from the message"
    )]
    FieldOfReply,
    #[error("a `file` must have exactly one of `file_id`, `file_url` and `file_data`")]
    File,
    #[error("content must not contain NUL characters")]
    Nul,
}

/// The content of a user's message: 1 to 64 parts, nothing that only replies have, and at least one
/// text, image or file that is not empty.
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
                ContentPart::Text {
                    text,
                    annotations,
                    message: 0,
                    phase: None,
                } if annotations.is_empty() => [text, ""],
                ContentPart::Text { .. } => return Err(InvalidContent::FieldOfReply),
                ContentPart::ImageUrl { image_url } => {
                    [&image_url.url, image_url.detail.as_deref().unwrap_or("")]
                }
                ContentPart::ImageFile { image_file } => [
                    &image_file.file_id,
                    image_file.detail.as_deref().unwrap_or(""),
                ],
                ContentPart::Refusal { .. } => return Err(InvalidContent::PartOfReply("refusal")),
                ContentPart::GeneratedImage { .. } => {
                    return Err(InvalidContent::PartOfReply("generated_image"));
                }
                ContentPart::ToolCall { .. } => {
                    return Err(InvalidContent::PartOfReply("tool_call"));
                }
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
                        json!({"type": "text", "text": "a", "message": 1, "phase": "commentary",
                            "annotations": [{"type": "file_citation", "file_id": "f"}]}),
                        json!({"type": "generated_image", "generated_image": {"id": "ig", "url": "u"}}),
                        json!({"type": "tool_call", "tool_call": {
                            "id": "c", "type": "function", "name": "f", "arguments": "{}", "output": null,
                        }}),
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
                Err(InvalidContent::PartOfReply(_)) => {
                    let is_of_reply = |part: &ContentPart| {
                        matches!(
                            part,
                            ContentPart::Refusal { .. }
                                | ContentPart::GeneratedImage { .. }
                                | ContentPart::ToolCall { .. }
                        )
                    };
                    prop_assert!(parts.iter().any(is_of_reply));
                }
                Err(InvalidContent::FieldOfReply) => {
                    let is_plain = |part: &ContentPart| {
                        part.as_text().is_none_or(|text| *part == ContentPart::text(text))
                    };
                    prop_assert!(!parts.iter().all(is_plain));
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

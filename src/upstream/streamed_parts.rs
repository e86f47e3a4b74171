//! Assembles the parts of a reply from the deltas of a stream.

use std::collections::BTreeMap;

use serde_json::value::RawValue;

use crate::domain::{ContentPart, Origin};
use crate::upstream::relay::PLACE_COST;
use crate::upstream::surrogates::PendingHalf;

/// Parts in the order of their places.
#[derive(Debug)]
pub(super) struct StreamedParts<P>(BTreeMap<P, StreamedPart>);

#[derive(Debug)]
struct StreamedPart {
    part: ContentPart,
    half: PendingHalf,
}

/// The result of a delta.
#[derive(Debug, Default, Eq, PartialEq)]
pub(super) struct Growth {
    /// The new text.
    pub(super) text: String,
    /// The bytes by which the parts grew.
    pub(super) bytes: usize,
}

impl<P> Default for StreamedParts<P> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<P: Ord> StreamedParts<P> {
    /// Appends a delta, which is a JSON string, to the text or refusal at `place`, in the message
    /// `origin`. A character that the server cut in two comes with its second half. Returns `None` if
    /// `delta` is not a string.
    pub(super) fn grow(
        &mut self,
        place: P,
        origin: Origin,
        delta: &RawValue,
        is_refusal: bool,
    ) -> Option<Growth> {
        let is_new = !self.0.contains_key(&place);
        match delta.get() {
            "\"\"" if is_new => return Some(Growth::default()),
            text if !text.starts_with('"') => return None,
            _ => {}
        }
        let grown = self.0.entry(place).or_insert_with(|| StreamedPart {
            part: if is_refusal {
                ContentPart::Refusal {
                    refusal: String::new(),
                    message: origin.message,
                }
            } else {
                ContentPart::text_of("", origin)
            },
            half: PendingHalf::default(),
        });
        let more = grown.half.join(delta.get())?;
        if let Some(text) = text_in(&mut grown.part) {
            text.push_str(&more);
        }
        Some(Growth {
            bytes: more.len() + if is_new { PLACE_COST } else { 0 },
            text: more,
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &ContentPart> {
        self.0.values().map(|grown| &grown.part)
    }

    pub(super) fn into_vec(self) -> Vec<ContentPart> {
        let whole = |StreamedPart { mut part, half }| {
            if half.is_pending()
                && let Some(text) = text_in(&mut part)
            {
                text.push(char::REPLACEMENT_CHARACTER);
            }
            part
        };
        self.0.into_values().map(whole).collect()
    }
}

fn text_in(part: &mut ContentPart) -> Option<&mut String> {
    match part {
        ContentPart::Text { text, .. } | ContentPart::Refusal { refusal: text, .. } => Some(text),
        _ => None,
    }
}

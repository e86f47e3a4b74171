//! Assembles the parts of a reply from the deltas of a stream.

use std::collections::BTreeMap;

use crate::domain::ContentPart;
use crate::upstream::relay::PLACE_COST;

/// Parts in the order of their places.
#[derive(Debug)]
pub(super) struct StreamedParts<P>(BTreeMap<P, ContentPart>);

impl<P> Default for StreamedParts<P> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<P: Ord> StreamedParts<P> {
    /// Appends text, or text of a refusal, to the part at `place`. Returns the number of bytes by
    /// which the parts grew.
    pub(super) fn grow(&mut self, place: P, more: &str, is_refusal: bool) -> usize {
        let cost = if self.0.contains_key(&place) {
            0
        } else {
            PLACE_COST
        };
        let part = self.0.entry(place).or_insert_with(|| {
            if is_refusal {
                ContentPart::Refusal {
                    refusal: String::new(),
                }
            } else {
                ContentPart::Text {
                    text: String::new(),
                }
            }
        });
        if let ContentPart::Text { text } | ContentPart::Refusal { refusal: text } = part {
            text.push_str(more);
        }
        cost + more.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &ContentPart> {
        self.0.values()
    }

    pub(super) fn into_vec(self) -> Vec<ContentPart> {
        self.0.into_values().collect()
    }
}

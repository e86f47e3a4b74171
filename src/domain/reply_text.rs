//! The text of a reply, as its readers see it.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::content::{ContentPart, Origin, Phase};

/// More text of a reply.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(from = "Stored", into = "Stored")]
pub struct TextDelta {
    pub origin: Origin,
    pub text: Arc<str>,
}

impl From<&str> for TextDelta {
    /// Returns text of the first message.
    fn from(text: &str) -> Self {
        Self {
            origin: Origin::default(),
            text: text.into(),
        }
    }
}

impl From<String> for TextDelta {
    /// Returns text of the first message.
    fn from(text: String) -> Self {
        text.as_str().into()
    }
}

/// The stored form. A bare string for a first message without a phase, because most deltas are of
/// one.
#[derive(Deserialize, Serialize)]
#[serde(untagged)]
enum Stored {
    Bare(String),
    Full {
        text: String,
        message: u32,
        phase: Option<Phase>,
    },
}

impl From<Stored> for TextDelta {
    fn from(stored: Stored) -> Self {
        match stored {
            Stored::Bare(text) => text.into(),
            Stored::Full {
                text,
                message,
                phase,
            } => Self {
                origin: Origin { message, phase },
                text: text.into(),
            },
        }
    }
}

impl From<TextDelta> for Stored {
    fn from(TextDelta { origin, text }: TextDelta) -> Self {
        let text = text.as_ref().to_owned();
        if origin == Origin::default() {
            return Self::Bare(text);
        }
        Self::Full {
            text,
            message: origin.message,
            phase: origin.phase,
        }
    }
}

/// The text of a reply, in the order in which its readers see it. Texts of one message that follow
/// each other are one piece, so two texts are equal if each byte is the same and has the same
/// origin.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ReplyText(Vec<(Origin, String)>);

impl ReplyText {
    /// Returns the text of this content.
    pub fn of<'a>(content: impl IntoIterator<Item = &'a ContentPart>) -> Self {
        let mut all = Self::default();
        for part in content {
            if let (Some(origin), Some(text)) = (part.origin(), part.as_text()) {
                all.push(origin, text);
            }
        }
        all
    }

    pub fn push(&mut self, origin: Origin, text: &str) {
        match self.0.last_mut() {
            _ if text.is_empty() => {}
            Some((last, all)) if *last == origin => all.push_str(text),
            _ => self.0.push((origin, text.to_owned())),
        }
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the text without its origins.
    pub fn plain(&self) -> String {
        self.0.iter().map(|(_, text)| text.as_str()).collect()
    }

    /// Returns true if `beginning` is the beginning of this text, with the same origins.
    pub fn starts_with(&self, beginning: &Self) -> bool {
        let Some(((origin, text), before)) = beginning.0.split_last() else {
            return true;
        };
        self.0.starts_with(before)
            && self
                .0
                .get(before.len())
                .is_some_and(|(own, all)| own == origin && all.starts_with(text.as_str()))
    }

    /// Returns the text after `seen`. Returns `None` if it does not begin with `seen`. Origins do not
    /// count, because a stream may not tell them.
    pub fn after(self, seen: &Self) -> Option<Self> {
        let seen = seen.plain();
        let mut left = seen.as_str();
        let mut rest = Self::default();
        for (origin, text) in self.0 {
            let common = left.len().min(text.len());
            let (old, new) = (text.get(..common)?, text.get(common..)?);
            left = left.strip_prefix(old)?;
            rest.push(origin, new);
        }
        left.is_empty().then_some(rest)
    }

    /// Returns the text as deltas.
    pub fn into_deltas(self) -> impl Iterator<Item = TextDelta> {
        self.0.into_iter().map(|(origin, text)| TextDelta {
            origin,
            text: text.into(),
        })
    }

    /// Returns the text as content.
    pub fn into_parts(self) -> Vec<ContentPart> {
        let part = |(origin, text)| ContentPart::text_of(text, origin);
        self.0.into_iter().map(part).collect()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Generates pieces of text with the messages that they belong to.
    pub(crate) fn pieces() -> impl Strategy<Value = Vec<TextDelta>> {
        let phase = prop_oneof![
            Just(None),
            Just(Some(Phase::Commentary)),
            Just(Some(Phase::FinalAnswer)),
        ];
        let piece = (0..3_u32, phase, "[aä😀]{1,3}").prop_map(|(message, phase, text)| TextDelta {
            origin: Origin { message, phase },
            text: text.into(),
        });
        prop::collection::vec(piece, 0..6)
    }

    pub(crate) fn text_of(pieces: &[TextDelta]) -> ReplyText {
        let mut text = ReplyText::default();
        for TextDelta { origin, text: more } in pieces {
            text.push(*origin, more);
        }
        text
    }

    proptest! {
        #[test]
        fn a_text_is_its_beginning_and_its_rest(pieces in pieces(), at in 0..6_usize) {
            let (text, seen) = (text_of(&pieces), text_of(&pieces[..at.min(pieces.len())]));
            prop_assert!(text.starts_with(&seen));
            let mut whole = seen.clone();
            for TextDelta { origin, text } in text.clone().after(&seen).unwrap().into_deltas() {
                whole.push(origin, &text);
            }
            prop_assert_eq!(&whole, &text);
            prop_assert_eq!(ReplyText::of(&text.clone().into_parts()), text);
        }

        #[test]
        fn a_delta_is_stored_with_its_message(pieces in pieces()) {
            let json = serde_json::to_string(&pieces).unwrap();
            prop_assert_eq!(serde_json::from_str::<Vec<TextDelta>>(&json).unwrap(), pieces);
        }
    }

    #[test]
    fn another_text_has_no_rest() {
        let text = |text: &str| text_of(&[text.into()]);
        assert_eq!(text("ab").after(&text("ac")), None);
        assert_eq!(text("a").after(&text("ab")), None);
        assert_eq!(text("\u{e4}").after(&text("\u{e5}")), None);
    }
}

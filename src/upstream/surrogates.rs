//! Lone halves of UTF-16 pairs in JSON. A server that cuts text by UTF-16 units writes each half
//! of a cut character as an escape of its own, and a JSON parser refuses the text.

use std::borrow::Cow;

/// Bytes of an escape such as `\ud83d`.
const ESCAPE: usize = 6;

/// Returns the JSON text with U+FFFD in the place of each lone half.
pub(super) fn without_lone_halves(json: &str) -> Cow<'_, str> {
    let halves = lone_halves(json);
    if halves.is_empty() {
        return json.into();
    }
    let mut json = json.to_owned();
    for at in halves {
        json.replace_range(at..at + ESCAPE, "\\ufffd");
    }
    json.into()
}

/// A first half at the end of a piece of text. The next piece may begin with the second half.
#[derive(Debug, Default)]
pub(super) struct PendingHalf(Option<String>);

impl PendingHalf {
    /// Reads a piece of text, which is a JSON string, after the pending half. A first half at its
    /// end stays pending. Returns `None` if `json` is not a string.
    pub(super) fn join(&mut self, json: &str) -> Option<String> {
        if self.0.is_none() && !json.contains("\\u") {
            return serde_json::from_str(json).ok();
        }
        let inner = json.strip_prefix('"')?.strip_suffix('"')?;
        let mut text = self.0.take().unwrap_or_default() + inner;
        let end = lone_halves(&text).last().copied();
        if let Some(at) = end
            && at + ESCAPE == text.len()
            && unit(&text[at..]).is_some_and(is_first)
        {
            self.0 = Some(text.split_off(at));
        }
        serde_json::from_str(&without_lone_halves(&format!("\"{text}\""))).ok()
    }

    pub(super) fn is_pending(&self) -> bool {
        self.0.is_some()
    }
}

/// Returns the places of the escapes of lone halves.
fn lone_halves(json: &str) -> Vec<usize> {
    let mut halves = Vec::new();
    let mut at = 0;
    while let Some(next) = memchr::memchr(b'\\', &json.as_bytes()[at..]) {
        at += next;
        at += match json.get(at..).and_then(unit) {
            Some(first)
                if is_first(first)
                    && json
                        .get(at + ESCAPE..)
                        .and_then(unit)
                        .is_some_and(is_second) =>
            {
                2 * ESCAPE
            }
            Some(lone) => {
                if is_first(lone) || is_second(lone) {
                    halves.push(at);
                }
                ESCAPE
            }
            None => 2,
        };
        if at >= json.len() {
            break;
        }
    }
    halves
}

/// Returns the UTF-16 unit of the escape with which the text begins.
fn unit(text: &str) -> Option<u16> {
    let digits = text.strip_prefix("\\u")?.get(..4)?;
    u16::from_str_radix(digits, 16).ok()
}

const fn is_first(unit: u16) -> bool {
    matches!(unit, 0xd800..=0xdbff)
}

const fn is_second(unit: u16) -> bool {
    matches!(unit, 0xdc00..=0xdfff)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Writes each UTF-16 unit as an escape, as a JSON string.
    fn escaped(units: &[u16]) -> String {
        let escapes: Vec<String> = units.iter().map(|unit| format!("\\u{unit:04x}")).collect();
        format!("\"{}\"", escapes.concat())
    }

    #[test]
    fn only_lone_halves_are_replaced() {
        for (json, expected) in [
            (r#""Nice \ud83d""#, "Nice \u{fffd}"),
            (r#""\uDE00!""#, "\u{fffd}!"),
            (r#""\ud83d\ude00\ud83dx\ude00""#, "😀\u{fffd}x\u{fffd}"),
            (r#""\\ud83d \u00e4 \"""#, "\\ud83d ä \""),
        ] {
            let whole = without_lone_halves(json);
            assert_eq!(serde_json::from_str::<String>(&whole).unwrap(), expected);
        }
    }

    proptest! {
        #[test]
        fn pieces_of_utf16_give_the_whole_text(text in ".{0,12}", cuts in prop::collection::vec(0_usize..24, 0..4)) {
            let units: Vec<u16> = text.encode_utf16().collect();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(units.len())).chain([0, units.len()]).collect();
            cuts.sort_unstable();
            let mut half = PendingHalf::default();
            let read: String = cuts.windows(2).filter_map(|it| half.join(&escaped(&units[it[0]..it[1]]))).collect();
            prop_assert_eq!(read, text);
            prop_assert!(!half.is_pending());
        }

        #[test]
        fn any_text_stays_as_long_and_any_units_are_readable(
            text in any::<String>(), units in prop::collection::vec(any::<u16>(), 0..9),
        ) {
            prop_assert_eq!(without_lone_halves(&text).len(), text.len());
            let json = escaped(&units);
            prop_assert_eq!(
                serde_json::from_str::<String>(&without_lone_halves(&json)).unwrap(),
                String::from_utf16_lossy(&units)
            );
        }
    }
}

//! The text of replies, and its tokens.

use crate::simulator::wire::sse::{CUT, HALVES};

/// Returns the assistant's reply. It repeats the user's text and the outputs of functions, and
/// counts the user's messages, so that a reader can check what the simulator knew. It is padded
/// to at least `words` words.
pub(in crate::simulator) fn reply(
    user: &str,
    turn: usize,
    outputs: &[String],
    words: usize,
) -> String {
    let mut text = format!("You said: {user}.");
    if !outputs.is_empty() {
        text.push_str(" The tools answered: ");
        text.push_str(&outputs.join("; "));
        text.push('.');
    }
    pad(
        text + &format!(" (This is turn {turn} of this conversation.)"),
        words,
    )
}

/// Returns the text of a further message of the same reply.
pub(in crate::simulator) fn further_part(number: usize, words: usize) -> String {
    pad(format!("This is part {number} of the reply."), words)
}

/// Splits a text into words, each with the blank behind it. Together they are the text.
pub(in crate::simulator) fn tokens(text: &str) -> impl Iterator<Item = &str> {
    text.split_inclusive(' ')
}

/// Splits a text into its tokens. `halves`: the text ends with a character that is cut in two.
pub(in crate::simulator) fn fragments(text: &str, halves: bool) -> Vec<String> {
    let mut all: Vec<String> = tokens(text).map(str::to_owned).collect();
    if halves {
        all.extend(HALVES.map(String::from));
    }
    all
}

/// Puts the halves of characters in a text together. A half without the other one is unreadable.
pub(in crate::simulator) fn whole(text: &str) -> String {
    text.replace(&String::from_iter(HALVES), &String::from(CUT))
        .replace(HALVES, "\u{fffd}")
}

/// Counts the words of a text, as a measure of usage.
pub(in crate::simulator) fn count(text: &str) -> u64 {
    text.split_whitespace()
        .count()
        .try_into()
        .unwrap_or(u64::MAX)
}

fn pad(mut text: String, words: usize) -> String {
    const FILLER: [&str; 8] = [
        " and", " so", " the", " story", " went", " on", " for", " long",
    ];
    let have = text.split(' ').count();
    text.extend(
        FILLER
            .iter()
            .copied()
            .cycle()
            .take(words.saturating_sub(have)),
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_make_up_the_character() {
        let cut = fragments("one two", true);
        assert_eq!(cut.len(), 4);
        assert_eq!(whole(&cut.concat()), "one two🙂");
        assert_eq!(whole(&cut[..3].concat()), "one two\u{fffd}");
        assert_eq!(fragments("one two", false).concat(), "one two");
    }

    #[test]
    fn tokens_make_up_the_text() {
        let text = reply("hé  🙂", 3, &["4 °C".to_owned()], 40);
        assert_eq!(tokens(&text).collect::<String>(), text);
        assert_eq!(tokens(&text).count(), 40);
        assert!(text.starts_with(
            "You said: hé  🙂. The tools answered: 4 °C. (This is turn 3 of this conversation.)"
        ));
    }
}

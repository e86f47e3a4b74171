//! Relays the upstream's stream of a round to the run's log.

use futures_util::StreamExt;

use super::failure::Failure;
use super::progress::Progress;
use super::recover::recover;
use super::round_context::{RoundContext, RoundEnd};
use super::trial;
use crate::domain::{
    ContentPart, ReplyText, RunStatus, TextDelta, add_calls, next_message, number_messages,
};
use crate::error::Chain;
use crate::runs::log::event::RunEvent;
use crate::upstream::{Ended, EventStream, Recovered, UpstreamError, UpstreamEvent};

/// Bytes that each streamed piece of a reply counts at least towards the limit on replies: the log
/// of a run keeps the pieces apart.
const MIN_PIECE_COST: usize = 64;
/// Most times that a broken stream is continued.
const MAX_BREAKS: u32 = 5;

/// The part of a round that a stream has.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in crate::runs) enum Telling {
    /// The round as it happens, from its beginning. Readers have seen nothing of it.
    First,
    /// The round from its beginning again. Readers may have seen some of it.
    Again,
}

/// Relays the stream to its end. Continues a broken stream while the upstream has the run.
pub(in crate::runs) async fn relay(
    round: &RoundContext<'_>,
    progress: &mut Progress,
    mut events: EventStream,
    mut telling: Telling,
) -> Result<RoundEnd, Failure> {
    let mut breaks = 0;
    loop {
        let error = match relay_once(round, progress, &mut events, telling).await {
            Ok(ended) => {
                return Ok(RoundEnd {
                    ended,
                    rest: events,
                });
            }
            Err(Failure::Upstream(error)) if error.is_ambiguous() => error,
            Err(failure) => return Err(failure),
        };
        breaks += 1;
        if breaks > MAX_BREAKS {
            return Err(Failure::Upstream(error));
        }
        match recover(round, progress, &error).await? {
            Recovered::Running(rest) => {
                tracing::warn!(error = %Chain(&error), "the stream broke; following the run to its end");
                (events, telling) = (rest, Telling::Again);
            }
            Recovered::Absent | Recovered::Unknown => return Err(Failure::Upstream(error)),
        }
    }
}

async fn relay_once(
    round: &RoundContext<'_>,
    progress: &mut Progress,
    events: &mut EventStream,
    telling: Telling,
) -> Result<Ended, Failure> {
    let limit = round.ctx.config.runs.max_reply_bytes;
    let is_again = telling == Telling::Again;
    let shown = if is_again {
        progress.text.plain()
    } else {
        String::new()
    };
    // The upstream counts the messages of each round from 0.
    let first_message = next_message(&progress.content);
    let mut retelling = Retelling {
        shown,
        differs: false,
    };
    let mut is_named = is_again;
    // Where threads are chains of responses, a response that does not end well changes nothing.
    let has_threads = round.upstream.capabilities().has_threads;
    while let Some(event) = events.next().await {
        match event.map_err(Failure::Upstream)? {
            UpstreamEvent::Accepted(id) => {
                is_named = true;
                round.awaits_id.send_replace(false);
                round.log.accepted(&id);
                progress.accepted(id);
            }
            UpstreamEvent::Text(TextDelta { mut origin, text }) => {
                if has_threads {
                    trial::accept(round.ctx, round.started, round.log, progress).await?;
                }
                let Some(text) = retelling.notifications_in(&text) else {
                    continue;
                };
                progress.cost += text.len().max(MIN_PIECE_COST);
                if progress.cost > limit {
                    return Err(Failure::ReplyTooLarge);
                }
                origin.message = origin.message.saturating_add(first_message);
                progress.text.push(origin, text);
                round.log.push(RunEvent::Delta(TextDelta {
                    origin,
                    text: text.into(),
                }));
            }
            UpstreamEvent::Ended(mut ended) => {
                if !is_named {
                    // The round failed before the upstream sent an id.
                    round.awaits_id.send_replace(false);
                    progress.heard();
                }
                let calls = ended
                    .tool_calls
                    .iter()
                    .map(|it| it.arguments.len() + MIN_PIECE_COST);
                progress.cost += calls.sum::<usize>();
                let size: usize = ended
                    .content
                    .iter()
                    .chain(&progress.content)
                    .map(ContentPart::size_made)
                    .sum();
                if size.max(progress.cost) > limit {
                    return Err(Failure::ReplyTooLarge);
                }
                let ended_well = matches!(
                    ended.status,
                    RunStatus::Completed | RunStatus::Incomplete | RunStatus::RequiresAction
                );
                if ended_well && (has_threads || ended.thread.is_some()) {
                    trial::accept(round.ctx, round.started, round.log, progress).await?;
                }
                if is_again && let Some(earlier) = begins_with(&ended.content, &progress.content) {
                    ended.content.drain(..earlier);
                }
                let Ended {
                    content,
                    tool_calls,
                    ..
                } = &mut *ended;
                add_calls(content, tool_calls);
                number_messages(&mut ended.content, first_message);
                // So a reader of the deltas alone gets the whole text too.
                let rest = ReplyText::of(&ended.content).after(&progress.text);
                for delta in rest.unwrap_or_default().into_deltas() {
                    round.log.push(RunEvent::Delta(delta));
                }
                return Ok(*ended);
            }
        }
    }
    Err(Failure::Upstream(UpstreamError::Broken { timeout: false }))
}

/// Returns how many parts of the content are of the earlier rounds, if it begins with those.
/// Annotations do not count, because a stream may not tell them, nor do calls, which are in no
/// message.
fn begins_with(content: &[ContentPart], earlier: &[ContentPart]) -> Option<usize> {
    let is_same =
        |(one, other): (&ContentPart, &ContentPart)| match (one.as_text(), other.as_text()) {
            (Some(one), Some(other)) => one == other,
            _ => one == other,
        };
    let said: Vec<&ContentPart> = earlier.iter().filter(|part| part.is_said()).collect();
    let is_there =
        content.len() >= said.len() && content.iter().zip(said.iter().copied()).all(is_same);
    is_there.then_some(said.len())
}

/// Compares a stream that repeats a round with the text that was shown before.
struct Retelling {
    /// The shown text that the stream has not repeated yet.
    shown: String,
    /// Whether the stream has another text than was shown. Then only the end of the round has the
    /// valid text.
    differs: bool,
}

impl Retelling {
    /// Returns the new part of a piece of text.
    fn notifications_in<'a>(&mut self, text: &'a str) -> Option<&'a str> {
        let common = self.shown.len().min(text.len());
        if self.differs || self.shown.as_bytes()[..common] != text.as_bytes()[..common] {
            self.differs = true;
            return None;
        }
        if common == 0 {
            return Some(text);
        }
        self.shown.drain(..common);
        Some(&text[common..]).filter(|new| !new.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Returns what a reader sees of a repeated round in these pieces.
    fn seen(shown: &str, pieces: &[&str]) -> String {
        let mut retelling = Retelling {
            shown: shown.to_owned(),
            differs: false,
        };
        pieces
            .iter()
            .filter_map(|piece| retelling.notifications_in(piece))
            .collect()
    }

    #[test]
    fn what_was_shown_is_not_shown_again() {
        assert_eq!(seen("", &["a", "b"]), "ab");
        assert_eq!(seen("abc", &["ab", "cd", "e"]), "de");
        assert_eq!(seen("abc", &["abcde"]), "de");
        assert_eq!(seen("abc", &["a"]), "");
        assert_eq!(seen("abc", &["ax", "bc", "d"]), "", "another text");
        assert_eq!(seen("äö", &["ä", "öü"]), "ü");
    }

    proptest! {
        #[test]
        fn any_retelling_goes_on_where_it_was_left(text in ".{0,20}", at in 0..20_usize, cuts in proptest::collection::vec(0..20_usize, 0..4)) {
            let boundary = |at: usize| text.floor_char_boundary(at.min(text.len()));
            let mut cuts: Vec<_> = cuts.into_iter().map(boundary).chain([0, text.len()]).collect();
            cuts.sort_unstable();
            let pieces: Vec<_> = cuts.windows(2).map(|it| &text[it[0]..it[1]]).filter(|it| !it.is_empty()).collect();
            let at = boundary(at);
            prop_assert_eq!(seen(&text[..at], &pieces), &text[at..]);
        }
    }
}

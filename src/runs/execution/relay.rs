//! Relaying what an upstream says of a round to the run's log.

use futures_util::StreamExt;

use crate::domain::ContentPart;
use crate::error::Chain;
use crate::runs::RunEvent;
use crate::runs::execution::failure::Failure;
use crate::runs::execution::round::Drive;
use crate::upstream::{Ended, EventStream, Recovered, UpstreamError, UpstreamEvent};

/// What each streamed piece of a reply counts at least towards the limit on replies, bytes: the log of a run keeps
/// the pieces apart.
const MIN_PIECE_COST: usize = 64;
/// How often a stream that breaks is taken up again.
const MAX_BREAKS: u32 = 5;

impl Drive<'_> {
    /// Relays the stream to its end. One that breaks is followed up as long as the upstream has the run. `followed_up`:
    /// it tells the round from its beginning again.
    pub(in crate::runs) async fn relay(
        &mut self,
        mut events: EventStream,
        mut followed_up: bool,
    ) -> Result<(Ended, EventStream), Failure> {
        self.is_answered();
        let mut breaks = 0;
        loop {
            let error = match self.relay_once(&mut events, followed_up).await {
                Ok(ended) => return Ok((ended, events)),
                Err(Failure::Upstream(error)) if error.is_ambiguous() => error,
                Err(failure) => return Err(failure),
            };
            breaks += 1;
            if breaks > MAX_BREAKS {
                return Err(Failure::Upstream(error));
            }
            match self.recover(&error).await? {
                Some(Recovered::Running(rest)) => {
                    tracing::warn!(error = %Chain(&error), "the stream broke; following the run to its end");
                    (events, followed_up) = (rest, true);
                }
                _ => return Err(Failure::Upstream(error)),
            }
        }
    }

    async fn relay_once(&mut self, events: &mut EventStream, followed_up: bool) -> Result<Ended, Failure> {
        let progress = &mut *self.progress;
        let limit = self.runs.parts.given.runs.max_reply_bytes;
        let shown = if followed_up { progress.text.clone() } else { String::new() };
        let mut retelling = Retelling { shown, differs: false };
        let mut is_named = followed_up;
        while let Some(event) = events.next().await {
            match event.map_err(Failure::Upstream)? {
                UpstreamEvent::Accepted(id) => {
                    is_named = true;
                    self.asking.send_replace(false);
                    self.log.accepted(&id);
                    progress.accepted(id);
                }
                UpstreamEvent::Text(text) => {
                    let Some(text) = retelling.news_in(text) else { continue };
                    progress.cost += text.len().max(MIN_PIECE_COST);
                    if progress.cost > limit {
                        return Err(Failure::ReplyTooLarge);
                    }
                    progress.text.push_str(&text);
                    self.log.push(RunEvent::Delta(text.into()));
                }
                UpstreamEvent::Ended(mut ended) => {
                    if !is_named {
                        // It failed, as the upstream says, before it had a name.
                        self.asking.send_replace(false);
                        progress.heard();
                    }
                    let calls = ended.tool_calls.iter().map(|it| it.arguments.len() + MIN_PIECE_COST);
                    progress.cost += calls.sum::<usize>();
                    let size: usize =
                        ended.content.iter().chain(&progress.content).map(ContentPart::size).sum();
                    if size.max(progress.cost) > limit {
                        return Err(Failure::ReplyTooLarge);
                    }
                    if followed_up && ended.content.starts_with(&progress.content) {
                        ended.content.drain(..progress.content.len());
                    }
                    // Whoever reads the deltas alone shall have the whole text too.
                    let text: String = ended.content.iter().filter_map(plain).collect();
                    if let Some(rest) = text.strip_prefix(&progress.text).filter(|rest| !rest.is_empty()) {
                        self.log.push(RunEvent::Delta(rest.into()));
                    }
                    return Ok(*ended);
                }
            }
        }
        Err(Failure::Upstream(UpstreamError::Broken { timeout: false }))
    }
}

/// A stream that tells a round from its beginning again, of which some was shown before.
struct Retelling {
    /// What was shown and has not been told again yet.
    shown: String,
    /// It tells something else: what holds is told by the end.
    differs: bool,
}

impl Retelling {
    /// What is new of a piece of text.
    fn news_in(&mut self, text: String) -> Option<String> {
        let common = self.shown.len().min(text.len());
        if self.differs || self.shown.as_bytes()[..common] != text.as_bytes()[..common] {
            self.differs = true;
            return None;
        }
        if common == 0 {
            return Some(text);
        }
        self.shown.drain(..common);
        Some(text[common..].to_owned()).filter(|new| !new.is_empty())
    }
}

/// Reads what is left of an answer, so that its connection can be used again. The stream itself bounds that.
pub(in crate::runs) async fn drain(rest: Option<EventStream>) {
    if let Some(rest) = rest {
        rest.for_each(|_| std::future::ready(())).await;
    }
}

/// The text of a part that is text.
pub(in crate::runs) fn plain(part: &ContentPart) -> Option<&str> {
    match part {
        ContentPart::Text { text } => Some(text),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a reader sees of a retelling in these pieces.
    fn seen(shown: &str, pieces: &[&str]) -> String {
        let mut retelling = Retelling { shown: shown.to_owned(), differs: false };
        pieces.iter().filter_map(|piece| retelling.news_in((*piece).to_owned())).collect()
    }

    #[test]
    fn what_was_shown_is_not_shown_again() {
        assert_eq!(seen("", &["a", "b"]), "ab");
        assert_eq!(seen("abc", &["ab", "cd", "e"]), "de");
        assert_eq!(seen("abc", &["abcde"]), "de");
        assert_eq!(seen("abc", &["a"]), "");
        assert_eq!(seen("abc", &["ax", "bc", "d"]), "", "another story");
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

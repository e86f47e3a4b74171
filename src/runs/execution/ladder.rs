//! The ladder of recovery: what the gateway tries after the upstream refused the request of a run.
//! Pure. `docs/upstream-failures.md` has it as a table.

use crate::domain::{HistoryKept, KnownRefusal, RecoveryCause};
use crate::upstream::{RefusalCause, UpstreamError};

/// Most requests of a run that the upstream may refuse.
const MAX_REFUSALS: u32 = 4;
/// Number of messages that [`HistoryKept::LastMessages`] keeps.
pub(in crate::runs) const LAST_MESSAGES: usize = 4;

/// The earlier messages that a new upstream thread would begin with.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in crate::runs) struct PastShape {
    pub(in crate::runs) messages: usize,
    pub(in crate::runs) has_media: bool,
    /// The upstream thread has none of them: it is new and empty. So the refused message was sent
    /// alone.
    pub(in crate::runs) is_unsent: bool,
}

/// The next step after a refusal.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in crate::runs) enum NextStep {
    /// Send the message in a new upstream thread that begins with this part of the conversation.
    Try(HistoryKept),
    /// The upstream refused the message alone, so the message is at fault.
    BlameMessage,
    /// Nothing that the gateway can change will help.
    GiveUp,
}

/// The refusals of one run so far.
#[derive(Clone, Debug, Default)]
pub(in crate::runs) struct Ladder {
    refusals: u32,
    /// The history of the last request; `None`: the thread as it was.
    tried: Option<HistoryKept>,
    /// The first refusal that the ladder answers, and its cause.
    first: Option<(RecoveryCause, KnownRefusal)>,
}

impl Ladder {
    /// Returns whether a refusal is one that another thread, or another history, may avoid.
    pub(in crate::runs) fn can_answer(error: &UpstreamError) -> bool {
        cause_of(error).is_some()
    }

    /// Returns the next step after a refusal. `known`: the last refusal that the thread recovered
    /// from.
    pub(in crate::runs) fn next(
        &mut self,
        error: &UpstreamError,
        past: PastShape,
        known: Option<&KnownRefusal>,
    ) -> NextStep {
        let Some(cause) = cause_of(error) else {
            return NextStep::GiveUp;
        };
        self.refusals += 1;
        let refusal = signature(error);
        if self.first.is_none() {
            self.first = Some((cause, refusal.clone()));
        }
        let was_alone = match self.tried {
            Some(kept) => kept == HistoryKept::Nothing || past.messages == 0,
            None => past.is_unsent,
        };
        if was_alone && cause != RecoveryCause::ThreadGone {
            return if blames_input(error) {
                NextStep::BlameMessage
            } else {
                NextStep::GiveUp
            };
        }
        let next = match MAX_REFUSALS.saturating_sub(self.refusals) {
            0 => None,
            1 if cause != RecoveryCause::ThreadGone => Some(HistoryKept::Nothing),
            _ => self.next_history(cause, past, &refusal, known),
        };
        match next {
            Some(kept) => {
                self.tried = Some(kept);
                NextStep::Try(kept)
            }
            None => NextStep::GiveUp,
        }
    }

    /// Returns the largest history that is smaller than the one before and that the cause does not
    /// rule out.
    fn next_history(
        &self,
        cause: RecoveryCause,
        past: PastShape,
        refusal: &KnownRefusal,
        known: Option<&KnownRefusal>,
    ) -> Option<HistoryKept> {
        use HistoryKept::{All, LastMessages, NewerHalf, Nothing, WithoutMedia};
        let order: &[HistoryKept] = match (cause, self.tried) {
            (RecoveryCause::ContextFull, _) => &[NewerHalf, LastMessages, Nothing],
            (RecoveryCause::MediaUnusable, _) => &[WithoutMedia, Nothing],
            // A thread that is gone right after it was made says nothing about its content.
            (RecoveryCause::ThreadGone, Some(All)) => return None,
            (RecoveryCause::ThreadGone | RecoveryCause::ThreadRefused, None) => &[All],
            _ => &[All, WithoutMedia, NewerHalf, Nothing],
        };
        let helped = known
            .filter(|known| known.status == refusal.status && known.code == refusal.code)
            .map(|known| known.cure)
            .filter(|cure| self.tried.is_none() && *cure != Nothing);
        let is_new = |kept: HistoryKept| {
            let is_smaller = self.tried.is_none_or(|tried| kept > tried);
            let differs = match kept {
                All | Nothing => true,
                WithoutMedia => past.has_media,
                NewerHalf => past.messages > 1,
                LastMessages => past.messages > 2 * LAST_MESSAGES,
            };
            is_smaller && differs
        };
        let new = || order.iter().copied().filter(|kept| is_new(*kept));
        new()
            .find(|kept| helped.is_none_or(|helped| *kept >= helped))
            .or_else(|| new().next())
    }

    /// Returns the cause of the first refusal.
    pub(in crate::runs) fn cause(&self) -> Option<RecoveryCause> {
        self.first.as_ref().map(|(cause, _)| *cause)
    }

    /// Returns the first refusal as the thread remembers it once the upstream has answered. `None`:
    /// there was no refusal.
    pub(in crate::runs) fn answered(&self) -> Option<KnownRefusal> {
        let (_, refusal) = self.first.clone()?;
        let cure = self.tried?;
        Some(KnownRefusal { cure, ..refusal })
    }
}

/// Returns why the upstream refused; `None` if no other thread and no other history can help.
fn cause_of(error: &UpstreamError) -> Option<RecoveryCause> {
    match error {
        UpstreamError::ThreadGone => Some(RecoveryCause::ThreadGone),
        UpstreamError::Refused { cause, status, .. } => match cause {
            RefusalCause::Thread => Some(RecoveryCause::ThreadRefused),
            RefusalCause::Size => Some(RecoveryCause::ContextFull),
            RefusalCause::Media => Some(RecoveryCause::MediaUnusable),
            RefusalCause::Unknown => {
                matches!(status, 400 | 404 | 413 | 422).then_some(RecoveryCause::Unknown)
            }
            RefusalCause::Configuration | RefusalCause::Policy => None,
        },
        _ => None,
    }
}

/// Returns whether a refusal of a message without a history means that the message is at fault.
fn blames_input(error: &UpstreamError) -> bool {
    let UpstreamError::Refused { cause, status, .. } = error else {
        return false;
    };
    match cause {
        RefusalCause::Size | RefusalCause::Media => true,
        RefusalCause::Unknown => matches!(status, 400 | 413 | 422),
        RefusalCause::Thread | RefusalCause::Configuration | RefusalCause::Policy => false,
    }
}

fn signature(error: &UpstreamError) -> KnownRefusal {
    let (status, code) = match error {
        UpstreamError::Refused { status, code, .. } => (*status, code.clone()),
        _ => (404, None),
    };
    KnownRefusal {
        status,
        code,
        cure: HistoryKept::All,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use HistoryKept::{All, LastMessages, NewerHalf, Nothing, WithoutMedia};

    fn refused(cause: RefusalCause) -> UpstreamError {
        UpstreamError::Refused {
            status: 400,
            code: None,
            missing: false,
            cause,
        }
    }

    const LONG: PastShape = PastShape {
        messages: 40,
        has_media: false,
        is_unsent: false,
    };

    /// Returns the steps until the upstream takes one of `taken`.
    fn climb(error: &UpstreamError, past: PastShape, taken: Option<HistoryKept>) -> Vec<NextStep> {
        let mut ladder = Ladder::default();
        let mut steps = Vec::new();
        loop {
            let step = ladder.next(error, past, None);
            steps.push(step);
            match step {
                NextStep::Try(kept) if taken.is_none_or(|taken| kept < taken) => {}
                _ => return steps,
            }
        }
    }

    #[test]
    fn each_cause_has_its_steps() {
        use NextStep::{BlameMessage, GiveUp, Try};
        let media = PastShape {
            has_media: true,
            ..LONG
        };
        let short = PastShape {
            messages: 1,
            ..LONG
        };
        let unsent = PastShape {
            messages: 0,
            is_unsent: true,
            ..LONG
        };
        let gone = UpstreamError::ThreadGone;
        let [thread, size, dead, unknown] = [
            RefusalCause::Thread,
            RefusalCause::Size,
            RefusalCause::Media,
            RefusalCause::Unknown,
        ]
        .map(refused);
        for (error, past, expected) in [
            (&gone, LONG, &[Try(All), GiveUp][..]),
            (
                &thread,
                LONG,
                &[Try(All), Try(NewerHalf), Try(Nothing), GiveUp],
            ),
            (
                &size,
                LONG,
                &[
                    Try(NewerHalf),
                    Try(LastMessages),
                    Try(Nothing),
                    BlameMessage,
                ],
            ),
            (&size, short, &[Try(Nothing), BlameMessage]),
            (&size, unsent, &[BlameMessage]),
            (
                &dead,
                media,
                &[Try(WithoutMedia), Try(Nothing), BlameMessage],
            ),
            (&dead, LONG, &[Try(Nothing), BlameMessage]),
            (
                &unknown,
                LONG,
                &[Try(All), Try(NewerHalf), Try(Nothing), BlameMessage],
            ),
            (
                &unknown,
                media,
                &[Try(All), Try(WithoutMedia), Try(Nothing), BlameMessage],
            ),
            (&unknown, unsent, &[BlameMessage]),
        ] {
            assert_eq!(climb(error, past, None), expected, "{error:?} {past:?}");
        }
        for cause in [RefusalCause::Configuration, RefusalCause::Policy] {
            assert_eq!(climb(&refused(cause), LONG, None), [GiveUp]);
        }
    }

    #[test]
    fn known_refusal_begins_with_what_helped_before() {
        let error = refused(RefusalCause::Unknown);
        let known = |cure| KnownRefusal {
            status: 400,
            code: None,
            cure,
        };
        let first = |known: &KnownRefusal| Ladder::default().next(&error, LONG, Some(known));
        assert_eq!(first(&known(NewerHalf)), NextStep::Try(NewerHalf));
        assert_eq!(
            first(&known(Nothing)),
            NextStep::Try(All),
            "history is not dropped on a guess"
        );
        let gone = KnownRefusal {
            status: 404,
            ..known(NewerHalf)
        };
        assert_eq!(
            Ladder::default().next(&UpstreamError::ThreadGone, LONG, Some(&gone)),
            NextStep::Try(All),
            "a thread that is gone is made anew in any case"
        );
        let other = KnownRefusal {
            status: 422,
            ..known(NewerHalf)
        };
        assert_eq!(first(&other), NextStep::Try(All));
    }

    fn any_error() -> impl Strategy<Value = UpstreamError> {
        let cause = prop::sample::select(vec![
            RefusalCause::Configuration,
            RefusalCause::Policy,
            RefusalCause::Thread,
            RefusalCause::Size,
            RefusalCause::Media,
            RefusalCause::Unknown,
        ]);
        let status = prop::sample::select(vec![400, 401, 404, 405, 413, 422]);
        prop_oneof![
            1 => Just(UpstreamError::ThreadGone),
            6 => (cause, status).prop_map(|(cause, status)| UpstreamError::Refused {
                status, code: None, missing: false, cause,
            }),
        ]
    }

    proptest! {
        /// For any sequence of refusals, the requests are bounded, each has less of the
        /// conversation than the one before, and only a message that was sent alone is blamed.
        #[test]
        fn any_refusals_end_soon(
            errors in prop::collection::vec(any_error(), 20),
            messages in 0..50_usize, has_media: bool, is_unsent: bool,
        ) {
            let past = PastShape { messages, has_media, is_unsent: is_unsent && messages == 0 };
            let mut ladder = Ladder::default();
            let mut tried: Vec<HistoryKept> = Vec::new();
            for error in &errors {
                match ladder.next(error, past, None) {
                    NextStep::Try(kept) => {
                        prop_assert!(tried.last().is_none_or(|last| *last < kept), "{tried:?} {kept:?}");
                        tried.push(kept);
                    }
                    NextStep::BlameMessage => {
                        let was_alone = messages == 0 || tried.last() == Some(&Nothing);
                        prop_assert!(was_alone, "{tried:?}");
                        break;
                    }
                    NextStep::GiveUp => break,
                }
            }
            prop_assert!(tried.len() < MAX_REFUSALS as usize, "{tried:?}");
        }

        /// A message that the upstream accepts without a history is never lost to a refusal of the
        /// thread or of its past.
        #[test]
        fn innocent_message_is_answered_in_the_end(
            causes in prop::collection::vec(prop::sample::select(vec![
                RefusalCause::Thread, RefusalCause::Size, RefusalCause::Media, RefusalCause::Unknown,
            ]), 10),
            messages in 1..50_usize, has_media: bool, is_gone: bool,
            cure in prop::option::of(prop::sample::select(HistoryKept::ALL)), known_status in prop::sample::select(vec![400, 404]),
        ) {
            let past = PastShape { messages, has_media, is_unsent: false };
            let known = cure.map(|cure| KnownRefusal { status: known_status, code: None, cure });
            let mut ladder = Ladder::default();
            for (n, cause) in causes.into_iter().enumerate() {
                let error = if is_gone && n == 0 { UpstreamError::ThreadGone } else { refused(cause) };
                match ladder.next(&error, past, known.as_ref()) {
                    NextStep::Try(Nothing) => return Ok(()),
                    NextStep::Try(_) => {}
                    other => prop_assert!(false, "{other:?}"),
                }
            }
            prop_assert!(false, "no end");
        }
    }
}

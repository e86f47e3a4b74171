use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::*;
use crate::domain::{Baseline, RunId, UpstreamRunId, Usage};

/// The inputs of one decision.
#[derive(Clone, Debug)]
struct Case {
    verdict: LocalOutcome,
    traces: UpstreamState,
    progress: Progress,
}

impl Case {
    fn end(&self) -> RunEnd {
        decide_outcome(
            &self.verdict,
            &self.traces,
            &self.progress,
            EventBatch {
                first: 3,
                events: Vec::new(),
            },
        )
    }

    /// What the gateway found at the upstream, if it looked.
    fn seen(&self) -> Option<&Settled> {
        match &self.traces {
            UpstreamState::Seen { settled, .. } => Some(settled),
            _ => None,
        }
    }

    /// Whether the run was cut off here although the upstream had completed it.
    fn is_late(&self) -> bool {
        let completed = self
            .seen()
            .is_some_and(|settled| settled.status == Some(RunStatus::Completed));
        completed && self.verdict.cut_off && !self.verdict.discard
    }
}

fn text(text: &str) -> ContentPart {
    ContentPart::text(text)
}

fn usage(tokens: u64) -> Usage {
    Usage {
        input_tokens: tokens,
        output_tokens: tokens,
        total_tokens: 2 * tokens,
        ..Usage::default()
    }
}

fn thread(id: &str) -> UpstreamThreadId {
    UpstreamThreadId(id.to_owned())
}

fn a_thread(id: &'static str) -> impl Strategy<Value = Option<UpstreamThreadId>> {
    option::of(Just(thread(id)))
}

fn a_message(id: &'static str) -> impl Strategy<Value = Option<String>> {
    option::of(Just(id.to_owned()))
}

fn a_usage() -> impl Strategy<Value = Option<Usage>> {
    option::of((1..9_u64).prop_map(usage))
}

fn ends() -> Vec<RunStatus> {
    RunStatus::ALL
        .iter()
        .copied()
        .filter(|status| status.is_final())
        .collect()
}

/// Only a run that the upstream ended itself can have moved the thread or named a message.
fn a_verdict() -> impl Strategy<Value = LocalOutcome> {
    let error = option::of(select(RunErrorCode::ALL));
    (
        select(ends()),
        error,
        any::<(bool, bool)>(),
        a_thread("seen"),
        a_message("msg_seen"),
    )
        .prop_map(
            |(status, code, (cut_off, discard), thread, upstream_message_id)| {
                let cut_off = cut_off && status != RunStatus::Completed;
                let error = code.map(|code| RunError::new(code, "why"));
                let (thread, upstream_message_id) = if cut_off {
                    (None, None)
                } else {
                    (thread, upstream_message_id)
                };
                LocalOutcome {
                    status,
                    error,
                    cut_off,
                    thread,
                    upstream_message_id,
                    discard,
                }
            },
        )
}

fn a_settled() -> impl Strategy<Value = Settled> {
    (
        any::<bool>(),
        option::of(select(ends())),
        a_usage(),
        vec(Just(text("found")), 0..3),
        a_message("msg_found"),
        a_thread("found"),
    )
        .prop_map(
            |(said, status, usage, content, upstream_message_id, thread)| Settled {
                said,
                unsure: false,
                status,
                usage,
                content,
                upstream_message_id,
                // A chain that the run moved contains the run's messages.
                thread: thread.filter(|_| said),
            },
        )
}

fn an_unsettled_run() -> UnsettledRun {
    UnsettledRun {
        run: RunId::new(),
        thread: Some(thread("conv")),
        upstream_run: None,
        open_calls: Vec::new(),
        baseline: Baseline::default(),
        inputs: 1,
        synced: true,
        remove: false,
    }
}

fn a_progress() -> impl Strategy<Value = Progress> {
    let reach = select(vec![Delivery::NotSent, Delivery::Sent, Delivery::Accepted]);
    let run = option::of(Just(UpstreamRunId("run".to_owned())));
    (
        reach,
        run,
        vec(Just(text("seen")), 0..4),
        any::<Index>(),
        a_usage(),
        any::<bool>(),
    )
        .prop_map(|(reach, upstream_run, content, before, usage, synced)| {
            let mut progress = Progress::default();
            (progress.delivery, progress.upstream_run) = (reach, upstream_run);
            progress.rounds_before = before.index(content.len() + 1);
            (progress.content, progress.usage, progress.synced) = (content, usage, synced);
            progress
        })
}

fn a_case() -> impl Strategy<Value = Case> {
    (a_verdict(), a_progress(), a_settled(), 0..4).prop_map(
        |(verdict, progress, settled, which)| {
            let traces = match which {
                _ if verdict.is_clean() && which < 2 => UpstreamState::Clean,
                0 => UpstreamState::None,
                1 => UpstreamState::Unknown(UnsettledRun {
                    remove: verdict.discard,
                    ..an_unsettled_run()
                }),
                _ => UpstreamState::Seen {
                    settled,
                    removed: verdict.discard,
                },
            };
            Case {
                verdict,
                traces,
                progress,
            }
        },
    )
}

proptest! {
    // Some rules concern one case in a hundred.
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn what_was_not_taken_leaves_nothing_upstream(case in a_case()) {
        let end = Case { traces: UpstreamState::None, ..case }.end();
        prop_assert_eq!((end.said, end.synced), (UpstreamSync::Withheld, false));
        prop_assert_eq!((end.unsettled_run, end.upstream_thread_id), (None, None));
        if let Some(reply) = end.reply {
            prop_assert_eq!((reply.sync, reply.upstream_message_id), (UpstreamSync::Withheld, None));
        }
    }

    #[test]
    fn what_is_not_known_is_left_to_be_looked_at(case in a_case()) {
        let left = an_unsettled_run();
        let end = Case { traces: UpstreamState::Unknown(left.clone()), ..case }.end();
        prop_assert_eq!((end.said, end.synced), (UpstreamSync::Unknown, false));
        prop_assert_eq!((end.unsettled_run, end.upstream_thread_id), (Some(left), None));
        if let Some(reply) = end.reply {
            prop_assert_eq!((reply.sync, reply.upstream_message_id), (UpstreamSync::Unknown, None));
        }
    }

    #[test]
    fn only_what_is_not_known_is_left_to_be_looked_at(case in a_case()) {
        let end = case.end();
        let is_unknown = matches!(case.traces, UpstreamState::Unknown(_));
        prop_assert_eq!(end.unsettled_run.is_some(), is_unknown);
        prop_assert_eq!(end.said == UpstreamSync::Unknown, is_unknown);
        prop_assert!(end.reply.is_none_or(|reply| (reply.sync == UpstreamSync::Unknown) == is_unknown));
    }

    #[test]
    fn a_discarded_run_has_no_reply_and_moves_no_chain(case in a_case()) {
        let end = case.end();
        prop_assert_eq!(end.discard, case.verdict.discard);
        if end.discard {
            prop_assert_eq!((end.reply, end.upstream_thread_id), (None, None));
            prop_assert_eq!(end.status, case.verdict.status, "a late completion does not count");
            // The chain stays where it was, and no history was sent to that place.
            prop_assert!(!end.synced || case.seen().is_some_and(|settled| settled.thread.is_none()));
        }
    }

    #[test]
    fn a_chain_moves_only_if_it_holds_what_was_said(case in a_case()) {
        let end = case.end();
        if let Some(moved) = end.upstream_thread_id {
            prop_assert_eq!(end.said, UpstreamSync::Present);
            let found = case.seen().and_then(|settled| settled.thread.clone());
            prop_assert_eq!(Some(moved), found.or(case.verdict.thread));
        }
    }

    #[test]
    fn a_chain_that_moved_stays_where_it_is(case in a_case()) {
        let end = case.end();
        let holds = matches!(case.traces, UpstreamState::Clean) || case.seen().is_some_and(|settled| settled.said);
        if holds && !case.verdict.discard && case.verdict.thread.is_some() {
            prop_assert!(end.upstream_thread_id.is_some());
        }
    }

    #[test]
    fn a_run_that_was_cut_off_too_late_has_completed(case in a_case()) {
        let end = case.end();
        // A completed run has a reply.
        if case.is_late() && end.reply.is_some() {
            prop_assert_eq!((end.status, end.error), (RunStatus::Completed, None));
        } else {
            prop_assert_eq!((end.status, end.error), (case.verdict.status, case.verdict.error));
        }
    }

    #[test]
    fn the_reply_is_what_the_thread_holds_or_else_what_was_seen(case in a_case()) {
        let found = case.seen().filter(|settled| settled.said && !settled.content.is_empty());
        let mut content = case.progress.content.clone();
        if let Some(settled) = found {
            // On a chain each round is a response of its own, and the gateway looked at the last
            // one only.
            content.truncate(if settled.thread.is_some() { case.progress.rounds_before } else { 0 });
            append_messages(&mut content, settled.content.clone());
        }
        let end = case.end();
        prop_assert_eq!(end.reply.is_some(), !case.verdict.discard && !content.is_empty());
        if let Some(reply) = end.reply {
            prop_assert_eq!(reply.content, content);
            let id = match (&case.traces, found) {
                (UpstreamState::Clean, _) => case.verdict.upstream_message_id,
                (_, Some(settled)) => settled.upstream_message_id.clone(),
                _ => None,
            };
            prop_assert_eq!(reply.upstream_message_id, id);
        }
    }

    #[test]
    fn a_reply_stands_where_the_thread_has_it(case in a_case()) {
        let end = case.end();
        let Some(reply) = &end.reply else { return Ok(()) };
        let held = matches!(case.traces, UpstreamState::Clean)
            || case.seen().is_some_and(|settled| settled.said && !settled.content.is_empty());
        prop_assert_eq!(reply.sync == UpstreamSync::Present, held);
        prop_assert!(reply.sync != UpstreamSync::Present || end.said == UpstreamSync::Present);
        // The user's message is there without the reply, which is then sent with the next run.
        let expected = if held || end.said != UpstreamSync::Present { end.said } else { UpstreamSync::Missing };
        prop_assert_eq!(reply.sync, expected);
    }

    #[test]
    fn what_the_model_never_took_is_withheld(case in a_case()) {
        let end = case.end();
        let Some(settled) = case.seen() else { return Ok(()) };
        let reported = case.verdict.status == RunStatus::Failed && !case.verdict.cut_off;
        let expected = match settled.said {
            true => UpstreamSync::Present,
            // The upstream reported the failure, or never accepted the run.
            false if reported || case.progress.delivery < Delivery::Accepted => UpstreamSync::Withheld,
            false => UpstreamSync::Missing,
        };
        prop_assert_eq!(end.said, expected);
    }

    #[test]
    fn earlier_messages_went_along_only_with_what_is_there(case in a_case()) {
        let end = case.end();
        prop_assert!(!end.synced || (case.progress.synced && end.said == UpstreamSync::Present));
        if case.progress.synced && end.said == UpstreamSync::Present && !case.verdict.discard {
            prop_assert!(end.synced);
        }
    }

    #[test]
    fn what_was_counted_and_shown_is_kept(case in a_case()) {
        let end = case.end();
        let found = case.seen().and_then(|settled| settled.usage);
        prop_assert_eq!(end.usage, found.or(case.progress.usage));
        prop_assert_eq!(end.upstream_run_id, case.progress.upstream_run);
        prop_assert_eq!(end.events, EventBatch { first: 3, events: Vec::new() });
        prop_assert!(end.status.is_final());
    }
}

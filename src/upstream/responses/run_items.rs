//! Finds the items of one run, and the damage of earlier runs, among the items of a conversation.
//! Pure.

use serde_json::Value;

use super::wire::{Output, answered_calls, call_of, is_answer, open_calls};
use crate::domain::{RunStatus, UnsettledRun};
use crate::upstream::classify::Damage;
use crate::upstream::port::Ended;
use crate::upstream::wire::{failure, without_reply};

pub(super) fn id_of(item: &Value) -> Option<&str> {
    item.get("id")?.as_str()
}

/// Returns the items of a run, given the items since its baseline: everything from its first user
/// message on. Empty if that message is not there.
pub(super) fn own_part(since_anchor: &[Value], skip: u32) -> &[Value] {
    let own = user_messages(since_anchor).nth(skip as usize);
    own.map_or(&[], |at| &since_anchor[at..])
}

/// Returns true if all user messages of the run are there.
pub(super) fn is_said(own: &[Value], inputs: u32) -> bool {
    user_messages(own).count() >= inputs.max(1) as usize
}

/// Returns the items after what was sent; `None` if what was sent is not there. The gateway sent
/// the outputs of `sent.open_calls` if there are any, else the user's messages.
pub(super) fn what_followed<'a>(own: &'a [Value], sent: &UnsettledRun) -> Option<&'a [Value]> {
    let answered = answered_calls(own);
    let last_output = own.iter().rposition(is_answer);
    let begins = if sent.open_calls.is_empty() {
        let last_input = user_messages(own).nth(sent.inputs.saturating_sub(1) as usize)?;
        last_output.map_or(last_input, |at| at.max(last_input))
    } else {
        let is_answered = |id: &str| answered.contains(&id);
        last_output.filter(|_| sent.open_calls.iter().all(|call| is_answered(&call.id)))?
    };
    Some(&own[begins + 1..])
}

/// Returns how the response that left these items ended; `None` if it left neither text nor
/// calls.
pub(super) fn end_of(items: &[Value]) -> Option<Ended> {
    let output = Output::of(items);
    let says_something = output.says_something();
    if output.message_id.is_none() && !says_something && output.open_calls.is_empty() {
        return None;
    }
    let unread = output.unread.iter().map(String::as_str);
    let is_cut = items.iter().any(|item| {
        kind(item) == "message" && matches!(text(item, "status"), "incomplete" | "in_progress")
    });
    let status = match (output.open_calls.is_empty(), is_cut) {
        (false, _) => RunStatus::RequiresAction,
        (true, true) => RunStatus::Incomplete,
        (true, false) => RunStatus::Completed,
    };
    Some(Ended {
        status,
        error: failure(status, None).or_else(|| {
            let is_empty = status == RunStatus::Completed && !says_something;
            is_empty.then(|| without_reply(unread))
        }),
        content: output.content,
        upstream_message_id: output.message_id,
        usage: None,
        tool_calls: output.open_calls,
        thread: None,
        refusal: None,
    })
}

/// Returns the items whose deletion lets the conversation take a run again, newest first:
/// calls without an answer, the reasoning right before each, and the reasoning that the
/// server complains about.
pub(super) fn broken_tail(items: &[Value], damage: &Damage) -> Vec<String> {
    let open = open_calls(items);
    let is_open = |item: &Value| call_of(item).is_some_and(|call| open.contains(&call));
    let is_doomed = |at: usize| match &items[at] {
        item if is_open(item) => true,
        item if kind(item) == "reasoning" => {
            let next = items.get(at + 1);
            let named =
                matches!(damage, Damage::OrphanedReasoning(Some(id)) if id_of(item) == Some(id));
            // If the server names no id, the broken item is the reasoning that no item of the
            // model follows.
            let is_orphan = next.is_none_or(|next| text(next, "role") == "user" || is_answer(next));
            named
                || next.is_some_and(is_open)
                || (*damage == Damage::OrphanedReasoning(None) && is_orphan)
        }
        _ => false,
    };
    let mut doomed: Vec<String> = (0..items.len())
        .rev()
        .filter(|at| is_doomed(*at))
        .filter_map(|at| id_of(&items[at]))
        .map(str::to_owned)
        .collect();
    if let Damage::OrphanedReasoning(Some(id)) = damage
        && !doomed.contains(id)
    {
        doomed.push(id.clone());
    }
    doomed
}

/// Returns the messages of `input` with which the conversation ends, newest first. A server that
/// refuses a run only after it has accepted it may have kept them.
pub(super) fn kept(items: &[Value], input: &[Value]) -> Vec<String> {
    let is_same = |item: &Value, sent: &Value| {
        kind(item) == "message"
            && text(item, "role") == text(sent, "role")
            && words(item) == words(sent)
    };
    let pairs = items.iter().rev().zip(input.iter().rev());
    let kept = pairs.take_while(|(item, sent)| is_same(item, sent));
    kept.filter_map(|(item, _)| id_of(item))
        .map(str::to_owned)
        .collect()
}

/// Returns the indices of the user's messages.
fn user_messages(items: &[Value]) -> impl Iterator<Item = usize> {
    let is_one = |item: &Value| kind(item) == "message" && text(item, "role") == "user";
    items
        .iter()
        .enumerate()
        .filter(move |(_, item)| is_one(item))
        .map(|(at, _)| at)
}

fn words(message: &Value) -> String {
    match &message["content"] {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts.iter().map(|part| text(part, "text")).collect(),
        _ => String::new(),
    }
}

fn kind(item: &Value) -> &str {
    text(item, "type")
}

fn text<'a>(object: &'a Value, field: &str) -> &'a str {
    object
        .get(field)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::domain::{Baseline, ContentPart, RunId, ToolCall};
    use crate::upstream::mutation::mutated;
    use crate::upstream::responses::stream_resume::as_event;

    fn message(id: &str, role: &str, words: &str) -> Value {
        json!({"type": "message", "id": id, "role": role, "status": "completed",
               "content": [{"type": if role == "user" { "input_text" } else { "output_text" }, "text": words}]})
    }

    fn call(id: &str) -> Value {
        json!({"type": "function_call", "id": format!("fc_{id}"), "call_id": id, "name": "f", "arguments": "{}"})
    }

    fn output(id: &str) -> Value {
        json!({"type": "function_call_output", "id": format!("fco_{id}"), "call_id": id, "output": "1"})
    }

    fn reasoning(id: &str) -> Value {
        json!({"type": "reasoning", "id": id, "summary": []})
    }

    fn sent(inputs: u32, answering: &[&str]) -> UnsettledRun {
        let call = |id: &&str| ToolCall {
            id: (*id).to_owned(),
            ..ToolCall::default()
        };
        UnsettledRun {
            run: RunId::new(),
            thread: None,
            upstream_run: None,
            open_calls: answering.iter().map(call).collect(),
            baseline: Baseline::default(),
            inputs,
            synced: false,
            remove: false,
        }
    }

    fn ids(items: &[Value]) -> Vec<&str> {
        items.iter().filter_map(id_of).collect()
    }

    #[test]
    fn a_run_s_own_part_begins_with_its_first_message() {
        let items = [
            output("call_0"),
            message("m1", "user", "before"),
            message("m2", "assistant", "yes"),
            output("call_9"),
            message("m3", "user", "now"),
            message("m4", "assistant", "done"),
        ];
        assert_eq!(
            ids(own_part(&items, 0)),
            ["m1", "m2", "fco_call_9", "m3", "m4"]
        );
        assert_eq!(ids(own_part(&items, 1)), ["m3", "m4"]);
        assert_eq!(own_part(&items, 2), &[] as &[Value]);
        assert!(is_said(own_part(&items, 1), 1) && !is_said(own_part(&items, 1), 2));
        assert!(!is_said(&[], 0));
    }

    #[test]
    fn what_was_sent_is_told_from_what_followed() {
        let items = [
            message("m1", "user", "a"),
            message("m2", "user", "b"),
            reasoning("rs_1"),
            call("call_1"),
        ];
        assert_eq!(
            ids(what_followed(&items, &sent(2, &[])).unwrap()),
            ["rs_1", "fc_call_1"]
        );
        assert_eq!(what_followed(&items, &sent(3, &[])), None);
        assert_eq!(what_followed(&items, &sent(2, &["call_1"])), None);
        let answered = [
            &items[..],
            &[output("call_1"), message("m3", "assistant", "c")],
        ]
        .concat();
        assert_eq!(
            ids(what_followed(&answered, &sent(2, &["call_1"])).unwrap()),
            ["m3"]
        );
        assert_eq!(
            ids(what_followed(&answered, &sent(2, &[])).unwrap()),
            ["m3"]
        );
        assert_eq!(
            what_followed(&answered, &sent(2, &["call_1", "call_2"])),
            None
        );
    }

    #[test]
    fn items_tell_how_a_response_ended() {
        assert_eq!(end_of(&[]), None);
        assert_eq!(end_of(&[reasoning("rs_1")]), None);
        let done = end_of(&[reasoning("rs_1"), message("m1", "assistant", "c")]).unwrap();
        assert_eq!(
            (done.status, done.upstream_message_id.as_deref()),
            (RunStatus::Completed, Some("m1"))
        );
        assert_eq!(done.content, [ContentPart::text("c")]);
        let mut cut = message("m1", "assistant", "c");
        cut["status"] = "incomplete".into();
        let cut = end_of(&[cut]).unwrap();
        assert_eq!(
            (cut.status, cut.error.is_some()),
            (RunStatus::Incomplete, true)
        );
        let asks = end_of(&[message("m1", "assistant", "c"), call("call_1")]).unwrap();
        assert_eq!(
            (asks.status, asks.tool_calls[0].id.as_str()),
            (RunStatus::RequiresAction, "call_1")
        );
    }

    #[test]
    fn the_broken_tail_is_open_calls_and_the_reasoning_that_led_to_them() {
        let items = [
            reasoning("rs_1"),
            call("call_1"),
            output("call_1"),
            reasoning("rs_2"),
            call("call_2"),
            call("call_3"),
            message("m1", "user", "x"),
            reasoning("rs_3"),
        ];
        assert_eq!(
            broken_tail(&items, &Damage::OpenCall),
            ["fc_call_3", "fc_call_2", "rs_2"]
        );
        let named = |id: &str| Damage::OrphanedReasoning(Some(id.to_owned()));
        assert_eq!(
            broken_tail(&items, &named("rs_3")),
            ["rs_3", "fc_call_3", "fc_call_2", "rs_2"]
        );
        assert_eq!(broken_tail(&items[..3], &named("rs_1")), ["rs_1"]);
        assert_eq!(
            broken_tail(&items[..3], &named("rs_0")),
            ["rs_0"],
            "even one that is further back"
        );
        assert_eq!(
            broken_tail(&items[6..], &Damage::OrphanedReasoning(None)),
            ["rs_3"]
        );
        assert_eq!(
            broken_tail(&items[..3], &Damage::OrphanedReasoning(None)),
            [""; 0]
        );
    }

    proptest! {
        /// Whatever items a conversation has, the results are parts of them.
        #[test]
        fn items_of_any_shape_are_read(
            items in proptest::collection::vec(mutated(vec![message("m1", "user", "a"), message("m2", "assistant", "b"), call("call_1"), output("call_1"), reasoning("rs_1")]), 0..8),
            skip in 0..3_u32,
            inputs in 0..3_u32,
            answers in any::<bool>(),
        ) {
            let own = own_part(&items, skip);
            prop_assert!(own.len() <= items.len());
            let sent = sent(inputs, if answers { &["call_1"] } else { &[] });
            prop_assert!(what_followed(own, &sent).is_none_or(|rest| rest.len() <= own.len()));
            let _ = (is_said(own, inputs), end_of(own));
            for damage in [Damage::OpenCall, Damage::OrphanedReasoning(None), Damage::OrphanedReasoning(Some("rs_1".to_owned()))] {
                prop_assert!(broken_tail(&items, &damage).len() <= items.len() + 1);
            }
            prop_assert!(kept(&items, own).len() <= items.len());
            let _ = items.iter().map(as_event).count();
        }
    }

    #[test]
    fn input_that_was_kept_is_known_by_its_words() {
        let sent = [
            json!({"type": "message", "role": "user", "content": "a"}),
            message("", "user", "b"),
        ];
        let items = [
            message("m0", "user", "a"),
            message("m1", "user", "a"),
            message("m2", "user", "b"),
        ];
        assert_eq!(kept(&items, &sent), ["m2", "m1"]);
        assert_eq!(kept(&items[..2], &sent), [""; 0]);
        assert_eq!(kept(&[message("m1", "assistant", "b")], &sent), [""; 0]);
    }
}

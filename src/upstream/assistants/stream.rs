//! Decodes the event stream of a run.

use std::collections::VecDeque;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::wire::{MessageDelta, MessageObject, RunObject, StreamedText, hosted_calls};
use crate::domain::{
    ContentPart, Origin, RunError, RunStatus, TextDelta, ToolCall, UpstreamRunId, Usage,
    append_messages,
};
use crate::upstream::classify::{ErrorDetail, Rejection};
use crate::upstream::error::UpstreamError;
use crate::upstream::port::{Ended, UpstreamEvent};
use crate::upstream::relay::{Decoder, PLACE_COST, StreamNotes, unreadable};
use crate::upstream::sse::SseEvent;
use crate::upstream::streamed_parts::StreamedParts;
use crate::upstream::surrogates::without_lone_halves;
use crate::upstream::wire::failure;

/// The state of a run while its events arrive.
#[derive(Debug, Default)]
pub(super) struct StreamDecoder {
    accepted: bool,
    /// Whether the run called a tool.
    called: bool,
    /// In the order in which they began.
    messages: Vec<Message>,
    /// The calls that the server has answered itself, each with the number of messages before it.
    calls: Vec<(usize, ContentPart)>,
    /// The size of `messages` in bytes.
    held: usize,
    notes: StreamNotes,
}

#[derive(Debug)]
struct Message {
    id: String,
    parts: Parts,
}

#[derive(Debug)]
enum Parts {
    /// Assembled from deltas, by index.
    Growing(StreamedParts<u64>),
    /// As the upstream has stored them.
    Whole(Vec<ContentPart>),
}

/// The cause for which a run failed.
struct Failed {
    error: Option<RunError>,
    /// The failure as a refusal of the request.
    refusal: Option<UpstreamError>,
}

/// The subject of an event.
enum Kind {
    /// With the status that the event's name says.
    Run(Option<RunStatus>),
    MessageDelta,
    MessageEnd,
    StepEnd,
    Error,
    Other,
}

impl Decoder for StreamDecoder {
    fn decode(
        &mut self,
        event: &SseEvent,
        out: &mut VecDeque<UpstreamEvent>,
    ) -> Option<Result<(), Rejection>> {
        self.called |= calls_tool(event);
        match kind(event)? {
            Kind::Run(named) => return Some(self.run(named, parse(&event.data)?, out)),
            Kind::MessageDelta => self.delta(serde_json::from_str(&event.data).ok()?, out)?,
            Kind::MessageEnd => self.message(parse(&event.data)?),
            // The reply is whole without it.
            Kind::StepEnd => self.step(&parse(&event.data).unwrap_or_default()),
            Kind::Error => {
                let detail = parse(&event.data)
                    .map(|object| ErrorDetail::from_object(&object))
                    .unwrap_or_default();
                self.notes.error = Some(detail.clone());
                let (code, refusal) = if self.accepted {
                    (detail.word(), detail.refusal())
                } else {
                    match detail.of_refused_stream() {
                        Ok(refusal) => return Some(Err(refusal)),
                        Err(code) => (code, None),
                    }
                };
                let error = failure(RunStatus::Failed, code);
                self.end(
                    RunStatus::Failed,
                    Failed { error, refusal },
                    None,
                    Vec::new(),
                    out,
                );
            }
            Kind::Other => {}
        }
        Some(Ok(()))
    }

    fn held(&self) -> usize {
        self.held
    }

    fn notes(&mut self) -> &mut StreamNotes {
        &mut self.notes
    }
}

impl StreamDecoder {
    fn run(
        &mut self,
        named: Option<RunStatus>,
        run: RunObject,
        out: &mut VecDeque<UpstreamEvent>,
    ) -> Result<(), Rejection> {
        if !self.accepted {
            self.accepted = true;
            out.push_back(UpstreamEvent::Accepted(UpstreamRunId(run.id.clone())));
        }
        let status = match named.or_else(|| run.run_status()) {
            Some(status) if status.is_final() || status == RunStatus::RequiresAction => status,
            _ => return Ok(()),
        };
        // The thread has the whole reply, and the caller reads it there after an error.
        if status == RunStatus::Completed && !self.is_whole() {
            return Err(unreadable().into());
        }
        let usage = run.usage();
        if status == RunStatus::Failed {
            self.notes.error = run.error_detail();
        }
        let failed = Failed {
            error: run
                .unknown_action()
                .or_else(|| failure(status, run.failure_code())),
            refusal: run.refusal().filter(|_| status == RunStatus::Failed),
        };
        let calls = if status == RunStatus::RequiresAction {
            run.into_tool_calls()
        } else {
            Vec::new()
        };
        self.end(status, failed, usage, calls, out);
        Ok(())
    }

    /// Returns true if the stream told the reply, without a gap.
    fn is_whole(&self) -> bool {
        let is_stored = |message: &Message| matches!(message.parts, Parts::Whole(_));
        !self.messages.is_empty() && (!self.notes.has_gap || self.messages.iter().all(is_stored))
    }

    fn end(
        &mut self,
        status: RunStatus,
        failed: Failed,
        usage: Option<Usage>,
        tool_calls: Vec<ToolCall>,
        out: &mut VecDeque<UpstreamEvent>,
    ) {
        let upstream_message_id = self.messages.last().map(|message| message.id.clone());
        let mut content = Vec::new();
        let mut calls = std::mem::take(&mut self.calls).into_iter().peekable();
        for (at, message) in self.messages.drain(..).enumerate() {
            while let Some((_, call)) = calls.next_if(|(before, _)| *before <= at) {
                content.push(call);
            }
            append_messages(&mut content, message.parts.into_vec());
        }
        content.extend(calls.map(|(_, call)| call));
        let did_nothing = content.is_empty() && !self.called;
        out.push_back(UpstreamEvent::Ended(Box::new(Ended {
            status,
            error: failed.error,
            content,
            upstream_message_id,
            usage,
            tool_calls,
            thread: None,
            refusal: failed.refusal.filter(|_| did_nothing),
        })));
    }

    fn delta(&mut self, delta: MessageDelta, out: &mut VecDeque<UpstreamEvent>) -> Option<()> {
        for piece in delta.delta.content.unwrap_or_default() {
            let (text, is_refusal) = match (&piece.text, &piece.refusal) {
                (Some(StreamedText { value: Some(text) }), _) => (text, false),
                (None, Some(refusal)) => (refusal, true),
                _ => continue,
            };
            if text.get() == "\"\"" {
                continue;
            }
            let at = self.place(&delta.id);
            let origin = Origin {
                message: u32::try_from(at).unwrap_or(u32::MAX),
                phase: None,
            };
            let Parts::Growing(parts) = &mut self.messages[at].parts else {
                continue;
            };
            let grown = parts.grow(piece.index, Origin::default(), text, is_refusal)?;
            self.held += grown.bytes;
            if !is_refusal && !grown.text.is_empty() {
                out.push_back(UpstreamEvent::Text(TextDelta {
                    origin,
                    text: grown.text.into(),
                }));
            }
        }
        Some(())
    }

    fn step(&mut self, step: &Value) {
        for call in hosted_calls(step) {
            let part = ContentPart::ToolCall { tool_call: call };
            self.held += part.size() + PLACE_COST;
            self.calls.push((self.messages.len(), part));
        }
    }

    fn message(&mut self, message: MessageObject) {
        if !message.is_reply() {
            return;
        }
        let id = message.id.clone();
        let parts = Parts::Whole(message.into_parts());
        // A server that stores the text in another place than the message must not erase the
        // streamed text.
        if parts.size() > 0 {
            let at = self.place(&id);
            let entry = &mut self.messages[at];
            let before = std::mem::replace(&mut entry.parts, parts).size();
            let now = entry.parts.size();
            self.held = (self.held + now).saturating_sub(before);
        }
    }

    /// Returns the index of the message, which is also its number.
    fn place(&mut self, id: &str) -> usize {
        let known = self.messages.iter().rposition(|message| message.id == id);
        known.unwrap_or_else(|| {
            self.held += PLACE_COST + id.len();
            self.messages.push(Message {
                id: id.to_owned(),
                parts: Parts::Growing(StreamedParts::default()),
            });
            self.messages.len() - 1
        })
    }
}

impl Parts {
    fn size(&self) -> usize {
        let size = |part: &ContentPart| part.size() + PLACE_COST;
        match self {
            Self::Growing(parts) => parts.iter().map(size).sum(),
            Self::Whole(parts) => parts.iter().map(size).sum(),
        }
    }

    fn into_vec(self) -> Vec<ContentPart> {
        match self {
            Self::Growing(parts) => parts.into_vec(),
            Self::Whole(parts) => parts,
        }
    }
}

/// Classifies an event by its name; where a server leaves out the event line, by the fields of
/// the object.
fn kind(event: &SseEvent) -> Option<Kind> {
    let name = event
        .name
        .as_deref()
        .filter(|name| !name.is_empty() && *name != "message");
    if let Some(name) = name {
        return Some(match name {
            "thread.message.delta" => Kind::MessageDelta,
            "thread.message.completed" | "thread.message.incomplete" => Kind::MessageEnd,
            "error" => Kind::Error,
            "thread.run.step.completed" => Kind::StepEnd,
            _ if name.starts_with("thread.run.step.") => Kind::Other,
            _ => match name.strip_prefix("thread.run.") {
                // `created` is a name and no status. Then the object's own status counts.
                Some(status) => Kind::Run(status.parse().ok()),
                None if !name.starts_with("thread.")
                    && ErrorDetail::of_event(Some(name), &event.data).is_some() =>
                {
                    Kind::Error
                }
                None => Kind::Other,
            },
        });
    }
    if event.data == "[DONE]" {
        return Some(Kind::Other);
    }
    let object: Map<String, Value> = parse(&event.data)?;
    Some(match object.get("object").and_then(Value::as_str) {
        Some("thread.run") => Kind::Run(None),
        Some("thread.message.delta") => Kind::MessageDelta,
        Some("thread.run.step")
            if object.get("status").and_then(Value::as_str) == Some("completed") =>
        {
            Kind::StepEnd
        }
        Some("thread.message") => match object.get("status").and_then(Value::as_str) {
            Some("completed" | "incomplete") => Kind::MessageEnd,
            _ => Kind::Other,
        },
        _ if ErrorDetail::of_event(None, &event.data).is_some() => Kind::Error,
        _ => Kind::Other,
    })
}

/// Returns true if the event is about a step that calls a tool.
fn calls_tool(event: &SseEvent) -> bool {
    event
        .name
        .as_deref()
        .is_none_or(|name| name.starts_with("thread.run.step."))
        && event.data.contains("\"thread.run.step")
        && event.data.contains("\"tool_calls\"")
}

fn parse<T: DeserializeOwned>(data: &str) -> Option<T> {
    serde_json::from_str(&without_lone_halves(data)).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::upstream::mutation::{damaged, ends_once, mutated, read_to_the_end, told};

    fn event(name: &str, data: &Value) -> SseEvent {
        SseEvent {
            name: (!name.is_empty()).then(|| name.to_owned()),
            data: data.to_string(),
        }
    }

    fn read(
        events: impl IntoIterator<Item = SseEvent>,
    ) -> Result<Vec<UpstreamEvent>, UpstreamError> {
        let (mut decoder, mut out) = (StreamDecoder::default(), VecDeque::new());
        for event in events {
            decoder
                .read(&event, &mut out)
                .map_err(UpstreamError::from)?;
        }
        Ok(out.into())
    }

    fn run(status: &str) -> Value {
        json!({"id": "run_1", "object": "thread.run", "status": status})
    }

    fn delta(message: &str, index: u64, text: &str) -> Value {
        json!({"id": message, "object": "thread.message.delta",
               "delta": {"content": [{"index": index, "type": "text", "text": {"value": text}}]}})
    }

    fn message(id: &str, status: &str, text: &str) -> Value {
        json!({"id": id, "object": "thread.message", "status": status, "role": "assistant",
               "content": [{"type": "text", "text": {"value": text, "annotations": []}}]})
    }

    fn text(text: &str) -> ContentPart {
        ContentPart::text(text)
    }

    fn ended(events: &[UpstreamEvent]) -> &Ended {
        match events.last() {
            Some(UpstreamEvent::Ended(ended)) => ended,
            other => panic!("not ended: {other:?}"),
        }
    }

    fn plain() -> Vec<(&'static str, Value)> {
        let mut completed = run("completed");
        completed["usage"] = json!({"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5});
        vec![
            ("thread.run.created", run("queued")),
            ("thread.run.queued", run("queued")),
            ("thread.run.in_progress", run("in_progress")),
            (
                "thread.run.step.created",
                json!({"id": "step_1", "object": "thread.run.step"}),
            ),
            (
                "thread.message.created",
                json!({"id": "msg_1", "object": "thread.message", "status": "in_progress"}),
            ),
            ("thread.message.delta", delta("msg_1", 0, "Hel")),
            ("thread.message.delta", delta("msg_1", 0, "")),
            ("thread.message.delta", delta("msg_1", 0, "lo")),
            (
                "thread.message.completed",
                message("msg_1", "completed", "Hello"),
            ),
            (
                "thread.run.step.completed",
                json!({"id": "step_1", "object": "thread.run.step"}),
            ),
            ("thread.run.completed", completed),
        ]
    }

    #[test]
    fn a_plain_turn_is_read_with_and_without_event_lines() {
        let named: Vec<_> = plain()
            .iter()
            .map(|(name, data)| event(name, data))
            .collect();
        let unnamed: Vec<_> = plain().iter().map(|(_, data)| event("", data)).collect();
        let expected = vec![
            UpstreamEvent::Accepted(UpstreamRunId("run_1".to_owned())),
            UpstreamEvent::Text("Hel".into()),
            UpstreamEvent::Text("lo".into()),
            UpstreamEvent::Ended(Box::new(Ended {
                status: RunStatus::Completed,
                error: None,
                content: vec![text("Hello")],
                upstream_message_id: Some("msg_1".to_owned()),
                usage: Some(Usage {
                    input_tokens: 3,
                    output_tokens: 2,
                    total_tokens: 5,
                    ..Usage::default()
                }),
                tool_calls: Vec::new(),
                thread: None,
                refusal: None,
            })),
        ];
        assert_eq!(read(named).unwrap(), expected);
        assert_eq!(read(unnamed).unwrap(), expected);
    }

    #[test]
    fn the_stored_message_wins_over_its_deltas() {
        let events = read([
            event("thread.message.delta", &delta("msg_1", 0, "Helo")),
            event(
                "thread.message.completed",
                &message("msg_1", "completed", "Hello"),
            ),
            event("thread.message.delta", &delta("msg_2", 1, "b")),
            event("thread.message.delta", &delta("msg_2", 0, "a")),
            event("thread.run.completed", &run("completed")),
        ])
        .unwrap();
        let second = Origin {
            message: 1,
            phase: None,
        };
        let of_second = |text: &str| ContentPart::text_of(text, second);
        assert_eq!(
            ended(&events).content,
            [text("Hello"), of_second("a"), of_second("b")]
        );
        assert_eq!(ended(&events).upstream_message_id.as_deref(), Some("msg_2"));
    }

    #[test]
    fn messages_of_the_user_are_no_reply() {
        let mut echo = message("msg_0", "completed", "question");
        echo["role"] = "user".into();
        let events = read([
            event("thread.message.completed", &echo),
            event("thread.run.failed", &run("failed")),
        ])
        .unwrap();
        assert_eq!(ended(&events).content, []);
    }

    #[test]
    fn every_way_to_end_is_told_with_its_reason() {
        for (name, status, field, reason, message) in [
            (
                "failed",
                RunStatus::Failed,
                "last_error",
                json!({"code": "rate_limit_exceeded", "message": "secret"}),
                "the upstream reported that the run failed (rate_limit_exceeded)",
            ),
            (
                "failed",
                RunStatus::Failed,
                "last_error",
                json!({"code": "a secret sentence"}),
                "the upstream reported that the run failed",
            ),
            (
                "incomplete",
                RunStatus::Incomplete,
                "incomplete_details",
                json!({"reason": "max_completion_tokens"}),
                "the upstream ended the reply before it was whole (max_completion_tokens)",
            ),
            (
                "cancelled",
                RunStatus::Cancelled,
                "x",
                Value::Null,
                "the run was cancelled at the upstream",
            ),
            (
                "expired",
                RunStatus::Expired,
                "x",
                Value::Null,
                "the run expired at the upstream",
            ),
        ] {
            let mut object = run(name);
            object[field] = reason;
            let events = read([
                event("thread.message.delta", &delta("msg_1", 0, "half")),
                event(&format!("thread.run.{name}"), &object),
            ])
            .unwrap();
            let ended = ended(&events);
            assert_eq!(ended.status, status);
            assert_eq!(ended.error.as_ref().unwrap().message, message);
            assert_eq!(ended.content, [text("half")]);
        }
    }

    #[test]
    fn function_calls_end_the_stream() {
        let mut object = run("requires_action");
        object["required_action"] = json!({"type": "submit_tool_outputs", "submit_tool_outputs": {"tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{"}},
        ]}});
        let events = read([event("thread.run.requires_action", &object)]).unwrap();
        assert_eq!(ended(&events).status, RunStatus::RequiresAction);
        let call = ToolCall {
            id: "call_1".to_owned(),
            name: "f".to_owned(),
            arguments: "{".to_owned(),
            ..ToolCall::default()
        };
        assert_eq!(ended(&events).tool_calls, [call]);
    }

    #[test]
    fn an_error_event_refuses_before_acceptance_and_fails_the_run_after() {
        let flat = json!({"code": "rate_limit_exceeded", "message": "m", "type": "x"});
        for data in [flat.clone(), json!({"error": flat})] {
            for name in ["error", ""] {
                let error = read([event(name, &data)]).unwrap_err();
                assert!(
                    matches!(error, UpstreamError::Unavailable { status: 429, .. }),
                    "{error:?}"
                );
                let events = read([
                    event("thread.run.created", &run("queued")),
                    event("thread.message.delta", &delta("msg_1", 0, "half")),
                    event(name, &data),
                ])
                .unwrap();
                assert_eq!(ended(&events).status, RunStatus::Failed);
                assert_eq!(ended(&events).content, [text("half")]);
                assert_eq!(
                    ended(&events).error.as_ref().unwrap().message,
                    "the upstream reported that the run failed (rate_limit_exceeded)"
                );
            }
        }
    }

    #[test]
    fn unknown_events_and_done_mean_nothing() {
        let raw = |name: &str, data: &str| SseEvent {
            name: Some(name.to_owned()),
            data: data.to_owned(),
        };
        let events = [
            raw("thread.hologram", "not json"),
            raw("done", "[DONE]"),
            raw("message", "[DONE]"),
            raw("thread.run.step.delta", "{"),
            raw("thread.created", "{}"),
            event("", &json!({"object": "thread.future"})),
        ];
        assert_eq!(read(events).unwrap(), []);
    }

    #[test]
    fn an_unreadable_event_is_skipped_and_leaves_no_hole() {
        let broken = |name: &str| SseEvent {
            name: Some(name.to_owned()),
            data: "{".to_owned(),
        };
        let first = || event("thread.message.delta", &delta("msg_1", 0, "Hel"));
        let whole = event(
            "thread.message.completed",
            &message("msg_1", "completed", "Hello"),
        );
        let completed = || event("thread.run.completed", &run("completed"));
        let lost = || broken("thread.message.delta");
        let events = read([first(), lost(), whole, completed()]).unwrap();
        assert_eq!(ended(&events).content, [text("Hello")]);
        // The thread has the reply in these cases.
        for hole in [vec![first(), lost(), completed()], vec![completed()]] {
            assert!(matches!(read(hole), Err(UpstreamError::Protocol(_))));
        }
        let mut decoder = StreamDecoder::default();
        let mut out = VecDeque::new();
        decoder
            .read(&broken("thread.run.completed"), &mut out)
            .unwrap();
        assert!(out.is_empty() && matches!(decoder.notes().unended(), UpstreamError::Protocol(_)));
    }

    const NAMES: [&str; 11] = [
        "",
        "message",
        "error",
        "done",
        "thread.run.created",
        "thread.run.completed",
        "thread.run.requires_action",
        "thread.message.delta",
        "thread.message.delta",
        "thread.message.completed",
        "thread.run.step.delta",
    ];

    /// Events that a plain run does not have.
    fn odd() -> Vec<Value> {
        let mut asks = run("requires_action");
        asks["required_action"] = json!({"type": "submit_tool_outputs", "submit_tool_outputs": {"tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{"}},
        ]}});
        let refusal = json!({"id": "msg_2", "object": "thread.message.delta",
                             "delta": {"content": [{"index": 1, "type": "refusal", "refusal": "no"}]}});
        let failed = json!({"error": {"code": "server_error", "message": "m", "type": "x"}});
        vec![asks, refusal, failed]
    }

    fn transcript() -> String {
        let event = |(name, data): &(&str, Value)| format!("event: {name}\ndata: {data}\n\n");
        plain().iter().map(event).collect::<Vec<_>>().concat()
    }

    proptest! {
        #[test]
        fn arbitrary_events_do_not_panic(
            names in proptest::collection::vec(0..NAMES.len(), 0..12),
            data in "\\PC{0,40}|\\{\"id\":\"x\"\\}|\\{\"error\":[0-9]\\}",
        ) {
            let _ = read(names.iter().map(|at| SseEvent { name: Some(NAMES[*at].to_owned()), data: data.clone() }));
        }

        #[test]
        fn events_that_are_nearly_real_are_read_within_bounds(
            events in proptest::collection::vec((0..NAMES.len(), mutated(plain().into_iter().map(|(_, data)| data).chain(odd()).collect())), 0..16),
        ) {
            let (mut decoder, mut out, mut sent) = (StreamDecoder::default(), VecDeque::new(), 0);
            for (name, data) in events {
                let event = SseEvent { name: Some(NAMES[name].to_owned()), data: data.to_string() };
                sent += event.data.len();
                let read = decoder.read(&event, &mut out);
                let kept: usize = decoder.messages.iter().map(|message| message.parts.size()).sum();
                prop_assert!(kept <= decoder.held(), "{kept} of {}", decoder.held());
                if read.is_err() || matches!(out.back(), Some(UpstreamEvent::Ended(_))) {
                    break;
                }
            }
            let told = told(&out);
            prop_assert!(told <= 2 * sent, "shown, and told again at the end: {told} of {sent}");
        }

        #[test]
        fn a_damaged_stream_has_an_end(pieces in damaged(transcript().into_bytes())) {
            ends_once(&read_to_the_end(pieces, StreamDecoder::default(), 4096))?;
        }
    }
}

//! Decodes the event stream of a response.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::value::RawValue;

use super::wire::{Envelope, ItemHead, ResponseHead, ResponseObject};
use crate::domain::{
    Origin, Phase, RunStatus, TextDelta, UpstreamRunId, UpstreamThreadId, says_something as says,
};
use crate::upstream::classify::{ErrorDetail, Rejection};
use crate::upstream::error::{RefusalCause, UpstreamError};
use crate::upstream::port::{Ended, UpstreamEvent};
use crate::upstream::relay::{Decoder, PLACE_COST, StreamNotes, unreadable};
use crate::upstream::sse::SseEvent;
use crate::upstream::streamed_parts::StreamedParts;
use crate::upstream::surrogates::without_lone_halves;
use crate::upstream::wire::{failure, without_reply};

/// The state of a response while its events arrive.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(super) struct StreamDecoder {
    /// The response becomes the end of the chain if it ends well.
    chain: bool,
    /// A response that fails because the conversation is damaged counts as a refusal, because the
    /// caller can repair the conversation.
    repairs: bool,
    /// The response on which this one must build.
    previous: Option<Previous>,
    /// The response does not build on `previous`.
    forgets: bool,
    response: Option<String>,
    /// Whether the response called a tool.
    called: bool,
    /// Text assembled from deltas, by output and content index, for the case that the final
    /// response does not hold it.
    streamed: StreamedParts<(u64, u64)>,
    /// The messages that have text, by output index.
    messages: BTreeMap<u64, Origin>,
    /// The phases of the messages that have none yet.
    phases: BTreeMap<u64, Phase>,
    /// The size of these in bytes.
    held: usize,
    notes: StreamNotes,
}

/// The response on which the next one of a chain must build.
#[derive(Clone, Debug)]
pub(super) struct Previous {
    pub(super) id: String,
    /// Set when the server turns out to ignore ids of earlier responses.
    pub(super) is_ignored: Arc<AtomicBool>,
}

impl Previous {
    /// Checks what the server says of the response on which a new one builds. A server that says
    /// nothing is trusted.
    fn is_forgotten(&self, said: Option<&Value>) -> bool {
        let is_forgotten = said.is_some_and(|said| said.as_str() != Some(&self.id));
        if is_forgotten && !self.is_ignored.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "the upstream ignores `previous_response_id`, so each request now holds the whole \
                 history; set `conversations = true` if the server has conversations"
            );
        }
        is_forgotten
    }
}

impl StreamDecoder {
    pub(super) fn new(chain: bool) -> Self {
        Self {
            chain,
            repairs: false,
            previous: None,
            forgets: false,
            response: None,
            called: false,
            streamed: StreamedParts::default(),
            messages: BTreeMap::new(),
            phases: BTreeMap::new(),
            held: 0,
            notes: StreamNotes::default(),
        }
    }

    /// Makes a decoder for a caller that can repair a damaged conversation.
    pub(super) fn for_repair(chain: bool) -> Self {
        Self {
            repairs: true,
            ..Self::new(chain)
        }
    }

    /// Makes the decoder check that the response builds on an earlier one.
    pub(super) fn after(self, previous: Option<Previous>) -> Self {
        Self { previous, ..self }
    }

    /// Returns true if the response has produced nothing, and the caller can repair the
    /// conversation.
    fn is_refused_late(&self) -> bool {
        self.repairs && self.streamed.is_empty()
    }
}

impl Decoder for StreamDecoder {
    /// The JSON says what an event is. The event line, which not every server sends, counts only
    /// where the JSON does not say it. An event that neither of them names may be an error of a
    /// proxy in front of the server, or a whole response.
    fn decode(
        &mut self,
        event: &SseEvent,
        out: &mut VecDeque<UpstreamEvent>,
    ) -> Option<Result<(), Rejection>> {
        // The id of the response was relayed before, so that the response can be deleted.
        if self.forgets {
            return Some(Err(UpstreamError::ThreadGone.into()));
        }
        if event.data == "[DONE]" {
            return Some(Ok(()));
        }
        let foreign = event
            .name
            .as_deref()
            .is_some_and(|name| name != "error" && !name.starts_with("response."));
        let envelope: Envelope<'_> = match serde_json::from_str(&event.data) {
            Ok(envelope) => envelope,
            Err(_) if foreign => return Some(Ok(())),
            Err(_) if event.name.as_deref() == Some("error") => {
                return Some(self.error(ErrorDetail::default(), out));
            }
            Err(_) => return None,
        };
        let kind = envelope
            .kind
            .as_deref()
            .or(event.name.as_deref())
            .unwrap_or_default();
        self.called |= calls_tool(kind, &event.data);
        let place = (
            envelope.output_index.unwrap_or(0),
            envelope.content_index.unwrap_or(0),
        );
        match (kind, envelope.response_in(&event.data), envelope.delta) {
            ("response.output_text.delta", _, Some(delta)) => {
                let more = self.grow(place, delta, false)?;
                if !more.text.is_empty() {
                    out.push_back(UpstreamEvent::Text(more));
                }
            }
            ("response.refusal.delta", _, Some(delta)) => {
                self.grow(place, delta, true)?;
            }
            ("response.output_item.added", ..) => {
                let item = envelope.item.map(RawValue::get);
                if let Some(phase) = item.and_then(parse).and_then(|it: ItemHead| it.phase) {
                    self.held += PLACE_COST;
                    self.phases.insert(place.0, phase);
                }
            }
            (kind, Some(response), _) if kind.is_empty() || kind.starts_with("response.") => {
                return self.response(kind, response, out);
            }
            ("error", ..) => {
                let object = parse(&event.data)?;
                return Some(self.error(ErrorDetail::from_object(&object), out));
            }
            (kind, ..) if may_tell_error(kind) => {
                let data = without_lone_halves(&event.data);
                if let Some(detail) = ErrorDetail::of_event(event.name.as_deref(), &data) {
                    return Some(self.error(detail, out));
                }
            }
            _ => {}
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
    /// Returns the text that the delta adds, which may be empty. Returns `None` if the delta is no
    /// text.
    fn grow(&mut self, place: (u64, u64), delta: &RawValue, is_refusal: bool) -> Option<TextDelta> {
        let next = Origin {
            message: u32::try_from(self.messages.len()).unwrap_or(u32::MAX),
            phase: self.phases.get(&place.0).copied(),
        };
        let origin = self.messages.get(&place.0).copied().unwrap_or(next);
        let grown = self.streamed.grow(place, origin, delta, is_refusal)?;
        self.held += grown.bytes;
        if grown.bytes > 0 {
            self.messages.insert(place.0, origin);
        }
        Some(TextDelta {
            origin,
            text: grown.text.into(),
        })
    }

    fn response(
        &mut self,
        kind: &str,
        json: &str,
        out: &mut VecDeque<UpstreamEvent>,
    ) -> Option<Result<(), Rejection>> {
        let head: ResponseHead = parse(json)?;
        if self.response.is_none() {
            self.response = Some(head.id.clone());
            let previous = self.previous.take();
            self.forgets =
                previous.is_some_and(|it| it.is_forgotten(head.previous_response_id.as_ref()));
            out.push_back(UpstreamEvent::Accepted(UpstreamRunId(head.id.clone())));
        }
        // The status decides, because a cancelled response ends with an event named `failed`. The
        // name of the event decides only if the server leaves the status out, or does not update
        // it.
        let named = match kind {
            "response.completed" => Some(RunStatus::Completed),
            "response.incomplete" => Some(RunStatus::Incomplete),
            "response.failed" => Some(RunStatus::Failed),
            "response.cancelled" => Some(RunStatus::Cancelled),
            _ => None,
        };
        if let Some(status) = head
            .run_status()
            .filter(|status| status.is_final())
            .or(named)
        {
            if self.forgets {
                return Some(Err(UpstreamError::ThreadGone.into()));
            }
            let response: ResponseObject = parse(json)?;
            if status == RunStatus::Failed {
                self.notes.error = response.error_detail();
            }
            // Some servers accept a run before they see that the conversation is damaged.
            if status == RunStatus::Failed
                && self.is_refused_late()
                && let Some(damage) = response.damage()
            {
                let error = UpstreamError::Refused {
                    status: 400,
                    code: response.failure_code(),
                    missing: false,
                    cause: RefusalCause::Thread,
                };
                return Some(Err(Rejection {
                    error,
                    damage: Some(damage),
                }));
            }
            match self.end(status, head.id, response) {
                Ok(ended) => out.push_back(UpstreamEvent::Ended(Box::new(ended))),
                Err(error) => return Some(Err(error.into())),
            }
        }
        Some(Ok(()))
    }

    /// Fails if the reply has a gap: an event could not be read, and the response does not hold
    /// the reply either.
    fn end(
        &mut self,
        status: RunStatus,
        id: String,
        response: ResponseObject,
    ) -> Result<Ended, UpstreamError> {
        let error = failure(status, response.failure_code());
        let refusal = response
            .refusal()
            .filter(|_| status == RunStatus::Failed && !self.called);
        let usage = response.usage();
        let output = response.into_output();
        let ended_well = matches!(status, RunStatus::Completed | RunStatus::Incomplete);
        let closed = output.open_calls.is_empty();
        // A cancelled response comes back empty, and some servers leave the output out
        // altogether.
        let says_something = output.says_something();
        let mut content = output.content;
        if !says_something && (closed || !ended_well) {
            if self.notes.has_gap && ended_well {
                return Err(unreadable());
            }
            content.append(&mut std::mem::take(&mut self.streamed).into_vec());
        }
        let refusal = refusal.filter(|_| content.is_empty());
        let is_empty = status == RunStatus::Completed && closed && !says(&content);
        let error = error
            .or_else(|| is_empty.then(|| without_reply(output.unread.iter().map(String::as_str))));
        Ok(Ended {
            status: if status == RunStatus::Completed && !closed {
                RunStatus::RequiresAction
            } else {
                status
            },
            error,
            content,
            upstream_message_id: output.message_id,
            usage,
            tool_calls: output.open_calls,
            // The next response must not build on one that did not end well or left calls open.
            thread: (self.chain && ended_well && closed).then_some(UpstreamThreadId(id)),
            refusal,
        })
    }

    /// Handles an error in the place of a terminal event.
    fn error(
        &mut self,
        detail: ErrorDetail,
        out: &mut VecDeque<UpstreamEvent>,
    ) -> Result<(), Rejection> {
        self.notes.error = Some(detail.clone());
        let (code, refusal) =
            if self.response.is_none() || (self.is_refused_late() && detail.damage().is_some()) {
                match detail.of_refused_stream() {
                    Ok(refusal) => return Err(refusal),
                    Err(code) => (code, None),
                }
            } else {
                (detail.word(), detail.refusal())
            };
        out.push_back(UpstreamEvent::Ended(Box::new(Ended {
            status: RunStatus::Failed,
            error: failure(RunStatus::Failed, code),
            content: std::mem::take(&mut self.streamed).into_vec(),
            upstream_message_id: None,
            usage: None,
            tool_calls: Vec::new(),
            thread: None,
            refusal: refusal.filter(|_| !self.called),
        })));
        Ok(())
    }
}

/// Returns true if the event is about a call of a tool: `response.mcp_call.in_progress`, or an
/// item of such a type.
fn calls_tool(kind: &str, data: &str) -> bool {
    kind.contains("_call")
        || (kind.starts_with("response.output_item.") && data.contains("_call\""))
}

/// Returns true if the event may be an error. Events of the protocol hold errors only in their
/// response.
fn may_tell_error(kind: &str) -> bool {
    !kind.starts_with("response.") || matches!(kind, "response.error" | "response.failed")
}

/// Returns true if the event is an error and not a part of the response.
pub(super) fn tells_error(kind: &str, event: &SseEvent) -> bool {
    kind == "error"
        || (may_tell_error(kind)
            && ErrorDetail::of_event(event.name.as_deref(), &event.data).is_some())
}

fn parse<T: DeserializeOwned>(json: &str) -> Option<T> {
    serde_json::from_str(&without_lone_halves(json)).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::domain::{ContentPart, Usage};
    use crate::upstream::classify::Damage;
    use crate::upstream::mutation::{damaged, ends_once, mutated, read_to_the_end, told};

    fn event(data: &Value) -> SseEvent {
        SseEvent {
            name: data["type"].as_str().map(str::to_owned),
            data: data.to_string(),
        }
    }

    fn read(
        chain: bool,
        events: impl IntoIterator<Item = SseEvent>,
    ) -> Result<Vec<UpstreamEvent>, UpstreamError> {
        let (mut decoder, mut out) = (StreamDecoder::new(chain), VecDeque::new());
        for event in events {
            decoder
                .read(&event, &mut out)
                .map_err(UpstreamError::from)?;
        }
        Ok(out.into())
    }

    fn response(kind: &str, status: &str, output: &Value) -> Value {
        json!({"type": kind, "sequence_number": 9, "response": {"id": "resp_1", "status": status, "output": output,
               "usage": {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5}}})
    }

    fn delta(text: &str) -> Value {
        json!({"type": "response.output_text.delta", "item_id": "msg_1", "output_index": 0, "content_index": 0,
               "delta": text, "logprobs": []})
    }

    fn message(text: &str) -> Value {
        json!({"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
               "content": [{"type": "output_text", "text": text, "annotations": []}]})
    }

    fn call() -> Value {
        json!({"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "f", "arguments": "{}"})
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

    fn plain() -> Vec<Value> {
        vec![
            response("response.created", "in_progress", &json!([])),
            response("response.in_progress", "in_progress", &json!([])),
            json!({"type": "response.output_item.added", "item": {"type": "message"}}),
            json!({"type": "response.reasoning_text.delta", "delta": "hmm"}),
            delta("Hel"),
            delta(""),
            delta("lo"),
            json!({"type": "response.output_text.done", "text": "Hello"}),
            json!({"type": "response.audio.delta", "delta": {"odd": true}}),
            response(
                "response.completed",
                "completed",
                &json!([{"type": "reasoning"}, message("Hello")]),
            ),
        ]
    }

    #[test]
    fn a_plain_turn_is_read_with_and_without_event_lines() {
        let expected = vec![
            UpstreamEvent::Accepted(UpstreamRunId("resp_1".to_owned())),
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
                thread: Some(UpstreamThreadId("resp_1".to_owned())),
                refusal: None,
            })),
        ];
        assert_eq!(read(true, plain().iter().map(event)).unwrap(), expected);
        let unnamed = plain().into_iter().map(|data| SseEvent {
            name: None,
            data: data.to_string(),
        });
        assert_eq!(read(true, unnamed).unwrap(), expected);
        assert_eq!(
            ended(&read(false, plain().iter().map(event)).unwrap()).thread,
            None
        );
    }

    #[test]
    fn the_status_decides_and_not_the_name_of_the_event() {
        for (name, status, expected) in [
            ("response.failed", "cancelled", RunStatus::Cancelled),
            ("response.failed", "failed", RunStatus::Failed),
            ("response.completed", "incomplete", RunStatus::Incomplete),
            ("response.future", "completed", RunStatus::Completed),
            ("response.completed", "in_progress", RunStatus::Completed),
            ("response.incomplete", "", RunStatus::Incomplete),
        ] {
            let events = read(
                true,
                [
                    event(&delta("half")),
                    event(&response(name, status, &json!([]))),
                ],
            )
            .unwrap();
            assert_eq!(ended(&events).status, expected, "{name} {status}");
            assert_eq!(ended(&events).content, [text("half")]);
            let well = matches!(expected, RunStatus::Completed | RunStatus::Incomplete);
            assert_eq!(ended(&events).thread.is_some(), well, "{name} {status}");
        }
        let running = read(
            true,
            [event(&response("response.queued", "queued", &json!([])))],
        )
        .unwrap();
        assert_eq!(
            running,
            [UpstreamEvent::Accepted(UpstreamRunId("resp_1".to_owned()))]
        );
    }

    #[test]
    fn the_output_wins_over_the_deltas() {
        let output = json!([
            message("Hello"),
            {"type": "message", "id": "msg_2", "content": [{"type": "refusal", "refusal": "no"}, {"type": "x"}]},
            {"type": "message", "role": "user", "content": [{"type": "output_text", "text": "echo"}]},
        ]);
        let events = read(
            false,
            [
                event(&delta("Helo")),
                event(&response("response.completed", "completed", &output)),
            ],
        )
        .unwrap();
        let refusal = ContentPart::Refusal {
            refusal: "no".to_owned(),
            message: 1,
        };
        assert_eq!(ended(&events).content, [text("Hello"), refusal]);
        assert_eq!(ended(&events).upstream_message_id.as_deref(), Some("msg_2"));
    }

    #[test]
    fn open_function_calls_leave_the_turn_open_and_the_chain_where_it_was() {
        let done = response(
            "response.completed",
            "completed",
            &json!([message("wait"), call()]),
        );
        let events = read(true, [event(&done)]).unwrap();
        assert_eq!(ended(&events).status, RunStatus::RequiresAction);
        assert_eq!(ended(&events).tool_calls[0].id, "call_1");
        assert_eq!(ended(&events).thread, None);

        let answered =
            json!([call(), {"type": "function_call_output", "call_id": "call_1", "output": "1"}]);
        let done = response("response.completed", "completed", &answered);
        assert_eq!(
            ended(&read(true, [event(&done)]).unwrap()).status,
            RunStatus::Completed
        );

        let cut = response("response.incomplete", "incomplete", &json!([call()]));
        let events = read(true, [event(&cut)]).unwrap();
        assert_eq!(ended(&events).status, RunStatus::Incomplete);
        assert_eq!(
            (ended(&events).tool_calls.len(), &ended(&events).thread),
            (1, &None)
        );
    }

    #[test]
    fn a_failure_for_damage_is_a_refusal_only_to_those_who_can_mend_it() {
        let mut failed = response("response.failed", "failed", &json!([]));
        failed["response"]["error"] = json!({"code": "server_error", "message": "No tool output found for function call call_1."});
        let late = json!({"type": "error", "error": failed["response"]["error"]});
        let started = response("response.created", "in_progress", &json!([]));
        let damage = |mut decoder: StreamDecoder, events: &[&Value]| {
            let mut out = VecDeque::new();
            let read = events
                .iter()
                .try_for_each(|data| decoder.read(&event(data), &mut out));
            read.err().and_then(|refusal| refusal.damage)
        };
        for end in [&failed, &late] {
            assert_eq!(
                damage(StreamDecoder::for_repair(false), &[&started, end]),
                Some(Damage::OpenCall)
            );
            assert_eq!(
                damage(
                    StreamDecoder::for_repair(false),
                    &[&started, &delta("half"), end]
                ),
                None
            );
            assert_eq!(damage(StreamDecoder::new(false), &[&started, end]), None);
        }
        failed["response"]["output"] = json!([message("Hello")]);
        assert_eq!(damage(StreamDecoder::for_repair(false), &[&failed]), None);
    }

    #[test]
    fn the_reason_is_told_as_a_word_only() {
        let mut failed = response("response.failed", "failed", &json!([]));
        failed["response"]["error"] = json!({"code": "server_error", "message": "secret"});
        let message = |data: &Value| {
            ended(&read(true, [event(data)]).unwrap())
                .error
                .as_ref()
                .unwrap()
                .message
                .clone()
        };
        assert_eq!(
            message(&failed),
            "the upstream reported that the run failed (server_error)"
        );
        failed["response"]["error"] = json!({"code": "a secret sentence"});
        assert_eq!(
            message(&failed),
            "the upstream reported that the run failed"
        );
        let mut cut = response("response.incomplete", "incomplete", &json!([]));
        cut["response"]["incomplete_details"] = json!({"reason": "max_output_tokens"});
        assert_eq!(
            message(&cut),
            "the upstream ended the reply before it was whole (max_output_tokens)"
        );
    }

    #[test]
    fn an_error_event_refuses_before_acceptance_and_fails_the_run_after() {
        let flat = json!({"type": "error", "code": "rate_limit_exceeded", "message": "m", "param": null, "sequence_number": 3});
        let error = json!({"type": "x", "code": "rate_limit_exceeded", "message": "m"});
        let nested = json!({"type": "error", "error": error});
        let bare = json!({"error": error});
        let wrongly_typed = json!({"type": "rate_limit_error", "error": error});
        let other_events = [
            json!({"type": "response.error", "error": error}),
            json!({"type": "response.failed", "error": error}),
        ];
        for data in [flat, nested, bare, wrongly_typed]
            .into_iter()
            .chain(other_events)
        {
            let error = read(true, [event(&data)]).unwrap_err();
            assert!(
                matches!(error, UpstreamError::Unavailable { status: 429, .. }),
                "{error:?}"
            );
            let started = response("response.created", "in_progress", &json!([]));
            let events =
                read(true, [event(&started), event(&delta("half")), event(&data)]).unwrap();
            assert_eq!(ended(&events).status, RunStatus::Failed);
            assert_eq!(
                ended(&events).error.as_ref().unwrap().message,
                "the upstream reported that the run failed (rate_limit_exceeded)"
            );
            assert_eq!(ended(&events).content, [text("half")]);
        }
        let locked = json!({"type": "error", "code": "conversation_locked", "message": "m"});
        assert!(matches!(
            read(false, [event(&locked)]),
            Err(UpstreamError::Busy { .. })
        ));
    }

    #[test]
    fn unknown_events_and_done_mean_nothing() {
        let raw = |name: Option<&str>, data: &str| SseEvent {
            name: name.map(str::to_owned),
            data: data.to_owned(),
        };
        let events = [
            raw(None, "[DONE]"),
            raw(Some("ping"), "now"),
            raw(Some("keepalive"), "{}"),
            raw(
                None,
                r#"{"type":"response.hologram.delta","delta":{"x":1},"output_index":"a"}"#,
            ),
            raw(None, r#"{"type":7}"#),
            raw(None, "{}"),
        ];
        assert_eq!(read(true, events).unwrap(), []);
        for broken in [
            raw(None, "{"),
            raw(Some("response.completed"), r#"{"response":7}"#),
        ] {
            // Without the end, the stream may have been any reply.
            let (mut decoder, mut out) = (StreamDecoder::new(true), VecDeque::new());
            decoder.read(&broken, &mut out).unwrap();
            assert!(matches!(
                decoder.notes().unended(),
                UpstreamError::Protocol(_)
            ));
            // The whole reply at the end closes the gap; a reply of deltas may have a hole.
            let end = |output| event(&response("response.completed", "completed", &output));
            let whole = [broken.clone(), end(json!([message("Hello")]))];
            assert_eq!(ended(&read(true, whole).unwrap()).content, [text("Hello")]);
            let hole = [event(&delta("Hel")), broken, end(json!([]))];
            assert!(matches!(read(true, hole), Err(UpstreamError::Protocol(_))));
        }
    }

    const NAMES: [&str; 5] = [
        "",
        "error",
        "response.completed",
        "response.output_text.delta",
        "ping",
    ];

    /// Events that a plain run does not have.
    fn odd() -> Vec<Value> {
        let mut failed = response("response.failed", "failed", &json!([]));
        failed["response"]["error"] = json!({"code": "server_error", "message": "No tool output found for function call call_1."});
        vec![
            failed,
            response(
                "response.completed",
                "completed",
                &json!([call(), message("Hello")]),
            ),
            json!({"type": "response.refusal.delta", "output_index": 1, "content_index": 0, "delta": "no"}),
            json!({"type": "error", "code": "conversation_locked", "message": "m", "param": null}),
        ]
    }

    fn transcript() -> String {
        let name = |data: &Value| data["type"].as_str().unwrap_or_default().to_owned();
        let event = |data| format!("event: {}\ndata: {data}\n\n", name(data));
        plain().iter().map(event).collect::<Vec<_>>().concat()
    }

    proptest! {
        #[test]
        fn arbitrary_events_do_not_panic(data in proptest::collection::vec(
            "\\PC{0,30}|\\{\"type\":\"(error|response\\.(created|completed|output_text\\.delta))\",\"(response|delta|error)\":(\\{\\}|\"x\"|[0-9]|\\{\"id\":\"r\"\\})\\}",
            0..10,
        )) {
            for item in data {
                let _ = read(true, [SseEvent { name: None, data: item }]);
            }
        }

        #[test]
        fn events_that_are_nearly_real_are_read_within_bounds(
            events in proptest::collection::vec((0..NAMES.len(), mutated(plain().into_iter().chain(odd()).collect())), 0..16),
        ) {
            let (mut decoder, mut out, mut sent) = (StreamDecoder::for_repair(true), VecDeque::new(), 0);
            for (name, data) in events {
                let event = SseEvent { name: Some(NAMES[name].to_owned()), data: data.to_string() };
                sent += event.data.len();
                let read = decoder.read(&event, &mut out);
                let kept: usize = decoder.streamed.iter().map(ContentPart::size).sum();
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
            ends_once(&read_to_the_end(pieces, StreamDecoder::for_repair(true), 4096))?;
        }
    }
}

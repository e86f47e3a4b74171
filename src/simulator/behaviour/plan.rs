//! The plan of one run, read from directives in the user's text or from a fault.

use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use http::{HeaderValue, StatusCode, header};
use humantime_serde::re::humantime::parse_duration;
use rand::RngExt;
use serde_json::{Value, json};

use crate::simulator::behaviour::hostile::{Hostile, Hostility};
use crate::simulator::behaviour::refusal::Refused;
use crate::simulator::wire::error::{ApiError, json_body};
use crate::simulator::wire::sse::{EventFormat, event_stream};

const OPEN: &str = "[[sim:";
const CLOSE: &str = "]]";
const MAX_WORDS: usize = 1_000_000;

/// The behaviour of one run. The default is a plain reply.
#[derive(Clone, Debug, Default, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of its own")]
pub(in crate::simulator) struct Plan {
    /// The calls to make before the reply.
    pub(in crate::simulator) tools: Vec<PlannedCall>,
    pub(in crate::simulator) outcome: Outcome,
    /// The code of a run that fails before its first word.
    pub(in crate::simulator) failure: Option<String>,
    /// Replaces the configured latency.
    pub(in crate::simulator) latency: Option<Duration>,
    /// Replaces the configured interval between tokens.
    pub(in crate::simulator) interval: Option<Duration>,
    /// Pads the reply to this many words.
    pub(in crate::simulator) words: Option<usize>,
    /// Percentage of the requests with these directives that the directives apply to, at random.
    pub(in crate::simulator) chance: Option<u8>,
    /// Answer with an error status instead of accepting.
    pub(in crate::simulator) status: Option<StatusCode>,
    pub(in crate::simulator) code: Option<String>,
    /// The wording of such an error; by default the protocol's own.
    pub(in crate::simulator) wording: Option<Wording>,
    pub(in crate::simulator) retry_after: Option<String>,
    /// Send a hostile answer instead of accepting.
    pub(in crate::simulator) hostile: Option<Hostile>,
    /// The target of a redirect.
    pub(in crate::simulator) location: Option<String>,
    /// Hold the head of the answer back for this time, while the run works.
    pub(in crate::simulator) late_head: Option<Duration>,
    /// Answer with status 200 and an error in the body, instead of accepting.
    pub(in crate::simulator) bare_error: Option<BareError>,
    /// The type of such an error.
    pub(in crate::simulator) error_type: Option<String>,
    /// Close the connection without an answer.
    pub(in crate::simulator) drop: Option<Drop>,
    /// Close the connection after this many deltas.
    pub(in crate::simulator) cut: Option<usize>,
    /// Send nothing after this many deltas; `Some(0)`: accept and send nothing at all.
    pub(in crate::simulator) silent_after: Option<usize>,
    /// Let a hold take effect after this many deltas, instead of before the first one.
    pub(in crate::simulator) hold_after: Option<usize>,
    /// Accept a cancel that never takes effect.
    pub(in crate::simulator) stuck_cancel: bool,
    /// End the response failed, without output, with this complaint.
    pub(in crate::simulator) complaint: Option<Complaint>,
    pub(in crate::simulator) refusal: bool,
    pub(in crate::simulator) reasoning: bool,
    /// Leave a reasoning item without its successor.
    pub(in crate::simulator) dangling_reasoning: bool,
    /// Send an `error` event in the middle of the reply.
    pub(in crate::simulator) mid_error: Option<ErrorShape>,
    /// End the stream without its last events.
    pub(in crate::simulator) no_terminal: bool,
    /// Number of messages minus one.
    pub(in crate::simulator) more_parts: usize,
    pub(in crate::simulator) format: EventFormat,
    /// Ignore `previous_response_id`.
    pub(in crate::simulator) forget: bool,
    /// Lose the thread, conversation or previous response that the request names.
    pub(in crate::simulator) gone: bool,
    /// Refuse every later run whose history holds this message.
    pub(in crate::simulator) poison: Option<Poison>,
    /// Complete without any output.
    pub(in crate::simulator) empty: bool,
    /// Send an event that is cut off in the middle.
    pub(in crate::simulator) unreadable: bool,
    /// Send the last event twice.
    pub(in crate::simulator) two_ends: bool,
}

/// What a message in a history is refused for.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(in crate::simulator) struct Poison {
    /// The code of the refusal.
    pub(in crate::simulator) code: Option<String>,
}

impl Poison {
    /// Returns the poison in a user's text.
    pub(in crate::simulator) fn of_text(text: &str) -> Option<Self> {
        Plan::of_text(text).ok()?.0.poison
    }

    pub(in crate::simulator) fn refusal(&self) -> ApiError {
        let error = ApiError::invalid("The input cannot be processed.");
        match &self.code {
            Some(code) => error.code(code),
            None => error,
        }
    }
}

/// A call that the client answers.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(in crate::simulator) struct PlannedCall {
    /// The type of the call's item, without `_call`: `function`, `mcp_approval`, `computer`, ….
    pub(in crate::simulator) kind: &'static str,
    pub(in crate::simulator) name: String,
}

/// The types of calls, with their names in directives.
const CALLS: [&str; 7] = [
    "function",
    "custom",
    "mcp_approval",
    "computer",
    "local_shell",
    "shell",
    "apply_patch",
];

impl PlannedCall {
    /// Reads `name`, a function, or `type:name`.
    fn named(text: &str) -> Result<Self, &'static str> {
        let (kind, name) = text.split_once(':').unwrap_or(("function", text));
        let kind = CALLS.into_iter().find(|known| *known == kind);
        Ok(Self {
            kind: kind.ok_or("there is no such type of call")?,
            name: name.to_owned(),
        })
    }
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(in crate::simulator) enum Outcome {
    #[default]
    Complete,
    Fail,
    Incomplete,
}

/// The damage of a conversation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in crate::simulator) enum Complaint {
    OpenCall,
    Reasoning,
}

/// The moment at which a connection is closed without an answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in crate::simulator) enum Drop {
    /// Before the request takes effect.
    Before,
    /// After the request took effect.
    After,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in crate::simulator) enum ErrorShape {
    Flat,
    Nested,
    /// Nested, without an event line and without the type of an event.
    Bare,
}

/// The form of an error that a server, or a proxy in front of it, writes into a stream that it
/// has begun.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in crate::simulator) enum BareError {
    /// `data: {"error": {…}}`.
    Object,
    /// The same, and `data: [DONE]` after it.
    Done,
    /// `data: {"error": "…"}`.
    String,
    /// `data: {"message": …}`.
    Flat,
    /// `data: {"detail": …}`.
    Detail,
    /// `{"error": {…}}`, over several lines, without `data:`.
    Line,
    /// The whole answer is JSON.
    Json,
}

impl BareError {
    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "object" => Self::Object,
            "done" => Self::Done,
            "string" => Self::String,
            "flat" => Self::Flat,
            "detail" => Self::Detail,
            "line" => Self::Line,
            "json" => Self::Json,
            _ => return None,
        })
    }
}

/// The wording of an error by a server or proxy that does not speak the protocol.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in crate::simulator) enum Wording {
    /// The page of a web server.
    Html,
    /// `{"detail": "Not Found"}`, a framework's answer for an unknown endpoint.
    Detail,
    /// `{"detail": "… not found"}`, with the requested id.
    Named,
    /// The protocol's own error, wrapped by a relay.
    Relayed,
    /// `{"error": "…"}`, a text in the place of the error's object.
    String,
}

impl Wording {
    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "html" => Self::Html,
            "detail" => Self::Detail,
            "named" => Self::Named,
            "relayed" => Self::Relayed,
            "string" => Self::String,
            _ => return None,
        })
    }

    fn answer(self, status: StatusCode, asked: &str) -> Response {
        let reason = status.canonical_reason().unwrap_or("Error");
        let (kind, body) = match self {
            Self::Html => {
                let page = format!(
                    "<html><body><h1>{} {reason}</h1></body></html>",
                    status.as_u16()
                );
                ("text/html", page)
            }
            Self::Detail => ("application/json", json!({"detail": reason}).to_string()),
            Self::Named => (
                "application/json",
                json!({"detail": format!("{asked} was not found.")}).to_string(),
            ),
            Self::String => ("application/json", json!({"error": reason}).to_string()),
            Self::Relayed => {
                let told =
                    json!({"error": {"message": format!("Response with id '{asked}' not found.")}});
                let message = format!(
                    "relay.NotFoundError: HostedException - {told}. Received Model Group=m"
                );
                let error = json!({"message": message, "type": null, "param": null, "code": status.as_str()});
                ("application/json", json!({"error": error}).to_string())
            }
        };
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = status;
        response
            .headers_mut()
            .insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        response
    }
}

impl Plan {
    /// Splits `text` into the plan of its directives and the text without them.
    pub(in crate::simulator) fn of_text(text: &str) -> Result<(Self, String), ApiError> {
        let mut plan = Self::default();
        let mut stripped = String::with_capacity(text.len());
        let mut rest = text;
        while let Some((before, after)) = rest.split_once(OPEN) {
            let Some((words, after)) = after.split_once(CLOSE) else {
                break;
            };
            stripped.push_str(before);
            plan.apply(words)
                .map_err(|error| ApiError::invalid(error).code("invalid_directive"))?;
            rest = after;
        }
        stripped.push_str(rest);
        if !plan.is_hit() {
            plan = Self::default();
        }
        Ok((plan, stripped.trim().to_owned()))
    }

    /// Adds the behaviour of the directives in `words`, such as `tool=get_weather rate=20ms`.
    pub(in crate::simulator) fn apply(&mut self, words: &str) -> Result<(), String> {
        for word in words.split_whitespace() {
            let (name, value) = word
                .split_once('=')
                .map_or((word, None), |(name, value)| (name, Some(value)));
            self.apply_word(name, value)
                .map_err(|why| format!("Simulator directive '{word}': {why}."))?;
        }
        Ok(())
    }

    /// Returns the error in a foreign wording, if the plan has one. `asked`: the last segment of
    /// the path.
    pub(in crate::simulator) fn worded(&self, asked: &str) -> Result<(), Refused> {
        match (self.wording, self.status) {
            (Some(wording), Some(status)) => {
                Err(Refused::Told(Box::new(wording.answer(status, asked))))
            }
            _ => Ok(()),
        }
    }

    /// Returns true if the directives apply to this request.
    pub(in crate::simulator) fn is_hit(&self) -> bool {
        self.chance
            .is_none_or(|chance| rand::rng().random_range(0..100) < chance)
    }

    /// Returns the refusal, if the plan refuses the request.
    pub(in crate::simulator) fn refused(&self) -> Result<(), Refused> {
        if let Some(kind) = self.hostile {
            let (status, location, pause) = (self.status, self.location.clone(), self.interval);
            return Err(Refused::Hostile(Hostility {
                kind,
                status,
                location,
                pause,
            }));
        }
        if let Some(shape) = self.bare_error {
            return Err(Refused::Told(Box::new(self.told(shape))));
        }
        if let Some(status) = self.status {
            let error =
                ApiError::of_status(status, self.code.as_deref(), self.retry_after.as_deref());
            return Err(error.into());
        }
        if self.drop == Some(Drop::Before) {
            Err(Refused::Dropped)
        } else {
            Ok(())
        }
    }

    /// Returns the error for a stream whose status cannot carry it.
    pub(in crate::simulator) fn error(&self) -> Value {
        let usual = if self.code.is_none() {
            Some("server_error")
        } else {
            None
        };
        let code = self.code.as_deref().unwrap_or("server_error");
        // Some servers write the code as a number.
        let code = code
            .parse::<u16>()
            .map_or_else(|_| code.into(), Value::from);
        json!({
            "message": "The server had an error while processing your request.",
            "type": self.error_type.as_deref().or(usual), "param": null, "code": code,
        })
    }

    /// Returns the error of a run that fails before its first word.
    pub(in crate::simulator) fn failed(&self) -> Option<Value> {
        let code = self.failure.as_ref()?;
        let pause = self.retry_after.as_deref().unwrap_or("0");
        Some(json!({"code": code, "message": format!("It failed. Please try again in {pause}s.")}))
    }

    fn told(&self, shape: BareError) -> Response {
        let error = self.error();
        let text = match shape {
            BareError::Object => format!("data: {}\n\n", json!({"error": error})),
            BareError::Done => format!("data: {}\n\ndata: [DONE]\n\n", json!({"error": error})),
            BareError::String => {
                format!(
                    "data: {}\n\n",
                    json!({"error": error["message"], "code": error["code"]})
                )
            }
            BareError::Flat => format!("data: {error}\n\n"),
            BareError::Detail => {
                format!(
                    "data: {}\n\n",
                    json!({"detail": error["message"], "code": error["code"]})
                )
            }
            BareError::Line => format!("{:#}\n", json!({"error": error})),
            BareError::Json => return json_body(&json!({"error": error})),
        };
        event_stream(Body::from(text))
    }

    /// Returns true if nothing is ever sent.
    pub(in crate::simulator) fn is_silent(&self) -> bool {
        self.silent_after == Some(0)
    }

    fn apply_word(&mut self, name: &str, value: Option<&str>) -> Result<(), &'static str> {
        let count = || {
            value
                .and_then(|text| text.parse::<usize>().ok())
                .ok_or("expected a number")
        };
        let time = || {
            value
                .and_then(|text| parse_duration(text).ok())
                .ok_or("expected a time such as 20ms")
        };
        let text = || value.map(str::to_owned).ok_or("expected a value");
        match name {
            "tool" => self.tools.push(PlannedCall::named(&text()?)?),
            "tools" => self
                .tools
                .extend((1..=count()?.min(128)).map(|n| PlannedCall {
                    kind: "function",
                    name: format!("function_{n}"),
                })),
            "fail" => {
                self.outcome = Outcome::Fail;
                self.failure = value.map(str::to_owned);
            }
            "incomplete" => self.outcome = Outcome::Incomplete,
            "latency" => self.latency = Some(time()?),
            "rate" => self.interval = Some(time()?),
            "tokens" => self.words = Some(count()?.min(MAX_WORDS)),
            "status" => {
                let status =
                    value
                        .and_then(|text| text.parse().ok())
                        .filter(|status: &StatusCode| {
                            status.is_client_error() || status.is_server_error()
                        });
                self.status = Some(status.ok_or("expected an error status")?);
            }
            "chance" => {
                let chance = count().ok().and_then(|count| u8::try_from(count).ok());
                self.chance = Some(chance.filter(|it| *it <= 100).ok_or("expected 0 to 100")?);
            }
            "code" => self.code = Some(text()?),
            "wording" => {
                let wording = value.and_then(Wording::named);
                self.wording = Some(
                    wording.ok_or("expected `html`, `detail`, `named`, `relayed` or `string`")?,
                );
            }
            "retry_after" => self.retry_after = Some(text()?),
            "hostile" => {
                let kind = value.and_then(Hostile::named);
                self.hostile = Some(kind.ok_or("expected a kind of hostile answer")?);
            }
            "late_head" => self.late_head = Some(time()?),
            "bare_error" => {
                let shape = value.and_then(BareError::named);
                self.bare_error = Some(shape.ok_or("expected the form of an error")?);
            }
            "error_type" => self.error_type = Some(text()?),
            "location" => self.location = Some(text()?),
            "drop" => {
                self.drop = Some(match value {
                    Some("before") => Drop::Before,
                    None | Some("after") => Drop::After,
                    Some(_) => return Err("expected `before` or `after`"),
                });
            }
            "cut" => self.cut = Some(count()?),
            "silent" => self.silent_after = Some(0),
            "silent_after" => self.silent_after = Some(count()?.max(1)),
            "hold_after" => self.hold_after = Some(count()?.max(1)),
            "fail_text" => {
                self.complaint = Some(match value {
                    Some("open_call") => Complaint::OpenCall,
                    Some("reasoning") => Complaint::Reasoning,
                    _ => return Err("expected `open_call` or `reasoning`"),
                });
            }
            "mid_error" => {
                self.mid_error = Some(match value {
                    None | Some("flat") => ErrorShape::Flat,
                    Some("nested") => ErrorShape::Nested,
                    Some("bare") => ErrorShape::Bare,
                    Some(_) => return Err("expected `flat`, `nested` or `bare`"),
                });
            }
            "parts" => self.more_parts = count()?.clamp(1, 16) - 1,
            "poison" => {
                self.poison = Some(Poison {
                    code: value.map(str::to_owned),
                });
            }
            _ => return self.apply_switch(name),
        }
        Ok(())
    }

    /// Applies a directive that has no value.
    fn apply_switch(&mut self, name: &str) -> Result<(), &'static str> {
        match name {
            "stuck_cancel" => self.stuck_cancel = true,
            "refusal" => self.refusal = true,
            "reasoning" => self.reasoning = true,
            "dangling_reasoning" => self.dangling_reasoning = true,
            "no_terminal" => self.no_terminal = true,
            "forget" => self.forget = true,
            "gone" => self.gone = true,
            "empty" => self.empty = true,
            "unreadable" => self.unreadable = true,
            "two_ends" => self.two_ends = true,
            "halves" => self.format.halves = true,
            "crlf" => self.format.crlf = true,
            "no_event_lines" => self.format.no_event_lines = true,
            "split" => self.format.split = true,
            "comments" => self.format.comments = true,
            "unknown_events" => self.format.unknown_events = true,
            _ => return Err("there is no such directive"),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directives_are_taken_out_of_the_text() {
        let (plan, text) =
            Plan::of_text("Weather [[sim: tool=get_weather rate=20ms]] in Paris [[sim: fail]]")
                .unwrap();
        assert_eq!(text, "Weather  in Paris");
        let call = |kind, name: &str| PlannedCall {
            kind,
            name: name.to_owned(),
        };
        assert_eq!(plan.tools, [call("function", "get_weather")]);
        assert_eq!(plan.interval, Some(Duration::from_millis(20)));
        assert_eq!(plan.outcome, Outcome::Fail);
        let (plan, _) = Plan::of_text("[[sim: tool=mcp_approval:find]]").unwrap();
        assert_eq!(plan.tools, [call("mcp_approval", "find")]);
    }

    #[test]
    fn text_without_directives_stays_as_it_is() {
        for text in ["plain [[text]]", "an unclosed [[sim: fail"] {
            assert_eq!(
                Plan::of_text(text).unwrap(),
                (Plan::default(), text.to_owned())
            );
        }
    }

    #[test]
    fn chance_steers_a_share_of_the_requests() {
        let hit = |text: &str| {
            (0..200)
                .filter(|_| Plan::of_text(text).unwrap().0.status.is_some())
                .count()
        };
        assert_eq!(
            (
                hit("[[sim: status=503 chance=0]]"),
                hit("[[sim: status=503 chance=100]]")
            ),
            (0, 200)
        );
        assert!((1..200).contains(&hit("[[sim: status=503 chance=50]]")));
    }

    #[test]
    fn a_misspelt_directive_is_refused() {
        for text in [
            "[[sim: fial]]",
            "[[sim: cut]]",
            "[[sim: status=200]]",
            "[[sim: rate=fast]]",
            "[[sim: fail_text=x]]",
            "[[sim: tool=mcp:find]]",
            "[[sim: hostile]]",
            "[[sim: hostile=x]]",
            "[[sim: bare_error]]",
            "[[sim: wording=x]]",
            "[[sim: bare_error=x]]",
            "[[sim: late_head]]",
            "[[sim: chance=101]]",
        ] {
            assert!(Plan::of_text(text).is_err(), "{text}");
        }
    }
}

//! Answers that are to harm their reader: without end, of absurd size, unreadable, or leading elsewhere.
//!
//! They are made while they are read, and never held in memory. When the reader leaves, nobody asks for more.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use futures_util::{StreamExt, stream};
use http::{HeaderValue, StatusCode, header};

use crate::simulator::wire::operation::Operation;

/// Size of the pieces in which something without end is sent.
const PIECE: usize = 16 * 1024;
/// Size of the huge event.
const HUGE: usize = 1024 * 1024 * 1024;
/// How deep the deep JSON is, in thousands.
const DEPTH: usize = 100;
/// Size of the dense and of the nested JSON: less than a client is known to refuse for its size.
const DENSE: usize = 15 * 1024 * 1024;
/// How deep the values of the nested JSON are: less than a reader is known to refuse for it.
const NESTED: usize = 100;
/// Size of the text on a full page, and values that it has besides: nearly as much as a client is known to read.
const FULL: usize = 14 * 1024 * 1024;
const FULL_VALUES: usize = 100_000;
/// Each full page has an element that was on none before it.
static PAGES: AtomicU64 = AtomicU64::new(0);
/// A word that is in all that is said here, so that a test can see whether it comes through.
const WORD: &str = "quagmire ";
/// Where a redirect leads if nothing else is said: nobody listens there.
const NOWHERE: &str = "http://127.0.0.1:9/";
/// Time between two bytes that drip.
const DRIP: Duration = Duration::from_millis(20);

/// A kind of answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in crate::simulator) enum Hostile {
    EndlessLine,
    EndlessEvents,
    EndlessReply,
    HugeEvent,
    InvalidUtf8,
    DeepJson,
    DenseJson,
    NestedJson,
    FullPage,
    Html,
    Redirect,
    Gzip,
    Drip,
}

impl Hostile {
    pub(in crate::simulator) fn named(name: &str) -> Option<Self> {
        Some(match name {
            "endless_line" => Self::EndlessLine,
            "endless_events" => Self::EndlessEvents,
            "endless_reply" => Self::EndlessReply,
            "huge_event" => Self::HugeEvent,
            "invalid_utf8" => Self::InvalidUtf8,
            "deep_json" => Self::DeepJson,
            "dense_json" => Self::DenseJson,
            "nested_json" => Self::NestedJson,
            "full_page" => Self::FullPage,
            "html" => Self::Html,
            "redirect" => Self::Redirect,
            "gzip" => Self::Gzip,
            "drip" => Self::Drip,
            _ => return None,
        })
    }
}

/// An answer that is to be given.
#[derive(Clone, Debug)]
pub(in crate::simulator) struct Hostility {
    pub(in crate::simulator) kind: Hostile,
    /// Instead of 200.
    pub(in crate::simulator) status: Option<StatusCode>,
    pub(in crate::simulator) location: Option<String>,
    /// Between two bytes that drip.
    pub(in crate::simulator) pause: Option<Duration>,
}

/// What the reader expects.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Form {
    RunEvents,
    ResponseEvents,
    Json,
}

type Pieces = BoxStream<'static, Bytes>;

impl Hostility {
    pub(in crate::simulator) fn answer(&self, operation: Operation) -> Response {
        let form = Form::of(operation);
        let body = self.pieces(form).map(Ok::<_, io::Error>);
        let mut response = Response::new(Body::from_stream(body));
        let kind = match (self.kind, form) {
            (Hostile::Html, _) => "text/html",
            (_, Form::Json) => "application/json",
            _ => "text/event-stream",
        };
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        match self.kind {
            Hostile::Gzip => {
                headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            }
            Hostile::HugeEvent if form == Form::Json => {
                headers.insert(header::CONTENT_LENGTH, HUGE.into());
            }
            Hostile::Redirect => {
                let location = self.location.as_deref().unwrap_or(NOWHERE);
                let location = HeaderValue::from_str(location);
                headers.insert(
                    header::LOCATION,
                    location.unwrap_or(HeaderValue::from_static(NOWHERE)),
                );
            }
            _ => {}
        }
        let usual = if self.kind == Hostile::Redirect {
            StatusCode::TEMPORARY_REDIRECT
        } else {
            StatusCode::OK
        };
        *response.status_mut() = self.status.unwrap_or(usual);
        response
    }

    fn pieces(&self, form: Form) -> Pieces {
        let filler = || Bytes::from(filled(WORD));
        match self.kind {
            Hostile::EndlessLine => begun(form.begun_text())
                .chain(stream::repeat(filler()))
                .boxed(),
            Hostile::EndlessEvents | Hostile::EndlessReply if form == Form::Json => {
                let element = format!("{{\"id\":\"{WORD}\"}},");
                begun("{\"object\":\"list\",\"data\":[")
                    .chain(stream::repeat(filled(&element).into()))
                    .boxed()
            }
            Hostile::EndlessEvents => {
                let event = format!("event: {}\ndata: {{\"text\":\"{WORD}\"}}\n\n", WORD.trim());
                stream::repeat(filled(&event).into()).boxed()
            }
            Hostile::EndlessReply => {
                let more = stream::iter(0_u64..).map(move |number| form.refusal(number).into());
                begun(form.accepted("\"in_progress\"")).chain(more).boxed()
            }
            Hostile::HugeEvent if form == Form::Json => {
                let text = stream::repeat(filler()).scan(HUGE, |left, piece: Bytes| {
                    let some = piece.slice(..piece.len().min(*left));
                    *left -= some.len();
                    std::future::ready(Some(some).filter(|some| !some.is_empty()))
                });
                text.boxed()
            }
            Hostile::HugeEvent => {
                let lines = filled(&format!("data: {}\n", WORD.repeat(10)));
                let count = HUGE / lines.len() + 1;
                stream::repeat(Bytes::from(lines))
                    .take(count)
                    .chain(begun("\n"))
                    .boxed()
            }
            Hostile::InvalidUtf8 => {
                let (before, after) = form.around_value();
                stream::iter([
                    before.into(),
                    Bytes::from_static(b"\"\xff\xfe\""),
                    after.into(),
                ])
                .boxed()
            }
            Hostile::DeepJson => {
                let (before, after) = form.around_value();
                let levels = |text: &str| stream::repeat(text.repeat(500).into()).take(DEPTH);
                let (opened, closed) = (levels("[{\"a\":"), levels("}]"));
                begun(before)
                    .chain(opened)
                    .chain(begun("0"))
                    .chain(closed)
                    .chain(begun(after))
                    .boxed()
            }
            Hostile::DenseJson => form.dense("0,"),
            Hostile::NestedJson => form.dense(&format!(
                "{}0{},",
                "{\"\":".repeat(NESTED),
                "}".repeat(NESTED)
            )),
            Hostile::FullPage => {
                let number = PAGES.fetch_add(1, Ordering::Relaxed);
                let half = || stream::repeat(filler()).take(FULL / 2 / PIECE);
                // A message as both protocols have it, each of which passes over the other's part.
                let before = format!(
                    "{{\"object\":\"list\",\"has_more\":true,\"data\":[{{\"id\":\"msg_{number}\",\"object\":\"thread.message\",\
                     \"type\":\"message\",\"role\":\"assistant\",\"content\":[{{\"type\":\"output_text\",\"text\":\""
                );
                let between = "\"},{\"type\":\"text\",\"text\":{\"annotations\":[],\"value\":\"";
                let zeros = format!("\"}}}}],\"zeros\":[{}0]}}]}}", "0,".repeat(FULL_VALUES));
                begun(before)
                    .chain(half())
                    .chain(begun(between))
                    .chain(half())
                    .chain(begun(zeros))
                    .boxed()
            }
            Hostile::Html => {
                begun(format!("<!doctype html><title>{WORD}</title><p>Sign in.")).boxed()
            }
            Hostile::Redirect => begun(WORD).boxed(),
            Hostile::Gzip => {
                let (begin, more) = bomb();
                begun(begin)
                    .chain(stream::repeat(filled_with(&more).into()))
                    .boxed()
            }
            Hostile::Drip => {
                let pause = self.pause.unwrap_or(DRIP);
                let drops = stream::repeat(Bytes::from_static(b"q")).then(move |drop| async move {
                    tokio::time::sleep(pause).await;
                    drop
                });
                begun(form.begun_text()).chain(drops).boxed()
            }
        }
    }
}

impl Form {
    fn of(operation: Operation) -> Self {
        match operation {
            Operation::CreateResponse => Self::ResponseEvents,
            operation if operation.generates() => Self::RunEvents,
            _ => Self::Json,
        }
    }

    /// The beginning of a text that has no end yet.
    const fn begun_text(self) -> &'static str {
        match self {
            Self::RunEvents | Self::ResponseEvents => "data: ",
            Self::Json => "{\"id\":\"",
        }
    }

    /// A list of nothing but this element, which ends with a comma.
    fn dense(self, element: &str) -> Pieces {
        let (before, after) = self.around_value();
        let elements = stream::repeat(Bytes::from(filled(element))).take(DENSE / PIECE);
        begun(before)
            .chain(begun("["))
            .chain(elements)
            .chain(begun("0]"))
            .chain(begun(after))
            .boxed()
    }

    /// The event that says that a run was accepted, which nobody else knows of. `status` is JSON.
    fn accepted(self, status: &str) -> String {
        let (before, after) = self.around_value();
        [before, status, after].concat()
    }

    /// What stands before and behind a value that every reader reads.
    const fn around_value(self) -> (&'static str, &'static str) {
        match self {
            Self::RunEvents => (
                "event: thread.run.created\ndata: {\"id\":\"run_quagmire\",\"object\":\"thread.run\",\"status\":",
                "}\n\n",
            ),
            Self::ResponseEvents => (
                "event: response.created\ndata: {\"type\":\"response.created\",\"response\":{\"id\":\"resp_quagmire\",\"status\":",
                "}}\n\n",
            ),
            Self::Json => ("{\"id\":", "}"),
        }
    }

    /// A piece of the reply, in a place of its own.
    fn refusal(self, number: u64) -> String {
        let text = WORD.repeat(100);
        match self {
            Self::RunEvents => format!(
                "event: thread.message.delta\ndata: {{\"id\":\"msg_{number}\",\"object\":\"thread.message.delta\",\
                 \"delta\":{{\"content\":[{{\"index\":0,\"type\":\"refusal\",\"refusal\":\"{text}\"}}]}}}}\n\n"
            ),
            _ => format!(
                "data: {{\"type\":\"response.refusal.delta\",\"sequence_number\":{number},\"output_index\":{number},\
                 \"content_index\":0,\"delta\":\"{text}\"}}\n\n"
            ),
        }
    }
}

fn begun(bytes: impl Into<Bytes>) -> Pieces {
    let bytes = bytes.into();
    stream::once(std::future::ready(bytes)).boxed()
}

/// So many of `unit` as fit into a piece.
fn filled(unit: &str) -> Vec<u8> {
    filled_with(unit.as_bytes())
}

fn filled_with(unit: &[u8]) -> Vec<u8> {
    unit.repeat(PIECE / unit.len())
}

/// A gzip stream that unpacks to one letter, over and over: how it begins, and what is then repeated for ever. Each of
/// its bytes makes 158.
fn bomb() -> (Vec<u8>, Vec<u8>) {
    /// Deflate's fixed code for "the 258 bytes from one byte back".
    const COPY: &str = "1100010100000";
    /// Of a block with the fixed code that is not the last one, and in it the letter `q`.
    const BEGIN: &str = "01010100001";
    let header = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3];
    let begin = [&header[..], &packed(&[BEGIN, COPY].concat())].concat();
    (begin, packed(&COPY.repeat(8)))
}

/// Bits, the lowest of each byte first.
fn packed(bits: &str) -> Vec<u8> {
    let byte = |bits: &[u8]| {
        bits.iter()
            .rev()
            .fold(0, |byte, bit| (byte << 1) | (bit - b'0'))
    };
    bits.as_bytes().chunks(8).map(byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bomb_is_made_of_whole_bytes() {
        let (begin, more) = bomb();
        assert_eq!(begin[10..], [0x2a, 0x1c, 0x05]);
        assert_eq!(more.len(), 13);
    }
}

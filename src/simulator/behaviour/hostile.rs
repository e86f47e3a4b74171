//! Answers that harm their reader: endless, huge, unreadable, or a redirect.
//!
//! They are generated as the reader reads, and never held in memory. They end when the reader
//! leaves.

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

/// Bytes of a chunk of an endless answer.
const PIECE: usize = 16 * 1024;
/// Bytes of the huge event.
const HUGE: usize = 1024 * 1024 * 1024;
/// Nesting of the deep JSON, in thousands.
const DEPTH: usize = 100;
/// Bytes of the dense and of the nested JSON. They are fewer than the size that clients are known
/// to refuse.
const DENSE: usize = 15 * 1024 * 1024;
/// Nesting of the values in the nested JSON. It is less than the depth that readers are known to
/// refuse.
const NESTED: usize = 100;
/// Bytes of text on a full page. They are nearly as many as clients are known to read.
const FULL: usize = 14 * 1024 * 1024;
/// Values on a full page besides its text.
const FULL_VALUES: usize = 100_000;
/// Counts the full pages, because each one needs an element that no earlier page had.
static PAGES: AtomicU64 = AtomicU64::new(0);
/// A word in every hostile answer, by which a test can see whether content comes through.
const WORD: &str = "quagmire ";
/// The default target of a redirect, where nothing listens.
const NOWHERE: &str = "http://127.0.0.1:9/";
/// Time between two bytes of the dripping answer.
const DRIP: Duration = Duration::from_millis(20);

/// A kind of hostile answer.
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

/// A hostile answer to be sent.
#[derive(Clone, Debug)]
pub(in crate::simulator) struct Hostility {
    pub(in crate::simulator) kind: Hostile,
    /// Status in the place of 200.
    pub(in crate::simulator) status: Option<StatusCode>,
    pub(in crate::simulator) location: Option<String>,
    /// Time between two bytes of the dripping answer.
    pub(in crate::simulator) pause: Option<Duration>,
}

/// The form of answer that the reader expects.
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
                // A message in the shapes of both protocols. Each protocol ignores the other's
                // part.
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

    /// Returns the beginning of a text that has no end yet.
    const fn begun_text(self) -> &'static str {
        match self {
            Self::RunEvents | Self::ResponseEvents => "data: ",
            Self::Json => "{\"id\":\"",
        }
    }

    /// Returns a list that repeats this element, which ends with a comma.
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

    /// Returns the event that announces an accepted run, which exists nowhere else. `status` is
    /// JSON.
    fn accepted(self, status: &str) -> String {
        let (before, after) = self.around_value();
        [before, status, after].concat()
    }

    /// Returns the text before and after a value that every reader parses.
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

    /// Returns a piece of the reply, in a place of its own.
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

/// Repeats `unit` as often as it fits into a chunk.
fn filled(unit: &str) -> Vec<u8> {
    filled_with(unit.as_bytes())
}

fn filled_with(unit: &[u8]) -> Vec<u8> {
    unit.repeat(PIECE / unit.len())
}

/// Returns the beginning of a gzip stream that unpacks to one letter, and the bytes to repeat for
/// ever. Each repeated byte unpacks to 158.
fn bomb() -> (Vec<u8>, Vec<u8>) {
    /// Deflate's fixed code for "copy 258 bytes from one byte back".
    const COPY: &str = "1100010100000";
    /// The header of a block with the fixed code that is not the last one, and the letter `q`.
    const BEGIN: &str = "01010100001";
    let header = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3];
    let begin = [&header[..], &packed(&[BEGIN, COPY].concat())].concat();
    (begin, packed(&COPY.repeat(8)))
}

/// Packs bits into bytes, lowest bit first.
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

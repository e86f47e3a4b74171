//! Writes event streams, in the format that a run asks for, to a connection or to a log.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderValue, header};
use serde::Serialize;
use tokio::sync::{mpsc, watch};

/// Bytes that the buffer holds back while no pause is due, so that an instant reply is one write.
const FLUSH_AT: usize = 16 * 1024;

/// The halves of a character that needs two UTF-16 units, as they stand in a text. In an event each
/// becomes the escape of half a surrogate pair.
pub(in crate::simulator) const HALVES: [char; 2] = ['\u{e000}', '\u{e001}'];
const ESCAPES: [&str; 2] = ["\\ud83d", "\\ude42"];
/// The character whose halves these are.
pub(in crate::simulator) const CUT: char = '🙂';

type Chunk = Result<Bytes, io::Error>;

/// The format of events.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of its own")]
pub(in crate::simulator) struct EventFormat {
    pub(in crate::simulator) crlf: bool,
    pub(in crate::simulator) no_event_lines: bool,
    pub(in crate::simulator) split: bool,
    pub(in crate::simulator) comments: bool,
    pub(in crate::simulator) unknown_events: bool,
    pub(in crate::simulator) halves: bool,
}

/// The destination of a run's events.
#[derive(Debug)]
pub(in crate::simulator) struct EventOut {
    target: Target,
    buffer: Vec<u8>,
    format: EventFormat,
    muted: bool,
}

#[derive(Debug)]
enum Target {
    Nobody,
    Connection(mpsc::UnboundedSender<Chunk>),
    Log(Arc<EventLog>),
}

impl EventOut {
    /// Discards all events.
    pub(in crate::simulator) fn nobody() -> Self {
        Self::new(Target::Nobody, EventFormat::default())
    }

    /// Sends the events as the body of the returned response. [`cut`](Self::cut) breaks its
    /// connection.
    pub(in crate::simulator) fn connection(format: EventFormat) -> (Self, Response) {
        let (sender, receiver) = mpsc::unbounded_channel::<Chunk>();
        let body = Body::from_stream(stream::unfold(receiver, |mut receiver| async {
            let chunk = receiver.recv().await?;
            if chunk.is_err() {
                let_out().await;
            }
            Some((chunk, receiver))
        }));
        (
            Self::new(Target::Connection(sender), format),
            event_stream(body),
        )
    }

    /// Keeps the events for any number of readers.
    pub(in crate::simulator) fn log(log: Arc<EventLog>, format: EventFormat) -> Self {
        Self::new(Target::Log(log), format)
    }

    fn new(target: Target, format: EventFormat) -> Self {
        Self {
            target,
            buffer: Vec::new(),
            format,
            muted: false,
        }
    }

    /// Sends one event. It may stay in the buffer until [`flush`](Self::flush).
    pub(in crate::simulator) fn emit(&mut self, event: &str, data: &impl Serialize) {
        if !self.is_listening() {
            return;
        }
        let mut data = serde_json::to_string(data).expect("the simulator's objects are plain JSON");
        if self.format.halves {
            for (half, escape) in HALVES.into_iter().zip(ESCAPES) {
                data = data.replace(half, escape);
            }
        }
        self.emit_text(event, &data);
    }

    /// Sends one event whose data is not JSON.
    pub(in crate::simulator) fn emit_text(&mut self, event: &str, data: &str) {
        if !self.is_listening() {
            return;
        }
        let newline = if self.format.crlf { "\r\n" } else { "\n" };
        if self.format.comments {
            self.push(&[": keep-alive", newline, newline, ":", newline]);
        }
        if !self.format.no_event_lines {
            self.push(&["event: ", event, newline]);
        }
        self.push(&["data: ", data, newline, newline]);
        match &self.target {
            Target::Log(log) => log.push(Bytes::from(std::mem::take(&mut self.buffer))),
            Target::Connection(_) if self.buffer.len() >= FLUSH_AT => self.flush(),
            Target::Connection(_) | Target::Nobody => {}
        }
    }

    /// Sends data without an event line.
    pub(in crate::simulator) fn emit_bare(&mut self, data: &impl Serialize) {
        self.format.no_event_lines = true;
        self.emit("", data);
    }

    /// Returns true if the events have a destination.
    pub(in crate::simulator) fn is_listening(&self) -> bool {
        !self.muted && !matches!(self.target, Target::Nobody)
    }

    /// Returns true if the run asks for events that no client knows.
    pub(in crate::simulator) fn wants_unknown_events(&self) -> bool {
        self.format.unknown_events
    }

    /// Sends nothing from now on, not even the buffer. The connection stays open.
    pub(in crate::simulator) fn mute(&mut self) {
        self.muted = true;
        self.buffer.clear();
    }

    /// Passes the buffer to the connection.
    pub(in crate::simulator) fn flush(&mut self) {
        let Target::Connection(sender) = &self.target else {
            return;
        };
        if self.buffer.is_empty() {
            return;
        }
        let bytes = Bytes::from(std::mem::take(&mut self.buffer));
        if !self.format.split {
            let _ = sender.send(Ok(bytes)); // the reader has left; `gone` reports that
            return;
        }
        for piece in pieces(&bytes) {
            let _ = sender.send(Ok(piece));
        }
    }

    /// Breaks the connection without an end of the body. Later events are discarded, except by a
    /// log.
    pub(in crate::simulator) fn cut(&mut self) {
        self.flush();
        if let Target::Connection(sender) = &self.target {
            let _ = sender.send(Err(io::Error::other(
                "a directive asked the simulator to cut the connection",
            )));
            self.target = Target::Nobody;
        }
    }

    /// Ends the body properly.
    pub(in crate::simulator) fn finish(&mut self) {
        self.flush();
        if let Target::Log(log) = &self.target {
            log.finish();
        }
        self.target = Target::Nobody;
    }

    /// Returns true if the client has left; always false without a connection.
    pub(in crate::simulator) fn is_gone(&self) -> bool {
        matches!(&self.target, Target::Connection(sender) if sender.is_closed())
    }

    /// Waits until the client has left; for ever without a connection. May be dropped.
    pub(in crate::simulator) async fn gone(&self) {
        match &self.target {
            Target::Connection(sender) => sender.closed().await,
            Target::Nobody | Target::Log(_) => std::future::pending().await,
        }
    }
}

/// The events of one background response, numbered from 0, with any number of readers.
#[derive(Debug)]
pub(in crate::simulator) struct EventLog {
    frames: Mutex<VecDeque<Bytes>>,
    /// The number of frames, and whether there will be no more.
    progress: watch::Sender<(usize, bool)>,
}

impl EventLog {
    pub(in crate::simulator) fn new() -> Arc<Self> {
        Arc::new(Self {
            frames: Mutex::default(),
            progress: watch::Sender::new((0, false)),
        })
    }

    /// Streams the events from number `from` on, then live ones until the last. After `cut`
    /// events the connection breaks.
    pub(in crate::simulator) fn follow(
        self: &Arc<Self>,
        from: usize,
        cut: Option<usize>,
        split: bool,
    ) -> Response {
        let reader = Reader {
            log: Arc::clone(self),
            next: from,
            cut,
            split: split.then(VecDeque::new),
        };
        event_stream(Body::from_stream(stream::unfold(reader, Reader::next)))
    }

    /// Returns all frames so far.
    pub(in crate::simulator) fn text(&self) -> String {
        let frames = self.frames.lock().unwrap_or_else(PoisonError::into_inner);
        frames
            .iter()
            .map(|frame| String::from_utf8_lossy(frame))
            .collect()
    }

    fn push(&self, frame: Bytes) {
        self.frames
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back(frame);
        self.progress.send_modify(|progress| progress.0 += 1);
    }

    fn finish(&self) {
        self.progress.send_modify(|progress| progress.1 = true);
    }
}

struct Reader {
    log: Arc<EventLog>,
    next: usize,
    cut: Option<usize>,
    /// Pieces that are still to be sent, if frames are split.
    split: Option<VecDeque<Bytes>>,
}

impl Reader {
    async fn next(mut self) -> Option<(Chunk, Self)> {
        if let Some(piece) = self.split.as_mut().and_then(VecDeque::pop_front) {
            return Some((Ok(piece), self));
        }
        if self.cut == Some(0) {
            self.cut = None;
            self.next = usize::MAX;
            let_out().await;
            return Some((
                Err(io::Error::other(
                    "a directive asked the simulator to cut the connection",
                )),
                self,
            ));
        }
        let mut progress = self.log.progress.subscribe();
        let next = self.next;
        let state = *progress
            .wait_for(|(count, ended)| *count > next || *ended)
            .await
            .ok()?;
        if state.0 <= next {
            return None;
        }
        let chunk: Vec<u8> = {
            let frames = self
                .log
                .frames
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let take = self.cut.unwrap_or(usize::MAX).min(frames.len() - next);
            self.next += take;
            self.cut = self.cut.map(|left| left - take);
            frames.range(next..next + take).flatten().copied().collect()
        };
        let chunk = Bytes::from(chunk);
        let Some(queue) = &mut self.split else {
            return Some((Ok(chunk), self));
        };
        queue.extend(pieces(&chunk));
        let first = queue.pop_front()?;
        Some((Ok(first), self))
    }
}

/// Cuts bytes into pieces of one to three, so that lines and characters are torn apart.
fn pieces(bytes: &Bytes) -> impl Iterator<Item = Bytes> {
    let (mut rest, mut size) = (bytes.clone(), 0);
    std::iter::from_fn(move || {
        size = size % 3 + 1;
        let piece = rest.split_to(size.min(rest.len()));
        (!piece.is_empty()).then_some(piece)
    })
}

/// Lets the connection write its chunks. An error right behind a chunk would swallow it.
async fn let_out() {
    tokio::task::yield_now().await;
}

pub(in crate::simulator) fn event_stream(body: Body) -> Response {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream; charset=utf-8"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

impl EventOut {
    fn push(&mut self, parts: &[&str]) {
        for part in parts {
            self.buffer.extend_from_slice(part.as_bytes());
        }
    }
}

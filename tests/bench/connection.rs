//! A connection to the server that answers messages.

use std::net::SocketAddr;

use memchr::memmem;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::answers::Asked;

/// End of the event line of a piece of a reply: the gateway's `message.delta`, or an upstream's
/// `response.output_text.delta`.
const PIECE: &[u8] = b".delta\n";

/// The end of a stream: its chunks end with an empty one.
const LAST_CHUNK: &[u8] = b"\r\n0\r\n\r\n";

/// A connection that stays open for many messages.
pub(crate) struct Connection {
    address: SocketAddr,
    stream: TcpStream,
    /// The part of the last answer that has arrived.
    buffer: Vec<u8>,
    /// When the first piece of the last answer arrived.
    first: Option<Instant>,
}

impl Connection {
    pub(crate) async fn open(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self {
            address,
            stream,
            buffer: Vec::with_capacity(4096),
            first: None,
        }
    }

    /// The same as [`ask`](Self::ask), with times. `since` is when the message was due.
    pub(crate) async fn timed(&mut self, message: &str, since: Instant) -> Asked {
        let status = self.ask(message).await;
        let asked = Asked {
            status,
            since,
            first: self.first,
            until: Instant::now(),
        };
        if status.is_none() {
            *self = Self::open(self.address).await;
        }
        asked
    }

    /// The body of the last answer.
    pub(crate) fn body(&self) -> &[u8] {
        let (_, _, begin) = head_in(&self.buffer).unwrap();
        &self.buffer[begin..]
    }

    /// Sends a message and reads the whole answer. Returns its status, or `None` if the
    /// connection broke.
    pub(crate) async fn ask(&mut self, message: &str) -> Option<u16> {
        self.send(message, whole_answer_in).await
    }

    /// Sends a message and reads the head of the answer. Returns its status, or `None` if the
    /// connection broke.
    pub(crate) async fn begin(&mut self, message: &str) -> Option<u16> {
        self.send(message, |bytes| Some(head_in(bytes)?.0)).await
    }

    /// Reads the rest of an answer, and drops it.
    pub(crate) async fn read_on(&mut self) {
        while !self.buffer.ends_with(LAST_CHUNK) {
            self.buffer.clear();
            if !matches!(self.stream.read_buf(&mut self.buffer).await, Ok(1..)) {
                return;
            }
        }
    }

    /// Sends a message and reads until `answer_in` finds the status of a sufficient answer.
    async fn send(&mut self, message: &str, answer_in: fn(&[u8]) -> Option<u16>) -> Option<u16> {
        self.stream.write_all(message.as_bytes()).await.ok()?;
        self.buffer.clear();
        self.first = None;
        loop {
            if self.first.is_none() && memmem::find(&self.buffer, PIECE).is_some() {
                self.first = Some(Instant::now());
            }
            if let Some(status) = answer_in(&self.buffer) {
                return Some(status);
            }
            if self.stream.read_buf(&mut self.buffer).await.ok()? == 0 {
                return None;
            }
        }
    }
}

/// Returns a request with a JSON body. `head` has further lines of its head.
pub(crate) fn post(path: &str, head: &str, body: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n{head}content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Returns status, head and length of the head, once all of it has arrived.
fn head_in(bytes: &[u8]) -> Option<(u16, &str, usize)> {
    let length = memmem::find(bytes, b"\r\n\r\n")? + 4;
    let head = std::str::from_utf8(&bytes[..length]).ok()?;
    Some((head.split(' ').nth(1)?.parse().ok()?, head, length))
}

/// Returns the status of an answer, once all of it has arrived.
fn whole_answer_in(bytes: &[u8]) -> Option<u16> {
    let (status, head, begin) = head_in(bytes)?;
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        // A proxy may write the name in capitals.
        if name.eq_ignore_ascii_case("content-length") {
            value.parse::<usize>().ok()
        } else {
            None
        }
    });
    let is_whole = match length {
        Some(length) => bytes.len() >= begin + length,
        None => bytes.ends_with(LAST_CHUNK),
    };
    is_whole.then_some(status)
}

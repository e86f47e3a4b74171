//! A connection to what answers messages.

use std::net::SocketAddr;

use memchr::memmem;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::answers::Asked;

/// Ends the event line of a piece of a reply: `message.delta` of the gateway, `response.output_text.delta` of an
/// upstream.
const PIECE: &[u8] = b".delta\n";

/// A stream comes in chunks, of which the last is empty.
const LAST_CHUNK: &[u8] = b"\r\n0\r\n\r\n";

/// A connection that is kept open from one message to the next.
pub(crate) struct Connection {
    address: SocketAddr,
    stream: TcpStream,
    /// The last answer, as far as it has come.
    buffer: Vec<u8>,
    /// When its first piece came.
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

    /// The same as `ask`, and when. `since`: when the message was to be sent.
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

    /// The status, once the whole answer is there; `None` if the connection broke.
    pub(crate) async fn ask(&mut self, message: &str) -> Option<u16> {
        self.send(message, whole_answer_in).await
    }

    /// The status, once the head of the answer is there; `None` if the connection broke.
    pub(crate) async fn begin(&mut self, message: &str) -> Option<u16> {
        self.send(message, |bytes| Some(head_in(bytes)?.0)).await
    }

    /// Reads the rest of an answer, and forgets it.
    pub(crate) async fn read_on(&mut self) {
        while !self.buffer.ends_with(LAST_CHUNK) {
            self.buffer.clear();
            if !matches!(self.stream.read_buf(&mut self.buffer).await, Ok(1..)) {
                return;
            }
        }
    }

    /// `answer_in` tells the status of an answer as soon as there is enough of it.
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

/// A request with a body in JSON. `head`: further lines of its head.
pub(crate) fn post(path: &str, head: &str, body: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n{head}content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// The status, the head and its length, once all of it is there.
fn head_in(bytes: &[u8]) -> Option<(u16, &str, usize)> {
    let length = memmem::find(bytes, b"\r\n\r\n")? + 4;
    let head = std::str::from_utf8(&bytes[..length]).ok()?;
    Some((head.split(' ').nth(1)?.parse().ok()?, head, length))
}

/// The status of an answer, once all of it is there.
fn whole_answer_in(bytes: &[u8]) -> Option<u16> {
    let (status, head, begin) = head_in(bytes)?;
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        // A proxy writes it in capitals.
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

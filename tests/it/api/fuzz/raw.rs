//! A client that sends exactly the given bytes.

use reqwest::StatusCode;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use super::{PATIENCE, READS_FOR};

#[derive(Debug)]
pub(super) struct Response {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Vec<u8>,
}

/// Sends these bytes on a new connection, and reads the answer to its end. Of an event stream it
/// reads only for a while.
pub(super) async fn send(address: &str, bytes: &[u8]) -> Result<Response, String> {
    let mut connection = TcpStream::connect(address)
        .await
        .map_err(|error| error.to_string())?;
    connection
        .set_nodelay(true)
        .map_err(|error| error.to_string())?;
    let (mut reads, mut writes) = connection.split();
    // The gateway may answer and close before it has read everything.
    let sends = async { drop(writes.write_all(bytes).await) };
    let receives = async {
        let mut received = Vec::new();
        let mut until = Instant::now() + PATIENCE;
        let mut streams = false;
        let mut chunk = vec![0; 64 * 1024];
        loop {
            match timeout_at(until, reads.read(&mut chunk)).await {
                Err(_) if streams => break,
                Err(_) => return Err(format!("no end of the answer: {}", received.escape_ascii())),
                // What arrived before a reset counts.
                Ok(Ok(0) | Err(_)) => break,
                Ok(Ok(length)) => received.extend_from_slice(&chunk[..length]),
            }
            if !streams && contains(&received, b"text/event-stream") {
                streams = true;
                until = Instant::now() + READS_FOR;
            }
        }
        parse(&received, streams)
    };
    tokio::join!(sends, receives).1
}

fn parse(mut bytes: &[u8], may_be_cut: bool) -> Result<Response, String> {
    loop {
        let unreadable = || format!("no answer: {}", bytes.escape_ascii());
        let end = find(bytes, b"\r\n\r\n").ok_or_else(unreadable)?;
        let head = std::str::from_utf8(&bytes[..end]).map_err(|_| unreadable())?;
        let mut lines = head.split("\r\n");
        let status = lines
            .next()
            .and_then(|line| line.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok());
        let status =
            StatusCode::from_u16(status.ok_or_else(unreadable)?).map_err(|_| unreadable())?;
        let mut headers = HeaderMap::new();
        for line in lines {
            let (name, value) = line.split_once(':').ok_or_else(unreadable)?;
            let name = name.parse::<HeaderName>().map_err(|_| unreadable())?;
            headers.append(
                name,
                value
                    .trim()
                    .parse::<HeaderValue>()
                    .map_err(|_| unreadable())?,
            );
        }
        bytes = &bytes[end + 4..];
        if status.is_informational() {
            continue;
        }
        let body = if headers
            .get("transfer-encoding")
            .is_some_and(|it| it == "chunked")
        {
            unchunked(bytes, may_be_cut)?
        } else {
            bytes.to_vec()
        };
        return Ok(Response {
            status,
            headers,
            body,
        });
    }
}

fn unchunked(mut bytes: &[u8], may_be_cut: bool) -> Result<Vec<u8>, String> {
    let mut body = Vec::new();
    loop {
        let size = find(bytes, b"\r\n").and_then(|end| {
            let size = usize::from_str_radix(std::str::from_utf8(&bytes[..end]).ok()?, 16).ok()?;
            Some((size, end + 2))
        });
        match size {
            Some((0, _)) => return Ok(body),
            Some((size, from)) if bytes.len() >= from + size + 2 => {
                body.extend_from_slice(&bytes[from..from + size]);
                bytes = &bytes[from + size + 2..];
            }
            _ if may_be_cut => return Ok(body),
            _ => {
                return Err(format!(
                    "the answer broke off after {}",
                    body.escape_ascii()
                ));
            }
        }
    }
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes
        .windows(wanted.len())
        .position(|window| window == wanted)
}

fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    let head = find(bytes, b"\r\n\r\n").unwrap_or(0);
    find(&bytes[..head], wanted).is_some()
}

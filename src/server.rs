//! The sockets of the HTTP server. It accepts connections and serves a router on each. Limits protect it
//! from slow, silent and numerous clients. HTTP/1.1 only: TLS and HTTP/2 are for the load balancer.

mod linger;
mod stall;

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use bytes::Bytes;
use http::header::{CONNECTION, HOST};
use http::uri::Authority;
use http::{HeaderValue, Request, Response, StatusCode, Version};
use hyper::body::{Body as _, Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

use crate::config::ServerConfig;
use linger::linger;
use stall::StallGuard;

pub use linger::{LINGER_BYTES, LINGER_SILENCE, LINGER_TIME};

/// Number of header fields in a request.
const MAX_HEADERS: usize = 100;
/// Unread rest of a body, in bytes, up to which the connection is kept. hyper reads and drops such a rest
/// if it has arrived, and closes the connection otherwise.
const SMALL_REST: u64 = 8 * 1024;
/// Smallest buffer that hyper accepts, in bytes.
const MIN_BUFFER: usize = 8 * 1024;
/// Idle time before TCP probes a peer. A dead peer is noticed after this time and a few probes.
const KEEP_ALIVE_PROBE: Duration = Duration::from_mins(1);
/// First and longest pause after a failed accept, for example without free file descriptors.
const ACCEPT_PAUSE: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));
/// Time, during a shutdown, for a request's head to arrive, and for the rest of an unwanted body.
const LAST_HEAD: Duration = Duration::from_millis(500);
/// Pause between two warnings that all connections are in use.
const FULL_NOTICE: Duration = Duration::from_secs(30);

/// The two stages of a shutdown. Clones share their state.
#[derive(Clone, Debug, Default)]
pub struct ServerStop {
    /// Accept no connections, answer the requests that have arrived, then close.
    pub soft: CancellationToken,
    /// Close every connection at once. Implies `soft`.
    pub hard: CancellationToken,
}

/// Serves `router` on every connection to `listener` until `stop`, and returns when the last connection
/// is closed. Handlers find the peer as [`ConnectInfo<SocketAddr>`]. Dropping the future stops accepting.
/// Open connections then go on until they end or `stop` ends them.
///
/// - At most `settings.max_connections` are open. Further ones wait in the kernel's queue.
/// - A connection is closed if a request's head does not arrive within `header_read_timeout`, counted
///   from the start of the connection or its last answer.
/// - A connection is closed if its client leaves an answer unread for `write_timeout`.
/// - The router limits bodies. If it leaves a body unread, the server reads and drops up to
///   [`LINGER_BYTES`] after the answer, for at most [`LINGER_SILENCE`] after the last byte and
///   [`LINGER_TIME`] in all. Then it closes the connection.
///
/// # Errors
///
/// The listener has no local address, so it is not usable.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    settings: &ServerConfig,
    stop: ServerStop,
) -> io::Result<()> {
    let address = listener.local_addr()?;
    let connections = TaskTracker::new();
    let server = Arc::new(Server {
        router,
        http: http(settings),
        write_timeout: settings.write_timeout,
        stop,
    });
    let places = Arc::new(Semaphore::new(
        settings.max_connections.clamp(1, Semaphore::MAX_PERMITS),
    ));
    let mut full = Notice::default();
    loop {
        let place = tokio::select! {
            biased;
            () = server.stopping() => break,
            place = take_place(&places, &mut full) => place,
        };
        let Some(place) = place else { break };
        let (stream, peer) = tokio::select! {
            biased;
            () = server.stopping() => break,
            accepted = accept(&listener) => accepted,
        };
        connections.spawn(Arc::clone(&server).connection(stream, peer, place));
    }
    // Closes the kernel's queue: nobody will serve the connections in it.
    drop(listener);
    connections.close();
    tracing::debug!(%address, open = connections.len(), "stopped accepting");
    connections.wait().await;
    Ok(())
}

struct Server {
    router: Router,
    http: http1::Builder,
    write_timeout: Duration,
    stop: ServerStop,
}

impl Server {
    async fn stopping(&self) {
        tokio::select! {
            () = self.stop.soft.cancelled() => {}
            () = self.stop.hard.cancelled() => {}
        }
    }

    /// Serves one connection to its end, and gives its permit back then.
    async fn connection(
        self: Arc<Self>,
        stream: TcpStream,
        peer: SocketAddr,
        place: OwnedSemaphorePermit,
    ) {
        prepare(&stream);
        let busy = Busy::default();
        let service =
            service_fn(|request| answer(self.router.clone(), request, peer, busy.clone()));
        let stream = TokioIo::new(StallGuard::new(
            stream,
            self.write_timeout,
            Arc::clone(&busy.writing),
        ));
        let mut connection = self.http.serve_connection(stream, service);
        let result = tokio::select! {
            result = &mut connection => Some(result),
            () = self.stopping() => None,
        };
        let result = if let Some(result) = result {
            result
        } else {
            Pin::new(&mut connection).graceful_shutdown();
            tokio::select! {
                result = &mut connection => result,
                () = self.stop.hard.cancelled() => return,
                () = busy.idle() => return,
            }
        };
        // A client that sent something unreadable got an answer too.
        let is_answered = result
            .as_ref()
            .map_or_else(hyper::Error::is_parse, |()| true);
        if let Err(error) = result {
            // Clients often leave, fall silent or send nonsense, so this is no warning.
            tracing::debug!(%peer, %error, "a connection ended early");
        }
        if is_answered {
            tokio::select! {
                () = linger(connection.into_parts().io.into_inner()) => {}
                () = self.stop.hard.cancelled() => {}
                () = async { self.stopping().await; sleep(LAST_HEAD).await } => {}
            }
        }
        drop(place);
    }
}

fn http(settings: &ServerConfig) -> http1::Builder {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(settings.header_read_timeout)
        .max_buf_size(settings.max_header_bytes.max(MIN_BUFFER))
        .max_header_size(settings.max_header_bytes)
        .max_headers(MAX_HEADERS)
        .keep_alive(true)
        .half_close(false);
    http
}

/// Waits for a permit for a connection. `None` only if the semaphore is closed, which never happens.
async fn take_place(places: &Arc<Semaphore>, full: &mut Notice) -> Option<OwnedSemaphorePermit> {
    if let Ok(place) = Arc::clone(places).try_acquire_owned() {
        return Some(place);
    }
    if full.is_due() {
        tracing::warn!("all connections are in use, and new ones wait: server.max_connections");
    }
    Arc::clone(places).acquire_owned().await.ok()
}

/// Accepts the next connection. Its pauses grow while the system refuses, for example with too many open
/// files.
async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    let (mut pause, longest) = ACCEPT_PAUSE;
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) if is_about_the_peer(&error) => {}
            Err(error) => {
                tracing::error!(%error, pause_ms = pause.as_millis(), "cannot accept connections");
                sleep(pause).await;
                pause = (pause * 2).min(longest);
            }
        }
    }
}

/// Returns whether the error is about one peer, which left before the accept. The next accept may work.
fn is_about_the_peer(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted
    )
}

/// Sets the socket's options, so that small events go out at once and a dead peer is noticed. An error
/// means that the socket is broken already. The first read will show that.
fn prepare(stream: &TcpStream) {
    let probes = TcpKeepalive::new()
        .with_time(KEEP_ALIVE_PROBE)
        .with_interval(KEEP_ALIVE_PROBE / 4);
    let result = stream
        .set_nodelay(true)
        .and_then(|()| SockRef::from(stream).set_tcp_keepalive(&probes));
    if let Err(error) = result {
        tracing::debug!(%error, "cannot set the options of a socket");
    }
}

async fn answer(
    router: Router,
    request: Request<Incoming>,
    peer: SocketAddr,
    busy: Busy,
) -> Result<Response<Tracked>, Infallible> {
    let guard = busy.enter();
    if !names_its_host(&request) {
        return Ok(no_host().map(|body| Tracked {
            body,
            _guard: guard,
        }));
    }
    let is_read = Arc::new(AtomicBool::new(request.body().is_end_stream()));
    let rest = request.body().size_hint().upper().unwrap_or(u64::MAX);
    let mut request = request.map(|body| {
        Body::new(Received {
            body,
            is_read: Arc::clone(&is_read),
        })
    });
    request.extensions_mut().insert(ConnectInfo(peer));
    let mut response = router.oneshot(request).await?;
    if rest > SMALL_REST && !is_read.load(Ordering::Acquire) {
        response
            .headers_mut()
            .insert(CONNECTION, HeaderValue::from_static("close"));
    }
    Ok(response.map(|body| Tracked {
        body,
        _guard: guard,
    }))
}

/// A request's body that records whether it was read to its end.
struct Received {
    body: Incoming,
    is_read: Arc<AtomicBool>,
}

impl hyper::body::Body for Received {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if frame.is_none() || self.body.is_end_stream() {
            self.is_read.store(true, Ordering::Release);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Returns whether the request has one valid `Host` (RFC 9112, 3.2). With two, a proxy in front may have
/// used the other one. HTTP/1.0 needs none.
fn names_its_host<B>(request: &Request<B>) -> bool {
    let mut hosts = request.headers().get_all(HOST).iter();
    let is_host = |host: &HeaderValue| {
        host.is_empty()
            || Authority::try_from(host.as_bytes()).is_ok_and(|it| !it.as_str().contains('@'))
    };
    match (hosts.next(), hosts.next()) {
        (None, _) => request.version() < Version::HTTP_11,
        (Some(host), None) => is_host(host),
        (Some(_), Some(_)) => false,
    }
}

/// Returns a 400 without a body, like hyper's answer to a head that is not HTTP.
fn no_host() -> Response<Body> {
    let mut refusal = Response::new(Body::empty());
    *refusal.status_mut() = StatusCode::BAD_REQUEST;
    refusal
        .headers_mut()
        .insert(CONNECTION, HeaderValue::from_static("close"));
    refusal
}

/// The unfinished work of a connection.
#[derive(Clone, Debug, Default)]
struct Busy {
    /// Number of requests whose handler or answer has not ended.
    answers: Arc<AtomicUsize>,
    /// Whether bytes wait for the client to read them.
    writing: Arc<AtomicBool>,
}

impl Busy {
    fn enter(self) -> BusyGuard {
        self.answers.fetch_add(1, Ordering::AcqRel);
        BusyGuard(self)
    }

    /// Waits until the connection has no work, and a last request had time to arrive. hyper closes a
    /// connection itself after the last answer, but not while a head is arriving.
    async fn idle(&self) {
        loop {
            sleep(LAST_HEAD).await;
            if self.answers.load(Ordering::Acquire) == 0 && !self.writing.load(Ordering::Acquire) {
                return;
            }
        }
    }
}

struct BusyGuard(Busy);

impl Drop for BusyGuard {
    fn drop(&mut self) {
        self.0.answers.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A response's body that keeps its connection busy until it is dropped.
struct Tracked {
    body: Body,
    _guard: BusyGuard,
}

impl hyper::body::Body for Tracked {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Limits how often a warning is repeated.
#[derive(Default)]
struct Notice(Option<Instant>);

impl Notice {
    fn is_due(&mut self) -> bool {
        let now = Instant::now();
        let is_due = self
            .0
            .is_none_or(|last| now.duration_since(last) >= FULL_NOTICE);
        if is_due {
            self.0 = Some(now);
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn accepted_sockets_send_at_once_and_notice_a_dead_peer() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        prepare(&stream);
        assert!(stream.nodelay().unwrap());
        assert!(SockRef::from(&stream).keepalive().unwrap());
    }
}

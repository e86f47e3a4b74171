//! The HTTP server's sockets: accepts connections and serves a router on each, against clients that are slow, silent
//! or too many. HTTP/1.1 only; TLS and HTTP/2 are for the load balancer in front.

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

/// Fields in a request's head.
const MAX_HEADERS: usize = 100;
/// A rest of a body, bytes, for which a connection is kept: hyper drops one that is there already, and closes else.
const SMALL_REST: u64 = 8 * 1024;
/// hyper accepts no smaller buffer.
const MIN_BUFFER: usize = 8 * 1024;
/// Peers that are gone without a word are noticed after about this and a few probes.
const KEEP_ALIVE_PROBE: Duration = Duration::from_mins(1);
/// A first and a longest pause after a failed accept (out of file descriptors, say).
const ACCEPT_PAUSE: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));
/// During a shutdown: time for a request's head that is on its way, and for the rest of a body that nobody wants.
const LAST_HEAD: Duration = Duration::from_millis(500);
/// Pause between two complaints that all connections are in use.
const FULL_NOTICE: Duration = Duration::from_secs(30);

/// The two stages of a shutdown. A clone is the same pair.
#[derive(Clone, Debug, Default)]
pub struct ServerStop {
    /// Accept no more; answer what has been asked, then close.
    pub soft: CancellationToken,
    /// Close every connection, whatever is going on there. Implies `soft`.
    pub hard: CancellationToken,
}

/// Serves `router` on every connection to `listener` until it is told to stop, and returns when the last connection is
/// closed. Handlers find the peer as [`ConnectInfo<SocketAddr>`]. Dropping the future stops accepting; open
/// connections then go on until they end or `stop` says so.
///
/// At most `settings.max_connections` are open; further ones wait in the kernel's queue. A connection is closed when a
/// request's head has not arrived within `header_read_timeout`, counted from the connection's start or its last
/// answer, or when its client leaves an answer unread for `write_timeout`. Bodies are the router's concern. Of one that the
/// router does not read to its end, a rest of [`LINGER_BYTES`] is read and dropped after the answer, at most
/// [`LINGER_SILENCE`] after the last byte and [`LINGER_TIME`] in all; then the connection is closed.
///
/// # Errors
///
/// The listener cannot tell its address: it is not usable.
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
    // Refuse rather than leave in the queue what nobody will serve.
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

    /// Serves one connection to its end. The place is free again only then.
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
        // One that sent nonsense was told so.
        let is_answered = result
            .as_ref()
            .map_or_else(hyper::Error::is_parse, |()| true);
        if let Err(error) = result {
            // Clients that leave, send nonsense or fall silent: their business, and they are many.
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

/// `None` only if the semaphore is closed, which nobody does.
async fn take_place(places: &Arc<Semaphore>, full: &mut Notice) -> Option<OwnedSemaphorePermit> {
    if let Ok(place) = Arc::clone(places).try_acquire_owned() {
        return Some(place);
    }
    if full.is_due() {
        tracing::warn!("all connections are in use: new ones wait (server.max_connections)");
    }
    Arc::clone(places).acquire_owned().await.ok()
}

/// The next connection. Waits longer and longer while the system refuses (too many open files).
async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    let (mut pause, longest) = ACCEPT_PAUSE;
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) if is_about_the_peer(&error) => {}
            Err(error) => {
                tracing::error!(%error, pause_ms = pause.as_millis(), "no connection can be accepted");
                sleep(pause).await;
                pause = (pause * 2).min(longest);
            }
        }
    }
}

/// The peer left between its connect and our accept. The next one may be fine.
fn is_about_the_peer(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted
    )
}

/// Small events go out at once, and a peer that is gone is noticed. A socket that refuses is already broken, which
/// the first read will tell.
fn prepare(stream: &TcpStream) {
    let probes = TcpKeepalive::new()
        .with_time(KEEP_ALIVE_PROBE)
        .with_interval(KEEP_ALIVE_PROBE / 4);
    let result = stream
        .set_nodelay(true)
        .and_then(|()| SockRef::from(stream).set_tcp_keepalive(&probes));
    if let Err(error) = result {
        tracing::debug!(%error, "a socket's options cannot be set");
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

/// A request's body, of which is known whether it was read to its end.
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

/// One `Host`, which is one (RFC 9112, 3.2). Whatever stands in front may have gone by another one of two. HTTP/1.0 has none.
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

/// As bare as what hyper answers to a head that is no HTTP.
fn no_host() -> Response<Body> {
    let mut refusal = Response::new(Body::empty());
    *refusal.status_mut() = StatusCode::BAD_REQUEST;
    refusal
        .headers_mut()
        .insert(CONNECTION, HeaderValue::from_static("close"));
    refusal
}

/// What a connection still owes its client.
#[derive(Clone, Debug, Default)]
struct Busy {
    /// Requests whose handler or body is not at its end.
    answers: Arc<AtomicUsize>,
    /// Bytes wait for the client to take them.
    writing: Arc<AtomicBool>,
}

impl Busy {
    fn enter(self) -> BusyGuard {
        self.answers.fetch_add(1, Ordering::AcqRel);
        BusyGuard(self)
    }

    /// Resolves when nothing is owed and there was time for a last request to arrive. hyper closes a connection by
    /// itself after its last answer, but not while a head is on its way.
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

/// A response's body, which keeps its connection busy.
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

/// Keeps a complaint from being repeated too often.
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

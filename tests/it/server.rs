//! The accept loop against slow clients, silent clients, and too many of them.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::ConnectInfo;
use axum::routing::get;
use futures_util::{StreamExt, stream};
use threadkeeper::config::ServerConfig;
use threadkeeper::server::{ServerStop, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

/// Longest time that these servers wait for a request's head.
const HEADER_TIME: Duration = Duration::from_millis(200);
/// Longest wait for anything that does not hang.
const PATIENCE: Duration = Duration::from_secs(10);

/// A server with these routes:
/// - `/` answers `hello`,
/// - `/peer` answers the client's address,
/// - `/stream` sends `first`, waits for the gate, and sends `last`,
/// - `/endless` never ends.
struct TestServer {
    address: SocketAddr,
    stop: ServerStop,
    gate: Arc<Semaphore>,
    running: JoinSet<io::Result<()>>,
}

impl TestServer {
    async fn start(change: impl FnOnce(&mut ServerConfig)) -> Self {
        let mut settings = ServerConfig {
            header_read_timeout: HEADER_TIME,
            ..ServerConfig::default()
        };
        change(&mut settings);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let gate = Arc::new(Semaphore::new(0));
        let stop = ServerStop::default();
        let mut running = JoinSet::new();
        let (router, watched) = (routes(Arc::clone(&gate)), stop.clone());
        running.spawn(async move { serve(listener, router, &settings, watched).await });
        Self {
            address,
            stop,
            gate,
            running,
        }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    async fn get(&self, path: &str) -> TcpStream {
        let mut client = self.connect().await;
        client.write_all(request(path).as_bytes()).await.unwrap();
        client
    }

    /// Waits until `serve` returns.
    async fn ended(&mut self) {
        within(self.running.join_next())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
    }
}

fn routes(gate: Arc<Semaphore>) -> Router {
    let streamed = move || async move {
        let last = async move {
            gate.acquire().await.unwrap().forget();
            Ok::<_, Infallible>(Bytes::from_static(b"last"))
        };
        let first = stream::once(async { Ok(Bytes::from_static(b"first")) });
        Body::from_stream(first.chain(stream::once(last)))
    };
    let endless = || async {
        Body::from_stream(stream::repeat_with(|| {
            Ok::<_, Infallible>(Bytes::from_static(&[b'x'; 16 * 1024]))
        }))
    };
    Router::new()
        .route("/", get(|| async { "hello" }))
        .route(
            "/peer",
            get(|ConnectInfo(peer): ConnectInfo<SocketAddr>| async move { peer.to_string() }),
        )
        .route("/stream", get(streamed))
        .route("/endless", get(endless))
}

fn request(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n")
}

async fn within<T>(work: impl Future<Output = T>) -> T {
    timeout(PATIENCE, work)
        .await
        .expect("the step ends in time")
}

/// Reads until `end` has arrived. Returns everything that was read.
async fn read_until(client: &mut TcpStream, end: &str) -> String {
    let mut text = Vec::new();
    within(async {
        while !String::from_utf8_lossy(&text).contains(end) {
            let read = client.read_buf(&mut text).await.unwrap();
            assert!(read > 0, "closed after: {}", String::from_utf8_lossy(&text));
        }
    })
    .await;
    String::from_utf8(text).unwrap()
}

/// Waits until the server closes. Returns what it sent before. A reset counts as a close.
async fn read_to_close(client: &mut TcpStream) -> String {
    let mut text = Vec::new();
    match within(client.read_to_end(&mut text)).await {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// Asserts that the server closes after about `HEADER_TIME`.
async fn assert_closed_on_time(client: &mut TcpStream, since: Instant) {
    read_to_close(client).await;
    let elapsed = since.elapsed();
    assert!(elapsed >= HEADER_TIME * 9 / 10, "closed after {elapsed:?}");
    assert!(
        elapsed < HEADER_TIME + PATIENCE / 2,
        "closed after {elapsed:?}"
    );
}

#[tokio::test]
async fn handlers_see_peer_address() {
    let server = TestServer::start(|_| ()).await;
    let mut client = server.get("/peer").await;
    let own = client.local_addr().unwrap().to_string();
    let text = read_until(&mut client, &own).await;
    assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
    assert!(
        text.contains(&format!("content-length: {}", own.len())),
        "{text}"
    );
}

#[tokio::test]
async fn unfinished_head_times_out() {
    let server = TestServer::start(|_| ()).await;
    for said in ["", "P", "GET / HT", "GET / HTTP/1.1\r\nhost: te"] {
        let since = Instant::now();
        let mut client = server.connect().await;
        client.write_all(said.as_bytes()).await.unwrap();
        assert_closed_on_time(&mut client, since).await;
    }
}

#[tokio::test]
async fn http2_preface_is_refused() {
    let server = TestServer::start(|settings| settings.header_read_timeout = PATIENCE * 2).await;
    let mut client = server.connect().await;
    client
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .await
        .unwrap();
    assert!(!read_to_close(&mut client).await.contains("hello"));
}

#[tokio::test]
async fn dripping_head_has_one_total_time_limit() {
    let server = TestServer::start(|_| ()).await;
    let since = Instant::now();
    let (mut reader, mut writer) = server.connect().await.into_split();
    let drip = async {
        writer.write_all(b"GET / HTTP/1.1\r\nx: ").await.unwrap();
        // The write fails once the server has closed.
        while writer.write_all(b"a").await.is_ok() {
            sleep(HEADER_TIME / 10).await;
        }
    };
    let mut said = Vec::new();
    let closed = async {
        let _ = reader.read_to_end(&mut said).await;
        since.elapsed()
    };
    let elapsed = within(async {
        tokio::select! {
            () = drip => since.elapsed(),
            elapsed = closed => elapsed,
        }
    })
    .await;
    assert!(elapsed >= HEADER_TIME * 9 / 10, "closed after {elapsed:?}");
    assert!(
        elapsed < HEADER_TIME + PATIENCE / 2,
        "closed after {elapsed:?}"
    );
}

#[tokio::test]
async fn idle_keep_alive_connection_is_closed() {
    let server = TestServer::start(|_| ()).await;
    let mut client = server.get("/").await;
    read_until(&mut client, "hello").await;
    client.write_all(request("/").as_bytes()).await.unwrap();
    let since = Instant::now();
    read_until(&mut client, "hello").await;
    assert_closed_on_time(&mut client, since).await;
}

#[tokio::test]
async fn response_may_outlast_header_timeout() {
    let server = TestServer::start(|_| ()).await;
    let mut client = server.get("/stream").await;
    read_until(&mut client, "first").await;
    sleep(HEADER_TIME * 2).await;
    server.gate.add_permits(1);
    read_until(&mut client, "last").await;
}

#[tokio::test]
async fn oversized_and_malformed_heads_are_refused() {
    let patient = |settings: &mut ServerConfig| {
        settings.header_read_timeout = PATIENCE;
        settings.max_header_bytes = 8 * 1024;
    };
    let server = TestServer::start(patient).await;
    let long = format!(
        "GET / HTTP/1.1\r\nhost: test\r\nx: {}\r\n\r\n",
        "a".repeat(9 * 1024)
    );
    let endless = format!(
        "GET / HTTP/1.1\r\nhost: test\r\nx: {}",
        "a".repeat(64 * 1024)
    );
    let fields = (0..101)
        .map(|n| format!("x{n}: 1\r\n"))
        .collect::<Vec<_>>()
        .concat();
    let many = format!("GET / HTTP/1.1\r\n{fields}\r\n");
    let hosts = |hosts: &str| format!("GET / HTTP/1.1\r\n{hosts}\r\n");
    let fits = format!(
        "GET / HTTP/1.1\r\nhost: test\r\nx: {}\r\n\r\n",
        "a".repeat(7 * 1024)
    );
    for (head, status) in [
        (long, "431"),
        (endless, "431"),
        (many, "431"),
        ("hello?\r\n\r\n".to_owned(), "400"),
        (hosts(""), "400"),
        (hosts("host: a\r\nhost: a\r\n"), "400"),
        (hosts("host: a, b\r\n"), "400"),
        (hosts("host: user@a\r\n"), "400"),
        (
            "GET / HTTP/1.0\r\nhost: a\r\nhost: b\r\n\r\n".to_owned(),
            "400",
        ),
    ] {
        let mut client = server.connect().await;
        // The server may close before it has read everything.
        let _ = client.write_all(head.as_bytes()).await;
        let text = read_until(&mut client, "\r\n\r\n").await;
        assert_eq!(text.split(' ').nth(1), Some(status), "{head}: {text}");
    }
    let old = "GET / HTTP/1.0\r\n\r\n".to_owned();
    for served in [
        fits,
        old,
        hosts("host:\r\n"),
        hosts("host: gateway_1:8080\r\n"),
        hosts("host: [::1]\r\n"),
    ] {
        let mut client = server.connect().await;
        client.write_all(served.as_bytes()).await.unwrap();
        read_until(&mut client, "hello").await;
    }
}

#[tokio::test]
async fn client_not_reading_response_is_closed() {
    let server = TestServer::start(|settings| {
        settings.write_timeout = HEADER_TIME;
        settings.max_connections = 1;
    })
    .await;
    let silent = server.get("/endless").await;
    // The only permit is free again once the server has given up the first client.
    let mut next = server.get("/").await;
    read_until(&mut next, "hello").await;
    drop(silent);
}

#[tokio::test]
async fn connections_beyond_limit_wait() {
    let server = TestServer::start(|settings| {
        settings.max_connections = 2;
        settings.header_read_timeout = PATIENCE;
    })
    .await;
    let mut first = server.get("/").await;
    let mut second = server.get("/").await;
    read_until(&mut first, "hello").await;
    read_until(&mut second, "hello").await;
    let mut third = server.get("/").await;
    let mut byte = [0];
    let early = timeout(HEADER_TIME, third.read(&mut byte)).await;
    assert!(early.is_err(), "a third connection was served");
    drop(first);
    read_until(&mut third, "hello").await;
}

#[tokio::test]
async fn soft_stop_finishes_responses_and_closes_idle_connections() {
    let mut server =
        TestServer::start(|settings| settings.header_read_timeout = PATIENCE * 2).await;
    let mut streaming = server.get("/stream").await;
    read_until(&mut streaming, "first").await;
    let mut idle = server.get("/").await;
    read_until(&mut idle, "hello").await;
    let mut silent = server.connect().await;
    let mut half = server.connect().await;
    half.write_all(b"GET / HT").await.unwrap();

    server.stop.soft.cancel();
    for client in [&mut idle, &mut silent, &mut half] {
        assert_eq!(read_to_close(client).await, "");
    }
    let refused = within(async {
        // The listener closes once the accept loop has seen the stop.
        while TcpStream::connect(server.address).await.is_ok() {
            sleep(Duration::from_millis(5)).await;
        }
    });
    refused.await;
    assert!(
        server.running.try_join_next().is_none(),
        "a response is still in flight"
    );
    server.gate.add_permits(1);
    // The response is complete if it has the end of a chunked body.
    let rest = read_to_close(&mut streaming).await;
    assert!(
        rest.contains("last") && rest.ends_with("0\r\n\r\n"),
        "{rest}"
    );
    server.ended().await;
}

#[tokio::test]
async fn hard_stop_cuts_responses() {
    let mut server = TestServer::start(|_| ()).await;
    let mut streaming = server.get("/stream").await;
    read_until(&mut streaming, "first").await;
    server.stop.soft.cancel();
    server.stop.hard.cancel();
    let rest = read_to_close(&mut streaming).await;
    assert!(!rest.contains("last"), "{rest}");
    server.ended().await;
}

#[tokio::test]
async fn hard_stop_works_without_soft_stop() {
    let mut server = TestServer::start(|_| ()).await;
    let mut streaming = server.get("/stream").await;
    read_until(&mut streaming, "first").await;
    server.stop.hard.cancel();
    read_to_close(&mut streaming).await;
    server.ended().await;
}

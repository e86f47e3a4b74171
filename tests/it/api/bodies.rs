//! Request bodies that are too large, not wanted, or too many.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use threadkeeper::server::{LINGER_BYTES, LINGER_TIME};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use super::pages::memory;
use crate::support::gateway::{EventReader, Gateway, PATIENCE};
use crate::support::scene::{Backend, Protocol, Scene};

/// Size of the client's send buffer, in bytes. As on a real link, a large body does not fit
/// between client and gateway.
const SEND_BUFFER: u32 = 64 * 1024;
const MIB: usize = 1024 * 1024;

async fn connect(gateway: &Gateway) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_send_buffer_size(SEND_BUFFER).unwrap();
    socket
        .connect(gateway.address().parse().unwrap())
        .await
        .unwrap()
}

/// Reads until the gateway closes.
async fn rest(mut from: impl AsyncReadExt + Unpin) -> String {
    let mut answer = Vec::new();
    timeout(PATIENCE, from.read_to_end(&mut answer))
        .await
        .expect("the gateway closes in time")
        .unwrap();
    String::from_utf8(answer).unwrap()
}

/// Sends the whole request before it reads the answer, as Python's `http.client` does.
async fn all_then_read(gateway: &Gateway, request: &[u8]) -> String {
    let mut connection = connect(gateway).await;
    let sent = timeout(PATIENCE, connection.write_all(request))
        .await
        .expect("the request is sent in time");
    sent.unwrap_or_else(|error| panic!("the connection broke before the answer was read: {error}"));
    rest(connection).await
}

/// Returns a request with a body of this many bytes. `head` lacks only the fields for the length.
fn request(head: &str, bytes: usize) -> Vec<u8> {
    let mut request = format!("{head}\r\ncontent-length: {bytes}\r\n\r\n").into_bytes();
    request.resize(request.len() + bytes, b' ');
    request
}

fn chunked(head: &str, bytes: usize) -> Vec<u8> {
    let mut request = format!("{head}\r\ntransfer-encoding: chunked\r\n\r\n").into_bytes();
    for _ in 0..bytes.div_ceil(MIB) {
        request.extend(format!("{MIB:x}\r\n").as_bytes());
        request.resize(request.len() + MIB, b' ');
        request.extend(b"\r\n");
    }
    request.extend(b"0\r\n\r\n");
    request
}

const KEY: &str = "a-key-of-the-backend-of-these-tests";
const SETTINGS: &str = "[server]\nmax_body_bytes = 65536\n[limits]\nuser_messages = \"1/s burst 1\"\n\
     [auth.keys.backend]\nkey = \"a-key-of-the-backend-of-these-tests\"\nscope = \"chat\"\n\
     [auth.keys.reader]\nkey = \"a-key-of-a-reader-of-these-tests\"\nscope = \"read\"\n";

#[tokio::test(flavor = "multi_thread")]
async fn refusal_readable_after_client_sends_whole_body() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let gateway = scene.gateway_with(SETTINGS).await;
    let json = format!("host: h\r\ncontent-type: application/json\r\nauthorization: Bearer {KEY}");
    let reader = json.replace(KEY, "a-key-of-a-reader-of-these-tests");
    let post =
        |user: &str, more: &str| format!("POST /v1/users/{user}/messages HTTP/1.1\r\n{more}");
    let mib = 8 * MIB;
    let cases = [
        (
            "a declared length",
            request(&post("one", &json), mib),
            "413",
            "payload-too-large",
        ),
        (
            "chunks",
            chunked(&post("two", &json), mib),
            "413",
            "payload-too-large",
        ),
        (
            "HTTP/1.0",
            request(&post("three", &json).replace("1.1", "1.0"), mib),
            "413",
            "payload-too-large",
        ),
        (
            "no key",
            request(&post("four", "host: h"), mib),
            "401",
            "unauthenticated",
        ),
        (
            "a reader's key",
            request(&post("five", &reader), mib),
            "403",
            "forbidden",
        ),
        (
            "no route",
            request("POST /nowhere HTTP/1.1\r\nhost: h", mib),
            "404",
            "not-found",
        ),
        (
            "no method",
            request("PUT /healthz HTTP/1.1\r\nhost: h", mib),
            "405",
            "method-not-allowed",
        ),
        (
            "no JSON",
            request(&post("six", &json.replace("/json", "/xml")), mib),
            "415",
            "unsupported-media-type",
        ),
        // The HTTP library answers this one.
        (
            "a large head",
            format!("GET / HTTP/1.1\r\na: {}\r\n\r\n", "x".repeat(mib)).into_bytes(),
            "431",
            "",
        ),
    ];
    let tried = cases.iter().map(async |(what, request, status, name)| {
        assert_refused(what, &all_then_read(&gateway, request).await, status, name);
    });
    join_all(tried).await;
    // The limit refuses the second request within a second.
    let limited = post("seven", &json);
    let answer = loop {
        all_then_read(
            &gateway,
            &request(&format!("{limited}\r\nconnection: close"), 1),
        )
        .await;
        let answer = all_then_read(&gateway, &request(&limited, mib)).await;
        if !answer.contains(" 413 ") {
            break answer;
        }
    };
    assert_refused("too often", &answer, "429", "rate-limited");
}

#[track_caller]
fn assert_refused(what: &str, answer: &str, status: &str, name: &str) {
    let status_line = answer.lines().next().unwrap_or_default();
    assert_eq!(
        status_line.split(' ').nth(1),
        Some(status),
        "{what}: {answer}"
    );
    assert!(answer.contains(name), "{what}: {answer}");
    let closes =
        answer.contains("\r\nconnection: close\r\n") || status_line.starts_with("HTTP/1.0");
    assert!(
        closes || name.is_empty(),
        "{what}: the answer lacks `connection: close`: {answer}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn endless_body_is_drained_up_to_limit() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let gateway = scene
        .gateway_with("[server]\nmax_body_bytes = 65536\n")
        .await;
    let (reads, mut writes) = connect(&gateway).await.into_split();
    let head = "POST /v1/users/alice/messages HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\n\
                content-length: 99999999999\r\n\r\n";
    let before = memory(&gateway, "VmRSS:");
    let sends = async {
        writes.write_all(head.as_bytes()).await.unwrap();
        let (begun, mut sent, blanks) = (Instant::now(), 0, vec![b' '; 64 * 1024]);
        while writes.write_all(&blanks).await.is_ok() {
            sent += blanks.len();
        }
        (sent, begun.elapsed())
    };
    // A client that reads while it sends gets the answer at once.
    let reads = async {
        let mut reads = reads;
        let mut answer = vec![0; 8 * 1024];
        let length = timeout(PATIENCE, reads.read(&mut answer))
            .await
            .expect("the answer arrives in time")
            .unwrap();
        String::from_utf8(answer[..length].to_vec()).unwrap()
    };
    let ((sent, took), answer) = tokio::join!(sends, reads);
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    // Socket buffers hold some more.
    assert!(
        (LINGER_BYTES..2 * LINGER_BYTES).contains(&sent),
        "the gateway read {sent} bytes"
    );
    assert!(took < LINGER_TIME + Duration::from_secs(5), "{took:?}");
    let grown = memory(&gateway, "VmHWM:") - before;
    assert!(grown < 8 * 1024, "the process grew by {grown} KiB");
}

#[tokio::test(flavor = "multi_thread")]
async fn expect_continue_withheld_when_request_is_refused() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let gateway = scene.gateway_with(SETTINGS).await;
    let expecting = |user: &str, key: &str, length: usize| {
        format!(
            "POST /v1/users/{user}/messages HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\nexpect: 100-continue\r\n\
             authorization: Bearer {key}\r\ncontent-length: {length}\r\n\r\n"
        )
    };
    for (user, key, length, status) in [
        ("one", KEY, 99_999_999_999, "413"),
        ("two", "wrong", 20, "401"),
    ] {
        let mut connection = connect(&gateway).await;
        connection
            .write_all(expecting(user, key, length).as_bytes())
            .await
            .unwrap();
        let answer = rest(connection).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{answer}"
        );
    }
    let mut connection = connect(&gateway).await;
    connection
        .write_all(expecting("three", KEY, 20).as_bytes())
        .await
        .unwrap();
    let mut interim = [0; 25];
    connection.read_exact(&mut interim).await.unwrap();
    assert_eq!(interim, *b"HTTP/1.1 100 Continue\r\n\r\n");
}

/// Returns a message with a picture of about this many bytes.
fn picture(bytes: usize) -> Value {
    let url = format!("data:image/jpeg;base64,{}", "A".repeat(bytes));
    json!({"content": [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": url}}]})
}

fn streamed(message: &Value, strategy: &str) -> Value {
    let mut message = message.clone();
    message["stream"] = true.into();
    message["multitask_strategy"] = strategy.into();
    message
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_for_concurrent_large_bodies_is_bounded() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    // There is memory for four of the bodies.
    let gateway = scene
        .gateway_with("[server]\nmax_body_bytes = 2097152\nmax_buffered_body_bytes = 8388608\n")
        .await;
    let large = picture(2_000_000);
    gateway
        .post("/v1/users/first/messages", &json!({"content": "hi"}))
        .await
        .ok();
    let before = memory(&gateway, "VmRSS:");
    scene.simulator.hold();
    let open = async |user: &str| {
        let request = gateway.request(Method::POST, &format!("/v1/users/{user}/messages"));
        request
            .json(&streamed(&large, "enqueue"))
            .send()
            .await
            .unwrap()
    };
    // One run is active. The ones behind it are in the database, not in memory.
    let mut streams = Vec::new();
    for _ in 0..6 {
        streams.push(EventReader::new(open("alice").await));
    }
    let users: Vec<_> = (0..10).map(|n| format!("user-{n}")).collect();
    let answers = async { join_all(users.iter().map(|user| open(user))).await };
    // Ordinary messages do not wait for memory behind pictures.
    let small = async {
        let small = streamed(&json!({"content": "hi"}), "enqueue");
        let begun = Instant::now();
        let answer = gateway
            .request(Method::POST, "/v1/users/small/messages")
            .json(&small)
            .send()
            .await
            .unwrap();
        assert!(
            begun.elapsed() < Duration::from_secs(4),
            "{:?}",
            begun.elapsed()
        );
        streams.push(EventReader::new(answer));
    };
    let (answers, ()) = tokio::join!(answers, small);
    let (taken, refused): (Vec<_>, Vec<_>) = answers
        .into_iter()
        .partition(|answer| answer.status() == 200);
    assert_eq!((taken.len(), refused.len()), (3, 7));
    for answer in refused {
        assert_eq!(
            (answer.status().as_u16(), &answer.headers()["retry-after"]),
            (503, &"2".parse().unwrap())
        );
        let problem: Value = answer.json().await.unwrap();
        assert_eq!(problem["type"], "urn:threadkeeper:problem:overloaded");
    }
    let grown = memory(&gateway, "VmHWM:") - before;
    println!("{grown} KiB more");
    assert!(grown < 96 * 1024, "the process grew by {grown} KiB");
    scene.simulator.release();
    for stream in streams
        .into_iter()
        .chain(taken.into_iter().map(EventReader::new))
    {
        assert_eq!(stream.rest().await.last().unwrap().name, "run.completed");
    }
    for user in &users {
        gateway
            .post(&format!("/v1/users/{user}/messages"), &large)
            .await
            .ok();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn queue_is_bounded_in_bytes_per_thread() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let settings = "[server]\nmax_body_bytes = 100000\n[runs]\nmax_queue_bytes = 100000\n";
    let gateway = scene.gateway_with(settings).await;
    scene.simulator.hold();
    let mut streams = Vec::new();
    for (bytes, name) in [
        (60_000, "run.started"),
        (60_000, "run.queued"),
        (30_000, "run.queued"),
    ] {
        let body = streamed(&picture(bytes), "enqueue");
        let answer = gateway
            .request(Method::POST, "/v1/users/alice/messages")
            .json(&body)
            .send()
            .await
            .unwrap();
        let mut stream = EventReader::new(answer);
        assert_eq!(stream.next().await.unwrap().name, name);
        streams.push(stream);
    }
    let refused = gateway
        .post("/v1/users/alice/messages", &picture(20_000))
        .await;
    assert_eq!(refused.problem(), (429, "queue-full"));
    assert!(
        refused.body["detail"]
            .as_str()
            .unwrap()
            .contains("100000 bytes"),
        "{refused:?}"
    );
    assert!(refused.headers.contains_key("retry-after"));
    scene.simulator.release();
    for stream in streams {
        assert_eq!(stream.rest().await.last().unwrap().name, "run.completed");
    }
    gateway
        .post("/v1/users/alice/messages", &picture(60_000))
        .await
        .ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn merged_run_is_bounded_in_bytes() {
    for backend in [Backend::Sqlite, Backend::Postgres] {
        let scene = Scene::new(Protocol::Responses, backend).await;
        let gateway = scene.gateway().await;
        scene.simulator.hold();
        let mut runs = Vec::new();
        let mut streams = vec![gateway.stream("/v1/users/alice", "first").await];
        streams[0].next().await.unwrap();
        // Two pictures fit into one run.
        for _ in 0..3 {
            let body = streamed(&picture(5 * MIB), "merge");
            let answer = gateway
                .request(Method::POST, "/v1/users/alice/messages")
                .json(&body)
                .send()
                .await
                .unwrap();
            let mut stream = EventReader::new(answer);
            runs.push(stream.next().await.unwrap().data["run_id"].clone());
            streams.push(stream);
        }
        assert_eq!(runs[0], runs[1], "{backend:?}");
        assert_ne!(runs[1], runs[2], "{backend:?}");
        scene.simulator.release();
        for stream in streams {
            assert_eq!(stream.rest().await.last().unwrap().name, "run.completed");
        }
    }
}

/// By default SQLite writes values that exceed its memory to temporary files beside the database.
/// No erasure reaches those.
#[tokio::test]
async fn large_message_leaves_no_sqlite_temp_file() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let gateway = scene.gateway().await;
    let text = "abc".repeat(MIB);
    gateway
        .post("/v1/users/alice/messages", &json!({"content": text}))
        .await
        .ok();
    let open = std::fs::read_dir(format!("/proc/{}/fd", gateway.id())).unwrap();
    let files = open.filter_map(|it| std::fs::read_link(it.unwrap().path()).ok());
    let beside: Vec<_> = files
        .filter(|it| it.to_string_lossy().contains("etilqs"))
        .collect();
    assert!(beside.is_empty(), "{beside:?}");
}

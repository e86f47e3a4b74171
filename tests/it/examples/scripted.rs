//! A gateway that falls silent, refuses twice, breaks off, and stops in the middle of a reply.

use std::future::pending;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, Method, Response, Uri};
use futures_util::StreamExt;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

const RETRY_AFTER: Duration = Duration::from_secs(1);

const PROBLEM: &str =
    r#"{"type": "urn:threadkeeper:problem:rate-limited", "detail": "too many messages"}"#;

const BEGINNING: &str = "id: run_1:1\nevent: run.started\ndata: {\"run_id\": \"run_1\"}\n\n\
                         id: run_1:7\nevent: message.delta\ndata: {\"text\": \"Hello \"}\n\n\
                         id: run_1:12\nevent: message.delta\ndata: {\"text\": \"wi";

const MIDDLE: &str = ": keep-alive\n\n\
                      id: run_1:12\nevent: message.delta\ndata: {\"text\": \"wide \"}\n\n\
                      event: stream.reconnect\nretry: 1000\n\
                      data: {\"events\": \"/prefix/events\", \"after\": \"run_1:12\"}\n\n";

const WORLD: &str = "id: run_1:17\nevent: message.delta\ndata: {\"text\": \"world\"}\n\n";

const END: &str = "id: run_1:18\nevent: message.completed\ndata: {\"message\": {}}\n\n\
                   id: run_1:19\nevent: run.completed\n\
                   data: {\"run\": {\"status\": \"completed\", \"error\": null}}\n\n";

struct Request {
    at: Instant,
    line: String,
    headers: HeaderMap,
    body: Bytes,
}

type Requests = Arc<Mutex<Vec<Request>>>;

pub(super) struct Gateway {
    pub(super) base: String,
    requests: Requests,
    _task: JoinSet<()>,
}

impl Gateway {
    pub(super) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let requests = Requests::default();
        let router = Router::new()
            .fallback(answer)
            .with_state(Arc::clone(&requests));
        let mut task = JoinSet::new();
        task.spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self {
            base,
            requests,
            _task: task,
        }
    }

    pub(super) fn assert_asked_well(&self) {
        let requests = self.requests.lock().unwrap();
        let lines: Vec<_> = requests.iter().map(|it| it.line.as_str()).collect();
        let post = "POST /v1/users/example/messages";
        let read = "GET /v1/users/example/runs/run_1/events";
        let moved = "GET /prefix/events";
        assert_eq!(lines, [post, post, post, post, read, moved, moved]);
        let headers = |name: &str| {
            let values = requests.iter().map(|it| it.headers.get(name));
            let values = values.map(|it| it.map_or("", |it| it.to_str().unwrap()));
            values.collect::<Vec<_>>()
        };
        let keys = headers("idempotency-key");
        assert!(keys[0].len() >= 16, "{keys:?}");
        assert_eq!(keys[..4], [keys[0]; 4]);
        for repeated in &requests[1..4] {
            assert_eq!(repeated.body, requests[0].body);
        }
        let last = headers("last-event-id");
        assert_eq!(last[4..], ["run_1:7", "run_1:12", "run_1:17"]);
        assert_eq!(headers("authorization"), ["Bearer secret"; 7]);
        let waited = requests[2].at - requests[1].at;
        assert!(waited >= RETRY_AFTER, "came back after {waited:?}");
    }
}

async fn answer(
    State(requests): State<Requests>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response<Body> {
    let number = {
        let mut requests = requests.lock().unwrap();
        requests.push(Request {
            at: Instant::now(),
            line: format!("{method} {}", uri.path()),
            headers,
            body,
        });
        requests.len()
    };
    match number {
        1 => pending().await,
        2 => refusal(429, RETRY_AFTER, "application/problem+json", PROBLEM),
        // As a load balancer in front of the gateway says it.
        3 => refusal(503, Duration::ZERO, "text/html", "<h1>No server</h1>"),
        4 => stream(BEGINNING, After::Cut),
        5 => stream(MIDDLE, After::End),
        6 => stream(WORLD, After::Silence),
        _ => stream(END, After::End),
    }
}

fn refusal(status: u16, after: Duration, kind: &str, body: &'static str) -> Response<Body> {
    let refusal = Response::builder().status(status);
    let refusal = refusal.header("retry-after", after.as_secs());
    let refusal = refusal.header("content-type", kind);
    refusal.body(Body::from(body)).unwrap()
}

/// What comes after the events of a stream.
#[derive(Clone, Copy)]
enum After {
    End,
    Silence,
    Cut,
}

fn stream(events: &'static str, after: After) -> Response<Body> {
    let rest = futures_util::stream::once(async move {
        match after {
            After::End => Ok(Bytes::new()),
            After::Silence => pending().await,
            After::Cut => {
                // What was sent before is to arrive.
                tokio::time::sleep(Duration::from_millis(50)).await;
                Err(std::io::Error::other("cut"))
            }
        }
    });
    let events = futures_util::stream::iter([Ok(Bytes::from(events))]);
    let answer = Response::builder().header("content-type", "text/event-stream");
    answer.body(Body::from_stream(events.chain(rest))).unwrap()
}

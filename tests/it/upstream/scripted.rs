//! A server that answers each request with the next entry of a script, and records the requests.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{ConnectInfo, State};
use axum::http::{HeaderMap, Method, Response, Uri};
use futures_util::stream;
use serde_json::Value;
use tokio::task::JoinSet;

/// One entry of the script.
pub(super) enum Play {
    Answer(Box<Response<Body>>),
    /// An answer after a delay.
    Late(Duration, Box<Response<Body>>),
    /// Accepts the request and sends nothing.
    Silence,
    /// Closes the connection without an answer.
    HangUp,
}

/// One step of an event stream.
pub(super) enum Step {
    Bytes(Vec<u8>),
    Pause(Duration),
    /// Sends nothing more, and keeps the connection open.
    Stall,
    /// Breaks the connection.
    Cut,
}

pub(super) struct Seen {
    /// Method, path and query.
    pub(super) target: String,
    pub(super) headers: HeaderMap,
    /// The JSON body; null if there was none.
    pub(super) body: Value,
    pub(super) peer: SocketAddr,
}

struct Script {
    plays: Mutex<VecDeque<Play>>,
    seen: Mutex<Vec<Arc<Seen>>>,
}

pub(super) struct Scripted {
    /// The base URL, with a slash at the end.
    pub(super) url: String,
    script: Arc<Script>,
    /// Stops with the fixture.
    _server: JoinSet<()>,
}

impl Scripted {
    pub(super) async fn start(plays: Vec<Play>) -> Self {
        let script = Arc::new(Script {
            plays: Mutex::new(plays.into()),
            seen: Mutex::default(),
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let app = axum::Router::new()
            .fallback(answer)
            .with_state(Arc::clone(&script));
        let mut server = JoinSet::new();
        server.spawn(async move {
            axum::serve(
                listener,
                app.into_make_service_with_connect_info::<SocketAddr>(),
            )
            .await
            .unwrap();
        });
        Self {
            url,
            script,
            _server: server,
        }
    }

    pub(super) fn requests(&self) -> Vec<Arc<Seen>> {
        self.script.seen.lock().unwrap().clone()
    }

    pub(super) fn targets(&self) -> Vec<String> {
        self.requests()
            .iter()
            .map(|seen| seen.target.clone())
            .collect()
    }
}

/// An answer with a JSON content type and this body, which need not be JSON.
pub(super) fn json_answer(status: u16, headers: &[(&str, &str)], body: &str) -> Play {
    let mut answer = Response::builder()
        .status(status)
        .header("content-type", "application/json");
    for (name, value) in headers {
        answer = answer.header(*name, *value);
    }
    Play::Answer(Box::new(answer.body(Body::from(body.to_owned())).unwrap()))
}

/// The same answer after a delay.
pub(super) fn late(time: Duration, play: Play) -> Play {
    match play {
        Play::Answer(answer) => Play::Late(time, answer),
        other => other,
    }
}

/// An event stream with one chunk for each `Bytes`.
pub(super) fn sse(steps: Vec<Step>) -> Play {
    let body = Body::from_stream(stream::unfold(VecDeque::from(steps), |mut steps| async {
        loop {
            match steps.pop_front()? {
                Step::Bytes(bytes) => return Some((Ok(Bytes::from(bytes)), steps)),
                Step::Pause(time) => tokio::time::sleep(time).await,
                Step::Stall => std::future::pending().await,
                Step::Cut => {
                    // What was written before must leave first, or it is lost with the
                    // connection.
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    return Some((Err(std::io::Error::other("cut")), steps));
                }
            }
        }
    }));
    let answer = Response::builder()
        .header("content-type", "text/event-stream; charset=utf-8")
        .body(body);
    Play::Answer(Box::new(answer.unwrap()))
}

async fn answer(
    State(script): State<Arc<Script>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response<Body>, Infallible> {
    let body = if body.is_empty() {
        Value::Null
    } else {
        serde_json::from_slice(&body).unwrap()
    };
    let target = format!("{method} {}", uri.path_and_query().unwrap());
    script.seen.lock().unwrap().push(Arc::new(Seen {
        target,
        headers,
        body,
        peer,
    }));
    let play = script
        .plays
        .lock()
        .unwrap()
        .pop_front()
        .expect("there are more requests than answers in the script");
    match play {
        Play::Answer(answer) => Ok(*answer),
        Play::Late(time, answer) => {
            tokio::time::sleep(time).await;
            Ok(*answer)
        }
        Play::Silence => std::future::pending().await,
        // A panic in a handler closes its connection.
        Play::HangUp => std::panic::resume_unwind(Box::new("hang up")),
    }
}

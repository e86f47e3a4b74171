//! A proxy before the simulator that refuses requests for what the model would read.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, Method, Response, StatusCode, Uri, header};
use serde_json::Value;
use tokio::task::JoinSet;

/// Returns the refusal of a request whose model would read this text: the JSON of the thread's
/// input so far, and of the request.
pub(crate) type Rule = Box<dyn Fn(&str) -> Option<(u16, String)> + Send + Sync>;

pub(crate) struct Picky {
    /// The base URL.
    pub(crate) url: String,
    shared: Arc<Shared>,
    /// Stops with the fixture.
    _server: JoinSet<()>,
}

struct Shared {
    upstream: String,
    client: reqwest::Client,
    rule: Mutex<Rule>,
    /// The input of each thread, and of each response of a chain.
    read: Mutex<HashMap<String, String>>,
    /// The requests that were to start a run.
    starts: Mutex<u32>,
}

impl Picky {
    /// Starts a proxy that refuses nothing.
    pub(crate) async fn before(upstream: &str) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let shared = Arc::new(Shared {
            upstream: upstream.trim_end_matches("/v1").to_owned(),
            client: reqwest::Client::new(),
            rule: Mutex::new(Box::new(|_| None)),
            read: Mutex::default(),
            starts: Mutex::new(0),
        });
        let app = axum::Router::new()
            .fallback(answer)
            .with_state(Arc::clone(&shared))
            .layer(axum::extract::DefaultBodyLimit::disable());
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self {
            url,
            shared,
            _server: server,
        }
    }

    pub(crate) fn refuse(
        &self,
        rule: impl Fn(&str) -> Option<(u16, String)> + Send + Sync + 'static,
    ) {
        *self.shared.rule.lock().unwrap() = Box::new(rule);
    }

    /// Returns how many requests were to start a run since the last call.
    pub(crate) fn starts(&self) -> u32 {
        std::mem::take(&mut *self.shared.starts.lock().unwrap())
    }
}

async fn answer(
    State(shared): State<Arc<Shared>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response<Body> {
    let path = uri.path().to_owned();
    let sent: Value = serde_json::from_slice(&body).unwrap_or_default();
    let is_start =
        method == Method::POST && (path.ends_with("/responses") || path.ends_with("/runs"));
    let makes =
        method == Method::POST && (path.ends_with("/conversations") || path.ends_with("/threads"));
    let adds = method == Method::POST && (path.ends_with("/items") || path.ends_with("/messages"));
    let in_path = path
        .split('/')
        .skip_while(|part| !matches!(*part, "threads" | "conversations"))
        .nth(1);
    let thread = sent["conversation"]
        .as_str()
        .or(sent["previous_response_id"].as_str())
        .or(in_path)
        .map(str::to_owned);
    let before = thread
        .as_ref()
        .and_then(|id| shared.read.lock().unwrap().get(id).cloned());
    let input = ["input", "additional_messages", "items", "messages"]
        .map(|field| sent[field].to_string())
        .concat();
    let read = before.unwrap_or_default() + &input;
    if is_start {
        *shared.starts.lock().unwrap() += 1;
    }
    if is_start || makes || adds {
        let refusal = (shared.rule.lock().unwrap())(&read);
        if let Some((status, body)) = refusal {
            return Response::builder()
                .status(status)
                .header(header::CONTENT_TYPE, "application/json")
                .body(Body::from(body))
                .unwrap();
        }
    }
    let mut request = shared
        .client
        .request(method, format!("{}{uri}", shared.upstream))
        .body(body);
    for (name, value) in &headers {
        if name != header::HOST && name != header::CONTENT_LENGTH {
            request = request.header(name, value);
        }
    }
    let Ok(answered) = request.send().await else {
        return Response::builder()
            .status(StatusCode::BAD_GATEWAY)
            .body(Body::empty())
            .unwrap();
    };
    let mut response = Response::builder().status(answered.status());
    if let Some(kind) = answered.headers().get(header::CONTENT_TYPE) {
        response = response.header(header::CONTENT_TYPE, kind);
    }
    let bytes = answered.bytes().await.unwrap_or_default();
    let mut known = shared.read.lock().unwrap();
    if let Some(thread) = thread {
        known.insert(thread, read.clone());
    }
    if makes || is_start {
        let text = String::from_utf8_lossy(&bytes);
        let prefix = if makes { "" } else { "resp_" };
        let id = text
            .split("\"id\":\"")
            .nth(1)
            .and_then(|rest| rest.split('"').next())
            .filter(|id| id.starts_with(prefix));
        if let Some(id) = id {
            known.insert(id.to_owned(), read);
        }
    }
    response.body(Body::from(bytes)).unwrap()
}

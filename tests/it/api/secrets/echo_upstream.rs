//! An upstream that repeats what it receives.

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::HeaderValue;
use axum::response::Response;
use http_body_util::BodyExt;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::task::JoinSet;

/// A server that repeats what it received, in headers, errors and events.
pub(super) struct EchoUpstream {
    pub(super) url: String,
    _task: JoinSet<()>,
}

/// The forms of the answers.
pub(super) const PARROT_SAYS: [&str; 6] = ["400", "401", "500", "307", "garbage", "events"];

impl EchoUpstream {
    pub(super) async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let mut task = JoinSet::new();
        task.spawn(async move {
            axum::serve(listener, Router::new().fallback(repeat))
                .await
                .unwrap();
        });
        Self { url, _task: task }
    }
}

async fn repeat(request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let key = parts.headers["authorization"]
        .to_str()
        .unwrap()
        .strip_prefix("Bearer ")
        .unwrap();
    let heard = format!(
        "{} {:?} {}",
        parts.uri,
        parts.headers,
        String::from_utf8_lossy(&body)
    );
    let headers = format!("{key} {}", parts.headers["authorization"].to_str().unwrap());
    let error = json!({"code": key, "type": key, "param": key, "message": format!("{key} {headers} {heard}")});
    let mut segments = parts.uri.path().split('/').skip(1);
    let (says, what) = (segments.next().unwrap(), segments.next().unwrap());
    let makes_thread = parts.method == Method::POST
        && parts.uri.path().split('/').count() == 3
        && what != "responses";
    let mut response = Response::new(Body::empty());
    let mut kind = "application/json";
    let body = match says {
        "events" if makes_thread => json!({"id": "thread_1", "object": "thread"}).to_string(),
        "events" if parts.method == Method::POST => {
            kind = "text/event-stream";
            let begun = json!({"id": "run_1", "object": "thread.run", "status": "in_progress"});
            let failed = json!({"id": "run_1", "object": "thread.run", "status": "failed", "last_error": error, "error": error});
            let events = if what == "threads" {
                [("thread.run.created", begun), ("thread.run.failed", failed)]
            } else {
                [
                    (
                        "response.created",
                        json!({"type": "response.created", "response": begun}),
                    ),
                    (
                        "response.failed",
                        json!({"type": "response.failed", "response": failed}),
                    ),
                ]
            };
            let event =
                |(name, data): (&str, Value)| format!(": {heard}\nevent: {name}\ndata: {data}\n\n");
            events.map(event).concat()
        }
        "garbage" => heard,
        _ => {
            *response.status_mut() = says.parse().unwrap_or(StatusCode::NOT_FOUND);
            json!({"error": error}).to_string()
        }
    };
    for name in [
        "x-request-id",
        "apim-request-id",
        "retry-after",
        "location",
        "server",
        "openai-poll-after-ms",
    ] {
        response
            .headers_mut()
            .insert(name, HeaderValue::from_str(key).unwrap());
    }
    response
        .headers_mut()
        .insert("content-type", HeaderValue::from_static(kind));
    *response.body_mut() = body.into();
    response
}

//! The gateway tells the caller and the operator why the upstream refused. It reads the refusals of
//! servers and relays in all their shapes.

use std::sync::{Arc, Mutex};

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{Method, Uri, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::support::gateway::{Gateway, text};
use crate::support::scene::{Backend, Protocol, Scene, on_each_protocol};

on_each_protocol!(refusals_have_codes_of_their_own);

/// Settings without repeats, and without the breaker.
const SETTINGS: &str = "[runs]\nmax_retries = 0\n";
const UPSTREAM: &str = "breaker_min_requests = 0\nlock_window = \"100ms\"\n";

/// A server that refuses each run with the answer that the test chose.
struct Refusing {
    url: String,
    state: Arc<Script>,
    _server: JoinSet<()>,
}

struct Script {
    /// Whether a response that continues no other one is answered.
    accepts_first: bool,
    /// Status, type and body of the refusal.
    answer: Mutex<(u16, &'static str, String)>,
    runs: Mutex<Vec<Value>>,
}

impl Refusing {
    async fn start(accepts_first: bool) -> Self {
        let state = Arc::new(Script {
            accepts_first,
            answer: Mutex::new((500, "text/plain", String::new())),
            runs: Mutex::default(),
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let app = axum::Router::new()
            .fallback(answer)
            .with_state(Arc::clone(&state));
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self {
            url,
            state,
            _server: server,
        }
    }

    /// Sets the refusal. A status of 200 makes it an event of a stream.
    fn refuse(&self, status: u16, body: &str) {
        let kind = match status {
            200 => "text/event-stream",
            _ if body.starts_with('<') => "text/html",
            _ => "application/json",
        };
        *self.state.answer.lock().unwrap() = (status, kind, body.to_owned());
        self.state.runs.lock().unwrap().clear();
    }

    fn runs(&self) -> usize {
        self.state.runs.lock().unwrap().len()
    }
}

async fn answer(
    State(script): State<Arc<Script>>,
    method: Method,
    uri: Uri,
    body: Bytes,
) -> Response {
    let json = |value: Value| axum::Json(value).into_response();
    let path = uri.path();
    if method != Method::POST || path.contains("/items") || path.contains("/messages") {
        return json(json!({"object": "list", "data": [], "has_more": false}));
    }
    if path.ends_with("/threads") || path.ends_with("/conversations") {
        return json(json!({"id": "thread_1"}));
    }
    let request: Value = serde_json::from_slice(&body).unwrap();
    let is_first = request["previous_response_id"].is_null();
    script.runs.lock().unwrap().push(request);
    if script.accepts_first && is_first {
        let output = json!([{"type": "message", "id": "msg_1", "role": "assistant",
            "content": [{"type": "output_text", "text": "fine"}]}]);
        let response = json!({"id": "resp_1", "status": "completed", "output": output});
        let event = json!({"type": "response.completed", "response": response});
        let kind = [(header::CONTENT_TYPE, "text/event-stream")];
        return (kind, format!("data: {event}\n\n")).into_response();
    }
    let (status, kind, body) = script.answer.lock().unwrap().clone();
    let status = axum::http::StatusCode::from_u16(status).unwrap();
    (status, [(header::CONTENT_TYPE, kind)], body).into_response()
}

/// Wraps an error as a relay does.
fn relayed(inner: &Value, code: &str) -> String {
    let message = format!("litellm.BadRequestError: OpenAIException - {inner}. Received Model=m");
    json!({"error": {"message": message, "type": null, "param": null, "code": code}}).to_string()
}

fn error(code: &str) -> Value {
    json!({"error": {"message": "no SECRET", "type": "invalid_request_error", "code": code}})
}

async fn refusals_have_codes_of_their_own(mut scene: Scene) {
    let server = Refusing::start(false).await;
    scene.upstream_url.clone_from(&server.url);
    let gateway = scene.gateway_both(SETTINGS, UPSTREAM).await;
    let event = |value: &Value| format!("data: {value}\n\n");
    let quota_text = "You exceeded your current quota, please check your plan.";
    let cases = [
        (400, error("content_filter").to_string(), (422, "content-refused"), "content_refused", Some("content_filter")),
        (400, relayed(&error("content_policy_violation"), "400"), (422, "content-refused"), "content_refused", Some("content_policy_violation")),
        (401, error("invalid_api_key").to_string(), (502, "upstream-error"), "upstream_unauthorized", Some("invalid_api_key")),
        (403, "<html>Forbidden</html>".to_owned(), (502, "upstream-error"), "upstream_unauthorized", None),
        (404, json!({"error": {"code": "DeploymentNotFound", "message": "m"}}).to_string(), (502, "upstream-error"), "upstream_misconfigured", Some("DeploymentNotFound")),
        (400, json!({"error": {"message": "m", "param": "temperature", "code": "unsupported_parameter"}}).to_string(), (502, "upstream-error"), "upstream_misconfigured", Some("unsupported_parameter")),
        (429, json!({"error": {"message": quota_text}}).to_string(), (502, "upstream-error"), "upstream_quota_exhausted", None),
        (403, relayed(&error("insufficient_quota"), "403"), (502, "upstream-error"), "upstream_quota_exhausted", Some("insufficient_quota")),
        (429, error("rate_limit_exceeded").to_string(), (503, "upstream-rate-limited"), "upstream_rate_limited", Some("rate_limit_exceeded")),
        (200, event(&error("content_filter")), (422, "content-refused"), "content_refused", Some("content_filter")),
        (200, event(&error("insufficient_quota")), (502, "upstream-error"), "upstream_quota_exhausted", Some("insufficient_quota")),
        (200, event(&json!({"error": {"message": "m", "code": 429}})), (503, "upstream-rate-limited"), "upstream_rate_limited", Some("429")),
        (200, event(&json!({"message": quota_text})), (502, "upstream-error"), "upstream_quota_exhausted", None),
    ];
    for (n, (status, body, problem, code, upstream_code)) in cases.into_iter().enumerate() {
        server.refuse(status, &body);
        let user = format!("/v1/users/user-{n}");
        let message = json!({"content": "hello"});
        let answer = gateway.post(&format!("{user}/messages"), &message).await;
        assert_eq!(
            answer.problem(),
            problem,
            "{status} {body}: {:#}",
            answer.body
        );
        assert_eq!(answer.body["code"], code, "{status} {body}");
        assert_eq!(
            answer.body["upstream_code"].as_str(),
            upstream_code,
            "{status} {body}"
        );
        if status != 200 {
            assert_eq!(answer.body["upstream_status"], status, "{status} {body}");
        }
        let may_pass = code == "upstream_rate_limited";
        assert_eq!(
            answer.headers.contains_key("retry-after"),
            may_pass,
            "{status} {body}"
        );
        assert_eq!(server.runs(), 1, "sent once: {status} {body}");
        assert!(
            !answer.body.to_string().contains("SECRET"),
            "{:#}",
            answer.body
        );
        let runs = gateway.get(&format!("{user}/runs")).await.ok();
        let told = &runs["data"][0]["error"];
        assert_eq!(
            (
                &told["code"],
                &told["upstream_code"],
                &told["upstream_status"]
            ),
            (
                &answer.body["code"],
                &answer.body["upstream_code"],
                &answer.body["upstream_status"]
            ),
            "{runs:#}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_response_is_recognised_behind_relays() {
    let mut scene = Scene::by_chance(Protocol::Chain).await;
    let server = Refusing::start(true).await;
    scene.upstream_url.clone_from(&server.url);
    let gateway = scene.gateway_both(SETTINGS, UPSTREAM).await;
    let missing = json!({"error": {"message": "Response with id 'resp_1' not found.", "param": "response_id", "code": 404}});
    for (n, (status, body)) in [
        (404, relayed(&missing, "404")),
        (400, relayed(&missing, "400")),
        (500, relayed(&missing, "500")),
        (404, json!({"code": "not-found", "error": "Response with id resp_1 not found"}).to_string()),
        (404, json!({"detail": "Response with id 'resp_1' not found"}).to_string()),
        (404, json!([missing]).to_string()),
        (502, json!({"error": {"message": "Provider returned error", "code": 502, "metadata": {"raw": missing.to_string()}}}).to_string()),
    ]
    .into_iter()
    .enumerate()
    {
        let user = format!("/v1/users/user-{n}/messages");
        gateway.post(&user, &json!({"content": "hello"})).await.ok();
        server.refuse(status, &body);
        let answer = gateway.post(&user, &json!({"content": "and now?"})).await.ok();
        assert_eq!(text(&answer["message"]), "fine", "{status} {body}");
        assert_eq!(server.runs(), 2, "{status} {body}");
        let sent = server.state.runs.lock().unwrap().pop().unwrap();
        assert_eq!(sent["input"].as_array().unwrap().len(), 3, "with its history: {sent:#}");
    }
}

/// Returns the line about a refusal by this upstream.
fn refusal_line(gateway: &Gateway, upstream: &str) -> String {
    let named = format!("\"upstream.name\":\"{upstream}\"");
    let lines = gateway.logs();
    let mut own = lines
        .iter()
        .filter(|line| line.contains(&named) && line.contains("http.status"));
    own.next_back()
        .unwrap_or_else(|| panic!("{lines:#?}"))
        .clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn operator_learns_what_to_do_about_refusal() {
    let mut scene = Scene::new(Protocol::Chain, Backend::Sqlite).await;
    let server = Refusing::start(false).await;
    scene.upstream_url.clone_from(&server.url);
    let talkative = format!(
        "{SETTINGS}[upstreams.talkative]\nkind = \"responses\"\nbase_url = \"{}\"\napi_key = \"planted-key-of-mine\"\n\
         conversations = false\nlog_upstream_errors = true\nheaders = {{ x-team = \"planted-team\" }}\n\
         breaker_min_requests = 0\n[assistants.talkative]\nupstream = \"talkative\"\nmodel = \"m\"\n",
        server.url
    );
    let gateway = scene.gateway_both(&talkative, UPSTREAM).await;
    let words = format!(
        "Your organization must be verified. Key planted-key-of-mine of planted-team, Bearer abc.def-ghi, sk-proj-1 {}",
        "and so on ".repeat(1000)
    );
    let about = |message: &str, param: &str| {
        json!({"error": {"message": message, "param": param, "code": "unsupported_value"}})
            .to_string()
    };
    let failed = json!({"type": "response.failed", "response": {
        "id": "resp_2", "status": "failed", "output": [], "error": error("insufficient_quota")["error"],
    }});
    for (status, body, hint) in [
        (
            400,
            about(&words, "stream"),
            "must be verified by its owner",
        ),
        (401, error("invalid_api_key").to_string(), "`api_key_file`"),
        (
            404,
            "<html>Not Found</html>".to_owned(),
            "should it end in /v1?",
        ),
        (
            404,
            error("model_not_found").to_string(),
            "assistant's `model`",
        ),
        (
            429,
            error("insufficient_quota").to_string(),
            "no quota left",
        ),
        (
            200,
            format!("data: {}\n\n", error("model_not_found")),
            "assistant's `model`",
        ),
        (200, format!("data: {failed}\n\n"), "no quota left"),
    ] {
        server.refuse(status, &body);
        for (assistant, upstream) in [("default", "simulated"), ("talkative", "talkative")] {
            let message = json!({"content": "hello", "assistant": assistant});
            let answer = gateway
                .post(&format!("/v1/users/{upstream}/messages"), &message)
                .await;
            assert!(answer.status.as_u16() >= 500, "{answer:?}");
            let line = refusal_line(&gateway, upstream);
            assert!(
                line.contains(&format!("\"http.status\":{status}")),
                "{status}: {line}"
            );
            assert!(
                line.contains("WARN") && line.contains(hint),
                "{hint}: {line}"
            );
        }
    }
    let lines = gateway.logs();
    let told = |line: &&String| line.contains("Your organization must be verified");
    let told: Vec<_> = lines.iter().filter(told).collect();
    let [line] = told[..] else {
        panic!("one upstream's words are logged, the other's are not: {told:#?}");
    };
    assert!(line.contains("talkative") && line.len() < 2500, "{line}");
    for secret in ["planted", "abc.def", "sk-proj"] {
        assert!(!line.contains(secret), "{line}");
    }
}

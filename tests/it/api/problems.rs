//! Bad input gets a typed problem that says how to mend it.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::routes::Routes;
use crate::support::scene::{Backend, Protocol, Scene};

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_with_typed_problem() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let gateway = Routes::new(&scene, "[server]\nmax_body_bytes = 4096\n").await;
    let messages = "/v1/users/alice/messages";
    let pairs: serde_json::Map<_, _> = (0..11).map(|n| (n.to_string(), json!("x"))).collect();
    for (body, status, name, hint) in [
        (json!({}), 422, "invalid-request", "content"),
        (json!({"content": 7}), 422, "invalid-request", "content"),
        (json!({"content": ""}), 422, "invalid-request", "empty"),
        (json!({"content": []}), 422, "invalid-request", "empty"),
        (
            json!({"content": "nul \u{0}"}),
            422,
            "invalid-request",
            "NUL",
        ),
        (
            json!({"content": [{"type": "text", "text": "a", "extra": 1}]}),
            422,
            "invalid-request",
            "content[0]",
        ),
        (
            json!({"content": [{"type": "video"}]}),
            422,
            "invalid-request",
            "`content[0].type`: must be one of `text`, `image_url`, `image_file`, `file`",
        ),
        (
            json!({"content": [{"type": "file", "file": {"file_id": "f", "file_url": "u"}}]}),
            422,
            "invalid-request",
            "exactly one of `file_id`, `file_url` and `file_data`",
        ),
        (
            json!({"content": [{"type": "image_url", "image_url": "u"}]}),
            422,
            "invalid-request",
            "`content[0].image_url`: must be an object, not a string",
        ),
        (
            json!({"content": [{"type": "text", "image_url": {"url": "u"}}]}),
            422,
            "invalid-request",
            "its `type`",
        ),
        (
            json!({"content": "a", "timeout_ms": "1"}),
            422,
            "invalid-request",
            "a whole number, 0 or more, not a string",
        ),
        (
            json!({"content": "a", "stream": "yes"}),
            422,
            "invalid-request",
            "must be `true` or `false`",
        ),
        (
            json!({"content": "a", "metadata": {"k": "a\u{0}"}}),
            422,
            "invalid-request",
            "NUL",
        ),
        (
            json!({"content": "a", "metadata": {"k\u{0}": "a"}}),
            422,
            "invalid-request",
            "NUL",
        ),
        (
            json!({"content": "a", "metadata": {"": "a"}}),
            422,
            "invalid-request",
            "empty",
        ),
        (
            json!({"content": [{"type": "refusal", "refusal": "no"}]}),
            422,
            "invalid-request",
            "refusal",
        ),
        (
            json!({"content": "a", "colour": "blue"}),
            422,
            "invalid-request",
            "colour",
        ),
        (
            json!({"content": "a", "metadata": {"k": "x".repeat(513)}}),
            422,
            "invalid-request",
            "512",
        ),
        (
            json!({"content": "a", "metadata": pairs}),
            422,
            "invalid-request",
            "10",
        ),
        (
            json!({"content": "a", "metadata": {"threadkeeper_run": "x"}}),
            422,
            "invalid-request",
            "reserved",
        ),
        (
            json!({"content": "a", "timeout_ms": 0}),
            422,
            "invalid-request",
            "timeout_ms",
        ),
        (
            json!({"content": "a", "timeout_ms": 1_800_001}),
            422,
            "invalid-request",
            "1800000",
        ),
        (
            json!({"content": "a", "multitask_strategy": "panic"}),
            422,
            "invalid-request",
            "enqueue",
        ),
        (
            json!({"content": "a", "multitask_strategy": []}),
            422,
            "invalid-request",
            "`: must be a string",
        ),
        (
            json!({"content": "a", "multitask_strategy": "queue"}),
            422,
            "invalid-request",
            "rollback",
        ),
        (
            json!({"content": "a", "on_disconnect": "explode"}),
            422,
            "invalid-request",
            "continue",
        ),
        (
            json!({"content": "x".repeat(5000)}),
            413,
            "payload-too-large",
            "4096",
        ),
    ] {
        let answer = gateway.post(messages, &body).await;
        assert_eq!(
            answer.problem(),
            (status, name),
            "{body}: {:#}",
            answer.body
        );
        let detail = answer.body["detail"].as_str().unwrap();
        assert!(detail.contains(hint), "{body}: {detail}");
        for rust in [
            "struct ",
            "u64",
            "invalid type",
            "expected",
            "variant",
            "EOF",
            "at line",
        ] {
            assert!(!detail.contains(rust), "{body}: {detail}");
        }
    }
    for (query, hint) in [
        ("limit=x", "`limit`: must be a whole number"),
        ("order=up", "`order`: must be `asc` or `desc`"),
        ("archived=1", "`archived`: must be `true` or `false`"),
    ] {
        let answer = gateway.get(&format!("{messages}?{query}")).await;
        assert_eq!(answer.problem(), (400, "invalid-request"));
        let detail = answer.body["detail"].as_str().unwrap();
        assert!(detail.contains(hint), "{detail}");
    }
    let since = gateway.get("/v1/threads?created_before=2026").await;
    assert!(
        since.body["detail"]
            .as_str()
            .unwrap()
            .contains("must be a time such as"),
        "{since:?}"
    );
    assert_eq!(
        gateway.get("/v1/users/alice/thread").await.problem(),
        (404, "not-found"),
        "no refused request stored anything"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_paths_and_types_are_refused_with_typed_problem() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let gateway = Routes::new(&scene, "").await;
    let messages = "/v1/users/alice/messages";
    let long = format!("/v1/users/{}/thread", "k".repeat(257));
    for (method, path, status, name) in [
        (Method::GET, "/", 404, "not-found"),
        (Method::GET, "/v1/users/alice", 405, "method-not-allowed"),
        (Method::GET, "/v1/users/alice/messages", 404, "not-found"),
        (Method::GET, "/v1/users/alice/runs", 404, "not-found"),
        (
            Method::GET,
            "/v1/users/alice/runs/run_0198f000000070008000000000000000",
            404,
            "not-found",
        ),
        (
            Method::GET,
            "/v1/users/alice/runs/thr_1",
            400,
            "invalid-request",
        ),
        (
            Method::GET,
            "/v1/users/a%00b/thread",
            400,
            "invalid-request",
        ),
        (Method::GET, "/v1/users/%ff/thread", 400, "invalid-request"),
        (Method::GET, &long, 400, "invalid-request"),
        (
            Method::GET,
            "/v1/users/alice/messages?limit=0",
            400,
            "invalid-request",
        ),
        (
            Method::GET,
            "/v1/users/alice/messages?limit=101",
            400,
            "invalid-request",
        ),
        (
            Method::GET,
            "/v1/users/alice/messages?limit=many",
            400,
            "invalid-request",
        ),
        (
            Method::GET,
            "/v1/users/alice/messages?order=up",
            400,
            "invalid-request",
        ),
        (
            Method::GET,
            "/v1/users/alice/messages?page=2",
            400,
            "invalid-request",
        ),
        (
            Method::GET,
            "/v1/users/alice/messages?after=x",
            400,
            "invalid-request",
        ),
        (
            Method::DELETE,
            "/v1/users/alice/messages",
            405,
            "method-not-allowed",
        ),
        (
            Method::POST,
            "/v1/users/alice/thread",
            405,
            "method-not-allowed",
        ),
        (Method::PUT, "/healthz", 405, "method-not-allowed"),
    ] {
        let answer = gateway.send(gateway.request(method.clone(), path)).await;
        assert_eq!(
            answer.problem(),
            (status, name),
            "{method} {path}: {:#}",
            answer.body
        );
        assert_eq!(
            answer.headers.contains_key("allow"),
            status == 405,
            "{method} {path}"
        );
    }

    let raw = |content_type: &'static str, body: &'static str| {
        gateway.send(
            gateway
                .request(Method::POST, messages)
                .header("content-type", content_type)
                .body(body),
        )
    };
    assert_eq!(
        raw("application/json", "{\"content\":").await.problem(),
        (400, "invalid-request")
    );
    assert_eq!(
        raw("application/json", "{\"content\":\"a\"} x")
            .await
            .problem(),
        (400, "invalid-request")
    );
    assert_eq!(
        raw("text/plain", "{\"content\":\"a\"}").await.problem(),
        (415, "unsupported-media-type")
    );
    raw("application/json; charset=utf-8", "{\"content\":\"a\"}")
        .await
        .ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn body_not_arriving_times_out() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let gateway = scene
        .gateway_with("[server]\nbody_read_timeout = \"100ms\"\n")
        .await;
    let never = futures_util::stream::pending::<Result<bytes::Bytes, std::io::Error>>();
    let request = gateway
        .request(Method::POST, "/v1/users/alice/messages")
        .header("content-type", "application/json");
    let answer = gateway
        .send(request.body(reqwest::Body::wrap_stream(never)))
        .await;
    assert_eq!(answer.problem(), (408, "request-timeout"));
}

#[tokio::test(flavor = "multi_thread")]
async fn request_id_is_kept_when_valid() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let gateway = Routes::new(&scene, "").await;
    let with = async |id: &str| {
        let answer = gateway
            .send(
                gateway
                    .request(Method::GET, "/nowhere")
                    .header("x-request-id", id),
            )
            .await;
        assert_eq!(
            answer.body["request_id"],
            answer.headers["x-request-id"].to_str().unwrap()
        );
        answer.body["request_id"].as_str().unwrap().to_owned()
    };
    assert_eq!(with("abc-123").await, "abc-123");
    for unusable in ["", "two words", "\"quoted\"", &"x".repeat(129)] {
        let given = with(unusable).await;
        assert!(given.starts_with("req_"), "{unusable:?} became {given:?}");
    }
    let missing: Value = gateway.get("/nowhere").await.body;
    assert!(missing["request_id"].as_str().unwrap().starts_with("req_"));
}

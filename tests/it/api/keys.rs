//! The keys of a request: in paths and in headers; and unknown query parameters.

use reqwest::header::HeaderValue;
use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use threadkeeper::api::routes;

use crate::support::gateway::{Answer, EventReader, Gateway, text};
use crate::support::routes::Routes;
use crate::support::scene::{Backend, Protocol, Scene};

/// A user key as somebody's directory may have it.
const USER: &str = "org/42?x#é .";
const ENCODED: &str = "org%2F42%3Fx%23%C3%A9%20.";

fn by_headers(request: RequestBuilder, keys: &[(&str, &str)]) -> RequestBuilder {
    keys.iter().fold(request, |request, (name, value)| {
        request.header(
            format!("threadkeeper-{name}"),
            HeaderValue::from_bytes(value.as_bytes()).unwrap(),
        )
    })
}

async fn get(gateway: &Gateway, path: &str, keys: &[(&str, &str)]) -> Answer {
    gateway
        .send(by_headers(gateway.request(Method::GET, path), keys))
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn header_keys_name_same_conversations_as_path_keys() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let gateway = scene.gateway().await;
    let (user, topic, session) = (
        ("user", ENCODED),
        ("topic", "a%2C%20b"),
        ("session", "tab;1"),
    );
    for (keys, scope, shown) in [
        (vec![user], format!("/v1/users/{ENCODED}"), "user"),
        (
            vec![user, topic],
            format!("/v1/users/{ENCODED}/topics/a%2C%20b"),
            "topic:a, b",
        ),
        (
            vec![user, session],
            format!("/v1/users/{ENCODED}/sessions/tab%3B1"),
            "session:tab;1",
        ),
    ] {
        let post = |path: &str, body: Value| {
            by_headers(gateway.request(Method::POST, path), &keys).json(&body)
        };
        let said = gateway
            .send(post(
                "/v1/conversation/messages",
                json!({"content": "hello"}),
            ))
            .await
            .ok();
        assert_eq!(
            said["thread"]["key"],
            json!({"tenant": "default", "user": USER, "scope": shown})
        );
        let by_path = gateway
            .get(&format!("{scope}/messages?order=asc"))
            .await
            .ok();
        let by_header = get(&gateway, "/v1/conversation/messages?order=asc", &keys)
            .await
            .ok();
        assert_eq!(by_path, by_header);
        assert_eq!(text(&by_path["data"][0]), "hello");

        // An answer's link can be followed with headers, too.
        scene.simulator.hold();
        let body = json!({"content": "later"});
        let later = post("/v1/conversation/messages", body).header("prefer", "respond-async");
        let later = gateway.send(later).await;
        assert_eq!(later.status, StatusCode::ACCEPTED);
        let place = later.headers["location"].to_str().unwrap();
        assert_eq!(
            place,
            format!(
                "/v1/conversation/runs/{}",
                later.body["run"]["id"].as_str().unwrap()
            )
        );
        scene.simulator.release();
        let events = by_headers(
            gateway.request(Method::GET, &format!("{place}/events")),
            &keys,
        )
        .send()
        .await
        .unwrap();
        assert_eq!(
            EventReader::new(events).rest().await.pop().unwrap().name,
            "run.completed"
        );
        assert_eq!(
            get(&gateway, place, &keys).await.ok()["run"]["status"],
            "completed"
        );

        // A repeat by the other kind of keys is recognised.
        let body = json!({"content": "once"});
        let first = post("/v1/conversation/messages", body.clone()).header("idempotency-key", "k");
        let first = gateway.send(first).await.ok();
        let again = gateway
            .request(Method::POST, &format!("{scope}/messages"))
            .json(&body);
        let again = gateway.send(again.header("idempotency-key", "k")).await;
        assert_eq!(again.headers["idempotent-replayed"], "true");
        assert_eq!(again.ok()["run"], first["run"]);
    }
    // In another conversation the same idempotency key is another request's.
    let other = by_headers(
        gateway.request(Method::POST, "/v1/conversation/messages"),
        &[("user", "other")],
    );
    let other = gateway
        .send(
            other
                .json(&json!({"content": "once"}))
                .header("idempotency-key", "k"),
        )
        .await;
    assert!(!other.headers.contains_key("idempotent-replayed"));
    other.ok();

    let threads = get(&gateway, "/v1/user/threads", &[user]).await.ok();
    assert_eq!(threads["data"].as_array().unwrap().len(), 3);
    let export = get(&gateway, "/v1/user/export", &[user]).await;
    assert!(export.body.to_string().contains("hello"), "{export:?}");
    let gone = gateway
        .send(by_headers(
            gateway.request(Method::DELETE, "/v1/user"),
            &[user],
        ))
        .await
        .ok();
    assert_eq!(gone["threads_done"], 3);
    assert_eq!(
        get(&gateway, "/v1/conversation/thread", &[user])
            .await
            .problem(),
        (404, "not-found")
    );
    get(&gateway, "/v1/conversation/thread", &[("user", "other")])
        .await
        .ok();
    assert!(
        !gateway.logs().iter().any(|line| line.contains("org")),
        "keys are not logged"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn conflicting_or_malformed_keys_are_refused() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let gateway = Routes::new(&scene, "").await;
    gateway
        .post("/v1/users/alice/messages", &json!({"content": "hello"}))
        .await
        .ok();
    let (user, session, topic) = (("user", "alice"), ("session", "s"), ("topic", "t"));
    for (path, keys, hint) in [
        ("/v1/users/alice/thread", &[user][..], "threadkeeper-user"),
        (
            "/v1/users/alice/thread",
            &[("user", "bob")],
            "threadkeeper-user",
        ),
        ("/v1/users/alice/thread", &[session], "threadkeeper-session"),
        ("/v1/users/alice/threads", &[topic], "threadkeeper-topic"),
        (
            "/v1/users/alice/topics/t/thread",
            &[topic],
            "threadkeeper-topic",
        ),
        (
            "/v1/conversation/thread",
            &[],
            "send the header `threadkeeper-user`",
        ),
        (
            "/v1/conversation/thread",
            &[session],
            "send the header `threadkeeper-user`",
        ),
        ("/v1/conversation/thread", &[user, user], "once"),
        ("/v1/conversation/thread", &[user, session, session], "once"),
        (
            "/v1/conversation/thread",
            &[user, session, topic],
            "not both",
        ),
        (
            "/v1/conversation/thread",
            &[("user", "alice, bob")],
            "percent-encoded",
        ),
        (
            "/v1/conversation/thread",
            &[("user", "alice%2")],
            "percent-encoded",
        ),
        (
            "/v1/conversation/thread",
            &[("user", "%ff")],
            "percent-encoded",
        ),
        (
            "/v1/conversation/thread",
            &[("user", "é")],
            "percent-encoded",
        ),
        ("/v1/conversation/thread", &[("user", "%2e%2E")], "`..`"),
        ("/v1/conversation/thread", &[user, ("topic", ".")], "`.`"),
        ("/v1/conversation/thread", &[("user", "")], "empty"),
        (
            "/v1/conversation/thread",
            &[user, ("topic", "%00")],
            "control",
        ),
        ("/v1/user/threads", &[user, session], "threadkeeper-session"),
        (
            "/v1/user/threads",
            &[],
            "send the header `threadkeeper-user`",
        ),
    ] {
        let answer = gateway
            .send(by_headers(gateway.request(Method::GET, path), keys))
            .await;
        assert_eq!(
            answer.problem(),
            (400, "invalid-request"),
            "{path} {keys:?}"
        );
        let detail = answer.body["detail"].as_str().unwrap();
        assert!(detail.contains(hint), "{path} {keys:?}: {detail}");
    }
    for method in [Method::POST, Method::PATCH, Method::DELETE] {
        let path = if method == Method::POST {
            "/v1/users/alice/messages"
        } else {
            "/v1/users/alice/thread"
        };
        let request =
            by_headers(gateway.request(method, path), &[user]).json(&json!({"content": "no"}));
        assert_eq!(
            gateway.send(request).await.problem(),
            (400, "invalid-request")
        );
    }
    assert_eq!(
        gateway.get("/v1/users/alice/thread").await.ok()["message_count"],
        2,
        "no refused request had an effect"
    );
}

/// Sends a path unchanged, which ordinary clients would normalise.
async fn raw(gateway: &Gateway, method: &str, path: &str) -> (u16, String) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut socket = tokio::net::TcpStream::connect(gateway.address())
        .await
        .unwrap();
    let head = format!("{method} {path} HTTP/1.1\r\nhost: gateway\r\nconnection: close\r\n\r\n");
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    (answer[9..12].parse().unwrap(), answer)
}

#[tokio::test(flavor = "multi_thread")]
async fn dot_segments_are_refused_as_keys() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let gateway = scene.gateway().await;
    gateway.say("/v1/users/alice", "hello").await;
    for path in [
        "/v1/users/../thread",
        "/v1/users/%2e%2E/thread",
        "/v1/users/./threads",
        "/v1/users/alice/topics/%2e%2e/thread",
        "/v1/users/alice/sessions/./thread",
    ] {
        let (status, answer) = raw(&gateway, "GET", path).await;
        assert_eq!(status, 400, "{path}: {answer}");
        assert!(answer.contains("clients and proxies"), "{path}: {answer}");
    }
    let (status, _) = raw(&gateway, "DELETE", "/v1/users/alice/topics/%2e%2e/thread").await;
    assert_eq!(status, 400);
    // Texts that only resemble dot segments are ordinary keys, for the gateway and for clients
    // that normalise paths.
    for key in ["...", "%252e%252e", "..%3B", ".%2F..", "%2F"] {
        let scope = format!("/v1/users/alice/topics/{key}");
        gateway.say(&scope, "hello").await;
        assert_eq!(
            gateway.get(&format!("{scope}/thread")).await.ok()["message_count"],
            2,
            "{key}"
        );
    }
    gateway.get("/v1/users/alice/thread").await.ok();
}

/// An ignored parameter might have been meant to limit the effect of the request.
#[tokio::test(flavor = "multi_thread")]
async fn authenticated_routes_refuse_unknown_query_parameters() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let gateway = Routes::new(&scene, "").await;
    gateway
        .post("/v1/users/alice/messages", &json!({"content": "hello"}))
        .await
        .ok();
    for route in routes() {
        let what = format!("{} {}", route.method, route.path);
        let path = route
            .path
            .replace("{user}", "alice")
            .replace("{session}", "s")
            .replace("{topic}", "t");
        let path = path.replace("{run}", "run_0198f000000070008000000000000000");
        let path = path.replace("{thread}", "thr_0198f000000070008000000000000000");
        let path = path.replace("{deletion}", "del_0198f000000070008000000000000000");
        let headers = path.starts_with("/v1/conversation")
            || path.starts_with("/v1/user/")
            || path == "/v1/user";
        let keys: &[_] = if headers { &[("user", "alice")] } else { &[] };
        for query in [
            "no_such=true",
            "archiv=true",
            "x/sessions/s1/thread",
            "=",
            "limit=1&limit=1&x",
        ] {
            let request = by_headers(
                gateway.request(route.method.clone(), &format!("{path}?{query}")),
                keys,
            );
            let answer = gateway.send(request.json(&json!({"content": "no"}))).await;
            if route.needs.is_none() {
                // Probes may add a parameter against caches.
                assert_eq!(answer.status, StatusCode::OK, "{what}");
                continue;
            }
            assert_eq!(answer.problem(), (400, "invalid-request"), "{what}?{query}");
        }
    }
    let told = gateway.delete("/v1/users/alice?dry-run=true").await;
    let detail = told.body["detail"].as_str().unwrap();
    assert!(
        ["`dry-run`", "`archive`", "`dry_run`"]
            .iter()
            .all(|name| detail.contains(name)),
        "{detail}"
    );
    let none = gateway.get("/v1/users/alice/export?x").await;
    assert!(
        none.body["detail"].as_str().unwrap().contains("takes none"),
        "{none:?}"
    );
    assert_eq!(
        gateway.get("/v1/users/alice/thread").await.ok()["message_count"],
        2,
        "no refused request had an effect"
    );
    // A lone `?` is no parameter.
    gateway.get("/v1/users/alice/thread?").await.ok();
}

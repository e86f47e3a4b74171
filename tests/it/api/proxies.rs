//! The gateway behind a proxy: links that callers can follow, and the client's address.

use reqwest::Method;
use serde_json::json;

use crate::support::gateway::Gateway;
use crate::support::scene::{Backend, Protocol, Scene};

const MESSAGES: &str = "/v1/users/alice/messages";

/// Posts a message and a deletion. Returns the links to their results.
async fn places(gateway: &Gateway, headers: &[(&str, &str)]) -> (String, String) {
    let asked = async |method: Method, path: &str| {
        let request = gateway
            .request(method.clone(), path)
            .header("prefer", "respond-async");
        let request = headers.iter().fold(request, |request, (name, value)| {
            request.header(*name, *value)
        });
        let request = if method == Method::POST {
            request.json(&json!({"content": "hi"}))
        } else {
            request
        };
        let answer = gateway.send(request).await;
        answer.headers["location"].to_str().unwrap().to_owned()
    };
    (
        asked(Method::POST, MESSAGES).await,
        asked(Method::DELETE, "/v1/users/alice/thread").await,
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn links_include_prefix_stripped_by_proxy() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let url = "public_url = \"https://chat.example.com/chat-api/\"\n";
    let prefix = [
        ("x-forwarded-prefix", "/other"),
        ("x-forwarded-host", "evil.example"),
    ];
    for (settings, headers, before) in [
        (String::new(), &prefix[..], ""),
        (url.to_owned(), &prefix, "/chat-api"),
        (
            format!("{url}trusted_proxies = [\"127.0.0.0/8\"]\n"),
            &[],
            "/chat-api",
        ),
        (
            format!("{url}trusted_proxies = [\"127.0.0.0/8\"]\n"),
            &prefix,
            "/other",
        ),
        (
            "trusted_proxies = [\"127.0.0.1\"]\n".to_owned(),
            &[("x-forwarded-prefix", "//evil.example")],
            "",
        ),
    ] {
        let gateway = scene.gateway_with(&format!("[server]\n{settings}")).await;
        // An answer that does not wait for the result has a link, unless the result is there
        // already.
        scene.simulator.hold();
        let (run, deletion) = places(&gateway, headers).await;
        scene.simulator.release();
        let run = run
            .strip_prefix(before)
            .unwrap_or_else(|| panic!("{settings}: {run}"));
        let deletion = deletion
            .strip_prefix(before)
            .unwrap_or_else(|| panic!("{settings}: {deletion}"));
        assert!(
            run.starts_with("/v1/users/alice/runs/run_"),
            "{settings}: {run}"
        );
        // The proxy removes the prefix before the gateway sees the path.
        assert!(gateway.get(deletion).await.ok()["id"].is_string());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reconnect_event_link_includes_proxy_prefix() {
    let scene = Scene::new(Protocol::Assistants, Backend::Postgres).await;
    let settings =
        "[server]\nshutdown_grace = \"0s\"\npublic_url = \"https://chat.example.com/chat-api\"\n";
    let (gateway, _other) =
        tokio::join!(scene.gateway_with(settings), scene.gateway_with(settings));
    scene.simulator.hold();
    let mut stream = gateway.stream("/v1/users/alice", "hi").await;
    let run = stream.next().await.unwrap().data["run_id"]
        .as_str()
        .unwrap()
        .to_owned();
    gateway.terminate();
    let last = stream.rest().await.pop().unwrap();
    assert_eq!(last.name, "stream.reconnect");
    assert_eq!(
        last.data["events"],
        format!("/chat-api/v1/users/alice/runs/{run}/events")
    );
    scene.simulator.release();
}

/// Sends a request with these values of `X-Forwarded-For`. Returns the log line about it.
async fn line(gateway: &Gateway, id: &str, forwarded_for: &[&str]) -> String {
    let request = gateway
        .request(Method::GET, MESSAGES)
        .header("x-request-id", id);
    let request = forwarded_for.iter().fold(request, |request, value| {
        request.header("x-forwarded-for", *value)
    });
    gateway.send(request).await;
    let is_meant = |line: &str| line.contains(id) && line.contains("\"answered\"");
    gateway.logged(is_meant).await;
    gateway
        .logs()
        .into_iter()
        .find(|line| is_meant(line))
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn log_names_client_behind_trusted_proxy() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let gateway = scene.gateway().await;
    let untrusted = line(&gateway, "untrusted", &["203.0.113.9"]).await;
    assert!(
        untrusted.contains("\"client\":\"127.0.0.1\"") && !untrusted.contains("203.0.113.9"),
        "{untrusted}"
    );
    drop(gateway);
    let gateway = scene
        .gateway_with("[server]\ntrusted_proxies = [\"127.0.0.1\", \"10.0.0.0/8\"]\n")
        .await;
    for (id, told, client) in [
        (
            "one",
            &["198.51.100.1, 203.0.113.9, 10.0.0.2"][..],
            "203.0.113.9",
        ),
        ("two", &["198.51.100.1", "[2001:db8::9]:443"], "2001:db8::9"),
        ("three", &["198.51.100.1, planted\\\"text"], "127.0.0.1"),
        ("four", &[], "127.0.0.1"),
    ] {
        let line = line(&gateway, id, told).await;
        assert!(
            line.contains(&format!("\"client\":\"{client}\"")),
            "{id}: {line}"
        );
        assert!(
            !line.contains("198.51.100.1") && !line.contains("planted"),
            "{id}: {line}"
        );
    }
    drop(gateway);
    let settings = "[server]\ntrusted_proxies = [\"127.0.0.1\"]\n[log]\nclient_address = false\n";
    let gateway = scene.gateway_with(settings).await;
    let silent = line(&gateway, "silent", &["203.0.113.9"]).await;
    assert!(
        !silent.contains("client") && !silent.contains("203.0.113.9"),
        "{silent}"
    );
}

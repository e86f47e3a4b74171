//! The log lines about the gateway's work. `secrets.rs` tests what must not be logged.

use serde_json::{Value, json};

use crate::support::scene::{Backend, Protocol, Scene};

#[tokio::test(flavor = "multi_thread")]
async fn log_lines_are_json_with_request_and_run_ids() {
    let scene = Scene::new(Protocol::Assistants, Backend::Postgres).await;
    let gateway = scene
        .gateway_with("[log]\nfilter = \"threadkeeper=trace,info\"\n")
        .await;
    let request = gateway.request(reqwest::Method::POST, "/v1/users/alice/sessions/s/messages");
    let request = request
        .header("x-request-id", "my-request")
        .json(&json!({"content": "hello"}));
    let answer = gateway.send(request).await.ok();
    let last = gateway.get("/v1/users/alice/thread").await;
    let last = last.body["request_id"].as_str().unwrap().to_owned();
    gateway
        .logged(|line| line.contains("answered") && line.contains(&last))
        .await;

    let run = answer["run"]["id"].as_str().unwrap();
    let mut lines = Vec::new();
    for line in gateway.logs() {
        lines.push(
            serde_json::from_str::<Value>(&line).unwrap_or_else(|error| panic!("{error}: {line}")),
        );
    }
    let ended = lines
        .iter()
        .find(|line| line["message"] == "run ended" && line.to_string().contains(run))
        .unwrap();
    let ended = ended.to_string();
    assert!(
        ended.contains("my-request"),
        "the lines of a run have the request's id: {ended}"
    );
    assert!(
        ended.contains("duration_ms") && ended.contains("completed"),
        "{ended}"
    );
    let answered = lines
        .iter()
        .find(|line| line["message"] == "answered")
        .unwrap()
        .to_string();
    assert!(
        answered.contains("/v1/users/{user}/sessions/{session}/messages"),
        "the line has the route, not the path: {answered}"
    );
}

/// Each line names the upstream and the thing that an operator has to look at.
#[tokio::test(flavor = "multi_thread")]
async fn upstream_failure_is_logged_once_with_upstream_name() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let simulator = scene.upstream_url.strip_prefix("http://").unwrap();
    let nobody = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let upstreams = [
        ("closed", format!("http://{nobody}/v1"), "planted-key"),
        ("unknown", "http://nowhere.invalid/planted-path".to_owned(), "planted-key"),
        ("plain", format!("https://{simulator}"), "planted-key"),
        ("strict", format!("http://{simulator}"), "bad-planted-key"),
    ]
    .map(|(name, url, key)| {
        format!(
            "[upstreams.{name}]\nkind = \"responses\"\nbase_url = \"{url}\"\napi_key = \"{key}\"\n\
             query = {{ version = \"planted-query\" }}\n[assistants.{name}]\nupstream = \"{name}\"\nmodel = \"m\"\n"
        )
    });
    let gateway = scene
        .gateway_with(&format!("[runs]\nmax_retries = 0\n{}", upstreams.concat()))
        .await;
    for (name, words) in [
        (
            "closed",
            ["the upstream cannot be reached", "Connection refused"],
        ),
        (
            "unknown",
            ["the upstream cannot be reached", "failed to lookup address"],
        ),
        (
            "plain",
            ["the upstream cannot be reached", "does not speak TLS"],
        ),
        (
            "strict",
            ["the upstream refused a request", "\"http.status\":401"],
        ),
    ] {
        let message = json!({"content": "planted-words", "assistant": name});
        for user in ["alice", "bob"] {
            let answer = gateway
                .post(&format!("/v1/users/{name}-{user}/messages"), &message)
                .await;
            assert_eq!(answer.problem(), (502, "upstream-error"));
        }
        let message = format!("\"message\":\"{}\"", words[0]);
        let lines: Vec<_> = gateway
            .logs()
            .into_iter()
            .filter(|line| line.contains(&message))
            .collect();
        let named = format!("\"upstream.name\":\"{name}\"");
        let mut own = lines.iter().filter(|line| line.contains(&named));
        let line = own.next().unwrap_or_else(|| panic!("{name}: {lines:#?}"));
        assert!(line.contains(words[1]) && line.contains("WARN"), "{line}");
        assert_eq!(
            own.next(),
            None,
            "one line for each kind, however often it happens"
        );
    }
    let planted: Vec<_> = gateway
        .logs()
        .into_iter()
        .filter(|line| line.contains("planted"))
        .collect();
    assert!(planted.is_empty(), "{planted:#?}");
}

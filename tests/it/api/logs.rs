//! What the gateway writes about its work. What it never writes: `secrets.rs`.

use serde_json::{Value, json};

use crate::support::scene::{Backend, Protocol, Scene};

#[tokio::test(flavor = "multi_thread")]
async fn logs_are_json_with_the_ids_of_requests_and_runs() {
    let scene = Scene::new(Protocol::Assistants, Backend::Postgres).await;
    let gateway = scene.gateway_with("[log]\nfilter = \"threadkeeper=trace,info\"\n").await;
    let request = gateway.request(reqwest::Method::POST, "/v1/users/alice/sessions/s/messages");
    let request = request.header("x-request-id", "my-request").json(&json!({"content": "hello"}));
    let answer = gateway.send(request).await.ok();
    let last = gateway.get("/v1/users/alice/thread").await;
    let last = last.body["request_id"].as_str().unwrap().to_owned();
    gateway.logged(|line| line.contains("answered") && line.contains(&last)).await;

    let run = answer["run"]["id"].as_str().unwrap();
    let mut lines = Vec::new();
    for line in gateway.logs() {
        lines.push(serde_json::from_str::<Value>(&line).unwrap_or_else(|error| panic!("{error}: {line}")));
    }
    let ended =
        lines.iter().find(|line| line["message"] == "run ended" && line.to_string().contains(run)).unwrap();
    let ended = ended.to_string();
    assert!(ended.contains("my-request"), "a run's lines carry the request's id: {ended}");
    assert!(ended.contains("duration_ms") && ended.contains("completed"), "{ended}");
    let answered = lines.iter().find(|line| line["message"] == "answered").unwrap().to_string();
    assert!(
        answered.contains("/v1/users/{user}/sessions/{session}/messages"),
        "the route, not the path: {answered}"
    );
}

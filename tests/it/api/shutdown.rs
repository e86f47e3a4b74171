//! SIGTERM: readiness drops, active runs end within the grace time, and the process exits with 0.

use serde_json::json;

use crate::support::gateway::{text, text_of};
use crate::support::scene::{Backend, Protocol, Scene, on_each_protocol};

on_each_protocol!(
    active_and_queued_runs_finish_before_shutdown,
    runs_past_grace_time_are_left_to_successor,
);

async fn active_and_queued_runs_finish_before_shutdown(scene: Scene) {
    let mut gateway = scene.gateway().await;
    assert_eq!(
        gateway.get("/readyz").await.ok(),
        json!({"status": "ready"})
    );
    scene.simulator.hold();
    let mut running = gateway.stream("/v1/users/alice", "last words").await;
    running.next().await.unwrap();
    let mut waiting = gateway.stream("/v1/users/alice", "me too").await;
    waiting.next().await.unwrap();
    gateway.terminate();
    let not_ready = gateway
        .until("/readyz", |answer| answer.status == 503)
        .await;
    assert_eq!(not_ready.problem(), (503, "draining"));
    assert_eq!(
        gateway.get("/healthz").await.ok(),
        json!({"status": "ok"}),
        "the process still lives"
    );
    let refused = gateway
        .post("/v1/users/bob/messages", &json!({"content": "hi"}))
        .await;
    assert_eq!(refused.problem(), (503, "draining"));
    assert!(refused.headers.contains_key("retry-after"));
    gateway.get("/v1/users/alice/thread").await.ok();
    scene.simulator.release();
    for (stream, said) in [(running, "last words"), (waiting, "me too")] {
        let events = stream.rest().await;
        assert_eq!(events.last().unwrap().name, "run.completed");
        assert!(text_of(&events).contains(said));
    }
    assert!(gateway.exit().await.success());
    assert_eq!(
        scene.database.number("SELECT count(*) FROM replicas").await,
        0,
        "its session is closed"
    );
}

async fn runs_past_grace_time_are_left_to_successor(scene: Scene) {
    let mut gateway = scene
        .gateway_with("[server]\nshutdown_grace = \"100ms\"\n")
        .await;
    scene.simulator.hold();
    let mut running = gateway.stream("/v1/users/alice", "last words").await;
    running.next().await.unwrap();
    let mut streams = vec![running];
    for n in 0..20 {
        let mut waiting = gateway
            .stream("/v1/users/alice", &format!("me too {n}"))
            .await;
        waiting.next().await.unwrap();
        streams.push(waiting);
    }
    gateway.terminate();
    for stream in streams {
        assert_eq!(stream.rest().await.last().unwrap().name, "stream.reconnect");
    }
    assert!(gateway.exit().await.success());
    scene.simulator.release();
    let again = scene.gateway_upstream("lock_window = \"500ms\"\n").await;
    again.say("/v1/users/alice", "and now?").await;
    let said = again
        .get("/v1/users/alice/messages?order=asc&limit=100")
        .await
        .ok();
    let said = said["data"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|m| m["role"] == "user")
        .map(text);
    let wanted: Vec<_> = ["last words".to_owned()]
        .into_iter()
        .chain((0..20).map(|n| format!("me too {n}")))
        .chain(["and now?".to_owned()])
        .collect();
    assert_eq!(
        said.collect::<Vec<_>>(),
        wanted,
        "the transcript has all messages in order"
    );
    let runs = again
        .get("/v1/users/alice/runs?order=asc&limit=100")
        .await
        .ok();
    let runs = runs["data"].as_array().unwrap();
    assert!(
        runs[1..].iter().all(|run| run["status"] == "completed"),
        "the queued run has completed: {runs:#?}"
    );
    // The active run has ended as the upstream says, where the upstream continues without its
    // client.
    let completed = runs[0]["status"] == "completed";
    assert!(
        completed || runs[0]["error"]["code"] == "replica_lost",
        "{:#}",
        runs[0]
    );
    assert!(
        completed || scene.protocol != Protocol::Assistants,
        "{:#}",
        runs[0]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn second_signal_ends_grace_time() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let mut gateway = scene
        .gateway_with("[server]\nshutdown_grace = \"10m\"\n")
        .await;
    scene.simulator.hold();
    let mut running = gateway.stream("/v1/users/alice", "last words").await;
    running.next().await.unwrap();
    gateway.terminate();
    gateway
        .until("/readyz", |answer| answer.status == 503)
        .await;
    gateway.terminate();
    assert_eq!(
        running.rest().await.last().unwrap().name,
        "stream.reconnect"
    );
    assert!(gateway.exit().await.success());
}

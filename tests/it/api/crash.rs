//! SIGKILL in the middle of a run.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::json;
use tokio::task::JoinSet;

use crate::support::gateway::{Gateway, PATIENCE, text};
use crate::support::scene::{Backend, Protocol, Scene, on_every_scene};

on_every_scene!(killed_gateway_loses_no_message_silently);

/// A session life that a test can wait for.
const SHORT: Duration = Duration::from_millis(1500);
/// Extra time for the work itself on a busy machine.
const SLACK: Duration = Duration::from_secs(5);

async fn killed_gateway_loses_no_message_silently(scene: Scene) {
    // The documentation promises 2 s beyond the session's life on Postgres. A SQLite file serves
    // one process, so a new one takes the runs over at once.
    let (ttl, bound) = match scene.backend {
        Backend::Postgres => (SHORT, SHORT + Duration::from_secs(2)),
        Backend::Sqlite => (Duration::from_hours(1), Duration::ZERO),
    };
    let settings = format!("[replica]\nsession_ttl = \"{}ms\"\n", ttl.as_millis());
    // The lock of the upstream adds its time.
    let upstream = "lock_window = \"500ms\"\n";
    let gateway = scene.gateway_both(&settings, upstream).await;
    gateway.say("/v1/users/alice", "hello").await;
    scene.simulator.hold();
    let send = |gateway: &Gateway| {
        gateway
            .request(Method::POST, "/v1/users/alice/messages")
            .header("idempotency-key", "middle")
            .json(&json!({"content": "in the middle"}))
    };
    let mut running = JoinSet::new();
    running.spawn(send(&gateway).send());
    gateway
        .until("/v1/users/alice/runs", |answer| {
            answer.body["data"]
                .as_array()
                .is_some_and(|runs| runs.len() == 2)
        })
        .await;
    let mut waiting = gateway.stream("/v1/users/alice", "in the queue").await;
    waiting.next().await.unwrap();
    gateway.kill();
    running.join_next().await.unwrap().unwrap().unwrap_err();

    let again = scene.gateway_both(&settings, upstream).await;
    let restarted = Instant::now();
    scene.simulator.release();
    let answer = again.say("/v1/users/alice", "and now?").await;
    assert!(
        restarted.elapsed() < bound + SLACK,
        "the conversation was usable again after {:?}",
        restarted.elapsed()
    );
    assert!(text(&answer["message"]).contains("and now?"));

    let runs = again.get("/v1/users/alice/runs?order=asc").await.ok();
    let runs = runs["data"].as_array().unwrap();
    let statuses: Vec<_> = runs
        .iter()
        .map(|run| run["status"].as_str().unwrap())
        .collect();
    // With Assistants a run continues without its client. Other protocols stop it. The gateway
    // then sends it again only if the conversation proves that nothing of it is left.
    let goes_on = match scene.protocol {
        Protocol::Assistants => true,
        Protocol::Responses => statuses[1] == "completed",
        Protocol::Chain => false,
    };
    let middle = if goes_on { "completed" } else { "failed" };
    assert_eq!(
        statuses,
        ["completed", middle, "completed", "completed"],
        "{runs:#?}"
    );
    let reason = if goes_on {
        json!(null)
    } else {
        json!("replica_lost")
    };
    assert_eq!(runs[1]["error"]["code"], reason, "the run has the reason");
    let repeated = again.send(send(&again)).await;
    assert_eq!(repeated.headers["idempotent-replayed"], "true");
    if goes_on {
        assert!(text(&repeated.ok()["message"]).contains("in the middle"));
    } else {
        assert_eq!(repeated.problem(), (503, "replica-lost"));
        // The run has ended, so to send the request again would not help.
        assert!(!repeated.headers.contains_key("retry-after"));
    }
    let said = again.get("/v1/users/alice/messages?order=asc").await.ok();
    let said: Vec<_> = said["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| (m["role"].as_str().unwrap(), text(m)))
        .collect();
    let users: Vec<_> = said
        .iter()
        .filter(|(role, _)| *role == "user")
        .map(|(_, text)| *text)
        .collect();
    assert_eq!(
        users,
        ["hello", "in the middle", "in the queue", "and now?"]
    );
    assert_eq!(
        again.get("/v1/users/alice/thread").await.ok()["state"],
        "idle"
    );
}

/// The number of runs is larger than one takeover handles at a time.
#[tokio::test(flavor = "multi_thread")]
async fn killed_gateway_leaves_no_conversation_locked() {
    for backend in [Backend::Postgres, Backend::Sqlite] {
        let scene = Scene::new(Protocol::Responses, backend).await;
        // The first look for orphans must suffice, since the next one is due after 20 minutes.
        let settings = "[replica]\nsession_ttl = \"1h\"\n";
        let gateway = scene.gateway_with(settings).await;
        scene.simulator.hold();
        let mut streams = Vec::new();
        for n in 0..150 {
            let mut stream = gateway
                .stream(&format!("/v1/users/user-{n}"), "in the middle")
                .await;
            stream.next().await.unwrap();
            streams.push(stream);
        }
        gateway.kill();
        scene.database.execute("DELETE FROM replicas").await;
        scene.simulator.release();
        let again = scene.gateway_with(settings).await;
        let unfinished = "SELECT count(*) FROM runs WHERE finished_at IS NULL";
        let start = Instant::now();
        while scene.database.number(unfinished).await > 0 {
            assert!(start.elapsed() < PATIENCE, "some conversations stay locked");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        again.say("/v1/users/user-149", "and now?").await;
    }
}

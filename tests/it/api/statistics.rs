//! The statistics of a thread, and their comparison with the upstream.

use serde_json::{Value, json};

use crate::support::gateway::Gateway;
use crate::support::scene::{Protocol, Scene, on_each_protocol, on_each_store};

on_each_protocol!(upstream_verification_reports_every_difference);
on_each_store!(
    statistics_need_no_upstream_requests,
    thread_metadata_and_ttl_can_be_patched
);

const SCOPE: &str = "/v1/users/alice";
const THREAD: &str = "/v1/users/alice/thread";

async fn statistics_need_no_upstream_requests(scene: Scene) {
    let gateway = scene.gateway().await;
    let first = gateway.say(SCOPE, "hello").await;
    gateway
        .post(
            &format!("{SCOPE}/messages"),
            &json!({"content": "[[sim: fail]]"}),
        )
        .await;
    let before = scene.simulator.stats().requests;
    let report = gateway.get(THREAD).await.ok();
    assert_eq!(report["id"], first["thread"]["id"]);
    assert_eq!(report["run_count"], 2);
    assert_eq!(
        report["message_count"], 4,
        "the messages of the failed run count, too"
    );
    assert_eq!(
        (&report["state"], &report["queue_depth"]),
        (&json!("idle"), &json!(0))
    );
    assert_eq!(
        (&report["lifecycle"], &report["expires_at"]),
        (&json!("current"), &Value::Null)
    );
    assert_eq!(
        (&report["previous_thread"], &report["next_thread"]),
        (&Value::Null, &Value::Null)
    );
    assert_eq!(report["last_run"]["status"], "failed");
    assert!(
        report["last_run"]["error"]["code"].is_string(),
        "{report:#}"
    );
    assert!(report.get("verified").is_none());

    scene.simulator.hold();
    let mut streams = Vec::new();
    for content in ["one", "two", "three"] {
        let mut stream = gateway.stream(SCOPE, content).await;
        stream.next().await.unwrap();
        streams.push(stream);
    }
    let report = gateway.get(THREAD).await.ok();
    assert_eq!(
        (&report["state"], &report["queue_depth"]),
        (&json!("active"), &json!(2))
    );
    assert_eq!(report["last_run"]["status"], "queued");
    scene.simulator.release();
    for stream in streams {
        stream.rest().await;
    }
    let asked = scene.simulator.stats().requests - before;
    assert!(
        asked <= 6,
        "three runs, one of them after the failed one, and no request for the statistics: {asked}"
    );
    let other = gateway.get("/v1/users/nobody/thread").await;
    assert_eq!(other.problem(), (404, "not-found"));
    let named = gateway
        .get(&format!("/v1/threads/{}", report["id"].as_str().unwrap()))
        .await
        .ok();
    assert_eq!(named["last_run"]["status"], "completed");
    assert_eq!(
        gateway.get("/v1/threads/thr_1").await.problem(),
        (400, "invalid-request")
    );
    let unknown = format!("/v1/threads/thr_{}", "0".repeat(32));
    assert_eq!(gateway.get(&unknown).await.problem(), (404, "not-found"));
}

async fn verified(gateway: &Gateway) -> Value {
    gateway.get(&format!("{THREAD}?verify=upstream")).await.ok()["verified"].clone()
}

async fn upstream_verification_reports_every_difference(scene: Scene) {
    let gateway = scene.gateway().await;
    let thread = gateway.say(SCOPE, "hello").await["thread"].clone();
    gateway.say(SCOPE, "and again [[sim: parts=3]]").await;
    let id = thread["upstream_thread_id"].as_str().unwrap();
    let found = verified(&gateway).await;
    if scene.protocol == Protocol::Chain {
        assert_eq!(
            (&found["upstream_thread"], &found["in_step"]),
            (&json!("cannot_tell"), &Value::Null)
        );
        return;
    }
    assert_eq!(
        (&found["upstream_thread"], &found["in_step"]),
        (&json!("found"), &json!(true)),
        "{found:#}"
    );
    scene.write(id, "user", "psst, it is somebody else").await;
    let found = verified(&gateway).await;
    assert_eq!(found["in_step"], false);
    assert_eq!(found["external"].as_array().unwrap().len(), 1, "{found:#}");
    assert_eq!(found["external"][0]["after_position"], 4);
    assert_eq!(found["external"][0]["role"], "user");
    assert_eq!(found["missing"], json!([]));

    scene.delete_thread(id).await;
    let found = verified(&gateway).await;
    assert_eq!(
        (&found["upstream_thread"], &found["in_step"]),
        (&json!("gone"), &json!(false))
    );
    let bad = gateway.get(&format!("{THREAD}?verify=downstream")).await;
    assert_eq!(bad.problem(), (400, "invalid-request"));
}

async fn thread_metadata_and_ttl_can_be_patched(scene: Scene) {
    let gateway = scene.gateway_with("[threads]\nmax_ttl = \"1h\"\n").await;
    let patch = async |body: Value| gateway.patch(THREAD, &body).await;
    assert_eq!(
        patch(json!({"metadata": {"a": "b"}})).await.problem(),
        (404, "not-found")
    );
    gateway.say(SCOPE, "hello").await;
    let changed = patch(json!({"metadata": {"a": "b"}})).await.ok();
    assert_eq!(
        (&changed["metadata"], &changed["expires_at"]),
        (&json!({"a": "b"}), &Value::Null)
    );
    let changed = patch(json!({"ttl_ms": 60_000})).await.ok();
    assert_eq!(
        changed["metadata"],
        json!({"a": "b"}),
        "a field that is left out stays"
    );
    assert!(changed["expires_at"].is_string());
    let changed = patch(json!({"ttl_ms": null, "metadata": {}})).await.ok();
    assert_eq!(
        (&changed["metadata"], &changed["expires_at"]),
        (&json!({}), &Value::Null)
    );
    for bad in [
        json!({"ttl_ms": 0}),
        json!({"ttl_ms": 3_600_001}),
        json!({"ttl_ms": "soon"}),
        json!({"metadata": {"threadkeeper_x": "y"}}),
        json!({"state": "idle"}),
    ] {
        assert_eq!(patch(bad).await.problem(), (422, "invalid-request"));
    }
}

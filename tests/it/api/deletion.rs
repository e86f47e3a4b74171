//! Deleting a conversation from database and upstream.

use std::time::Duration;

use futures_util::future::join;
use serde_json::{Value, json};
use threadkeeper::simulator::{Fault, SimulatorConfig};

use crate::support::gateway::{Gateway, text};
use crate::support::link::{Link, Weather};
use crate::support::scene::{
    Backend, Protocol, Scene, on_each_protocol, on_each_store, on_every_scene,
};

on_every_scene!(killed_deletion_resumes_after_restart);
on_each_protocol!(
    deleted_conversation_is_gone_locally_and_upstream,
    deletion_cancels_active_and_queued_runs,
    deletion_tolerates_repeats_and_missing_upstream_thread,
    message_during_deletion_starts_fresh_thread,
    deletion_refused_upstream_is_retried_in_background,
    deletion_with_archive_keeps_transcript,
    deletion_removes_upstream_thread_being_created,
    deletion_removes_upstream_thread_being_recreated,
);
on_each_store!(deletion_accepted_when_receipt_is_unreadable);

const SCOPE: &str = "/v1/users/alice/topics/secret";
const THREAD: &str = "/v1/users/alice/topics/secret/thread";
const BY_HAND: &str = "[janitor]\ninterval = \"1h\"\ncalls_per_second = 10000\n";

async fn nothing_is_left(scene: &Scene) {
    assert_eq!(scene.database.holding("needle").await, Vec::<String>::new());
    assert_eq!(scene.simulator.holds_text("needle"), Vec::<String>::new());
}

/// Makes a conversation of several runs, one of them with a function call.
async fn converse(gateway: &Gateway) -> Value {
    gateway.say(SCOPE, "needle one").await;
    let asks = json!({"content": "needle two [[sim: tool=look_up]]"});
    let asked = gateway.post(&format!("{SCOPE}/messages"), &asks).await.ok();
    let call = &asked["run"]["required_action"]["tool_calls"][0]["id"];
    let outputs = json!({"tool_outputs": [{"tool_call_id": call, "output": "needle three"}]});
    let run = asked["run"]["id"].as_str().unwrap();
    gateway
        .post(&format!("{SCOPE}/runs/{run}/tool_outputs"), &outputs)
        .await
        .ok();
    gateway.say(SCOPE, "needle four").await
}

async fn deleted_conversation_is_gone_locally_and_upstream(scene: Scene) {
    let gateway = scene.gateway_with(BY_HAND).await;
    let first = converse(&gateway).await;
    gateway
        .post(&format!("{THREAD}/rollover"), &json!({}))
        .await
        .ok();
    gateway.say(SCOPE, "needle five").await;
    gateway.say("/v1/users/alice", "this one stays").await;
    let receipt = gateway.delete(THREAD).await.ok();
    assert_eq!(
        (&receipt["status"], &receipt["threads_done"]),
        (&json!("completed"), &json!(2)),
        "{receipt:#}"
    );
    nothing_is_left(&scene).await;
    assert!(!scene.simulator.holds_text("this one stays").is_empty());
    assert_eq!(
        gateway.get("/v1/users/alice/thread").await.ok()["message_count"],
        2
    );

    let old = &receipt["threads"]["data"][0];
    assert_eq!(
        (&old["thread_id"], &old["upstream_thread_id"]),
        (
            &first["thread"]["id"],
            &first["thread"]["upstream_thread_id"]
        )
    );
    assert_eq!(
        (&old["messages"], &old["runs"]),
        (&json!(6), &json!(3)),
        "{old:#}"
    );
    assert_eq!(
        (&old["upstream"], &old["upstream_outcome"]),
        (&json!("simulated"), &json!("deleted"))
    );
    if scene.protocol == Protocol::Responses {
        assert!(old["upstream_items"].as_u64().unwrap() >= 6, "{old:#}");
    }
    if scene.protocol != Protocol::Assistants {
        assert_eq!(
            old["upstream_responses"], 4,
            "each round of a run is one response"
        );
    }
    let id = receipt["id"].as_str().unwrap();
    let again = gateway.get(&format!("/v1/deletions/{id}")).await.ok();
    assert_eq!(again, receipt);
    assert_eq!(
        scene
            .database
            .number("SELECT count(*) FROM deletions WHERE user_key IS NOT NULL")
            .await,
        0
    );
    assert_eq!(
        gateway
            .get(&format!(
                "/v1/threads/{}",
                old["thread_id"].as_str().unwrap()
            ))
            .await
            .status,
        404
    );

    let fresh = gateway.say(SCOPE, "hello?").await;
    assert_eq!(
        fresh["thread"]["previous_thread"],
        Value::Null,
        "an erased idempotency key finds nothing"
    );
    assert!(text(&fresh["message"]).contains("turn 1"));
    let all = gateway
        .get(&format!("{SCOPE}/messages?archived=true"))
        .await
        .ok();
    assert_eq!(all["data"].as_array().unwrap().len(), 2);
}

async fn deletion_cancels_active_and_queued_runs(scene: Scene) {
    let gateway = scene.gateway_with(BY_HAND).await;
    gateway.say(SCOPE, "needle").await;
    scene.simulator.hold();
    let mut running = gateway.stream(SCOPE, "needle that runs").await;
    running.next().await.unwrap();
    let mut waiting = gateway.stream(SCOPE, "needle that waits").await;
    waiting.next().await.unwrap();
    let receipt = gateway.delete(THREAD).await.ok();
    assert_eq!(receipt["status"], "completed", "{receipt:#}");
    for stream in [running, waiting] {
        let last = stream.rest().await.pop().unwrap();
        assert_eq!(last.name, "run.cancelled", "{last:?}");
    }
    scene.simulator.release();
    nothing_is_left(&scene).await;
    // This run awaits tool outputs.
    let asks = json!({"content": "needle [[sim: tool=look_up]]"});
    gateway.post(&format!("{SCOPE}/messages"), &asks).await.ok();
    gateway.delete(THREAD).await.ok();
    nothing_is_left(&scene).await;
}

async fn deletion_tolerates_repeats_and_missing_upstream_thread(scene: Scene) {
    let gateway = scene.gateway_with(BY_HAND).await;
    assert_eq!(gateway.delete(THREAD).await.problem(), (404, "not-found"));
    converse(&gateway).await;
    // The wait is longer than any clock can count.
    let receipt = gateway
        .delete_after(THREAD, &format!("wait={}", u64::MAX))
        .await
        .ok();
    assert_eq!(
        gateway.delete(THREAD).await.problem(),
        (404, "not-found"),
        "there is nothing left to delete"
    );
    assert_eq!(gateway.get(THREAD).await.problem(), (404, "not-found"));
    let id = receipt["id"].as_str().unwrap();
    assert_eq!(
        gateway.get(&format!("/v1/deletions/{id}")).await.ok()["status"],
        "completed"
    );

    let said = gateway.say(SCOPE, "needle").await;
    scene.simulator.reset();
    let receipt = gateway.delete(THREAD).await.ok();
    let thread = &receipt["threads"]["data"][0];
    assert_eq!(thread["upstream_outcome"], "already_gone", "{receipt:#}");
    assert_eq!(
        thread["upstream_thread_id"],
        said["thread"]["upstream_thread_id"]
    );
    nothing_is_left(&scene).await;

    // Two concurrent requests are one deletion.
    converse(&gateway).await;
    let (one, other) = join(gateway.delete(THREAD), gateway.delete(THREAD)).await;
    let ids: Vec<Value> = [one, other]
        .into_iter()
        .filter(|it| it.status != 404)
        .map(|it| it.body["id"].clone())
        .collect();
    assert!(
        !ids.is_empty() && ids.iter().all(|id| *id == ids[0]),
        "{ids:?}"
    );
    nothing_is_left(&scene).await;
}

async fn message_during_deletion_starts_fresh_thread(scene: Scene) {
    let gateway = scene.gateway_with(BY_HAND).await;
    let old = converse(&gateway).await;
    scene.fault("any", "status=500", 1000);
    let answer = gateway.delete_after(THREAD, "respond-async").await;
    assert_eq!(
        (answer.status.as_u16(), &answer.body["status"]),
        (202, &json!("in_progress"))
    );
    assert_eq!(
        gateway.get(THREAD).await.problem(),
        (404, "not-found"),
        "the old thread cannot be read any more"
    );
    assert_eq!(
        gateway
            .get(&format!("{SCOPE}/messages?archived=true"))
            .await
            .status,
        404
    );
    scene.simulator.clear_faults();
    let fresh = gateway.say(SCOPE, "hello?").await;
    assert_ne!(fresh["thread"]["id"], old["thread"]["id"]);
    assert_eq!(fresh["thread"]["previous_thread"], Value::Null);
    assert!(text(&fresh["message"]).contains("turn 1"));
    // The deletion that is under way spares the fresh thread.
    finish(
        &scene,
        &gateway,
        answer.headers["location"].to_str().unwrap(),
    )
    .await;
    nothing_is_left(&scene).await;
    assert_eq!(gateway.get(THREAD).await.ok()["id"], fresh["thread"]["id"]);
}

async fn deletion_accepted_when_receipt_is_unreadable(scene: Scene) {
    let gateway = scene.gateway_with(BY_HAND).await;
    gateway.say(SCOPE, "needle").await;
    scene
        .database
        .execute("ALTER TABLE deleted_threads RENAME TO deleted_threads_away")
        .await;
    let answer = gateway.delete(THREAD).await;
    assert_eq!(answer.status, 202, "{:#}", answer.body);
    assert_eq!(
        (&answer.body["status"], &answer.body["threads_pending"]),
        (&json!("in_progress"), &json!(1))
    );
    assert_eq!(
        gateway.get(THREAD).await.problem(),
        (404, "not-found"),
        "the thread cannot be read any more"
    );
    scene
        .database
        .execute("ALTER TABLE deleted_threads_away RENAME TO deleted_threads")
        .await;
    let place = answer.headers["location"].to_str().unwrap();
    let receipt = finish(&scene, &gateway, place).await;
    assert_eq!(
        (&receipt["id"], &receipt["threads_done"]),
        (&answer.body["id"], &json!(1))
    );
    nothing_is_left(&scene).await;
}

/// Starts passes of the janitor, whatever it waits for, until the deletion is done. Returns the
/// receipt.
async fn finish(scene: &Scene, gateway: &Gateway, receipt: &str) -> Value {
    let start = std::time::Instant::now();
    loop {
        let answer = gateway.get(receipt).await.ok();
        if answer["status"] == "completed" {
            return answer;
        }
        assert!(
            start.elapsed() < crate::support::gateway::PATIENCE,
            "{answer:#}"
        );
        scene
            .database
            .execute("UPDATE threads SET due_at = created_at WHERE due_at IS NOT NULL")
            .await;
        gateway.post("/v1/admin/cleanup", &json!({})).await.ok();
    }
}

async fn deletion_refused_upstream_is_retried_in_background(scene: Scene) {
    let gateway = scene.gateway_with(BY_HAND).await;
    gateway.say(SCOPE, "needle").await;
    let on = match scene.protocol {
        Protocol::Assistants => "delete_thread",
        Protocol::Responses => "delete_conversation",
        Protocol::Chain => "delete_response",
    };
    scene.fault(on, "status=403", 1);
    let answer = gateway.delete_after(THREAD, "wait=1").await;
    assert_eq!(answer.status, 202, "{:#}", answer.body);
    let place = answer.headers["location"].to_str().unwrap().to_owned();
    let pending = gateway
        .until(&place, |it| it.body["threads"]["data"][0]["attempts"] == 1)
        .await
        .ok();
    let thread = &pending["threads"]["data"][0];
    assert_eq!(thread["status"], "in_progress", "{pending:#}");
    assert!(
        thread["last_failure"]
            .as_str()
            .unwrap()
            .contains("status 403"),
        "{thread:#}"
    );
    let asked_again = gateway.delete_after(THREAD, "respond-async").await;
    assert_eq!(
        asked_again.body["id"], pending["id"],
        "the receipt names the same deletion"
    );
    let done = finish(&scene, &gateway, &place).await;
    assert_eq!(
        (&done["threads_done"], &done["threads_pending"]),
        (&json!(1), &json!(0))
    );
    nothing_is_left(&scene).await;
}

async fn deletion_with_archive_keeps_transcript(scene: Scene) {
    let gateway = scene.gateway_with(BY_HAND).await;
    let old = converse(&gateway).await;
    let receipt = gateway.delete(&format!("{THREAD}?archive=true")).await.ok();
    assert_eq!(
        (&receipt["status"], &receipt["archive"]),
        (&json!("completed"), &json!(true)),
        "{receipt:#}"
    );
    assert_eq!(scene.simulator.holds_text("needle"), Vec::<String>::new());
    let report = gateway.get(THREAD).await.ok();
    assert_eq!(
        (&report["lifecycle"], &report["id"]),
        (&json!("archived"), &old["thread"]["id"])
    );
    let said = gateway.get(&format!("{SCOPE}/messages")).await.ok();
    assert_eq!(said["data"].as_array().unwrap().len(), 6);
    let fresh = gateway.say(SCOPE, "hello?").await;
    assert_eq!(fresh["thread"]["previous_thread"], old["thread"]["id"]);
    assert!(text(&fresh["message"]).contains("turn 1"));
    // All archived threads can still be erased.
    let receipt = gateway.delete(THREAD).await.ok();
    assert_eq!(receipt["threads_done"], 2, "{receipt:#}");
    nothing_is_left(&scene).await;
}

async fn killed_deletion_resumes_after_restart(scene: Scene) {
    let gateway = scene.gateway_with(BY_HAND).await;
    converse(&gateway).await;
    scene.fault("any", "silent", 1000);
    let answer = gateway.delete_after(THREAD, "respond-async").await;
    let place = answer.headers["location"].to_str().unwrap().to_owned();
    gateway.kill();
    scene.simulator.clear_faults();
    let gateway = scene.gateway_with(BY_HAND).await;
    finish(&scene, &gateway, &place).await;
    nothing_is_left(&scene).await;
}

/// A failure that the database could not take is recorded once the database is back, not when the
/// lease of the thread ends.
#[tokio::test(flavor = "multi_thread")]
async fn deletion_failure_recorded_once_database_returns() {
    let scene = Scene::new(Protocol::Responses, Backend::Postgres).await;
    let link = Link::to_postgres(&scene.database.url()).await;
    let upstream = Link::to_upstream(&scene.upstream_url).await;
    let config = scene
        .config(BY_HAND)
        .replace(&scene.database.url(), &link.url);
    let gateway = Gateway::start(&config.replace(&scene.upstream_url, &upstream.url)).await;
    converse(&gateway).await;
    let requests = scene.simulator.stats().requests;
    // The upstream stays silent until the database is away.
    scene.fault("any", "silent", 1);
    scene.fault("any", "status=403", 1000);
    let answer = gateway.delete_after(THREAD, "respond-async").await;
    let place = answer.headers["location"].to_str().unwrap().to_owned();
    scene
        .simulator
        .wait_for(|stats| stats.requests > requests)
        .await;
    link.valve.set(Weather {
        refuses: true,
        ..Weather::default()
    });
    link.valve.cut();
    upstream.valve.cut();
    let is_lost =
        |line: &str| line.contains("threadkeeper::lifecycle::janitor") && line.contains("cannot");
    gateway.logged(is_lost).await;
    link.valve.set(Weather::default());
    gateway
        .until(&place, |it| it.body["threads"]["data"][0]["attempts"] == 1)
        .await
        .ok();
}

/// There are several orphans, so that none of them is taken for a thread that is just being
/// created.
#[tokio::test(flavor = "multi_thread")]
async fn orphaned_upstream_threads_are_deleted_or_reported() {
    for list_threads in [true, false] {
        let config = SimulatorConfig {
            list_threads,
            ..SimulatorConfig::default()
        };
        let scene = Scene::with(Protocol::Responses, Backend::Sqlite, config).await;
        let gateway = scene.gateway_with(BY_HAND).await;
        let lost = Fault {
            on: "create_thread".to_owned(),
            fault: "drop=after".to_owned(),
            times: 2,
        };
        scene.simulator.add_fault(lost).unwrap();
        gateway.say(SCOPE, "needle").await;
        assert_eq!(scene.upstream_threads().len(), 3);
        if !list_threads {
            // The janitor deals with the orphans before the thread is deleted.
            scene.database.age_due_times(Duration::from_hours(3)).await;
            gateway.post("/v1/admin/cleanup", &json!({})).await.ok();
        }
        let receipt = gateway.delete(THREAD).await.ok();
        let thread = &receipt["threads"]["data"][0];
        let told = [
            &thread["upstream_other_threads"],
            &thread["upstream_unknown"],
        ];
        assert_eq!(
            told,
            if list_threads { [2, 0] } else { [0, 2] },
            "{receipt:#}"
        );
        assert_eq!(
            scene.upstream_threads().len(),
            if list_threads { 0 } else { 2 }
        );
    }
}

/// Sends a message, and deletes the conversation while the upstream thread is being created.
async fn delete_during_creation(scene: &Scene, gateway: &Gateway) {
    scene.fault("create_thread", "latency=1500ms", 1);
    let mut running = gateway.stream(SCOPE, "needle at last").await;
    running.next().await.unwrap();
    let intended = "SELECT count(*) FROM upstream_orphans WHERE upstream_id IS NULL";
    while scene.database.number(intended).await == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let receipt = gateway.delete(THREAD).await.ok();
    assert_eq!(receipt["status"], "completed", "{receipt:#}");
    assert_eq!(running.rest().await.pop().unwrap().name, "run.cancelled");
    let unknown: u64 = receipt["threads"]["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it["upstream_unknown"].as_u64().unwrap())
        .sum();
    assert_eq!(unknown, 0, "{receipt:#}");
    assert_eq!(scene.upstream_threads(), Vec::<String>::new());
    assert_eq!(scene.database.holding("needle").await, Vec::<String>::new());
    assert_eq!(
        scene
            .database
            .number("SELECT count(*) FROM upstream_orphans")
            .await,
        0
    );
}

async fn deletion_removes_upstream_thread_being_created(scene: Scene) {
    if scene.protocol == Protocol::Chain {
        return;
    }
    let gateway = scene.gateway_with(BY_HAND).await;
    delete_during_creation(&scene, &gateway).await;
    nothing_is_left(&scene).await;
}

/// The recreated upstream thread begins with the whole transcript.
async fn deletion_removes_upstream_thread_being_recreated(scene: Scene) {
    if scene.protocol == Protocol::Chain {
        return;
    }
    let gateway = scene.gateway_with(BY_HAND).await;
    let last = converse(&gateway).await;
    let gone = last["thread"]["upstream_thread_id"].as_str().unwrap();
    scene.delete_thread(gone).await;
    delete_during_creation(&scene, &gateway).await;
    // Deleting a conversation directly leaves its items, which the gateway cannot find.
    let left = scene.simulator.holds_text("needle");
    assert!(left.iter().all(|it| it.contains(gone)), "{left:#?}");
}

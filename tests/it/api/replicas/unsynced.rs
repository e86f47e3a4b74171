//! SIGKILL of a replica whose run was sent with unsynced messages. The replica that takes the run
//! over knows that they were sent.

use std::time::{Duration, Instant};

use reqwest::StatusCode;
use sqlx::Executor;
use threadkeeper::simulator::Fault;

use super::{Half, SCOPE, SHORT, ask, begin, cancel, counted, outputs};
use crate::support::gateway::{Gateway, PATIENCE};
use crate::support::history::{assert_same, upstream};
use crate::support::scene::{Protocol, Scene, on_every_shared_scene};

on_every_shared_scene!(
    unsynced_messages_not_resent_after_takeover_of_tool_call,
    unsynced_messages_not_resent_after_run_lost_in_crash,
    unsynced_messages_not_resent_after_unconfirmed_rollback,
    unsynced_messages_not_resent_after_rollback_and_crash,
);

/// Starts two replicas and a thread with an unsynced message, if the protocol can have one. The
/// next run sends that message, too.
async fn with_unsynced_message(scene: &Scene) -> (Gateway, Gateway) {
    let start = || scene.gateway_both(SHORT, "lock_window = \"500ms\"\n");
    let (owner, other) = tokio::join!(start(), start());
    owner.say(SCOPE, "hello").await;
    let half = Half::at(scene, &owner, "never mind").await;
    assert_eq!(cancel(&owner, &half.run).await.status, 200);
    scene.simulator.release();
    half.stream.rest().await;
    (owner, other)
}

/// Checks that the thread accepts the next messages, and that the upstream got each message once.
async fn assert_messages_sent_once(scene: &Scene, gateway: &Gateway) {
    gateway.say(SCOPE, "and now?").await;
    gateway.say(SCOPE, "and then?").await;
    assert_same(scene, gateway, SCOPE).await;
    let there = upstream(scene, gateway, SCOPE).await;
    for (role, text) in &there {
        let times = there
            .iter()
            .filter(|line| **line == (role.clone(), text.clone()))
            .count();
        assert!(role != "user" || times == 1, "{times} times `{text}`");
    }
}

async fn unsynced_messages_not_resent_after_takeover_of_tool_call(scene: Scene) {
    let (owner, other) = with_unsynced_message(&scene).await;
    let asked = ask(&owner, SCOPE).await;
    owner.kill();
    counted(&scene, "SELECT count(*) FROM runs WHERE fence > 1", 1).await;
    let (path, body) = outputs(SCOPE, &asked);
    let answer = other.post(&path, &body).await.ok();
    assert_eq!(answer["run"]["status"], "completed", "{answer:#}");
    assert_messages_sent_once(&scene, &other).await;
}

async fn unsynced_messages_not_resent_after_run_lost_in_crash(scene: Scene) {
    let (owner, other) = with_unsynced_message(&scene).await;
    let half = Half::at(&scene, &owner, "tell me").await;
    let mut follower = other.events(SCOPE, &half.run, None).await;
    follower.until_text(&half.text()).await;
    owner.kill();
    counted(&scene, "SELECT count(*) FROM runs WHERE fence > 1", 1).await;
    scene.simulator.release();
    follower.rest().await;
    assert_messages_sent_once(&scene, &other).await;
}

/// The answer to the last removal is lost, and further requests are refused. So the next run
/// looks again, and finds nothing to remove.
async fn unsynced_messages_not_resent_after_unconfirmed_rollback(scene: Scene) {
    let (owner, _other) = with_unsynced_message(&scene).await;
    ask(&owner, SCOPE).await;
    // The function call is removed before the message that led to it. Assistants have no item for
    // a call.
    let (operation, before) = match scene.protocol {
        Protocol::Assistants => ("delete_message", 0),
        Protocol::Responses | Protocol::Chain => ("delete_item", 1),
    };
    let add = |fault: &str, times| {
        let fault = Fault {
            on: operation.to_owned(),
            fault: fault.to_owned(),
            times,
        };
        scene.simulator.add_fault(fault).unwrap();
    };
    add("latency=1ms", before);
    add("drop=after", 1);
    add("status=503 retry_after=0.01", 100);
    let (stream, _) = begin(&owner, "rollback", "something else").await;
    assert_eq!(stream.rest().await.last().unwrap().name, "run.completed");
    scene.simulator.clear_faults();
    assert_messages_sent_once(&scene, &owner).await;
}

/// The messages are removed upstream, and the process dies before it can record that.
async fn unsynced_messages_not_resent_after_rollback_and_crash(scene: Scene) {
    let (owner, other) = with_unsynced_message(&scene).await;
    let asked = ask(&owner, SCOPE).await;
    let run = asked["run"]["id"]
        .as_str()
        .unwrap()
        .trim_start_matches("run_");
    let mut holder = scene.database.pg().await;
    let hold = format!("BEGIN; SELECT FROM messages WHERE run_id = '{run}' FOR UPDATE");
    holder.execute(sqlx::AssertSqlSafe(hold)).await.unwrap();
    let (_stream, _) = begin(&owner, "rollback", "something else").await;
    until_removed(&scene, &owner, "weather?").await;
    owner.kill();
    drop(holder);
    let ended = format!("SELECT count(*) FROM runs WHERE id = '{run}' AND finished_at IS NOT NULL");
    counted(&scene, &ended, 1).await;
    assert_eq!(
        other.get(&format!("{SCOPE}/thread")).await.status,
        StatusCode::OK
    );
    assert_messages_sent_once(&scene, &other).await;
}

/// Waits until the upstream thread lacks a text. A chain never had it.
async fn until_removed(scene: &Scene, gateway: &Gateway, said: &str) {
    let start = Instant::now();
    while upstream(scene, gateway, SCOPE)
        .await
        .iter()
        .any(|(_, text)| text.contains(said))
    {
        assert!(start.elapsed() < PATIENCE, "`{said}` is still upstream");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

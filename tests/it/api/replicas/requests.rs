//! Requests for a run at a replica that does not own it. Sessions are renewed so rarely that only
//! notifications explain a prompt reaction.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{Half, LONG, PROMPT, SCOPE, ask, begin, cancel, completed, outputs, user_messages};
use crate::support::gateway::{Gateway, text, text_of};
use crate::support::history::assert_same;
use crate::support::link::{Link, Weather};
use crate::support::scene::{Backend, Protocol, Scene, on_shared_scene};

on_shared_scene!(
    active_run_cancelled_promptly_from_other_replica,
    queued_run_cancelled_promptly_from_other_replica,
    tool_outputs_posted_at_other_replica_are_answered,
    interrupt_from_other_replica_runs_next,
    rollback_from_other_replica_replaces_active_run,
);

async fn two_gateways(scene: &Scene) -> (Gateway, Gateway) {
    let upstream = "lock_window = \"500ms\"\n";
    tokio::join!(
        scene.gateway_both(LONG, upstream),
        scene.gateway_both(LONG, upstream)
    )
}

async fn thread_continues(scene: &Scene, gateways: [&Gateway; 2]) {
    scene.simulator.release();
    for gateway in gateways {
        let answer = gateway.say(SCOPE, "and now?").await;
        assert!(text(&answer["message"]).contains("and now?"));
        assert_same(scene, gateway, SCOPE).await;
    }
}

async fn active_run_cancelled_promptly_from_other_replica(scene: Scene) {
    let (owner, other) = two_gateways(&scene).await;
    let half = Half::at(&scene, &owner, "a long story").await;
    let begun = Instant::now();
    let cancelled = cancel(&other, &half.run).await.ok();
    assert!(
        begun.elapsed() < PROMPT,
        "cancelled after {:?}",
        begun.elapsed()
    );
    assert_eq!(cancelled["run"]["status"], "cancelled");
    let said = half.text();
    let rest = half.stream.rest().await;
    assert_eq!(rest.last().unwrap().name, "run.cancelled");
    assert_eq!(completed(&rest), said, "the partial reply is kept");
    assert_eq!(rest.last().unwrap().data["run"], cancelled["run"]);
    thread_continues(&scene, [&owner, &other]).await;
}

/// A replica announces its start once. A replica that misses this looks for others as soon as it
/// can listen again.
#[tokio::test(flavor = "multi_thread")]
async fn replicas_discover_each_other_after_missed_notification() {
    let scene = Scene::new(Protocol::Responses, Backend::Postgres).await;
    let link = Link::to_postgres(&scene.database.url()).await;
    let direct = format!("[store]\ndirect_url = {:?}\n", link.url);
    let first = Gateway::start(&scene.config(LONG).replace("[store]\n", &direct)).await;
    let ends = "SELECT CAST(max(expires_at) AS text) FROM replicas WHERE id IN (SELECT min(id::text)::uuid FROM replicas)";
    link.valve.set(Weather {
        refuses: true,
        ..Weather::default()
    });
    link.valve.cut();
    let owner = scene.gateway_with(LONG).await;
    let half = Half::at(&scene, &owner, "a long story").await;
    let session = scene.database.texts(ends).await;
    let begun = Instant::now();
    link.valve.set(Weather::default());
    while scene.database.texts(ends).await == session && begun.elapsed() < PROMPT {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    cancel(&first, &half.run).await.ok();
    assert!(
        begun.elapsed() < PROMPT,
        "cancelled after {:?}",
        begun.elapsed()
    );
    assert_eq!(
        half.stream.rest().await.last().unwrap().name,
        "run.cancelled"
    );
}

async fn queued_run_cancelled_promptly_from_other_replica(scene: Scene) {
    let (owner, other) = two_gateways(&scene).await;
    scene.simulator.hold();
    let (first, _) = begin(&owner, "enqueue", "first").await;
    let (second, queued) = begin(&owner, "enqueue", "second").await;
    let begun = Instant::now();
    let cancelled = cancel(&other, &super::run_of(&queued)).await.ok();
    assert_eq!(cancelled["run"]["status"], "cancelled");
    assert_eq!(second.rest().await.last().unwrap().name, "run.cancelled");
    assert!(
        begun.elapsed() < PROMPT,
        "cancelled after {:?}",
        begun.elapsed()
    );
    scene.simulator.release();
    assert_eq!(first.rest().await.last().unwrap().name, "run.completed");
    thread_continues(&scene, [&owner, &other]).await;
}

async fn tool_outputs_posted_at_other_replica_are_answered(scene: Scene) {
    let (owner, other) = two_gateways(&scene).await;
    let asked = ask(&owner, SCOPE).await;
    let (path, body) = outputs(SCOPE, &asked);
    let begun = Instant::now();
    let answer = other.post(&path, &body).await.ok();
    assert!(
        begun.elapsed() < PROMPT,
        "answered after {:?}",
        begun.elapsed()
    );
    assert_eq!(
        (&answer["run"]["id"], &answer["run"]["status"]),
        (&asked["run"]["id"], &json!("completed"))
    );
    assert!(text(&answer["message"]).contains("4 °C"), "{answer:#}");
    thread_continues(&scene, [&owner, &other]).await;
}

async fn interrupt_from_other_replica_runs_next(scene: Scene) {
    let (owner, other) = two_gateways(&scene).await;
    let half = Half::at(&scene, &owner, "a long story").await;
    let (waiting, _) = begin(&owner, "enqueue", "me too").await;
    let begun = Instant::now();
    let (interrupt, _) = begin(&other, "interrupt", "stop it").await;
    let said = half.text();
    let rest = half.stream.rest().await;
    assert!(
        begun.elapsed() < PROMPT,
        "interrupted after {:?}",
        begun.elapsed()
    );
    assert_eq!(rest.last().unwrap().name, "run.cancelled");
    assert_eq!(completed(&rest), said);
    scene.simulator.release();
    let (interrupt, waiting) = tokio::join!(interrupt.rest(), waiting.rest());
    for (events, said) in [(interrupt, "stop it"), (waiting, "me too")] {
        assert_eq!(events.last().unwrap().name, "run.completed");
        assert!(text_of(&events).contains(said));
    }
    assert_eq!(
        user_messages(&other, SCOPE).await,
        ["a long story", "stop it", "me too"]
    );
    thread_continues(&scene, [&owner, &other]).await;
}

async fn rollback_from_other_replica_replaces_active_run(scene: Scene) {
    let (owner, other) = two_gateways(&scene).await;
    owner.say(SCOPE, "hello").await;
    let half = Half::at(&scene, &owner, "a long story").await;
    let begun = Instant::now();
    let (rollback, _) = begin(&other, "rollback", "forget it").await;
    let rest = half.stream.rest().await;
    assert!(
        begun.elapsed() < PROMPT,
        "rolled back after {:?}",
        begun.elapsed()
    );
    assert_eq!(rest.last().unwrap().name, "run.cancelled");
    assert_eq!(rest.last().unwrap().data["run"]["rolled_back"], true);
    scene.simulator.release();
    assert_eq!(rollback.rest().await.last().unwrap().name, "run.completed");
    assert_eq!(user_messages(&other, SCOPE).await, ["hello", "forget it"]);
    if scene.protocol != Protocol::Chain {
        assert_eq!(
            scene.simulator.holds_text("a long story"),
            [""; 0],
            "the removed message is still upstream"
        );
    }
    thread_continues(&scene, [&owner, &other]).await;
}

//! A process that is frozen for longer than its session lives, and then continues.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::{Half, SCOPE, SHORT, begin, completed, counted, user_messages};
use crate::support::gateway::{PATIENCE, text_of};
use crate::support::history::{assert_same, messages};
use crate::support::scene::{Backend, Protocol, Scene, on_shared_scene};

on_shared_scene!(frozen_replica_waking_after_takeover_changes_nothing);

/// A deletion cannot end the run of a replica that does not answer, and whose session is still
/// good. So it leaves the upstream thread, which the run uses.
#[tokio::test(flavor = "multi_thread")]
async fn deletion_leaves_upstream_thread_to_run_of_frozen_replica() {
    const THREAD: &str = "/v1/users/alice/thread";
    // The deletion waits for the run for a third of a session and 2.2 s. The session of a frozen
    // replica is good for two thirds at least.
    let settings = "[replica]\nsession_ttl = \"15s\"\n[runs]\nsettle_timeout = \"200ms\"\n\
                    [janitor]\ninterval = \"1h\"\n";
    let scene = Scene::new(Protocol::Assistants, Backend::Postgres).await;
    let start = || scene.gateway_with(settings);
    let (sleeper, other) = tokio::join!(start(), start());
    sleeper.say(SCOPE, "hello").await;
    let half = Half::at(&scene, &sleeper, "tell me").await;
    sleeper.freeze();
    let receipt = other.delete_after(THREAD, "wait=0").await;
    assert_eq!(receipt.status, 202, "{receipt:?}");
    let start = Instant::now();
    let failures = "SELECT count(*) FROM threads WHERE attempts > 0";
    while scene.database.number(failures).await == 0 {
        assert!(
            !scene.simulator.holds_text("hello").is_empty(),
            "the upstream thread is deleted beside its run"
        );
        assert!(start.elapsed() < PATIENCE, "the deletion does not give up");
        sleep(Duration::from_millis(20)).await;
    }
    let unfinished = "SELECT count(*) FROM runs WHERE finished_at IS NULL AND fence = 1";
    assert_eq!(scene.database.number(unfinished).await, 1);
    assert!(!scene.simulator.holds_text("hello").is_empty());
    scene.simulator.release();
    sleeper.thaw();
    drop(half);
}

async fn frozen_replica_waking_after_takeover_changes_nothing(scene: Scene) {
    // The response is not in the background. The frozen process's socket keeps what arrives, so
    // it can read the whole reply when it wakes up.
    let upstream = "lock_window = \"500ms\"\n";
    let start = || scene.gateway_both(SHORT, upstream);
    let (sleeper, other) = tokio::join!(start(), start());
    sleeper.say(SCOPE, "hello").await;
    let half = Half::at(&scene, &sleeper, "tell me").await;
    let (in_line, _) = begin(&sleeper, "enqueue", "me too").await;
    let mut follower = other.events(SCOPE, &half.run, None).await;
    follower.until_text(&half.text()).await;
    sleeper.freeze();
    scene.simulator.release();
    counted(&scene, "SELECT count(*) FROM runs WHERE fence > 1", 2).await;
    let elsewhere = follower.rest().await;
    counted(
        &scene,
        "SELECT count(*) FROM runs WHERE finished_at IS NULL",
        0,
    )
    .await;
    other.say(SCOPE, "and now?").await;
    let before = messages(&other, SCOPE).await;
    let runs = other.get(&format!("{SCOPE}/runs")).await.ok();

    sleeper.thaw();
    // Its readers see how the run ended, not what the frozen process believes.
    let shown = half.stream.rest().await;
    assert_eq!(shown.last(), elsewhere.last());
    if scene.protocol == Protocol::Assistants {
        let shown = [half.seen, shown].concat();
        assert_eq!(text_of(&shown), completed(&shown));
    }
    assert_eq!(in_line.rest().await.last().unwrap().name, "run.completed");
    sleeper
        .until("/readyz", |answer| answer.status == 200)
        .await;
    assert_eq!(
        messages(&sleeper, SCOPE).await,
        before,
        "the transcript is unchanged"
    );
    assert_eq!(other.get(&format!("{SCOPE}/runs")).await.ok(), runs);
    sleeper.say(SCOPE, "there again").await;
    assert_eq!(
        user_messages(&other, SCOPE).await,
        ["hello", "tell me", "me too", "and now?", "there again"]
    );
    let replies = messages(&other, SCOPE).await;
    let of_run = |message: &&serde_json::Value| {
        message["role"] == "assistant" && message["run_id"] == half.run.as_str()
    };
    assert!(replies.iter().filter(of_run).count() <= 1, "{replies:#?}");
    assert_same(&scene, &sleeper, SCOPE).await;
}

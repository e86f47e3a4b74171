//! kill -9 of a replica whose run was told what its upstream thread lacked: its heir knows that too.

use super::{Half, SCOPE, SHORT, ask, cancel, counted, outputs};
use crate::support::gateway::Gateway;
use crate::support::history::{assert_same, upstream};
use crate::support::scene::{Scene, on_every_shared_scene};

on_every_shared_scene!(
    what_went_along_with_a_run_that_waits_is_not_said_again,
    what_went_along_with_a_run_that_was_lost_is_not_said_again,
);

/// Two replicas, and a thread that lacks something upstream, if its protocol can lack anything: it goes along with the next message.
async fn with_a_backlog(scene: &Scene) -> (Gateway, Gateway) {
    let start = || scene.gateway_both(SHORT, "lock_window = \"500ms\"\n");
    let (owner, other) = tokio::join!(start(), start());
    owner.say(SCOPE, "hello").await;
    let half = Half::at(scene, &owner, "never mind").await;
    assert_eq!(cancel(&owner, &half.run).await.status, 200);
    scene.simulator.release();
    half.stream.rest().await;
    (owner, other)
}

/// The next message has a turn, and the upstream has seen each once.
async fn nothing_is_said_again(scene: &Scene, gateway: &Gateway) {
    gateway.say(SCOPE, "and now?").await;
    gateway.say(SCOPE, "and then?").await;
    assert_same(scene, gateway, SCOPE).await;
    let there = upstream(scene, gateway, SCOPE).await;
    for (role, text) in &there {
        let times = there.iter().filter(|line| **line == (role.clone(), text.clone())).count();
        assert!(role != "user" || times == 1, "{times} times `{text}`");
    }
}

async fn what_went_along_with_a_run_that_waits_is_not_said_again(scene: Scene) {
    let (owner, other) = with_a_backlog(&scene).await;
    let asked = ask(&owner, SCOPE).await;
    owner.kill();
    counted(&scene, "SELECT count(*) FROM runs WHERE fence > 1", 1).await;
    let (path, body) = outputs(SCOPE, &asked);
    let answer = other.post(&path, &body).await.ok();
    assert_eq!(answer["run"]["status"], "completed", "{answer:#}");
    nothing_is_said_again(&scene, &other).await;
}

async fn what_went_along_with_a_run_that_was_lost_is_not_said_again(scene: Scene) {
    let (owner, other) = with_a_backlog(&scene).await;
    let half = Half::at(&scene, &owner, "tell me").await;
    let mut follower = other.events(SCOPE, &half.run, None).await;
    follower.until_told(&half.text()).await;
    owner.kill();
    counted(&scene, "SELECT count(*) FROM runs WHERE fence > 1", 1).await;
    scene.simulator.release();
    follower.rest().await;
    nothing_is_said_again(&scene, &other).await;
}

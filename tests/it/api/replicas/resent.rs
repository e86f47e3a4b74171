//! SIGKILL at the moment at which a message is sent to its upstream. The replica that takes the
//! run over sends the message only if it never arrived.

use std::time::Duration;

use serde_json::{Value, json};

use super::{SCOPE, SHORT, TTL, user_messages};
use crate::support::gate::{Gate, Moment};
use crate::support::gateway::{Gateway, text};
use crate::support::history::assert_same;
use crate::support::recording_proxy::{HttpTap, Steps};
use crate::support::scene::{Protocol, Scene, on_every_shared_scene};

on_every_shared_scene!(
    takeover_sends_unsent_message_once,
    takeover_does_not_resend_delivered_message,
    takeover_during_thread_creation_sends_message_once,
);

/// Settings of the upstream. `lock_window` bounds the time until it shows what it got.
const UPSTREAM: &str = "lock_window = \"500ms\"\n";

async fn takeover_sends_unsent_message_once(scene: Scene) {
    killed(scene, true, Moment::Before).await;
}

async fn takeover_does_not_resend_delivered_message(scene: Scene) {
    killed(scene, true, Moment::After).await;
}

/// The creation of a thread precedes a first message. A chain needs none.
async fn takeover_during_thread_creation_sends_message_once(scene: Scene) {
    killed(scene, false, Moment::Before).await;
}

async fn killed(scene: Scene, has_thread: bool, moment: Moment) {
    let gate = Gate::default();
    let tap = HttpTap::gated(&scene.upstream_url, &gate, Steps::Changes).await;
    let config = scene.config_with(SHORT, UPSTREAM);
    let tapped = config.replace(&scene.upstream_url, &tap.url);
    let (owner, other) = tokio::join!(Gateway::start(&tapped), Gateway::start(&config));
    if has_thread {
        owner.say(SCOPE, "hello").await;
    }
    let before = scene.simulator.stats().runs_started;
    gate.set(1, moment);
    let said =
        owner.post_in_background(&format!("{SCOPE}/messages"), &json!({"content": "tell me"}));
    gate.caught().await;
    owner.kill();
    drop(said);
    let steps = gate.open();
    let runs = format!("{SCOPE}/runs?limit=1");
    let ended = other
        .until(&runs, |answer| {
            answer.body["data"][0]["finished_at"].is_string()
        })
        .await
        .ok();
    let run = &ended["data"][0];
    let other_answer = other
        .get(&format!("{SCOPE}/runs/{}", run["id"].as_str().unwrap()))
        .await
        .ok();
    // A server without conversations cannot tell of a response whose id never arrived. So the
    // message is not sent again.
    let can_be_told = scene.protocol != Protocol::Chain;
    if can_be_told {
        assert_eq!(run["status"], "completed", "{steps:?}: {run:#}");
        assert!(
            text(&other_answer["message"]).contains("tell me"),
            "{other_answer:#}"
        );
        assert_eq!(
            scene.simulator.stats().runs_started,
            before + 1,
            "the message ran once"
        );
    } else {
        assert_eq!(
            (&run["status"], &run["error"]["code"]),
            (&json!("failed"), &json!("replica_lost")),
            "{run:#}"
        );
        assert_eq!(other_answer["message"], Value::Null);
    }
    let wanted: &[&str] = if has_thread {
        &["hello", "tell me", "and now?"]
    } else {
        &["tell me", "and now?"]
    };
    other.say(SCOPE, "and now?").await;
    assert_eq!(user_messages(&other, SCOPE).await, wanted);
    assert_same(&scene, &other, SCOPE).await;
    if can_be_told {
        let thread = scene
            .simulator
            .threads()
            .into_iter()
            .filter(|thread| !thread.user_texts.is_empty());
        let texts: Vec<_> = thread.flat_map(|thread| thread.user_texts).collect();
        assert_eq!(texts, wanted, "nothing arrived twice");
    }
}

/// A slow replica counts as alive for its session's life, and keeps its runs.
#[tokio::test(flavor = "multi_thread")]
async fn live_replica_keeps_its_runs() {
    use crate::support::scene::Backend;
    let scene = Scene::new(Protocol::Responses, Backend::Postgres).await;
    let (owner, other) = tokio::join!(scene.gateway_with(SHORT), scene.gateway_with(SHORT));
    let half = super::Half::at(&scene, &owner, "tell me").await;
    tokio::time::sleep(TTL + Duration::from_secs(1)).await;
    assert_eq!(
        scene
            .database
            .number("SELECT count(*) FROM runs WHERE fence > 1")
            .await,
        0
    );
    scene.simulator.release();
    assert_eq!(
        half.stream.rest().await.last().unwrap().name,
        "run.completed"
    );
    assert_same(&scene, &other, SCOPE).await;
}

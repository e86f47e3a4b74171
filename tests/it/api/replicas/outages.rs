//! A replica that loses its database while others have theirs.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{Half, SCOPE, SHORT, TTL, begin, counted, user_messages};
use crate::support::gate::{Gate, Moment};
use crate::support::gateway::{Gateway, text, text_of};
use crate::support::history::assert_same;
use crate::support::recording_proxy::{DatabaseTap, HttpTap, Steps};
use crate::support::scene::{Backend, Protocol, Scene, on_shared_scene};

on_shared_scene!(cut_off_replica_stops_before_takeover);

/// Longest time until a refusal: the configured waits for a connection and for an answer, and
/// more for a busy machine.
const REFUSED_WITHIN: Duration = Duration::from_secs(20);

/// Stops all statements of a database behind this gate from now on.
fn cut_off(gate: &Gate) {
    gate.set(1, Moment::Before);
}

async fn cut_off_replica_stops_before_takeover(scene: Scene) {
    let (database, upstream) = (Gate::default(), Gate::default());
    let tap = DatabaseTap::gated(&scene.database.url(), &database, Steps::All).await;
    let http = HttpTap::gated(&scene.upstream_url, &upstream, Steps::All).await;
    let config = scene.config_with(SHORT, "lock_window = \"500ms\"\n");
    let (one, other) = (
        config.replace(&scene.database.url(), &tap.url),
        config.replace(&scene.upstream_url, &http.url),
    );
    let (one, other) = tokio::join!(Gateway::start(&one), Gateway::start(&other));
    one.say(SCOPE, "hello").await;
    let half = Half::at(&scene, &one, "tell me").await;
    let (in_line, _) = begin(&one, "enqueue", "me too").await;
    let mut follower = other.events(SCOPE, &half.run, None).await;
    follower.until_text(&half.text()).await;

    // The first upstream request of the replica that takes the run over is stopped.
    upstream.set(1, Moment::Before);
    cut_off(&database);
    upstream.caught().await;
    if scene.protocol != Protocol::Assistants {
        let abandoned = scene.simulator.stats().runs_ended.get("abandoned").copied();
        assert_eq!(
            abandoned,
            Some(1),
            "the former owner does not read any more"
        );
    }
    upstream.open();

    // The replica soon reports that it is not ready, although it cannot ask the database.
    let not_ready = one.until("/readyz", |answer| answer.status == 503).await;
    assert_eq!(not_ready.problem(), (503, "store-unavailable"));
    for path in [SCOPE, "/v1/users/bob"] {
        let begun = Instant::now();
        let refused = one
            .post(
                &format!("{path}/messages"),
                &json!({"content": "are you there?"}),
            )
            .await;
        assert_eq!(refused.problem(), (503, "store-unavailable"));
        assert!(refused.headers.contains_key("retry-after"), "{refused:?}");
        assert!(
            begun.elapsed() < REFUSED_WITHIN,
            "refused after {:?}",
            begun.elapsed()
        );
    }
    // The other replicas continue.
    scene.simulator.release();
    let elsewhere = follower.rest().await;
    let lost = scene.protocol != Protocol::Assistants;
    let end = if lost { "run.failed" } else { "run.completed" };
    assert_eq!(elsewhere.last().unwrap().name, end, "{elsewhere:#?}");
    counted(
        &scene,
        "SELECT count(*) FROM runs WHERE finished_at IS NULL",
        0,
    )
    .await;
    other.say(SCOPE, "and now?").await;

    // Once the database is back, the replica recovers by itself.
    database.open();
    one.until("/readyz", |answer| answer.status == 200).await;
    let shown = half.stream.rest().await;
    assert_eq!(
        shown.last(),
        elsewhere.last(),
        "its readers see the end, too"
    );
    let in_line = in_line.rest().await;
    assert!(text_of(&in_line).contains("me too"), "{in_line:#?}");
    let answer = one.say(SCOPE, "there again").await;
    assert!(text(&answer["message"]).contains("there again"));
    assert_eq!(
        user_messages(&one, SCOPE).await,
        ["hello", "tell me", "me too", "and now?", "there again"]
    );
    assert_same(&scene, &one, SCOPE).await;
    assert_eq!(scene.simulator.stats().runs_started, 5, "nothing ran twice");
}

/// The replica stops by its own clock, without hearing of a takeover.
#[tokio::test(flavor = "multi_thread")]
async fn cut_off_replica_stops_before_session_lapses() {
    /// A replica gives its session up a tenth of the life early, which is enough for a late
    /// check.
    const LIFE: Duration = Duration::from_secs(10);
    let scene = Scene::new(Protocol::Responses, Backend::Postgres).await;
    let gate = Gate::default();
    let tap = DatabaseTap::gated(&scene.database.url(), &gate, Steps::All).await;
    let settings = format!("[replica]\nsession_ttl = \"{}s\"\n", LIFE.as_secs());
    let gateway = Gateway::start(
        &scene
            .config(&settings)
            .replace(&scene.database.url(), &tap.url),
    )
    .await;
    let _half = Half::at(&scene, &gateway, "tell me").await;
    cut_off(&gate);
    scene
        .simulator
        .wait_for(|stats| stats.runs_ended.contains_key("abandoned"))
        .await;
    let alive = "SELECT count(*) FROM replicas WHERE expires_at > clock_timestamp()";
    assert_eq!(
        scene.database.number(alive).await,
        1,
        "the session had lapsed before the replica stopped"
    );
}

/// There is no other replica. Its runs continue once the database is back, whichever session
/// owned them.
#[tokio::test(flavor = "multi_thread")]
async fn single_replica_resumes_runs_after_database_outage() {
    let scene = Scene::new(Protocol::Assistants, Backend::Postgres).await;
    let gate = Gate::default();
    let tap = DatabaseTap::gated(&scene.database.url(), &gate, Steps::All).await;
    let gateway =
        Gateway::start(&scene.config(SHORT).replace(&scene.database.url(), &tap.url)).await;
    let half = Half::at(&scene, &gateway, "tell me").await;
    let (in_line, _) = begin(&gateway, "enqueue", "me too").await;
    cut_off(&gate);
    gateway
        .until("/readyz", |answer| answer.status == 503)
        .await;
    tokio::time::sleep(TTL).await;
    gate.open();
    gateway
        .until("/readyz", |answer| answer.status == 200)
        .await;
    scene.simulator.release();
    let shown = [half.seen, half.stream.rest().await].concat();
    assert_eq!(shown.last().unwrap().name, "run.completed", "{shown:#?}");
    assert_eq!(text_of(&shown), super::completed(&shown));
    assert_eq!(in_line.rest().await.last().unwrap().name, "run.completed");
    assert_eq!(user_messages(&gateway, SCOPE).await, ["tell me", "me too"]);
    assert_same(&scene, &gateway, SCOPE).await;
}

/// The process waits for the database at whichever step of the start it is lost, as it waits for
/// one that is not up yet.
#[tokio::test(flavor = "multi_thread")]
async fn startup_waits_for_lost_database() {
    let scene = Scene::new(Protocol::Responses, Backend::Postgres).await;
    let gate = Gate::default();
    let tap = DatabaseTap::gated(&scene.database.url(), &gate, Steps::All).await;
    let config = scene
        .config_with(SHORT, "")
        .replace(&scene.database.url(), &tap.url);
    let mut steps = 0;
    loop {
        gate.set(steps + 1, Moment::Before);
        let mut start = std::pin::pin!(Gateway::start(&config));
        tokio::select! {
            _ = &mut start => break,
            () = gate.caught() => {}
        }
        gate.open();
        let gateway = start.await;
        gateway
            .say(&format!("/v1/users/after-{steps}"), "hello")
            .await;
        steps += 1;
    }
    gate.open();
    assert!(steps >= 4, "a start needs more than {steps} steps");
}

//! SIGTERM: runs that do not end in time are handed over. Sessions are so long that only the
//! hand-over explains why another replica continues at once.

use std::time::Instant;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use super::{
    Half, LONG, PROMPT, SCOPE, ask, assert_ascending, begin, completed, counted, outputs,
    user_messages, whole,
};
use crate::support::gateway::{Event, EventReader, Gateway, text, text_of};
use crate::support::history::assert_same;
use crate::support::scene::{Backend, Protocol, Scene, on_each_protocol, on_every_shared_scene};

on_every_shared_scene!(unfinished_runs_are_handed_over_on_shutdown);

on_each_protocol!(
    unfinished_runs_of_single_gateway_resume_in_successor,
    unfinished_runs_without_transcript_fail_on_shutdown,
);

fn settings(grace: &str) -> String {
    format!("{LONG}[server]\nshutdown_grace = \"{grace}\"\n")
}

/// Settings of an upstream on which a run outlives its client and can be followed to its end.
fn upstream(scene: &Scene) -> &'static str {
    if scene.protocol == Protocol::Assistants {
        ""
    } else {
        "background = true\n"
    }
}

/// Returns the hint at the end of a stream that continues elsewhere: the link, and the event to
/// continue after.
#[track_caller]
fn hint(events: &[Event]) -> (String, Option<String>) {
    let last = events.last().expect("the stream has a last event");
    assert_eq!(
        (last.name.as_str(), last.id.as_str()),
        ("stream.reconnect", ""),
        "{events:#?}"
    );
    (
        last.data["events"].as_str().unwrap().to_owned(),
        last.data["after"].as_str().map(str::to_owned),
    )
}

async fn resume(gateway: &Gateway, (path, after): &(String, Option<String>)) -> EventReader {
    EventReader::new(gateway.open_events(path, after.as_deref()).await)
}

async fn unfinished_runs_are_handed_over_on_shutdown(scene: Scene) {
    let start = || scene.gateway_both(SETTINGS, upstream(&scene));
    let (mut owner, other) = tokio::join!(start(), start());
    let asked = ask(&owner, "/v1/users/bob").await;
    let mut half = Half::at(&scene, &owner, "tell me").await;
    // One run has a follower at the other replica, one is queued, and one has a caller that waits
    // for JSON.
    let follower = owner.events(SCOPE, &half.run, Some(half.last())).await;
    let (in_line, queued) = begin(&owner, "enqueue", "me too").await;
    let request = owner.request(Method::POST, "/v1/users/carol/messages");
    let waits = owner.send(request.json(&json!({"content": "and I?"})));
    let stopped = async {
        scene
            .simulator
            .wait_for(|stats| stats.runs_started == 3)
            .await;
        let begun = Instant::now();
        owner.terminate();
        let not_ready = owner.until("/readyz", |answer| answer.status == 503).await;
        assert_eq!(not_ready.problem(), (503, "draining"));
        begun
    };
    let (waits, begun) = tokio::join!(waits, stopped);
    assert_eq!(waits.status, StatusCode::ACCEPTED, "{waits:?}");
    let place = waits.headers["location"].to_str().unwrap().to_owned();

    while let Some(event) = half.stream.next().await {
        half.seen.push(event);
    }
    let (path, after) = hint(&half.seen);
    assert_eq!(path, format!("{SCOPE}/runs/{}/events", half.run));
    assert_eq!(after.as_deref(), Some(&*half.seen[half.seen.len() - 2].id));
    half.seen.pop();
    hint(&follower.rest().await);
    let in_line = in_line.rest().await;
    let (path, _) = hint(&in_line);
    assert_eq!(
        path,
        format!("{SCOPE}/runs/{}/events", super::run_of(&queued))
    );
    assert!(owner_exits(&mut owner).await);
    counted(
        &scene,
        "SELECT count(*) FROM runs WHERE finished_at IS NULL AND fence > 1",
        4,
    )
    .await;
    assert!(
        begun.elapsed() < PROMPT,
        "taken over after {:?}",
        begun.elapsed()
    );
    assert_eq!(
        scene.database.number("SELECT count(*) FROM replicas").await,
        1,
        "its session is closed"
    );

    let rest = resume(
        &other,
        &(
            format!("{SCOPE}/runs/{}/events", half.run),
            Some(half.last().to_owned()),
        ),
    )
    .await;
    let second = resume(&other, &hint(&in_line)).await;
    scene.simulator.release();
    half.seen.extend(rest.rest().await);
    assert_ascending(&half.seen);
    assert_eq!(half.seen.last().unwrap().name, "run.completed");
    assert_eq!(
        text_of(&half.seen),
        completed(&half.seen),
        "both parts give the whole reply"
    );
    let second = second.rest().await;
    assert_eq!(second.last().unwrap().name, "run.completed");
    assert!(text_of(&second).contains("me too"));
    let carol = other
        .until(&place, |answer| answer.body["run"]["status"] == "completed")
        .await
        .ok();
    assert!(whole(&carol["message"]).contains("and I?"));
    let (path, body) = outputs("/v1/users/bob", &asked);
    let bob = other.post(&path, &body).await.ok();
    assert!(text(&bob["message"]).contains("4 °C"), "{bob:#}");
    assert_eq!(user_messages(&other, SCOPE).await, ["tell me", "me too"]);
    other.say(SCOPE, "and now?").await;
    assert_same(&scene, &other, SCOPE).await;
    // Except with Assistants, tool outputs start another run upstream.
    let runs = if scene.protocol == Protocol::Assistants {
        5
    } else {
        6
    };
    assert_eq!(
        scene.simulator.stats().runs_started,
        runs,
        "nothing was sent twice"
    );
}

/// Settings with little time for active runs.
const SETTINGS: &str = "[replica]\nsession_ttl = \"60s\"\n[server]\nshutdown_grace = \"500ms\"\n";

async fn owner_exits(gateway: &mut Gateway) -> bool {
    gateway.exit().await.success()
}

/// A run that ends within the grace time ends as usual. New messages are refused meanwhile, and
/// the other replica accepts them.
#[tokio::test(flavor = "multi_thread")]
async fn runs_ending_within_grace_are_not_handed_over() {
    let scene = Scene::new(Protocol::Responses, Backend::Postgres).await;
    let settings = settings("30s");
    let (mut owner, other) =
        tokio::join!(scene.gateway_with(&settings), scene.gateway_with(&settings));
    let half = Half::at(&scene, &owner, "tell me").await;
    // A queued run is handed over at once, not at the end of the grace time.
    let (in_line, _) = begin(&owner, "enqueue", "me too").await;
    owner.terminate();
    owner.until("/readyz", |answer| answer.status == 503).await;
    let refused = owner
        .post("/v1/users/bob/messages", &json!({"content": "hi"}))
        .await;
    assert_eq!(refused.problem(), (503, "draining"));
    assert!(refused.headers.contains_key("retry-after"));
    other
        .say("/v1/users/bob", "hi there [[sim: hold_after=1000]]")
        .await;
    counted(
        &scene,
        "SELECT count(*) FROM runs WHERE status = 'queued' AND fence > 1",
        1,
    )
    .await;
    scene.simulator.release();
    let shown = [half.seen, half.stream.rest().await].concat();
    assert_eq!(text_of(&shown), completed(&shown));
    // Its reader keeps its connection for as long as possible.
    let in_line = in_line.rest().await;
    let last = in_line.last().unwrap();
    if last.name == "stream.reconnect" {
        let rest = resume(&other, &hint(&in_line)).await.rest().await;
        assert_eq!(rest.last().unwrap().name, "run.completed");
    } else {
        assert_eq!(last.name, "run.completed");
    }
    assert!(owner.exit().await.success());
    let fences = "SELECT count(*) FROM runs WHERE fence > 1";
    assert_eq!(
        scene.database.number(fences).await,
        1,
        "only the queued run was handed over"
    );
    assert_same(&scene, &other, SCOPE).await;
}

async fn unfinished_runs_of_single_gateway_resume_in_successor(scene: Scene) {
    let mut gateway = scene.gateway_both(SETTINGS, upstream(&scene)).await;
    let mut half = Half::at(&scene, &gateway, "tell me").await;
    let (in_line, _) = begin(&gateway, "enqueue", "me too").await;
    gateway.terminate();
    while let Some(event) = half.stream.next().await {
        half.seen.push(event);
    }
    let half_hint = hint(&half.seen);
    let in_line_hint = hint(&in_line.rest().await);
    half.seen.pop();
    assert!(gateway.exit().await.success());
    assert_eq!(
        scene.database.number("SELECT count(*) FROM replicas").await,
        0,
        "its session is closed"
    );
    let unfinished = "SELECT count(*) FROM runs WHERE finished_at IS NULL";
    assert_eq!(
        scene.database.number(unfinished).await,
        2,
        "no run that can continue is ended"
    );

    let begun = Instant::now();
    let again = scene.gateway_both(SETTINGS, upstream(&scene)).await;
    let (rest, second) = tokio::join!(resume(&again, &half_hint), resume(&again, &in_line_hint));
    counted(
        &scene,
        "SELECT count(*) FROM runs WHERE finished_at IS NULL AND fence > 1",
        2,
    )
    .await;
    assert!(
        begun.elapsed() < PROMPT,
        "taken over after {:?}",
        begun.elapsed()
    );
    scene.simulator.release();
    half.seen.extend(rest.rest().await);
    assert_ascending(&half.seen);
    assert_eq!(
        text_of(&half.seen),
        completed(&half.seen),
        "both parts give the whole reply"
    );
    assert_eq!(second.rest().await.last().unwrap().name, "run.completed");
    assert_eq!(user_messages(&again, SCOPE).await, ["tell me", "me too"]);
    again.say(SCOPE, "and now?").await;
    assert_same(&scene, &again, SCOPE).await;
}

/// No other replica could know the text of these runs, so they fail before the process ends.
async fn unfinished_runs_without_transcript_fail_on_shutdown(scene: Scene) {
    let config = scene.config_with(SETTINGS, upstream(&scene));
    let config = config.replace("[store]\n", "[store]\ntranscript = \"off\"\n");
    let mut gateway = Gateway::start(&config).await;
    let half = Half::at(&scene, &gateway, "tell me").await;
    let (in_line, _) = begin(&gateway, "enqueue", "me too").await;
    gateway.terminate();
    for events in [half.stream.rest().await, in_line.rest().await] {
        let end = events.last().unwrap();
        assert_eq!(end.name, "run.failed", "{events:#?}");
        assert_eq!(end.data["run"]["error"]["code"], "gateway_stopped");
    }
    assert!(gateway.exit().await.success());
    assert_eq!(
        scene
            .database
            .number("SELECT count(*) FROM runs WHERE finished_at IS NULL")
            .await,
        0
    );
    scene.simulator.release();
    let again = Gateway::start(&config).await;
    let answer = again.say(SCOPE, "and now?").await;
    assert_eq!(answer["run"]["error"], Value::Null);
}

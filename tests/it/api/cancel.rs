//! Cancelling active and queued runs.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::gateway::{EventReader, Gateway, PATIENCE, text, text_of};
use crate::support::history::assert_same;
use crate::support::link::{Link, Weather};
use crate::support::scene::{Backend, Protocol, Scene, on_each_protocol};

on_each_protocol!(
    active_run_when_cancelled_keeps_partial_reply,
    queued_run_when_cancelled_never_starts,
    thread_cancel_ends_selected_runs,
    cancel_of_finished_run_returns_its_result,
    disconnect_cancels_run_when_requested,
    every_reader_sees_cancellation_of_run,
    any_replica_can_cancel_run,
);

const SCOPE: &str = "/v1/users/alice";

/// Lets a replica see soon what others request of its runs, and that another replica is gone.
const SHORT: &str = "[replica]\nsession_ttl = \"900ms\"\n";

async fn cancel(gateway: &Gateway, path: &str) -> crate::support::gateway::Answer {
    gateway
        .send(gateway.request(Method::POST, &format!("{SCOPE}/{path}")))
        .await
}

async fn works_again(gateway: &Gateway, scene: &Scene) {
    let answer = gateway.say(SCOPE, "and now?").await;
    assert!(text(&answer["message"]).contains("and now?"));
    assert_eq!(answer["thread"]["state"], "idle");
    assert_eq!(
        scene.simulator.stats().active_runs,
        0,
        "the upstream has no active run"
    );
}

async fn active_run_when_cancelled_keeps_partial_reply(scene: Scene) {
    let gateway = scene.gateway().await;
    gateway.say(SCOPE, "hello").await;
    let mut stream = gateway
        .stream(SCOPE, "a long story [[sim: silent_after=3]]")
        .await;
    let run = stream.next().await.unwrap().data["run_id"]
        .as_str()
        .unwrap()
        .to_owned();
    for _ in 0..3 {
        assert_eq!(stream.next().await.unwrap().name, "message.delta");
    }
    let cancelled = cancel(&gateway, &format!("runs/{run}/cancel")).await.ok();
    assert_eq!(
        (&cancelled["run"]["status"], &cancelled["run"]["error"]),
        (&json!("cancelled"), &Value::Null)
    );
    let rest = stream.rest().await;
    let names: Vec<_> = rest.iter().map(|event| event.name.as_str()).collect();
    assert_eq!(
        names,
        ["message.completed", "run.cancelled"],
        "the partial reply is kept"
    );
    assert_eq!(rest[0].data["message"], cancelled["message"]);
    let transcript = gateway.get(&format!("{SCOPE}/messages")).await.ok();
    assert_eq!(transcript["data"][0], cancelled["message"]);
    works_again(&gateway, &scene).await;
}

async fn queued_run_when_cancelled_never_starts(scene: Scene) {
    let gateway = scene.gateway().await;
    scene.simulator.hold();
    let mut first = gateway.stream(SCOPE, "first").await;
    first.next().await.unwrap();
    let mut second = gateway.stream(SCOPE, "second").await;
    let run = second.next().await.unwrap().data["run_id"]
        .as_str()
        .unwrap()
        .to_owned();
    let mut third = gateway.stream(SCOPE, "third").await;
    third.next().await.unwrap();
    let cancelled = cancel(&gateway, &format!("runs/{run}/cancel")).await.ok();
    assert_eq!(
        (&cancelled["run"]["status"], &cancelled["message"]),
        (&json!("cancelled"), &Value::Null)
    );
    assert_eq!(second.rest().await.last().unwrap().name, "run.cancelled");
    scene.simulator.release();
    for (stream, said) in [(first, "first"), (third, "third")] {
        let events = stream.rest().await;
        assert_eq!(events.last().unwrap().name, "run.completed");
        assert!(text_of(&events).contains(said));
    }
    if scene.protocol != Protocol::Chain {
        assert_eq!(
            scene.simulator.threads().remove(0).user_texts,
            ["first", "third"],
            "the message was never sent"
        );
    }
    works_again(&gateway, &scene).await;
    let transcript = gateway
        .get(&format!("{SCOPE}/messages?order=asc"))
        .await
        .ok();
    let said = transcript["data"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|m| m["role"] == "user")
        .map(text);
    assert_eq!(
        said.filter(|text| *text == "second").count(),
        1,
        "the message stays in the transcript"
    );
}

async fn thread_cancel_ends_selected_runs(scene: Scene) {
    let gateway = scene.gateway().await;
    let nobody = cancel(&gateway, "thread/cancel").await;
    assert_eq!(nobody.problem(), (404, "not-found"));
    for (which, ends) in [
        ("", ["cancelled", "completed", "completed"]),
        ("?which=queued", ["completed", "cancelled", "cancelled"]),
        ("?which=all", ["cancelled", "cancelled", "cancelled"]),
    ] {
        scene.simulator.hold();
        let mut streams = Vec::new();
        for n in 0..3 {
            let mut stream = gateway.stream(SCOPE, &format!("message {n}")).await;
            stream.next().await.unwrap();
            streams.push(stream);
        }
        let path = format!("thread/cancel{which}");
        let cancelled = cancel(&gateway, &path).await.ok();
        let statuses = cancelled["data"]
            .as_array()
            .unwrap()
            .iter()
            .map(|run| run["status"].as_str().unwrap());
        assert!(
            statuses.clone().all(|status| status == "cancelled"),
            "{cancelled:#}"
        );
        assert_eq!(
            statuses.count(),
            ends.iter().filter(|end| **end == "cancelled").count()
        );
        scene.simulator.release();
        for (stream, end) in streams.into_iter().zip(ends) {
            assert_eq!(
                stream.rest().await.last().unwrap().name,
                format!("run.{end}"),
                "{which}"
            );
        }
        assert_eq!(
            cancel(&gateway, &path).await.ok()["data"],
            json!([]),
            "no run is left to cancel"
        );
        works_again(&gateway, &scene).await;
    }
    assert_eq!(
        cancel(&gateway, "thread/cancel?which=some").await.problem(),
        (400, "invalid-request")
    );
}

async fn cancel_of_finished_run_returns_its_result(scene: Scene) {
    let gateway = scene.gateway().await;
    let answer = gateway.say(SCOPE, "hello").await;
    let path = format!("runs/{}/cancel", answer["run"]["id"].as_str().unwrap());
    let late = cancel(&gateway, &path).await.ok();
    assert_eq!(
        (&late["run"], &late["message"]),
        (&answer["run"], &answer["message"])
    );
    let unknown = cancel(&gateway, "runs/run_0198f000000070008000000000000000/cancel").await;
    assert_eq!(unknown.problem(), (404, "not-found"));
}

async fn disconnect_cancels_run_when_requested(scene: Scene) {
    let gateway = scene.gateway().await;
    gateway.say(SCOPE, "hello").await;
    scene.simulator.hold();
    for stream in [true, false] {
        let body = json!({"content": "bye", "stream": stream, "on_disconnect": "cancel"});
        let request = gateway
            .request(Method::POST, &format!("{SCOPE}/messages"))
            .json(&body);
        let begun = scene.simulator.stats().runs_started;
        let leaves = async {
            scene
                .simulator
                .wait_for(|stats| stats.runs_started > begun)
                .await;
        };
        tokio::time::timeout(PATIENCE, async {
            if stream {
                let response = request.send().await.unwrap();
                leaves.await;
                drop(response);
            } else {
                tokio::select! {
                    answer = request.send() => panic!("cancelling cannot change it: {answer:?}"),
                    () = leaves => {}
                }
            }
        })
        .await
        .expect("the run starts");
        let newest = format!("{SCOPE}/runs?limit=1");
        let runs = gateway
            .until(&newest, |answer| {
                answer.body["data"][0]["status"] == "cancelled"
            })
            .await
            .ok();
        assert_eq!(runs["data"][0]["error"], Value::Null);
    }
    scene.simulator.release();
    works_again(&gateway, &scene).await;
}

async fn every_reader_sees_cancellation_of_run(scene: Scene) {
    let gateway = scene.gateway().await;
    let mut own = gateway
        .stream(SCOPE, "a long story [[sim: silent_after=3]]")
        .await;
    let started = own.next().await.unwrap();
    let run = format!("{SCOPE}/runs/{}", started.data["run_id"].as_str().unwrap());
    let follow = |gateway: &Gateway| {
        gateway
            .request(Method::GET, &format!("{run}/events"))
            .send()
    };
    let mut other = EventReader::new(follow(&gateway).await.unwrap());
    assert_eq!(
        other.next().await.unwrap(),
        started,
        "both readers see the same events"
    );
    for _ in 0..3 {
        assert_eq!(other.next().await, own.next().await);
    }
    let cancelled = gateway
        .send(gateway.request(Method::POST, &format!("{run}/cancel")))
        .await
        .ok();
    let (own, other) = (own.rest().await, other.rest().await);
    assert_eq!(own, other);
    assert_eq!(own.last().unwrap().name, "run.cancelled");
    assert_eq!(own.last().unwrap().data["run"], cancelled["run"]);
    let late = EventReader::new(follow(&gateway).await.unwrap())
        .rest()
        .await;
    assert_eq!(
        late[late.len() - own.len()..],
        own,
        "a later reader sees the same events"
    );
    works_again(&gateway, &scene).await;
}

/// Cancels an active run, a queued one, and one that awaits tool outputs, each at a replica that
/// does not own it.
async fn any_replica_can_cancel_run(scene: Scene) {
    if scene.backend == Backend::Sqlite {
        // SQLite serves one process only.
        return;
    }
    let (owner, other) = tokio::join!(scene.gateway_with(SHORT), scene.gateway_with(SHORT));
    let mut first = owner
        .stream(SCOPE, "a long story [[sim: silent_after=3]]")
        .await;
    let at_work = first.next().await.unwrap().data["run_id"]
        .as_str()
        .unwrap()
        .to_owned();
    let mut second = owner.stream(SCOPE, "in line").await;
    let in_line = second.next().await.unwrap().data["run_id"]
        .as_str()
        .unwrap()
        .to_owned();
    // A follower at that replica sees the end, too.
    let path = format!("{SCOPE}/runs/{at_work}/events");
    let follower = EventReader::new(other.request(Method::GET, &path).send().await.unwrap());

    let cancelled = cancel(&other, &format!("runs/{in_line}/cancel")).await.ok();
    assert_eq!(
        (&cancelled["run"]["status"], &cancelled["message"]),
        (&json!("cancelled"), &Value::Null)
    );
    assert_eq!(second.rest().await.last().unwrap().name, "run.cancelled");
    for _ in 0..3 {
        assert_eq!(
            first.next().await.unwrap().name,
            "message.delta",
            "the run before it continues"
        );
    }
    let cancelled = cancel(&other, &format!("runs/{at_work}/cancel")).await.ok();
    assert_eq!(cancelled["run"]["status"], "cancelled");
    let (first, follower) = (first.rest().await, follower.rest().await);
    assert_eq!(first.last().unwrap().name, "run.cancelled");
    assert_eq!(follower[follower.len() - first.len()..], first);

    let asked = owner.say(SCOPE, "weather? [[sim: tool=get_weather]]").await;
    assert_eq!(asked["run"]["status"], "requires_action");
    let waits = asked["run"]["id"].as_str().unwrap();
    let cancelled = cancel(&other, &format!("runs/{waits}/cancel")).await.ok();
    assert_eq!(cancelled["run"]["status"], "cancelled");
    assert_eq!(cancelled["run"]["required_action"], Value::Null);
    works_again(&other, &scene).await;
    works_again(&owner, &scene).await;
    assert_same(&scene, &owner, SCOPE).await;
}

/// A background response continues even if no client reads it. So a cancel before its id has
/// arrived waits for the id, and then cancels the response.
#[tokio::test(flavor = "multi_thread")]
async fn cancel_before_upstream_id_arrives_still_cancels_upstream() {
    for protocol in [Protocol::Responses, Protocol::Chain] {
        let scene = Scene::new(protocol, Backend::Sqlite).await;
        let link = Link::to_upstream(&scene.upstream_url).await;
        let config = scene
            .config_with("", "background = true\n")
            .replace(&scene.upstream_url, &link.url);
        let gateway = Gateway::start(&config).await;
        gateway.say(SCOPE, "hello").await;
        link.valve.set(Weather {
            delay: Duration::from_millis(300),
            ..Weather::default()
        });
        let mut stream = gateway
            .stream(SCOPE, "a long story [[sim: silent_after=3]]")
            .await;
        let run = stream.next().await.unwrap().data["run_id"]
            .as_str()
            .unwrap()
            .to_owned();
        scene
            .simulator
            .wait_for(|stats| stats.runs_started == 2)
            .await;
        let cancelled = cancel(&gateway, &format!("runs/{run}/cancel")).await.ok();
        assert_eq!(cancelled["run"]["status"], "cancelled");
        assert_eq!(
            scene.simulator.stats().runs_ended.get("cancelled"),
            Some(&1),
            "{protocol:?}"
        );
        link.valve.set(Weather::default());
        works_again(&gateway, &scene).await;
        assert_same(&scene, &gateway, SCOPE).await;
    }
}

/// The response's id never arrived, so it continues while the next message waits. The earlier
/// message that was sent with it is upstream in the end.
#[tokio::test(flavor = "multi_thread")]
async fn unsynced_messages_not_resent_after_cancelled_run_continues_upstream() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let link = Link::to_upstream(&scene.upstream_url).await;
    let upstream = "background = true\nlock_window = \"1s\"\n";
    let config = scene
        .config_with("", upstream)
        .replace(&scene.upstream_url, &link.url);
    let gateway = Gateway::start(&config).await;
    gateway.say(SCOPE, "hello").await;
    let begin = async |said: &str| {
        let mut stream = gateway.stream(SCOPE, said).await;
        let run = stream.next().await.unwrap().data["run_id"]
            .as_str()
            .unwrap()
            .to_owned();
        (stream, format!("runs/{run}/cancel"))
    };
    // The upstream drops this message, so the next one is sent with it.
    let (_first, stop) = begin("first [[sim: silent_after=3]]").await;
    scene
        .simulator
        .wait_for(|stats| stats.runs_started == 2)
        .await;
    cancel(&gateway, &stop).await.ok();

    link.valve.set(Weather {
        swallows_answers: true,
        ..Weather::default()
    });
    let (_second, stop) = begin("second [[sim: tokens=100 rate=50ms]]").await;
    scene
        .simulator
        .wait_for(|stats| stats.runs_started == 3)
        .await;
    link.valve.cut();
    link.valve.set(Weather::default());
    assert_eq!(
        cancel(&gateway, &stop).await.ok()["run"]["status"],
        "cancelled"
    );
    assert_eq!(
        scene.simulator.stats().active_runs,
        1,
        "the response continues"
    );
    let third = gateway.say(SCOPE, "third").await;
    assert!(text(&third["message"]).contains("third"), "{third:#}");
    works_again(&gateway, &scene).await;
    assert_same(&scene, &gateway, SCOPE).await;
}

//! `POST …/runs` answers the last messages of the user again. It adds no message here, sends none
//! twice to the upstream, and leaves both sides with the same conversation.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::gateway::{Answer, EventReader, Gateway, text, text_of};
use crate::support::history::{assert_same, messages, transcript, upstream};
use crate::support::scene::{Protocol, Scene, on_each_protocol, on_every_scene};

on_every_scene!(
    refused_message_is_run_again,
    failed_run_is_run_again,
    cancelled_run_is_run_again,
    completed_reply_is_made_anew,
    killed_rerun_is_not_run_twice,
);

on_each_protocol!(
    several_unanswered_messages_are_run_together,
    queued_rerun_answers_what_is_last_when_it_starts,
    discarded_rerun_leaves_the_message,
    repeated_request_gets_the_same_run,
    conversation_without_messages_has_nothing_to_run,
    unstored_message_is_run_again_only_if_the_upstream_has_it,
);

const SCOPE: &str = "/v1/users/alice";
const RUNS: &str = "/v1/users/alice/runs";

async fn rerun(gateway: &Gateway) -> Answer {
    gateway.post(RUNS, &json!({})).await
}

async fn post(gateway: &Gateway, content: &str) -> Answer {
    let path = format!("{SCOPE}/messages");
    gateway.post(&path, &json!({"content": content})).await
}

/// Returns the texts of the user's messages.
async fn asked(gateway: &Gateway) -> Vec<String> {
    let all = messages(gateway, SCOPE).await;
    let users = all.iter().filter(|message| message["role"] == "user");
    users.map(|message| text(message).to_owned()).collect()
}

/// Checks that both sides agree, now and after another message.
async fn assert_agreed(scene: &Scene, gateway: &Gateway) {
    assert_same(scene, gateway, SCOPE).await;
    gateway.say(SCOPE, "and now?").await;
    assert_same(scene, gateway, SCOPE).await;
}

async fn refused_message_is_run_again(scene: Scene) {
    let gateway = scene.gateway().await;
    gateway.say(SCOPE, "one").await;
    scene.fault("start", "status=429 code=insufficient_quota", 1);
    let refused = post(&gateway, "two").await;
    assert!(refused.status.as_u16() >= 400, "{:#}", refused.body);
    let all = messages(&gateway, SCOPE).await;
    assert_eq!(all.last().unwrap()["visible_to_model"], false);

    let answer = rerun(&gateway).await.ok();
    assert_eq!(answer["run"]["status"], "completed", "{answer:#}");
    assert!(text(&answer["message"]).contains("two"), "{answer:#}");
    assert_eq!(asked(&gateway).await, ["one", "two"]);
    let all = messages(&gateway, SCOPE).await;
    let two = &all[2];
    assert_eq!(
        (&two["run_id"], &two["status"], &two["visible_to_model"]),
        (&answer["run"]["id"], &json!("completed"), &json!(true))
    );
    assert_agreed(&scene, &gateway).await;
}

/// The upstream accepts the run and says something before it fails.
async fn failed_run_is_run_again(scene: Scene) {
    let gateway = scene.gateway().await;
    gateway.say(SCOPE, "one").await;
    scene.fault("start", "fail", 1);
    let failed = post(&gateway, "two").await;
    assert!(failed.status.as_u16() >= 400, "{:#}", failed.body);
    let answer = rerun(&gateway).await.ok();
    assert!(text(&answer["message"]).contains("two"), "{answer:#}");
    assert_eq!(asked(&gateway).await, ["one", "two"]);
    let sees = transcript(&gateway, SCOPE).await;
    assert_eq!(sees.len(), 4, "without the reply that broke off: {sees:#?}");
    assert_agreed(&scene, &gateway).await;
}

async fn cancelled_run_is_run_again(scene: Scene) {
    let gateway = scene.gateway().await;
    gateway.say(SCOPE, "one").await;
    let mut stream = gateway
        .stream(SCOPE, "two [[sim: tokens=400 rate=20ms]]")
        .await;
    let run = stream.next().await.unwrap().data["run_id"].clone();
    stream.until_text("two").await;
    let cancel = format!("{RUNS}/{}/cancel", run.as_str().unwrap());
    gateway.post(&cancel, &json!({})).await.ok();
    let body = json!({"stream": true, "timeout_ms": 60_000, "metadata": {"a": "b"}});
    let request = gateway.request(Method::POST, RUNS).json(&body);
    let mut stream = EventReader::new(request.send().await.unwrap());
    let queued = stream.next().await.unwrap();
    assert_eq!(
        (&*queued.name, &queued.data["position"]),
        ("run.queued", &json!(1))
    );
    assert_eq!(stream.next().await.unwrap().name, "run.started");
    let more = stream.until_text("two").await;
    assert!(text_of(&more).contains("two"));
    let again = queued.data["run_id"].as_str().unwrap();
    gateway
        .post(&format!("{RUNS}/{again}/cancel"), &json!({}))
        .await
        .ok();
    let runs = gateway.get(RUNS).await.ok();
    assert_eq!(runs["data"][0]["metadata"], json!({"a": "b"}));
    // The upstream lacks messages of the cancelled run. The next message takes them along.
    gateway.say(SCOPE, "and now?").await;
    assert_same(&scene, &gateway, SCOPE).await;
    assert_eq!(asked(&gateway).await.len(), 3);
}

async fn completed_reply_is_made_anew(scene: Scene) {
    let gateway = scene.gateway().await;
    gateway.say(SCOPE, "one").await;
    let first = gateway.say(SCOPE, "two").await;
    let answer = rerun(&gateway).await.ok();
    assert!(text(&answer["message"]).contains("two"), "{answer:#}");
    assert_eq!(answer["run"]["recovered"], Value::Null);
    assert_ne!(answer["message"]["id"], first["message"]["id"]);
    let all = messages(&gateway, SCOPE).await;
    let visible: Vec<_> = all
        .iter()
        .map(|message| message["visible_to_model"] == true)
        .collect();
    assert_eq!(visible, [true, true, true, false, true], "{all:#?}");
    // The earlier run still has its reply.
    let path = format!("{RUNS}/{}", first["run"]["id"].as_str().unwrap());
    let run = gateway.get(&path).await.ok();
    assert_eq!(run["message"]["id"], first["message"]["id"]);
    assert_agreed(&scene, &gateway).await;
    let thread = gateway.get(&format!("{SCOPE}/thread")).await.ok();
    assert_eq!(thread["message_count"], 7);
}

/// The process dies in the middle of the rerun. The next one ends it, and the model gets the message
/// once.
async fn killed_rerun_is_not_run_twice(scene: Scene) {
    let settings = "[replica]\nsession_ttl = \"1500ms\"\n";
    let upstream = "lock_window = \"500ms\"\n";
    let gateway = scene.gateway_both(settings, upstream).await;
    gateway.say(SCOPE, "one").await;
    scene.fault("start", "status=429 code=insufficient_quota", 1);
    post(&gateway, "two").await;
    let before = scene.simulator.stats().runs_started;
    scene.simulator.hold();
    let asking = gateway.post_in_background(RUNS, &json!({}));
    let begun = |stats: &threadkeeper::simulator::Stats| stats.runs_started == before + 1;
    scene.simulator.wait_for(begun).await;
    gateway.kill();
    drop(asking);
    let gateway = scene.gateway_both(settings, upstream).await;
    scene.simulator.release();
    let ended = gateway
        .until(RUNS, |answer| {
            let run = &answer.body["data"][0];
            run["status"] == "completed" || run["status"] == "failed"
        })
        .await
        .ok();
    if scene.protocol == Protocol::Assistants {
        // There a run continues without its client.
        assert_eq!(ended["data"][0]["status"], "completed", "{ended:#}");
        assert_eq!(scene.simulator.stats().runs_started, before + 1);
    }
    assert_eq!(asked(&gateway).await, ["one", "two"]);
    assert_agreed(&scene, &gateway).await;
    let there = upstream_texts(&scene, &gateway).await;
    let twos = there
        .iter()
        .filter(|(role, said)| role == "user" && said == "two");
    assert!(twos.count() <= 1, "{there:#?}");
}

async fn upstream_texts(scene: &Scene, gateway: &Gateway) -> Vec<(String, String)> {
    upstream(scene, gateway, SCOPE).await
}

async fn several_unanswered_messages_are_run_together(scene: Scene) {
    let gateway = scene.gateway().await;
    gateway.say(SCOPE, "zero").await;
    scene.fault("start", "status=429 code=insufficient_quota", 2);
    post(&gateway, "one").await;
    post(&gateway, "two").await;
    let answer = rerun(&gateway).await.ok();
    assert_eq!(asked(&gateway).await, ["zero", "one", "two"]);
    let all = messages(&gateway, SCOPE).await;
    for message in &all[2..4] {
        assert_eq!(message["run_id"], answer["run"]["id"]);
    }
    assert_agreed(&scene, &gateway).await;
}

async fn queued_rerun_answers_what_is_last_when_it_starts(scene: Scene) {
    let gateway = scene.gateway().await;
    gateway.say(SCOPE, "one").await;
    scene.simulator.hold();
    let mut stream = gateway.stream(SCOPE, "two").await;
    stream.next().await.unwrap();
    for (strategy, problem) in [
        ("reject", (409, "thread-busy")),
        ("merge", (422, "invalid-request")),
    ] {
        let body = json!({"multitask_strategy": strategy});
        assert_eq!(gateway.post(RUNS, &body).await.problem(), problem);
    }
    let request = gateway
        .request(Method::POST, "/v1/conversation/runs")
        .header("threadkeeper-user", "alice")
        .header("prefer", "respond-async");
    let accepted = gateway.send(request).await;
    assert_eq!(accepted.status, StatusCode::ACCEPTED, "{:#}", accepted.body);
    assert_eq!(accepted.body["run"]["status"], "queued");
    // A message does not join a run that answers others.
    let body = json!({"content": "three", "multitask_strategy": "merge"});
    let merged = gateway.post_in_background(&format!("{SCOPE}/messages"), &body);
    let queued = |answer: &Answer| answer.body["queue_depth"] == 2;
    gateway.until(&format!("{SCOPE}/thread"), queued).await;
    scene.simulator.release();
    stream.rest().await;
    merged.join_all().await;
    let idle = |answer: &Answer| answer.body["state"] == "idle";
    gateway.until(&format!("{SCOPE}/thread"), idle).await;
    let run = accepted.body["run"]["id"].as_str().unwrap();
    let ended = gateway.get(&format!("{RUNS}/{run}")).await.ok();
    assert!(text(&ended["message"]).contains("two"), "{ended:#}");
    assert_eq!(asked(&gateway).await, ["one", "two", "three"]);
    assert_agreed(&scene, &gateway).await;
}

/// A rollback removes what the run has said, and not the message, which an earlier run brought.
async fn discarded_rerun_leaves_the_message(scene: Scene) {
    let gateway = scene.gateway().await;
    gateway.say(SCOPE, "one").await;
    scene.fault("start", "status=429 code=insufficient_quota", 1);
    post(&gateway, "two [[sim: tokens=400 rate=20ms]]").await;
    let request = gateway
        .request(Method::POST, RUNS)
        .json(&json!({"stream": true}));
    let mut stream = EventReader::new(request.send().await.unwrap());
    stream.until_text("two").await;
    let body = json!({"content": "three", "multitask_strategy": "rollback"});
    let answer = gateway.post(&format!("{SCOPE}/messages"), &body).await.ok();
    assert!(text(&answer["message"]).contains("three"), "{answer:#}");
    stream.rest().await;
    assert_eq!(asked(&gateway).await.len(), 3);
    assert_agreed(&scene, &gateway).await;
}

async fn repeated_request_gets_the_same_run(scene: Scene) {
    let gateway = scene.gateway().await;
    gateway.say(SCOPE, "one").await;
    let send = |body: Option<Value>| {
        let request = gateway
            .request(Method::POST, RUNS)
            .header("idempotency-key", "again");
        body.map_or(request.try_clone().unwrap(), |body| request.json(&body))
    };
    let first = gateway.send(send(None)).await.ok();
    let repeated = gateway.send(send(Some(json!({})))).await;
    assert_eq!(repeated.headers["idempotent-replayed"], "true");
    assert_eq!(repeated.ok()["run"]["id"], first["run"]["id"]);
    let other = gateway.send(send(Some(json!({"timeout_ms": 1000})))).await;
    assert_eq!(other.problem(), (422, "idempotency-mismatch"));
    assert_agreed(&scene, &gateway).await;
}

async fn conversation_without_messages_has_nothing_to_run(scene: Scene) {
    let gateway = scene.gateway().await;
    assert_eq!(rerun(&gateway).await.problem(), (404, "not-found"));
    gateway.say(SCOPE, "one").await;
    gateway
        .post(&format!("{SCOPE}/thread/rollover"), &json!({}))
        .await
        .ok();
    let refused = rerun(&gateway).await;
    assert_eq!(refused.problem(), (409, "nothing-to-run"));
    let detail = refused.body["detail"].as_str().unwrap();
    assert!(detail.contains("post a message"), "{detail}");
    let runs = gateway.get(RUNS).await.ok();
    assert_eq!(runs["data"], json!([]), "nothing was stored");
}

/// Without a transcript the gateway has nothing to send again. Assistants keep the message of a
/// failed run in the thread, and a further run needs none.
async fn unstored_message_is_run_again_only_if_the_upstream_has_it(scene: Scene) {
    let config = scene.config("[runs]\nmax_retries = 0\n");
    let config = config.replace("[store]\n", "[store]\ntranscript = \"off\"\n");
    let gateway = Gateway::start(&config).await;
    gateway.say(SCOPE, "one").await;
    scene.fault("start", "fail=server_error", 1);
    post(&gateway, "two").await;
    let answer = rerun(&gateway).await;
    if scene.protocol == Protocol::Assistants {
        assert!(text(&answer.ok()["message"]).contains("two"));
    } else {
        assert_eq!(answer.problem(), (409, "nothing-to-run"));
    }
    let there = upstream(&scene, &gateway, SCOPE).await;
    assert!(there.iter().all(|(_, said)| !said.is_empty()), "{there:#?}");
    let next = gateway.say(SCOPE, "three").await;
    assert!(text(&next["message"]).contains("three"));
    let all = messages(&gateway, SCOPE).await;
    let users = all.iter().filter(|message| message["role"] == "user");
    assert_eq!(users.count(), 3);
}

//! `Idempotency-Key`: a request that is sent twice takes effect once.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::future::join_all;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::gateway::{Answer, Event, EventReader, Gateway, text, text_of};
use crate::support::history::assert_same;
use crate::support::scene::{Backend, Scene, on_each_protocol, on_each_store};

on_each_protocol!(
    idempotent_retry_returns_same_run,
    idempotent_retry_joins_active_run,
    concurrent_retries_start_one_run,
    concurrent_retries_with_reject_strategy_share_one_run,
    idempotent_retry_of_merged_message_adds_nothing,
    retried_tool_outputs_are_accepted_once,
    idempotent_retry_of_failed_run_returns_failure,
    idempotent_retry_reports_current_run_state,
    idempotent_retry_waits_past_answered_tool_calls,
);
on_each_store!(
    idempotency_key_reused_for_different_request_is_refused,
    idempotency_key_is_scoped_to_conversation,
    refused_request_does_not_use_idempotency_key,
    idempotency_key_expires_after_ttl,
    malformed_idempotency_key_is_refused,
);

const SCOPE: &str = "/v1/users/alice";

async fn send(gateway: &Gateway, path: &str, key: &str, body: &Value) -> Answer {
    let request = gateway
        .request(Method::POST, path)
        .header("idempotency-key", key);
    gateway.send(request.json(body)).await
}

async fn say(gateway: &Gateway, key: &str, content: &str) -> Answer {
    send(
        gateway,
        &format!("{SCOPE}/messages"),
        key,
        &json!({"content": content}),
    )
    .await
}

fn is_replay(answer: &Answer) -> bool {
    answer
        .headers
        .get("idempotent-replayed")
        .is_some_and(|value| value == "true")
}

async fn idempotent_retry_returns_same_run(scene: Scene) {
    let gateway = scene.gateway().await;
    let first = say(&gateway, "k1", "hello").await;
    assert!(!is_replay(&first));
    let first = first.ok();
    // White space and the order of fields do not make another request.
    let again = gateway
        .request(Method::POST, &format!("{SCOPE}/messages"))
        .header("idempotency-key", "k1");
    let again = again
        .header("content-type", "application/json")
        .body("{ \"content\" :\"hello\"}");
    let again = gateway.send(again).await;
    assert!(is_replay(&again));
    let again = again.ok();
    assert_eq!(
        (&again["run"], &again["message"]),
        (&first["run"], &first["message"])
    );
    // A repeat may ask for any form, and may reach another process.
    let run = first["run"]["id"].as_str().unwrap();
    gateway.kill();
    let gateway = scene.gateway().await;
    let request = gateway
        .request(Method::POST, &format!("{SCOPE}/messages"))
        .header("idempotency-key", "k1");
    let request = request
        .header("accept", "text/event-stream")
        .json(&json!({"content": "hello"}));
    let response = request.send().await.unwrap();
    assert_eq!(response.headers()["idempotent-replayed"], "true");
    let events = EventReader::new(response).rest().await;
    assert_eq!(
        (
            events[0].name.as_str(),
            events.last().unwrap().name.as_str()
        ),
        ("run.started", "run.completed")
    );
    assert_eq!(events.last().unwrap().data["run"], first["run"]);
    let request = gateway
        .request(Method::POST, &format!("{SCOPE}/messages"))
        .header("idempotency-key", "k1");
    let request = request
        .header("prefer", "respond-async")
        .json(&json!({"content": "hello"}));
    let taken = gateway.send(request).await;
    assert!(
        taken.status == StatusCode::ACCEPTED || taken.status == StatusCode::OK,
        "{taken:?}"
    );
    assert_eq!(taken.body["run"]["id"], run);
    assert_eq!(scene.simulator.stats().runs_started, 1);
    assert_eq!(
        gateway.get(&format!("{SCOPE}/thread")).await.ok()["run_count"],
        1
    );
}

async fn idempotent_retry_joins_active_run(scene: Scene) {
    let gateway = scene.gateway().await;
    scene.simulator.hold();
    let (first, second, ()) = tokio::join!(
        say(&gateway, "k1", "hello"),
        say(&gateway, "k1", "hello"),
        async {
            scene
                .simulator
                .wait_for(|stats| stats.runs_started == 1)
                .await;
            scene.simulator.release();
        }
    );
    assert!(
        is_replay(&first) != is_replay(&second),
        "exactly one of them was first"
    );
    assert_eq!(first.ok(), second.ok());
    assert_eq!(scene.simulator.stats().runs_started, 1);
}

async fn idempotency_key_reused_for_different_request_is_refused(scene: Scene) {
    let gateway = scene.gateway().await;
    say(&gateway, "k1", "hello").await.ok();
    assert_eq!(
        say(&gateway, "k1", "something else").await.problem(),
        (422, "idempotency-mismatch")
    );
    let body = json!({"content": "hello", "metadata": {"a": "b"}});
    let refused = send(&gateway, &format!("{SCOPE}/messages"), "k1", &body).await;
    assert_eq!(refused.problem(), (422, "idempotency-mismatch"));
    assert_eq!(scene.simulator.stats().runs_started, 1);
}

async fn idempotency_key_is_scoped_to_conversation(scene: Scene) {
    let gateway = scene.gateway().await;
    let mut runs = BTreeSet::new();
    for scope in [
        SCOPE,
        "/v1/users/bob",
        "/v1/users/alice/sessions/s",
        "/v1/users/alice/topics/s",
    ] {
        let body = json!({"content": "hello"});
        let answer = send(&gateway, &format!("{scope}/messages"), "k1", &body).await;
        assert!(!is_replay(&answer));
        runs.insert(answer.ok()["run"]["id"].to_string());
    }
    assert_eq!(runs.len(), 4);
    // A key belongs to the conversation, not to one of its threads. The session's thread has
    // expired, and a repeat still gets the first answer.
    scene.database.age_threads(Duration::from_hours(25)).await;
    let path = "/v1/users/alice/sessions/s/messages";
    let again = send(&gateway, path, "k1", &json!({"content": "hello"})).await;
    assert!(is_replay(&again), "{again:?}");
    assert!(runs.contains(&again.ok()["run"]["id"].to_string()));
}

async fn concurrent_retries_start_one_run(scene: Scene) {
    let mut gateways = vec![scene.gateway().await];
    if scene.backend == Backend::Postgres {
        gateways.push(scene.gateway().await);
    }
    let all = (0..16).map(|n| say(&gateways[n % gateways.len()], "k1", "hello"));
    let answers: Vec<Value> = join_all(all).await.into_iter().map(Answer::ok).collect();
    for answer in &answers {
        assert_eq!(
            (&answer["run"], &answer["message"]),
            (&answers[0]["run"], &answers[0]["message"])
        );
    }
    assert_eq!(scene.simulator.stats().runs_started, 1);
    let runs = gateways[0].get(&format!("{SCOPE}/runs")).await.ok();
    assert_eq!(runs["data"].as_array().map(Vec::len), Some(1));
}

async fn idempotent_retry_of_merged_message_adds_nothing(scene: Scene) {
    let gateway = scene.gateway().await;
    scene.simulator.hold();
    let mut active = gateway.stream(SCOPE, "first").await;
    active.next().await.unwrap();
    let mut waiting = gateway.stream(SCOPE, "second").await;
    let run = waiting.next().await.unwrap().data["run_id"].clone();
    let body = json!({"content": "third", "multitask_strategy": "merge"});
    for round in 0..3 {
        let request = gateway
            .request(Method::POST, &format!("{SCOPE}/messages"))
            .header("idempotency-key", "k1");
        let taken = gateway
            .send(request.header("prefer", "respond-async").json(&body))
            .await;
        assert_eq!(
            (taken.status, is_replay(&taken)),
            (StatusCode::ACCEPTED, round > 0)
        );
        assert_eq!(taken.body["run"]["id"], run);
    }
    scene.simulator.release();
    active.rest().await;
    waiting.rest().await;
    let messages = gateway
        .get(&format!("{SCOPE}/messages?order=asc"))
        .await
        .ok();
    let thirds = messages["data"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|it| text(it) == "third")
        .count();
    assert_eq!(thirds, 1);
}

async fn retried_tool_outputs_are_accepted_once(scene: Scene) {
    let gateway = scene.gateway().await;
    let asked = gateway
        .say(SCOPE, "weather? [[sim: tool=get_weather]]")
        .await;
    let path = format!(
        "{SCOPE}/runs/{}/tool_outputs",
        asked["run"]["id"].as_str().unwrap()
    );
    let call = &asked["run"]["required_action"]["tool_calls"][0]["id"];
    let body = json!({"tool_outputs": [{"tool_call_id": call, "output": "4 °C"}]});
    let answers = join_all((0..6).map(|_| send(&gateway, &path, "k1", &body))).await;
    assert_eq!(
        answers.iter().filter(|answer| !is_replay(answer)).count(),
        1
    );
    let answers: Vec<_> = answers.into_iter().map(Answer::ok).collect();
    for answer in &answers {
        assert_eq!(answer["run"]["status"], "completed");
        assert_eq!(answer["message"], answers[0]["message"]);
    }
    let later = send(&gateway, &path, "k1", &body).await;
    assert!(is_replay(&later));
    assert_eq!(later.ok()["message"], answers[0]["message"]);
    let other = json!({"tool_outputs": [{"tool_call_id": call, "output": "5 °C"}]});
    assert_eq!(
        send(&gateway, &path, "k1", &other).await.problem(),
        (422, "idempotency-mismatch")
    );
    assert_same(&scene, &gateway, SCOPE).await;
}

async fn idempotent_retry_of_failed_run_returns_failure(scene: Scene) {
    let gateway = scene.gateway().await;
    let first = say(&gateway, "k1", "oh [[sim: fail]]").await;
    assert_eq!(first.problem(), (502, "upstream-error"));
    let again = say(&gateway, "k1", "oh [[sim: fail]]").await;
    assert!(is_replay(&again) && !is_replay(&first));
    assert_eq!(again.problem(), (502, "upstream-error"));
    assert_eq!(again.body["run_id"], first.body["run_id"]);
    assert_eq!(scene.simulator.stats().runs_started, 1);
}

/// Repeats the message as a stream.
async fn stream(gateway: &Gateway, key: &str, content: &str) -> EventReader {
    let request = gateway
        .request(Method::POST, &format!("{SCOPE}/messages"))
        .header("idempotency-key", key);
    let request = request
        .header("accept", "text/event-stream")
        .json(&json!({"content": content}));
    let response = request.send().await.unwrap();
    assert_eq!(response.headers()["idempotent-replayed"], "true");
    EventReader::new(response)
}

/// Sends the outputs that a run asked for. Does not wait for the end of the run.
async fn give(gateway: &Gateway, asked: &Value, output: &str) {
    let path = format!(
        "{SCOPE}/runs/{}/tool_outputs",
        asked["run"]["id"].as_str().unwrap()
    );
    let call = &asked["run"]["required_action"]["tool_calls"][0]["id"];
    let body = json!({"tool_outputs": [{"tool_call_id": call, "output": output}]});
    let request = gateway
        .request(Method::POST, &path)
        .header("prefer", "respond-async");
    // If the run has ended by then, the answer is its result.
    let status = gateway.send(request.json(&body)).await.status;
    assert!(
        matches!(
            status,
            StatusCode::ACCEPTED | StatusCode::OK | StatusCode::BAD_GATEWAY
        ),
        "{status}"
    );
}

/// Returns all events of the run.
async fn all_events(gateway: &Gateway, asked: &Value) -> Vec<Event> {
    gateway
        .events(SCOPE, asked["run"]["id"].as_str().unwrap(), None)
        .await
        .rest()
        .await
}

async fn idempotent_retry_reports_current_run_state(scene: Scene) {
    let gateway = scene.gateway().await;
    let content = "weather? [[sim: tool=get_place]]";
    let asked = say(&gateway, "k1", content).await.ok();
    assert_eq!(
        say(&gateway, "k1", content).await.ok(),
        asked,
        "the run waits as before"
    );
    let events = stream(&gateway, "k1", content).await.rest().await;
    assert_eq!(events.last().unwrap().name, "run.requires_action");

    // The run asks again: the earlier calls are answered, the new ones are not.
    give(&gateway, &asked, "Paris [[sim: tool=get_weather]]").await;
    let again = say(&gateway, "k1", content).await.ok();
    assert_eq!(again["run"]["status"], "requires_action", "{again:#}");
    assert_ne!(
        again["run"]["required_action"],
        asked["run"]["required_action"]
    );
    let events = stream(&gateway, "k1", content).await.rest().await;
    let names = events.iter().map(|event| event.name.as_str());
    assert_eq!(
        names.filter(|name| *name == "run.requires_action").count(),
        2,
        "{events:#?}"
    );
    let wanted = &again["run"]["required_action"]["tool_calls"];
    assert_eq!(
        events.last().unwrap().data["tool_calls"],
        *wanted,
        "{events:#?}"
    );

    give(&gateway, &again, "4 °C").await;
    let mut gateway = gateway;
    for round in 0..2 {
        let ended = say(&gateway, "k1", content).await;
        assert!(is_replay(&ended));
        let ended = ended.ok();
        assert_eq!(
            ended["run"]["status"], "completed",
            "round {round}: {ended:#}"
        );
        assert!(text(&ended["message"]).contains("4 °C"), "{ended:#}");
        let events = stream(&gateway, "k1", content).await.rest().await;
        assert_eq!(events, all_events(&gateway, &asked).await, "round {round}");
        assert!(text_of(&events).contains("4 °C"));
        if round == 0 {
            gateway.kill();
            gateway = scene.gateway().await;
        }
    }
    // A repeat of a failed run gets the same failure.
    let content = "and there? [[sim: tool=get_weather]]";
    let asked = say(&gateway, "k2", content).await.ok();
    give(&gateway, &asked, "30 °C [[sim: fail]]").await;
    let failed = say(&gateway, "k2", content).await;
    assert_eq!(
        (failed.problem(), is_replay(&failed)),
        ((502, "upstream-error"), true)
    );
    assert_eq!(
        stream(&gateway, "k2", content)
            .await
            .rest()
            .await
            .last()
            .unwrap()
            .name,
        "run.failed"
    );
}

/// A repeat does not stop at calls that are answered already, while the run continues.
async fn idempotent_retry_waits_past_answered_tool_calls(scene: Scene) {
    let gateway = scene.gateway().await;
    let content = "weather? [[sim: tool=get_weather]]";
    let asked = say(&gateway, "k1", content).await.ok();
    scene.simulator.hold();
    give(&gateway, &asked, "4 °C").await;
    let mut reader = stream(&gateway, "k1", content).await;
    let mut events = Vec::new();
    for _ in 0..2 {
        events.push(reader.next().await.unwrap());
    }
    assert_eq!(
        events[1].name, "run.requires_action",
        "the stream repeats the earlier pause"
    );
    let request = gateway
        .request(Method::POST, &format!("{SCOPE}/messages"))
        .header("idempotency-key", "k1");
    let request = request
        .header("prefer", "wait=0")
        .json(&json!({"content": content}));
    let taken = gateway.send(request).await;
    assert_eq!(
        (taken.status, &taken.body["run"]["status"]),
        (StatusCode::ACCEPTED, &json!("in_progress"))
    );
    let release = async {
        scene.simulator.release();
        reader.rest().await
    };
    let (ended, rest) = tokio::join!(say(&gateway, "k1", content), release);
    let ended = ended.ok();
    assert!(text(&ended["message"]).contains("4 °C"), "{ended:#}");
    events.extend(rest);
    assert_eq!(events, all_events(&gateway, &asked).await);
}

async fn refused_request_does_not_use_idempotency_key(scene: Scene) {
    let gateway = scene.gateway().await;
    scene.simulator.hold();
    let mut active = gateway.stream(SCOPE, "first").await;
    active.next().await.unwrap();
    let body = json!({"content": "second", "multitask_strategy": "reject"});
    let path = format!("{SCOPE}/messages");
    assert_eq!(
        send(&gateway, &path, "k1", &body).await.problem(),
        (409, "thread-busy")
    );
    scene.simulator.release();
    active.rest().await;
    let answer = send(&gateway, &path, "k1", &body).await;
    assert!(!is_replay(&answer));
    answer.ok();
}

async fn idempotency_key_expires_after_ttl(scene: Scene) {
    let gateway = scene
        .gateway_with("[runs]\nidempotency_ttl = \"1h\"\n")
        .await;
    let first = say(&gateway, "k1", "hello").await.ok();
    scene
        .database
        .age_idempotency_keys(Duration::from_secs(3595))
        .await;
    assert!(is_replay(&say(&gateway, "k1", "hello").await));
    scene
        .database
        .age_idempotency_keys(Duration::from_secs(10))
        .await;
    let second = say(&gateway, "k1", "something else").await;
    assert!(!is_replay(&second));
    assert_ne!(second.ok()["run"]["id"], first["run"]["id"]);
}

async fn malformed_idempotency_key_is_refused(scene: Scene) {
    let gateway = scene.gateway().await;
    for key in ["", "with blank", &"x".repeat(256)] {
        assert_eq!(
            say(&gateway, key, "hello").await.problem(),
            (400, "invalid-request"),
            "{key:?}"
        );
    }
    let twice = gateway.request(Method::POST, &format!("{SCOPE}/messages"));
    let twice = twice
        .header("idempotency-key", "a")
        .header("idempotency-key", "b");
    let twice = gateway.send(twice.json(&json!({"content": "hello"}))).await;
    assert_eq!(twice.problem(), (400, "invalid-request"));
    assert_eq!(scene.simulator.stats().requests, 0);
}

async fn concurrent_retries_with_reject_strategy_share_one_run(scene: Scene) {
    let gateway = scene.gateway().await;
    scene.simulator.hold();
    let body = json!({"content": "hello", "multitask_strategy": "reject"});
    let (gateway, body) = (&gateway, &body);
    let send_async = async |user: usize, key: &str| {
        let path = format!("/v1/users/user-{user}/messages");
        let request = gateway
            .request(Method::POST, &path)
            .header("idempotency-key", key);
        gateway
            .send(request.header("prefer", "respond-async").json(body))
            .await
    };
    for user in 0..20 {
        let answers = join_all((0..6).map(|_| send_async(user, "k1"))).await;
        let runs: BTreeSet<String> = answers
            .iter()
            .map(|answer| answer.body["run"]["id"].to_string())
            .collect();
        assert_eq!(runs.len(), 1, "{answers:#?}");
        assert!(
            answers
                .iter()
                .all(|answer| answer.status == StatusCode::ACCEPTED),
            "{answers:#?}"
        );
        assert_eq!(
            answers.iter().filter(|answer| !is_replay(answer)).count(),
            1
        );
        // The thread is busy for all other requests.
        let others = join_all((0..3).map(|_| send_async(user, "k2"))).await;
        for other in others {
            assert_eq!(other.problem(), (409, "thread-busy"));
        }
    }
    scene.simulator.release();
}

//! `store.transcript = "off"`: all texts reach their readers, and none is stored.

use std::time::Instant;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use threadkeeper::simulator::{Fault, Stats};

use crate::support::gateway::{Answer, Event, EventReader, Gateway, PATIENCE, text, text_of};
use crate::support::history::{all, assert_same, messages, upstream};
use crate::support::scene::{Backend, Protocol, Scene, on_each_protocol};

on_each_protocol!(
    plain_messages_are_answered_and_not_stored,
    queued_messages_are_not_stored,
    function_calls_are_not_stored,
    interrupted_replies_are_delivered_but_not_stored,
    idempotent_retry_replays_only_live_content,
    queued_messages_lost_in_crash_are_not_sent_empty,
    wait_for_tool_outputs_survives_crash,
    tool_outputs_lost_in_crash_are_not_sent_empty,
    tool_outputs_accepted_only_by_owning_replica,
    merge_never_joins_run_of_another_replica,
    lost_upstream_thread_restarts_empty,
    rollover_carries_nothing_over,
    unstored_messages_are_skipped_when_thread_is_rebuilt,
);

const SCOPE: &str = "/v1/users/alice";

/// A word in all texts of users and tools. Replies and arguments repeat it.
const NEEDLE: &str = "needle";
/// The simulated model's own words.
const REPLIES: [&str; 3] = ["You said", "tools answered", "of this conversation"];

async fn gateway(scene: &Scene) -> Gateway {
    gateway_with(scene, "").await
}

async fn gateway_with(scene: &Scene, more: &str) -> Gateway {
    let settings =
        "[log]\nfilter = \"threadkeeper=trace,info\"\n[replica]\nsession_ttl = \"900ms\"\n";
    let config = scene.config(&format!("{settings}{more}"));
    Gateway::start(&config.replace("[store]\n", "[store]\ntranscript = \"off\"\n")).await
}

/// Checks that no text so far is stored or logged.
async fn assert_silent(scene: &Scene, gateway: &Gateway) {
    let found = |bytes: &[u8]| {
        let said = REPLIES.iter().chain(&[NEEDLE]);
        said.copied()
            .find(|said| bytes.windows(said.len()).any(|at| at == said.as_bytes()))
    };
    let stored = scene.database.everything().await;
    assert!(
        stored
            .iter()
            .any(|(_, value)| value.windows(5).any(|at| at == b"alice")),
        "the search finds what the database has"
    );
    for (place, value) in stored {
        if let Some(said) = found(&value) {
            panic!(
                "{place} holds `{said}`: {}",
                String::from_utf8_lossy(&value[..value.len().min(400)])
            );
        }
    }
    for line in gateway.logs() {
        assert_eq!(found(line.as_bytes()), None, "{line}");
    }
}

/// Checks that the upstream thread has no empty message.
async fn assert_nothing_empty_was_sent(scene: &Scene, gateway: &Gateway) {
    for (role, text) in upstream(scene, gateway, SCOPE).await {
        assert!(
            !text.is_empty(),
            "the upstream thread has an empty message of the {role}"
        );
    }
    for request in scene.simulator.recorded() {
        let body = request.body.to_string();
        for empty in [
            r#""output":"""#,
            r#""content":[]"#,
            r#""content":"""#,
            r#""text":"""#,
        ] {
            assert!(
                !body.contains(empty),
                "{} {}: {body}",
                request.method,
                request.path
            );
        }
    }
}

/// Posts a message and reads the first event of its stream.
async fn begin(gateway: &Gateway, strategy: &str, content: &str) -> (EventReader, String) {
    let body = json!({"content": content, "multitask_strategy": strategy, "stream": true});
    let request = gateway
        .request(Method::POST, &format!("{SCOPE}/messages"))
        .json(&body);
    let mut stream = EventReader::new(request.send().await.unwrap());
    let run = stream.next().await.unwrap().data["run_id"]
        .as_str()
        .unwrap()
        .to_owned();
    (stream, run)
}

async fn deltas(stream: &mut EventReader, count: usize) -> String {
    let mut events = Vec::new();
    for _ in 0..count {
        events.push(stream.next().await.unwrap());
    }
    text_of(&events)
}

async fn ask(gateway: &Gateway, content: &str) -> Value {
    let answer = gateway.say(SCOPE, content).await;
    assert_eq!(answer["run"]["status"], "requires_action", "{answer:#}");
    answer
}

fn path(run: &Value) -> String {
    format!("{SCOPE}/runs/{}", run["id"].as_str().unwrap())
}

fn outputs(run: &Value, output: &str) -> Value {
    let calls = run["required_action"]["tool_calls"].as_array().unwrap();
    let outputs: Value = calls
        .iter()
        .map(|call| json!({"tool_call_id": call["id"], "output": output}))
        .collect();
    json!({"tool_outputs": outputs})
}

async fn give(gateway: &Gateway, run: &Value, output: &str) -> Answer {
    gateway
        .post(
            &format!("{}/tool_outputs", path(run)),
            &outputs(run, output),
        )
        .await
}

fn arguments(run: &Value) -> &str {
    run["required_action"]["tool_calls"][0]["arguments"]
        .as_str()
        .unwrap()
}

async fn events(gateway: &Gateway, run: &str) -> Vec<Event> {
    let request = gateway.request(Method::GET, &format!("{SCOPE}/runs/{run}/events"));
    EventReader::new(request.send().await.unwrap()).rest().await
}

/// Returns role, run status and visibility to the model of each entry, and checks that none has
/// content.
async fn entries(gateway: &Gateway) -> Vec<(String, Value, bool)> {
    let entry = |message: &Value| {
        assert_eq!(message["content"], json!([]), "{message:#}");
        let role = message["role"].as_str().unwrap().to_owned();
        (
            role,
            message["incomplete_reason"].clone(),
            message["visible_to_model"].as_bool().unwrap(),
        )
    };
    messages(gateway, SCOPE).await.iter().map(entry).collect()
}

async fn users_upstream(scene: &Scene, gateway: &Gateway) -> Vec<String> {
    let lines = upstream(scene, gateway, SCOPE).await.into_iter();
    lines
        .filter(|(role, _)| role == "user")
        .map(|(_, text)| text)
        .collect()
}

async fn plain_messages_are_answered_and_not_stored(scene: Scene) {
    let gateway = gateway(&scene).await;
    let first = gateway.say(SCOPE, "needle one").await;
    assert!(
        text(&first["message"]).contains("needle one")
            && text(&first["message"]).contains("turn 1 of")
    );
    assert_silent(&scene, &gateway).await;

    let (stream, run) = begin(&gateway, "enqueue", "needle two").await;
    let live = stream.rest().await;
    assert!(
        text_of(&live).contains("needle two") && text_of(&live).contains("turn 2 of"),
        "{live:#?}"
    );
    let names: Vec<_> = live[live.len() - 2..]
        .iter()
        .map(|event| event.name.as_str())
        .collect();
    assert_eq!(names, ["message.completed", "run.completed"]);
    assert_eq!(text(&live[live.len() - 2].data["message"]), text_of(&live));

    let parts = json!([{"type": "text", "text": "needle three"},
        {"type": "image_url", "image_url": {"url": "https://example.com/needle.png"}}]);
    gateway
        .post(&format!("{SCOPE}/messages"), &json!({"content": parts}))
        .await
        .ok();
    for failing in [
        "needle four [[sim: fail]]",
        "needle five [[sim: status=401]]",
    ] {
        let failed = gateway
            .post(&format!("{SCOPE}/messages"), &json!({"content": failing}))
            .await;
        assert_eq!(failed.problem(), (502, "upstream-error"));
    }
    gateway.say(SCOPE, "needle six").await;
    assert_silent(&scene, &gateway).await;

    // A later reader sees the statuses, but no text.
    let entries = entries(&gateway).await;
    let ended: Vec<_> = entries
        .iter()
        .filter(|(role, ..)| role == "user")
        .map(|(_, why, _)| why)
        .collect();
    let (done, failed) = (&Value::Null, &json!("failed"));
    assert_eq!(ended, [done, done, done, failed, failed, done]);
    let replies = entries
        .iter()
        .filter(|(role, why, _)| role == "assistant" && why.is_null())
        .count();
    assert_eq!(replies, 4);
    let later = events(&gateway, &run).await;
    let names: Vec<_> = later.iter().map(|event| event.name.as_str()).collect();
    assert_eq!(
        names,
        ["run.started", "message.completed", "run.completed"],
        "no piece of text is empty"
    );
    assert_eq!(later[1].data["message"]["content"], json!([]));
    let (of_live, of_later) = (&live[live.len() - 1], &later[2]);
    assert_eq!(
        (&of_live.id, &of_live.data),
        (&of_later.id, &of_later.data),
        "event numbers stay the same"
    );
    assert!(first["run"]["usage"]["total_tokens"].as_u64().unwrap() > 0);
    assert_nothing_empty_was_sent(&scene, &gateway).await;
}

async fn queued_messages_are_not_stored(scene: Scene) {
    let gateway = gateway(&scene).await;
    gateway.say(SCOPE, "needle zero").await;
    scene.simulator.hold();
    let (active, _) = begin(&gateway, "enqueue", "needle one").await;
    let (waiting, run) = begin(&gateway, "enqueue", "needle two").await;
    let (joined, same) = begin(&gateway, "merge", "needle three").await;
    assert_eq!(same, run, "both callers get the run");
    let (other, next) = begin(&gateway, "enqueue", "needle four").await;
    assert_ne!(next, run);
    assert_silent(&scene, &gateway).await;
    scene.simulator.release();
    let (active, waiting) = (active.rest().await, waiting.rest().await);
    let (joined, other) = (joined.rest().await, other.rest().await);
    assert!(text_of(&active).contains("needle one"));
    assert!(
        text_of(&waiting).contains("needle three"),
        "the reply is to the newest message: {waiting:#?}"
    );
    assert_eq!(text_of(&joined), text_of(&waiting));
    assert!(text_of(&other).contains("needle four"));
    assert_silent(&scene, &gateway).await;
    let said = users_upstream(&scene, &gateway).await;
    assert_eq!(
        said,
        [
            "needle zero",
            "needle one",
            "needle two",
            "needle three",
            "needle four"
        ]
    );
    assert_eq!(entries(&gateway).await.len(), 9);
    assert_nothing_empty_was_sent(&scene, &gateway).await;
}

async fn function_calls_are_not_stored(scene: Scene) {
    let gateway = gateway(&scene).await;
    let asked = ask(
        &gateway,
        "needle weather? [[sim: tool=get_weather tool=get_time]]",
    )
    .await;
    assert!(
        arguments(&asked["run"]).contains("needle weather?"),
        "{asked:#}"
    );
    let read = gateway.get(&path(&asked["run"])).await.ok();
    assert_eq!(
        read["run"], asked["run"],
        "the owning process shows the calls"
    );
    assert_eq!(
        all(&gateway, &format!("{SCOPE}/runs")).await[0],
        asked["run"]
    );
    assert_silent(&scene, &gateway).await;

    let again = give(
        &gateway,
        &asked["run"],
        "needle cold [[sim: tool=get_place]]",
    )
    .await
    .ok();
    assert_eq!(again["run"]["status"], "requires_action", "{again:#}");
    assert_eq!(
        again["run"]["required_action"]["tool_calls"][0]["name"],
        "get_place"
    );
    assert!(!arguments(&again["run"]).is_empty());
    assert_silent(&scene, &gateway).await;
    let late = give(&gateway, &asked["run"], "needle late").await;
    assert_eq!(
        late.problem(),
        (422, "invalid-request"),
        "the run does not wait for these calls"
    );

    let answer = give(&gateway, &again["run"], "needle here").await.ok();
    assert_eq!(answer["run"]["status"], "completed");
    assert!(
        text(&answer["message"]).contains("needle here"),
        "{answer:#}"
    );
    assert_silent(&scene, &gateway).await;

    // The same as a stream.
    let (stream, run) = begin(
        &gateway,
        "enqueue",
        "needle and there? [[sim: tool=get_weather]]",
    )
    .await;
    let asked = stream.rest().await.pop().unwrap();
    assert_eq!(asked.name, "run.requires_action");
    assert!(
        asked.data["tool_calls"][0]["arguments"]
            .as_str()
            .unwrap()
            .contains("needle and there?")
    );
    assert_silent(&scene, &gateway).await;
    let output = json!({"tool_call_id": asked.data["tool_calls"][0]["id"], "output": "needle hot"});
    let body = json!({"tool_outputs": [output], "stream": true});
    let request = gateway
        .request(Method::POST, &format!("{SCOPE}/runs/{run}/tool_outputs"))
        .json(&body);
    let events = EventReader::new(request.send().await.unwrap()).rest().await;
    assert!(text_of(&events).contains("needle hot"), "{events:#?}");
    assert!(
        events
            .iter()
            .all(|event| event.name != "run.requires_action"),
        "the stream has only the later events"
    );

    // This wait for outputs is cancelled.
    let asked = ask(&gateway, "needle never mind [[sim: tool=get_weather]]").await;
    let cancel = gateway.request(Method::POST, &format!("{}/cancel", path(&asked["run"])));
    assert_eq!(
        gateway.send(cancel).await.ok()["run"]["status"],
        "cancelled"
    );
    gateway.say(SCOPE, "needle thanks").await;
    assert_silent(&scene, &gateway).await;
    assert_nothing_empty_was_sent(&scene, &gateway).await;
}

async fn interrupted_replies_are_delivered_but_not_stored(scene: Scene) {
    let gateway = gateway(&scene).await;
    gateway.say(SCOPE, "needle zero").await;
    let (mut cancelled, run) =
        begin(&gateway, "enqueue", "needle one [[sim: silent_after=4]]").await;
    let partial = deltas(&mut cancelled, 4).await;
    assert!(partial.contains("You said: needle"), "{partial}");
    assert_silent(&scene, &gateway).await;
    gateway
        .send(gateway.request(Method::POST, &format!("{SCOPE}/runs/{run}/cancel")))
        .await
        .ok();
    let rest = cancelled.rest().await;
    assert_eq!(rest.last().unwrap().name, "run.cancelled");
    assert_eq!(
        text(&rest[rest.len() - 2].data["message"]),
        partial,
        "{rest:#?}"
    );
    assert_silent(&scene, &gateway).await;

    for strategy in ["interrupt", "rollback"] {
        let (mut active, _) =
            begin(&gateway, "enqueue", "needle two [[sim: silent_after=4]]").await;
        let partial = deltas(&mut active, 4).await;
        let (waiting, _) = begin(&gateway, "enqueue", "needle three").await;
        let urgent = json!({"content": "needle four", "multitask_strategy": strategy});
        let urgent = gateway
            .post(&format!("{SCOPE}/messages"), &urgent)
            .await
            .ok();
        assert!(text(&urgent["message"]).contains("needle four"));
        let active = active.rest().await;
        assert_eq!(active.last().unwrap().name, "run.cancelled");
        if strategy == "interrupt" {
            assert_eq!(
                text(&active[active.len() - 2].data["message"]),
                partial,
                "{active:#?}"
            );
        }
        assert!(text_of(&waiting.rest().await).contains("needle three"));
        assert_silent(&scene, &gateway).await;
    }
    // This run ends while it is queued.
    scene.simulator.hold();
    let (active, _) = begin(&gateway, "enqueue", "needle five").await;
    let (waiting, run) = begin(&gateway, "enqueue", "needle never").await;
    gateway
        .send(gateway.request(Method::POST, &format!("{SCOPE}/runs/{run}/cancel")))
        .await
        .ok();
    assert_eq!(waiting.rest().await.last().unwrap().name, "run.cancelled");
    scene.simulator.release();
    active.rest().await;
    gateway.say(SCOPE, "needle six").await;
    assert_silent(&scene, &gateway).await;

    // The upstream never gets the messages that it lacks, and the transcript says so.
    let (said, entries) = (
        users_upstream(&scene, &gateway).await,
        entries(&gateway).await,
    );
    assert!(!said.contains(&"needle never".to_owned()));
    let known = entries
        .iter()
        .filter(|(role, _, visible_to_model)| role == "user" && *visible_to_model)
        .count();
    assert_eq!(known, said.len(), "{entries:#?} {said:#?}");
    assert_eq!(
        scene
            .database
            .number("SELECT CAST(sum(unsynced_messages) AS BIGINT) FROM threads")
            .await,
        0
    );
    assert_nothing_empty_was_sent(&scene, &gateway).await;
}

async fn idempotent_retry_replays_only_live_content(scene: Scene) {
    let gateway = gateway(&scene).await;
    let request = || {
        let request = gateway.request(Method::POST, &format!("{SCOPE}/messages"));
        request
            .header("idempotency-key", "k1")
            .json(&json!({"content": "needle"}))
    };
    let stream = || async {
        EventReader::new(
            request()
                .header("accept", "text/event-stream")
                .send()
                .await
                .unwrap(),
        )
    };
    scene.simulator.hold();
    let (first, second) = (stream().await, stream().await);
    scene.simulator.release();
    let (first, second) = (first.rest().await, second.rest().await);
    assert!(text_of(&first).contains("needle"));
    assert_eq!(first, second, "repeats get the live run");
    let late = gateway.send(request()).await;
    assert_eq!(late.headers["idempotent-replayed"], "true");
    let (late, message) = (late.ok(), &first[first.len() - 2].data["message"]);
    assert_eq!(late["run"], first[first.len() - 1].data["run"]);
    assert!(text(message).contains("needle"));
    assert_eq!(
        (&late["message"]["id"], &late["message"]["content"]),
        (&message["id"], &json!([]))
    );
    assert_eq!(scene.simulator.stats().runs_started, 1);
    assert_silent(&scene, &gateway).await;
}

/// Waits until no run is unfinished.
async fn settles(scene: &Scene) {
    let start = Instant::now();
    while scene
        .database
        .number("SELECT count(*) FROM runs WHERE finished_at IS NULL")
        .await
        > 0
    {
        assert!(start.elapsed() < PATIENCE, "a run never ended");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

async fn queued_messages_lost_in_crash_are_not_sent_empty(scene: Scene) {
    let first = gateway(&scene).await;
    first.say(SCOPE, "needle zero").await;
    scene.simulator.hold();
    let (_active, _) = begin(&first, "enqueue", "needle one").await;
    let mut waiting = Vec::new();
    for content in ["needle two", "needle three", "needle four"] {
        waiting.push(begin(&first, "enqueue", content).await);
    }
    first.kill();
    let second = gateway(&scene).await;
    scene.simulator.release();
    settles(&scene).await;
    let runs = all(&second, &format!("{SCOPE}/runs")).await;
    for run in &runs[2..] {
        assert_eq!(
            (&run["status"], &run["error"]["code"]),
            (&json!("failed"), &json!("replica_lost")),
            "{runs:#?}"
        );
    }
    let answer = second.say(SCOPE, "needle five").await;
    assert!(text(&answer["message"]).contains("needle five"));
    assert_silent(&scene, &second).await;
    let said = users_upstream(&scene, &second).await;
    for lost in ["needle two", "needle three", "needle four"] {
        assert!(!said.contains(&lost.to_owned()), "{said:#?}");
    }
    // The transcript has them in order, and says that the model does not know them.
    let users = messages(&second, SCOPE)
        .await
        .into_iter()
        .filter(|message| message["role"] == "user");
    let lost: Vec<Value> = users
        .filter(|message| message["visible_to_model"] == false)
        .collect();
    let order: Vec<_> = lost
        .iter()
        .map(|message| message["run_id"].as_str().unwrap())
        .collect();
    let wanted: Vec<_> = waiting.iter().map(|(_, run)| run.as_str()).collect();
    assert!(order.ends_with(&wanted), "{lost:#?}");
    assert_nothing_empty_was_sent(&scene, &second).await;
}

async fn wait_for_tool_outputs_survives_crash(scene: Scene) {
    let first = gateway(&scene).await;
    let asked = ask(&first, "needle weather? [[sim: tool=get_weather]]").await;
    first.kill();
    let second = gateway(&scene).await;
    // The outputs are accepted once this process has taken the run over.
    let start = Instant::now();
    let answer = loop {
        let answer = give(&second, &asked["run"], "needle cold").await;
        if answer.status == StatusCode::OK {
            break answer.ok();
        }
        assert_eq!(answer.problem(), (421, "other-replica"), "{answer:?}");
        assert!(start.elapsed() < PATIENCE, "no process took the run over");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    };
    assert_eq!(answer["run"]["status"], "completed");
    assert!(
        text(&answer["message"]).contains("needle cold"),
        "{answer:#}"
    );
    second.say(SCOPE, "needle thanks").await;
    assert_silent(&scene, &second).await;
    assert_nothing_empty_was_sent(&scene, &second).await;
}

/// The process dies after a run got its outputs: either the upstream has them, or they would have
/// to be sent again.
async fn tool_outputs_lost_in_crash_are_not_sent_empty(scene: Scene) {
    let operation = if scene.protocol == Protocol::Assistants {
        "submit_tool_outputs"
    } else {
        "create_response"
    };
    for taken in [true, false] {
        let first = gateway(&scene).await;
        let asked = ask(&first, "needle weather? [[sim: tool=get_weather]]").await;
        if taken {
            scene.simulator.hold();
        } else {
            let fault = "status=503 retry_after=30".to_owned();
            scene
                .simulator
                .add_fault(Fault {
                    on: operation.to_owned(),
                    fault,
                    times: 1,
                })
                .unwrap();
        }
        let sent = |stats: &Stats| {
            stats
                .requests_by_operation
                .get(operation)
                .copied()
                .unwrap_or(0)
        };
        let before = sent(&scene.simulator.stats());
        let request = first.request(
            Method::POST,
            &format!("{}/tool_outputs", path(&asked["run"])),
        );
        let request = request
            .header("prefer", "respond-async")
            .json(&outputs(&asked["run"], "needle cold"));
        assert_eq!(first.send(request).await.status, StatusCode::ACCEPTED);
        scene.simulator.wait_for(|stats| sent(stats) > before).await;
        first.kill();
        scene.simulator.release();
        let second = gateway(&scene).await;
        settles(&scene).await;
        let read = second.get(&path(&asked["run"])).await.ok();
        // The run ended as the upstream says, if the upstream can say so.
        if !taken || read["run"]["status"] != "completed" {
            assert_eq!(read["run"]["error"]["code"], "replica_lost", "{read:#}");
        }
        second.say(SCOPE, "needle thanks").await;
        assert_silent(&scene, &second).await;
        assert_nothing_empty_was_sent(&scene, &second).await;
        second.kill();
    }
}

async fn tool_outputs_accepted_only_by_owning_replica(scene: Scene) {
    if scene.backend == Backend::Sqlite {
        // SQLite serves one process only.
        return;
    }
    let (own, other) = tokio::join!(gateway(&scene), gateway(&scene));
    let asked = ask(&own, "needle weather? [[sim: tool=get_weather]]").await;
    let seen = other.get(&path(&asked["run"])).await.ok();
    assert_eq!(seen["run"]["status"], "requires_action");
    assert_eq!(
        arguments(&seen["run"]),
        "",
        "another process does not know the calls"
    );
    let refused = give(&other, &seen["run"], "needle cold").await;
    assert_eq!(refused.problem(), (421, "other-replica"), "{refused:?}");
    assert!(refused.headers.contains_key("retry-after"));
    let answer = give(&own, &asked["run"], "needle cold").await.ok();
    assert!(text(&answer["message"]).contains("needle cold"));
    // A reader at another process sees the end.
    let seen = other.get(&path(&asked["run"])).await.ok();
    assert_eq!(
        (&seen["run"], &seen["message"]["content"]),
        (&answer["run"], &json!([]))
    );
    assert_silent(&scene, &own).await;
    assert_nothing_empty_was_sent(&scene, &own).await;
}

async fn merge_never_joins_run_of_another_replica(scene: Scene) {
    if scene.backend == Backend::Sqlite {
        return;
    }
    let (one, two) = tokio::join!(gateway(&scene), gateway(&scene));
    one.say(SCOPE, "needle zero").await;
    scene.simulator.hold();
    let (active, _) = begin(&one, "enqueue", "needle one").await;
    let (waiting, run) = begin(&one, "merge", "needle two").await;
    let (elsewhere, own) = begin(&two, "merge", "needle three").await;
    assert_ne!(own, run, "at another process the text would be lost");
    assert_silent(&scene, &two).await;
    scene.simulator.release();
    for (stream, said) in [
        (active, "needle one"),
        (waiting, "needle two"),
        (elsewhere, "needle three"),
    ] {
        let events = stream.rest().await;
        assert!(text_of(&events).contains(said), "{events:#?}");
    }
    assert_silent(&scene, &one).await;
    assert_nothing_empty_was_sent(&scene, &two).await;
}

async fn lost_upstream_thread_restarts_empty(scene: Scene) {
    let gateway = gateway(&scene).await;
    for n in 1..=3 {
        gateway.say(SCOPE, &format!("needle {n}")).await;
    }
    scene.simulator.reset();
    let answer = gateway.say(SCOPE, "needle four").await;
    assert!(
        text(&answer["message"]).contains("turn 1 of"),
        "there is nothing to send: {answer:#}"
    );
    assert_eq!(users_upstream(&scene, &gateway).await, ["needle four"]);
    // A run that leaves something in the new upstream thread is settled by the items before its
    // own.
    let (mut cancelled, run) =
        begin(&gateway, "enqueue", "needle five [[sim: silent_after=4]]").await;
    deltas(&mut cancelled, 4).await;
    gateway
        .send(gateway.request(Method::POST, &format!("{SCOPE}/runs/{run}/cancel")))
        .await
        .ok();
    cancelled.rest().await;
    gateway.say(SCOPE, "needle six").await;
    // A response that is cut off leaves nothing.
    let stays = scene.protocol == Protocol::Assistants;
    let said = users_upstream(&scene, &gateway).await;
    assert_eq!(
        said.iter().any(|text| text.contains("needle five")),
        stays,
        "{said:#?}"
    );
    let users = entries(&gateway)
        .await
        .into_iter()
        .filter(|(role, ..)| role == "user");
    let known: Vec<bool> = users
        .map(|(_, _, visible_to_model)| visible_to_model)
        .collect();
    assert_eq!(known, [false, false, false, true, stays, true]);
    assert_silent(&scene, &gateway).await;
    assert_nothing_empty_was_sent(&scene, &gateway).await;
}

async fn rollover_carries_nothing_over(scene: Scene) {
    let gateway = gateway_with(&scene, "[threads]\nmax_messages = 4\n").await;
    let first = gateway.say(SCOPE, "needle one").await;
    gateway.say(SCOPE, "needle two").await;
    let next = gateway.say(SCOPE, "needle three").await;
    assert_eq!(
        next["thread"]["previous_thread"], first["thread"]["id"],
        "{next:#}"
    );
    assert!(text(&next["message"]).contains("needle three"), "{next:#}");
    assert!(text(&next["message"]).contains("turn 1 of"), "{next:#}");
    assert_eq!(users_upstream(&scene, &gateway).await, ["needle three"]);
    assert_silent(&scene, &gateway).await;
    assert_nothing_empty_was_sent(&scene, &gateway).await;
}

/// From now on the content is stored.
async fn unstored_messages_are_skipped_when_thread_is_rebuilt(scene: Scene) {
    let mut gateway = gateway(&scene).await;
    gateway.say(SCOPE, "needle one").await;
    gateway.terminate();
    assert!(gateway.exit().await.success());
    let gateway = scene.gateway().await;
    let answer = gateway.say(SCOPE, "two").await;
    assert!(text(&answer["message"]).contains("turn 2 of"), "{answer:#}");
    scene.simulator.reset();
    let answer = gateway.say(SCOPE, "three").await;
    assert!(text(&answer["message"]).contains("turn 1 of"), "{answer:#}");
    let answer = gateway.say(SCOPE, "four").await;
    assert!(text(&answer["message"]).contains("turn 2 of"), "{answer:#}");
    scene.simulator.reset();
    // Messages since then are complete.
    let answer = gateway.say(SCOPE, "five").await;
    assert!(text(&answer["message"]).contains("turn 3 of"), "{answer:#}");
    assert_same(&scene, &gateway, SCOPE).await;
    assert_nothing_empty_was_sent(&scene, &gateway).await;
}

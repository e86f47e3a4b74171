//! Rollover: a fresh thread replaces a full one.

use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::support::gateway::{Gateway, text};
use crate::support::history::all;
use crate::support::scene::{Protocol, Scene, on_each_protocol, on_every_scene};

on_every_scene!(rollover_under_load_neither_loses_nor_doubles_messages);
on_each_protocol!(
    full_thread_rolls_over_before_next_run,
    thread_rolls_over_on_request,
    rollover_waits_for_active_run,
    rollover_archives_external_messages,
    lost_upstream_thread_is_rebuilt_with_carried_over_messages,
    deadline_and_cancel_end_run_before_rollover,
);

const SCOPE: &str = "/v1/users/alice";

fn thread(answer: &Value) -> &str {
    answer["thread"]["id"].as_str().unwrap()
}

/// Returns the texts of messages.
fn texts(messages: &[Value]) -> Vec<&str> {
    messages.iter().map(text).collect()
}

/// Returns the user's lines in the upstream thread of the current thread.
async fn user_messages_upstream(scene: &Scene, gateway: &Gateway) -> Vec<String> {
    let report = gateway.get(&format!("{SCOPE}/thread")).await.ok();
    let lines = scene
        .simulator
        .thread_history(report["upstream_thread_id"].as_str().unwrap());
    lines
        .into_iter()
        .filter(|(role, _)| role == "user")
        .map(|(_, text)| text)
        .collect()
}

/// Returns the messages of all threads of the key, in their order.
async fn transcript(gateway: &Gateway) -> Vec<Value> {
    all(gateway, &format!("{SCOPE}/messages?archived=true")).await
}

async fn full_thread_rolls_over_before_next_run(scene: Scene) {
    let settings =
        "[threads]\nmax_messages = 60\ncarry_over_messages = 50\n[janitor]\ninterval = \"100ms\"\n";
    let gateway = scene.gateway_with(settings).await;
    let first = gateway.say(SCOPE, "message 0").await;
    gateway
        .patch(
            &format!("{SCOPE}/thread"),
            &json!({"metadata": {"team": "blue"}}),
        )
        .await
        .ok();
    for n in 1..30 {
        assert_eq!(
            thread(&gateway.say(SCOPE, &format!("message {n}")).await),
            thread(&first)
        );
    }
    let next = gateway.say(SCOPE, "message 30").await;
    assert_ne!(thread(&next), thread(&first));
    assert_eq!(next["thread"]["previous_thread"], first["thread"]["id"]);
    assert_eq!(next["thread"]["metadata"], json!({"team": "blue"}));
    assert_eq!(next["thread"]["message_count"], 2);
    // 25 messages are carried over, which is more than one upstream request may have.
    assert!(text(&next["message"]).contains("turn 26"), "{next:#}");
    let expected: Vec<String> = (5..=30).map(|n| format!("message {n}")).collect();
    assert_eq!(user_messages_upstream(&scene, &gateway).await, expected);
    let said = transcript(&gateway).await;
    assert_eq!(said.len(), 62);
    let users: Vec<&str> = texts(&said).into_iter().step_by(2).collect();
    assert_eq!(
        users,
        (0..=30).map(|n| format!("message {n}")).collect::<Vec<_>>()
    );
    // The old thread's upstream copy is not needed any more.
    let old = format!("/v1/threads/{}", thread(&first));
    let archived = gateway
        .until(&old, |answer| answer.body["upstream_thread_id"].is_null())
        .await
        .ok();
    assert_eq!(
        (&archived["lifecycle"], &archived["message_count"]),
        (&json!("archived"), &json!(60))
    );
    assert_eq!(archived["next_thread"], next["thread"]["id"]);
    if scene.protocol != Protocol::Chain {
        assert_eq!(scene.upstream_threads().len(), 1);
    }
    // The conversation continues in the fresh thread.
    assert!(text(&gateway.say(SCOPE, "message 31").await["message"]).contains("turn 27"));
}

async fn thread_rolls_over_on_request(scene: Scene) {
    let gateway = scene
        .gateway_with("[threads]\ncarry_over_messages = 2\n")
        .await;
    let rollover = format!("{SCOPE}/thread/rollover");
    assert_eq!(
        gateway.post(&rollover, &json!({})).await.problem(),
        (404, "not-found")
    );
    gateway.say(SCOPE, "one").await;
    let old = gateway.say(SCOPE, "two").await;
    let fresh = gateway.post(&rollover, &json!({})).await.ok();
    assert_eq!(fresh["previous_thread"], old["thread"]["id"]);
    assert_eq!(
        (&fresh["message_count"], &fresh["run_count"]),
        (&json!(0), &json!(0))
    );
    let again = gateway.post(&rollover, &json!({})).await.ok();
    assert_eq!(
        again["id"], fresh["id"],
        "an empty thread is not rolled over"
    );
    let next = gateway.say(SCOPE, "three").await;
    assert_eq!(next["thread"]["id"], fresh["id"]);
    assert_eq!(
        user_messages_upstream(&scene, &gateway).await,
        ["two", "three"]
    );
    assert_eq!(transcript(&gateway).await.len(), 6);
    // All runs of the key can be found, including those of the archived thread.
    let run = gateway
        .get(&format!(
            "{SCOPE}/runs/{}",
            old["run"]["id"].as_str().unwrap()
        ))
        .await
        .ok();
    assert_eq!(run["message"], old["message"]);
    // A rollover does not prolong a session.
    let session = "/v1/users/alice/sessions/tab";
    let first = gateway.say(session, "one").await;
    let fresh = gateway
        .post(&format!("{session}/thread/rollover"), &json!({}))
        .await
        .ok();
    let at = |value: &Value| {
        value
            .as_str()
            .unwrap()
            .parse::<chrono::DateTime<chrono::Utc>>()
            .unwrap()
    };
    let later = at(&fresh["expires_at"]) - at(&first["thread"]["expires_at"]);
    assert!(later.num_milliseconds().abs() <= 2, "{later}");
}

async fn rollover_waits_for_active_run(scene: Scene) {
    let gateway = scene.gateway().await;
    let old = gateway.say(SCOPE, "one").await;
    let asks = json!({"content": "[[sim: tool=get_weather]] what is it like?"});
    let asked = gateway.post(&format!("{SCOPE}/messages"), &asks).await.ok();
    assert_eq!(asked["run"]["status"], "requires_action");
    let answer = gateway
        .post(&format!("{SCOPE}/thread/rollover"), &json!({}))
        .await;
    assert_eq!(answer.status, 202);
    assert_eq!(
        (&answer.body["id"], &answer.body["rollover_pending"]),
        (&old["thread"]["id"], &json!(true))
    );
    // The open function call can still be answered.
    let call = &asked["run"]["required_action"]["tool_calls"][0]["id"];
    let outputs = json!({"tool_outputs": [{"tool_call_id": call, "output": "sunny"}]});
    let path = format!(
        "{SCOPE}/runs/{}/tool_outputs",
        asked["run"]["id"].as_str().unwrap()
    );
    let done = gateway.post(&path, &outputs).await.ok();
    assert_eq!(
        (&done["run"]["status"], &done["thread"]["id"]),
        (&json!("completed"), &old["thread"]["id"])
    );
    let next = gateway.say(SCOPE, "two").await;
    assert_eq!(next["thread"]["previous_thread"], old["thread"]["id"]);
    assert_eq!(
        gateway.get(&format!("{SCOPE}/thread")).await.ok()["rollover_pending"],
        false
    );
    assert_eq!(
        user_messages_upstream(&scene, &gateway)
            .await
            .last()
            .unwrap(),
        "two"
    );
    assert_eq!(transcript(&gateway).await.len(), 6);
}

async fn rollover_under_load_neither_loses_nor_doubles_messages(scene: Scene) {
    let settings = "[threads]\nmax_messages = 6\ncarry_over_messages = 4\n[janitor]\ninterval = \"50ms\"\n\
                    calls_per_second = 10000\n";
    let gateway = scene.gateway_with(settings).await;
    let (talkers, each) = (6, 8);
    let talk = async |talker: usize| {
        for n in 0..each {
            let strategy = if n % 3 == 2 { "interrupt" } else { "enqueue" };
            let body = json!({"content": format!("{talker}-{n}"), "multitask_strategy": strategy});
            let answer = gateway.post(&format!("{SCOPE}/messages"), &body).await;
            assert_eq!(answer.status, 200, "{:#}", answer.body);
        }
    };
    join_all((0..talkers).map(talk)).await;
    let said = transcript(&gateway).await;
    let mut users: Vec<&str> = said
        .iter()
        .filter(|m| m["role"] == "user")
        .map(text)
        .collect();
    for talker in 0..talkers {
        let own: Vec<&str> = users
            .iter()
            .copied()
            .filter(|it| it.starts_with(&format!("{talker}-")))
            .collect();
        assert_eq!(
            own,
            (0..each)
                .map(|n| format!("{talker}-{n}"))
                .collect::<Vec<_>>(),
            "each message is there once, in order"
        );
    }
    users.sort_unstable();
    users.dedup();
    assert_eq!(users.len(), talkers * each);
    assert_eq!(
        scene
            .database
            .number("SELECT count(*) FROM threads WHERE lifecycle = 'current'")
            .await,
        1
    );
    assert!(
        scene.database.number("SELECT count(*) FROM threads").await > 8,
        "the conversation was rolled over often"
    );
    let counted = "SELECT count(*) FROM threads t WHERE message_count <> \
                   (SELECT count(*) FROM messages m WHERE m.thread_id = t.id)";
    assert_eq!(scene.database.number(counted).await, 0);
    // Two clean runs bring the upstream thread up to date, whatever was interrupted.
    gateway.say(SCOPE, "a").await;
    gateway.say(SCOPE, "b").await;
    let last = user_messages_upstream(&scene, &gateway).await;
    assert!(
        last.ends_with(&["a".to_owned(), "b".to_owned()]),
        "{last:?}"
    );
    gateway
        .until("/v1/threads?lifecycle=archived&limit=100", |answer| {
            answer.body["data"]
                .as_array()
                .unwrap()
                .iter()
                .all(|it| it["upstream_thread_id"].is_null())
        })
        .await;
    if scene.protocol != Protocol::Chain {
        assert_eq!(
            scene.upstream_threads().len(),
            1,
            "the upstream copies of all old threads are gone"
        );
    }
}

async fn rollover_archives_external_messages(scene: Scene) {
    if scene.protocol == Protocol::Chain {
        return;
    }
    let settings = "[threads]\ncarry_over_messages = 3\n";
    let gateway = scene
        .gateway_both(settings, "external_writers = true\n")
        .await;
    gateway.say(SCOPE, "one").await;
    let old = gateway.say(SCOPE, "two").await;
    let id = old["thread"]["upstream_thread_id"].as_str().unwrap();
    // There is more than one page of them.
    for n in 0..120 {
        scene
            .write(
                id,
                if n % 2 == 0 { "user" } else { "assistant" },
                &format!("foreign {n}"),
            )
            .await;
    }
    gateway.say(SCOPE, "three").await;
    gateway
        .post(&format!("{SCOPE}/thread/rollover"), &json!({}))
        .await
        .ok();
    let said = transcript(&gateway).await;
    let said = texts(&said);
    assert_eq!(said.len(), 126);
    assert_eq!((said[0], said[2], said[124]), ("one", "two", "three"));
    assert_eq!(
        said[4..124],
        (0..120).map(|n| format!("foreign {n}")).collect::<Vec<_>>()
    );
    gateway.say(SCOPE, "four").await;
    assert_eq!(
        user_messages_upstream(&scene, &gateway).await,
        ["three", "four"],
        "the last three are the foreign message 119, `three`, and its reply"
    );
}

async fn lost_upstream_thread_is_rebuilt_with_carried_over_messages(scene: Scene) {
    if scene.protocol == Protocol::Chain {
        return;
    }
    let gateway = scene
        .gateway_with("[threads]\ncarry_over_messages = 2\n")
        .await;
    gateway.say(SCOPE, "one").await;
    gateway.say(SCOPE, "two").await;
    gateway
        .post(&format!("{SCOPE}/thread/rollover"), &json!({}))
        .await
        .ok();
    let third = gateway.say(SCOPE, "three").await;
    scene
        .delete_thread(third["thread"]["upstream_thread_id"].as_str().unwrap())
        .await;
    gateway.say(SCOPE, "four").await;
    assert_eq!(
        user_messages_upstream(&scene, &gateway).await,
        ["two", "three", "four"]
    );
    // A run that ends uncleanly is settled by the messages before it.
    gateway
        .post(
            &format!("{SCOPE}/messages"),
            &json!({"content": "[[sim: cut=2]] five"}),
        )
        .await;
    gateway.say(SCOPE, "six").await;
    gateway.say(SCOPE, "seven").await;
    let heard = user_messages_upstream(&scene, &gateway).await;
    assert_eq!(heard[..3], ["two", "three", "four"]);
    assert!(
        heard.ends_with(&["six".to_owned(), "seven".to_owned()]),
        "{heard:?}"
    );
}

/// Before a rollover the gateway reads the upstream thread, and the upstream takes long.
async fn deadline_and_cancel_end_run_before_rollover(scene: Scene) {
    let on = match scene.protocol {
        Protocol::Assistants => "list_messages",
        Protocol::Responses => "list_items",
        Protocol::Chain => return,
    };
    let settings = "[threads]\nmax_messages = 2\n[runs]\nsettle_timeout = \"1h\"\n";
    let gateway = scene
        .gateway_both(settings, "external_writers = true\n")
        .await;
    gateway.say(SCOPE, "one").await;
    scene.fault(on, "latency=1h", 2);
    let body = json!({"content": "two", "timeout_ms": 300});
    let answer = gateway.post(&format!("{SCOPE}/messages"), &body).await;
    assert_eq!(
        (answer.status.as_u16(), &answer.body["code"]),
        (504, &json!("deadline_exceeded")),
        "{answer:?}"
    );
    let mut running = gateway.stream(SCOPE, "three").await;
    let run = running.next().await.unwrap().data["run_id"]
        .as_str()
        .unwrap()
        .to_owned();
    gateway
        .post(&format!("{SCOPE}/runs/{run}/cancel"), &json!({}))
        .await
        .ok();
    assert_eq!(running.rest().await.pop().unwrap().name, "run.cancelled");
    scene.simulator.clear_faults();
    let next = gateway.say(SCOPE, "four").await;
    assert_eq!(next["run"]["status"], "completed", "{next:#}");
}

//! Calls of tools and their outputs are part of the transcript, so that a new upstream thread has
//! them.

use serde_json::{Value, json};

use crate::support::gateway::{Answer, Gateway};
use crate::support::history::messages;
use crate::support::scene::{Protocol, Scene, on_each_protocol};

on_each_protocol!(
    calls_and_outputs_are_kept_in_order,
    new_upstream_thread_gets_calls_with_outputs,
    imported_conversation_gets_calls_with_outputs,
    cancelled_run_keeps_its_calls,
    large_outputs_are_kept_in_part,
);

const SCOPE: &str = "/v1/users/alice";

async fn ask(gateway: &Gateway, content: &str) -> Value {
    let asked = gateway.say(SCOPE, content).await;
    assert_eq!(asked["run"]["status"], "requires_action", "{asked:#}");
    assert_eq!(asked["message"], Value::Null);
    asked
}

async fn give(gateway: &Gateway, asked: &Value, output: &str) -> Answer {
    let calls = asked["run"]["required_action"]["tool_calls"]
        .as_array()
        .unwrap();
    let outputs: Vec<Value> = calls
        .iter()
        .map(|call| json!({"tool_call_id": call["id"], "output": output}))
        .collect();
    let run = asked["run"]["id"].as_str().unwrap();
    let path = format!("{SCOPE}/runs/{run}/tool_outputs");
    gateway.post(&path, &json!({"tool_outputs": outputs})).await
}

/// Makes the upstream lose the conversation.
async fn lose_thread(scene: &Scene, gateway: &Gateway) {
    let thread = gateway.get(&format!("{SCOPE}/thread")).await.ok();
    let id = thread["upstream_thread_id"].as_str().unwrap();
    if scene.protocol == Protocol::Chain {
        let url = format!("{}/responses/{id}", scene.upstream_url);
        let delete = reqwest::Client::new().delete(url).bearer_auth("sk-other");
        delete.send().await.unwrap();
    } else {
        scene.delete_thread(id).await;
    }
}

/// Returns the calls of a message: name, arguments and output.
fn calls(message: &Value) -> Vec<Value> {
    let parts = message["content"].as_array().unwrap().iter();
    parts
        .filter(|part| part["type"] == "tool_call")
        .map(|part| part["tool_call"].clone())
        .collect()
}

/// Checks that the upstream was sent the calls of a message, each right before its output. Threads of
/// Assistants hold no calls and get a note.
fn assert_sent(scene: &Scene, from: usize, calls: &[Value]) {
    let recorded = scene.simulator.recorded().split_off(from);
    if scene.protocol == Protocol::Assistants {
        let bodies: String = recorded.iter().map(|it| it.body.to_string()).collect();
        for call in calls {
            let note = format!("[Called the tool {} with ", call["name"].as_str().unwrap());
            assert!(bodies.contains(&note), "{bodies}");
            assert!(bodies.contains(&format!("Output: {}]", call["output"].as_str().unwrap())));
        }
        return;
    }
    let items: Vec<Value> = recorded
        .iter()
        .filter_map(|it| it.body["items"].as_array().or(it.body["input"].as_array()))
        .flatten()
        .cloned()
        .collect();
    let mut sent = Vec::new();
    for (at, item) in items.iter().enumerate() {
        match item["type"].as_str() {
            Some("function_call") => {
                assert_eq!(items[at + 1]["type"], "function_call_output");
                assert_eq!(items[at + 1]["call_id"], item["call_id"]);
                sent.push((
                    item["name"].clone(),
                    item["arguments"].clone(),
                    items[at + 1]["output"].clone(),
                ));
            }
            Some("function_call_output") => assert_eq!(items[at - 1]["type"], "function_call"),
            _ => {}
        }
    }
    let wanted: Vec<_> = calls
        .iter()
        .map(|call| {
            (
                call["name"].clone(),
                call["arguments"].clone(),
                call["output"].clone(),
            )
        })
        .collect();
    assert_eq!(sent, wanted);
}

async fn answered(gateway: &Gateway) -> Value {
    gateway.say(SCOPE, "hello").await;
    let asked = ask(gateway, "weather? [[sim: tool=get_weather tool=get_time]]").await;
    give(gateway, &asked, "4 °C").await.ok()
}

async fn calls_and_outputs_are_kept_in_order(scene: Scene) {
    let gateway = scene.gateway().await;
    let answer = answered(&gateway).await;
    let message = &answer["message"];
    let kinds: Vec<_> = message["content"]
        .as_array()
        .unwrap()
        .iter()
        .map(|part| part["type"].as_str().unwrap())
        .collect();
    assert_eq!(kinds, ["tool_call", "tool_call", "text"], "{message:#}");
    let calls = calls(message);
    assert_eq!(calls[0]["name"], "get_weather");
    assert_eq!(calls[1]["name"], "get_time");
    for call in &calls {
        assert_eq!(
            (&call["type"], &call["output"]),
            (&json!("function"), &json!("4 °C"))
        );
        assert!(call["arguments"].is_string() && call["id"].is_string());
    }
    let stored = messages(&gateway, SCOPE).await;
    assert_eq!(stored.last().unwrap(), message);
    // The events are as they were streamed, and have the message.
    let run = answer["run"]["id"].as_str().unwrap();
    let events = gateway.events(SCOPE, run, None).await.rest().await;
    let completed = events.iter().find(|it| it.name == "message.completed");
    assert_eq!(completed.unwrap().data["message"], *message);
    let verified = gateway
        .get(&format!("{SCOPE}/thread?verify=upstream"))
        .await
        .ok();
    assert_ne!(verified["verified"]["in_step"], false, "{verified:#}");
}

async fn new_upstream_thread_gets_calls_with_outputs(scene: Scene) {
    let gateway = scene.gateway().await;
    let calls = calls(&answered(&gateway).await["message"]);
    lose_thread(&scene, &gateway).await;
    let from = scene.simulator.recorded().len();
    let next = gateway.say(SCOPE, "and now?").await;
    assert_eq!(next["run"]["status"], "completed", "{next:#}");
    assert_sent(&scene, from, &calls);
}

async fn imported_conversation_gets_calls_with_outputs(scene: Scene) {
    let gateway = scene.gateway().await;
    let calls = calls(&answered(&gateway).await["message"]);
    let export = gateway
        .request(reqwest::Method::GET, &format!("{SCOPE}/export"))
        .send()
        .await
        .unwrap();
    let export = export.text().await.unwrap();
    let elsewhere = Scene::new(scene.protocol, scene.backend).await;
    super::pictures::import(&elsewhere, export).await;
    let successor = elsewhere.gateway().await;
    let from = elsewhere.simulator.recorded().len();
    let next = successor.say(SCOPE, "and now?").await;
    assert_eq!(next["run"]["status"], "completed", "{next:#}");
    assert_sent(&elsewhere, from, &calls);
}

async fn cancelled_run_keeps_its_calls(scene: Scene) {
    let gateway = scene.gateway().await;
    gateway.say(SCOPE, "hello").await;
    let asked = ask(&gateway, "weather? [[sim: tool=get_weather]]").await;
    let cancel = format!(
        "{SCOPE}/runs/{}/cancel",
        asked["run"]["id"].as_str().unwrap()
    );
    let cancelled = gateway.post(&cancel, &json!({})).await.ok();
    assert_eq!(cancelled["run"]["status"], "cancelled");
    let calls = calls(&cancelled["message"]);
    assert_eq!(calls[0]["name"], "get_weather", "{cancelled:#}");
    assert_eq!(calls[0]["output"], Value::Null);
    let next = gateway.say(SCOPE, "and now?").await;
    assert_eq!(next["run"]["status"], "completed", "{next:#}");
    // A new thread gets the call with an output that says so.
    lose_thread(&scene, &gateway).await;
    let last = gateway.say(SCOPE, "bye").await;
    assert_eq!(last["run"]["status"], "completed", "{last:#}");
}

async fn large_outputs_are_kept_in_part(scene: Scene) {
    let gateway = scene.gateway().await;
    let asked = ask(&gateway, "weather? [[sim: tool=get_weather]]").await;
    let large = "ä".repeat(100_000);
    let answer = give(&gateway, &asked, &large).await.ok();
    let call = &calls(&answer["message"])[0];
    let output = call["output"].as_str().unwrap();
    assert!(output.len() < 65 * 1024, "{}", output.len());
    assert!(output.ends_with("[… cut, 200000 bytes in all]"));
    lose_thread(&scene, &gateway).await;
    let next = gateway.say(SCOPE, "and now?").await;
    assert_eq!(next["run"]["status"], "completed", "{next:#}");
}

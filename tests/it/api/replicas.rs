//! Several gateways on one database: what one of them has begun, all can show, steer and finish.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::gateway::{Answer, Event, EventReader, Gateway, PATIENCE, text_of};
use crate::support::scene::Scene;

mod alone;
mod asks;
mod backlog;
mod clocks;
mod files;
mod handover;
mod order;
mod outages;
mod pools;
mod resent;
mod rolling;
mod sleepers;
mod streams;
mod takeover;

const SCOPE: &str = "/v1/users/alice";

/// Nothing in a test waits until such a session is renewed, or lapses. What is prompt is so because replicas tell each
/// other.
const LONG: &str = "[replica]\nsession_ttl = \"60s\"\n";
/// Well below the 20 s after which such a session is renewed.
const PROMPT: Duration = Duration::from_secs(8);

/// A session's life that a test can wait for.
const TTL: Duration = Duration::from_secs(3);

/// Such a one, as a setting.
const SHORT: &str = "[replica]\nsession_ttl = \"3s\"\n";

/// Words that come before a reply is held.
const HELD_AFTER: usize = 20;

/// What makes the simulator stop half-way, once it is told to hold.
fn half_way(text: &str) -> String {
    format!("{text} [[sim: tokens=60 hold_after={HELD_AFTER}]]")
}

/// A reply of which the first half was told.
struct Half {
    run: String,
    seen: Vec<Event>,
    stream: EventReader,
}

impl Half {
    /// Has a run come half-way, and stay there until the simulator is released.
    async fn at(scene: &Scene, gateway: &Gateway, text: &str) -> Self {
        scene.simulator.hold();
        let mut stream = gateway.stream(SCOPE, &half_way(text)).await;
        let mut seen = Vec::new();
        // Each word of the reply has a blank behind it.
        while text_of(&seen).matches(' ').count() < HELD_AFTER {
            seen.push(stream.next().await.expect("the reply goes on"));
        }
        Self {
            run: run_of(&seen[0]),
            seen,
            stream,
        }
    }

    fn text(&self) -> String {
        text_of(&self.seen)
    }

    fn last(&self) -> &str {
        &self.seen.last().unwrap().id
    }
}

fn run_of(event: &Event) -> String {
    event.data["run_id"].as_str().unwrap().to_owned()
}

/// The number of an event in its run.
fn number(event: &Event) -> i64 {
    event.id.rsplit_once(':').unwrap().1.parse().unwrap()
}

#[track_caller]
fn assert_ascending(events: &[Event]) {
    assert!(
        events
            .windows(2)
            .all(|two| number(&two[0]) < number(&two[1])),
        "{events:#?}"
    );
}

/// All text of a message.
fn whole(message: &Value) -> String {
    let parts = message["content"]
        .as_array()
        .unwrap_or_else(|| panic!("no message: {message:#}"))
        .iter();
    parts.map(|part| part["text"].as_str().unwrap()).collect()
}

/// The message that a stream ended with.
fn completed(events: &[Event]) -> String {
    let message = events
        .iter()
        .find(|event| event.name == "message.completed");
    whole(
        &message
            .unwrap_or_else(|| panic!("no message: {events:#?}"))
            .data["message"],
    )
}

async fn cancel(gateway: &Gateway, run: &str) -> Answer {
    gateway
        .send(gateway.request(Method::POST, &format!("{SCOPE}/runs/{run}/cancel")))
        .await
}

/// Posts a message and reads the first event of its stream.
async fn begin(gateway: &Gateway, strategy: &str, content: &str) -> (EventReader, Event) {
    let body = json!({"content": content, "multitask_strategy": strategy, "stream": true});
    let request = gateway
        .request(Method::POST, &format!("{SCOPE}/messages"))
        .json(&body);
    let mut stream = EventReader::new(request.send().await.unwrap());
    let first = stream.next().await.unwrap();
    (stream, first)
}

/// Asks for something that the model answers with a function call.
async fn ask(gateway: &Gateway, scope: &str) -> Value {
    let asked = gateway
        .say(scope, "weather? [[sim: tool=get_weather]]")
        .await;
    assert_eq!(asked["run"]["status"], "requires_action", "{asked:#}");
    asked
}

/// The outputs of these calls, as a request's path and body.
fn outputs(scope: &str, asked: &Value) -> (String, Value) {
    let path = format!(
        "{scope}/runs/{}/tool_outputs",
        asked["run"]["id"].as_str().unwrap()
    );
    let call = &asked["run"]["required_action"]["tool_calls"][0]["id"];
    (
        path,
        json!({"tool_outputs": [{"tool_call_id": call, "output": "4 °C"}]}),
    )
}

/// Asks the database until it counts as many.
async fn counted(scene: &Scene, sql: &str, wanted: i64) {
    let start = Instant::now();
    loop {
        let found = scene.database.number(sql).await;
        if found == wanted {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "{sql}: {found}, not {wanted}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What the users of a conversation said, in the order of the transcript, without directives.
async fn heard(gateway: &Gateway, scope: &str) -> Vec<String> {
    let all = crate::support::history::messages(gateway, scope).await;
    let users = all
        .iter()
        .filter(|message| message["role"] == "user")
        .map(whole);
    users
        .map(|text| text.split(" [[").next().unwrap().to_owned())
        .collect()
}

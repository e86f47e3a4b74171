//! Several gateways on one database: each replica can show, control and finish the runs of the
//! others.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::gateway::{Answer, Event, EventReader, Gateway, PATIENCE, text_of};
use crate::support::scene::Scene;

mod clocks;
mod files;
mod frozen;
mod handover;
mod order;
mod outages;
mod pools;
mod requests;
mod resent;
mod rolling;
mod single;
mod streams;
mod takeover;
mod unsynced;

const SCOPE: &str = "/v1/users/alice";

/// With this session, no test waits for a renewal or a lapse. Whatever is prompt is due to
/// notifications between replicas.
const LONG: &str = "[replica]\nsession_ttl = \"60s\"\n";
/// Longest time that counts as prompt. It is well below the 20 s between two renewals of such a
/// session.
const PROMPT: Duration = Duration::from_secs(8);

/// A session life that a test can wait for.
const TTL: Duration = Duration::from_secs(3);

/// The setting for that life.
const SHORT: &str = "[replica]\nsession_ttl = \"3s\"\n";

/// Number of words before the simulator holds a reply.
const HELD_AFTER: usize = 20;

/// Adds a directive to a text: the simulator stops in the middle of the reply while it is on
/// hold.
fn half_way(text: &str) -> String {
    format!("{text} [[sim: tokens=60 hold_after={HELD_AFTER}]]")
}

/// A reply of which a reader has seen the first half.
struct Half {
    run: String,
    seen: Vec<Event>,
    stream: EventReader,
}

impl Half {
    /// Starts a run and reads the first half of its reply. The run stays there until the
    /// simulator is released.
    async fn at(scene: &Scene, gateway: &Gateway, text: &str) -> Self {
        scene.simulator.hold();
        let mut stream = gateway.stream(SCOPE, &half_way(text)).await;
        let mut seen = Vec::new();
        // Each word of the reply ends with a space.
        while text_of(&seen).matches(' ').count() < HELD_AFTER {
            seen.push(stream.next().await.expect("the reply continues"));
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

/// Returns the number of an event within its run.
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

/// Returns the whole text of a message.
fn whole(message: &Value) -> String {
    let parts = message["content"]
        .as_array()
        .unwrap_or_else(|| panic!("the message has no content: {message:#}"))
        .iter();
    parts.map(|part| part["text"].as_str().unwrap()).collect()
}

/// Returns the text of the completed message at the end of a stream.
fn completed(events: &[Event]) -> String {
    let message = events
        .iter()
        .find(|event| event.name == "message.completed");
    whole(
        &message
            .unwrap_or_else(|| panic!("no event has a completed message: {events:#?}"))
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

/// Sends a message that the model answers with a function call.
async fn ask(gateway: &Gateway, scope: &str) -> Value {
    let asked = gateway
        .say(scope, "weather? [[sim: tool=get_weather]]")
        .await;
    assert_eq!(asked["run"]["status"], "requires_action", "{asked:#}");
    asked
}

/// Returns path and body of the request with outputs for these calls.
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

/// Repeats a query until it counts `wanted`.
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

/// Returns the users' messages in the order of the transcript, without directives.
async fn user_messages(gateway: &Gateway, scope: &str) -> Vec<String> {
    let all = crate::support::history::messages(gateway, scope).await;
    let users = all
        .iter()
        .filter(|message| message["role"] == "user")
        .map(whole);
    users
        .map(|text| text.split(" [[").next().unwrap().to_owned())
        .collect()
}

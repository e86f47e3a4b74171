//! Lost acknowledgements of the database: the statement may have taken effect.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::gate::{Gate, Moment};
use crate::support::gateway::{Answer, Gateway, text};
use crate::support::history::{all, upstream};
use crate::support::recording_proxy::{DatabaseTap, Steps};
use crate::support::scene::{Backend, Protocol, Scene};

const SCOPE: &str = "/v1/users/alice";
/// The session lasts longer than any of these tests.
const SESSION: &str = "[replica]\nsession_ttl = \"5m\"\n";
/// Names of statements.
const ANSWER_TOOLS: &str = "tools.answer";
const ADMIT: &str = "admission.admit";

struct World {
    scene: Scene,
    gate: Gate,
    gateway: Gateway,
    _tap: DatabaseTap,
}

impl World {
    async fn new(transcript: &str) -> Self {
        let scene = Scene::new(Protocol::Responses, Backend::Postgres).await;
        let gate = Gate::default();
        let tap = DatabaseTap::gated(&scene.database.url(), &gate, Steps::Changes).await;
        let config = scene
            .config(SESSION)
            .replace(&scene.database.url(), &tap.url);
        let store = format!("[store]\ntranscript = \"{transcript}\"\nacquire_timeout = \"1s\"\n");
        let gateway = Gateway::start(&config.replace("[store]\n", &store)).await;
        Self {
            scene,
            gate,
            gateway,
            _tap: tap,
        }
    }

    /// Sends a request, and cuts the connection on which the gateway executes this statement.
    async fn cut(
        &self,
        statement: &'static str,
        moment: Moment,
        path: &str,
        body: &Value,
    ) -> Answer {
        self.gate.set_at(statement, moment);
        let request = self.gateway.request(Method::POST, path).json(body);
        let request = if statement == ADMIT {
            request.header("prefer", "respond-async")
        } else {
            request
        };
        let (answer, ()) = tokio::join!(self.gateway.send(request), async {
            self.gate.caught().await;
            self.gate.open();
        });
        answer
    }

    async fn user_messages(&self) -> Vec<String> {
        let lines = upstream(&self.scene, &self.gateway, SCOPE)
            .await
            .into_iter();
        lines
            .filter(|(role, _)| role == "user")
            .map(|(_, text)| text)
            .collect()
    }
}

/// Checks that the message joins the queued run once, and that its sender learns so.
async fn merge_is_applied_once(transcript: &str, moment: Moment) {
    let world = World::new(transcript).await;
    let gateway = &world.gateway;
    gateway.say(SCOPE, "hello").await;
    world.scene.simulator.hold();
    let mut active = gateway.stream(SCOPE, "first").await;
    active.next().await.unwrap();
    let mut waiting = gateway.stream(SCOPE, "second").await;
    let run = waiting.next().await.unwrap().data["run_id"].clone();
    let body = json!({"content": "third", "multitask_strategy": "merge"});
    let answer = world
        .cut(ADMIT, moment, &format!("{SCOPE}/messages"), &body)
        .await;
    assert_eq!(
        (answer.status, &answer.body["run"]["id"]),
        (StatusCode::ACCEPTED, &run),
        "{answer:?}"
    );
    assert!(
        !answer.headers.contains_key("idempotent-replayed"),
        "{answer:?}"
    );
    world.scene.simulator.release();
    active.rest().await;
    let ended = waiting.rest().await;
    assert_eq!(ended.last().unwrap().name, "run.completed", "{ended:#?}");
    assert_eq!(
        world.user_messages().await,
        ["hello", "first", "second", "third"]
    );
    assert_eq!(all(gateway, &format!("{SCOPE}/runs")).await.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn merge_with_lost_answer_is_not_repeated() {
    merge_is_applied_once("on", Moment::After).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn merge_with_lost_request_is_retried() {
    merge_is_applied_once("on", Moment::Before).await;
}

/// Without stored content, only this process knows the message. It is sent with the run all the
/// same.
#[tokio::test(flavor = "multi_thread")]
async fn merge_with_lost_answer_keeps_unstored_content() {
    merge_is_applied_once("off", Moment::After).await;
}

/// The sender of a message learns of the run that it joined, even if that run has ended by then.
#[tokio::test(flavor = "multi_thread")]
async fn merge_with_lost_answer_found_by_idempotency_key() {
    let world = World::new("on").await;
    let gateway = &world.gateway;
    world.scene.simulator.hold();
    let mut active = gateway.stream(SCOPE, "first").await;
    active.next().await.unwrap();
    let mut waiting = gateway.stream(SCOPE, "second").await;
    let run = waiting.next().await.unwrap().data["run_id"].clone();
    let request = || {
        let request = gateway.request(Method::POST, &format!("{SCOPE}/messages"));
        let request = request
            .header("idempotency-key", "k1")
            .header("prefer", "respond-async");
        request.json(&json!({"content": "third", "multitask_strategy": "merge"}))
    };
    world.gate.set_at(ADMIT, Moment::After);
    let (answer, ()) = tokio::join!(gateway.send(request()), async {
        world.gate.caught().await;
        world.gate.open();
    });
    for answer in [answer, gateway.send(request()).await] {
        assert_eq!(
            (answer.status, &answer.body["run"]["id"]),
            (StatusCode::ACCEPTED, &run),
            "{answer:?}"
        );
    }
    world.scene.simulator.release();
    active.rest().await;
    assert_eq!(waiting.rest().await.last().unwrap().name, "run.completed");
    assert_eq!(world.user_messages().await, ["first", "second", "third"]);
}

/// The database stays away longer than the sender waits.
#[tokio::test(flavor = "multi_thread")]
async fn merge_with_unknown_outcome_is_reported_as_such() {
    let world = World::new("off").await;
    let gateway = &world.gateway;
    world.scene.simulator.hold();
    let mut active = gateway.stream(SCOPE, "first").await;
    active.next().await.unwrap();
    let mut waiting = gateway.stream(SCOPE, "second").await;
    waiting.next().await.unwrap();
    world.gate.set_at(ADMIT, Moment::After);
    let body = json!({"content": "third", "multitask_strategy": "merge"});
    let answer = gateway.post(&format!("{SCOPE}/messages"), &body).await;
    assert_eq!(answer.problem(), (503, "maybe-merged"));
    world.gate.open();
    world.scene.simulator.release();
    active.rest().await;
    assert_eq!(waiting.rest().await.last().unwrap().name, "run.completed");
    assert_eq!(world.user_messages().await, ["first", "second", "third"]);
}

/// Without stored outputs only this process can send them to the upstream.
async fn outputs_reach_their_run(moment: Moment) {
    let world = World::new("off").await;
    let gateway = &world.gateway;
    let asked = gateway
        .say(SCOPE, "weather? [[sim: tool=get_weather]]")
        .await;
    let path = format!(
        "{SCOPE}/runs/{}/tool_outputs",
        asked["run"]["id"].as_str().unwrap()
    );
    let call = &asked["run"]["required_action"]["tool_calls"][0]["id"];
    let body = json!({"tool_outputs": [{"tool_call_id": call, "output": "4 °C"}]});
    let answer = world.cut(ANSWER_TOOLS, moment, &path, &body).await;
    assert!(
        !answer.headers.contains_key("idempotent-replayed"),
        "{answer:?}"
    );
    let answer = answer.ok();
    assert_eq!(answer["run"]["status"], "completed", "{answer:#}");
    assert!(text(&answer["message"]).contains("4 °C"), "{answer:#}");
    assert_eq!(
        gateway.post(&path, &body).await.problem(),
        (409, "run-not-waiting")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn tool_outputs_with_lost_answer_reach_run() {
    outputs_reach_their_run(Moment::After).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tool_outputs_with_lost_request_are_retried() {
    outputs_reach_their_run(Moment::Before).await;
}

/// The database stays away longer than the sender waits, but the outputs are kept until it is
/// back.
#[tokio::test(flavor = "multi_thread")]
async fn tool_outputs_survive_database_outage() {
    let world = World::new("off").await;
    let gateway = &world.gateway;
    let asked = gateway
        .say(SCOPE, "weather? [[sim: tool=get_weather]]")
        .await;
    let run = format!("{SCOPE}/runs/{}", asked["run"]["id"].as_str().unwrap());
    let call = &asked["run"]["required_action"]["tool_calls"][0]["id"];
    let body = json!({"tool_outputs": [{"tool_call_id": call, "output": "4 °C"}]});
    world.gate.set_at(ANSWER_TOOLS, Moment::After);
    let answer = gateway.post(&format!("{run}/tool_outputs"), &body).await;
    assert_eq!(answer.problem(), (503, "store-unavailable"));
    world.gate.open();
    let read = gateway
        .until(&run, |answer| answer.body["run"]["finished_at"].is_string())
        .await
        .ok();
    assert_eq!(read["run"]["status"], "completed", "{read:#}");
}

/// A message joins a queued run whose own sender is about to learn that its message was not
/// accepted.
#[tokio::test(flavor = "multi_thread")]
async fn merged_message_survives_refusal_of_first_message() {
    let world = World::new("on").await;
    let gateway = &world.gateway;
    // This replica reaches the database without the gate.
    let other = Gateway::start(&world.scene.config(SESSION)).await;
    world.scene.simulator.hold();
    let mut active = gateway.stream(SCOPE, "first").await;
    active.next().await.unwrap();
    let post = async |gateway: &Gateway, key: &str, body: &Value| {
        let mut request = gateway.request(Method::POST, &format!("{SCOPE}/messages"));
        if body["on_disconnect"].is_null() {
            request = request.header("prefer", "respond-async");
        }
        gateway
            .send(request.header("idempotency-key", key).json(body))
            .await
    };
    world.gate.set_at(ADMIT, Moment::After);
    // The refusal of the first message counts as the end of its request. It must not end the run
    // for the message that joined it.
    let (second, third) = (
        json!({"content": "second", "on_disconnect": "cancel"}),
        json!({"content": "third", "multitask_strategy": "merge"}),
    );
    let (refused, joined) = tokio::join!(post(gateway, "k2", &second), async {
        world.gate.caught().await;
        post(&other, "k3", &third).await
    });
    // The gateway asked again for as long as the sender waits, but the database stayed away.
    world.gate.open();
    assert_eq!(refused.problem(), (503, "store-unavailable"));
    assert_eq!(joined.status, StatusCode::ACCEPTED, "{joined:?}");
    let run = joined.body["run"]["id"].as_str().unwrap();
    let input = "SELECT jsonb_array_length(queued_input)::bigint FROM runs WHERE status = 'queued'";
    while world.scene.database.number(input).await != 1 {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    world.scene.simulator.release();
    active.rest().await;
    let path = format!("{SCOPE}/runs/{run}");
    let ended = other
        .until(&path, |answer| {
            answer.body["run"]["finished_at"].is_string()
        })
        .await
        .ok();
    assert_eq!(ended["run"]["status"], "completed", "{ended:#}");
    assert_eq!(world.user_messages().await, ["first", "third"]);
    // The first sender repeats its message, and must not get the run without it.
    let again = post(gateway, "k2", &second).await;
    assert!(
        !again.headers.contains_key("idempotent-replayed"),
        "{again:?}"
    );
    let path = format!("{SCOPE}/runs/{}", again.body["run"]["id"].as_str().unwrap());
    gateway
        .until(&path, |answer| {
            answer.body["run"]["finished_at"].is_string()
        })
        .await
        .ok();
    assert_eq!(world.user_messages().await, ["first", "third", "second"]);
    // The other sender gets the run with its message.
    let again = post(gateway, "k3", &third).await;
    assert_eq!(again.body["run"]["id"], run, "{again:?}");
}

//! The multitask strategies: what a new message does on a busy thread.

use serde_json::{Value, json};

use crate::support::gateway::{Answer, Event, EventReader, Gateway, PATIENCE, text, text_of};
use crate::support::history::{assert_same, messages, transcript};
use crate::support::scene::{Backend, Protocol, Scene, on_each_protocol, on_every_scene};

on_every_scene!(rollback_removes_messages_locally_and_upstream);
on_each_protocol!(
    interrupt_cancels_active_run_and_goes_next,
    interrupt_ends_wait_for_tool_outputs,
    rollback_rebuilds_thread_when_messages_are_undeletable,
    rollback_removes_reasoning_items,
    merge_joins_last_queued_run,
    merge_with_different_metadata_starts_own_run,
    every_strategy_starts_immediately_on_idle_thread,
    later_interrupt_goes_before_earlier_one,
);

const SCOPE: &str = "/v1/users/alice";

async fn post(gateway: &Gateway, strategy: &str, content: &str) -> Answer {
    let body = json!({"content": content, "multitask_strategy": strategy});
    gateway.post(&format!("{SCOPE}/messages"), &body).await
}

/// Posts a message as a stream and reads its first event.
async fn begin(gateway: &Gateway, strategy: &str, content: &str) -> (EventReader, Event) {
    let body = json!({"content": content, "multitask_strategy": strategy, "stream": true});
    let request = gateway
        .request(reqwest::Method::POST, &format!("{SCOPE}/messages"))
        .json(&body);
    let mut stream = EventReader::new(request.send().await.unwrap());
    let first = stream.next().await.unwrap();
    (stream, first)
}

async fn deltas(stream: &mut EventReader, count: usize) {
    for _ in 0..count {
        assert_eq!(stream.next().await.unwrap().name, "message.delta");
    }
}

fn last(events: &[Event]) -> (&str, &Value) {
    let last = events.last().unwrap();
    (&last.name, &last.data["run"])
}

/// Returns roles and texts of the transcript, and how their runs ended if they did not complete.
async fn said(gateway: &Gateway) -> Vec<(String, String, Value)> {
    let line = |message: &Value| {
        let word = |name: &str| message[name].as_str().unwrap().to_owned();
        assert_eq!(
            message["status"] == "completed",
            message["incomplete_reason"].is_null(),
            "{message:#}"
        );
        (
            word("role"),
            text(message).to_owned(),
            message["incomplete_reason"].clone(),
        )
    };
    messages(gateway, SCOPE).await.iter().map(line).collect()
}

async fn interrupt_cancels_active_run_and_goes_next(scene: Scene) {
    let gateway = scene.gateway().await;
    gateway.say(SCOPE, "hello").await;
    let (mut active, _) = begin(&gateway, "enqueue", "a long story [[sim: silent_after=3]]").await;
    deltas(&mut active, 3).await;
    let (waiting, first) = begin(&gateway, "enqueue", "and I wait").await;
    assert_eq!(
        (first.name.as_str(), &first.data["position"]),
        ("run.queued", &json!(1))
    );
    let (urgent, first) = begin(&gateway, "interrupt", "stop that").await;
    assert_eq!(
        (first.name.as_str(), &first.data["position"]),
        ("run.queued", &json!(1)),
        "the interrupting run is next"
    );

    let active = active.rest().await;
    assert_eq!(last(&active).0, "run.cancelled");
    assert_eq!(last(&active).1["error"], Value::Null);
    let partial = text(&active[active.len() - 2].data["message"]).to_owned();
    let (urgent, waiting) = (urgent.rest().await, waiting.rest().await);
    assert_eq!(
        (last(&urgent).0, last(&waiting).0),
        ("run.completed", "run.completed")
    );

    let said = said(&gateway).await;
    let cancelled = json!("cancelled");
    let wanted = [
        (
            "user",
            "a long story [[sim: silent_after=3]]".to_owned(),
            &cancelled,
        ),
        ("assistant", partial, &cancelled),
        ("user", "stop that".to_owned(), &Value::Null),
        ("assistant", text_of(&urgent), &Value::Null),
        ("user", "and I wait".to_owned(), &Value::Null),
        ("assistant", text_of(&waiting), &Value::Null),
    ];
    let shown: Vec<_> = said[2..]
        .iter()
        .map(|(role, text, why)| (role.as_str(), text.clone(), why))
        .collect();
    assert_eq!(
        shown, wanted,
        "nothing is lost, and the interrupted reply is marked"
    );
    assert!(
        text_of(&urgent).contains("turn 3 of"),
        "the model knows the interrupted message: {urgent:#?}"
    );
    assert_same(&scene, &gateway, SCOPE).await;
}

async fn interrupt_ends_wait_for_tool_outputs(scene: Scene) {
    let gateway = scene.gateway().await;
    let asks = gateway
        .say(SCOPE, "weather? [[sim: tool=get_weather]]")
        .await;
    assert_eq!(asks["run"]["status"], "requires_action");
    let answer = post(&gateway, "interrupt", "never mind").await.ok();
    assert_eq!(answer["run"]["status"], "completed");
    let run = asks["run"]["id"].as_str().unwrap();
    assert_eq!(
        gateway.get(&format!("{SCOPE}/runs/{run}")).await.ok()["run"]["status"],
        "cancelled"
    );
    assert!(text(&answer["message"]).contains("never mind"));
    assert_same(&scene, &gateway, SCOPE).await;
}

async fn rollback_removes_messages_locally_and_upstream(scene: Scene) {
    let gateway = scene.gateway().await;
    let hello = gateway.say(SCOPE, "hello").await;
    let (mut active, started) =
        begin(&gateway, "enqueue", "a long story [[sim: silent_after=3]]").await;
    deltas(&mut active, 3).await;
    let (waiting, _) = begin(&gateway, "enqueue", "and I wait").await;
    let (instead, first) = begin(&gateway, "rollback", "a short one").await;
    assert_eq!(
        (first.name.as_str(), &first.data["position"]),
        ("run.queued", &json!(1))
    );
    let active = active.rest().await;
    assert_eq!(last(&active).0, "run.cancelled");
    assert_eq!(last(&active).1["rolled_back"], true);
    let (instead, waiting) = (instead.rest().await, waiting.rest().await);

    let wanted = [
        ("user".to_owned(), "hello".to_owned()),
        ("assistant".to_owned(), text(&hello["message"]).to_owned()),
        ("user".to_owned(), "a short one".to_owned()),
        ("assistant".to_owned(), text_of(&instead)),
        ("user".to_owned(), "and I wait".to_owned()),
        ("assistant".to_owned(), text_of(&waiting)),
    ];
    assert_eq!(transcript(&gateway, SCOPE).await, wanted);
    assert!(
        text_of(&instead).contains("turn 2 of"),
        "the model does not know the removed message: {instead:#?}"
    );
    assert_same(&scene, &gateway, SCOPE).await;
    // The run itself can still be read, without its messages.
    let run = started.data["run_id"].as_str().unwrap();
    let read = gateway.get(&format!("{SCOPE}/runs/{run}")).await.ok();
    assert_eq!(
        (&read["run"]["status"], &read["run"]["rolled_back"]),
        (&json!("cancelled"), &json!(true))
    );
    assert_eq!(read["message"], Value::Null);
    assert_eq!(
        gateway.get(&format!("{SCOPE}/thread")).await.ok()["message_count"],
        6
    );
}

async fn rollback_rebuilds_thread_when_messages_are_undeletable(scene: Scene) {
    let gateway = scene.gateway().await;
    gateway.say(SCOPE, "hello").await;
    for fault in ["status=405 wording=detail", "status=404 wording=detail"] {
        for on in ["delete_item", "delete_message"] {
            scene.fault(on, fault, 1000);
        }
        let (mut active, _) = begin(&gateway, "enqueue", "a needle [[sim: silent_after=3]]").await;
        deltas(&mut active, 3).await;
        let (instead, _) = begin(&gateway, "rollback", "a short one").await;
        assert_eq!(last(&active.rest().await).0, "run.cancelled");
        let instead = instead.rest().await;
        assert_eq!(last(&instead).0, "run.completed", "{fault}: {instead:#?}");
        scene.simulator.clear_faults();
        gateway.say(SCOPE, "and on").await;
        assert_same(&scene, &gateway, SCOPE).await;
    }
}

async fn rollback_removes_reasoning_items(scene: Scene) {
    let gateway = scene.gateway().await;
    gateway.say(SCOPE, "hello").await;
    let reasoning = if scene.protocol == Protocol::Assistants {
        ""
    } else {
        "reasoning "
    };
    let asks = gateway
        .say(
            SCOPE,
            &format!("weather? [[sim: {reasoning}tool=get_weather]]"),
        )
        .await;
    assert_eq!(asks["run"]["status"], "requires_action");
    let answer = post(&gateway, "rollback", "hello again").await.ok();
    assert!(text(&answer["message"]).contains("turn 2 of"), "{answer:#}");
    assert_same(&scene, &gateway, SCOPE).await;
    if scene.protocol == Protocol::Responses {
        let deleted = scene.simulator.stats().requests_by_operation["delete_item"];
        assert_eq!(deleted, 3, "message, reasoning and function call");
    }
    gateway.say(SCOPE, "and on").await;
}

async fn merge_joins_last_queued_run(scene: Scene) {
    let gateway = scene.gateway().await;
    gateway.say(SCOPE, "hello").await;
    scene.simulator.hold();
    let (active, _) = begin(&gateway, "enqueue", "first").await;
    let (waiting, queued) = begin(&gateway, "merge", "second").await;
    assert_eq!(
        queued.name, "run.queued",
        "without a queued run the message waits in its own"
    );
    let (third, first) = begin(&gateway, "merge", "third").await;
    assert_eq!(
        first.data["run_id"], queued.data["run_id"],
        "both callers get the run"
    );
    let body = json!({"content": "fourth", "multitask_strategy": "merge"});
    let path = format!("{SCOPE}/messages");
    let fourth = gateway.post(&path, &body);
    // The run must not start before both messages have joined it: it shows three then.
    let (fourth, ()) = tokio::join!(fourth, async {
        let started = std::time::Instant::now();
        while scene.database.number(MERGED).await != 3 {
            assert!(started.elapsed() < PATIENCE, "the messages never joined");
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        scene.simulator.release();
    });
    let fourth = fourth.ok();
    let (active, waiting, third) = (
        active.rest().await,
        waiting.rest().await,
        third.rest().await,
    );
    assert_eq!(last(&active).0, "run.completed");
    assert_eq!(last(&waiting), last(&third));
    assert_eq!(&fourth["run"], last(&waiting).1);
    assert!(
        text_of(&third).contains("fourth"),
        "the reply is to the newest message: {third:#?}"
    );
    let said: Vec<_> = transcript(&gateway, SCOPE)
        .await
        .into_iter()
        .skip(4)
        .collect();
    let user = |text: &str| ("user".to_owned(), text.to_owned());
    assert_eq!(said[..3], [user("second"), user("third"), user("fourth")]);
    assert_eq!(said[3], ("assistant".to_owned(), text_of(&waiting)));
    assert_eq!(said.len(), 4);
    assert_same(&scene, &gateway, SCOPE).await;
    assert_eq!(scene.simulator.stats().runs_started, 3);
}

/// SQL for the number of queued messages in all runs.
const MERGED: &str = "SELECT COALESCE(SUM(LENGTH(CAST(queued_input AS TEXT)) - LENGTH(REPLACE(CAST(queued_input AS TEXT), 'msg_', ''))), 0) / 4 \
     FROM runs WHERE status = 'queued'";

async fn merge_with_different_metadata_starts_own_run(scene: Scene) {
    let gateway = scene.gateway().await;
    gateway.say(SCOPE, "hello").await;
    scene.simulator.hold();
    let (active, _) = begin(&gateway, "enqueue", "first").await;
    let (waiting, queued) = begin(&gateway, "enqueue", "second").await;
    let body = json!({"content": "third", "multitask_strategy": "merge", "stream": true, "metadata": {"a": "b"}});
    let request = gateway
        .request(reqwest::Method::POST, &format!("{SCOPE}/messages"))
        .json(&body);
    let mut other = EventReader::new(request.send().await.unwrap());
    let own = other.next().await.unwrap();
    assert_ne!(
        own.data["run_id"], queued.data["run_id"],
        "its metadata would be lost"
    );
    assert_eq!(own.data["position"], 2);
    scene.simulator.release();
    for stream in [active, waiting, other] {
        assert_eq!(last(&stream.rest().await).0, "run.completed");
    }
    assert_same(&scene, &gateway, SCOPE).await;
}

async fn every_strategy_starts_immediately_on_idle_thread(scene: Scene) {
    let gateway = scene.gateway().await;
    for strategy in ["enqueue", "reject", "interrupt", "rollback", "merge"] {
        let answer = post(&gateway, strategy, strategy).await.ok();
        assert_eq!(answer["run"]["status"], "completed");
        assert_eq!(answer["run"]["multitask_strategy"], strategy);
        assert!(text(&answer["message"]).contains(strategy));
    }
    assert_eq!(
        gateway.get(&format!("{SCOPE}/thread")).await.ok()["message_count"],
        10
    );
    assert_same(&scene, &gateway, SCOPE).await;
}

async fn later_interrupt_goes_before_earlier_one(scene: Scene) {
    // The cancel of the first run takes long, so that both interrupts arrive during it. With a
    // shared store they use two processes.
    let gateway = scene
        .gateway_with("[replica]\nsession_ttl = \"1500ms\"\n")
        .await;
    let other = match scene.backend {
        Backend::Postgres => Some(
            scene
                .gateway_with("[replica]\nsession_ttl = \"1500ms\"\n")
                .await,
        ),
        Backend::Sqlite => None,
    };
    gateway.say(SCOPE, "hello").await;
    let (mut active, _) = begin(&gateway, "enqueue", "a long story [[sim: silent_after=2]]").await;
    deltas(&mut active, 2).await;
    let second = other.as_ref().unwrap_or(&gateway);
    let (one, two) = tokio::join!(begin(second, "interrupt", "one"), async {
        // This message is recorded after the other one.
        while scene.database.number("SELECT count(*) FROM runs").await < 3 {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
        begin(&gateway, "interrupt", "two").await
    });
    assert_eq!(last(&active.rest().await).0, "run.cancelled");
    let (one, two) = (one.0.rest().await, two.0.rest().await);
    // If the first interrupt started before the second arrived, it was interrupted itself.
    // Otherwise it waits behind the second.
    let ends = (last(&one).0, last(&two).0);
    assert!(
        matches!(ends, ("run.completed" | "run.cancelled", "run.completed")),
        "{ends:?}"
    );
    gateway.say(SCOPE, "and now?").await;
    assert_same(&scene, &gateway, SCOPE).await;
    let unfinished = "SELECT count(*) FROM runs WHERE finished_at IS NULL";
    assert_eq!(scene.database.number(unfinished).await, 0);
}

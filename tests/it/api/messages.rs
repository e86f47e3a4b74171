//! A message becomes a run on the right thread and a reply.

use std::collections::BTreeMap;

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::gateway::{Event, Gateway, text, text_of};
use crate::support::recording_proxy::DatabaseTap;
use crate::support::scene::{
    Backend, Protocol, Scene, on_each_protocol, on_each_store, on_every_scene,
};

on_every_scene!(
    conversation_remembers_earlier_messages_after_restart,
    message_on_known_thread_costs_one_upstream_call
);
on_each_protocol!(
    stream_events_describe_complete_run,
    thread_ownership_is_sent_as_upstream_metadata,
    content_parts_reach_the_upstream,
    half_of_a_pair_is_taken_as_replacement_character,
    expired_session_starts_fresh_thread,
    disconnecting_client_does_not_stop_run,
);
on_each_store!(
    user_session_and_topic_keys_are_separate_conversations,
    transcript_can_be_paged,
    runs_can_be_listed_and_read,
    respond_async_returns_before_run_ends,
);

async fn user_session_and_topic_keys_are_separate_conversations(scene: Scene) {
    let gateway = scene.gateway().await;
    let mut threads = Vec::new();
    for (scope, shown, expires) in [
        ("/v1/users/al%2Fice%7C%C3%A9", "user", false),
        (
            "/v1/users/al%2Fice%7C%C3%A9/sessions/s%201",
            "session:s 1",
            true,
        ),
        (
            "/v1/users/al%2Fice%7C%C3%A9/topics/s%201",
            "topic:s 1",
            false,
        ),
    ] {
        let answer = gateway.say(scope, "Hello").await;
        assert_eq!(
            answer["thread"]["key"],
            json!({"tenant": "default", "user": "al/ice|é", "scope": shown})
        );
        assert_eq!(answer["thread"]["expires_at"].is_string(), expires);
        assert_eq!(answer["thread"]["state"], "idle");
        assert_eq!(answer["thread"]["queue_depth"], 0);
        assert_eq!(answer["thread"]["message_count"], 2);
        assert_eq!(answer["thread"]["run_count"], 1);
        assert_eq!(answer["run"]["status"], "completed");
        assert!(answer["run"]["usage"]["total_tokens"].as_u64().unwrap() > 0);
        assert_eq!(answer["message"]["run_id"], answer["run"]["id"]);
        assert!(text(&answer["message"]).contains("Hello"));
        let mut shown = gateway.get(&format!("{scope}/thread")).await.ok();
        let fields = shown.as_object_mut().unwrap();
        assert_eq!(
            fields.remove("last_run").unwrap()["id"],
            answer["run"]["id"]
        );
        fields.retain(|name, _| answer["thread"].get(name).is_some());
        assert_eq!(
            shown, answer["thread"],
            "another request reads the same answer"
        );
        threads.push(answer["thread"]["id"].clone());
    }
    threads.dedup();
    assert_eq!(threads.len(), 3);
}

async fn conversation_remembers_earlier_messages_after_restart(scene: Scene) {
    let gateway = scene.gateway().await;
    let first = gateway.say("/v1/users/alice", "one").await;
    let second = gateway.say("/v1/users/alice", "two").await;
    assert_eq!(first["thread"]["id"], second["thread"]["id"]);
    assert_ne!(text(&first["message"]), text(&second["message"]));
    assert!(
        text(&second["message"]).contains("turn 2"),
        "the upstream got both messages: {second:#}"
    );
    gateway.kill();
    let again = scene.gateway().await;
    let third = again.say("/v1/users/alice", "three").await;
    assert_eq!(first["thread"]["id"], third["thread"]["id"]);
    assert!(
        text(&third["message"]).contains("turn 3"),
        "the conversation survives a restart: {third:#}"
    );
}

async fn stream_events_describe_complete_run(scene: Scene) {
    let gateway = scene.gateway().await;
    let events = gateway
        .stream("/v1/users/alice", "Hello [[sim: tokens=30]]")
        .await
        .rest()
        .await;
    let names: Vec<_> = events
        .iter()
        .map(|e| e.name.as_str())
        .filter(|name| *name != "message.delta")
        .collect();
    assert_eq!(names, ["run.started", "message.completed", "run.completed"]);
    let run = events[0].data["run_id"].as_str().unwrap();
    // A delta counts its bytes, any other event one. Number 0 would mean a queued run.
    let mut n = 0;
    for event in &events {
        n += event.data["text"].as_str().map_or(1, str::len);
        assert_eq!(event.id, format!("{run}:{n}"));
    }
    let message = &events[events.len() - 2].data["message"];
    assert_eq!(text_of(&events), text(message));
    assert!(
        events.iter().filter(|e| e.name == "message.delta").count() >= 30,
        "the reply arrives in pieces"
    );
    let end = &events.last().unwrap().data["run"];
    let read = gateway
        .get(&format!("/v1/users/alice/runs/{run}"))
        .await
        .ok();
    assert_eq!(
        (&read["run"], &read["message"]),
        (end, message),
        "the announced message can be read"
    );

    // The same by content negotiation, on a busy thread.
    scene.simulator.hold();
    let mut blocking = gateway.stream("/v1/users/alice", "first").await;
    assert_eq!(blocking.next().await.unwrap().name, "run.started");
    let request = gateway
        .request(Method::POST, "/v1/users/alice/messages")
        .json(&json!({"content": "second"}));
    let response = request
        .header("accept", "text/event-stream")
        .send()
        .await
        .unwrap();
    let mut waiting = crate::support::gateway::EventReader::new(response);
    let queued = waiting.next().await.unwrap();
    assert_eq!(
        (queued.name.as_str(), &queued.data["position"]),
        ("run.queued", &json!(1))
    );
    scene.simulator.release();
    assert_eq!(blocking.rest().await.last().unwrap().name, "run.completed");
    let rest = waiting.rest().await;
    assert_eq!(rest[0].name, "run.started");
    assert_eq!(rest.last().unwrap().name, "run.completed");
}

async fn transcript_can_be_paged(scene: Scene) {
    let gateway = scene.gateway().await;
    for n in 0..4 {
        gateway
            .say("/v1/users/alice", &format!("message {n}"))
            .await;
    }
    let read = async |query: &str| {
        let page = gateway
            .get(&format!("/v1/users/alice/messages?{query}"))
            .await
            .ok();
        let texts: Vec<_> = page["data"]
            .as_array()
            .unwrap()
            .iter()
            .map(|m| (m["position"].as_u64().unwrap(), text(m).to_owned()))
            .collect();
        (texts, page)
    };
    let (all, page) = read("order=asc&limit=100").await;
    assert_eq!(
        all.iter()
            .map(|(position, _)| *position)
            .collect::<Vec<_>>(),
        (1..=8).collect::<Vec<_>>()
    );
    assert_eq!(page["has_more"], false);
    for (n, (_, text)) in all.iter().enumerate() {
        assert!(text.contains(&format!("message {}", n / 2)), "{all:?}");
    }
    let (head, page) = read("order=asc&limit=3").await;
    assert_eq!(
        (&head[..], page["has_more"].as_bool()),
        (&all[..3], Some(true))
    );
    let (next, _) = read(&format!(
        "order=asc&limit=3&after={}",
        page["last_id"].as_str().unwrap()
    ))
    .await;
    assert_eq!(next, all[3..6]);
    let (newest, page) = read("limit=2").await;
    assert_eq!(
        newest,
        [all[7].clone(), all[6].clone()],
        "the newest comes first by default"
    );
    let (older, page) = read(&format!(
        "limit=2&after={}",
        page["last_id"].as_str().unwrap()
    ))
    .await;
    assert_eq!(older, [all[5].clone(), all[4].clone()]);
    let (back, _) = read(&format!(
        "limit=2&before={}",
        page["first_id"].as_str().unwrap()
    ))
    .await;
    assert_eq!(back, [all[7].clone(), all[6].clone()]);
    let unknown = gateway
        .get("/v1/users/alice/messages?after=msg_00000000000000000000000000000000")
        .await;
    assert_eq!(unknown.problem(), (422, "invalid-request"));
}

async fn runs_can_be_listed_and_read(scene: Scene) {
    let gateway = scene.gateway().await;
    let body = json!({"content": "hi", "metadata": {"source": "web"}, "multitask_strategy": "reject", "timeout_ms": 5000});
    let first = gateway.post("/v1/users/alice/messages", &body).await.ok();
    let second = gateway.say("/v1/users/alice", "there").await;
    assert_eq!(first["run"]["metadata"], json!({"source": "web"}));
    assert_eq!(first["run"]["multitask_strategy"], "reject");
    let list = gateway.get("/v1/users/alice/runs").await.ok();
    assert_eq!(list["data"], json!([second["run"], first["run"]]));
    assert_eq!(list["first_id"], second["run"]["id"]);
    let other = gateway
        .get(&format!(
            "/v1/users/bob/runs/{}",
            first["run"]["id"].as_str().unwrap()
        ))
        .await;
    assert_eq!(
        other.problem(),
        (404, "not-found"),
        "a run can be read under its own key only"
    );
}

async fn thread_ownership_is_sent_as_upstream_metadata(scene: Scene) {
    let gateway = scene.gateway_upstream("send_identifiers = true").await;
    let long = "é".repeat(128);
    // The message has as many pairs as a caller may send. With the gateway's own pairs it reaches
    // the upstream's limit exactly.
    let pairs: serde_json::Map<_, _> = (0..10)
        .map(|n| (n.to_string(), json!("x".repeat(512))))
        .collect();
    let path = format!("/v1/users/{long}/sessions/tab");
    let answer = gateway
        .post(
            &format!("{path}/messages"),
            &json!({"content": "hi", "metadata": pairs}),
        )
        .await
        .ok();
    let metadata: BTreeMap<String, String> = if scene.protocol == Protocol::Chain {
        // A chain has no object upstream, so its responses have the metadata.
        serde_json::from_value(scene.simulator.recorded().pop().unwrap().body["metadata"].clone())
            .unwrap()
    } else {
        let thread = scene.simulator.threads().remove(0);
        assert_eq!(
            thread.id,
            answer["thread"]["upstream_thread_id"].as_str().unwrap()
        );
        thread.metadata
    };
    assert_eq!(metadata["threadkeeper_user"], long);
    assert_eq!(metadata["threadkeeper_session"], "tab");
    assert_eq!(
        metadata["threadkeeper_thread"],
        answer["thread"]["id"].as_str().unwrap()
    );
    assert!(metadata.contains_key("threadkeeper_expires_at"));
}

async fn content_parts_reach_the_upstream(scene: Scene) {
    let gateway = scene.gateway().await;
    let parts = json!([
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "https://example.com/cat.png", "detail": "low"}},
        {"type": "image_file", "image_file": {"file_id": "file-1"}},
        {"type": "file", "file": {"file_id": "file-2", "filename": "bill.pdf"}},
    ]);
    let answer = gateway
        .post("/v1/users/alice/messages", &json!({"content": parts}))
        .await
        .ok();
    assert!(text(&answer["message"]).contains("What is this?"));
    let transcript = gateway.get("/v1/users/alice/messages?order=asc").await.ok();
    assert_eq!(transcript["data"][0]["content"], parts);
    let sent = scene.simulator.recorded().pop().unwrap().body.to_string();
    assert!(
        ["https://example.com/cat.png", "file-1", "file-2"]
            .iter()
            .all(|it| sent.contains(it)),
        "{sent}"
    );
    assert!(
        sent.contains("Be kind."),
        "the instructions are sent: {sent}"
    );
    for source in ["file_url", "file_data"] {
        let content = json!([{"type": "file", "file": {source: "data:application/pdf;base64,AA"}}]);
        let answer = gateway
            .post("/v1/users/alice/messages", &json!({"content": content}))
            .await;
        if scene.protocol == Protocol::Assistants {
            assert_eq!(answer.problem(), (422, "invalid-request"));
        } else {
            answer.ok();
            let sent = scene.simulator.recorded().pop().unwrap().body.to_string();
            assert!(
                sent.contains(source) && sent.contains("input_file"),
                "{sent}"
            );
        }
    }
}

async fn half_of_a_pair_is_taken_as_replacement_character(scene: Scene) {
    let gateway = scene.gateway().await;
    let send = |body: &'static str| {
        let request = gateway
            .request(Method::POST, "/v1/users/alice/messages")
            .header("content-type", "application/json")
            .header("idempotency-key", "once")
            .body(body);
        gateway.send(request)
    };
    let first = send(r#"{"content":"cut off \ud83d","metadata":{"a":"\ude00"}}"#)
        .await
        .ok();
    assert!(
        text(&first["message"]).contains("cut off \u{fffd}"),
        "{first:#}"
    );
    assert_eq!(first["run"]["metadata"]["a"], "\u{fffd}");
    let again = send(r#"{"content":"cut off \ufffd","metadata":{"a":"\ufffd"}}"#)
        .await
        .ok();
    assert_eq!(again["run"]["id"], first["run"]["id"]);
}

async fn message_on_known_thread_costs_one_upstream_call(scene: Scene) {
    let gateway = scene.gateway().await;
    gateway.say("/v1/users/alice", "first").await;
    let before = scene.simulator.stats().requests;
    gateway.say("/v1/users/alice", "second").await;
    assert_eq!(scene.simulator.stats().requests - before, 1);
}

async fn expired_session_starts_fresh_thread(scene: Scene) {
    let gateway = scene.gateway().await;
    let scope = "/v1/users/alice/sessions/tab";
    let first = gateway.say(scope, "one").await;
    scene
        .database
        .age_threads(std::time::Duration::from_hours(24))
        .await;
    let second = gateway.say(scope, "two").await;
    assert_ne!(first["thread"]["id"], second["thread"]["id"]);
    assert_eq!(second["thread"]["previous_thread"], first["thread"]["id"]);
    assert!(
        text(&second["message"]).contains("turn 1"),
        "the fresh thread knows nothing of the old one: {second:#}"
    );
    let run = gateway
        .get(&format!(
            "{scope}/runs/{}",
            first["run"]["id"].as_str().unwrap()
        ))
        .await
        .ok();
    assert_eq!(
        run["message"], first["message"],
        "the old thread's messages can still be read"
    );
}

async fn disconnecting_client_does_not_stop_run(scene: Scene) {
    let gateway = scene.gateway().await;
    scene.simulator.hold();
    let mut leaver = gateway.stream("/v1/users/alice", "bye").await;
    let run = leaver.next().await.unwrap().data["run_id"]
        .as_str()
        .unwrap()
        .to_owned();
    drop(leaver);
    scene.simulator.release();
    let path = format!("/v1/users/alice/runs/{run}");
    let done = gateway
        .until(&path, |answer| answer.body["run"]["status"] == "completed")
        .await
        .ok();
    assert!(text(&done["message"]).contains("bye"));
}

async fn respond_async_returns_before_run_ends(scene: Scene) {
    let gateway = scene.gateway().await;
    let scope = "/v1/users/al%2Fice/topics/messages";
    let post = async |prefer: &str, text: &str| {
        let request = gateway
            .request(Method::POST, &format!("{scope}/messages"))
            .header("prefer", prefer);
        let body = json!({"content": text, "on_disconnect": "cancel"});
        gateway.send(request.json(&body)).await
    };
    scene.simulator.hold();
    for prefer in ["respond-async", "wait=0"] {
        let answer = post(prefer, "hello").await;
        assert_eq!(answer.status, 202, "{:#}", answer.body);
        assert_eq!(answer.headers["preference-applied"], prefer);
        assert_eq!(
            (&answer.body["message"], &answer.body["thread"]["state"]),
            (&Value::Null, &json!("active"))
        );
        let place = answer.headers["location"].to_str().unwrap();
        assert_eq!(
            place,
            format!(
                "{scope}/runs/{}",
                answer.body["run"]["id"].as_str().unwrap()
            )
        );
        let run = gateway.get(place).await.ok();
        assert!(
            ["queued", "in_progress"].contains(&run["run"]["status"].as_str().unwrap()),
            "{run:#}"
        );
    }
    scene.simulator.release();
    let runs = gateway
        .until(&format!("{scope}/runs"), |answer| {
            answer.body["data"]
                .as_array()
                .is_some_and(|runs| runs.iter().all(|run| run["status"] == "completed"))
        })
        .await;
    assert_eq!(
        runs.body["data"].as_array().map(Vec::len),
        Some(2),
        "leaving after a 202 is no disconnect"
    );
    let in_time = post("wait=50", "and now?").await;
    assert!(
        text(&in_time.ok()["message"]).contains("turn 3"),
        "the answer came at once"
    );
}

/// Round trips are counted on the wire, so that the driver's own ones count.
#[tokio::test(flavor = "multi_thread")]
async fn message_on_known_thread_costs_two_store_round_trips() {
    let scene = Scene::new(Protocol::Responses, Backend::Postgres).await;
    let tap = DatabaseTap::on(&scene.database.url()).await;
    // A renewal of the session would count, too.
    let config = scene
        .config("[replica]\nsession_ttl = \"1h\"\n")
        .replace(&scene.database.url(), &tap.url);
    let gateway = Gateway::start(&config).await;
    for n in 0..8 {
        gateway
            .say(
                "/v1/users/alice",
                &format!("number {n}, so that every statement is prepared"),
            )
            .await;
    }
    // Background work, such as the look for orphans each second, may add a round trip to some
    // messages.
    let mut least = usize::MAX;
    for _ in 0..5 {
        let before = tap.round_trips();
        gateway.say("/v1/users/alice", "what does this cost?").await;
        least = least.min(tap.round_trips() - before);
    }
    assert_eq!(least, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_stream_is_kept_alive_with_comments() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let gateway = scene
        .gateway_with("[server]\nstream_keep_alive = \"20ms\"\n")
        .await;
    let mut stream = gateway
        .stream("/v1/users/alice", "wait [[sim: latency=300ms]]")
        .await;
    let mut events: Vec<Event> = Vec::new();
    while let Some(event) = stream.next().await {
        events.push(event);
    }
    assert!(stream.comments >= 3, "{} comments", stream.comments);
    assert_eq!(events.last().unwrap().name, "run.completed");
}

#[tokio::test(flavor = "multi_thread")]
async fn chosen_assistant_pins_conversation_to_its_upstream() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let other = Scene::new(Protocol::Assistants, Backend::Sqlite).await;
    let more = format!(
        "[upstreams.other]\nkind = \"assistants\"\nbase_url = \"{}\"\napi_key = \"k\"\nheaders = {{ x-team = \"blue\" }}\nquery = {{ api-version = \"v1\" }}\n\
         [assistants.poet]\nupstream = \"other\"\nassistant_id = \"asst_poet\"\nparameters = {{ temperature = 0.5 }}\n",
        other.upstream_url
    );
    let gateway = scene.gateway_with(&more).await;
    let body = |assistant: &str| json!({"content": "hi", "assistant": assistant});
    let answer = gateway
        .post("/v1/users/alice/messages", &body("poet"))
        .await
        .ok();
    assert_eq!(answer["thread"]["upstream"], "other");
    let start = other.simulator.recorded().pop().unwrap();
    assert_eq!(start.headers["x-team"], "blue");
    assert_eq!(start.headers["openai-beta"], "assistants=v2");
    assert_eq!(start.query.as_deref(), Some("api-version=v1"));
    assert_eq!(
        (&start.body["assistant_id"], &start.body["temperature"]),
        (&json!("asst_poet"), &json!(0.5))
    );
    let refused = gateway
        .post("/v1/users/alice/messages", &body("default"))
        .await;
    assert_eq!(refused.problem(), (422, "invalid-request"));
    let unknown = gateway
        .post("/v1/users/alice/messages", &body("nobody"))
        .await;
    assert_eq!(unknown.problem(), (422, "invalid-request"));
    assert!(
        unknown.body["detail"].as_str().unwrap().contains("poet"),
        "the refusal lists the assistants"
    );
    let runs = gateway.get("/v1/users/alice/runs").await.ok();
    assert_eq!(
        runs["data"].as_array().map(Vec::len),
        Some(1),
        "a refused message leaves nothing: {runs:#}"
    );
}

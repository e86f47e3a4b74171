//! Conversations and responses.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use threadkeeper::simulator::{Fault, SimulatorConfig};

use crate::support::wire::{Sim, Stream, id, names};

fn response_request(conversation: &str, text: &str) -> Value {
    json!({"model": "m", "conversation": conversation, "input": text})
}

fn streamed(mut body: Value) -> Value {
    body["stream"] = true.into();
    body
}

fn background(mut body: Value) -> Value {
    body["background"] = true.into();
    body
}

/// The text of a finished response.
fn text(response: &Value) -> &str {
    response["output"][0]["content"][0]["text"]
        .as_str()
        .unwrap_or_else(|| panic!("{response} has no text"))
}

#[tokio::test]
async fn plain_response_streams_in_documented_order() {
    let sim = Sim::instant().await;
    let conversation = sim.conversation().await;
    let mut stream = sim
        .open(
            "/responses",
            &streamed(response_request(&conversation, "Hello")),
        )
        .await;
    assert!(stream.content_type.starts_with("text/event-stream"));
    let events = stream.rest().await.unwrap();
    assert_eq!(
        names(&events),
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
    );
    for (n, event) in events.iter().enumerate() {
        assert_eq!(
            (
                event.json()["sequence_number"].as_u64(),
                &event.json()["type"]
            ),
            (Some(n as u64), &json!(event.name))
        );
    }
    let last = events.last().unwrap().json();
    assert_eq!(
        text(&last["response"]),
        "You said: Hello. (This is turn 1 of this conversation.)"
    );
    let deltas = events
        .iter()
        .filter(|event| event.name == "response.output_text.delta");
    let streamed: String = deltas
        .map(|event| event.json()["delta"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(streamed, text(&last["response"]));
    let next = sim
        .post("/responses", response_request(&conversation, "Again"))
        .await;
    assert_eq!(
        text(&next),
        "You said: Again. (This is turn 2 of this conversation.)"
    );
    assert_eq!(sim.handle.thread_history(&conversation).len(), 4);
    let items = sim
        .get(&format!("/conversations/{conversation}/items?order=asc"))
        .await;
    let roles: Vec<&Value> = items["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| &item["role"])
        .collect();
    assert_eq!(roles, ["user", "assistant", "user", "assistant"]);
}

#[tokio::test]
async fn response_chain_keeps_history() {
    let sim = Sim::instant().await;
    let first = sim
        .post("/responses", json!({"model": "m", "input": "One"}))
        .await;
    let body = json!({"model": "m", "input": "Two", "previous_response_id": id(&first)});
    let second = sim.post("/responses", body.clone()).await;
    assert_eq!(
        text(&second),
        "You said: Two. (This is turn 2 of this conversation.)"
    );
    assert_eq!(second["previous_response_id"], first["id"]);
    let users = sim.handle.thread_history(&id(&second));
    assert_eq!(users.iter().filter(|(role, _)| role == "user").count(), 2);
    let unstored = sim
        .post(
            "/responses",
            json!({"model": "m", "input": "x", "store": false}),
        )
        .await;
    let (status, error) = sim
        .refused(
            "/responses",
            json!({"model": "m", "input": "y", "previous_response_id": id(&unstored)}),
        )
        .await;
    assert_eq!(status, 400);
    assert_eq!(
        (error["code"].as_str(), error["param"].as_str()),
        (
            Some("previous_response_not_found"),
            Some("previous_response_id")
        )
    );
    let mut both = body;
    both["conversation"] = sim.conversation().await.into();
    let (status, error) = sim.refused("/responses", both).await;
    assert_eq!(
        (status, error["code"].as_str()),
        (400, Some("mutually_exclusive_parameters"))
    );
}

#[tokio::test]
async fn busy_conversation_is_locked_without_naming_response() {
    let sim = Sim::instant().await;
    let conversation = sim.conversation().await;
    sim.handle.hold();
    let running = id(&sim
        .post(
            "/responses",
            background(response_request(&conversation, "One")),
        )
        .await);
    for (path, body) in [
        (
            "/responses".to_owned(),
            response_request(&conversation, "Two"),
        ),
        (
            format!("/conversations/{conversation}/items"),
            json!({"items": [{"role": "user", "content": "x"}]}),
        ),
    ] {
        let (status, error) = sim.refused(&path, body).await;
        assert_eq!(status, 400);
        assert_eq!(
            (error["code"].as_str(), error["param"].as_str()),
            (Some("conversation_locked"), Some("conversation"))
        );
        assert!(!error["message"].as_str().unwrap().contains(&running));
    }
    sim.handle.release();
    let stats = sim.wait_for(|stats| stats.active_runs == 0).await;
    assert_eq!(
        (stats.lock_refusals, stats.max_active_runs_per_thread),
        (2, 1)
    );
    sim.post("/responses", response_request(&conversation, "Two"))
        .await;

    let run = sim.handle.start_foreign_run(&conversation).unwrap();
    assert!(run.starts_with("resp_"));
    assert_eq!(
        sim.refused("/responses", response_request(&conversation, "Three"))
            .await
            .1["code"],
        "conversation_locked"
    );
    assert!(sim.handle.stop_foreign_run(&conversation));
    sim.post("/responses", response_request(&conversation, "Three"))
        .await;
}

#[tokio::test]
async fn conversation_lock_can_outlive_response() {
    let sim = Sim::start(SimulatorConfig {
        lock_linger: Duration::from_millis(300),
        ..SimulatorConfig::default()
    })
    .await;
    let conversation = sim.conversation().await;
    sim.post("/responses", response_request(&conversation, "One"))
        .await;
    let mut refusals = 0;
    loop {
        match sim
            .send(
                Method::POST,
                "/responses",
                Some(&response_request(&conversation, "Two")),
            )
            .await
        {
            (200, _) => break,
            (status, answer) => {
                assert_eq!(
                    (status, answer["error"]["code"].as_str()),
                    (400, Some("conversation_locked"))
                );
                refusals += 1;
            }
        }
    }
    assert!(refusals > 0);
}

#[tokio::test]
async fn disconnect_abandons_foreground_response() {
    let sim = Sim::instant().await;
    let conversation = sim.conversation().await;
    for stream in [true, false] {
        sim.handle.hold();
        let mut body = response_request(&conversation, "Goodbye");
        body["stream"] = stream.into();
        let request = sim.request(Method::POST, "/responses").json(&body).send();
        let started = sim.handle.stats().runs_started;
        tokio::select! {
            answer = request => {
                // The head of the stream arrives at once, its end does not.
                assert!(stream);
                drop(answer.unwrap());
            }
            _ = sim.wait_for(|stats| stats.runs_started == started + 1), if !stream => {}
        }
        sim.wait_for(|stats| stats.active_runs == 0).await;
        assert_eq!(sim.handle.thread_history(&conversation), []);
        sim.handle.release();
    }
    assert_eq!(sim.handle.stats().runs_ended["abandoned"], 2);
    let next = sim
        .post("/responses", response_request(&conversation, "Hello again"))
        .await;
    assert_eq!(
        text(&next),
        "You said: Hello again. (This is turn 1 of this conversation.)"
    );
}

#[tokio::test]
async fn append_unfinished_keeps_failed_response() {
    let sim = Sim::start(SimulatorConfig {
        append_unfinished: true,
        ..SimulatorConfig::default()
    })
    .await;
    let conversation = sim.conversation().await;
    assert_eq!(
        sim.post(
            "/responses",
            response_request(&conversation, "Bad [[sim: fail]]")
        )
        .await["status"],
        "failed"
    );
    assert_eq!(sim.handle.threads()[0].user_texts, ["Bad [[sim: fail]]"]);
}

#[tokio::test]
async fn unanswered_function_call_blocks_conversation() {
    let sim = Sim::instant().await;
    let conversation = sim.conversation().await;
    let body = streamed(response_request(
        &conversation,
        "Weather? [[sim: tools=2 reasoning]]",
    ));
    let events = sim.events("/responses", body).await;
    let response = events.last().unwrap().json()["response"].clone();
    assert_eq!(response["status"], "completed");
    let calls: Vec<Value> = response["output"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|item| item["type"] == "function_call")
        .cloned()
        .collect();
    let (first, second) = (
        calls[0]["call_id"].as_str().unwrap(),
        calls[1]["call_id"].as_str().unwrap(),
    );
    let output =
        |call: &str| json!({"type": "function_call_output", "call_id": call, "output": "4 °C"});
    let message = json!({"role": "user", "content": "Never mind"});
    for (input, culprit) in [
        (json!([message]), first),
        (json!([output(first), message]), second),
    ] {
        let (status, error) = sim
            .refused(
                "/responses",
                json!({"model": "m", "conversation": conversation, "input": input}),
            )
            .await;
        let text = format!("No tool output found for function call {culprit}.");
        assert_eq!(
            (status, error["message"].as_str(), error["param"].as_str()),
            (400, Some(&*text), Some("input"))
        );
        assert_eq!(error["code"], Value::Null);
    }
    let input = json!([output(first), output(second), output("call_x")]);
    let (_, error) = sim
        .refused(
            "/responses",
            json!({"model": "m", "conversation": conversation, "input": input}),
        )
        .await;
    assert_eq!(
        error["message"],
        "No tool call found for function call output with call_id call_x."
    );
    let input = json!([output(first), output(second)]);
    let answered = sim
        .post(
            "/responses",
            json!({"model": "m", "conversation": conversation, "input": input}),
        )
        .await;
    assert_eq!(
        text(&answered),
        "You said: Weather?. The tools answered: 4 °C; 4 °C. (This is turn 1 of this conversation.)"
    );
    sim.post("/responses", response_request(&conversation, "Thanks"))
        .await;
}

#[tokio::test]
async fn item_deletion_repairs_conversation_tail() {
    let sim = Sim::instant().await;
    let conversation = sim.conversation().await;
    let response = sim
        .post(
            "/responses",
            response_request(&conversation, "Look [[sim: tools=1 reasoning]]"),
        )
        .await;
    let (reasoning, call) = (id(&response["output"][0]), id(&response["output"][1]));
    sim.delete(&format!("/conversations/{conversation}/items/{call}"))
        .await;
    let (status, error) = sim
        .refused("/responses", response_request(&conversation, "Next"))
        .await;
    let text = format!(
        "Item '{reasoning}' of type 'reasoning' was provided without its required following item."
    );
    assert_eq!((status, error["message"].as_str()), (400, Some(&*text)));
    sim.delete(&format!("/conversations/{conversation}/items/{reasoning}"))
        .await;
    sim.post("/responses", response_request(&conversation, "Next"))
        .await;
}

#[tokio::test]
async fn resent_stored_item_is_refused() {
    let sim = Sim::instant().await;
    let conversation = sim.conversation().await;
    sim.post("/responses", response_request(&conversation, "One"))
        .await;
    let items = sim
        .get(&format!("/conversations/{conversation}/items"))
        .await;
    let again = items["data"][0].clone();
    let (status, error) = sim
        .refused(
            "/responses",
            json!({"model": "m", "conversation": conversation, "input": [again]}),
        )
        .await;
    assert_eq!((status, error["param"].as_str()), (400, Some("input")));
    assert!(
        error["message"]
            .as_str()
            .unwrap()
            .starts_with("Duplicate item found with id")
    );
    let twice = json!([{"role": "user", "content": "a", "id": "msg_a"}, {"role": "user", "content": "b", "id": "msg_a"}]);
    let (status, _) = sim
        .refused("/responses", json!({"model": "m", "input": twice}))
        .await;
    assert_eq!(status, 400);
}

#[tokio::test]
async fn background_response_survives_disconnect_and_resumes() {
    let sim = Sim::instant().await;
    let conversation = sim.conversation().await;
    sim.handle.hold();
    let mut stream = sim
        .open(
            "/responses",
            &streamed(background(response_request(&conversation, "Hello"))),
        )
        .await;
    let response = id(&stream.until("response.created").await.json()["response"]);
    stream.until("response.queued").await;
    stream.until("response.in_progress").await;
    drop(stream);
    let path = format!("/responses/{response}");
    assert_eq!(sim.get(&path).await["status"], "in_progress");
    let (status, answer) = sim.send(Method::DELETE, &path, None).await;
    assert_eq!(status, 400, "{answer}");
    let mut resumed =
        Stream::of(sim.request(Method::GET, &format!("{path}?stream=true&starting_after=1"))).await;
    assert_eq!(
        resumed.next().await.unwrap().unwrap().json()["sequence_number"],
        2
    );
    sim.handle.release();
    let rest = resumed.rest().await.unwrap();
    let numbers: Vec<u64> = rest
        .iter()
        .map(|event| event.json()["sequence_number"].as_u64().unwrap())
        .collect();
    assert!(
        numbers.iter().copied().eq(3..3 + numbers.len() as u64),
        "{numbers:?}"
    );
    assert_eq!(rest.last().unwrap().name, "response.completed");
    assert_eq!(sim.get(&path).await["status"], "completed");
    let mut beyond = Stream::of(sim.request(
        Method::GET,
        &format!("{path}?stream=true&starting_after=999"),
    ))
    .await;
    assert_eq!(beyond.next().await.unwrap(), None);
    let (status, error) = sim.refused(&format!("{path}/cancel"), json!({})).await;
    assert_eq!(
        (status, error["message"].as_str()),
        (400, Some("Cannot cancel a completed response."))
    );
}

#[tokio::test]
async fn cancelled_background_response_leaves_no_output() {
    let sim = Sim::instant().await;
    let conversation = sim.conversation().await;
    let body = streamed(background(response_request(
        &conversation,
        "Stop [[sim: tokens=100 rate=1m]]",
    )));
    let mut stream = sim.open("/responses", &body).await;
    let response = id(&stream.until("response.created").await.json()["response"]);
    stream.until("response.output_text.delta").await;
    let cancelled = sim
        .post(&format!("/responses/{response}/cancel"), json!({}))
        .await;
    assert_eq!(
        (cancelled["status"].as_str(), &cancelled["output"]),
        (Some("cancelled"), &json!([]))
    );
    assert_eq!(
        sim.post(&format!("/responses/{response}/cancel"), json!({}))
            .await,
        cancelled
    );
    let rest = stream.rest().await.unwrap();
    assert_eq!(names(&rest), ["response.failed"]);
    assert_eq!(rest[0].json()["response"]["status"], "cancelled");
    assert_eq!(sim.handle.thread_history(&conversation), []);
    sim.post(
        "/responses",
        response_request(&conversation, "The lock is free"),
    )
    .await;
}

#[tokio::test]
async fn only_background_responses_can_be_resumed_or_cancelled() {
    let sim = Sim::instant().await;
    let done = sim
        .post("/responses", json!({"model": "m", "input": "x"}))
        .await;
    let path = format!("/responses/{}", id(&done));
    let (status, error) = sim.refused(&format!("{path}/cancel"), json!({})).await;
    assert_eq!(
        (status, error["message"].as_str()),
        (400, Some("Cannot cancel a synchronous response."))
    );
    let (status, answer) = sim
        .send(Method::GET, &format!("{path}?stream=true"), None)
        .await;
    assert_eq!(
        (status, answer["error"]["param"].as_str()),
        (400, Some("stream"))
    );
    let quiet = sim
        .post(
            "/responses",
            background(json!({"model": "m", "input": "x"})),
        )
        .await;
    let (status, answer) = sim
        .send(
            Method::GET,
            &format!("/responses/{}?stream=true", id(&quiet)),
            None,
        )
        .await;
    assert_eq!(status, 400);
    assert!(
        answer["error"]["message"]
            .as_str()
            .unwrap()
            .contains("stream=true")
    );
    let (status, error) = sim
        .refused(
            "/responses",
            json!({"model": "m", "input": "x", "background": true, "store": false}),
        )
        .await;
    assert_eq!(
        (status, error["code"].as_str(), error["param"].as_str()),
        (400, Some("unsupported_parameter"), Some("background"))
    );
    sim.handle.hold();
    let mut stream = sim
        .open("/responses", &streamed(json!({"model": "m", "input": "x"})))
        .await;
    let running = id(&stream.until("response.created").await.json()["response"]);
    for method in [Method::GET, Method::DELETE] {
        let (status, answer) = sim
            .send(method, &format!("/responses/{running}"), None)
            .await;
        let text = format!("Response with id '{running}' not found.");
        assert_eq!(
            (status, answer["error"]["message"].as_str()),
            (404, Some(&*text))
        );
    }
    assert_eq!(
        sim.refused(&format!("/responses/{running}/cancel"), json!({}))
            .await
            .0,
        404
    );
}

#[tokio::test]
async fn directives_set_response_outcome() {
    let sim = Sim::instant().await;
    let conversation = sim.conversation().await;
    let events = sim
        .events(
            "/responses",
            streamed(response_request(&conversation, "A [[sim: fail]]")),
        )
        .await;
    assert!(names(&events).ends_with(&["response.output_text.delta", "response.failed"]));
    let failed = events.last().unwrap().json()["response"].clone();
    assert_eq!(
        (failed["error"]["code"].as_str(), &failed["output"]),
        (Some("server_error"), &json!([]))
    );
    assert_eq!(sim.handle.thread_history(&conversation), []);
    let cut = sim
        .post(
            "/responses",
            response_request(&conversation, "B [[sim: incomplete]]"),
        )
        .await;
    assert_eq!(
        (cut["status"].as_str(), cut["output"][0]["status"].as_str()),
        (Some("incomplete"), Some("incomplete"))
    );
    assert_eq!(cut["incomplete_details"]["reason"], "max_output_tokens");
    let mut body = response_request(&conversation, "C [[sim: tokens=40]]");
    body["max_output_tokens"] = 16.into();
    let cut = sim.post("/responses", body).await;
    assert_eq!(
        (
            text(&cut).split_whitespace().count(),
            cut["usage"]["output_tokens"].as_u64()
        ),
        (16, Some(16))
    );
    let two = sim
        .post(
            "/responses",
            response_request(&conversation, "D [[sim: parts=2]]"),
        )
        .await;
    assert_eq!(two["output"].as_array().unwrap().len(), 2);
    let refusal = sim
        .events(
            "/responses",
            streamed(response_request(&conversation, "E [[sim: refusal]]")),
        )
        .await;
    assert!(names(&refusal).contains(&"response.refusal.delta"));
}

#[tokio::test]
async fn conversation_deletion_leaks_its_items() {
    let sim = Sim::instant().await;
    let conversation = sim.conversation().await;
    sim.post("/responses", response_request(&conversation, "Remember me"))
        .await;
    let path = format!("/conversations/{conversation}");
    assert_eq!(sim.delete(&path).await["object"], "conversation.deleted");
    for method in [Method::DELETE, Method::GET] {
        let (status, answer) = sim.send(method, &path, None).await;
        let text = format!("Conversation with id '{conversation}' not found.");
        assert_eq!(
            (status, answer["error"]["message"].as_str()),
            (404, Some(&*text))
        );
    }
    assert_eq!(
        sim.refused("/responses", response_request(&conversation, "x"))
            .await
            .0,
        404
    );
    assert_eq!(
        sim.send(Method::GET, &format!("{path}/items"), None)
            .await
            .0,
        404
    );
    let leaked = sim.handle.leaked_items();
    assert_eq!(leaked.len(), 2);
    let places = sim.handle.holds_text("Remember me");
    assert_eq!(
        places[0],
        format!("leaked item {} of conversation {conversation}", leaked[0])
    );
    for item in leaked {
        let item = format!("{path}/items/{item}");
        sim.get(&item).await;
        sim.delete(&item).await;
        let (status, answer) = sim.send(Method::DELETE, &item, None).await;
        assert_eq!(status, 404);
        assert!(
            answer["error"]["message"]
                .as_str()
                .unwrap()
                .ends_with("not found in conversation.")
        );
    }
    assert_eq!(sim.handle.leaked_items(), [""; 0]);
}

#[tokio::test]
async fn emptied_conversation_leaves_only_stored_responses() {
    let sim = Sim::instant().await;
    let conversation = sim.conversation().await;
    let path = format!("/conversations/{conversation}");
    sim.post(&path, json!({"metadata": {"note": "about a needle"}}))
        .await;
    let body = streamed(background(response_request(&conversation, "A needle")));
    let response = id(&sim.events("/responses", body).await[0].json()["response"]);
    sim.wait_for(|stats| stats.active_runs == 0).await;
    let items = sim.get(&format!("{path}/items?order=asc")).await;
    let (said, answered) = (id(&items["data"][0]), id(&items["data"][1]));
    let of_the_response = [
        format!("response {response}"),
        format!("input of response {response}"),
        format!("events of response {response}"),
    ];
    let of_the_conversation = [
        format!("conversation {conversation}"),
        format!("item {said} of conversation {conversation}"),
        format!("item {answered} of conversation {conversation}"),
    ];
    assert_eq!(
        sim.handle.holds_text("needle"),
        [of_the_conversation, of_the_response.clone()].concat()
    );
    for item in [said, answered] {
        sim.delete(&format!("{path}/items/{item}")).await;
    }
    sim.delete(&path).await;
    assert_eq!(sim.handle.leaked_items(), [""; 0]);
    assert_eq!(sim.handle.holds_text("needle"), of_the_response);
    assert_eq!(sim.handle.stored_responses(), [response.as_str()]);
    sim.delete(&format!("/responses/{response}")).await;
    assert_eq!(sim.handle.holds_text("needle"), [""; 0]);
    assert_eq!(sim.handle.stored_responses(), [""; 0]);
}

#[tokio::test]
async fn response_outliving_its_conversation_leaks_items() {
    let sim = Sim::instant().await;
    let conversation = sim.conversation().await;
    sim.handle.hold();
    sim.post(
        "/responses",
        background(response_request(&conversation, "A needle")),
    )
    .await;
    sim.delete(&format!("/conversations/{conversation}")).await;
    sim.handle.release();
    let stats = sim.wait_for(|stats| stats.active_runs == 0).await;
    assert_eq!(stats.violations.len(), 1);
    assert_eq!(sim.handle.leaked_items().len(), 2);
}

#[tokio::test]
async fn response_deletion_requires_finished_response() {
    let sim = Sim::instant().await;
    sim.handle.hold();
    let running = id(&sim
        .post(
            "/responses",
            background(json!({"model": "m", "input": "One"})),
        )
        .await);
    let path = format!("/responses/{running}");
    let (status, answer) = sim.send(Method::DELETE, &path, None).await;
    assert_eq!(
        (status, answer["error"]["type"].as_str()),
        (400, Some("invalid_request_error"))
    );
    sim.handle.release();
    sim.wait_for(|stats| stats.active_runs == 0).await;
    assert_eq!(
        sim.delete(&path).await,
        json!({"id": running, "object": "response.deleted", "deleted": true})
    );
    for method in [Method::DELETE, Method::GET] {
        let (status, answer) = sim.send(method, &path, None).await;
        let text = format!("Response with id '{running}' not found.");
        assert_eq!(
            (status, answer["error"]["message"].as_str()),
            (404, Some(&*text))
        );
    }
}

#[tokio::test]
async fn conversation_list_requires_setting() {
    let sim = Sim::instant().await;
    let (status, answer) = sim.send(Method::GET, "/conversations", None).await;
    assert_eq!(
        (status, answer["error"]["type"].as_str()),
        (405, Some("invalid_request_error"))
    );
    let sim = Sim::start(SimulatorConfig {
        list_threads: true,
        ..SimulatorConfig::default()
    })
    .await;
    let mut made = Vec::new();
    for n in 0..5 {
        made.push(id(&sim
            .post("/conversations", json!({"metadata": {"n": n.to_string()}}))
            .await));
    }
    sim.delete(&format!("/conversations/{}", made.remove(1)))
        .await;
    let ids = |list: &Value| {
        list["data"]
            .as_array()
            .unwrap()
            .iter()
            .map(id)
            .collect::<Vec<_>>()
    };
    let page = sim.get("/conversations?limit=3").await;
    assert_eq!(ids(&page), [made[3].as_str(), &made[2], &made[1]]);
    assert_eq!(
        (&page["has_more"], page["data"][0]["metadata"]["n"].as_str()),
        (&json!(true), Some("4"))
    );
    let after = page["last_id"].as_str().unwrap();
    let page = sim
        .get(&format!("/conversations?limit=3&after={after}"))
        .await;
    assert_eq!(
        (ids(&page), &page["has_more"]),
        (vec![made[0].clone()], &json!(false))
    );
}

#[tokio::test]
async fn invalid_requests_are_refused_with_parameter() {
    let sim = Sim::instant().await;
    let items = json!(vec![json!({"role": "user", "content": "x"}); 21]);
    for (path, body, code, param) in [
        (
            "/conversations",
            json!({"items": items}),
            "array_above_max_length",
            "items",
        ),
        (
            "/conversations",
            json!({"metadata": {"x".repeat(65): "v"}}),
            "string_above_max_length",
            &*format!("metadata.{}", "x".repeat(65)),
        ),
        (
            "/responses",
            json!({"model": "m", "input": "x", "surprise": 1}),
            "unknown_parameter",
            "surprise",
        ),
        (
            "/responses",
            json!({"input": "x"}),
            "missing_required_parameter",
            "model",
        ),
        (
            "/responses",
            json!({"model": "m"}),
            "missing_required_parameter",
            "input",
        ),
        (
            "/responses",
            json!({"model": "m", "input": "x", "conversation": "thr_1"}),
            "invalid_value",
            "conversation",
        ),
        (
            "/responses",
            json!({"model": "m", "input": "x", "max_output_tokens": 3}),
            "integer_below_min_value",
            "max_output_tokens",
        ),
        (
            "/responses",
            json!({"model": "m", "input": [{"role": "user", "content": "x", "who": "me"}]}),
            "unknown_parameter",
            "input[0].who",
        ),
    ] {
        let (status, error) = sim.refused(path, body).await;
        let got = (
            status,
            error["code"].as_str().unwrap(),
            error["param"].as_str().unwrap(),
        );
        assert_eq!(got, (400, code, param), "{error}");
    }
    let broken = sim
        .request(Method::POST, "/responses")
        .body("{\"model\":")
        .send()
        .await
        .unwrap();
    assert_eq!(broken.status(), 400);
    assert_eq!(
        broken.json::<Value>().await.unwrap()["error"]["code"],
        "invalid_json"
    );
}

#[tokio::test]
async fn damaged_conversation_can_fail_after_acceptance() {
    let sim = Sim::instant().await;
    let conversation = sim.conversation().await;
    let response = sim
        .post(
            "/responses",
            response_request(&conversation, "Look [[sim: tools=1]]"),
        )
        .await;
    let call = response["output"][0]["call_id"].as_str().unwrap();
    let fault = Fault {
        on: "create_response".into(),
        fault: "fail_text=open_call".into(),
        times: 1,
    };
    sim.handle.add_fault(fault).unwrap();
    let failed = sim
        .post("/responses", response_request(&conversation, "Next"))
        .await;
    assert_eq!(
        (failed["status"].as_str(), &failed["output"]),
        (Some("failed"), &json!([]))
    );
    assert_eq!(
        failed["error"]["message"],
        format!("No tool output found for function call {call}.")
    );
    assert_eq!(
        sim.refused("/responses", response_request(&conversation, "Next"))
            .await
            .0,
        400
    );
    assert_eq!(
        sim.handle.threads()[0].user_texts,
        ["Look [[sim: tools=1]]"]
    );
}

#[tokio::test]
async fn dangling_reasoning_damages_conversation() {
    let sim = Sim::instant().await;
    let conversation = sim.conversation().await;
    let response = sim
        .post(
            "/responses",
            response_request(&conversation, "Think [[sim: dangling_reasoning]]"),
        )
        .await;
    let reasoning = id(&response["output"][1]);
    let (_, error) = sim
        .refused("/responses", response_request(&conversation, "Next"))
        .await;
    assert!(
        error["message"].as_str().unwrap().contains(&reasoning),
        "{error}"
    );
    sim.delete(&format!("/conversations/{conversation}/items/{reasoning}"))
        .await;
    sim.post("/responses", response_request(&conversation, "Next"))
        .await;
}

#[tokio::test]
async fn stuck_cancel_of_response_stays_unanswered() {
    let sim = Sim::instant().await;
    let conversation = sim.conversation().await;
    sim.handle.hold();
    let body = background(response_request(
        &conversation,
        "Stay [[sim: stuck_cancel]]",
    ));
    let path = format!("/responses/{}", id(&sim.post("/responses", body).await));
    let cancel = sim.request(Method::POST, &format!("{path}/cancel")).send();
    tokio::select! {
        answer = cancel => panic!("{answer:?}"),
        _ = sim.wait_for(|stats| stats.requests_by_operation.contains_key("cancel_response")) => {}
    }
    sim.handle.release();
    sim.wait_for(|stats| stats.active_runs == 0).await;
    assert_eq!(sim.get(&path).await["status"], "completed");
}

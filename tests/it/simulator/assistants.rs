//! Threads, messages and runs.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use threadkeeper::simulator::SimulatorConfig;

use crate::support::wire::{PATIENCE, Sim, id, names};

/// A request for a run whose user message is `text`.
fn run_request(text: &str) -> Value {
    json!({"assistant_id": "asst_1", "additional_messages": [{"role": "user", "content": text}]})
}

fn streamed(text: &str) -> Value {
    let mut body = run_request(text);
    body["stream"] = true.into();
    body
}

/// Polls a run until it has this status.
async fn run_with(sim: &Sim, path: &str, status: &str) -> Value {
    let poll = async {
        loop {
            let run = sim.get(path).await;
            if run["status"] == status {
                return run;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, poll)
        .await
        .unwrap_or_else(|_| panic!("{path} never became {status}"))
}

#[tokio::test]
async fn plain_run_streams_in_documented_order() {
    let sim = Sim::instant().await;
    let thread = sim.thread().await;
    let events = sim
        .events(&format!("/threads/{thread}/runs"), streamed("Hé 🙂"))
        .await;
    assert_eq!(
        names(&events),
        [
            "thread.run.created",
            "thread.run.queued",
            "thread.run.in_progress",
            "thread.run.step.created",
            "thread.run.step.in_progress",
            "thread.message.created",
            "thread.message.in_progress",
            "thread.message.delta",
            "thread.message.completed",
            "thread.run.step.completed",
            "thread.run.completed",
            "done",
        ]
    );
    assert_eq!(events.last().unwrap().data, "[DONE]");
    let reply = "You said: Hé 🙂. (This is turn 1 of this conversation.)";
    let deltas = events
        .iter()
        .filter(|event| event.name == "thread.message.delta");
    let text: String = deltas
        .map(|event| {
            event.json()["delta"]["content"][0]["text"]["value"]
                .as_str()
                .unwrap()
                .to_owned()
        })
        .collect();
    assert_eq!(text, reply);
    let line = |role: &str, text: &str| (role.to_owned(), text.to_owned());
    assert_eq!(
        sim.handle.thread_history(&thread),
        [line("user", "Hé 🙂"), line("assistant", reply)]
    );
    let run = id(&events[0].json());
    let messages = sim
        .get(&format!("/threads/{thread}/messages?run_id={run}"))
        .await;
    assert_eq!(messages["data"].as_array().unwrap().len(), 1);
    assert_eq!(messages["data"][0]["content"][0]["text"]["value"], reply);
}

#[tokio::test]
async fn function_call_run_continues_after_tool_outputs() {
    let sim = Sim::instant().await;
    let thread = sim.thread().await;
    let runs = format!("/threads/{thread}/runs");
    let events = sim
        .events(
            &runs,
            streamed("Weather? [[sim: tool=get_weather tool=get_time]]"),
        )
        .await;
    let tail = [
        "thread.run.in_progress",
        "thread.run.step.created",
        "thread.run.step.in_progress",
        "thread.run.step.delta",
        "thread.run.requires_action",
        "done",
    ];
    assert_eq!(names(&events)[2..], tail);
    let run = events
        .iter()
        .find(|event| event.name == "thread.run.requires_action")
        .unwrap()
        .json();
    let calls = run["required_action"]["submit_tool_outputs"]["tool_calls"]
        .as_array()
        .unwrap()
        .clone();
    assert_eq!(calls[0]["function"]["name"], "get_weather");
    assert_eq!(calls[0]["function"]["arguments"], r#"{"input":"Weather?"}"#);
    let fragments = events
        .iter()
        .filter(|event| event.name == "thread.run.step.delta")
        .map(|event| {
            let call = event.json()["delta"]["step_details"]["tool_calls"][0].clone();
            if call["index"] == 0 {
                call["function"]["arguments"].as_str().unwrap().to_owned()
            } else {
                String::new()
            }
        });
    assert_eq!(fragments.collect::<String>(), r#"{"input":"Weather?"}"#);

    let path = format!("{runs}/{}", id(&run));
    let submit = format!("{path}/submit_tool_outputs");
    let (status, error) = sim.refused(&runs, run_request("Too early")).await;
    assert_eq!(
        (
            status,
            error["message"].as_str().unwrap().contains(&id(&run))
        ),
        (400, true)
    );
    let half = json!({"tool_outputs": [{"tool_call_id": calls[0]["id"], "output": "4 °C"}]});
    let (status, error) = sim.refused(&submit, half).await;
    let (first, second) = (
        calls[0]["id"].as_str().unwrap(),
        calls[1]["id"].as_str().unwrap(),
    );
    let text =
        format!("Expected tool outputs for call_ids ['{first}', '{second}'], got ['{first}']");
    assert_eq!(
        (status, error["message"].as_str().unwrap()),
        (400, text.as_str())
    );

    let outputs = json!([{"tool_call_id": second, "output": "noon"}, {"tool_call_id": first, "output": "4 °C"}]);
    let events = sim
        .events(&submit, json!({"tool_outputs": outputs, "stream": true}))
        .await;
    assert_eq!(
        names(&events)[..4],
        [
            "thread.run.step.completed",
            "thread.run.queued",
            "thread.run.in_progress",
            "thread.run.step.created"
        ]
    );
    let answered = events[0].json()["step_details"]["tool_calls"][0].clone();
    assert_eq!(
        (
            answered["id"].as_str(),
            answered["function"]["output"].as_str()
        ),
        (Some(first), Some("4 °C"))
    );
    assert!(names(&events).ends_with(&["thread.run.completed", "done"]));
    let (_, reply) = sim.handle.thread_history(&thread).pop().unwrap();
    assert_eq!(
        reply,
        "You said: Weather?. The tools answered: noon; 4 °C. (This is turn 1 of this conversation.)"
    );
    let (status, error) = sim.refused(&submit, json!({"tool_outputs": []})).await;
    let text = "Runs in status \"completed\" do not accept tool outputs.";
    assert_eq!((status, error["message"].as_str().unwrap()), (400, text));
}

#[tokio::test]
async fn conflicts_name_active_run() {
    let sim = Sim::instant().await;
    let thread = sim.thread().await;
    sim.handle.hold();
    let run = id(&sim
        .post(&format!("/threads/{thread}/runs"), run_request("One"))
        .await);
    let (status, error) = sim
        .refused(&format!("/threads/{thread}/runs"), run_request("Two"))
        .await;
    assert_eq!(status, 400);
    assert_eq!(
        error["message"],
        format!("Thread {thread} already has an active run {run}.")
    );
    assert_eq!(
        (&error["code"], &error["param"]),
        (&Value::Null, &Value::Null)
    );
    let message = json!({"role": "user", "content": "Three"});
    let (status, error) = sim
        .refused(&format!("/threads/{thread}/messages"), message)
        .await;
    assert_eq!(status, 400);
    assert_eq!(
        error["message"],
        format!("Can't add messages to {thread} while a run {run} is active.")
    );
    sim.handle.release();
    let seen = sim.wait_for(|stats| stats.active_runs == 0).await;
    assert_eq!(
        (seen.lock_refusals, seen.max_active_runs_per_thread),
        (2, 1)
    );
    assert_eq!(seen.violations, Vec::<String>::new());
    // A refused request has left no trace.
    assert_eq!(sim.handle.threads()[0].user_texts, ["One"]);
    sim.events(&format!("/threads/{thread}/runs"), streamed("Four"))
        .await;
}

#[tokio::test]
async fn unenforced_locks_still_count_overlaps() {
    let sim = Sim::start(SimulatorConfig {
        enforce_locks: false,
        ..SimulatorConfig::default()
    })
    .await;
    let thread = sim.thread().await;
    sim.handle.hold();
    for text in ["One", "Two", "Three"] {
        sim.post(&format!("/threads/{thread}/runs"), run_request(text))
            .await;
    }
    sim.post(
        &format!("/threads/{thread}/messages"),
        json!({"role": "user", "content": "Four"}),
    )
    .await;
    let stats = sim.handle.stats();
    assert_eq!(
        (
            stats.active_runs,
            stats.max_active_runs_per_thread,
            stats.max_generating_runs_per_thread
        ),
        (3, 3, 3)
    );
    assert_eq!(
        (stats.messages_added_while_active, stats.violations.len()),
        (1, 3)
    );
    sim.handle.release();
    let stats = sim.wait_for(|stats| stats.active_runs == 0).await;
    assert_eq!(stats.runs_ended["completed"], 3);
    // Runs on different threads do not overlap.
    let sim = Sim::instant().await;
    sim.handle.hold();
    for _ in 0..3 {
        let thread = sim.thread().await;
        sim.post(&format!("/threads/{thread}/runs"), run_request("One"))
            .await;
    }
    let stats = sim.handle.stats();
    assert_eq!(
        (stats.max_active_runs, stats.max_active_runs_per_thread),
        (3, 1)
    );
}

#[tokio::test]
async fn cancelled_run_passes_through_cancelling() {
    let config = SimulatorConfig {
        cancel_delay: Duration::from_millis(30),
        ..SimulatorConfig::default()
    };
    let sim = Sim::start(config).await;
    let thread = sim.thread().await;
    let runs = format!("/threads/{thread}/runs");
    let mut stream = sim
        .open(&runs, &streamed("Stop [[sim: tokens=100 rate=1m]]"))
        .await;
    let run = id(&stream.until("thread.run.created").await.json());
    stream.until("thread.message.delta").await;
    let path = format!("{runs}/{run}");
    let answer = sim.post(&format!("{path}/cancel"), json!({})).await;
    assert_eq!(answer["status"], "cancelling");
    let (status, error) = sim.refused(&format!("{path}/cancel"), json!({})).await;
    assert_eq!(
        (status, error["message"].as_str()),
        (400, Some("Cannot cancel run with status 'cancelling'."))
    );
    assert_eq!(
        names(&stream.rest().await.unwrap()),
        [
            "thread.run.cancelling",
            "thread.message.incomplete",
            "thread.run.step.cancelled",
            "thread.run.cancelled",
            "done"
        ]
    );
    assert_eq!(sim.get(&path).await["status"], "cancelled");
    let messages = sim.get(&format!("/threads/{thread}/messages")).await;
    assert_eq!(messages["data"][0]["status"], "incomplete");
    assert_eq!(
        messages["data"][0]["incomplete_details"]["reason"],
        "run_cancelled"
    );
    assert_eq!(messages["data"][0]["content"][0]["text"]["value"], "You ");
    let (status, error) = sim.refused(&format!("{path}/cancel"), json!({})).await;
    assert_eq!(
        (status, error["message"].as_str()),
        (400, Some("Cannot cancel run with status 'cancelled'."))
    );

    let run = sim.post(&runs, run_request("[[sim: tools=1]]")).await;
    let path = format!("{runs}/{}", id(&run));
    run_with(&sim, &path, "requires_action").await;
    assert_eq!(
        sim.post(&format!("{path}/cancel"), json!({})).await["status"],
        "cancelling"
    );
    run_with(&sim, &path, "cancelled").await;
    let steps = sim.get(&format!("{path}/steps")).await;
    assert_eq!(steps["data"][0]["status"], "cancelled");
    sim.events(&runs, streamed("The thread is free again"))
        .await;
}

#[tokio::test]
async fn stuck_cancel_leaves_run_cancelling_until_expiry() {
    let config = SimulatorConfig {
        run_expiry: Duration::from_millis(200),
        ..SimulatorConfig::default()
    };
    let sim = Sim::start(config).await;
    for text in [
        "[[sim: tokens=100 rate=1m stuck_cancel]]",
        "[[sim: tools=1 stuck_cancel]]",
    ] {
        let thread = sim.thread().await;
        let runs = format!("/threads/{thread}/runs");
        let path = format!("{runs}/{}", id(&sim.post(&runs, run_request(text)).await));
        let status = if text.contains("tools") {
            "requires_action"
        } else {
            "in_progress"
        };
        run_with(&sim, &path, status).await;
        assert_eq!(
            sim.post(&format!("{path}/cancel"), json!({})).await["status"],
            "cancelling"
        );
        assert_eq!(sim.get(&path).await["status"], "cancelling");
        run_with(&sim, &path, "expired").await;
    }
    assert_eq!(sim.handle.stats().runs_ended["expired"], 2);
}

#[tokio::test]
async fn thread_deletion_removes_all_content() {
    let sim = Sim::instant().await;
    let thread = sim.thread().await;
    let path = format!("/threads/{thread}");
    sim.post(&path, json!({"metadata": {"note": "about a needle"}}))
        .await;
    let events = sim
        .events(
            &format!("{path}/runs"),
            streamed("A needle [[sim: tool=look_up]]"),
        )
        .await;
    let run = events
        .iter()
        .find(|event| event.name == "thread.run.requires_action")
        .unwrap()
        .json();
    let call = run["required_action"]["submit_tool_outputs"]["tool_calls"][0]["id"].clone();
    let outputs = json!({"tool_outputs": [{"tool_call_id": call, "output": "found the needle"}], "stream": true});
    sim.events(
        &format!("{path}/runs/{}/submit_tool_outputs", id(&run)),
        outputs,
    )
    .await;
    let places = sim.handle.holds_text("needle");
    assert_eq!(places[0], format!("thread {thread}"));
    assert_eq!(
        places
            .iter()
            .filter(|place| place.starts_with("message "))
            .count(),
        2,
        "{places:?}"
    );
    assert!(
        places
            .last()
            .unwrap()
            .ends_with(&format!("of run {}", id(&run))),
        "{places:?}"
    );
    assert_eq!(
        sim.delete(&path).await,
        json!({"id": thread, "object": "thread.deleted", "deleted": true})
    );
    assert_eq!(sim.handle.holds_text("needle"), [""; 0]);
    for (method, below) in [
        (Method::DELETE, ""),
        (Method::GET, ""),
        (Method::GET, "/messages"),
        (Method::GET, "/runs"),
    ] {
        let (status, answer) = sim.send(method, &format!("{path}{below}"), None).await;
        let text = format!("No thread found with id '{thread}'.");
        assert_eq!(
            (status, answer["error"]["message"].as_str()),
            (404, Some(&*text)),
            "{below}"
        );
    }
    assert_eq!(sim.handle.stats().violations, [""; 0]);
}

#[tokio::test]
async fn thread_list_requires_setting() {
    let sim = Sim::instant().await;
    let (status, answer) = sim.send(Method::GET, "/threads", None).await;
    assert_eq!(
        (status, answer["error"]["message"].as_str()),
        (404, Some("Invalid URL (GET /v1/threads)"))
    );
    let sim = Sim::start(SimulatorConfig {
        list_threads: true,
        ..SimulatorConfig::default()
    })
    .await;
    assert_eq!(sim.get("/threads").await["data"], json!([]));
    let mut made = Vec::new();
    for n in 0..5 {
        made.push(id(&sim
            .post("/threads", json!({"metadata": {"n": n.to_string()}}))
            .await));
    }
    sim.delete(&format!("/threads/{}", made.remove(1))).await;
    let ids = |list: &Value| {
        list["data"]
            .as_array()
            .unwrap()
            .iter()
            .map(id)
            .collect::<Vec<_>>()
    };
    let page = sim.get("/threads?limit=3&order=asc").await;
    assert_eq!(ids(&page), made[..3]);
    assert_eq!(
        (&page["has_more"], page["data"][0]["metadata"]["n"].as_str()),
        (&json!(true), Some("0"))
    );
    let after = page["last_id"].as_str().unwrap();
    let page = sim
        .get(&format!("/threads?limit=3&order=asc&after={after}"))
        .await;
    assert_eq!(
        (ids(&page), &page["has_more"]),
        (vec![made[3].clone()], &json!(false))
    );
}

#[tokio::test]
async fn deleted_message_is_absent_from_next_run() {
    let sim = Sim::instant().await;
    let thread = sim.thread().await;
    let runs = format!("/threads/{thread}/runs");
    sim.events(&runs, streamed("One")).await;
    sim.events(&runs, streamed("Two")).await;
    let messages = sim
        .get(&format!("/threads/{thread}/messages?order=asc"))
        .await;
    for message in &messages["data"].as_array().unwrap()[2..] {
        sim.delete(&format!("/threads/{thread}/messages/{}", id(message)))
            .await;
    }
    sim.events(&runs, streamed("Three")).await;
    let lines = sim.handle.thread_history(&thread);
    assert_eq!(lines.len(), 4);
    assert_eq!(
        lines[3].1,
        "You said: Three. (This is turn 2 of this conversation.)"
    );
}

#[tokio::test]
async fn run_expires_in_every_waiting_state() {
    let config = SimulatorConfig {
        run_expiry: Duration::from_millis(40),
        ..SimulatorConfig::default()
    };
    let sim = Sim::start(config).await;
    for text in [
        "[[sim: silent]]",
        "[[sim: tools=1]]",
        "[[sim: tokens=100 rate=1m]]",
    ] {
        let thread = sim.thread().await;
        let runs = format!("/threads/{thread}/runs");
        let run = sim.post(&runs, run_request(text)).await;
        let run = run_with(&sim, &format!("{runs}/{}", id(&run)), "expired").await;
        assert_eq!(
            (&run["expires_at"], &run["required_action"]),
            (&Value::Null, &Value::Null),
            "{text}"
        );
        let path = format!("{runs}/{}/submit_tool_outputs", id(&run));
        let (status, error) = sim.refused(&path, json!({"tool_outputs": []})).await;
        let text = "Runs in status \"expired\" do not accept tool outputs.";
        assert_eq!((status, error["message"].as_str()), (400, Some(text)));
        sim.post(
            &format!("/threads/{thread}/messages"),
            json!({"role": "user", "content": "Free again"}),
        )
        .await;
    }
    assert_eq!(sim.handle.stats().active_runs, 0);
}

#[tokio::test]
async fn directives_set_run_outcome() {
    let sim = Sim::instant().await;
    let thread = sim.thread().await;
    let runs = format!("/threads/{thread}/runs");
    let events = sim.events(&runs, streamed("A [[sim: fail]]")).await;
    let tail = [
        "thread.message.incomplete",
        "thread.run.step.failed",
        "thread.run.failed",
        "done",
    ];
    assert!(names(&events).ends_with(&tail), "{:?}", names(&events));
    let run = events[events.len() - 2].json();
    assert_eq!(
        (
            run["last_error"]["code"].as_str(),
            run["failed_at"].is_i64()
        ),
        (Some("server_error"), true)
    );
    let events = sim.events(&runs, streamed("B [[sim: incomplete]]")).await;
    let tail = [
        "thread.message.incomplete",
        "thread.run.step.completed",
        "thread.run.incomplete",
        "done",
    ];
    assert!(names(&events).ends_with(&tail), "{:?}", names(&events));
    assert_eq!(
        events[events.len() - 2].json()["incomplete_details"]["reason"],
        "max_completion_tokens"
    );
    let events = sim.events(&runs, streamed("C [[sim: parts=2]]")).await;
    let made = events
        .iter()
        .filter(|event| event.name == "thread.message.completed");
    assert_eq!(made.count(), 2);
    let events = sim.events(&runs, streamed("D [[sim: refusal]]")).await;
    let message = events
        .iter()
        .find(|event| event.name == "thread.message.completed")
        .unwrap()
        .json();
    assert_eq!(message["content"][0]["type"], "refusal");
    let stats = sim.handle.stats();
    assert_eq!(
        (
            stats.runs_ended["failed"],
            stats.runs_ended["incomplete"],
            stats.runs_ended["completed"]
        ),
        (1, 1, 2)
    );
}

#[tokio::test]
async fn run_outlives_its_connection() {
    let sim = Sim::instant().await;
    let thread = sim.thread().await;
    sim.handle.hold();
    let mut stream = sim
        .open(&format!("/threads/{thread}/runs"), &streamed("Goodbye"))
        .await;
    stream.until("thread.run.in_progress").await;
    drop(stream);
    sim.handle.release();
    let stats = sim.wait_for(|stats| stats.active_runs == 0).await;
    assert_eq!(stats.runs_ended["completed"], 1);
    assert_eq!(sim.handle.thread_history(&thread).len(), 2);
}

#[tokio::test]
async fn assistant_message_parts_join_into_one_text() {
    let sim = Sim::instant().await;
    let thread = sim.thread().await;
    let parts = json!([{"type": "text", "text": "Part 1."}, {"type": "text", "text": "Part 2."}]);
    for role in ["assistant", "user"] {
        sim.post(
            &format!("/threads/{thread}/messages"),
            json!({"role": role, "content": parts}),
        )
        .await;
    }
    let texts: Vec<String> = sim
        .handle
        .thread_history(&thread)
        .into_iter()
        .map(|(_, text)| text)
        .collect();
    assert_eq!(
        texts,
        ["Part 1.Part 2.", "Part 1. Part 2."],
        "the parts are as in separate messages"
    );
}

#[tokio::test]
async fn invalid_requests_are_refused_with_parameter() {
    let sim = Sim::instant().await;
    let thread = sim.thread().await;
    let runs = format!("/threads/{thread}/runs");
    let sixteen: Value = (0..17)
        .map(|n| (n.to_string(), "x".into()))
        .collect::<serde_json::Map<_, _>>()
        .into();
    for (path, body, code, param) in [
        (
            "/threads",
            json!({"surprise": 1}),
            "unknown_parameter",
            "surprise",
        ),
        (
            "/threads",
            json!({"metadata": {"a": 1}}),
            "invalid_type",
            "metadata.a",
        ),
        (
            "/threads",
            json!({"metadata": {"a": "x".repeat(513)}}),
            "string_above_max_length",
            "metadata.a",
        ),
        (
            "/threads",
            json!({"metadata": sixteen}),
            "object_above_max_properties",
            "metadata",
        ),
        (
            "/threads",
            json!({"messages": [{"role": "user"}]}),
            "missing_required_parameter",
            "messages[0].content",
        ),
        (
            "/threads",
            json!({"messages": [{"role": "system", "content": "x"}]}),
            "invalid_value",
            "messages[0].role",
        ),
        (
            &runs,
            json!({}),
            "missing_required_parameter",
            "assistant_id",
        ),
        (
            &runs,
            json!({"assistant_id": "asst_1", "max_completion_tokens": 5}),
            "integer_below_min_value",
            "max_completion_tokens",
        ),
        (
            &runs,
            json!({"assistant_id": "asst_1", "temperature": 3}),
            "decimal_above_max_value",
            "temperature",
        ),
        (
            &runs,
            json!({"assistant_id": "asst_1", "tools": vec![json!({}); 21]}),
            "array_above_max_length",
            "tools",
        ),
        (&runs, run_request("[[sim: fial]]"), "invalid_directive", ""),
    ] {
        let (status, error) = sim.refused(path, body).await;
        let got = (
            status,
            error["code"].as_str().unwrap(),
            error["param"].as_str().unwrap_or_default(),
        );
        assert_eq!(got, (400, code, param), "{error}");
    }
    for (path, text) in [
        (
            "/threads/thread_x".to_owned(),
            "No thread found with id 'thread_x'.",
        ),
        (format!("{runs}/run_x"), "No run found with id 'run_x'."),
        (
            format!("/threads/{thread}/messages/msg_x"),
            "No message found with id 'msg_x'.",
        ),
    ] {
        let (status, answer) = sim.send(Method::GET, &path, None).await;
        assert_eq!(
            (status, answer["error"]["message"].as_str()),
            (404, Some(text))
        );
    }
    let (status, error) = sim
        .refused(&runs, json!({"assistant_id": "asst_missing"}))
        .await;
    assert_eq!(
        (status, error["message"].as_str()),
        (404, Some("No assistant found with id 'asst_missing'."))
    );
    assert_eq!(sim.handle.stats().runs_started, 0);
}

#[tokio::test]
async fn message_pages_follow_cursors() {
    let sim = Sim::instant().await;
    let thread = sim.thread().await;
    let path = format!("/threads/{thread}/messages");
    let mut made = Vec::new();
    for n in 0..5 {
        made.push(id(&sim
            .post(&path, json!({"role": "user", "content": n.to_string()}))
            .await));
    }
    let ids = |page: &Value| {
        page["data"]
            .as_array()
            .unwrap()
            .iter()
            .map(id)
            .collect::<Vec<_>>()
    };
    let page = sim.get(&format!("{path}?limit=2")).await;
    assert_eq!(
        (ids(&page), page["has_more"].as_bool()),
        (vec![made[4].clone(), made[3].clone()], Some(true))
    );
    assert_eq!(
        (page["first_id"].as_str(), page["last_id"].as_str()),
        (Some(&*made[4]), Some(&*made[3]))
    );
    let page = sim
        .get(&format!("{path}?limit=2&order=asc&after={}", made[2]))
        .await;
    assert_eq!(
        (ids(&page), page["has_more"].as_bool()),
        (made[3..].to_vec(), Some(false))
    );
    let page = sim
        .get(&format!("{path}?limit=2&order=asc&before={}", made[3]))
        .await;
    assert_eq!(
        (ids(&page), page["has_more"].as_bool()),
        (made[1..3].to_vec(), Some(true))
    );
    for (query, code) in [
        ("limit=101", "integer_above_max_value"),
        ("limit=0", "integer_below_min_value"),
        ("limit=x", "invalid_type"),
        ("order=up", "invalid_value"),
    ] {
        let (status, answer) = sim
            .send(Method::GET, &format!("{path}?{query}"), None)
            .await;
        assert_eq!(
            (status, answer["error"]["code"].as_str()),
            (400, Some(code))
        );
    }
}

#[tokio::test]
async fn foreign_run_holds_thread_until_stopped() {
    let sim = Sim::instant().await;
    let thread = sim.thread().await;
    let run = sim.handle.start_foreign_run(&thread).unwrap();
    assert_eq!(sim.handle.start_foreign_run(&thread), None);
    let (_, error) = sim
        .refused(&format!("/threads/{thread}/runs"), run_request("Mine"))
        .await;
    assert!(error["message"].as_str().unwrap().contains(&run));
    let listed = sim.get(&format!("/threads/{thread}/runs?limit=1")).await;
    assert_eq!(
        (id(&listed["data"][0]), listed["data"][0]["status"].as_str()),
        (run.clone(), Some("in_progress"))
    );
    assert!(sim.handle.stop_foreign_run(&thread));
    sim.events(&format!("/threads/{thread}/runs"), streamed("Mine"))
        .await;
    // A foreign run can be cancelled like any other.
    let run = sim.handle.start_foreign_run(&thread).unwrap();
    let path = format!("/threads/{thread}/runs/{run}");
    sim.post(&format!("{path}/cancel"), json!({})).await;
    run_with(&sim, &path, "cancelled").await;
    assert_eq!(sim.handle.stats().runs_started, 1);
}

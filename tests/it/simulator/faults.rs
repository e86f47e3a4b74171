//! Faults, settings, the record of requests, and the endpoints below `/_simulator`.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use threadkeeper::simulator::{Fault, RunView, SimulatorConfig, Stats};

use crate::support::wire::{Event, PATIENCE, Sim, id, names};

fn response(text: &str) -> Value {
    json!({"model": "m", "input": text, "stream": true})
}

fn fault(on: &str, fault: &str, times: u32) -> Fault {
    Fault {
        on: on.to_owned(),
        fault: fault.to_owned(),
        times,
    }
}

/// Joins the text of a response stream's events.
fn text(events: &[Event]) -> String {
    let data = events.iter().map(Event::json);
    let deltas = data.filter(|data| data["type"] == "response.output_text.delta");
    deltas
        .map(|data| data["delta"].as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn credentials_and_beta_header_are_required() {
    let sim = Sim::instant().await;
    let client = reqwest::Client::new();
    let url = format!("{}/threads", sim.base);
    for (key, status) in [("", 401), ("bad-key", 401), ("sk-anything", 200)] {
        let request = client
            .post(&url)
            .header("OpenAI-Beta", "assistants=v2")
            .bearer_auth(key);
        assert_eq!(request.send().await.unwrap().status(), status, "{key}");
        let request = client
            .post(&url)
            .header("OpenAI-Beta", "assistants=v2")
            .header("api-key", key);
        assert_eq!(request.send().await.unwrap().status(), status, "{key}");
    }
    let answer = client
        .post(&url)
        .bearer_auth("sk-test")
        .send()
        .await
        .unwrap();
    assert_eq!(answer.status(), 400);
    assert!(answer.headers().contains_key("x-request-id"));
    assert_eq!(
        answer.json::<Value>().await.unwrap()["error"]["code"],
        "invalid_beta"
    );
    let plain = client
        .post(format!("{}/conversations", sim.base))
        .bearer_auth("sk-test")
        .send()
        .await
        .unwrap();
    assert_eq!(plain.status(), 200);

    let sim = Sim::start(SimulatorConfig {
        api_key: Some("sk-test".into()),
        ..SimulatorConfig::default()
    })
    .await;
    sim.conversation().await;
    let other = client
        .post(format!("{}/conversations", sim.base))
        .bearer_auth("sk-other")
        .send()
        .await
        .unwrap();
    assert_eq!(other.status(), 401);
    assert_eq!(
        other.json::<Value>().await.unwrap()["error"]["code"],
        "invalid_api_key"
    );
}

#[tokio::test]
async fn conversations_endpoint_can_be_disabled() {
    let sim = Sim::start(SimulatorConfig {
        conversations: false,
        ..SimulatorConfig::default()
    })
    .await;
    let (status, answer) = sim
        .send(Method::POST, "/conversations", Some(&json!({})))
        .await;
    assert_eq!((status, answer), (404, json!({"detail": "Not Found"})));
    sim.post("/responses", json!({"model": "m", "input": "x"}))
        .await;
}

#[tokio::test]
async fn status_directive_refuses_run_before_acceptance() {
    let sim = Sim::instant().await;
    let conversation = sim.conversation().await;
    for (directive, status, code) in [
        ("status=500", 500, Value::Null),
        (
            "status=429 retry_after=2",
            429,
            "rate_limit_exceeded".into(),
        ),
        (
            "status=429 code=insufficient_quota",
            429,
            "insufficient_quota".into(),
        ),
        ("status=401", 401, "invalid_api_key".into()),
    ] {
        let body = json!({"model": "m", "conversation": conversation, "input": format!("[[sim: {directive}]]")});
        let answer = sim
            .request(Method::POST, "/responses")
            .json(&body)
            .send()
            .await
            .unwrap();
        assert_eq!(answer.status(), status);
        let waits = answer
            .headers()
            .get("retry-after")
            .map(|value| value.to_str().unwrap().to_owned());
        assert_eq!(
            waits,
            directive.contains("retry_after").then(|| "2".to_owned())
        );
        assert_eq!(answer.json::<Value>().await.unwrap()["error"]["code"], code);
    }
    assert_eq!(sim.handle.stats().runs_started, 0);
    assert_eq!(sim.handle.thread_history(&conversation), []);
}

#[tokio::test]
async fn queued_fault_applies_given_times() {
    let sim = Sim::instant().await;
    let url = format!("{}/_simulator/faults", sim.root);
    let client = reqwest::Client::new();
    let body = json!({"on": "start", "fault": "status=503", "times": 2});
    assert_eq!(
        client.post(&url).json(&body).send().await.unwrap().status(),
        200
    );
    for wrong in [
        json!({"on": "start", "fault": "explode"}),
        json!({"on": "nothing", "fault": "fail"}),
        json!({}),
    ] {
        assert_eq!(
            client
                .post(&url)
                .json(&wrong)
                .send()
                .await
                .unwrap()
                .status(),
            400
        );
    }
    sim.handle
        .add_fault(fault("create_thread", "status=500", 1))
        .unwrap();
    let thread = json!({"assistant_id": "asst_1", "thread": {}});
    assert_eq!(sim.refused("/threads/runs", thread).await.0, 503);
    assert_eq!(sim.refused("/conversations", json!({})).await.0, 500);
    let conversation = sim.conversation().await;
    assert_eq!(
        sim.refused("/responses", json!({"model": "m", "input": "x"}))
            .await
            .0,
        503
    );
    let body = json!({"model": "m", "conversation": conversation, "input": "x"});
    assert_eq!(sim.post("/responses", body).await["status"], "completed");
    assert_eq!(
        client
            .get(&url)
            .send()
            .await
            .unwrap()
            .json::<Value>()
            .await
            .unwrap(),
        json!([])
    );
}

#[tokio::test]
async fn drop_fault_closes_connection_without_response() {
    let sim = Sim::instant().await;
    let thread = sim.thread().await;
    let body = json!({"assistant_id": "asst_1", "additional_messages": [{"role": "user", "content": "Hi"}]});
    let runs = format!("/threads/{thread}/runs");
    for (directive, messages) in [("drop=before", 0), ("drop=after", 2)] {
        sim.handle
            .add_fault(fault("create_run", directive, 1))
            .unwrap();
        let error = sim
            .request(Method::POST, &runs)
            .json(&body)
            .send()
            .await
            .unwrap_err();
        assert!(error.status().is_none());
        sim.wait_for(|stats| stats.active_runs == 0).await;
        assert_eq!(
            sim.handle.thread_history(&thread).len(),
            messages,
            "{directive}"
        );
    }
    sim.handle
        .add_fault(fault("get_thread", "drop", 1))
        .unwrap();
    assert!(
        sim.request(Method::GET, &format!("/threads/{thread}"))
            .send()
            .await
            .is_err()
    );
}

#[tokio::test]
async fn cut_directive_breaks_stream() {
    let sim = Sim::instant().await;
    let conversation = sim.conversation().await;
    let mut body = response("One two three four [[sim: cut=3]]");
    body["conversation"] = conversation.clone().into();
    let mut stream = sim.open("/responses", &body).await;
    let mut deltas = 0;
    let error = loop {
        match stream.next().await {
            Ok(Some(event)) => deltas += usize::from(event.name == "response.output_text.delta"),
            Ok(None) => panic!("the stream ended properly"),
            Err(error) => break error,
        }
    };
    assert!(error.is_body() || error.is_decode(), "{error:?}");
    assert_eq!(deltas, 3);
    let stats = sim.wait_for(|stats| stats.active_runs == 0).await;
    assert_eq!(stats.runs_ended["abandoned"], 1);
    assert_eq!(sim.handle.thread_history(&conversation), []);

    let mut body = response("One two three four [[sim: cut=3]]");
    body["background"] = true.into();
    let mut stream = sim.open("/responses", &body).await;
    let created = stream.until("response.created").await.json();
    for _ in 0..3 {
        stream.until("response.output_text.delta").await;
    }
    assert!(stream.next().await.is_err());
    let path = format!("/responses/{}", id(&created["response"]));
    sim.wait_for(|stats| stats.active_runs == 0).await;
    assert_eq!(sim.get(&path).await["status"], "completed");
}

#[tokio::test]
async fn silent_directive_stalls_accepted_run() {
    let sim = Sim::instant().await;
    let conversation = sim.conversation().await;
    for (directive, deltas) in [("silent", 0), ("silent_after=2", 2)] {
        let mut body = response(&format!("One two three [[sim: {directive}]]"));
        body["conversation"] = conversation.clone().into();
        let mut stream = sim.open("/responses", &body).await;
        for _ in 0..deltas {
            stream.until("response.output_text.delta").await;
        }
        let more = tokio::time::timeout(Duration::from_millis(50), stream.next()).await;
        assert!(more.is_err(), "{directive}: {more:?}");
        assert_eq!(sim.handle.stats().active_runs, 1);
        drop(stream);
        sim.wait_for(|stats| stats.active_runs == 0).await;
    }
}

#[tokio::test]
async fn late_head_delays_response_while_run_completes() {
    let sim = Sim::instant().await;
    let text = "One two three [[sim: late_head=1h]]";
    let message = json!([{"role": "user", "content": text}]);
    let run = json!({"assistant_id": "asst_1", "stream": true, "additional_messages": message});
    let runs = format!("/threads/{}/runs", sim.thread().await);
    for (path, body) in [("/responses", response(text)), (&*runs, run)] {
        let before = sim.handle.stats().runs_started;
        let waiting = sim.request(Method::POST, path).json(&body).send();
        let ended = sim.wait_for(|stats| stats.runs_started > before && stats.active_runs == 0);
        tokio::select! {
            answer = waiting => panic!("{path}: {answer:?}"),
            stats = ended => assert_eq!(stats.runs_ended["completed"], stats.runs_started),
        }
    }
}

#[tokio::test]
async fn bare_error_returns_error_with_status_200() {
    let sim = Sim::instant().await;
    for (form, kind, expected) in [
        ("object", "text/event-stream", "data: {\"error\":{"),
        ("done", "text/event-stream", "\n\ndata: [DONE]\n\n"),
        ("string", "text/event-stream", "\"error\":\"The server"),
        ("flat", "text/event-stream", "data: {\"code\":"),
        ("detail", "text/event-stream", "\"detail\":\"The server"),
        ("line", "text/event-stream", "{\n  \"error\": {"),
        ("json", "application/json", "{\"error\":{"),
    ] {
        let body = response(&format!("[[sim: bare_error={form} code=429 error_type=x]]"));
        let answer = sim
            .request(Method::POST, "/responses")
            .json(&body)
            .send()
            .await
            .unwrap();
        assert_eq!(answer.status(), 200);
        assert!(
            answer.headers()["content-type"]
                .to_str()
                .unwrap()
                .starts_with(kind),
            "{form}"
        );
        let text = answer.text().await.unwrap();
        assert!(
            text.contains(expected) && text.contains("429"),
            "{form}: {text}"
        );
    }
    assert_eq!(sim.handle.stats().runs_started, 0);
}

#[tokio::test]
async fn hold_after_pauses_reply_midway() {
    let sim = Sim::instant().await;
    let text = "One two three [[sim: hold_after=2]]";
    let message = json!([{"role": "user", "content": text}]);
    let run = json!({"assistant_id": "asst_1", "stream": true, "additional_messages": message});
    let runs = format!("/threads/{}/runs", sim.thread().await);
    for (path, body, delta) in [
        ("/responses", response(text), "response.output_text.delta"),
        (&*runs, run, "thread.message.delta"),
    ] {
        sim.handle.hold();
        let mut stream = sim.open(path, &body).await;
        for _ in 0..2 {
            stream.until(delta).await;
        }
        let more = tokio::time::timeout(Duration::from_millis(50), stream.next()).await;
        assert!(more.is_err(), "{path}: {more:?}");
        sim.handle.release();
        stream.until(delta).await;
        stream.rest().await.unwrap();
        sim.wait_for(|stats| stats.active_runs == 0).await;
    }
}

#[tokio::test]
async fn stream_can_end_early_or_with_error() {
    let sim = Sim::instant().await;
    let events = sim
        .events("/responses", response("Hello [[sim: no_terminal]]"))
        .await;
    assert_eq!(names(&events).last(), Some(&"response.output_item.done"));
    for (directive, nested) in [("mid_error", false), ("mid_error=nested", true)] {
        let events = sim
            .events(
                "/responses",
                response(&format!("Hello [[sim: {directive}]]")),
            )
            .await;
        let error = events.last().unwrap();
        assert_eq!(error.name, "error");
        let error = error.json();
        let fields = if nested { &error["error"] } else { &error };
        assert_eq!(fields["code"], "server_error");
    }
    let thread = sim.thread().await;
    let body = |text: &str| {
        json!({
            "assistant_id": "asst_1", "stream": true, "additional_messages": [{"role": "user", "content": text}],
        })
    };
    let runs = format!("/threads/{thread}/runs");
    let events = sim.events(&runs, body("Hello [[sim: mid_error]]")).await;
    assert!(names(&events).ends_with(&["thread.message.delta", "error", "done"]));
    let events = sim.events(&runs, body("Hello [[sim: no_terminal]]")).await;
    assert_eq!(names(&events).last(), Some(&"thread.run.step.completed"));
    let listed = sim.get(&runs).await;
    assert_eq!(
        (
            listed["data"][0]["status"].as_str(),
            listed["data"][1]["status"].as_str()
        ),
        (Some("completed"), Some("failed"))
    );
}

#[tokio::test]
async fn every_sse_encoding_carries_same_text() {
    let sim = Sim::instant().await;
    let plain = text(&sim.events("/responses", response("Hé 🙂")).await);
    for dialect in [
        "crlf",
        "comments",
        "no_event_lines",
        "split",
        "unknown_events",
        "crlf comments split",
    ] {
        for background in [false, true] {
            let mut body = response(&format!("Hé 🙂 [[sim: {dialect}]]"));
            body["background"] = background.into();
            let chunks = sim.open("/responses", &body).await.raw().await;
            let raw = String::from_utf8(chunks.concat()).unwrap();
            assert_eq!(dialect.contains("crlf"), raw.contains("\r\n"), "{dialect}");
            assert_eq!(
                dialect.contains("comments"),
                raw.contains("\n: keep-alive"),
                "{dialect}"
            );
            assert_eq!(
                dialect != "no_event_lines",
                raw.contains("event: response.created"),
                "{dialect}"
            );
            assert_eq!(
                dialect.contains("unknown"),
                raw.contains("response.future_event"),
                "{dialect}"
            );
            assert_eq!(
                dialect.contains("split"),
                chunks.iter().all(|chunk| chunk.len() <= 3),
                "{dialect}"
            );
            let events = sim.events("/responses", body).await;
            assert_eq!(text(&events), plain, "{dialect}");
        }
    }
}

#[tokio::test]
async fn latency_and_rate_directives_delay_response() {
    let sim = Sim::instant().await;
    let start = std::time::Instant::now();
    let events = sim
        .events(
            "/responses",
            response("x [[sim: latency=60ms rate=10ms tokens=15]]"),
        )
        .await;
    assert!(
        start.elapsed() >= Duration::from_millis(200),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(text(&events).split_whitespace().count(), 15);
}

#[tokio::test]
async fn requests_are_recorded_without_secrets() {
    let sim = Sim::start(SimulatorConfig {
        recorded: 2,
        ..SimulatorConfig::default()
    })
    .await;
    sim.thread().await;
    sim.post("/threads", json!({"metadata": {"a": "b"}})).await;
    sim.send(Method::GET, "/threads/thread_x?x=y", None).await;
    let recorded = sim.handle.recorded();
    assert_eq!(recorded.len(), 2);
    assert_eq!(
        (recorded[0].method.as_str(), recorded[0].path.as_str()),
        ("POST", "/v1/threads")
    );
    assert_eq!(recorded[0].operation.as_deref(), Some("create_thread"));
    assert_eq!(recorded[0].body, json!({"metadata": {"a": "b"}}));
    assert_eq!(recorded[0].headers["openai-beta"], "assistants=v2");
    assert!(!recorded[0].headers.contains_key("authorization"));
    assert_eq!(recorded[1].query.as_deref(), Some("x=y"));
}

#[tokio::test]
async fn handle_operations_are_available_over_http() {
    let sim = Sim::instant().await;
    let thread = sim.thread().await;
    let client = reqwest::Client::new();
    let at = |path: &str| format!("{}/_simulator/{path}", sim.root);
    client
        .post(at("hold"))
        .send()
        .await
        .unwrap()
        .error_for_status()
        .unwrap();
    let body = json!({"assistant_id": "asst_1", "additional_messages": [{"role": "user", "content": "Hi"}]});
    sim.post(&format!("/threads/{thread}/runs"), body).await;
    let stats: Stats = client
        .get(at("stats"))
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert_eq!(
        (stats.active_runs, stats.requests_by_operation["create_run"]),
        (1, 1)
    );
    assert_eq!(stats, sim.handle.stats());
    client
        .post(at("release"))
        .send()
        .await
        .unwrap()
        .error_for_status()
        .unwrap();
    sim.wait_for(|stats| stats.active_runs == 0).await;
    let history: Vec<(String, String)> = client
        .get(at(&format!("threads/{thread}/history")))
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert_eq!(history, sim.handle.thread_history(&thread));
    let places: Vec<String> = client
        .post(at("holds_text"))
        .body("Hi")
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert_eq!(places, sim.handle.holds_text("Hi"));
    assert_eq!(places.len(), 2, "the message and the reply");
    for list in ["responses", "leaked_items"] {
        let none: Vec<String> = client
            .get(at(list))
            .send()
            .await
            .unwrap()
            .json()
            .await
            .unwrap();
        assert_eq!(none, [""; 0]);
    }
    let foreign = at(&format!("threads/{thread}/foreign_run"));
    assert_eq!(client.post(&foreign).send().await.unwrap().status(), 200);
    assert_eq!(client.post(&foreign).send().await.unwrap().status(), 404);
    let stopped: Value = client
        .delete(&foreign)
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert_eq!(stopped["stopped"], true);
    client
        .post(at("reset"))
        .send()
        .await
        .unwrap()
        .error_for_status()
        .unwrap();
    assert_eq!(sim.handle.stats(), Stats::default());
    assert_eq!(
        client.get(at("nothing")).send().await.unwrap().status(),
        404
    );
}

#[tokio::test]
async fn reset_ends_active_runs() {
    let sim = Sim::instant().await;
    sim.handle.hold();
    let thread = sim.thread().await;
    let body = json!({"assistant_id": "asst_1", "stream": true});
    let mut run = sim.open(&format!("/threads/{thread}/runs"), &body).await;
    run.until("thread.run.in_progress").await;
    let mut response = sim.open("/responses", &response("Hi")).await;
    response.until("response.in_progress").await;
    sim.handle.reset();
    assert_eq!(run.rest().await.unwrap(), []);
    assert_eq!(response.rest().await.unwrap(), []);
    assert_eq!(sim.handle.stats(), Stats::default());
}

#[tokio::test]
async fn run_views_record_input_and_outcome() {
    let sim = Sim::instant().await;
    let thread = sim.thread().await;
    let said = |text: &str| json!({"role": "user", "content": text});
    let run = json!({
        "assistant_id": "asst_1", "metadata": {"tag": "a"},
        "additional_messages": [said("before"), said("now [[sim: tool=f]]")],
    });
    let run = id(&sim.post(&format!("/threads/{thread}/runs"), run).await);
    sim.wait_for(|stats| stats.active_runs == 1 && stats.max_generating_runs_per_thread == 1)
        .await;
    let path = format!("/threads/{thread}/runs/{run}");
    let call = loop {
        let seen = sim.get(&path).await;
        if seen["status"] == "requires_action" {
            break id(&seen["required_action"]["submit_tool_outputs"]["tool_calls"][0]);
        }
    };
    assert_eq!(sim.handle.threads()[0].active, std::slice::from_ref(&run));
    let outputs = json!({"tool_outputs": [{"tool_call_id": call, "output": "1"}]});
    sim.post(&format!("{path}/submit_tool_outputs"), outputs)
        .await;
    sim.wait_for(|stats| stats.active_runs == 0).await;

    // One response whose client disconnects, and one that is answered.
    let conversation = sim.conversation().await;
    let turn = |input: Value| json!({"model": "m", "conversation": conversation, "stream": true, "input": input});
    let slow = sim
        .open("/responses", &turn("slow [[sim: rate=10s]]".into()))
        .await;
    sim.wait_for(|stats| stats.active_runs == 1).await;
    assert_eq!(sim.handle.runs()[1].status, None);
    drop(slow);
    sim.wait_for(|stats| stats.active_runs == 0).await;
    let asked = sim
        .events("/responses", turn("x [[sim: tools=1]]".into()))
        .await;
    let call = asked.last().unwrap().json()["response"]["output"][0]["call_id"].clone();
    sim.events(
        "/responses",
        turn(json!([{"type": "function_call_output", "call_id": call, "output": "1"}])),
    )
    .await;

    let url = format!("{}/_simulator/runs", sim.root);
    let runs: Vec<RunView> = reqwest::get(url).await.unwrap().json().await.unwrap();
    assert_eq!(runs, sim.handle.runs());
    let ends: Vec<_> = runs
        .iter()
        .map(|run| run.status.as_deref().unwrap())
        .collect();
    assert_eq!(ends, ["completed", "abandoned", "completed", "completed"]);
    assert_eq!(
        (runs[0].id.as_str(), runs[0].thread.as_str()),
        (run.as_str(), thread.as_str())
    );
    assert_eq!(runs[0].user_texts, ["before", "now [[sim: tool=f]]"]);
    assert_eq!(
        (
            runs[0].metadata["tag"].as_str(),
            runs[0].answered_calls.len()
        ),
        ("a", 1)
    );
    assert!(runs[1..].iter().all(|run| run.thread == conversation));
    assert_eq!(
        (&runs[3].user_texts, &runs[3].answered_calls),
        (&vec![], &vec![call.as_str().unwrap().to_owned()])
    );
    for pair in runs.windows(2) {
        assert!(
            pair[0].started_ms <= pair[1].started_ms
                && pair[0].ended_ms.unwrap() <= pair[1].started_ms
        );
    }
}

#[tokio::test]
async fn only_newest_run_views_are_kept() {
    let sim = Sim::start(SimulatorConfig {
        max_kept: 2,
        ..SimulatorConfig::default()
    })
    .await;
    let slow = sim
        .open("/responses", &response("0 [[sim: rate=10s]]"))
        .await;
    for text in ["1", "2", "3"] {
        sim.events("/responses", response(text)).await;
    }
    drop(slow);
    sim.wait_for(|stats| stats.active_runs == 0).await;
    let runs = sim.handle.runs();
    assert_eq!(
        runs.iter()
            .map(|run| run.user_texts[0].as_str())
            .collect::<Vec<_>>(),
        ["2", "3"]
    );
    assert!(
        runs.iter()
            .all(|run| run.status.as_deref() == Some("completed"))
    );
}

/// Returns the first `size` bytes of an answer, or all of it.
async fn beginning(mut response: reqwest::Response, size: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < size
        && let Some(chunk) = tokio::time::timeout(PATIENCE, response.chunk())
            .await
            .unwrap()
            .unwrap()
    {
        bytes.extend_from_slice(&chunk);
    }
    bytes
}

#[tokio::test]
async fn hostile_directive_produces_named_response() {
    let sim = Sim::instant().await;
    let endless = [
        "endless_line",
        "endless_events",
        "endless_reply",
        "huge_event",
        "gzip",
    ];
    for kind in endless.into_iter().chain([
        "invalid_utf8",
        "deep_json",
        "dense_json",
        "html",
        "redirect",
        "drip",
    ]) {
        for (on, path) in [
            ("create_response", "/responses"),
            ("create_run", "/threads/t/runs"),
            ("create_conversation", "/conversations"),
        ] {
            sim.handle
                .add_fault(fault(on, &format!("hostile={kind} rate=1ms"), 1))
                .unwrap();
            let client = reqwest::Client::builder()
                .redirect(reqwest::redirect::Policy::none())
                .build()
                .unwrap();
            let request = client
                .post(format!("{}{path}", sim.base))
                .bearer_auth("sk-test");
            let request = request.header("OpenAI-Beta", "assistants=v2").body("{}");
            let answer = tokio::time::timeout(PATIENCE, request.send())
                .await
                .unwrap()
                .unwrap();
            let header = |name: &str| {
                answer
                    .headers()
                    .get(name)
                    .map(|value| value.to_str().unwrap().to_owned())
            };
            assert_eq!(
                answer.status(),
                if kind == "redirect" { 307 } else { 200 },
                "{kind}"
            );
            assert_eq!(header("location").is_some(), kind == "redirect");
            assert_eq!(
                header("content-encoding").as_deref(),
                (kind == "gzip").then_some("gzip")
            );
            let expected = match (kind, on) {
                ("html", _) => "text/html",
                (_, "create_conversation") => "application/json",
                _ => "text/event-stream",
            };
            assert_eq!(header("content-type").as_deref(), Some(expected), "{kind}");
            let size = if kind == "drip" { 20 } else { 1024 * 1024 };
            let bytes = beginning(answer, size).await;
            if endless.contains(&kind) || kind == "dense_json" || kind == "drip" {
                assert!(
                    bytes.len() >= size,
                    "{kind} on {on} ended after {} bytes",
                    bytes.len()
                );
            }
            assert_eq!(
                std::str::from_utf8(&bytes).is_err(),
                ["invalid_utf8", "gzip"].contains(&kind),
                "{kind}"
            );
        }
    }
    // A directive in a user's text does the same with any status. The request has no other
    // effect.
    let conversation = sim.conversation().await;
    let body = json!({"model": "m", "conversation": conversation, "input": "[[sim: hostile=html status=503]]"});
    let answer = sim
        .request(Method::POST, "/responses")
        .json(&body)
        .send()
        .await
        .unwrap();
    assert_eq!(
        (answer.status().as_u16(), &answer.headers()["content-type"]),
        (503, &"text/html".parse().unwrap())
    );
    assert_eq!(sim.handle.stats().runs_started, 0);
    assert_eq!(sim.handle.thread_history(&conversation), []);
}

/// Returns the body that starts a run on a thread or conversation, without a stream.
fn run_on(thread: &str, text: &str) -> (String, Value) {
    if thread.starts_with("conv_") {
        let body = json!({"model": "m", "conversation": thread, "input": text});
        ("/responses".to_owned(), body)
    } else {
        let message = json!({"role": "user", "content": text});
        let body = json!({"assistant_id": "asst_1", "additional_messages": [message]});
        (format!("/threads/{thread}/runs"), body)
    }
}

#[tokio::test]
async fn gone_fault_loses_thread_for_good() {
    let sim = Sim::instant().await;
    for thread in [sim.thread().await, sim.conversation().await] {
        for _ in 0..2 {
            sim.handle.add_fault(fault("start", "gone", 1)).unwrap();
            let (path, body) = run_on(&thread, "hello");
            assert_eq!(sim.refused(&path, body).await.0, 404);
        }
        assert_eq!(sim.handle.holds_text("hello"), [""; 0]);
    }
    let first = sim
        .post("/responses", json!({"model": "m", "input": "one"}))
        .await;
    sim.handle.add_fault(fault("start", "gone", 1)).unwrap();
    let next = json!({"model": "m", "input": "two", "previous_response_id": first["id"]});
    let (status, error) = sim.refused("/responses", next).await;
    assert_eq!(
        (status, &error["code"]),
        (400, &"previous_response_not_found".into())
    );
}

#[tokio::test]
async fn poison_is_refused_once_it_is_history() {
    let sim = Sim::instant().await;
    for thread in [sim.thread().await, sim.conversation().await] {
        let (path, body) = run_on(&thread, "one [[sim: poison=odd]]");
        sim.post(&path, body).await;
        sim.wait_for(|stats| stats.active_runs == 0).await;
        for _ in 0..2 {
            let (path, body) = run_on(&thread, "two");
            let (status, error) = sim.refused(&path, body).await;
            assert_eq!((status, &error["code"]), (400, &"odd".into()));
        }
    }
}

#[tokio::test]
async fn context_above_its_limit_is_refused() {
    let sim = Sim::start(SimulatorConfig {
        context_words: Some(5),
        ..SimulatorConfig::default()
    })
    .await;
    for thread in [sim.thread().await, sim.conversation().await] {
        let (path, body) = run_on(&thread, "one two three four five six");
        let (status, error) = sim.refused(&path, body).await;
        assert_eq!(
            (status, &error["code"]),
            (400, &"context_length_exceeded".into())
        );
        let (path, body) = run_on(&thread, "one two three four five");
        sim.post(&path, body).await;
        sim.wait_for(|stats| stats.active_runs == 0).await;
        let (path, body) = run_on(&thread, "six");
        sim.refused(&path, body).await;
    }
}

#[tokio::test]
async fn odd_streams_are_written_as_directed() {
    let sim = Sim::instant().await;
    let told = sim
        .events("/responses", response("x [[sim: halves]]"))
        .await;
    let halves: Vec<&str> = told.iter().map(|event| event.data.as_str()).collect();
    assert!(
        halves
            .iter()
            .any(|data| data.contains("\"delta\":\"\\ud83d\"")),
        "{halves:#?}"
    );
    assert!(halves.last().unwrap().contains('🙂'), "{halves:#?}");
    let told = sim
        .events("/responses", response("x [[sim: two_ends]]"))
        .await;
    let ends = told
        .iter()
        .filter(|event| event.name == "response.completed");
    assert_eq!(ends.count(), 2);
    let told = sim
        .events("/responses", response("x [[sim: unreadable]]"))
        .await;
    let broken = told
        .iter()
        .filter(|event| serde_json::from_str::<Value>(&event.data).is_err());
    assert_eq!(broken.count(), 1);
    let told = sim.events("/responses", response("x [[sim: empty]]")).await;
    let last = told.last().unwrap().json();
    assert_eq!(
        (&last["response"]["status"], &last["response"]["output"]),
        (&"completed".into(), &json!([]))
    );
    let (path, mut body) = run_on(&sim.thread().await, "x [[sim: empty two_ends]]");
    body["stream"] = true.into();
    let told = sim.events(&path, body).await;
    assert!(
        !told
            .iter()
            .any(|event| event.name.starts_with("thread.message"))
    );
    let ends = told
        .iter()
        .filter(|event| event.name == "thread.run.completed");
    assert_eq!(ends.count(), 2);
}

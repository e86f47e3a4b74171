//! Checks the simulator's answers and events against the published specifications, call by call.

use reqwest::Method;
use serde_json::{Value, json};
use threadkeeper::simulator::SimulatorConfig;

use crate::support::openapi::{self, Document};
use crate::support::wire::{Event, Sim, id};

/// A simulator; every exchange with it is checked.
struct Checked {
    sim: Sim,
    document: &'static Document,
}

impl Checked {
    async fn start(document: &'static Document) -> Self {
        Self {
            sim: Sim::instant().await,
            document,
        }
    }

    async fn call(&self, method: Method, path: &str, body: Value) -> Value {
        let body = Some(&body).filter(|body| !body.is_null());
        let (status, answer) = self.sim.send(method.clone(), path, body).await;
        let template = self.template(&method, path);
        if status == 200 {
            let body = body.unwrap_or(&Value::Null);
            self.document
                .check_request(method.as_str(), &template, body)
                .unwrap();
        }
        self.document
            .check_response(method.as_str(), &template, status, &answer)
            .unwrap();
        answer
    }

    async fn post(&self, path: &str, body: Value) -> Value {
        self.call(Method::POST, path, body).await
    }

    async fn get(&self, path: &str) -> Value {
        self.call(Method::GET, path, Value::Null).await
    }

    async fn delete(&self, path: &str) -> Value {
        self.call(Method::DELETE, path, Value::Null).await
    }

    async fn stream(&self, path: &str, body: Value) -> Vec<Event> {
        let template = self.template(&Method::POST, path);
        self.document
            .check_request("POST", &template, &body)
            .unwrap();
        let events = self.sim.events(path, body).await;
        for event in &events {
            let data = serde_json::from_str(&event.data)
                .unwrap_or_else(|_| Value::String(event.data.clone()));
            self.document.check_event(&event.name, &data).unwrap();
        }
        events
    }

    fn template(&self, method: &Method, path: &str) -> String {
        let path = path.split('?').next().unwrap();
        self.document
            .template(method.as_str(), path)
            .unwrap_or_else(|| panic!("the specification lacks {method} {path}"))
    }
}

/// A user's message with instructions for the simulator.
fn says(text: &str) -> Value {
    json!({"role": "user", "content": text})
}

#[tokio::test]
async fn thread_message_and_run_endpoints_match_specification() {
    let api = Checked::start(openapi::assistants()).await;
    let thread = id(&api
        .post(
            "/threads",
            json!({"messages": [says("Hi")], "metadata": {"a": "b"}}),
        )
        .await);
    let at = format!("/threads/{thread}");
    api.get(&at).await;
    api.post(&at, json!({"metadata": {"c": "d"}})).await;
    let parts = json!([
        {"type": "text", "text": "Look"},
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png", "detail": "low"}},
        {"type": "image_file", "image_file": {"file_id": "file_1"}},
    ]);
    let message = api
        .post(
            &format!("{at}/messages"),
            json!({"role": "user", "content": parts}),
        )
        .await;
    let message = format!("{at}/messages/{}", id(&message));
    api.get(&message).await;
    api.post(&message, json!({"metadata": {"e": "f"}})).await;
    api.delete(&message).await;
    let page = api.get(&format!("{at}/messages?limit=1&order=asc")).await;
    api.get(&format!(
        "{at}/messages?limit=100&order=asc&after={}",
        page["last_id"].as_str().unwrap()
    ))
    .await;
    api.get(&format!("{at}/runs")).await;
    let body = json!({
        "assistant_id": "asst_1", "model": "m", "instructions": "Be kind.", "metadata": {"turn": "1"},
        "tools": [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}],
        "temperature": 0.5, "max_completion_tokens": 1000,
        "additional_messages": [says("Hello [[sim: tools=2]]")],
    });
    let run = api.post(&format!("{at}/runs"), body).await;
    let run = format!("{at}/runs/{}", id(&run));
    let calls = loop {
        let now = api.get(&run).await;
        if now["status"] == "requires_action" {
            break now["required_action"]["submit_tool_outputs"]["tool_calls"].clone();
        }
        tokio::task::yield_now().await;
    };
    api.post(&run, json!({"metadata": {"turn": "one"}})).await;
    api.get(&format!("{at}/runs")).await;
    let steps = api.get(&format!("{run}/steps")).await;
    api.get(&format!(
        "{run}/steps/{}",
        steps["data"][0]["id"].as_str().unwrap()
    ))
    .await;
    api.post(&format!("{at}/messages"), says("too early")).await;
    let outputs: Vec<Value> = calls
        .as_array()
        .unwrap()
        .iter()
        .map(|call| json!({"tool_call_id": call["id"], "output": "found"}))
        .collect();
    api.post(
        &format!("{run}/submit_tool_outputs"),
        json!({"tool_outputs": outputs}),
    )
    .await;
    api.sim.wait_for(|stats| stats.active_runs == 0).await;
    api.get(&run).await;
    api.get(&format!("{run}/steps")).await;
    api.get(&format!("{at}/messages")).await;
    api.post(&format!("{run}/cancel"), Value::Null).await;
    api.sim.handle.hold();
    let run = api
        .post(&format!("{at}/runs"), json!({"assistant_id": "asst_1"}))
        .await;
    api.post(&format!("{at}/runs/{}/cancel", id(&run)), Value::Null)
        .await;
    api.sim.handle.release();
    api.sim.wait_for(|stats| stats.active_runs == 0).await;
    api.get(&format!("{at}/runs/{}", id(&run))).await;
    let together =
        json!({"assistant_id": "asst_1", "thread": {"messages": [says("Both at once")]}});
    api.post("/threads/runs", together).await;
    api.delete(&at).await;
    api.get(&at).await;
    api.get(&format!("{at}/messages")).await;
    api.get(&format!("{at}/runs")).await;
    api.delete(&at).await;
}

#[tokio::test]
async fn run_events_match_specification() {
    let api = Checked::start(openapi::assistants()).await;
    let thread = api.sim.thread().await;
    let runs = format!("/threads/{thread}/runs");
    for text in [
        "Hello",
        "[[sim: fail]]",
        "[[sim: incomplete]]",
        "[[sim: refusal]]",
        "[[sim: parts=2]]",
        "[[sim: mid_error]]",
    ] {
        let body =
            json!({"assistant_id": "asst_1", "stream": true, "additional_messages": [says(text)]});
        api.stream(&runs, body).await;
    }
    let body = json!({"assistant_id": "asst_1", "stream": true, "thread": {"messages": [says("[[sim: tools=2]]")]}});
    let events = api.stream("/threads/runs", body).await;
    let run = events
        .iter()
        .find(|event| event.name == "thread.run.requires_action")
        .unwrap()
        .json();
    let calls = run["required_action"]["submit_tool_outputs"]["tool_calls"]
        .as_array()
        .unwrap()
        .clone();
    let outputs: Vec<Value> = calls
        .iter()
        .map(|call| json!({"tool_call_id": call["id"], "output": "4 °C"}))
        .collect();
    let path = format!(
        "/threads/{}/runs/{}/submit_tool_outputs",
        run["thread_id"].as_str().unwrap(),
        id(&run)
    );
    api.stream(&path, json!({"tool_outputs": outputs, "stream": true}))
        .await;
}

#[tokio::test]
async fn events_of_cancelled_and_expired_runs_match_specification() {
    let document = openapi::assistants();
    let config = SimulatorConfig {
        run_expiry: std::time::Duration::from_millis(50),
        ..SimulatorConfig::default()
    };
    for (config, end) in [
        (SimulatorConfig::default(), "cancelled"),
        (config, "expired"),
    ] {
        let sim = Sim::start(config).await;
        let thread = sim.thread().await;
        let body = json!({
            "assistant_id": "asst_1", "stream": true, "additional_messages": [says("[[sim: tokens=50 rate=10s]]")],
        });
        let mut stream = sim.open(&format!("/threads/{thread}/runs"), &body).await;
        let run = id(&stream.until("thread.run.created").await.json());
        stream.until("thread.message.delta").await;
        if end == "cancelled" {
            sim.send(
                Method::POST,
                &format!("/threads/{thread}/runs/{run}/cancel"),
                None,
            )
            .await;
        }
        let events = stream.rest().await.unwrap();
        assert!(
            events
                .iter()
                .any(|event| event.name == format!("thread.run.{end}")),
            "{events:?}"
        );
        for event in &events {
            let data = serde_json::from_str(&event.data)
                .unwrap_or_else(|_| Value::String(event.data.clone()));
            document.check_event(&event.name, &data).unwrap();
        }
    }
}

#[tokio::test]
async fn conversation_and_response_endpoints_match_specification() {
    let api = Checked::start(openapi::responses()).await;
    let conversation = api
        .post(
            "/conversations",
            json!({"items": [says("Hi")], "metadata": {"a": "b"}}),
        )
        .await;
    let at = format!("/conversations/{}", id(&conversation));
    api.get(&at).await;
    api.post(&at, json!({"metadata": {"c": "d"}})).await;
    let items = api
        .post(
            &format!("{at}/items"),
            json!({"items": [says("One"), says("Two")]}),
        )
        .await;
    let item = format!("{at}/items/{}", items["first_id"].as_str().unwrap());
    api.get(&item).await;
    api.delete(&item).await;
    api.delete(&item).await;
    let tool = json!({"type": "function", "name": "look_up", "parameters": {"type": "object"}, "strict": false});
    let asked = api
        .post("/responses", json!({
            "model": "gpt-5", "conversation": id(&conversation), "instructions": "Be kind.", "tools": [tool],
            "input": "Look it up [[sim: tool=look_up reasoning]]", "metadata": {"turn": "1"}, "max_output_tokens": 100,
        }))
        .await;
    let call = asked["output"]
        .as_array()
        .unwrap()
        .iter()
        .find(|item| item["type"] == "function_call")
        .unwrap();
    let output =
        json!([{"type": "function_call_output", "call_id": call["call_id"], "output": "found"}]);
    let body =
        json!({"model": "gpt-5", "conversation": {"id": id(&conversation)}, "input": output});
    let answered = api.post("/responses", body).await;
    api.post(
        "/responses",
        json!({"model": "gpt-5", "input": "x", "conversation": "thread_1"}),
    )
    .await;
    let page = api.get(&format!("{at}/items?limit=1&order=asc")).await;
    api.get(&format!(
        "{at}/items?limit=100&order=asc&after={}",
        page["last_id"].as_str().unwrap()
    ))
    .await;
    let response = format!("/responses/{}", id(&answered));
    api.get(&response).await;
    api.get(&format!("{response}/input_items")).await;
    api.post(&format!("{response}/cancel"), Value::Null).await;
    api.delete(&response).await;
    api.delete(&response).await;
    api.post(&format!("{response}/cancel"), Value::Null).await;
    for text in [
        "[[sim: fail]]",
        "[[sim: incomplete]]",
        "[[sim: refusal]]",
        "[[sim: parts=2]]",
    ] {
        let chained = json!({"model": "gpt-5", "input": text, "store": false});
        api.post("/responses", chained).await;
    }
    api.sim.handle.hold();
    let running = api
        .post(
            "/responses",
            json!({"model": "gpt-5", "input": "Hello", "background": true}),
        )
        .await;
    let running = format!("/responses/{}", id(&running));
    api.get(&running).await;
    api.delete(&running).await;
    api.post(&format!("{running}/cancel"), Value::Null).await;
    api.get(&running).await;
    api.delete(&running).await;
    api.delete(&at).await;
    api.get(&at).await;
    api.get(&format!("{at}/items")).await;
    api.delete(&at).await;
}

#[tokio::test]
async fn response_events_match_specification() {
    let api = Checked::start(openapi::responses()).await;
    for text in [
        "Hello",
        "[[sim: fail]]",
        "[[sim: incomplete]]",
        "[[sim: refusal]]",
        "[[sim: parts=2]]",
        "[[sim: tools=2 reasoning]]",
        "[[sim: mid_error]]",
        "[[sim: fail_text=open_call]]",
        "[[sim: dangling_reasoning]]",
    ] {
        for background in [false, true] {
            let body =
                json!({"model": "gpt-5", "input": text, "stream": true, "background": background});
            api.stream("/responses", body).await;
        }
    }
}

#[test]
fn specification_checks_reject_violations() {
    let (assistants, responses) = (openapi::assistants(), openapi::responses());
    let refused = |result: Result<(), String>, why: &str| {
        let error = result.expect_err(why);
        assert!(error.contains(why), "{error}");
    };
    let runs = "/threads/{thread_id}/runs";
    let fine = json!({"assistant_id": "asst_1", "metadata": {"a": "b"}});
    assistants.check_request("POST", runs, &fine).unwrap();
    refused(
        assistants.check_request("POST", runs, &json!({})),
        "assistant_id",
    );
    refused(
        assistants.check_request(
            "POST",
            runs,
            &json!({"assistant_id": "asst_1", "thread": "t"}),
        ),
        "thread",
    );
    refused(
        assistants.check_request("GET", runs, &fine),
        "takes no body",
    );
    refused(
        assistants.check_request("POST", "/nowhere", &fine),
        "no operation",
    );
    let thread = json!({"id": "t", "object": "thread", "created_at": 1, "metadata": {}, "tool_resources": null});
    assistants
        .check_response("GET", "/threads/{thread_id}", 200, &thread)
        .unwrap();
    let mut broken = thread.clone();
    broken["created_at"] = "2026-11-22".into();
    refused(
        assistants.check_response("GET", "/threads/{thread_id}", 200, &broken),
        "/created_at",
    );
    refused(
        assistants.check_response("GET", "/threads/{thread_id}", 404, &json!({"detail": "no"})),
        "error",
    );
    refused(
        assistants.check_event("thread.run.created", &thread),
        "thread.run",
    );
    refused(
        assistants.check_event("thread.run.exploded", &thread),
        "no event",
    );
    let delta = json!({
        "type": "response.output_text.delta", "item_id": "m", "output_index": 0, "content_index": 0, "delta": "x",
        "logprobs": [], "sequence_number": 4,
    });
    responses
        .check_event("response.output_text.delta", &delta)
        .unwrap();
    let mut broken = delta.clone();
    broken.as_object_mut().unwrap().remove("sequence_number");
    refused(
        responses.check_event("response.output_text.delta", &broken),
        "sequence_number",
    );
    refused(
        responses.check_request("POST", "/responses", &json!({"model": "m", "input": 7})),
        "/input",
    );
    assert_eq!(
        assistants.template("POST", "/threads/runs").unwrap(),
        "/threads/runs"
    );
    assert_eq!(
        assistants.template("GET", "/threads/t_1/runs/r_1").unwrap(),
        "/threads/{thread_id}/runs/{run_id}"
    );
    assert_eq!(assistants.template("DELETE", "/threads/t_1/runs/r_1"), None);
}

//! Function calls: the run waits for its caller's outputs and continues with them.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use threadkeeper::simulator::Fault;

use crate::support::gateway::{Answer, EventReader, Gateway, text, text_of};
use crate::support::history::assert_same;
use crate::support::scene::{Backend, Protocol, Scene, on_each_protocol};

on_each_protocol!(
    run_waits_for_tool_outputs_and_continues,
    run_may_request_tool_calls_repeatedly,
    tool_outputs_support_streaming_and_async_replies,
    mismatched_tool_outputs_are_refused_with_reason,
    concurrent_tool_outputs_are_accepted_once,
    wait_for_tool_outputs_expires_at_deadline,
    wait_for_tool_outputs_can_be_cancelled,
    wait_for_tool_outputs_survives_crash,
    wait_for_tool_outputs_survives_orderly_shutdown,
    submitted_tool_outputs_survive_crash_when_recoverable,
    tool_outputs_lost_after_takeover_are_looked_up,
    message_queued_behind_tool_call_is_answered,
    each_type_of_call_is_answered_or_closed,
);

const SCOPE: &str = "/v1/users/alice";

async fn ask(gateway: &Gateway, content: &str) -> Value {
    let answer = gateway.say(SCOPE, content).await;
    assert_eq!(answer["run"]["status"], "requires_action", "{answer:#}");
    assert_eq!(
        (&answer["message"], &answer["thread"]["state"]),
        (&Value::Null, &json!("requires_action"))
    );
    answer
}

fn path(answer: &Value) -> String {
    format!(
        "{SCOPE}/runs/{}/tool_outputs",
        answer["run"]["id"].as_str().unwrap()
    )
}

fn outputs(answer: &Value, output: &str) -> Value {
    let calls = answer["run"]["required_action"]["tool_calls"]
        .as_array()
        .unwrap();
    calls
        .iter()
        .map(|call| json!({"tool_call_id": call["id"], "output": output}))
        .collect()
}

async fn give(gateway: &Gateway, asked: &Value, output: &str) -> Answer {
    gateway
        .post(
            &path(asked),
            &json!({"tool_outputs": outputs(asked, output)}),
        )
        .await
}

async fn run_waits_for_tool_outputs_and_continues(scene: Scene) {
    let gateway = scene.gateway().await;
    gateway.say(SCOPE, "hello").await;
    let asked = ask(&gateway, "weather? [[sim: tool=get_weather tool=get_time]]").await;
    let calls = asked["run"]["required_action"]["tool_calls"]
        .as_array()
        .unwrap();
    let names: Vec<_> = calls
        .iter()
        .map(|call| call["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["get_weather", "get_time"]);
    for call in calls {
        assert!(
            call["arguments"].as_str().unwrap().contains("weather?"),
            "{call:#}"
        );
    }
    let read = gateway
        .get(path(&asked).trim_end_matches("/tool_outputs"))
        .await
        .ok();
    assert_eq!(
        read["run"], asked["run"],
        "another request reads the same answer"
    );

    let answer = give(&gateway, &asked, "4 °C").await.ok();
    assert_eq!(
        answer["run"]["id"], asked["run"]["id"],
        "the run is the same"
    );
    assert_eq!(
        (&answer["run"]["status"], &answer["thread"]["state"]),
        (&json!("completed"), &json!("idle"))
    );
    assert_eq!(answer["run"]["required_action"], Value::Null);
    assert!(
        text(&answer["message"]).contains("The tools answered: 4 °C; 4 °C."),
        "{answer:#}"
    );
    assert!(answer["run"]["usage"]["total_tokens"].as_u64().unwrap() > 0);
    let next = gateway.say(SCOPE, "thanks").await;
    assert!(text(&next["message"]).contains("turn 3 of"));
    assert_same(&scene, &gateway, SCOPE).await;
    assert_eq!(scene.simulator.stats().lock_refusals, 0);
}

async fn run_may_request_tool_calls_repeatedly(scene: Scene) {
    let gateway = scene.gateway().await;
    let first = ask(&gateway, "weather? [[sim: tool=get_place]]").await;
    let second = give(&gateway, &first, "Paris [[sim: tool=get_weather]]")
        .await
        .ok();
    assert_eq!(second["run"]["status"], "requires_action", "{second:#}");
    assert_eq!(second["run"]["id"], first["run"]["id"]);
    assert_ne!(
        second["run"]["required_action"],
        first["run"]["required_action"]
    );
    let late = give(&gateway, &first, "Paris").await;
    assert_eq!(
        late.problem(),
        (422, "invalid-request"),
        "the run does not wait for these calls"
    );
    let answer = give(&gateway, &second, "4 °C").await.ok();
    assert!(text(&answer["message"]).contains("4 °C"), "{answer:#}");
    gateway.say(SCOPE, "thanks").await;
    assert_same(&scene, &gateway, SCOPE).await;
}

async fn tool_outputs_support_streaming_and_async_replies(scene: Scene) {
    let gateway = scene.gateway().await;
    let mut stream = gateway
        .stream(SCOPE, "weather? [[sim: tool=get_weather]]")
        .await;
    let mut events = Vec::new();
    while let Some(event) = stream.next().await {
        events.push(event);
    }
    let names: Vec<_> = events.iter().map(|event| event.name.as_str()).collect();
    assert_eq!(
        names,
        ["run.started", "run.requires_action"],
        "the stream ends with the pause"
    );
    let wait = events.pop().unwrap();
    let asked = &wait.data;
    assert_eq!(asked["tool_calls"][0]["name"], "get_weather");
    let run = asked["run_id"].as_str().unwrap();
    let outputs = json!([{"tool_call_id": asked["tool_calls"][0]["id"], "output": "4 °C"}]);
    let body = json!({"tool_outputs": outputs, "stream": true});
    let request = gateway
        .request(Method::POST, &format!("{SCOPE}/runs/{run}/tool_outputs"))
        .json(&body);
    let events = EventReader::new(request.send().await.unwrap()).rest().await;
    assert_eq!(events.last().unwrap().name, "run.completed");
    assert!(text_of(&events).contains("4 °C"), "{events:#?}");
    assert!(
        events
            .iter()
            .all(|event| event.name != "run.requires_action"),
        "the stream has only the later events"
    );
    let n = |event: &crate::support::gateway::Event| {
        event.id.rsplit_once(':').unwrap().1.parse::<u64>().unwrap()
    };
    assert!(n(&events[0]) > n(&wait), "{events:#?}");
    assert!(
        events.windows(2).all(|two| n(&two[1]) > n(&two[0])),
        "{events:#?}"
    );

    let asked = ask(&gateway, "and there? [[sim: tool=get_weather]]").await;
    let request = gateway
        .request(Method::POST, &path(&asked))
        .header("prefer", "respond-async");
    let body = json!({"tool_outputs": self::outputs(&asked, "30 °C")});
    scene.simulator.hold();
    let taken = gateway.send(request.json(&body)).await;
    assert_eq!(taken.status, StatusCode::ACCEPTED, "{:#}", taken.body);
    scene.simulator.release();
    let place = taken.headers["location"].to_str().unwrap().to_owned();
    assert_eq!(place, path(&asked).trim_end_matches("/tool_outputs"));
    let read = gateway
        .until(&place, |answer| answer.body["run"]["status"] == "completed")
        .await
        .ok();
    assert!(text(&read["message"]).contains("30 °C"));
}

async fn mismatched_tool_outputs_are_refused_with_reason(scene: Scene) {
    let gateway = scene.gateway().await;
    let asked = ask(&gateway, "weather? [[sim: tool=a tool=b]]").await;
    let calls = asked["run"]["required_action"]["tool_calls"]
        .as_array()
        .unwrap();
    let (a, b) = (
        calls[0]["id"].as_str().unwrap(),
        calls[1]["id"].as_str().unwrap(),
    );
    let output = |id: &str| json!({"tool_call_id": id, "output": "x"});
    for (outputs, told) in [
        (json!([output(a)]), format!("missing: `{b}`")),
        (json!([]), format!("missing: `{a}`, `{b}`")),
        (
            json!([output(a), output(b), output("call_unknown")]),
            "does not wait for: `call_unknown`".to_owned(),
        ),
        (
            json!([output(a), output(b), output(a)]),
            "more than once".to_owned(),
        ),
        (
            json!([{"tool_call_id": a}, output(b)]),
            "`tool_outputs".to_owned(),
        ),
    ] {
        let refused = gateway
            .post(&path(&asked), &json!({"tool_outputs": outputs}))
            .await;
        assert_eq!(refused.problem(), (422, "invalid-request"), "{outputs}");
        let detail = refused.body["detail"].as_str().unwrap();
        assert!(detail.contains(&told), "{detail}");
    }
    let nobody = format!("{SCOPE}/runs/run_0198f000000070008000000000000000/tool_outputs");
    let unknown = gateway.post(&nobody, &json!({"tool_outputs": []})).await;
    assert_eq!(unknown.problem(), (404, "not-found"));
    let elsewhere = path(&asked).replace("alice", "bob");
    assert_eq!(
        gateway
            .post(&elsewhere, &json!({"tool_outputs": []}))
            .await
            .problem(),
        (404, "not-found")
    );
    give(&gateway, &asked, "fine").await.ok();
    let late = give(&gateway, &asked, "fine").await;
    assert_eq!(late.problem(), (409, "run-not-waiting"));
}

async fn concurrent_tool_outputs_are_accepted_once(scene: Scene) {
    let gateway = scene.gateway().await;
    let asked = ask(&gateway, "weather? [[sim: tool=get_weather]]").await;
    scene.simulator.hold();
    let all = async {
        let gives = (0..8).map(|n| {
            let (gateway, asked) = (&gateway, &asked);
            async move { give(gateway, asked, &format!("{n} °C")).await }
        });
        futures_util::future::join_all(gives).await
    };
    let release = async {
        scene
            .simulator
            .wait_for(|stats| stats.requests_by_operation.contains_key(answers(&scene)))
            .await;
        scene.simulator.release();
    };
    let (answers, ()) = tokio::join!(all, release);
    let taken: Vec<_> = answers
        .iter()
        .filter(|answer| answer.status == StatusCode::OK)
        .collect();
    assert_eq!(taken.len(), 1, "{answers:#?}");
    for refused in answers
        .iter()
        .filter(|answer| answer.status != StatusCode::OK)
    {
        assert_eq!(refused.problem(), (409, "run-not-waiting"));
    }
    gateway.say(SCOPE, "thanks").await;
    assert_same(&scene, &gateway, SCOPE).await;
}

/// Returns the operation that sends outputs to the simulator.
fn answers(scene: &Scene) -> &'static str {
    if scene.protocol == Protocol::Assistants {
        "submit_tool_outputs"
    } else {
        "create_response"
    }
}

async fn wait_for_tool_outputs_expires_at_deadline(scene: Scene) {
    let (settings, timeout_ms) = if scene.backend == Backend::Sqlite {
        ("", 400)
    } else {
        ("[runs]\ntool_outputs_timeout = \"400ms\"", 60_000)
    };
    let gateway = scene.gateway_with(settings).await;
    gateway.say(SCOPE, "hello").await;
    let body = json!({"content": "weather? [[sim: tool=get_weather]]", "timeout_ms": timeout_ms});
    let asked = gateway.post(&format!("{SCOPE}/messages"), &body).await.ok();
    let run = path(&asked).trim_end_matches("/tool_outputs").to_owned();
    let read = gateway
        .until(&run, |answer| {
            answer.body["run"]["status"] != "requires_action"
        })
        .await
        .ok();
    assert_eq!(read["run"]["status"], "expired");
    assert_eq!(read["run"]["error"]["code"], "deadline_exceeded");
    let late = give(&gateway, &asked, "4 °C").await;
    assert_eq!(late.problem(), (409, "run-not-waiting"));
    assert!(
        late.body["detail"].as_str().unwrap().contains("deadline"),
        "{:#}",
        late.body
    );
    let next = gateway.say(SCOPE, "hello again").await;
    assert!(text(&next["message"]).contains("hello again"));
    assert_same(&scene, &gateway, SCOPE).await;
}

async fn wait_for_tool_outputs_can_be_cancelled(scene: Scene) {
    let gateway = scene.gateway().await;
    let asked = ask(&gateway, "weather? [[sim: tool=get_weather]]").await;
    let run = path(&asked).trim_end_matches("/tool_outputs").to_owned();
    let cancelled = gateway
        .send(gateway.request(Method::POST, &format!("{run}/cancel")))
        .await
        .ok();
    assert_eq!(cancelled["run"]["status"], "cancelled");
    assert_eq!(
        give(&gateway, &asked, "4 °C").await.problem(),
        (409, "run-not-waiting")
    );
    gateway.say(SCOPE, "hello again").await;
    assert_same(&scene, &gateway, SCOPE).await;
    assert_eq!(scene.simulator.stats().active_runs, 0);
}

/// With this session the next process soon counts the one before as dead.
const SHORT: &str = "[replica]\nsession_ttl = \"900ms\"\n";

async fn wait_for_tool_outputs_survives_crash(scene: Scene) {
    let gateway = scene.gateway_with(SHORT).await;
    let asked = ask(&gateway, "weather? [[sim: tool=get_weather]]").await;
    gateway.kill();
    let gateway = scene.gateway_with(SHORT).await;
    run_continues(&scene, &gateway, &asked).await;
}

async fn wait_for_tool_outputs_survives_orderly_shutdown(scene: Scene) {
    let mut gateway = scene.gateway_with(SHORT).await;
    let asked = ask(&gateway, "weather? [[sim: tool=get_weather]]").await;
    gateway.terminate();
    assert!(gateway.exit().await.success());
    let gateway = scene.gateway_with(SHORT).await;
    run_continues(&scene, &gateway, &asked).await;
}

async fn submitted_tool_outputs_survive_crash_when_recoverable(scene: Scene) {
    let upstream = "lock_window = \"300ms\"\n";
    let gateway = scene.gateway_both(SHORT, upstream).await;
    let asked = ask(&gateway, "weather? [[sim: tool=get_weather]]").await;
    scene.simulator.hold();
    let begun = scene
        .simulator
        .stats()
        .requests_by_operation
        .get(answers(&scene))
        .copied()
        .unwrap_or(0);
    let request = gateway
        .request(Method::POST, &path(&asked))
        .header("prefer", "respond-async");
    let taken = gateway
        .send(request.json(&json!({"tool_outputs": outputs(&asked, "4 °C")})))
        .await;
    assert_eq!(taken.status, StatusCode::ACCEPTED);
    let sent = scene.simulator.wait_for(|stats| {
        stats
            .requests_by_operation
            .get(answers(&scene))
            .copied()
            .unwrap_or(0)
            > begun
    });
    sent.await;
    gateway.kill();
    scene.simulator.release();
    let gateway = scene.gateway_both(SHORT, upstream).await;
    let run = path(&asked).trim_end_matches("/tool_outputs").to_owned();
    let read = gateway
        .until(&run, |answer| answer.body["run"]["finished_at"].is_string())
        .await
        .ok();
    if scene.protocol == Protocol::Chain {
        // Without a look-up the gateway cannot know whether they arrived, so it does not send
        // them again.
        assert_eq!(read["run"]["error"]["code"], "stream_broken", "{read:#}");
    } else {
        assert!(text(&read["message"]).contains("4 °C"), "{read:#}");
    }
    gateway.say(SCOPE, "thanks").await;
    assert_same(&scene, &gateway, SCOPE).await;
}

async fn tool_outputs_lost_after_takeover_are_looked_up(scene: Scene) {
    let upstream = "lock_window = \"300ms\"\n";
    let gateway = scene.gateway_both(SHORT, upstream).await;
    let asked = ask(&gateway, "weather? [[sim: tool=get_weather]]").await;
    gateway.kill();
    let gateway = scene.gateway_both(SHORT, upstream).await;
    let (on, fault) = (answers(&scene).to_owned(), "drop=before".to_owned());
    scene
        .simulator
        .add_fault(Fault {
            on,
            fault,
            times: 1,
        })
        .unwrap();
    let answer = give(&gateway, &asked, "4 °C").await;
    if scene.protocol == Protocol::Chain {
        assert_eq!(answer.body["code"], "stream_broken", "{answer:?}");
    } else {
        let answer = answer.ok();
        assert_eq!(answer["run"]["status"], "completed", "{answer:#}");
        assert!(text(&answer["message"]).contains("4 °C"), "{answer:#}");
    }
    gateway.say(SCOPE, "thanks").await;
    assert_same(&scene, &gateway, SCOPE).await;
}

async fn run_continues(scene: &Scene, gateway: &Gateway, asked: &Value) {
    let run = path(asked).trim_end_matches("/tool_outputs").to_owned();
    assert_eq!(
        gateway.get(&run).await.ok()["run"],
        asked["run"],
        "the run waits as before"
    );
    let answer = give(gateway, asked, "4 °C").await.ok();
    assert_eq!(answer["run"]["status"], "completed");
    assert!(text(&answer["message"]).contains("4 °C"));
    // The new process shows all events, including those of the old process.
    let events = gateway
        .request(Method::GET, &format!("{run}/events"))
        .send()
        .await
        .unwrap();
    let events = EventReader::new(events).rest().await;
    let mut names: Vec<_> = events.iter().map(|event| event.name.as_str()).collect();
    names.dedup();
    let wanted = [
        "run.started",
        "run.requires_action",
        "message.delta",
        "message.completed",
        "run.completed",
    ];
    assert_eq!(names, wanted);
    gateway.say(SCOPE, "thanks").await;
    assert_same(scene, gateway, SCOPE).await;
}

async fn message_queued_behind_tool_call_is_answered(scene: Scene) {
    let gateway = scene.gateway().await;
    let asked = ask(&gateway, "weather? [[sim: tool=get_weather]]").await;
    let mut waiting = gateway.stream(SCOPE, "and me?").await;
    assert_eq!(waiting.next().await.unwrap().name, "run.queued");
    let thread = gateway.get(&format!("{SCOPE}/thread")).await.ok();
    assert_eq!(
        (&thread["state"], &thread["queue_depth"]),
        (&json!("requires_action"), &json!(1))
    );
    give(&gateway, &asked, "4 °C").await.ok();
    assert_eq!(waiting.rest().await.last().unwrap().name, "run.completed");
    assert_same(&scene, &gateway, SCOPE).await;
}

/// A type of call, a part of its arguments, its answer, a part of the reply to that, and an answer
/// of a wrong form with the refusal.
type Kind = (
    &'static str,
    &'static str,
    Value,
    &'static str,
    Value,
    &'static str,
);

fn kinds(protocol: Protocol) -> Vec<Kind> {
    let text = |text: &str| json!({"output": text});
    let approval: Kind = (
        "mcp_approval",
        "look",
        json!({"approve": true}),
        "approved",
        text("yes"),
        "`approve`",
    );
    if protocol == Protocol::Assistants {
        return vec![approval];
    }
    let picture = json!({"type": "input_image", "image_url": "data:image/png;base64,AA=="});
    let words = json!({"type": "input_text", "text": "a picture"});
    let check = json!([{"id": "check_1"}]);
    let shell = json!([{"stdout": "4", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}]);
    let approve = json!({"approve": true});
    vec![
        approval,
        (
            "function",
            "look",
            json!({"output": [words, picture]}),
            "a picture",
            approve.clone(),
            "`output`",
        ),
        (
            "custom",
            "look",
            text("four"),
            "four",
            json!({"approve": false, "reason": "no"}),
            "`output`",
        ),
        (
            "computer",
            "screenshot",
            json!({"output": [picture], "acknowledged_safety_checks": check}),
            "a screenshot",
            text("seen"),
            "`input_image`",
        ),
        (
            "local_shell",
            "exec",
            text("files"),
            "files",
            json!({"output": [words]}),
            "a string",
        ),
        (
            "shell",
            "exec",
            text(&shell.to_string()),
            "4",
            text("4"),
            "JSON",
        ),
        (
            "apply_patch",
            "delete_file",
            text(r#"{"status": "completed", "output": "gone"}"#),
            "gone",
            text("gone"),
            "JSON",
        ),
    ]
}

async fn each_type_of_call_is_answered_or_closed(scene: Scene) {
    let gateway = scene.gateway().await;
    let kinds = kinds(scene.protocol);
    let with_id = |asked: &Value, answer: &Value| {
        let mut answer = answer.clone();
        answer["tool_call_id"] = asked["run"]["required_action"]["tool_calls"][0]["id"].clone();
        json!({"tool_outputs": [answer]})
    };
    for (kind, told, answer, said, wrong, form) in &kinds {
        let asked = ask(&gateway, &format!("look [[sim: tool={kind}:find]]")).await;
        let call = &asked["run"]["required_action"]["tool_calls"][0];
        assert_eq!(call["type"], *kind, "{call:#}");
        assert!(
            call["arguments"].as_str().unwrap().contains(told),
            "{call:#}"
        );
        assert_eq!(
            call["server_label"] == "sim",
            *kind == "mcp_approval",
            "{call:#}"
        );
        let refused = gateway.post(&path(&asked), &with_id(&asked, wrong)).await;
        assert_eq!(refused.problem(), (422, "invalid-request"), "{kind}");
        let detail = refused.body["detail"].as_str().unwrap();
        assert!(detail.contains(kind) && detail.contains(form), "{detail}");
        let answered = gateway
            .post(&path(&asked), &with_id(&asked, answer))
            .await
            .ok();
        let reply = text(&answered["message"]);
        assert!(
            reply.contains(&format!("The tools answered: {said}.")),
            "{kind}: {reply}"
        );
    }

    // Nobody answers: after a cancel and after the deadline, the next message works.
    let all: Vec<String> = kinds
        .iter()
        .map(|it| format!("tool={}:find", it.0))
        .collect();
    let all = format!("look [[sim: {}]]", all.join(" "));
    let asked = ask(&gateway, &all).await;
    let run = path(&asked).trim_end_matches("/tool_outputs").to_owned();
    let cancel = gateway.request(Method::POST, &format!("{run}/cancel"));
    assert_eq!(
        gateway.send(cancel).await.ok()["run"]["status"],
        "cancelled"
    );
    gateway.say(SCOPE, "hello again").await;
    assert_same(&scene, &gateway, SCOPE).await;
    assert_eq!(scene.simulator.stats().active_runs, 0);
}

//! Recovery: the gateway looks up what is uncertain, repeats what is safe, and mends what is
//! broken. It sends nothing twice on a guess.

use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use threadkeeper::simulator::Fault;

use crate::support::gateway::{Answer, Gateway, PATIENCE, text, text_of};
use crate::support::history::{assert_same, messages, upstream};
use crate::support::scene::{Protocol, Scene, on_each_protocol};

on_each_protocol!(
    request_with_lost_answer_is_looked_up_before_retry,
    refused_request_is_retried_without_duplicates,
    broken_stream_is_followed_to_end_when_possible,
    tool_outputs_with_lost_answer_recovered_when_possible,
    dead_upstream_fails_fast_and_recovers,
    foreign_run_is_handled_by_caller_strategy,
    resumed_stream_can_be_cancelled,
    cancel_ignored_upstream_is_not_waited_for,
    cancel_losing_race_returns_completed_run,
    message_refused_or_cancelled_is_never_sent_later,
    cancelled_run_is_settled_once_upstream_returns,
    conversation_with_foreign_broken_items_is_repaired,
);

const SCOPE: &str = "/v1/users/alice";
/// A lock window that a test can wait for.
const WINDOW: &str = "lock_window = \"300ms\"\n";

async fn post(gateway: &Gateway, body: &Value) -> Answer {
    gateway.post(&format!("{SCOPE}/messages"), body).await
}

async fn say(gateway: &Gateway, content: &str) -> Answer {
    post(gateway, &json!({"content": content})).await
}

fn fault(scene: &Scene, on: &str, fault: &str, times: u32) {
    scene
        .simulator
        .add_fault(Fault {
            on: on.to_owned(),
            fault: fault.to_owned(),
            times,
        })
        .unwrap();
}

/// Returns the operation that starts a run.
fn start(scene: &Scene) -> &'static str {
    if scene.protocol == Protocol::Assistants {
        "create_run"
    } else {
        "create_response"
    }
}

/// Returns how often the upstream has a message.
async fn times_upstream(scene: &Scene, gateway: &Gateway, content: &str) -> usize {
    let lines = upstream(scene, gateway, SCOPE).await;
    lines
        .iter()
        .filter(|(role, text)| role == "user" && text == content)
        .count()
}

async fn request_with_lost_answer_is_looked_up_before_retry(scene: Scene) {
    let gateway = scene.gateway_upstream(WINDOW).await;
    say(&gateway, "hello").await.ok();
    for (n, when) in ["drop=after", "drop=before"].into_iter().enumerate() {
        fault(&scene, start(&scene), when, 1);
        let content = format!("question {n}");
        let answer = say(&gateway, &content).await;
        if scene.protocol == Protocol::Chain {
            // A response whose id never arrived cannot be looked up, so it must not be made
            // again.
            assert_eq!(answer.problem(), (502, "upstream-error"), "{when}");
            assert_eq!(answer.body["code"], "stream_broken");
        } else {
            assert!(text(&answer.ok()["message"]).contains(&content), "{when}");
            assert_eq!(
                times_upstream(&scene, &gateway, &content).await,
                1,
                "{when}"
            );
        }
    }
    say(&gateway, "and now?").await.ok();
    assert_same(&scene, &gateway, SCOPE).await;
}

async fn refused_request_is_retried_without_duplicates(scene: Scene) {
    let gateway = scene.gateway().await;
    say(&gateway, "hello").await.ok();
    for refusal in [
        "status=500 retry_after=0.01",
        "status=503 retry_after=0.01",
        "status=429 retry_after=0.01",
    ] {
        fault(&scene, start(&scene), refusal, 2);
        let before = scene.simulator.stats().requests_by_operation[start(&scene)];
        let answer = say(&gateway, refusal).await.ok();
        assert!(text(&answer["message"]).contains(refusal));
        assert_eq!(times_upstream(&scene, &gateway, refusal).await, 1);
        assert_eq!(
            scene.simulator.stats().requests_by_operation[start(&scene)] - before,
            3
        );
    }
    assert_same(&scene, &gateway, SCOPE).await;
}

async fn broken_stream_is_followed_to_end_when_possible(scene: Scene) {
    let background = if scene.protocol == Protocol::Assistants {
        ""
    } else {
        "background = true\n"
    };
    let gateway = scene
        .gateway_upstream(&format!("{WINDOW}{background}"))
        .await;
    say(&gateway, "hello").await.ok();
    for cut in [1, 5, 12] {
        let content = format!("a story [[sim: cut={cut} tokens=40 rate=2ms]]");
        let events = gateway.stream(SCOPE, &content).await.rest().await;
        assert_eq!(
            events.last().unwrap().name,
            "run.completed",
            "{cut}: {events:#?}"
        );
        let message = &events[events.len() - 2].data["message"];
        assert_eq!(
            text(message),
            text_of(&events),
            "the deltas give the whole text"
        );
        assert_eq!(times_upstream(&scene, &gateway, &content).await, 1);
    }
    assert_same(&scene, &gateway, SCOPE).await;
    // Without background a response stops with its connection. The run fails, and its message is
    // sent again with the next one.
    if scene.protocol != Protocol::Assistants {
        let plain = scene.gateway_instead(gateway, WINDOW).await;
        let answer = say(&plain, "a story [[sim: cut=5 tokens=40 rate=2ms]]").await;
        assert_eq!(answer.problem(), (502, "upstream-error"));
        assert_eq!(answer.body["code"], "stream_broken");
        say(&plain, "and now?").await.ok();
        assert_same(&scene, &plain, SCOPE).await;
    }
}

async fn tool_outputs_with_lost_answer_recovered_when_possible(scene: Scene) {
    let gateway = scene.gateway_upstream(WINDOW).await;
    for when in ["drop=before", "status=503 retry_after=0.01", "drop=after"] {
        let asked = say(
            &gateway,
            &format!("weather? {when} [[sim: tool=get_weather]]"),
        )
        .await
        .ok();
        let operation = if scene.protocol == Protocol::Assistants {
            "submit_tool_outputs"
        } else {
            start(&scene)
        };
        fault(&scene, operation, when, 1);
        let path = format!(
            "{SCOPE}/runs/{}/tool_outputs",
            asked["run"]["id"].as_str().unwrap()
        );
        let call = &asked["run"]["required_action"]["tool_calls"][0]["id"];
        let body = json!({"tool_outputs": [{"tool_call_id": call, "output": "4 °C"}]});
        let answer = gateway.post(&path, &body).await;
        if scene.protocol == Protocol::Chain && when.starts_with("drop") {
            assert_eq!(
                answer.body["code"], "stream_broken",
                "{when}: {:#}",
                answer.body
            );
        } else {
            let answer = answer.ok();
            assert!(
                text(&answer["message"]).contains("4 °C"),
                "{when}: {answer:#}"
            );
        }
        say(&gateway, "thanks").await.ok();
        assert_same(&scene, &gateway, SCOPE).await;
    }
}

async fn dead_upstream_fails_fast_and_recovers(scene: Scene) {
    const OPEN: Duration = Duration::from_secs(4);
    let settings = "breaker_min_requests = 2\nbreaker_open_duration = \"4s\"\n";
    let gateway = scene
        .gateway_both("[runs]\nmax_retries = 0\n", settings)
        .await;
    say(&gateway, "hello").await.ok();
    fault(&scene, start(&scene), "status=503", 1000);
    let mut opened = Instant::now();
    for _ in 0..2 {
        opened = Instant::now();
        assert_eq!(
            say(&gateway, "anybody?").await.problem(),
            (502, "upstream-error")
        );
    }
    let (before, runs) = (scene.simulator.stats().requests, run_count(&gateway).await);
    for _ in 0..5 {
        let refused = say(&gateway, "anybody?").await;
        assert_eq!(refused.problem(), (502, "upstream-error"));
        assert!(refused.headers.contains_key("retry-after"), "{refused:?}");
    }
    let after = (scene.simulator.stats().requests, run_count(&gateway).await);
    assert!(
        after == (before, runs) || opened.elapsed() >= OPEN,
        "the message is neither sent nor stored: {after:?}"
    );
    scene.simulator.clear_faults();
    let found = Instant::now();
    loop {
        let answer = say(&gateway, "and now?").await;
        if answer.status == StatusCode::OK {
            break;
        }
        assert!(
            found.elapsed() < PATIENCE,
            "the upstream was never found again: {answer:?}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_same(&scene, &gateway, SCOPE).await;
}

async fn run_count(gateway: &Gateway) -> i64 {
    gateway.get(&format!("{SCOPE}/thread")).await.ok()["run_count"]
        .as_i64()
        .unwrap()
}

async fn foreign_run_is_handled_by_caller_strategy(scene: Scene) {
    if scene.protocol == Protocol::Chain {
        return; // a chain has no lock
    }
    let gateway = scene.gateway_upstream(WINDOW).await;
    say(&gateway, "hello").await.ok();
    let thread = scene.upstream_threads().remove(0);
    let foreign = scene.simulator.start_foreign_run(&thread).unwrap();

    // With `reject` the caller gets a refusal, with the run if the protocol names it. Nothing of
    // the message is kept.
    let refused = post(
        &gateway,
        &json!({"content": "may I?", "multitask_strategy": "reject"}),
    )
    .await;
    assert_eq!(refused.problem(), (409, "thread-busy"));
    let detail = refused.body["detail"].as_str().unwrap();
    assert_eq!(
        detail.contains(&foreign),
        scene.protocol == Protocol::Assistants,
        "{detail}"
    );
    assert!(
        messages(&gateway, SCOPE)
            .await
            .iter()
            .all(|message| text(message) != "may I?")
    );

    // With `interrupt` the gateway cancels the other client's run if the protocol allows it, or
    // else waits for its end.
    let urgent = json!({"content": "now!", "multitask_strategy": "interrupt"});
    let answered = post(&gateway, &urgent);
    let answer = if scene.protocol == Protocol::Assistants {
        answered.await
    } else {
        let refusals = scene.simulator.stats().lock_refusals;
        let (answer, ()) = tokio::join!(answered, async {
            scene
                .simulator
                .wait_for(|stats| stats.lock_refusals > refusals)
                .await;
            assert!(scene.simulator.stop_foreign_run(&thread));
        });
        answer
    };
    assert!(text(&answer.ok()["message"]).contains("now!"));
    assert!(
        !scene.simulator.stop_foreign_run(&thread),
        "the other client's run is cancelled"
    );
    assert_eq!(times_upstream(&scene, &gateway, "now!").await, 1);

    // Other servers report the lock with a 409.
    fault(&scene, start(&scene), "status=409 code=conflict", 2);
    assert!(text(&say(&gateway, "hello again").await.ok()["message"]).contains("hello again"));
    assert_eq!(times_upstream(&scene, &gateway, "hello again").await, 1);
    assert_same(&scene, &gateway, SCOPE).await;
}

async fn resumed_stream_can_be_cancelled(scene: Scene) {
    let background = if scene.protocol == Protocol::Assistants {
        ""
    } else {
        "background = true\n"
    };
    let gateway = scene
        .gateway_upstream(&format!("{WINDOW}{background}"))
        .await;
    say(&gateway, "hello").await.ok();
    let mut stream = gateway
        .stream(SCOPE, "a story [[sim: cut=2 tokens=5000 rate=10ms]]")
        .await;
    let run = stream.next().await.unwrap().data["run_id"]
        .as_str()
        .unwrap()
        .to_owned();
    // The connection breaks after two tokens, and the gateway looks the run up.
    let looked_up = |stats: &threadkeeper::simulator::Stats| {
        ["get_run", "get_response"]
            .iter()
            .any(|name| stats.requests_by_operation.contains_key(*name))
    };
    tokio::time::timeout(PATIENCE, scene.simulator.wait_for(looked_up))
        .await
        .expect("the gateway looks the run up");
    let path = format!("{SCOPE}/runs/{run}/cancel");
    let cancelled = gateway
        .send(gateway.request(Method::POST, &path))
        .await
        .ok();
    assert_eq!(
        (&cancelled["run"]["status"], &cancelled["run"]["error"]),
        (&json!("cancelled"), &Value::Null)
    );
    assert_eq!(stream.rest().await.last().unwrap().name, "run.cancelled");
    assert_eq!(
        scene.simulator.stats().active_runs,
        0,
        "the upstream has no active run"
    );
    say(&gateway, "and now?").await.ok();
    assert_same(&scene, &gateway, SCOPE).await;
}

async fn cancel_ignored_upstream_is_not_waited_for(scene: Scene) {
    let background = if scene.protocol == Protocol::Assistants {
        ""
    } else {
        "background = true\n"
    };
    let gateway = scene
        .gateway_both("[runs]\nsettle_timeout = \"300ms\"\n", background)
        .await;
    say(&gateway, "hello").await.ok();
    let mut stream = gateway
        .stream(SCOPE, "a story [[sim: silent_after=2 stuck_cancel]]")
        .await;
    let run = stream.next().await.unwrap().data["run_id"]
        .as_str()
        .unwrap()
        .to_owned();
    stream.next().await.unwrap();
    let began = Instant::now();
    let path = format!("{SCOPE}/runs/{run}/cancel");
    let cancelled = gateway
        .send(gateway.request(Method::POST, &path))
        .await
        .ok();
    assert_eq!(cancelled["run"]["status"], "cancelled");
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "{:?}",
        began.elapsed()
    );
    // The thread is still locked, so the next message fails at its deadline.
    if scene.protocol != Protocol::Chain {
        let answer = post(&gateway, &json!({"content": "and now?", "timeout_ms": 500})).await;
        assert!(matches!(answer.problem(), (504 | 502, _)), "{answer:?}");
    }
}

async fn cancel_losing_race_returns_completed_run(scene: Scene) {
    let background = if scene.protocol == Protocol::Assistants {
        ""
    } else {
        "background = true\n"
    };
    let gateway = scene.gateway_upstream(background).await;
    say(&gateway, "hello").await.ok();
    let operation = if scene.protocol == Protocol::Assistants {
        "cancel_run"
    } else {
        "cancel_response"
    };
    // The cancel takes longer than the rest of the run.
    fault(&scene, operation, "latency=1s", 1);
    let mut stream = gateway
        .stream(SCOPE, "a story [[sim: tokens=20 rate=10ms]]")
        .await;
    let run = stream.next().await.unwrap().data["run_id"]
        .as_str()
        .unwrap()
        .to_owned();
    stream.next().await.unwrap();
    let path = format!("{SCOPE}/runs/{run}/cancel");
    let cancelled = gateway
        .send(gateway.request(Method::POST, &path))
        .await
        .ok();
    assert_eq!(
        (&cancelled["run"]["status"], &cancelled["run"]["error"]),
        (&json!("completed"), &Value::Null)
    );
    assert!(text(&cancelled["message"]).contains("a story"));
    assert_eq!(stream.rest().await.last().unwrap().name, "run.completed");
    assert_same(&scene, &gateway, SCOPE).await;
    say(&gateway, "and now?").await.ok();
    assert_same(&scene, &gateway, SCOPE).await;
}

async fn message_refused_or_cancelled_is_never_sent_later(scene: Scene) {
    let gateway = scene.gateway_with("[runs]\nmax_retries = 0\n").await;
    say(&gateway, "hello").await.ok();
    for refusal in [
        "status=400",
        "status=401",
        "status=403",
        "status=404",
        "status=500",
        "status=429",
    ] {
        let threads = scene.upstream_threads();
        assert_eq!(
            say(&gateway, &format!("oh [[sim: {refusal}]]"))
                .await
                .problem(),
            match refusal {
                "status=429" => (503, "upstream-rate-limited"),
                "status=400" => (422, "message-refused"),
                _ => (502, "upstream-error"),
            }
        );
        // Only where the thread may be at fault are others tried.
        if !matches!(refusal, "status=400" | "status=404") {
            assert_eq!(
                scene.upstream_threads(),
                threads,
                "the gateway creates nothing again for a {refusal}"
            );
        }
    }
    // The same holds for a run that was cancelled while it was queued.
    scene.simulator.hold();
    let mut active = gateway.stream(SCOPE, "first").await;
    active.next().await.unwrap();
    let mut waiting = gateway.stream(SCOPE, "forget it").await;
    waiting.next().await.unwrap();
    let path = format!("{SCOPE}/thread/cancel?which=queued");
    gateway
        .send(gateway.request(Method::POST, &path))
        .await
        .ok();
    scene.simulator.release();
    active.rest().await;
    let answer = say(&gateway, "and now?").await.ok();
    assert!(text(&answer["message"]).contains("turn 3 of"), "{answer:#}");
    let kept = messages(&gateway, SCOPE).await;
    let withheld: Vec<_> = kept
        .iter()
        .filter(|message| message["visible_to_model"] == false)
        .collect();
    assert_eq!(
        withheld.len(),
        7,
        "the messages stay in the transcript, marked"
    );
    assert!(
        withheld
            .iter()
            .all(|message| message["status"] == "incomplete")
    );
    assert_same(&scene, &gateway, SCOPE).await;
    // A rebuilt upstream thread does not get them either.
    scene.simulator.reset();
    let answer = say(&gateway, "and now again?").await.ok();
    assert!(text(&answer["message"]).contains("turn 4 of"), "{answer:#}");
    assert_same(&scene, &gateway, SCOPE).await;
}

async fn cancelled_run_is_settled_once_upstream_returns(scene: Scene) {
    let gateway = scene
        .gateway_both(
            "[runs]\nsettle_timeout = \"300ms\"\nmax_retries = 0\n",
            "breaker_min_requests = 0\n",
        )
        .await;
    say(&gateway, "hello").await.ok();
    let mut stream = gateway
        .stream(SCOPE, "a story [[sim: silent_after=2]]")
        .await;
    let run = stream.next().await.unwrap().data["run_id"]
        .as_str()
        .unwrap()
        .to_owned();
    for _ in 0..2 {
        stream.next().await.unwrap();
    }
    // From here on the upstream answers nothing, so the run cannot be settled.
    fault(&scene, "any", "status=503", 1000);
    let path = format!("{SCOPE}/runs/{run}/cancel");
    let cancelled = gateway
        .send(gateway.request(Method::POST, &path))
        .await
        .ok();
    assert_eq!(cancelled["run"]["status"], "cancelled");
    let failed = say(&gateway, "are you there?").await;
    assert_eq!(failed.problem(), (502, "upstream-error"));
    scene.simulator.clear_faults();
    say(&gateway, "and now?").await.ok();
    say(&gateway, "and on").await.ok();
    assert_same(&scene, &gateway, SCOPE).await;
    assert_eq!(scene.simulator.stats().active_runs, 0);
}

async fn conversation_with_foreign_broken_items_is_repaired(scene: Scene) {
    if scene.protocol != Protocol::Responses {
        return; // no other client can write to a chain, and a thread has no such items
    }
    let gateway = scene.gateway().await;
    say(&gateway, "hello").await.ok();
    let conversation = scene.upstream_threads().remove(0);
    let call =
        json!({"type": "function_call", "call_id": "call_x", "name": "f", "arguments": "{}"});
    let reasoning = json!({"type": "reasoning", "id": "rs_x", "summary": []});
    for items in [json!([call]), json!([reasoning.clone()])] {
        scene.add_items(&conversation, &items).await;
        let answer = say(&gateway, "and now?").await.ok();
        assert!(text(&answer["message"]).contains("and now?"), "{answer:#}");
    }
    assert_eq!(
        scene.upstream_threads(),
        [conversation],
        "the conversation is the same"
    );
    assert_same(&scene, &gateway, SCOPE).await;
}

/// The server answers as if there were no earlier response, and says so.
#[tokio::test(flavor = "multi_thread")]
async fn server_that_ignores_previous_response_gets_history() {
    let scene = Scene::by_chance(Protocol::Chain).await;
    let gateway = scene.gateway().await;
    say(&gateway, "one").await.ok();
    scene.fault("create_response", "forget", 100);
    for (turn, text_said, requests) in [(2, "two", 3), (3, "three", 4)] {
        let answer = say(&gateway, text_said).await.ok();
        assert_eq!(answer["run"]["status"], "completed", "{answer:#}");
        let reply = text(&answer["message"]);
        assert!(reply.contains(&format!("turn {turn}")), "{reply}");
        let sent = scene.simulator.stats().requests_by_operation["create_response"];
        assert_eq!(
            sent, requests,
            "the gateway remembers that the server forgets"
        );
        assert_same(&scene, &gateway, SCOPE).await;
    }
    let told = gateway
        .logs()
        .into_iter()
        .filter(|line| line.contains("ignores `previous_response_id`"));
    assert_eq!(told.count(), 1);
}

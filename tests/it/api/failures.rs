//! Whatever the upstream does, every run ends, and the thread is usable afterwards.

use reqwest::StatusCode;
use serde_json::{Value, json};
use threadkeeper::simulator::{Fault, SimulatorConfig};

use crate::support::gateway::{Gateway, PATIENCE, text, text_of};
use crate::support::history::assert_same;
use crate::support::scene::{Protocol, Scene, on_each_protocol, on_each_store};

on_each_protocol!(
    upstream_refusal_is_reported_with_reason,
    missing_thread_support_upstream_is_reported_with_setting,
    request_provably_not_accepted_is_retried,
    run_failed_upstream_is_reported_as_failed,
    run_that_fails_before_it_says_anything_is_repeated,
    incomplete_reply_is_kept_and_marked,
    model_refusal_is_returned_as_refusal_content,
    broken_stream_fails_run_and_frees_thread,
    silent_upstream_expires_run_at_deadline,
    slow_upstream_is_awaited_without_retry,
    slow_upstream_thread_creation_is_not_retried,
    broken_connection_is_retried_at_most_once,
    error_event_in_stream_counts_as_answer,
    foreign_upstream_lock_is_waited_out,
    foreign_upstream_lock_wait_ends_at_deadline,
    every_sse_encoding_is_parsed,
    lost_upstream_thread_is_rebuilt_from_transcript,
);
on_each_store!(oversized_reply_fails_run);

const SCOPE: &str = "/v1/users/alice";

async fn post(gateway: &Gateway, body: &Value) -> crate::support::gateway::Answer {
    gateway.post(&format!("{SCOPE}/messages"), body).await
}

async fn say(gateway: &Gateway, content: &str) -> crate::support::gateway::Answer {
    post(gateway, &json!({"content": content})).await
}

/// Checks that the thread accepts the next message, and that the upstream saw no forbidden
/// request.
async fn works_again(gateway: &Gateway) {
    let answer = say(gateway, "and now?").await.ok();
    assert!(text(&answer["message"]).contains("and now?"));
    assert_eq!(answer["thread"]["state"], "idle");
}

async fn missing_thread_support_upstream_is_reported_with_setting(scene: Scene) {
    if scene.protocol == Protocol::Chain {
        return;
    }
    let gateway = scene.gateway().await;
    let (path, setting) = match scene.protocol {
        Protocol::Assistants => ("/threads", "`base_url`"),
        _ => ("/conversations", "`conversations = false`"),
    };
    for fault in [
        "status=404 wording=detail",
        "status=405 wording=html",
        "status=501",
    ] {
        scene.fault("create_thread", fault, 1);
        let answer = say(&gateway, "hello").await;
        assert_eq!(answer.problem(), (502, "upstream-error"));
        let detail = answer.body["detail"].as_str().unwrap();
        assert!(
            detail.contains(path) && detail.contains(setting),
            "{detail}"
        );
        assert!(
            !detail.contains("simulated"),
            "callers do not see names of upstreams: {detail}"
        );
    }
    let told = |line: &String| {
        line.contains("WARN") && line.contains("simulated") && line.contains(setting)
    };
    assert!(gateway.logs().iter().any(told), "{:#?}", gateway.logs());
    works_again(&gateway).await;
}

async fn upstream_refusal_is_reported_with_reason(scene: Scene) {
    let gateway = scene.gateway_with("[runs]\nmax_retries = 0\n").await;
    say(&gateway, "hello").await.ok();
    let error = (502, "upstream-error");
    let limited = (503, "upstream-rate-limited");
    for (directive, problem, code, retry_after) in [
        ("status=500", error, "upstream_error", None),
        (
            "status=503 retry_after=7",
            error,
            "upstream_error",
            Some("7"),
        ),
        ("status=401", error, "upstream_unauthorized", None),
        (
            "status=429 retry_after=3",
            limited,
            "upstream_rate_limited",
            Some("3"),
        ),
        (
            "status=400 code=context_length_exceeded",
            (422, "message-refused"),
            "message_refused",
            None,
        ),
    ] {
        let answer = say(&gateway, &format!("oh [[sim: {directive}]]")).await;
        assert_eq!(answer.problem(), problem, "{directive}");
        assert_eq!(
            answer
                .headers
                .get("retry-after")
                .map(|value| value.to_str().unwrap()),
            retry_after,
            "{directive}"
        );
        assert!(
            !answer.body.to_string().contains("sk-planted"),
            "{directive}: {:#}",
            answer.body
        );
        let run = answer.body["run_id"].as_str().unwrap();
        let read = gateway.get(&format!("{SCOPE}/runs/{run}")).await.ok();
        assert_eq!(
            (&read["run"]["status"], &read["run"]["error"]["code"]),
            (&json!("failed"), &json!(code))
        );
        if directive.contains("code=") {
            assert!(
                answer.body["detail"]
                    .as_str()
                    .unwrap()
                    .contains("context_length_exceeded"),
                "{:#}",
                answer.body
            );
        }
    }
    let events = gateway
        .stream(SCOPE, "again [[sim: status=500]]")
        .await
        .rest()
        .await;
    let names: Vec<_> = events.iter().map(|event| event.name.as_str()).collect();
    assert_eq!(
        names,
        ["run.started", "run.failed"],
        "an open stream reports the failure as an event"
    );
    works_again(&gateway).await;
    let said = gateway
        .get(&format!("{SCOPE}/messages?order=asc&limit=100"))
        .await
        .ok();
    let users = said["data"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|m| m["role"] == "user")
        .count();
    assert_eq!(
        users, 8,
        "a user's message stays in the transcript, answered or not"
    );
}

async fn request_provably_not_accepted_is_retried(scene: Scene) {
    let gateway = scene.gateway().await;
    let fault = |on: &str, fault: &str, times| {
        scene
            .simulator
            .add_fault(Fault {
                on: on.to_owned(),
                fault: fault.to_owned(),
                times,
            })
            .unwrap();
    };
    let begun = || {
        let requests = scene.simulator.stats().requests_by_operation;
        requests
            .get("create_run")
            .or(requests.get("create_response"))
            .copied()
            .unwrap_or(0)
    };
    // The upstream's `Retry-After` counts, so the test need not wait for the back-off.
    let refusal = "status=429 retry_after=0.01";
    fault(
        "create_thread",
        refusal,
        u32::from(scene.protocol != Protocol::Chain),
    );
    fault("start", refusal, 2);
    let answer = say(&gateway, "hello").await.ok();
    assert!(text(&answer["message"]).contains("hello"));
    assert_eq!((begun(), scene.simulator.stats().runs_started), (3, 1));

    let limited = (503, "upstream-rate-limited");
    let error = (502, "upstream-error");
    for (refusal, tries, problem) in [
        (refusal, 4, limited),
        ("status=429 code=insufficient_quota", 1, error),
        ("status=503 retry_after=0.01", 4, error),
        ("status=429 retry_after=61", 1, limited),
    ] {
        let before = begun();
        fault("start", refusal, tries);
        assert_eq!(say(&gateway, "again").await.problem(), problem, "{refusal}");
        assert_eq!(begun() - before, u64::from(tries), "{refusal}");
    }
    works_again(&gateway).await;
}

async fn run_failed_upstream_is_reported_as_failed(scene: Scene) {
    let gateway = scene.gateway().await;
    for directive in ["fail", "mid_error", "mid_error=nested"] {
        let answer = say(&gateway, &format!("oh [[sim: {directive}]]")).await;
        assert_eq!(answer.problem(), (502, "upstream-error"), "{directive}");
        assert_eq!(
            answer.body["code"], "upstream_failed",
            "{directive}: {:#}",
            answer.body
        );
        works_again(&gateway).await;
    }
}

async fn run_that_fails_before_it_says_anything_is_repeated(scene: Scene) {
    // Whether a conversation keeps the messages of a failed response differs between servers.
    for append_unfinished in [false, true] {
        let config = SimulatorConfig {
            append_unfinished,
            ..SimulatorConfig::default()
        };
        let scene = Scene::with(scene.protocol, scene.backend, config).await;
        let gateway = scene.gateway_with("[runs]\nmax_retries = 2").await;
        let fails = |code: &str, times| {
            scene
                .simulator
                .add_fault(Fault {
                    on: "start".to_owned(),
                    fault: format!("fail={code} retry_after=0.01"),
                    times,
                })
                .unwrap();
        };
        gateway.say(SCOPE, "hello").await;
        fails("rate_limit_exceeded", 1);
        fails("server_error", 1);
        let answer = say(&gateway, "and?").await.ok();
        assert!(text(&answer["message"]).contains("and?"), "{answer:#}");
        assert_same(&scene, &gateway, SCOPE).await;

        fails("rate_limit_exceeded", 3);
        let refused = say(&gateway, "once more").await;
        assert_eq!(refused.body["code"], "upstream_rate_limited");
        assert!(refused.headers.contains_key("retry-after"));
        works_again(&gateway).await;
        assert_same(&scene, &gateway, SCOPE).await;
    }
}

async fn incomplete_reply_is_kept_and_marked(scene: Scene) {
    let gateway = scene.gateway().await;
    let answer = say(&gateway, "tell me all of it [[sim: incomplete]]")
        .await
        .ok();
    assert_eq!(answer["run"]["status"], "incomplete");
    assert!(!text(&answer["message"]).is_empty());
    let transcript = gateway.get(&format!("{SCOPE}/messages")).await.ok();
    assert_eq!(
        transcript["data"][0]["content"],
        answer["message"]["content"]
    );
    works_again(&gateway).await;
}

async fn model_refusal_is_returned_as_refusal_content(scene: Scene) {
    let gateway = scene.gateway().await;
    let answer = say(&gateway, "how? [[sim: refusal]]").await.ok();
    assert_eq!(
        answer["message"]["content"][0]["type"], "refusal",
        "{answer:#}"
    );
    works_again(&gateway).await;
}

async fn broken_stream_fails_run_and_frees_thread(scene: Scene) {
    if scene.protocol == Protocol::Assistants {
        return; // the run continues there, and the gateway follows it to its end
    }
    let gateway = scene.gateway_upstream("lock_window = \"200ms\"\n").await;
    for directive in ["cut=5 tokens=40 rate=1ms", "no_terminal"] {
        let answer = say(&gateway, &format!("oh [[sim: {directive}]]")).await;
        assert_eq!(answer.problem(), (502, "upstream-error"), "{directive}");
        assert_eq!(
            answer.body["code"], "stream_broken",
            "{directive}: {:#}",
            answer.body
        );
        works_again(&gateway).await;
    }
    let events = gateway
        .stream(SCOPE, "oh [[sim: cut=5 tokens=40 rate=1ms]]")
        .await
        .rest()
        .await;
    let partial = text_of(&events);
    assert!(!partial.is_empty());
    assert_eq!(events.last().unwrap().name, "run.failed");
    let completed = &events[events.len() - 2];
    assert_eq!(
        (completed.name.as_str(), text(&completed.data["message"])),
        ("message.completed", partial.as_str())
    );
    works_again(&gateway).await;
}

/// Returns how many requests for a run the upstream got.
fn sends(scene: &Scene) -> u64 {
    let requests = scene.simulator.stats().requests_by_operation;
    ["create_run", "create_response"]
        .iter()
        .filter_map(|name| requests.get(*name))
        .sum()
}

async fn silent_upstream_expires_run_at_deadline(scene: Scene) {
    // Look-ups and lists time out long before the deadline.
    let gateway = scene.gateway_upstream("call_timeout = \"100ms\"\n").await;
    for directive in [
        "silent",
        "silent_after=3",
        "late_head=1h latency=1h",
        "rate=50ms tokens=1000",
    ] {
        let before = sends(&scene);
        let body = json!({"content": format!("oh [[sim: {directive}]]"), "timeout_ms": 500});
        let answer = post(&gateway, &body).await;
        assert_eq!(answer.problem(), (504, "upstream-timeout"), "{directive}");
        assert_eq!(
            answer.body["code"], "deadline_exceeded",
            "{directive}: {:#}",
            answer.body
        );
        let run = answer.body["run_id"].as_str().unwrap();
        let read = gateway.get(&format!("{SCOPE}/runs/{run}")).await.ok();
        assert_eq!(read["run"]["status"], "expired");
        assert_eq!(sends(&scene) - before, 1, "{directive}");
        works_again(&gateway).await;
    }
}

async fn slow_upstream_is_awaited_without_retry(scene: Scene) {
    let mut ways = vec![""];
    if scene.protocol != Protocol::Assistants {
        ways.push("background = true\n");
    }
    for background in ways {
        let gateway = scene
            .gateway_upstream(&format!("call_timeout = \"100ms\"\n{background}"))
            .await;
        for directive in ["late_head=500ms", "latency=500ms", "rate=300ms"] {
            let before = sends(&scene);
            let answer = say(&gateway, &format!("oh [[sim: {directive}]]"))
                .await
                .ok();
            assert_eq!(answer["run"]["status"], "completed", "{directive}");
            assert_eq!(sends(&scene) - before, 1, "{directive}");
        }
        let asked = say(&gateway, "weather? [[sim: tool=get_weather]]")
            .await
            .ok();
        let path = format!(
            "{SCOPE}/runs/{}/tool_outputs",
            asked["run"]["id"].as_str().unwrap()
        );
        let call = &asked["run"]["required_action"]["tool_calls"][0]["id"];
        let body = json!({"tool_outputs": [{"tool_call_id": call, "output": "4 °C [[sim: late_head=500ms]]"}]});
        let started = scene.simulator.stats().requests;
        let answer = gateway.post(&path, &body).await.ok();
        assert!(text(&answer["message"]).contains("4 °C"), "{answer:#}");
        assert_eq!(scene.simulator.stats().requests - started, 1);
        let mut gateway = gateway;
        gateway.terminate();
        gateway.exit().await;
    }
}

async fn slow_upstream_thread_creation_is_not_retried(scene: Scene) {
    if scene.protocol == Protocol::Chain {
        return; // its first run makes it
    }
    let gateway = scene.gateway_upstream("call_timeout = \"100ms\"\n").await;
    let asked = || {
        let requests = scene.simulator.stats().requests_by_operation;
        ["create_thread", "create_conversation"]
            .iter()
            .filter_map(|name| requests.get(*name))
            .sum::<u64>()
    };
    scene.fault("create_thread", "latency=500ms", 1);
    say(&gateway, "hello").await.ok();
    assert_eq!(asked(), 1);
    // The new upstream thread gets the whole transcript.
    scene.delete_thread(&scene.upstream_threads()[0]).await;
    scene.fault("create_thread", "latency=500ms", 1);
    let answer = say(&gateway, "and now?").await.ok();
    assert!(text(&answer["message"]).contains("turn 2 of"), "{answer:#}");
    assert_eq!(asked(), 2);
    // The deadline does not wait for the creation.
    scene.fault("create_thread", "silent", 1);
    let other = gateway
        .post(
            "/v1/users/bob/messages",
            &json!({"content": "hi", "timeout_ms": 300}),
        )
        .await;
    assert_eq!(
        (other.problem().0, &other.body["code"]),
        (504, &json!("deadline_exceeded"))
    );
    assert!(text(&gateway.say("/v1/users/bob", "and now?").await["message"]).contains("turn 1 of"));
}

async fn broken_connection_is_retried_at_most_once(scene: Scene) {
    let gateway = scene.gateway_upstream("lock_window = \"200ms\"\n").await;
    say(&gateway, "hello").await.ok();
    // A 504 of a proxy in front of the server is no answer either.
    for breaks in ["drop=before", "status=504 retry_after=0.01"] {
        // Without a look-up the gateway must not send the request again.
        let tries = if scene.protocol == Protocol::Chain {
            1
        } else {
            2
        };
        let before = sends(&scene);
        scene.fault("start", breaks, 2);
        let answer = say(&gateway, "are you there?").await;
        assert_eq!(answer.problem(), (502, "upstream-error"), "{breaks}");
        assert_eq!(sends(&scene) - before, tries, "{breaks}");
        scene.simulator.clear_faults();
        works_again(&gateway).await;
    }
    if scene.protocol != Protocol::Chain {
        let before = sends(&scene);
        scene.fault("start", "drop=before", 1);
        say(&gateway, "and now?").await.ok();
        assert_eq!(sends(&scene) - before, 2);
    }
}

async fn error_event_in_stream_counts_as_answer(scene: Scene) {
    // With a wait to see what became of the message, the run would miss its deadline.
    let gateway = scene.gateway_upstream("lock_window = \"10m\"\n").await;
    say(&gateway, "hello").await.ok();
    let refused = "the upstream refused the request with status 400 (content_filter)";
    let failed = "the upstream reported that the run failed (content_filter)";
    let mut cases: Vec<(String, &str, &str)> = Vec::new();
    for form in ["object", "done", "string", "flat", "detail", "line", "json"] {
        cases.push((
            format!("bare_error={form} code=content_filter"),
            "content_refused",
            refused,
        ));
    }
    let quota = "the quota at the upstream is used up (insufficient_quota)";
    cases.push((
        "bare_error=line code=insufficient_quota".to_owned(),
        "upstream_quota_exhausted",
        quota,
    ));
    let number = "the upstream reported that the run failed (";
    cases.push((
        "bare_error=json code=500".to_owned(),
        "upstream_failed",
        number,
    ));
    cases.push((
        "mid_error=bare code=content_filter".to_owned(),
        "content_refused",
        failed,
    ));
    for (directive, code, detail) in cases {
        let before = sends(&scene);
        let answer = say(&gateway, &format!("oh [[sim: {directive}]]")).await;
        let problem = match code {
            "content_refused" => (422, "content-refused"),
            _ => (502, "upstream-error"),
        };
        assert_eq!(answer.problem(), problem, "{directive}");
        assert_eq!(answer.body["code"], code, "{directive}: {:#}", answer.body);
        assert!(
            answer.body["detail"].as_str().unwrap().contains(detail),
            "{directive}: {:#}",
            answer.body
        );
        assert_eq!(sends(&scene) - before, 1, "{directive}");
        works_again(&gateway).await;
    }
    // A rate limit is waited out, since the upstream did not accept the message.
    let before = sends(&scene);
    scene.fault("start", "bare_error=object code=429", 1);
    say(&gateway, "and now?").await.ok();
    assert_eq!(sends(&scene) - before, 2);
}

async fn foreign_upstream_lock_is_waited_out(scene: Scene) {
    if scene.protocol == Protocol::Chain {
        return; // a chain has no lock
    }
    let gateway = scene.gateway().await;
    say(&gateway, "hello").await.ok();
    let thread = scene.upstream_threads().remove(0);
    scene.simulator.start_foreign_run(&thread).unwrap();
    let mut stream = gateway.stream(SCOPE, "may I?").await;
    assert_eq!(stream.next().await.unwrap().name, "run.started");
    let refused = scene.simulator.wait_for(|stats| stats.lock_refusals > 0);
    tokio::time::timeout(PATIENCE, refused)
        .await
        .expect("the request met the lock");
    assert!(scene.simulator.stop_foreign_run(&thread));
    let events = stream.rest().await;
    assert_eq!(events.last().unwrap().name, "run.completed");
    assert_eq!(text_of(&events).matches("may I?").count(), 1);
    let texts = scene.simulator.threads().remove(0).user_texts;
    assert_eq!(
        texts.iter().filter(|text| *text == "may I?").count(),
        1,
        "the message was sent until accepted, and is upstream once"
    );
}

async fn foreign_upstream_lock_wait_ends_at_deadline(scene: Scene) {
    if scene.protocol == Protocol::Chain {
        return; // a chain has no lock
    }
    let gateway = scene
        .gateway_with("[runs]\nsettle_timeout = \"200ms\"\n")
        .await;
    say(&gateway, "hello").await.ok();
    let thread = scene.upstream_threads().remove(0);
    scene.simulator.start_foreign_run(&thread).unwrap();
    let answer = post(&gateway, &json!({"content": "may I?", "timeout_ms": 400})).await;
    assert_eq!(answer.problem(), (504, "upstream-timeout"));
    assert_eq!(answer.body["code"], "upstream_busy");
    assert!(scene.simulator.stop_foreign_run(&thread));
    works_again(&gateway).await;
}

async fn every_sse_encoding_is_parsed(scene: Scene) {
    let gateway = scene.gateway().await;
    let plain = say(&gateway, "wörld").await.ok();
    let mut dialects = vec![
        "crlf",
        "split",
        "comments",
        "unknown_events",
        "crlf split comments unknown_events",
    ];
    if scene.protocol != Protocol::Assistants {
        dialects.extend(["no_event_lines", "reasoning"]);
    }
    for (n, dialect) in dialects.into_iter().enumerate() {
        let answer = say(&gateway, &format!("wörld [[sim: {dialect}]]"))
            .await
            .ok();
        let same = text(&plain["message"]).replace("turn 1 of", &format!("turn {} of", n + 2));
        assert_eq!(text(&answer["message"]), same, "{dialect}");
    }
    let parts = say(&gateway, "twice [[sim: parts=2]]").await.ok();
    assert_eq!(
        parts["message"]["content"].as_array().map(Vec::len),
        Some(2),
        "{parts:#}"
    );
}

async fn oversized_reply_fails_run(scene: Scene) {
    let gateway = scene.gateway_with("[runs]\nmax_reply_bytes = 2000\n").await;
    let answer = say(&gateway, "go on [[sim: tokens=500]]").await;
    assert_eq!(
        (answer.status, &answer.body["code"]),
        (StatusCode::BAD_GATEWAY, &json!("reply_too_large"))
    );
    works_again(&gateway).await;
}

async fn lost_upstream_thread_is_rebuilt_from_transcript(scene: Scene) {
    let gateway = scene.gateway().await;
    let mut expected = Vec::new();
    for n in 1..=12 {
        let answer = say(&gateway, &format!("message {n}")).await.ok();
        expected.push(format!("message {n}"));
        expected.push(text(&answer["message"]).to_owned());
    }
    let before = gateway.get(&format!("{SCOPE}/thread")).await.ok();
    scene.simulator.reset();
    let answer = say(&gateway, "and now?").await.ok();
    assert_eq!(
        answer["thread"]["id"], before["id"],
        "the conversation is the same"
    );
    assert_ne!(
        answer["thread"]["upstream_thread_id"],
        before["upstream_thread_id"]
    );
    assert!(
        text(&answer["message"]).contains("turn 13 of"),
        "the model knows the whole transcript: {answer:#}"
    );
    if scene.protocol != Protocol::Chain {
        let id = answer["thread"]["upstream_thread_id"].as_str().unwrap();
        assert_eq!(scene.upstream_threads(), [id]);
        let history: Vec<_> = scene
            .simulator
            .thread_history(id)
            .into_iter()
            .map(|(_, text)| text)
            .collect();
        assert_eq!(history[..24], expected);
    }
    works_again(&gateway).await;
    assert_eq!(
        gateway.get(&format!("{SCOPE}/thread")).await.ok()["message_count"],
        28
    );
}

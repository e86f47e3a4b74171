//! Conversations that an earlier run left damaged.

use std::time::Duration;

use serde_json::{Value, json};
use threadkeeper::config::UpstreamKind;
use threadkeeper::domain::RunStatus;
use threadkeeper::simulator::SimulatorConfig;
use threadkeeper::upstream::UpstreamError;

use futures_util::StreamExt;

use super::scene::{Flavour, Scene, read};
use super::scripted::{Play, Scripted, Step, json_answer, sse};
use super::{EXPECTED, RESPONSES_TURN, adapter, config, lines, responses, run_to_end, thread};

const OPEN: &str = "No tool output found for function call call_1.";
const ORPHAN: &str =
    "Item 'rs_1' of type 'reasoning' was provided without its required following item.";

fn refused(message: &str) -> Play {
    let error = json!({"message": message, "type": "invalid_request_error", "param": "input", "code": null});
    json_answer(400, &[], &json!({"error": error}).to_string())
}

/// A list of items, newest first.
fn items(items: &Value) -> Play {
    json_answer(
        200,
        &[],
        &json!({"data": items, "has_more": false}).to_string(),
    )
}

fn call(id: &str) -> Value {
    json!({"type": "function_call", "id": format!("fc_{id}"), "call_id": id, "name": "f", "arguments": "{}"})
}

fn good() -> Play {
    sse(vec![Step::Bytes(RESPONSES_TURN.into())])
}

fn ok() -> Play {
    json_answer(200, &[], "{}")
}

/// The run was refused, and the conversation cannot be read for repairs. So nothing of the run is
/// upstream.
#[tokio::test]
async fn refused_run_is_unambiguous_when_repair_fails() {
    let mut plays = vec![refused(OPEN)];
    plays.extend((0..5).map(|_| Play::Silence));
    let server = Scripted::start(plays).await;
    let mut settings = config(UpstreamKind::Responses, &server.url);
    settings.call_timeout = Duration::from_millis(50);
    let error = run_to_end(&*adapter(&settings), Some(&thread()))
        .await
        .unwrap_err();
    assert!(matches!(error, UpstreamError::Connect), "{error:?}");
    assert!(
        server.targets()[1..]
            .iter()
            .all(|target| target.starts_with("GET ")),
        "{:?}",
        server.targets()
    );
}

#[tokio::test]
async fn open_calls_are_closed_with_next_message() {
    let custom = json!({"type": "custom_tool_call", "id": "ctc_2", "call_id": "call_2", "name": "h", "input": ""});
    let server = Scripted::start(vec![
        refused(OPEN),
        items(&json!([custom, call("call_1")])),
        good(),
    ])
    .await;
    let events = run_to_end(&*responses(&server), Some(&thread()))
        .await
        .unwrap();
    assert_eq!(lines(&events), EXPECTED);
    let requests = server.requests();
    let output = |kind: &str, id: &str| json!({"type": kind, "call_id": id, "output": "{\"error\":\"the call was not answered\"}"});
    let mut expected = vec![
        output("function_call_output", "call_1"),
        output("custom_tool_call_output", "call_2"),
    ];
    expected.extend(requests[0].body["input"].as_array().unwrap().clone());
    assert_eq!(requests[2].body["input"], Value::from(expected));
    let without_input = |body: &Value| {
        let mut body = body.clone();
        body["input"].take();
        body
    };
    assert_eq!(
        without_input(&requests[0].body),
        without_input(&requests[2].body)
    );
}

/// An approval that a conversation, or the last response of a chain, waits for is declined.
#[tokio::test]
async fn open_approval_is_declined_with_next_message() {
    let asked = json!([{"type": "mcp_approval_request", "id": "mcpr_1", "server_label": "s", "name": "find", "arguments": "{}"}]);
    let response = json!({"id": "t_1", "status": "completed", "output": asked});
    let blocked = "The following MCP approval requests do not have an approval: mcpr_1";
    for conversations in [true, false] {
        let read = if conversations {
            items(&asked)
        } else {
            json_answer(200, &[], &response.to_string())
        };
        let server = Scripted::start(vec![refused(blocked), read, good()]).await;
        let mut settings = config(UpstreamKind::Responses, &server.url);
        settings.conversations = conversations;
        let events = run_to_end(&*adapter(&settings), Some(&thread())).await;
        assert_eq!(lines(&events.unwrap()), EXPECTED);
        let requests = server.requests();
        let declined = json!({"type": "mcp_approval_response", "approval_request_id": "mcpr_1",
            "approve": false, "reason": "the call was not answered"});
        assert_eq!(requests[2].body["input"][0], declined);
        assert_eq!(
            requests[2].body["input"].as_array().unwrap()[1..],
            requests[0].body["input"].as_array().unwrap()[..]
        );
    }
}

#[tokio::test]
async fn repairs_are_tried_in_order_once_each() {
    let reasoning = |id: &str| json!({"type": "reasoning", "id": id, "summary": []});
    let tail = json!([call("call_1"), reasoning("rs_2"), reasoning("rs_1")]);
    let list = || items(&tail);
    let server = Scripted::start(vec![
        refused(OPEN),
        list(),
        refused(ORPHAN),
        list(),
        ok(),
        json_answer(
            404,
            &[],
            r#"{"error":{"message":"Item with id 'rs_2' not found in conversation.","type":"x"}}"#,
        ),
        ok(),
        good(),
    ])
    .await;
    assert_eq!(
        lines(
            &run_to_end(&*responses(&server), Some(&thread()))
                .await
                .unwrap()
        ),
        EXPECTED
    );
    let targets = server.targets();
    assert_eq!(
        targets[4..7],
        ["fc_call_1", "rs_2", "rs_1"].map(|id| format!("DELETE /conversations/t_1/items/{id}"))
    );
    let requests = server.requests();
    assert_eq!(requests[2].body["input"].as_array().unwrap().len(), 2);
    assert_eq!(requests[7].body, requests[0].body);

    // The run is still refused, so the caller must recreate the conversation.
    let plays = vec![
        refused(OPEN),
        list(),
        refused(OPEN),
        list(),
        ok(),
        ok(),
        refused(ORPHAN),
    ];
    let server = Scripted::start(plays).await;
    let error = run_to_end(&*responses(&server), Some(&thread()))
        .await
        .unwrap_err();
    assert!(matches!(error, UpstreamError::ThreadGone), "{error:?}");
    assert_eq!(server.requests().len(), 7);

    // An orphaned output gets no answer; the adapter deletes it at once, even one that is further
    // back.
    let server = Scripted::start(vec![refused(ORPHAN), items(&json!([])), ok(), good()]).await;
    assert_eq!(
        lines(
            &run_to_end(&*responses(&server), Some(&thread()))
                .await
                .unwrap()
        ),
        EXPECTED
    );
    assert_eq!(server.targets()[2], "DELETE /conversations/t_1/items/rs_1");
}

#[tokio::test]
async fn unrepairable_thread_counts_as_gone() {
    let server = Scripted::start(vec![
        refused(OPEN),
        items(&json!([])),
        refused(OPEN),
        json_answer(404, &[], "Not Found"),
        refused(OPEN),
        json_answer(404, &[], "Not Found"),
    ])
    .await;
    for _ in 0..2 {
        let error = run_to_end(&*responses(&server), Some(&thread()))
            .await
            .unwrap_err();
        assert!(matches!(error, UpstreamError::ThreadGone), "{error:?}");
    }
    let mut chain = config(UpstreamKind::Responses, &server.url);
    chain.conversations = false;
    let error = run_to_end(&*adapter(&chain), Some(&thread()))
        .await
        .unwrap_err();
    assert!(
        matches!(error, UpstreamError::ThreadGone),
        "the response is not there: {error:?}"
    );
    assert_eq!(server.requests().len(), 6);
}

#[tokio::test]
async fn damaged_conversation_accepts_next_message() {
    for flavour in [Flavour::Conversations, Flavour::Background] {
        for text in [
            "x [[sim: tools=2]]",
            "x [[sim: tools=23 reasoning]]",
            "x [[sim: dangling_reasoning]]",
        ] {
            let scene = Scene::new(flavour).await;
            scene.say(text).await;
            let next = scene.say("next").await;
            assert_eq!(
                next.ended.status,
                RunStatus::Completed,
                "{flavour:?} {text}"
            );
            assert!(
                next.streamed.starts_with("You said: next."),
                "{}",
                next.streamed
            );
            let texts = &scene.sim.handle.threads()[0].user_texts;
            assert_eq!(texts.iter().filter(|text| *text == "next").count(), 1);
            scene.assert_sound();
        }
    }
}

#[tokio::test]
async fn damage_reported_after_acceptance_is_repaired_in_stream() {
    for append_unfinished in [false, true] {
        for flavour in [Flavour::Conversations, Flavour::Background] {
            let config = SimulatorConfig {
                append_unfinished,
                ..SimulatorConfig::default()
            };
            let scene = Scene::with(flavour, config, |_| ()).await;
            scene.say("x [[sim: tools=1 reasoning]]").await;
            scene.plant("create_response", "fail_text=open_call");
            let next = scene.say("next").await;
            assert_eq!(next.ended.status, RunStatus::Completed, "{flavour:?}");
            let texts = &scene.sim.handle.threads()[0].user_texts;
            assert_eq!(
                texts.iter().filter(|text| *text == "next").count(),
                1,
                "{flavour:?} {append_unfinished}"
            );

            scene.say("x [[sim: dangling_reasoning]]").await;
            scene.plant("create_response", "fail_text=reasoning");
            let last = scene.say("last").await;
            assert_eq!(last.ended.status, RunStatus::Completed, "{flavour:?}");
            let texts = &scene.sim.handle.threads()[0].user_texts;
            assert_eq!(
                texts.iter().filter(|text| *text == "last").count(),
                1,
                "{flavour:?} {append_unfinished}"
            );
            scene.assert_sound();
        }
    }
}

#[tokio::test]
async fn repeated_damage_failure_reports_thread_gone() {
    let scene = Scene::new(Flavour::Conversations).await;
    let events: Vec<_> = scene
        .start("x [[sim: fail_text=open_call]]")
        .await
        .unwrap()
        .collect()
        .await;
    assert!(matches!(
        events[0],
        Ok(threadkeeper::upstream::UpstreamEvent::Accepted(_))
    ));
    assert!(
        matches!(events[1..], [Err(UpstreamError::ThreadGone)]),
        "{events:?}"
    );
    read(scene.start("y").await.unwrap()).await;
}

//! Outputs for function calls.

use std::time::Duration;

use threadkeeper::domain::{Metadata, RunId, RunStatus, ToolOutput, UpstreamRunId};
use threadkeeper::upstream::{AnswerTools, EventStream, Upstream, UpstreamError};

use serde_json::json;
use threadkeeper::config::UpstreamKind;

use super::scene::{ALL, Flavour, Scene, read};
use super::scripted::{Play, Scripted, Step, json_answer, sse};
use super::{RESPONSES_TURN, adapter, assistants, config, owner, profile, responses, thread};

async fn answer(upstream: &dyn Upstream, custom: bool) -> Result<EventStream, UpstreamError> {
    answer_of(upstream, Some("r_0"), custom).await
}

async fn answer_of(
    upstream: &dyn Upstream,
    upstream_run: Option<&str>,
    custom: bool,
) -> Result<EventStream, UpstreamError> {
    let mut assistant = profile();
    if custom {
        assistant.tools = vec![json!({"type": "custom", "name": "h"})];
    }
    let output = |id: &str| ToolOutput::text(id, "1");
    let upstream_run = upstream_run.map(|id| UpstreamRunId(id.to_owned()));
    let request = AnswerTools {
        run: RunId::new(),
        thread: Some(&thread()),
        owner: &owner(),
        upstream_run: upstream_run.as_ref(),
        assistant: &assistant,
        outputs: &[output("call_1"), output("call_2")],
        metadata: &Metadata::default(),
    };
    upstream.answer_tools(request).await
}

#[tokio::test]
async fn run_continues_after_tool_outputs() {
    for flavour in ALL {
        let scene = Scene::new(flavour).await;
        let asked = scene.say("weather? [[sim: tools=2 reasoning]]").await;
        assert_eq!(
            (asked.ended.status, asked.ended.tool_calls.len()),
            (RunStatus::RequiresAction, 2)
        );
        let again = scene.answer(&asked, "[[sim: tool=other]] rain").await;
        assert_eq!(
            (again.ended.status, again.ended.tool_calls.len()),
            (RunStatus::RequiresAction, 1)
        );
        let done = scene.answer(&again, "4 °C").await;
        assert_eq!(done.ended.status, RunStatus::Completed, "{flavour:?}");
        let expected = "You said: weather?. The tools answered: rain; rain; 4 °C. (This is turn 1 of this conversation.)";
        assert_eq!(done.streamed, expected, "{flavour:?}");
        assert_eq!(done.ended.thread.is_some(), flavour.is_chain());
        let is_the_same = asked.accepted == done.accepted;
        assert_eq!(is_the_same, flavour == Flavour::Assistants);
        scene.assert_sound();
    }
}

/// A look-up before the outputs gets no answer, so the outputs were certainly not sent.
#[tokio::test]
async fn failed_lookup_before_tool_outputs_is_unambiguous() {
    let failed = || json_answer(503, &[("retry-after-ms", "1")], "");
    for plays in [
        (0..5).map(|_| Play::Silence).collect::<Vec<_>>(),
        (0..5).map(|_| failed()).collect(),
    ] {
        let server = Scripted::start(plays).await;
        let mut settings = config(UpstreamKind::Responses, &server.url);
        settings.call_timeout = Duration::from_millis(50);
        let error = answer(&*adapter(&settings), true).await.err().unwrap();
        assert!(matches!(error, UpstreamError::Connect), "{error:?}");
        assert!(
            server
                .targets()
                .iter()
                .all(|target| target == "GET /responses/r_0"),
            "{:?}",
            server.targets()
        );
    }
}

#[tokio::test]
async fn custom_tool_calls_get_custom_tool_outputs() {
    let asking = json!({"id": "r_0", "status": "completed", "output": [
        {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"},
        {"type": "custom_tool_call", "call_id": "call_2", "name": "h", "input": "x"},
    ]});
    let server = Scripted::start(vec![
        json_answer(200, &[], &asking.to_string()),
        sse(vec![Step::Bytes(RESPONSES_TURN.into())]),
        sse(vec![Step::Bytes(RESPONSES_TURN.into())]),
    ])
    .await;
    let upstream = responses(&server);
    read(answer(&*upstream, true).await.unwrap()).await;
    read(answer(&*upstream, false).await.unwrap()).await;
    assert_eq!(
        server.targets(),
        ["GET /responses/r_0", "POST /responses", "POST /responses"]
    );
    let kinds = |at: usize| {
        let body = &server.requests()[at].body;
        [0, 1].map(|item| body["input"][item]["type"].as_str().unwrap().to_owned())
    };
    assert_eq!(
        kinds(1),
        ["function_call_output", "custom_tool_call_output"]
    );
    assert_eq!(
        kinds(2),
        ["function_call_output", "function_call_output"],
        "the adapter makes no needless request"
    );
}

#[tokio::test]
async fn refused_tool_outputs_are_ambiguous_after_run_moved_on() {
    let refused = |status: &str| {
        let message = format!("Runs in status \"{status}\" do not accept tool outputs.");
        let error = json!({"error": {"message": message, "type": "invalid_request_error", "param": null, "code": null}});
        json_answer(400, &[], &error.to_string())
    };
    let run = |status: &str| {
        json_answer(
            200,
            &[],
            &json!({"id": "r_0", "status": status}).to_string(),
        )
    };
    let server = Scripted::start(vec![
        refused("expired"),
        run("expired"),
        refused("queued"),
        run("queued"),
        refused("requires_action"),
        run("requires_action"),
    ])
    .await;
    let upstream = assistants(&server);
    for _ in ["expired", "queued"] {
        let error = answer(&*upstream, false).await.err().unwrap();
        assert!(
            error.is_ambiguous(),
            "the error must lead to a look-up: {error:?}"
        );
    }
    let error = answer(&*upstream, false).await.err().unwrap();
    assert!(
        matches!(error, UpstreamError::Refused { status: 400, .. }),
        "{error:?}"
    );
    assert_eq!(server.requests().len(), 6);
    assert_eq!(
        server.targets()[0],
        "POST /threads/t_1/runs/r_0/submit_tool_outputs"
    );
}

#[tokio::test]
async fn tool_outputs_without_response_id_use_conversation_items() {
    let items = json!({"data": [
        {"type": "custom_tool_call", "id": "ct_2", "call_id": "call_2", "name": "h", "input": "x"},
        {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "f", "arguments": "{}"},
    ], "has_more": false});
    let server = Scripted::start(vec![
        json_answer(200, &[], &items.to_string()),
        sse(vec![Step::Bytes(RESPONSES_TURN.into())]),
    ])
    .await;
    read(answer_of(&*responses(&server), None, true).await.unwrap()).await;
    assert_eq!(
        server.targets(),
        [
            "GET /conversations/t_1/items?limit=100&order=desc",
            "POST /responses"
        ]
    );
    let body = &server.requests()[1].body;
    assert_eq!(body["conversation"], "t_1");
    assert_eq!(body["input"][1]["type"], "custom_tool_call_output");

    // Runs and chains need an id for their outputs.
    let server = Scripted::start(vec![]).await;
    let mut chain = config(UpstreamKind::Responses, &server.url);
    chain.conversations = false;
    for upstream in [assistants(&server), adapter(&chain)] {
        let error = answer_of(&*upstream, None, true).await.err().unwrap();
        assert!(matches!(error, UpstreamError::Protocol(_)), "{error:?}");
    }
}

//! Outputs for function calls.

use threadkeeper::domain::{Metadata, RunId, RunStatus, ToolCallType, ToolOutput, UpstreamRunId};
use threadkeeper::upstream::{AnswerTools, EventStream, Upstream, UpstreamError};

use serde_json::json;
use threadkeeper::config::UpstreamKind;

use super::scene::{ALL, Flavour, Scene, read};
use super::scripted::{Scripted, Step, json_answer, sse};
use super::{RESPONSES_TURN, adapter, assistants, config, owner, profile, responses, thread};

async fn answer(upstream: &dyn Upstream) -> Result<EventStream, UpstreamError> {
    answer_of(upstream, Some("r_0")).await
}

/// Answers a call of a function and a call of a custom tool.
async fn answer_of(
    upstream: &dyn Upstream,
    upstream_run: Option<&str>,
) -> Result<EventStream, UpstreamError> {
    let custom = ToolOutput {
        kind: ToolCallType::Custom,
        ..ToolOutput::text("call_2", "1")
    };
    let upstream_run = upstream_run.map(|id| UpstreamRunId(id.to_owned()));
    let request = AnswerTools {
        run: RunId::new(),
        thread: Some(&thread()),
        owner: &owner(),
        upstream_run: upstream_run.as_ref(),
        assistant: &profile(),
        outputs: &[ToolOutput::text("call_1", "1"), custom],
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
        let error = answer(&*upstream).await.err().unwrap();
        assert!(
            error.is_ambiguous(),
            "the error must lead to a look-up: {error:?}"
        );
    }
    let error = answer(&*upstream).await.err().unwrap();
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
async fn conversation_takes_tool_outputs_without_response_id() {
    let server = Scripted::start(vec![sse(vec![Step::Bytes(RESPONSES_TURN.into())])]).await;
    read(answer_of(&*responses(&server), None).await.unwrap()).await;
    assert_eq!(server.targets(), ["POST /responses"]);
    let body = &server.requests()[0].body;
    assert_eq!(body["conversation"], "t_1");
    let kinds = [0, 1].map(|item| body["input"][item]["type"].as_str().unwrap().to_owned());
    assert_eq!(kinds, ["function_call_output", "custom_tool_call_output"]);

    // Runs and chains need an id for their outputs.
    let server = Scripted::start(vec![]).await;
    let mut chain = config(UpstreamKind::Responses, &server.url);
    chain.conversations = false;
    for upstream in [assistants(&server), adapter(&chain)] {
        let error = answer_of(&*upstream, None).await.err().unwrap();
        assert!(matches!(error, UpstreamError::Protocol(_)), "{error:?}");
    }
}

//! The exact shapes of answers, one of each kind, so that a change of them is seen here.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::gateway::Gateway;
use crate::support::scene::{Backend, Protocol, Scene};

const SCOPE: &str = "/v1/users/alice/topics/news";

async fn gateway() -> (Scene, Gateway) {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let gateway = scene.gateway().await;
    (scene, gateway)
}

macro_rules! assert_shape {
    ($answer:expr, @$shape:literal) => {{
        let mut answer: Value = $answer;
        redact(&mut answer);
        insta::assert_json_snapshot!(answer, @$shape);
    }};
}

#[tokio::test(flavor = "multi_thread")]
async fn message_answer_has_thread_run_and_reply() {
    let (_scene, gateway) = gateway().await;
    assert_shape!(gateway.say(SCOPE, "Hello").await, @r#"
    {
      "message": {
        "content": [
          {
            "text": "You said: Hello. (This is turn 1 of this conversation.)",
            "type": "text"
          }
        ],
        "created_at": "[created_at]",
        "id": "[id]",
        "incomplete_reason": null,
        "position": 2,
        "role": "assistant",
        "run_id": "[run_id]",
        "status": "completed",
        "thread_id": "[thread_id]",
        "visible_to_model": true
      },
      "run": {
        "assistant": "default",
        "created_at": "[created_at]",
        "deadline_at": "[deadline_at]",
        "error": null,
        "finished_at": "[finished_at]",
        "id": "[id]",
        "metadata": {},
        "multitask_strategy": "enqueue",
        "recovered": null,
        "required_action": null,
        "rolled_back": false,
        "started_at": "[started_at]",
        "status": "completed",
        "thread_id": "[thread_id]",
        "usage": {
          "cached_input_tokens": 0,
          "input_tokens": 1,
          "output_tokens": 10,
          "reasoning_tokens": 0,
          "total_tokens": 11
        }
      },
      "thread": {
        "archived_at": null,
        "created_at": "[created_at]",
        "expires_at": null,
        "id": "[id]",
        "key": {
          "scope": "topic:news",
          "tenant": "default",
          "user": "alice"
        },
        "last_active_at": "[last_active_at]",
        "lifecycle": "current",
        "message_count": 2,
        "metadata": {},
        "previous_thread": null,
        "queue_depth": 0,
        "run_count": 1,
        "state": "idle",
        "upstream": "simulated",
        "upstream_thread_id": "[upstream_thread_id]",
        "usage": {
          "cached_input_tokens": 0,
          "input_tokens": 1,
          "output_tokens": 10,
          "reasoning_tokens": 0,
          "total_tokens": 11
        }
      }
    }
    "#);
}

#[tokio::test(flavor = "multi_thread")]
async fn accepted_message_answer_has_no_reply() {
    let (scene, gateway) = gateway().await;
    scene.simulator.hold();
    let request = gateway.request(Method::POST, &format!("{SCOPE}/messages"));
    let request = request
        .header("prefer", "respond-async")
        .json(&json!({"content": "Hello"}));
    let answer = gateway.send(request).await;
    assert_eq!(answer.status, 202);
    assert_shape!(answer.body, @r#"
    {
      "message": null,
      "run": {
        "assistant": "default",
        "created_at": "[created_at]",
        "deadline_at": "[deadline_at]",
        "error": null,
        "finished_at": null,
        "id": "[id]",
        "metadata": {},
        "multitask_strategy": "enqueue",
        "recovered": null,
        "required_action": null,
        "rolled_back": false,
        "started_at": "[started_at]",
        "status": "in_progress",
        "thread_id": "[thread_id]",
        "usage": null
      },
      "thread": {
        "archived_at": null,
        "created_at": "[created_at]",
        "expires_at": null,
        "id": "[id]",
        "key": {
          "scope": "topic:news",
          "tenant": "default",
          "user": "alice"
        },
        "last_active_at": "[last_active_at]",
        "lifecycle": "current",
        "message_count": 1,
        "metadata": {},
        "previous_thread": null,
        "queue_depth": 0,
        "run_count": 1,
        "state": "active",
        "upstream": "simulated",
        "upstream_thread_id": null,
        "usage": {
          "cached_input_tokens": 0,
          "input_tokens": 0,
          "output_tokens": 0,
          "reasoning_tokens": 0,
          "total_tokens": 0
        }
      }
    }
    "#);
    scene.simulator.release();
}

#[tokio::test(flavor = "multi_thread")]
async fn run_with_function_call_has_required_action() {
    let (_scene, gateway) = gateway().await;
    let answer = gateway
        .say(SCOPE, "Weather? [[sim: tool=get_weather]]")
        .await;
    assert_shape!(answer["run"].clone(), @r#"
    {
      "assistant": "default",
      "created_at": "[created_at]",
      "deadline_at": "[deadline_at]",
      "error": null,
      "finished_at": null,
      "id": "[id]",
      "metadata": {},
      "multitask_strategy": "enqueue",
      "recovered": null,
      "required_action": {
        "tool_calls": [
          {
            "arguments": "{\"input\":\"Weather?\"}",
            "id": "[id]",
            "name": "get_weather",
            "type": "function"
          }
        ]
      },
      "rolled_back": false,
      "started_at": "[started_at]",
      "status": "requires_action",
      "thread_id": "[thread_id]",
      "usage": {
        "cached_input_tokens": 0,
        "input_tokens": 3,
        "output_tokens": 0,
        "reasoning_tokens": 0,
        "total_tokens": 3
      }
    }
    "#);
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_run_has_code_and_message() {
    let (_scene, gateway) = gateway().await;
    let answer = gateway
        .post(
            &format!("{SCOPE}/messages"),
            &json!({"content": "Hello [[sim: fail]]"}),
        )
        .await;
    assert_eq!(answer.status, 502);
    assert_shape!(answer.body, @r#"
    {
      "code": "upstream_failed",
      "detail": "the upstream reported that the run failed (server_error)",
      "request_id": "[request_id]",
      "run_id": "[run_id]",
      "status": 502,
      "thread_id": "[thread_id]",
      "title": "Upstream error",
      "type": "urn:threadkeeper:problem:upstream-error",
      "upstream_code": "server_error"
    }
    "#);
}

#[tokio::test(flavor = "multi_thread")]
async fn stream_has_each_event_with_its_data() {
    let (_scene, gateway) = gateway().await;
    let events = gateway.stream(SCOPE, "Hello").await.rest().await;
    let deltas = events
        .iter()
        .filter(|event| event.name == "message.delta")
        .count();
    assert!(deltas > 1, "{events:#?}");
    let mut seen = Vec::new();
    for event in events {
        if seen
            .last()
            .is_none_or(|last: &Value| last["event"] != event.name.as_str())
        {
            seen.push(json!({"event": event.name, "data": event.data}));
        }
    }
    // The data of the last event are those of an answer.
    assert_shape!(json!(seen), @r#"
    [
      {
        "data": {
          "run_id": "[run_id]",
          "thread_id": "[thread_id]"
        },
        "event": "run.started"
      },
      {
        "data": {
          "text": "You "
        },
        "event": "message.delta"
      },
      {
        "data": {
          "message": {
            "content": [
              {
                "text": "You said: Hello. (This is turn 1 of this conversation.)",
                "type": "text"
              }
            ],
            "created_at": "[created_at]",
            "id": "[id]",
            "incomplete_reason": null,
            "position": 2,
            "role": "assistant",
            "run_id": "[run_id]",
            "status": "completed",
            "thread_id": "[thread_id]",
            "visible_to_model": true
          }
        },
        "event": "message.completed"
      },
      {
        "data": {
          "run": {
            "assistant": "default",
            "created_at": "[created_at]",
            "deadline_at": "[deadline_at]",
            "error": null,
            "finished_at": "[finished_at]",
            "id": "[id]",
            "metadata": {},
            "multitask_strategy": "enqueue",
            "recovered": null,
            "required_action": null,
            "rolled_back": false,
            "started_at": "[started_at]",
            "status": "completed",
            "thread_id": "[thread_id]",
            "usage": {
              "cached_input_tokens": 0,
              "input_tokens": 1,
              "output_tokens": 10,
              "reasoning_tokens": 0,
              "total_tokens": 11
            }
          }
        },
        "event": "run.completed"
      }
    ]
    "#);
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_have_first_and_last_ids() {
    let (_scene, gateway) = gateway().await;
    gateway.say(SCOPE, "Hello").await;
    assert_shape!(gateway.get(&format!("{SCOPE}/messages?limit=1")).await.ok(), @r#"
    {
      "data": [
        {
          "content": [
            {
              "text": "You said: Hello. (This is turn 1 of this conversation.)",
              "type": "text"
            }
          ],
          "created_at": "[created_at]",
          "id": "[id]",
          "incomplete_reason": null,
          "position": 2,
          "role": "assistant",
          "run_id": "[run_id]",
          "status": "completed",
          "thread_id": "[thread_id]",
          "visible_to_model": true
        }
      ],
      "first_id": "[first_id]",
      "has_more": true,
      "last_id": "[last_id]"
    }
    "#);
    assert_shape!(gateway.get("/v1/users/alice/threads").await.ok(), @r#"
    {
      "data": [
        {
          "archived_at": null,
          "created_at": "[created_at]",
          "expires_at": null,
          "id": "[id]",
          "key": {
            "scope": "topic:news",
            "tenant": "default",
            "user": "alice"
          },
          "last_active_at": "[last_active_at]",
          "lifecycle": "current",
          "message_count": 2,
          "metadata": {},
          "previous_thread": null,
          "queue_depth": 0,
          "run_count": 1,
          "state": "idle",
          "upstream": "simulated",
          "upstream_thread_id": "[upstream_thread_id]",
          "usage": {
            "cached_input_tokens": 0,
            "input_tokens": 1,
            "output_tokens": 10,
            "reasoning_tokens": 0,
            "total_tokens": 11
          }
        }
      ],
      "first_id": "[first_id]",
      "has_more": false,
      "last_id": "[last_id]"
    }
    "#);
}

#[tokio::test(flavor = "multi_thread")]
async fn deletion_answers_with_receipt() {
    let (_scene, gateway) = gateway().await;
    gateway.say(SCOPE, "Hello").await;
    assert_shape!(gateway.delete(&format!("{SCOPE}/thread")).await.ok(), @r#"
    {
      "archive": false,
      "finished_at": "[finished_at]",
      "id": "[id]",
      "requested_at": "[requested_at]",
      "status": "completed",
      "threads": {
        "data": [
          {
            "attempts": 0,
            "finished_at": "[finished_at]",
            "last_failure": null,
            "messages": 2,
            "runs": 1,
            "status": "completed",
            "thread_id": "[thread_id]",
            "upstream": "simulated",
            "upstream_items": 2,
            "upstream_left_items": 0,
            "upstream_left_responses": 0,
            "upstream_left_threads": 0,
            "upstream_other_threads": 0,
            "upstream_outcome": "deleted",
            "upstream_responses": 1,
            "upstream_thread_id": "[upstream_thread_id]",
            "upstream_tried_until": null,
            "upstream_unknown": 0
          }
        ],
        "first_id": "[first_id]",
        "has_more": false,
        "last_id": "[last_id]"
      },
      "threads_done": 1,
      "threads_incomplete": 0,
      "threads_pending": 0
    }
    "#);
}

#[tokio::test(flavor = "multi_thread")]
async fn deletion_dry_run_counts_and_deletes_nothing() {
    let (_scene, gateway) = gateway().await;
    gateway.say(SCOPE, "Hello").await;
    assert_shape!(gateway.delete("/v1/users/alice?dry_run=true").await.ok(), @r#"
    {
      "archive": false,
      "dry_run": true,
      "messages": 2,
      "runs": 1,
      "threads": 1,
      "unfinished_runs": 0
    }
    "#);
    gateway.get(&format!("{SCOPE}/thread")).await.ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn cleanup_answers_with_its_counts() {
    let (_scene, gateway) = gateway().await;
    gateway.say(SCOPE, "Hello").await;
    let dry_run = gateway.request(Method::POST, "/v1/admin/cleanup?dry_run=true");
    assert_shape!(gateway.send(dry_run).await.ok(), @r#"
    {
      "dry_run": true,
      "has_more": false,
      "threads": [],
      "upstream_orphans": [],
      "would_prune": {
        "events": 0,
        "idempotency_keys": 0,
        "receipts": 0,
        "runs": 0
      }
    }
    "#);
    let cleanup = gateway.request(Method::POST, "/v1/admin/cleanup");
    assert_shape!(gateway.send(cleanup).await.ok(), @r#"
    {
      "deleted": 0,
      "discarded": 0,
      "dry_run": false,
      "expired": 0,
      "failed": 0,
      "has_more": false,
      "pruned": {
        "events": 0,
        "idempotency_keys": 0,
        "receipts": 0,
        "runs": 0
      },
      "upstream_cleared": 0,
      "upstream_orphans_deleted": 0
    }
    "#);
}

#[tokio::test(flavor = "multi_thread")]
async fn export_begins_with_thread_and_its_messages() {
    let (_scene, gateway) = gateway().await;
    gateway.say(SCOPE, "Hello").await;
    let export = gateway
        .request(Method::GET, "/v1/users/alice/export")
        .send()
        .await
        .unwrap();
    let lines = export.text().await.unwrap();
    let lines: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_shape!(json!(lines), @r#"
    [
      {
        "archived_at": null,
        "created_at": "[created_at]",
        "id": "[id]",
        "key": {
          "scope": "topic:news",
          "tenant": "default",
          "user": "alice"
        },
        "last_active_at": "[last_active_at]",
        "lifecycle": "current",
        "max_age_ms": null,
        "max_idle_ms": null,
        "metadata": {},
        "previous_thread": null,
        "type": "thread",
        "upstream": "simulated",
        "upstream_thread_id": "[upstream_thread_id]"
      },
      {
        "assistant": "default",
        "created_at": "[created_at]",
        "error": null,
        "finished_at": "[finished_at]",
        "id": "[id]",
        "metadata": {},
        "started_at": "[started_at]",
        "status": "completed",
        "strategy": "enqueue",
        "thread_id": "[thread_id]",
        "type": "run",
        "upstream_run_id": "[upstream_run_id]",
        "usage": {
          "cached_input_tokens": 0,
          "input_tokens": 1,
          "output_tokens": 10,
          "reasoning_tokens": 0,
          "total_tokens": 11
        }
      },
      {
        "content": [
          {
            "text": "Hello",
            "type": "text"
          }
        ],
        "created_at": "[created_at]",
        "ended": null,
        "id": "[id]",
        "role": "user",
        "run_id": "[run_id]",
        "thread_id": "[thread_id]",
        "type": "message",
        "upstream_message_id": null,
        "upstream_sync": "present"
      },
      {
        "content": [
          {
            "text": "You said: Hello. (This is turn 1 of this conversation.)",
            "type": "text"
          }
        ],
        "created_at": "[created_at]",
        "ended": null,
        "id": "[id]",
        "role": "assistant",
        "run_id": "[run_id]",
        "thread_id": "[thread_id]",
        "type": "message",
        "upstream_message_id": "[upstream_message_id]",
        "upstream_sync": "present"
      },
      {
        "messages": 2,
        "runs": 1,
        "threads": 1,
        "type": "end"
      }
    ]
    "#);
}

#[tokio::test(flavor = "multi_thread")]
async fn problem_says_how_to_mend_request() {
    let (_scene, gateway) = gateway().await;
    let problem = gateway
        .post(&format!("{SCOPE}/messages"), &json!({"content": 7}))
        .await
        .body;
    assert_shape!(problem, @r#"
    {
      "detail": "`content`: must be a string or a list of content parts, not a number",
      "request_id": "[request_id]",
      "status": 422,
      "title": "Invalid request",
      "type": "urn:threadkeeper:problem:invalid-request"
    }
    "#);
}

/// Replaces ids and times, which differ each time. Everything else must match exactly.
fn redact(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                if field.is_string()
                    && (name == "id" || name.ends_with("_id") || name.ends_with("_at"))
                {
                    *field = json!(format!("[{name}]"));
                } else {
                    redact(field);
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(redact),
        _ => {}
    }
}

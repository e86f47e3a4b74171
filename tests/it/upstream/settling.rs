//! Settling a run: cancelling it, reporting what the thread has of it, removing it.

use futures_util::StreamExt;
use serde_json::{Value, json};
use threadkeeper::config::UpstreamKind;
use threadkeeper::domain::{
    Baseline, ContentPart, Role, RunId, RunStatus, TextDelta, ToolCall, UnsettledRun, Usage,
};
use threadkeeper::upstream::{Settled, UpstreamEvent};

use super::scene::{ALL, Flavour, Scene, earlier, text_of};
use super::scripted::{Play, Scripted, json_answer};
use super::{adapter, assistants, config, responses, unsettled_run};

/// The messages of a run, and one of another run.
fn messages() -> Play {
    let message = json!({"id": "msg_1", "role": "assistant", "run_id": "r_1", "content": [{"type": "text", "text": {"value": "Hel"}}]});
    let other = json!({"id": "msg_0", "role": "assistant", "run_id": "r_0", "content": [{"type": "text", "text": {"value": "x"}}]});
    json_answer(200, &[], &json!({"data": [other, message]}).to_string())
}

#[tokio::test]
async fn settling_cancels_run_and_waits_for_its_end() {
    let status = |status: &str| {
        json_answer(
            200,
            &[("openai-poll-after-ms", "1")],
            &format!(r#"{{"id":"r_1","status":"{status}"}}"#),
        )
    };
    let server = Scripted::start(vec![
        status("cancelling"),
        status("cancelling"),
        json_answer(500, &[("retry-after-ms", "1")], ""),
        json_answer(
            200,
            &[],
            r#"{"id":"r_1","status":"cancelled","usage":{"prompt_tokens":1,"completion_tokens":2}}"#,
        ),
        messages(),
    ])
    .await;
    let settled = assistants(&server)
        .settle(&unsettled_run(RunId::new(), Some("r_1")))
        .await
        .unwrap();
    assert_eq!(
        server.targets(),
        [
            "POST /threads/t_1/runs/r_1/cancel",
            "GET /threads/t_1/runs/r_1",
            "GET /threads/t_1/runs/r_1",
            "GET /threads/t_1/runs/r_1",
            "GET /threads/t_1/messages?limit=100&run_id=r_1&order=asc",
        ]
    );
    let expected = Settled {
        unsure: false,
        said: true,
        status: Some(RunStatus::Cancelled),
        usage: Some(Usage {
            input_tokens: 1,
            output_tokens: 2,
            total_tokens: 3,
            ..Usage::default()
        }),
        content: vec![ContentPart::text("Hel")],
        upstream_message_id: Some("msg_1".to_owned()),
        thread: None,
    };
    assert_eq!(settled, expected);
}

#[tokio::test]
async fn settling_retries_while_run_requires_action() {
    let status = |status: &str| {
        json_answer(
            200,
            &[("openai-poll-after-ms", "1")],
            &format!(r#"{{"id":"r_1","status":"{status}"}}"#),
        )
    };
    let refused = || {
        json_answer(
            400,
            &[],
            r#"{"error":{"message":"Cannot cancel run with status 'requires_action'.","type":"invalid_request_error","param":null,"code":null}}"#,
        )
    };
    let server = Scripted::start(vec![
        refused(),
        status("requires_action"),
        refused(),
        status("expired"),
        messages(),
    ])
    .await;
    let settled = assistants(&server)
        .settle(&unsettled_run(RunId::new(), Some("r_1")))
        .await
        .unwrap();
    assert_eq!(settled.status, Some(RunStatus::Expired));
    assert_eq!(server.requests().len(), 5);
}

#[tokio::test]
async fn settling_finds_run_by_gateway_tag() {
    let run = RunId::new();
    let list = json!({"object": "list", "data": [
        {"id": "r_9", "status": "in_progress", "metadata": {"threadkeeper_run": "run_other"}},
        {"id": "r_8", "status": "in_progress"},
        {"id": "r_1", "status": "in_progress", "metadata": {"threadkeeper_run": run.to_string()}},
    ]});
    let server = Scripted::start(vec![
        json_answer(200, &[], r#"{"data":[]}"#),
        json_answer(200, &[], &list.to_string()),
        json_answer(200, &[], r#"{"id":"r_1","status":"cancelled"}"#),
        messages(),
    ])
    .await;
    assistants(&server)
        .settle(&unsettled_run(run, None))
        .await
        .unwrap();
    assert_eq!(
        server.targets(),
        [
            "GET /threads/t_1/runs?limit=20&order=desc",
            "GET /threads/t_1/runs?limit=20&order=desc",
            "POST /threads/t_1/runs/r_1/cancel",
            "GET /threads/t_1/messages?limit=100&run_id=r_1&order=asc",
        ]
    );
}

#[tokio::test]
async fn settling_on_missing_thread_is_done() {
    let gone = |noun: &str| {
        let message = format!("{noun} with id 't_1' not found.");
        let body = json!({"error": {"message": message, "type": "invalid_request_error", "param": null, "code": null}});
        Scripted::start(vec![json_answer(404, &[], &body.to_string())])
    };
    assistants(&gone("Thread").await)
        .settle(&unsettled_run(RunId::new(), Some("r_1")))
        .await
        .unwrap();
    responses(&gone("Conversation").await)
        .settle(&unsettled_run(RunId::new(), None))
        .await
        .unwrap();

    let server = Scripted::start(vec![]).await;
    let nothing = UnsettledRun {
        thread: None,
        ..unsettled_run(RunId::new(), None)
    };
    assistants(&server).settle(&nothing).await.unwrap();
    responses(&server).settle(&nothing).await.unwrap();
    let mut chain = config(UpstreamKind::Responses, &server.url);
    chain.conversations = false;
    adapter(&chain)
        .settle(&unsettled_run(RunId::new(), None))
        .await
        .unwrap();
    assert_eq!(server.requests().len(), 0);

    // A 404 of the endpoint says nothing about the thread.
    let server = Scripted::start(vec![json_answer(404, &[], "Not Found")]).await;
    assistants(&server)
        .settle(&unsettled_run(RunId::new(), Some("r_1")))
        .await
        .unwrap_err();
}

#[tokio::test]
async fn settling_closes_unanswered_calls() {
    let call = |id: &str| json!({"type": "function_call", "id": format!("fc_{id}"), "call_id": id, "name": "f", "arguments": "{}"});
    let list = json!({"data": [
        call("call_3"),
        {"type": "function_call_output", "call_id": "call_2", "output": "1"},
        call("call_2"),
        call("call_1"),
    ]});
    let locked = json!({"error": {"message": "m", "code": "conversation_locked"}});
    let server = Scripted::start(vec![
        json_answer(200, &[], &list.to_string()),
        json_answer(400, &[], &locked.to_string()),
        json_answer(200, &[], r#"{"data":[]}"#),
    ])
    .await;
    let known = |id: &str| ToolCall {
        id: id.to_owned(),
        name: "f".to_owned(),
        arguments: "{}".to_owned(),
        ..ToolCall::default()
    };
    let unsettled_run = UnsettledRun {
        open_calls: vec![known("call_2"), known("call_4")],
        ..unsettled_run(RunId::new(), None)
    };
    responses(&server).settle(&unsettled_run).await.unwrap();
    assert_eq!(
        server.targets(),
        [
            "GET /conversations/t_1/items?limit=100&order=desc",
            "POST /conversations/t_1/items",
            "POST /conversations/t_1/items",
        ]
    );
    let output = |id: &str| json!({"type": "function_call_output", "call_id": id, "output": "{\"error\":\"the call was not answered\"}"});
    let expected = json!({"items": [output("call_1"), output("call_3"), output("call_4")]});
    assert_eq!(server.requests()[2].body, expected);
}

#[tokio::test]
async fn many_open_calls_are_closed_in_several_requests() {
    let calls: Vec<Value> = (0..45)
        .map(|at| json!({"type": "function_call", "call_id": format!("call_{at}"), "name": "f", "arguments": "{}"}))
        .collect();
    let ok = || json_answer(200, &[], r#"{"data":[]}"#);
    let list = json_answer(200, &[], &json!({"data": calls}).to_string());
    let server = Scripted::start(vec![list, ok(), ok(), ok()]).await;
    responses(&server)
        .settle(&unsettled_run(RunId::new(), None))
        .await
        .unwrap();
    let sizes: Vec<usize> = server.requests()[1..]
        .iter()
        .map(|request| request.body["items"].as_array().unwrap().len())
        .collect();
    assert_eq!(sizes, [20, 20, 5]);
}

/// Returns the texts of the thread, oldest first.
fn held(scene: &Scene) -> Vec<String> {
    let thread = scene.thread.as_ref().unwrap();
    scene
        .sim
        .handle
        .thread_history(thread.as_str())
        .into_iter()
        .map(|(_, text)| text)
        .collect()
}

#[tokio::test]
async fn settling_completed_run_reports_completed() {
    for flavour in ALL {
        let scene = Scene::new(flavour).await;
        let said = scene.say("hello").await;
        for known in [true, false] {
            let id = known.then_some(&said.accepted);
            let settled = scene
                .upstream
                .settle(&scene.unsettled_run(id))
                .await
                .unwrap();
            if flavour.is_chain() && !known {
                assert_eq!(
                    settled,
                    Settled::default(),
                    "a response cannot be found without its id"
                );
                continue;
            }
            assert!(settled.said, "{flavour:?}");
            assert_eq!(settled.content, said.ended.content, "{flavour:?}");
            assert_eq!(settled.upstream_message_id, said.ended.upstream_message_id);
            assert_eq!(settled.thread, said.ended.thread);
            if known || flavour == Flavour::Assistants {
                assert_eq!(settled.status, Some(RunStatus::Completed), "{flavour:?}");
                assert_eq!(settled.usage, said.ended.usage);
            } else {
                assert_eq!((settled.status, settled.usage), (None, None));
            }
        }
        scene.assert_sound();
    }
}

#[tokio::test]
async fn settling_cancelled_run_reports_kept_text() {
    for flavour in ALL {
        let scene = Scene::new(flavour).await;
        let mut events = scene
            .start("stop [[sim: tokens=50 rate=10s]]")
            .await
            .unwrap();
        let Some(Ok(UpstreamEvent::Accepted(id))) = events.next().await else {
            panic!("the run was not accepted")
        };
        let Some(Ok(UpstreamEvent::Text(TextDelta { text, .. }))) = events.next().await else {
            panic!("the stream has no text")
        };
        drop(events);
        let left = scene.unsettled_run(Some(&id));
        let settled = scene.upstream.settle(&left).await.unwrap();
        scene.sim.wait_for(|stats| stats.active_runs == 0).await;
        let status = match flavour {
            Flavour::Assistants | Flavour::Background | Flavour::BackgroundChain => {
                Some(RunStatus::Cancelled)
            }
            Flavour::Conversations | Flavour::Chain => None,
        };
        assert_eq!(settled.status, status, "{flavour:?}");
        assert_eq!(settled.said, flavour == Flavour::Assistants);
        assert_eq!(settled.thread, None);
        let partial: String = if flavour == Flavour::Assistants {
            text.to_string()
        } else {
            String::new()
        };
        assert_eq!(text_of(&settled.content), partial);
        assert_eq!(
            scene.upstream.settle(&left).await.unwrap(),
            settled,
            "{flavour:?}: a repeat is harmless"
        );
        scene.assert_sound();
    }
}

#[tokio::test]
async fn closed_calls_are_not_reported_as_waiting() {
    for flavour in ALL {
        let scene = Scene::new(flavour).await;
        let said = scene.say("x [[sim: tools=2]]").await;
        let left = UnsettledRun {
            open_calls: said.ended.tool_calls.clone(),
            ..scene.unsettled_run(Some(&said.accepted))
        };
        let settled = scene.upstream.settle(&left).await.unwrap();
        let expected = (flavour == Flavour::Assistants).then_some(RunStatus::Cancelled);
        assert_eq!(
            (settled.status, settled.thread),
            (expected, None),
            "{flavour:?}"
        );
        assert_eq!(settled.said, !flavour.is_chain());
        assert_eq!(scene.say("next").await.ended.status, RunStatus::Completed);
        scene.assert_sound();
    }
}

#[tokio::test]
async fn removal_deletes_all_items_of_run() {
    for flavour in [
        Flavour::Assistants,
        Flavour::Conversations,
        Flavour::Background,
    ] {
        let mut scene = Scene::new(flavour).await;
        let first = scene.say("one").await;
        let before = held(&scene);
        scene.next_run(Baseline {
            anchor: first.ended.upstream_message_id,
            skip: 0,
        });
        let asked = scene.say("two [[sim: tools=2 reasoning]]").await;
        let answered = scene.answer(&asked, "[[sim: reasoning]] done").await;
        assert_eq!(answered.ended.status, RunStatus::Completed);

        // The removal works with the run's id and without it, and a repeat finds nothing.
        let left = UnsettledRun {
            remove: true,
            ..scene.unsettled_run(Some(&answered.accepted))
        };
        for left in [
            &left,
            &UnsettledRun {
                upstream_run: None,
                ..left.clone()
            },
        ] {
            scene.upstream.settle(left).await.unwrap();
            scene.upstream.remove(left).await.unwrap();
            assert_eq!(held(&scene), before, "{flavour:?}");
        }
        if flavour != Flavour::Assistants {
            let path = format!(
                "/conversations/{}/items?limit=100",
                scene.thread.as_ref().unwrap()
            );
            assert_eq!(
                scene.sim.get(&path).await["data"].as_array().unwrap().len(),
                2
            );
        }
        let next = scene.say("three").await;
        assert!(
            next.streamed.contains("turn 2"),
            "{flavour:?}: {}",
            next.streamed
        );
        scene.assert_sound();
    }
}

#[tokio::test]
async fn run_with_open_calls_is_removed_without_closing() {
    for flavour in [Flavour::Conversations, Flavour::Background] {
        let scene = Scene::new(flavour).await;
        let asked = scene.say("one [[sim: tools=23 reasoning]]").await;
        let left = UnsettledRun {
            remove: true,
            ..scene.unsettled_run(Some(&asked.accepted))
        };
        scene.upstream.settle(&left).await.unwrap();
        scene.upstream.remove(&left).await.unwrap();
        let stats = scene.sim.handle.stats();
        assert_eq!(stats.requests_by_operation.get("create_items"), None);
        assert!(scene.say("two").await.streamed.contains("turn 1"));
        scene.assert_sound();
    }
}

#[tokio::test]
async fn removal_keeps_seeded_history() {
    let mut scene = Scene::new(Flavour::Conversations).await;
    scene.history = vec![
        earlier(Role::User, "before"),
        earlier(Role::Assistant, "yes"),
    ];
    let said = scene.say("now").await;
    assert!(said.streamed.contains("turn 2"));
    scene.next_run(Baseline {
        anchor: None,
        skip: 1,
    });
    scene
        .upstream
        .remove(&scene.unsettled_run(None))
        .await
        .unwrap();
    assert_eq!(held(&scene), ["before", "yes"]);
    scene
        .upstream
        .remove(&scene.unsettled_run(None))
        .await
        .unwrap();
    assert_eq!(held(&scene), ["before", "yes"]);
}

#[tokio::test]
async fn removal_waits_for_lock_and_accepts_missing_items() {
    let item =
        |id: &str, role: &str| json!({"type": "message", "id": id, "role": role, "content": []});
    let list = json!({"data": [item("m_4", "assistant"), item("m_3", "user"), item("m_2", "assistant")], "has_more": true});
    let locked = json!({"error": {"message": "m", "code": "conversation_locked"}});
    let gone =
        json!({"error": {"message": "Item with id 'm_3' not found in conversation.", "type": "x"}});
    let server = Scripted::start(vec![
        json_answer(200, &[], &list.to_string()),
        json_answer(400, &[], &locked.to_string()),
        json_answer(200, &[], "{}"),
        json_answer(404, &[], &gone.to_string()),
    ])
    .await;
    let baseline = Baseline {
        anchor: Some("m_2".to_owned()),
        skip: 0,
    };
    let left = UnsettledRun {
        baseline,
        ..unsettled_run(RunId::new(), None)
    };
    responses(&server).remove(&left).await.unwrap();
    assert_eq!(
        server.targets(),
        [
            "GET /conversations/t_1/items?limit=100&order=desc",
            "DELETE /conversations/t_1/items/m_4",
            "DELETE /conversations/t_1/items/m_4",
            "DELETE /conversations/t_1/items/m_3",
        ]
    );
}

#[tokio::test]
async fn unknown_baseline_removes_nothing() {
    let list = json!({"data": [{"type": "message", "id": "m_4", "role": "user", "content": []}], "has_more": false});
    let page = || json_answer(200, &[], &list.to_string());
    let server = Scripted::start(vec![page(), page()]).await;
    let baseline = Baseline {
        anchor: Some("m_2".to_owned()),
        skip: 0,
    };
    let left = UnsettledRun {
        baseline,
        ..unsettled_run(RunId::new(), None)
    };
    responses(&server).remove(&left).await.unwrap_err();
    responses(&server).settle(&left).await.unwrap_err();
    assert_eq!(server.requests().len(), 2);
}

#[tokio::test]
async fn long_conversation_is_read_in_pages() {
    let mut scene = Scene::new(Flavour::Conversations).await;
    let first = scene.say("one").await;
    scene.next_run(Baseline {
        anchor: first.ended.upstream_message_id,
        skip: 0,
    });
    let last = scene.say("two [[sim: tools=120]]").await;
    let settled = scene
        .upstream
        .settle(&scene.unsettled_run(Some(&last.accepted)))
        .await
        .unwrap();
    assert!(settled.said);
    assert_eq!(scene.say("three").await.ended.status, RunStatus::Completed);
    scene.assert_sound();
}

#[tokio::test]
async fn settling_without_item_list_uses_response_content() {
    let done = json!({"id": "r_1", "status": "completed", "output": [
        {"type": "message", "id": "m_1", "role": "assistant", "content": [{"type": "output_text", "text": "Hi"}]},
    ]});
    let server = Scripted::start(vec![
        json_answer(200, &[], &done.to_string()),
        json_answer(404, &[], "Not Found"),
    ])
    .await;
    let settled = responses(&server)
        .settle(&unsettled_run(RunId::new(), Some("r_1")))
        .await
        .unwrap();
    assert!(settled.said && settled.status == Some(RunStatus::Completed));
    assert_eq!(text_of(&settled.content), "Hi");
}

#[tokio::test]
async fn settling_waits_for_ineffective_cancel() {
    for flavour in [Flavour::Assistants, Flavour::Background] {
        let scene = Scene::new(flavour).await;
        scene.sim.handle.hold();
        let mut events = scene.start("x [[sim: stuck_cancel]]").await.unwrap();
        let Some(Ok(UpstreamEvent::Accepted(id))) = events.next().await else {
            panic!("the run was not accepted")
        };
        drop(events);
        let left = scene.unsettled_run(Some(&id));
        let settling = scene.upstream.settle(&left);
        let asked = scene.sim.wait_for(|stats| {
            let cancels = |name| stats.requests_by_operation.get(name).copied().unwrap_or(0);
            cancels("cancel_run") + cancels("get_run") >= 3 || cancels("cancel_response") > 0
        });
        tokio::select! {
            settled = settling => panic!("{flavour:?}: {settled:?}"),
            stats = asked => assert_eq!(stats.active_runs, 1),
        }
    }
}

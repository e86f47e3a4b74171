//! Deleting threads and runs, reading a thread from its beginning, and finding lost threads.

use std::num::NonZeroU32;
use std::time::Duration;

use futures_util::StreamExt;
use reqwest::Method;
use serde_json::{Value, json};
use threadkeeper::config::UpstreamKind;
use threadkeeper::domain::{
    ContentPart, KeyNames, Role, ThreadId, UpstreamRunId, UpstreamThreadId,
};
use threadkeeper::simulator::SimulatorConfig;
use threadkeeper::upstream::Disposal::{AlreadyGone, Deleted, NotSupported};
use threadkeeper::upstream::{
    Disposal, HistoryEntry, Items, Ownership, RateLimiter, Upstream, UpstreamError, UpstreamEvent,
};

use super::scene::{ALL, Flavour, Scene};
use super::scripted::{Play, Scripted, json_answer};
use super::{adapter, assistants, config, owner, responses, thread};
use crate::support::wire::id;

/// A rate limiter that never makes a test wait for long.
fn pace() -> RateLimiter {
    RateLimiter::new(NonZeroU32::new(10_000).unwrap())
}

/// Returns the result of the deletion, and the number of items that were deleted one by one.
async fn delete(
    upstream: &dyn Upstream,
    thread: &UpstreamThreadId,
) -> Result<(Disposal, u64), UpstreamError> {
    let mut items = Items::default();
    let disposal = upstream.delete_thread(thread, &pace(), &mut items).await?;
    Ok((disposal, items.deleted))
}

impl Scene {
    fn thread(&self) -> UpstreamThreadId {
        self.thread.clone().unwrap()
    }

    fn calls_of(&self, operation: &str) -> u64 {
        self.sim
            .handle
            .stats()
            .requests_by_operation
            .get(operation)
            .copied()
            .unwrap_or_default()
    }

    /// Adds user messages to the thread directly, as another client may.
    async fn add(&self, texts: &[String]) {
        let (thread, says) = (
            self.thread(),
            |text: &String| json!({"role": "user", "content": text}),
        );
        if self.flavour == Flavour::Assistants {
            for text in texts {
                self.sim
                    .post(&format!("/threads/{thread}/messages"), says(text))
                    .await;
            }
        } else {
            for some in texts.chunks(20) {
                let items: Vec<Value> = some.iter().map(says).collect();
                self.sim
                    .post(
                        &format!("/conversations/{thread}/items"),
                        json!({"items": items}),
                    )
                    .await;
            }
        }
    }

    /// Asserts that nothing at the server contains `text`.
    fn assert_forgotten(&self, text: &str) {
        assert_eq!(
            self.sim.handle.holds_text(text),
            [""; 0],
            "{:?}",
            self.flavour
        );
        assert_eq!(
            self.sim.handle.leaked_items(),
            [""; 0],
            "{:?}",
            self.flavour
        );
    }
}

fn numbered(count: usize) -> Vec<String> {
    (1..=count).map(|n| format!("needle {n}")).collect()
}

const WITH_THREADS: [Flavour; 2] = [Flavour::Assistants, Flavour::Conversations];

#[tokio::test]
async fn thread_deletion_removes_all_content() {
    for flavour in WITH_THREADS {
        let scene = Scene::new(flavour).await;
        scene.add(&numbered(248)).await;
        let said = scene.say("needle [[sim: tool=look_up]]").await;
        scene.answer(&said, "needle").await;
        let expected = if flavour == Flavour::Assistants {
            0
        } else {
            248 + 4
        };
        assert_eq!(
            delete(&*scene.upstream, &scene.thread()).await.unwrap(),
            (Deleted, expected)
        );
        for response in scene.sim.handle.stored_responses() {
            let disposal = scene
                .upstream
                .delete_run(&UpstreamRunId(response), &pace())
                .await
                .unwrap();
            assert_eq!(disposal, Deleted);
        }
        scene.assert_forgotten("needle");
        // A repeat finds nothing.
        assert_eq!(
            delete(&*scene.upstream, &scene.thread()).await.unwrap(),
            (AlreadyGone, 0)
        );
        scene.assert_sound();
    }
}

#[tokio::test]
async fn interrupted_deletion_can_be_repeated() {
    let scene = Scene::new(Flavour::Conversations).await;
    scene.add(&numbered(250)).await;
    let (thread, pace) = (scene.thread(), pace());
    let mut items = Items::default();
    tokio::select! {
        deleted = scene.upstream.delete_thread(&thread, &pace, &mut items) => panic!("the deletion ended before it was interrupted: {deleted:?}"),
        _ = scene.sim.wait_for(|stats| stats.requests_by_operation.get("delete_item") >= Some(&120)) => {}
    }
    // An item whose deletion was under way may be deleted without being counted.
    let left = scene.sim.handle.holds_text("needle").len() as u64;
    let items = items.deleted;
    assert!(
        items >= 119 && (249..=250).contains(&(items + left)),
        "{items} and {left}"
    );
    let (disposal, rest) = delete(&*scene.upstream, &thread).await.unwrap();
    assert!(
        disposal == Deleted && (249..=250).contains(&(items + rest)),
        "{items} and {rest}"
    );
    scene.assert_forgotten("needle");
    scene.assert_sound();
}

#[tokio::test]
async fn active_run_is_cancelled_before_thread_deletion() {
    let delay = Duration::from_millis(50);
    let simulator = SimulatorConfig {
        cancel_delay: delay,
        ..SimulatorConfig::default()
    };
    let scene = Scene::with(Flavour::Assistants, simulator, |_| ()).await;
    scene.say("needle").await;
    scene.sim.handle.hold();
    let mut events = scene.start("needle").await.unwrap();
    assert!(matches!(
        events.next().await,
        Some(Ok(UpstreamEvent::Accepted(_)))
    ));
    assert_eq!(
        delete(&*scene.upstream, &scene.thread()).await.unwrap(),
        (Deleted, 0)
    );
    let stats = scene.sim.handle.stats();
    assert_eq!(
        (stats.runs_ended.get("cancelled"), stats.threads_deleted),
        (Some(&1), 1)
    );
    scene.assert_forgotten("needle");
    scene.assert_sound();
}

#[tokio::test]
async fn run_started_during_deletion_is_cancelled() {
    let busy =
        json!({"error": {"message": "Thread t_1 already has an active run run_7.", "type": "x"}});
    let gone = || json_answer(404, &[], &not_found("No thread found with id 't_1'."));
    let run = |status: &str| {
        json_answer(
            200,
            &[],
            &json!({"id": "run_7", "status": status}).to_string(),
        )
    };
    let runs = |status: &str| {
        let runs = json!({"data": [{"id": "run_7", "status": status}, {"id": "run_6", "status": "completed"}]});
        json_answer(200, &[], &runs.to_string())
    };
    let server = Scripted::start(vec![
        object(),
        list(&json!([])),
        json_answer(400, &[], &busy.to_string()),
        runs("in_progress"),
        run("cancelling"),
        run("cancelled"),
        object(),
        gone(),
    ])
    .await;
    assert_eq!(
        delete(&*assistants(&server), &thread()).await.unwrap(),
        (Deleted, 0)
    );
    let at = "/threads/t_1";
    assert_eq!(
        server.targets(),
        [
            format!("GET {at}"),
            format!("GET {at}/runs?limit=100&order=desc"),
            format!("DELETE {at}"),
            format!("GET {at}/runs?limit=100&order=desc"),
            format!("POST {at}/runs/run_7/cancel"),
            format!("GET {at}/runs/run_7"),
            format!("DELETE {at}"),
            format!("GET {at}"),
        ]
    );
}

#[tokio::test]
async fn deletion_waits_for_locked_conversation() {
    let scene = Scene::new(Flavour::Conversations).await;
    scene.add(&numbered(3)).await;
    let thread = scene.thread();
    scene.sim.handle.start_foreign_run(thread.as_str()).unwrap();
    let stop = async {
        scene.sim.wait_for(|stats| stats.lock_refusals >= 2).await;
        scene.sim.handle.stop_foreign_run(thread.as_str());
    };
    let (deleted, ()) = tokio::join!(delete(&*scene.upstream, &thread), stop);
    assert_eq!(deleted.unwrap(), (Deleted, 3));
    scene.assert_forgotten("needle");
}

#[tokio::test]
async fn unknown_thread_or_run_is_already_gone() {
    for flavour in ALL {
        let scene = Scene::new(flavour).await;
        let unknown = match &scene.thread {
            Some(thread) => UpstreamThreadId(format!("{thread}0")),
            None => UpstreamThreadId("resp_0".to_owned()),
        };
        assert_eq!(
            delete(&*scene.upstream, &unknown).await.unwrap(),
            (AlreadyGone, 0),
            "{flavour:?}"
        );
        let run = UpstreamRunId("resp_0".to_owned());
        assert_eq!(
            scene.upstream.delete_run(&run, &pace()).await.unwrap(),
            AlreadyGone,
            "{flavour:?}"
        );
        if !flavour.is_chain() {
            let gone = scene
                .upstream
                .history(&unknown, None, &pace())
                .await
                .unwrap_err();
            assert!(
                matches!(gone, UpstreamError::ThreadGone),
                "{flavour:?}: {gone:?}"
            );
        }
        scene.assert_sound();
    }
}

#[tokio::test]
async fn stored_responses_are_deleted_finished_or_running() {
    for flavour in ALL
        .into_iter()
        .filter(|flavour| *flavour != Flavour::Assistants)
    {
        let scene = Scene::new(flavour).await;
        let said = scene.say("needle").await.accepted;
        assert_eq!(
            scene.upstream.delete_run(&said, &pace()).await.unwrap(),
            Deleted
        );
        assert_eq!(
            scene.upstream.delete_run(&said, &pace()).await.unwrap(),
            AlreadyGone,
            "{flavour:?}"
        );
        if flavour.is_background() {
            scene.sim.handle.hold();
            let mut events = scene.start("needle").await.unwrap();
            let Some(Ok(UpstreamEvent::Accepted(running))) = events.next().await else {
                panic!("the run was not accepted")
            };
            assert_eq!(
                scene.upstream.delete_run(&running, &pace()).await.unwrap(),
                Deleted
            );
            assert_eq!(scene.sim.handle.stats().runs_ended["cancelled"], 1);
        }
        assert_eq!(scene.sim.handle.stored_responses(), [""; 0], "{flavour:?}");
        scene.assert_sound();
    }
}

#[tokio::test]
async fn chain_is_deleted_response_by_response() {
    for flavour in [Flavour::Chain, Flavour::BackgroundChain] {
        let mut scene = Scene::new(flavour).await;
        let first = scene.say("needle").await;
        scene.thread = first.ended.thread;
        let last = scene.say("needle").await.ended.thread.unwrap();
        assert_eq!(delete(&*scene.upstream, &last).await.unwrap(), (Deleted, 0));
        assert_eq!(
            delete(&*scene.upstream, &last).await.unwrap(),
            (AlreadyGone, 0)
        );
        assert_eq!(
            scene
                .upstream
                .delete_run(&first.accepted, &pace())
                .await
                .unwrap(),
            Deleted
        );
        scene.assert_forgotten("needle");
        assert_eq!(
            scene.upstream.history(&last, None, &pace()).await.unwrap(),
            None
        );
        scene.assert_sound();
    }
}

#[tokio::test]
async fn deletion_retries_transient_failures() {
    for flavour in [Flavour::Assistants, Flavour::Conversations, Flavour::Chain] {
        let mut scene = Scene::new(flavour).await;
        scene.thread = scene.say("needle").await.ended.thread.or(scene.thread);
        for (on, fault) in [
            ("get_thread", "status=503"),
            ("list_runs", "status=429 retry_after=0"),
            ("delete_thread", "drop=after"),
            ("get_conversation", "drop=before"),
            ("list_items", "status=500"),
            ("delete_item", "status=429 retry_after=0"),
            ("delete_conversation", "drop=after"),
            ("delete_response", "drop=after"),
            ("get_response", "status=503"),
        ] {
            scene.plant(on, fault);
        }
        let items = if flavour == Flavour::Conversations {
            2
        } else {
            0
        };
        // An attempt whose answer was lost has deleted it.
        assert_eq!(
            delete(&*scene.upstream, &scene.thread()).await.unwrap(),
            (Deleted, items),
            "{flavour:?}"
        );
        assert_eq!(
            delete(&*scene.upstream, &scene.thread()).await.unwrap(),
            (AlreadyGone, 0),
            "{flavour:?}"
        );
        scene.assert_sound();
    }
}

#[tokio::test]
async fn error_in_success_response_is_no_deletion() {
    for (flavour, on) in [
        (Flavour::Assistants, "delete_thread"),
        (Flavour::Conversations, "delete_item"),
        (Flavour::Conversations, "delete_conversation"),
        (Flavour::Chain, "delete_response"),
    ] {
        let mut scene = Scene::new(flavour).await;
        scene.thread = scene.say("needle").await.ended.thread.or(scene.thread);
        scene.plant(on, "bare_error=line");
        let error = delete(&*scene.upstream, &scene.thread()).await.unwrap_err();
        assert!(
            matches!(error, UpstreamError::Protocol(_)),
            "{flavour:?} {on}: {error:?}"
        );
        let (disposal, _) = delete(&*scene.upstream, &scene.thread()).await.unwrap();
        assert_eq!(disposal, Deleted, "{flavour:?} {on}");
    }
}

fn not_found(message: &str) -> String {
    json!({"error": {"message": message, "type": "invalid_request_error", "param": null, "code": null}})
        .to_string()
}

fn object() -> Play {
    json_answer(200, &[], r#"{"id":"t_1"}"#)
}

fn list(data: &Value) -> Play {
    json_answer(
        200,
        &[],
        &json!({"data": data, "has_more": false}).to_string(),
    )
}

fn framework_404() -> Play {
    json_answer(404, &[], r#"{"detail":"Not Found"}"#)
}

/// A server with the same answer to all requests.
async fn always(status: u16, body: &str) -> Scripted {
    Scripted::start((0..8).map(|_| json_answer(status, &[], body)).collect()).await
}

#[tokio::test]
async fn missing_endpoint_is_not_reported_as_gone_thread() {
    for (status, body, is_refused) in [
        (404, r#"{"detail":"Not Found"}"#, false),
        (404, "<html><h1>404 Not Found</h1></html>", false),
        (
            404,
            r#"{"error":{"message":"Invalid URL (GET /v1/threads/t_1)","type":"invalid_request_error"}}"#,
            false,
        ),
        (405, r#"{"detail":"Method Not Allowed"}"#, false),
        (501, "", false),
        (
            401,
            r#"{"error":{"message":"No thread found with id 't_1'.","type":"invalid_request_error"}}"#,
            true,
        ),
        (403, "", true),
    ] {
        let judge = |disposal: Result<Disposal, UpstreamError>| match disposal {
            Ok(disposal) => assert!(
                !is_refused && disposal == NotSupported,
                "{status}: {disposal:?}"
            ),
            Err(UpstreamError::Refused { status: told, .. }) => {
                assert!(is_refused && told == status, "{told}");
            }
            Err(error) => panic!("{status}: {error:?}"),
        };
        for kind in [UpstreamKind::Assistants, UpstreamKind::Responses] {
            for conversations in [true, false] {
                let server = always(status, body).await;
                let mut settings = config(kind, &server.url);
                settings.conversations = conversations;
                judge(
                    delete(&*adapter(&settings), &thread())
                        .await
                        .map(|(disposal, _)| disposal),
                );
            }
        }
        let server = always(status, body).await;
        judge(
            responses(&server)
                .delete_run(&UpstreamRunId("r_1".to_owned()), &pace())
                .await,
        );
    }
}

#[tokio::test]
async fn not_found_in_any_wording_counts_as_gone() {
    for (status, body) in [
        (
            404,
            r#"{"detail":"No object t_1 was found: it was not found in the store"}"#,
        ),
        (
            404,
            r#"{"error":{"message":"litellm.NotFoundError: \"Response with id 't_1' not found.\"","code":"404"}}"#,
        ),
        (410, ""),
    ] {
        for kind in [UpstreamKind::Assistants, UpstreamKind::Responses] {
            for conversations in [true, false] {
                let server = always(status, body).await;
                let mut settings = config(kind, &server.url);
                settings.conversations = conversations;
                assert_eq!(
                    delete(&*adapter(&settings), &thread()).await.unwrap(),
                    (AlreadyGone, 0),
                    "{body}"
                );
            }
        }
        let server = always(status, body).await;
        let run = UpstreamRunId("t_1".to_owned());
        assert_eq!(
            responses(&server).delete_run(&run, &pace()).await.unwrap(),
            AlreadyGone,
            "{body}"
        );
    }
}

/// The 404's text leaves open what is missing, and the response can still be read.
#[tokio::test]
async fn readable_response_is_not_reported_gone() {
    let server = Scripted::start(vec![
        json_answer(404, &[], r#"{"detail":"Response r_1 not found"}"#),
        object(),
    ])
    .await;
    let run = UpstreamRunId("r_1".to_owned());
    assert_eq!(
        responses(&server).delete_run(&run, &pace()).await.unwrap(),
        NotSupported
    );
    assert_eq!(
        server.targets(),
        ["DELETE /responses/r_1", "GET /responses/r_1"]
    );
}

#[tokio::test]
async fn missing_delete_endpoint_is_not_supported() {
    for status in [405, 501] {
        let server = Scripted::start(vec![
            object(),
            list(&json!([])),
            json_answer(status, &[], ""),
        ])
        .await;
        assert_eq!(
            delete(&*assistants(&server), &thread()).await.unwrap(),
            (NotSupported, 0)
        );
    }
    // The endpoint answers 404, but the thread can still be read.
    let plays = [object(), list(&json!([])), framework_404()]
        .into_iter()
        .chain((0..4).map(|_| object()));
    let server = Scripted::start(plays.collect()).await;
    assert_eq!(
        delete(&*assistants(&server), &thread()).await.unwrap(),
        (NotSupported, 0)
    );
    assert_eq!(server.requests().len(), 7);
}

/// The server cannot show the conversation, but can delete it.
#[tokio::test]
async fn unreadable_thread_is_deleted_anyway() {
    let lacks = || json_answer(405, &[], r#"{"detail":"Method Not Allowed"}"#);
    let server = Scripted::start(vec![
        lacks(),
        list(&json!([])),
        json_answer(200, &[], "{}"),
        lacks(),
    ])
    .await;
    assert_eq!(
        delete(&*responses(&server), &thread()).await.unwrap(),
        (Deleted, 0)
    );
}

#[tokio::test]
async fn ineffective_deletion_is_an_error() {
    let plays = [object(), list(&json!([])), object()]
        .into_iter()
        .chain((0..4).map(|_| object()));
    let server = Scripted::start(plays.collect()).await;
    let error = delete(&*assistants(&server), &thread()).await.unwrap_err();
    assert!(matches!(error, UpstreamError::Protocol(_)), "{error:?}");

    // Items are listed again and again, although each deletion was confirmed.
    let items = json!([{"id": "msg_1"}, {"id": "msg_2"}, {"type": "odd"}]);
    let deleted = || json_answer(200, &[], "");
    let mut plays = vec![object(), list(&items), deleted(), deleted()];
    plays.extend((0..4).map(|_| list(&items)));
    let server = Scripted::start(plays).await;
    let error = delete(&*responses(&server), &thread()).await.unwrap_err();
    assert!(error.to_string().contains("still listed"), "{error}");
    assert_eq!(
        server
            .targets()
            .iter()
            .filter(|target| target.starts_with("DELETE"))
            .count(),
        2
    );
}

#[tokio::test]
async fn undeletable_items_are_counted() {
    let items = json!([{"id": "msg_1"}, {"id": "msg_2"}, {"type": "odd"}]);
    let gone = || {
        json_answer(
            404,
            &[],
            &not_found("Conversation with id 't_1' not found."),
        )
    };
    for (status, tries, looks) in [(405, 1, 0), (501, 1, 0), (404, 2, 4)] {
        let mut plays = vec![object(), list(&items)];
        plays.extend((0..tries).map(|_| json_answer(status, &[], "")));
        plays.extend((0..=looks).map(|_| list(&items)));
        plays.extend([json_answer(200, &[], "{}"), gone()]);
        let server = Scripted::start(plays).await;
        let mut count = Items::default();
        let deleted = responses(&server)
            .delete_thread(&thread(), &pace(), &mut count)
            .await
            .unwrap();
        assert_eq!(
            (deleted, count),
            (
                Deleted,
                Items {
                    deleted: 0,
                    left: 3
                }
            ),
            "{status}"
        );
    }
}

#[tokio::test]
async fn conversation_without_item_list_is_deleted_alone() {
    for status in [404, 405, 501] {
        let server = Scripted::start(vec![
            object(),
            json_answer(status, &[], ""),
            json_answer(204, &[], ""),
            // Any 404 counts here, since the same request succeeded before.
            framework_404(),
        ])
        .await;
        assert_eq!(
            delete(&*responses(&server), &thread()).await.unwrap(),
            (Deleted, 0)
        );
        let at = "/conversations/t_1";
        let expected = [
            format!("GET {at}"),
            format!("GET {at}/items?limit=100&order=asc"),
            format!("DELETE {at}"),
            format!("GET {at}"),
        ];
        assert_eq!(server.targets(), expected);
    }
}

#[tokio::test]
async fn items_changed_during_deletion_are_handled() {
    let gone = || {
        json_answer(
            404,
            &[],
            &not_found("Item with id 'msg_1' not found in conversation."),
        )
    };
    let server = Scripted::start(vec![
        object(),
        list(&json!([{"id": "msg_1"}, {"id": "rs_2"}])),
        gone(),
        json_answer(200, &[], "{}"),
        list(&json!([{"id": "rs_2"}, {"id": "msg_3"}])),
        json_answer(200, &[], "{}"),
        list(&json!([])),
        json_answer(200, &[], "{}"),
        json_answer(
            404,
            &[],
            &not_found("Conversation with id 't_1' not found."),
        ),
    ])
    .await;
    assert_eq!(
        delete(&*responses(&server), &thread()).await.unwrap(),
        (Deleted, 2)
    );
    let at = "DELETE /conversations/t_1";
    let deletions: Vec<_> = server
        .targets()
        .into_iter()
        .filter(|it| it.starts_with("DELETE"))
        .collect();
    assert_eq!(
        deletions,
        ["/items/msg_1", "/items/rs_2", "/items/msg_3", ""].map(|it| format!("{at}{it}"))
    );
}

#[tokio::test]
async fn oversized_pages_are_requested_in_smaller_parts() {
    let scene = Scene::with(
        Flavour::Conversations,
        SimulatorConfig::default(),
        |settings| {
            settings.max_event_bytes = 64 * 1024;
        },
    )
    .await;
    let long: Vec<String> = numbered(30)
        .iter()
        .map(|text| format!("{text} {}", "x".repeat(10_000)))
        .collect();
    scene.add(&long).await;
    let (entries, _) = whole_history(&scene).await;
    assert_eq!(entries.len(), 30);
    assert_eq!(
        delete(&*scene.upstream, &scene.thread()).await.unwrap(),
        (Deleted, 30)
    );
    scene.assert_forgotten("needle");
}

/// Returns all entries, and the number of pages.
async fn whole_history(scene: &Scene) -> (Vec<HistoryEntry>, usize) {
    let (mut entries, mut pages, mut after) = (Vec::new(), 0, None);
    loop {
        let page = scene
            .upstream
            .history(&scene.thread(), after.as_deref(), &pace())
            .await
            .unwrap()
            .unwrap();
        entries.extend(page.entries);
        pages += 1;
        after = page.next;
        if after.is_none() {
            return (entries, pages);
        }
    }
}

fn text_of(entry: &HistoryEntry) -> &str {
    match &entry.content[..] {
        [ContentPart::Text { text, .. }] => text,
        other => panic!("the entry is no text: {other:?}"),
    }
}

#[tokio::test]
async fn history_is_read_from_beginning_across_pages() {
    for flavour in WITH_THREADS {
        let scene = Scene::new(flavour).await;
        assert_eq!(whole_history(&scene).await, (Vec::new(), 1));
        scene.say("ours").await;
        let foreign = numbered(120);
        scene.add(&foreign).await;
        if flavour == Flavour::Conversations {
            // A whole page without messages.
            let calls: Vec<Value> = (0..100)
                .map(|n| json!({"type": "reasoning", "id": format!("rs_{n}"), "summary": []}))
                .collect();
            for some in calls.chunks(20) {
                scene
                    .sim
                    .post(
                        &format!("/conversations/{}/items", scene.thread()),
                        json!({"items": some}),
                    )
                    .await;
            }
        }
        scene.add(&["last".to_owned()]).await;
        let (entries, pages) = whole_history(&scene).await;
        assert_eq!(pages, if flavour == Flavour::Assistants { 2 } else { 3 });
        let mut expected = vec![
            "ours".to_owned(),
            "You said: ours. (This is turn 1 of this conversation.)".to_owned(),
        ];
        expected.extend(foreign);
        expected.push("last".to_owned());
        assert_eq!(
            entries.iter().map(text_of).collect::<Vec<_>>(),
            expected,
            "{flavour:?}"
        );
        let roles: Vec<Role> = entries[..3].iter().map(|entry| entry.role).collect();
        assert_eq!(roles, [Role::User, Role::Assistant, Role::User]);
        let tagged = entries.iter().filter(|entry| entry.is_tagged).count();
        assert_eq!(
            tagged,
            usize::from(flavour == Flavour::Assistants),
            "the message of this run"
        );
        assert_eq!(entries[0].is_tagged, flavour == Flavour::Assistants);
        let dated = entries.iter().all(|entry| entry.created_at.is_some());
        assert_eq!(dated, flavour == Flavour::Assistants);
        assert_eq!(
            scene.calls_of("list_messages") + scene.calls_of("list_items"),
            1 + pages as u64
        );
        scene.assert_sound();
    }
}

#[tokio::test]
async fn unsupported_history_differs_from_refused_history() {
    for upstream_of in [assistants as fn(&Scripted) -> Box<dyn Upstream>, responses] {
        let plays = [404, 405, 501].map(|status| json_answer(status, &[], r#"{"detail":"no"}"#));
        let server = Scripted::start(plays.into()).await;
        for _ in 0..3 {
            assert_eq!(
                upstream_of(&server)
                    .history(&thread(), None, &pace())
                    .await
                    .unwrap(),
                None
            );
        }
        let server = Scripted::start(vec![json_answer(401, &[], "")]).await;
        let error = upstream_of(&server)
            .history(&thread(), None, &pace())
            .await
            .unwrap_err();
        assert!(
            matches!(error, UpstreamError::Refused { status: 401, .. }),
            "{error:?}"
        );
    }
}

#[tokio::test]
async fn lost_threads_are_found_by_tag_in_list() {
    for flavour in WITH_THREADS {
        let simulator = SimulatorConfig {
            list_threads: true,
            ..SimulatorConfig::default()
        };
        let scene = Scene::with(flavour, simulator, |_| ()).await;
        let path = if flavour == Flavour::Assistants {
            "/threads"
        } else {
            "/conversations"
        };
        let sought = owner();
        let mut made = Vec::new();
        for at in 0..210 {
            if at % 100 == 0 {
                // An earlier version or another setting may have sent the names in another form.
                let names = KeyNames {
                    user: format!("{at:032x}"),
                    ..sought.names.clone()
                };
                let owner = Ownership {
                    names,
                    ..sought.clone()
                };
                made.push(
                    scene
                        .upstream
                        .create_thread(&owner, &[])
                        .await
                        .unwrap()
                        .unwrap(),
                );
            } else {
                scene
                    .sim
                    .post(path, json!({"metadata": {"threadkeeper_thread": "other"}}))
                    .await;
            }
        }
        // A deleted thread is not found.
        delete(&*scene.upstream, &made.remove(0)).await.unwrap();
        made.reverse();
        let found = scene
            .upstream
            .find_threads(sought.thread, &pace())
            .await
            .unwrap();
        assert_eq!(found, Some(made), "{flavour:?}");
        assert_eq!(
            scene
                .upstream
                .find_threads(ThreadId::new(), &pace())
                .await
                .unwrap(),
            Some(Vec::new())
        );
        assert_eq!(
            scene.calls_of("list_threads") + scene.calls_of("list_conversations"),
            6
        );
        assert_eq!(scene.sim.handle.stats().violations, [""; 0]);
    }
}

#[tokio::test]
async fn lost_threads_are_unknown_without_list() {
    for flavour in ALL {
        let scene = Scene::new(flavour).await;
        let Ownership { thread, .. } = owner();
        let found = scene.upstream.find_threads(thread, &pace()).await.unwrap();
        assert_eq!(found, flavour.is_chain().then(Vec::new), "{flavour:?}");
    }
    let refusals = [
        (404, r#"{"detail":"Not Found"}"#, true),
        (405, "", true),
        (501, "", true),
        (
            401,
            r#"{"error":{"message":"m","type":"invalid_request_error","code":"missing_scope"}}"#,
            true,
        ),
        (403, "", true),
        (
            401,
            r#"{"error":{"message":"m","type":"invalid_request_error","code":"invalid_api_key"}}"#,
            false,
        ),
    ];
    for upstream_of in [assistants as fn(&Scripted) -> Box<dyn Upstream>, responses] {
        for (status, body, is_told) in refusals {
            let server = Scripted::start(vec![json_answer(status, &[], body)]).await;
            let found = upstream_of(&server)
                .find_threads(ThreadId::new(), &pace())
                .await;
            assert_eq!(matches!(found, Ok(None)), is_told, "{status}: {found:?}");
        }
    }
}

#[tokio::test]
async fn endless_thread_list_is_read_up_to_limit() {
    let sought = ThreadId::new();
    let other = |id: &str| json!({"id": id, "metadata": {"threadkeeper_thread": "other"}});
    let ours = json!({"id": "t_9", "metadata": {"threadkeeper_thread": sought.to_string()}});
    let endless = |page: &Value| {
        json_answer(
            200,
            &[],
            &json!({"data": page, "has_more": true}).to_string(),
        )
    };
    // This server does not know the cursor.
    let server = Scripted::start(
        (0..2)
            .map(|_| endless(&json!([ours, other("t_1")])))
            .collect(),
    )
    .await;
    let found = assistants(&server)
        .find_threads(sought, &pace())
        .await
        .unwrap();
    assert_eq!(found, Some(vec![UpstreamThreadId("t_9".to_owned())]));
    // The server has more threads than the adapter reads. So finding nothing means nothing, but a
    // find counts.
    for (first, expected) in [
        (other("t_0"), None),
        (ours, Some(vec![UpstreamThreadId("t_9".to_owned())])),
    ] {
        let pages = (1..50)
            .map(|n| endless(&json!([other(&format!("t_1{n}")), {"id": format!("t_2{n}")}])));
        let plays = std::iter::once(endless(&json!([first])))
            .chain(pages)
            .collect();
        let server = Scripted::start(plays).await;
        assert_eq!(
            assistants(&server)
                .find_threads(sought, &pace())
                .await
                .unwrap(),
            expected
        );
        let targets = server.targets();
        assert_eq!(
            (targets.len(), targets[2].as_str()),
            (50, "GET /threads?limit=100&order=desc&after=t_21")
        );
    }
}

#[tokio::test]
async fn deletion_calls_respect_pace() {
    let scene = Scene::new(Flavour::Conversations).await;
    scene.add(&numbered(4)).await;
    let before = scene.sim.handle.stats().requests;
    let started = std::time::Instant::now();
    let slow = RateLimiter::new(NonZeroU32::new(50).unwrap());
    let mut items = Items::default();
    let disposal = scene
        .upstream
        .delete_thread(&scene.thread(), &slow, &mut items)
        .await
        .unwrap();
    let calls = u32::try_from(scene.sim.handle.stats().requests - before).unwrap();
    // Two reads of the conversation, two lists, four items and the conversation itself. The first
    // request is not delayed.
    assert_eq!((disposal, items.deleted, calls), (Deleted, 4, 9));
    assert!(
        started.elapsed() >= Duration::from_millis(20) * (calls - 1),
        "{:?}",
        started.elapsed()
    );
}

#[tokio::test]
async fn items_of_externally_deleted_conversation_stay() {
    let scene = Scene::new(Flavour::Conversations).await;
    scene.add(&numbered(2)).await;
    let path = format!("/conversations/{}", scene.thread());
    let item = id(&scene.sim.get(&format!("{path}/items")).await["data"][0]);
    scene.sim.delete(&path).await;
    assert_eq!(
        delete(&*scene.upstream, &scene.thread()).await.unwrap(),
        (AlreadyGone, 0)
    );
    assert_eq!(scene.sim.handle.leaked_items().len(), 2);
    let (status, _) = scene
        .sim
        .send(Method::DELETE, &format!("{path}/items/{item}"), None)
        .await;
    assert_eq!((status, scene.sim.handle.leaked_items().len()), (200, 1));
}

//! What a process finds out about a run that another process began. That process is dead, or is
//! frozen and keeps its connection.

use std::time::Duration;

use futures_util::StreamExt;
use threadkeeper::domain::{RunStatus, TextDelta, ToolCall, UnsettledRun, UpstreamRunId};
use threadkeeper::simulator::{SimulatorConfig, Stats};
use threadkeeper::upstream::{
    EventStream, Items, RateLimiter, Recovered, UpstreamError, UpstreamEvent,
};

use super::recovery::{BROKEN, name, recover, running};
use super::scene::{ALL, Flavour, Scene, read, text_of};

/// Longest wait where the wait is in vain.
const SHORT: Duration = Duration::from_millis(300);
/// Longest wait where it succeeds earlier.
const LONG: Duration = Duration::from_secs(20);

async fn scene(flavour: Flavour, window: Duration) -> Scene {
    Scene::with(flavour, SimulatorConfig::default(), |settings| {
        settings.lock_window = window;
    })
    .await
}

/// Reads the run's id and `texts` pieces of text, as its owner did before it died.
async fn shown(events: &mut EventStream, texts: usize) -> (UpstreamRunId, String) {
    let Some(Ok(UpstreamEvent::Accepted(id))) = events.next().await else {
        panic!("the run was not accepted")
    };
    let mut text = String::new();
    for _ in 0..texts {
        let Some(Ok(UpstreamEvent::Text(TextDelta { text: more, .. }))) = events.next().await
        else {
            panic!("the stream has no text")
        };
        text.push_str(&more);
    }
    (id, text)
}

/// Whether the run has been looked up this many times.
fn looked(stats: &Stats, times: u64) -> bool {
    let looks = ["list_runs", "list_items", "get_response"];
    looks
        .iter()
        .filter_map(|look| stats.requests_by_operation.get(*look))
        .sum::<u64>()
        >= times
}

#[tokio::test]
async fn unsent_run_is_absent_where_verifiable() {
    for flavour in ALL {
        let scene = scene(flavour, SHORT).await;
        let expected = match flavour {
            Flavour::Assistants | Flavour::Conversations => "absent",
            // The run may be active all the same.
            Flavour::Background | Flavour::Chain | Flavour::BackgroundChain => "unknown",
        };
        assert_eq!(
            name(&recover(&scene, &scene.unsettled_run(None), &BROKEN).await),
            expected,
            "{flavour:?}"
        );
        if !flavour.is_chain() {
            let no_thread = UnsettledRun {
                thread: None,
                ..scene.unsettled_run(None)
            };
            assert_eq!(
                name(&recover(&scene, &no_thread, &BROKEN).await),
                "absent",
                "{flavour:?}"
            );
            scene.assert_sound();
        }
    }
}

#[tokio::test]
async fn late_arriving_request_is_found_after_takeover() {
    for flavour in [
        Flavour::Assistants,
        Flavour::Conversations,
        Flavour::Background,
    ] {
        let scene = scene(flavour, LONG).await;
        let late = async {
            scene.sim.wait_for(|stats| looked(stats, 1)).await;
            scene.say("hello").await
        };
        let sent = scene.unsettled_run(None);
        let (said, events) = tokio::join!(late, running(&scene, &sent, &BROKEN));
        let found = read(events).await;
        assert_eq!(found.ended.content, said.ended.content, "{flavour:?}");
        assert_eq!(scene.sim.handle.stats().runs_started, 1);
        scene.assert_sound();
    }
}

#[tokio::test]
async fn run_of_deleted_thread_is_unknown_with_id() {
    for flavour in [Flavour::Assistants, Flavour::Conversations] {
        let scene = scene(flavour, SHORT).await;
        scene
            .upstream
            .delete_thread(
                scene.thread.as_ref().unwrap(),
                &RateLimiter::UNBOUND,
                &mut Items::default(),
            )
            .await
            .unwrap();
        let known = scene.unsettled_run(Some(&UpstreamRunId("r_1".to_owned())));
        assert_eq!(
            name(&recover(&scene, &known, &BROKEN).await),
            "unknown",
            "{flavour:?}"
        );
        assert_eq!(
            name(&recover(&scene, &scene.unsettled_run(None), &BROKEN).await),
            "absent",
            "{flavour:?}"
        );
    }
}

#[tokio::test]
async fn running_background_response_replays_from_beginning_after_takeover() {
    for flavour in [Flavour::Background, Flavour::BackgroundChain] {
        let scene = scene(flavour, SHORT).await;
        let mut events = scene
            .start("a b c d e [[sim: silent_after=4]]")
            .await
            .unwrap();
        let (id, before) = shown(&mut events, 4).await;
        drop(events);
        let mut events = running(&scene, &scene.unsettled_run(Some(&id)), &BROKEN).await;
        assert_eq!(
            shown(&mut events, 4).await,
            (id.clone(), before),
            "{flavour:?}"
        );
        assert_eq!(
            scene.sim.handle.stats().active_runs,
            1,
            "the response continues"
        );
        scene
            .upstream
            .settle(&scene.unsettled_run(Some(&id)))
            .await
            .unwrap();
        assert_eq!(read(events).await.ended.status, RunStatus::Cancelled);

        // The run is read to its end.
        scene.sim.handle.hold();
        let (id, _) = shown(&mut scene.start("hello").await.unwrap(), 0).await;
        let events = running(&scene, &scene.unsettled_run(Some(&id)), &BROKEN).await;
        scene.sim.handle.release();
        let said = read(events).await;
        assert_eq!(
            (said.accepted, said.ended.status),
            (id, RunStatus::Completed)
        );
        assert_eq!(said.streamed, text_of(&said.ended.content));
        scene.assert_sound();
    }
}

#[tokio::test]
async fn takeover_awaits_background_response_without_id() {
    let scene = scene(Flavour::Background, LONG).await;
    scene.sim.handle.hold();
    scene
        .start("hello [[sim: drop=after]]")
        .await
        .err()
        .unwrap();
    let release = async {
        scene.sim.wait_for(|stats| looked(stats, 1)).await;
        scene.sim.handle.release();
    };
    let sent = scene.unsettled_run(None);
    let (events, ()) = tokio::join!(running(&scene, &sent, &BROKEN), release);
    assert_eq!(read(events).await.ended.status, RunStatus::Completed);
    scene.assert_sound();
}

#[tokio::test]
async fn takeover_awaits_response_held_by_stalled_owner() {
    for flavour in [Flavour::Conversations, Flavour::Chain] {
        for knows_id in [true, false] {
            if flavour.is_chain() && !knows_id {
                continue;
            }
            let scene = scene(flavour, LONG).await;
            scene.sim.handle.hold();
            let mut held = scene.start("hello").await.unwrap();
            let (id, _) = shown(&mut held, 0).await;
            let release = async {
                scene.sim.wait_for(|stats| looked(stats, 2)).await;
                scene.sim.handle.release();
            };
            let sent = scene.unsettled_run(knows_id.then_some(&id));
            let (events, ()) = tokio::join!(running(&scene, &sent, &BROKEN), release);
            let said = read(events).await;
            assert_eq!(said.ended.status, RunStatus::Completed, "{flavour:?}");
            assert_eq!(said.ended.thread.is_some(), flavour.is_chain());
            drop(held);
            scene.assert_sound();
        }
    }
}

#[tokio::test]
async fn abandoned_response_with_known_id_is_not_resent() {
    for flavour in [Flavour::Conversations, Flavour::Chain] {
        let scene = scene(flavour, SHORT).await;
        let (id, _) = shown(&mut scene.start("x [[sim: rate=10s]]").await.unwrap(), 1).await;
        assert_eq!(
            name(&recover(&scene, &scene.unsettled_run(Some(&id)), &BROKEN).await),
            "unknown",
            "{flavour:?}"
        );
        assert_eq!(scene.sim.handle.stats().runs_ended["abandoned"], 1);
        // Nothing of the run is left.
        let expected = if flavour.is_chain() {
            "unknown"
        } else {
            "absent"
        };
        assert_eq!(
            name(&recover(&scene, &scene.unsettled_run(None), &BROKEN).await),
            expected,
            "{flavour:?}"
        );
    }
}

#[tokio::test]
async fn unseen_tool_calls_are_recovered_and_answerable() {
    for flavour in ALL {
        for knows_id in [true, false] {
            let scene = scene(flavour, LONG).await;
            let asked = scene.say("weather? [[sim: tools=2 reasoning]]").await;
            let sent = scene.unsettled_run(knows_id.then_some(&asked.accepted));
            if flavour.is_chain() && !knows_id {
                assert_eq!(name(&recover(&scene, &sent, &BROKEN).await), "unknown");
                continue;
            }
            let found = read(running(&scene, &sent, &BROKEN).await).await;
            assert_eq!(found.ended.status, RunStatus::RequiresAction, "{flavour:?}");
            assert_eq!(found.ended.tool_calls, asked.ended.tool_calls);
            let done = scene.answer(&found, "4 °C").await;
            assert_eq!(done.ended.status, RunStatus::Completed, "{flavour:?}");
            assert!(done.streamed.contains("4 °C"));
            scene.assert_sound();
        }
    }
}

#[tokio::test]
async fn answering_round_is_found_with_or_without_id() {
    for flavour in ALL {
        let scene = scene(flavour, SHORT).await;
        let asked = scene.say("weather? [[sim: tools=1]]").await;
        let done = scene.answer(&asked, "[[sim: tool=other]] rain").await;
        let open_calls = asked.ended.tool_calls.clone();
        let of_round = |id| UnsettledRun {
            open_calls: open_calls.clone(),
            ..scene.unsettled_run(Some(id))
        };
        let found = read(running(&scene, &of_round(&done.accepted), &BROKEN).await).await;
        assert_eq!(found.ended.status, RunStatus::RequiresAction, "{flavour:?}");
        let names = |calls: &[ToolCall]| {
            calls
                .iter()
                .map(|call| call.name.clone())
                .collect::<Vec<_>>()
        };
        assert_eq!(names(&found.ended.tool_calls), ["other"]);
        // Only the response that asked is known.
        let sent = of_round(&asked.accepted);
        match recover(&scene, &sent, &BROKEN).await {
            Recovered::Running(events) => {
                let found = read(events).await;
                assert_eq!(names(&found.ended.tool_calls), ["other"], "{flavour:?}");
            }
            other => {
                assert_eq!(name(&other), "unknown");
                assert!(flavour.is_chain());
            }
        }
        scene.assert_sound();
    }
}

#[tokio::test]
async fn run_started_late_by_owner_is_followed() {
    let scene = scene(Flavour::Assistants, SHORT).await;
    scene.sim.handle.hold();
    let late = scene.start("hello").await.unwrap();
    let error = scene.start("hello").await.err().unwrap();
    assert!(error.is_ambiguous(), "{error:?}");
    let events = running(&scene, &scene.unsettled_run(None), &error).await;
    scene.sim.handle.release();
    assert_eq!(read(events).await.ended.status, RunStatus::Completed);
    assert_eq!(scene.sim.handle.threads()[0].user_texts, ["hello"]);
    drop(late);

    // Where the server does not name the owner, the run counts as another client's.
    scene.sim.handle.hold();
    let held = scene.start("again").await.unwrap();
    scene.plant("get_run", "status=500");
    let error = scene.start("again").await.err().unwrap();
    assert!(
        matches!(
            error,
            UpstreamError::Busy {
                blocking_run: Some(_)
            }
        ),
        "{error:?}"
    );
    drop(held);
}

#[tokio::test]
async fn takeover_reports_outcome_of_finished_run() {
    for flavour in ALL {
        for (text, status) in [
            ("a b c d", RunStatus::Completed),
            ("a b c d [[sim: incomplete]]", RunStatus::Incomplete),
            ("a b c d [[sim: fail]]", RunStatus::Failed),
        ] {
            let scene = scene(flavour, SHORT).await;
            let said = scene.say(text).await;
            let found =
                read(running(&scene, &scene.unsettled_run(Some(&said.accepted)), &BROKEN).await)
                    .await;
            assert_eq!(found.ended.status, status, "{flavour:?}");
            let without_id = recover(&scene, &scene.unsettled_run(None), &BROKEN).await;
            match (flavour, status) {
                (Flavour::Chain | Flavour::BackgroundChain, _)
                | (Flavour::Background, RunStatus::Failed) => {
                    assert_eq!(name(&without_id), "unknown", "{flavour:?} {status}");
                    continue;
                }
                // A failed response leaves nothing in its conversation.
                (Flavour::Conversations, RunStatus::Failed) => {
                    assert_eq!(name(&without_id), "absent");
                    continue;
                }
                (Flavour::Assistants | Flavour::Conversations | Flavour::Background, _) => {}
            }
            let Recovered::Running(events) = without_id else {
                panic!("{flavour:?} {status}")
            };
            assert_eq!(read(events).await.ended.status, status, "{flavour:?}");
            scene.assert_sound();
        }
    }
}

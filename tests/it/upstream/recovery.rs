//! Finding out what a broken request or stream has done.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use serde_json::json;
use threadkeeper::domain::{Baseline, RunId, RunStatus, UnsettledRun, UpstreamRunId};
use threadkeeper::simulator::SimulatorConfig;
use threadkeeper::upstream::{EventStream, Recovered, UpstreamError, UpstreamEvent};

use super::scene::{ALL, Flavour, Scene, read, text_of};
use super::scripted::{Scripted, json_answer};
use super::{assistants, unsettled_run};

const WINDOW: Duration = Duration::from_millis(300);
pub(super) const BROKEN: UpstreamError = UpstreamError::Broken { timeout: false };
const FAILED: UpstreamError = UpstreamError::Unavailable {
    status: 500,
    retry_after: None,
    no_retry: false,
    code: None,
};
const GATEWAY: UpstreamError = UpstreamError::Unavailable {
    status: 504,
    retry_after: None,
    no_retry: false,
    code: None,
};

async fn scene(flavour: Flavour, simulator: SimulatorConfig) -> Scene {
    Scene::with(flavour, simulator, |settings| settings.lock_window = WINDOW).await
}

pub(super) async fn recover(
    scene: &Scene,
    sent: &UnsettledRun,
    failure: &UpstreamError,
) -> Recovered {
    scene.upstream.recover(sent, failure).await.unwrap()
}

pub(super) fn name(recovered: &Recovered) -> &'static str {
    match recovered {
        Recovered::Running(_) => "running",
        Recovered::Absent => "absent",
        Recovered::Unknown => "unknown",
    }
}

pub(super) async fn running(
    scene: &Scene,
    sent: &UnsettledRun,
    failure: &UpstreamError,
) -> EventStream {
    match recover(scene, sent, failure).await {
        Recovered::Running(events) => events,
        other => panic!("{:?}: {}", scene.flavour, name(&other)),
    }
}

/// Reads a stream until it breaks. Returns the run's id and the text so far.
async fn broken(events: EventStream) -> (UpstreamRunId, String) {
    let (mut accepted, mut text) = (None, String::new());
    let events: Vec<_> = events.collect().await;
    for event in events {
        match event {
            Ok(UpstreamEvent::Accepted(id)) => accepted = Some(id),
            Ok(UpstreamEvent::Text(more)) => text.push_str(&more.text),
            Ok(UpstreamEvent::Ended(ended)) => panic!("the stream did not break: {ended:?}"),
            Err(error) => assert!(error.is_ambiguous()),
        }
    }
    (accepted.unwrap(), text)
}

#[tokio::test]
async fn recovery_of_finished_run_returns_its_outcome() {
    for flavour in ALL {
        for text in [
            "hello",
            "[[sim: tools=2]]",
            "a b c d [[sim: incomplete]]",
            "[[sim: fail]]",
        ] {
            let scene = scene(flavour, SimulatorConfig::default()).await;
            let said = scene.say(text).await;
            let sent = scene.unsettled_run(Some(&said.accepted));
            let again = read(running(&scene, &sent, &BROKEN).await).await;
            assert_eq!(again.accepted, said.accepted);
            assert_eq!(again.streamed, "");
            let mut expected = said.ended.clone();
            if said.ended.status == RunStatus::Failed && flavour != Flavour::Assistants {
                // A failed response keeps nothing, so it looks as if it had said nothing.
                expected.content.clear();
                expected.refusal.clone_from(&again.ended.refusal);
            }
            assert_eq!(again.ended, expected, "{flavour:?} {text}");
            scene.assert_sound();
        }
    }
}

#[tokio::test]
async fn recovery_follows_running_run_to_its_end() {
    for flavour in [
        Flavour::Assistants,
        Flavour::Background,
        Flavour::BackgroundChain,
    ] {
        let scene = scene(flavour, SimulatorConfig::default()).await;
        scene.sim.handle.hold();
        let mut events = scene.start("hello").await.unwrap();
        let Some(Ok(UpstreamEvent::Accepted(id))) = events.next().await else {
            panic!("the run was not accepted")
        };
        drop(events);
        let mut events = running(&scene, &scene.unsettled_run(Some(&id)), &BROKEN).await;
        assert!(
            matches!(events.next().await, Some(Ok(UpstreamEvent::Accepted(again))) if again == id)
        );
        scene.sim.handle.release();
        let said = read(events).await;
        assert_eq!(said.ended.status, RunStatus::Completed);
        assert_eq!(said.ended.thread.is_some(), flavour.is_chain());
        scene.assert_sound();
    }
}

#[tokio::test]
async fn run_is_recovered_by_tag_without_id() {
    let scene = scene(Flavour::Assistants, SimulatorConfig::default()).await;
    let error = scene
        .start("hello [[sim: drop=after]]")
        .await
        .err()
        .unwrap();
    assert!(error.is_ambiguous());
    let said = read(running(&scene, &scene.unsettled_run(None), &error).await).await;
    assert_eq!(said.ended.status, RunStatus::Completed);

    let absent = UnsettledRun {
        run: RunId::new(),
        ..scene.unsettled_run(None)
    };
    assert_eq!(name(&recover(&scene, &absent, &BROKEN).await), "absent");
    let no_thread = UnsettledRun {
        thread: None,
        ..scene.unsettled_run(None)
    };
    assert_eq!(name(&recover(&scene, &no_thread, &BROKEN).await), "absent");
    let unknown = scene.unsettled_run(Some(&UpstreamRunId("run_0".to_owned())));
    assert_eq!(name(&recover(&scene, &unknown, &BROKEN).await), "unknown");
    scene.assert_sound();
}

#[tokio::test]
async fn message_without_run_is_recovered_as_unknown() {
    let run = RunId::new();
    let none = || json_answer(200, &[], r#"{"data":[]}"#);
    let message = json!({"data": [{"id": "m_1", "role": "user", "metadata": {"threadkeeper_run": run.to_string()}}]});
    let server = Scripted::start(vec![
        none(),
        none(),
        json_answer(200, &[], &message.to_string()),
    ])
    .await;
    let recovered = assistants(&server)
        .recover(&unsettled_run(run, None), &BROKEN)
        .await
        .unwrap();
    assert_eq!(name(&recovered), "unknown");
}

#[tokio::test]
async fn cut_run_stream_is_completed_by_recovery() {
    let config = SimulatorConfig {
        token_interval: Duration::from_millis(5),
        ..SimulatorConfig::default()
    };
    let scene = scene(Flavour::Assistants, config).await;
    let (id, text) = broken(scene.start("a b c d e f [[sim: cut=3]]").await.unwrap()).await;
    let said = read(running(&scene, &scene.unsettled_run(Some(&id)), &BROKEN).await).await;
    assert_eq!(said.ended.status, RunStatus::Completed);
    let whole = text_of(&said.ended.content);
    assert!(whole.starts_with(&text) && whole.len() > text.len());
    scene.assert_sound();
}

#[tokio::test]
async fn disconnected_response_is_unknown_after_lock_window() {
    let config = SimulatorConfig {
        token_interval: Duration::from_millis(5),
        ..SimulatorConfig::default()
    };
    for flavour in [Flavour::Conversations, Flavour::Chain] {
        let scene = scene(flavour, config.clone()).await;
        let (id, _) = broken(scene.start("a b c d e f [[sim: cut=3]]").await.unwrap()).await;
        let started = Instant::now();
        let recovered = recover(&scene, &scene.unsettled_run(Some(&id)), &BROKEN).await;
        assert_eq!(name(&recovered), "unknown", "{flavour:?}");
        assert!(started.elapsed() >= WINDOW, "{flavour:?}");
        scene.assert_sound();
    }
}

#[tokio::test]
async fn response_without_id_is_recovered_from_conversation() {
    for flavour in [Flavour::Conversations, Flavour::Background] {
        let mut scene = scene(flavour, SimulatorConfig::default()).await;
        let first = scene.say("one").await;
        let anchor = first.ended.upstream_message_id.clone();
        scene.next_run(Baseline {
            anchor: anchor.clone(),
            skip: 0,
        });
        let nothing = scene.unsettled_run(None);
        let unless_background = if flavour.is_background() {
            "unknown"
        } else {
            "absent"
        };
        for (failure, expected, may_still_work) in [
            (&FAILED, "absent", false),
            (&UpstreamError::Connect, "absent", false),
            (&BROKEN, unless_background, true),
            (&GATEWAY, unless_background, true),
        ] {
            let started = Instant::now();
            let recovered = recover(&scene, &nothing, failure).await;
            assert_eq!(name(&recovered), expected, "{flavour:?} {failure:?}");
            assert_eq!(started.elapsed() >= WINDOW, may_still_work, "{failure:?}");
        }
        let second = scene.say("two [[sim: tools=1]]").await;
        for failure in [&FAILED, &BROKEN] {
            let said = read(running(&scene, &scene.unsettled_run(None), failure).await).await;
            assert_eq!(said.ended.status, RunStatus::RequiresAction);
            assert_eq!(said.ended.tool_calls, second.ended.tool_calls);
        }
        let further = UnsettledRun {
            baseline: Baseline { anchor, skip: 1 },
            ..scene.unsettled_run(None)
        };
        assert_eq!(name(&recover(&scene, &further, &FAILED).await), "absent");
        let lost = Baseline {
            anchor: Some("msg_0".to_owned()),
            skip: 0,
        };
        let lost = UnsettledRun {
            baseline: lost,
            ..scene.unsettled_run(None)
        };
        assert_eq!(name(&recover(&scene, &lost, &FAILED).await), "unknown");
        scene.assert_sound();
    }
}

#[tokio::test]
async fn kept_message_without_reply_is_unknown() {
    let config = SimulatorConfig {
        append_unfinished: true,
        ..SimulatorConfig::default()
    };
    let scene = scene(Flavour::Conversations, config).await;
    let error = scene
        .start("hello [[sim: drop=after latency=1m]]")
        .await
        .err()
        .unwrap();
    assert_eq!(
        name(&recover(&scene, &scene.unsettled_run(None), &error).await),
        "unknown"
    );
}

#[tokio::test]
async fn response_failed_by_damage_is_recovered_as_failed() {
    let scene = scene(Flavour::Background, SimulatorConfig::default()).await;
    scene.sim.handle.hold();
    let mut events = scene.start("x [[sim: fail_text=open_call]]").await.unwrap();
    let Some(Ok(UpstreamEvent::Accepted(id))) = events.next().await else {
        panic!("the run was not accepted")
    };
    drop(events);
    scene.sim.handle.release();
    scene.sim.wait_for(|stats| stats.active_runs == 0).await;
    let said = read(running(&scene, &scene.unsettled_run(Some(&id)), &BROKEN).await).await;
    assert_eq!(said.ended.status, RunStatus::Failed);
}

#[tokio::test]
async fn chain_recovery_needs_response_id() {
    for flavour in [Flavour::Chain, Flavour::BackgroundChain] {
        let scene = scene(flavour, SimulatorConfig::default()).await;
        assert_eq!(
            name(&recover(&scene, &scene.unsettled_run(None), &FAILED).await),
            "absent"
        );
        assert_eq!(
            name(&recover(&scene, &scene.unsettled_run(None), &BROKEN).await),
            "unknown"
        );
        assert_eq!(
            name(&recover(&scene, &scene.unsettled_run(None), &GATEWAY).await),
            "unknown"
        );
        let unknown = scene.unsettled_run(Some(&UpstreamRunId("resp_0".to_owned())));
        assert_eq!(name(&recover(&scene, &unknown, &BROKEN).await), "unknown");
    }
}

#[tokio::test]
async fn background_response_without_id_is_recovered_once_finished() {
    let scene = scene(Flavour::Background, SimulatorConfig::default()).await;
    scene.sim.handle.hold();
    let error = scene
        .start("hello [[sim: drop=after]]")
        .await
        .err()
        .unwrap();
    assert_eq!(
        name(&recover(&scene, &scene.unsettled_run(None), &error).await),
        "unknown",
        "the response finishes in time"
    );
    scene.sim.handle.release();
    scene.sim.wait_for(|stats| stats.active_runs == 0).await;
    let said = read(running(&scene, &scene.unsettled_run(None), &error).await).await;
    assert_eq!(said.ended.status, RunStatus::Completed);
}

#[tokio::test]
async fn recovery_distinguishes_delivered_from_undelivered_tool_outputs() {
    for flavour in ALL {
        let answering = if flavour == Flavour::Assistants {
            "submit_tool_outputs"
        } else {
            "create_response"
        };
        let scene = scene(flavour, SimulatorConfig::default()).await;
        let asked = scene.say("x [[sim: tools=2]]").await;
        let open_calls = asked.ended.tool_calls.clone();
        let sent = UnsettledRun {
            open_calls,
            ..scene.unsettled_run(Some(&asked.accepted))
        };

        scene.plant(answering, "drop=before");
        let error = scene.try_answer(&asked, "4 °C").await.err().unwrap();
        let expected = match flavour {
            Flavour::Assistants | Flavour::Conversations => "absent",
            Flavour::Chain | Flavour::Background | Flavour::BackgroundChain => "unknown",
        };
        assert_eq!(
            name(&recover(&scene, &sent, &error).await),
            expected,
            "{flavour:?}"
        );
        assert_eq!(
            name(&recover(&scene, &sent, &FAILED).await),
            "absent",
            "{flavour:?}"
        );

        let answered = if flavour == Flavour::Assistants {
            scene.plant(answering, "drop=after");
            scene.try_answer(&asked, "4 °C").await.err().unwrap()
        } else {
            // A response without background ends with its connection, so only its id is lost
            // here.
            scene.answer(&asked, "4 °C").await;
            BROKEN
        };
        if flavour.is_chain() {
            assert_eq!(name(&recover(&scene, &sent, &answered).await), "unknown");
            continue;
        }
        let said = read(running(&scene, &sent, &answered).await).await;
        assert_eq!(said.ended.status, RunStatus::Completed, "{flavour:?}");
        assert!(text_of(&said.ended.content).contains("4 °C"));
        scene.assert_sound();
    }
}

#[tokio::test]
async fn earlier_round_calls_do_not_answer_lost_round() {
    let scene = scene(Flavour::Conversations, SimulatorConfig::default()).await;
    let asked = scene.say("x [[sim: tools=1]]").await;
    scene.plant("create_response", "cut=1 rate=1ms");
    let (id, _) = broken(scene.try_answer(&asked, "a b c").await.unwrap()).await;
    let recovered = recover(&scene, &scene.unsettled_run(Some(&id)), &BROKEN).await;
    assert_eq!(name(&recovered), "unknown");
}

#[tokio::test]
async fn recovery_fails_when_upstream_refuses_lookup() {
    for flavour in ALL {
        let scene = scene(flavour, SimulatorConfig::default()).await;
        let said = scene.say("x").await;
        scene.plant("any", "status=401");
        let sent = scene.unsettled_run(Some(&said.accepted));
        scene.upstream.recover(&sent, &BROKEN).await.err().unwrap();
    }
}

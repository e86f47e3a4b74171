//! Streams of background responses that break and resume.

use std::time::Duration;

use futures_util::StreamExt;
use serde_json::{Value, json};
use threadkeeper::config::UpstreamKind;
use threadkeeper::domain::{RunId, RunStatus};
use threadkeeper::simulator::{Fault, SimulatorConfig};
use threadkeeper::upstream::{Recovered, Upstream, UpstreamError, UpstreamEvent};

use super::scene::{Flavour, Scene, read};
use super::scripted::{Play, Scripted, Step, json_answer, late, sse};
use super::{EXPECTED, RESPONSES_TURN, adapter, config, lines, run_to_end, thread, unsettled_run};

/// An adapter whose responses run in the background.
fn background(server: &Scripted) -> Box<dyn Upstream> {
    let mut settings = config(UpstreamKind::Responses, &server.url);
    settings.background = true;
    settings.call_timeout = Duration::from_millis(500);
    adapter(&settings)
}

/// The first events of the usual run.
fn first(events: usize) -> Vec<u8> {
    RESPONSES_TURN
        .split_inclusive("\n\n")
        .take(events)
        .collect::<String>()
        .into_bytes()
}

fn cut_after(events: usize) -> Play {
    sse(vec![Step::Bytes(first(events)), Step::Cut])
}

/// The remaining events of the run.
fn rest(events: usize) -> Play {
    sse(vec![Step::Bytes(rest_of(events))])
}

fn rest_of(events: usize) -> Vec<u8> {
    RESPONSES_TURN
        .split_inclusive("\n\n")
        .skip(events)
        .collect::<String>()
        .into_bytes()
}

fn response(status: &str) -> Play {
    response_that_asks(status, "1")
}

/// A response whose server asks for the next poll after `after` milliseconds.
fn response_that_asks(status: &str, after: &str) -> Play {
    let done = json!({"id": "r_1", "status": status, "output": if status == "completed" {
        json!([{"type": "message", "id": "msg_1", "role": "assistant", "content": [{"type": "output_text", "text": "Hello!"}]}])
    } else {
        Value::from(Vec::<Value>::new())
    }});
    json_answer(200, &[("openai-poll-after-ms", after)], &done.to_string())
}

#[tokio::test]
async fn cut_background_stream_resumes_without_duplicate_text() {
    for flavour in [Flavour::Background, Flavour::BackgroundChain] {
        for cut in 0..=6 {
            let scene = Scene::new(flavour).await;
            let get = |fault: &str, times| Fault {
                on: "get_response".into(),
                fault: fault.into(),
                times,
            };
            scene
                .sim
                .handle
                .add_fault(get(&format!("cut={}", cut % 3 + 1), 3))
                .unwrap();
            if cut == 3 {
                scene
                    .sim
                    .handle
                    .add_fault(get("status=500 retry_after=0", 2))
                    .unwrap();
                scene.sim.handle.add_fault(get("drop=before", 1)).unwrap();
            }
            let said = scene
                .say(&format!("a b c d e f g h [[sim: cut={cut}]]"))
                .await;
            let expected = "You said: a b c d e f g h. (This is turn 1 of this conversation.)";
            assert_eq!(said.streamed, expected, "{flavour:?} cut after {cut}");
            assert_eq!(said.ended.status, RunStatus::Completed);
            assert_eq!(scene.sim.handle.stats().runs_started, 1);
            scene.assert_sound();
        }
    }
}

#[tokio::test]
async fn slow_background_response_is_followed_across_many_breaks() {
    let config = SimulatorConfig {
        token_interval: Duration::from_millis(5),
        ..SimulatorConfig::default()
    };
    let scene = Scene::with(Flavour::Background, config, |_| ()).await;
    let cut = Fault {
        on: "get_response".into(),
        fault: "cut=2".into(),
        times: 12,
    };
    scene.sim.handle.add_fault(cut).unwrap();
    let said = scene.say("slow [[sim: cut=1 tokens=40]]").await;
    assert_eq!(said.streamed.split(' ').count(), 40);
    let requests = scene.sim.handle.recorded();
    let resumed: Vec<_> = requests
        .iter()
        .filter_map(|request| request.query.as_deref())
        .collect();
    assert_eq!(resumed[0], "stream=true&starting_after=5");
    assert_eq!(resumed.len(), 13);
}

#[tokio::test]
async fn replayed_events_are_ignored_after_resume() {
    let whole = || sse(vec![Step::Bytes(RESPONSES_TURN.into())]);
    let server = Scripted::start(vec![cut_after(3), whole()]).await;
    assert_eq!(
        lines(
            &run_to_end(&*background(&server), Some(&thread()))
                .await
                .unwrap()
        ),
        EXPECTED
    );
    assert_eq!(
        server.targets(),
        [
            "POST /responses",
            "GET /responses/r_1?stream=true&starting_after=2"
        ]
    );
    assert_eq!(server.requests()[0].body["background"], true);
}

#[tokio::test]
async fn unresumable_stream_falls_back_to_polling() {
    let refused = || {
        let error = json!({"message": "This response cannot be streamed.", "type": "x", "param": "stream", "code": null});
        json_answer(400, &[], &json!({"error": error}).to_string())
    };
    let error_event = || {
        let error = json!({"type": "error", "code": "x", "message": "The stream TTL has expired.", "sequence_number": 0});
        sse(vec![Step::Bytes(
            format!("event: error\ndata: {error}\n\n").into_bytes(),
        )])
    };
    let bare_error = || {
        sse(vec![Step::Bytes(
            b"data: {\"error\":{\"message\":\"expired\"}}\n\n".to_vec(),
        )])
    };
    let whole_error = || json_answer(200, &[], r#"{"error":{"message":"expired"}}"#);
    // The resumed stream is refused, has another content type, is empty, contains an error, or
    // has no numbers.
    let unnumbered = String::from_utf8(first(3))
        .unwrap()
        .replace("sequence_number", "x");
    let unnumbered = || {
        sse(vec![
            Step::Bytes(unnumbered.clone().into_bytes()),
            Step::Cut,
        ])
    };
    for plays in [
        vec![
            cut_after(3),
            refused(),
            response("in_progress"),
            response("completed"),
        ],
        vec![
            cut_after(3),
            response("in_progress"),
            response("queued"),
            response("completed"),
        ],
        vec![
            cut_after(3),
            sse(vec![]),
            response("in_progress"),
            response("completed"),
        ],
        vec![
            cut_after(3),
            error_event(),
            response("in_progress"),
            response("completed"),
        ],
        vec![
            cut_after(3),
            bare_error(),
            response("in_progress"),
            response("completed"),
        ],
        vec![
            cut_after(3),
            whole_error(),
            response("in_progress"),
            response("completed"),
        ],
        vec![unnumbered(), response("in_progress"), response("completed")],
        // The adapter does not wait for a day.
        vec![
            cut_after(3),
            refused(),
            response_that_asks("in_progress", "86400000"),
            response("completed"),
        ],
    ] {
        let (count, server) = (plays.len(), Scripted::start(plays).await);
        let events = run_to_end(&*background(&server), Some(&thread()))
            .await
            .unwrap();
        let expected = ["accepted r_1", "text Hel", "ended completed Hello!"];
        assert_eq!(lines(&events), expected, "{:?}", server.targets());
        assert_eq!(server.requests().len(), count);
        assert_eq!(server.targets().last().unwrap(), "GET /responses/r_1");
    }
}

async fn taken_over(server: &Scripted) -> Vec<String> {
    let sent = unsettled_run(RunId::new(), Some("r_1"));
    let broken = UpstreamError::Broken { timeout: false };
    match background(server).recover(&sent, &broken).await.unwrap() {
        Recovered::Running(events) => lines(&events.collect::<Vec<_>>().await),
        Recovered::Absent | Recovered::Unknown => panic!("the response is in progress"),
    }
}

#[tokio::test]
async fn recovered_background_response_streams_from_beginning() {
    let server = Scripted::start(vec![response("in_progress"), cut_after(3), rest(3)]).await;
    assert_eq!(taken_over(&server).await, EXPECTED);
    let expected = [
        "GET /responses/r_1",
        "GET /responses/r_1?stream=true",
        "GET /responses/r_1?stream=true&starting_after=2",
    ];
    assert_eq!(server.targets(), expected);

    // A finished response needs no stream.
    let server = Scripted::start(vec![response("completed")]).await;
    assert_eq!(
        taken_over(&server).await,
        ["accepted r_1", "ended completed Hello!"]
    );
}

#[tokio::test]
async fn recovered_response_without_stream_is_polled() {
    let refused = || {
        json_answer(
            400,
            &[],
            r#"{"error":{"message":"not created with stream=true"}}"#,
        )
    };
    let failed = || json_answer(500, &[("retry-after-ms", "1")], "");
    for plays in [
        vec![
            response("queued"),
            refused(),
            response("in_progress"),
            response("completed"),
        ],
        vec![
            response("queued"),
            failed(),
            refused(),
            response("completed"),
        ],
        vec![
            response("queued"),
            response("queued"),
            response("in_progress"),
            response("completed"),
        ],
        vec![
            response("queued"),
            sse(vec![]),
            response("in_progress"),
            response("completed"),
        ],
    ] {
        let (count, server) = (plays.len(), Scripted::start(plays).await);
        assert_eq!(
            taken_over(&server).await,
            ["accepted r_1", "ended completed Hello!"]
        );
        assert_eq!(
            (server.requests().len(), server.targets().pop().unwrap()),
            (count, "GET /responses/r_1".into())
        );
    }
}

#[tokio::test]
async fn fruitless_resume_attempts_are_bounded() {
    let bad = || json_answer(503, &[("retry-after-ms", "1")], "");
    let mut plays = vec![cut_after(3), bad(), bad(), bad(), bad(), rest(3)];
    plays.extend([cut_after(3), bad(), bad(), bad(), bad(), bad()]);
    let server = Scripted::start(plays).await;
    let mut settings = config(UpstreamKind::Responses, &server.url);
    settings.background = true;
    let upstream = adapter(&settings);
    assert_eq!(
        lines(&run_to_end(&*upstream, Some(&thread())).await.unwrap()),
        EXPECTED
    );
    let events = run_to_end(&*upstream, Some(&thread())).await.unwrap();
    let lines = lines(&events);
    assert_eq!(lines[..2], EXPECTED[..2]);
    assert!(
        lines[2].starts_with("error Unavailable { status: 503"),
        "{lines:?}"
    );
    assert_eq!(server.requests().len(), 12);
}

#[tokio::test]
async fn refused_resume_is_reported_as_broken_stream() {
    let gone = json!({"error": {"message": "Response with id 'r_1' not found.", "type": "x", "param": null, "code": null}});
    for answer in [
        json_answer(401, &[], "{}"),
        json_answer(404, &[], &gone.to_string()),
    ] {
        let again = json_answer(404, &[], &gone.to_string());
        let server = Scripted::start(vec![cut_after(3), answer, again]).await;
        let events = run_to_end(&*background(&server), Some(&thread()))
            .await
            .unwrap();
        assert_eq!(lines(&events)[2..], ["error Broken { timeout: false }"]);
    }
}

#[tokio::test]
async fn silent_resume_and_unanswered_poll_are_waited_for() {
    let silent = || {
        sse(vec![
            Step::Pause(Duration::from_secs(1)),
            Step::Bytes(rest_of(3)),
        ])
    };
    let server = Scripted::start(vec![
        cut_after(3),
        silent(),
        cut_after(3),
        late(Duration::from_secs(1), silent()),
    ])
    .await;
    let upstream = background(&server);
    for _ in 0..2 {
        assert_eq!(
            lines(&run_to_end(&*upstream, Some(&thread())).await.unwrap()),
            EXPECTED
        );
    }
    assert_eq!(server.requests().len(), 4);

    // There is no answer more often than a request may fail.
    let mut plays = vec![cut_after(3), json_answer(400, &[], "{}")];
    plays.extend((0..7).map(|_| Play::Silence));
    plays.push(response("completed"));
    let server = Scripted::start(plays).await;
    let mut settings = config(UpstreamKind::Responses, &server.url);
    (settings.background, settings.call_timeout) = (true, Duration::from_millis(50));
    let events = run_to_end(&*adapter(&settings), Some(&thread()))
        .await
        .unwrap();
    assert_eq!(
        lines(&events),
        ["accepted r_1", "text Hel", "ended completed Hello!"]
    );
    assert_eq!(server.requests().len(), 10);
}

#[tokio::test]
async fn stream_cut_before_acceptance_is_ambiguous() {
    let server = Scripted::start(vec![sse(vec![
        Step::Bytes(b": hi\n\n".to_vec()),
        Step::Cut,
    ])])
    .await;
    let error = run_to_end(&*background(&server), Some(&thread()))
        .await
        .unwrap_err();
    assert!(error.is_ambiguous(), "{error:?}");
    assert_eq!(server.requests().len(), 1);
}

#[tokio::test]
async fn external_cancel_ends_background_stream() {
    let scene = Scene::new(Flavour::Background).await;
    let mut events = scene
        .start("stop [[sim: tokens=50 rate=10s]]")
        .await
        .unwrap();
    let Some(Ok(UpstreamEvent::Accepted(id))) = events.next().await else {
        panic!("the run was not accepted")
    };
    scene
        .sim
        .post(&format!("/responses/{id}/cancel"), json!({}))
        .await;
    let said = read(events).await;
    assert_eq!(said.ended.status, RunStatus::Cancelled);
}

//! Whole runs against the simulator, which enforces the rules of the protocols.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::StreamExt;
use serde_json::json;
use threadkeeper::config::{AssistantConfig, UpstreamConfig, UpstreamKind};
use threadkeeper::domain::{
    ContentPart, ImageFile, ImageUrl, MessageId, Metadata, RunId, RunStatus, ToolCall,
    UnsettledRun, UpstreamRunId, UpstreamThreadId,
};
use threadkeeper::simulator::SimulatorConfig;
use threadkeeper::store::InputMessage;
use threadkeeper::upstream::{Ended, StartRun, Upstream, UpstreamError, UpstreamEvent};

use super::{adapter, config, owner, profile, run_to_end_with};
use crate::support::openapi;
use crate::support::wire::Sim;

const KINDS: [UpstreamKind; 2] = [UpstreamKind::Assistants, UpstreamKind::Responses];

/// Asserts that every request of the adapters matches the published protocol.
pub(super) fn assert_requests_are_valid(kind: UpstreamKind, sim: &Sim) {
    let document = match kind {
        UpstreamKind::Assistants => openapi::assistants(),
        UpstreamKind::Responses => openapi::responses(),
    };
    let requests = sim.handle.recorded();
    assert!(!requests.is_empty());
    for request in requests {
        let path = request.path.trim_start_matches("/v1");
        let template = document.template(&request.method, path);
        let template =
            template.unwrap_or_else(|| panic!("the specification lacks {} {path}", request.method));
        document
            .check_request(&request.method, &template, &request.body)
            .unwrap();
    }
}

/// The result of a run.
struct Said {
    accepted: UpstreamRunId,
    streamed: String,
    ended: Ended,
}

fn settings(kind: UpstreamKind, sim: &Sim) -> UpstreamConfig {
    config(kind, &sim.base)
}

async fn thread_on(upstream: &dyn Upstream) -> UpstreamThreadId {
    upstream
        .create_thread(&owner(), &[])
        .await
        .unwrap()
        .unwrap()
}

/// Sends a message and reads its run to the end.
async fn say(upstream: &dyn Upstream, thread: Option<&UpstreamThreadId>, text: &str) -> Said {
    let content = vec![ContentPart::text(text)];
    let events = run_to_end_with(upstream, thread, &profile_of(upstream), content)
        .await
        .unwrap();
    let mut said = (None, String::new(), None);
    for event in events {
        match event.unwrap() {
            UpstreamEvent::Accepted(id) => said.0 = Some(id),
            UpstreamEvent::Text(delta) => said.1.push_str(&delta.text),
            UpstreamEvent::Ended(ended) => said.2 = Some(*ended),
        }
    }
    Said {
        accepted: said.0.unwrap(),
        streamed: said.1,
        ended: said.2.unwrap(),
    }
}

fn profile_of(upstream: &dyn Upstream) -> AssistantConfig {
    let mut profile = profile();
    if !format!("{upstream:?}").starts_with("Assistants") {
        profile.assistant_id = None;
    }
    profile
}

fn text_of(ended: &Ended) -> String {
    ended
        .content
        .iter()
        .map(|part| match part {
            ContentPart::Text { text, .. } => text.clone(),
            ContentPart::Refusal { refusal, .. } => format!("({refusal})"),
            other => panic!("the part is no text: {other:?}"),
        })
        .collect()
}

fn unsettled_run(
    thread: &UpstreamThreadId,
    run: RunId,
    upstream_run: Option<UpstreamRunId>,
) -> UnsettledRun {
    UnsettledRun {
        thread: Some(thread.clone()),
        upstream_run,
        ..super::unsettled_run(run, None)
    }
}

#[tokio::test]
async fn runs_on_known_thread_take_one_valid_request() {
    for kind in KINDS {
        let sim = Sim::instant().await;
        let upstream = adapter(&settings(kind, &sim));
        let thread = thread_on(&*upstream).await;
        for (at, dialect) in [
            "",
            "[[sim: crlf]]",
            "[[sim: split comments]]",
            "[[sim: unknown_events]]",
        ]
        .into_iter()
        .enumerate()
        {
            let said = say(&*upstream, Some(&thread), &format!("hello 🙂 {dialect}")).await;
            assert_eq!(said.ended.status, RunStatus::Completed);
            let expected = format!(
                "You said: hello 🙂. (This is turn {} of this conversation.)",
                at + 1
            );
            assert_eq!(
                (said.streamed.as_str(), text_of(&said.ended)),
                (expected.as_str(), expected.clone())
            );
            assert!(said.ended.usage.is_some() && said.ended.upstream_message_id.is_some());
            assert_eq!(said.ended.thread, None);
        }
        let stats = sim.handle.stats();
        assert_eq!((stats.requests, stats.runs_started), (5, 4), "{kind:?}");
        assert_eq!(stats.violations, [""; 0]);
        assert_requests_are_valid(kind, &sim);
    }
}

#[tokio::test]
async fn threads_and_runs_carry_ownership_tags() {
    for kind in KINDS {
        let sim = Sim::instant().await;
        let upstream = adapter(&settings(kind, &sim));
        let thread = thread_on(&*upstream).await;
        let view = &sim.handle.threads()[0];
        assert_eq!(view.id, thread.as_str());
        for (tag, value) in [
            ("tenant", "default"),
            ("user", "alice"),
            ("topic", "tea"),
            ("expires_at", "2026-11-23T09:00:00Z"),
        ] {
            assert_eq!(view.metadata[&format!("threadkeeper_{tag}")], value);
        }
        say(&*upstream, Some(&thread), "hello").await;
        let body = &sim.handle.recorded()[1].body;
        assert!(
            body["metadata"]["threadkeeper_run"]
                .as_str()
                .unwrap()
                .starts_with("run_")
        );
    }
}

#[tokio::test]
async fn every_run_outcome_is_reported() {
    for kind in KINDS {
        let sim = Sim::instant().await;
        let upstream = adapter(&settings(kind, &sim));
        let thread = thread_on(&*upstream).await;
        for (text, status, reason) in [
            ("[[sim: fail]]", RunStatus::Failed, "(server_error)"),
            ("[[sim: incomplete]]", RunStatus::Incomplete, "_tokens)"),
            ("[[sim: mid_error]]", RunStatus::Failed, "("),
            ("[[sim: mid_error=nested]]", RunStatus::Failed, "("),
        ] {
            let ended = say(&*upstream, Some(&thread), &format!("a b c {text}"))
                .await
                .ended;
            assert_eq!(ended.status, status, "{kind:?} {text}");
            let message = ended.error.unwrap().message;
            assert!(message.contains(reason), "{kind:?} {text}: {message}");
        }
        let refusal = say(&*upstream, Some(&thread), "x [[sim: refusal]]")
            .await
            .ended;
        assert!(
            matches!(refusal.content[..], [ContentPart::Refusal { .. }]),
            "{refusal:?}"
        );
        let parts = say(&*upstream, Some(&thread), "x [[sim: parts=3]]").await;
        assert_eq!(
            (parts.ended.content.len(), text_of(&parts.ended)),
            (3, parts.streamed)
        );
    }
}

#[tokio::test]
async fn every_input_form_is_accepted() {
    for kind in KINDS {
        let sim = Sim::instant().await;
        let upstream = adapter(&settings(kind, &sim));
        let thread = thread_on(&*upstream).await;
        let mut assistant = profile_of(&*upstream);
        assistant.tools = vec![match kind {
            UpstreamKind::Assistants => {
                json!({"type": "function", "function": {"name": "f", "parameters": {}}})
            }
            UpstreamKind::Responses => {
                json!({"type": "function", "name": "f", "parameters": {}, "strict": false})
            }
        }];
        assistant.parameters = json!({"temperature": 0.5}).as_object().unwrap().clone();
        let text = |text: &str| ContentPart::text(text);
        let image = |detail: Option<&str>| ContentPart::ImageUrl {
            image_url: ImageUrl {
                url: "https://example.org/1.png".to_owned(),
                detail: detail.map(str::to_owned),
            },
        };
        let file = ContentPart::ImageFile {
            image_file: ImageFile {
                file_id: "file_1".to_owned(),
                detail: None,
            },
        };
        let input = [
            InputMessage {
                id: MessageId::new(),
                content: vec![text("one")],
            },
            InputMessage {
                id: MessageId::new(),
                content: vec![text("two"), image(None), image(Some("low")), file],
            },
        ];
        let pairs = (0..10)
            .map(|at| (format!("{at:064}"), "x".repeat(512)))
            .collect();
        let metadata =
            Metadata::try_from(std::collections::BTreeMap::from_iter::<Vec<_>>(pairs)).unwrap();
        let request = StartRun {
            run: RunId::new(),
            thread: Some(&thread),
            owner: &owner(),
            history: &[],
            assistant: &assistant,
            input: &input,
            metadata: &metadata,
        };
        let events: Vec<_> = upstream.start(request).await.unwrap().collect().await;
        assert!(
            matches!(events.last(), Some(Ok(UpstreamEvent::Ended(_)))),
            "{kind:?}: {events:?}"
        );
        assert_eq!(sim.handle.threads()[0].user_texts.len(), 2);
        assert_requests_are_valid(kind, &sim);
    }
}

#[tokio::test]
async fn refusals_and_broken_streams_are_distinguished() {
    for kind in KINDS {
        let sim = Sim::instant().await;
        let upstream = adapter(&settings(kind, &sim));
        let thread = thread_on(&*upstream).await;
        let content = |text: &str| vec![ContentPart::text(text)];
        let profile = profile_of(&*upstream);
        let started = async |text: &str| {
            run_to_end_with(&*upstream, Some(&thread), &profile, content(text)).await
        };

        for (text, expected) in [
            (
                "[[sim: status=429 retry_after=2]]",
                "RateLimited { status: 429, retry_after: Some(2s), quota: false, code: Some(\"rate_limit_exceeded\") }",
            ),
            (
                "[[sim: status=429 code=insufficient_quota]]",
                "RateLimited { status: 429, retry_after: None, quota: true, code: Some(\"insufficient_quota\") }",
            ),
            (
                "[[sim: status=503]]",
                "Unavailable { status: 503, retry_after: None, no_retry: false, code: None }",
            ),
            ("[[sim: drop=before]]", "Broken { timeout: false }"),
        ] {
            let error = started(&format!("x {text}")).await.unwrap_err();
            assert_eq!(format!("{error:?}"), expected, "{kind:?}");
        }
        for text in ["[[sim: cut=2 rate=10ms]]", "[[sim: no_terminal]]"] {
            let events = started(&format!("a b c d {text}")).await.unwrap();
            let last = events.last().unwrap();
            assert!(
                matches!(last, Err(UpstreamError::Broken { timeout: false })),
                "{kind:?} {text}: {last:?}"
            );
            upstream
                .settle(&unsettled_run(&thread, RunId::new(), accepted(&events)))
                .await
                .unwrap();
        }
        assert_eq!(
            say(&*upstream, Some(&thread), "still here")
                .await
                .ended
                .status,
            RunStatus::Completed
        );

        let unknown = UpstreamThreadId(format!("{}0", thread.as_str()));
        let error = run_to_end_with(&*upstream, Some(&unknown), &profile, content("x"))
            .await
            .unwrap_err();
        assert!(
            matches!(error, UpstreamError::ThreadGone),
            "{kind:?}: {error:?}"
        );
    }
}

fn accepted(events: &[Result<UpstreamEvent, UpstreamError>]) -> Option<UpstreamRunId> {
    events.iter().find_map(|event| match event {
        Ok(UpstreamEvent::Accepted(id)) => Some(id.clone()),
        _ => None,
    })
}

#[tokio::test]
async fn wrong_api_key_is_refused() {
    for kind in KINDS {
        let sim = Sim::start(SimulatorConfig {
            api_key: Some("right".to_owned().into()),
            ..SimulatorConfig::default()
        })
        .await;
        let error = adapter(&settings(kind, &sim))
            .create_thread(&owner(), &[])
            .await
            .unwrap_err();
        assert!(
            matches!(error, UpstreamError::Refused { status: 401, .. }),
            "{error:?}"
        );
        let mut right = settings(kind, &sim);
        right.api_key = Some("right".to_owned().into());
        adapter(&right).create_thread(&owner(), &[]).await.unwrap();
    }
}

#[tokio::test]
async fn foreign_run_makes_thread_busy() {
    for kind in KINDS {
        let sim = Sim::instant().await;
        let upstream = adapter(&settings(kind, &sim));
        let thread = thread_on(&*upstream).await;
        let blocking = sim.handle.start_foreign_run(thread.as_str()).unwrap();
        let content = vec![ContentPart::text("x")];
        let profile = profile_of(&*upstream);
        let error = run_to_end_with(&*upstream, Some(&thread), &profile, content)
            .await
            .unwrap_err();
        let UpstreamError::Busy { blocking_run } = error else {
            panic!("{error:?}")
        };
        let expected = (kind == UpstreamKind::Assistants).then_some(UpstreamRunId(blocking));
        assert_eq!(blocking_run, expected);
        sim.handle.stop_foreign_run(thread.as_str());
        assert_eq!(
            say(&*upstream, Some(&thread), "x").await.ended.status,
            RunStatus::Completed
        );
        assert_eq!(
            sim.handle.thread_history(thread.as_str()).len(),
            2,
            "nothing of the refused run is upstream"
        );
    }
}

#[tokio::test]
async fn abandoned_run_is_settled_with_or_without_id() {
    for kind in KINDS {
        for known in [true, false] {
            let delay = Duration::from_millis(30);
            let sim = Sim::start(SimulatorConfig {
                cancel_delay: delay,
                ..SimulatorConfig::default()
            })
            .await;
            let upstream = adapter(&settings(kind, &sim));
            let thread = thread_on(&*upstream).await;
            sim.handle.hold();
            let (run, assistant, metadata) =
                (RunId::new(), profile_of(&*upstream), Metadata::default());
            let input = [InputMessage {
                id: MessageId::new(),
                content: vec![ContentPart::text("x")],
            }];
            let request = StartRun {
                run,
                thread: Some(&thread),
                owner: &owner(),
                history: &[],
                assistant: &assistant,
                input: &input,
                metadata: &metadata,
            };
            let mut stream = upstream.start(request).await.unwrap();
            let Some(Ok(UpstreamEvent::Accepted(id))) = stream.next().await else {
                panic!("the run was not accepted")
            };
            drop(stream);
            let left = unsettled_run(&thread, run, known.then_some(id));
            upstream.settle(&left).await.unwrap();
            upstream.settle(&left).await.unwrap();
            sim.handle.release();
            sim.handle.wait_for(|stats| stats.active_runs == 0).await;
            let ended = sim.handle.stats().runs_ended;
            let expected = if kind == UpstreamKind::Assistants {
                "cancelled"
            } else {
                "abandoned"
            };
            assert_eq!(
                ended.keys().collect::<Vec<_>>(),
                [expected],
                "known: {known}"
            );
            assert_eq!(
                say(&*upstream, Some(&thread), "next").await.ended.status,
                RunStatus::Completed
            );
            assert_eq!(sim.handle.stats().violations, [""; 0]);
            assert_requests_are_valid(kind, &sim);
        }
    }
}

#[tokio::test]
async fn unanswered_function_calls_are_settled() {
    for kind in KINDS {
        for told in [true, false] {
            let sim = Sim::instant().await;
            let upstream = adapter(&settings(kind, &sim));
            let thread = thread_on(&*upstream).await;
            let said = say(&*upstream, Some(&thread), "x [[sim: tools=23]]").await;
            assert_eq!(said.ended.status, RunStatus::RequiresAction);
            assert_eq!(said.ended.tool_calls.len(), 23);
            let ids: BTreeSet<_> = said
                .ended
                .tool_calls
                .iter()
                .map(|call| call.id.as_str())
                .collect();
            assert_eq!(ids.len(), 23);
            let open_calls: Vec<ToolCall> = if told {
                said.ended.tool_calls.clone()
            } else {
                Vec::new()
            };
            let left = UnsettledRun {
                open_calls,
                ..unsettled_run(&thread, RunId::new(), Some(said.accepted))
            };
            upstream.settle(&left).await.unwrap();
            upstream.settle(&left).await.unwrap();
            let before = sim.handle.stats().requests;
            assert_eq!(
                say(&*upstream, Some(&thread), "next").await.ended.status,
                RunStatus::Completed
            );
            let stats = sim.handle.stats();
            assert_eq!(
                (stats.requests, &stats.violations[..]),
                (before + 1, &[][..]),
                "{kind:?}"
            );
            assert_requests_are_valid(kind, &sim);
        }
    }
}

#[tokio::test]
async fn open_calls_are_repaired_at_next_message() {
    let sim = Sim::instant().await;
    let upstream = adapter(&settings(UpstreamKind::Responses, &sim));
    let thread = thread_on(&*upstream).await;
    say(&*upstream, Some(&thread), "x [[sim: tools=2]]").await;
    assert_eq!(
        say(&*upstream, Some(&thread), "next").await.ended.status,
        RunStatus::Completed
    );
    let texts = &sim.handle.threads()[0].user_texts;
    assert_eq!(texts.iter().filter(|text| *text == "next").count(), 1);
}

#[tokio::test]
async fn chain_keeps_completed_and_drops_broken_runs() {
    let sim = Sim::start(SimulatorConfig {
        conversations: false,
        ..SimulatorConfig::default()
    })
    .await;
    let mut settings = settings(UpstreamKind::Responses, &sim);
    settings.conversations = false;
    let upstream = adapter(&settings);
    assert_eq!(upstream.create_thread(&owner(), &[]).await.unwrap(), None);
    let first = say(&*upstream, None, "one").await.ended.thread.unwrap();
    let broken = say(&*upstream, Some(&first), "lost [[sim: tools=1]]")
        .await
        .ended;
    assert_eq!(
        (broken.status, broken.thread),
        (RunStatus::RequiresAction, None)
    );
    assert_eq!(
        say(&*upstream, Some(&first), "lost [[sim: fail]]")
            .await
            .ended
            .thread,
        None
    );
    let second = say(&*upstream, Some(&first), "two").await.ended;
    assert!(text_of(&second).contains("turn 2"), "{second:?}");
    let history = sim.handle.thread_history(second.thread.unwrap().as_str());
    let users: Vec<&str> = history
        .iter()
        .filter(|(role, _)| role == "user")
        .map(|(_, text)| text.as_str())
        .collect();
    assert_eq!(users, ["one", "two"]);
    assert_requests_are_valid(UpstreamKind::Responses, &sim);

    let unknown = UpstreamThreadId("resp_0000".to_owned());
    let content = vec![ContentPart::text("x")];
    let error = run_to_end_with(&*upstream, Some(&unknown), &profile_of(&*upstream), content)
        .await
        .unwrap_err();
    assert!(matches!(error, UpstreamError::ThreadGone), "{error:?}");
}

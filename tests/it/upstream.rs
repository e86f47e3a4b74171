//! The adapters over real sockets: scripted servers play hostile or odd ones, and the simulator
//! serves whole runs.

mod answers;
mod background;
mod clearing;
mod deleting;
mod mending;
mod recovery;
mod scene;
mod scripted;
mod settling;
mod simulated;
mod takeover;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use serde_json::{Value, json};
use threadkeeper::config::{AssistantConfig, AuthScheme, UpstreamConfig, UpstreamKind};
use threadkeeper::domain::{
    Baseline, ContentPart, KeyNames, MessageId, Metadata, RunId, RunStatus, ThreadId, UnsettledRun,
    UpstreamRunId, UpstreamThreadId,
};
use threadkeeper::store::InputMessage;
use threadkeeper::upstream::{
    AssistantsUpstream, Ownership, ResponsesUpstream, StartRun, Upstream, UpstreamClient,
    UpstreamError, UpstreamEvent,
};

use scripted::{Play, Scripted, Step, json_answer, late, sse};

fn config(kind: UpstreamKind, base_url: &str) -> UpstreamConfig {
    UpstreamConfig {
        api_key: Some("sk-hidden".to_owned().into()),
        call_timeout: Duration::from_secs(5),
        max_event_bytes: 64 * 1024,
        ..UpstreamConfig::new(kind, base_url.parse().unwrap())
    }
}

fn adapter(config: &UpstreamConfig) -> Box<dyn Upstream> {
    let client = UpstreamClient::new("test", config).unwrap();
    match config.kind {
        UpstreamKind::Assistants => Box::new(AssistantsUpstream::new(client, config)),
        UpstreamKind::Responses => Box::new(ResponsesUpstream::new(client, config)),
    }
}

fn assistants(server: &Scripted) -> Box<dyn Upstream> {
    adapter(&config(UpstreamKind::Assistants, &server.url))
}

fn responses(server: &Scripted) -> Box<dyn Upstream> {
    adapter(&config(UpstreamKind::Responses, &server.url))
}

fn thread() -> UpstreamThreadId {
    UpstreamThreadId("t_1".to_owned())
}

fn owner() -> Ownership {
    Ownership {
        names: KeyNames {
            tenant: "default".to_owned(),
            user: "alice".to_owned(),
            scope: Some(("topic", "tea".to_owned())),
        },
        thread: ThreadId::new(),
        expires_at: Some("2026-11-23T09:00:00Z".parse().unwrap()),
    }
}

fn profile() -> AssistantConfig {
    AssistantConfig {
        assistant_id: Some("asst_1".to_owned()),
        model: Some("m".to_owned()),
        instructions: Some("be brief".to_owned()),
        ..AssistantConfig::default()
    }
}

/// Starts a run with one text and reads its events to the end.
async fn run_to_end(
    upstream: &dyn Upstream,
    thread: Option<&UpstreamThreadId>,
) -> Result<Vec<Result<UpstreamEvent, UpstreamError>>, UpstreamError> {
    let content = vec![ContentPart::text("hello")];
    run_to_end_with(upstream, thread, &profile(), content).await
}

async fn run_to_end_with(
    upstream: &dyn Upstream,
    thread: Option<&UpstreamThreadId>,
    assistant: &AssistantConfig,
    content: Vec<ContentPart>,
) -> Result<Vec<Result<UpstreamEvent, UpstreamError>>, UpstreamError> {
    let input = [InputMessage {
        id: MessageId::new(),
        content,
    }];
    let metadata = Metadata::default();
    let request = StartRun {
        run: RunId::new(),
        thread,
        owner: &owner(),
        history: &[],
        assistant,
        input: &input,
        metadata: &metadata,
    };
    Ok(upstream.start(request).await?.collect().await)
}

fn unsettled_run(run: RunId, upstream_run: Option<&str>) -> UnsettledRun {
    UnsettledRun {
        thread: Some(thread()),
        run,
        upstream_run: upstream_run.map(|id| UpstreamRunId(id.to_owned())),
        open_calls: Vec::new(),
        baseline: Baseline::default(),
        inputs: 1,
        synced: false,
        remove: false,
    }
}

/// Returns a line for each event: `accepted x`, `text x`, `ended status [parts] message`, `error
/// x`.
fn lines(events: &[Result<UpstreamEvent, UpstreamError>]) -> Vec<String> {
    events
        .iter()
        .map(|event| match event {
            Ok(UpstreamEvent::Accepted(id)) => format!("accepted {id}"),
            Ok(UpstreamEvent::Text(delta)) => format!("text {}", delta.text),
            Ok(UpstreamEvent::Ended(ended)) => {
                let text: Vec<&str> = ended
                    .content
                    .iter()
                    .map(|part| match part {
                        ContentPart::Text { text, .. } => text.as_str(),
                        _ => "?",
                    })
                    .collect();
                format!("ended {} {}", ended.status, text.join("|"))
            }
            Err(error) => format!("error {error:?}"),
        })
        .collect()
}

const ASSISTANTS_TURN: &str = include_str!("upstream/assistants.sse");
const RESPONSES_TURN: &str = include_str!("upstream/responses.sse");
const EXPECTED: [&str; 4] = [
    "accepted r_1",
    "text Hel",
    "text lö",
    "ended completed Hello!",
];

#[tokio::test]
async fn run_is_one_request_in_any_sse_encoding() {
    for (upstream_of, transcript) in [
        (
            assistants as fn(&Scripted) -> Box<dyn Upstream>,
            ASSISTANTS_TURN,
        ),
        (responses, RESPONSES_TURN),
    ] {
        let crlf = transcript.replace('\n', "\r\n");
        let no_names: String = transcript
            .split_inclusive('\n')
            .filter(|line| !line.starts_with("event:"))
            .collect();
        let noisy = format!(
            "\u{feff}: hi\n\nevent: ping\ndata: now\n\n{}",
            transcript.replace(
                "\n\n",
                "\n\n: keep-alive\n\nevent: thread.future\ndata: {\"type\":\"x\"}\n\n"
            )
        );
        let done = format!("{transcript}data: [DONE]\n\n");
        for text in [transcript, &crlf, &no_names, &noisy, &done] {
            for size in [1, 7, 4096] {
                let chunks = text
                    .as_bytes()
                    .chunks(size)
                    .map(|chunk| Step::Bytes(chunk.to_vec()))
                    .collect();
                let server = Scripted::start(vec![sse(chunks)]).await;
                let events = run_to_end(&*upstream_of(&server), Some(&thread()))
                    .await
                    .unwrap();
                assert_eq!(lines(&events), EXPECTED, "in pieces of {size}: {text}");
                assert_eq!(server.requests().len(), 1);
            }
        }
    }
}

#[tokio::test]
async fn connections_are_reused_after_run() {
    let play = || sse(vec![Step::Bytes(RESPONSES_TURN.into())]);
    let server = Scripted::start((0..5).map(|_| play()).collect()).await;
    let upstream = responses(&server);
    for _ in 0..5 {
        run_to_end(&*upstream, Some(&thread())).await.unwrap();
    }
    let peers: std::collections::BTreeSet<_> = server
        .requests()
        .iter()
        .map(|request| request.peer)
        .collect();
    assert_eq!(peers.len(), 1);
}

#[tokio::test]
async fn idle_connection_is_not_reused_after_its_time() {
    let play = || sse(vec![Step::Bytes(RESPONSES_TURN.into())]);
    let server = Scripted::start(vec![play(), play()]).await;
    let upstream = adapter(&UpstreamConfig {
        pool_idle_timeout: Duration::from_millis(1),
        ..config(UpstreamKind::Responses, &server.url)
    });
    for _ in 0..2 {
        run_to_end(&*upstream, Some(&thread())).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let requests = server.requests();
    assert_ne!(requests[0].peer, requests[1].peer);
}

#[tokio::test]
async fn terminal_event_ends_run_before_body_ends() {
    let server = Scripted::start(vec![sse(vec![
        Step::Bytes(ASSISTANTS_TURN.into()),
        Step::Stall,
    ])])
    .await;
    let started = Instant::now();
    let events = run_to_end(&*assistants(&server), Some(&thread()))
        .await
        .unwrap();
    assert_eq!(lines(&events), EXPECTED);
    assert!(
        started.elapsed() < Duration::from_secs(4),
        "the adapter stops reading after a bounded time"
    );
}

#[tokio::test]
async fn headers_query_and_key_are_sent_as_configured() {
    let server = Scripted::start(vec![
        sse(vec![Step::Bytes(ASSISTANTS_TURN.into())]),
        sse(vec![Step::Bytes(RESPONSES_TURN.into())]),
        sse(vec![Step::Bytes(RESPONSES_TURN.into())]),
    ])
    .await;
    let base = format!("{}api/v1/", server.url);
    let mut settings = config(UpstreamKind::Assistants, &base);
    settings.headers = BTreeMap::from([("X-Team".to_owned(), "tea".to_owned().into())]);
    settings.query = BTreeMap::from([("api-version".to_owned(), "2025-05-01".to_owned().into())]);
    let odd = UpstreamThreadId("a/b?c".to_owned());
    run_to_end(&*adapter(&settings), Some(&odd)).await.unwrap();

    settings.kind = UpstreamKind::Responses;
    settings.auth = AuthScheme::ApiKey;
    run_to_end(&*adapter(&settings), Some(&odd)).await.unwrap();
    settings.api_key = None;
    run_to_end(&*adapter(&settings), Some(&odd)).await.unwrap();

    let requests = server.requests();
    assert_eq!(
        requests[0].target,
        "POST /api/v1/threads/a%2Fb%3Fc/runs?api-version=2025-05-01"
    );
    assert_eq!(
        requests[1].target,
        "POST /api/v1/responses?api-version=2025-05-01"
    );
    let header = |at: usize, name: &str| {
        requests[at]
            .headers
            .get(name)
            .map(|value| value.to_str().unwrap().to_owned())
            .unwrap_or_default()
    };
    assert_eq!(header(0, "authorization"), "Bearer sk-hidden");
    assert_eq!(header(0, "openai-beta"), "assistants=v2");
    assert_eq!(header(0, "x-team"), "tea");
    assert_eq!(header(0, "accept"), "text/event-stream");
    assert_eq!(header(0, "content-type"), "application/json");
    assert!(header(0, "user-agent").starts_with("threadkeeper/"));
    assert_eq!(
        (header(1, "authorization"), header(1, "api-key")),
        (String::new(), "sk-hidden".to_owned())
    );
    assert_eq!(header(1, "openai-beta"), "");
    assert_eq!(
        (header(2, "authorization"), header(2, "api-key")),
        (String::new(), String::new())
    );
    assert_eq!(requests[1].body["conversation"], "a/b?c");
}

#[tokio::test]
async fn redirect_is_not_followed() {
    let server = Scripted::start(vec![
        json_answer(307, &[("location", "/elsewhere")], ""),
        json_answer(200, &[], r#"{"id":"t_2"}"#),
    ])
    .await;
    let error = assistants(&server)
        .create_thread(&owner(), &[])
        .await
        .unwrap_err();
    assert!(
        matches!(
            error,
            UpstreamError::Refused {
                status: 307,
                code: None,
                ..
            }
        ),
        "{error:?}"
    );
    assert_eq!(server.requests().len(), 1);
}

/// Status, headers and body of a refusal, and the error that they mean.
type Refusal<'a> = (u16, Vec<(&'a str, &'a str)>, String, &'a str);

#[tokio::test]
async fn refusals_become_errors_without_upstream_text() {
    let wrapped = |message: &str, code: Value| {
        json!({"error": {"message": message, "type": "invalid_request_error", "param": null, "code": code}})
            .to_string()
    };
    let busy = wrapped("Thread t_1 already has an active run run_7.", Value::Null);
    let gone = wrapped("No thread found with id 't_1'.", Value::Null);
    let locked = wrapped("Another process", "conversation_locked".into());
    let cases: Vec<Refusal<'_>> = vec![
        (
            400,
            vec![],
            busy,
            r#"Busy { blocking_run: Some(UpstreamRunId("run_7")) }"#,
        ),
        (400, vec![], locked, "Busy { blocking_run: None }"),
        (409, vec![], "{}".into(), "Busy { blocking_run: None }"),
        (404, vec![], gone, "ThreadGone"),
        (
            404,
            vec![],
            "Not Found".into(),
            "Refused { status: 404, code: None, missing: false, cause: Configuration }",
        ),
        (
            401,
            vec![],
            wrapped("sk-hidden is wrong", "invalid_api_key".into()),
            r#"Refused { status: 401, code: Some("invalid_api_key"), missing: false, cause: Configuration }"#,
        ),
        (
            429,
            vec![("retry-after", "2")],
            "{}".into(),
            "RateLimited { status: 429, retry_after: Some(2s), quota: false, code: None }",
        ),
        (
            503,
            vec![("retry-after-ms", "5")],
            "x".repeat(200_000),
            "Unavailable { status: 503, retry_after: Some(5ms), no_retry: false, code: None }",
        ),
    ];
    for (status, headers, body, expected) in cases {
        let server = Scripted::start(vec![json_answer(status, &headers, &body)]).await;
        let error = run_to_end(&*assistants(&server), Some(&thread()))
            .await
            .unwrap_err();
        assert_eq!(format!("{error:?}"), expected);
        assert!(!format!("{error} {error:?}").contains("hidden"));
    }
}

#[tokio::test]
async fn response_without_event_stream_is_protocol_error() {
    for kind in [UpstreamKind::Assistants, UpstreamKind::Responses] {
        let server = Scripted::start(vec![json_answer(200, &[], r#"{"ok":true}"#)]).await;
        let error = run_to_end(&*adapter(&config(kind, &server.url)), Some(&thread()))
            .await
            .unwrap_err();
        assert!(
            matches!(error, UpstreamError::Protocol(_)) && error.is_ambiguous(),
            "{error:?}"
        );
    }
}

/// A limit that is shorter than any silence in these tests.
const SHORT: Duration = Duration::from_millis(50);
const LONG: Duration = Duration::from_millis(300);
const SILENCE: Step = Step::Pause(LONG);

#[tokio::test]
async fn silent_run_request_outlasts_call_timeout() {
    let (head, rest) = RESPONSES_TURN.split_at(RESPONSES_TURN.find("\n\n").unwrap() + 2);
    let turns = || {
        vec![
            late(LONG, sse(vec![Step::Bytes(RESPONSES_TURN.into())])),
            sse(vec![SILENCE, Step::Bytes(RESPONSES_TURN.into())]),
            sse(vec![
                Step::Bytes(head.into()),
                SILENCE,
                Step::Bytes(rest.into()),
            ]),
        ]
    };
    for background in [false, true] {
        let server = Scripted::start(turns()).await;
        let mut settings = config(UpstreamKind::Responses, &server.url);
        (settings.call_timeout, settings.background) = (SHORT, background);
        let upstream = adapter(&settings);
        for _ in turns() {
            assert_eq!(
                lines(&run_to_end(&*upstream, Some(&thread())).await.unwrap()),
                EXPECTED
            );
        }
        assert_eq!(server.targets(), ["POST /responses"; 3]);
    }
}

#[tokio::test]
async fn slow_thread_creation_is_sent_once() {
    for (kind, path) in [
        (UpstreamKind::Assistants, "POST /threads"),
        (UpstreamKind::Responses, "POST /conversations"),
    ] {
        let made = json_answer(200, &[], r#"{"id":"t_1"}"#);
        let server = Scripted::start(vec![late(LONG, made)]).await;
        let mut settings = config(kind, &server.url);
        settings.call_timeout = SHORT;
        assert_eq!(
            adapter(&settings)
                .create_thread(&owner(), &[])
                .await
                .unwrap(),
            Some(thread())
        );
        assert_eq!(server.targets(), [path]);
    }
}

#[tokio::test]
async fn silent_recovery_lookup_times_out_without_outage() {
    let server = Scripted::start((0..6).map(|_| Play::Silence).collect()).await;
    let mut settings = config(UpstreamKind::Assistants, &server.url);
    settings.call_timeout = SHORT;
    let upstream = adapter(&settings);
    let error = upstream
        .recover(
            &unsettled_run(RunId::new(), Some("run_1")),
            &recovery::BROKEN,
        )
        .await
        .err()
        .unwrap();
    assert!(
        matches!(error, UpstreamError::Broken { timeout: true }),
        "{error:?}"
    );
    // A busy machine may give a connection up before the server has read its request.
    assert!(
        (1..=5).contains(&server.requests().len()),
        "{:?}",
        server.targets()
    );
    assert!(
        !error.tells_outage(),
        "a slow server does not count as an outage"
    );
}

/// Returns all forms of an answer that contains an error and nothing else of a run.
fn bare(error: &Value) -> Vec<Play> {
    let event = format!("data: {}\n\n", json!({"error": error}));
    let stream = |text: &str| sse(vec![Step::Bytes(text.into())]);
    vec![
        stream(&event),
        stream(&format!("{event}data: [DONE]\n\n")),
        stream(&format!("event: message\n{event}")),
        stream(&format!("event: error\n{event}")),
        stream(&format!(": keep-alive\n\n{}", json!({"error": error}))),
        stream(&format!("{:#}\n", json!({"error": error}))),
        stream(&format!("{}\ndata: [DONE]\n\n", json!({"error": error}))),
        stream(&format!("data: {error}\n\n")),
        stream(&format!("data: {}\n\n", json!({"detail": error}))),
        stream(&format!(
            "data: {}\n\n",
            json!({"error": "it failed", "code": error["code"]})
        )),
        json_answer(200, &[], &json!({"error": error}).to_string()),
    ]
}

/// Returns the events that accept a run and begin its reply.
fn begun(kind: UpstreamKind) -> String {
    let transcript = if kind == UpstreamKind::Assistants {
        ASSISTANTS_TURN
    } else {
        RESPONSES_TURN
    };
    transcript[..transcript.find("lö").unwrap()]
        .rsplit_once("\n\n")
        .unwrap()
        .0
        .to_owned()
        + "\n\n"
}

#[tokio::test]
async fn stream_error_in_any_form_is_recognised() {
    for kind in [UpstreamKind::Assistants, UpstreamKind::Responses] {
        for (code, expected) in [
            (
                json!("content_filter"),
                "the upstream refused the request with status 400 (content_filter)",
            ),
            (json!(500), "failed (500)"),
            (
                json!("insufficient_quota"),
                "the quota at the upstream is used up (insufficient_quota)",
            ),
            (json!(429), "the upstream failed with status 429 (429)"),
            (
                json!("conversation_locked"),
                "the upstream thread is held by another run",
            ),
        ] {
            let error = json!({"message": "No.", "type": null, "param": null, "code": code});
            for form in 0..bare(&error).len() {
                for conversations in [true, false] {
                    let server = Scripted::start(vec![bare(&error).remove(form)]).await;
                    let mut settings = config(kind, &server.url);
                    settings.conversations = conversations;
                    let told = match run_to_end(&*adapter(&settings), Some(&thread())).await {
                        Ok(events) => match &events[..] {
                            [Ok(UpstreamEvent::Ended(ended))]
                                if ended.status == RunStatus::Failed =>
                            {
                                let message = &ended.error.as_ref().unwrap().message;
                                message
                                    .replace("the upstream reported that the run failed", "failed")
                            }
                            other => panic!("{kind:?} {code} {form}: {other:?}"),
                        },
                        Err(error) => error.to_string(),
                    };
                    assert_eq!(told, expected, "{kind:?} {form}");
                }
            }
        }
    }
}

#[tokio::test]
async fn error_amid_reply_fails_run_in_any_form() {
    let error = json!({"message": "No.", "type": null, "param": null, "code": "content_filter"});
    let forms = [
        format!("data: {}\n\n", json!({"error": error})),
        format!("data: {}\n\ndata: [DONE]\n\n", json!({"error": error})),
        format!("data: {error}\n\n"),
        json!({"error": error}).to_string(),
        format!("{:#}\n\n", json!({"error": error})),
    ];
    for kind in [UpstreamKind::Assistants, UpstreamKind::Responses] {
        for form in &forms {
            for background in [false, kind == UpstreamKind::Responses] {
                let text = begun(kind) + form;
                let server = Scripted::start(vec![sse(vec![Step::Bytes(text.into_bytes())])]).await;
                let mut settings = config(kind, &server.url);
                settings.background = background;
                let events = run_to_end(&*adapter(&settings), Some(&thread()))
                    .await
                    .unwrap();
                assert_eq!(
                    lines(&events),
                    ["accepted r_1", "text Hel", "ended failed Hel"],
                    "{form}"
                );
                let Some(Ok(UpstreamEvent::Ended(ended))) = events.last() else {
                    unreachable!()
                };
                assert_eq!(
                    ended.error.as_ref().unwrap().message,
                    "the upstream reported that the run failed (content_filter)"
                );
                assert_eq!(server.requests().len(), 1);
            }
        }
    }
}

#[tokio::test]
async fn slow_reader_causes_no_timeout() {
    let server = Scripted::start(vec![sse(vec![
        Step::Bytes(
            RESPONSES_TURN
                .split_inclusive("\n\n")
                .next()
                .unwrap()
                .into(),
        ),
        Step::Pause(Duration::from_millis(20)),
        Step::Bytes(RESPONSES_TURN.split_once("\n\n").unwrap().1.into()),
    ])])
    .await;
    let mut settings = config(UpstreamKind::Responses, &server.url);
    settings.call_timeout = Duration::from_millis(200);
    let upstream = adapter(&settings);
    let (assistant, metadata, thread) = (profile(), Metadata::default(), thread());
    let input = [InputMessage {
        id: MessageId::new(),
        content: vec![ContentPart::text("x")],
    }];
    let request = StartRun {
        run: RunId::new(),
        thread: Some(&thread),
        owner: &owner(),
        history: &[],
        assistant: &assistant,
        input: &input,
        metadata: &metadata,
    };
    let mut stream = upstream.start(request).await.unwrap();
    let mut events = vec![stream.next().await.unwrap()];
    tokio::time::sleep(Duration::from_millis(500)).await;
    events.extend(stream.collect::<Vec<_>>().await);
    assert_eq!(lines(&events), EXPECTED);
}

#[tokio::test]
async fn stream_without_terminal_event_is_broken() {
    for transcript in [ASSISTANTS_TURN, RESPONSES_TURN] {
        let kind = if transcript == ASSISTANTS_TURN {
            UpstreamKind::Assistants
        } else {
            UpstreamKind::Responses
        };
        let half = &transcript[..transcript.rfind("event:").unwrap() + 20];
        for end in [Step::Cut, Step::Bytes(Vec::new())] {
            let server = Scripted::start(vec![sse(vec![Step::Bytes(half.into()), end])]).await;
            let events = run_to_end(&*adapter(&config(kind, &server.url)), Some(&thread()))
                .await
                .unwrap();
            let lines = lines(&events);
            assert_eq!(lines[..3], EXPECTED[..3]);
            assert_eq!(lines[3..], ["error Broken { timeout: false }"]);
        }
    }
}

#[tokio::test]
async fn oversized_event_or_response_is_refused() {
    let huge = format!("data: {}\n\n", "x".repeat(100_000));
    let server = Scripted::start(vec![
        sse(vec![Step::Bytes(huge.into_bytes())]),
        json_answer(
            200,
            &[],
            &json!({"id": "t", "x": "x".repeat(100_000)}).to_string(),
        ),
    ])
    .await;
    let upstream = responses(&server);
    let error = run_to_end(&*upstream, Some(&thread())).await.unwrap_err();
    assert!(
        error.to_string().contains("longer than 65536 bytes"),
        "{error}"
    );
    let error = upstream.create_thread(&owner(), &[]).await.unwrap_err();
    assert!(
        error.to_string().contains("longer than 65536 bytes"),
        "{error}"
    );
}

#[tokio::test]
async fn refused_connection_differs_from_broken_call() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    drop(listener);
    let error = run_to_end(
        &*adapter(&config(UpstreamKind::Responses, &url)),
        Some(&thread()),
    )
    .await
    .unwrap_err();
    assert!(
        matches!(error, UpstreamError::Connect) && !error.is_ambiguous(),
        "{error:?}"
    );

    let server = Scripted::start(vec![Play::HangUp]).await;
    let error = run_to_end(&*responses(&server), Some(&thread()))
        .await
        .unwrap_err();
    assert!(
        matches!(error, UpstreamError::Broken { timeout: false }),
        "{error:?}"
    );
}

#[tokio::test]
async fn error_event_before_acceptance_fails_the_call() {
    let event = |data: &Value| {
        sse(vec![Step::Bytes(
            format!("event: error\ndata: {data}\n\n").into_bytes(),
        )])
    };
    let flat = json!({"type": "error", "code": "conversation_locked", "message": "m"});
    let nested = json!({"type": "error", "error": {"code": "rate_limit_exceeded", "message": "m"}});
    let server = Scripted::start(vec![event(&flat), event(&nested)]).await;
    let upstream = responses(&server);
    let error = run_to_end(&*upstream, Some(&thread())).await.unwrap_err();
    assert!(matches!(error, UpstreamError::Busy { .. }), "{error:?}");
    let error = run_to_end(&*upstream, Some(&thread())).await.unwrap_err();
    assert!(
        matches!(error, UpstreamError::Unavailable { status: 429, .. }),
        "{error:?}"
    );
}

#[tokio::test]
async fn chain_continues_from_last_completed_response() {
    let server = Scripted::start(vec![
        sse(vec![Step::Bytes(RESPONSES_TURN.into())]),
        sse(vec![Step::Bytes(
            RESPONSES_TURN.replace("\"completed\"", "\"failed\"").into(),
        )]),
    ])
    .await;
    let mut settings = config(UpstreamKind::Responses, &server.url);
    settings.conversations = false;
    let upstream = adapter(&settings);
    assert!(
        upstream
            .create_thread(&owner(), &[])
            .await
            .unwrap()
            .is_none()
    );
    let thread_of = |events: &[Result<UpstreamEvent, UpstreamError>]| match events.last() {
        Some(Ok(UpstreamEvent::Ended(ended))) => ended.thread.clone(),
        other => panic!("the run did not end: {other:?}"),
    };
    let first = thread_of(&run_to_end(&*upstream, None).await.unwrap()).unwrap();
    assert_eq!(first.as_str(), "r_1");
    assert_eq!(
        thread_of(&run_to_end(&*upstream, Some(&first)).await.unwrap()),
        None
    );
    let requests = server.requests();
    assert_eq!(requests[0].body.get("previous_response_id"), None);
    assert_eq!(requests[0].body.get("conversation"), None);
    assert_eq!(requests[1].body["previous_response_id"], "r_1");
}

/// Without CA certificates, an https upstream must be refused with that reason, and an http one
/// must work. The environment says where the certificates are, so the test starts itself as a
/// process without any.
#[test]
fn missing_ca_certificates_are_reported_for_https_only() {
    const MARK: &str = "THREADKEEPER_TEST_WITHOUT_CERTIFICATES";
    if std::env::var_os(MARK).is_some() {
        UpstreamClient::new(
            "plain",
            &config(UpstreamKind::Responses, "http://localhost/"),
        )
        .unwrap();
        let error = UpstreamClient::new(
            "tls",
            &config(UpstreamKind::Responses, "https://localhost/"),
        )
        .unwrap_err();
        assert!(error.to_string().contains("ca-certificates"), "{error}");
        return;
    }
    let empty = tempfile::tempdir().unwrap();
    let file = empty.path().join("none.pem");
    std::fs::write(&file, "").unwrap();
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "upstream::missing_ca_certificates_are_reported_for_https_only",
        ])
        .env(MARK, "1")
        .env("SSL_CERT_FILE", &file)
        .env("SSL_CERT_DIR", empty.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
}

//! The gateway reads replies tolerantly, and keeps all that the model said.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{Method, Response, Uri};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::support::TestDatabase;
use crate::support::gateway::{Gateway, joined, text, text_of};
use crate::support::scene::Protocol;

const PROTOCOLS: [Protocol; 3] = [Protocol::Assistants, Protocol::Responses, Protocol::Chain];
const SSE: &str = "text/event-stream";
const JSON: &str = "application/json";

/// An upstream whose runs answer with the given bodies, one after the other.
#[derive(Default)]
struct Script {
    /// Content type and body.
    runs: VecDeque<(&'static str, String)>,
    /// The messages, or items, that a thread lists.
    listed: Vec<Value>,
    /// The next run finds no thread.
    is_gone: bool,
    /// Method, path and body of each request.
    seen: Vec<(String, Value)>,
}

struct Upstream {
    protocol: Protocol,
    script: Arc<Mutex<Script>>,
    gateway: Gateway,
    _database: TestDatabase,
    _server: JoinSet<()>,
}

impl Upstream {
    async fn start(protocol: Protocol) -> Self {
        let script = Arc::new(Mutex::new(Script::default()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new()
            .fallback(answer)
            .with_state(Arc::clone(&script));
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, router).await.unwrap() });
        let database = TestDatabase::sqlite().await;
        let (kind, assistant) = match protocol {
            Protocol::Assistants => ("assistants", "assistant_id = \"asst_1\""),
            _ => ("responses", "model = \"m\""),
        };
        let conversations = if protocol == Protocol::Chain {
            "conversations = false"
        } else {
            ""
        };
        let config = format!(
            "[store]\nurl = {:?}\n[upstreams.u]\nkind = \"{kind}\"\nbase_url = \"{url}\"\n\
             lock_window = \"50ms\"\n{conversations}\n[assistants.default]\nupstream = \"u\"\n{assistant}\n",
            database.url()
        );
        Self {
            protocol,
            script,
            gateway: Gateway::start(&config).await,
            _database: database,
            _server: server,
        }
    }

    fn play(&self, kind: &'static str, body: impl Into<String>) {
        let mut script = self.script.lock().unwrap();
        script.runs.push_back((kind, body.into()));
    }

    /// Returns the reply of one message as a stream, and what lists show of it.
    fn reply(&self, messages: &[Value], usage: &Value) -> (String, Vec<Value>) {
        let mut events = vec![self.begun()];
        let mut whole = Vec::new();
        for (at, message) in messages.iter().enumerate() {
            for piece in message["text"].as_str().unwrap().split_inclusive(' ') {
                events.push(self.delta(at, &json!(piece).to_string()));
            }
            if self.protocol == Protocol::Assistants {
                let mut message = assistants_message(at, message);
                whole.push(message.clone());
                message["object"] = "thread.message".into();
                events.push(sse("thread.message.completed", &message.to_string()));
            } else {
                let item = item(at, message);
                let added =
                    json!({"type": "response.output_item.added", "output_index": at, "item": item});
                let at = events.len()
                    - message["text"]
                        .as_str()
                        .unwrap()
                        .split_inclusive(' ')
                        .count();
                events.insert(at, sse("", &added.to_string()));
                whole.push(item);
            }
        }
        events.push(self.ended("completed", &whole, usage));
        (events.concat(), whole)
    }

    fn begun(&self) -> String {
        match self.protocol {
            Protocol::Assistants => sse(
                "thread.run.created",
                &json!({"id": "run_1", "object": "thread.run", "status": "queued"}).to_string(),
            ),
            _ => sse(
                "",
                &json!({"type": "response.created", "response": {"id": "resp_1", "status": "in_progress"}}).to_string(),
            ),
        }
    }

    /// Returns a delta of a message. `text` is a JSON string.
    fn delta(&self, message: usize, text: &str) -> String {
        match self.protocol {
            Protocol::Assistants => sse(
                "thread.message.delta",
                &format!(
                    r#"{{"id": "msg_{message}", "delta": {{"content": [{{"index": 0, "type": "text", "text": {{"value": {text}}}}}]}}}}"#
                ),
            ),
            _ => sse(
                "",
                &format!(
                    r#"{{"type": "response.output_text.delta", "output_index": {message}, "content_index": 0, "delta": {text}}}"#
                ),
            ),
        }
    }

    fn ended(&self, status: &str, output: &[Value], usage: &Value) -> String {
        if self.protocol == Protocol::Assistants {
            let run =
                json!({"id": "run_1", "object": "thread.run", "status": status, "usage": usage});
            return sse(&format!("thread.run.{status}"), &run.to_string());
        }
        let response = json!({"id": "resp_1", "object": "response", "status": status, "output": output,
                              "usage": usage});
        let event = json!({"type": format!("response.{status}"), "response": response});
        sse("", &event.to_string())
    }

    async fn say(&self, user: &str) -> Value {
        self.gateway.say(&scope(user), "hello").await
    }
}

async fn answer(
    State(script): State<Arc<Mutex<Script>>>,
    method: Method,
    uri: Uri,
    body: Bytes,
) -> Response<String> {
    let mut script = script.lock().unwrap();
    let path = uri.path().to_owned();
    let body = serde_json::from_slice(&body).unwrap_or_default();
    script.seen.push((format!("{method} {path}"), body));
    let starts_run = path == "/responses" || path.ends_with("/runs");
    let json = |body: Value| (200, JSON, body.to_string());
    let (status, kind, body) = match method {
        Method::POST if starts_run && std::mem::take(&mut script.is_gone) => {
            let error = json!({"error": {"message": "No thread found with id 'conv_1'.", "code": null,
                                         "type": "invalid_request_error"}});
            (404, JSON, error.to_string())
        }
        Method::POST if starts_run => {
            let (kind, body) = script.runs.pop_front().expect("no more runs in the script");
            (200, kind, body)
        }
        Method::POST => json(json!({"id": "conv_1"})),
        _ if path.ends_with("/messages") || path.ends_with("/items") => {
            json(json!({"data": script.listed, "has_more": false}))
        }
        _ if path.ends_with("/runs/run_1") => {
            json(json!({"id": "run_1", "object": "thread.run", "status": "completed"}))
        }
        _ => (
            404,
            JSON,
            json!({"error": {"message": "no such thing"}}).to_string(),
        ),
    };
    let answer = Response::builder().status(status);
    answer.header("content-type", kind).body(body).unwrap()
}

fn sse(name: &str, data: &str) -> String {
    if name.is_empty() {
        format!("data: {data}\n\n")
    } else {
        format!("event: {name}\ndata: {data}\n\n")
    }
}

fn item(at: usize, message: &Value) -> Value {
    let mut item = json!({"type": "message", "id": format!("msg_{at}"), "role": "assistant", "status": "completed",
        "content": [{"type": "output_text", "text": message["text"], "annotations": message["annotations"]}]});
    if message["phase"].is_string() {
        item["phase"] = message["phase"].clone();
    }
    item
}

fn assistants_message(at: usize, message: &Value) -> Value {
    json!({"id": format!("msg_{at}"), "role": "assistant", "run_id": "run_1", "status": "completed",
        "content": [{"type": "text", "text": {"value": message["text"], "annotations": message["annotations"]}}]})
}

fn scope(user: &str) -> String {
    format!("/v1/users/{user}")
}

async fn transcript(gateway: &Gateway, user: &str) -> Vec<Value> {
    let path = format!("{}/messages?order=asc", scope(user));
    let page = gateway.get(&path).await.ok();
    page["data"].as_array().unwrap().clone()
}

/// Half of a character in a delta, events that nobody can read, ends that come twice, and answers
/// that are no stream: none of them loses a reply that the gateway received.
#[tokio::test(flavor = "multi_thread")]
async fn readable_reply_survives_unreadable_surroundings() {
    for protocol in PROTOCOLS {
        let upstream = Upstream::start(protocol).await;
        let is_assistants = protocol == Protocol::Assistants;
        let nice = [json!({"text": "Nice 😀!", "annotations": []})];
        let (_, whole) = upstream.reply(&nice, &Value::Null);
        let end = |output: &[Value]| upstream.ended("completed", output, &Value::Null);
        let told = if is_assistants {
            sse("thread.message.completed", &whole[0].to_string()) + &end(&[])
        } else {
            end(&whole)
        };
        let begun = upstream.begun();
        let cut = upstream.delta(0, r#""Nice \ud83d""#) + &upstream.delta(0, r#""\ude00!""#);
        let name = if is_assistants {
            "thread.message.delta"
        } else {
            "response.output_text.delta"
        };
        let unreadable = sse(name, r#"{"type": "response.output_text.delta", "delta": "#);
        let lone = upstream.delta(0, r#""Nice \ud83d""#) + &upstream.delta(0, r#"" ok\udc00""#);
        let mut streams = vec![
            ("cut character", format!("{begun}{cut}{told}"), "Nice 😀!"),
            (
                "no whole text",
                format!("{begun}{cut}{}", end(&[])),
                "Nice 😀!",
            ),
            (
                "lone halves",
                format!("{begun}{lone}{}", end(&[])),
                "Nice \u{fffd} ok\u{fffd}",
            ),
            (
                "half in the whole text",
                format!("{begun}{}", told.replace("😀", "\\ud83d")),
                "Nice \u{fffd}!",
            ),
            ("two ends", format!("{begun}{cut}{told}{told}"), "Nice 😀!"),
            (
                "gap",
                format!("{begun}{}{unreadable}{told}", upstream.delta(0, r#""Ni""#)),
                "Nice 😀!",
            ),
        ];
        if !is_assistants {
            let lines = format!("{begun}{cut}{told}")
                .replace("data: ", "")
                .replace("\n\n", "\n");
            streams.push(("lines of JSON", lines, "Nice 😀!"));
        }
        for (at, (what, body, expected)) in streams.into_iter().enumerate() {
            upstream.play(SSE, body);
            let user = format!("user-{at}");
            let events = upstream
                .gateway
                .stream(&scope(&user), "hello")
                .await
                .rest()
                .await;
            assert_eq!(
                events.last().unwrap().name,
                "run.completed",
                "{protocol:?}, {what}: {events:#?}"
            );
            assert_eq!(text_of(&events), expected, "{protocol:?}, {what}");
            let kept = transcript(&upstream.gateway, &user).await;
            assert_eq!(text(&kept[1]), expected, "{protocol:?}, {what}");
        }

        // A whole object in the place of a stream.
        let object = if is_assistants {
            json!({"id": "run_1", "object": "thread.run", "status": "queued"})
        } else {
            json!({"id": "resp_1", "object": "response", "status": "completed", "output": whole})
        };
        upstream.script.lock().unwrap().listed = whole.clone();
        for kind in [JSON, SSE] {
            upstream.play(kind, object.to_string());
            let answer = upstream.say(&format!("object-{}", kind.len())).await;
            assert_eq!(text(&answer["message"]), "Nice 😀!", "{protocol:?}, {kind}");
        }
    }
}

/// A gap that nothing closes makes no completed reply: the gateway looks for the reply, or fails
/// the run. So does a completed run that said nothing.
#[tokio::test(flavor = "multi_thread")]
async fn reply_with_hole_and_empty_reply_are_never_completed() {
    for protocol in PROTOCOLS {
        let upstream = Upstream::start(protocol).await;
        let user = scope("alice");
        let message = json!({"content": "hello"});
        let unreadable = sse("", "{\"type\": ");
        let hole = format!(
            "{}{}{unreadable}{}",
            upstream.begun(),
            upstream.delta(0, "\"Ni\""),
            upstream.ended("completed", &[], &Value::Null)
        );
        upstream.play(SSE, hole);
        let answer = upstream
            .gateway
            .post(&format!("{user}/messages"), &message)
            .await;
        assert_eq!(
            answer.problem(),
            (502, "upstream-error"),
            "{protocol:?}: {:#}",
            answer.body
        );

        let search = json!({"type": "web_search_call", "id": "ws_1", "status": "completed"});
        let empty = format!(
            "{}{}",
            upstream.begun(),
            upstream.ended("completed", &[search], &Value::Null)
        );
        upstream.play(SSE, empty);
        let answer = upstream
            .gateway
            .post(&format!("{user}/messages"), &message)
            .await;
        assert_eq!(
            answer.problem(),
            (502, "upstream-error"),
            "{protocol:?}: {:#}",
            answer.body
        );
        assert_eq!(answer.body["code"], "upstream_failed");
        let detail = answer.body["detail"].as_str().unwrap();
        let instead = if protocol == Protocol::Assistants {
            "no items"
        } else {
            "`web_search_call`"
        };
        assert!(detail.contains(instead), "{detail}");

        let refusal = if protocol == Protocol::Assistants {
            let message = json!({"id": "msg_0", "role": "assistant", "content": [
                {"type": "refusal", "refusal": "no"}, {"type": "image_file", "image_file": {"file_id": "file_1"}}]});
            sse("thread.message.completed", &message.to_string())
                + &upstream.ended("completed", &[], &Value::Null)
        } else {
            let message = json!({"type": "message", "id": "msg_0", "role": "assistant",
                "content": [{"type": "refusal", "refusal": "no"}]});
            let image = json!({"type": "image_generation_call", "id": "ig_1", "status": "completed",
                "result": "aGVsbG8=".repeat(100)});
            upstream.ended("completed", &[message, image], &Value::Null)
        };
        upstream.play(SSE, upstream.begun() + &refusal);
        let answer = upstream.say("bob").await;
        let picture = if protocol == Protocol::Assistants {
            json!({"type": "image_file", "image_file": {"file_id": "file_1"}})
        } else {
            json!({"type": "generated_image", "generated_image": {"id": "ig_1"}})
        };
        assert_eq!(
            answer["message"]["content"],
            json!([{"type": "refusal", "refusal": "no"}, picture])
        );
    }
}

/// Two messages of one run stay apart, with their phases and annotations, in the stream, in the
/// answer, in the transcript, in a second reading, and in a thread that is built again.
#[tokio::test(flavor = "multi_thread")]
async fn messages_of_one_run_stay_apart_with_phase_and_annotations() {
    for protocol in PROTOCOLS {
        let upstream = Upstream::start(protocol).await;
        let is_assistants = protocol == Protocol::Assistants;
        let citation =
            json!({"type": "url_citation", "url": "https://example.org", "start_index": 0});
        let messages = [
            json!({"text": "I'll check it.", "phase": "commentary", "annotations": []}),
            json!({"text": "It ships 😀 on Monday.", "phase": "final_answer", "annotations": [citation]}),
        ];
        let (input, output) = if is_assistants {
            ("prompt", "completion")
        } else {
            ("input", "output")
        };
        let usage = json!({format!("{input}_tokens"): 9, format!("{output}_tokens"): 5, "total_tokens": 14,
            format!("{input}_tokens_details"): {"cached_tokens": 4},
            format!("{output}_tokens_details"): {"reasoning_tokens": 3}});
        let mut expected = json!([
            {"type": "text", "text": "I'll check it.", "phase": "commentary"},
            {"type": "text", "text": "It ships 😀 on Monday.", "annotations": [citation], "message": 1,
             "phase": "final_answer"},
        ]);
        let mut deltas = [
            json!({"text": "I'll check it.", "phase": "commentary"}),
            json!({"text": "It ships 😀 on Monday.", "message": 1, "phase": "final_answer"}),
        ];
        if is_assistants {
            for part in expected
                .as_array_mut()
                .unwrap()
                .iter_mut()
                .chain(&mut deltas)
            {
                part.as_object_mut().unwrap().remove("phase");
            }
        }
        let (body, _) = upstream.reply(&messages, &usage);
        upstream.play(SSE, body.clone());
        let live = upstream
            .gateway
            .stream(&scope("alice"), "hello")
            .await
            .rest()
            .await;
        let told: Vec<_> = joined(&live)
            .into_iter()
            .filter(|event| event.name == "message.delta")
            .collect();
        assert_eq!(
            told.iter().map(|event| &event.data).collect::<Vec<_>>(),
            deltas.iter().collect::<Vec<_>>()
        );
        let ended = &live.last().unwrap().data["run"];
        assert_eq!(
            ended["usage"],
            json!({"input_tokens": 9, "output_tokens": 5, "total_tokens": 14,
            "cached_input_tokens": 4, "reasoning_tokens": 3})
        );
        assert_eq!(live[live.len() - 2].data["message"]["content"], expected);
        assert_eq!(
            transcript(&upstream.gateway, "alice").await[1]["content"],
            expected
        );
        upstream.play(SSE, body.clone());
        assert_eq!(upstream.say("bob").await["message"]["content"], expected);

        // A second reading tells the same, from any place.
        let run = ended["id"].as_str().unwrap();
        let again = upstream
            .gateway
            .events(&scope("alice"), run, None)
            .await
            .rest()
            .await;
        assert_eq!(joined(&again), joined(&live));
        for (at, event) in live.iter().enumerate().take(live.len() - 1) {
            let rest = upstream
                .gateway
                .events(&scope("alice"), run, Some(&event.id))
                .await
                .rest()
                .await;
            assert_eq!(joined(&rest), joined(&live[at + 1..]), "after {}", event.id);
        }

        // The upstream loses the thread, and the next run rebuilds it.
        let before = upstream.script.lock().unwrap().seen.len();
        upstream.script.lock().unwrap().is_gone = true;
        upstream.play(SSE, body);
        upstream.say("alice").await;
        let seen = upstream.script.lock().unwrap().seen.split_off(before);
        let sent: Vec<Value> = seen
            .into_iter()
            .flat_map(|(_, body)| ["messages", "items", "input"].map(|list| body[list].clone()))
            .filter_map(|list| list.as_array().cloned())
            .rfind(|list| list.iter().any(|it| it["role"] == "assistant"))
            .unwrap();
        let sent: Vec<Value> = sent
            .into_iter()
            .filter(|it| it["role"] == "assistant")
            .map(|it| json!([it["content"], it["phase"]]))
            .collect();
        let phase = |phase: &str| {
            if is_assistants {
                Value::Null
            } else {
                phase.into()
            }
        };
        assert_eq!(
            sent,
            [
                json!(["I'll check it.", phase("commentary")]),
                json!(["It ships 😀 on Monday.", phase("final_answer")]),
            ]
        );

        // Only replies have these fields.
        for part in expected
            .as_array()
            .unwrap()
            .iter()
            .filter(|part| part.as_object().unwrap().len() > 2)
        {
            let message = json!({"content": [part]});
            let refused = upstream
                .gateway
                .post(&format!("{}/messages", scope("carol")), &message)
                .await;
            assert_eq!(
                refused.problem(),
                (422, "invalid-request"),
                "{:#}",
                refused.body
            );
        }
    }
}

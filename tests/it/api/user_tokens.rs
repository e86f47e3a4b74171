//! Which assistants a user's own token may use, and what a refused caller and the log learn.

use reqwest::Method;
use serde_json::{Value, json};

use super::access::{ISSUER, SECRET, token};
use crate::support::gateway::{Answer, Gateway, text};
use crate::support::scene::{Backend, Protocol, Scene};

/// Further assistants. The scene's default assistant is open to user tokens by name only.
const ASSISTANTS: &str = r#"
[auth.keys.backend]
key = "backend-of-the-tenant-acme"
tenant = "acme"
scope = "chat"
[assistants.internal]
upstream = "simulated"
model = "test-model"
client_tools = true
"#;
const SUPPORT: &str = r#"
[assistants.support]
upstream = "simulated"
model = "test-model"
user_selectable = true
client_tools = true
"#;
const BACKEND: &str = "backend-of-the-tenant-acme";
const MESSAGES: &str = "/v1/users/alice/messages";

fn alice() -> String {
    token(SECRET, &json!({"sub": "alice"}))
}

async fn say(gateway: &Gateway, bearer: &str, body: &Value) -> Answer {
    gateway
        .send(
            gateway
                .request(Method::POST, MESSAGES)
                .bearer_auth(bearer)
                .json(body),
        )
        .await
}

fn outputs_path(asked: &Value) -> String {
    format!(
        "/v1/users/alice/runs/{}/tool_outputs",
        asked["run"]["id"].as_str().unwrap()
    )
}

async fn give(gateway: &Gateway, bearer: &str, asked: &Value, key: Option<&str>) -> Answer {
    let calls = asked["run"]["required_action"]["tool_calls"]
        .as_array()
        .unwrap();
    let outputs: Value = calls
        .iter()
        .map(|call| json!({"tool_call_id": call["id"], "output": "4 °C"}))
        .collect();
    let request = gateway
        .request(Method::POST, &outputs_path(asked))
        .bearer_auth(bearer);
    let request = key.iter().fold(request, |request, key| {
        request.header("idempotency-key", *key)
    });
    gateway
        .send(request.json(&json!({"tool_outputs": outputs})))
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn user_token_selects_only_user_selectable_assistants() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let gateway = scene
        .gateway_with(&format!("{ASSISTANTS}{SUPPORT}{ISSUER}"))
        .await;
    let with = |assistant: &str| json!({"content": "hello", "assistant": assistant});
    say(&gateway, &alice(), &json!({"content": "hello"}))
        .await
        .ok();
    for open in ["default", "support"] {
        assert_eq!(
            say(&gateway, &alice(), &with(open)).await.ok()["run"]["assistant"],
            open
        );
    }
    let told = |answer: &Answer| answer.body["detail"].as_str().unwrap().to_owned();
    let closed = say(&gateway, &alice(), &with("internal")).await;
    let unknown = say(&gateway, &alice(), &with("nonsense")).await;
    assert_eq!(closed.problem(), (422, "invalid-request"));
    assert_eq!(
        (unknown.problem(), told(&unknown)),
        (closed.problem(), told(&closed))
    );
    assert!(
        told(&closed).ends_with("there are: default, support"),
        "{}",
        told(&closed)
    );

    let admin = token(SECRET, &json!({"sub": "eve", "roles": ["chat-admin"]}));
    for trusted in [BACKEND, &admin] {
        say(&gateway, trusted, &with("internal")).await.ok();
        let unknown = say(&gateway, trusted, &with("nonsense")).await;
        assert!(
            told(&unknown).ends_with("there are: default, internal, support"),
            "{}",
            told(&unknown)
        );
    }
}

/// Returns the outputs of the calls in the answer's message.
fn outputs_in(answer: &Value) -> Vec<Value> {
    let parts = answer["message"]["content"].as_array().unwrap().iter();
    let calls = parts.filter(|part| part["type"] == "tool_call");
    calls
        .map(|part| part["tool_call"]["output"].clone())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn user_token_answers_tool_calls_only_when_allowed() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let gateway = scene
        .gateway_with(&format!("{ASSISTANTS}{SUPPORT}{ISSUER}"))
        .await;
    let ask = |assistant: &str| json!({"content": "weather? [[sim: tool=get_weather]]", "assistant": assistant});
    let asked = say(&gateway, &alice(), &ask("default")).await.ok();
    assert_eq!(
        asked["run"]["status"], "requires_action",
        "the caller sees that the run waits"
    );
    for key in [None, Some("1")] {
        let refused = give(&gateway, &alice(), &asked, key).await;
        assert_eq!(refused.problem(), (403, "forbidden"));
        assert!(
            !refused.headers.contains_key("www-authenticate"),
            "another scope would not help"
        );
        let detail = refused.body["detail"].as_str().unwrap();
        assert!(
            detail.contains("API key") && detail.contains("client_tools"),
            "{detail}"
        );
    }
    let answered = give(&gateway, BACKEND, &asked, Some("1")).await.ok();
    assert!(text(&answered["message"]).contains("4 °C"), "{answered:#}");
    assert_eq!(outputs_in(&answered), [json!("4 °C")]);
    for key in [None, Some("1")] {
        let repeated = give(&gateway, &alice(), &asked, key).await;
        assert_eq!(
            repeated.problem(),
            (403, "forbidden"),
            "the backend cannot send its outputs twice"
        );
    }
    let nobodys = asked["run"]["id"]
        .as_str()
        .unwrap()
        .replace("run_", "run_0");
    let mut unknown = asked.clone();
    unknown["run"]["id"] = nobodys[..nobodys.len() - 1].into();
    assert_eq!(
        give(&gateway, &alice(), &unknown, None).await.problem(),
        (404, "not-found")
    );

    // An output was made for the model: its user reads the call alone, everywhere.
    let run = format!(
        "/v1/users/alice/runs/{}",
        asked["run"]["id"].as_str().unwrap()
    );
    for path in [
        MESSAGES,
        &run,
        &format!("{run}/events"),
        "/v1/users/alice/export",
    ] {
        for (bearer, output) in [
            (BACKEND, r#""output":"4 °C""#),
            (&alice(), r#""output":null"#),
        ] {
            let request = gateway.request(Method::GET, path).bearer_auth(bearer);
            let read = request.send().await.unwrap().text().await.unwrap();
            let others = read.matches(r#""output":"#).count() - read.matches(output).count();
            assert!(read.contains(output) && others == 0, "{path}: {read}");
        }
    }

    let own = say(&gateway, &alice(), &ask("support")).await.ok();
    let seen = give(&gateway, &alice(), &own, Some("2")).await.ok();
    assert_eq!(outputs_in(&seen), [Value::Null]);
    let again = give(&gateway, &alice(), &own, Some("2")).await;
    assert_eq!(again.headers["idempotent-replayed"], "true", "{again:?}");
    // The setting of the assistant decides, not the right to choose it.
    let internal = say(&gateway, BACKEND, &ask("internal")).await.ok();
    give(&gateway, &alice(), &internal, None).await.ok();

    // If the assistant is no longer configured, users may not answer.
    let gateway = {
        let mut old = gateway;
        old.terminate();
        old.exit().await;
        scene.gateway_with(&format!("{ASSISTANTS}{ISSUER}")).await
    };
    for key in [None, Some("2")] {
        assert_eq!(
            give(&gateway, &alice(), &own, key).await.problem(),
            (403, "forbidden")
        );
    }
    assert_eq!(
        give(&gateway, BACKEND, &own, None).await.problem(),
        (409, "run-not-waiting")
    );
}

/// RFC 6750, section 3.
#[tokio::test(flavor = "multi_thread")]
async fn authentication_refusal_reason_reaches_caller_and_log() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let gateway = scene.gateway_with(&format!("{ASSISTANTS}{ISSUER}")).await;
    let good = |claims: Value| token(SECRET, &claims);
    for (bearer, why) in [
        (
            good(json!({"sub": "alice", "exp": 1_000_000_000})),
            "it has expired",
        ),
        (
            good(json!({"sub": "alice", "nbf": 4_000_000_000_i64})),
            "it is not valid yet",
        ),
        (
            good(json!({"sub": "alice", "iss": "https://evil.example/"})),
            "its issuer is missing or another one",
        ),
        (
            good(json!({"sub": "alice", "aud": "other"})),
            "its audience is missing or another one",
        ),
        (
            token(
                "another-secret-that-nobody-shares-with-us",
                &json!({"sub": "alice"}),
            ),
            "its signature is wrong",
        ),
        (
            "no.json.token".to_owned(),
            "it is not a JSON web token with a known algorithm",
        ),
        (
            "tk_0123456789ab_unknown".to_owned(),
            "there is no such API key",
        ),
    ] {
        let request = gateway
            .request(Method::GET, "/v1/users/alice/threads")
            .bearer_auth(&bearer);
        let refused = gateway.send(request).await;
        assert_eq!(refused.problem(), (401, "unauthenticated"), "{why}");
        let challenge = format!("Bearer error=\"invalid_token\", error_description=\"{why}\"");
        assert_eq!(refused.headers["www-authenticate"], challenge);
        assert!(
            refused.body["detail"].as_str().unwrap().contains(why),
            "{:#}",
            refused.body
        );
        let id = refused.body["request_id"].as_str().unwrap();
        gateway.logged(|line| line.contains(id)).await;
        // The request's own line has the reason, so refusals add no further lines.
        let lines: Vec<_> = gateway
            .logs()
            .into_iter()
            .filter(|line| line.contains(id))
            .collect();
        assert!(
            lines.len() == 1 && lines[0].contains("INFO") && lines[0].contains(why),
            "{lines:#?}"
        );
        assert!(!lines[0].contains(&bearer), "{lines:#?}");
    }
    let none = gateway.get("/v1/users/alice/threads").await;
    assert_eq!(
        (
            none.problem(),
            none.headers["www-authenticate"].to_str().unwrap()
        ),
        ((401, "unauthenticated"), "Bearer")
    );
    let request = gateway
        .request(Method::GET, "/v1/threads")
        .bearer_auth(BACKEND);
    let weak = gateway.send(request).await;
    assert_eq!(weak.problem(), (403, "forbidden"));
    assert_eq!(
        weak.headers["www-authenticate"],
        "Bearer error=\"insufficient_scope\", scope=\"admin\""
    );
    // A wider scope does not open another user's threads.
    let request = gateway
        .request(Method::GET, "/v1/users/bob/threads")
        .bearer_auth(alice());
    let other = gateway.send(request).await;
    assert_eq!(
        (other.problem(), other.headers.get("www-authenticate")),
        ((403, "forbidden"), None)
    );
}

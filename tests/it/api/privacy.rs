//! Keys of users, tenants, sessions and topics. None leaves the gateway in clear unless the
//! configuration allows it.

use std::collections::BTreeSet;

use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use threadkeeper::simulator::Recorded;

use crate::support::gateway::Gateway;
use crate::support::scene::{Backend, Protocol, Scene, on_each_protocol};
use crate::support::secret_scan::{Needles, planted};

on_each_protocol!(names_are_never_logged_and_sent_only_when_configured);

const SETTINGS: &str = r#"
[log]
filter = "threadkeeper=trace,debug"
[runs]
settle_timeout = "1s"
max_retries = 1
[auth.jwt]
issuer = "https://login.example/"
audience = ["chat"]
algorithms = ["HS256"]
secret = "a-secret-that-is-shared-with-the-issuer"
tenant_claim = "org"
"#;
const UPSTREAM: &str = "lock_window = \"100ms\"\n";
/// Characters of a key that are encoded differently in different places.
const ODD: &str = "|é\"\\+%&/ ";

/// One key of each kind, which the search finds in any encoding.
struct Names {
    needles: Needles,
    token: String,
}

fn name(kind: &str) -> String {
    format!("{}{ODD}", planted(&format!("privacy: {kind}")))
}

impl Names {
    fn new() -> Self {
        let mut needles = Needles::default();
        for kind in ["tenant", "user", "session", "topic"] {
            needles.add(kind, &planted(&format!("privacy: {kind}")), 8);
        }
        let claims = json!({
            "iss": "https://login.example/", "aud": "chat", "exp": 4_102_444_800_i64,
            "sub": name("user"), "org": name("tenant"),
        });
        let key =
            jsonwebtoken::EncodingKey::from_secret(b"a-secret-that-is-shared-with-the-issuer");
        let token = jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).unwrap();
        Self { needles, token }
    }

    fn ask(&self, gateway: &Gateway, method: Method, path: &str) -> RequestBuilder {
        gateway.request(method, path).bearer_auth(&self.token)
    }

    async fn post(&self, gateway: &Gateway, path: &str, body: Value) -> Value {
        gateway
            .send(self.ask(gateway, Method::POST, path).json(&body))
            .await
            .body
    }

    fn assert_not_logged(&self, gateway: &Gateway) {
        let lines = gateway.logs();
        assert!(
            lines.iter().any(|line| line.contains("run ended")),
            "the gateway logged nothing"
        );
        for line in lines {
            assert_eq!(
                self.needles.find(line.as_bytes()),
                None,
                "a key is logged in clear"
            );
        }
    }
}

fn encoded(name: &str) -> String {
    name.bytes()
        .flat_map(|byte| format!("%{byte:02X}").into_bytes())
        .map(char::from)
        .collect()
}

fn user() -> String {
    format!("/v1/users/{}", encoded(&name("user")))
}

fn scopes() -> [String; 3] {
    let (session, topic) = (encoded(&name("session")), encoded(&name("topic")));
    [
        user(),
        format!("{}/sessions/{session}", user()),
        format!("{}/topics/{topic}", user()),
    ]
}

/// Returns how these requests name a tenant, user, session or topic.
fn tags(requests: &[Recorded], kind: &str) -> BTreeSet<String> {
    let of = |body: &Value| {
        body["metadata"][format!("threadkeeper_{kind}")]
            .as_str()
            .map(str::to_owned)
    };
    requests
        .iter()
        .filter_map(|request| of(&request.body))
        .collect()
}

/// Returns the requests to the upstream after the first `known` ones.
fn after(scene: &Scene, known: usize) -> Vec<Recorded> {
    let mut recorded = scene.simulator.recorded();
    let new = usize::try_from(scene.simulator.stats().requests).unwrap() - known;
    recorded.split_off(
        recorded
            .len()
            .checked_sub(new)
            .expect("the simulator still has all new requests"),
    )
}

/// Starts a gateway at which users answer their runs' function calls.
async fn start(scene: &Scene, upstream: &str) -> Gateway {
    // The table of the assistant comes last.
    Gateway::start(&format!(
        "{}client_tools = true\n",
        scene.config_with(SETTINGS, upstream)
    ))
    .await
}

async fn names_are_never_logged_and_sent_only_when_configured(scene: Scene) {
    let names = Names::new();
    let mut gateway = start(&scene, UPSTREAM).await;
    let mut requests = Vec::new();
    for scope in scopes() {
        converse(&scene, &gateway, &names, &scope).await;
        requests.extend(after(&scene, requests.len()));
    }
    let delete = names.ask(&gateway, Method::DELETE, &user());
    gateway.send(delete.header("prefer", "wait=20")).await.ok();
    gateway.terminate();
    gateway.exit().await;
    names.assert_not_logged(&gateway);
    requests.extend(after(&scene, requests.len()));
    assert!(
        requests.len() > 20,
        "{} requests show too little",
        requests.len()
    );
    for request in &requests {
        let found = names
            .needles
            .find(format!("{request:?} {}", request.body).as_bytes());
        assert_eq!(
            found, None,
            "a key is sent upstream in clear: {} {}",
            request.method, request.path
        );
    }

    // A fingerprint stands for the key. It is always the same, and the command finds it by the
    // key.
    for kind in ["session", "topic"] {
        for (kind, fingerprint) in printed_fingerprints(&scene, kind) {
            assert_eq!(
                tags(&requests, &kind),
                BTreeSet::from([fingerprint.clone()]),
                "{kind}"
            );
            let logs = gateway.logs();
            let is_logged = |text: &str| logs.iter().any(|line| line.contains(text));
            assert!(is_logged(&fingerprint) || kind == "tenant", "{kind}");
            assert_eq!(is_logged(&format!("jwt:{fingerprint}")), kind == "user");
        }
    }

    let gateway = start(&scene, &format!("{UPSTREAM}send_identifiers = true\n")).await;
    for scope in scopes() {
        names
            .post(
                &gateway,
                &format!("{scope}/messages"),
                json!({"content": "hello"}),
            )
            .await;
    }
    names.assert_not_logged(&gateway);
    for kind in ["tenant", "user", "session", "topic"] {
        let sent = tags(&after(&scene, requests.len()), kind);
        assert_eq!(sent, BTreeSet::from([name(kind)]), "{kind}");
    }
}

/// Returns the fingerprints that the command prints for a session or a topic of the user.
fn printed_fingerprints(scene: &Scene, kind: &str) -> Vec<(String, String)> {
    let folder = tempfile::TempDir::new().unwrap();
    let file = folder.path().join("gateway.toml");
    std::fs::write(&file, scene.config(SETTINGS)).unwrap();
    let mut command = Gateway::command(&[
        "fingerprint",
        "--tenant",
        &name("tenant"),
        "--user",
        &name("user"),
    ]);
    let output = command
        .args([&format!("--{kind}"), &name(kind)])
        .arg("--config")
        .arg(&file)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let lines = String::from_utf8(output.stdout).unwrap();
    let told: Vec<_> = lines
        .lines()
        .map(|line| {
            line.split_once(' ')
                .expect("a line has a kind and a fingerprint")
        })
        .collect();
    assert_eq!(
        told.iter().map(|(kind, _)| *kind).collect::<Vec<_>>(),
        ["tenant", "user", kind]
    );
    told.iter()
        .map(|(kind, it)| ((*kind).to_owned(), it.trim().to_owned()))
        .collect()
}

/// Replicas of one database have the same fingerprints, later ones too. Other databases have
/// others.
#[tokio::test(flavor = "multi_thread")]
async fn fingerprints_are_stable_per_database() {
    let mut seen = Vec::new();
    for protocol in [Protocol::Assistants, Protocol::Chain] {
        let scene = Scene::new(protocol, Backend::Postgres).await;
        let (one, other) = tokio::join!(scene.gateway(), scene.gateway());
        one.say("/v1/users/alice", "hello").await;
        other.say("/v1/users/alice/sessions/s", "hello").await;
        let next = scene.gateway_instead(one, "").await;
        next.say("/v1/users/alice/sessions/t", "hello").await;
        let requests = scene.simulator.recorded();
        assert_eq!(tags(&requests, "session").len(), 2);
        let users = tags(&requests, "user");
        assert_eq!(users.len(), 1, "{users:?}");
        seen.push((users, tags(&requests, "tenant")));
    }
    assert_ne!(seen[0].0, seen[1].0);
    assert_ne!(seen[0].1, seen[1].1);
}

/// Runs a conversation with all events that cause upstream requests.
async fn converse(scene: &Scene, gateway: &Gateway, names: &Names, scope: &str) {
    let messages = format!("{scope}/messages");
    let say = |text: &str| names.post(gateway, &messages, json!({"content": text}));
    let first = say("hello").await;
    assert_eq!(first["run"]["status"], "completed", "{first:#}");
    let asked = say("look [[sim: tool=get_weather]]").await;
    let run = format!("{scope}/runs/{}", asked["run"]["id"].as_str().unwrap());
    let call = &asked["run"]["required_action"]["tool_calls"][0]["id"];
    let outputs = json!({"tool_outputs": [{"tool_call_id": call, "output": "4"}]});
    let answered = names
        .post(gateway, &format!("{run}/tool_outputs"), outputs)
        .await;
    assert_eq!(answered["run"]["status"], "completed", "{answered:#}");
    let silent = names
        .ask(gateway, Method::POST, &messages)
        .header("prefer", "respond-async");
    gateway
        .send(silent.json(&json!({"content": "wait [[sim: silent_after=2]]"})))
        .await;
    names
        .post(gateway, &format!("{scope}/thread/cancel"), json!({}))
        .await;
    for failing in ["status=500", "cut=3", "fail", "no_terminal"] {
        say(&format!("fail [[sim: {failing}]]")).await;
    }
    if scene.protocol == Protocol::Chain {
        scene.fault("start", "status=404", 1);
    } else {
        for thread in scene.upstream_threads() {
            scene.delete_thread(&thread).await;
        }
    }
    say("is it gone?").await;
    names
        .post(gateway, &format!("{scope}/thread/rollover"), json!({}))
        .await;
    let last = say("anew").await;
    assert_eq!(last["run"]["status"], "completed", "{last:#}");
    let verify = format!("{scope}/thread?verify=upstream");
    gateway
        .send(names.ask(gateway, Method::GET, &verify))
        .await
        .ok();
    let delete = names.ask(
        gateway,
        Method::DELETE,
        &format!("{scope}/thread?archive=true"),
    );
    gateway.send(delete.header("prefer", "wait=20")).await.ok();
}

//! Access to every route: without a key, with too little access, and as another tenant.

use std::collections::BTreeSet;
use std::process::{Command, Output};

use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use threadkeeper::api::{Route, routes};
use threadkeeper::domain::{Access, DeletionId, MessageId, RunId, ThreadId};

use crate::support::gateway::{Answer, Gateway, PATIENCE};
use crate::support::scene::{Backend, Protocol, Scene};

/// Keys of each access level, of the tenant `default` and of the tenant `other`.
const KEYS: &str = r#"
[auth.keys.reader]
key = "reader-of-the-tenant-default"
scope = "read"
[auth.keys.chatter]
key = "chatter-of-the-tenant-default"
scope = "chat"
[auth.keys.admin]
key = "admin-of-the-tenant-default"
scope = "admin"
[auth.keys.operator]
key = "operator-of-the-tenant-default"
scope = "operator"
[auth.keys.other]
key = "operator-of-the-tenant-other"
tenant = "other"
scope = "operator"
"#;
const OTHER: &str = "operator-of-the-tenant-other";

const SCOPES: [&str; 3] = [
    "/v1/users/alice",
    "/v1/users/alice/sessions/s",
    "/v1/users/alice/topics/t",
];

/// The answer to a tenant whose request names another tenant's things.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Gets {
    /// 404, as for things that never existed.
    NotFound,
    /// An empty list of its own things.
    Nothing,
    /// Its own thing, which the request creates.
    Own,
    /// Something that belongs to no tenant.
    Served,
}

/// Every route by its end, with the answer to another tenant. A new route without a row fails the
/// test.
const ROWS: &[(&str, &str, Gets)] = &[
    ("GET", "/healthz", Gets::Served),
    ("GET", "/readyz", Gets::Served),
    ("GET", "/openapi.json", Gets::Served),
    ("POST", "{scope}/messages", Gets::Own),
    ("GET", "{scope}/messages", Gets::NotFound),
    ("GET", "{scope}/thread", Gets::NotFound),
    ("PATCH", "{scope}/thread", Gets::NotFound),
    ("DELETE", "{scope}/thread", Gets::NotFound),
    ("POST", "{scope}/thread/rollover", Gets::NotFound),
    ("POST", "{scope}/thread/cancel", Gets::NotFound),
    ("POST", "{scope}/runs/{run}/cancel", Gets::NotFound),
    ("POST", "{scope}/runs/{run}/tool_outputs", Gets::NotFound),
    ("GET", "{scope}/runs/{run}/events", Gets::NotFound),
    ("POST", "{scope}/runs", Gets::NotFound),
    ("GET", "{scope}/runs", Gets::NotFound),
    ("GET", "{scope}/runs/{run}", Gets::NotFound),
    ("DELETE", "{user}", Gets::Own),
    ("GET", "{user}/threads", Gets::Nothing),
    ("GET", "{user}/export", Gets::Nothing),
    ("GET", "/v1/deletions/{deletion}", Gets::NotFound),
    ("GET", "/v1/threads", Gets::Nothing),
    ("GET", "/v1/threads/{thread}", Gets::NotFound),
    ("GET", "/v1/threads/{thread}/messages", Gets::NotFound),
    ("POST", "/v1/admin/cleanup", Gets::Served),
];

/// Returns the end of a route: the part below a scope or a user.
fn end(path: &str) -> String {
    for scope in [
        "/v1/users/{user}/sessions/{session}",
        "/v1/users/{user}/topics/{topic}",
        "/v1/users/{user}",
        "/v1/conversation",
    ] {
        let is_conversation = |rest: &&str| {
            ["/messages", "/thread", "/runs"]
                .iter()
                .any(|it| rest.starts_with(it))
        };
        if let Some(rest) = path.strip_prefix(scope).filter(is_conversation)
            && rest != "/threads"
        {
            return format!("{{scope}}{rest}");
        }
    }
    for user in ["/v1/users/{user}", "/v1/user"] {
        if let Some(rest) = path.strip_prefix(user)
            && ["", "/threads", "/export"].contains(&rest)
        {
            return format!("{{user}}{rest}");
        }
    }
    path.to_owned()
}

/// Whether path or headers name a user.
fn names_a_user(route: &Route) -> bool {
    route.path.contains("{user}") || has_key_headers(route)
}

fn has_key_headers(route: &Route) -> bool {
    route.path.starts_with("/v1/conversation/") || route.path.split('/').nth(2) == Some("user")
}

/// An id of each kind.
struct Ids {
    user: &'static str,
    run: String,
    thread: String,
    deletion: String,
}

impl Ids {
    fn unknown() -> Self {
        Self {
            user: "nobody-knows",
            run: RunId::new().to_string(),
            thread: ThreadId::new().to_string(),
            deletion: DeletionId::new().to_string(),
        }
    }

    fn path(&self, route: &Route) -> String {
        let names = [
            ("{session}", "s"),
            ("{topic}", "t"),
            ("{user}", self.user),
            ("{run}", &self.run),
        ];
        let names = names
            .into_iter()
            .chain([("{thread}", &*self.thread), ("{deletion}", &self.deletion)]);
        names.fold(route.path.clone(), |path, (name, value)| {
            path.replace(name, value)
        })
    }
}

fn request(gateway: &Gateway, route: &Route, ids: &Ids) -> RequestBuilder {
    let mut request = gateway.request(route.method.clone(), &ids.path(route));
    if has_key_headers(route) {
        request = request.header("threadkeeper-user", ids.user);
    }
    match (route.method.as_str(), end(&route.path).as_str()) {
        ("POST", "{scope}/messages") => request
            .header("idempotency-key", "1")
            .json(&json!({"content": "hello"})),
        ("POST", "{scope}/runs/{run}/tool_outputs") => {
            request.json(&json!({"tool_outputs": [{"tool_call_id": "call_1", "output": "4"}]}))
        }
        ("PATCH", _) => request.json(&json!({"metadata": {"a": "b"}})),
        _ => request,
    }
}

/// Returns a key with this access level.
fn key(access: Access) -> &'static str {
    match access {
        Access::Read => "reader-of-the-tenant-default",
        Access::Chat => "chatter-of-the-tenant-default",
        Access::Admin => "admin-of-the-tenant-default",
        Access::Operator => "operator-of-the-tenant-default",
    }
}

async fn ask(gateway: &Gateway, route: &Route, ids: &Ids, key: &str) -> Answer {
    gateway
        .send(request(gateway, route, ids).bearer_auth(key))
        .await
}

#[test]
fn access_table_covers_every_route() {
    let there: BTreeSet<_> = routes()
        .iter()
        .map(|route| (route.method.to_string(), end(&route.path)))
        .collect();
    let rows: BTreeSet<_> = ROWS
        .iter()
        .map(|(method, path, _)| ((*method).to_owned(), (*path).to_owned()))
        .collect();
    assert_eq!(there, rows);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_checks_authentication_and_scope() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let gateway = scene.gateway_with(KEYS).await;
    let ids = Ids::unknown();
    for route in routes() {
        let what = format!("{} {}", route.method, route.path);
        let anonymous = gateway.send(request(&gateway, &route, &ids)).await;
        let Some(needs) = route.needs else {
            assert_eq!(anonymous.status, StatusCode::OK, "{what}");
            continue;
        };
        let wrong = [
            key(needs).to_uppercase(),
            key(needs)[1..].to_owned(),
            format!("{} x", key(needs)),
        ];
        let basic = request(&gateway, &route, &ids).basic_auth(key(needs), None::<&str>);
        let mut refused = vec![(false, anonymous), (false, gateway.send(basic).await)];
        for wrong in &wrong {
            refused.push((true, ask(&gateway, &route, &ids, wrong).await));
        }
        let twice = request(&gateway, &route, &ids)
            .bearer_auth(key(needs))
            .bearer_auth(key(needs));
        refused.push((true, gateway.send(twice).await));
        for (has_token, answer) in refused {
            assert_eq!(answer.problem(), (401, "unauthenticated"), "{what}");
            let challenge = answer.headers["www-authenticate"].to_str().unwrap();
            assert_eq!(
                challenge.starts_with("Bearer error=\"invalid_token\""),
                has_token,
                "{what}: {challenge}"
            );
            assert_eq!(challenge == "Bearer", !has_token, "{what}: {challenge}");
            assert_eq!(
                answer.headers["x-content-type-options"], "nosniff",
                "{what}"
            );
            assert_eq!(answer.headers["cache-control"], "no-store", "{what}");
        }
        for level in Access::ALL {
            let answer = ask(&gateway, &route, &ids, key(*level)).await;
            if *level < needs {
                assert_eq!(answer.problem(), (403, "forbidden"), "{what} with {level}");
            } else {
                let status = answer.status.as_u16();
                assert!(
                    ![401, 403].contains(&status) && status < 500,
                    "{what} with {level}: {answer:?}"
                );
            }
        }
    }
    let nowhere = gateway.get("/v1/nowhere").await;
    assert_eq!(nowhere.problem(), (404, "not-found"));
    assert!(
        gateway
            .logs()
            .iter()
            .any(|line| line.contains(r#""caller":"chatter""#)),
        "the log names the caller"
    );
}

/// Makes a conversation of each scope and a deletion. Returns their ids.
async fn prepare(gateway: &Gateway) -> Vec<Ids> {
    let mine = key(Access::Operator);
    let gone = gateway
        .request(Method::POST, "/v1/users/gone/messages")
        .json(&json!({"content": "planted word"}));
    gateway.send(gone.bearer_auth(mine)).await.ok();
    let gone = gateway
        .send(
            gateway
                .request(Method::DELETE, "/v1/users/gone")
                .bearer_auth(mine),
        )
        .await
        .ok();
    let mut all = Vec::new();
    for scope in SCOPES {
        let body = json!({"content": "planted word [[sim: tool=get_weather]]"});
        let request = gateway
            .request(Method::POST, &format!("{scope}/messages"))
            .json(&body);
        let asked = gateway
            .send(request.bearer_auth(mine).header("idempotency-key", "1"))
            .await
            .ok();
        let id = |of: &str| asked[of]["id"].as_str().unwrap().to_owned();
        let deletion = gone["id"].as_str().unwrap().to_owned();
        all.push(Ids {
            user: "alice",
            run: id("run"),
            thread: id("thread"),
            deletion,
        });
    }
    all
}

/// The parts of an answer that must be the same for another tenant's thing and for one that never
/// existed.
fn outcome(answer: &Answer) -> (StatusCode, Value, Value) {
    (
        answer.status,
        answer.body["type"].clone(),
        answer.body["detail"].clone(),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn tenants_are_isolated_on_every_route() {
    for backend in [Backend::Sqlite, Backend::Postgres] {
        let scene = Scene::new(Protocol::Responses, backend).await;
        let gateway = scene.gateway_with(KEYS).await;
        let mine = prepare(&gateway).await;
        let secrets: Vec<String> = mine
            .iter()
            .flat_map(|ids| [ids.run.clone(), ids.thread.clone(), ids.deletion.clone()])
            .chain(["planted".to_owned()])
            .collect();
        // Routes that create something come last, so that earlier ones do not see it.
        let mut all = routes();
        all.sort_by_key(|route| row(route) == Gets::Own);
        for route in all.iter().filter(|route| route.needs.is_some()) {
            let ids = mine.iter().zip(SCOPES).find(|(_, scope)| {
                let depth = scope.matches('/').count();
                let kind = ["sessions", "topics"]
                    .into_iter()
                    .find(|kind| route.path.contains(*kind));
                kind.map_or(depth == 3, |kind| scope.contains(kind))
            });
            let (ids, _) = ids.unwrap();
            let what = format!("{} {}", route.method, route.path);
            let theirs = ask(&gateway, route, ids, OTHER).await;
            let never = ask(&gateway, route, &Ids::unknown(), OTHER).await;
            let text = format!("{} {:?}", theirs.body, theirs.headers);
            for secret in &secrets {
                assert!(
                    !text.contains(secret.as_str()),
                    "{what} reveals another tenant's data: {text}"
                );
            }
            // The routes by headers reach the same conversations as the routes by paths before
            // them.
            let is_own = route.path.starts_with("/v1/conversation") && row(route) == Gets::Own;
            assert!(
                is_own || !theirs.headers.contains_key("idempotent-replayed"),
                "{what}"
            );
            assert_eq!(
                outcome(&theirs),
                outcome(&never),
                "{what} reveals what exists"
            );
            match row(route) {
                Gets::NotFound => assert_eq!(theirs.problem(), (404, "not-found"), "{what}"),
                Gets::Nothing => {
                    assert_eq!(theirs.status, StatusCode::OK, "{what}");
                    let is_empty = theirs.body["data"].as_array().is_none_or(Vec::is_empty);
                    assert!(is_empty, "{what}: {theirs:?}");
                }
                Gets::Own | Gets::Served => {
                    assert!(theirs.status.is_success(), "{what}: {theirs:?}");
                }
            }
        }
        // The first tenant's things have not changed.
        for (ids, scope) in mine.iter().zip(SCOPES) {
            let get = |path: String| {
                gateway.send(
                    gateway
                        .request(Method::GET, &path)
                        .bearer_auth(key(Access::Read)),
                )
            };
            let run = get(format!("{scope}/runs/{}", ids.run)).await.ok();
            assert_eq!(run["run"]["status"], "requires_action", "{scope}");
            let messages = get(format!("{scope}/messages")).await.ok();
            assert_eq!(messages["data"].as_array().unwrap().len(), 1, "{scope}");
            assert!(
                get(format!("{scope}/thread")).await.ok()["metadata"]
                    .as_object()
                    .unwrap()
                    .is_empty()
            );
        }
    }
}

fn row(route: &Route) -> Gets {
    let end = end(&route.path);
    ROWS.iter()
        .find(|(method, path, _)| route.method == *method && *path == end)
        .unwrap()
        .2
}

/// Runs the command `keys` with a configuration.
fn keys(config: &str, args: &[&str]) -> (Output, String) {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("gateway.toml");
    std::fs::write(&file, config).unwrap();
    let mut command: Command = Gateway::command(&["keys"]);
    let output = command
        .args(args)
        .arg("--config")
        .arg(&file)
        .output()
        .unwrap();
    let told = String::from_utf8(output.stdout.clone()).unwrap();
    (output, told.trim().to_owned())
}

async fn status(gateway: &Gateway, key: &str) -> u16 {
    gateway
        .send(
            gateway
                .request(Method::GET, "/v1/users/alice/threads")
                .bearer_auth(key),
        )
        .await
        .status
        .as_u16()
}

#[tokio::test(flavor = "multi_thread")]
async fn api_key_changes_reach_running_replicas() {
    let scene = Scene::new(Protocol::Responses, Backend::Postgres).await;
    let config = scene.config("[auth]\nstored_keys = true\n");
    let (one, other) = tokio::join!(Gateway::start(&config), Gateway::start(&config));
    let create = [
        "create",
        "--scope",
        "read",
        "--label",
        "for reports",
        "--tenant",
        "acme",
    ];
    let (output, key) = keys(&config, &create);
    assert!(
        output.status.success() && key.starts_with("tk_"),
        "{output:?}"
    );
    assert!(
        !String::from_utf8_lossy(&output.stderr).contains(&key),
        "replicas are notified"
    );
    for gateway in [&one, &other] {
        becomes(gateway, &key, 200).await;
    }
    let (_, list) = keys(&config, &["list", "--tenant", "acme"]);
    let prefix = &key[..15];
    for part in [prefix, "read", "acme", "good", "for reports"] {
        assert!(list.contains(part), "the list lacks {part}: {list}");
    }
    assert!(!list.contains(&key[16..]), "{list}");
    assert_eq!(
        keys(&config, &["list", "--tenant", "elsewhere"])
            .1
            .lines()
            .count(),
        1
    );

    let (output, told) = keys(&config, &["revoke", &key]);
    assert!(
        output.status.success() && told.contains("revoked"),
        "{output:?}"
    );
    for gateway in [&one, &other] {
        becomes(gateway, &key, 401).await;
    }
    assert!(keys(&config, &["list"]).1.contains("revoked"));
    let (output, _) = keys(&config, &["revoke", "tk_000000000000"]);
    assert!(!output.status.success());
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("keys list"),
        "{output:?}"
    );
}

async fn becomes(gateway: &Gateway, key: &str, wanted: u16) {
    let begun = std::time::Instant::now();
    while status(gateway, key).await != wanted {
        assert!(begun.elapsed() < PATIENCE, "the key never became {wanted}");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

/// A SQLite file can be open in one process only, so keys are made before the gateway starts.
#[tokio::test(flavor = "multi_thread")]
async fn sqlite_api_keys_managed_only_while_gateway_stopped() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let config = scene.config("[auth]\nstored_keys = true\n");
    let (output, key) = keys(&config, &["create"]);
    assert!(output.status.success(), "{output:?}");
    let gateway = Gateway::start(&config).await;
    assert_eq!(status(&gateway, &key).await, 200);
    assert_eq!(status(&gateway, "tk_0123").await, 401);
    let (output, _) = keys(&config, &["list"]);
    assert!(!output.status.success());
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("process"),
        "{output:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn cors_allows_configured_origins_only() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let settings = format!(
        "{KEYS}[server]\ncors_origins = [\"https://chat.example\", \"capacitor://localhost\"]\n"
    );
    let gateway = scene.gateway_with(&settings).await;
    let path = "/v1/users/alice/messages";
    let preflight = |origin: &str| {
        let request = gateway
            .request(Method::OPTIONS, path)
            .header("origin", origin);
        let request = request.header("access-control-request-method", "POST");
        gateway.send(request.header(
            "access-control-request-headers",
            "authorization,content-type,idempotency-key,threadkeeper-user",
        ))
    };
    let known = preflight("https://chat.example").await;
    assert_eq!(known.status, StatusCode::OK);
    assert_eq!(
        known.headers["access-control-allow-origin"],
        "https://chat.example"
    );
    let allowed = known.headers["access-control-allow-headers"]
        .to_str()
        .unwrap();
    for name in [
        "idempotency-key",
        "threadkeeper-user",
        "threadkeeper-session",
        "threadkeeper-topic",
    ] {
        assert!(allowed.contains(name), "{name} is missing in: {allowed}");
    }
    assert!(
        !known
            .headers
            .contains_key("access-control-allow-credentials"),
        "cookies are not allowed"
    );
    let app = preflight("capacitor://localhost").await;
    assert_eq!(
        app.headers["access-control-allow-origin"], "capacitor://localhost",
        "a page inside an app gets an answer"
    );
    for other in [
        "https://chat.example.evil",
        "http://chat.example",
        "tauri://localhost",
        "null",
    ] {
        assert!(
            !preflight(other)
                .await
                .headers
                .contains_key("access-control-allow-origin"),
            "{other}"
        );
    }
    let request = gateway
        .request(Method::POST, path)
        .header("origin", "https://chat.example");
    let answer = gateway
        .send(
            request
                .bearer_auth(key(Access::Chat))
                .json(&json!({"content": "hello"})),
        )
        .await;
    assert_eq!(
        answer.headers["access-control-allow-origin"],
        "https://chat.example"
    );
    assert!(
        answer.headers["access-control-expose-headers"]
            .to_str()
            .unwrap()
            .contains("retry-after")
    );
    answer.ok();
    let refused = gateway
        .send(
            gateway
                .request(Method::GET, path)
                .header("origin", "https://chat.example"),
        )
        .await;
    assert_eq!(refused.problem(), (401, "unauthenticated"));
    assert_eq!(
        refused.headers["access-control-allow-origin"], "https://chat.example",
        "a page can read the reason"
    );
}

pub(super) const SECRET: &str = "a-secret-that-is-shared-with-the-issuer";
pub(super) const ISSUER: &str = r#"
[auth.jwt]
issuer = "https://login.example/"
audience = ["chat"]
algorithms = ["HS256"]
secret = "a-secret-that-is-shared-with-the-issuer"
tenant_claim = "org"
admin_claim = "roles"
admin_value = "chat-admin"
"#;

/// Returns a token with these claims and the usual ones.
pub(super) fn token(secret: &str, claims: &Value) -> String {
    let mut all = json!({"iss": "https://login.example/", "aud": "chat", "exp": 4_102_444_800_i64, "org": "acme"});
    all.as_object_mut()
        .unwrap()
        .extend(claims.as_object().unwrap().clone());
    let key = jsonwebtoken::EncodingKey::from_secret(secret.as_bytes());
    jsonwebtoken::encode(&jsonwebtoken::Header::default(), &all, &key).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn user_token_opens_only_its_own_user() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let gateway = scene.gateway_with(&format!("{KEYS}{ISSUER}")).await;
    let good = |claims: Value| token(SECRET, &claims);
    let (alice, admin) = (
        good(json!({"sub": "alice"})),
        good(json!({"sub": "eve", "roles": ["chat-admin"]})),
    );
    let ids = Ids::unknown();
    let own = Ids {
        user: "alice",
        ..Ids::unknown()
    };
    for route in routes() {
        let (Some(needs), what) = (route.needs, format!("{} {}", route.method, route.path)) else {
            continue;
        };
        let opens = |answer: &Answer| ![401, 403].contains(&answer.status.as_u16());
        let others = ask(&gateway, &route, &ids, &alice).await;
        if names_a_user(&route) {
            assert_eq!(
                others.problem(),
                (403, "forbidden"),
                "{what} of another user"
            );
            assert!(
                opens(&ask(&gateway, &route, &own, &alice).await),
                "{what} of the token's user"
            );
        } else {
            assert_eq!(opens(&others), needs <= Access::Chat, "{what}: {others:?}");
        }
        assert_eq!(
            opens(&ask(&gateway, &route, &ids, &admin).await),
            needs <= Access::Admin,
            "{what} for an admin"
        );
    }
    // Another spelling of the path names the same user.
    let spelled = gateway
        .request(Method::GET, "/v1/users/%61lice/threads")
        .bearer_auth(&alice);
    gateway.send(spelled).await.ok();
    let spelled = gateway
        .request(Method::GET, "/v1/user/threads")
        .header("threadkeeper-user", "%61lice");
    gateway.send(spelled.bearer_auth(&alice)).await.ok();
    // Two names that contradict each other name nobody.
    for (path, user) in [
        ("/v1/users/alice/threads", "bob"),
        ("/v1/users/bob/threads", "alice"),
    ] {
        let both = gateway
            .request(Method::GET, path)
            .header("threadkeeper-user", user)
            .bearer_auth(&alice);
        assert_eq!(
            gateway.send(both).await.problem(),
            (400, "invalid-request"),
            "{path}"
        );
    }

    let bad = [
        good(json!({"sub": "alice", "exp": 1_000_000_000})),
        good(json!({"sub": "alice", "aud": "other"})),
        good(json!({"sub": "alice", "iss": "https://evil.example/"})),
        good(json!({"sub": "alice", "org": null})),
        good(json!({})),
        token(
            "another-secret-that-nobody-shares-with-us",
            &json!({"sub": "alice"}),
        ),
        format!("{alice}x"),
    ];
    for token in bad {
        let request = gateway
            .request(Method::GET, "/v1/users/alice/threads")
            .bearer_auth(&token);
        assert_eq!(
            gateway.send(request).await.problem(),
            (401, "unauthenticated"),
            "{token}"
        );
    }
}

/// Ids in paths and cursors of lists do not reach another user's things.
#[tokio::test(flavor = "multi_thread")]
async fn user_token_reveals_nothing_of_other_users() {
    for backend in [Backend::Sqlite, Backend::Postgres] {
        let scene = Scene::new(Protocol::Responses, backend).await;
        let gateway = scene.gateway_with(ISSUER).await;
        let token = |user: &str| token(SECRET, &json!({"sub": user}));
        let get = |path: String, user: &str| {
            gateway.send(gateway.request(Method::GET, &path).bearer_auth(token(user)))
        };
        let mut asked = Vec::new();
        for user in ["alice", "bob"] {
            let body = json!({"content": "hello [[sim: tool=get_weather]]"});
            let say = gateway
                .request(Method::POST, &format!("/v1/users/{user}/messages"))
                .json(&body);
            asked.push(gateway.send(say.bearer_auth(token(user))).await.ok());
        }
        let id = |of: &str| asked[1][of]["id"].as_str().unwrap().to_owned();
        let own = Ids {
            user: "alice",
            ..Ids::unknown()
        };
        let bobs = Ids {
            run: id("run"),
            thread: id("thread"),
            ..Ids {
                user: "alice",
                ..Ids::unknown()
            }
        };
        let by_id = routes()
            .into_iter()
            .filter(|it| it.needs.is_some_and(|needs| needs <= Access::Chat));
        for route in by_id.filter(|it| ["{run}", "{thread}"].iter().any(|id| it.path.contains(id)))
        {
            let what = format!("{} {}", route.method, route.path);
            let theirs = ask(&gateway, &route, &bobs, &token("alice")).await;
            assert_eq!(theirs.problem(), (404, "not-found"), "{what}");
            assert_eq!(
                outcome(&theirs),
                outcome(&ask(&gateway, &route, &own, &token("alice")).await),
                "{what}"
            );
        }
        let said = get("/v1/users/bob/messages".to_owned(), "bob").await.ok();
        let said = said["data"][0]["id"].as_str().unwrap().to_owned();
        for (list, theirs, none) in [
            ("threads", id("thread"), ThreadId::new().to_string()),
            ("runs", id("run"), RunId::new().to_string()),
            ("messages", said, MessageId::new().to_string()),
        ] {
            for cursor in ["after", "before"] {
                let list = |id: &str| get(format!("/v1/users/alice/{list}?{cursor}={id}"), "alice");
                let refused = list(&theirs).await;
                assert_eq!(
                    refused.status,
                    StatusCode::UNPROCESSABLE_ENTITY,
                    "{refused:?}"
                );
                assert_eq!(outcome(&refused), outcome(&list(&none).await));
            }
        }
        assert_eq!(
            get(format!("/v1/users/bob/runs/{}", id("run")), "bob")
                .await
                .ok()["run"],
            asked[1]["run"]
        );
    }
}

/// The user's rate applies even if the path names no user. Otherwise the tenant's other users
/// would pay for it.
#[tokio::test(flavor = "multi_thread")]
async fn user_token_is_rate_limited_on_userless_paths() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let limits = "[limits]\nuser_requests = \"1/s burst 2\"\ntenant_requests = \"1000/s\"\n";
    let gateway = scene.gateway_with(&format!("{ISSUER}{limits}")).await;
    let good = |user: &str| token(SECRET, &json!({"sub": user}));
    let alice = good("alice");
    let path = "/v1/deletions/del_0198f000000070008000000000000000";
    let ask = |token: &str| gateway.send(gateway.request(Method::GET, path).bearer_auth(token));
    let answers = futures_util::future::join_all((0..20).map(|_| ask(&alice))).await;
    let refused = answers.iter().filter(|answer| answer.status == 429).count();
    assert!(refused >= 10, "{refused} of 20 were refused");
    assert_eq!(ask(&good("bob")).await.problem(), (404, "not-found"));
}

/// Only its user sees a deletion, before it is done and afterwards. The finished receipt contains
/// no name.
#[tokio::test(flavor = "multi_thread")]
async fn deletion_receipt_hidden_from_other_users_and_tenants() {
    for backend in [Backend::Sqlite, Backend::Postgres] {
        let scene = Scene::new(Protocol::Responses, backend).await;
        let gateway = scene
            .gateway_with(&format!("{KEYS}{ISSUER}{OWN_KEY}"))
            .await;
        let good = |user: &str, tenant: &str| token(SECRET, &json!({"sub": user, "org": tenant}));
        let (zoe, bob, namesake) = (
            good("zoe", "acme"),
            good("bob", "acme"),
            good("zoe", "elsewhere"),
        );
        let backend_of_acme = "chatter-of-the-tenant-acme".to_owned();
        for (path, asks) in [
            ("/v1/users/zoe/thread", &zoe),
            ("/v1/users/zoe", &zoe),
            ("/v1/users/zoe", &backend_of_acme),
        ] {
            let say = gateway
                .request(Method::POST, "/v1/users/zoe/messages")
                .json(&json!({"content": "hello"}));
            gateway.send(say.bearer_auth(&zoe)).await.ok();
            scene.fault("any", "status=503", 1000);
            let delete = gateway
                .request(Method::DELETE, path)
                .header("prefer", "respond-async");
            let pending = gateway.send(delete.bearer_auth(asks)).await;
            assert_eq!(pending.status, StatusCode::ACCEPTED, "{pending:?}");
            let place = pending.headers["location"].to_str().unwrap();
            let receipt =
                |token: &str| gateway.send(gateway.request(Method::GET, place).bearer_auth(token));
            let never = format!("/v1/deletions/{}", DeletionId::new());
            let never = gateway
                .send(gateway.request(Method::GET, &never).bearer_auth(&bob))
                .await;
            assert_eq!(never.problem(), (404, "not-found"));
            let mut in_progress = true;
            loop {
                let seen = receipt(&zoe).await.ok();
                assert!(
                    in_progress || seen["status"] == "completed",
                    "{path}: {seen:#}"
                );
                assert_eq!(
                    receipt(&backend_of_acme).await.ok()["id"],
                    seen["id"],
                    "{path}"
                );
                for other in [&bob, &namesake, OTHER] {
                    assert_eq!(outcome(&receipt(other).await), outcome(&never), "{path}");
                }
                if !in_progress {
                    break;
                }
                in_progress = seen["status"] == "in_progress";
                if in_progress {
                    scene.simulator.clear_faults();
                    scene
                        .database
                        .execute("UPDATE threads SET due_at = created_at")
                        .await;
                    let cleanup = gateway
                        .request(Method::POST, "/v1/admin/cleanup")
                        .bearer_auth(OTHER);
                    gateway.send(cleanup).await.ok();
                }
            }
            assert_eq!(
                scene.database.holding("zoe").await,
                Vec::<String>::new(),
                "{path}"
            );
        }
    }
}

const OWN_KEY: &str = r#"
[auth.keys.acme]
key = "chatter-of-the-tenant-acme"
tenant = "acme"
scope = "chat"
"#;

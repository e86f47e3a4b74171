//! What the gateway with planted secrets goes through: ordinary use, mistakes and failures.

use std::process::Output;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::gateway::Gateway;
use crate::support::secret_scan::planted;

use super::echo_upstream::PARROT_SAYS;
use super::fixture::{PIECE, World, signed};
use super::{secret, word};

/// Wrong configurations and variables, with the mistake within a secret or beside it.
pub(super) fn mistakes(world: &World) {
    let key = secret("a key in a wrong place");
    let quoted = json!(key).to_string();
    assert!(world.run(&["check-config"]).contains("sound"));
    let lines = [
        format!("[upstreams.other]\nkind = \"responses\"\nbase_url = \"http://h\"\napi_key = {key}"),
        format!("[upstreams.other]\nkind = \"responses\"\nbase_url = \"http://h\"\napi_key = \"{key}"),
        format!("[upstreams.other]\napi_key {quoted}"),
        format!("[upstreams.other]\napi_key = {quoted} {quoted}"),
        format!("[upstreams.other]\napi_key = {quoted}\napi_key = {quoted}"),
        format!("[upstreams.other]\nkind = {quoted}\nbase_url = {quoted}\napi_key = [{quoted}]\nkey = {quoted}"),
        format!("[upstreams.other]\nkind = \"responses\"\nbase_url = \"https://u:{}@h/\"", planted("the password")),
        "[upstreams.other]\nkind = \"responses\"\nbase_url = \"http://h\"\napi_key = \"KEY\\n\"\nheaders = {a = \"KEY\\n\", b = 1, c = [\"KEY\"]}"
            .replace("KEY", &planted("the password")),
        format!("[upstreams.other]\nkind = \"responses\"\nbase_url = \"http://h\"\nquery = [{quoted}]\nheaders = {quoted}"),
        format!("[auth]\nkeys = [{quoted}]"),
        format!("[auth]\nkeys = {quoted}"),
        format!("[auth.keys.a]\nkey = {quoted}\nscope = {quoted}\nsha256 = {quoted}"),
        format!("[auth.keys.a]\nkey = \"{}\"\nscope = \"read\"", &planted("the password")[..=PIECE]),
        format!("[auth.jwt]\nsecret = {quoted}\nalgorithms = [{quoted}]\njwks_url = {quoted}\nissuer = [{quoted}]"),
        format!("[store]\nurl = {quoted}\ndirect_url = {quoted}\nsynchronous = {quoted}"),
        format!("[store]\nurl = \"postgres://u:{0}@h:{0}/d\"", planted("the password")),
        format!("[server]\nlisten = {quoted}\nmax_body_bytes = {quoted}\nstream_keep_alive = {quoted}\ncors_origins = {quoted}"),
        format!("[log]\nfilter = {quoted}"),
    ];
    for line in lines {
        for command in ["check-config", "serve"] {
            let told = world.run_with(&line, &[command]);
            assert!(
                told.contains("threadkeeper: "),
                "{command} takes {line}: {told}"
            );
        }
    }
    for name in [
        "THREADKEEPER_API_KEY",
        "THREADKEEPER_UPSTREAMS__SIMULATED",
        "THREADKEEPER_UPSTREAMS__SIMULATED__API_KEY__FILE",
        "THREADKEEPER_UPSTREAMS__SIMULATED__HEADERS",
        "THREADKEEPER_AUTH__KEYS",
        "THREADKEEPER_AUTH__JWT__SECRET",
        "THREADKEEPER_STORE__URL",
        "RUST_LOG",
    ] {
        for command in ["check-config", "migrate"] {
            let mut command = world.command(&world.config, &[command]);
            let Output { stdout, stderr, .. } = command.env(name, &key).output().unwrap();
            assert_eq!(
                world.secrets.find(&[stdout, stderr].concat()),
                None,
                "the error about {name} contains the secret"
            );
        }
    }
    // A server that refuses connections, and unknown parameters.
    for rest in ["", "?sslmode=KEY", "?pasword=KEY"] {
        let url = format!("postgres://u:KEY@127.0.0.1:9/d{rest}")
            .replace("KEY", &planted("the password"));
        let mut serve = world.command(&world.config, &["serve"]);
        serve
            .env("DATABASE_URL", &url)
            .env("THREADKEEPER_STORE__STARTUP_TIMEOUT", "50ms");
        let Output { stderr, .. } = serve.output().unwrap();
        assert_eq!(
            world.secrets.find(&stderr),
            None,
            "the error contains the password"
        );
        assert!(!stderr.is_empty());
    }
}

/// Conversations as a backend has them.
pub(super) async fn conversations(world: &World, gateway: &Gateway, key: &str) {
    let said = word("what is said");
    let user = format!("/v1/users/{}", word("a user"));
    let send = |method: Method, path: &str, body: Value| {
        world.ask(gateway.request(method, path).bearer_auth(key).json(&body))
    };
    let get = |path: &str| world.ask(gateway.request(Method::GET, path).bearer_auth(key));
    for scope in [
        user.clone(),
        format!("{user}/sessions/{}", word("a session")),
        format!("{user}/topics/{}", word("a topic")),
    ] {
        let messages = format!("{scope}/messages");
        let metadata = json!({word("a name of metadata"): word("a value of metadata")});
        for content in [json!(said), json!([{"type": "text", "text": said}])] {
            let body = json!({"content": content, "metadata": metadata});
            let request = gateway
                .request(Method::POST, &messages)
                .bearer_auth(key)
                .json(&body);
            let request = request.header("idempotency-key", word("an idempotency key"));
            let answer = world.ask(request).await;
            assert!([200, 422].contains(&answer.status.as_u16()), "{answer:?}");
        }
        let streamed =
            json!({"content": format!("{said} [[sim: comments tokens=20]]"), "stream": true});
        let events = send(Method::POST, &messages, streamed).await;
        assert!(
            events.body.as_str().unwrap().contains("run.completed"),
            "{events:?}"
        );
        let asks = json!({"content": format!("{said} [[sim: tool=get_weather]]")});
        let asks = send(Method::POST, &messages, asks).await.ok();
        let run = format!("{scope}/runs/{}", asks["run"]["id"].as_str().unwrap());
        let call = &asks["run"]["required_action"]["tool_calls"][0];
        assert!(
            call["arguments"].as_str().unwrap().contains(&said),
            "{asks:#}"
        );
        let outputs = format!("{run}/tool_outputs");
        let output = |id: &Value| json!({"tool_outputs": [{"tool_call_id": id, "output": word("an output")}]});
        send(Method::POST, &outputs, output(&json!(word("an output")))).await;
        send(Method::POST, &outputs, output(&call["id"])).await.ok();
        send(Method::POST, &outputs, output(&call["id"])).await;
        let body = json!({"content": format!("{said} [[sim: silent_after=2]]")});
        let request = gateway
            .request(Method::POST, &messages)
            .bearer_auth(key)
            .json(&body);
        world.ask(request.header("prefer", "respond-async")).await;
        send(Method::POST, &format!("{scope}/thread/cancel"), json!({}))
            .await
            .ok();
        for failing in [
            "fail",
            "status=401",
            "status=500",
            "incomplete",
            "refusal",
            "cut=3",
            "mid_error",
        ] {
            let body = json!({"content": format!("{said} [[sim: {failing}]]")});
            send(Method::POST, &messages, body).await;
        }
        send(
            Method::PATCH,
            &format!("{scope}/thread"),
            json!({"metadata": metadata}),
        )
        .await
        .ok();
        send(Method::POST, &format!("{scope}/thread/rollover"), json!({})).await;
        for path in ["/messages", "/thread", "/runs"] {
            get(&format!("{scope}{path}")).await.ok();
        }
        get(&format!("{run}/events")).await.ok();
        get(&run).await.ok();
        // Texts of refused requests must not appear in the log.
        let wrong = word("what is no content");
        for body in [
            json!({"content": {&wrong: 1}}),
            json!({"content": [{"type": wrong}]}),
            json!({&wrong: wrong}),
            json!({"content": said, "metadata": {&wrong: [wrong]}}),
            json!({"content": said, "assistant": wrong}),
            json!({"content": said, "multitask_strategy": wrong}),
            json!(wrong),
        ] {
            assert!(
                send(Method::POST, &messages, body)
                    .await
                    .status
                    .is_client_error()
            );
        }
        let broken = gateway.request(Method::POST, &messages).bearer_auth(key);
        let broken = broken.header("content-type", "application/json");
        world
            .ask(broken.body(format!("{{\"content\": \"{wrong}")))
            .await;
        let repeated = gateway
            .request(Method::POST, &messages)
            .bearer_auth(key)
            .json(&json!({"content": said}));
        let twice = repeated.header("idempotency-key", word("another idempotency key"));
        world
            .ask(twice.header("idempotency-key", word("another idempotency key")))
            .await;
        let lost = gateway
            .request(Method::GET, &format!("{run}/events"))
            .bearer_auth(key);
        world.ask(lost.header("last-event-id", &wrong)).await;
        for path in [
            format!("{scope}/runs/{wrong}"),
            format!("{scope}/messages?after={wrong}"),
            format!("{scope}/messages?{wrong}={wrong}"),
            format!("{scope}/{wrong}"),
            format!("/v1/users/{wrong}%00/messages"),
            format!("/v1/users/{wrong}%ff/messages"),
        ] {
            assert!(get(&path).await.status.is_client_error(), "{path}");
        }
    }
    for path in ["/threads", "/export"] {
        get(&format!("{user}{path}")).await.ok();
    }
    get("/v1/threads").await.ok();
}

/// Callers with all kinds of credentials.
pub(super) async fn callers(world: &World, gateway: &Gateway, good: &str, revoked: &str) {
    let filed = secret("auth.keys.filed");
    let subject = word("a subject");
    for key in [&filed, good, &signed(&subject)] {
        world
            .say(gateway, key, &subject, &word("what is said"))
            .await
            .ok();
    }
    let forged = signed(&subject).replace('.', ".e30");
    let strange = secret("a key that opens nothing");
    for key in [
        revoked,
        &strange,
        &good[..70],
        &forged,
        &format!("{}x", signed(&subject)),
        &format!("{strange}.a.b"),
    ] {
        assert_eq!(
            world
                .say(gateway, key, &subject, &word("what is said"))
                .await
                .status,
            401
        );
    }
    let path = format!("/v1/users/{}/threads", word("a user"));
    let get = |path: &str| gateway.request(Method::GET, path);
    for request in [
        get(&path),
        get(&path).basic_auth(&strange, Some(&strange)),
        get(&path).bearer_auth(&filed).bearer_auth(&strange),
        get(&path).header("authorization", &strange),
        get(&path).header("authorization", format!("Bearer\t{strange}")),
        get(&path)
            .header("cookie", format!("key={strange}"))
            .header("x-api-key", &strange),
    ] {
        assert_eq!(world.ask(request).await.status, 401);
    }
    // A key within a URL.
    let plain = planted("a key that opens nothing");
    world
        .ask(get(&format!("{path}?access_token={plain}")).bearer_auth(good))
        .await;
    world
        .ask(get(&format!("/healthz?access_token={plain}")))
        .await;
    world
        .ask(get(&format!("/v1/{plain}?access_token={plain}")))
        .await;
}

/// Upstreams that cannot be reached, or that repeat what they receive.
pub(super) async fn bad_upstreams(world: &World, gateway: &Gateway, key: &str) {
    for name in ["down"]
        .into_iter()
        .map(str::to_owned)
        .chain(PARROT_SAYS.map(|says| format!("parrot-{says}")))
    {
        let path = format!("/v1/users/{}-{name}/messages", word("a user"));
        for stream in [false, true] {
            let body =
                json!({"content": word("what is said"), "assistant": name, "stream": stream});
            let answer = world
                .ask(
                    gateway
                        .request(Method::POST, &path)
                        .bearer_auth(key)
                        .json(&body),
                )
                .await;
            let failed =
                answer.status == StatusCode::OK && answer.body.to_string().contains("run.failed");
            assert!(
                answer.status.is_server_error() || failed,
                "{name}: {answer:?}"
            );
        }
        let list = path.replace("/messages", "/runs");
        world
            .ask(gateway.request(Method::GET, &list).bearer_auth(key))
            .await
            .ok();
    }
}

/// Requests that are not HTTP, or incomplete.
pub(super) async fn rough_requests(world: &World, gateway: &Gateway) {
    let (key, said) = (secret("a key that opens nothing"), word("what is said"));
    for request in [
        format!(
            "GET /{said} HTTP/1.1\r\nhost: h\r\nauthorization: Bearer {key}\r\nbad header {key}\r\n\r\n"
        ),
        format!("GET /{said} HTTP/9\r\nauthorization: Bearer {key}\r\n\r\n"),
        format!("{key} {said}\r\n\r\n"),
        format!(
            "POST /v1/users/{said}/messages HTTP/1.1\r\nhost: h\r\ncontent-length: {key}\r\n\r\n{said}"
        ),
        format!(
            "GET / HTTP/1.1\r\nhost: h\r\nx: {}\r\n\r\n",
            key.repeat(1000)
        ),
        format!(
            "GET /healthz HTTP/1.1\r\nhost: h\r\nconnection: close\r\nx-request-id: {said}-{key}\r\n\r\n"
        ),
    ] {
        let mut connection = tokio::net::TcpStream::connect(gateway.address())
            .await
            .unwrap();
        connection.write_all(request.as_bytes()).await.unwrap();
        connection.shutdown().await.unwrap();
        let mut answer = Vec::new();
        // The answer may be cut off, since the gateway did not read the whole request.
        let _ = connection.read_to_end(&mut answer).await;
        assert_eq!(
            world.secrets.find(&answer),
            None,
            "an answer contains a secret"
        );
    }
}

pub(super) async fn deletions(world: &World, gateway: &Gateway, key: &str) {
    let user = format!("/v1/users/{}", word("a user"));
    let delete = gateway.request(
        Method::DELETE,
        &format!("{user}/topics/{}/thread", word("a topic")),
    );
    let deleted = world
        .ask(delete.bearer_auth(key).header("prefer", "wait=1"))
        .await;
    let receipt = format!("/v1/deletions/{}", deleted.body["id"].as_str().unwrap());
    world
        .ask(gateway.request(Method::GET, &receipt).bearer_auth(key))
        .await
        .ok();
    for name in ["down", "parrot-401"] {
        let request = gateway
            .request(Method::DELETE, &format!("{user}-{name}"))
            .bearer_auth(key);
        world.ask(request.header("prefer", "respond-async")).await;
    }
    world
        .ask(
            gateway
                .request(Method::POST, "/v1/admin/cleanup")
                .bearer_auth(key),
        )
        .await
        .ok();
}

/// Lines that cannot be imported, each with a text in the wrong place.
pub(super) fn broken_lines() -> String {
    let wrong = word("what is no content");
    let lines = [
        json!({"type": wrong}).to_string(),
        json!({"type": "thread", "key": wrong}).to_string(),
        json!({"type": "thread", "key": {"user": format!("{wrong}\0")}}).to_string(),
        json!({"type": "thread", "key": {"user": wrong, "topic": [wrong]}}).to_string(),
        json!({"type": "thread", "key": {"user": "u"}, "created_at": wrong}).to_string(),
        json!({"type": "message", "role": wrong, "content": wrong}).to_string(),
        json!({"type": "message", "role": "user", "content": [{"type": wrong}]}).to_string(),
        json!({"type": "message", "role": "user", "content": {&wrong: 1}, "thread_id": wrong})
            .to_string(),
        format!("{{\"type\": \"message\", {wrong}"),
        wrong,
    ];
    lines.join("\n")
}

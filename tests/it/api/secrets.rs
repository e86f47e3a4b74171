//! Everything that a process ever writes, searched for secrets and for what was said.
//!
//! Secrets are planted wherever one can be configured or presented, words wherever a caller can say something. Then the
//! binary goes through good days and bad ones, with all that it and its libraries can log. No piece of a secret may be in
//! its logs, its answers, its files or its database, and no piece of a word in its logs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::HeaderValue;
use axum::response::Response;
use http_body_util::BodyExt;
use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use threadkeeper::config::StoreConfig;
use threadkeeper::simulator::SimulatorConfig;
use threadkeeper::store::{PostgresStore, Store};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

use crate::support::TestDatabase;
use crate::support::cluster::{Cluster, Stop};
use crate::support::gateway::{Answer, Gateway};
use crate::support::needles::{Needles, planted};
use crate::support::scene::{Backend, Protocol, Scene};

/// Pieces of this length are looked for.
const PIECE: usize = 8;
/// The same for what is hexadecimal, since ids are, too.
const HEX_PIECE: usize = 16;

#[tokio::test(flavor = "multi_thread")]
async fn assistants_on_a_file() {
    let database = TestDatabase::sqlite().await;
    let scene = Scene::on(database, Protocol::Assistants, Backend::Sqlite, SimulatorConfig::default()).await;
    nothing_is_written(scene, "json", None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn responses_on_a_file() {
    let database = TestDatabase::sqlite().await;
    let scene = Scene::on(database, Protocol::Responses, Backend::Sqlite, SimulatorConfig::default()).await;
    nothing_is_written(scene, "pretty", None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn assistants_on_a_server() {
    let cluster = Cluster::start();
    let database = TestDatabase::on(&cluster).await;
    let scene =
        Scene::on(database, Protocol::Assistants, Backend::Postgres, SimulatorConfig::default()).await;
    nothing_is_written(scene, "pretty", Some(cluster)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn responses_on_a_server() {
    let cluster = Cluster::start();
    let database = TestDatabase::on(&cluster).await;
    let scene = Scene::on(database, Protocol::Responses, Backend::Postgres, SimulatorConfig::default()).await;
    nothing_is_written(scene, "json", Some(cluster)).await;
}

async fn nothing_is_written(scene: Scene, format: &str, mut cluster: Option<Cluster>) {
    let parrot = Parrot::start().await;
    let mut world = World::new(&scene, format, &parrot.url);
    mistakes(&world);
    let (good, revoked) = (world.make_key("chat"), world.make_key("read"));
    world.run(&["keys", "revoke", &revoked]);
    let mut gateway = world.serve().await;
    let backend = secret("auth.keys.backend");
    conversations(&world, &gateway, &backend).await;
    callers(&world, &gateway, &good, &revoked).await;
    bad_upstreams(&world, &gateway, &backend).await;
    rough_requests(&world, &gateway).await;
    if let Some(cluster) = &mut cluster {
        cluster.stop(Stop::Immediate);
        for key in [&backend, &good, &secret("a key that opens nothing")] {
            world.say(&gateway, key, "alice", &word("what is said in an outage")).await;
        }
        cluster.start_again();
        gateway.until("/readyz", |answer| answer.status == StatusCode::OK).await;
        let url = Some(world.env["DATABASE_URL"].clone().into());
        let store = PostgresStore::connect(&StoreConfig { url, ..StoreConfig::default() }).await.unwrap();
        assert_eq!(world.secrets.find(format!("{store:?}").as_bytes()), None, "its text tells a secret");
        store.close().await;
    }
    deletions(&world, &gateway, &backend).await;
    // One that is at work when it is told to stop.
    let silent = format!("{} [[sim: silent_after=2]]", word("what is said last"));
    let path = format!("/v1/users/{}/messages", word("a user"));
    let last = gateway.request(Method::POST, &path).bearer_auth(&backend);
    let mut last_words = JoinSet::new();
    last_words.spawn(last.json(&json!({"content": silent})).send());
    scene.simulator.wait_for(|stats| stats.active_runs > 0).await;
    gateway.terminate();
    gateway.exit().await;
    world.logged(&gateway);

    let told = world.run(&["keys", "list"]);
    assert!(told.contains(&good[..15]) && told.contains("revoked"), "{told}");
    let file = world.folder.path().join("export.ndjson");
    world.run(&["export", "--out", file.to_str().unwrap(), "--tenant", &word("a tenant")]);
    let export = std::fs::read_to_string(&file).unwrap();
    assert!(export.contains(&word("what is said")), "the export holds what was said: {export}");
    world.run(&["import", file.to_str().unwrap()]);
    std::fs::write(&file, broken_lines()).unwrap();
    world.run(&["import", file.to_str().unwrap()]);
    world.run(&["migrate"]);

    world.search_files();
    for (place, value) in scene.database.everything().await {
        assert_eq!(world.secrets.find(&value), None, "a secret is in {place}");
    }
    let stored = scene.database.texts("SELECT user_key FROM threads").await;
    assert!(stored.contains(&word("a user")), "it looked at another database: {stored:?}");
}

/// A secret, always the same for what it is for.
fn secret(name: &str) -> String {
    // Some characters that are written differently here and there.
    format!("{}\"\\/+%&{}", planted(name), planted(&format!("the rest of {name}")))
}

/// A secret that may stand in an error's code.
fn plain_secret(name: &str) -> String {
    format!("sk-{}7", planted(name))
}

/// What a caller says.
fn word(name: &str) -> String {
    planted(&format!("said: {name}"))
}

const SECRETS: &[&str] = &[
    "auth.keys.backend",
    "auth.keys.filed",
    "auth.jwt.secret",
    "upstreams.simulated.api_key",
    "upstreams.simulated.headers",
    "upstreams.simulated.query",
    "a key that opens nothing",
    "a key in a wrong place",
];
const PLAIN_SECRETS: &[&str] = &["the parrot's key", "the password", "a misspelt password"];
const WORDS: &[&str] = &[
    "what is said",
    "what is said in an outage",
    "what is said last",
    "what is no content",
    "a name of metadata",
    "a value of metadata",
    "an output",
    "a user",
    "a session",
    "a topic",
    "a tenant",
    "a subject",
    "an idempotency key",
    "another idempotency key",
];

/// What is asked for, and all that comes of it.
struct World {
    folder: TempDir,
    config: String,
    env: BTreeMap<&'static str, String>,
    secrets: Needles,
    words: Needles,
}

impl World {
    fn new(scene: &Scene, format: &str, parrot: &str) -> Self {
        let folder = TempDir::new().unwrap();
        for name in ["work", "temp", "given"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        let given = |name: &str, text: &str| {
            let path = folder.path().join("given").join(name);
            std::fs::write(&path, format!("{text}\n")).unwrap();
            json!(path.to_str().unwrap())
        };
        let (kind, assistant) = match scene.protocol {
            Protocol::Assistants => ("assistants", "assistant_id = \"asst_test\""),
            _ => ("responses", "model = \"test-model\""),
        };
        let soon = "lock_window = \"50ms\"\nmax_failures = 0\n";
        let mut config = format!(
            "[log]\nfilter = \"trace\"\nformat = \"{format}\"\n\
             [server]\nshutdown_grace = \"100ms\"\n\
             [runs]\nmax_retries = 0\nsettle_timeout = \"500ms\"\n\
             [store]\nstartup_timeout = \"5s\"\n\
             [auth]\nstored_keys = true\n\
             [auth.keys.backend]\nkey = {backend}\ntenant = \"{tenant}\"\nscope = \"operator\"\n\
             [auth.keys.filed]\nkey_file = {filed}\nscope = \"chat\"\n\
             [auth.jwt]\nissuer = \"https://login.example/\"\naudience = [\"chat\"]\nalgorithms = [\"HS256\"]\n\
             secret_file = {jwt}\n\
             [upstreams.simulated]\nkind = \"{kind}\"\nbase_url = \"{url}\"\n{soon}\
             headers = {{ x-gateway = {header} }}\nquery = {{ code = {query} }}\n\
             [assistants.default]\nupstream = \"simulated\"\n{assistant}\ninstructions = \"Be kind.\"\n\
             [upstreams.down]\nkind = \"{kind}\"\nbase_url = \"http://127.0.0.1:9/v1\"\n{soon}api_key = {key}\n\
             [assistants.down]\nupstream = \"down\"\n{assistant}\n",
            backend = json!(secret("auth.keys.backend")),
            tenant = word("a tenant"),
            filed = given("key", &secret("auth.keys.filed")),
            jwt = given("jwt", &secret("auth.jwt.secret")),
            header = json!(secret("upstreams.simulated.headers")),
            query = json!(secret("upstreams.simulated.query")),
            url = scene.upstream_url,
            key = json!(plain_secret("the parrot's key")),
        );
        for says in PARROT_SAYS {
            config = format!(
                "{config}[upstreams.parrot-{says}]\nkind = \"{kind}\"\nbase_url = \"{parrot}/{says}\"\n{soon}\
                 api_key_file = {key}\n[assistants.parrot-{says}]\nupstream = \"parrot-{says}\"\n{assistant}\n",
                key = given(&format!("parrot-{says}"), &plain_secret("the parrot's key")),
            );
        }
        let mut database = scene.database.url();
        if scene.backend == Backend::Postgres {
            // The server trusts everybody on this machine.
            let password = plain_secret("the password");
            database = database.replace("postgres@", &format!("postgres:{password}@"));
            database = format!("{database}&pasword={}", plain_secret("a misspelt password"));
        }
        let env = BTreeMap::from([
            ("DATABASE_URL", database),
            ("THREADKEEPER_UPSTREAMS__SIMULATED__API_KEY", secret("upstreams.simulated.api_key")),
        ]);
        let (mut secrets, mut words) = (Needles::default(), Needles::default());
        for name in SECRETS {
            secrets.add(name, &secret(name), PIECE);
        }
        for name in PLAIN_SECRETS {
            secrets.add(name, &planted(name), PIECE);
        }
        for name in WORDS {
            words.add(name, &word(name), PIECE);
        }
        let token = signed(&word("a subject"));
        secrets.add("the signature of a token", token.rsplit('.').next().unwrap(), PIECE);
        Self { folder, config, env, secrets, words }
    }

    /// The binary, with this configuration, in folders of its own.
    fn command(&self, config: &str, args: &[&str]) -> Command {
        let file = self.folder.path().join("given/gateway.toml");
        std::fs::write(&file, config).unwrap();
        let mut command = Gateway::command(args);
        command.arg("--config").arg(file);
        let temp = self.folder.path().join("temp");
        command.envs(&self.env).env("TMPDIR", temp).current_dir(self.folder.path().join("work"));
        command.env("RUST_BACKTRACE", "1");
        command
    }

    /// What a command says, which may be none of what is looked for.
    fn run(&self, args: &[&str]) -> String {
        self.run_with(&self.config, args)
    }

    fn run_with(&self, config: &str, args: &[&str]) -> String {
        let Output { stdout, stderr, .. } = self.command(config, args).output().unwrap();
        let text = [stdout, stderr].concat();
        assert_eq!(self.secrets.find(&text), None, "{args:?} tells a secret");
        assert_eq!(self.words_but_tenant(&text), None, "{args:?} tells what was said");
        String::from_utf8(text).unwrap()
    }

    /// Who lists keys is told whose they are.
    fn words_but_tenant(&self, text: &[u8]) -> Option<String> {
        let text = String::from_utf8_lossy(text).replace(&word("a tenant"), "");
        self.words.find(text.as_bytes())
    }

    /// A key that is recorded. It is told on standard output, and from then on looked for.
    fn make_key(&mut self, scope: &str) -> String {
        let args = ["keys", "create", "--scope", scope, "--label", "a label"];
        let Output { stdout, stderr, status } = self.command(&self.config, &args).output().unwrap();
        assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
        let key = String::from_utf8(stdout).unwrap().trim().to_owned();
        self.secrets.add("a recorded key", &key[16..], HEX_PIECE);
        assert_eq!(self.secrets.find(&stderr), None, "keys create tells a secret");
        key
    }

    /// A gateway whose standard output goes to a file.
    async fn serve(&self) -> Gateway {
        let serve = self.command(&self.config, &["serve", "--listen", "127.0.0.1:0"]);
        let mut command = Command::new("sh");
        command.args(["-c", "exec \"$@\" > \"$0\""]).arg(self.folder.path().join("stdout"));
        command.arg(serve.get_program()).args(serve.get_args());
        for (name, value) in serve.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.current_dir(serve.get_current_dir().unwrap());
        Gateway::spawn(command, TempDir::new().unwrap()).await
    }

    /// Sends a request. The answer may hold what was said, since it is for whoever said it.
    async fn ask(&self, request: RequestBuilder) -> Answer {
        let response = request.send().await.unwrap();
        let (status, headers) = (response.status(), response.headers().clone());
        let text = response.text().await.unwrap();
        for bytes in [format!("{headers:?}").as_bytes(), text.as_bytes()] {
            assert_eq!(self.secrets.find(bytes), None, "an answer tells a secret");
        }
        let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
        Answer { status, headers, body }
    }

    async fn say(&self, gateway: &Gateway, key: &str, user: &str, content: &str) -> Answer {
        let request = gateway.request(Method::POST, &format!("/v1/users/{user}/messages"));
        self.ask(request.bearer_auth(key).json(&json!({"content": content}))).await
    }

    /// Looks through all that a gateway has logged.
    fn logged(&self, gateway: &Gateway) {
        let lines = gateway.logs();
        assert!(lines.iter().any(|line| line.contains("answered")), "nothing was logged");
        for line in lines {
            assert_eq!(self.secrets.find(line.as_bytes()), None, "a secret is logged");
            assert_eq!(self.words.find(line.as_bytes()), None, "what was said is logged");
        }
    }

    /// Looks through all files that processes have left, besides the export and what was given to them.
    fn search_files(&self) {
        let stdout = std::fs::read(self.folder.path().join("stdout")).unwrap();
        assert_eq!(String::from_utf8(stdout).unwrap(), "", "`serve` writes to standard output");
        for name in ["work", "temp"] {
            let files = files_below(&self.folder.path().join(name));
            assert_eq!(files, Vec::<PathBuf>::new(), "files that nobody asked for");
        }
    }
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
}

/// Configurations and variables that are wrong, in or beside a secret.
fn mistakes(world: &World) {
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
        format!("[server]\nlisten = {quoted}\nmax_body_bytes = {quoted}\nkeep_alive = {quoted}\ncors_origins = {quoted}"),
        format!("[log]\nfilter = {quoted}"),
    ];
    for line in lines {
        for command in ["check-config", "serve"] {
            let told = world.run_with(&line, &[command]);
            assert!(told.contains("threadkeeper: "), "{command} takes {line}: {told}");
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
            assert_eq!(world.secrets.find(&[stdout, stderr].concat()), None, "{name} is told");
        }
    }
    // A server that lets nobody in, and parameters that are none.
    for rest in ["", "?sslmode=KEY", "?pasword=KEY"] {
        let url = format!("postgres://u:KEY@127.0.0.1:9/d{rest}").replace("KEY", &planted("the password"));
        let mut serve = world.command(&world.config, &["serve"]);
        serve.env("DATABASE_URL", &url).env("THREADKEEPER_STORE__STARTUP_TIMEOUT", "50ms");
        let Output { stderr, .. } = serve.output().unwrap();
        assert_eq!(world.secrets.find(&stderr), None, "the URL is told");
        assert!(!stderr.is_empty());
    }
}

/// Turns and what goes with them, as a backend has them.
async fn conversations(world: &World, gateway: &Gateway, key: &str) {
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
            let request = gateway.request(Method::POST, &messages).bearer_auth(key).json(&body);
            let request = request.header("idempotency-key", word("an idempotency key"));
            let answer = world.ask(request).await;
            assert!([200, 422].contains(&answer.status.as_u16()), "{answer:?}");
        }
        let streamed = json!({"content": format!("{said} [[sim: comments tokens=20]]"), "stream": true});
        let events = send(Method::POST, &messages, streamed).await;
        assert!(events.body.as_str().unwrap().contains("run.completed"), "{events:?}");
        let asks = json!({"content": format!("{said} [[sim: tool=get_weather]]")});
        let asks = send(Method::POST, &messages, asks).await.ok();
        let run = format!("{scope}/runs/{}", asks["run"]["id"].as_str().unwrap());
        let call = &asks["run"]["required_action"]["tool_calls"][0];
        assert!(call["arguments"].as_str().unwrap().contains(&said), "{asks:#}");
        let outputs = format!("{run}/tool_outputs");
        let output =
            |id: &Value| json!({"tool_outputs": [{"tool_call_id": id, "output": word("an output")}]});
        send(Method::POST, &outputs, output(&json!(word("an output")))).await;
        send(Method::POST, &outputs, output(&call["id"])).await.ok();
        send(Method::POST, &outputs, output(&call["id"])).await;
        let body = json!({"content": format!("{said} [[sim: silent_after=2]]")});
        let request = gateway.request(Method::POST, &messages).bearer_auth(key).json(&body);
        world.ask(request.header("prefer", "respond-async")).await;
        send(Method::POST, &format!("{scope}/thread/cancel"), json!({})).await.ok();
        for failing in ["fail", "status=401", "status=500", "incomplete", "refusal", "cut=3", "mid_error"] {
            let body = json!({"content": format!("{said} [[sim: {failing}]]")});
            send(Method::POST, &messages, body).await;
        }
        send(Method::PATCH, &format!("{scope}/thread"), json!({"metadata": metadata})).await.ok();
        send(Method::POST, &format!("{scope}/thread/rollover"), json!({})).await;
        for path in ["/messages", "/thread", "/runs"] {
            get(&format!("{scope}{path}")).await.ok();
        }
        get(&format!("{run}/events")).await.ok();
        get(&run).await.ok();
        // What is refused is not repeated where others see it.
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
            assert!(send(Method::POST, &messages, body).await.status.is_client_error());
        }
        let broken = gateway.request(Method::POST, &messages).bearer_auth(key);
        let broken = broken.header("content-type", "application/json");
        world.ask(broken.body(format!("{{\"content\": \"{wrong}"))).await;
        let repeated =
            gateway.request(Method::POST, &messages).bearer_auth(key).json(&json!({"content": said}));
        let twice = repeated.header("idempotency-key", word("another idempotency key"));
        world.ask(twice.header("idempotency-key", word("another idempotency key"))).await;
        let lost = gateway.request(Method::GET, &format!("{run}/events")).bearer_auth(key);
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

/// Everybody who may come to the door.
async fn callers(world: &World, gateway: &Gateway, good: &str, revoked: &str) {
    let filed = secret("auth.keys.filed");
    let subject = word("a subject");
    for key in [&filed, good, &signed(&subject)] {
        world.say(gateway, key, &subject, &word("what is said")).await.ok();
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
        assert_eq!(world.say(gateway, key, &subject, &word("what is said")).await.status, 401);
    }
    let path = format!("/v1/users/{}/threads", word("a user"));
    let get = |path: &str| gateway.request(Method::GET, path);
    for request in [
        get(&path),
        get(&path).basic_auth(&strange, Some(&strange)),
        get(&path).bearer_auth(&filed).bearer_auth(&strange),
        get(&path).header("authorization", &strange),
        get(&path).header("authorization", format!("Bearer\t{strange}")),
        get(&path).header("cookie", format!("key={strange}")).header("x-api-key", &strange),
    ] {
        assert_eq!(world.ask(request).await.status, 401);
    }
    // In an address.
    let plain = planted("a key that opens nothing");
    world.ask(get(&format!("{path}?access_token={plain}")).bearer_auth(good)).await;
    world.ask(get(&format!("/healthz?access_token={plain}"))).await;
    world.ask(get(&format!("/v1/{plain}?access_token={plain}"))).await;
}

/// A token of this subject.
fn signed(subject: &str) -> String {
    let claims = json!({
        "iss": "https://login.example/", "aud": "chat", "exp": 4_102_444_800_i64, "sub": subject,
    });
    let key = jsonwebtoken::EncodingKey::from_secret(secret("auth.jwt.secret").as_bytes());
    jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).unwrap()
}

/// Upstreams that are not there, or say what they were told.
async fn bad_upstreams(world: &World, gateway: &Gateway, key: &str) {
    for name in
        ["down"].into_iter().map(str::to_owned).chain(PARROT_SAYS.map(|says| format!("parrot-{says}")))
    {
        let path = format!("/v1/users/{}-{name}/messages", word("a user"));
        for stream in [false, true] {
            let body = json!({"content": word("what is said"), "assistant": name, "stream": stream});
            let answer = world.ask(gateway.request(Method::POST, &path).bearer_auth(key).json(&body)).await;
            let failed = answer.status == StatusCode::OK && answer.body.to_string().contains("run.failed");
            assert!(answer.status.is_server_error() || failed, "{name}: {answer:?}");
        }
        let list = path.replace("/messages", "/runs");
        world.ask(gateway.request(Method::GET, &list).bearer_auth(key)).await.ok();
    }
}

/// What is no HTTP, or half of it.
async fn rough_requests(world: &World, gateway: &Gateway) {
    let (key, said) = (secret("a key that opens nothing"), word("what is said"));
    for request in [
        format!("GET /{said} HTTP/1.1\r\nhost: h\r\nauthorization: Bearer {key}\r\nbad header {key}\r\n\r\n"),
        format!("GET /{said} HTTP/9\r\nauthorization: Bearer {key}\r\n\r\n"),
        format!("{key} {said}\r\n\r\n"),
        format!("POST /v1/users/{said}/messages HTTP/1.1\r\nhost: h\r\ncontent-length: {key}\r\n\r\n{said}"),
        format!("GET / HTTP/1.1\r\nhost: h\r\nx: {}\r\n\r\n", key.repeat(1000)),
        format!(
            "GET /healthz HTTP/1.1\r\nhost: h\r\nconnection: close\r\nx-request-id: {said}-{key}\r\n\r\n"
        ),
    ] {
        let mut connection = tokio::net::TcpStream::connect(gateway.address()).await.unwrap();
        connection.write_all(request.as_bytes()).await.unwrap();
        connection.shutdown().await.unwrap();
        let mut answer = Vec::new();
        // It may be cut off, since not all of the request was read.
        let _ = connection.read_to_end(&mut answer).await;
        assert_eq!(world.secrets.find(&answer), None, "an answer tells a secret");
    }
}

async fn deletions(world: &World, gateway: &Gateway, key: &str) {
    let user = format!("/v1/users/{}", word("a user"));
    let delete = gateway.request(Method::DELETE, &format!("{user}/topics/{}/thread", word("a topic")));
    let deleted = world.ask(delete.bearer_auth(key).header("prefer", "wait=1")).await;
    let receipt = format!("/v1/deletions/{}", deleted.body["id"].as_str().unwrap());
    world.ask(gateway.request(Method::GET, &receipt).bearer_auth(key)).await.ok();
    for name in ["down", "parrot-401"] {
        let request = gateway.request(Method::DELETE, &format!("{user}-{name}")).bearer_auth(key);
        world.ask(request.header("prefer", "respond-async")).await;
    }
    world.ask(gateway.request(Method::POST, "/v1/admin/cleanup").bearer_auth(key)).await.ok();
}

/// Lines that cannot be brought along, each for what is said in it.
fn broken_lines() -> String {
    let wrong = word("what is no content");
    let lines = [
        json!({"type": wrong}).to_string(),
        json!({"type": "thread", "key": wrong}).to_string(),
        json!({"type": "thread", "key": {"user": format!("{wrong}\0")}}).to_string(),
        json!({"type": "thread", "key": {"user": wrong, "topic": [wrong]}}).to_string(),
        json!({"type": "thread", "key": {"user": "u"}, "created_at": wrong}).to_string(),
        json!({"type": "message", "role": wrong, "content": wrong}).to_string(),
        json!({"type": "message", "role": "user", "content": [{"type": wrong}]}).to_string(),
        json!({"type": "message", "role": "user", "content": {&wrong: 1}, "thread_id": wrong}).to_string(),
        format!("{{\"type\": \"message\", {wrong}"),
        wrong,
    ];
    lines.join("\n")
}

/// A server that says what it was told: in its headers, its errors and its events.
struct Parrot {
    url: String,
    _task: JoinSet<()>,
}

/// How it says it.
const PARROT_SAYS: [&str; 6] = ["400", "401", "500", "307", "garbage", "events"];

impl Parrot {
    async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let mut task = JoinSet::new();
        task.spawn(async move { axum::serve(listener, Router::new().fallback(repeat)).await.unwrap() });
        Self { url, _task: task }
    }
}

async fn repeat(request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let key = parts.headers["authorization"].to_str().unwrap().strip_prefix("Bearer ").unwrap();
    let heard = format!("{} {:?} {}", parts.uri, parts.headers, String::from_utf8_lossy(&body));
    let headers = format!("{key} {}", parts.headers["authorization"].to_str().unwrap());
    let error =
        json!({"code": key, "type": key, "param": key, "message": format!("{key} {headers} {heard}")});
    let mut segments = parts.uri.path().split('/').skip(1);
    let (says, what) = (segments.next().unwrap(), segments.next().unwrap());
    let makes_thread =
        parts.method == Method::POST && parts.uri.path().split('/').count() == 3 && what != "responses";
    let mut response = Response::new(Body::empty());
    let mut kind = "application/json";
    let body = match says {
        "events" if makes_thread => json!({"id": "thread_1", "object": "thread"}).to_string(),
        "events" if parts.method == Method::POST => {
            kind = "text/event-stream";
            let begun = json!({"id": "run_1", "object": "thread.run", "status": "in_progress"});
            let failed = json!({"id": "run_1", "object": "thread.run", "status": "failed", "last_error": error, "error": error});
            let events = if what == "threads" {
                [("thread.run.created", begun), ("thread.run.failed", failed)]
            } else {
                [
                    ("response.created", json!({"type": "response.created", "response": begun})),
                    ("response.failed", json!({"type": "response.failed", "response": failed})),
                ]
            };
            let event = |(name, data): (&str, Value)| format!(": {heard}\nevent: {name}\ndata: {data}\n\n");
            events.map(event).concat()
        }
        "garbage" => heard,
        _ => {
            *response.status_mut() = says.parse().unwrap_or(StatusCode::NOT_FOUND);
            json!({"error": error}).to_string()
        }
    };
    for name in
        ["x-request-id", "apim-request-id", "retry-after", "location", "server", "openai-poll-after-ms"]
    {
        response.headers_mut().insert(name, HeaderValue::from_str(key).unwrap());
    }
    response.headers_mut().insert("content-type", HeaderValue::from_static(kind));
    *response.body_mut() = body.into();
    response
}

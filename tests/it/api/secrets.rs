//! Searches everything that a process writes for secrets and for users' texts.
//!
//! The test plants secrets wherever one can be configured or presented, and words wherever a
//! caller can send a text. Then the binary works and fails in many ways, with the fullest log. No
//! piece of a secret may be in its logs, answers, files or database. No piece of a word may be in
//! its logs.

mod echo_upstream;
mod fixture;
mod scenarios;

use reqwest::{Method, StatusCode};
use serde_json::json;
use threadkeeper::config::StoreConfig;
use threadkeeper::simulator::SimulatorConfig;
use threadkeeper::store::Store;
use tokio::task::JoinSet;

use crate::support::TestDatabase;
use crate::support::cluster::{Cluster, Stop};
use crate::support::scene::{Backend, Protocol, Scene};
use crate::support::secret_scan::planted;
use echo_upstream::EchoUpstream;
use fixture::World;
use scenarios::{
    bad_upstreams, broken_lines, callers, conversations, deletions, mistakes, rough_requests,
};

#[tokio::test(flavor = "multi_thread")]
async fn assistants_gateway_on_sqlite_writes_no_secrets() {
    let database = TestDatabase::sqlite().await;
    let scene = Scene::on(
        database,
        Protocol::Assistants,
        Backend::Sqlite,
        SimulatorConfig::default(),
    )
    .await;
    nothing_is_written(scene, "json", None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn responses_gateway_on_sqlite_writes_no_secrets() {
    let database = TestDatabase::sqlite().await;
    let scene = Scene::on(
        database,
        Protocol::Responses,
        Backend::Sqlite,
        SimulatorConfig::default(),
    )
    .await;
    nothing_is_written(scene, "pretty", None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn assistants_gateway_on_postgres_writes_no_secrets() {
    let cluster = Cluster::start();
    let database = TestDatabase::on(&cluster).await;
    let scene = Scene::on(
        database,
        Protocol::Assistants,
        Backend::Postgres,
        SimulatorConfig::default(),
    )
    .await;
    nothing_is_written(scene, "pretty", Some(cluster)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn responses_gateway_on_postgres_writes_no_secrets() {
    let cluster = Cluster::start();
    let database = TestDatabase::on(&cluster).await;
    let scene = Scene::on(
        database,
        Protocol::Responses,
        Backend::Postgres,
        SimulatorConfig::default(),
    )
    .await;
    nothing_is_written(scene, "json", Some(cluster)).await;
}

async fn nothing_is_written(scene: Scene, format: &str, mut cluster: Option<Cluster>) {
    let parrot = EchoUpstream::start().await;
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
            world
                .say(&gateway, key, "alice", &word("what is said in an outage"))
                .await;
        }
        cluster.start_again();
        gateway
            .until("/readyz", |answer| answer.status == StatusCode::OK)
            .await;
        let url = Some(world.env["DATABASE_URL"].clone().into());
        let store = Store::open(&StoreConfig {
            url,
            ..StoreConfig::default()
        })
        .await
        .unwrap();
        assert_eq!(
            world.secrets.find(format!("{store:?}").as_bytes()),
            None,
            "the debug text of a store contains a secret"
        );
        store.close().await;
    }
    deletions(&world, &gateway, &backend).await;
    // One run is active when the process gets SIGTERM.
    let silent = format!("{} [[sim: silent_after=2]]", word("what is said last"));
    let path = format!("/v1/users/{}/messages", word("a user"));
    let last = gateway.request(Method::POST, &path).bearer_auth(&backend);
    let mut last_words = JoinSet::new();
    last_words.spawn(last.json(&json!({"content": silent})).send());
    scene
        .simulator
        .wait_for(|stats| stats.active_runs > 0)
        .await;
    gateway.terminate();
    gateway.exit().await;
    world.logged(&gateway);

    let told = world.run(&["keys", "list"]);
    assert!(
        told.contains(&good[..15]) && told.contains("revoked"),
        "{told}"
    );
    let file = world.folder.path().join("export.ndjson");
    world.run(&[
        "export",
        "--out",
        file.to_str().unwrap(),
        "--tenant",
        &word("a tenant"),
    ]);
    let export = std::fs::read_to_string(&file).unwrap();
    assert!(
        export.contains(&word("what is said")),
        "the export contains the texts: {export}"
    );
    world.run(&["import", file.to_str().unwrap()]);
    std::fs::write(&file, broken_lines()).unwrap();
    world.run(&["import", file.to_str().unwrap()]);
    world.run(&["migrate"]);

    world.search_files();
    for (place, value) in scene.database.everything().await {
        assert_eq!(world.secrets.find(&value), None, "a secret is in {place}");
    }
    let stored = scene.database.texts("SELECT user_key FROM threads").await;
    assert!(
        stored.contains(&word("a user")),
        "the search reads the right database: {stored:?}"
    );
}

/// Returns a secret, which is always the same for a name.
fn secret(name: &str) -> String {
    // Some characters are encoded differently in different places.
    format!(
        "{}\"\\/+%&{}",
        planted(name),
        planted(&format!("the rest of {name}"))
    )
}

/// Returns a secret that may stand in an error's code.
fn plain_secret(name: &str) -> String {
    format!("sk-{}7", planted(name))
}

/// Returns a word of a caller's text.
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

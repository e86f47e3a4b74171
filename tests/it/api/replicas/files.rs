//! A SQLite file serves one process.

use std::time::Instant;

use tempfile::TempDir;

use crate::support::gateway::{Gateway, PATIENCE};
use crate::support::scene::{Backend, Protocol, Scene};

#[tokio::test(flavor = "multi_thread")]
async fn second_process_on_sqlite_file_is_refused_with_reason() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let gateway = scene.gateway().await;
    gateway.say("/v1/users/alice", "hello").await;
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("gateway.toml");
    std::fs::write(&file, scene.config("")).unwrap();
    let begun = Instant::now();
    let mut second = Gateway::command(&["serve", "--listen", "127.0.0.1:0", "--config"]);
    let output = tokio::task::spawn_blocking(move || second.arg(&file).output())
        .await
        .unwrap()
        .unwrap();
    assert!(begun.elapsed() < PATIENCE);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    let path = scene
        .database
        .url()
        .strip_prefix("sqlite:")
        .unwrap()
        .to_owned();
    for told in [&*path, "in use by another process", "use Postgres"] {
        assert!(text.contains(told), "the error lacks `{told}`: {text}");
    }
    gateway.say("/v1/users/alice", "and now?").await;
    // The file is free as soon as its process is gone, however it ended.
    gateway.kill();
    scene
        .gateway()
        .await
        .say("/v1/users/alice", "and now?")
        .await;
}

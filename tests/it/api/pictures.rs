//! A conversation with a phone's picture. The picture is sent, stored, sent again and carried
//! over like any other content.

use std::io::Write;
use std::process::Stdio;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::gateway::{Gateway, text};
use crate::support::history::messages;
use crate::support::scene::{Backend, Protocol, Scene};

const SCOPE: &str = "/v1/users/alice";
/// Length of the data URL, in bytes.
const PICTURE_BYTES: usize = 8 * 1024 * 1024;

/// Each protocol and each store, but not all combinations, since those would take minutes.
#[tokio::test(flavor = "multi_thread")]
async fn picture_in_assistants_thread_survives_rebuild_import_rollover() {
    picture_survives_rebuild_import_rollover(
        Protocol::Assistants,
        Backend::Postgres,
        Backend::Sqlite,
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn picture_in_conversation_survives_rebuild_import_rollover() {
    picture_survives_rebuild_import_rollover(
        Protocol::Responses,
        Backend::Sqlite,
        Backend::Postgres,
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn picture_in_chain_survives_rebuild_import_rollover() {
    picture_survives_rebuild_import_rollover(Protocol::Chain, Backend::Postgres, Backend::Sqlite)
        .await;
}

async fn picture_survives_rebuild_import_rollover(
    protocol: Protocol,
    backend: Backend,
    other: Backend,
) {
    let scene = Scene::new(protocol, backend).await;
    let gateway = scene.gateway().await;
    let url = format!("data:image/jpeg;base64,{}", "A".repeat(PICTURE_BYTES));
    let picture =
        json!([{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": url}}]);
    gateway
        .post(&format!("{SCOPE}/messages"), &json!({"content": picture}))
        .await
        .ok();
    gateway.say(SCOPE, "two").await;

    // Deletes the upstream thread, which is then rebuilt from the transcript.
    let thread = gateway.get(&format!("{SCOPE}/thread")).await.ok();
    let id = thread["upstream_thread_id"].as_str().unwrap();
    if protocol == Protocol::Chain {
        let url = format!("{}/responses/{id}", scene.upstream_url);
        reqwest::Client::new()
            .delete(url)
            .bearer_auth("sk-other")
            .send()
            .await
            .unwrap();
    } else {
        scene.delete_thread(id).await;
    }
    assert_turn(&gateway.say(SCOPE, "three").await, 3);
    check(&scene, &gateway, &picture).await;

    // Exports the thread, and imports it at a gateway whose upstream does not know it.
    let export = gateway
        .request(reqwest::Method::GET, &format!("{SCOPE}/export"))
        .send()
        .await
        .unwrap();
    let export = export.text().await.unwrap();
    let elsewhere = Scene::new(protocol, other).await;
    import(&elsewhere, export).await;
    let successor = elsewhere.gateway().await;
    assert_turn(&successor.say(SCOPE, "four").await, 4);
    check(&elsewhere, &successor, &picture).await;

    // The rollover carries the picture over into a fresh thread.
    gateway
        .post(&format!("{SCOPE}/thread/rollover"), &json!({}))
        .await
        .ok();
    assert_turn(&gateway.say(SCOPE, "four").await, 4);
    let archived = gateway
        .get(&format!("{SCOPE}/messages?archived=true&order=asc&limit=1"))
        .await
        .ok();
    assert_eq!(archived["data"][0]["content"], picture);
}

/// Asserts that the model got this number of messages.
#[track_caller]
fn assert_turn(answer: &Value, turn: usize) {
    assert!(
        text(&answer["message"]).contains(&format!("turn {turn}")),
        "{:#}",
        answer["message"]
    );
}

/// Asserts that the picture is the first message, and that no message is withheld from the model.
async fn check(scene: &Scene, gateway: &Gateway, picture: &Value) {
    assert_eq!(messages(gateway, SCOPE).await[0]["content"], *picture);
    let withheld = "SELECT count(*) FROM messages WHERE upstream_sync = 'withheld'";
    assert_eq!(scene.database.number(withheld).await, 0);
}

pub(super) async fn import(scene: &Scene, lines: String) {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("gateway.toml");
    std::fs::write(&file, scene.config("")).unwrap();
    let mut import = Gateway::command(&["import", "--config"]);
    import
        .arg(&file)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let run = move || {
        let mut child = import.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let writer = std::thread::spawn(move || drop(stdin.write_all(lines.as_bytes())));
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap();
        output
    };
    let output = tokio::task::spawn_blocking(run).await.unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

//! Pages of long messages.

use reqwest::Method;
use serde_json::Value;
use threadkeeper::domain::{ContentPart, MessageId, Role};
use threadkeeper::store::{Imported, ImportedMessage};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::store_contract::{import_messages, import_thread, imported, user};
use crate::support::chance::noise;
use crate::support::gateway::Gateway;
use crate::support::scene::{Backend, Protocol, Scene};

const SCOPE: &str = "/v1/users/alice";
const MESSAGES: usize = 64;
const MIB: usize = 1024 * 1024;

#[tokio::test(flavor = "multi_thread")]
async fn long_messages_cost_little_memory_on_sqlite() {
    long_messages_cost_little_memory(Scene::new(Protocol::Responses, Backend::Sqlite).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn long_messages_cost_little_memory_on_postgres() {
    long_messages_cost_little_memory(Scene::new(Protocol::Responses, Backend::Postgres).await)
        .await;
}

/// Four callers ask for the largest page and do not read it. Then one caller reads all pages, and
/// another one exports them.
async fn long_messages_cost_little_memory(scene: Scene) {
    const READERS: u64 = 4;
    add_messages(&scene).await;
    let gateway = scene.gateway().await;
    gateway.get(&format!("{SCOPE}/thread")).await.ok();
    let before = memory(&gateway, "VmRSS:");

    let mut readers = Vec::new();
    for _ in 0..READERS {
        let mut socket = TcpStream::connect(gateway.address()).await.unwrap();
        let request = format!("GET {SCOPE}/messages?limit=100 HTTP/1.1\r\nhost: x\r\n\r\n");
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut head = [0; 12];
        socket.read_exact(&mut head).await.unwrap();
        assert_eq!(&head, b"HTTP/1.1 200");
        readers.push(socket);
    }
    let held = memory(&gateway, "VmRSS:").saturating_sub(before);
    drop(readers);

    let (mut places, mut pages, mut after) = (Vec::new(), 0, String::new());
    loop {
        let page = gateway
            .get(&format!("{SCOPE}/messages?limit=100&order=asc{after}"))
            .await
            .ok();
        let data = page["data"].as_array().unwrap();
        assert!(
            (1..=4).contains(&data.len()),
            "{} messages in a page",
            data.len()
        );
        places.extend(
            data.iter()
                .map(|message| message["content"][0]["text"].as_str().unwrap()[..3].to_owned()),
        );
        pages += 1;
        if page["has_more"] == Value::Bool(false) {
            break;
        }
        after = format!("&after={}", page["last_id"].as_str().unwrap());
    }
    assert!(
        places
            .iter()
            .map(|place| place.parse::<usize>().unwrap())
            .eq(0..MESSAGES),
        "{places:?}"
    );
    let most = memory(&gateway, "VmHWM:").saturating_sub(before);

    let export = gateway
        .request(Method::GET, &format!("{SCOPE}/export"))
        .send()
        .await
        .unwrap();
    let export = export.text().await.unwrap();
    assert_eq!(
        export
            .lines()
            .filter(|line| line.contains(r#""type":"message""#))
            .count(),
        MESSAGES
    );
    let exported = memory(&gateway, "VmHWM:").saturating_sub(before);

    println!(
        "{READERS} readers: {held} KiB more; at most, over {pages} pages: {most}; with the export: {exported}"
    );
    assert!(exported < 96 * 1024, "at most {exported} KiB more");
    assert!(
        held < READERS * 16 * 1024,
        "{READERS} readers make the process grow by {held} KiB"
    );
}

/// Adds messages of 1 MiB each, which begin with their number. Every other one can be compressed
/// to almost nothing.
async fn add_messages(scene: &Scene) {
    let store = scene.database.store().await;
    let thread = imported(&user("alice"));
    let Imported::Added(id) = import_thread(&store, &thread).await else {
        panic!("the thread is new")
    };
    let (noise, silence) = (noise(MIB - 4), "0".repeat(MIB - 4));
    for n in 0..MESSAGES {
        let filler = if n % 2 == 0 { &noise } else { &silence };
        let text = format!("{n:03} {filler}");
        let message = ImportedMessage {
            id: MessageId::new(),
            role: Role::User,
            content: vec![ContentPart::text(text)],
            upstream_message_id: None,
            sync: None,
            created_at: None,
        };
        import_messages(&store, id, &[message]).await;
    }
    store.close().await;
}

/// Returns a line of the process's status, in KiB.
pub(super) fn memory(gateway: &Gateway, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", gateway.id())).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

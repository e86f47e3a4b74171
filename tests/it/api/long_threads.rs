//! Threads that are longer than what can be sent to an upstream at once.

use std::fmt::Write;

use threadkeeper::domain::{ContentPart, MessageId, Role, UpstreamThreadId};
use threadkeeper::store::{Imported, ImportedMessage, ImportedThread};

use super::pages::memory;
use crate::store_contract::{import_messages, import_thread, imported, user};
use crate::support::gateway::{Gateway, text};
use crate::support::history::{Line, upstream};
use crate::support::scene::{Backend, Protocol, Scene};

/// Each protocol and each store, but not all combinations, since those would take minutes.
mod gone {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn long_assistants_thread_rebuilt_from_newest_messages() {
        long_thread_is_rebuilt(Protocol::Assistants, Backend::Postgres, "thread_gone").await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn long_conversation_rebuilt_from_newest_messages() {
        long_thread_is_rebuilt(Protocol::Responses, Backend::Sqlite, "conv_gone").await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn long_chain_rebuilt_from_newest_messages() {
        long_thread_is_rebuilt(Protocol::Chain, Backend::Postgres, "resp_gone").await;
    }
}

const SCOPE: &str = "/v1/users/alice";
/// 36 MB in all.
const MESSAGES: usize = 120;
/// More than an Assistants server takes as one text.
const MESSAGE_BYTES: usize = 300_000;
/// Most bytes of messages that are sent to an upstream thread at once.
const TOLD_BYTES: usize = 16 * 1024 * 1024;
/// Largest growth of a process, in KiB. It includes the sent messages twice, as values and as the
/// text of a request, as much again that the allocator keeps, and one page of messages.
const MAX_GROWTH_KIB: u64 = 144 * 1024;

#[tokio::test(flavor = "multi_thread")]
async fn long_thread_without_upstream_thread_starts_with_newest_messages() {
    let scene = Scene::new(Protocol::Assistants, Backend::Sqlite).await;
    let thread = ImportedThread {
        upstream: "simulated".to_owned(),
        ..imported(&user("alice"))
    };
    continues_with_newest_messages(scene, &thread).await;
}

async fn long_thread_is_rebuilt(protocol: Protocol, backend: Backend, gone: &str) {
    let thread = ImportedThread {
        upstream: "simulated".to_owned(),
        upstream_thread_id: Some(UpstreamThreadId(gone.to_owned())),
        ..imported(&user("alice"))
    };
    continues_with_newest_messages(Scene::new(protocol, backend).await, &thread).await;
}

async fn continues_with_newest_messages(scene: Scene, thread: &ImportedThread) {
    fill(&scene, thread).await;
    let gateway = scene.gateway().await;
    gateway.get(&format!("{SCOPE}/thread")).await.ok();
    let before = memory(&gateway, "VmRSS:");
    // The server takes only a part of the messages with the new thread, and fails at the next part.
    let part = match scene.protocol {
        Protocol::Assistants => "create_message",
        Protocol::Responses | Protocol::Chain => "create_items",
    };
    let is_rebuilt = thread.upstream_thread_id.is_some();
    scene.fault(part, "status=500", u32::from(is_rebuilt));
    let first = gateway.say(SCOPE, "one").await;
    let grown = memory(&gateway, "VmHWM:").saturating_sub(before);
    println!("{grown} KiB more");
    assert!(grown < MAX_GROWTH_KIB, "the process grew by {grown} KiB");

    if is_rebuilt && scene.protocol != Protocol::Chain {
        let threads = scene.upstream_threads();
        assert_eq!(
            threads.len(),
            1,
            "a thread without its history stays: {threads:?}"
        );
        let stats = scene.simulator.stats();
        assert!(stats.requests_by_operation[part] > 1, "{stats:?}");
    }

    // The upstream gets the newest messages that fit, in their order.
    let told = TOLD_BYTES / MESSAGE_BYTES;
    let mut expected: Vec<String> = (MESSAGES - told..MESSAGES)
        .map(|n| format!("{n:03} "))
        .collect();
    expected.extend(["one".to_owned(), text(&first["message"]).to_owned()]);
    check(&scene, &gateway, &expected, MESSAGES - told).await;
    let lines = gateway
        .logs()
        .iter()
        .filter(|line| line.contains("older messages are withheld"))
        .count();
    assert_eq!(lines, 1);

    // Later runs and another loss do not bring back older messages.
    for (n, word) in [(2, "two"), (3, "three")] {
        let next = gateway.say(SCOPE, word).await;
        let users = (MESSAGES - told..MESSAGES)
            .filter(|n| n.is_multiple_of(2))
            .count();
        assert!(
            text(&next["message"]).contains(&format!("turn {}", users + n)),
            "{next:#}"
        );
        expected.extend([word.to_owned(), text(&next["message"]).to_owned()]);
        check(&scene, &gateway, &expected, MESSAGES - told).await;
        lose_thread(&scene, &gateway).await;
    }
}

/// Checks that the upstream thread has messages that begin like `expected`, and that `withheld`
/// messages stay withheld.
async fn check(scene: &Scene, gateway: &Gateway, expected: &[String], withheld: usize) {
    let there = upstream(scene, gateway, SCOPE).await;
    let begins = |((_, there), expected): (&Line, &String)| there.starts_with(expected);
    assert!(
        there.len() == expected.len() && there.iter().zip(expected).all(begins),
        "{expected:?}"
    );
    let count = "SELECT count(*) FROM messages WHERE upstream_sync = 'withheld'";
    assert_eq!(
        scene.database.number(count).await,
        i64::try_from(withheld).unwrap()
    );
    let thread = gateway.get(&format!("{SCOPE}/thread")).await.ok();
    assert_eq!(
        thread["message_count"],
        withheld + expected.len(),
        "the transcript keeps all messages"
    );
}

/// Deletes the upstream thread directly, as another client may.
async fn lose_thread(scene: &Scene, gateway: &Gateway) {
    let thread = gateway.get(&format!("{SCOPE}/thread")).await.ok();
    let id = thread["upstream_thread_id"].as_str().unwrap();
    if scene.protocol == Protocol::Chain {
        let url = format!("{}/responses/{id}", scene.upstream_url);
        let answer = reqwest::Client::new()
            .delete(url)
            .bearer_auth("sk-other")
            .send()
            .await
            .unwrap();
        assert!(answer.status().is_success());
    } else {
        scene.delete_thread(id).await;
    }
}

/// Fills a thread with long messages of alternating roles, which begin with their number.
async fn fill(scene: &Scene, thread: &ImportedThread) {
    let store = scene.database.store().await;
    let Imported::Added(id) = import_thread(&store, thread).await else {
        panic!("the thread is new")
    };
    let message = |n: usize| {
        let mut text = format!("{n:03} ");
        while text.len() < MESSAGE_BYTES {
            write!(text, "{:07} ", n * MESSAGE_BYTES + text.len()).unwrap();
        }
        text.truncate(MESSAGE_BYTES);
        ImportedMessage {
            id: MessageId::new(),
            role: if n.is_multiple_of(2) {
                Role::User
            } else {
                Role::Assistant
            },
            content: vec![ContentPart::text(text)],
            upstream_message_id: None,
            sync: None,
            created_at: None,
        }
    };
    for first in (0..MESSAGES).step_by(20) {
        let some: Vec<_> = (first..first + 20).map(message).collect();
        import_messages(&store, id, &some).await;
    }
    store.close().await;
}

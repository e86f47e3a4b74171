//! The use cases of `runs/`, with upstreams and databases that misbehave in ways that no real one
//! can be brought to.

mod lifecycle;
mod scripted;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use threadkeeper::config::{AssistantConfig, Config};
use threadkeeper::domain::{
    ConversationKey, Fingerprints, Metadata, MultitaskStrategy, ReplicaId, RunErrorCode, RunStatus,
};
use threadkeeper::locks::Share;
use threadkeeper::runs::{
    Answer, ConfiguredUpstream, NewMessage, RunEvent, RunSettings, Runs, RunsParts, Tasks,
};
use threadkeeper::store::Store;
use threadkeeper::upstream::Upstream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::store_contract::{text, user};
use crate::support::TestDatabase;
use scripted::{Scripted, Settling};

fn key() -> ConversationKey {
    user("alice")
}

fn message(words: &str) -> NewMessage {
    NewMessage {
        content: Some(text(words).try_into().unwrap()),
        assistant: None,
        strategy: MultitaskStrategy::Enqueue,
        metadata: Metadata::default(),
        timeout: None,
        ttl: None,
        cancel: CancellationToken::new(),
        idempotency: None,
        by_user: false,
        only_repeats: None,
        share: Share::default(),
    }
}

/// The use cases of one process, without HTTP.
struct Process {
    runs: Runs,
    replica: ReplicaId,
    tasks: TaskTracker,
    draining: CancellationToken,
    stop: CancellationToken,
}

const ALIVE: Duration = Duration::from_mins(1);

impl Process {
    /// Makes a process with this store and upstream. It accepts no message before its session is
    /// renewed.
    fn new(store: Arc<Store>, upstream: Arc<dyn Upstream>) -> Self {
        Self::configured(store, upstream, false, Config::default())
    }

    fn configured(
        store: Arc<Store>,
        upstream: Arc<dyn Upstream>,
        has_external_writers: bool,
        config: Config,
    ) -> Self {
        let assistant = AssistantConfig {
            upstream: "main".to_owned(),
            ..AssistantConfig::default()
        };
        let (tasks, replica) = (TaskTracker::new(), ReplicaId::new());
        let (draining, stop) = (CancellationToken::new(), CancellationToken::new());
        let upstream = ConfiguredUpstream {
            adapter: upstream,
            breaker: None,
            has_external_writers,
            gets_keys: false,
        };
        let runs = Runs::new(RunsParts {
            store,
            upstreams: BTreeMap::from([("main".to_owned(), upstream)]),
            settings: RunSettings {
                assistants: BTreeMap::from([("default".to_owned(), assistant)]),
                default_assistant: "default".to_owned(),
                lifetimes: config.lifetimes(),
                runs: config.runs,
                sessions: config.sessions,
                threads: config.threads,
                fingerprints: Fingerprints::new(&[7; 32]),
                admission_timeout: Duration::from_secs(5),
                attend_every: Duration::from_secs(3),
            },
            replica,
            tasks: Tasks {
                tracker: tasks.clone(),
                draining: draining.clone(),
                stop: stop.clone(),
            },
        });
        Self {
            runs,
            replica,
            tasks,
            draining,
            stop,
        }
    }

    async fn alive(store: Arc<Store>, upstream: Arc<dyn Upstream>) -> Self {
        let process = Self::new(store, upstream);
        process.runs.renew("127.0.0.1:1", ALIVE).await.unwrap();
        process
    }
}

#[tokio::test]
async fn adapter_panic_fails_run_and_frees_thread() {
    let database = TestDatabase::sqlite().await;
    let upstream = Scripted::new(false);
    upstream.settles(Settling::Panics);
    let Process { runs, .. } = Process::new(database.store().await, upstream);
    assert!(
        runs.submit(key(), message("too early")).await.is_err(),
        "a replica without a session accepts no message"
    );
    runs.renew("127.0.0.1:1", ALIVE).await.unwrap();
    // The last adapter panics only while the run is settled, after its stream broke off.
    for (words, code) in [
        ("panic", RunErrorCode::Internal),
        ("falter", RunErrorCode::Internal),
        ("break", RunErrorCode::StreamBroken),
    ] {
        // The second run panics too, since it first settles the run before it. If that one still
        // held its ticket or its thread, the second would be refused.
        for code in [code, RunErrorCode::Internal] {
            let new = NewMessage {
                strategy: MultitaskStrategy::Reject,
                ..message(words)
            };
            let submitted = runs.submit(user(words), new).await.unwrap();
            let events: Vec<_> = submitted
                .follow
                .events(0)
                .map(|(_, event)| event)
                .collect()
                .await;
            let Some(RunEvent::Ended(outcome)) = events.last() else {
                panic!("{words}: {events:?}")
            };
            assert_eq!(outcome.run.status, RunStatus::Failed, "{words}");
            assert_eq!(outcome.run.error.as_ref().unwrap().code, code, "{words}");
            assert!(matches!(
                submitted.follow.answer(0).await,
                Some(Answer::Ended(_))
            ));
        }
    }
}

/// A run whose stream broke off may have completed upstream. Readers then get the whole reply.
#[tokio::test]
async fn readers_see_reply_found_while_settling() {
    let database = TestDatabase::sqlite().await;
    let upstream = Scripted::new(false);
    let Process { runs, .. } = Process::alive(database.store().await, upstream).await;
    let submitted = runs.submit(key(), message("break")).await.unwrap();
    let live: Vec<_> = submitted.follow.events(0).collect().await;
    let (_, follow) = runs.follow(&key(), submitted.run.id).await.unwrap();
    let recorded: Vec<_> = follow.events(0).collect().await;
    for events in [live, recorded] {
        let [
            ..,
            (n, RunEvent::Delta(delta)),
            (m, RunEvent::MessageCompleted(message)),
            (_, RunEvent::Ended(outcome)),
        ] = events.as_slice()
        else {
            panic!("{events:?}")
        };
        assert_eq!((&*delta.text, *m), ("held", n + 1));
        assert_eq!(
            (&message.content, outcome.run.status),
            (&crate::store_contract::text("held"), RunStatus::Completed)
        );
    }
}

//! What the `Store` trait promises, shown on both backends.

mod admission;
mod backends;
mod random;
mod reading;
mod replicas;
mod turns;

use std::collections::BTreeMap;
use std::time::Duration;

use threadkeeper::domain::{
    ContentPart, ConversationKey, MessageId, Metadata, MultitaskStrategy, PageRequest, ReplicaId, Run, RunId,
    RunStatus, Scope, SessionKey, TenantKey, Thread, ThreadId, TopicKey, UserKey,
};
use threadkeeper::store::{
    Admission, Admitted, Claim, Finished, InputMessage, Reply, RunEnd, RunLease, Store, Turn,
};

use crate::support::TestDatabase;

/// Makes a test of each case and backend. A case is a function of the database and a store on it.
macro_rules! on_every_backend {
    ($($case:ident),+ $(,)?) => {
        mod sqlite {
            $(#[tokio::test]
            async fn $case() {
                let database = $crate::support::TestDatabase::sqlite().await;
                let store = database.store().await;
                super::$case(&database, &*store).await;
                store.close().await;
            })+
        }
        mod postgres {
            $(#[tokio::test]
            async fn $case() {
                let database = $crate::support::TestDatabase::postgres().await;
                let store = database.store().await;
                super::$case(&database, &*store).await;
                store.close().await;
            })+
        }
    };
}
use on_every_backend;

fn user(name: &str) -> ConversationKey {
    ConversationKey {
        tenant: TenantKey::default(),
        user: UserKey::try_from(name.to_owned()).unwrap(),
        scope: Scope::User,
    }
}

fn session(name: &str, session: &str) -> ConversationKey {
    ConversationKey { scope: Scope::Session(SessionKey::try_from(session.to_owned()).unwrap()), ..user(name) }
}

fn topic(name: &str, topic: &str) -> ConversationKey {
    ConversationKey { scope: Scope::Topic(TopicKey::try_from(topic.to_owned()).unwrap()), ..user(name) }
}

fn text(text: &str) -> Vec<ContentPart> {
    vec![ContentPart::Text { text: text.to_owned() }]
}

fn metadata(pairs: &[(&str, &str)]) -> Metadata {
    let pairs: BTreeMap<_, _> = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    Metadata::try_from(pairs).unwrap()
}

/// A message of a key, of a replica that nobody knows.
fn admission(key: &ConversationKey) -> Admission {
    Admission {
        key: key.clone(),
        new_thread: ThreadId::new(),
        thread_ttl: None,
        upstream: "main".to_owned(),
        run_id: RunId::new(),
        assistant: "default".to_owned(),
        strategy: MultitaskStrategy::Enqueue,
        metadata: Metadata::default(),
        message: InputMessage { id: MessageId::new(), content: text("hello") },
        timeout: Duration::from_mins(1),
        replica: ReplicaId::new(),
    }
}

fn completed(reply: Option<&str>) -> RunEnd {
    RunEnd {
        status: RunStatus::Completed,
        error: None,
        usage: None,
        upstream_run_id: None,
        upstream_thread_id: None,
        reply: reply.map(|reply| Reply {
            id: MessageId::new(),
            content: text(reply),
            upstream_message_id: None,
        }),
    }
}

fn first_page<Id>() -> PageRequest<Id> {
    PageRequest { limit: 100, ascending: true, after: None, before: None }
}

fn started(admitted: Admitted) -> Turn {
    match admitted {
        Admitted::Started(turn) => *turn,
        other => panic!("started was expected, not {other:?}"),
    }
}

fn queued(admitted: Admitted) -> (RunLease, Thread, Run, i64) {
    match admitted {
        Admitted::Queued { lease, thread, run, position } => (lease, *thread, *run, position),
        other => panic!("queued was expected, not {other:?}"),
    }
}

fn claimed(claim: Claim) -> Turn {
    match claim {
        Claim::Started(turn) => *turn,
        other => panic!("started was expected, not {other:?}"),
    }
}

/// Admits a message of the key and ends its run.
async fn exchange(store: &dyn Store, key: &ConversationKey) -> Finished {
    let turn = started(store.admit(&admission(key)).await.unwrap());
    store.finish(&turn.lease, &completed(Some("hi"))).await.unwrap().unwrap()
}

/// The positions, roles and texts of a key's transcript, after checking that it has no gaps and is counted right.
async fn transcript(store: &dyn Store, key: &ConversationKey) -> Vec<String> {
    let (thread, _) = store.thread(key).await.unwrap().unwrap();
    let page = store.messages(key, &first_page()).await.unwrap().unwrap();
    assert!(!page.has_more, "more than a page");
    assert_eq!(thread.message_count, i64::try_from(page.data.len()).unwrap(), "message_count is off");
    let line = |(position, message): (i64, &threadkeeper::domain::Message)| {
        assert_eq!(message.position, position, "a gap in the transcript");
        let [ContentPart::Text { text }] = &message.content[..] else { panic!("one text was expected") };
        format!("{}: {text}", message.role)
    };
    (1..).zip(&page.data).map(line).collect()
}

/// Checks, over the whole database, what must hold at any time.
async fn check_invariants(database: &TestDatabase) {
    for (rule, broken) in [
        (
            "at most one active run a thread",
            "SELECT count(*) FROM (SELECT thread_id FROM runs WHERE status IN ('in_progress', 'requires_action', \
             'cancelling') GROUP BY thread_id HAVING count(*) > 1) x",
        ),
        (
            "at most one current thread a key",
            "SELECT count(*) FROM (SELECT 1 FROM threads WHERE lifecycle = 'current' \
             GROUP BY tenant, user_key, scope_kind, scope_name HAVING count(*) > 1) x",
        ),
        (
            "positions from 1 to message_count",
            "SELECT count(*) FROM threads t WHERE message_count <> (SELECT count(*) FROM messages m WHERE \
             m.thread_id = t.id) OR message_count <> (SELECT COALESCE(max(position), 0) FROM messages m WHERE \
             m.thread_id = t.id)",
        ),
        (
            "seqs from 1 to run_count",
            "SELECT count(*) FROM threads t WHERE run_count <> (SELECT count(*) FROM runs r WHERE \
             r.thread_id = t.id) OR run_count <> (SELECT COALESCE(max(seq), 0) FROM runs r WHERE r.thread_id = t.id)",
        ),
    ] {
        assert_eq!(database.number(broken).await, 0, "broken: {rule}");
    }
}

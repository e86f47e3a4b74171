//! The promises of `Store`, tested on both engines.

mod admission;
mod api_keys;
mod deletion;
mod engines;
mod events;
mod expiry;
mod idempotency;
mod import;
mod lanes;
mod notifications;
mod outages;
mod plans;
mod queue;
mod random;
mod redaction;
mod replicas;
mod reruns;
mod retention;
mod rollover;
mod runs;
mod sync;
mod threads;
mod tools;
mod transcript;
mod upstream_orphans;
mod versions;

use std::collections::BTreeMap;
use std::time::Duration;

use threadkeeper::domain::{
    ContentPart, ConversationKey, EventBatch, Lifecycle, Limits, LoggedEvent, Message, MessageId,
    Metadata, MultitaskStrategy, OrphanId, PageRequest, ReplicaId, RequiredAction, Run, RunId,
    RunStatus, Scope, SessionKey, TenantKey, Thread, ThreadActivity, ThreadId, ToolCall,
    ToolOutput, TopicKey, UpstreamRunId, UpstreamSync, UpstreamThreadId, Usage, UserKey,
};
use threadkeeper::store::{
    Admission, Admitted, Binding, Bound, Closing, Finished, Idempotency, Imported, ImportedMessage,
    ImportedThread, InputMessage, Pause, QueuedStart, Reply, RunEnd, RunLease, StartedRun, Store,
    ThreadFilter, ThreadName, ToolAnswer,
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

pub(crate) fn user(name: &str) -> ConversationKey {
    ConversationKey {
        tenant: TenantKey::default(),
        user: UserKey::try_from(name.to_owned()).unwrap(),
        scope: Scope::User,
    }
}

/// A thread to import of which only the key is known.
pub(crate) fn imported(key: &ConversationKey) -> ImportedThread {
    ImportedThread {
        id: None,
        key: key.clone(),
        upstream: "main".to_owned(),
        upstream_thread_id: None,
        lifecycle: Lifecycle::Current,
        previous_thread: None,
        metadata: Metadata::default(),
        created_at: None,
        last_active_at: None,
        archived_at: None,
        limits: Limits::NONE,
        configured: Limits::NONE,
    }
}

pub(crate) async fn import_thread(store: &Store, thread: &ImportedThread) -> Imported {
    store.import_threads(&[thread]).await.unwrap()[0]
}

/// Imports messages. Returns how many were added.
pub(crate) async fn import_messages(
    store: &Store,
    thread: ThreadId,
    messages: &[ImportedMessage],
) -> u64 {
    store
        .import_messages(&[(thread, messages.to_vec())])
        .await
        .unwrap()
}

fn session(name: &str, session: &str) -> ConversationKey {
    ConversationKey {
        scope: Scope::Session(SessionKey::try_from(session.to_owned()).unwrap()),
        ..user(name)
    }
}

fn topic(name: &str, topic: &str) -> ConversationKey {
    ConversationKey {
        scope: Scope::Topic(TopicKey::try_from(topic.to_owned()).unwrap()),
        ..user(name)
    }
}

pub(crate) fn text(text: &str) -> Vec<ContentPart> {
    vec![ContentPart::text(text)]
}

fn metadata(pairs: &[(&str, &str)]) -> Metadata {
    let pairs: BTreeMap<_, _> = pairs
        .iter()
        .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
        .collect();
    Metadata::try_from(pairs).unwrap()
}

/// A message under a key, from a replica without a session.
pub(crate) fn admission(key: &ConversationKey) -> Admission {
    Admission {
        key: key.clone(),
        new_thread: ThreadId::new(),
        limits: Limits::NONE,
        ttl: None,
        upstream: "main".to_owned(),
        run_id: RunId::new(),
        assistant: "default".to_owned(),
        strategy: MultitaskStrategy::Enqueue,
        metadata: Metadata::default(),
        message: InputMessage {
            id: MessageId::new(),
            content: text("hello"),
        },
        again: false,
        timeout: Duration::from_mins(1),
        replica: ReplicaId::new(),
        intent: None,
        idempotency: None,
        idempotency_ttl: Duration::from_hours(24),
    }
}

pub(crate) fn completed(reply: Option<&str>) -> RunEnd {
    RunEnd {
        status: RunStatus::Completed,
        error: None,
        usage: None,
        context_tokens: None,
        upstream_run_id: None,
        unacknowledged_requests: 0,
        upstream_thread_id: None,
        reply: reply.map(|reply| Reply {
            id: MessageId::new(),
            content: text(reply),
            upstream_message_id: None,
            sync: UpstreamSync::Present,
        }),
        said: UpstreamSync::Present,
        synced: false,
        unsettled_run: None,
        discard: false,
        keeps_said: false,
        events: EventBatch {
            first: 0,
            events: vec![],
        },
        drops_log: false,
    }
}

/// A pause of a run that asks for these function calls. Its first event has number `first`.
fn pause(calls: &[&str], first: i64) -> Pause {
    let call = |id: &&str| ToolCall {
        id: (*id).to_owned(),
        name: "look_up".to_owned(),
        arguments: format!("{{\"b\": \"{id}\",  \"a\": 1.0}}"),
        ..ToolCall::default()
    };
    let required_action = RequiredAction {
        tool_calls: calls.iter().map(call).collect(),
    };
    let asked = LoggedEvent::RequiresAction(required_action.clone());
    let delta = |text: &str| LoggedEvent::Delta(text.into());
    Pause {
        required_action,
        upstream_run_id: Some(UpstreamRunId("resp_1".to_owned())),
        content: text("let me see"),
        usage: Some(Usage {
            input_tokens: 1,
            output_tokens: 2,
            total_tokens: 3,
            ..Usage::default()
        }),
        events: EventBatch {
            first,
            events: vec![LoggedEvent::Started, delta("let me"), delta(" see"), asked],
        },
        wait: Duration::from_mins(2),
    }
}

/// The outputs for the calls of a [`pause`].
fn answer(calls: &[&str]) -> ToolAnswer {
    let output = |id: &&str| ToolOutput::text(*id, format!("found {id}"));
    ToolAnswer {
        expected: pause(calls, 0).required_action,
        outputs: calls.iter().map(output).collect(),
        idempotency: None,
    }
}

fn idempotency(key: &str) -> Idempotency {
    Idempotency {
        key: key.to_owned(),
        request_hash: [7; 32],
    }
}

fn first_page<Id>() -> PageRequest<Id> {
    PageRequest {
        limit: 100,
        ascending: true,
        after: None,
        before: None,
    }
}

fn started(admitted: Admitted) -> StartedRun {
    match admitted {
        Admitted::Started(turn) => *turn,
        other => panic!("expected a started run, not {other:?}"),
    }
}

fn queued(admitted: Admitted) -> (RunLease, Thread, Run, i64) {
    match admitted {
        Admitted::Queued {
            lease,
            thread,
            run,
            position,
        } => (lease, *thread, *run, position),
        other => panic!("expected a queued run, not {other:?}"),
    }
}

fn closed(closing: Closing) -> Finished {
    match closing {
        Closing::Finished(finished) => *finished,
        other => panic!("expected a finished run, not {other:?}"),
    }
}

fn started_from_queue(claim: QueuedStart) -> StartedRun {
    match claim {
        QueuedStart::Started(turn) => *turn,
        other => panic!("expected a started run, not {other:?}"),
    }
}

/// Returns the newest thread of a key, and its activity.
async fn newest_thread(store: &Store, key: &ConversationKey) -> Option<(Thread, ThreadActivity)> {
    let report = store.report(ThreadName::Newest(key)).await.unwrap()?;
    Some((report.thread, report.activity))
}

fn every_thread() -> ThreadFilter {
    ThreadFilter {
        tenant: TenantKey::default(),
        user: None,
        upstream: None,
        lifecycle: None,
        state: None,
        created_before: None,
        inactive_since: None,
    }
}

/// Limits under which a thread may be used for `max_age` after its creation.
fn limits(max_age: Duration) -> Limits {
    Limits {
        max_age: Some(max_age),
        max_idle: None,
    }
}

/// Binds an upstream thread to the run's thread, with a new intent.
async fn bind(store: &Store, lease: &RunLease, id: &UpstreamThreadId, seeded: bool) -> bool {
    let binding = Binding {
        id: id.clone(),
        intent: OrphanId::new(),
        seeded,
        carried_users: 0,
    };
    store
        .bind_upstream_thread(lease, binding.clone())
        .await
        .unwrap()
        == Bound::Done
}

/// Admits a message under the key and finishes its run.
async fn exchange(store: &Store, key: &ConversationKey) -> Finished {
    let turn = started(store.admit(admission(key)).await.unwrap());
    closed(
        store
            .finish(&turn.lease, completed(Some("hi")))
            .await
            .unwrap(),
    )
}

/// Returns roles and texts of a key's transcript. Asserts that positions ascend and that
/// `message_count` is right.
async fn transcript(store: &Store, key: &ConversationKey) -> Vec<String> {
    let (thread, _) = newest_thread(store, key).await.unwrap();
    let page = store
        .messages(ThreadName::Newest(key), false, &first_page())
        .await
        .unwrap()
        .unwrap();
    assert!(!page.has_more, "the transcript has more than one page");
    assert_eq!(
        thread.message_count,
        i64::try_from(page.data.len()).unwrap(),
        "message_count is wrong"
    );
    assert!(
        page.data
            .is_sorted_by(|one, next| one.position < next.position),
        "{:#?}",
        page.data
    );
    let line = |message: &Message| {
        let [ContentPart::Text { text, .. }] = &message.content[..] else {
            panic!("the message has one text")
        };
        format!("{}: {text}", message.role)
    };
    page.data.iter().map(line).collect()
}

/// Checks the invariants that the whole database must satisfy at any time.
pub(crate) async fn check_invariants(database: &TestDatabase) {
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
            "messages are counted, and each has a position of its own up to the last one given",
            "SELECT count(*) FROM threads t WHERE message_count <> (SELECT count(DISTINCT position) FROM messages m \
             WHERE m.thread_id = t.id) OR message_count <> (SELECT count(*) FROM messages m WHERE \
             m.thread_id = t.id) OR last_position < (SELECT COALESCE(max(position), 0) FROM messages m WHERE \
             m.thread_id = t.id)",
        ),
        (
            "the unsynced messages are those that are missing",
            "SELECT count(*) FROM threads t WHERE unsynced_messages <> (SELECT count(*) FROM messages m WHERE \
             m.thread_id = t.id AND m.upstream_sync = 'missing')",
        ),
        (
            "nothing is left of a run that was discarded, and nothing but its record of one that ended",
            "SELECT count(*) FROM runs r WHERE finished_at IS NOT NULL AND (partial_reply IS NOT NULL OR \
             tool_outputs IS NOT NULL OR required_action IS NOT NULL OR queued_input IS NOT NULL OR rollback_pending AND \
             r.rerun IS NULL AND EXISTS (SELECT 1 FROM messages m WHERE m.run_id = r.id))",
        ),
        (
            "a run that waits has its input, and no other one has",
            "SELECT count(*) FROM runs WHERE (status = 'queued') <> (queued_input IS NOT NULL)",
        ),
        (
            "a run that has ended says when, and one that has started has a deadline",
            "SELECT count(*) FROM runs WHERE (finished_at IS NULL) <> (status IN ('queued', 'in_progress', \
             'requires_action', 'cancelling')) OR (started_at IS NULL) <> (deadline_at IS NULL) OR \
             tool_outputs IS NOT NULL AND status NOT IN ('in_progress', 'cancelling')",
        ),
        (
            "a thread that was archived says when, and one that is being deleted says for what",
            "SELECT count(*) FROM threads WHERE (lifecycle = 'archived' AND archived_at IS NULL) OR \
             (lifecycle = 'deleting') <> (deletion IS NOT NULL)",
        ),
        (
            "counts, numbers and places are in their bounds",
            "SELECT (SELECT count(*) FROM threads WHERE message_count < 0 OR run_count < 0 OR unsynced_messages < 0 OR \
             last_position < message_count OR (scope_kind = 'user') <> (scope_name = '')) + (SELECT count(*) FROM runs \
             WHERE seq < 1 OR priority > 0 OR fence < 1) + (SELECT count(*) FROM messages WHERE position < 1)",
        ),
        (
            "nothing belongs to a thread or run that is not there",
            "SELECT (SELECT count(*) FROM runs r WHERE NOT EXISTS (SELECT 1 FROM threads t WHERE t.id = r.thread_id)) + \
             (SELECT count(*) FROM messages m WHERE NOT EXISTS (SELECT 1 FROM threads t WHERE t.id = m.thread_id)) + \
             (SELECT count(*) FROM run_events e WHERE NOT EXISTS (SELECT 1 FROM runs r WHERE r.id = e.run_id)) + \
             (SELECT count(*) FROM idempotency_keys k WHERE NOT EXISTS (SELECT 1 FROM runs r WHERE r.id = k.run_id))",
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

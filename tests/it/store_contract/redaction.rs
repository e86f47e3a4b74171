//! `transcript = "off"`: the database gets no text, and everything else works as usual.

use threadkeeper::config::{StoreConfig, Transcript};
use threadkeeper::domain::{Baseline, Role, UnsettledRun};
use threadkeeper::store::{
    Answered, ExternalMessage, ImportedMessage, Paused, Request, Rolled, Rollover, RunProgress,
};

use super::*;

/// A part of all texts in these tests.
const SAID: &str = "planted";

on_every_backend!(
    content_is_delivered_but_not_stored,
    imported_and_external_content_is_not_stored,
    takeover_of_redacted_run_loses_content,
    redacted_rollover_carries_no_messages,
);

async fn redacting(database: &TestDatabase, store: &Store) -> Store {
    // A SQLite file serves one store.
    store.close().await;
    Store::open(&StoreConfig {
        transcript: Transcript::Off,
        ..database.config()
    })
    .await
    .unwrap()
}

fn says(key: &ConversationKey, strategy: MultitaskStrategy) -> Admission {
    Admission {
        message: InputMessage {
            id: MessageId::new(),
            content: text(SAID),
        },
        strategy,
        ..admission(key)
    }
}

fn asks() -> RequiredAction {
    let call = ToolCall {
        id: "call".to_owned(),
        name: "f".to_owned(),
        arguments: SAID.to_owned(),
        ..ToolCall::default()
    };
    RequiredAction {
        tool_calls: vec![call],
    }
}

fn asking() -> Pause {
    let events = vec![
        LoggedEvent::Started,
        LoggedEvent::Delta(SAID.into()),
        LoggedEvent::RequiresAction(asks()),
    ];
    Pause {
        required_action: asks(),
        upstream_run_id: Some(UpstreamRunId("up".to_owned())),
        content: text(SAID),
        usage: None,
        events: EventBatch { first: 0, events },
        wait: Duration::from_mins(2),
    }
}

async fn content_is_delivered_but_not_stored(database: &TestDatabase, store: &Store) {
    let (store, key) = (redacting(database, store).await, user("alice"));
    assert!(!store.keeps_content());
    let turn = started(
        store
            .admit(says(&key, MultitaskStrategy::Enqueue))
            .await
            .unwrap(),
    );
    assert_eq!(
        turn.input[0].content,
        text(SAID),
        "a run that starts at once has its text"
    );
    let (waiting, ..) = queued(
        store
            .admit(says(&key, MultitaskStrategy::Enqueue))
            .await
            .unwrap(),
    );
    let merged = store
        .admit(says(&key, MultitaskStrategy::Merge))
        .await
        .unwrap();
    assert!(matches!(merged, Admitted::Merged { .. }), "{merged:?}");

    let shown = EventBatch {
        first: 0,
        events: vec![LoggedEvent::Started, LoggedEvent::Delta(SAID.into())],
    };
    let progress = RunProgress {
        lease: turn.lease,
        upstream_run_id: None,
        events: shown,
    };
    assert_eq!(store.record(&[progress]).await.unwrap(), [turn.run.id]);
    let paused = store.pause(&turn.lease, &asking()).await.unwrap();
    assert!(matches!(paused, Paused::Waiting(_)), "{paused:?}");
    let length = i64::try_from(SAID.len()).unwrap();
    let batches = store.events(turn.run.id, 0).await.unwrap();
    let numbers: Vec<i64> = batches.iter().map(EventBatch::end).collect();
    assert_eq!(
        numbers.last(),
        Some(&(1 + length + 1)),
        "event numbers stay the same"
    );
    let output = ToolOutput::text("call", SAID);
    let answer = ToolAnswer {
        expected: asks(),
        outputs: vec![output],
        idempotency: None,
    };
    let answered = store
        .answer_tools(&key, turn.run.id, &answer)
        .await
        .unwrap();
    assert!(matches!(answered, Answered::Resumed(_)), "{answered:?}");
    let requests = store.requests(turn_owner(database).await).await.unwrap();
    assert!(
        !requests
            .iter()
            .any(|it| matches!(it, Request::Resume { .. })),
        "{requests:?}"
    );

    let mut end = completed(Some(SAID));
    end.reply.as_mut().unwrap().sync = UpstreamSync::Missing;
    end.events = EventBatch {
        first: 20,
        events: vec![LoggedEvent::Delta(SAID.into())],
    };
    end.drops_log = true;
    for _ in 0..2 {
        let message = closed(store.finish(&turn.lease, end.clone()).await.unwrap())
            .message
            .unwrap();
        assert_eq!(
            (message.content, message.sync),
            (text(SAID), UpstreamSync::Withheld)
        );
    }
    assert_eq!(
        store.events(turn.run.id, 20).await.unwrap().len(),
        1,
        "the transcript does not replace the log"
    );
    let next = started_from_queue(store.start_queued(&waiting).await.unwrap());
    assert_eq!(next.input.len(), 2);
    assert!(
        next.input.iter().all(|message| message.content.is_empty()),
        "the process that sends the text knows it"
    );
    assert!(
        store
            .unsynced_messages(next.run.id, None, 10)
            .await
            .unwrap()
            .data
            .is_empty()
    );
    let left = UnsettledRun {
        run: next.run.id,
        thread: None,
        upstream_run: None,
        open_calls: asks().tool_calls,
        baseline: Baseline::default(),
        inputs: 2,
        synced: false,
        remove: false,
    };
    let cut = RunEnd {
        said: UpstreamSync::Unknown,
        unsettled_run: Some(left),
        status: RunStatus::Cancelled,
        ..completed(None)
    };
    let finished = closed(store.finish(&waiting, cut.clone()).await.unwrap());
    assert_eq!(
        finished.thread.unsettled_run.unwrap().open_calls[0].arguments,
        ""
    );
    let third = started(
        store
            .admit(says(&key, MultitaskStrategy::Enqueue))
            .await
            .unwrap(),
    );
    assert!(
        store
            .record_settlement(&third.lease, waiting.run_id, UpstreamSync::Missing)
            .await
            .unwrap()
    );
    let transcript = store.transcript(third.thread.id, 0, 10).await.unwrap();
    let syncs: Vec<_> = transcript.iter().map(|message| message.sync).collect();
    assert_eq!(
        syncs,
        [
            UpstreamSync::Present,
            UpstreamSync::Withheld,
            UpstreamSync::Withheld,
            UpstreamSync::Withheld,
            UpstreamSync::Present
        ]
    );
    check_invariants(database).await;
    store.close().await;
    assert_eq!(database.holding(SAID).await, Vec::<String>::new());
}

/// Returns the owner of the run. Each admission of these tests has another one.
async fn turn_owner(database: &TestDatabase) -> ReplicaId {
    let hex = if database.url().starts_with("sqlite") {
        "lower(hex(owner))"
    } else {
        "replace(owner::text, '-', '')"
    };
    let owners = database
        .texts(&format!("SELECT {hex} FROM runs WHERE seq = 1"))
        .await;
    ReplicaId::from_uuid(owners[0].parse().unwrap())
}

async fn imported_and_external_content_is_not_stored(database: &TestDatabase, store: &Store) {
    let (store, key) = (redacting(database, store).await, user("alice"));
    let thread = exchange(&store, &key).await.thread.id;
    let imported = |sync| ImportedMessage {
        id: MessageId::new(),
        role: Role::User,
        content: text(SAID),
        upstream_message_id: None,
        sync,
        created_at: None,
    };
    let imports = [imported(Some(UpstreamSync::Missing)), imported(None)];
    assert_eq!(import_messages(&store, thread, &imports).await, 2);
    let external = ExternalMessage {
        id: MessageId::new(),
        after: 1,
        role: Role::User,
        content: text(SAID),
        upstream_message_id: Some("item".to_owned()),
        created_at: None,
    };
    assert_eq!(
        store
            .insert_external_messages(thread, None, &[external])
            .await
            .unwrap(),
        1
    );
    let transcript = store.transcript(thread, 0, 10).await.unwrap();
    assert!(transcript.iter().all(|message| message.content.is_empty()));
    assert!(
        transcript
            .iter()
            .all(|message| message.sync != UpstreamSync::Missing),
        "the message has no text to send"
    );
    check_invariants(database).await;
    store.close().await;
    assert_eq!(database.holding(SAID).await, Vec::<String>::new());
}

async fn takeover_of_redacted_run_loses_content(database: &TestDatabase, store: &Store) {
    let (store, key) = (redacting(database, store).await, user("alice"));
    let turn = started(
        store
            .admit(says(&key, MultitaskStrategy::Enqueue))
            .await
            .unwrap(),
    );
    queued(
        store
            .admit(says(&key, MultitaskStrategy::Enqueue))
            .await
            .unwrap(),
    );
    store.pause(&turn.lease, &asking()).await.unwrap();
    let heir = ReplicaId::new();
    let orphans = store.adopt_orphans(heir, &[], 9).await.unwrap();
    let lost: Vec<_> = orphans
        .iter()
        .map(|it| (it.run.status, it.content_lost))
        .collect();
    assert_eq!(
        lost,
        [
            (RunStatus::RequiresAction, false),
            (RunStatus::Queued, true)
        ]
    );
    assert_eq!(
        orphans[0].content,
        [],
        "the text before is not known either"
    );
    // Later outputs reach the run only through the process that got them. Another process could
    // not send them.
    let output = ToolOutput::text("call", SAID);
    let answer = ToolAnswer {
        expected: asks(),
        outputs: vec![output],
        idempotency: None,
    };
    store
        .answer_tools(&key, turn.run.id, &answer)
        .await
        .unwrap();
    assert!(store.adopt_orphans(heir, &[], 1).await.unwrap()[0].content_lost);
    store.close().await;
}

async fn redacted_rollover_carries_no_messages(database: &TestDatabase, store: &Store) {
    let (store, key) = (redacting(database, store).await, user("alice"));
    let thread = exchange(&store, &key).await.thread.id;
    let rollover = Rollover {
        thread,
        by: None,
        new_thread: ThreadId::new(),
        carry_over: 5,
        limits: Limits::NONE,
    };
    let rolled = store.roll_over(&rollover).await.unwrap();
    assert!(
        matches!(&rolled, Rolled::Done { thread, .. } if thread.carried == 0),
        "{rolled:?}"
    );
    assert!(
        store
            .carried(rollover.new_thread, None, 10)
            .await
            .unwrap()
            .data
            .is_empty()
    );
    store.close().await;
}

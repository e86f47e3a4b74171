//! Admission: the thread of a key, and which runs start at once.

use std::collections::BTreeSet;
use std::time::Duration;

use threadkeeper::domain::{Lifecycle, MultitaskStrategy, RunStatus, TenantKey, ThreadState};

use super::*;

on_every_backend!(
    concurrent_first_messages_create_one_thread,
    first_message_starts_run_on_new_thread,
    second_message_is_queued,
    queued_runs_report_positions,
    reject_on_busy_thread_stores_nothing,
    concurrent_rejects_on_free_thread_start_one_run,
    admission_for_other_upstream_is_refused,
    similar_keys_get_separate_threads,
    expired_thread_is_replaced_on_next_message,
    concurrent_messages_replace_expired_thread_once,
    expired_thread_can_be_replaced_on_other_upstream,
    queued_run_survives_expiry_of_its_thread,
    message_content_and_metadata_round_trip_unchanged,
);

async fn concurrent_first_messages_create_one_thread(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let admissions: Vec<_> = (0..64).map(|_| admission(&key)).collect();
    let results =
        futures_util::future::join_all(admissions.iter().map(|it| store.admit(it.clone()))).await;

    let (mut running, mut threads, mut seqs, mut positions) = (0, BTreeSet::new(), vec![], vec![]);
    for result in results {
        let (thread, run) = match result.unwrap() {
            Admitted::Started(turn) => {
                running += 1;
                (turn.thread, turn.run)
            }
            Admitted::Queued {
                thread,
                run,
                position,
                ..
            } => {
                positions.push(position);
                assert_eq!(
                    position,
                    run.seq - 1,
                    "the first run starts, the rest is queued in order"
                );
                (*thread, *run)
            }
            other => panic!("{other:?}"),
        };
        threads.insert(thread.id);
        seqs.push(run.seq);
    }
    seqs.sort_unstable();
    assert_eq!(running, 1);
    assert_eq!(threads.len(), 1);
    assert_eq!(seqs, (1..=64).collect::<Vec<_>>());
    assert_eq!(positions.len(), 63);
    assert_eq!(database.number("SELECT count(*) FROM threads").await, 1);
    assert_eq!(transcript(store, &key).await, ["user: hello"]);
    check_invariants(database).await;
}

async fn first_message_starts_run_on_new_thread(_: &TestDatabase, store: &Store) {
    let key = session("alice", "s1");
    let request = Admission {
        metadata: metadata(&[("trace", "7")]),
        timeout: Duration::from_millis(1500),
        ..admission(&key)
    };
    let turn = started(store.admit(request.clone()).await.unwrap());

    assert_eq!(turn.lease.run_id, request.run_id);
    assert_eq!(turn.input, [request.message]);
    assert_eq!(
        (turn.thread.id, &turn.thread.key),
        (request.new_thread, &key)
    );
    assert_eq!((turn.thread.message_count, turn.thread.run_count), (1, 1));
    assert_eq!(turn.thread.lifecycle, Lifecycle::Current);
    assert_eq!(
        (
            turn.thread.upstream.as_str(),
            &turn.thread.upstream_thread_id
        ),
        ("main", &None)
    );
    assert_eq!(
        (turn.thread.limits, turn.thread.archived_at),
        (Limits::NONE, None)
    );
    assert_eq!(
        (turn.run.id, turn.run.thread_id, turn.run.seq),
        (request.run_id, request.new_thread, 1)
    );
    assert_eq!(
        (turn.run.status, turn.run.strategy),
        (RunStatus::InProgress, MultitaskStrategy::Enqueue)
    );
    assert_eq!(
        (turn.run.assistant.as_str(), &turn.run.metadata),
        ("default", &request.metadata)
    );
    assert_eq!(
        turn.run.deadline_at.unwrap() - turn.run.started_at.unwrap(),
        chrono::TimeDelta::milliseconds(1500)
    );
    assert_eq!(turn.run.finished_at, None);

    let (thread, activity) = newest_thread(store, &key).await.unwrap();
    assert_eq!(thread, turn.thread);
    assert_eq!(
        (activity.state, activity.queue_depth),
        (ThreadState::Active, 0)
    );
    assert_eq!(
        store.run(&key, turn.run.id).await.unwrap().unwrap(),
        (turn.run, None)
    );
}

async fn second_message_is_queued(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let first = started(store.admit(admission(&key)).await.unwrap());
    let (lease, thread, run, position) = queued(store.admit(admission(&key)).await.unwrap());
    assert_eq!(
        (run.id, run.seq, run.status),
        (lease.run_id, 2, RunStatus::Queued)
    );
    assert_eq!((run.started_at, run.deadline_at), (None, None));
    assert_eq!(
        (thread.id, thread.run_count, thread.message_count),
        (first.thread.id, 2, 1)
    );
    assert_eq!(position, 1);
    assert_eq!(transcript(store, &key).await, ["user: hello"]);

    // A new message does not start on a free thread that has a queued run.
    closed(
        store
            .finish(&first.lease, completed(Some("hi")))
            .await
            .unwrap(),
    );
    let (_, _, run, position) = queued(store.admit(admission(&key)).await.unwrap());
    assert_eq!((run.seq, position), (3, 2));
}

async fn queued_runs_report_positions(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let mut leases = vec![started(store.admit(admission(&key)).await.unwrap()).lease];
    for place in 1..=3 {
        let (lease, _, _, position) = queued(store.admit(admission(&key)).await.unwrap());
        assert_eq!(position, place);
        leases.push(lease);
    }
    let (_, activity) = newest_thread(store, &key).await.unwrap();
    assert_eq!(
        (activity.state, activity.queue_depth),
        (ThreadState::Active, 3)
    );

    closed(store.finish(&leases[0], completed(None)).await.unwrap());
    started_from_queue(store.start_queued(&leases[1]).await.unwrap());
    let (_, _, _, position) = queued(store.admit(admission(&key)).await.unwrap());
    assert_eq!(position, 3);
}

async fn reject_on_busy_thread_stores_nothing(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let (waiting, ..) = queued(store.admit(admission(&key)).await.unwrap());
    let before = newest_thread(store, &key).await.unwrap();
    let reject = || Admission {
        strategy: MultitaskStrategy::Reject,
        ..admission(&key)
    };
    assert_eq!(store.admit(reject()).await.unwrap(), Admitted::Busy);
    assert_eq!(newest_thread(store, &key).await.unwrap(), before);

    // A queued run keeps the thread busy, too.
    closed(store.finish(&turn.lease, completed(None)).await.unwrap());
    assert_eq!(store.admit(reject()).await.unwrap(), Admitted::Busy);
    assert_eq!(database.number("SELECT count(*) FROM runs").await, 2);

    let next = started_from_queue(store.start_queued(&waiting).await.unwrap());
    closed(store.finish(&next.lease, completed(None)).await.unwrap());
    assert_eq!(started(store.admit(reject()).await.unwrap()).run.seq, 3);
    check_invariants(database).await;
}

async fn concurrent_rejects_on_free_thread_start_one_run(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let reject: Vec<_> = (0..16)
        .map(|_| Admission {
            strategy: MultitaskStrategy::Reject,
            ..admission(&key)
        })
        .collect();
    let results =
        futures_util::future::join_all(reject.iter().map(|it| store.admit(it.clone()))).await;
    let count = |wanted: fn(&Admitted) -> bool| {
        results
            .iter()
            .filter(|it| wanted(it.as_ref().unwrap()))
            .count()
    };
    assert_eq!(count(|it| matches!(it, Admitted::Started(_))), 1);
    assert_eq!(count(|it| matches!(it, Admitted::Busy)), 15);
    assert_eq!(database.number("SELECT count(*) FROM runs").await, 1);
    check_invariants(database).await;
}

async fn admission_for_other_upstream_is_refused(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    exchange(store, &key).await;
    let other = Admission {
        upstream: "spare".to_owned(),
        ..admission(&key)
    };
    assert_eq!(
        store.admit(other.clone()).await.unwrap(),
        Admitted::OtherUpstream("main".to_owned())
    );
    assert_eq!(database.number("SELECT count(*) FROM runs").await, 1);

    // The other upstream is the more lasting obstacle, so it is named before the busy thread.
    started(store.admit(admission(&key)).await.unwrap());
    let other = Admission {
        strategy: MultitaskStrategy::Reject,
        ..other
    };
    assert_eq!(
        store.admit(other.clone()).await.unwrap(),
        Admitted::OtherUpstream("main".to_owned())
    );
    check_invariants(database).await;
}

async fn similar_keys_get_separate_threads(database: &TestDatabase, store: &Store) {
    let tenant = |name: &str| TenantKey::try_from(name.to_owned()).unwrap();
    let keys = [
        user("alice"),
        user("Alice"),
        user("alice "),
        user("al"),
        user("e\u{301}"),
        user("\u{e9}"),
        user("auth0|5f7c"),
        user("a%"),
        user("a_"),
        session("alice", "x"),
        topic("alice", "x"),
        topic("alice", "user"),
        session("al", "icex"),
        ConversationKey {
            tenant: tenant("other"),
            ..user("alice")
        },
        ConversationKey {
            tenant: tenant("othera"),
            ..user("lice")
        },
    ];
    let mut threads = BTreeSet::new();
    for key in &keys {
        let finished = exchange(store, key).await;
        assert_eq!(&finished.thread.key, key);
        threads.insert(finished.thread.id);
    }
    assert_eq!(threads.len(), keys.len());
    for key in &keys {
        assert_eq!(exchange(store, key).await.run.seq, 2, "{key:?}");
        assert_eq!(transcript(store, key).await.len(), 4, "{key:?}");
    }
    // Another key cannot read the run by its id.
    let alice = store
        .runs(&keys[0], &first_page())
        .await
        .unwrap()
        .unwrap()
        .data
        .remove(0);
    for stranger in &keys[1..] {
        assert_eq!(
            store.run(stranger, alice.id).await.unwrap(),
            None,
            "{stranger:?}"
        );
    }
    check_invariants(database).await;
}

async fn expired_thread_is_replaced_on_next_message(database: &TestDatabase, store: &Store) {
    let key = session("alice", "s1");
    let hour = Duration::from_hours(1);
    let with_ttl = || Admission {
        limits: limits(hour),
        ..admission(&key)
    };
    let old = started(store.admit(with_ttl()).await.unwrap());
    closed(
        store
            .finish(&old.lease, completed(Some("hi")))
            .await
            .unwrap(),
    );
    database.age_threads(hour / 2).await;
    let turn = started(store.admit(with_ttl()).await.unwrap());
    assert_eq!(turn.thread.id, old.thread.id, "half of its life is left");
    closed(store.finish(&turn.lease, completed(None)).await.unwrap());

    database.age_threads(hour / 2).await;
    let (thread, _) = newest_thread(store, &key).await.unwrap();
    assert_eq!(thread.lifecycle, Lifecycle::Current);
    assert_eq!(
        thread.id, old.thread.id,
        "nothing changes before a message arrives"
    );
    let request = with_ttl();
    let fresh = started(store.admit(request.clone()).await.unwrap());
    assert_eq!(fresh.thread.id, request.new_thread);
    assert_eq!(fresh.thread.previous_thread, Some(old.thread.id));
    assert_eq!(
        (
            fresh.thread.message_count,
            fresh.thread.run_count,
            fresh.run.seq
        ),
        (1, 1, 1)
    );
    assert_eq!(transcript(store, &key).await, ["user: hello"]);

    // The old thread's runs can still be read.
    let (run, reply) = store.run(&key, old.run.id).await.unwrap().unwrap();
    assert_eq!(
        (run.thread_id, run.status),
        (old.thread.id, RunStatus::Completed)
    );
    assert_eq!(reply.unwrap().content, text("hi"));
    assert_eq!(
        database
            .number("SELECT count(*) FROM threads WHERE lifecycle = 'archived'")
            .await,
        1
    );
    check_invariants(database).await;
}

async fn concurrent_messages_replace_expired_thread_once(database: &TestDatabase, store: &Store) {
    let key = session("alice", "s1");
    let with_ttl = || Admission {
        limits: limits(Duration::from_mins(1)),
        ..admission(&key)
    };
    let old = started(store.admit(with_ttl()).await.unwrap());
    closed(store.finish(&old.lease, completed(None)).await.unwrap());
    database.age_threads(Duration::from_mins(1)).await;

    let admissions: Vec<_> = (0..32).map(|_| with_ttl()).collect();
    let results =
        futures_util::future::join_all(admissions.iter().map(|it| store.admit(it.clone()))).await;
    let (mut running, mut threads) = (0, BTreeSet::new());
    for result in results {
        match result.unwrap() {
            Admitted::Started(turn) => {
                running += 1;
                threads.insert((turn.thread.id, turn.thread.previous_thread));
            }
            Admitted::Queued { thread, .. } => {
                threads.insert((thread.id, thread.previous_thread));
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(running, 1);
    assert_eq!(threads.len(), 1);
    assert_eq!(threads.first().unwrap().1, Some(old.thread.id));
    assert_eq!(database.number("SELECT count(*) FROM threads").await, 2);
    check_invariants(database).await;
}

async fn expired_thread_can_be_replaced_on_other_upstream(database: &TestDatabase, store: &Store) {
    let key = session("alice", "s1");
    let request = Admission {
        limits: limits(Duration::from_mins(1)),
        ..admission(&key)
    };
    let old = started(store.admit(request.clone()).await.unwrap());
    database.age_threads(Duration::from_mins(1)).await;
    // The old thread's run is still active, but does not block the new thread.
    let strategy = MultitaskStrategy::Reject;
    let moved = Admission {
        upstream: "spare".to_owned(),
        strategy,
        ..request
    };
    let moved = Admission {
        new_thread: ThreadId::new(),
        run_id: RunId::new(),
        ..moved
    };
    let moved = Admission {
        message: admission(&key).message,
        ..moved
    };
    let turn = started(store.admit(moved.clone()).await.unwrap());
    assert_eq!(
        (turn.thread.upstream.as_str(), turn.thread.previous_thread),
        ("spare", Some(old.thread.id))
    );
    let finished = closed(
        store
            .finish(&old.lease, completed(Some("late")))
            .await
            .unwrap(),
    );
    assert_eq!(
        (finished.thread.lifecycle, finished.thread.message_count),
        (Lifecycle::Archived, 2)
    );
    assert_eq!(transcript(store, &key).await, ["user: hello"]);
    check_invariants(database).await;
}

async fn queued_run_survives_expiry_of_its_thread(database: &TestDatabase, store: &Store) {
    let key = session("alice", "s1");
    let with_ttl = || Admission {
        limits: limits(Duration::from_mins(1)),
        ..admission(&key)
    };
    let first = started(store.admit(with_ttl()).await.unwrap());
    let (second, ..) = queued(store.admit(with_ttl()).await.unwrap());
    database.age_threads(Duration::from_mins(1)).await;
    let fresh = started(store.admit(with_ttl()).await.unwrap());
    assert_ne!(fresh.thread.id, first.thread.id);

    assert_eq!(
        store.start_queued(&second).await.unwrap(),
        QueuedStart::NotYet
    );
    closed(
        store
            .finish(&first.lease, completed(Some("one")))
            .await
            .unwrap(),
    );
    let turn = started_from_queue(store.start_queued(&second).await.unwrap());
    assert_eq!(
        (turn.thread.id, turn.thread.lifecycle),
        (first.thread.id, Lifecycle::Archived)
    );
    let finished = closed(store.finish(&second, completed(Some("two"))).await.unwrap());
    assert_eq!(finished.thread.message_count, 4);
    assert_eq!(
        store.run(&key, second.run_id).await.unwrap().unwrap().1,
        finished.message
    );
    check_invariants(database).await;
}

async fn message_content_and_metadata_round_trip_unchanged(_: &TestDatabase, store: &Store) {
    let json = serde_json::json!([
        {"type": "text", "text": "\u{1f980} \"quoted\" \\u0000 \u{202e} \t\r\n {}'; DROP TABLE runs; -- $1 ?1"},
        {"type": "image_url", "image_url": {"url": "https://example.org/a?b=c&d=%20", "detail": "low"}},
        {"type": "image_file", "image_file": {"file_id": "file-1"}},
        {"type": "text", "text": ""},
    ]);
    let content: Vec<ContentPart> = serde_json::from_value(json).unwrap();
    let key = topic("\u{65e5}\u{672c}|$1", "a b/c?d");
    let first = Admission {
        message: InputMessage {
            id: MessageId::new(),
            content: content.clone(),
        },
        metadata: metadata(&[("k \u{1f980}", "'\"\\ \u{10ffff}"), ("empty", "")]),
        assistant: "r\u{e9}sum\u{e9}".to_owned(),
        ..admission(&key)
    };
    let turn = started(store.admit(first.clone()).await.unwrap());
    assert_eq!(
        (&turn.run.metadata, &turn.run.assistant),
        (&first.metadata, &first.assistant)
    );
    assert_eq!(turn.thread.key, key);
    // The same through the queue.
    let second = Admission {
        message: InputMessage {
            id: MessageId::new(),
            content: content.clone(),
        },
        ..first.clone()
    };
    let second = Admission {
        run_id: RunId::new(),
        ..second
    };
    let (lease, ..) = queued(store.admit(second.clone()).await.unwrap());
    closed(store.finish(&turn.lease, completed(None)).await.unwrap());
    let turn = started_from_queue(store.start_queued(&lease).await.unwrap());
    assert_eq!(turn.input, std::slice::from_ref(&second.message));
    assert_eq!(turn.run.metadata, second.metadata);

    let page = store
        .messages(ThreadName::Newest(&key), false, &first_page())
        .await
        .unwrap()
        .unwrap();
    let ids: Vec<_> = page.data.iter().map(|message| message.id).collect();
    assert_eq!(ids, [first.message.id, second.message.id]);
    assert!(page.data.iter().all(|message| message.content == content));
}

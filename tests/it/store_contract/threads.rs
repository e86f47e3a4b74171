//! Threads as operators see them, and transcripts across threads.

use threadkeeper::domain::{Lifecycle, Page, ThreadState};
use threadkeeper::store::StoreError;

use super::*;

on_every_backend!(
    report_describes_thread_and_activity,
    thread_list_is_paged,
    thread_list_filters_match,
    thread_cursor_of_other_user_or_tenant_is_unknown,
    runs_are_read_in_order_across_threads,
    archived_thread_stays_readable,
    transcript_across_threads_is_paged,
    message_cursor_must_belong_to_key,
);

/// Makes as many threads for each key as given, oldest first. Each has an exchange, and the last
/// is current.
async fn generations(
    database: &TestDatabase,
    store: &Store,
    key: &ConversationKey,
    n: usize,
) -> Vec<Thread> {
    let mut threads = vec![];
    for generation in 0..n {
        if generation > 0 {
            let user = key.user.as_str();
            let archive = format!(
                "UPDATE threads SET lifecycle = 'archived', archived_at = last_active_at WHERE user_key = '{user}'"
            );
            database.execute(&archive).await;
        }
        threads.push(exchange(store, key).await.thread);
    }
    threads
}

async fn report_describes_thread_and_activity(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    assert_eq!(store.report(ThreadName::Newest(&key)).await.unwrap(), None);
    assert_eq!(
        store
            .report(ThreadName::Id(&key.tenant, ThreadId::new()))
            .await
            .unwrap(),
        None
    );
    let threads = generations(database, store, &key, 2).await;
    generations(database, store, &user("bob"), 1).await;
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let (_, _, last, _) = queued(store.admit(admission(&key)).await.unwrap());

    let newest = store
        .report(ThreadName::Newest(&key))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(newest.thread.id, threads[1].id);
    assert_eq!(
        (newest.activity.state, newest.activity.queue_depth),
        (ThreadState::Active, 1)
    );
    assert_eq!((newest.last_run, newest.next_thread), (Some(last), None));
    let by_id = store
        .report(ThreadName::Id(&key.tenant, turn.thread.id))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        (by_id.thread, by_id.activity),
        (newest.thread, newest.activity)
    );

    let first = store
        .report(ThreadName::Id(&key.tenant, threads[0].id))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        (first.thread.lifecycle, first.next_thread),
        (Lifecycle::Archived, Some(threads[1].id))
    );
    assert_eq!(
        (first.activity.state, first.last_run.unwrap().seq),
        (ThreadState::Idle, 1)
    );
    let stranger = TenantKey::try_from("other".to_owned()).unwrap();
    assert_eq!(
        store
            .report(ThreadName::Id(&stranger, threads[0].id))
            .await
            .unwrap(),
        None
    );

    // Without a current thread the report describes the newest archived one, but none that is
    // being deleted.
    database.archive_threads().await;
    assert_eq!(
        store
            .report(ThreadName::Newest(&key))
            .await
            .unwrap()
            .unwrap()
            .thread
            .id,
        threads[1].id
    );
    database
        .execute(
            "UPDATE threads SET lifecycle = 'deleting', deletion = 'erase' WHERE previous_thread_id IS NOT NULL",
        )
        .await;
    assert_eq!(
        store
            .report(ThreadName::Newest(&key))
            .await
            .unwrap()
            .unwrap()
            .thread
            .id,
        threads[0].id
    );
    let gone = store
        .report(ThreadName::Id(&key.tenant, threads[1].id))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(gone.thread.lifecycle, Lifecycle::Deleting);
}

async fn thread_list_is_paged(_: &TestDatabase, store: &Store) {
    let mut ids = vec![];
    for name in ["a", "b", "c", "d", "e"] {
        ids.push(exchange(store, &user(name)).await.thread.id);
    }
    let id = |n: usize| ids[n - 1];
    for (limit, ascending, after, before, wanted, has_more) in [
        (5, true, None, None, vec![1, 2, 3, 4, 5], false),
        (2, true, None, None, vec![1, 2], true),
        (2, true, Some(2), None, vec![3, 4], true),
        (2, true, Some(3), None, vec![4, 5], false),
        (2, true, None, Some(5), vec![3, 4], true),
        (2, true, None, Some(3), vec![1, 2], false),
        (2, false, None, None, vec![5, 4], true),
        (2, false, Some(3), None, vec![2, 1], false),
        (2, false, None, Some(2), vec![4, 3], true),
        (2, false, None, Some(3), vec![5, 4], false),
    ] {
        let page = PageRequest {
            limit,
            ascending,
            after: after.map(id),
            before: before.map(id),
        };
        let got = store.threads(&every_thread(), &page).await.unwrap();
        let found: Vec<_> = got.data.iter().map(|(thread, _)| thread.id).collect();
        let wanted: Vec<_> = wanted.into_iter().map(id).collect();
        assert_eq!((found, got.has_more), (wanted, has_more), "{page:?}");
    }
}

async fn thread_list_filters_match(database: &TestDatabase, store: &Store) {
    let alice = generations(database, store, &session("alice", "s1"), 2).await;
    let topic = exchange(store, &topic("alice", "s1")).await.thread;
    let spare = Admission {
        upstream: "spare".to_owned(),
        ..admission(&user("bob"))
    };
    let bob = started(store.admit(spare.clone()).await.unwrap());
    let carol = started(store.admit(admission(&user("carol"))).await.unwrap());
    store
        .pause(&carol.lease, &pause(&["call_1"], 0))
        .await
        .unwrap();
    let dave = exchange(store, &user("dave")).await.thread;
    database
        .execute(
            "UPDATE threads SET lifecycle = 'deleting', deletion = 'erase' WHERE user_key = 'dave'",
        )
        .await;
    let elsewhere = ConversationKey {
        tenant: TenantKey::try_from("other".to_owned()).unwrap(),
        ..user("alice")
    };
    let elsewhere = exchange(store, &elsewhere).await.thread;
    database
        .date_threads("bob", Duration::from_hours(2), Duration::from_hours(2))
        .await;
    database
        .date_threads("carol", Duration::from_hours(2), Duration::ZERO)
        .await;

    let hour_ago = dave.created_at - chrono::TimeDelta::hours(1);
    let all = every_thread();
    let found = async |filter: ThreadFilter| {
        let page = store.threads(&filter, &first_page()).await.unwrap();
        page.data
            .into_iter()
            .map(|(thread, _)| thread.id)
            .collect::<Vec<_>>()
    };
    let [one, two] = [alice[0].id, alice[1].id];
    let (topic, bob, carol, dave) = (topic.id, bob.thread.id, carol.thread.id, dave.id);
    for (filter, wanted) in [
        (all.clone(), vec![one, two, topic, bob, carol, dave]),
        (
            ThreadFilter {
                tenant: elsewhere.key.tenant.clone(),
                ..all.clone()
            },
            vec![elsewhere.id],
        ),
        (
            ThreadFilter {
                user: Some(user("alice").user),
                ..all.clone()
            },
            vec![one, two, topic],
        ),
        (
            ThreadFilter {
                user: Some(user("al").user),
                ..all.clone()
            },
            vec![],
        ),
        (
            ThreadFilter {
                upstream: Some("spare".to_owned()),
                ..all.clone()
            },
            vec![bob],
        ),
        (
            ThreadFilter {
                lifecycle: Some(Lifecycle::Archived),
                ..all.clone()
            },
            vec![one],
        ),
        (
            ThreadFilter {
                lifecycle: Some(Lifecycle::Deleting),
                ..all.clone()
            },
            vec![dave],
        ),
        (
            ThreadFilter {
                lifecycle: Some(Lifecycle::Current),
                ..all.clone()
            },
            vec![two, topic, bob, carol],
        ),
        (
            ThreadFilter {
                state: Some(ThreadState::Idle),
                ..all.clone()
            },
            vec![one, two, topic, dave],
        ),
        (
            ThreadFilter {
                state: Some(ThreadState::Active),
                ..all.clone()
            },
            vec![bob],
        ),
        (
            ThreadFilter {
                state: Some(ThreadState::RequiresAction),
                ..all.clone()
            },
            vec![carol],
        ),
        (
            ThreadFilter {
                created_before: Some(hour_ago),
                ..all.clone()
            },
            vec![bob, carol],
        ),
        (
            ThreadFilter {
                inactive_since: Some(hour_ago),
                ..all.clone()
            },
            vec![bob],
        ),
        (
            ThreadFilter {
                user: Some(user("alice").user),
                upstream: Some("main".to_owned()),
                lifecycle: Some(Lifecycle::Current),
                state: Some(ThreadState::Idle),
                ..all.clone()
            },
            vec![two, topic],
        ),
        (
            ThreadFilter {
                user: Some(user("bob").user),
                state: Some(ThreadState::Active),
                created_before: Some(hour_ago),
                inactive_since: Some(hour_ago),
                ..all.clone()
            },
            vec![bob],
        ),
    ] {
        assert_eq!(found(filter.clone()).await, wanted, "{filter:?}");
    }
    let page = store.threads(&all, &first_page()).await.unwrap();
    let states: Vec<_> = page
        .data
        .iter()
        .map(|(_, activity)| activity.state)
        .collect();
    let idle = ThreadState::Idle;
    assert_eq!(
        states,
        [
            idle,
            idle,
            idle,
            ThreadState::Active,
            ThreadState::RequiresAction,
            idle
        ]
    );
}

async fn thread_cursor_of_other_user_or_tenant_is_unknown(_: &TestDatabase, store: &Store) {
    let mine = exchange(store, &user("alice")).await.thread;
    let other = TenantKey::try_from("other".to_owned()).unwrap();
    let others = exchange(
        store,
        &ConversationKey {
            tenant: other,
            ..user("alice")
        },
    )
    .await
    .thread;
    let bobs = exchange(store, &user("bob")).await.thread;
    let of_alice = ThreadFilter {
        user: Some(user("alice").user),
        ..every_thread()
    };
    for (filter, id, known) in [
        (every_thread(), mine.id, true),
        (every_thread(), others.id, false),
        (every_thread(), ThreadId::new(), false),
        (of_alice.clone(), mine.id, true),
        (of_alice.clone(), bobs.id, false),
        (of_alice, others.id, false),
    ] {
        for page in [
            PageRequest {
                after: Some(id),
                ..first_page()
            },
            PageRequest {
                before: Some(id),
                ..first_page()
            },
        ] {
            let got = store.threads(&filter, &page).await;
            match got {
                Ok(page) => {
                    assert!(known && page.data.iter().all(|(thread, _)| thread.id == bobs.id));
                }
                Err(error) => assert!(!known && matches!(error, StoreError::UnknownCursor)),
            }
        }
    }
}

async fn runs_are_read_in_order_across_threads(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    exchange(store, &key).await;
    let second = exchange(store, &key).await;
    started(store.admit(admission(&key)).await.unwrap());
    queued(store.admit(admission(&key)).await.unwrap());
    let thread = second.thread.id;
    let seqs = |runs: Vec<Run>| runs.into_iter().map(|run| run.seq).collect::<Vec<_>>();
    assert_eq!(
        seqs(store.runs_of(&[thread], (thread, 0), 3).await.unwrap()),
        [1, 2, 3]
    );
    assert_eq!(
        store.runs_of(&[thread], (thread, 1), 1).await.unwrap(),
        [second.run]
    );
    assert_eq!(
        seqs(store.runs_of(&[thread], (thread, 4), 3).await.unwrap()),
        [0; 0]
    );
    assert_eq!(seqs(store.unfinished_of(thread).await.unwrap()), [3, 4]);
    assert_eq!(seqs(store.unfinished(&key).await.unwrap().unwrap()), [3, 4]);
    let nothing = ThreadId::new();
    assert_eq!(
        store.runs_of(&[nothing], (nothing, 0), 3).await.unwrap(),
        []
    );
    let other = exchange(store, &user("bob")).await.run;
    let all = [nothing, thread, other.thread_id];
    let places = async |behind, limit| {
        let runs = store.runs_of(&all, behind, limit).await.unwrap();
        runs.into_iter()
            .map(|run| (run.thread_id, run.seq))
            .collect::<Vec<_>>()
    };
    let wanted: Vec<_> = [
        (thread, 1),
        (thread, 2),
        (thread, 3),
        (thread, 4),
        (other.thread_id, 1),
    ]
    .into();
    assert_eq!(places((all[1], 0), 10).await, wanted);
    assert_eq!(places((all[1], 2), 2).await, wanted[2..4]);
    assert_eq!(places((all[1], 4), 10).await, wanted[4..]);
    assert_eq!(places((other.thread_id, 0), 10).await, wanted[4..]);
    assert_eq!(store.unfinished_of(ThreadId::new()).await.unwrap(), []);
}

async fn archived_thread_stays_readable(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let threads = generations(database, store, &key, 2).await;
    database.archive_threads().await;
    assert_eq!(
        transcript(store, &key).await,
        ["user: hello", "assistant: hi"]
    );
    let runs = store.runs(&key, &first_page()).await.unwrap().unwrap();
    assert_eq!(
        runs.data
            .iter()
            .map(|run| run.thread_id)
            .collect::<Vec<_>>(),
        [threads[1].id]
    );
    assert_eq!(store.unfinished(&key).await.unwrap(), Some(vec![]));
    for thread in &threads {
        let name = ThreadName::Id(&key.tenant, thread.id);
        let page = store
            .messages(name, false, &first_page())
            .await
            .unwrap()
            .unwrap();
        assert!(
            page.data.len() == 2
                && page
                    .data
                    .iter()
                    .all(|message| message.thread_id == thread.id)
        );
    }
    let stranger = TenantKey::try_from("other".to_owned()).unwrap();
    for across in [true, false] {
        let name = ThreadName::Id(&stranger, threads[0].id);
        assert_eq!(
            store.messages(name, across, &first_page()).await.unwrap(),
            None
        );
    }
}

async fn transcript_across_threads_is_paged(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    exchange(store, &session("alice", "s1")).await;
    let threads = generations(database, store, &key, 3).await;
    exchange(store, &user("bob")).await;
    exchange(store, &key).await;
    let name = ThreadName::Newest(&key);
    let all = store
        .messages(name, true, &first_page())
        .await
        .unwrap()
        .unwrap();
    let places: Vec<_> = all
        .data
        .iter()
        .map(|message| (message.thread_id, message.position))
        .collect();
    let [a, b, c] = [threads[0].id, threads[1].id, threads[2].id];
    assert_eq!(
        places,
        [
            (a, 1),
            (a, 2),
            (b, 1),
            (b, 2),
            (c, 1),
            (c, 2),
            (c, 3),
            (c, 4)
        ]
    );
    let id = |n: usize| all.data[n - 1].id;
    let numbers = |page: &Page<Message>| {
        let number =
            |message: &Message| 1 + all.data.iter().position(|it| it.id == message.id).unwrap();
        page.data.iter().map(number).collect::<Vec<_>>()
    };

    for (limit, ascending, after, before, wanted, has_more) in [
        (8, true, None, None, vec![1, 2, 3, 4, 5, 6, 7, 8], false),
        (3, true, None, None, vec![1, 2, 3], true),
        (3, true, Some(1), None, vec![2, 3, 4], true),
        (3, true, Some(2), None, vec![3, 4, 5], true),
        (3, true, Some(5), None, vec![6, 7, 8], false),
        (3, true, Some(8), None, vec![], false),
        (3, true, None, Some(8), vec![5, 6, 7], true),
        (3, true, None, Some(4), vec![1, 2, 3], false),
        (3, true, None, Some(1), vec![], false),
        (3, false, None, None, vec![8, 7, 6], true),
        (3, false, Some(5), None, vec![4, 3, 2], true),
        (3, false, Some(3), None, vec![2, 1], false),
        (3, false, None, Some(3), vec![6, 5, 4], true),
        (3, false, None, Some(5), vec![8, 7, 6], false),
    ] {
        let page = PageRequest {
            limit,
            ascending,
            after: after.map(id),
            before: before.map(id),
        };
        for name in [
            name,
            ThreadName::Id(&key.tenant, a),
            ThreadName::Id(&key.tenant, c),
        ] {
            let got = store.messages(name, true, &page).await.unwrap().unwrap();
            assert_eq!(
                (numbers(&got), got.has_more),
                (wanted.clone(), has_more),
                "{page:?}"
            );
        }
    }

    // A thread that is being deleted is not shown.
    database
        .execute(
            "UPDATE threads SET lifecycle = 'deleting', deletion = 'erase' WHERE run_count = 1 \
                  AND previous_thread_id IS NOT NULL",
        )
        .await;
    let got = store
        .messages(name, true, &first_page())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(numbers(&got), [1, 2, 5, 6, 7, 8]);
    let page = PageRequest {
        after: Some(id(3)),
        ..first_page()
    };
    assert!(matches!(
        store.messages(name, true, &page).await,
        Err(StoreError::UnknownCursor)
    ));
}

async fn message_cursor_must_belong_to_key(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let others = exchange(store, &session("alice", "s1"))
        .await
        .message
        .unwrap()
        .id;
    let after = |id| PageRequest {
        after: Some(id),
        ..first_page()
    };
    assert_eq!(
        store
            .messages(ThreadName::Newest(&key), true, &after(others))
            .await
            .unwrap(),
        None
    );
    let threads = generations(database, store, &key, 2).await;
    let first = ThreadName::Id(&key.tenant, threads[0].id);
    let old = store
        .messages(first, false, &first_page())
        .await
        .unwrap()
        .unwrap()
        .data[1]
        .id;
    for (across, id, known) in [
        (true, old, true),
        (false, old, false),
        (true, others, false),
    ] {
        let got = store
            .messages(ThreadName::Newest(&key), across, &after(id))
            .await;
        match got {
            Ok(page) => assert_eq!((known, page.unwrap().data.len()), (true, 2)),
            Err(error) => assert!(
                !known && matches!(error, StoreError::UnknownCursor),
                "{error:?}"
            ),
        }
    }
}

//! Imported threads and messages.

use threadkeeper::domain::{Role, Timestamp};
use threadkeeper::store::{Imported, ImportedMessage};

use super::*;

on_every_backend!(
    imported_thread_keeps_given_fields,
    imported_thread_gets_defaults_for_omitted_fields,
    thread_import_by_id_is_idempotent,
    thread_import_without_id_matches_by_key,
    archived_thread_import_keeps_current_thread,
    imported_thread_ids_order_by_creation_time,
    imported_thread_continues_with_next_message,
    imported_messages_keep_order_and_fields,
    message_import_is_idempotent,
    imported_messages_without_upstream_thread_are_unsynced,
    imported_messages_append_after_last_position,
    many_messages_import_in_one_call,
    batched_thread_import_equals_sequential_import,
    batched_thread_import_keeps_order,
    messages_of_many_threads_import_in_one_call,
    concurrent_imports_and_admissions_never_deadlock,
);

const HOUR: Duration = Duration::from_hours(1);

fn upstream(id: &str) -> UpstreamThreadId {
    UpstreamThreadId(id.to_owned())
}

fn message(role: Role, said: &str) -> ImportedMessage {
    ImportedMessage {
        id: MessageId::new(),
        role,
        content: text(said),
        upstream_message_id: None,
        sync: None,
        created_at: None,
    }
}

async fn added(store: &Store, thread: &ImportedThread) -> ThreadId {
    match import_thread(store, thread).await {
        Imported::Added(id) => id,
        other => panic!("expected an added thread, not {other:?}"),
    }
}

async fn by_id(store: &Store, id: ThreadId) -> Thread {
    store
        .report(ThreadName::Id(&TenantKey::default(), id))
        .await
        .unwrap()
        .unwrap()
        .thread
}

fn time(text: &str) -> Timestamp {
    text.parse().unwrap()
}

async fn imported_thread_keeps_given_fields(database: &TestDatabase, store: &Store) {
    let key = session("alice", "s1");
    let said = ImportedThread {
        id: Some(ThreadId::new()),
        upstream_thread_id: Some(upstream("thread_abc")),
        previous_thread: Some(ThreadId::new()),
        metadata: metadata(&[("plan", "gold")]),
        created_at: Some(time("2026-01-02T03:04:05.678Z")),
        last_active_at: Some(time("2026-02-02T03:04:05.678Z")),
        limits: Limits {
            max_age: Some(1000 * HOUR),
            max_idle: Some(500 * HOUR),
        },
        configured: limits(HOUR),
        ..imported(&key)
    };
    let id = added(store, &said).await;
    assert_eq!(Some(id), said.id);
    let got = by_id(store, id).await;
    assert_eq!(
        (&got.key, got.lifecycle, got.archived_at),
        (&key, Lifecycle::Current, None)
    );
    assert_eq!(
        (got.upstream.as_str(), &got.upstream_thread_id),
        ("main", &said.upstream_thread_id)
    );
    assert_eq!(
        (got.previous_thread, &got.metadata),
        (said.previous_thread, &said.metadata)
    );
    assert_eq!(
        (Some(got.created_at), Some(got.last_active_at)),
        (said.created_at, said.last_active_at)
    );
    assert_eq!(
        (got.limits, got.message_count, got.run_count),
        (said.limits, 0, 0)
    );
    let due = said.limits.end(got.created_at, got.last_active_at);
    assert_eq!(database.due_at("alice").await, due);
    check_invariants(database).await;
}

async fn imported_thread_gets_defaults_for_omitted_fields(database: &TestDatabase, store: &Store) {
    let now = exchange(store, &user("bob")).await.thread.created_at;
    let id = added(
        store,
        &ImportedThread {
            configured: limits(HOUR),
            ..imported(&user("alice"))
        },
    )
    .await;
    let got = by_id(store, id).await;
    assert!(got.created_at >= now && got.last_active_at == got.created_at);
    assert_eq!(
        database.due_at("alice").await,
        limits(HOUR).end(got.created_at, got.last_active_at)
    );
    added(store, &imported(&user("carol"))).await;
    assert_eq!(database.due_at("carol").await, None);
}

async fn thread_import_by_id_is_idempotent(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let one = ImportedThread {
        id: Some(ThreadId::new()),
        ..imported(&key)
    };
    let id = added(store, &one).await;
    let before = by_id(store, id).await;
    let again = ImportedThread {
        metadata: metadata(&[("a", "b")]),
        ..one.clone()
    };
    assert_eq!(import_thread(store, &again).await, Imported::Known(id));
    assert_eq!(by_id(store, id).await, before);

    let other = ImportedThread {
        id: Some(ThreadId::new()),
        ..one.clone()
    };
    assert_eq!(import_thread(store, &other).await, Imported::Taken(id));
    let stolen = ImportedThread {
        key: user("bob"),
        ..one.clone()
    };
    assert_eq!(import_thread(store, &stolen).await, Imported::OtherKey);
    let tenant = TenantKey::try_from("other".to_owned()).unwrap();
    let stolen = ImportedThread {
        key: ConversationKey {
            tenant,
            ..user("bob")
        },
        ..one
    };
    assert_eq!(import_thread(store, &stolen).await, Imported::OtherKey);
    assert_eq!(database.number("SELECT count(*) FROM threads").await, 1);
}

async fn thread_import_without_id_matches_by_key(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let bare = imported(&key);
    let named = |id| ImportedThread {
        upstream_thread_id: Some(upstream(id)),
        ..imported(&key)
    };
    let id = added(store, &named("thread_abc")).await;
    assert_eq!(
        import_thread(store, &named("thread_abc")).await,
        Imported::Known(id)
    );
    assert_eq!(import_thread(store, &bare).await, Imported::Known(id));
    assert_eq!(
        import_thread(store, &named("thread_other")).await,
        Imported::Taken(id)
    );
    let elsewhere = ImportedThread {
        upstream: "spare".to_owned(),
        ..named("thread_abc")
    };
    assert_eq!(import_thread(store, &elsewhere).await, Imported::Taken(id));

    // The import is recognised even after another thread took its place, or its upstream thread
    // was deleted.
    database.archive_threads().await;
    exchange(store, &key).await;
    assert_eq!(
        import_thread(store, &named("thread_abc")).await,
        Imported::Known(id)
    );
    database
        .execute(
            "UPDATE threads SET upstream_thread_id = NULL, upstream_cleanup = '{\"upstream_thread_id\": \"thread_abc\", \
             \"outcome\": \"deleted\"}' WHERE lifecycle = 'archived'",
        )
        .await;
    assert_eq!(
        import_thread(store, &named("thread_abc")).await,
        Imported::Known(id)
    );
    assert_eq!(database.number("SELECT count(*) FROM threads").await, 2);

    let many: Vec<_> = (0..16).map(|_| imported(&user("bob"))).collect();
    let results =
        futures_util::future::join_all(many.iter().map(|it| import_thread(store, it))).await;
    let new = results
        .iter()
        .filter(|it| matches!(it, Imported::Added(_)))
        .count();
    let known = results
        .iter()
        .filter(|it| matches!(it, Imported::Known(_)))
        .count();
    assert_eq!((new, known), (1, 15));
}

async fn archived_thread_import_keeps_current_thread(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let current = exchange(store, &key).await.thread;
    let archived = |id, created_at: &str, archived_at: Option<&str>| ImportedThread {
        id,
        lifecycle: Lifecycle::Archived,
        created_at: Some(time(created_at)),
        archived_at: archived_at.map(time),
        ..imported(&key)
    };
    let one = archived(
        Some(ThreadId::new()),
        "2026-01-01T00:00:00Z",
        Some("2026-03-01T00:00:00Z"),
    );
    let got = by_id(store, added(store, &one).await).await;
    assert_eq!(
        (got.lifecycle, got.archived_at, got.last_active_at),
        (
            Lifecycle::Archived,
            one.archived_at,
            one.archived_at.unwrap()
        )
    );
    let due = "SELECT count(*) FROM threads WHERE lifecycle = 'archived' AND due_at > archived_at";
    assert_eq!(database.number(due).await, 1);

    let two = archived(None, "2025-01-01T00:00:00Z", None);
    let id = added(store, &two).await;
    assert!(by_id(store, id).await.archived_at.unwrap() > current.created_at);
    assert_eq!(import_thread(store, &two).await, Imported::Known(id));
    let three = archived(None, "2025-02-01T00:00:00Z", None);
    added(store, &three).await;
    assert_eq!(newest_thread(store, &key).await.unwrap().0.id, current.id);
    check_invariants(database).await;
}

async fn imported_thread_ids_order_by_creation_time(_: &TestDatabase, store: &Store) {
    let mut wanted = vec![];
    for (name, created_at) in [
        ("c", "2026-03-01T00:00:00Z"),
        ("a", "2024-01-01T00:00:00Z"),
        ("b", "2025-01-01T00:00:00Z"),
    ] {
        let said = ImportedThread {
            created_at: Some(time(created_at)),
            ..imported(&user(name))
        };
        wanted.push((created_at, added(store, &said).await));
    }
    wanted.sort_unstable();
    let wanted: Vec<_> = wanted.into_iter().map(|(_, id)| id).collect();
    let ids = async |filter: &ThreadFilter| {
        let page = store.threads(filter, &first_page()).await.unwrap();
        page.data
            .into_iter()
            .map(|(thread, _)| thread.id)
            .collect::<Vec<_>>()
    };
    assert_eq!(ids(&every_thread()).await, wanted);
    let early = ThreadFilter {
        created_before: Some(time("2025-01-01T00:00:01Z")),
        ..every_thread()
    };
    assert_eq!(ids(&early).await, wanted[..2]);
}

async fn imported_thread_continues_with_next_message(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let id = added(
        store,
        &ImportedThread {
            upstream_thread_id: Some(upstream("thread_abc")),
            ..imported(&key)
        },
    )
    .await;
    import_messages(
        store,
        id,
        &[
            message(Role::User, "before"),
            message(Role::Assistant, "yes"),
        ],
    )
    .await;
    let finished = exchange(store, &key).await;
    assert_eq!(
        (finished.thread.id, &finished.thread.upstream_thread_id),
        (id, &Some(upstream("thread_abc")))
    );
    let wanted = [
        "user: before",
        "assistant: yes",
        "user: hello",
        "assistant: hi",
    ];
    assert_eq!(transcript(store, &key).await, wanted);
    check_invariants(database).await;

    let old = ImportedThread {
        created_at: Some(time("2024-01-01T00:00:00Z")),
        ..imported(&user("bob"))
    };
    let old = added(store, &old).await;
    let fresh = started(
        store
            .admit(Admission {
                limits: limits(HOUR),
                ..admission(&user("bob"))
            })
            .await
            .unwrap(),
    );
    assert_eq!(fresh.thread.previous_thread, Some(old));
}

async fn imported_messages_keep_order_and_fields(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let id = added(
        store,
        &ImportedThread {
            upstream_thread_id: Some(upstream("thread_abc")),
            ..imported(&key)
        },
    )
    .await;
    let before = by_id(store, id).await;
    let one = ImportedMessage {
        upstream_message_id: Some("msg_up".to_owned()),
        created_at: Some(time("2026-01-02T03:04:05.678Z")),
        ..message(Role::User, "nul: \0")
    };
    let two = ImportedMessage {
        sync: Some(UpstreamSync::Withheld),
        ..message(Role::Assistant, "two")
    };
    let three = ImportedMessage {
        sync: Some(UpstreamSync::Missing),
        ..message(Role::User, "three")
    };
    let four = ImportedMessage {
        sync: Some(UpstreamSync::Unknown),
        ..message(Role::User, "four")
    };
    let all = [one.clone(), two, three, four];
    assert_eq!(import_messages(store, id, &all).await, 4);
    let page = store
        .messages(ThreadName::Newest(&key), false, &first_page())
        .await
        .unwrap()
        .unwrap();
    let got = &page.data[0];
    assert_eq!((got.id, got.role, got.position), (one.id, Role::User, 1));
    assert_eq!(
        (&got.content, &got.upstream_message_id),
        (&text("nul: \u{fffd}"), &one.upstream_message_id)
    );
    assert_eq!(
        (Some(got.created_at), got.run_id, got.ended),
        (one.created_at, None, None)
    );
    assert!(page.data[1].created_at >= before.created_at);
    let syncs: Vec<_> = page.data.iter().map(|message| message.sync).collect();
    assert_eq!(
        syncs,
        [
            UpstreamSync::Present,
            UpstreamSync::Withheld,
            UpstreamSync::Missing,
            UpstreamSync::Present
        ]
    );
    let after = by_id(store, id).await;
    assert_eq!((after.message_count, after.unsynced_messages), (4, 1));
    assert_eq!(
        after.last_active_at, before.last_active_at,
        "an import does not count as activity"
    );
}

async fn message_import_is_idempotent(database: &TestDatabase, store: &Store) {
    let id = added(store, &imported(&user("alice"))).await;
    let [one, two, three] = ["one", "two", "three"].map(|said| message(Role::User, said));
    let first = [one.clone(), two.clone(), one.clone()];
    assert_eq!(import_messages(store, id, &first).await, 2);
    assert_eq!(import_messages(store, id, &first).await, 0);
    assert_eq!(
        import_messages(store, id, &[two, three.clone(), one.clone()]).await,
        1
    );
    assert_eq!(
        transcript(store, &user("alice")).await,
        ["user: one", "user: two", "user: three"]
    );
    // The message's id is taken in all threads. A missing thread and one that is being deleted
    // take no messages.
    let other = added(store, &imported(&user("bob"))).await;
    assert_eq!(import_messages(store, other, &[one]).await, 0);
    let four = [message(Role::User, "four")];
    assert_eq!(import_messages(store, ThreadId::new(), &four).await, 0);
    database
        .execute("UPDATE threads SET lifecycle = 'deleting', deletion = 'erase'")
        .await;
    assert_eq!(import_messages(store, id, &four).await, 0);
    check_invariants(database).await;
}

async fn imported_messages_without_upstream_thread_are_unsynced(
    database: &TestDatabase,
    store: &Store,
) {
    let key = user("alice");
    let id = added(store, &imported(&key)).await;
    import_messages(
        store,
        id,
        &[message(Role::User, "one"), message(Role::Assistant, "two")],
    )
    .await;
    assert_eq!(by_id(store, id).await.unsynced_messages, 2);
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let unsynced = store
        .unsynced_messages(turn.run.id, None, 1000)
        .await
        .unwrap()
        .data;
    assert_eq!(
        unsynced
            .iter()
            .map(|message| message.position)
            .collect::<Vec<_>>(),
        [2, 1]
    );
    let end = RunEnd {
        synced: true,
        ..completed(Some("hi"))
    };
    assert_eq!(
        closed(store.finish(&turn.lease, end.clone()).await.unwrap())
            .thread
            .unsynced_messages,
        0
    );
    check_invariants(database).await;
}

async fn imported_messages_append_after_last_position(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let thread = exchange(store, &key).await.thread;
    // Such a gap is left by a rollback.
    database
        .execute("UPDATE threads SET last_position = 7")
        .await;
    import_messages(store, thread.id, &[message(Role::User, "later")]).await;
    let page = store
        .messages(ThreadName::Newest(&key), false, &first_page())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        page.data
            .iter()
            .map(|message| message.position)
            .collect::<Vec<_>>(),
        [1, 2, 8]
    );
    check_invariants(database).await;
}

async fn many_messages_import_in_one_call(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let id = added(store, &imported(&key)).await;
    let many: Vec<_> = (0..250)
        .map(|n| message(Role::User, &n.to_string()))
        .collect();
    assert_eq!(import_messages(store, id, &many).await, 250);
    assert_eq!(import_messages(store, id, &many).await, 0);
    let got = store.transcript(id, 0, 1000).await.unwrap();
    let places: Vec<_> = got
        .iter()
        .map(|message| (message.id, message.position))
        .collect();
    let wanted: Vec<_> = many.iter().map(|message| message.id).zip(1..).collect();
    assert_eq!(places, wanted);
    check_invariants(database).await;
}

/// Returns the result for each thread. Instead of its id stands the number of the first result
/// with that id.
fn outcomes(results: &[Imported]) -> Vec<String> {
    let mut ids: Vec<ThreadId> = Vec::new();
    let mut number = |id: ThreadId| {
        let known = ids.iter().position(|it| *it == id);
        known.unwrap_or_else(|| {
            ids.push(id);
            ids.len() - 1
        })
    };
    let outcome = |result: &Imported| match *result {
        Imported::Added(id) => format!("added {}", number(id)),
        Imported::Known(id) => format!("known {}", number(id)),
        Imported::Taken(id) => format!("taken {}", number(id)),
        Imported::OtherKey => "other key".to_owned(),
    };
    results.iter().map(outcome).collect()
}

async fn batched_thread_import_equals_sequential_import(database: &TestDatabase, store: &Store) {
    let mut noise = 7_u64;
    let mut pick = |most: u64| {
        noise = noise
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from((noise >> 33) % most).unwrap()
    };
    let mut seen = std::collections::BTreeSet::new();
    for round in 0..60 {
        let choices: Vec<[usize; 6]> = (0..16)
            .map(|_| [pick(3), pick(8), pick(3), pick(2), pick(2), pick(4)])
            .collect();
        let alone = pick(4);
        let mut got = Vec::new();
        for together in [false, true] {
            // The creation times decide which thread is found.
            let id = |n: usize| {
                format!(
                    "thr_018000000000700080000000{round:04x}{}{n:03x}",
                    u8::from(together)
                )
            };
            let thread = |(n, [user_key, id_of, upstream_thread, before, archived, spare]): (
                usize,
                &[usize; 6],
            )| {
                ImportedThread {
                    id: (*id_of < 4).then(|| id(*id_of).parse().unwrap()),
                    upstream: if *spare == 0 { "spare" } else { "main" }.to_owned(),
                    upstream_thread_id: [None, Some("x"), Some("y")][*upstream_thread]
                        .map(upstream),
                    lifecycle: if *archived == 0 {
                        Lifecycle::Archived
                    } else {
                        Lifecycle::Current
                    },
                    created_at: Some(time(&format!("2024-01-{:02}T00:00:00Z", n + 2 - before))),
                    ..imported(&user(&format!("{round}-{together}-{user_key}")))
                }
            };
            let threads: Vec<_> = choices.iter().enumerate().map(thread).collect();
            // One of the ids belongs to another tenant.
            let tenant = TenantKey::try_from("other".to_owned()).unwrap();
            let elsewhere = ConversationKey {
                tenant,
                ..threads[0].key.clone()
            };
            added(
                store,
                &ImportedThread {
                    id: Some(id(3).parse().unwrap()),
                    ..imported(&elsewhere)
                },
            )
            .await;
            let mut results = Vec::new();
            let (first, rest) = threads.split_at(if together { alone } else { threads.len() });
            for thread in first {
                results.push(import_thread(store, thread).await);
            }
            results.extend(
                store
                    .import_threads(&rest.iter().collect::<Vec<_>>())
                    .await
                    .unwrap(),
            );
            seen.extend(
                outcomes(&results)
                    .iter()
                    .filter_map(|it| it.split(' ').next().map(str::to_owned)),
            );
            got.push(outcomes(&results));
        }
        assert_eq!(got[1], got[0], "{round}: {choices:?}");
    }
    assert_eq!(Vec::from_iter(seen), ["added", "known", "other", "taken"]);
    check_invariants(database).await;
}

async fn batched_thread_import_keeps_order(_: &TestDatabase, store: &Store) {
    let threads: Vec<_> = (0..100)
        .rev()
        .map(|n| imported(&user(&format!("u{n}"))))
        .collect();
    let results = store
        .import_threads(&threads.iter().collect::<Vec<_>>())
        .await
        .unwrap();
    let added = results.into_iter().map(|result| match result {
        Imported::Added(id) => id,
        other => panic!("expected an added thread, not {other:?}"),
    });
    assert!(added.is_sorted());
}

async fn messages_of_many_threads_import_in_one_call(database: &TestDatabase, store: &Store) {
    let [alice, bob, carol] = [user("alice"), user("bob"), user("carol")].map(|key| imported(&key));
    let (a, b, c) = (
        added(store, &alice).await,
        added(store, &bob).await,
        added(store, &carol).await,
    );
    database
        .execute("UPDATE threads SET lifecycle = 'deleting', deletion = 'erase' WHERE user_key = 'carol'")
        .await;
    let [one, two, three, four, five] =
        ["one", "two", "three", "four", "five"].map(|said| message(Role::User, said));
    let all = [
        (c, vec![one.clone()]),
        (a, vec![one.clone(), two.clone()]),
        (b, vec![two.clone(), three.clone(), three.clone()]),
        (ThreadId::new(), vec![four.clone()]),
        (a, vec![three, four, one]),
    ];
    assert_eq!(store.import_messages(&all).await.unwrap(), 4);
    assert_eq!(
        transcript(store, &user("alice")).await,
        ["user: one", "user: two", "user: four"]
    );
    assert_eq!(transcript(store, &user("bob")).await, ["user: three"]);
    assert_eq!(store.import_messages(&all).await.unwrap(), 0);
    assert_eq!(
        store
            .import_messages(&[(b, vec![five]), (a, vec![two])])
            .await
            .unwrap(),
        1
    );
    assert_eq!(
        transcript(store, &user("bob")).await,
        ["user: three", "user: five"]
    );
    assert_eq!(
        (
            by_id(store, a).await.message_count,
            by_id(store, b).await.message_count
        ),
        (3, 2)
    );
    check_invariants(database).await;

    let page = store.transcripts(&[a, b], (a, 0), 4).await.unwrap();
    let places = |page: &[Message]| {
        page.iter()
            .map(|it| (it.thread_id, it.position))
            .collect::<Vec<_>>()
    };
    let wanted = [(a, 1), (a, 2), (a, 3), (b, 1), (b, 2)];
    assert_eq!((&*places(&page.data), page.has_more), (&wanted[..4], true));
    let page = store.transcripts(&[a, b], (b, 1), 4).await.unwrap();
    assert_eq!((&*places(&page.data), page.has_more), (&wanted[4..], false));
}

async fn concurrent_imports_and_admissions_never_deadlock(database: &TestDatabase, store: &Store) {
    for round in 0..5 {
        let key = |n: usize| user(&format!("{round}-{n}"));
        let threads: Vec<_> = (0..60).map(|n| imported(&key(n))).collect();
        let forward: Vec<_> = threads.iter().collect();
        let back: Vec<_> = threads.iter().rev().collect();
        let turns = async {
            for n in (0..60).step_by(7) {
                store.admit(admission(&key(n))).await.unwrap();
            }
        };
        let (one, two, ()) = tokio::join!(
            store.import_threads(&forward),
            store.import_threads(&back),
            turns
        );
        let (one, mut two) = (one.unwrap(), two.unwrap());
        two.reverse();
        for (n, (one, two)) in one.into_iter().zip(two).enumerate() {
            let (Imported::Added(a) | Imported::Known(a)) = one else {
                panic!("{n}: {one:?}")
            };
            let (Imported::Added(b) | Imported::Known(b)) = two else {
                panic!("{n}: {two:?}")
            };
            assert_eq!(a, b, "{n}");
        }
        // The same messages again.
        let transcripts: Vec<_> = one_message_each(store, &threads).await;
        let back: Vec<_> = transcripts.iter().rev().cloned().collect();
        let (one, two) = tokio::join!(
            store.import_messages(&transcripts),
            store.import_messages(&back)
        );
        assert_eq!(one.unwrap() + two.unwrap(), 60);
    }
    check_invariants(database).await;
}

async fn one_message_each(
    store: &Store,
    threads: &[ImportedThread],
) -> Vec<(ThreadId, Vec<ImportedMessage>)> {
    let mut transcripts = Vec::new();
    for thread in threads {
        let id = newest_thread(store, &thread.key).await.unwrap().0.id;
        transcripts.push((id, vec![message(Role::User, "hello")]));
    }
    transcripts
}

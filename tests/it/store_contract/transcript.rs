//! Pages of the transcript, and readiness.

use threadkeeper::domain::{Page, Role, Run};
use threadkeeper::store::{ImportedMessage, PAGE_BYTES, StoreError};

use super::*;
use crate::support::chance::noise;

on_every_backend!(
    readiness_requires_current_schema,
    unknown_key_reads_as_none,
    transcript_is_paged,
    transcript_pages_are_bounded_in_bytes,
    run_list_is_paged,
    cursor_of_other_list_is_unknown,
    closed_store_reports_unavailable,
);

async fn readiness_requires_current_schema(database: &TestDatabase, store: &Store) {
    store.ready().await.unwrap();
    let schema_error = |result| match result {
        Err(StoreError::Schema(text)) => text,
        other => panic!("{other:?}"),
    };
    database
        .execute("UPDATE _sqlx_migrations SET version = version + 1000")
        .await;
    assert!(schema_error(store.ready().await).contains("newer"));
    database.execute("DELETE FROM _sqlx_migrations").await;
    assert!(schema_error(store.ready().await).contains("run `threadkeeper migrate`"));
    database.execute("DROP TABLE _sqlx_migrations").await;
    assert!(schema_error(store.ready().await).contains("run `threadkeeper migrate`"));
}

async fn unknown_key_reads_as_none(_: &TestDatabase, store: &Store) {
    let key = user("nobody");
    assert_eq!(newest_thread(store, &key).await, None);
    assert_eq!(
        store
            .messages(ThreadName::Newest(&key), false, &first_page())
            .await
            .unwrap(),
        None
    );
    assert_eq!(store.runs(&key, &first_page()).await.unwrap(), None);
    assert_eq!(store.run(&key, RunId::new()).await.unwrap(), None);
    let after = PageRequest {
        after: Some(MessageId::new()),
        ..first_page()
    };
    assert_eq!(
        store
            .messages(ThreadName::Newest(&key), false, &after)
            .await
            .unwrap(),
        None
    );
}

async fn transcript_is_paged(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    for _ in 0..3 {
        exchange(store, &key).await;
    }
    exchange(store, &user("bob")).await;
    let all = store
        .messages(ThreadName::Newest(&key), false, &first_page())
        .await
        .unwrap()
        .unwrap();
    assert_eq!((all.data.len(), all.has_more), (6, false));
    let id = |position: usize| all.data[position - 1].id;

    for (limit, ascending, after, before, wanted, has_more) in [
        (6, true, None, None, vec![1, 2, 3, 4, 5, 6], false),
        (5, true, None, None, vec![1, 2, 3, 4, 5], true),
        (2, true, Some(2), None, vec![3, 4], true),
        (2, true, Some(4), None, vec![5, 6], false),
        (2, true, Some(6), None, vec![], false),
        (2, true, None, Some(5), vec![3, 4], true),
        (2, true, None, Some(3), vec![1, 2], false),
        (4, true, None, Some(3), vec![1, 2], false),
        (2, true, None, Some(1), vec![], false),
        (2, false, None, None, vec![6, 5], true),
        (100, false, None, None, vec![6, 5, 4, 3, 2, 1], false),
        (2, false, Some(3), None, vec![2, 1], false),
        (2, false, Some(4), None, vec![3, 2], true),
        (2, false, None, Some(3), vec![5, 4], true),
        (2, false, None, Some(4), vec![6, 5], false),
    ] {
        let page = PageRequest {
            limit,
            ascending,
            after: after.map(id),
            before: before.map(id),
        };
        let got = store
            .messages(ThreadName::Newest(&key), false, &page)
            .await
            .unwrap()
            .unwrap();
        let positions: Vec<_> = got.data.iter().map(|message| message.position).collect();
        assert_eq!((positions, got.has_more), (wanted, has_more), "{page:?}");
    }
}

async fn transcript_pages_are_bounded_in_bytes(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let thread = exchange(store, &key).await.thread.id;
    // All but the sixth message have a quarter of a page's size. The database may compress some
    // of them.
    let quarter = PAGE_BYTES / 4;
    let (noise, silence) = (&noise(quarter), &"x".repeat(quarter));
    for said in [
        noise,
        silence,
        silence,
        noise,
        silence,
        &silence.repeat(5),
        noise,
    ] {
        let message = ImportedMessage {
            id: MessageId::new(),
            role: Role::User,
            content: text(said),
            upstream_message_id: None,
            sync: None,
            created_at: None,
        };
        import_messages(store, thread, &[message]).await;
    }
    let mut all = Vec::new();
    loop {
        let after = all.last().map_or(0, |message: &Message| message.position);
        let step = store.transcript(thread, after, 100).await.unwrap();
        let lengths: Vec<_> = step
            .iter()
            .map(|message| message.content[0].size())
            .collect();
        match after {
            0 => assert_eq!(lengths[2..], [quarter; 4]),
            6 => assert_eq!(lengths, [quarter, 5 * quarter]),
            8 => assert_eq!(lengths, [quarter]),
            _ => {
                assert_eq!((after, &*lengths), (9, &[][..]));
                break;
            }
        }
        all.extend(step);
    }
    // The same across threads.
    let short = exchange(store, &user("bob")).await.thread.id;
    let mut places = Vec::new();
    let mut behind = (thread, 0);
    loop {
        let page = store
            .transcripts(&[thread, short], behind, 100)
            .await
            .unwrap();
        let last = page.data.last().unwrap();
        behind = (last.thread_id, last.position);
        places.push(
            page.data
                .iter()
                .map(|message| message.position)
                .collect::<Vec<_>>(),
        );
        if !page.has_more {
            break;
        }
    }
    assert_eq!(places, [vec![1, 2, 3, 4, 5, 6], vec![7, 8], vec![9, 1, 2]]);
    let id = |position: usize| all[position - 1].id;

    for (limit, ascending, after, before, wanted, has_more) in [
        (100, true, None, None, vec![1, 2, 3, 4, 5, 6], true),
        (6, true, None, None, vec![1, 2, 3, 4, 5, 6], true),
        (5, true, None, None, vec![1, 2, 3, 4, 5], true),
        (100, true, Some(6), None, vec![7, 8], true),
        (100, true, Some(7), None, vec![8], true),
        (100, true, Some(8), None, vec![9], false),
        (100, true, None, Some(9), vec![8], true),
        (100, true, None, Some(8), vec![4, 5, 6, 7], true),
        (100, true, None, Some(6), vec![1, 2, 3, 4, 5], false),
        (100, false, None, None, vec![9, 8], true),
        (100, false, Some(8), None, vec![7, 6, 5, 4], true),
        (100, false, Some(7), None, vec![6, 5, 4, 3], true),
        (100, false, Some(6), None, vec![5, 4, 3, 2, 1], false),
        (100, false, None, Some(4), vec![8, 7, 6, 5], true),
    ] {
        for across in [false, true] {
            let page = PageRequest {
                limit,
                ascending,
                after: after.map(id),
                before: before.map(id),
            };
            let got = store
                .messages(ThreadName::Newest(&key), across, &page)
                .await
                .unwrap()
                .unwrap();
            let positions: Vec<_> = got.data.iter().map(|message| message.position).collect();
            assert_eq!(
                (&positions, got.has_more),
                (&wanted, has_more),
                "{across} {page:?}"
            );
        }
    }
}

async fn run_list_is_paged(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let mut ids = vec![];
    for _ in 0..4 {
        ids.push(exchange(store, &key).await.run.id);
    }
    ids.push(started(store.admit(admission(&key)).await.unwrap()).run.id);
    ids.push(queued(store.admit(admission(&key)).await.unwrap()).2.id);
    let id = |seq: usize| ids[seq - 1];
    let seqs = |page: Page<Run>| page.data.iter().map(|run| run.seq).collect::<Vec<_>>();

    for (limit, ascending, after, before, wanted, has_more) in [
        (100, true, None, None, vec![1, 2, 3, 4, 5, 6], false),
        (2, false, None, None, vec![6, 5], true),
        (2, false, Some(5), None, vec![4, 3], true),
        (2, false, Some(3), None, vec![2, 1], false),
        (2, false, None, Some(4), vec![6, 5], false),
        (2, true, None, Some(6), vec![4, 5], true),
    ] {
        let page = PageRequest {
            limit,
            ascending,
            after: after.map(id),
            before: before.map(id),
        };
        let got = store.runs(&key, &page).await.unwrap().unwrap();
        let more = got.has_more;
        assert_eq!((seqs(got), more), (wanted, has_more), "{page:?}");
    }
}

async fn cursor_of_other_list_is_unknown(_: &TestDatabase, store: &Store) {
    let (mine, other) = (user("alice"), user("bob"));
    exchange(store, &mine).await;
    let others = exchange(store, &other).await;
    let message = others.message.unwrap().id;
    for (after, before) in [
        (Some(message), None),
        (None, Some(message)),
        (Some(MessageId::new()), None),
    ] {
        let page = PageRequest {
            after,
            before,
            ..first_page()
        };
        assert!(matches!(
            store
                .messages(ThreadName::Newest(&mine), false, &page)
                .await,
            Err(StoreError::UnknownCursor)
        ));
    }
    for (after, before) in [(Some(others.run.id), None), (None, Some(RunId::new()))] {
        let page = PageRequest {
            after,
            before,
            ..first_page()
        };
        assert!(matches!(
            store.runs(&mine, &page).await,
            Err(StoreError::UnknownCursor)
        ));
    }
}

async fn closed_store_reports_unavailable(_: &TestDatabase, store: &Store) {
    store.close().await;
    assert!(matches!(
        store.ready().await,
        Err(StoreError::Unavailable(_))
    ));
    assert!(matches!(
        store.admit(admission(&user("a"))).await,
        Err(threadkeeper::store::NotWritten::Unsent(
            StoreError::Unavailable(_)
        ))
    ));
}

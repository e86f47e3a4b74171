//! Pages, and looking from outside.

use threadkeeper::domain::{Page, Run};
use threadkeeper::store::StoreError;

use super::*;

on_every_backend!(
    a_store_is_ready,
    nothing_is_known_of_a_new_key,
    transcripts_have_pages,
    runs_have_pages,
    a_cursor_of_another_list_is_unknown,
    a_closed_store_says_so,
);

async fn a_store_is_ready(database: &TestDatabase, store: &dyn Store) {
    store.ready().await.unwrap();
    let schema_error = |result| match result {
        Err(StoreError::Schema(text)) => text,
        other => panic!("{other:?}"),
    };
    database.execute("UPDATE _sqlx_migrations SET version = version + 1000").await;
    assert!(schema_error(store.ready().await).contains("newer"));
    database.execute("UPDATE _sqlx_migrations SET version = version - 1001").await;
    assert!(schema_error(store.ready().await).contains("run `threadkeeper migrate`"));
    database.execute("DROP TABLE _sqlx_migrations").await;
    assert!(schema_error(store.ready().await).contains("run `threadkeeper migrate`"));
}

async fn nothing_is_known_of_a_new_key(_: &TestDatabase, store: &dyn Store) {
    let key = user("nobody");
    assert_eq!(seen(store, &key).await, None);
    assert_eq!(store.messages(ThreadName::Newest(&key), false, &first_page()).await.unwrap(), None);
    assert_eq!(store.runs(&key, &first_page()).await.unwrap(), None);
    assert_eq!(store.run(&key, RunId::new()).await.unwrap(), None);
    let after = PageRequest { after: Some(MessageId::new()), ..first_page() };
    assert_eq!(store.messages(ThreadName::Newest(&key), false, &after).await.unwrap(), None);
}

async fn transcripts_have_pages(_: &TestDatabase, store: &dyn Store) {
    let key = user("alice");
    for _ in 0..3 {
        exchange(store, &key).await;
    }
    exchange(store, &user("bob")).await;
    let all = store.messages(ThreadName::Newest(&key), false, &first_page()).await.unwrap().unwrap();
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
        let page = PageRequest { limit, ascending, after: after.map(id), before: before.map(id) };
        let got = store.messages(ThreadName::Newest(&key), false, &page).await.unwrap().unwrap();
        let positions: Vec<_> = got.data.iter().map(|message| message.position).collect();
        assert_eq!((positions, got.has_more), (wanted, has_more), "{page:?}");
    }
}

async fn runs_have_pages(_: &TestDatabase, store: &dyn Store) {
    let key = user("alice");
    let mut ids = vec![];
    for _ in 0..4 {
        ids.push(exchange(store, &key).await.run.id);
    }
    ids.push(started(store.admit(&admission(&key)).await.unwrap()).run.id);
    ids.push(queued(store.admit(&admission(&key)).await.unwrap()).2.id);
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
        let page = PageRequest { limit, ascending, after: after.map(id), before: before.map(id) };
        let got = store.runs(&key, &page).await.unwrap().unwrap();
        let more = got.has_more;
        assert_eq!((seqs(got), more), (wanted, has_more), "{page:?}");
    }
}

async fn a_cursor_of_another_list_is_unknown(_: &TestDatabase, store: &dyn Store) {
    let (mine, other) = (user("alice"), user("bob"));
    exchange(store, &mine).await;
    let others = exchange(store, &other).await;
    let message = others.message.unwrap().id;
    for (after, before) in [(Some(message), None), (None, Some(message)), (Some(MessageId::new()), None)] {
        let page = PageRequest { after, before, ..first_page() };
        assert!(matches!(
            store.messages(ThreadName::Newest(&mine), false, &page).await,
            Err(StoreError::UnknownCursor)
        ));
    }
    for (after, before) in [(Some(others.run.id), None), (None, Some(RunId::new()))] {
        let page = PageRequest { after, before, ..first_page() };
        assert!(matches!(store.runs(&mine, &page).await, Err(StoreError::UnknownCursor)));
    }
}

async fn a_closed_store_says_so(_: &TestDatabase, store: &dyn Store) {
    store.close().await;
    assert!(matches!(store.ready().await, Err(StoreError::Unavailable(_))));
    assert!(matches!(store.admit(&admission(&user("a"))).await, Err(StoreError::Unavailable(_))));
}

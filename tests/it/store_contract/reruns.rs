//! Runs without a message of their own: their admission, and the messages that they take.

use threadkeeper::domain::{Rerun, RunStatus, UpstreamSync};

use super::*;

on_every_backend!(
    rerun_needs_a_thread_with_a_message,
    rerun_takes_last_messages_of_one_kind,
    reply_that_is_replaced_is_withheld,
    discarded_rerun_keeps_its_messages,
);

fn say(key: &ConversationKey, words: &str) -> Admission {
    Admission {
        message: InputMessage {
            id: MessageId::new(),
            content: text(words),
        },
        ..admission(key)
    }
}

fn again(key: &ConversationKey) -> Admission {
    Admission {
        again: true,
        message: InputMessage {
            id: MessageId::new(),
            content: vec![],
        },
        ..admission(key)
    }
}

fn failed(said: UpstreamSync) -> RunEnd {
    RunEnd {
        status: RunStatus::Failed,
        said,
        ..completed(None)
    }
}

async fn ended(store: &Store, key: &ConversationKey, words: &str, end: RunEnd) {
    let turn = started(store.admit(say(key, words)).await.unwrap());
    closed(store.finish(&turn.lease, end).await.unwrap());
}

/// Admits and starts a rerun, and gives it its messages.
async fn begun(store: &Store, key: &ConversationKey) -> StartedRun {
    let (lease, _, run, position) = queued(store.admit(again(key)).await.unwrap());
    assert_eq!((run.rerun, position), (Some(Rerun::Waiting), 1));
    let bare = started_from_queue(store.start_queued(&lease).await.unwrap());
    assert_eq!(bare.input, []);
    let taken = started_from_queue(store.take_last_messages(&lease).await.unwrap());
    let repeated = started_from_queue(store.take_last_messages(&lease).await.unwrap());
    assert_eq!(taken, repeated);
    taken
}

fn words(started: &StartedRun) -> Vec<&str> {
    let texts = started.input.iter().map(|it| it.content[0].as_text());
    texts.map(Option::unwrap).collect()
}

async fn rerun_needs_a_thread_with_a_message(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let admitted = store.admit(again(&key)).await.unwrap();
    assert_eq!(admitted, Admitted::NoThread);
    assert_eq!(newest_thread(store, &key).await, None);
    let turn = started(store.admit(say(&key, "one")).await.unwrap());
    let (behind, ..) = queued(store.admit(again(&key)).await.unwrap());
    let discarded = RunEnd {
        status: RunStatus::Cancelled,
        discard: true,
        ..completed(None)
    };
    closed(store.finish(&turn.lease, discarded).await.unwrap());
    // The message was rolled back meanwhile.
    started_from_queue(store.start_queued(&behind).await.unwrap());
    let bare = started_from_queue(store.take_last_messages(&behind).await.unwrap());
    assert_eq!(bare.input, []);
    closed(
        store
            .finish(&behind, failed(UpstreamSync::Withheld))
            .await
            .unwrap(),
    );
    let admitted = store.admit(again(&key)).await.unwrap();
    assert_eq!(admitted, Admitted::NoMessage);
    check_invariants(database).await;
}

async fn rerun_takes_last_messages_of_one_kind(database: &TestDatabase, store: &Store) {
    use UpstreamSync::{Missing, Present, Withheld};
    let key = user("alice");
    ended(store, &key, "one", completed(Some("1"))).await;
    for (said, found) in [
        (Missing, Rerun::Missing),
        (Withheld, Rerun::Withheld),
        (Present, Rerun::Present),
    ] {
        ended(store, &key, "two", failed(said)).await;
        ended(store, &key, "three", failed(said)).await;
        let taken = begun(store, &key).await;
        assert_eq!(words(&taken), ["two", "three"], "{said}");
        assert_eq!(taken.run.rerun, Some(found));
        assert_eq!(taken.thread.unsynced_messages, 0);
        let earlier = store.earlier(taken.run.id, None, 10).await.unwrap();
        assert!(
            earlier
                .data
                .iter()
                .all(|it| it.run_id != Some(taken.run.id))
        );
        closed(
            store
                .finish(&taken.lease, completed(Some("2")))
                .await
                .unwrap(),
        );
        check_invariants(database).await;
    }
    // A message that is to be sent anyway is not mixed with one that is not.
    ended(store, &key, "four", failed(Missing)).await;
    ended(store, &key, "five", failed(Withheld)).await;
    let taken = begun(store, &key).await;
    assert_eq!(words(&taken), ["five"]);
    assert_eq!(taken.thread.unsynced_messages, 1);
    check_invariants(database).await;
}

async fn reply_that_is_replaced_is_withheld(database: &TestDatabase, store: &Store) {
    use UpstreamSync::{Present, Withheld};
    let key = user("alice");
    ended(store, &key, "one", completed(Some("1"))).await;
    let taken = begun(store, &key).await;
    assert_eq!(
        (words(&taken), taken.run.rerun),
        (vec!["one"], Some(Rerun::Answered))
    );
    let sync = async || {
        let (name, all) = (ThreadName::Newest(&key), first_page());
        let page = store.messages(name, false, &all).await.unwrap().unwrap();
        page.data.iter().map(|it| it.sync).collect::<Vec<_>>()
    };
    assert_eq!(sync().await, [Present; 2]);
    store.withhold_replaced(&taken.lease).await.unwrap();
    closed(
        store
            .finish(&taken.lease, completed(Some("2")))
            .await
            .unwrap(),
    );
    assert_eq!(sync().await, [Present, Withheld, Present]);
    // A reply that the upstream thread lacks is withheld at once.
    let missing = Reply {
        id: MessageId::new(),
        content: text("3"),
        upstream_message_id: None,
        sync: UpstreamSync::Missing,
    };
    let end = RunEnd {
        reply: Some(missing),
        ..failed(UpstreamSync::Missing)
    };
    ended(store, &key, "three", end).await;
    let taken = begun(store, &key).await;
    assert_eq!(taken.run.rerun, Some(Rerun::Missing));
    assert_eq!(taken.thread.unsynced_messages, 0);
    assert_eq!(sync().await[4], Withheld);
    check_invariants(database).await;
}

async fn discarded_rerun_keeps_its_messages(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    ended(store, &key, "one", failed(UpstreamSync::Missing)).await;
    let taken = begun(store, &key).await;
    let end = RunEnd {
        status: RunStatus::Cancelled,
        said: UpstreamSync::Missing,
        discard: true,
        keeps_said: true,
        ..completed(None)
    };
    let finished = closed(store.finish(&taken.lease, end).await.unwrap());
    assert_eq!(finished.thread.unsynced_messages, 1);
    assert_eq!(transcript(store, &key).await, ["user: one"]);
    check_invariants(database).await;
}

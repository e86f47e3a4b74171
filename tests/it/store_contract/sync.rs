//! The sync state of messages, and messages that are removed from the transcript.

use threadkeeper::domain::{Baseline, UnsettledRun, UpstreamThreadId};
use threadkeeper::store::{PAGE_BYTES, Withholding};

use super::*;

on_every_backend!(
    finish_records_sync_state_of_its_messages,
    completed_run_leaves_no_outcome_on_messages,
    messages_of_unstarted_run_get_sync_state,
    unsynced_messages_are_missing_ones_of_earlier_runs,
    synced_finish_marks_unsynced_messages_present,
    synced_finish_leaves_later_messages_missing,
    synced_discard_leaves_later_messages_missing,
    unsettled_run_stays_until_replaced_or_synced,
    settling_run_resolves_its_unknown_messages,
    unsynced_messages_sent_with_unsettled_run_are_settled_present,
    unsynced_messages_sent_with_discarded_run_are_settled_present,
    seeded_upstream_thread_contains_all_earlier_messages,
    all_earlier_messages_can_be_withheld,
    messages_before_position_can_be_withheld,
    missing_messages_can_be_withheld_alone,
    earlier_messages_page_backwards,
    pages_of_long_earlier_messages_are_bounded_in_bytes,
    baseline_anchors_at_newest_known_upstream_message,
    discarded_run_leaves_no_messages,
    discarding_queued_run_changes_no_counts,
    run_marked_for_rollback_must_be_discarded,
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

fn failed(said: UpstreamSync) -> RunEnd {
    RunEnd {
        status: RunStatus::Failed,
        said,
        ..completed(None)
    }
}

fn reply(words: &str, upstream: Option<&str>, sync: UpstreamSync) -> Reply {
    let upstream_message_id = upstream.map(ToOwned::to_owned);
    Reply {
        id: MessageId::new(),
        content: text(words),
        upstream_message_id,
        sync,
    }
}

fn unsettled_run(run: RunId) -> UnsettledRun {
    UnsettledRun {
        run,
        thread: Some(UpstreamThreadId("conv_1".to_owned())),
        upstream_run: Some(UpstreamRunId("resp_1".to_owned())),
        open_calls: pause(&["call_1"], 0).required_action.tool_calls,
        baseline: Baseline {
            anchor: Some("msg_0".to_owned()),
            skip: 2,
        },
        inputs: 1,
        synced: false,
        remove: true,
    }
}

/// Returns each message of the key's transcript: its text, its sync state, and how its run ended.
async fn syncs(
    store: &Store,
    key: &ConversationKey,
) -> Vec<(String, UpstreamSync, Option<RunStatus>)> {
    let lines = transcript(store, key).await;
    let page = store
        .messages(ThreadName::Newest(key), false, &first_page())
        .await
        .unwrap()
        .unwrap();
    let words = lines
        .into_iter()
        .map(|line| line.split_once(": ").unwrap().1.to_owned());
    words
        .zip(page.data)
        .map(|(words, message)| (words, message.sync, message.ended))
        .collect()
}

/// Admits a message on a free thread and finishes its run.
async fn finished_run(store: &Store, key: &ConversationKey, words: &str, end: &RunEnd) -> Finished {
    let turn = started(store.admit(say(key, words)).await.unwrap());
    closed(store.finish(&turn.lease, end.clone()).await.unwrap())
}

/// Returns the texts of a run's unsynced messages.
async fn unsynced_messages(store: &Store, run: RunId) -> Vec<String> {
    let text = |message: Message| match &message.content[..] {
        [ContentPart::Text { text, .. }] => text.clone(),
        other => panic!("{other:?}"),
    };
    store
        .unsynced_messages(run, None, 1000)
        .await
        .unwrap()
        .data
        .into_iter()
        .rev()
        .map(text)
        .collect()
}

async fn finish_records_sync_state_of_its_messages(database: &TestDatabase, store: &Store) {
    use UpstreamSync::{Missing, Present, Unknown, Withheld};
    let key = user("alice");
    let mut missing = 0;
    let mut wanted = vec![];
    for said in [Present, Missing, Withheld, Unknown] {
        for replied in [Present, Missing, Withheld, Unknown] {
            let status = RunStatus::Cancelled;
            let end = RunEnd {
                status,
                reply: Some(reply("reply", None, replied)),
                ..failed(said)
            };
            let finished = finished_run(store, &key, "message", &end).await;
            missing += i64::from(said == Missing) + i64::from(replied == Missing);
            assert_eq!(
                finished.thread.unsynced_messages, missing,
                "{said} {replied}"
            );
            let message = finished.message.unwrap();
            assert_eq!((message.sync, message.ended), (replied, Some(status)));
            wanted.push(("message".to_owned(), said, Some(status)));
            wanted.push(("reply".to_owned(), replied, Some(status)));
        }
    }
    assert_eq!(syncs(store, &key).await, wanted);
    assert_eq!(
        newest_thread(store, &key)
            .await
            .unwrap()
            .0
            .unsynced_messages,
        8
    );
    check_invariants(database).await;
}

async fn completed_run_leaves_no_outcome_on_messages(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let finished = finished_run(store, &key, "1", &completed(Some("one"))).await;
    assert_eq!(
        (
            finished.thread.unsynced_messages,
            &finished.thread.unsettled_run
        ),
        (0, &None)
    );
    // A run may complete although the upstream thread lacks its messages.
    let end = RunEnd {
        said: UpstreamSync::Missing,
        ..completed(Some("two"))
    };
    assert_eq!(
        finished_run(store, &key, "2", &end)
            .await
            .thread
            .unsynced_messages,
        1
    );
    let wanted = [
        ("1", "present"),
        ("one", "present"),
        ("2", "missing"),
        ("two", "present"),
    ];
    for ((words, sync, ended), wanted) in syncs(store, &key).await.iter().zip(wanted) {
        assert_eq!(
            (words.as_str(), sync.as_str(), *ended),
            (wanted.0, wanted.1, None)
        );
    }
    check_invariants(database).await;
}

async fn messages_of_unstarted_run_get_sync_state(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    started(store.admit(say(&key, "1")).await.unwrap());
    let mut missing = 0;
    for said in [UpstreamSync::Withheld, UpstreamSync::Missing] {
        let (waiting, ..) = queued(store.admit(say(&key, "2")).await.unwrap());
        let merge = Admission {
            strategy: MultitaskStrategy::Merge,
            ..say(&key, "3")
        };
        assert!(matches!(
            store.admit(merge.clone()).await.unwrap(),
            Admitted::Merged { .. }
        ));
        let finished = closed(store.finish(&waiting, failed(said)).await.unwrap());
        missing += if said == UpstreamSync::Missing { 2 } else { 0 };
        assert_eq!(finished.thread.unsynced_messages, missing);
        let all = syncs(store, &key).await;
        let failed = Some(RunStatus::Failed);
        assert_eq!(
            all[all.len() - 2..],
            [
                ("2".to_owned(), said, failed),
                ("3".to_owned(), said, failed)
            ]
        );
        assert_eq!(all[0], ("1".to_owned(), UpstreamSync::Present, None));
    }
    check_invariants(database).await;
}

async fn unsynced_messages_are_missing_ones_of_earlier_runs(
    database: &TestDatabase,
    store: &Store,
) {
    use UpstreamSync::{Missing, Present, Unknown, Withheld};
    let key = user("alice");
    finished_run(store, &key, "1", &failed(Missing)).await;
    finished_run(store, &key, "2", &failed(Withheld)).await;
    finished_run(store, &key, "3", &failed(Unknown)).await;
    let partial = RunEnd {
        reply: Some(reply("four", None, Missing)),
        ..failed(Present)
    };
    finished_run(store, &key, "4", &partial).await;
    finished_run(store, &user("bob"), "other", &failed(Missing)).await;
    let now = started(store.admit(say(&key, "5")).await.unwrap());
    assert_eq!(now.thread.unsynced_messages, 2);
    assert_eq!(unsynced_messages(store, now.run.id).await, ["1", "four"]);
    assert_eq!(unsynced_messages(store, RunId::new()).await, [""; 0]);
    // No unsynced message was sent with this run, so all stay.
    let own = RunEnd {
        reply: Some(reply("five", None, Missing)),
        ..failed(Missing)
    };
    let finished = closed(store.finish(&now.lease, own.clone()).await.unwrap());
    assert_eq!(finished.thread.unsynced_messages, 4);
    let next = started(store.admit(say(&key, "6")).await.unwrap());
    assert_eq!(
        unsynced_messages(store, next.run.id).await,
        ["1", "four", "5", "five"]
    );
    let (waiting, ..) = queued(store.admit(say(&key, "7")).await.unwrap());
    assert_eq!(
        unsynced_messages(store, waiting.run_id).await,
        ["1", "four", "5", "five"]
    );
    check_invariants(database).await;
}

async fn synced_finish_marks_unsynced_messages_present(database: &TestDatabase, store: &Store) {
    use UpstreamSync::{Missing, Present, Unknown, Withheld};
    let key = user("alice");
    finished_run(store, &key, "1", &failed(Missing)).await;
    finished_run(store, &key, "2", &failed(Withheld)).await;
    finished_run(store, &key, "3", &failed(Unknown)).await;
    let others = finished_run(store, &user("bob"), "other", &failed(Missing)).await;

    // The run's own messages may still be missing.
    let end = RunEnd {
        synced: true,
        reply: Some(reply("four", None, Missing)),
        ..failed(Missing)
    };
    let finished = finished_run(store, &key, "4", &end).await;
    assert_eq!(finished.thread.unsynced_messages, 2);
    let told = |all: Vec<(String, UpstreamSync, Option<RunStatus>)>| {
        all.into_iter()
            .map(|(words, sync, _)| (words, sync))
            .collect::<Vec<_>>()
    };
    let wanted = |sync| {
        [
            ("1", Present),
            ("2", Withheld),
            ("3", Present),
            ("4", sync),
            ("four", sync),
        ]
        .map(|(words, sync)| (words.to_owned(), sync))
    };
    assert_eq!(told(syncs(store, &key).await), wanted(Missing));
    check_invariants(database).await;

    let end = RunEnd {
        synced: true,
        ..completed(Some("five"))
    };
    let finished = finished_run(store, &key, "5", &end).await;
    assert_eq!(finished.thread.unsynced_messages, 0);
    assert_eq!(told(syncs(store, &key).await)[..5], wanted(Present));
    let (bob, _) = newest_thread(store, &user("bob")).await.unwrap();
    assert_eq!(bob, others.thread, "no other thread changes");
    check_invariants(database).await;
}

async fn synced_finish_leaves_later_messages_missing(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    finished_run(store, &key, "1", &failed(UpstreamSync::Missing)).await;
    let now = started(store.admit(say(&key, "2")).await.unwrap());
    let (waiting, ..) = queued(store.admit(say(&key, "3")).await.unwrap());
    closed(
        store
            .finish(&waiting, failed(UpstreamSync::Missing))
            .await
            .unwrap(),
    );
    assert_eq!(unsynced_messages(store, now.run.id).await, ["1"]);
    let end = RunEnd {
        synced: true,
        ..completed(Some("two"))
    };
    let finished = closed(store.finish(&now.lease, end.clone()).await.unwrap());
    assert_eq!(finished.thread.unsynced_messages, 1);
    let next = started(store.admit(say(&key, "4")).await.unwrap());
    assert_eq!(unsynced_messages(store, next.run.id).await, ["3"]);

    // A run without messages counts as the last.
    let (waiting, ..) = queued(store.admit(say(&key, "5")).await.unwrap());
    let end = RunEnd {
        synced: true,
        ..failed(UpstreamSync::Missing)
    };
    assert_eq!(
        closed(store.finish(&waiting, end.clone()).await.unwrap())
            .thread
            .unsynced_messages,
        1
    );
    check_invariants(database).await;
}

async fn synced_discard_leaves_later_messages_missing(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    finished_run(store, &key, "1", &failed(UpstreamSync::Missing)).await;
    let now = started(store.admit(say(&key, "2")).await.unwrap());
    let (waiting, ..) = queued(store.admit(say(&key, "3")).await.unwrap());
    closed(
        store
            .finish(&waiting, failed(UpstreamSync::Missing))
            .await
            .unwrap(),
    );
    let end = RunEnd {
        synced: true,
        discard: true,
        ..failed(UpstreamSync::Missing)
    };
    let finished = closed(store.finish(&now.lease, end).await.unwrap());
    assert_eq!(finished.thread.unsynced_messages, 1);
    let next = started(store.admit(say(&key, "4")).await.unwrap());
    assert_eq!(unsynced_messages(store, next.run.id).await, ["3"]);
    check_invariants(database).await;
}

async fn unsettled_run_stays_until_replaced_or_synced(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let left = |run| RunEnd {
        unsettled_run: Some(unsettled_run(run)),
        ..failed(UpstreamSync::Unknown)
    };
    let (one, two) = (RunId::new(), RunId::new());
    assert_eq!(
        finished_run(store, &key, "1", &left(one))
            .await
            .thread
            .unsettled_run,
        Some(unsettled_run(one))
    );
    assert_eq!(
        newest_thread(store, &key).await.unwrap().0.unsettled_run,
        Some(unsettled_run(one))
    );
    let finished = finished_run(store, &key, "2", &completed(None)).await;
    assert_eq!(
        finished.thread.unsettled_run,
        Some(unsettled_run(one)),
        "the finish does not name an unsettled run"
    );
    assert_eq!(
        finished_run(store, &key, "3", &left(two))
            .await
            .thread
            .unsettled_run,
        Some(unsettled_run(two))
    );
    let both = RunEnd {
        synced: true,
        ..left(one)
    };
    assert_eq!(
        finished_run(store, &key, "4", &both)
            .await
            .thread
            .unsettled_run,
        Some(unsettled_run(one))
    );
    let synced = RunEnd {
        synced: true,
        ..completed(None)
    };
    assert_eq!(
        finished_run(store, &key, "5", &synced)
            .await
            .thread
            .unsettled_run,
        None
    );
}

async fn settling_run_resolves_its_unknown_messages(database: &TestDatabase, store: &Store) {
    use UpstreamSync::{Missing, Present, Unknown, Withheld};
    let key = user("alice");
    for (found, missing) in [(Present, 0), (Missing, 1), (Withheld, 1)] {
        let end = RunEnd {
            reply: Some(reply("reply", None, Withheld)),
            ..failed(Unknown)
        };
        let earlier = finished_run(store, &key, "message", &end).await.run.id;
        let end = RunEnd {
            unsettled_run: Some(unsettled_run(earlier)),
            ..completed(Some("other"))
        };
        finished_run(store, &key, "other", &end).await;
        let other = finished_run(store, &key, "unknown", &failed(Unknown))
            .await
            .run
            .id;
        let now = started(store.admit(say(&key, "now")).await.unwrap());
        let (waiting, ..) = queued(store.admit(say(&key, "waits")).await.unwrap());
        let stale = RunLease {
            fence: now.lease.fence - 1,
            ..now.lease
        };
        assert!(
            !store
                .record_settlement(&stale, earlier, found)
                .await
                .unwrap()
        );
        assert!(
            !store
                .record_settlement(&waiting, earlier, found)
                .await
                .unwrap(),
            "the run is not active"
        );
        for _ in 0..2 {
            assert!(
                store
                    .record_settlement(&now.lease, earlier, found)
                    .await
                    .unwrap()
            );
        }
        let (thread, _) = newest_thread(store, &key).await.unwrap();
        assert_eq!(
            (thread.unsynced_messages, thread.unsettled_run),
            (missing, None),
            "{found}"
        );
        let page = PageRequest {
            ascending: false,
            ..first_page()
        };
        let of = |run| move |message: &&Message| message.run_id == Some(run);
        let data = store
            .messages(ThreadName::Newest(&key), false, &page)
            .await
            .unwrap()
            .unwrap()
            .data;
        let syncs: Vec<_> = data.iter().filter(of(earlier)).map(|it| it.sync).collect();
        assert_eq!(syncs, [Withheld, found], "only unknown messages change");
        assert!(data.iter().filter(of(other)).all(|it| it.sync == Unknown));
        check_invariants(database).await;

        assert!(
            store
                .record_settlement(&now.lease, other, Present)
                .await
                .unwrap()
        );
        closed(store.finish(&now.lease, completed(None)).await.unwrap());
        assert!(
            !store
                .record_settlement(&now.lease, other, Missing)
                .await
                .unwrap(),
            "the run has ended"
        );
        started_from_queue(store.start_queued(&waiting).await.unwrap());
        closed(store.finish(&waiting, completed(None)).await.unwrap());
    }
    check_invariants(database).await;
}

async fn unsynced_messages_sent_with_unsettled_run_are_settled_present(
    database: &TestDatabase,
    store: &Store,
) {
    use UpstreamSync::{Missing, Present, Unknown, Withheld};
    for (found, own) in [(Present, 0), (Missing, 2), (Withheld, 0)] {
        let key = user(found.as_str());
        finished_run(store, &key, "1", &failed(Missing)).await;
        let partial = RunEnd {
            reply: Some(reply("two", None, Missing)),
            ..failed(Withheld)
        };
        finished_run(store, &key, "2", &partial).await;
        let forgotten = finished_run(store, &key, "3", &failed(Unknown))
            .await
            .run
            .id;
        let others = finished_run(
            store,
            &session("bob", found.as_str()),
            "other",
            &failed(Missing),
        )
        .await;

        let now = started(store.admit(say(&key, "4")).await.unwrap());
        let (waiting, ..) = queued(store.admit(say(&key, "5")).await.unwrap());
        closed(store.finish(&waiting, failed(Missing)).await.unwrap());
        let end = RunEnd {
            unsettled_run: Some(UnsettledRun {
                synced: true,
                ..unsettled_run(now.run.id)
            }),
            reply: Some(reply("four", None, Unknown)),
            ..failed(Unknown)
        };
        assert_eq!(
            closed(store.finish(&now.lease, end.clone()).await.unwrap())
                .thread
                .unsynced_messages,
            3
        );
        finished_run(store, &key, "6", &failed(Missing)).await;

        let next = started(store.admit(say(&key, "7")).await.unwrap());
        assert_eq!(next.thread.unsynced_messages, 4);
        let before = syncs(store, &key).await;
        let stale = RunLease {
            fence: next.lease.fence - 1,
            ..next.lease
        };
        assert!(!store.took_along(&stale, now.run.id).await.unwrap());
        assert!(
            !store
                .record_settlement(&stale, now.run.id, found)
                .await
                .unwrap()
        );
        assert_eq!(syncs(store, &key).await, before);
        for _ in 0..2 {
            assert!(store.took_along(&next.lease, now.run.id).await.unwrap());
            assert!(
                store
                    .record_settlement(&next.lease, now.run.id, found)
                    .await
                    .unwrap()
            );
            let (thread, _) = newest_thread(store, &key).await.unwrap();
            assert_eq!(
                (thread.unsynced_messages, thread.unsettled_run),
                (2 + own, None),
                "{found}"
            );
            let wanted = [
                ("1", Present),
                ("2", Withheld),
                ("two", Present),
                ("3", Unknown),
                ("4", found),
                ("5", Missing),
                ("four", found),
                ("6", Missing),
                ("7", Present),
            ];
            let all = syncs(store, &key).await;
            let all: Vec<_> = all
                .iter()
                .map(|(words, sync, _)| (words.as_str(), *sync))
                .collect();
            assert_eq!(
                all, wanted,
                "later messages were not sent, and unknown ones stay unknown"
            );
            check_invariants(database).await;
        }
        // Only this run is unsettled now, and no message before it is unsynced.
        assert!(store.took_along(&next.lease, forgotten).await.unwrap());
        assert!(
            store
                .record_settlement(&next.lease, forgotten, Missing)
                .await
                .unwrap()
        );
        let (thread, _) = newest_thread(store, &key).await.unwrap();
        assert_eq!(thread.unsynced_messages, 3 + own);
        let (bob, _) = newest_thread(store, &others.thread.key).await.unwrap();
        assert_eq!(bob, others.thread, "no other thread changes");
        check_invariants(database).await;
    }
}

/// A discarded run has no messages left that show its position.
async fn unsynced_messages_sent_with_discarded_run_are_settled_present(
    database: &TestDatabase,
    store: &Store,
) {
    use UpstreamSync::{Missing, Present};
    let key = user("alice");
    finished_run(store, &key, "1", &failed(Missing)).await;
    let now = started(store.admit(say(&key, "2")).await.unwrap());
    database.age_starts(Duration::from_secs(1)).await;
    let (waiting, ..) = queued(store.admit(say(&key, "3")).await.unwrap());
    closed(store.finish(&waiting, failed(Missing)).await.unwrap());
    let left = UnsettledRun {
        synced: true,
        ..unsettled_run(now.run.id)
    };
    let end = RunEnd {
        discard: true,
        unsettled_run: Some(left),
        ..failed(Missing)
    };
    closed(store.finish(&now.lease, end.clone()).await.unwrap());
    finished_run(store, &key, "4", &failed(Missing)).await;
    let next = started(store.admit(say(&key, "5")).await.unwrap());
    for _ in 0..2 {
        assert!(store.took_along(&next.lease, now.run.id).await.unwrap());
        assert!(
            store
                .record_settlement(&next.lease, now.run.id, Missing)
                .await
                .unwrap()
        );
        let all = syncs(store, &key).await;
        let all: Vec<_> = all
            .iter()
            .map(|(words, sync, _)| (words.as_str(), *sync))
            .collect();
        assert_eq!(
            all,
            [
                ("1", Present),
                ("3", Missing),
                ("4", Missing),
                ("5", Present)
            ]
        );
        assert_eq!(
            newest_thread(store, &key)
                .await
                .unwrap()
                .0
                .unsynced_messages,
            2
        );
        check_invariants(database).await;
    }
    assert_eq!(unsynced_messages(store, next.run.id).await, ["3", "4"]);
}

async fn seeded_upstream_thread_contains_all_earlier_messages(
    database: &TestDatabase,
    store: &Store,
) {
    use UpstreamSync::{Missing, Present, Unknown, Withheld};
    let key = user("alice");
    let ids = |words: &str| RunEnd {
        reply: Some(reply(words, Some(words), Present)),
        ..completed(None)
    };
    finished_run(store, &key, "1", &ids("one")).await;
    finished_run(store, &key, "2", &failed(Missing)).await;
    let partial = RunEnd {
        reply: Some(reply("three", Some("m3"), Missing)),
        ..failed(Unknown)
    };
    finished_run(store, &key, "3", &partial).await;
    let withheld = RunEnd {
        unsettled_run: Some(unsettled_run(RunId::new())),
        ..failed(Withheld)
    };
    finished_run(store, &key, "4", &withheld).await;
    let others = finished_run(store, &user("bob"), "other", &ids("bob")).await;
    let now = started(store.admit(say(&key, "5")).await.unwrap());
    let (waiting, ..) = queued(store.admit(say(&key, "6")).await.unwrap());
    closed(store.finish(&waiting, failed(Missing)).await.unwrap());

    let id = UpstreamThreadId("conv_2".to_owned());
    let before = newest_thread(store, &key).await.unwrap().0;
    assert_eq!(before.unsynced_messages, 3);
    let stale = RunLease {
        fence: now.lease.fence - 1,
        ..now.lease
    };
    assert!(!bind(store, &stale, &id, true).await);
    assert_eq!(newest_thread(store, &key).await.unwrap().0, before);
    // Binding an upstream thread that is not seeded says nothing about its content.
    assert!(bind(store, &now.lease, &id, false).await);
    let bound = newest_thread(store, &key).await.unwrap().0;
    assert_eq!(
        (bound.unsynced_messages, &bound.unsettled_run),
        (3, &before.unsettled_run)
    );

    for _ in 0..2 {
        assert!(bind(store, &now.lease, &id, true).await);
        let (thread, _) = newest_thread(store, &key).await.unwrap();
        assert_eq!(
            (thread.upstream_thread_id.as_ref(), thread.unsettled_run),
            (Some(&id), None)
        );
        assert_eq!(
            thread.unsynced_messages, 1,
            "the upstream thread lacks messages after the run's own"
        );
        let all: Vec<_> = syncs(store, &key)
            .await
            .into_iter()
            .map(|it| it.1)
            .collect();
        assert_eq!(
            all,
            [
                Present, Present, Present, Present, Present, Withheld, Present, Missing
            ]
        );
        let page = store
            .messages(ThreadName::Newest(&key), false, &first_page())
            .await
            .unwrap()
            .unwrap();
        assert!(page.data.iter().all(|it| it.upstream_message_id.is_none()));
    }
    let page = store
        .messages(ThreadName::Newest(&user("bob")), false, &first_page())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        page.data[1],
        others.message.unwrap(),
        "no other thread changes"
    );
    check_invariants(database).await;
}

async fn all_earlier_messages_can_be_withheld(database: &TestDatabase, store: &Store) {
    use UpstreamSync::{Missing, Present, Unknown, Withheld};
    let key = user("alice");
    for said in [Present, Missing, Withheld, Unknown] {
        let end = RunEnd {
            reply: Some(reply("reply", Some("msg_1"), Present)),
            ..failed(said)
        };
        finished_run(store, &key, "message", &end).await;
    }
    let turn = started(store.admit(say(&key, "and now?")).await.unwrap());
    assert!(
        !store
            .withhold_earlier(
                &RunLease {
                    fence: 2,
                    ..turn.lease
                },
                &Withholding::default()
            )
            .await
            .unwrap()
    );
    assert_eq!(
        newest_thread(store, &key)
            .await
            .unwrap()
            .0
            .unsynced_messages,
        1,
        "another owner has the lease"
    );
    for _ in 0..2 {
        assert!(
            store
                .withhold_earlier(&turn.lease, &Withholding::default())
                .await
                .unwrap()
        );
    }
    let mut syncs: Vec<_> = syncs(store, &key)
        .await
        .into_iter()
        .map(|(_, sync, _)| sync)
        .collect();
    assert_eq!(syncs.pop(), Some(Present));
    assert_eq!(syncs, [Withheld; 8]);
    assert_eq!(
        newest_thread(store, &key)
            .await
            .unwrap()
            .0
            .unsynced_messages,
        0
    );
    assert_eq!(
        store.baseline(turn.run.id).await.unwrap(),
        Baseline::default()
    );
    check_invariants(database).await;
}

/// Makes six messages of three runs, of which the upstream lacks the first two, and starts
/// another run.
async fn three_runs_and_one(store: &Store, key: &ConversationKey) -> StartedRun {
    for (n, said) in [
        UpstreamSync::Missing,
        UpstreamSync::Present,
        UpstreamSync::Missing,
    ]
    .into_iter()
    .enumerate()
    {
        let reply = reply(
            &format!("reply {n}"),
            Some(&format!("m{n}")),
            UpstreamSync::Present,
        );
        finished_run(
            store,
            key,
            &format!("say {n}"),
            &RunEnd {
                said,
                reply: Some(reply),
                ..completed(None)
            },
        )
        .await;
    }
    started(store.admit(say(key, "now")).await.unwrap())
}

async fn messages_before_position_can_be_withheld(database: &TestDatabase, store: &Store) {
    use UpstreamSync::{Missing, Present, Withheld};
    let key = user("alice");
    let now = three_runs_and_one(store, &key).await;
    let what = Withholding {
        before: Some(4),
        ..Withholding::default()
    };
    assert!(
        !store
            .withhold_earlier(
                &RunLease {
                    fence: 2,
                    ..now.lease
                },
                &what
            )
            .await
            .unwrap()
    );
    for _ in 0..2 {
        assert!(store.withhold_earlier(&now.lease, &what).await.unwrap());
        let seen = syncs(store, &key)
            .await
            .into_iter()
            .map(|(_, sync, _)| sync);
        let wanted = [
            Withheld, Withheld, Withheld, Present, Missing, Present, Present,
        ];
        assert_eq!(seen.collect::<Vec<_>>(), wanted);
        check_invariants(database).await;
    }
    // A run's own messages are never withheld by it.
    let all = Withholding {
        before: Some(i64::MAX),
        ..Withholding::default()
    };
    assert!(store.withhold_earlier(&now.lease, &all).await.unwrap());
    let seen = syncs(store, &key)
        .await
        .into_iter()
        .map(|(_, sync, _)| sync);
    assert_eq!(
        seen.collect::<Vec<_>>(),
        [&[Withheld; 6][..], &[Present]].concat()
    );
    assert_eq!(store.earlier(now.run.id, None, 10).await.unwrap().data, []);
    check_invariants(database).await;
}

async fn missing_messages_can_be_withheld_alone(database: &TestDatabase, store: &Store) {
    use UpstreamSync::{Missing, Present, Withheld};
    let key = user("alice");
    let now = three_runs_and_one(store, &key).await;
    let baseline = store.baseline(now.run.id).await.unwrap();
    let what = Withholding {
        before: Some(5),
        missing_only: true,
        carried: None,
    };
    assert!(store.withhold_earlier(&now.lease, &what).await.unwrap());
    let seen = syncs(store, &key)
        .await
        .into_iter()
        .map(|(_, sync, _)| sync);
    assert_eq!(
        seen.collect::<Vec<_>>(),
        [
            Withheld, Present, Present, Present, Missing, Present, Present
        ]
    );
    assert_eq!(unsynced_messages(store, now.run.id).await, ["say 2"]);
    assert_eq!(
        store.baseline(now.run.id).await.unwrap(),
        baseline,
        "messages that are upstream keep their id"
    );
    check_invariants(database).await;
}

async fn earlier_messages_page_backwards(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let now = three_runs_and_one(store, &key).await;
    queued(store.admit(say(&key, "later")).await.unwrap());
    let run = now.run.id;
    let positions =
        |messages: Vec<Message>| messages.iter().map(|it| it.position).collect::<Vec<_>>();
    assert_eq!(
        positions(store.earlier(run, None, 10).await.unwrap().data),
        [6, 5, 4, 3, 2, 1]
    );
    assert_eq!(
        positions(store.earlier(run, None, 2).await.unwrap().data),
        [6, 5]
    );
    assert_eq!(
        positions(store.earlier(run, Some(5), 2).await.unwrap().data),
        [4, 3]
    );
    assert_eq!(
        positions(store.earlier(run, Some(99), 1).await.unwrap().data),
        [6],
        "the run's own message is not included"
    );
    assert_eq!(
        positions(store.earlier(run, Some(1), 2).await.unwrap().data),
        [0; 0]
    );
    assert_eq!(
        positions(store.unsynced_messages(run, None, 10).await.unwrap().data),
        [5, 1]
    );
    assert_eq!(
        positions(store.unsynced_messages(run, None, 1).await.unwrap().data),
        [5]
    );
    assert_eq!(
        positions(store.unsynced_messages(run, Some(5), 1).await.unwrap().data),
        [1]
    );
    let what = Withholding {
        before: Some(3),
        ..Withholding::default()
    };
    assert!(store.withhold_earlier(&now.lease, &what).await.unwrap());
    assert_eq!(
        positions(store.earlier(run, None, 10).await.unwrap().data),
        [6, 5, 4, 3]
    );
    assert_eq!(
        positions(store.unsynced_messages(run, None, 10).await.unwrap().data),
        [5]
    );
    for nobody in [RunId::new(), RunId::new()] {
        assert_eq!(store.earlier(nobody, None, 10).await.unwrap().data, []);
        assert_eq!(
            store
                .unsynced_messages(nobody, None, 10)
                .await
                .unwrap()
                .data,
            []
        );
    }
}

async fn pages_of_long_earlier_messages_are_bounded_in_bytes(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let long = "x".repeat(PAGE_BYTES / 4);
    for _ in 0..6 {
        finished_run(store, &key, &long, &failed(UpstreamSync::Missing)).await;
    }
    let now = started(store.admit(say(&key, "now")).await.unwrap());
    let run = now.run.id;
    let (mut known, mut lacking) = (vec![], vec![]);
    for _ in 0..2 {
        let before = known.last().copied();
        let page = store.earlier(run, before, 100).await.unwrap().data;
        known.extend(page.iter().map(|it| it.position));
        let page = store
            .unsynced_messages(run, before, 100)
            .await
            .unwrap()
            .data;
        lacking.extend(page.iter().map(|it| it.position));
        assert_eq!(known, lacking);
        assert_eq!(known.len(), if before.is_none() { 4 } else { 6 });
    }
    assert_eq!(known, [6, 5, 4, 3, 2, 1]);
}

async fn baseline_anchors_at_newest_known_upstream_message(_: &TestDatabase, store: &Store) {
    use UpstreamSync::{Missing, Present, Unknown, Withheld};
    let key = user("alice");
    let replied = |id: Option<&str>, sync| RunEnd {
        reply: Some(reply("x", id, sync)),
        ..completed(None)
    };
    let baseline = |anchor: Option<&str>, skip| Baseline {
        anchor: anchor.map(ToOwned::to_owned),
        skip,
    };
    assert_eq!(
        store.baseline(RunId::new()).await.unwrap(),
        Baseline::default()
    );
    for (said, end, wanted) in [
        (Present, replied(None, Present), baseline(None, 0)),
        (Present, replied(None, Present), baseline(None, 1)),
        (Missing, replied(None, Present), baseline(None, 2)),
        (Present, replied(Some("m4"), Present), baseline(None, 2)),
        (Present, replied(None, Present), baseline(Some("m4"), 0)),
        (
            Withheld,
            replied(Some("m6"), Missing),
            baseline(Some("m4"), 1),
        ),
        (
            Unknown,
            replied(Some("m7"), Unknown),
            baseline(Some("m4"), 1),
        ),
        (Present, replied(None, Present), baseline(Some("m4"), 1)),
        (
            Present,
            replied(Some("m9"), Present),
            baseline(Some("m4"), 2),
        ),
        (Present, replied(None, Present), baseline(Some("m9"), 0)),
    ] {
        let now = started(store.admit(say(&key, "x")).await.unwrap());
        assert_eq!(store.baseline(now.run.id).await.unwrap(), wanted);
        closed(
            store
                .finish(&now.lease, RunEnd { said, ..end })
                .await
                .unwrap(),
        );
    }
    // A run without a message counts as the last.
    started(store.admit(say(&key, "x")).await.unwrap());
    let (waiting, ..) = queued(store.admit(say(&key, "y")).await.unwrap());
    let (cancelled, ..) = queued(store.admit(say(&key, "z")).await.unwrap());
    assert_eq!(
        store.baseline(waiting.run_id).await.unwrap(),
        baseline(Some("m9"), 2)
    );
    // Messages that other runs add later do not matter.
    closed(store.finish(&cancelled, failed(Present)).await.unwrap());
    assert_eq!(
        store.baseline(waiting.run_id).await.unwrap(),
        baseline(Some("m9"), 3)
    );
    assert_eq!(
        store.baseline(cancelled.run_id).await.unwrap(),
        baseline(Some("m9"), 2)
    );
}

async fn discarded_run_leaves_no_messages(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    finished_run(store, &key, "1", &completed(Some("one"))).await;
    let now = started(store.admit(say(&key, "2")).await.unwrap());
    let (cancelled, ..) = queued(store.admit(say(&key, "3")).await.unwrap());
    let (next, ..) = queued(store.admit(say(&key, "4")).await.unwrap());
    closed(
        store
            .finish(&cancelled, failed(UpstreamSync::Missing))
            .await
            .unwrap(),
    );
    let end = RunEnd {
        status: RunStatus::Cancelled,
        discard: true,
        unsettled_run: Some(unsettled_run(now.run.id)),
        said: UpstreamSync::Missing,
        ..completed(Some("two"))
    };
    let finished = closed(store.finish(&now.lease, end.clone()).await.unwrap());
    assert_eq!(
        (finished.run.status, finished.run.discarded),
        (RunStatus::Cancelled, true)
    );
    assert_eq!(
        (&finished.message, finished.thread.message_count),
        (&None, 3)
    );
    assert_eq!(
        (
            finished.thread.unsynced_messages,
            &finished.thread.unsettled_run
        ),
        (1, &end.unsettled_run)
    );
    assert_eq!(
        closed(store.finish(&now.lease, end.clone()).await.unwrap()),
        finished,
        "a repeat is harmless"
    );
    assert_eq!(
        store.run(&key, now.run.id).await.unwrap().unwrap(),
        (finished.run, None)
    );
    assert_eq!(
        transcript(store, &key).await,
        ["user: 1", "assistant: one", "user: 3"]
    );
    check_invariants(database).await;

    // No position is given twice, not even that of the last message.
    let turn = started_from_queue(store.start_queued(&next).await.unwrap());
    closed(store.finish(&turn.lease, end.clone()).await.unwrap());
    exchange(store, &key).await;
    let page = store
        .messages(ThreadName::Newest(&key), false, &first_page())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        page.data.iter().map(|it| it.position).collect::<Vec<_>>(),
        [1, 2, 4, 6, 7]
    );
    check_invariants(database).await;
}

async fn discarding_queued_run_changes_no_counts(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    started(store.admit(say(&key, "1")).await.unwrap());
    let (waiting, ..) = queued(store.admit(say(&key, "2")).await.unwrap());
    let end = RunEnd {
        discard: true,
        ..failed(UpstreamSync::Missing)
    };
    let finished = closed(store.finish(&waiting, end.clone()).await.unwrap());
    assert_eq!(
        (
            finished.thread.message_count,
            finished.thread.unsynced_messages
        ),
        (1, 0)
    );
    assert!(finished.run.discarded);
    assert_eq!(transcript(store, &key).await, ["user: 1"]);
    check_invariants(database).await;
}

async fn run_marked_for_rollback_must_be_discarded(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let now = started(store.admit(say(&key, "1")).await.unwrap());
    let (rollback, ..) = queued(store.admit(say(&key, "2")).await.unwrap());
    store.cancel_active(&rollback, true).await.unwrap().unwrap();
    let before = (
        newest_thread(store, &key).await,
        store.run(&key, now.run.id).await.unwrap(),
    );
    let end = RunEnd {
        synced: true,
        unsettled_run: Some(unsettled_run(now.run.id)),
        ..completed(Some("one"))
    };
    for end in [&end, &failed(UpstreamSync::Missing)] {
        assert_eq!(
            store.finish(&now.lease, end.clone()).await.unwrap(),
            Closing::MustDiscard
        );
    }
    let after = (
        newest_thread(store, &key).await,
        store.run(&key, now.run.id).await.unwrap(),
    );
    assert_eq!(before, after);
    assert_eq!(store.events(now.run.id, 0).await.unwrap(), []);
    assert_eq!(transcript(store, &key).await, ["user: 1"]);
    let stale = RunLease {
        fence: now.lease.fence - 1,
        ..now.lease
    };
    assert_eq!(
        store.finish(&stale, end.clone()).await.unwrap(),
        Closing::Lost
    );

    let discarded = RunEnd {
        discard: true,
        ..end
    };
    let finished = closed(store.finish(&now.lease, discarded.clone()).await.unwrap());
    assert_eq!((finished.thread.message_count, finished.message), (0, None));
    started_from_queue(store.start_queued(&rollback).await.unwrap());
    check_invariants(database).await;
}

//! The stored events of runs, and what else is recorded during a run.

use threadkeeper::domain::UpstreamRunId;
use threadkeeper::store::{Answered, Paused, Request, RunProgress};

use super::*;

on_every_backend!(
    shown_events_are_recorded_in_order,
    recording_requires_current_lease,
    progress_of_many_runs_records_in_one_call,
    longer_of_two_recordings_wins,
    pause_extends_recorded_events,
    recording_after_pause_changes_nothing,
    pause_overlapping_recorded_batches_leaves_no_gap,
    finish_extends_recorded_events,
    finish_dropping_log_removes_recorded_events,
    upstream_run_ids_of_all_rounds_are_kept,
    late_upstream_run_id_is_ignored,
    repeated_run_has_no_upstream_run_id_until_its_next_try,
);

/// A batch of texts of one byte each, which begins at number `first`.
fn texts(first: i64, texts: &[&str]) -> EventBatch {
    EventBatch {
        first,
        events: texts
            .iter()
            .map(|text| LoggedEvent::Delta((*text).into()))
            .collect(),
    }
}

fn progress(lease: RunLease, events: EventBatch) -> RunProgress {
    RunProgress {
        lease,
        upstream_run_id: None,
        events,
    }
}

/// A pause whose events begin with this batch.
fn pause_after(EventBatch { first, mut events }: EventBatch) -> Pause {
    let calls = pause(&["call_1"], 0);
    events.push(LoggedEvent::RequiresAction(calls.required_action.clone()));
    Pause {
        events: EventBatch { first, events },
        ..calls
    }
}

async fn begin(store: &Store, key: &ConversationKey) -> StartedRun {
    started(store.admit(admission(key)).await.unwrap())
}

async fn shown_events_are_recorded_in_order(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = begin(store, &key).await;
    let batches = [
        EventBatch {
            first: 1,
            events: vec![LoggedEvent::Started],
        },
        texts(2, &["Hel", "lo"]),
        EventBatch {
            first: 7,
            events: vec![LoggedEvent::Omitted { units: 3 }],
        },
        texts(10, &["a\"\u{1f980}"]),
    ];
    for batch in &batches {
        for _ in 0..2 {
            let recorded = store
                .record(&[progress(turn.lease, batch.clone())])
                .await
                .unwrap();
            assert_eq!(recorded, [turn.run.id]);
        }
    }
    assert_eq!(store.record(&[]).await.unwrap(), []);
    for (from, skipped) in [
        (0, 0),
        (1, 0),
        (2, 1),
        (6, 1),
        (7, 2),
        (9, 2),
        (10, 3),
        (15, 3),
        (16, 3),
        (99, 3),
    ] {
        assert_eq!(
            store.events(turn.run.id, from).await.unwrap(),
            batches[skipped..],
            "from {from}"
        );
    }
    // A batch without events adds no row.
    let nothing = progress(turn.lease, texts(16, &[]));
    assert_eq!(store.record(&[nothing]).await.unwrap(), [turn.run.id]);
    assert_eq!(store.events(turn.run.id, 0).await.unwrap(), batches);

    // A queued run has an event to record, too.
    let (waits, ..) = queued(store.admit(admission(&key)).await.unwrap());
    let place = EventBatch {
        first: 0,
        events: vec![LoggedEvent::Queued { position: 1 }],
    };
    assert_eq!(
        store
            .record(&[progress(waits, place.clone())])
            .await
            .unwrap(),
        [waits.run_id]
    );
    assert_eq!(store.events(waits.run_id, 0).await.unwrap(), [place]);
    let end = RunEnd {
        events: texts(16, &["!"]),
        ..completed(Some("hi"))
    };
    closed(store.finish(&turn.lease, end.clone()).await.unwrap());
    started_from_queue(store.start_queued(&waits).await.unwrap());
    assert_eq!(
        store.events(turn.run.id, 12).await.unwrap(),
        [batches[3].clone(), texts(16, &["!"])]
    );
    check_invariants(database).await;
}

async fn recording_requires_current_lease(_: &TestDatabase, store: &Store) {
    let turn = begin(store, &user("a")).await;
    let ended = begin(store, &user("b")).await;
    closed(store.finish(&ended.lease, completed(None)).await.unwrap());
    let before = store.events(ended.run.id, 0).await.unwrap();
    let adopted = store.adopt_orphans(ReplicaId::new(), &[], 1).await.unwrap();
    assert_eq!(adopted[0].run.id, turn.run.id);
    let id = Some(UpstreamRunId("resp_1".to_owned()));
    let leases = [
        turn.lease,
        ended.lease,
        RunLease {
            run_id: RunId::new(),
            fence: 1,
        },
    ];
    let stale = leases.map(|lease| RunProgress {
        upstream_run_id: id.clone(),
        ..progress(lease, texts(2, &["a"]))
    });
    assert_eq!(store.record(&stale).await.unwrap(), []);
    assert_eq!(store.events(turn.run.id, 0).await.unwrap(), []);
    assert_eq!(store.events(ended.run.id, 0).await.unwrap(), before);
    for key in ["a", "b"] {
        let run = &store.unfinished(&user(key)).await.unwrap().unwrap();
        assert!(run.iter().all(|run| run.upstream_run_id.is_none()));
    }
    let good = progress(adopted[0].lease, texts(2, &["b"]));
    let all = [stale[0].clone(), stale[1].clone()]
        .into_iter()
        .skip(1)
        .chain([good])
        .collect::<Vec<_>>();
    assert_eq!(store.record(&all).await.unwrap(), [turn.run.id]);
    assert_eq!(
        store.events(turn.run.id, 0).await.unwrap(),
        [texts(2, &["b"])]
    );
}

async fn progress_of_many_runs_records_in_one_call(database: &TestDatabase, store: &Store) {
    let mut all = vec![];
    for n in 0..50 {
        let turn = begin(store, &user(&n.to_string())).await;
        // An upstream id that cannot be stored does not affect the other runs.
        let id = if n == 7 {
            "resp\0".to_owned()
        } else {
            format!("resp_{n}")
        };
        all.push(RunProgress {
            upstream_run_id: (n % 2 == 1).then_some(UpstreamRunId(id)),
            ..progress(
                turn.lease,
                texts(2, if n % 3 == 0 { &[] } else { &["a", "\0", "c"] }),
            )
        });
    }
    let mut recorded = store.record(&all).await.unwrap();
    recorded.sort_unstable();
    let mut wanted: Vec<_> = all.iter().map(|run| run.lease.run_id).collect();
    wanted.sort_unstable();
    assert_eq!(recorded, wanted);
    for (n, run) in all.iter().enumerate() {
        let found = store
            .unfinished(&user(&n.to_string()))
            .await
            .unwrap()
            .unwrap();
        let id = run.upstream_run_id.clone().filter(|_| n != 7);
        assert_eq!(
            (found[0].id, &found[0].upstream_run_id),
            (run.lease.run_id, &id)
        );
        let batches = store.events(run.lease.run_id, 0).await.unwrap();
        let wanted = if n % 3 == 0 {
            vec![]
        } else {
            vec![texts(2, &["a", "\u{1a}", "c"])]
        };
        assert_eq!(batches, wanted);
    }
    check_invariants(database).await;
}

/// The longer batch repeats one whose acknowledgement was lost. If that one was only slow, it
/// arrives after the longer one.
async fn longer_of_two_recordings_wins(_: &TestDatabase, store: &Store) {
    let turn = begin(store, &user("alice")).await;
    let (short, long) = (texts(2, &["a", "b"]), texts(2, &["a", "b", "c"]));
    for (events, wanted) in [(&short, &short), (&long, &long), (&short, &long)] {
        let recorded = store
            .record(&[progress(turn.lease, events.clone())])
            .await
            .unwrap();
        assert_eq!(recorded, [turn.run.id], "the longer batch is stored");
        assert_eq!(
            &store.events(turn.run.id, 0).await.unwrap()[..],
            std::slice::from_ref(wanted)
        );
    }
}

async fn pause_extends_recorded_events(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = begin(store, &key).await;
    let calls = pause_after(texts(2, &["a", "b"]));
    // Some or all of the text is recorded. Its acknowledgement was lost, so the pause begins with
    // it, too.
    for recorded in [texts(2, &["a"]), texts(2, &["a", "b"])] {
        store
            .record(&[progress(turn.lease, recorded)])
            .await
            .unwrap();
    }
    let Paused::Waiting(paused) = store.pause(&turn.lease, &calls).await.unwrap() else {
        panic!("the run was in progress")
    };
    assert_eq!(paused.run.status, RunStatus::RequiresAction);
    assert_eq!(
        store.events(turn.run.id, 0).await.unwrap(),
        std::slice::from_ref(&calls.events)
    );
    // The pause is recorded already. If it is repeated after the outputs, the run does not wait
    // again.
    let answered = store
        .answer_tools(&key, turn.run.id, &answer(&["call_1"]))
        .await
        .unwrap();
    assert!(matches!(answered, Answered::Resumed(_)), "{answered:?}");
    let Paused::Waiting(again) = store.pause(&turn.lease, &calls).await.unwrap() else {
        panic!("the run is in progress")
    };
    assert_eq!(again.run.status, RunStatus::InProgress);
    check_invariants(database).await;
}

async fn recording_after_pause_changes_nothing(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let request = admission(&key);
    let turn = started(store.admit(request.clone()).await.unwrap());
    let calls = pause_after(texts(2, &["a", "b"]));
    store.pause(&turn.lease, &calls).await.unwrap();
    let late = RunProgress {
        upstream_run_id: calls.upstream_run_id.clone(),
        ..progress(turn.lease, texts(2, &["a", "b"]))
    };
    assert_eq!(
        store.record(std::slice::from_ref(&late)).await.unwrap(),
        [turn.run.id]
    );
    assert_eq!(
        store.events(turn.run.id, 0).await.unwrap(),
        std::slice::from_ref(&calls.events)
    );
    let (run, _) = store.run(&key, turn.run.id).await.unwrap().unwrap();
    assert_eq!(
        (run.status, run.required_action),
        (RunStatus::RequiresAction, Some(calls.required_action))
    );

    store
        .answer_tools(&key, turn.run.id, &answer(&["call_1"]))
        .await
        .unwrap();
    store.record(&[late]).await.unwrap();
    assert_eq!(store.events(turn.run.id, 0).await.unwrap(), [calls.events]);
    let requests = store.requests(request.replica).await.unwrap();
    assert!(
        matches!(requests[..], [Request::Resume { .. }]),
        "{requests:?}"
    );
}

/// The pause was built before two recordings were acknowledged, and is sent after them.
async fn pause_overlapping_recorded_batches_leaves_no_gap(_: &TestDatabase, store: &Store) {
    let turn = begin(store, &user("alice")).await;
    let calls = pause_after(texts(2, &["a", "b", "c"]));
    for recorded in [texts(2, &["a"]), texts(3, &["b", "c"])] {
        store
            .record(&[progress(turn.lease, recorded)])
            .await
            .unwrap();
    }
    store.pause(&turn.lease, &calls).await.unwrap();
    // A reader gets all events after the ones that it has seen.
    let all = [calls.events.clone(), texts(3, &["b", "c"])];
    assert_eq!((all[0].end(), all[1].end()), (6, 5));
    for (from, known) in [(0, 2), (3, 2), (4, 2), (5, 1), (6, 1), (9, 1)] {
        let batches = store.events(turn.run.id, from).await.unwrap();
        assert_eq!(batches, all[..known], "from {from}");
    }
}

async fn finish_extends_recorded_events(database: &TestDatabase, store: &Store) {
    let all = texts(2, &["a", "b", "c"]);
    for (name, recorded) in [
        ("a", texts(2, &["a"])),
        ("b", all.clone()),
        ("c", texts(2, &[])),
    ] {
        let turn = begin(store, &user(name)).await;
        store
            .record(&[progress(turn.lease, recorded)])
            .await
            .unwrap();
        let end = RunEnd {
            events: all.clone(),
            ..completed(Some("abc"))
        };
        for _ in 0..2 {
            closed(store.finish(&turn.lease, end.clone()).await.unwrap());
            assert_eq!(
                store.events(turn.run.id, 0).await.unwrap(),
                std::slice::from_ref(&all)
            );
            // The run's log is still kept.
            assert_eq!(
                store
                    .record(&[progress(turn.lease, texts(2, &["a"]))])
                    .await
                    .unwrap(),
                []
            );
        }
    }
    check_invariants(database).await;
}

async fn finish_dropping_log_removes_recorded_events(database: &TestDatabase, store: &Store) {
    let rows = async || database.number("SELECT count(*) FROM run_events").await;
    let other = begin(store, &user("bob")).await;
    store
        .record(&[progress(other.lease, texts(2, &["a"]))])
        .await
        .unwrap();
    for (name, recorded) in [("short", &[][..]), ("long", &["Hel", "lo"][..])] {
        let key = user(name);
        let turn = begin(store, &key).await;
        let mut first = 2;
        for text in recorded {
            let batch = texts(first, &[text]);
            first = batch.end();
            assert_eq!(
                store.record(&[progress(turn.lease, batch)]).await.unwrap(),
                [turn.run.id]
            );
        }
        let first = if recorded.is_empty() { 0 } else { first };
        let end = RunEnd {
            events: EventBatch {
                first,
                events: vec![],
            },
            drops_log: true,
            ..completed(Some("Hello"))
        };
        let lost = RunLease {
            fence: turn.lease.fence + 1,
            ..turn.lease
        };
        assert_eq!(
            store.finish(&lost, end.clone()).await.unwrap(),
            Closing::Lost
        );
        assert_eq!(
            rows().await,
            1 + i64::try_from(recorded.len()).unwrap(),
            "another owner has the lease"
        );
        for _ in 0..2 {
            closed(store.finish(&turn.lease, end.clone()).await.unwrap());
            assert_eq!(rows().await, 1, "{name}");
            assert_eq!(store.events(turn.run.id, 0).await.unwrap(), []);
        }
        assert_eq!(
            transcript(store, &key).await,
            ["user: hello", "assistant: Hello"]
        );
    }
    assert_eq!(
        store.events(other.run.id, 0).await.unwrap(),
        [texts(2, &["a"])],
        "another's stays"
    );
    check_invariants(database).await;
}

async fn upstream_run_ids_of_all_rounds_are_kept(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = begin(store, &key).await;
    let records = |id: &str| RunProgress {
        upstream_run_id: Some(UpstreamRunId(id.to_owned())),
        ..progress(turn.lease, texts(2, &[]))
    };
    let known = async || {
        let run = store.run(&key, turn.run.id).await.unwrap().unwrap().0;
        let earlier = database
            .texts("SELECT COALESCE(CAST(earlier_upstream_run_ids AS text), '') FROM runs")
            .await;
        (run.upstream_run_id.unwrap().0, earlier[0].replace(' ', ""))
    };
    for _ in 0..2 {
        store.record(&[records("resp_1")]).await.unwrap();
        assert_eq!(known().await, ("resp_1".to_owned(), String::new()));
    }
    // The pause has the same upstream id. The next round has another one.
    store
        .pause(&turn.lease, &pause_after(texts(2, &["a"])))
        .await
        .unwrap();
    assert_eq!(known().await, ("resp_1".to_owned(), String::new()));
    store
        .answer_tools(&key, turn.run.id, &answer(&["call_1"]))
        .await
        .unwrap();
    for _ in 0..2 {
        store.record(&[records("resp_2")]).await.unwrap();
        assert_eq!(
            known().await,
            ("resp_2".to_owned(), "[\"resp_1\"]".to_owned())
        );
    }
    let end = RunEnd {
        upstream_run_id: Some(UpstreamRunId("resp_3".to_owned())),
        ..completed(None)
    };
    closed(store.finish(&turn.lease, end.clone()).await.unwrap());
    assert_eq!(
        known().await,
        ("resp_3".to_owned(), "[\"resp_1\",\"resp_2\"]".to_owned())
    );
}

async fn late_upstream_run_id_is_ignored(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = begin(store, &key).await;
    for id in ["resp_1", "resp_2", "resp_1"] {
        let progress = RunProgress {
            upstream_run_id: Some(UpstreamRunId(id.to_owned())),
            ..progress(turn.lease, texts(2, &[]))
        };
        assert_eq!(store.record(&[progress]).await.unwrap(), [turn.run.id]);
    }
    let run = store.run(&key, turn.run.id).await.unwrap().unwrap().0;
    assert_eq!(
        run.upstream_run_id,
        Some(UpstreamRunId("resp_2".to_owned()))
    );
}

/// The ids of failed tries are kept, so that the janitor can delete what the upstream stores under
/// them. A late recording of such an id changes nothing.
async fn repeated_run_has_no_upstream_run_id_until_its_next_try(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = begin(store, &key).await;
    let id = |id: &str| UpstreamRunId(id.to_owned());
    let named = |id: UpstreamRunId| RunProgress {
        upstream_run_id: Some(id),
        ..progress(turn.lease, texts(2, &[]))
    };
    store.record(&[named(id("resp_1"))]).await.unwrap();
    let stale = RunLease {
        fence: turn.lease.fence - 1,
        ..turn.lease
    };
    assert!(
        !store
            .begins_again(&stale, Some(&id("resp_2")))
            .await
            .unwrap()
    );
    for _ in 0..2 {
        assert!(
            store
                .begins_again(&turn.lease, Some(&id("resp_2")))
                .await
                .unwrap()
        );
    }
    assert!(store.begins_again(&turn.lease, None).await.unwrap());
    store.record(&[named(id("resp_2"))]).await.unwrap();
    let run = store.run(&key, turn.run.id).await.unwrap().unwrap().0;
    assert_eq!(run.upstream_run_id, None);
    store.record(&[named(id("resp_3"))]).await.unwrap();
    let run = store.run(&key, turn.run.id).await.unwrap().unwrap().0;
    assert_eq!(run.upstream_run_id, Some(id("resp_3")));
    let kept = store
        .upstream_orphans(turn.thread.id, true, 10)
        .await
        .unwrap();
    let mut kept: Vec<_> = kept.into_iter().filter_map(|it| it.upstream_id).collect();
    kept.sort();
    assert_eq!(kept, ["resp_1", "resp_2", "resp_3"]);
}

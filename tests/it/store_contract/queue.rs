//! The queue: order of runs, merges, withdrawals and interrupts.

use std::time::Duration;

use threadkeeper::domain::{MultitaskStrategy, RunStatus};
use threadkeeper::store::{MAX_MERGED, Withdrawal, Withdrawn};

use super::*;

on_every_backend!(
    interrupt_and_rollback_go_before_queued_runs,
    interrupt_on_free_thread_starts,
    merge_joins_last_queued_run,
    merge_joins_only_matching_run,
    full_merged_run_accepts_no_more_messages,
    merge_without_queued_run_is_queued_alone,
    interrupt_cancels_only_earlier_active_run,
    discard_mark_of_cancelled_run_stays,
    cancel_marks_only_active_runs,
    queued_run_can_be_taken_over,
    withdrawal_keeps_merged_messages_queued,
    withdrawal_ends_unmerged_run,
);

fn with(key: &ConversationKey, strategy: MultitaskStrategy, words: &str) -> Admission {
    Admission {
        strategy,
        message: InputMessage {
            id: MessageId::new(),
            content: text(words),
        },
        ..admission(key)
    }
}

async fn interrupt_and_rollback_go_before_queued_runs(database: &TestDatabase, store: &Store) {
    use MultitaskStrategy::{Enqueue, Interrupt, Rollback};
    let key = user("alice");
    let mut active = started(store.admit(with(&key, Enqueue, "first")).await.unwrap()).lease;
    let mut waiting = vec![];
    for (strategy, words, place) in [
        (Enqueue, "a", 1),
        (Enqueue, "b", 2),
        (Interrupt, "c", 1),
        (Enqueue, "d", 4),
        (Rollback, "e", 1),
        (Interrupt, "f", 1),
        (Enqueue, "g", 7),
    ] {
        let (lease, _, run, position) =
            queued(store.admit(with(&key, strategy, words)).await.unwrap());
        assert_eq!((position, run.strategy), (place, strategy), "{words}");
        waiting.push((words, lease));
    }
    for next in ["f", "e", "c", "a", "b", "d", "g"] {
        for (words, lease) in &waiting {
            assert_eq!(
                store.start_queued(lease).await.unwrap(),
                QueuedStart::NotYet,
                "{words}"
            );
        }
        closed(store.finish(&active, completed(None)).await.unwrap());
        for (words, lease) in waiting.iter().filter(|(words, _)| *words != next) {
            assert_eq!(
                store.start_queued(lease).await.unwrap(),
                QueuedStart::NotYet,
                "{words}"
            );
        }
        let at = waiting
            .iter()
            .position(|(words, _)| *words == next)
            .unwrap();
        active = waiting.remove(at).1;
        assert_eq!(
            started_from_queue(store.start_queued(&active).await.unwrap()).input[0].content,
            text(next)
        );
    }
    assert_eq!(transcript(store, &key).await.len(), 8);
    check_invariants(database).await;
}

async fn interrupt_on_free_thread_starts(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    for (strategy, seq) in [
        (MultitaskStrategy::Interrupt, 1),
        (MultitaskStrategy::Rollback, 2),
    ] {
        let turn = started(store.admit(with(&key, strategy, "x")).await.unwrap());
        assert_eq!((turn.run.seq, turn.run.strategy), (seq, strategy));
        closed(store.finish(&turn.lease, completed(None)).await.unwrap());
    }
}

async fn merge_joins_last_queued_run(database: &TestDatabase, store: &Store) {
    use MultitaskStrategy::{Enqueue, Interrupt, Merge};
    let key = user("alice");
    let first = started(store.admit(with(&key, Enqueue, "1")).await.unwrap());
    queued(store.admit(with(&key, Enqueue, "2")).await.unwrap());
    let (last, _, before, _) = queued(store.admit(with(&key, Enqueue, "3")).await.unwrap());
    // This run arrives later, but is not last in the queue.
    queued(store.admit(with(&key, Interrupt, "0")).await.unwrap());

    let joins = [with(&key, Merge, "4"), with(&key, Merge, "5")];
    for join in &joins {
        match store.admit(join.clone()).await.unwrap() {
            Admitted::Merged { thread, run } => {
                assert_eq!(*run, before, "the run is still queued");
                assert_eq!(
                    (thread.id, thread.run_count, thread.message_count),
                    (first.thread.id, 4, 1)
                );
                assert!(thread.last_active_at >= first.thread.last_active_at);
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(
            store.run(&key, join.run_id).await.unwrap(),
            None,
            "the merged message has no run of its own"
        );
    }
    let cancelled = RunEnd {
        status: RunStatus::Cancelled,
        ..completed(None)
    };
    let finished = closed(store.finish(&last, cancelled.clone()).await.unwrap());
    assert_eq!(finished.thread.message_count, 4);
    assert_eq!(
        transcript(store, &key).await,
        ["user: 1", "user: 3", "user: 4", "user: 5"]
    );
    let page = store
        .messages(ThreadName::Newest(&key), false, &first_page())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        page.data[2..].iter().map(|it| it.id).collect::<Vec<_>>(),
        joins.map(|it| it.message.id)
    );
    assert!(
        page.data[1..]
            .iter()
            .all(|it| it.run_id == Some(last.run_id))
    );
    check_invariants(database).await;
}

fn withdrawal(admission: &Admission) -> Withdrawal {
    Withdrawal {
        message: admission.message.id,
        idempotency_key: admission.idempotency.as_ref().map(|used| used.key.clone()),
        end: RunEnd {
            status: RunStatus::Failed,
            said: UpstreamSync::Withheld,
            discard: true,
            ..completed(None)
        },
    }
}

async fn withdrawal_keeps_merged_messages_queued(database: &TestDatabase, store: &Store) {
    use MultitaskStrategy::{Enqueue, Interrupt, Merge};
    let key = user("alice");
    let active = started(store.admit(with(&key, Enqueue, "1")).await.unwrap());
    queued(store.admit(with(&key, Interrupt, "0")).await.unwrap());
    let refused = Admission {
        idempotency: Some(idempotency("k2")),
        ..with(&key, Enqueue, "2")
    };
    let (lease, ..) = queued(store.admit(refused.clone()).await.unwrap());
    let joins = [("k3", "3"), ("k4", "4")].map(|(name, words)| Admission {
        idempotency: Some(idempotency(name)),
        ..with(&key, Merge, words)
    });
    for join in &joins {
        assert!(matches!(
            store.admit(join.clone()).await.unwrap(),
            Admitted::Merged { .. }
        ));
    }
    let stale = RunLease {
        fence: lease.fence - 1,
        ..lease
    };
    assert_eq!(
        store.withdraw(&stale, &withdrawal(&refused)).await.unwrap(),
        Withdrawn::Lost
    );
    for _ in 0..2 {
        match store.withdraw(&lease, &withdrawal(&refused)).await.unwrap() {
            Withdrawn::Shared {
                thread,
                run,
                position,
            } => {
                assert_eq!(
                    (thread.id, run.id, position),
                    (active.thread.id, lease.run_id, 2)
                );
                assert_eq!((run.status, run.strategy), (RunStatus::Queued, Merge));
            }
            other => panic!("{other:?}"),
        }
    }
    let remember = Duration::from_hours(1);
    assert_eq!(
        store.repeated(&key, "k2", remember).await.unwrap(),
        None,
        "the client may send the message again"
    );
    for name in ["k3", "k4"] {
        assert_eq!(
            store
                .repeated(&key, name, remember)
                .await
                .unwrap()
                .unwrap()
                .run
                .id,
            lease.run_id
        );
    }
    closed(
        store
            .finish(&active.lease, completed(Some("hi")))
            .await
            .unwrap(),
    );
    let interrupt = store
        .unfinished(&key)
        .await
        .unwrap()
        .unwrap()
        .into_iter()
        .find(|run| run.id != lease.run_id);
    let interrupt = RunLease {
        run_id: interrupt.unwrap().id,
        fence: 1,
    };
    started_from_queue(store.start_queued(&interrupt).await.unwrap());
    closed(store.finish(&interrupt, completed(None)).await.unwrap());
    let turn = started_from_queue(store.start_queued(&lease).await.unwrap());
    assert_eq!(turn.input, joins.map(|join| join.message));
    closed(store.finish(&lease, completed(Some("hi"))).await.unwrap());
    check_invariants(database).await;
}

async fn withdrawal_ends_unmerged_run(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let unknown = RunLease {
        run_id: RunId::new(),
        fence: 1,
    };
    let (active, waiting) = (admission(&key), admission(&key));
    assert_eq!(
        store
            .withdraw(&unknown, &withdrawal(&active))
            .await
            .unwrap(),
        Withdrawn::Lost
    );
    let active_lease = started(store.admit(active.clone()).await.unwrap()).lease;
    let (waiting_lease, ..) = queued(store.admit(waiting.clone()).await.unwrap());
    for (lease, admission) in [(waiting_lease, &waiting), (active_lease, &active)] {
        for _ in 0..2 {
            assert_eq!(
                store
                    .withdraw(&lease, &withdrawal(admission))
                    .await
                    .unwrap(),
                Withdrawn::Ended
            );
        }
        let (run, _) = store.run(&key, lease.run_id).await.unwrap().unwrap();
        assert_eq!((run.status, run.discarded), (RunStatus::Failed, true));
    }
    assert_eq!(transcript(store, &key).await, [""; 0]);
    check_invariants(database).await;
}

async fn merge_joins_only_matching_run(database: &TestDatabase, store: &Store) {
    use MultitaskStrategy::Merge;
    let key = user("alice");
    let pairs = metadata(&[("a", "1"), ("b", "2")]);
    started(store.admit(admission(&key)).await.unwrap());
    let plain = queued(store.admit(with(&key, Merge, "x")).await.unwrap()).2;
    assert_eq!(plain.strategy, Merge);
    let other = Admission {
        assistant: "other".to_owned(),
        ..with(&key, Merge, "x")
    };
    let other = queued(store.admit(other.clone()).await.unwrap()).2;
    // This message matches only the run before the last one.
    let behind = queued(store.admit(with(&key, Merge, "x")).await.unwrap()).2;
    assert!(plain.id != other.id && behind.seq == 4);
    let tagged = || Admission {
        metadata: pairs.clone(),
        ..with(&key, Merge, "x")
    };
    let (_, _, with_metadata, position) = queued(store.admit(tagged()).await.unwrap());
    assert_eq!(position, 4);
    match store.admit(tagged()).await.unwrap() {
        Admitted::Merged { run, .. } => assert_eq!(run.id, with_metadata.id),
        other => panic!("{other:?}"),
    }
    check_invariants(database).await;
}

async fn full_merged_run_accepts_no_more_messages(database: &TestDatabase, store: &Store) {
    use MultitaskStrategy::Merge;
    let key = user("alice");
    let first = started(store.admit(admission(&key)).await.unwrap());
    let (full, ..) = queued(store.admit(with(&key, Merge, "0")).await.unwrap());
    for n in 1..MAX_MERGED {
        let admitted = store
            .admit(with(&key, Merge, &n.to_string()))
            .await
            .unwrap();
        assert!(
            matches!(admitted, Admitted::Merged { .. }),
            "{n}: {admitted:?}"
        );
    }
    let (_, _, next, position) = queued(store.admit(with(&key, Merge, "next")).await.unwrap());
    assert_eq!((next.seq, position), (3, 2));
    closed(store.finish(&first.lease, completed(None)).await.unwrap());
    let turn = started_from_queue(store.start_queued(&full).await.unwrap());
    let words: Vec<_> = (0..MAX_MERGED).map(|n| text(&n.to_string())).collect();
    assert_eq!(
        turn.input
            .iter()
            .map(|it| it.content.clone())
            .collect::<Vec<_>>(),
        words
    );
    assert_eq!(
        started_from_queue(store.start_queued(&full).await.unwrap()),
        turn
    );
    check_invariants(database).await;
}

async fn merge_without_queued_run_is_queued_alone(database: &TestDatabase, store: &Store) {
    use MultitaskStrategy::Merge;
    let key = session("alice", "s1");
    let merge = || Admission {
        limits: limits(Duration::from_mins(1)),
        ..with(&key, Merge, "x")
    };
    let first = started(store.admit(merge()).await.unwrap());
    assert_eq!(first.run.strategy, Merge);
    // No run is queued, and a message cannot join the active one.
    let (second, _, _, position) = queued(store.admit(merge()).await.unwrap());
    assert_eq!(position, 1);
    let elsewhere = Admission {
        upstream: "spare".to_owned(),
        ..merge()
    };
    assert_eq!(
        store.admit(elsewhere.clone()).await.unwrap(),
        Admitted::OtherUpstream("main".to_owned())
    );
    // A message cannot join a queued run of an expired thread either.
    database.age_threads(Duration::from_mins(1)).await;
    let fresh = started(store.admit(merge()).await.unwrap());
    assert_eq!(fresh.thread.previous_thread, Some(first.thread.id));
    closed(store.finish(&first.lease, completed(None)).await.unwrap());
    assert_eq!(
        started_from_queue(store.start_queued(&second).await.unwrap())
            .input
            .len(),
        1
    );
    check_invariants(database).await;
}

async fn interrupt_cancels_only_earlier_active_run(database: &TestDatabase, store: &Store) {
    use MultitaskStrategy::{Enqueue, Interrupt};
    let key = user("alice");
    let first = started(store.admit(with(&key, Enqueue, "1")).await.unwrap());
    let (second, ..) = queued(store.admit(with(&key, Interrupt, "2")).await.unwrap());
    let stale = RunLease {
        fence: second.fence - 1,
        ..second
    };
    assert_eq!(store.cancel_active(&stale, false).await.unwrap(), None);
    assert_eq!(
        store.cancel_active(&first.lease, false).await.unwrap(),
        None,
        "the run is not queued"
    );
    for _ in 0..2 {
        assert_eq!(
            store.cancel_active(&second, false).await.unwrap(),
            Some(first.run.id)
        );
        let (run, _) = store.run(&key, first.run.id).await.unwrap().unwrap();
        assert_eq!((run.status, run.discarded), (RunStatus::Cancelling, false));
    }
    assert_eq!(
        store.start_queued(&second).await.unwrap(),
        QueuedStart::NotYet,
        "the cancelled run still occupies the thread"
    );
    // Another interrupt starts once the cancelled run has ended.
    let (third, ..) = queued(store.admit(with(&key, Interrupt, "3")).await.unwrap());
    let cancelled = RunEnd {
        status: RunStatus::Cancelled,
        ..completed(None)
    };
    closed(store.finish(&first.lease, cancelled.clone()).await.unwrap());
    assert_eq!(
        store.cancel_active(&second, false).await.unwrap(),
        None,
        "no run is active"
    );
    started_from_queue(store.start_queued(&third).await.unwrap());
    assert_eq!(
        store.cancel_active(&second, true).await.unwrap(),
        None,
        "the active run arrived later"
    );
    let (run, _) = store.run(&key, third.run_id).await.unwrap().unwrap();
    assert_eq!((run.status, run.discarded), (RunStatus::InProgress, false));
    // An active run of another thread does not matter.
    started(store.admit(admission(&user("bob"))).await.unwrap());
    closed(store.finish(&third, completed(None)).await.unwrap());
    assert_eq!(store.cancel_active(&second, true).await.unwrap(), None);
    started_from_queue(store.start_queued(&second).await.unwrap());
    check_invariants(database).await;
}

async fn discard_mark_of_cancelled_run_stays(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let first = started(store.admit(admission(&key)).await.unwrap());
    let (second, ..) = queued(
        store
            .admit(with(&key, MultitaskStrategy::Rollback, "2"))
            .await
            .unwrap(),
    );
    store
        .request_cancel(&key, first.run.id)
        .await
        .unwrap()
        .unwrap();
    for (discard, discarded) in [(false, false), (true, true), (false, true)] {
        assert_eq!(
            store.cancel_active(&second, discard).await.unwrap(),
            Some(first.run.id)
        );
        let (run, _) = store.run(&key, first.run.id).await.unwrap().unwrap();
        assert_eq!(
            (run.status, run.discarded),
            (RunStatus::Cancelling, discarded)
        );
    }
}

async fn cancel_marks_only_active_runs(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let first = started(store.admit(admission(&key)).await.unwrap());
    let (second, _, waiting, _) = queued(store.admit(admission(&key)).await.unwrap());
    assert_eq!(
        store.request_cancel(&key, RunId::new()).await.unwrap(),
        None
    );
    assert_eq!(
        store
            .request_cancel(&user("bob"), first.run.id)
            .await
            .unwrap(),
        None
    );
    assert_eq!(
        store.run(&key, first.run.id).await.unwrap().unwrap().0,
        first.run
    );
    assert_eq!(
        store.request_cancel(&key, second.run_id).await.unwrap(),
        Some(waiting)
    );

    let marked = Run {
        status: RunStatus::Cancelling,
        ..first.run.clone()
    };
    for _ in 0..2 {
        assert_eq!(
            store
                .request_cancel(&key, first.run.id)
                .await
                .unwrap()
                .as_ref(),
            Some(&marked)
        );
    }
    assert_eq!(
        store.run(&key, first.run.id).await.unwrap().unwrap().0,
        marked
    );
    assert_eq!(
        store.start_queued(&first.lease).await.unwrap(),
        QueuedStart::Lost,
        "the run does not start again"
    );
    let finished = closed(
        store
            .finish(&first.lease, completed(Some("hi")))
            .await
            .unwrap(),
    );
    assert_eq!(
        store.request_cancel(&key, first.run.id).await.unwrap(),
        Some(finished.run)
    );
}

async fn queued_run_can_be_taken_over(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let me = ReplicaId::new();
    store
        .renew_replica(me, "127.0.0.1:1", Duration::from_mins(1))
        .await
        .unwrap();
    let first = started(
        store
            .admit(Admission {
                replica: me,
                ..admission(&key)
            })
            .await
            .unwrap(),
    );
    let (second, ..) = queued(store.admit(admission(&key)).await.unwrap());
    assert_eq!(
        store.take_queued(me, first.run.id).await.unwrap(),
        None,
        "the run is not queued"
    );
    assert_eq!(store.take_queued(me, RunId::new()).await.unwrap(), None);
    let lease = store.take_queued(me, second.run_id).await.unwrap().unwrap();
    assert_eq!(
        (lease.run_id, lease.fence),
        (second.run_id, second.fence + 1)
    );
    assert_eq!(
        store
            .adopt_orphans(ReplicaId::new(), &[], 10)
            .await
            .unwrap(),
        [],
        "its owner is alive now"
    );

    let cancelled = RunEnd {
        status: RunStatus::Cancelled,
        ..completed(None)
    };
    assert_eq!(
        store.finish(&second, cancelled.clone()).await.unwrap(),
        Closing::Lost
    );
    closed(store.finish(&lease, cancelled.clone()).await.unwrap());
    assert_eq!(
        store.take_queued(me, second.run_id).await.unwrap(),
        None,
        "the run has ended"
    );
    check_invariants(database).await;
}

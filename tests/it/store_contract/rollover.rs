//! Rollover of a full thread, and messages that other clients wrote to its upstream thread.

use std::sync::Arc;

use sqlx::{Connection, Executor};
use threadkeeper::domain::{Deletion, Lifecycle, Role, UnsettledRun};
use threadkeeper::store::{DeletionTarget, ExternalMessage, Rolled, Rollover, Withholding};

use super::deletion::{gone_upstream, request};
use super::engines::blocked;
use super::retention::{HOUR, earlier, id, thread, time};
use super::*;

on_every_backend!(
    rollover_by_run_moves_run_and_its_messages,
    free_thread_is_rolled_over_at_once,
    busy_thread_is_rolled_over_at_next_run,
    rollover_keeps_queue_order,
    rollover_renumbers_runs_without_gaps,
    only_active_run_rolls_its_thread_over,
    rollover_is_idempotent,
    rollover_carries_remaining_limits,
    rollover_carries_last_messages,
    carried_messages_page_backwards,
    erased_thread_carries_no_messages,
    moved_run_continues_its_lifecycle,
    idempotency_key_moves_with_its_run,
    external_messages_are_inserted_at_their_positions,
    external_messages_are_inserted_once,
    external_messages_need_lease_of_active_run,
);

pub(super) fn rollover(thread: ThreadId, by: Option<RunLease>) -> Rollover {
    Rollover {
        thread,
        by,
        new_thread: ThreadId::new(),
        carry_over: 2,
        limits: Limits::NONE,
    }
}

fn done(rolled: Rolled) -> (Thread, Option<StartedRun>) {
    match rolled {
        Rolled::Done { thread, turn } => (*thread, turn.map(|turn| *turn)),
        other => panic!("expected a finished rollover, not {other:?}"),
    }
}

fn said(key: &ConversationKey, words: &str, strategy: MultitaskStrategy) -> Admission {
    Admission {
        message: InputMessage {
            id: MessageId::new(),
            content: text(words),
        },
        strategy,
        ..admission(key)
    }
}

fn enqueue(key: &ConversationKey, words: &str) -> Admission {
    said(key, words, MultitaskStrategy::Enqueue)
}

/// Returns the texts of a thread's messages, with their positions.
async fn texts(store: &Store, thread: ThreadId) -> Vec<(i64, String)> {
    lines(store.transcript(thread, 0, 1000).await.unwrap())
}

/// Returns the messages with which a thread begins, oldest first.
async fn carried(store: &Store, thread: ThreadId) -> Vec<Message> {
    let mut newest_first = store.carried(thread, None, 100).await.unwrap().data;
    newest_first.reverse();
    newest_first
}

fn lines(messages: Vec<Message>) -> Vec<(i64, String)> {
    let line = |message: Message| {
        let [ContentPart::Text { text, .. }] = &message.content[..] else {
            panic!("the message has one text")
        };
        (message.position, text.clone())
    };
    messages.into_iter().map(line).collect()
}

fn expect(lines: &[(i64, &str)]) -> Vec<(i64, String)> {
    lines
        .iter()
        .map(|(position, text)| (*position, (*text).to_owned()))
        .collect()
}

async fn rollover_by_run_moves_run_and_its_messages(database: &TestDatabase, store: &Store) {
    let key = session("alice", "s");
    exchange(store, &key).await;
    let turn = started(store.admit(enqueue(&key, "go on")).await.unwrap());
    let old = turn.thread.clone();
    let tags = "UPDATE threads SET rollover_pending = true, attempts = 2, last_failure = 'x', metadata = '{\"a\": \"b\"}', \
                upstream_thread_id = 'c'";
    database.execute(tags).await;
    let unsettled_run = UnsettledRun {
        run: RunId::new(),
        thread: None,
        upstream_run: None,
        open_calls: vec![],
        baseline: threadkeeper::domain::Baseline::default(),
        inputs: 1,
        synced: false,
        remove: false,
    };
    let json = serde_json::to_string(&unsettled_run).unwrap();
    database
        .execute(&format!("UPDATE threads SET unsettled_run = '{json}'"))
        .await;
    let rollover = rollover(old.id, Some(turn.lease));
    let (fresh, moved) = done(store.roll_over(&rollover).await.unwrap());
    let moved = moved.unwrap();
    assert_eq!(
        (fresh.id, fresh.previous_thread),
        (rollover.new_thread, Some(old.id))
    );
    assert_eq!((&fresh.key, &fresh.upstream), (&old.key, &old.upstream));
    assert_eq!(fresh.metadata, metadata(&[("a", "b")]));
    assert_eq!(
        (fresh.lifecycle, fresh.rolls, fresh.carried),
        (Lifecycle::Current, false, 2)
    );
    assert_eq!(
        (
            fresh.message_count,
            fresh.run_count,
            fresh.unsynced_messages
        ),
        (1, 1, 0)
    );
    assert_eq!(
        (
            fresh.upstream_thread_id.clone(),
            fresh.unsettled_run.clone()
        ),
        (None, None)
    );
    assert!(fresh.created_at >= old.last_active_at && fresh.last_active_at == fresh.created_at);
    assert_eq!(
        (&moved.thread, moved.lease, &moved.input),
        (&fresh, turn.lease, &turn.input)
    );
    assert_eq!(
        (moved.run.id, moved.run.thread_id, moved.run.seq),
        (turn.run.id, fresh.id, 1)
    );
    assert_eq!(
        (moved.run.started_at, moved.run.deadline_at),
        (turn.run.started_at, turn.run.deadline_at)
    );
    assert_eq!(texts(store, fresh.id).await, expect(&[(1, "go on")]));
    assert_eq!(
        texts(store, old.id).await,
        expect(&[(1, "hello"), (2, "hi")])
    );

    let old = thread(store, old.id).await.unwrap();
    assert_eq!(
        (old.lifecycle, old.rolls, old.message_count, old.run_count),
        (Lifecycle::Archived, false, 2, 1)
    );
    assert!(
        old.archived_at.unwrap() <= fresh.created_at && old.archived_at.unwrap() >= old.created_at
    );
    assert_eq!(
        (
            old.upstream_thread_id
                .as_ref()
                .map(UpstreamThreadId::as_str),
            old.unsettled_run.is_some()
        ),
        (Some("c"), true)
    );
    let due = store.due_threads(10).await.unwrap();
    assert_eq!(
        (due.len(), due[0].thread.id, due[0].attempts),
        (1, old.id, 0)
    );
    check_invariants(database).await;

    closed(
        store
            .finish(&turn.lease, completed(Some("well")))
            .await
            .unwrap(),
    );
    assert_eq!(
        texts(store, fresh.id).await,
        expect(&[(1, "go on"), (2, "well")])
    );
    assert_eq!(exchange(store, &key).await.thread.id, fresh.id);
    check_invariants(database).await;
}

async fn free_thread_is_rolled_over_at_once(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let old = exchange(store, &key).await.thread.id;
    let (fresh, turn) = done(store.roll_over(&rollover(old, None)).await.unwrap());
    assert_eq!(
        (turn, fresh.run_count, fresh.message_count, fresh.carried),
        (None, 0, 0, 2)
    );
    let next = exchange(store, &key).await.thread;
    assert_eq!(
        (next.id, next.run_count, next.previous_thread),
        (fresh.id, 1, Some(old))
    );
    assert_eq!(
        store.roll_over(&rollover(old, None)).await.unwrap(),
        Rolled::Lost,
        "the thread is not current any more"
    );
    assert_eq!(
        store
            .roll_over(&rollover(ThreadId::new(), None))
            .await
            .unwrap(),
        Rolled::Lost
    );
    check_invariants(database).await;
}

async fn busy_thread_is_rolled_over_at_next_run(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let (waiting, ..) = queued(store.admit(enqueue(&key, "next")).await.unwrap());
    for _ in 0..2 {
        let rolled = store
            .roll_over(&rollover(turn.thread.id, None))
            .await
            .unwrap();
        let Rolled::Later(thread) = rolled else {
            panic!("{rolled:?}")
        };
        assert_eq!(
            (thread.id, thread.rolls, thread.lifecycle),
            (turn.thread.id, true, Lifecycle::Current)
        );
    }
    closed(
        store
            .finish(&turn.lease, completed(Some("hi")))
            .await
            .unwrap(),
    );
    let next = started_from_queue(store.start_queued(&waiting).await.unwrap());
    assert!(next.thread.rolls, "the next run sees the mark");
    let (fresh, moved) = done(
        store
            .roll_over(&rollover(next.thread.id, Some(next.lease)))
            .await
            .unwrap(),
    );
    assert_eq!((moved.unwrap().input, fresh.rolls), (next.input, false));
    check_invariants(database).await;
}

async fn rollover_keeps_queue_order(database: &TestDatabase, store: &Store) {
    use MultitaskStrategy::{Enqueue, Interrupt, Merge, Rollback};
    let key = user("alice");
    exchange(store, &key).await;
    let mut active = started(store.admit(enqueue(&key, "first")).await.unwrap()).lease;
    let mut waiting = vec![];
    for (strategy, words) in [
        (Enqueue, "a"),
        (Interrupt, "b"),
        (Enqueue, "c"),
        (Rollback, "d"),
    ] {
        waiting.push((
            words,
            queued(store.admit(said(&key, words, strategy)).await.unwrap()).0,
        ));
    }
    let mut current = newest_thread(store, &key).await.unwrap().0.id;
    let (fresh, _) = done(
        store
            .roll_over(&rollover(current, Some(active)))
            .await
            .unwrap(),
    );
    let unfinished = store.unfinished_of(fresh.id).await.unwrap();
    assert!(
        unfinished.iter().map(|run| run.seq).eq(1..=5),
        "{unfinished:?}"
    );
    assert_eq!(fresh.run_count, 5);
    assert_eq!(store.unfinished_of(current).await.unwrap(), []);
    assert_eq!(thread(store, current).await.unwrap().run_count, 1);
    current = fresh.id;
    // Further runs join the queue in their usual order, and each run rolls the thread over again.
    for (strategy, words) in [(Enqueue, "e"), (Interrupt, "f")] {
        waiting.push((
            words,
            queued(store.admit(said(&key, words, strategy)).await.unwrap()).0,
        ));
    }
    let merged = store.admit(said(&key, "and", Merge)).await.unwrap();
    assert!(matches!(merged, Admitted::Merged { .. }), "{merged:?}");
    for next in ["f", "d", "b", "a", "c", "e"] {
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
        let turn = started_from_queue(store.start_queued(&active).await.unwrap());
        assert_eq!(turn.input[0].content, text(next));
        assert_eq!(turn.thread.id, current);
        let (fresh, turn) = done(
            store
                .roll_over(&rollover(current, Some(active)))
                .await
                .unwrap(),
        );
        assert_eq!(turn.unwrap().input[0].content, text(next));
        check_counts(database).await;
        current = fresh.id;
    }
    assert_eq!(texts(store, current).await, expect(&[(1, "e"), (2, "and")]));
    closed(store.finish(&active, completed(None)).await.unwrap());
    check_counts(database).await;
}

/// Checks the counts as `check_invariants` does, but allows gaps in the run numbers of archived
/// threads.
async fn check_counts(database: &TestDatabase) {
    for broken in [
        "SELECT count(*) FROM threads t WHERE run_count <> (SELECT count(*) FROM runs r WHERE r.thread_id = t.id)",
        "SELECT count(*) FROM threads t WHERE message_count <> (SELECT count(*) FROM messages m WHERE \
         m.thread_id = t.id) OR last_position < (SELECT COALESCE(max(position), 0) FROM messages m WHERE \
         m.thread_id = t.id)",
        "SELECT count(*) FROM threads t WHERE unsynced_messages <> (SELECT count(*) FROM messages m WHERE m.thread_id = t.id \
         AND m.upstream_sync = 'missing')",
        "SELECT count(*) FROM threads t WHERE lifecycle = 'current' AND run_count <> \
         (SELECT COALESCE(max(seq), 0) FROM runs r WHERE r.thread_id = t.id)",
        "SELECT count(*) FROM messages m JOIN runs r ON r.id = m.run_id WHERE r.thread_id <> m.thread_id",
    ] {
        assert_eq!(database.number(broken).await, 0, "{broken}");
    }
}

async fn rollover_renumbers_runs_without_gaps(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let active = started(store.admit(admission(&key)).await.unwrap());
    let mut waiting = vec![];
    for words in ["a", "b", "c", "d"] {
        waiting.push(queued(store.admit(enqueue(&key, words)).await.unwrap()).0);
    }
    let cancelled = RunEnd {
        status: RunStatus::Cancelled,
        said: UpstreamSync::Missing,
        ..completed(None)
    };
    for gone in [0, 2] {
        closed(
            store
                .finish(&waiting[gone], cancelled.clone())
                .await
                .unwrap(),
        );
    }
    let old = active.thread.id;
    let (fresh, _) = done(
        store
            .roll_over(&rollover(old, Some(active.lease)))
            .await
            .unwrap(),
    );
    let unfinished = store.unfinished_of(fresh.id).await.unwrap();
    let found: Vec<_> = unfinished.iter().map(|run| (run.id, run.seq)).collect();
    assert_eq!(
        found,
        [
            (active.run.id, 1),
            (waiting[1].run_id, 2),
            (waiting[3].run_id, 3)
        ]
    );
    assert_eq!(
        (
            fresh.run_count,
            fresh.message_count,
            fresh.unsynced_messages
        ),
        (3, 1, 0)
    );
    let old = thread(store, old).await.unwrap();
    assert_eq!(
        (old.run_count, old.message_count, old.unsynced_messages),
        (2, 2, 2)
    );
    check_counts(database).await;
    assert_eq!(queued(store.admit(admission(&key)).await.unwrap()).2.seq, 4);
}

async fn only_active_run_rolls_its_thread_over(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let (waiting, ..) = queued(store.admit(admission(&key)).await.unwrap());
    let other = started(store.admit(admission(&user("bob"))).await.unwrap());
    let outdated = RunLease {
        fence: turn.lease.fence + 1,
        ..turn.lease
    };
    for lease in [waiting, other.lease, outdated] {
        assert_eq!(
            store
                .roll_over(&rollover(turn.thread.id, Some(lease)))
                .await
                .unwrap(),
            Rolled::Lost
        );
    }
    store
        .pause(&turn.lease, &pause(&["call_1"], 0))
        .await
        .unwrap();
    assert_eq!(
        store
            .roll_over(&rollover(turn.thread.id, Some(turn.lease)))
            .await
            .unwrap(),
        Rolled::Lost
    );
    closed(store.finish(&turn.lease, completed(None)).await.unwrap());
    assert_eq!(
        store
            .roll_over(&rollover(turn.thread.id, Some(turn.lease)))
            .await
            .unwrap(),
        Rolled::Lost
    );
    assert_eq!(database.number("SELECT count(*) FROM threads").await, 2);
    let erase = request(DeletionTarget::Key(key), Deletion::Erase);
    store.begin_deletion(&erase, 10).await.unwrap();
    assert_eq!(
        store
            .roll_over(&rollover(turn.thread.id, None))
            .await
            .unwrap(),
        Rolled::Lost
    );
}

async fn rollover_is_idempotent(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let by_run = rollover(turn.thread.id, Some(turn.lease));
    let first = store.roll_over(&by_run).await.unwrap();
    assert_eq!(store.roll_over(&by_run).await.unwrap(), first);
    closed(store.finish(&turn.lease, completed(None)).await.unwrap());
    assert_eq!(
        store.roll_over(&by_run).await.unwrap(),
        Rolled::Lost,
        "the run has ended"
    );
    let by_caller = rollover(by_run.new_thread, None);
    let first = store.roll_over(&by_caller).await.unwrap();
    assert_eq!(store.roll_over(&by_caller).await.unwrap(), first);
    assert_eq!(database.number("SELECT count(*) FROM threads").await, 3);
    check_invariants(database).await;
}

async fn rollover_carries_remaining_limits(database: &TestDatabase, store: &Store) {
    let some = |age: Option<u32>, idle: Option<u32>| Limits {
        max_age: age.map(|hours| HOUR * hours),
        max_idle: idle.map(|hours| HOUR * hours),
    };
    // The thread is two hours old.
    for (n, (own, configured, expected, end)) in [
        (some(None, None), some(None, None), some(None, None), None),
        (
            some(None, None),
            some(None, Some(3)),
            some(None, None),
            Some(3),
        ),
        (
            some(None, None),
            some(Some(5), None),
            some(Some(3), None),
            Some(3),
        ),
        (
            some(None, None),
            some(Some(5), Some(1)),
            some(Some(3), Some(1)),
            Some(1),
        ),
        (
            some(Some(6), None),
            some(Some(5), Some(1)),
            some(Some(4), None),
            Some(4),
        ),
        (
            some(None, Some(7)),
            some(Some(5), Some(1)),
            some(None, Some(7)),
            Some(7),
        ),
        (
            some(Some(6), Some(7)),
            some(None, None),
            some(Some(4), Some(7)),
            Some(4),
        ),
        (
            some(Some(1), None),
            some(None, None),
            some(Some(0), None),
            Some(0),
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let made = exchange(store, &user(&n.to_string())).await.thread.id;
        earlier(
            database,
            "threads",
            &["created_at", "last_active_at"],
            HOUR * 2,
        )
        .await;
        let ms = |limit: Option<Duration>| {
            limit.map_or("NULL".to_owned(), |limit| limit.as_millis().to_string())
        };
        database
            .execute(&format!(
                "UPDATE threads SET max_age_ms = {}, max_idle_ms = {} WHERE id = {}",
                ms(own.max_age),
                ms(own.max_idle),
                id(database, made.uuid())
            ))
            .await;
        let rollover = Rollover {
            limits: configured,
            ..rollover(made, None)
        };
        let (fresh, _) = done(store.roll_over(&rollover).await.unwrap());
        let near = |one: Option<Duration>, other: Option<Duration>| match (one, other) {
            (Some(one), Some(other)) => one.abs_diff(other) < Duration::from_mins(1),
            (one, other) => one == other,
        };
        assert!(
            near(fresh.limits.max_age, expected.max_age),
            "{n}: {fresh:?}"
        );
        assert_eq!(fresh.limits.max_idle, expected.max_idle, "{n}: {fresh:?}");
        let due = time(database, "due_at", fresh.id).await;
        match end {
            None => assert_eq!(due, -1, "{n}"),
            Some(hours) => {
                let due = due - fresh.created_at.timestamp_millis();
                assert!((due - hours * 3_600_000).abs() < 60_000, "{n}: {due}");
            }
        }
    }
}

async fn rollover_carries_last_messages(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    for (n, said) in [
        UpstreamSync::Present,
        UpstreamSync::Withheld,
        UpstreamSync::Missing,
        UpstreamSync::Present,
    ]
    .iter()
    .enumerate()
    {
        let turn = started(
            store
                .admit(enqueue(&key, &format!("say {n}")))
                .await
                .unwrap(),
        );
        let end = RunEnd {
            said: *said,
            ..completed(Some(&format!("reply {n}")))
        };
        closed(store.finish(&turn.lease, end.clone()).await.unwrap());
    }
    let turn = started(store.admit(enqueue(&key, "now")).await.unwrap());
    let made = turn.thread.id;
    for (carry_over, expected) in [
        (0, &[][..]),
        (1, &[(8, "reply 3")][..]),
        (
            5,
            &[
                (4, "reply 1"),
                (5, "say 2"),
                (6, "reply 2"),
                (7, "say 3"),
                (8, "reply 3"),
            ][..],
        ),
    ] {
        // Each round makes a new request.
        let place = rollover(made, Some(turn.lease));
        let rollover = Rollover {
            carry_over,
            ..place
        };
        if carry_over == 5 {
            let (fresh, _) = done(store.roll_over(&rollover).await.unwrap());
            assert_eq!(fresh.carried, i64::from(carry_over));
            assert_eq!(lines(carried(store, fresh.id).await), expect(expected));
            // Only messages of the thread right before are carried over.
            closed(
                store
                    .finish(&turn.lease, completed(Some("then")))
                    .await
                    .unwrap(),
            );
            let again = Rollover {
                carry_over: 100,
                ..self::rollover(fresh.id, None)
            };
            let (again, _) = done(store.roll_over(&again).await.unwrap());
            assert_eq!(again.carried, 2);
            assert_eq!(
                lines(carried(store, again.id).await),
                expect(&[(1, "now"), (2, "then")])
            );
        } else {
            let other = user(&carry_over.to_string());
            let turn = started(store.admit(enqueue(&other, "reply 3")).await.unwrap());
            closed(store.finish(&turn.lease, completed(None)).await.unwrap());
            let (fresh, _) = done(
                store
                    .roll_over(&Rollover {
                        thread: turn.thread.id,
                        by: None,
                        ..rollover
                    })
                    .await
                    .unwrap(),
            );
            assert_eq!(fresh.carried, i64::from(carry_over));
            assert_eq!(
                store.carried(fresh.id, None, 100).await.unwrap().data.len(),
                expected.len()
            );
        }
    }
    assert_eq!(store.carried(made, None, 100).await.unwrap().data, []);
    assert_eq!(
        store
            .carried(ThreadId::new(), None, 100)
            .await
            .unwrap()
            .data,
        []
    );
    check_counts(database).await;
}

async fn carried_messages_page_backwards(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    for _ in 0..3 {
        exchange(store, &key).await;
    }
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let place = Rollover {
        carry_over: 4,
        ..rollover(turn.thread.id, Some(turn.lease))
    };
    let (fresh, _) = done(store.roll_over(&place).await.unwrap());
    let positions = async |before, limit| {
        let page = store.carried(fresh.id, before, limit).await.unwrap().data;
        page.iter()
            .map(|message| message.position)
            .collect::<Vec<_>>()
    };
    assert_eq!(positions(None, 100).await, [6, 5, 4, 3]);
    assert_eq!(positions(None, 3).await, [6, 5, 4]);
    assert_eq!(positions(Some(4), 3).await, [3]);
    assert_eq!(positions(Some(3), 3).await, [0; 0]);
    // A new upstream thread may begin with fewer messages, and never with more after that.
    for (carried, left) in [
        (Some(2), &[6, 5][..]),
        (Some(3), &[6, 5]),
        (None, &[6, 5]),
        (Some(0), &[]),
    ] {
        let what = Withholding {
            before: Some(0),
            missing_only: false,
            carried,
        };
        assert!(store.withhold_earlier(&turn.lease, &what).await.unwrap());
        assert_eq!(positions(None, 100).await, left, "{carried:?}");
    }
}

async fn erased_thread_carries_no_messages(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let old = exchange(store, &key).await.thread.id;
    let (fresh, _) = done(store.roll_over(&rollover(old, None)).await.unwrap());
    assert_eq!(
        store.carried(fresh.id, None, 100).await.unwrap().data.len(),
        2
    );
    assert!(store.discard(old, Duration::ZERO).await.unwrap());
    assert_eq!(
        store.carried(fresh.id, None, 100).await.unwrap().data,
        [],
        "the thread is being erased"
    );
    gone_upstream(store, old).await;
    assert!(store.conclude(old, 10).await.unwrap());
    assert_eq!(store.carried(fresh.id, None, 100).await.unwrap().data, []);
    exchange(store, &key).await;
}

async fn moved_run_continues_its_lifecycle(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let (rollback, ..) = queued(
        store
            .admit(said(&key, "no", MultitaskStrategy::Rollback))
            .await
            .unwrap(),
    );
    let (fresh, _) = done(
        store
            .roll_over(&rollover(turn.thread.id, Some(turn.lease)))
            .await
            .unwrap(),
    );
    assert_eq!(started_again(store, &turn.lease).await.thread.id, fresh.id);
    assert!(bind(store, &turn.lease, &UpstreamThreadId("c".to_owned()), true).await);
    store
        .pause(&turn.lease, &pause(&["call_1"], 0))
        .await
        .unwrap();
    store
        .answer_tools(&key, turn.run.id, &answer(&["call_1"]))
        .await
        .unwrap();
    assert_eq!(
        store.cancel_active(&rollback, true).await.unwrap(),
        Some(turn.run.id)
    );
    assert_eq!(
        store.finish(&turn.lease, completed(None)).await.unwrap(),
        Closing::MustDiscard
    );
    let end = RunEnd {
        discard: true,
        status: RunStatus::Cancelled,
        ..completed(None)
    };
    let ended = closed(store.finish(&turn.lease, end.clone()).await.unwrap());
    assert_eq!((ended.thread.id, ended.thread.message_count), (fresh.id, 0));
    let next = started_from_queue(store.start_queued(&rollback).await.unwrap());
    assert_eq!((next.thread.id, next.thread.message_count), (fresh.id, 1));
    assert_eq!(
        store
            .run(&key, turn.run.id)
            .await
            .unwrap()
            .unwrap()
            .0
            .thread_id,
        fresh.id
    );
    closed(
        store
            .finish(&rollback, completed(Some("hi")))
            .await
            .unwrap(),
    );
    check_counts(database).await;
}

async fn started_again(store: &Store, lease: &RunLease) -> StartedRun {
    started_from_queue(store.start_queued(lease).await.unwrap())
}

async fn idempotency_key_moves_with_its_run(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let once = Admission {
        idempotency: Some(idempotency("k")),
        ..admission(&key)
    };
    let (waiting, ..) = queued(store.admit(once.clone()).await.unwrap());
    let (fresh, _) = done(
        store
            .roll_over(&rollover(turn.thread.id, Some(turn.lease)))
            .await
            .unwrap(),
    );
    let again = Admission {
        idempotency: Some(idempotency("k")),
        ..admission(&key)
    };
    assert_eq!(
        store.admit(again.clone()).await.unwrap(),
        Admitted::Repeated
    );
    let repeated = store.repeated(&key, "k", HOUR).await.unwrap().unwrap();
    assert_eq!(
        (repeated.run.id, repeated.thread.id),
        (waiting.run_id, fresh.id)
    );
}

fn external(after: i64, words: &str) -> ExternalMessage {
    ExternalMessage {
        id: MessageId::new(),
        after,
        role: Role::Assistant,
        content: text(words),
        upstream_message_id: Some(format!("m_{words}")),
        created_at: None,
    }
}

async fn external_messages_are_inserted_at_their_positions(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    for _ in 0..2 {
        exchange(store, &key).await;
    }
    let turn = started(store.admit(enqueue(&key, "now")).await.unwrap());
    let made = turn.thread.id;
    let at = turn.thread.created_at;
    let messages = [
        external(2, "c"),
        ExternalMessage {
            role: Role::User,
            created_at: Some(at),
            ..external(0, "a")
        },
        external(4, "e"),
        external(2, "d"),
        external(0, "b"),
        ExternalMessage {
            upstream_message_id: None,
            ..external(4, "f")
        },
        external(99, "g"),
    ];
    assert_eq!(
        store
            .insert_external_messages(made, Some(turn.lease), &messages)
            .await
            .unwrap(),
        7
    );
    let expected = [
        (1, "a"),
        (2, "b"),
        (3, "hello"),
        (4, "hi"),
        (5, "c"),
        (6, "d"),
        (7, "hello"),
        (8, "hi"),
        (9, "e"),
        (10, "f"),
        (11, "now"),
        (12, "g"),
    ];
    assert_eq!(texts(store, made).await, expect(&expected));
    let page = store.transcript(made, 0, 1).await.unwrap();
    let first = Message {
        id: messages[1].id,
        thread_id: made,
        position: 1,
        role: Role::User,
        content: text("a"),
        run_id: None,
        upstream_message_id: Some("m_a".to_owned()),
        sync: UpstreamSync::Present,
        ended: None,
        created_at: page[0].created_at,
    };
    assert_eq!(page, [first]);
    assert_eq!(page[0].created_at.timestamp_millis(), at.timestamp_millis());
    check_invariants(database).await;
    closed(
        store
            .finish(&turn.lease, completed(Some("well")))
            .await
            .unwrap(),
    );
    assert_eq!(
        texts(store, made).await.last().unwrap(),
        &(13, "well".to_owned())
    );
    check_invariants(database).await;
}

async fn external_messages_are_inserted_once(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let mut end = completed(Some("hi"));
    end.reply.as_mut().unwrap().upstream_message_id = Some("m_own".to_owned());
    let made = closed(store.finish(&turn.lease, end.clone()).await.unwrap())
        .thread
        .id;
    let unnamed = ExternalMessage {
        upstream_message_id: None,
        ..external(2, "x")
    };
    let own = ExternalMessage {
        upstream_message_id: Some("m_own".to_owned()),
        ..external(2, "hi")
    };
    let messages = [own, external(2, "a"), external(2, "a"), unnamed];
    assert_eq!(
        store
            .insert_external_messages(made, None, &messages)
            .await
            .unwrap(),
        2
    );
    assert_eq!(
        store
            .insert_external_messages(made, None, &messages)
            .await
            .unwrap(),
        0
    );
    assert_eq!(
        store
            .insert_external_messages(made, None, &[])
            .await
            .unwrap(),
        0
    );
    assert_eq!(
        store
            .insert_external_messages(ThreadId::new(), None, &messages)
            .await
            .unwrap(),
        0
    );
    assert_eq!(
        texts(store, made).await,
        expect(&[(1, "hello"), (2, "hi"), (3, "a"), (4, "x")])
    );
    // A message that is known in one thread may be new in another.
    let other = exchange(store, &user("bob")).await.thread.id;
    assert_eq!(
        store
            .insert_external_messages(other, None, &[external(1, "a")])
            .await
            .unwrap(),
        1
    );
    assert_eq!(
        texts(store, other).await,
        expect(&[(1, "hello"), (2, "a"), (3, "hi")])
    );
    check_invariants(database).await;
}

async fn external_messages_need_lease_of_active_run(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let (waiting, ..) = queued(store.admit(admission(&key)).await.unwrap());
    let made = turn.thread.id;
    let stale = RunLease {
        fence: turn.lease.fence - 1,
        ..turn.lease
    };
    for by in [None, Some(waiting), Some(stale)] {
        assert_eq!(
            store
                .insert_external_messages(made, by, &[external(0, "a")])
                .await
                .unwrap(),
            0
        );
    }
    closed(store.finish(&turn.lease, completed(None)).await.unwrap());
    assert_eq!(
        store
            .insert_external_messages(made, None, &[external(0, "a")])
            .await
            .unwrap(),
        1,
        "a queued run does not matter"
    );
    let late = store
        .insert_external_messages(made, Some(turn.lease), &[external(0, "b")])
        .await
        .unwrap();
    assert_eq!(late, 0, "the run is over");
}

/// Messages of all kinds reach two replicas while runs and callers roll the thread over again and
/// again. No message may be lost or doubled, and all runs must start in order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_rollovers_and_messages_lose_nothing() {
    use MultitaskStrategy::{Enqueue, Interrupt, Merge};
    const MESSAGES: usize = 120;
    let database = TestDatabase::postgres().await;
    let replicas = [database.store().await, database.store().await];
    let key = session("alice", "s1");
    let begun = std::sync::Mutex::new(Vec::new());

    let work = |turn: StartedRun, store: Arc<Store>, n: usize| {
        let begun = &begun;
        async move {
            begun
                .lock()
                .unwrap()
                .extend(turn.input.iter().map(|message| message.id));
            let mut input = turn.input.clone();
            if n.is_multiple_of(3) {
                let (fresh, moved) = done(
                    store
                        .roll_over(&rollover(turn.thread.id, Some(turn.lease)))
                        .await
                        .unwrap(),
                );
                let moved = moved.unwrap();
                assert_eq!((moved.run.thread_id, moved.thread.id), (fresh.id, fresh.id));
                input = moved.input;
            }
            assert_eq!(input, turn.input);
            closed(
                store
                    .finish(&turn.lease, completed(Some("hi")))
                    .await
                    .unwrap(),
            );
        }
    };
    let send = |n: usize| {
        let store = Arc::clone(&replicas[n % 2]);
        let (key, work) = (&key, &work);
        async move {
            let strategy = [Enqueue, Merge, Enqueue, Interrupt, Merge][n % 5];
            let request = Admission {
                idempotency: Some(idempotency(&n.to_string())),
                ..said(key, "x", strategy)
            };
            match store.admit(request.clone()).await.unwrap() {
                Admitted::Started(turn) => work(*turn, store, n).await,
                Admitted::Merged { .. } => {}
                Admitted::Queued { lease, .. } => loop {
                    match store.start_queued(&lease).await.unwrap() {
                        QueuedStart::Started(turn) => break work(*turn, store, n).await,
                        QueuedStart::NotYet => tokio::task::yield_now().await,
                        QueuedStart::Lost => panic!("{lease:?}"),
                    }
                },
                other => panic!("{other:?}"),
            }
        }
    };
    let roll = |n: usize| {
        let (store, key) = (&replicas[n % 2], &key);
        async move {
            for _ in 0..20 {
                if let Some((thread, _)) = newest_thread(store, key).await {
                    store.roll_over(&rollover(thread.id, None)).await.unwrap();
                }
                tokio::task::yield_now().await;
            }
        }
    };
    let sends = futures_util::future::join_all((0..MESSAGES).map(send));
    let rolls = futures_util::future::join_all((0..2).map(roll));
    let all = async { tokio::join!(sends, rolls) };
    tokio::time::timeout(Duration::from_mins(2), all)
        .await
        .expect("every run starts in time");

    let mut begun = begun.into_inner().unwrap();
    assert_eq!(begun.len(), MESSAGES);
    begun.sort_by_key(|id| id.uuid());
    begun.dedup();
    assert_eq!(begun.len(), MESSAGES, "no message is doubled");
    let said = "SELECT count(*) FROM messages WHERE role = 'user'";
    assert_eq!(
        database.number(said).await,
        i64::try_from(MESSAGES).unwrap()
    );
    assert!(database.number("SELECT count(*) FROM threads").await > 10);
    check_counts(&database).await;
    for store in replicas {
        store.close().await;
    }
}

/// One replica rolls the thread over while others start and finish its runs. The queue keeps its
/// order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queue_order_survives_concurrent_rollovers() {
    let database = TestDatabase::postgres().await;
    let replicas = [database.store().await, database.store().await];
    for round in 0..8 {
        let key = user(&round.to_string());
        let first = started(replicas[0].admit(admission(&key)).await.unwrap());
        let mut waiting = vec![];
        for n in 0..8 {
            waiting.push(
                queued(
                    replicas[n % 2]
                        .admit(enqueue(&key, &n.to_string()))
                        .await
                        .unwrap(),
                )
                .0,
            );
        }
        let order = std::sync::Mutex::new(Vec::new());
        let claim = |n: usize| {
            let (store, lease, order) = (&replicas[n % 2], waiting[n], &order);
            async move {
                if n == 5 {
                    let end = RunEnd {
                        status: RunStatus::Cancelled,
                        said: UpstreamSync::Withheld,
                        ..completed(None)
                    };
                    closed(store.finish(&lease, end.clone()).await.unwrap());
                    return;
                }
                loop {
                    match store.start_queued(&lease).await.unwrap() {
                        QueuedStart::Started(turn) => {
                            order.lock().unwrap().push(n);
                            closed(
                                store
                                    .finish(&turn.lease, completed(Some("hi")))
                                    .await
                                    .unwrap(),
                            );
                            return;
                        }
                        QueuedStart::NotYet => tokio::task::yield_now().await,
                        QueuedStart::Lost => panic!("{n}"),
                    }
                }
            }
        };
        let roll = async {
            for n in 0..12_usize {
                if let Some((thread, _)) = newest_thread(&replicas[n % 2], &key).await {
                    replicas[n % 2]
                        .roll_over(&rollover(thread.id, None))
                        .await
                        .unwrap();
                }
                if n == 2 {
                    closed(
                        replicas[0]
                            .finish(&first.lease, completed(None))
                            .await
                            .unwrap(),
                    );
                }
            }
        };
        let claims = futures_util::future::join_all((0..8).map(claim));
        let all = async { tokio::join!(claims, roll) };
        tokio::time::timeout(Duration::from_mins(1), all)
            .await
            .expect("every run starts in time");
        assert_eq!(order.into_inner().unwrap(), [0, 1, 2, 3, 4, 6, 7]);
        let said = format!(
            "SELECT count(*) FROM messages m JOIN threads t ON t.id = m.thread_id WHERE t.user_key = '{round}'"
        );
        assert_eq!(database.number(&said).await, 9 + 7, "no message is lost");
        check_counts(&database).await;
    }
    for store in replicas {
        store.close().await;
    }
}

/// Calls that wait for a run during a rollover must see the run on its new thread.
#[tokio::test]
async fn calls_blocked_by_rollover_find_new_thread() {
    let database = TestDatabase::postgres().await;
    let (store, other) = (database.store().await, database.store().await);
    for round in 0..4 {
        let key = user(&round.to_string());
        let first = started(store.admit(admission(&key)).await.unwrap());
        let (second, ..) = queued(store.admit(enqueue(&key, "2")).await.unwrap());
        let (third, ..) = queued(store.admit(enqueue(&key, "3")).await.unwrap());
        let by = (round == 3).then_some(first.lease);
        if by.is_none() {
            closed(store.finish(&first.lease, completed(None)).await.unwrap());
        }
        let old = first.thread.id;
        // The rollover holds the runs, and waits for the thread.
        let mut holder = sqlx::PgConnection::connect(&database.url()).await.unwrap();
        let hold = format!(
            "BEGIN; SELECT FROM threads WHERE id = '{}' FOR UPDATE",
            old.uuid()
        );
        holder.execute(sqlx::AssertSqlSafe(hold)).await.unwrap();
        let roll = rollover(old, by);
        let roll = store.roll_over(&roll);
        let meanwhile = async {
            blocked(&database, 1).await;
            let release = async {
                blocked(&database, 2).await;
                holder.execute("ROLLBACK").await.unwrap();
            };
            match round {
                0 => {
                    let (claim, ()) = tokio::join!(other.start_queued(&second), release);
                    let turn = started_from_queue(claim.unwrap());
                    assert_eq!((turn.thread.previous_thread, turn.run.seq), (Some(old), 1));
                }
                1 => {
                    let end = RunEnd {
                        status: RunStatus::Cancelled,
                        said: UpstreamSync::Missing,
                        ..completed(None)
                    };
                    let (end, ()) = tokio::join!(other.finish(&third, end.clone()), release);
                    let ended = closed(end.unwrap());
                    assert_eq!(
                        (ended.thread.previous_thread, ended.thread.message_count),
                        (Some(old), 1)
                    );
                    assert_eq!(ended.thread.unsynced_messages, 1);
                }
                2 => {
                    let merge = said(&key, "4", MultitaskStrategy::Merge);
                    let (merged, ()) = tokio::join!(other.admit(merge.clone()), release);
                    let Admitted::Merged { thread, run } = merged.unwrap() else {
                        panic!("the message was not merged")
                    };
                    assert_eq!((thread.previous_thread, run.id), (Some(old), third.run_id));
                    let merged =
                        "SELECT count(*) FROM runs WHERE jsonb_array_length(queued_input) > 1";
                    assert_eq!(
                        database.number(merged).await,
                        1,
                        "the message is in one run"
                    );
                }
                _ => {
                    let (marked, ()) =
                        tokio::join!(other.request_cancel(&key, first.run.id), release);
                    assert_eq!(marked.unwrap().unwrap().status, RunStatus::Cancelling);
                }
            }
        };
        let (rolled, ()) = tokio::join!(roll, meanwhile);
        let (fresh, _) = done(rolled.unwrap());
        check_counts(&database).await;
        if round < 3 {
            let turn = started_from_queue(store.start_queued(&second).await.unwrap());
            assert_eq!(
                (turn.thread.id, &turn.input[0].content),
                (fresh.id, &text("2"))
            );
        }
    }
    for store in [store, other] {
        store.close().await;
    }
}

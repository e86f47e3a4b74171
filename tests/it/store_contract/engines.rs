//! Promises of one engine only.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use sqlx::{Connection, Executor};
use threadkeeper::config::StoreConfig;
use threadkeeper::domain::{Lifecycle, Role, RunStatus, ThreadState, UpstreamThreadId};
use threadkeeper::store::{ImportedMessage, Paused, StoreError, ThreadFilter, ThreadUpdate};

use super::*;
use crate::support::cluster::Cluster;
use crate::support::recording_proxy::DatabaseTap;

/// Counts each step's round trips on the wire. The first round does not count, since it prepares
/// the statements.
struct Meter {
    tap: DatabaseTap,
    round: usize,
    before: usize,
}

impl Meter {
    fn took(&mut self, trips: usize, what: &str) {
        let now = self.tap.round_trips();
        assert!(
            self.round == 0 || now - self.before == trips,
            "{what}: {}",
            now - self.before
        );
        self.before = now;
    }

    fn one(&mut self, what: &str) {
        self.took(1, what);
    }
}

#[tokio::test]
async fn common_run_steps_take_one_round_trip_on_postgres() {
    let database = TestDatabase::postgres().await;
    let tap = DatabaseTap::on(&database.url()).await;
    let config = StoreConfig {
        url: Some(tap.url.clone().into()),
        ..database.config()
    };
    let store = Store::open(&config).await.unwrap();
    let end = || RunEnd {
        upstream_thread_id: Some(UpstreamThreadId("c".to_owned())),
        ..completed(Some("hi"))
    };
    let mut meter = Meter {
        before: tap.round_trips(),
        tap,
        round: 0,
    };
    for round in 0..2 {
        meter.round = round;
        let key = user(&round.to_string());
        let turn = started(store.admit(admission(&key)).await.unwrap());
        meter.one("admission on a new key");
        closed(store.finish(&turn.lease, end()).await.unwrap());
        meter.one("an end");
        let turn = started(store.admit(admission(&key)).await.unwrap());
        meter.one("admission on a known thread");
        let (waiting, ..) = queued(store.admit(admission(&key)).await.unwrap());
        meter.one("admission to the queue");
        let reject = Admission {
            strategy: MultitaskStrategy::Reject,
            ..admission(&key)
        };
        assert_eq!(store.admit(reject.clone()).await.unwrap(), Admitted::Busy);
        meter.one("a refusal");
        closed(store.finish(&turn.lease, end()).await.unwrap());
        meter.one("an end with another waiting");
        started_from_queue(store.start_queued(&waiting).await.unwrap());
        meter.one("a claim");
        closed(store.finish(&waiting, end()).await.unwrap());
        meter.one("the last end");
        store.ready().await.unwrap();
        meter.one("readiness");
    }
}

#[tokio::test]
async fn other_run_steps_have_bounded_round_trips_on_postgres() {
    let database = TestDatabase::postgres().await;
    let tap = DatabaseTap::on(&database.url()).await;
    let config = StoreConfig {
        url: Some(tap.url.clone().into()),
        ..database.config()
    };
    let store = Store::open(&config).await.unwrap();
    let mut meter = Meter {
        before: tap.round_trips(),
        tap,
        round: 0,
    };
    for round in 0..2 {
        meter.round = round;
        let key = user(&round.to_string());
        let with = |strategy| Admission {
            strategy,
            ..admission(&key)
        };
        let once = || Admission {
            idempotency: Some(idempotency("k")),
            ..admission(&key)
        };
        assert_eq!(
            store
                .repeated(&key, "k", Duration::from_hours(1))
                .await
                .unwrap(),
            None
        );
        meter.one("a look at an idempotency key");
        let turn = started(store.admit(once()).await.unwrap());
        meter.one("admission with an idempotency key");
        assert_eq!(store.admit(once()).await.unwrap(), Admitted::Repeated);
        meter.one("a repetition");
        queued(store.admit(with(MultitaskStrategy::Merge)).await.unwrap());
        meter.one("a merge that finds nobody");
        assert!(matches!(
            store.admit(with(MultitaskStrategy::Merge)).await.unwrap(),
            Admitted::Merged { .. }
        ));
        meter.one("a merge");
        let (rollback, ..) = queued(
            store
                .admit(with(MultitaskStrategy::Rollback))
                .await
                .unwrap(),
        );
        meter.one("a rollback");
        store
            .pause(&turn.lease, &pause(&["call_1"], 0))
            .await
            .unwrap();
        meter.one("a pause");
        store
            .answer_tools(&key, turn.run.id, &answer(&["call_1"]))
            .await
            .unwrap();
        meter.one("an answer");
        store.requests(ReplicaId::new()).await.unwrap();
        meter.one("requests");
        store.cancel_active(&rollback, true).await.unwrap().unwrap();
        meter.took(2, "a displacement: a look that locks nothing, and the mark");
        assert_eq!(
            store.finish(&turn.lease, completed(None)).await.unwrap(),
            Closing::MustDiscard
        );
        meter.one("an end that is held back");
        closed(
            store
                .finish(
                    &turn.lease,
                    RunEnd {
                        discard: true,
                        ..completed(None)
                    },
                )
                .await
                .unwrap(),
        );
        meter.one("a discarding end");
        started_from_queue(store.start_queued(&rollback).await.unwrap());
        meter.one("a claim of a run that goes first");
        store
            .unsynced_messages(rollback.run_id, None, 10)
            .await
            .unwrap();
        meter.one("unsynced messages");
        assert!(
            store
                .record_settlement(&rollback, turn.run.id, UpstreamSync::Present)
                .await
                .unwrap()
        );
        meter.took(
            5,
            "settling, which follows a failure: a transaction of the same text for both engines",
        );
        let id = UpstreamThreadId("c".to_owned());
        assert!(bind(&store, &rollback, &id, true).await);
        meter.one("rebuilding");
        store
            .request_cancel(&key, rollback.run_id)
            .await
            .unwrap()
            .unwrap();
        meter.took(
            4,
            "a cancel: a click, in a transaction of the same text for both engines",
        );
        store.events(rollback.run_id, 0).await.unwrap();
        meter.one("a log");
        let end = RunEnd {
            status: RunStatus::Cancelled,
            synced: true,
            said: UpstreamSync::Missing,
            ..completed(None)
        };
        closed(store.finish(&rollback, end.clone()).await.unwrap());
        meter.one("an end that says much");
    }
}

/// The same request reaches both replicas at once, several times.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_idempotent_requests_create_one_run() {
    let database = TestDatabase::postgres().await;
    let replicas = [database.store().await, database.store().await];
    for (round, strategy) in MultitaskStrategy::ALL.iter().cycle().take(15).enumerate() {
        let key = user(&round.to_string());
        let busy = round % 3;
        for _ in 0..busy {
            replicas[0].admit(admission(&key)).await.unwrap();
        }
        let request = || Admission {
            strategy: *strategy,
            idempotency: Some(idempotency("k")),
            ..admission(&key)
        };
        let requests: Vec<_> = (0..12).map(|_| request()).collect();
        let admitted = requests
            .iter()
            .enumerate()
            .map(|(n, request)| replicas[n % 2].admit(request.clone()));
        let admitted = futures_util::future::join_all(admitted).await;
        let (again, taken): (Vec<_>, Vec<_>) = admitted
            .into_iter()
            .map(Result::unwrap)
            .partition(|it| *it == Admitted::Repeated);
        match (&taken[..], strategy) {
            ([Admitted::Started(_)], _) => assert_eq!(busy, 0, "{strategy}"),
            ([Admitted::Merged { .. }], MultitaskStrategy::Merge) => assert_eq!(busy, 2),
            ([Admitted::Queued { .. }], _) => assert_ne!(busy, 0, "{strategy}"),
            (refused, MultitaskStrategy::Reject) => {
                assert!(
                    busy > 0 && refused.iter().all(|it| *it == Admitted::Busy),
                    "{refused:?}"
                );
            }
            other => panic!("{strategy}: {other:?}"),
        }
        assert_eq!(again.len() + taken.len(), 12);
        let used = i64::from(busy == 0 || *strategy != MultitaskStrategy::Reject);
        let keys = format!("SELECT count(*) FROM idempotency_keys WHERE user_key = '{round}'");
        assert_eq!(database.number(&keys).await, used, "{strategy}");
        check_invariants(&database).await;
    }
    for store in replicas {
        store.close().await;
    }
}

/// An earlier-ranked run arrives after a start began. If it was faster, the start is refused.
#[tokio::test]
async fn start_overtaken_by_interrupt_is_deferred() {
    let database = TestDatabase::postgres().await;
    let store = database.store().await;
    let key = user("alice");
    let first = started(store.admit(admission(&key)).await.unwrap());
    let (second, ..) = queued(store.admit(admission(&key)).await.unwrap());
    closed(store.finish(&first.lease, completed(None)).await.unwrap());

    let mut holder = sqlx::PgConnection::connect(&database.url()).await.unwrap();
    holder
        .execute("BEGIN; SELECT FROM runs WHERE seq = 2 FOR UPDATE")
        .await
        .unwrap();
    let meanwhile = async {
        blocked(&database, 1).await;
        let interrupt = Admission {
            strategy: MultitaskStrategy::Interrupt,
            ..admission(&key)
        };
        let (third, ..) = queued(store.admit(interrupt.clone()).await.unwrap());
        started_from_queue(store.start_queued(&third).await.unwrap());
        holder.execute("ROLLBACK").await.unwrap();
        third
    };
    let (overtaken, third) = tokio::join!(store.start_queued(&second), meanwhile);
    assert_eq!(overtaken.unwrap(), QueuedStart::NotYet);
    check_invariants(&database).await;
    closed(store.finish(&third, completed(None)).await.unwrap());
    started_from_queue(store.start_queued(&second).await.unwrap());
}

/// A queued run polls for its start. A poll that changes nothing must take no lock, since it
/// would then get a transaction id, whose commit is flushed.
#[tokio::test]
async fn refused_start_writes_nothing_on_postgres() {
    let cluster = Cluster::start();
    let database = TestDatabase::on(&cluster).await;
    let store = database.store().await;
    let key = user("alice");
    started(store.admit(admission(&key)).await.unwrap());
    let interrupt = Admission {
        strategy: MultitaskStrategy::Interrupt,
        ..admission(&key)
    };
    let (first, ..) = queued(store.admit(interrupt.clone()).await.unwrap());
    let (second, ..) = queued(store.admit(admission(&key)).await.unwrap());
    store.cancel_active(&first, false).await.unwrap().unwrap();
    let next = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint";
    let before = database.number(next).await;
    for _ in 0..10 {
        for lease in [&first, &second] {
            assert_eq!(
                store.start_queued(lease).await.unwrap(),
                QueuedStart::NotYet
            );
        }
        store.cancel_active(&first, false).await.unwrap().unwrap();
    }
    assert_eq!(database.number(next).await, before);
    store.close().await;
}

/// A run starts while a message is about to join it. The message is then queued alone.
#[tokio::test]
async fn merge_into_run_starting_meanwhile_is_queued() {
    let database = TestDatabase::postgres().await;
    let store = database.store().await;
    let key = user("alice");
    let first = started(store.admit(admission(&key)).await.unwrap());
    let (second, ..) = queued(store.admit(admission(&key)).await.unwrap());
    closed(store.finish(&first.lease, completed(None)).await.unwrap());

    let mut holder = sqlx::PgConnection::connect(&database.url()).await.unwrap();
    let begin = "BEGIN; UPDATE runs SET status = 'in_progress', queued_input = NULL, started_at = now(), \
                 deadline_at = now() WHERE seq = 2";
    holder.execute(begin).await.unwrap();
    let merge = Admission {
        strategy: MultitaskStrategy::Merge,
        ..admission(&key)
    };
    let meanwhile = async {
        blocked(&database, 1).await;
        holder.execute("COMMIT").await.unwrap();
    };
    let (admitted, ()) = tokio::join!(store.admit(merge.clone()), meanwhile);
    let (third, _, run, position) = queued(admitted.unwrap());
    assert_eq!((run.seq, position), (3, 1));
    closed(store.finish(&second, completed(None)).await.unwrap());
    assert_eq!(
        started_from_queue(store.start_queued(&third).await.unwrap()).input,
        [merge.message]
    );
    check_invariants(&database).await;
}

/// Waits until `wanted` statements wait for a lock.
pub(super) async fn blocked(database: &TestDatabase, wanted: i64) {
    let blocked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' \
                   AND datname = current_database()";
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while database.number(blocked).await < wanted {
        assert!(
            tokio::time::Instant::now() < deadline,
            "fewer than {wanted} statements wait"
        );
    }
}

/// Two replicas do everything to one conversation at once. Nothing may deadlock, and no message
/// may be lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_strategies_neither_deadlock_nor_lose_messages() {
    const MESSAGES: usize = 150;
    let database = TestDatabase::postgres().await;
    let replicas = [database.store().await, database.store().await];
    let key = session("alice", "s1");
    let (begun, removed) = (AtomicUsize::new(0), AtomicUsize::new(0));

    let work = |turn: StartedRun, store: Arc<Store>, n: usize| {
        let (key, begun, removed) = (&key, &begun, &removed);
        async move {
            begun.fetch_add(turn.input.len(), Ordering::SeqCst);
            let id = UpstreamThreadId("c".to_owned());
            assert!(bind(&store, &turn.lease, &id, n.is_multiple_of(7)).await);
            assert!(
                store
                    .record_settlement(&turn.lease, turn.run.id, UpstreamSync::Present)
                    .await
                    .unwrap()
            );
            if n.is_multiple_of(3)
                && let Paused::Waiting(_) = store
                    .pause(&turn.lease, &pause(&["call_1"], 0))
                    .await
                    .unwrap()
            {
                let answer = ToolAnswer {
                    idempotency: Some(idempotency(&format!("answer {n}"))),
                    ..answer(&["call_1"])
                };
                store.answer_tools(key, turn.run.id, &answer).await.unwrap();
            }
            let said = if n.is_multiple_of(4) {
                UpstreamSync::Missing
            } else {
                UpstreamSync::Present
            };
            let mut end = RunEnd {
                said,
                synced: n.is_multiple_of(5),
                ..completed(Some("hi"))
            };
            end.events.first = 4;
            if store.finish(&turn.lease, end.clone()).await.unwrap() == Closing::MustDiscard {
                removed.fetch_add(turn.input.len(), Ordering::SeqCst);
                closed(
                    store
                        .finish(
                            &turn.lease,
                            RunEnd {
                                discard: true,
                                ..end
                            },
                        )
                        .await
                        .unwrap(),
                );
            }
        }
    };
    let send = |n: usize| {
        let (store, other) = (
            Arc::clone(&replicas[n % 2]),
            Arc::clone(&replicas[(n + 1) % 2]),
        );
        let (key, work) = (&key, &work);
        async move {
            let strategy = [
                MultitaskStrategy::Enqueue,
                MultitaskStrategy::Interrupt,
                MultitaskStrategy::Merge,
                MultitaskStrategy::Rollback,
                MultitaskStrategy::Merge,
            ][n % 5];
            let request = Admission {
                strategy,
                idempotency: Some(idempotency(&n.to_string())),
                ..admission(key)
            };
            match store.admit(request.clone()).await.unwrap() {
                Admitted::Started(turn) => work(*turn, store, n).await,
                Admitted::Merged { .. } => {}
                Admitted::Queued { lease, .. } => loop {
                    if matches!(
                        strategy,
                        MultitaskStrategy::Interrupt | MultitaskStrategy::Rollback
                    ) {
                        other
                            .cancel_active(&lease, strategy == MultitaskStrategy::Rollback)
                            .await
                            .unwrap();
                    }
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
    let all = futures_util::future::join_all((0..MESSAGES).map(send));
    tokio::time::timeout(Duration::from_mins(2), all)
        .await
        .expect("every run starts in time");

    assert_eq!(begun.into_inner(), MESSAGES);
    let left = i64::try_from(MESSAGES - removed.into_inner()).unwrap();
    assert_eq!(
        database
            .number("SELECT count(*) FROM messages WHERE role = 'user'")
            .await,
        left
    );
    let keys = "SELECT count(*) FROM idempotency_keys WHERE key NOT LIKE 'answer%'";
    assert_eq!(
        database.number(keys).await,
        i64::try_from(MESSAGES).unwrap()
    );
    check_invariants(&database).await;
    for store in replicas {
        store.close().await;
    }
}

/// Beside a long history, each step reads only a few rows, as the server counts them.
#[tokio::test]
async fn run_steps_read_bounded_rows() {
    let database = TestDatabase::postgres().await;
    let key = user("alice");
    let store = database.store().await;
    exchange(&store, &key).await;
    store.close().await;
    // A thread with a long history, many other threads, and many messages that were or are
    // unsynced.
    database
        .execute(
            "INSERT INTO threads (id, tenant, user_key, scope_kind, scope_name, upstream, lifecycle, message_count, \
             last_position, unsynced_messages, run_count, created_at, last_active_at) \
             SELECT gen_random_uuid(), 'default', 'u' || n, 'user', '', 'main', 'current', 1, 1, 1, 1, now(), now() \
             FROM generate_series(1, 5000) n; \
             INSERT INTO runs (id, thread_id, seq, status, strategy, assistant, fence, timeout_ms, created_at, \
             started_at, finished_at, deadline_at) \
             SELECT gen_random_uuid(), id, 1, 'completed', 'enqueue', 'default', 1, 1, now(), now(), now(), now() \
             FROM threads WHERE user_key <> 'alice'; \
             INSERT INTO messages (id, thread_id, position, role, content, run_id, upstream_sync, created_at) \
             SELECT gen_random_uuid(), thread_id, 1, 'user', '[]', id, 'missing', now() FROM runs \
             WHERE thread_id <> (SELECT id FROM threads WHERE user_key = 'alice'); \
             INSERT INTO run_events (run_id, first_offset, end_offset, events) SELECT id, 4, 4, '[]' FROM runs; \
             INSERT INTO idempotency_keys SELECT tenant, user_key, scope_kind, scope_name, 'k', r.id, \
             decode(repeat('00', 32), 'hex'), now() FROM runs r JOIN threads t ON t.id = r.thread_id; \
             INSERT INTO runs (id, thread_id, seq, status, strategy, assistant, fence, timeout_ms, created_at, \
             started_at, finished_at, deadline_at) \
             SELECT gen_random_uuid(), id, 1 + n, 'completed', 'enqueue', 'default', 1, 1, now(), now(), now(), now() \
             FROM threads, generate_series(1, 5000) n WHERE user_key = 'alice'; \
             INSERT INTO messages (id, thread_id, position, role, content, run_id, upstream_message_id, created_at) \
             SELECT gen_random_uuid(), thread_id, seq + 1, 'assistant', '[]', id, 'm', now() FROM runs \
             WHERE seq > 1; \
             UPDATE threads SET run_count = 5001, message_count = 5002, last_position = 5002 \
             WHERE user_key = 'alice'; \
             ANALYZE",
        )
        .await;
    check_invariants(&database).await;
    alone(&database).await;
    database.execute("SELECT pg_stat_reset()").await;

    let store = database.store().await;
    let replica = ReplicaId::new();
    let with = |strategy| Admission {
        strategy,
        ..admission(&key)
    };
    store
        .repeated(&key, "k", Duration::from_hours(1))
        .await
        .unwrap();
    let once = Admission {
        idempotency: Some(idempotency("new")),
        replica,
        ..admission(&key)
    };
    let turn = started(store.admit(once.clone()).await.unwrap());
    queued(store.admit(with(MultitaskStrategy::Merge)).await.unwrap());
    store.admit(with(MultitaskStrategy::Merge)).await.unwrap();
    let (next, ..) = queued(
        store
            .admit(with(MultitaskStrategy::Interrupt))
            .await
            .unwrap(),
    );
    store
        .pause(&turn.lease, &pause(&["call_1"], 0))
        .await
        .unwrap();
    store
        .answer_tools(&key, turn.run.id, &answer(&["call_1"]))
        .await
        .unwrap();
    assert_eq!(store.requests(replica).await.unwrap().len(), 1);
    store.cancel_active(&next, true).await.unwrap().unwrap();
    closed(
        store
            .finish(
                &turn.lease,
                RunEnd {
                    discard: true,
                    ..completed(None)
                },
            )
            .await
            .unwrap(),
    );
    started_from_queue(store.start_queued(&next).await.unwrap());
    assert_eq!(
        store
            .unsynced_messages(next.run_id, None, 10)
            .await
            .unwrap()
            .data,
        []
    );
    store.baseline(next.run_id).await.unwrap();
    assert!(
        store
            .record_settlement(&next, turn.run.id, UpstreamSync::Missing)
            .await
            .unwrap()
    );
    store
        .request_cancel(&key, next.run_id)
        .await
        .unwrap()
        .unwrap();
    store.events(next.run_id, 0).await.unwrap();
    let end = RunEnd {
        status: RunStatus::Failed,
        synced: true,
        said: UpstreamSync::Missing,
        ..completed(Some("x"))
    };
    closed(store.finish(&next, end.clone()).await.unwrap());
    newest_thread(&store, &key).await;
    store.run(&key, next.run_id).await.unwrap();
    store.close().await;

    alone(&database).await;
    for column in ["seq_scan", "idx_tup_fetch"] {
        for table in [
            "threads",
            "runs",
            "messages",
            "run_events",
            "idempotency_keys",
        ] {
            let number = format!(
                "SELECT COALESCE({column}, 0) FROM pg_stat_user_tables WHERE relname = '{table}'"
            );
            let number = database.number(&number).await;
            let most = if column == "seq_scan" { 0 } else { 300 };
            assert!(number <= most, "{table}.{column}: {number}");
        }
    }
    let read = "SELECT idx_scan FROM pg_stat_user_tables WHERE relname = 'messages'";
    assert!(database.number(read).await > 0, "the server counts reads");
}

/// The janitor's column is indexed, and so are others. A message must change no indexed column.
#[tokio::test]
async fn message_updates_no_thread_index() {
    let database = TestDatabase::postgres().await;
    let key = session("alice", "s1");
    let store = database.store().await;
    let limits = Limits {
        max_age: Some(Duration::from_hours(1)),
        max_idle: Some(Duration::from_mins(30)),
    };
    let with = |strategy| Admission {
        strategy,
        limits,
        ..admission(&key)
    };
    for _ in 0..3 {
        let turn = started(store.admit(with(MultitaskStrategy::Enqueue)).await.unwrap());
        let (waiting, ..) = queued(store.admit(with(MultitaskStrategy::Enqueue)).await.unwrap());
        assert!(matches!(
            store.admit(with(MultitaskStrategy::Merge)).await.unwrap(),
            Admitted::Merged { .. }
        ));
        closed(
            store
                .finish(&turn.lease, completed(Some("hi")))
                .await
                .unwrap(),
        );
        started_from_queue(store.start_queued(&waiting).await.unwrap());
        closed(store.finish(&waiting, completed(Some("hi"))).await.unwrap());
    }
    store.close().await;
    alone(&database).await;
    let updates = "SELECT n_tup_upd FROM pg_stat_user_tables WHERE relname = 'threads'";
    assert_eq!(database.number(updates).await, 17);
    let others =
        "SELECT n_tup_upd - n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'threads'";
    assert_eq!(database.number(others).await, 0);
}

/// Beside many threads, each list reads only a few rows, and no list reads a whole table.
#[tokio::test]
async fn lists_read_bounded_rows() {
    let database = TestDatabase::postgres().await;
    let key = user("alice");
    let store = database.store().await;
    exchange(&store, &key).await;
    store.close().await;
    database
        .execute(
            "INSERT INTO threads (id, tenant, user_key, scope_kind, scope_name, upstream, lifecycle, message_count, \
             last_position, run_count, created_at, last_active_at, archived_at) \
             SELECT (lpad(to_hex((EXTRACT(epoch FROM now()) * 1000)::bigint - n::bigint * 60000), 12, '0') \
             || substr(md5(n::text), 1, 20))::uuid, 'default', 'u' || n / 2, 'session', 's' || n, \
             CASE n % 10 WHEN 0 THEN 'spare' ELSE 'main' END, (CASE n % 4 WHEN 0 THEN 'archived' ELSE 'current' END)::thread_lifecycle, 1, \
             1, 1, now() - n * interval '1 minute', now() - n * interval '1 second', \
             CASE n % 4 WHEN 0 THEN now() END \
             FROM generate_series(1, 20000) n; \
             INSERT INTO runs (id, thread_id, seq, status, strategy, assistant, fence, timeout_ms, created_at, \
             started_at, finished_at, deadline_at) \
             SELECT gen_random_uuid(), id, 1, 'completed', 'enqueue', 'default', 1, 1, now(), now(), now(), now() \
             FROM threads WHERE user_key <> 'alice'; \
             INSERT INTO messages (id, thread_id, position, role, content, run_id, created_at) \
             SELECT gen_random_uuid(), thread_id, n, 'user', '[]', id, now() FROM runs, generate_series(1, 3) n \
             WHERE thread_id <> (SELECT id FROM threads WHERE user_key = 'alice'); \
             UPDATE threads SET message_count = 3, last_position = 3 WHERE user_key <> 'alice'; \
             INSERT INTO messages (id, thread_id, position, role, content, created_at) \
             SELECT gen_random_uuid(), id, n + 2, 'user', '[]', now() FROM threads, generate_series(1, 5000) n \
             WHERE user_key = 'alice'; \
             UPDATE threads SET message_count = 5002, last_position = 5002 WHERE user_key = 'alice'; \
             ANALYZE",
        )
        .await;
    check_invariants(&database).await;
    alone(&database).await;
    database.execute("SELECT pg_stat_reset()").await;

    let store = database.store().await;
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let page = PageRequest {
        limit: 20,
        ..first_page()
    };
    let recent = turn.thread.created_at - chrono::TimeDelta::hours(1);
    let all = ThreadFilter {
        tenant: TenantKey::default(),
        ..every_thread()
    };
    let filters = [
        all.clone(),
        ThreadFilter {
            user: Some(key.user.clone()),
            ..all.clone()
        },
        ThreadFilter {
            upstream: Some("spare".to_owned()),
            ..all.clone()
        },
        ThreadFilter {
            lifecycle: Some(Lifecycle::Archived),
            ..all.clone()
        },
        ThreadFilter {
            lifecycle: Some(Lifecycle::Deleting),
            ..all.clone()
        },
        ThreadFilter {
            lifecycle: Some(Lifecycle::Current),
            ..all.clone()
        },
        ThreadFilter {
            state: Some(ThreadState::Idle),
            ..all.clone()
        },
        ThreadFilter {
            state: Some(ThreadState::Active),
            ..all.clone()
        },
        ThreadFilter {
            state: Some(ThreadState::RequiresAction),
            ..all.clone()
        },
        ThreadFilter {
            created_before: Some(recent),
            ..all.clone()
        },
        ThreadFilter {
            inactive_since: Some(recent),
            ..all
        },
    ];
    for filter in &filters {
        for ascending in [true, false] {
            let page = PageRequest {
                ascending,
                ..page.clone()
            };
            let got = store.threads(filter, &page).await.unwrap();
            if let Some((thread, _)) = got.data.last() {
                let page = PageRequest {
                    after: Some(thread.id),
                    ..page
                };
                store.threads(filter, &page).await.unwrap();
            }
        }
    }
    for ascending in [true, false] {
        for across in [true, false] {
            let page = PageRequest {
                limit: 20,
                ascending,
                ..first_page()
            };
            let got = store
                .messages(ThreadName::Newest(&key), across, &page)
                .await
                .unwrap()
                .unwrap();
            let page = PageRequest {
                after: Some(got.data[9].id),
                ..page
            };
            store
                .messages(ThreadName::Newest(&key), across, &page)
                .await
                .unwrap()
                .unwrap();
        }
    }
    store
        .report(ThreadName::Newest(&key))
        .await
        .unwrap()
        .unwrap();
    store.unfinished(&key).await.unwrap().unwrap();
    store
        .runs_of(&[turn.thread.id], (turn.thread.id, 0), 10)
        .await
        .unwrap();
    store
        .transcripts(&[turn.thread.id], (turn.thread.id, 0), 10)
        .await
        .unwrap();
    store
        .update_thread(&key, &ThreadUpdate::default())
        .await
        .unwrap()
        .unwrap();
    import_messages(&store, turn.thread.id, &[]).await;
    store.close().await;

    alone(&database).await;
    for column in ["seq_scan", "idx_tup_fetch"] {
        for table in ["threads", "runs", "messages"] {
            let number = format!(
                "SELECT COALESCE({column}, 0) FROM pg_stat_user_tables WHERE relname = '{table}'"
            );
            let number = database.number(&number).await;
            let most = if column == "seq_scan" { 0 } else { 5_500 };
            assert!(number <= most, "{table}.{column}: {number}");
        }
    }
}

/// Waits until all other connections are gone, since each reports its reads to the server when it
/// ends.
pub(super) async fn alone(database: &TestDatabase) {
    let connections = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' \
                       AND datname = current_database()";
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while database.number(connections).await > 1 {
        assert!(
            tokio::time::Instant::now() < deadline,
            "another connection stays open"
        );
    }
}

/// Two replicas admit, start and finish runs of one key as fast as they can.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_replicas_never_hold_two_active_runs() {
    const EACH: usize = 100;
    let database = TestDatabase::postgres().await;
    let replicas = [database.store().await, database.store().await];
    let key = session("alice", "s1");
    let (active, order) = (AtomicUsize::new(0), std::sync::Mutex::new(vec![]));

    let work = |turn: StartedRun, store: Arc<Store>| {
        let (active, order) = (&active, &order);
        async move {
            assert_eq!(
                active.fetch_add(1, Ordering::SeqCst),
                0,
                "a second run is active"
            );
            order.lock().unwrap().push(turn.run.seq);
            tokio::task::yield_now().await;
            assert_eq!(active.fetch_sub(1, Ordering::SeqCst), 1);
            closed(
                store
                    .finish(&turn.lease, completed(Some("hi")))
                    .await
                    .unwrap(),
            );
        }
    };
    let turn = |n: usize| {
        let (store, key, work) = (Arc::clone(&replicas[n % 2]), &key, &work);
        async move {
            match store.admit(admission(key)).await.unwrap() {
                Admitted::Started(turn) => work(*turn, store).await,
                Admitted::Queued { lease, .. } => loop {
                    match store.start_queued(&lease).await.unwrap() {
                        QueuedStart::Started(turn) => break work(*turn, store).await,
                        QueuedStart::NotYet => tokio::task::yield_now().await,
                        QueuedStart::Lost => panic!("{lease:?}"),
                    }
                },
                other => panic!("{other:?}"),
            }
        }
    };
    let all = futures_util::future::join_all((0..2 * EACH).map(turn));
    tokio::time::timeout(Duration::from_mins(1), all)
        .await
        .expect("every run starts in time");

    let order = order.into_inner().unwrap();
    assert_eq!(
        order,
        (1..=2 * i64::try_from(EACH).unwrap()).collect::<Vec<_>>(),
        "runs start in the order of admission"
    );
    assert_eq!(database.number("SELECT count(*) FROM threads").await, 1);
    let completed = format!(
        "SELECT count(*) FROM runs WHERE status = '{}'",
        RunStatus::Completed
    );
    assert_eq!(
        database.number(&completed).await,
        2 * i64::try_from(EACH).unwrap()
    );
    check_invariants(&database).await;
    for store in replicas {
        store.close().await;
    }
}

/// A statement that waits for a thread's row must decide on the row that it gets, not on its
/// earlier snapshot.
#[tokio::test]
async fn stale_snapshot_never_starts_run() {
    let database = TestDatabase::postgres().await;
    let store = database.store().await;
    let key = user("alice");
    exchange(&store, &key).await;

    for strategy in [MultitaskStrategy::Enqueue, MultitaskStrategy::Reject] {
        // This transaction holds the thread's row, and admits a run meanwhile.
        let mut holder = sqlx::PgConnection::connect(&database.url()).await.unwrap();
        holder
            .execute("BEGIN; UPDATE threads SET run_count = run_count + 1")
            .await
            .unwrap();
        let request = Admission {
            strategy,
            ..admission(&key)
        };
        let waiting = store.admit(request.clone());
        let meanwhile = async {
            blocked(&database, 1).await;
            let run = "INSERT INTO runs (id, thread_id, seq, status, strategy, assistant, queued_input, fence, timeout_ms, \
                       created_at) SELECT gen_random_uuid(), id, run_count, 'queued', 'enqueue', 'x', '[]', 1, 1, \
                       now() FROM threads";
            holder.execute(run).await.unwrap();
            holder.execute("COMMIT").await.unwrap();
        };
        let (admitted, ()) = tokio::join!(waiting, meanwhile);
        match strategy {
            MultitaskStrategy::Reject => assert_eq!(admitted.unwrap(), Admitted::Busy),
            _ => assert_eq!(
                store
                    .start_queued(&queued(admitted.unwrap()).0)
                    .await
                    .unwrap(),
                QueuedStart::NotYet
            ),
        }
        check_invariants(&database).await;
        let end_all = "UPDATE runs SET status = 'failed', queued_input = NULL, finished_at = now() WHERE status = 'queued'";
        database.execute(end_all).await;
    }
}

/// Blocked admissions use all their connections. A run can still finish.
#[tokio::test]
async fn run_finishes_during_flood_of_blocked_admissions() {
    let database = TestDatabase::postgres().await;
    let store = database.store().await;
    let key = user("alice");
    let turn = started(store.admit(admission(&user("bob"))).await.unwrap());
    exchange(&store, &key).await;
    let mut holder = sqlx::PgConnection::connect(&database.url()).await.unwrap();
    holder
        .execute("BEGIN; UPDATE threads SET run_count = run_count WHERE user_key = 'alice'")
        .await
        .unwrap();
    let admissions: Vec<_> = (0..64).map(|_| admission(&key)).collect();
    let flood = futures_util::future::join_all(admissions.iter().map(|it| store.admit(it.clone())));
    let work = async {
        // Single admissions may use a quarter of the connections.
        blocked(&database, 4).await;
        closed(
            store
                .finish(&turn.lease, completed(Some("hi")))
                .await
                .unwrap(),
        );
        store
            .renew_replica(ReplicaId::new(), "127.0.0.1:1", Duration::from_secs(1))
            .await
            .unwrap();
        holder.execute("ROLLBACK").await.unwrap();
    };
    let (results, ()) = tokio::join!(flood, work);
    assert!(results.iter().all(Result::is_ok));
    check_invariants(&database).await;
}

/// Admissions and finishes have separate lanes, so neither waits for the other.
#[tokio::test]
async fn admissions_and_finishes_use_separate_lanes() {
    let database = TestDatabase::postgres().await;
    let store = database.store().await;
    let mut turns = Vec::new();
    for n in 0..24 {
        turns.push(started(
            store.admit(admission(&user(&n.to_string()))).await.unwrap(),
        ));
    }
    let mut holder = database.lock("threads").await;
    let end = completed(None);
    let ends = futures_util::future::join_all(
        turns
            .iter()
            .map(|turn| store.finish(&turn.lease, end.clone())),
    );
    let new: Vec<_> = (0..24)
        .map(|n| admission(&user(&format!("new {n}"))))
        .collect();
    let begins = async {
        blocked(&database, 1).await;
        futures_util::future::join_all(new.iter().map(|admission| store.admit(admission.clone())))
            .await
    };
    let release = async {
        blocked(&database, 2).await;
        holder.execute("ROLLBACK").await.unwrap();
    };
    let (ends, begins, ()) = tokio::join!(ends, begins, release);
    assert!(ends.iter().all(Result::is_ok), "{ends:?}");
    assert!(begins.iter().all(Result::is_ok), "{begins:?}");
    store.close().await;
}

#[tokio::test]
async fn missing_postgres_database_is_named_in_error() {
    let database = TestDatabase::postgres().await;
    let mut url = url::Url::parse(&database.url()).unwrap();
    url.set_path("no_such_database");
    let config = threadkeeper::config::StoreConfig {
        url: Some(String::from(url).into()),
        ..database.config()
    };
    let text = Store::open(&config).await.unwrap_err().to_string();
    assert!(text.contains("no database `no_such_database`"), "{text}");
}

#[tokio::test]
async fn concurrent_migrations_succeed() {
    let database = TestDatabase::postgres().await;
    database
        .execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        .await;
    let stores = [
        Store::open(&database.config()).await.unwrap(),
        Store::open(&database.config()).await.unwrap(),
    ];
    let (one, two) = tokio::join!(stores[0].migrate(), stores[1].migrate());
    one.unwrap();
    two.unwrap();
    for store in &stores {
        store.ready().await.unwrap();
    }
    database
        .execute("INSERT INTO _sqlx_migrations SELECT 9999, 'x', now(), true, '', 0")
        .await;
    assert!(
        matches!(stores[0].migrate().await, Err(StoreError::Schema(text)) if text.contains("newer"))
    );
}

#[tokio::test]
async fn sqlite_file_is_locked_to_one_store() {
    let database = TestDatabase::sqlite().await;
    let store = Store::open(&database.config()).await.unwrap();
    let text = match Store::open(&database.config()).await {
        Err(StoreError::Open(text)) => text,
        other => panic!("{other:?}"),
    };
    assert!(
        text.contains("another process") && text.contains("Postgres"),
        "{text}"
    );
    store.ready().await.unwrap();
    store.close().await;
    Store::open(&database.config())
        .await
        .expect("a closed store releases the file");
}

#[tokio::test]
async fn sqlite_file_keeps_data_after_reopen() {
    let database = TestDatabase::sqlite().await;
    let key = user("alice");
    let store = database.store().await;
    let finished = exchange(&store, &key).await;
    store.close().await;
    drop(store);
    let store = database.store().await;
    assert_eq!(
        newest_thread(&store, &key).await.unwrap(),
        (finished.thread, finished.activity)
    );
    assert_eq!(
        transcript(&store, &key).await,
        ["user: hello", "assistant: hi"]
    );
}

#[tokio::test]
async fn orphans_in_reopened_sqlite_file_are_adoptable_immediately() {
    let database = TestDatabase::sqlite().await;
    let (dead, me) = (ReplicaId::new(), ReplicaId::new());
    let store = database.store().await;
    store
        .renew_replica(dead, "127.0.0.1:1", Duration::from_hours(1))
        .await
        .unwrap();
    let turn = started(
        store
            .admit(Admission {
                replica: dead,
                ..admission(&user("alice"))
            })
            .await
            .unwrap(),
    );
    assert_eq!(store.adopt_orphans(me, &[], 10).await.unwrap(), []);
    store.close().await;
    drop(store);
    let store = database.store().await;
    let orphans = store.adopt_orphans(me, &[], 10).await.unwrap();
    assert_eq!(
        orphans
            .iter()
            .map(|orphan| orphan.run.id)
            .collect::<Vec<_>>(),
        [turn.run.id]
    );
}

/// A start whose caller gave up commits while the finish waits for the row. The finish must mark
/// the messages of that start, too.
#[tokio::test]
async fn finish_marks_messages_of_start_committed_meanwhile_on_postgres() {
    let database = TestDatabase::postgres().await;
    let store = database.store().await;
    let key = user("alice");
    let first = started(store.admit(admission(&key)).await.unwrap());
    let (waiting, ..) = queued(store.admit(admission(&key)).await.unwrap());
    closed(
        store
            .finish(&first.lease, completed(Some("hi")))
            .await
            .unwrap(),
    );
    let id = waiting.run_id.uuid();
    let claim = format!(
        "BEGIN;
        INSERT INTO messages (id, thread_id, position, role, content, run_id, created_at)
        SELECT gen_random_uuid(), thread_id, 3, 'user', '[{{\"type\": \"text\", \"text\": \"late\"}}]', id, now()
        FROM runs WHERE id = '{id}';
        UPDATE runs SET status = 'in_progress', queued_input = NULL, started_at = now(), deadline_at = now() WHERE id = '{id}';
        UPDATE threads SET message_count = 3, last_position = 3;
        SELECT pg_sleep(0.5);
        COMMIT"
    );
    let cancelled = RunEnd {
        status: RunStatus::Cancelled,
        said: UpstreamSync::Withheld,
        ..completed(None)
    };
    let end = async {
        let asleep = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep%' \
                      AND wait_event = 'PgSleep' AND pid <> pg_backend_pid()";
        while database.number(asleep).await == 0 {
            tokio::task::yield_now().await;
        }
        store.finish(&waiting, cancelled.clone()).await.unwrap()
    };
    let ((), closing) = tokio::join!(database.execute(&claim), end);
    closed(closing);
    let withheld = "SELECT count(*) FROM messages WHERE upstream_sync = 'withheld' AND run_outcome = 'cancelled'";
    assert_eq!(database.number(withheld).await, 1);
    check_invariants(&database).await;
}

/// A call that is dropped at any moment took effect or did not. Its connection can be used for
/// later calls.
async fn dropped_calls_leave_nothing_open(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let thread = exchange(store, &key).await.thread.id;
    for polls in 1..=20 {
        let message = [ImportedMessage {
            id: MessageId::new(),
            role: Role::User,
            content: text("hello"),
            upstream_message_id: None,
            sync: None,
            created_at: None,
        }];
        polled(store.import_messages(&[(thread, message.to_vec())]), polls).await;
        // A single statement would stay invisible within an open transaction.
        started(
            store
                .admit(admission(&user(&format!("n{polls}"))))
                .await
                .unwrap(),
        );
        assert_eq!(
            database.number("SELECT count(*) FROM runs").await,
            1 + i64::from(polls)
        );
        polled(store.transcript(thread, 0, 100), polls).await;
        import_messages(store, thread, &message).await;
        assert_eq!(
            database.number("SELECT count(*) FROM messages").await,
            2 + 2 * i64::from(polls)
        );
    }
    check_invariants(database).await;
}

/// The statement of a dropped call may fail later. Its transaction must be over then, too.
#[tokio::test]
async fn failure_of_dropped_call_leaves_next_calls_unaffected() {
    let database = TestDatabase::postgres().await;
    let store = Store::open(&StoreConfig {
        max_connections: 2,
        ..database.config()
    })
    .await
    .unwrap();
    let key = user("alice");
    let turn = started(store.admit(admission(&key)).await.unwrap());
    let lock = database.lock("runs").await;
    tokio::select! {
        cancelled = store.request_cancel(&key, turn.run.id) => panic!("{cancelled:?}"),
        () = blocked(&database, 1) => {}
    }
    let cancel = "SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity \
                  WHERE datname = current_database() AND wait_event_type = 'Lock'";
    assert_eq!(database.number(cancel).await, 1);
    drop(lock);
    for _ in 0..3 {
        store.request_cancel(&key, turn.run.id).await.unwrap();
    }
    store.close().await;
}

/// Polls a future up to `polls` times, and drops it.
async fn polled(future: impl Future, mut polls: u32) {
    let mut future = std::pin::pin!(future);
    std::future::poll_fn(|context| {
        polls -= 1;
        let at_its_end = future.as_mut().poll(context).is_ready();
        if at_its_end || polls == 0 {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
}

#[tokio::test]
async fn dropped_calls_leave_no_open_transaction_on_sqlite() {
    let database = TestDatabase::sqlite().await;
    let store = database.store().await;
    dropped_calls_leave_nothing_open(&database, &store).await;
    store.close().await;
}

#[tokio::test]
async fn dropped_calls_leave_no_open_transaction_on_postgres() {
    let database = TestDatabase::postgres().await;
    // One connection is for callers, so each call gets the connection of the call before.
    let config = StoreConfig {
        max_connections: 2,
        ..database.config()
    };
    let store = Store::open(&config).await.unwrap();
    dropped_calls_leave_nothing_open(&database, &store).await;
    store.close().await;
}

#[tokio::test]
async fn store_closes_while_server_executes_dropped_call() {
    let database = TestDatabase::postgres().await;
    let store = database.store().await;
    let _lock = database.lock("messages").await;
    tokio::select! {
        read = store.transcript(ThreadId::new(), 0, 100) => panic!("{read:?}"),
        () = blocked(&database, 1) => {}
    }
    tokio::time::timeout(Duration::from_secs(5), store.close())
        .await
        .expect("the store closes at once");
}

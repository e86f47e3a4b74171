//! What only one backend promises.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use sqlx::{Connection, Executor};
use threadkeeper::config::StoreConfig;
use threadkeeper::domain::{RunStatus, UpstreamThreadId};
use threadkeeper::store::{PostgresStore, SqliteStore, StoreError};

use super::*;
use crate::support::wiretap::Wiretap;

/// Counted on the wire, after a round in which the statements are prepared.
#[tokio::test]
async fn each_step_is_one_round_trip_on_postgres() {
    let database = TestDatabase::postgres().await;
    let tap = Wiretap::on(&database.url()).await;
    let config = StoreConfig { url: Some(tap.url.clone().into()), ..database.config() };
    let store = PostgresStore::connect(&config).await.unwrap();
    let end =
        || RunEnd { upstream_thread_id: Some(UpstreamThreadId("c".to_owned())), ..completed(Some("hi")) };
    for round in 0..2 {
        let mut before = tap.round_trips();
        let mut one = |what: &str| {
            let now = tap.round_trips();
            assert!(round == 0 || now - before == 1, "{what}: {}", now - before);
            before = now;
        };
        let key = user(&round.to_string());
        let turn = started(store.admit(&admission(&key)).await.unwrap());
        one("admission on a new key");
        store.finish(&turn.lease, &end()).await.unwrap().unwrap();
        one("an end");
        let turn = started(store.admit(&admission(&key)).await.unwrap());
        one("admission on a known thread");
        let (waiting, ..) = queued(store.admit(&admission(&key)).await.unwrap());
        one("admission to the queue");
        let reject = Admission { strategy: MultitaskStrategy::Reject, ..admission(&key) };
        assert_eq!(store.admit(&reject).await.unwrap(), Admitted::Busy);
        one("a refusal");
        store.finish(&turn.lease, &end()).await.unwrap().unwrap();
        one("an end with another waiting");
        claimed(store.claim(&waiting).await.unwrap());
        one("a claim");
        store.finish(&waiting, &end()).await.unwrap().unwrap();
        one("the last end");
        store.ready().await.unwrap();
        one("readiness");
    }
}

/// Two replicas admit, claim and end runs of one key, as fast as they can.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_replicas_never_get_two_active_runs() {
    const EACH: usize = 100;
    let database = TestDatabase::postgres().await;
    let replicas = [database.store().await, database.store().await];
    let key = session("alice", "s1");
    let (active, order) = (AtomicUsize::new(0), std::sync::Mutex::new(vec![]));

    let work = |turn: Turn, store: Arc<dyn Store>| {
        let (active, order) = (&active, &order);
        async move {
            assert_eq!(active.fetch_add(1, Ordering::SeqCst), 0, "two runs at a time");
            order.lock().unwrap().push(turn.run.seq);
            tokio::task::yield_now().await;
            assert_eq!(active.fetch_sub(1, Ordering::SeqCst), 1);
            store.finish(&turn.lease, &completed(Some("hi"))).await.unwrap().unwrap();
        }
    };
    let turn = |n: usize| {
        let (store, key, work) = (Arc::clone(&replicas[n % 2]), &key, &work);
        async move {
            match store.admit(&admission(key)).await.unwrap() {
                Admitted::Started(turn) => work(*turn, store).await,
                Admitted::Queued { lease, .. } => loop {
                    match store.claim(&lease).await.unwrap() {
                        Claim::Started(turn) => break work(*turn, store).await,
                        Claim::NotYet => tokio::task::yield_now().await,
                        Claim::Lost => panic!("{lease:?}"),
                    }
                },
                other => panic!("{other:?}"),
            }
        }
    };
    let all = futures_util::future::join_all((0..2 * EACH).map(turn));
    tokio::time::timeout(Duration::from_mins(1), all).await.expect("every run gets its turn");

    let order = order.into_inner().unwrap();
    assert_eq!(order, (1..=2 * i64::try_from(EACH).unwrap()).collect::<Vec<_>>(), "in order of admission");
    assert_eq!(database.number("SELECT count(*) FROM threads").await, 1);
    let completed = format!("SELECT count(*) FROM runs WHERE status = '{}'", RunStatus::Completed);
    assert_eq!(database.number(&completed).await, 2 * i64::try_from(EACH).unwrap());
    check_invariants(&database).await;
    for store in replicas {
        store.close().await;
    }
}

/// A statement that waits for a thread's row decides on what it finds then, not on what was when it began.
#[tokio::test]
async fn an_old_snapshot_starts_no_run() {
    let database = TestDatabase::postgres().await;
    let store = database.store().await;
    let key = user("alice");
    exchange(&*store, &key).await;

    for strategy in [MultitaskStrategy::Enqueue, MultitaskStrategy::Reject] {
        // Holds the thread's row, and admits a run under it.
        let mut holder = sqlx::PgConnection::connect(&database.url()).await.unwrap();
        holder.execute("BEGIN; UPDATE threads SET run_count = run_count + 1").await.unwrap();
        let request = Admission { strategy, ..admission(&key) };
        let waiting = store.admit(&request);
        let meanwhile = async {
            let blocked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' \
                           AND datname = current_database()";
            let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
            while database.number(blocked).await == 0 {
                assert!(tokio::time::Instant::now() < deadline, "the admission does not wait");
            }
            let run = "INSERT INTO runs (id, thread_id, seq, status, strategy, assistant, input, fence, timeout_ms, \
                       created_at) SELECT gen_random_uuid(), id, run_count, 'queued', 'enqueue', 'x', '[]', 1, 1, \
                       now() FROM threads";
            holder.execute(run).await.unwrap();
            holder.execute("COMMIT").await.unwrap();
        };
        let (admitted, ()) = tokio::join!(waiting, meanwhile);
        match strategy {
            MultitaskStrategy::Reject => assert_eq!(admitted.unwrap(), Admitted::Busy),
            _ => assert_eq!(store.claim(&queued(admitted.unwrap()).0).await.unwrap(), Claim::NotYet),
        }
        check_invariants(&database).await;
        let end_all =
            "UPDATE runs SET status = 'failed', input = NULL, finished_at = now() WHERE status = 'queued'";
        database.execute(end_all).await;
    }
}

/// Reads that occupy all of their connections do not keep a run from ending.
#[tokio::test]
async fn a_flood_of_admissions_does_not_keep_a_run_from_ending() {
    let database = TestDatabase::postgres().await;
    let store = database.store().await;
    let key = user("alice");
    let turn = started(store.admit(&admission(&user("bob"))).await.unwrap());
    exchange(&*store, &key).await;
    let mut holder = sqlx::PgConnection::connect(&database.url()).await.unwrap();
    holder.execute("BEGIN; UPDATE threads SET run_count = run_count WHERE user_key = 'alice'").await.unwrap();
    let admissions: Vec<_> = (0..64).map(|_| admission(&key)).collect();
    let flood = futures_util::future::join_all(admissions.iter().map(|it| store.admit(it)));
    let work = async {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        let blocked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' \
                       AND datname = current_database()";
        while database.number(blocked).await < 12 {
            assert!(tokio::time::Instant::now() < deadline, "the flood does not rise");
        }
        store.finish(&turn.lease, &completed(Some("hi"))).await.unwrap().unwrap();
        store.ready().await.unwrap();
        store.renew_replica(ReplicaId::new(), "127.0.0.1:1", Duration::from_secs(1)).await.unwrap();
        holder.execute("ROLLBACK").await.unwrap();
    };
    let (results, ()) = tokio::join!(flood, work);
    assert!(results.iter().all(Result::is_ok));
    check_invariants(&database).await;
}

#[tokio::test]
async fn postgres_says_what_is_wrong_with_the_url() {
    let database = TestDatabase::postgres().await;
    let mut url = url::Url::parse(&database.url()).unwrap();
    url.set_path("no_such_database");
    let config =
        threadkeeper::config::StoreConfig { url: Some(String::from(url).into()), ..database.config() };
    let text = PostgresStore::connect(&config).await.unwrap_err().to_string();
    assert!(text.contains("no database `no_such_database`"), "{text}");
}

#[tokio::test]
async fn migrating_twice_at_once_is_harmless() {
    let database = TestDatabase::postgres().await;
    database.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public").await;
    let stores = [
        PostgresStore::connect(&database.config()).await.unwrap(),
        PostgresStore::connect(&database.config()).await.unwrap(),
    ];
    let (one, two) = tokio::join!(stores[0].migrate(), stores[1].migrate());
    one.unwrap();
    two.unwrap();
    for store in &stores {
        store.ready().await.unwrap();
    }
    database.execute("INSERT INTO _sqlx_migrations SELECT 9999, 'x', now(), true, '', 0").await;
    assert!(matches!(stores[0].migrate().await, Err(StoreError::Schema(text)) if text.contains("newer")));
}

#[tokio::test]
async fn a_sqlite_file_serves_one_store_at_a_time() {
    let database = TestDatabase::sqlite().await;
    let store = SqliteStore::open(&database.config()).await.unwrap();
    let text = match SqliteStore::open(&database.config()).await {
        Err(StoreError::Open(text)) => text,
        other => panic!("{other:?}"),
    };
    assert!(text.contains("another process") && text.contains("Postgres"), "{text}");
    store.ready().await.unwrap();
    store.close().await;
    SqliteStore::open(&database.config()).await.expect("a closed store leaves the file to the next");
}

#[tokio::test]
async fn a_sqlite_file_keeps_what_was_written() {
    let database = TestDatabase::sqlite().await;
    let key = user("alice");
    let store = database.store().await;
    let finished = exchange(&*store, &key).await;
    store.close().await;
    drop(store);
    let store = database.store().await;
    assert_eq!(store.thread(&key).await.unwrap().unwrap(), (finished.thread, finished.activity));
    assert_eq!(transcript(&*store, &key).await, ["user: hello", "assistant: hi"]);
}

#[tokio::test]
async fn what_a_dead_process_left_in_a_sqlite_file_is_free_at_once() {
    let database = TestDatabase::sqlite().await;
    let (dead, me) = (ReplicaId::new(), ReplicaId::new());
    let store = database.store().await;
    store.renew_replica(dead, "127.0.0.1:1", Duration::from_hours(1)).await.unwrap();
    let turn = started(store.admit(&Admission { replica: dead, ..admission(&user("alice")) }).await.unwrap());
    assert_eq!(store.adopt_orphans(me, &[], 10).await.unwrap(), []);
    store.close().await;
    drop(store);
    let store = database.store().await;
    let orphans = store.adopt_orphans(me, &[], 10).await.unwrap();
    assert_eq!(orphans.iter().map(|orphan| orphan.run.id).collect::<Vec<_>>(), [turn.run.id]);
}

//! Lanes: admissions and finishes of many callers that go to Postgres together.

use futures_util::future::join_all;
use sqlx::{Connection, Executor};
use threadkeeper::config::StoreConfig;
use threadkeeper::store::{Made, OrphanName, StoreError};

use super::engines::blocked;
use super::*;
use crate::support::link::{Link, Weather};

/// Number of calls: one that goes first, and as many as a batch takes behind it.
const BATCH: i64 = 33;

fn users() -> Vec<Admission> {
    (0..BATCH)
        .map(|n| admission(&user(&n.to_string())))
        .collect()
}

/// A locked row blocks only the calls that need it.
#[tokio::test]
async fn locked_thread_row_blocks_no_other_threads() {
    let database = TestDatabase::postgres().await;
    let store = database.store().await;
    let locked = exchange(&store, &user("locked")).await;
    let ending = started(store.admit(admission(&user("ending"))).await.unwrap());
    let mut holder = sqlx::PgConnection::connect(&database.url()).await.unwrap();
    let hold = format!(
        "BEGIN; SELECT FROM threads WHERE id IN ('{}', '{}') FOR UPDATE",
        locked.thread.id.uuid(),
        ending.thread.id.uuid()
    );
    holder.execute(sqlx::AssertSqlSafe(hold)).await.unwrap();

    let waits = store.admit(admission(&user("locked")));
    let ends = store.finish(&ending.lease, completed(Some("hi")));
    let others = async {
        // Each call is in a batch with calls that wait.
        for round in 0..10 {
            let all = users();
            let turns = join_all(all.iter().map(|it| store.admit(it.clone()))).await;
            let turns: Vec<StartedRun> = turns.into_iter().map(|it| started(it.unwrap())).collect();
            let ends = turns
                .iter()
                .map(|turn| store.finish(&turn.lease, completed(Some("hi"))));
            for end in join_all(ends).await {
                closed(end.unwrap());
            }
            if round == 0 {
                blocked(&database, 2).await;
            }
        }
        holder.execute("ROLLBACK").await.unwrap();
    };
    let (waited, ended, ()) = tokio::join!(waits, ends, others);
    started(waited.unwrap());
    closed(ended.unwrap());
    check_invariants(&database).await;
    store.close().await;
}

/// An upstream run's id may contain a character that no database stores.
#[tokio::test]
async fn refused_finish_fails_alone_in_its_batch() {
    let database = TestDatabase::postgres().await;
    let store = database.store().await;
    let turns = join_all(users().iter().map(|it| store.admit(it.clone()))).await;
    let turns: Vec<StartedRun> = turns.into_iter().map(|it| started(it.unwrap())).collect();
    let end = |n: usize| {
        let id = if n == 7 {
            "a\0b".to_owned()
        } else {
            n.to_string()
        };
        RunEnd {
            upstream_run_id: Some(UpstreamRunId(id)),
            ..completed(Some("hi"))
        }
    };
    let ends = turns
        .iter()
        .enumerate()
        .map(|(n, turn)| store.finish(&turn.lease, end(n)));
    for (n, ended) in join_all(ends).await.into_iter().enumerate() {
        match ended {
            Ok(ended) => drop(closed(ended)),
            Err(error) => assert_eq!(
                (n, matches!(error, StoreError::Statement(_))),
                (7, true),
                "{error:?}"
            ),
        }
    }
    let unfinished = "SELECT count(*) FROM runs WHERE finished_at IS NULL";
    assert_eq!(database.number(unfinished).await, 1);
    closed(
        store
            .finish(&turns[7].lease, completed(None))
            .await
            .unwrap(),
    );
    check_invariants(&database).await;
    store.close().await;
}

/// The server has committed, and its answer is lost.
#[tokio::test]
async fn batch_with_lost_response_returns_recorded_results() {
    let database = TestDatabase::postgres().await;
    let link = Link::to_postgres(&database.url()).await;
    let config = StoreConfig {
        url: Some(link.url.clone().into()),
        ..database.config()
    };
    let store = Store::open(&config).await.unwrap();
    let loses = async |held: &mut sqlx::PgConnection| {
        // Two batches are under way.
        blocked(&database, 2).await;
        link.valve.set(Weather {
            swallows: true,
            ..Weather::default()
        });
        held.execute("ROLLBACK").await.unwrap();
        let working = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                       AND application_name = 'threadkeeper' AND state <> 'idle'";
        while database.number(working).await > 0 {
            tokio::task::yield_now().await;
        }
        link.valve.cut();
        link.valve.set(Weather::default());
    };
    let all: Vec<_> = users()
        .into_iter()
        .map(|it| Admission {
            idempotency: Some(idempotency("k")),
            ..it
        })
        .collect();
    let mut held = database.lock("threads").await;
    let (admitted, ()) = tokio::join!(
        join_all(all.iter().map(|it| store.admit(it.clone()))),
        loses(&mut held)
    );
    let turns: Vec<StartedRun> = admitted
        .into_iter()
        .map(|it| started(it.unwrap()))
        .collect();
    for (turn, asked) in turns.iter().zip(&all) {
        assert_eq!(
            (turn.run.id, &turn.input[0]),
            (asked.run_id, &asked.message)
        );
    }
    assert_eq!(database.number("SELECT count(*) FROM runs").await, BATCH);
    assert_eq!(
        database.number("SELECT count(*) FROM messages").await,
        BATCH
    );

    let mut held = database.lock("threads").await;
    let binds = turns
        .iter()
        .map(|turn| bind(&store, &turn.lease, turn.run.id, OrphanId::new()));
    let (bound, ()) = tokio::join!(join_all(binds), loses(&mut held));
    assert!(bound.iter().all(|bound| *bound == Bound::Done), "{bound:?}");

    let mut held = database.lock("threads").await;
    let ends = turns
        .iter()
        .map(|turn| store.finish(&turn.lease, completed(Some("hi"))));
    let (ended, ()) = tokio::join!(join_all(ends), loses(&mut held));
    for ended in ended {
        let ended = closed(ended.unwrap());
        assert_eq!(
            (ended.run.status, ended.thread.message_count),
            (RunStatus::Completed, 2)
        );
    }
    assert_eq!(
        database.number("SELECT count(*) FROM messages").await,
        2 * BATCH
    );
    check_invariants(&database).await;
    store.close().await;
}

#[tokio::test]
async fn batched_admissions_return_individual_results() {
    for database in [TestDatabase::postgres().await, TestDatabase::sqlite().await] {
        let store = database.store().await;
        let with = |name, strategy| Admission {
            strategy,
            ..admission(&user(name))
        };
        for name in ["busy", "interrupted", "joined", "elsewhere"] {
            started(store.admit(admission(&user(name))).await.unwrap());
        }
        let (waiting, ..) = queued(store.admit(admission(&user("joined"))).await.unwrap());
        let keyed = Admission {
            idempotency: Some(idempotency("k")),
            ..admission(&user("repeated"))
        };
        started(store.admit(keyed.clone()).await.unwrap());
        let old = exchange(&store, &user("expired")).await;

        let all = [
            admission(&user("new")),
            with("busy", MultitaskStrategy::Reject),
            with("interrupted", MultitaskStrategy::Interrupt),
            with("joined", MultitaskStrategy::Merge),
            Admission {
                upstream: "other".to_owned(),
                ..admission(&user("elsewhere"))
            },
            Admission {
                run_id: RunId::new(),
                new_thread: ThreadId::new(),
                ..keyed
            },
            Admission {
                limits: limits(Duration::ZERO),
                ..admission(&user("expired"))
            },
        ];
        let admitted = join_all(all.iter().map(|it| store.admit(it.clone()))).await;
        let mut admitted = admitted.into_iter().map(Result::unwrap);
        let mut next = || admitted.next().unwrap();
        let new = started(next());
        assert_eq!(
            (new.thread.id, new.thread.previous_thread),
            (all[0].new_thread, None)
        );
        assert_eq!(next(), Admitted::Busy);
        let (lease, _, _, position) = queued(next());
        assert_eq!((lease.run_id, position), (all[2].run_id, 1));
        let Admitted::Merged { run, .. } = next() else {
            panic!("the message was not merged")
        };
        assert_eq!(run.id, waiting.run_id);
        assert_eq!(next(), Admitted::OtherUpstream("main".to_owned()));
        assert_eq!(next(), Admitted::Repeated);
        let fresh = started(next());
        assert_eq!(
            (fresh.thread.id, fresh.thread.previous_thread),
            (all[6].new_thread, Some(old.thread.id))
        );
        check_invariants(&database).await;
        store.close().await;
    }
}

/// The thread's row may be locked. A repeat of an accepted message is answered all the same.
#[tokio::test]
async fn idempotent_retry_takes_no_row_lock() {
    let database = TestDatabase::postgres().await;
    let store = database.store().await;
    let keyed = || Admission {
        idempotency: Some(idempotency("k")),
        ..admission(&user("alice"))
    };
    started(store.admit(keyed()).await.unwrap());
    let _held = database.lock("threads").await;
    let repeated = tokio::time::timeout(Duration::from_secs(5), store.admit(keyed())).await;
    assert_eq!(
        repeated.expect("the repeat waits for the lock").unwrap(),
        Admitted::Repeated
    );
}

async fn bind(store: &Store, lease: &RunLease, name: RunId, intent: OrphanId) -> Bound {
    let id = UpstreamThreadId(format!("conv_{name}"));
    let binding = Binding {
        id,
        intent,
        seeded: false,
        carried_users: 0,
    };
    store.bind_upstream_thread(lease, binding).await.unwrap()
}

#[tokio::test]
async fn batched_bindings_return_individual_results() {
    for database in [TestDatabase::postgres().await, TestDatabase::sqlite().await] {
        let store = database.store().await;
        let with = |name| Admission {
            intent: Some(OrphanId::new()),
            ..admission(&user(name))
        };
        let mut turns = Vec::new();
        for name in ["good", "lost", "gone"] {
            turns.push(started(store.admit(with(name)).await.unwrap()));
        }
        let intents: Vec<_> = turns.iter().map(|turn| turn.intent.unwrap()).collect();
        turns[1].lease.fence += 1;
        turns[2].lease.fence += 1;
        store.resolve(intents[2], Made::Nothing).await.unwrap();
        let binds = turns
            .iter()
            .zip(&intents)
            .map(|(it, intent)| bind(&store, &it.lease, it.run.id, *intent));
        assert_eq!(
            join_all(binds).await,
            [Bound::Done, Bound::Lost, Bound::Unrecorded]
        );
        for (n, left) in [0, 1, 0].into_iter().enumerate() {
            let left_over = store
                .upstream_orphans(turns[n].thread.id, false, 10)
                .await
                .unwrap();
            assert_eq!(left_over.len(), left, "{n}: {left_over:?}");
        }
        let bound = "SELECT count(*) FROM threads WHERE upstream_thread_id IS NOT NULL";
        assert_eq!(database.number(bound).await, 1);
        store.close().await;
    }
}

/// A queued run can be withdrawn at the moment in which the run before it finishes.
#[tokio::test]
async fn two_runs_of_one_thread_finish_concurrently() {
    for database in [TestDatabase::postgres().await, TestDatabase::sqlite().await] {
        let store = database.store().await;
        let key = user("alice");
        let active = started(store.admit(admission(&key)).await.unwrap());
        let (waiting, ..) = queued(store.admit(admission(&key)).await.unwrap());
        let withdrawn = RunEnd {
            status: RunStatus::Cancelled,
            said: UpstreamSync::Missing,
            ..completed(None)
        };
        let (one, other) = tokio::join!(
            store.finish(&active.lease, completed(Some("hi"))),
            store.finish(&waiting, withdrawn)
        );
        let counts = [one, other].map(|ended| closed(ended.unwrap()).thread.message_count);
        assert_eq!(counts, [2, 3]);
        check_invariants(&database).await;
        store.close().await;
    }
}

/// A message that joined a queued run has no run of its own by which a retry could recognise it.
#[tokio::test]
async fn merge_with_lost_response_is_applied_once() {
    let database = TestDatabase::postgres().await;
    let link = Link::to_postgres(&database.url()).await;
    let config = StoreConfig {
        url: Some(link.url.clone().into()),
        ..database.config()
    };
    let store = Store::open(&config).await.unwrap();
    let key = user("alice");
    started(store.admit(admission(&key)).await.unwrap());
    let (waiting, ..) = queued(store.admit(admission(&key)).await.unwrap());
    let mut held = sqlx::PgConnection::connect(&database.url()).await.unwrap();
    held.execute("BEGIN; LOCK TABLE threads IN SHARE MODE")
        .await
        .unwrap();
    let loses = async {
        blocked(&database, 1).await;
        link.valve.set(Weather {
            swallows: true,
            ..Weather::default()
        });
        held.execute("ROLLBACK").await.unwrap();
        while database
            .number("SELECT count(*) FROM runs WHERE jsonb_array_length(queued_input) = 2")
            .await
            == 0
        {
            tokio::task::yield_now().await;
        }
        link.valve.cut();
        link.valve.set(Weather::default());
    };
    let merge = Admission {
        strategy: MultitaskStrategy::Merge,
        ..admission(&key)
    };
    let (merged, ()) = tokio::join!(store.admit(merge), loses);
    let Admitted::Merged { run, .. } = merged.unwrap() else {
        panic!("the message was not merged")
    };
    assert_eq!(run.id, waiting.run_id);
    assert_eq!(
        database
            .number("SELECT count(*) FROM runs WHERE jsonb_array_length(queued_input) = 2")
            .await,
        1
    );
    check_invariants(&database).await;
    store.close().await;
}

/// A first attempt that was given up arrives after the retry has taken effect.
#[tokio::test]
async fn repeated_merge_is_applied_once() {
    let database = TestDatabase::postgres().await;
    let store = database.store().await;
    let key = user("alice");
    let active = started(store.admit(admission(&key)).await.unwrap());
    let (waiting, ..) = queued(store.admit(admission(&key)).await.unwrap());
    let merge = Admission {
        strategy: MultitaskStrategy::Merge,
        ..admission(&key)
    };
    let again = async || {
        let Admitted::Merged { run, .. } = store.admit(merge.clone()).await.unwrap() else {
            panic!("the message was not merged")
        };
        assert_eq!(run.id, waiting.run_id);
    };
    again().await;
    again().await;
    closed(
        store
            .finish(&active.lease, completed(Some("hi")))
            .await
            .unwrap(),
    );
    let turn = started_from_queue(store.start_queued(&waiting).await.unwrap());
    assert_eq!(turn.input.len(), 2);
    // The run has started by then.
    again().await;
    closed(
        store
            .finish(&turn.lease, completed(Some("hi")))
            .await
            .unwrap(),
    );
    check_invariants(&database).await;
    store.close().await;
}

/// Another replica creates the thread of a new key. Calls that arrive meanwhile wait alone, and
/// find the thread.
#[tokio::test]
async fn concurrent_replicas_create_one_thread_per_key() {
    let database = TestDatabase::postgres().await;
    let replicas = join_all((0..3).map(|_| database.store())).await;
    for round in 0..20 {
        let key = user(&format!("new {round}"));
        let all = replicas.iter().map(|store| store.admit(admission(&key)));
        let admitted: Vec<_> = join_all(all)
            .await
            .into_iter()
            .map(Result::unwrap)
            .collect();
        let begun = admitted
            .iter()
            .filter(|it| matches!(it, Admitted::Started(_)))
            .count();
        assert_eq!(begun, 1, "{admitted:?}");
    }
    assert_eq!(database.number("SELECT count(*) FROM threads").await, 20);
    check_invariants(&database).await;
    for store in replicas {
        store.close().await;
    }
}

/// The admission of a new conversation also records the intent to create its upstream thread.
#[tokio::test]
async fn admission_records_intent_only_for_new_thread() {
    for database in [TestDatabase::postgres().await, TestDatabase::sqlite().await] {
        let store = database.store().await;
        let key = user("alice");
        let with = || Admission {
            intent: Some(OrphanId::new()),
            ..admission(&key)
        };
        let first = with();
        let turn = started(store.admit(first.clone()).await.unwrap());
        assert_eq!(turn.intent, first.intent);
        let intents = store
            .upstream_orphans(turn.thread.id, false, 10)
            .await
            .unwrap();
        assert_eq!(intents.len(), 1);
        assert_eq!(intents[0].name, OrphanName::Row(first.intent.unwrap()));
        closed(
            store
                .finish(&turn.lease, completed(Some("hi")))
                .await
                .unwrap(),
        );
        let turn = started(store.admit(with()).await.unwrap());
        assert_eq!(turn.intent, None);
        assert_eq!(
            store
                .upstream_orphans(turn.thread.id, false, 10)
                .await
                .unwrap()
                .len(),
            1
        );
        store.close().await;
    }
}

//! The store while its server is away, and afterwards.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use threadkeeper::config::StoreConfig;
use threadkeeper::store::StoreError;

use super::*;
use crate::support::cluster::{Cluster, Stop};

/// Opens all connections of both pools.
async fn fill(store: &Store) {
    let calls = (0..64).map(async |_| {
        store
            .unsynced_messages(RunId::new(), None, 10)
            .await
            .unwrap();
        store.events(RunId::new(), 0).await.unwrap();
    });
    join_all(calls).await;
}

/// During the outage each call fails in time. Once the server is back, each call succeeds.
#[tokio::test]
async fn store_calls_succeed_right_after_outage() {
    let mut cluster = Cluster::start();
    let database = TestDatabase::on(&cluster).await;
    let config = StoreConfig {
        acquire_timeout: Duration::from_secs(1),
        ..database.config()
    };
    let store = Store::open(&config).await.unwrap();
    for how in [Stop::Fast, Stop::Immediate] {
        fill(&store).await;
        cluster.stop(how);
        for _ in 0..20 {
            let before = Instant::now();
            for error in [
                store.events(RunId::new(), 0).await.unwrap_err(),
                store
                    .unsynced_messages(RunId::new(), None, 10)
                    .await
                    .unwrap_err(),
                store.ready().await.unwrap_err(),
            ] {
                assert!(
                    matches!(error, StoreError::Unavailable(_)),
                    "{how:?}: {error:?}"
                );
            }
            assert!(
                before.elapsed() < Duration::from_secs(3),
                "{how:?}: {:?}",
                before.elapsed()
            );
        }
        cluster.start_again();
        fill(&store).await;
    }
    store.close().await;
}

/// A restart that the store did not notice fails the one call that finds out, not one call for
/// each connection.
#[tokio::test]
async fn unnoticed_database_restart_fails_at_most_one_call() {
    let mut cluster = Cluster::start();
    let database = TestDatabase::on(&cluster).await;
    let store = Store::open(&database.config()).await.unwrap();
    for how in [Stop::Fast, Stop::Immediate] {
        fill(&store).await;
        cluster.restart(how);
        let mut failed = 0;
        for _ in 0..40 {
            if let Err(error) = store.events(RunId::new(), 0).await {
                assert!(
                    matches!(error, StoreError::Unavailable(_)),
                    "{how:?}: {error:?}"
                );
                failed += 1;
            }
        }
        assert!(failed <= 1, "{how:?}: {failed}");
    }
    store.close().await;
}

/// A commit that hangs costs its caller at most the time limit for a call. Callers without a
/// connection wait at most the time limit for that.
#[tokio::test]
async fn hanging_commit_times_out() {
    let cluster = Cluster::start();
    let database = TestDatabase::on(&cluster).await;
    let limit = Duration::from_secs(1);
    let config = StoreConfig {
        acquire_timeout: limit,
        max_connections: 4,
        ..database.config()
    };
    let store = Store::open(&config).await.unwrap();
    let renew = || store.renew_replica(ReplicaId::new(), "127.0.0.1:1", Duration::from_mins(1));
    renew().await.unwrap();
    // Each commit waits for a standby that does not exist.
    let reload = "SELECT pg_reload_conf()";
    database
        .execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        .await;
    database.execute(reload).await;
    let names = "SELECT count(*) FROM pg_settings WHERE name = 'synchronous_standby_names' AND setting <> ''";
    while database.number(names).await == 0 {
        tokio::task::yield_now().await;
    }

    let begin = Instant::now();
    let others = async {
        while database
            .number("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
            .await
            == 0
        {
            tokio::task::yield_now().await;
        }
        let begin = Instant::now();
        let late = join_all((0..8).map(|_| renew())).await;
        assert!(
            late.iter()
                .all(|it| matches!(it, Err(StoreError::Unavailable(_)))),
            "{late:?}"
        );
        assert!(begin.elapsed() < limit * 3 / 2, "{:?}", begin.elapsed());
        // Reads continue over the other connections.
        store.events(RunId::new(), 0).await.unwrap();
    };
    // An open connection may learn of the setting a moment later.
    let first = async {
        loop {
            if let Err(error) = renew().await {
                return error;
            }
        }
    };
    let (first, ()) = tokio::join!(first, others);
    assert!(matches!(first, StoreError::Unavailable(_)), "{first:?}");
    assert!(
        begin.elapsed() < Duration::from_secs(14),
        "{:?}",
        begin.elapsed()
    );

    database
        .execute("ALTER SYSTEM RESET synchronous_standby_names")
        .await;
    database.execute(reload).await;
    renew().await.unwrap();
    store.close().await;
}

//! Notifications between replicas.

use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use threadkeeper::store::{Notification, Store};

use super::*;
use crate::support::cluster::{Cluster, Stop};

const LIMIT: Duration = Duration::from_secs(20);

async fn next(notifications: &mut BoxStream<'static, Notification>) -> Option<Notification> {
    tokio::time::timeout(LIMIT, notifications.next())
        .await
        .expect("a notification arrives")
}

fn some_notifications(runs: usize) -> Vec<Notification> {
    let of_runs = (0..runs).map(|_| RunId::new()).flat_map(|run| {
        [
            Notification::Thread(ThreadId::new()),
            Notification::Run(run),
            Notification::Asked(run),
            Notification::Followed(run),
        ]
    });
    [Notification::Orphans].into_iter().chain(of_runs).collect()
}

#[tokio::test]
async fn notifications_reach_all_replicas_of_database() {
    let (database, other) = (
        TestDatabase::postgres().await,
        TestDatabase::postgres().await,
    );
    let (here, there, elsewhere) = (
        database.store().await,
        database.store().await,
        other.store().await,
    );
    let mut listeners = [
        here.notifications(),
        there.notifications(),
        elsewhere.notifications(),
    ];
    for listener in &mut listeners {
        assert_eq!(
            next(listener).await,
            Some(Notification::Missed),
            "a listener gets no earlier notifications"
        );
    }
    // These are far more than one Postgres notification can carry.
    let notifications = some_notifications(300);
    here.notify_replicas(&[]).await.unwrap();
    here.notify_replicas(&[Notification::Missed]).await.unwrap();
    here.notify_replicas(&notifications).await.unwrap();
    for listener in &mut listeners[..2] {
        let mut heard = vec![];
        while heard.len() < notifications.len() {
            heard.push(next(listener).await.unwrap());
        }
        assert_eq!(heard, notifications);
    }
    // Unknown words of another version are skipped one by one.
    let run = RunId::new();
    let notify = format!(
        "NOTIFY threadkeeper, 'x1 r{} later o'; NOTIFY threadkeeper, 'x'",
        run.uuid().simple()
    );
    database.execute(&notify).await;
    for listener in &mut listeners[..2] {
        assert_eq!(next(listener).await, Some(Notification::Run(run)));
        assert_eq!(next(listener).await, Some(Notification::Orphans));
    }
    // Listeners on another database of the server get none of them.
    elsewhere
        .notify_replicas(&[Notification::Orphans])
        .await
        .unwrap();
    assert_eq!(next(&mut listeners[2]).await, Some(Notification::Orphans));

    here.close().await;
    assert_eq!(
        next(&mut listeners[0]).await,
        None,
        "the stream ends with its store"
    );
    there
        .notify_replicas(&[Notification::Orphans])
        .await
        .unwrap();
    assert_eq!(next(&mut listeners[1]).await, Some(Notification::Orphans));
    there.close().await;
    elsewhere.close().await;
}

#[tokio::test]
async fn interrupted_listener_reports_missed_notifications() {
    let mut cluster = Cluster::start();
    let database = TestDatabase::on(&cluster).await;
    let store = Store::open(&database.config()).await.unwrap();
    let mut notifications = store.notifications();
    assert_eq!(next(&mut notifications).await, Some(Notification::Missed));
    for round in 0..3 {
        match round {
            0 => cluster.restart(Stop::Fast),
            1 => cluster.restart(Stop::Immediate),
            _ => {
                let cut = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'";
                assert_eq!(database.number(cut).await, 1);
            }
        }
        assert_eq!(
            next(&mut notifications).await,
            Some(Notification::Missed),
            "{round}"
        );
        // The listener noticed the restart, so the store knows that its other connections are
        // gone, too.
        store
            .notify_replicas(&[Notification::Orphans])
            .await
            .unwrap();
        assert_eq!(next(&mut notifications).await, Some(Notification::Orphans));
    }
    // While the server is away, the stream is silent and does not end.
    cluster.stop(Stop::Fast);
    let silence = tokio::time::timeout(Duration::from_millis(500), notifications.next()).await;
    assert!(silence.is_err(), "{silence:?}");
    cluster.start_again();
    assert_eq!(next(&mut notifications).await, Some(Notification::Missed));
    cluster.stop(Stop::Fast);
    store.close().await;
    assert_eq!(
        next(&mut notifications).await,
        None,
        "the stream ends even so"
    );
}

#[tokio::test]
async fn sqlite_store_delivers_no_notifications() {
    let database = TestDatabase::sqlite().await;
    let store = database.store().await;
    let mut notifications = store.notifications();
    store.notify_replicas(&some_notifications(1)).await.unwrap();
    assert!(futures_util::poll!(notifications.next()).is_pending());
    store.close().await;
    assert_eq!(next(&mut notifications).await, None);
}

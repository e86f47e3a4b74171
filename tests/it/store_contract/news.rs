//! What replicas tell each other.

use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use threadkeeper::store::{News, Store};

use super::*;
use crate::support::cluster::{Cluster, Stop};

const LIMIT: Duration = Duration::from_secs(20);

async fn next(news: &mut BoxStream<'static, News>) -> Option<News> {
    tokio::time::timeout(LIMIT, news.next()).await.expect("something is told")
}

fn some_news(runs: usize) -> Vec<News> {
    let of_runs = (0..runs).map(|_| RunId::new()).flat_map(|run| {
        [News::Thread(ThreadId::new()), News::Run(run), News::Asked(run), News::Followed(run)]
    });
    [News::Orphans].into_iter().chain(of_runs).collect()
}

#[tokio::test]
async fn news_reaches_all_replicas_of_database() {
    let (database, other) = (TestDatabase::postgres().await, TestDatabase::postgres().await);
    let (here, there, elsewhere) = (database.store().await, database.store().await, other.store().await);
    let mut ears = [here.news(), there.news(), elsewhere.news()];
    for ear in &mut ears {
        assert_eq!(next(ear).await, Some(News::Missed), "nobody knows what was told before");
    }
    // Far more than fits into one notification.
    let news = some_news(300);
    here.tell(&[]).await.unwrap();
    here.tell(&[News::Missed]).await.unwrap();
    here.tell(&news).await.unwrap();
    for ear in &mut ears[..2] {
        let mut heard = vec![];
        while heard.len() < news.len() {
            heard.push(next(ear).await.unwrap());
        }
        assert_eq!(heard, news);
    }
    // What another version tells is passed over, word by word.
    let run = RunId::new();
    let notify =
        format!("NOTIFY threadkeeper, 'x1 r{} later o'; NOTIFY threadkeeper, 'x'", run.uuid().simple());
    database.execute(&notify).await;
    for ear in &mut ears[..2] {
        assert_eq!(next(ear).await, Some(News::Run(run)));
        assert_eq!(next(ear).await, Some(News::Orphans));
    }
    // Another database of the server heard none of it.
    elsewhere.tell(&[News::Orphans]).await.unwrap();
    assert_eq!(next(&mut ears[2]).await, Some(News::Orphans));

    here.close().await;
    assert_eq!(next(&mut ears[0]).await, None, "it ends with its store");
    there.tell(&[News::Orphans]).await.unwrap();
    assert_eq!(next(&mut ears[1]).await, Some(News::Orphans));
    there.close().await;
    elsewhere.close().await;
}

#[tokio::test]
async fn interrupted_listener_reports_missed_news() {
    let mut cluster = Cluster::start();
    let database = TestDatabase::on(&cluster).await;
    let store = Store::open(&database.config()).await.unwrap();
    let mut news = store.news();
    assert_eq!(next(&mut news).await, Some(News::Missed));
    for round in 0..3 {
        match round {
            0 => cluster.restart(Stop::Fast),
            1 => cluster.restart(Stop::Immediate),
            _ => {
                let cut = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'";
                assert_eq!(database.number(cut).await, 1);
            }
        }
        assert_eq!(next(&mut news).await, Some(News::Missed), "{round}");
        // It found out about the restart, so the store knows that its other connections are gone too.
        store.tell(&[News::Orphans]).await.unwrap();
        assert_eq!(next(&mut news).await, Some(News::Orphans));
    }
    // While the server is away, nothing is heard, and nothing ends.
    cluster.stop(Stop::Fast);
    let silence = tokio::time::timeout(Duration::from_millis(500), news.next()).await;
    assert!(silence.is_err(), "{silence:?}");
    cluster.start_again();
    assert_eq!(next(&mut news).await, Some(News::Missed));
    cluster.stop(Stop::Fast);
    store.close().await;
    assert_eq!(next(&mut news).await, None, "it ends even so");
}

#[tokio::test]
async fn sqlite_store_delivers_no_news() {
    let database = TestDatabase::sqlite().await;
    let store = database.store().await;
    let mut news = store.news();
    store.tell(&some_news(1)).await.unwrap();
    assert!(futures_util::poll!(news.next()).is_pending());
    store.close().await;
    assert_eq!(next(&mut news).await, None);
}

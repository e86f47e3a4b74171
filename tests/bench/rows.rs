//! The effect of a locked row on callers of other conversations.

use std::time::Instant;

use sqlx::{Connection, Executor, PgConnection};
use tokio::task::JoinSet;

use super::Args;
use super::answers::Answers;
use super::callers::Callers;
use super::figures::{median_of, micros};
use super::setting::{Kind, Setting};
use super::turns::USERS;

/// Number of callers in a closed loop. None of them uses the locked row.
const AT_ONCE: usize = 64;
/// A long transaction, as an operator or a dump may have one.
const LOCK: &str =
    "BEGIN; SELECT 1 FROM threads WHERE user_key = 'user-0' AND lifecycle = 'current' FOR UPDATE";

pub(crate) async fn report(args: &Args, database: Kind) {
    if database == Kind::Sqlite {
        println!("SQLite has no row locks");
        return;
    }
    let setting = Setting::new(database, !args.share, &[], "").await;
    let locked = setting.known_callers(1).await;
    let others = Callers::new(setting.gateway.address, USERS).who_are("other");
    others.each_once().await;
    let mut rounds = vec![];
    for _ in 0..args.rounds {
        let free = others.keep_asking(AT_ONCE, args.time).await;
        let mut holder = PgConnection::connect(&setting.database.url())
            .await
            .unwrap();
        holder.execute(LOCK).await.unwrap();
        let (mut waits, locked, begun) = (JoinSet::new(), locked.clone(), Instant::now());
        waits.spawn(async move { (locked.ask().await, begun.elapsed()) });
        let beside = others.keep_asking(AT_ONCE, args.time).await;
        holder.close().await.unwrap();
        let (status, took) = waits.join_next().await.unwrap().unwrap();
        println!(
            "{database:?}, a message to the locked row: status {status:?} after {} ms",
            took.as_millis()
        );
        rounds.push((free, beside));
    }
    let of = |figure: fn(&Answers) -> f64| {
        (
            median_of(&rounds, |(free, _)| figure(free)),
            median_of(&rounds, |(_, beside)| figure(beside)),
        )
    };
    let (free, beside) = of(Answers::rate);
    let ratio = median_of(&rounds, |(free, beside)| beside.rate() / free.rate());
    println!("{database:?}, {AT_ONCE} callers elsewhere, without a locked row and beside one:");
    println!("  {free:.0} and {beside:.0} turns/s: {ratio:.2} of them");
    let (free, beside) = of(|it| micros(it.taken.p99()));
    println!("  time to the answer: p99 {free:.0} µs and {beside:.0} µs");
}

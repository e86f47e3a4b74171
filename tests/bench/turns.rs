//! Rate, latency and cost of turns.

use super::Args;
use super::answers::Answers;
use super::callers::{Callers, Form};
use super::figures::{count, median_of, micros, number};
use super::meter::{Work, commit_latency, size};
use super::setting::{Kind, Setting};

pub(crate) const USERS: usize = 4000;

pub(crate) async fn report(args: &Args, database: Kind) {
    let setting = Setting::new(database, !args.share, &[], "").await;
    let callers = setting.known_callers(USERS).await;
    println!(
        "{database:?}: a commit takes {:.0} µs",
        micros(commit_latency(&setting.database).await)
    );
    for form in &args.form {
        let (before, mut turns) = (size(&setting).await, 0);
        for at_once in &args.callers {
            turns += measure(
                args,
                &setting,
                &callers.who_ask_for(*form),
                (*form, *at_once),
            )
            .await;
        }
        let grown = number(size(&setting).await - before) / count(turns);
        println!("{database:?}, {form:?}: the database grows by {grown:.0} bytes a turn");
    }
}

/// Measures and prints. Returns the number of turns that were made.
async fn measure(
    args: &Args,
    setting: &Setting,
    callers: &Callers,
    (form, at_once): (Form, usize),
) -> usize {
    let mut rounds = vec![];
    for _ in 0..args.rounds {
        let before = Work::of(setting).await;
        let answers = callers.keep_asking(at_once, args.time).await;
        let work = Work::of(setting).await.since(before);
        assert_eq!((answers.failed.len(), answers.odd), (0, 0), "{answers:?}");
        rounds.push((answers, work));
    }
    println!("{:?}, {form:?}, {at_once} at once:", setting.kind);
    print(&rounds, setting.kind);
    rounds.iter().map(|(answers, _)| answers.taken.len()).sum()
}

/// Prints the medians of the rounds.
fn print(rounds: &[(Answers, Work)], database: Kind) {
    let of = |figure: fn(&Answers) -> f64| median_of(rounds, |(answers, _)| figure(answers));
    let a_turn = |figure: fn(&Work) -> f64| {
        median_of(rounds, |(answers, work)| {
            figure(work) / count(answers.taken.len())
        })
    };
    println!(
        "  {:.0} turns/s, {:.0} messages refused",
        of(Answers::rate),
        of(|it| count(it.refused.len()))
    );
    println!(
        "  time to the answer: p50 {:.0} µs, p99 {:.0} µs, p99.9 {:.0} µs",
        of(|it| micros(it.taken.p50())),
        of(|it| micros(it.taken.p99())),
        of(|it| micros(it.taken.permille(999)))
    );
    if rounds.iter().any(|(answers, _)| answers.first.len() > 0) {
        println!(
            "  time to the first token: p50 {:.0} µs, p99 {:.0} µs",
            of(|it| micros(it.first.p50())),
            of(|it| micros(it.first.p99()))
        );
    }
    println!(
        "  processor time a turn: gateway {:.0} µs, simulator {:.0} µs, callers {:.0} µs",
        a_turn(|it| micros(it.gateway)),
        a_turn(|it| micros(it.simulator)),
        a_turn(|it| micros(it.callers))
    );
    if database == Kind::Postgres {
        println!(
            "  Postgres a turn: {:.0} µs of processor time, {:.0} bytes of WAL, {:.1} commits",
            a_turn(|it| micros(it.postgres)),
            a_turn(|it| number(it.wal)),
            a_turn(|it| number(it.commits))
        );
    }
}

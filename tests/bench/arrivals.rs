//! An open loop: messages arrive at a given rate, whether or not earlier ones have been answered.
//!
//! A closed loop sends nothing while the gateway is slow. So it leaves out the latencies that
//! users would meet.

use std::time::Duration;

use tokio::time::sleep;

use super::Args;
use super::answers::Answers;
use super::figures::{count, median_of, micros};
use super::setting::{Kind, Setting};
use super::turns::USERS;

/// Number of callers in the closed loop that finds the sustainable rate.
const AT_ONCE: usize = 16;
/// Pause after a measurement, until no message waits or is refused because of it.
const CALM: Duration = Duration::from_secs(2);
/// Time in which a queue grows to its full length. Its messages do not count.
const ONSET: Duration = Duration::from_secs(4);

/// The answers of an open loop, and the sustainable rate of its closed loop.
struct Round {
    sustained: f64,
    answers: Answers,
}

pub(crate) async fn report(args: &Args, database: Kind) {
    let setting = Setting::new(database, !args.share, &[], "").await;
    let callers = setting.known_callers(USERS).await;
    let mut loads: Vec<(f64, Vec<Round>)> = args.load.iter().map(|load| (*load, vec![])).collect();
    for _ in 0..args.rounds {
        let sustained = callers.keep_asking(AT_ONCE, args.time).await.rate();
        for (load, rounds) in &mut loads {
            sleep(CALM).await;
            let answers = callers.arrive(sustained * *load, ONSET, args.time).await;
            rounds.push(Round { sustained, answers });
        }
        sleep(CALM).await;
    }
    for (load, rounds) in loads {
        println!(
            "{database:?}, {:.0} % of the rate of {AT_ONCE} callers in a closed loop:",
            load * 100.0
        );
        print(&rounds);
    }
}

/// Prints the medians of the rounds.
fn print(rounds: &[Round]) {
    let of = |figure: fn(&Answers) -> f64| median_of(rounds, |round| figure(&round.answers));
    println!(
        "  {:.0} messages/s offered, {:.0} turns/s made: {:.2} of the {:.0} turns/s of the closed loop",
        of(Answers::offered),
        of(Answers::rate),
        median_of(rounds, |round| round.answers.rate() / round.sustained),
        median_of(rounds, |round| round.sustained)
    );
    println!(
        "  time from arrival to the answer: p50 {:.0} µs, p99 {:.0} µs, p99.9 {:.0} µs",
        of(|it| micros(it.taken.p50())),
        of(|it| micros(it.taken.p99())),
        of(|it| micros(it.taken.permille(999)))
    );
    println!(
        "  {:.0} % of the messages refused; {:.0} failed, or answered in another way",
        of(|it| 100.0 * count(it.refused.len()) / count(it.len())),
        of(|it| count(it.failed.len() + it.odd))
    );
    if rounds.iter().any(|round| round.answers.refused.len() > 0) {
        println!(
            "  time from arrival to the refusal: p99 {:.0} µs",
            of(|it| micros(it.refused.p99()))
        );
    }
}

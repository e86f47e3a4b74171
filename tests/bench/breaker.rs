//! Compares what users get of a failing upstream with and without the circuit breaker.

use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};

use super::Args;
use super::answers::Answers;
use super::callers::Callers;
use super::connection::Connection;
use super::figures::{count, median};
use super::setting::{Kind, Setting};

/// Number of users. Each sends the next message once the last one is answered.
const USERS: usize = 24;
/// Pause of a user after a failure.
const PAUSE: Duration = Duration::from_secs(1);
/// Time that the upstream takes for a reply.
const LATENCY: &str = "200ms";

/// A way in which an upstream fails.
struct Weather {
    name: &'static str,
    /// Percentage of calls that are answered with 503.
    percent: u8,
    /// Lengths of the failing and of the working phase, which alternate. `None` means that the
    /// upstream fails all the time.
    bursts: Option<(Duration, Duration)>,
}

const fn steady(name: &'static str, percent: u8) -> Weather {
    Weather {
        name,
        percent,
        bursts: None,
    }
}

const fn bursts(name: &'static str, percent: u8, down: u64, up: u64) -> Weather {
    Weather {
        name,
        percent,
        bursts: Some((Duration::from_secs(down), Duration::from_secs(up))),
    }
}

const WEATHERS: [Weather; 9] = [
    steady("10 % fail", 10),
    steady("30 % fail", 30),
    steady("50 % fail", 50),
    steady("100 % fail", 100),
    bursts("10 % fail for 3 s of every 10 s", 10, 3, 7),
    bursts("30 % fail for 3 s of every 10 s", 30, 3, 7),
    bursts("50 % fail for 3 s of every 10 s", 50, 3, 7),
    bursts("100 % fail for 3 s of every 10 s", 100, 3, 7),
    bursts("100 % fail for 20 s of every 40 s", 100, 20, 20),
];

pub(crate) async fn report(args: &Args, database: Kind) {
    for weather in WEATHERS {
        // Both run at the same time, so that they share the machine's good and bad moments.
        let (mut with, mut without) = (vec![], vec![]);
        for _ in 0..args.rounds {
            let runs = (
                run(args, database, &weather, true),
                run(args, database, &weather, false),
            );
            let (one, other) = tokio::join!(runs.0, runs.1);
            with.push(one);
            without.push(other);
        }
        println!("{database:?}, {}", weather.name);
        println!("  with the breaker:    {}", told(&with));
        println!("  without the breaker: {}", told(&without));
    }
}

/// Returns the medians of the rounds as text.
fn told(rounds: &[Answers]) -> String {
    let of = |figure: fn(&Answers) -> f64| median(rounds.iter().map(figure).collect());
    format!(
        "{:.0} replies ({:.1}/s), p50 {:.2} s, p99 {:.2} s; {:.0} failures, told after p50 {:.2} s, p99 {:.2} s; {:.0} odd",
        of(|it| count(it.taken.len())),
        of(Answers::rate),
        of(|it| it.taken.p50().as_secs_f64()),
        of(|it| it.taken.p99().as_secs_f64()),
        of(|it| count(it.failed.len())),
        of(|it| it.failed.p50().as_secs_f64()),
        of(|it| it.failed.p99().as_secs_f64()),
        of(|it| count(it.refused.len() + it.odd)),
    )
}

async fn run(args: &Args, database: Kind, weather: &Weather, breaker: bool) -> Answers {
    let upstream = if breaker {
        ""
    } else {
        "breaker_min_requests = 0"
    };
    let simulator = ["--latency", LATENCY];
    let setting = Setting::with_upstream(database, !args.share, &simulator, "", upstream).await;
    let callers = Callers::new(setting.gateway.address, USERS).who_pause(PAUSE);
    callers.each_once().await;
    let mut control = Connection::open(setting.simulator.address).await;
    let time = weather
        .bursts
        .map_or(args.time, |(down, up)| args.time.max(down + up));
    let fails = async {
        let Some((down, up)) = weather.bursts else {
            set_fault(&mut control, Some(weather.percent)).await;
            sleep(time).await;
            return;
        };
        let begun = Instant::now();
        let mut at = begun;
        while at < begun + time {
            set_fault(&mut control, Some(weather.percent)).await;
            sleep_until(at + down).await;
            set_fault(&mut control, None).await;
            at += down + up;
            sleep_until(at).await;
        }
    };
    let (answers, ()) = tokio::join!(callers.keep_asking(USERS, time), fails);
    answers
}

/// Makes this percentage of all calls fail, or none.
async fn set_fault(control: &mut Connection, percent: Option<u8>) {
    let (method, body) = match percent {
        Some(percent) => (
            "POST",
            format!(
                "{{\"on\":\"any\",\"fault\":\"status=503 chance={percent}\",\"times\":{}}}",
                u32::MAX
            ),
        ),
        None => ("DELETE", String::new()),
    };
    let request = format!(
        "{method} /_simulator/faults HTTP/1.1\r\nhost: simulator\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    assert_eq!(control.ask(&request).await, Some(200));
}

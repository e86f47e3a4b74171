//! What becomes of turns when far more are asked for than can be had.

use std::time::Duration;

use tokio::time::sleep;

use super::Args;
use super::figures::{median, micros};
use super::setting::{Kind, Setting};
use super::turns::USERS;

/// Callers who keep a processor busy, and whom nobody refuses.
const AT_ONCE: usize = 8;
/// How much more than can be sustained.
const TIMES: f64 = 4.0;
/// Of the rate that can be sustained: what is no load to speak of.
const LIGHT: f64 = 0.1;
/// After an overload, until nobody is refused because of it.
const CALM: Duration = Duration::from_secs(2);
/// What comes first counts as a burst, is let in, and waits: it is not what this is about.
const ONSET: Duration = Duration::from_secs(1);

pub(crate) async fn report(args: &Args, database: Kind) {
    let setting = Setting::new(database, !args.share, &[], "[runs]\nshed_load = true\n").await;
    let callers = setting.known_callers(USERS).await;
    let (mut ratios, mut goodputs) = (vec![], vec![]);
    for _ in 0..args.rounds {
        sleep(CALM).await;
        let sustained = callers.keep_asking(AT_ONCE, args.time).await;
        let rate = sustained.rate();
        let light = callers.arrive(rate * LIGHT, ONSET, args.time).await;
        let heavy = callers.arrive(rate * TIMES, ONSET, args.time).await;
        println!(
            "{database:?}, {AT_ONCE} callers in turn: {rate:.0} turns/s, {}; {} refused",
            sustained.taken,
            sustained.refused.len()
        );
        println!("  {:.0} messages/s: {} answered, {}", rate * LIGHT, light.taken.len(), light.taken);
        println!(
            "  {:.0} messages/s: {} answered ({:.0}/s), {}; {} refused, {}; {} odd",
            rate * TIMES,
            heavy.taken.len(),
            heavy.rate(),
            heavy.taken,
            heavy.refused.len(),
            heavy.refused,
            heavy.failed.len() + heavy.odd
        );
        ratios.push(micros(heavy.taken.p99()) / micros(light.taken.p99()));
        goodputs.push(heavy.rate() / rate);
    }
    println!(
        "  medians: p99 is {:.1} times that of a light load, and {:.2} of the turns of {AT_ONCE} callers are made",
        median(ratios),
        median(goodputs)
    );
}

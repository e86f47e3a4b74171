//! How many turns a second there are, and how long they take.

use super::Args;
use super::figures::{median, micros};
use super::setting::{Kind, Setting};

pub(crate) const USERS: usize = 4000;

pub(crate) async fn report(args: &Args, database: Kind) {
    // All that can be done, however long it takes.
    let setting = Setting::new(database, !args.share, &[], "").await;
    let callers = setting.known_callers(USERS).await;
    for (name, at_once) in [("one caller", 1), ("16 callers", 16)] {
        let (mut rates, mut halves, mut tails, mut costs) = (vec![], vec![], vec![], vec![]);
        for _ in 0..args.rounds {
            let before = setting.gateway.cpu();
            let answers = callers.keep_asking(at_once, args.time).await;
            let cpu = setting.gateway.cpu().saturating_sub(before);
            let others = (answers.refused.len(), answers.failed.len(), answers.odd);
            assert_eq!(others, (0, 0, 0), "{answers:?}");
            rates.push(answers.rate());
            halves.push(micros(answers.taken.p50()));
            tails.push(micros(answers.taken.p99()));
            costs.push(micros(cpu) / super::figures::count(answers.taken.len()));
        }
        println!(
            "{database:?}, {name}: {:.0} turns/s, p50 {:.0} µs, p99 {:.0} µs, processor time of the gateway {:.0} µs a turn",
            median(rates),
            median(halves),
            median(tails),
            median(costs)
        );
    }
}

//! The processor time of refusals.

use std::time::Duration;

use tokio::time::timeout;

use super::Args;
use super::callers::Callers;
use super::figures::{count, median, micros};
use super::setting::{Kind, Setting};

const PATIENCE: Duration = Duration::from_millis(200);
const KEY: &str = "a-key-that-is-long-enough-for-it";

pub(crate) async fn report(args: &Args, database: Kind) {
    let keys = format!("[auth.keys.bench]\nkey = \"{KEY}\"\nscope = \"chat\"\n");
    let known = format!("authorization: Bearer {KEY}\r\n");
    let kinds: [(&str, &str, &str, usize); 4] = [
        ("no key", &keys, "", 0),
        (
            "too many requests of a user",
            "[limits]\nuser_messages = \"1/d\"\n",
            "",
            0,
        ),
        (
            "too large a body",
            "[server]\nmax_body_bytes = 16384\n",
            "",
            100_000,
        ),
        (
            "no free seat",
            &format!("{keys}[runs]\nmax_runs = 1\n"),
            &known,
            0,
        ),
    ];
    for (name, settings, head, length) in kinds {
        let setting = Setting::new(database, !args.share, &["--latency", "1m"], settings).await;
        let callers = Callers::new(setting.gateway.address, 1).with_head(head);
        // The first message holds the only permit, and has used the user's only request.
        let holder = callers.clone();
        let mut held = tokio::task::JoinSet::new();
        held.spawn(async move { holder.ask().await });
        let callers = callers.who_say("x".repeat(length.max(1)));
        // Whichever request is first: in the end one is refused.
        while !matches!(timeout(PATIENCE, callers.ask()).await, Ok(Some(401..=503))) {}
        let mut costs = vec![];
        for _ in 0..args.rounds {
            let before = setting.gateway.cpu();
            let answers = callers.keep_asking(16, args.time / 4).await;
            let cpu = setting.gateway.cpu().saturating_sub(before);
            costs.push(micros(cpu) / count(answers.refused.len()));
        }
        println!(
            "{database:?}, {name}: {:.0} µs of processor time",
            median(costs)
        );
    }
}

//! Measures the real binary, and reports: `cargo bench -- overload`.
//!
//! A gateway and a simulator as processes of their own, a database of its own, callers in this process. Nothing here
//! passes or fails. What it prints holds for this machine at this moment: compare figures of one run only.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a report; what goes wrong ends it")]

mod breaker;
mod callers;
#[path = "../it/support/cluster.rs"]
#[expect(dead_code, reason = "the tests use more of it")]
mod cluster;
#[path = "../it/support/database.rs"]
#[expect(dead_code, reason = "the tests use more of it")]
mod database;
mod existence;
mod figures;
mod overload;
#[path = "../it/support/postgres.rs"]
mod postgres;
mod process;
mod refusals;
mod setting;
mod turns;

use std::time::Duration;

use clap::{Parser, ValueEnum};
use humantime_serde::re::humantime::parse_duration;

use self::setting::Kind;

/// Measure the gateway.
#[derive(Clone, Debug, Parser)]
struct Args {
    /// What to measure; all of it if none is named.
    what: Vec<What>,
    /// Where the gateway keeps its record; each in turn if left out.
    #[arg(long)]
    database: Option<Kind>,
    /// How long each measurement takes, once it has warmed up.
    #[arg(long, default_value = "5s", value_parser = parse_duration)]
    time: Duration,
    /// How often each is made, the median counts.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Let all share all processors. Otherwise the gateway and its database have the first one, the callers and the upstream
    /// the others.
    #[arg(long)]
    share: bool,
    /// Cargo says so to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum What {
    /// Turns a second with 16 callers, and how long they take.
    Turns,
    /// What becomes of turns at four times the rate that can be sustained.
    Overload,
    /// What a refusal of each kind costs.
    Refusals,
    /// Whether the time of a 404 tells that something is there.
    Existence,
    /// What users get of an upstream that fails, with the breaker and without it. Takes minutes.
    Breaker,
}

fn main() {
    let args = Args::parse();
    if cfg!(debug_assertions) {
        println!("This is a build for debugging: the figures mean nothing.");
    }
    let all = [What::Turns, What::Overload, What::Refusals, What::Existence, What::Breaker];
    let what = if args.what.is_empty() { &all[..] } else { &args.what };
    let databases = args.database.map_or(vec![Kind::Sqlite, Kind::Postgres], |one| vec![one]);
    if !args.share {
        process::stay_on("0");
    }
    if databases.contains(&Kind::Postgres) && std::env::var_os("DATABASE_URL").is_none() {
        postgres::url();
    }
    if !args.share {
        process::leave_the_first_processor();
    }
    // Made after the processors were chosen, so that its threads keep to them.
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    for database in databases {
        for what in what {
            match what {
                What::Turns => runtime.block_on(turns::report(&args, database)),
                What::Overload => runtime.block_on(overload::report(&args, database)),
                What::Refusals => runtime.block_on(refusals::report(&args, database)),
                What::Existence => runtime.block_on(existence::report(&args, database)),
                What::Breaker => runtime.block_on(breaker::report(&args, database)),
            }
        }
    }
}

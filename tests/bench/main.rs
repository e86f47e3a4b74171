//! Measures the real binary, and reports: `cargo bench --bench load -- arrivals`.
//!
//! A gateway and a simulator as processes of their own, a database of its own, callers in this process. Nothing here
//! passes or fails. What it prints holds for this machine at this moment: compare figures of one run only.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a report; what goes wrong ends it"
)]

mod answers;
mod arrivals;
mod breaker;
mod callers;
#[path = "../it/support/cluster.rs"]
#[expect(dead_code, reason = "the tests use more of it")]
mod cluster;
mod connection;
#[path = "../it/support/database.rs"]
#[expect(dead_code, reason = "the tests use more of it")]
mod database;
mod existence;
mod figures;
mod floor;
mod meter;
mod nginx;
mod peers;
#[path = "../it/support/postgres.rs"]
mod postgres;
mod process;
mod refusals;
mod rows;
mod setting;
mod streams;
mod turns;

use std::time::Duration;

use clap::{Parser, ValueEnum};
use humantime_serde::re::humantime::parse_duration;

use self::callers::Form;
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
    /// How many callers ask at once, each after the answer to the last: `turns` and `peers` measure each.
    #[arg(long, value_delimiter = ',', default_value = "1,16,64,256")]
    callers: Vec<usize>,
    /// What they ask for: `turns` and `peers` measure each.
    #[arg(long, value_delimiter = ',', default_value = "known")]
    form: Vec<Form>,
    /// Rates of an open loop, as parts of the rate of 16 callers in a closed loop: `arrivals` measures each.
    #[arg(long, value_delimiter = ',', default_value = "0.6,1,2,4")]
    load: Vec<f64>,
    /// How many streams are open at once: `streams` measures them.
    #[arg(long, default_value_t = 2000)]
    streams: usize,
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
    /// A closed loop: turns a second, latencies, time to the first token, processor time, and the database's growth.
    Turns,
    /// An open loop at parts and multiples of the sustainable rate: turns a second, refusals, latencies from the arrival.
    Arrivals,
    /// The same callers at the gateway, at the upstream alone and through nginx; two Postgres calls a turn by pgbench.
    Peers,
    /// Rate and p99 of 64 callers beside a locked row of another conversation. Postgres only.
    Rows,
    /// Memory of the gateway for each stream that is open.
    Streams,
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
    let what = if args.what.is_empty() {
        What::value_variants()
    } else {
        &args.what
    };
    let databases = args
        .database
        .map_or(vec![Kind::Sqlite, Kind::Postgres], |one| vec![one]);
    process::raise_open_files();
    if !args.share {
        process::stay_on("0");
    }
    if databases.contains(&Kind::Postgres) && setting::is_server_ours() {
        setting::server();
    }
    if !args.share {
        process::leave_the_first_processor();
    }
    // Made after the processors were chosen, so that its threads keep to them.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    for database in databases {
        for what in what {
            match what {
                What::Turns => runtime.block_on(turns::report(&args, database)),
                What::Arrivals => runtime.block_on(arrivals::report(&args, database)),
                What::Peers => runtime.block_on(peers::report(&args, database)),
                What::Rows => runtime.block_on(rows::report(&args, database)),
                What::Streams => runtime.block_on(streams::report(&args, database)),
                What::Refusals => runtime.block_on(refusals::report(&args, database)),
                What::Existence => runtime.block_on(existence::report(&args, database)),
                What::Breaker => runtime.block_on(breaker::report(&args, database)),
            }
        }
    }
}

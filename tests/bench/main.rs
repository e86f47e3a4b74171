//! Measures the real binary, and reports: `cargo bench --bench load -- arrivals`.
//!
//! Gateway and simulator are separate processes with a separate database. The callers are in this
//! process. No measurement passes or fails. The figures hold for this machine at this moment:
//! compare only figures of one run.

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
    /// What to measure; everything if none is named.
    what: Vec<What>,
    /// The engine of the gateway's database; each in turn if left out.
    #[arg(long)]
    database: Option<Kind>,
    /// How long each measurement takes after it has warmed up.
    #[arg(long, default_value = "5s", value_parser = parse_duration)]
    time: Duration,
    /// How often each measurement is made. The median counts.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Numbers of concurrent callers, each of which waits for its answers. `turns` and `peers`
    /// measure each number.
    #[arg(long, value_delimiter = ',', default_value = "1,16,64,256")]
    callers: Vec<usize>,
    /// Kinds of messages: `turns` and `peers` measure each kind.
    #[arg(long, value_delimiter = ',', default_value = "known")]
    form: Vec<Form>,
    /// Rates of an open loop, as parts of the rate of 16 callers in a closed loop. `arrivals`
    /// measures each rate.
    #[arg(long, value_delimiter = ',', default_value = "0.6,1,2,4")]
    load: Vec<f64>,
    /// Number of streams that are open at once, for `streams`.
    #[arg(long, default_value_t = 2000)]
    streams: usize,
    /// Let all processes share all processors. Otherwise gateway and database have the first one,
    /// and callers and upstream the others.
    #[arg(long)]
    share: bool,
    /// Cargo passes this to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum What {
    /// A closed loop: turns a second, latencies, time to the first token, processor time, and the
    /// database's growth.
    Turns,
    /// An open loop at parts and multiples of the sustainable rate: turns a second, refusals,
    /// latencies from the arrival.
    Arrivals,
    /// The same callers at the gateway, at the upstream alone and through nginx; two Postgres
    /// calls a turn by pgbench.
    Peers,
    /// Rate and p99 of 64 callers beside a locked row of another conversation. Postgres only.
    Rows,
    /// Memory of the gateway for each open stream.
    Streams,
    /// Processor time of each kind of refusal.
    Refusals,
    /// Whether the time of a 404 reveals that the requested thing exists.
    Existence,
    /// What users get of a failing upstream, with and without the breaker. Takes minutes.
    Breaker,
}

fn main() {
    let args = Args::parse();
    if cfg!(debug_assertions) {
        println!("This is a debug build: the figures mean nothing.");
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
    // The runtime starts after the processors were chosen, so its threads keep to them.
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

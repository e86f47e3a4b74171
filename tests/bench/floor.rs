//! The floor for a turn that is two calls to Postgres: `pgbench` calls two functions that write
//! the rows of a turn.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::Args;
use super::database::TestDatabase;
use super::figures::{median_of, micros};
use super::meter::commit_latency;
use super::postgres::binaries;
use super::setting::Kind;

/// Numbers of concurrent clients. Each makes one turn after the other.
const CLIENTS: [usize; 2] = [1, 16];

/// The script of one turn.
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/bench/floor.pgbench");

/// The results of `pgbench`.
struct Floor {
    /// Turns a second.
    rate: f64,
    /// Latency of a turn, in milliseconds.
    latency: f64,
}

pub(crate) async fn report(args: &Args) {
    let Some(pgbench) = pgbench() else {
        println!("pgbench is not installed beside initdb: there is no floor to compare with");
        return;
    };
    let database = Kind::Postgres.database().await;
    database.execute(include_str!("floor.sql")).await;
    println!(
        "Postgres: a commit takes {:.0} µs",
        micros(commit_latency(&database).await)
    );
    for clients in CLIENTS {
        let rounds: Vec<Floor> = (0..args.rounds)
            .map(|_| measure(args, &pgbench, &database, clients))
            .collect();
        println!("Postgres, two calls a turn by pgbench, {clients} at once:");
        println!(
            "  {:.0} turns/s; time of a turn: mean {:.0} µs",
            median_of(&rounds, |floor| floor.rate),
            median_of(&rounds, |floor| floor.latency * 1e3)
        );
    }
}

/// Looks beside the `initdb` that makes the test clusters. The `pgbench` on a Debian PATH is a
/// wrapper that needs a cluster of the system.
fn pgbench() -> Option<PathBuf> {
    let initdb = binaries().ok()?.join("initdb").canonicalize().ok()?;
    Some(initdb.with_file_name("pgbench")).filter(|file| file.is_file())
}

fn measure(args: &Args, pgbench: &Path, database: &TestDatabase, clients: usize) -> Floor {
    let mut command = Command::new(pgbench);
    command.args([
        "-n",
        "-M",
        "prepared",
        "-j",
        "1",
        "-c",
        &clients.to_string(),
    ]);
    command
        .args(["-T", &args.time.as_secs().max(1).to_string(), "-f"])
        .arg(SCRIPT)
        .arg(database.url());
    let output = command.output().unwrap();
    let (told, errors) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "pgbench failed: {errors}");
    let number = |label: &str| {
        let rest = told.lines().find_map(|line| line.strip_prefix(label))?;
        rest.split(' ').next()?.parse().ok()
    };
    let (rate, latency) = (number("tps = "), number("latency average = "));
    Floor {
        rate: rate.unwrap(),
        latency: latency.unwrap(),
    }
}

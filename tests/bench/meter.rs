//! The cost of turns: counters that are read before and after.

use std::io::Write;
use std::time::{Duration, Instant};

use sqlx::{Connection, PgConnection};

use super::database::TestDatabase;
use super::figures::Durations;
use super::process::cpu_of;
use super::setting::{Kind, Setting, is_server_ours};

/// Number of commits whose median latency counts.
const COMMITS: usize = 200;

/// Counters of all processes that take part in turns, at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Work {
    /// Processor time of the gateway.
    pub(crate) gateway: Duration,
    /// Processor time of the upstream.
    pub(crate) simulator: Duration,
    /// Processor time of the callers, which are in this process.
    pub(crate) callers: Duration,
    /// Processor time of all processes of the Postgres server. Zero for a server that this
    /// process did not start.
    pub(crate) postgres: Duration,
    /// Bytes of WAL.
    pub(crate) wal: i64,
    /// Number of commits that write.
    pub(crate) commits: i64,
}

impl Work {
    pub(crate) async fn of(setting: &Setting) -> Self {
        let mut work = Self::default();
        if setting.kind == Kind::Postgres {
            let database = &setting.database;
            let wal = "SELECT CAST(pg_current_wal_insert_lsn() - '0/0' AS bigint)";
            let commits =
                "SELECT CAST(CAST(pg_snapshot_xmax(pg_current_snapshot()) AS text) AS bigint)";
            if is_server_ours() {
                let pids = database
                    .texts("SELECT CAST(pid AS text) FROM pg_stat_activity")
                    .await;
                work.postgres = pids.iter().map(|pid| cpu_of(pid)).sum();
            }
            work.wal = database.number(wal).await;
            work.commits = database.number(commits).await;
        }
        let (gateway, simulator) = (setting.gateway.cpu(), setting.simulator.cpu());
        Self {
            gateway,
            simulator,
            callers: cpu_of("self"),
            ..work
        }
    }

    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            gateway: self.gateway.saturating_sub(before.gateway),
            simulator: self.simulator.saturating_sub(before.simulator),
            callers: self.callers.saturating_sub(before.callers),
            postgres: self.postgres.saturating_sub(before.postgres),
            wal: self.wal - before.wal,
            commits: self.commits - before.commits,
        }
    }
}

/// Returns the size of the database in bytes: the files of Postgres, the pages of SQLite. SQLite
/// reuses its log, so that does not count.
pub(crate) async fn size(setting: &Setting) -> i64 {
    let size = match setting.kind {
        Kind::Postgres => "SELECT pg_database_size(current_database())",
        Kind::Sqlite => {
            "SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()"
        }
    };
    setting.database.number(size).await
}

/// Measures the latency of one client's tiny commits: the least time that a step of a turn can
/// take. On SQLite it measures appending a page to a file in the database's folder, and flushing
/// it.
pub(crate) async fn commit_latency(database: &TestDatabase) -> Duration {
    let mut took = Vec::with_capacity(COMMITS);
    if database.url().starts_with("sqlite") {
        let mut file = tempfile::tempfile().unwrap();
        for _ in 0..COMMITS {
            let begun = Instant::now();
            file.write_all(&[0; 4096])
                .and_then(|()| file.sync_data())
                .unwrap();
            took.push(begun.elapsed());
        }
    } else {
        database
            .execute("CREATE TABLE bench_commits (n integer)")
            .await;
        let mut connection = PgConnection::connect(&database.url()).await.unwrap();
        for _ in 0..COMMITS {
            let begun = Instant::now();
            sqlx::query("INSERT INTO bench_commits VALUES (1)")
                .execute(&mut connection)
                .await
                .unwrap();
            took.push(begun.elapsed());
        }
        database.execute("DROP TABLE bench_commits").await;
    }
    took.into_iter().collect::<Durations>().p50()
}

//! What turns cost, read before and after.

use std::io::Write;
use std::time::{Duration, Instant};

use sqlx::{Connection, PgConnection};

use super::database::TestDatabase;
use super::figures::Durations;
use super::process::cpu_of;
use super::setting::{Kind, Setting, is_server_ours};

/// Commits of which the latency is the median.
const COMMITS: usize = 200;

/// What all who take part in turns had done by some time.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Work {
    /// Processor time of the gateway.
    pub(crate) gateway: Duration,
    /// Of the upstream.
    pub(crate) simulator: Duration,
    /// Of the callers, which are in this process.
    pub(crate) callers: Duration,
    /// Of the Postgres server, in all its processes; none if it is not ours, and may be elsewhere.
    pub(crate) postgres: Duration,
    /// Written to its log, in bytes.
    pub(crate) wal: i64,
    /// Transactions that write.
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

/// Bytes of the database: the files in Postgres, the pages in SQLite, whose log is used again and again.
pub(crate) async fn size(setting: &Setting) -> i64 {
    let size = match setting.kind {
        Kind::Postgres => "SELECT pg_database_size(current_database())",
        Kind::Sqlite => {
            "SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()"
        }
    };
    setting.database.number(size).await
}

/// How long one client waits that commits next to nothing, again and again: the least that a step of a turn can take.
/// For SQLite, how long it takes to append a page to a file where the database is, and to flush it.
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

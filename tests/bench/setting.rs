//! A gateway with database, upstream and callers.

use std::sync::OnceLock;

use clap::ValueEnum;

use super::callers::Callers;
use super::cluster::Cluster;
use super::database::TestDatabase;
use super::process::Process;

/// Settings of a server with default durability.
const DURABLE: [&str; 5] = [
    "fsync=on",
    "full_page_writes=on",
    "autovacuum=on",
    "synchronous_commit=on",
    "max_connections=100",
];

/// The engine of the gateway's database.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Kind {
    /// A file on a disk, since flushing the log is part of a turn's cost.
    Sqlite,
    /// `DATABASE_URL`, or else a cluster on a disk that flushes its commits.
    Postgres,
}

impl Kind {
    /// Makes a new database.
    pub(crate) async fn database(self) -> TestDatabase {
        match self {
            Self::Sqlite => TestDatabase::sqlite_in(&std::env::temp_dir()).await,
            Self::Postgres if is_server_ours() => TestDatabase::on(server()).await,
            Self::Postgres => TestDatabase::postgres().await,
        }
    }
}

/// The cluster that this process started. Its watchdog removes it once this process has ended.
pub(crate) fn server() -> &'static Cluster {
    static SERVER: OnceLock<Cluster> = OnceLock::new();
    SERVER.get_or_init(|| Cluster::start_in(&std::env::temp_dir(), &DURABLE))
}

/// Whether this process starts the server, since `DATABASE_URL` names none.
pub(crate) fn is_server_ours() -> bool {
    std::env::var_os("DATABASE_URL").is_none()
}

pub(crate) struct Setting {
    pub(crate) kind: Kind,
    pub(crate) gateway: Process,
    pub(crate) simulator: Process,
    pub(crate) database: TestDatabase,
    _folder: tempfile::TempDir,
}

impl Setting {
    /// Starts a gateway. `more` is TOML. With `alone` the gateway has the first processor to
    /// itself.
    pub(crate) async fn new(kind: Kind, alone: bool, simulator: &[&str], more: &str) -> Self {
        Self::with_upstream(kind, alone, simulator, more, "").await
    }

    /// The same with more settings of the upstream.
    pub(crate) async fn with_upstream(
        kind: Kind,
        alone: bool,
        simulator: &[&str],
        more: &str,
        upstream: &str,
    ) -> Self {
        let database = kind.database().await;
        let args = [
            &["simulate", "--listen", "127.0.0.1:0", "--recorded", "0"],
            simulator,
        ]
        .concat();
        let simulator = Process::start(&args, &[], false);
        let config = format!(
            "{more}\n[upstreams.simulator]\nkind = \"responses\"\nbase_url = \"http://{}/v1\"\napi_key = \"sk-bench\"\n\
             {upstream}\n[assistants.default]\nupstream = \"simulator\"\nmodel = \"gpt-5\"\n",
            simulator.address
        );
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("gateway.toml");
        std::fs::write(&file, config).unwrap();
        let args = [
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--config",
            file.to_str().unwrap(),
        ];
        let gateway = Process::start(&args, &[("THREADKEEPER_STORE__URL", database.url())], alone);
        Self {
            kind,
            gateway,
            simulator,
            database,
            _folder: folder,
        }
    }

    /// Returns callers whose conversations exist already.
    pub(crate) async fn known_callers(&self, users: usize) -> Callers {
        let callers = Callers::new(self.gateway.address, users);
        callers.each_once().await;
        callers
    }
}

//! A gateway with what is around it.

use std::sync::OnceLock;

use clap::ValueEnum;

use super::callers::Callers;
use super::cluster::Cluster;
use super::database::TestDatabase;
use super::process::Process;

/// As safe as a server is where nobody has set anything, and on a disk.
const DURABLE: [&str; 5] = [
    "fsync=on",
    "full_page_writes=on",
    "autovacuum=on",
    "synchronous_commit=on",
    "max_connections=100",
];

/// Where the gateway keeps its record.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Kind {
    /// A file on a disk, for flushing its log is part of what a turn costs.
    Sqlite,
    /// `DATABASE_URL`, else a server of our own on a disk, which flushes what it commits.
    Postgres,
}

impl Kind {
    /// A new one.
    pub(crate) async fn database(self) -> TestDatabase {
        match self {
            Self::Sqlite => TestDatabase::sqlite_in(&std::env::temp_dir()).await,
            Self::Postgres if is_server_ours() => TestDatabase::on(server()).await,
            Self::Postgres => TestDatabase::postgres().await,
        }
    }
}

/// Our own server. Its watchdog removes it once this process has ended.
pub(crate) fn server() -> &'static Cluster {
    static SERVER: OnceLock<Cluster> = OnceLock::new();
    SERVER.get_or_init(|| Cluster::start_in(&std::env::temp_dir(), &DURABLE))
}

/// Nobody has named another server.
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
    /// `more` is TOML. `alone`: the gateway has the first processor to itself.
    pub(crate) async fn new(kind: Kind, alone: bool, simulator: &[&str], more: &str) -> Self {
        Self::with_upstream(kind, alone, simulator, more, "").await
    }

    /// The same, with more settings of the upstream.
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

    /// Callers who have talked with the assistant before.
    pub(crate) async fn known_callers(&self, users: usize) -> Callers {
        let callers = Callers::new(self.gateway.address, users);
        callers.each_once().await;
        callers
    }
}

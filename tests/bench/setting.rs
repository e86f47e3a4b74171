//! A gateway with what is around it.

use clap::ValueEnum;

use super::callers::Callers;
use super::database::TestDatabase;
use super::process::Process;

/// Where the gateway keeps its record.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Kind {
    /// A file on a disk, for flushing its log is part of what a turn costs.
    Sqlite,
    /// `DATABASE_URL`, else a server of our own in memory that syncs nothing to a disk.
    Postgres,
}

pub(crate) struct Setting {
    pub(crate) gateway: Process,
    pub(crate) simulator: Process,
    _folder: tempfile::TempDir,
    _database: TestDatabase,
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
        let database = match kind {
            Kind::Sqlite => TestDatabase::sqlite_in(&std::env::temp_dir()).await,
            Kind::Postgres => TestDatabase::postgres().await,
        };
        let args = [&["simulate", "--listen", "127.0.0.1:0", "--recorded", "0"], simulator].concat();
        let simulator = Process::start(&args, &[], false);
        let config = format!(
            "{more}\n[upstreams.simulator]\nkind = \"responses\"\nbase_url = \"http://{}/v1\"\napi_key = \"sk-bench\"\n\
             {upstream}\n[assistants.default]\nupstream = \"simulator\"\nmodel = \"gpt-5\"\n",
            simulator.address
        );
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("gateway.toml");
        std::fs::write(&file, config).unwrap();
        let args = ["serve", "--listen", "127.0.0.1:0", "--config", file.to_str().unwrap()];
        let gateway = Process::start(&args, &[("THREADKEEPER_STORE__URL", database.url())], alone);
        Self { gateway, simulator, _folder: folder, _database: database }
    }

    /// Callers who have talked with the assistant before.
    pub(crate) async fn known_callers(&self, users: usize) -> Callers {
        let callers = Callers::new(self.gateway.address, users);
        callers.each_once().await;
        callers
    }
}

//! A Postgres cluster for one test, which the test can stop and start.

use std::fs::{self, DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use uuid::Uuid;

use super::postgres::{Account, binaries, launch, make, scratch, url_of, watch};

/// Settings under which committed data survives any stop of the server, though not of the
/// machine.
const SETTINGS: [&str; 2] = ["synchronous_commit=on", "max_connections=100"];

/// How to stop a server.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Stop {
    /// Cuts the connections and rolls their transactions back.
    Fast,
    /// Stops as in a crash. The server recovers when it starts again.
    Immediate,
}

/// A server and its files. Dropping it removes both. Its methods block for some tenths of a
/// second each.
pub(crate) struct Cluster {
    folder: PathBuf,
    binaries: PathBuf,
    account: Account,
    settings: &'static [&'static str],
    /// `None` while the server is stopped.
    server: Option<Child>,
}

impl Cluster {
    /// Makes a cluster and starts its server.
    ///
    /// # Panics
    /// If this machine has no Postgres, or the server does not start.
    pub(crate) fn start() -> Self {
        Self::start_in(&scratch(), &SETTINGS)
    }

    /// The same with its folder in `place`, and with these settings.
    pub(crate) fn start_in(place: &Path, settings: &'static [&'static str]) -> Self {
        let folder = place.join(format!("threadkeeper-cluster-{}", Uuid::now_v7().simple()));
        let new = || {
            DirBuilder::new().mode(0o711).create(&folder)?;
            // The umask may have removed the search permission, which the server's account needs.
            fs::set_permissions(&folder, Permissions::from_mode(0o711))
        };
        new().expect("a folder for the cluster can be made");
        watch(&folder, std::process::id()).expect("a shell can be started");
        let binaries = binaries().unwrap_or_else(|text| panic!("{text}"));
        let account = Account::for_server().unwrap_or_else(|text| panic!("{text}"));
        make(&folder, &binaries, &account).expect("the cluster can be made");
        let mut cluster = Self {
            folder,
            binaries,
            account,
            settings,
            server: None,
        };
        cluster.start_again();
        cluster
    }

    /// Returns the URL of a database of this server. The database `postgres` always exists.
    pub(crate) fn url(&self, database: &str) -> String {
        url_of(&self.socket(), database)
    }

    /// The folder of the server's socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.join("socket")
    }

    /// Returns the server's log so far.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).expect("the server logs")
    }

    /// Stops the server and waits until it is gone.
    pub(crate) fn stop(&mut self, how: Stop) {
        let mut server = self.server.take().expect("the server is running");
        let signal = match how {
            Stop::Fast => "-INT",
            Stop::Immediate => "-QUIT",
        };
        let told = Command::new("kill")
            .arg(signal)
            .arg(server.id().to_string())
            .status();
        assert!(
            told.expect("the signal can be sent").success(),
            "the server was gone before it was stopped"
        );
        server
            .wait()
            .expect("the server is a child of this process");
    }

    /// Starts the server after a [`stop`](Self::stop) and waits until it takes connections.
    pub(crate) fn start_again(&mut self) {
        assert!(self.server.is_none(), "the server is already running");
        let server = launch(&self.folder, &self.binaries, &self.account, self.settings);
        self.server = Some(server.expect("the server starts"));
    }

    /// Stops the server and starts it again.
    pub(crate) fn restart(&mut self, how: Stop) {
        self.stop(how);
        self.start_again();
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.server.is_some() {
            self.stop(Stop::Immediate);
        }
        // If this fails, the watchdog removes the folder.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

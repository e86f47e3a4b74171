//! A private Postgres cluster that all test processes of one run share. It is removed when the
//! run is over.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::process::{CommandExt, parent_id};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Environment variable that names the folder of `initdb` and `postgres`.
const OVERRIDE: &str = "THREADKEEPER_TEST_PG_BIN";
const STARTUP: Duration = Duration::from_secs(30);

/// Returns the URL of the cluster's maintenance database. The first call of the test run starts
/// the cluster.
///
/// # Panics
/// If this machine has no Postgres, or the server does not start. The message says how to mend
/// it.
pub(crate) fn url() -> &'static str {
    static URL: OnceLock<Result<String, String>> = OnceLock::new();
    match URL.get_or_init(|| start_or_join().map(|socket| url_of(&socket, "postgres"))) {
        Ok(url) => url,
        Err(text) => panic!("{text}"),
    }
}

pub(super) fn url_of(socket: &Path, database: &str) -> String {
    let folder = socket
        .to_str()
        .expect("the temporary folder's name is UTF-8");
    format!(
        "postgres://postgres@localhost/{database}?host={}",
        folder.replace('/', "%2F")
    )
}

/// Returns the folder of the cluster's socket.
fn start_or_join() -> Result<PathBuf, String> {
    let binaries = binaries()?;
    let account = Account::for_server()?;
    let run = run_folder().map_err(|error| format!("no folder for the test cluster: {error}"))?;
    let attempt = || -> io::Result<PathBuf> {
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(run.join("lock"))?;
        lock.lock()?;
        let marker = run.join("started");
        if !marker.exists() {
            start(&run, &binaries, &account)?;
            File::create(marker)?;
        }
        Ok(run.join("socket"))
    };
    attempt().map_err(|error| {
        format!(
            "the test cluster in {} does not start: {error}",
            run.display()
        )
    })
}

/// Returns the folder of `initdb` and `postgres`.
pub(super) fn binaries() -> Result<PathBuf, String> {
    let complete =
        |folder: &PathBuf| folder.join("initdb").is_file() && folder.join("postgres").is_file();
    if let Some(folder) = std::env::var_os(OVERRIDE).map(PathBuf::from) {
        return Some(folder.clone()).filter(complete).ok_or_else(|| {
            format!(
                "{OVERRIDE} names {}, which lacks initdb or postgres",
                folder.display()
            )
        });
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut debian: Vec<(u32, PathBuf)> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            Some((
                entry.file_name().to_str()?.parse().ok()?,
                entry.path().join("bin"),
            ))
        })
        .collect();
    debian.sort_by_key(|(major, _)| std::cmp::Reverse(*major));
    std::env::split_paths(&path)
        .chain(debian.into_iter().map(|(_, folder)| folder))
        .find(complete)
        .ok_or_else(|| {
            format!(
                "these tests need a Postgres server: install Debian's package `postgresql` (it need not run), or \
                 name the folder of initdb and postgres in {OVERRIDE}, or a server in DATABASE_URL"
            )
        })
}

/// The account under which the server runs.
pub(super) struct Account {
    /// User and group ids; `None` is the account of this process.
    other: Option<(u32, u32)>,
}

impl Account {
    /// Root may not run Postgres, so root uses the account `postgres` or `nobody`.
    pub(super) fn for_server() -> Result<Self, String> {
        if own_uid() != 0 {
            return Ok(Self { other: None });
        }
        let passwd =
            fs::read_to_string("/etc/passwd").map_err(|error| format!("/etc/passwd: {error}"))?;
        let find = |name: &str| {
            passwd.lines().find_map(|line| {
                let mut fields = line.split(':');
                let found = fields.next() == Some(name);
                let mut ids = fields.skip(1).filter_map(|field| field.parse().ok());
                if found {
                    ids.next().zip(ids.next())
                } else {
                    None
                }
            })
        };
        match find("postgres").or_else(|| find("nobody")) {
            Some(ids) => Ok(Self { other: Some(ids) }),
            None => Err(
                "Postgres does not run as root, and there is no account postgres or nobody"
                    .to_owned(),
            ),
        }
    }

    /// Returns a command under this account. It starts in a folder that the account can enter,
    /// and gets no signals from the terminal.
    fn command(&self, program: PathBuf, log: &File) -> io::Result<Command> {
        let mut command = Command::new(program);
        command
            .current_dir("/")
            .stdin(Stdio::null())
            .process_group(0);
        command.stdout(log.try_clone()?).stderr(log.try_clone()?);
        if let Some((uid, gid)) = self.other {
            command.uid(uid).gid(gid);
        }
        Ok(command)
    }

    /// Makes a folder that only this account may enter.
    fn folder(&self, path: &Path) -> io::Result<()> {
        DirBuilder::new().mode(0o700).create(path)?;
        match self.other {
            Some((uid, gid)) => chown(path, Some(uid), Some(gid)),
            None => Ok(()),
        }
    }
}

/// Returns the folder of this test run. Its name contains the id of the parent of all test
/// processes: cargo, nextest or a shell. The parent's start time tells a later process with the
/// same id apart.
fn run_folder() -> io::Result<PathBuf> {
    let parent = parent_id();
    let stat = fs::read_to_string(format!("/proc/{parent}/stat"))?;
    // The name in parentheses may contain anything, so this counts from its end. The start time
    // is field 22.
    let started = stat
        .rsplit(')')
        .next()
        .and_then(|rest| rest.split_whitespace().nth(19))
        .unwrap_or("0");
    let folder = scratch().join(format!(
        "threadkeeper-test-{}-{parent}-{started}",
        own_uid()
    ));
    match DirBuilder::new().mode(0o711).create(&folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let found = fs::symlink_metadata(&folder)?;
    if !found.is_dir() || found.uid() != own_uid() {
        return Err(io::Error::other(format!(
            "{} is not ours",
            folder.display()
        )));
    }
    // The umask may have removed the search permission, which the server's account needs.
    fs::set_permissions(&folder, Permissions::from_mode(0o711))?;
    Ok(folder)
}

/// Returns the folder for databases: in memory if there is enough. A new database takes a tenth
/// of the time there.
pub(super) fn scratch() -> PathBuf {
    let memory = Path::new("/dev/shm");
    let free = Command::new("df")
        .args(["-Pk"])
        .arg(memory)
        .stderr(Stdio::null())
        .output()
        .ok()
        .and_then(|out| {
            let text = String::from_utf8(out.stdout).ok()?;
            text.lines()
                .nth(1)?
                .split_whitespace()
                .nth(3)?
                .parse::<u64>()
                .ok()
        });
    let probe = memory.join(format!("threadkeeper-probe-{}", std::process::id()));
    let writable = File::create(&probe)
        .and_then(|_| fs::remove_file(&probe))
        .is_ok();
    if writable && free.is_some_and(|kib| kib >= 1024 * 1024) {
        memory.to_owned()
    } else {
        std::env::temp_dir()
    }
}

fn own_uid() -> u32 {
    static UID: OnceLock<u32> = OnceLock::new();
    *UID.get_or_init(|| {
        fs::metadata("/proc/self")
            .expect("/proc describes this process")
            .uid()
    })
}

fn start(run: &Path, binaries: &Path, account: &Account) -> io::Result<()> {
    make(run, binaries, account)?;
    launch(
        run,
        binaries,
        account,
        &["synchronous_commit=off", "max_connections=300"],
    )?;
    watch(run, parent_id())
}

/// Makes the files of a cluster in a folder.
pub(super) fn make(run: &Path, binaries: &Path, account: &Account) -> io::Result<()> {
    let data = run.join("data");
    // A run that was killed half-way leaves its folders.
    for folder in [&data, &run.join("socket")] {
        if folder.exists() {
            fs::remove_dir_all(folder)?;
        }
        account.folder(folder)?;
    }
    let log = File::create(run.join("log"))?;
    let made = account
        .command(binaries.join("initdb"), &log)?
        .arg("-D")
        .arg(&data)
        .args([
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--no-locale",
            "--no-sync",
        ])
        .status()?;
    if made.success() {
        Ok(())
    } else {
        Err(failed(run, "initdb failed"))
    }
}

/// Starts the server of a cluster and waits until it takes connections.
pub(super) fn launch(
    run: &Path,
    binaries: &Path,
    account: &Account,
    settings: &[&str],
) -> io::Result<Child> {
    let data = run.join("data");
    let log = File::options().append(true).open(run.join("log"))?;
    let mut command = account.command(binaries.join("postgres"), &log)?;
    command
        .arg("-D")
        .arg(&data)
        .arg("-k")
        .arg(run.join("socket"));
    let common = [
        "listen_addresses=",
        "fsync=off",
        "full_page_writes=off",
        "autovacuum=off",
    ];
    for setting in common.iter().chain(settings) {
        command.args(["-c", setting]);
    }
    let mut server = command.spawn()?;
    let deadline = Instant::now() + STARTUP;
    let pid = server.id().to_string();
    // The socket appears before the server accepts connections; this line does not.
    let ready = || {
        let text = fs::read_to_string(data.join("postmaster.pid")).unwrap_or_default();
        let is_ours = text.lines().next() == Some(&pid);
        is_ours
            && text
                .lines()
                .nth(7)
                .is_some_and(|line| line.trim() == "ready")
    };
    while !ready() {
        if server.try_wait()?.is_some() {
            return Err(failed(run, "the server ended at once"));
        }
        if Instant::now() > deadline {
            server.kill()?;
            return Err(failed(run, "the server was not ready in time"));
        }
        sleep(Duration::from_millis(10));
    }
    Ok(server)
}

fn failed(run: &Path, what: &str) -> io::Error {
    let text = fs::read_to_string(run.join("log")).unwrap_or_default();
    io::Error::other(format!("{what}:\n{text}"))
}

/// Starts a shell that outlives the tests. Once `process` is gone, it stops the server that runs
/// then, and removes the folder. It looks for entries under /proc, since a signal to another
/// user's process fails whether that process lives or not.
pub(super) fn watch(run: &Path, process: u32) -> io::Result<()> {
    const SCRIPT: &str = r#"
        while [ -e "/proc/$1" ] && [ -e "$2" ]; do sleep 0.5; done
        server=$(head -n 1 "$2/data/postmaster.pid" 2>/dev/null)
        if [ -n "$server" ]; then
            kill -QUIT "$server"
            for i in 1 2 3 4 5 6 7 8 9 10; do [ -e "/proc/$server" ] || break; sleep 0.5; done
        fi
        rm -rf "$2"
    "#;
    Command::new("/bin/sh")
        .args(["-c", SCRIPT, "threadkeeper-test-watchdog"])
        .arg(process.to_string())
        .arg(run)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()?;
    Ok(())
}

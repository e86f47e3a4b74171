//! SQLite: one file, one process.
//!
//! There is one writing connection, so writing transactions come one after another and never meet; readers have connections of
//! their own and see what is committed. Parameters are sent as `$1`, not `?1`: the driver binds a script of several statements
//! wrongly if one of them leaves out a number of the `?` kind.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use secrecy::ExposeSecret;
use sqlx::ConnectOptions as _;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use tracing::log::LevelFilter;

use super::StoreError;
use super::backend::Backend;
use super::pool::{Dropped, Options, Pool, PoolSettings};
use crate::config::{StoreConfig, Synchronous};

/// How long SQLite waits for a lock: only the check-pointing of its log and visitors such as a backup take any.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time for one step, once it has its connection: waiting for a lock and then some.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// A statement that takes so long is logged with a warning.
const SLOW_STATEMENT: Duration = Duration::from_secs(1);

/// Takes the file, making it and its folder where they are missing.
pub(super) fn open(config: &StoreConfig) -> Result<Backend, StoreError> {
    let path = path(config)?;
    let lock = lock(&path)?;
    Ok(Backend::Sqlite {
        writer: writer(&path, config)?,
        readers: readers(&path, config)?,
        lock,
    })
}

/// Reads the URL, makes the folder, and gives the file's one absolute name.
fn path(config: &StoreConfig) -> Result<PathBuf, StoreError> {
    let url = config
        .url
        .as_ref()
        .ok_or_else(|| StoreError::Open("store.url is not set".to_owned()))?;
    let url = url.expose_secret();
    let rest = url.split_once(':').map_or("", |(_, rest)| rest);
    if rest.contains(":memory:") || rest.contains("mode=memory") {
        return Err(StoreError::Open(
            "store.url names a database in memory; give it a file: `sqlite:path/to/file.db`"
                .to_owned(),
        ));
    }
    if rest.contains('?') || rest.trim_start_matches('/').is_empty() {
        return Err(StoreError::Open(
            "store.url must be `sqlite:` and the path of a file, without parameters".to_owned(),
        ));
    }
    let options = SqliteConnectOptions::from_str(url).map_err(|error| {
        StoreError::Open(format!(
            "store.url is not of the form `sqlite:path`: {error}"
        ))
    })?;
    let path = options.get_filename();
    let (Some(name), parent) = (path.file_name(), path.parent().unwrap_or(Path::new(""))) else {
        return Err(StoreError::Open(format!(
            "`{}` is a folder, not a database file",
            path.display()
        )));
    };
    let folder = if parent.as_os_str().is_empty() {
        Path::new(".")
    } else {
        parent
    };
    std::fs::create_dir_all(folder)
        .and_then(|()| folder.canonicalize())
        .map(|folder| folder.join(name))
        .map_err(|error| {
            StoreError::Open(format!(
                "the folder `{}` cannot be made: {error}",
                folder.display()
            ))
        })
}

/// Takes the lock that lets one process at a time use the file. It lasts as long as the handle.
fn lock(database: &Path) -> Result<File, StoreError> {
    let mut name = database.as_os_str().to_owned();
    name.push(".lock");
    let cannot = |error| {
        StoreError::Open(format!(
            "`{}` cannot be locked: {error}",
            Path::new(&name).display()
        ))
    };
    let file = File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&name)
        .map_err(cannot)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StoreError::Open(format!(
            "`{}` is in use by another process, and a SQLite file serves only one: stop that one, or use Postgres \
             to run several replicas",
            database.display()
        ))),
        Err(TryLockError::Error(error)) => Err(cannot(error)),
    }
}

/// The one connection that writes.
fn writer(path: &Path, config: &StoreConfig) -> Result<Pool, StoreError> {
    let synchronous = match config.synchronous {
        Synchronous::Normal => SqliteSynchronous::Normal,
        Synchronous::Full => SqliteSynchronous::Full,
    };
    let options = options(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(synchronous)
        // What the items of a batch hold is in no other file than the database.
        .pragma("temp_store", "MEMORY");
    pool(options, 1, config)
}

/// The connections that only read; opened when they are needed.
fn readers(path: &Path, config: &StoreConfig) -> Result<Pool, StoreError> {
    pool(
        options(path).read_only(true),
        config.max_connections,
        config,
    )
}

fn pool(
    options: SqliteConnectOptions,
    size: u32,
    config: &StoreConfig,
) -> Result<Pool, StoreError> {
    Pool::new(PoolSettings {
        options: Options::Sqlite(options),
        health: Arc::default(),
        size,
        acquire_timeout: config.acquire_timeout,
        call_timeout: CALL_TIMEOUT,
        dropped: Dropped::Settled,
    })
}

/// What to tell when the file could not be opened.
pub(super) fn failed(config: &StoreConfig, error: &StoreError) -> StoreError {
    let path = match path(config) {
        Ok(path) => path,
        Err(error) => return error,
    };
    let cause =
        std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string);
    StoreError::Open(format!("`{}` cannot be opened: {cause}", path.display()))
}

fn options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .busy_timeout(BUSY_TIMEOUT)
        .foreign_keys(true)
        .log_statements(LevelFilter::Debug)
        .log_slow_statements(LevelFilter::Warn, SLOW_STATEMENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_are_accepted() {
        for url in [
            "sqlite::memory:",
            "sqlite://x?mode=memory",
            "sqlite:",
            "sqlite://",
            "sqlite:a.db?mode=ro",
        ] {
            let config = StoreConfig {
                url: Some(url.into()),
                ..StoreConfig::default()
            };
            assert!(matches!(path(&config), Err(StoreError::Open(_))), "{url}");
        }
    }

    #[test]
    fn a_file_has_one_name_and_its_folder_is_made() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        let named = |text: &str| {
            let url = format!("sqlite:{}/{text}", root.display());
            path(&StoreConfig {
                url: Some(url.into()),
                ..StoreConfig::default()
            })
            .unwrap()
        };
        assert_eq!(named("a/b/../c.db"), root.join("a/c.db"));
        assert_eq!(named("a/c.db"), root.join("a/c.db"));
    }
}

//! SQLite: one file, one process.
//!
//! One connection writes, so write transactions run one after another and never conflict. Readers
//! have connections of their own and see committed data.
//!
//! Parameters are sent as `$1`, not `?1`: the driver binds a script of several statements wrongly
//! if one of them leaves out a number of the `?` kind.

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

/// The longest wait of SQLite for a lock. Only checkpoints of its log and visitors such as a
/// backup take locks.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest time for one step after it has its connection. It is longer than [`BUSY_TIMEOUT`].
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// The duration from which a statement is logged with a warning.
const SLOW_STATEMENT: Duration = Duration::from_secs(1);

/// Opens the file. It creates the file and its folder if they are missing.
pub(super) fn open(config: &StoreConfig) -> Result<Backend, StoreError> {
    let path = path(config)?;
    let lock = lock(&path)?;
    Ok(Backend::Sqlite {
        writer: writer(&path, config)?,
        readers: readers(&path, config)?,
        lock,
    })
}

/// Reads the URL, creates the folder, and returns the absolute path of the file, which is its one
/// name.
fn path(config: &StoreConfig) -> Result<PathBuf, StoreError> {
    let url = config
        .url
        .as_ref()
        .ok_or_else(|| StoreError::Open("store.url is not set".to_owned()))?;
    let url = url.expose_secret();
    let rest = url.split_once(':').map_or("", |(_, rest)| rest);
    if rest.contains(":memory:") || rest.contains("mode=memory") {
        return Err(StoreError::Open(
            "store.url names a database in memory, which is not supported; name a file: `sqlite:path/to/file.db`"
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
            "store.url names the folder `{}`; it must name a database file",
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
                "the folder `{}` cannot be created: {error}",
                folder.display()
            ))
        })
}

/// Takes the lock that lets only one process use the file. It lasts as long as the handle.
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
            "`{}` is in use by another process, and a SQLite file serves only one: stop that process, or use Postgres \
             to run several replicas",
            database.display()
        ))),
        Err(TryLockError::Error(error)) => Err(cannot(error)),
    }
}

/// Returns the pool with the one connection that writes.
fn writer(path: &Path, config: &StoreConfig) -> Result<Pool, StoreError> {
    let synchronous = match config.synchronous {
        Synchronous::Normal => SqliteSynchronous::Normal,
        Synchronous::Full => SqliteSynchronous::Full,
    };
    let options = options(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(synchronous)
        // Keep the items of a batch in memory: their content must be in no file besides the
        // database.
        .pragma("temp_store", "MEMORY");
    pool(options, 1, config)
}

/// Returns the pool of connections that only read.
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

/// Returns the error for a file that cannot be opened.
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
    use crate::store::params::params;
    use crate::store::statement::Statement;

    /// `PRAGMA synchronous`: 1 is `NORMAL`, 2 is `FULL`.
    static LEVEL: Statement = Statement::on_sqlite(
        "test.synchronous",
        "SELECT synchronous FROM pragma_synchronous",
    );

    #[tokio::test]
    async fn commit_is_flushed_unless_configured_otherwise() {
        let folder = tempfile::tempdir().unwrap();
        let levels = [
            (StoreConfig::default().synchronous, 2),
            (Synchronous::Normal, 1),
        ];
        for (synchronous, level) in levels {
            let config = StoreConfig {
                synchronous,
                ..StoreConfig::default()
            };
            let pool = writer(&folder.path().join("a.db"), &config).unwrap();
            let mut connection = pool.acquire().await.unwrap();
            let (found,): (i64,) = connection.one(&LEVEL, params()).await.unwrap();
            assert_eq!(found, level, "{synchronous:?}");
            drop(connection);
            pool.close().await;
        }
    }

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

//! Translating the driver's errors for the callers of the store.

use std::error::Error as StdError;

use sqlx::error::DatabaseError;
use sqlx::migrate::MigrateError;
use sqlx::postgres::{PgDatabaseError, PgSeverity};

/// An error of the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database cannot be reached, has no free connection in time, or is shutting down. A
    /// retry may help.
    #[error("the database is not available")]
    Unavailable(#[source] Box<dyn StdError + Send + Sync>),
    /// The schema is not one that this binary works with. The text says what to do.
    #[error("{0}")]
    Schema(String),
    /// The database cannot be opened as configured. The text says how to mend it.
    #[error("{0}")]
    Open(String),
    #[error("the cursor names no entry of this list")]
    UnknownCursor,
    /// A row holds a value that this binary cannot have written.
    #[error("the database holds a value that this program cannot read: {0}")]
    Corrupt(String),
    /// The write was not sent: the database takes writes more slowly than they arrive, and this
    /// one would have waited too long.
    #[error("the database cannot keep up with the writes: try again later")]
    Overloaded,
    #[error("a statement failed")]
    Statement(#[source] Box<dyn StdError + Send + Sync>),
}

/// The reason why an item was not written, or may not have been.
#[derive(Debug, thiserror::Error)]
pub enum NotWritten {
    /// The item was never sent.
    #[error("not sent to the database")]
    Unsent(#[source] StoreError),
    /// The database refused the item.
    #[error("refused by the database")]
    Refused(#[source] StoreError),
    /// The item was sent, and its outcome is unknown.
    #[error("the answer of the database was lost")]
    Lost(#[source] StoreError),
}

impl From<NotWritten> for StoreError {
    fn from(not_written: NotWritten) -> Self {
        match not_written {
            NotWritten::Unsent(error) | NotWritten::Refused(error) | NotWritten::Lost(error) => {
                error
            }
        }
    }
}

/// A statement that failed, and the cause.
#[derive(Debug)]
pub(super) struct Failed {
    /// The name of the statement.
    pub(super) statement: &'static str,
    pub(super) cause: sqlx::Error,
}

impl Failed {
    /// Returns whether the statement failed because it would have broken this constraint. It has
    /// changed nothing then.
    pub(super) fn breaks(&self, constraint: &str) -> bool {
        self.cause
            .as_database_error()
            .and_then(DatabaseError::constraint)
            == Some(constraint)
    }

    /// Returns whether the statement names a table that does not exist.
    pub(super) fn lacks_table(&self) -> bool {
        let cause = self.cause.as_database_error();
        // SQLite has no separate code for this.
        cause.is_some_and(|it| {
            it.code().as_deref() == Some("42P01") || it.message().starts_with("no such table")
        })
    }
}

impl From<Failed> for StoreError {
    fn from(failed: Failed) -> Self {
        use sqlx::Error as E;
        let Failed { statement, cause } = failed;
        match &cause {
            E::Io(_)
            | E::Tls(_)
            | E::PoolTimedOut
            | E::PoolClosed
            | E::WorkerCrashed
            | E::BeginFailed => Self::Unavailable(
                InStatement {
                    statement,
                    cause: cause.into(),
                }
                .into(),
            ),
            E::Database(error) => {
                let is_passing = passes(&**error);
                let said = InStatement {
                    statement,
                    cause: Said::by(&**error).into(),
                }
                .into();
                if is_passing {
                    Self::Unavailable(said)
                } else {
                    Self::Statement(said)
                }
            }
            E::ColumnDecode { index, source } => {
                Self::Corrupt(format!("{statement}, column {index}: {source}"))
            }
            E::Decode(source) => Self::Corrupt(format!("{statement}: {source}")),
            _ => Self::Statement(
                InStatement {
                    statement,
                    cause: cause.into(),
                }
                .into(),
            ),
        }
    }
}

impl From<Failed> for NotWritten {
    fn from(failed: Failed) -> Self {
        // A statement that the database answers with an error was rolled back, unless the
        // connection ends with that error. In that case the outcome is unknown: a pooler reports a
        // lost server that way.
        let is_refused =
            matches!(&failed.cause, sqlx::Error::Database(said) if !ends_connection(&**said));
        let was_encoded = !matches!(failed.cause, sqlx::Error::Encode(_));
        let error = StoreError::from(failed);
        if is_refused || !was_encoded {
            Self::Refused(error)
        } else {
            Self::Lost(error)
        }
    }
}

/// Translates errors that did not come from a statement.
impl From<StoreError> for NotWritten {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Unavailable(_) | StoreError::Corrupt(_) => Self::Lost(error),
            error => Self::Refused(error),
        }
    }
}

/// An error, with the name of the statement that failed.
#[derive(Debug, thiserror::Error)]
#[error("{statement}: {cause}")]
struct InStatement {
    statement: &'static str,
    cause: Box<dyn std::error::Error + Send + Sync>,
}

/// Returns whether an error means that the connection is broken, not only that a statement failed.
pub(super) fn is_broken(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) => true,
        // The server is stopping, or has crashed.
        sqlx::Error::Database(cause) => {
            ["57P01", "57P02"].contains(&&*cause.code().unwrap_or_default())
        }
        _ => false,
    }
}

/// Returns whether an error ends the connection. The outcome of the statement is unknown then.
fn ends_connection(error: &dyn DatabaseError) -> bool {
    let severity = error
        .try_downcast_ref::<PgDatabaseError>()
        .map(PgDatabaseError::severity);
    matches!(severity, Some(PgSeverity::Fatal | PgSeverity::Panic))
}

/// The database's own error message. (The driver's text adds a line about the server's source
/// code.)
#[derive(Debug, thiserror::Error)]
#[error("{text} ({code}){}", if code == NOT_ALLOWED { MUST_BE_ALLOWED } else { "" })]
pub(super) struct Said {
    text: String,
    code: String,
}

impl Said {
    pub(super) fn by(error: &dyn DatabaseError) -> Self {
        Self {
            text: error.message().to_owned(),
            code: error.code().unwrap_or_default().into_owned(),
        }
    }
}

/// The error code of Postgres for a missing right of the role.
const NOT_ALLOWED: &str = "42501";
const MUST_BE_ALLOWED: &str = "; the role needs USAGE on the schema, and SELECT, INSERT, UPDATE and DELETE on all tables in it";

/// Returns the server's message if the migration failed because the role lacks a right.
pub(super) fn denial(error: &MigrateError) -> Option<String> {
    let (MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _)) = error else {
        return None;
    };
    let cause = error
        .as_database_error()
        .filter(|cause| cause.code().as_deref() == Some(NOT_ALLOWED))?;
    Some(cause.message().to_owned())
}

impl From<MigrateError> for StoreError {
    fn from(error: MigrateError) -> Self {
        match error {
            MigrateError::Execute(cause) | MigrateError::ExecuteMigration(cause, _) => Failed {
                statement: "migrate",
                cause,
            }
            .into(),
            MigrateError::VersionMissing(version) => Self::Schema(format!(
                "the database is at migration {version}, which is newer than this program and does not support it: run a \
                 newer `threadkeeper`"
            )),
            MigrateError::VersionMismatch(version) => Self::Schema(format!(
                "migration {version} was applied to the database in another form than this program knows: run the version of \
                 `threadkeeper` that applied it"
            )),
            MigrateError::Dirty(version) => Self::Schema(format!(
                "migration {version} was applied to the database only in part: restore the database from a backup"
            )),
            other => Self::Statement(other.into()),
        }
    }
}

/// Returns whether the same statement may succeed later.
pub(super) fn passes(error: &dyn DatabaseError) -> bool {
    let code = error.code().unwrap_or_default();
    if error.try_downcast_ref::<PgDatabaseError>().is_some() {
        // Classes 08, 57 and 53: connection errors; a server that starts or stops, or a time limit
        // that cancelled the statement; used-up resources. Single codes: a standby that was the
        // primary a moment ago, a serialisation failure, a deadlock, a lock timeout.
        return ["08", "57", "53"]
            .iter()
            .any(|class| code.starts_with(class))
            || ["25006", "40001", "40P01", "55P03"].contains(&&*code);
    }
    // The low byte is the primary code of SQLite: busy, locked, I/O error, disk full, cannot open.
    code.parse::<u32>()
        .is_ok_and(|code| [5, 6, 10, 13, 14].contains(&(code & 0xff)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_connection_is_worth_a_retry_and_a_bad_statement_is_not() {
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        for error in [
            sqlx::Error::Io(refused),
            sqlx::Error::PoolTimedOut,
            sqlx::Error::PoolClosed,
        ] {
            assert!(matches!(
                StoreError::from(Failed {
                    statement: "x",
                    cause: error
                }),
                StoreError::Unavailable(_)
            ));
        }
        assert!(matches!(
            StoreError::from(Failed {
                statement: "x",
                cause: sqlx::Error::RowNotFound
            }),
            StoreError::Statement(_)
        ));
    }
}

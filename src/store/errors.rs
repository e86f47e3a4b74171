//! What the driver's errors mean for the callers of the store.

use std::error::Error as StdError;

use sqlx::error::DatabaseError;
use sqlx::migrate::MigrateError;
use sqlx::postgres::{PgDatabaseError, PgSeverity};

/// What goes wrong in the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database cannot be reached, has no free connection in time or is shutting down. Worth a retry.
    #[error("the database is not available")]
    Unavailable(#[source] Box<dyn StdError + Send + Sync>),
    /// The schema is not the one that this binary was built for.
    #[error("{0}")]
    Schema(String),
    /// The database cannot be opened as configured. The text says how to mend it.
    #[error("{0}")]
    Open(String),
    #[error("the cursor names nothing in this list")]
    UnknownCursor,
    /// A row holds what this binary cannot have written.
    #[error("the database holds something unreadable: {0}")]
    Corrupt(String),
    /// It was not sent: more comes than the database can take, and it would have waited for too long.
    #[error("more comes than the database can take")]
    Overloaded,
    #[error("a statement failed")]
    Statement(#[source] Box<dyn StdError + Send + Sync>),
}

/// Why something was not written, or may not have been.
#[derive(Debug, thiserror::Error)]
pub enum NotWritten {
    /// It was never sent.
    #[error("not sent to the database")]
    Unsent(#[source] StoreError),
    /// The database refused it.
    #[error("refused by the database")]
    Refused(#[source] StoreError),
    /// It was sent, and nobody knows what came of it.
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

/// Why a statement came to nothing.
#[derive(Debug)]
pub(super) struct Failed {
    /// The statement's name.
    pub(super) statement: &'static str,
    pub(super) cause: sqlx::Error,
}

impl Failed {
    /// The statement would have broken this constraint, and has changed nothing.
    pub(super) fn breaks(&self, constraint: &str) -> bool {
        self.cause
            .as_database_error()
            .and_then(DatabaseError::constraint)
            == Some(constraint)
    }

    /// The statement names a table that is not there.
    pub(super) fn lacks_table(&self) -> bool {
        let cause = self.cause.as_database_error();
        // SQLite has no code of its own for this.
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
        // What the database answers with an error it has taken back, unless the connection ends with it: so a pooler tells
        // that it has lost the server.
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

/// Of what went wrong beside the database.
impl From<StoreError> for NotWritten {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Unavailable(_) | StoreError::Corrupt(_) => Self::Lost(error),
            error => Self::Refused(error),
        }
    }
}

/// What went wrong, and in which statement.
#[derive(Debug, thiserror::Error)]
#[error("{statement}: {cause}")]
struct InStatement {
    statement: &'static str,
    cause: Box<dyn std::error::Error + Send + Sync>,
}

/// Whether an error tells that the connection is broken, and not only that a statement came to nothing.
pub(super) fn is_broken(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) => true,
        // The server stops, or has crashed.
        sqlx::Error::Database(cause) => {
            ["57P01", "57P02"].contains(&&*cause.code().unwrap_or_default())
        }
        _ => false,
    }
}

/// Whether an error ends the connection. What came of the statement is not known then.
fn ends_connection(error: &dyn DatabaseError) -> bool {
    let severity = error
        .try_downcast_ref::<PgDatabaseError>()
        .map(PgDatabaseError::severity);
    matches!(severity, Some(PgSeverity::Fatal | PgSeverity::Panic))
}

/// What the database said, in its own words. (The driver's text adds a line of the server's own source.)
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

/// The code with which Postgres refuses what the role may not do.
const NOT_ALLOWED: &str = "42501";
const MUST_BE_ALLOWED: &str = "; the role needs USAGE on the schema, and SELECT, INSERT, UPDATE and DELETE on all tables in it";

/// What the role may not do, if that is why migrating failed.
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
                "the database is at migration {version}, which is newer than this program and does not serve it: run a \
                 newer `threadkeeper`"
            )),
            MigrateError::VersionMismatch(version) => Self::Schema(format!(
                "migration {version} was applied to the database in another form than this program knows"
            )),
            MigrateError::Dirty(version) => Self::Schema(format!(
                "migration {version} was applied to the database in part only"
            )),
            other => Self::Statement(other.into()),
        }
    }
}

/// Whether the same statement may well succeed later.
pub(super) fn passes(error: &dyn DatabaseError) -> bool {
    let code = error.code().unwrap_or_default();
    if error.try_downcast_ref::<PgDatabaseError>().is_some() {
        // Connection trouble, a server that starts or stops, resources used up, a statement cut short by a time
        // limit, a standby that was the primary a moment ago, a lost serialisation or deadlock.
        return ["08", "57", "53"]
            .iter()
            .any(|class| code.starts_with(class))
            || ["25006", "40001", "40P01", "55P03"].contains(&&*code);
    }
    // The primary code of SQLite is the low byte: busy, locked, I/O error, disk full, cannot open.
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

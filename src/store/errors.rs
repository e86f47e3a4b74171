//! What the driver's errors mean for the callers of the store.

use sqlx::error::DatabaseError;
use sqlx::migrate::MigrateError;
use sqlx::postgres::PgDatabaseError;

use super::StoreError;

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        use sqlx::Error as E;
        match &error {
            E::Io(_) | E::Tls(_) | E::PoolTimedOut | E::PoolClosed | E::WorkerCrashed | E::BeginFailed => {
                Self::Unavailable(error.into())
            }
            E::Database(cause) if passes(&**cause) => Self::Unavailable(Said::by(&**cause).into()),
            E::Database(cause) => Self::Statement(Said::by(&**cause).into()),
            E::ColumnDecode { index, source } => Self::Corrupt(format!("column {index}: {source}")),
            E::Decode(source) => Self::Corrupt(source.to_string()),
            _ => Self::Statement(error.into()),
        }
    }
}

/// What the database said, in its own words. (The driver's text adds a line of the server's own source.)
#[derive(Debug, thiserror::Error)]
#[error("{text} ({code}){}", if code == NOT_ALLOWED { MUST_BE_ALLOWED } else { "" })]
pub(super) struct Said {
    text: String,
    pub(super) code: String,
}

impl Said {
    pub(super) fn by(error: &dyn DatabaseError) -> Self {
        Self { text: error.message().to_owned(), code: error.code().unwrap_or_default().into_owned() }
    }
}

/// The code with which Postgres refuses what the role may not do.
const NOT_ALLOWED: &str = "42501";
const MUST_BE_ALLOWED: &str =
    "; the role needs USAGE on the schema, and SELECT, INSERT, UPDATE and DELETE on all tables in it";

/// What the role may not do, if that is why migrating failed.
pub(super) fn denial(error: &MigrateError) -> Option<String> {
    let (MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _)) = error else {
        return None;
    };
    let cause = error.as_database_error().filter(|cause| cause.code().as_deref() == Some(NOT_ALLOWED))?;
    Some(cause.message().to_owned())
}

impl From<MigrateError> for StoreError {
    fn from(error: MigrateError) -> Self {
        match error {
            MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => error.into(),
            MigrateError::VersionMissing(version) => Self::Schema(newer(version)),
            MigrateError::VersionMismatch(version) => Self::Schema(format!(
                "migration {version} was applied to the database in another form than this program knows"
            )),
            MigrateError::Dirty(version) => {
                Self::Schema(format!("migration {version} was applied to the database in part only"))
            }
            other => Self::Statement(other.into()),
        }
    }
}

/// Compares the newest migration that the database has with the newest that this program has.
pub(super) fn check_version(applied: Option<i64>, known: i64) -> Result<(), StoreError> {
    match applied {
        Some(version) if version == known => Ok(()),
        Some(version) if version > known => Err(StoreError::Schema(newer(version))),
        Some(version) => Err(StoreError::Schema(format!(
            "the database is at migration {version}, this program needs {known}: run `threadkeeper migrate`"
        ))),
        None => {
            Err(StoreError::Schema("the database has no tables yet: run `threadkeeper migrate`".to_owned()))
        }
    }
}

fn newer(version: i64) -> String {
    format!(
        "the database is at migration {version}, which is newer than this program: run a newer `threadkeeper`"
    )
}

/// Whether the same statement may well succeed later.
fn passes(error: &dyn DatabaseError) -> bool {
    let code = error.code().unwrap_or_default();
    if error.try_downcast_ref::<PgDatabaseError>().is_some() {
        // Connection trouble, a server that starts or stops, resources used up, a statement cut short by a time
        // limit, a standby that was the primary a moment ago, a lost serialisation or deadlock.
        return ["08", "57", "53"].iter().any(|class| code.starts_with(class))
            || ["25006", "40001", "40P01", "55P03"].contains(&&*code);
    }
    // The primary code of SQLite is the low byte: busy, locked, I/O error, disk full, cannot open.
    code.parse::<u32>().is_ok_and(|code| [5, 6, 10, 13, 14].contains(&(code & 0xff)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_very_same_schema_is_accepted() {
        assert!(check_version(Some(3), 3).is_ok());
        let text = |applied| check_version(applied, 3).unwrap_err().to_string();
        assert!(text(Some(2)).contains("run `threadkeeper migrate`"));
        assert!(text(None).contains("run `threadkeeper migrate`"));
        assert!(text(Some(4)).contains("newer than this program"));
    }

    #[test]
    fn a_lost_connection_is_worth_a_retry_and_a_bad_statement_is_not() {
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        for error in [sqlx::Error::Io(refused), sqlx::Error::PoolTimedOut, sqlx::Error::PoolClosed] {
            assert!(matches!(StoreError::from(error), StoreError::Unavailable(_)));
        }
        assert!(matches!(StoreError::from(sqlx::Error::RowNotFound), StoreError::Statement(_)));
    }
}

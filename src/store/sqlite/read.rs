//! What callers look at.

use sqlx::SqliteConnection;

use crate::store::read::reads;

reads!(sqlx::Sqlite);

/// The newest migration that was applied; `None` if none was.
pub(super) async fn schema_version(connection: &mut SqliteConnection) -> Result<Option<i64>, StoreError> {
    let found = sqlx::query_scalar("SELECT max(version) FROM _sqlx_migrations WHERE success")
        .fetch_one(&mut *connection)
        .await;
    match found {
        // SQLite has no code of its own for this.
        Err(sqlx::Error::Database(error)) if error.message().starts_with("no such table") => Ok(None),
        found => Ok(found?),
    }
}

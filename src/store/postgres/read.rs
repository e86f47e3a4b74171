//! What callers look at.

use sqlx::PgConnection;

use crate::store::read::reads;

reads!(sqlx::Postgres);

/// The newest migration that was applied; `None` if none was.
pub(super) async fn schema_version(connection: &mut PgConnection) -> Result<Option<i64>, StoreError> {
    let found = sqlx::query_scalar("SELECT max(version) FROM _sqlx_migrations WHERE success")
        .fetch_one(&mut *connection)
        .await;
    match found {
        Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("42P01") => Ok(None),
        found => Ok(found?),
    }
}

//! What callers look at.

use sqlx::PgConnection;

use crate::store::read::reads;

reads!(sqlx::Postgres);

/// The messages of all threads of a key behind the position `$6` of the thread `$5`, up to `$7`, and to the one that reaches
/// `$8` bytes. So many are read of each thread at most: a sort over all of them would read whole transcripts.
const ACROSS_UPWARDS: &str = listed!(
    "m_thread_id ASC, m_position ASC",
    "$7",
    "$8",
    "FROM threads t
    CROSS JOIN LATERAL (
        SELECT f.* FROM messages f
        WHERE f.thread_id = t.id AND f.position > CASE WHEN t.id = $5 THEN $6 ELSE 0 END
        ORDER BY f.position ASC
        LIMIT $7 + 1
    ) m
    WHERE ",
    lasting_of_key!(),
    " AND t.id >= $5
    ORDER BY t.id ASC, m.position ASC"
);

/// The same before that position, backwards.
const ACROSS_DOWNWARDS: &str = listed!(
    "m_thread_id DESC, m_position DESC",
    "$7",
    "$8",
    "FROM threads t
    CROSS JOIN LATERAL (
        SELECT f.* FROM messages f
        WHERE f.thread_id = t.id AND f.position < CASE WHEN t.id = $5 THEN $6 ELSE 9223372036854775807 END
        ORDER BY f.position DESC
        LIMIT $7 + 1
    ) m
    WHERE ",
    lasting_of_key!(),
    " AND t.id <= $5
    ORDER BY t.id DESC, m.position DESC"
);

/// A migration as the database tells of it.
#[derive(sqlx::FromRow)]
pub(super) struct Applied {
    pub(super) version: i64,
    pub(super) checksum: Vec<u8>,
    pub(super) success: bool,
}

/// All migrations that were applied; empty where there is no table of them.
pub(super) async fn applied(connection: &mut PgConnection) -> Result<Vec<Applied>, StoreError> {
    let found = sqlx::query_as("SELECT version, checksum, success FROM _sqlx_migrations ORDER BY version")
        .fetch_all(&mut *connection)
        .await;
    match found {
        Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("42P01") => Ok(Vec::new()),
        found => Ok(found?),
    }
}

/// The names of the role and of the schema that this connection works with, as statements write them.
pub(super) async fn role_and_schema(connection: &mut PgConnection) -> Result<(String, String), StoreError> {
    let names = "SELECT quote_ident(current_user), COALESCE(quote_ident(current_schema()), '<schema>')";
    Ok(sqlx::query_as(names).fetch_one(connection).await?)
}

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

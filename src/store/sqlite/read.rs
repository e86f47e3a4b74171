//! What callers look at.

use sqlx::SqliteConnection;

use crate::store::read::reads;

reads!(sqlx::Sqlite);

/// The messages of all threads of a key behind the position `$6` of the thread `$5`, up to `$7`. So many are read of each
/// thread at most: a sort over all of them would read whole transcripts.
macro_rules! across_upwards {
    () => {
        concat!(
            "FROM threads t
            CROSS JOIN messages m ON m.rowid IN (
                SELECT f.rowid FROM messages f
                WHERE f.thread_id = t.id AND f.position > iif(t.id = $5, $6, 0)
                ORDER BY f.position ASC
                LIMIT $7 + 1
            )
            WHERE ",
            $crate::store::columns::lasting_of_key!(),
            " AND t.id >= $5
            ORDER BY t.id ASC, m.position ASC"
        )
    };
}

/// The same before that position, backwards.
macro_rules! across_downwards {
    () => {
        concat!(
            "FROM threads t
            CROSS JOIN messages m ON m.rowid IN (
                SELECT f.rowid FROM messages f
                WHERE f.thread_id = t.id AND f.position < iif(t.id = $5, $6, 9223372036854775807)
                ORDER BY f.position DESC
                LIMIT $7 + 1
            )
            WHERE ",
            $crate::store::columns::lasting_of_key!(),
            " AND t.id <= $5
            ORDER BY t.id DESC, m.position DESC"
        )
    };
}

const ACROSS_UPWARDS: &str = listed!("m_thread_id ASC, m_position ASC", "$7", "$8", across_upwards!());
const ACROSS_DOWNWARDS: &str = listed!("m_thread_id DESC, m_position DESC", "$7", "$8", across_downwards!());

/// What a page across threads is chosen from.
#[cfg(test)]
pub(super) const ACROSS: [&str; 2] = [
    concat!("SELECT m.rowid ", across_upwards!(), " LIMIT $7"),
    concat!("SELECT m.rowid ", across_downwards!(), " LIMIT $7"),
];

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

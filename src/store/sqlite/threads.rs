//! Threads as callers and operators look at them, change them, and bring them along.

use sqlx::SqliteConnection;

use super::dialect::among_found;
use super::{earlier, expiry, now};
use crate::domain::NewLife;
use crate::store::ThreadUpdate;
use crate::store::columns::unfinished_runs;
use crate::store::rows::{ThreadRow, ttl_millis};
use crate::store::threads::threads;

threads!(sqlx::Sqlite, now = now!(), lock = "");

/// Implements [`Life::update_thread`](crate::store::Life::update_thread).
pub(super) async fn update_thread(
    connection: &mut SqliteConnection,
    key: &ConversationKey,
    update: &ThreadUpdate,
) -> Result<Option<Thread>, StoreError> {
    let (from_now, from_last_activity) = ttl_millis(update.life.and_then(NewLife::own));
    let row: Option<ThreadRow> = sqlx::query_as(concat!(
        "UPDATE threads AS t SET metadata = COALESCE($5, t.metadata),
            max_age_ms = CASE
                WHEN NOT $6 THEN t.max_age_ms
                WHEN $7 IS NOT NULL THEN max(0, ",
        now!(),
        " - t.created_at + $7)
            END,
            max_idle_ms = iif($6, $8, t.max_idle_ms),
            due_at = CASE
                WHEN NOT $6 THEN t.due_at
                WHEN $7 IS NOT NULL THEN ",
        now!(),
        " + $7
                WHEN $8 IS NOT NULL THEN t.last_active_at + $8
                ELSE ",
        earlier!("$9", "$10"),
        "
            END
        WHERE ",
        current_of_key!(),
        " AND COALESCE(",
        expiry!("$9", "$10"),
        " > ",
        now!(),
        ", 1)
        RETURNING ",
        thread_columns!("threads"),
    ))
    .bind(key.tenant.as_str())
    .bind(key.user.as_str())
    .bind(key.scope.kind())
    .bind(key.scope.name())
    .bind(update.metadata.as_ref().map(json).transpose()?)
    .bind(update.life.is_some())
    .bind(from_now)
    .bind(from_last_activity)
    .bind(update.limits.max_age.map(millis))
    .bind(update.limits.max_idle.map(millis))
    .fetch_optional(connection)
    .await?;
    row.map(Thread::try_from).transpose()
}

//! Threads as callers and operators look at them, change them, and bring them along.

use sqlx::PgConnection;

use super::dialect::among_found;
use super::{earlier, expiry};
use crate::domain::NewLife;
use crate::store::ThreadUpdate;
use crate::store::columns::unfinished_runs;
use crate::store::rows::{ThreadRow, ttl_millis};
use crate::store::threads::threads;

threads!(sqlx::Postgres, now = "now()", lock = " FOR NO KEY UPDATE");

/// Implements [`Life::update_thread`](crate::store::Life::update_thread).
pub(super) async fn update_thread(
    connection: &mut PgConnection,
    key: &ConversationKey,
    update: &ThreadUpdate,
) -> Result<Option<Thread>, StoreError> {
    let (from_now, from_last_activity) = ttl_millis(update.life.and_then(NewLife::own));
    let row: Option<ThreadRow> = sqlx::query_as(concat!(
        "UPDATE threads t SET metadata = COALESCE($5::jsonb, t.metadata),
            max_age_ms = CASE
                WHEN NOT $6 THEN t.max_age_ms
                WHEN $7 IS NOT NULL
                THEN GREATEST(0, ceil(EXTRACT(epoch FROM clock_timestamp() - t.created_at) * 1000)::bigint + $7)
            END,
            max_idle_ms = CASE WHEN $6 THEN $8 ELSE t.max_idle_ms END,
            due_at = CASE
                WHEN NOT $6 THEN t.due_at
                WHEN $7 IS NOT NULL THEN clock_timestamp() + $7 * interval '1 millisecond'
                WHEN $8 IS NOT NULL THEN t.last_active_at + $8 * interval '1 millisecond'
                ELSE ",
        earlier!("$9", "$10"),
        "
            END
        WHERE ",
        current_of_key!(),
        " AND COALESCE(",
        expiry!("$9", "$10"),
        " > clock_timestamp(), true)
        RETURNING ",
        thread_columns!(),
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

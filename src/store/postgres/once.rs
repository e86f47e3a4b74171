//! Idempotency keys.

use std::time::Duration;

use sqlx::PgConnection;
use sqlx::error::DatabaseError;

use crate::domain::{ConversationKey, RunErrorCode};
use crate::store::columns::{run_columns, thread_columns};
use crate::store::rows::{RepeatedRow, millis};
use crate::store::{Repeated, StoreError};

/// Implements [`Store::repeated`](crate::store::Store::repeated).
pub(super) async fn repeated(
    connection: &mut PgConnection,
    key: &ConversationKey,
    idempotency_key: &str,
    remember: Duration,
) -> Result<Option<Repeated>, StoreError> {
    // The statement reads the table as it was before it deletes from it, hence the last condition.
    let row: Option<RepeatedRow> = sqlx::query_as(concat!(
        "WITH forgotten AS (
            DELETE FROM idempotency_keys k
            WHERE k.tenant = $1 AND k.user_key = $2 AND k.scope_kind = $3 AND k.scope_name = $4 AND k.key = $5
                AND (k.created_at <= now() - $6 * interval '1 millisecond' OR EXISTS (
                    SELECT FROM runs r WHERE r.id = k.run_id AND r.error ->> 'code' = $7
                ))
            RETURNING k.run_id
        ), used AS MATERIALIZED (
            SELECT k.run_id, k.request_hash FROM idempotency_keys k
            WHERE k.tenant = $1 AND k.user_key = $2 AND k.scope_kind = $3 AND k.scope_name = $4 AND k.key = $5
                AND NOT EXISTS (SELECT FROM forgotten)
        )
        SELECT u.request_hash, ",
        thread_columns!(),
        ", ",
        run_columns!(),
        " FROM used u
        CROSS JOIN LATERAL (SELECT * FROM runs o WHERE o.id = u.run_id LIMIT 1) r
        CROSS JOIN LATERAL (SELECT * FROM threads o WHERE o.id = r.thread_id LIMIT 1) t",
    ))
    .bind(key.tenant.as_str())
    .bind(key.user.as_str())
    .bind(key.scope.kind())
    .bind(key.scope.name())
    .bind(idempotency_key)
    .bind(millis(remember))
    .bind(RunErrorCode::NotRecorded.as_str())
    .fetch_optional(connection)
    .await?;
    row.map(Repeated::try_from).transpose()
}

/// Whether a statement failed because the idempotency key is in use. Nothing of it was stored then.
pub(super) fn is_repeated(error: &sqlx::Error) -> bool {
    error.as_database_error().and_then(DatabaseError::constraint) == Some("idempotency_keys_pkey")
}

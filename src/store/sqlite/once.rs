//! Idempotency keys. Writing transactions come one after another, so looking a key up before it is used is exact.

use std::time::Duration;

use sqlx::SqliteConnection;

use super::now;
use crate::domain::{ConversationKey, RunErrorCode, RunId};
use crate::store::columns::{run_columns, thread_columns};
use crate::store::rows::{RepeatedRow, millis};
use crate::store::{Idempotency, Repeated, StoreError};

/// Implements [`Store::repeated`](crate::store::Store::repeated).
pub(super) async fn repeated(
    connection: &mut SqliteConnection,
    key: &ConversationKey,
    idempotency_key: &str,
    remember: Duration,
) -> Result<Option<Repeated>, StoreError> {
    let row: Option<RepeatedRow> = sqlx::query_as(concat!(
        "DELETE FROM idempotency_keys
        WHERE tenant = $1 AND user_key = $2 AND scope_kind = $3 AND scope_name = $4 AND key = $5
            AND (created_at <= ",
        now!(),
        " - $6 OR EXISTS (
                SELECT 1 FROM runs r WHERE r.id = run_id AND r.error ->> 'code' = $7
            ));

        SELECT k.request_hash, ",
        thread_columns!(),
        ", ",
        run_columns!(),
        " FROM idempotency_keys k
        JOIN runs r ON r.id = k.run_id
        JOIN threads t ON t.id = r.thread_id
        WHERE k.tenant = $1 AND k.user_key = $2 AND k.scope_kind = $3 AND k.scope_name = $4 AND k.key = $5",
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

/// Lets a key stand for a run from now on.
pub(super) async fn note(
    tx: &mut SqliteConnection,
    key: &ConversationKey,
    idempotency: Option<&Idempotency>,
    run: RunId,
) -> Result<(), StoreError> {
    let Some(idempotency) = idempotency else { return Ok(()) };
    sqlx::query(concat!(
        "INSERT INTO idempotency_keys (
            tenant, user_key, scope_kind, scope_name, key, run_id, request_hash, created_at
        )
        VALUES ($1, $2, $3, $4, $5, $6, $7, ",
        now!(),
        ")",
    ))
    .bind(key.tenant.as_str())
    .bind(key.user.as_str())
    .bind(key.scope.kind())
    .bind(key.scope.name())
    .bind(&idempotency.key)
    .bind(run.uuid())
    .bind(&idempotency.request_hash[..])
    .execute(tx)
    .await?;
    Ok(())
}

//! What others ask of a run: to end, or to change hands.

use sqlx::SqliteConnection;
use uuid::Uuid;

use super::{listed, read};
use crate::domain::{ConversationKey, ReplicaId, Run, RunId};
use crate::store::rows::RequestRow;
use crate::store::{Request, RunLease, StoreError};

/// Implements [`Store::displace`](crate::store::Store::displace). A repetition that has nothing to change writes
/// nothing.
pub(super) async fn displace(
    connection: &mut SqliteConnection,
    lease: &RunLease,
    discard: bool,
) -> Result<Option<RunId>, StoreError> {
    let mut tx = super::write(connection).await?;
    let active: Option<(Uuid, bool)> = sqlx::query_as(
        "SELECT r.id, r.status = 'cancelling' AND (r.discard OR NOT $3)
        FROM runs w JOIN runs r INDEXED BY runs_active ON r.thread_id = w.thread_id AND r.seq < w.seq
        WHERE w.id = $1 AND w.fence = $2 AND w.status = 'queued'
            AND r.status IN ('in_progress', 'requires_action', 'cancelling')",
    )
    .bind(lease.run_id.uuid())
    .bind(lease.fence)
    .bind(discard)
    .fetch_optional(&mut *tx)
    .await?;
    let Some((active, is_marked)) = active else { return Ok(None) };
    if !is_marked {
        sqlx::query("UPDATE runs SET status = 'cancelling', discard = discard OR $2 WHERE id = $1")
            .bind(active)
            .bind(discard)
            .execute(&mut *tx)
            .await?;
    }
    tx.commit().await?;
    Ok(Some(RunId::from_uuid(active)))
}

/// Implements [`Store::request_cancel`](crate::store::Store::request_cancel).
pub(super) async fn request_cancel(
    connection: &mut SqliteConnection,
    key: &ConversationKey,
    id: RunId,
) -> Result<Option<Run>, StoreError> {
    let mut tx = super::write(connection).await?;
    sqlx::query(
        "UPDATE runs SET status = 'cancelling'
        WHERE id = $5 AND status IN ('in_progress', 'requires_action') AND EXISTS (
            SELECT 1 FROM threads t
            WHERE t.id = runs.thread_id AND t.tenant = $1 AND t.user_key = $2 AND t.scope_kind = $3
                AND t.scope_name = $4
        )",
    )
    .bind(key.tenant.as_str())
    .bind(key.user.as_str())
    .bind(key.scope.kind())
    .bind(key.scope.name())
    .bind(id.uuid())
    .execute(&mut *tx)
    .await?;
    let found = read::run(&mut tx, key, id).await?;
    tx.commit().await?;
    Ok(found.map(|(run, _)| run))
}

/// Implements [`Store::requests`](crate::store::Store::requests).
pub(super) async fn requests(
    connection: &mut SqliteConnection,
    replica: ReplicaId,
) -> Result<Vec<Request>, StoreError> {
    let rows: Vec<RequestRow> = sqlx::query_as(
        "SELECT r.id, r.status, r.discard, r.tool_outputs FROM runs r INDEXED BY runs_active
        WHERE r.status IN ('in_progress', 'requires_action', 'cancelling') AND r.owner = $1
            AND (r.status = 'cancelling' OR (r.status = 'in_progress' AND r.tool_outputs IS NOT NULL
                AND NOT r.outputs_sent))",
    )
    .bind(replica.uuid())
    .fetch_all(connection)
    .await?;
    rows.into_iter().map(Request::try_from).collect()
}

/// Implements [`Store::lost`](crate::store::Store::lost).
pub(super) async fn lost(
    connection: &mut SqliteConnection,
    replica: ReplicaId,
    working: &[RunId],
) -> Result<Vec<RunId>, StoreError> {
    let lost: Vec<Uuid> = sqlx::query_scalar(
        "SELECT r.id FROM json_each($2) w JOIN runs r ON r.id = unhex(w.value) WHERE r.owner IS NOT $1",
    )
    .bind(replica.uuid())
    .bind(listed(working))
    .fetch_all(connection)
    .await?;
    Ok(lost.into_iter().map(RunId::from_uuid).collect())
}

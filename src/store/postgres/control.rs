//! What others ask of a run: to end, or to change hands. They lock the run's row alone.

use sqlx::PgConnection;
use uuid::Uuid;

use super::replicas::unfinished_of_owner;
use crate::domain::{ConversationKey, ReplicaId, Run, RunId};
use crate::store::columns::run_columns;
use crate::store::rows::{RequestRow, RunRow};
use crate::store::{Request, RunLease, StoreError};

/// Implements [`Store::displace`](crate::store::Store::displace). A repetition that has nothing to change writes
/// nothing, so it does not lock the run either.
pub(super) async fn displace(
    connection: &mut PgConnection,
    lease: &RunLease,
    discard: bool,
) -> Result<Option<RunId>, StoreError> {
    let id: Option<Uuid> = sqlx::query_scalar(
        "WITH waiting AS MATERIALIZED (
            SELECT r.thread_id, r.seq FROM runs r WHERE r.id = $1 AND r.fence = $2 AND r.input IS NOT NULL
        ), at_work AS MATERIALIZED (
            SELECT r.id, r.seq, r.status = 'cancelling' AND (r.discard OR NOT $3) AS is_marked FROM runs r
            WHERE r.thread_id = (SELECT w.thread_id FROM waiting w)
                AND r.status IN ('in_progress', 'requires_action', 'cancelling')
        ), earlier AS MATERIALIZED (
            SELECT a.id, a.is_marked FROM at_work a JOIN waiting w ON a.seq < w.seq
        ), marked AS (
            UPDATE runs r SET status = 'cancelling', discard = r.discard OR $3
            WHERE r.id = (SELECT e.id FROM earlier e WHERE NOT e.is_marked) AND r.finished_at IS NULL
            RETURNING r.id
        )
        SELECT e.id FROM earlier e WHERE e.is_marked UNION ALL SELECT m.id FROM marked m",
    )
    .bind(lease.run_id.uuid())
    .bind(lease.fence)
    .bind(discard)
    .fetch_optional(connection)
    .await?;
    Ok(id.map(RunId::from_uuid))
}

/// Implements [`Store::request_cancel`](crate::store::Store::request_cancel). The run is locked even if there is
/// nothing to change, so that the answer is not out of date. One that moves to a fresh thread meanwhile is not found the
/// first time.
pub(super) async fn request_cancel(
    connection: &mut PgConnection,
    key: &ConversationKey,
    id: RunId,
) -> Result<Option<Run>, StoreError> {
    match try_request_cancel(connection, key, id).await? {
        None => try_request_cancel(connection, key, id).await,
        found => Ok(found),
    }
}

async fn try_request_cancel(
    connection: &mut PgConnection,
    key: &ConversationKey,
    id: RunId,
) -> Result<Option<Run>, StoreError> {
    let row: Option<RunRow> = sqlx::query_as(concat!(
        "WITH found AS MATERIALIZED (
            SELECT r.* FROM runs r JOIN threads t ON t.id = r.thread_id
            WHERE r.id = $5 AND t.tenant = $1 AND t.user_key = $2 AND t.scope_kind = $3 AND t.scope_name = $4
            FOR NO KEY UPDATE OF r
        ), marked AS (
            UPDATE runs r SET status = 'cancelling' FROM found f
            WHERE r.id = $5 AND f.status IN ('in_progress', 'requires_action')
            RETURNING r.*
        )
        SELECT ",
        run_columns!(),
        " FROM marked r
        UNION ALL
        SELECT ",
        run_columns!(),
        " FROM found r WHERE NOT EXISTS (SELECT FROM marked)",
    ))
    .bind(key.tenant.as_str())
    .bind(key.user.as_str())
    .bind(key.scope.kind())
    .bind(key.scope.name())
    .bind(id.uuid())
    .fetch_optional(connection)
    .await?;
    row.map(Run::try_from).transpose()
}

/// Implements [`Store::requests`](crate::store::Store::requests).
pub(super) async fn requests(
    connection: &mut PgConnection,
    replica: ReplicaId,
) -> Result<Vec<Request>, StoreError> {
    let rows: Vec<RequestRow> = sqlx::query_as(concat!(
        "SELECT r.id, r.status, r.discard, r.tool_outputs FROM runs r WHERE r.owner = $1 AND ",
        unfinished_of_owner!(),
        " AND (r.status = 'cancelling' OR (r.tool_outputs IS NOT NULL AND NOT r.outputs_sent))"
    ))
    .bind(replica.uuid())
    .fetch_all(connection)
    .await?;
    rows.into_iter().map(Request::try_from).collect()
}

/// Implements [`Store::lost`](crate::store::Store::lost).
pub(super) async fn lost(
    connection: &mut PgConnection,
    replica: ReplicaId,
    working: &[RunId],
) -> Result<Vec<RunId>, StoreError> {
    let working: Vec<Uuid> = working.iter().map(|run| run.uuid()).collect();
    let lost: Vec<Uuid> =
        sqlx::query_scalar("SELECT r.id FROM runs r WHERE r.id = ANY($2) AND r.owner IS DISTINCT FROM $1")
            .bind(replica.uuid())
            .bind(working)
            .fetch_all(connection)
            .await?;
    Ok(lost.into_iter().map(RunId::from_uuid).collect())
}

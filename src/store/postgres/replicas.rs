//! Sessions of gateway processes, and what the dead ones leave behind.

use std::time::Duration;

use sqlx::PgConnection;
use uuid::Uuid;

use crate::domain::{ReplicaId, RunId};
use crate::store::columns::{run_columns, thread_columns};
use crate::store::rows::{OrphanRow, millis};
use crate::store::{Orphan, StoreError};

/// Implements [`Store::renew_replica`](crate::store::Store::renew_replica).
pub(super) async fn renew(
    connection: &mut PgConnection,
    id: ReplicaId,
    address: &str,
    ttl: Duration,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO replicas (id, address, started_at, expires_at)
        VALUES ($1, $2, now(), now() + $3 * interval '1 millisecond')
        ON CONFLICT (id) DO UPDATE SET address = excluded.address, expires_at = excluded.expires_at",
    )
    .bind(id.uuid())
    .bind(address)
    .bind(millis(ttl))
    .execute(&mut *connection)
    .await?;
    Ok(())
}

/// Implements [`Store::retire_replica`](crate::store::Store::retire_replica).
pub(super) async fn retire(connection: &mut PgConnection, id: ReplicaId) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM replicas WHERE id = $1").bind(id.uuid()).execute(&mut *connection).await?;
    Ok(())
}

/// Implements [`Store::adopt_orphans`](crate::store::Store::adopt_orphans).
///
/// Replicas that do so at once share the work. One that found an orphan just before another took it locks the row
/// as the other left it; its own snapshot (`s`) still has the old fence, which tells.
pub(super) async fn adopt_orphans(
    connection: &mut PgConnection,
    id: ReplicaId,
    working: &[RunId],
    limit: u32,
) -> Result<Vec<Orphan>, StoreError> {
    let working: Vec<Uuid> = working.iter().map(|run| run.uuid()).collect();
    // Thread ids sort by age, and within a thread the runs must come in order of admission.
    let rows: Vec<OrphanRow> = sqlx::query_as(concat!(
        "WITH orphans AS MATERIALIZED (
            SELECT r.id, r.fence FROM runs r
            WHERE r.status IN ('queued', 'in_progress', 'requires_action', 'cancelling')
                AND CASE
                    WHEN r.owner = $1
                    THEN r.id <> ALL($3) AND (r.fence > 1 OR r.created_at < now() - interval '1 minute')
                    ELSE NOT EXISTS (SELECT FROM replicas p WHERE p.id = r.owner AND p.expires_at > now())
                END
            ORDER BY r.thread_id, r.seq
            LIMIT $2
            FOR NO KEY UPDATE OF r SKIP LOCKED
        ), taken AS (
            UPDATE runs r SET owner = $1, fence = r.fence + 1
            FROM orphans o
            JOIN runs s ON s.id = o.id AND s.fence = o.fence
            WHERE r.id = o.id
            RETURNING r.*, s.owner AS previous_owner
        )
        SELECT r.previous_owner, r.partial, r.tool_outputs, r.outputs_sent,
            (EXTRACT(epoch FROM r.deadline_at - clock_timestamp()) * 1000)::bigint AS time_left, ",
        thread_columns!(),
        ", ",
        run_columns!(),
        " FROM taken r JOIN threads t ON t.id = r.thread_id ORDER BY r.thread_id, r.seq",
    ))
    .bind(id.uuid())
    .bind(i64::from(limit))
    .bind(working)
    .fetch_all(&mut *connection)
    .await?;
    // Long dead, and nothing refers to them but the runs that are orphans anyway.
    sqlx::query("DELETE FROM replicas WHERE expires_at < now() - interval '1 day'")
        .execute(connection)
        .await?;
    rows.into_iter().map(Orphan::try_from).collect()
}

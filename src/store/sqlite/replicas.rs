//! Sessions of gateway processes, and what the dead ones leave behind. The file serves one process at a time, so
//! these are that process's own earlier lives.

use std::time::Duration;

use sqlx::SqliteConnection;
use uuid::Uuid;

use super::read::said;
use super::{listed, now, write};
use crate::domain::{ReplicaId, RunId, RunStatus};
use crate::store::columns::{run_columns, thread_columns};
use crate::store::rows::{OrphanRow, RenewedRow, millis};
use crate::store::{Orphan, Renewed, RunLease, StoreError};

/// Ends all sessions, if there is a schema yet.
pub(super) async fn forget(connection: &mut SqliteConnection) -> Result<(), StoreError> {
    let tables: i64 =
        sqlx::query_scalar("SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name = 'replicas'")
            .fetch_one(&mut *connection)
            .await?;
    if tables > 0 {
        sqlx::query("DELETE FROM replicas").execute(&mut *connection).await?;
    }
    Ok(())
}

/// Implements [`Store::renew_replica`](crate::store::Store::renew_replica).
pub(super) async fn renew(
    connection: &mut SqliteConnection,
    id: ReplicaId,
    address: &str,
    ttl: Duration,
) -> Result<Renewed, StoreError> {
    let row: RenewedRow = sqlx::query_as(concat!(
        "INSERT INTO replicas (id, address, started_at, expires_at) VALUES ($1, $2, ",
        now!(),
        ", ",
        now!(),
        " + $3)
        ON CONFLICT (id) DO UPDATE SET address = excluded.address, expires_at = excluded.expires_at;

        SELECT EXISTS (SELECT 1 FROM replicas p WHERE p.id <> $1 AND p.expires_at > ",
        now!(),
        ") AS has_peers, ",
        now!(),
        " AS now",
    ))
    .bind(id.uuid())
    .bind(address)
    .bind(millis(ttl))
    .fetch_one(&mut *connection)
    .await?;
    Ok(row.into())
}

/// Implements [`Store::retire_replica`](crate::store::Store::retire_replica).
pub(super) async fn retire(connection: &mut SqliteConnection, id: ReplicaId) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM replicas WHERE id = $1").bind(id.uuid()).execute(&mut *connection).await?;
    Ok(())
}

/// Implements [`Store::release`](crate::store::Store::release).
pub(super) async fn release(
    connection: &mut SqliteConnection,
    leases: &[RunLease],
) -> Result<(), StoreError> {
    let mut tx = write(connection).await?;
    for lease in leases {
        sqlx::query(
            "UPDATE runs SET owner = NULL
            WHERE id = $1 AND fence = $2
                AND finished_at IS NULL",
        )
        .bind(lease.run_id.uuid())
        .bind(lease.fence)
        .execute(&mut *tx)
        .await?;
    }
    Ok(tx.commit().await?)
}

/// Implements [`Store::adopt_orphans`](crate::store::Store::adopt_orphans).
pub(super) async fn adopt_orphans(
    connection: &mut SqliteConnection,
    id: ReplicaId,
    working: &[RunId],
    limit: u32,
) -> Result<Vec<Orphan>, StoreError> {
    let mut tx = write(connection).await?;
    // Thread ids sort by age, and within a thread the runs must come in order of admission.
    let orphans: Vec<(Uuid, Option<Uuid>)> = sqlx::query_as(concat!(
        "SELECT r.id, r.owner FROM runs r INDEXED BY runs_by_owner
        WHERE r.finished_at IS NULL
            AND CASE
                WHEN r.owner = $2
                THEN lower(hex(r.id)) NOT IN (SELECT value FROM json_each($3)) AND (r.fence > 1 OR r.created_at < ",
        now!(),
        " - 60000)
                ELSE NOT EXISTS (SELECT 1 FROM replicas p WHERE p.id = r.owner AND p.expires_at > ",
        now!(),
        ")
            END
        ORDER BY r.thread_id, r.seq
        LIMIT $1",
    ))
    .bind(i64::from(limit))
    .bind(id.uuid())
    .bind(listed(working))
    .fetch_all(&mut *tx)
    .await?;
    let mut adopted = Vec::with_capacity(orphans.len());
    for (run, previous_owner) in orphans {
        sqlx::query("UPDATE runs SET owner = $1, fence = fence + 1 WHERE id = $2")
            .bind(id.uuid())
            .bind(run)
            .execute(&mut *tx)
            .await?;
        let row: OrphanRow = sqlx::query_as(concat!(
            "SELECT $2 AS previous_owner, r.partial, r.tool_outputs, r.outputs_sent, r.deadline_at - ",
            now!(),
            " AS time_left, ",
            thread_columns!(),
            ", ",
            run_columns!(),
            " FROM runs r JOIN threads t ON t.id = r.thread_id WHERE r.id = $1",
        ))
        .bind(run)
        .bind(previous_owner)
        .fetch_one(&mut *tx)
        .await?;
        let mut orphan = Orphan::try_from(row)?;
        if orphan.run.status != RunStatus::Queued {
            orphan.input = said(&mut tx, orphan.run.id).await?;
        }
        adopted.push(orphan);
    }
    tx.commit().await?;
    Ok(adopted)
}

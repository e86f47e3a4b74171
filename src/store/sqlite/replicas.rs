//! Sessions of gateway processes, and what the dead ones leave behind. The file serves one process at a time, so
//! these are that process's own earlier lives.

use std::time::Duration;

use sqlx::{Sqlite, SqlitePool, Transaction};
use uuid::Uuid;

use super::now;
use crate::domain::ReplicaId;
use crate::store::rows::{ThreadAndRun, millis, orphan, run_columns, thread_columns};
use crate::store::{Orphan, StoreError};

/// Ends all sessions, if there is a schema yet.
pub(super) async fn forget(writer: &SqlitePool) -> Result<(), StoreError> {
    let tables: i64 =
        sqlx::query_scalar("SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name = 'replicas'")
            .fetch_one(writer)
            .await?;
    if tables > 0 {
        sqlx::query("DELETE FROM replicas").execute(writer).await?;
    }
    Ok(())
}

/// Implements [`Store::renew_replica`](crate::store::Store::renew_replica).
pub(super) async fn renew(
    writer: &SqlitePool,
    id: ReplicaId,
    address: &str,
    ttl: Duration,
) -> Result<(), StoreError> {
    sqlx::query(concat!(
        "INSERT INTO replicas (id, address, started_at, expires_at) VALUES ($1, $2, ",
        now!(),
        ", ",
        now!(),
        " + $3)
        ON CONFLICT (id) DO UPDATE SET address = excluded.address, expires_at = excluded.expires_at",
    ))
    .bind(id.uuid())
    .bind(address)
    .bind(millis(ttl))
    .execute(writer)
    .await?;
    Ok(())
}

/// Implements [`Store::retire_replica`](crate::store::Store::retire_replica).
pub(super) async fn retire(writer: &SqlitePool, id: ReplicaId) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM replicas WHERE id = $1").bind(id.uuid()).execute(writer).await?;
    Ok(())
}

/// Implements [`Store::adopt_orphans`](crate::store::Store::adopt_orphans).
pub(super) async fn adopt_orphans(
    mut tx: Transaction<'static, Sqlite>,
    id: ReplicaId,
    limit: u32,
) -> Result<Vec<Orphan>, StoreError> {
    // Thread ids sort by age, and within a thread the runs must come in order of admission.
    let orphans: Vec<Uuid> = sqlx::query_scalar(concat!(
        "SELECT r.id FROM runs r INDEXED BY runs_unfinished
        WHERE r.status IN ('queued', 'in_progress', 'requires_action', 'cancelling')
            AND NOT EXISTS (SELECT 1 FROM replicas p WHERE p.id = r.owner AND p.expires_at > ",
        now!(),
        ")
        ORDER BY r.thread_id, r.seq
        LIMIT $1",
    ))
    .bind(i64::from(limit))
    .fetch_all(&mut *tx)
    .await?;
    let mut adopted = Vec::with_capacity(orphans.len());
    for run in orphans {
        sqlx::query("UPDATE runs SET owner = $1, fence = fence + 1 WHERE id = $2")
            .bind(id.uuid())
            .bind(run)
            .execute(&mut *tx)
            .await?;
        let row: ThreadAndRun = sqlx::query_as(concat!(
            "SELECT ",
            thread_columns!(),
            ", ",
            run_columns!(),
            " FROM runs r JOIN threads t ON t.id = r.thread_id WHERE r.id = $1",
        ))
        .bind(run)
        .fetch_one(&mut *tx)
        .await?;
        adopted.push(orphan(row)?);
    }
    tx.commit().await?;
    Ok(adopted)
}

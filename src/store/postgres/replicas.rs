//! Sessions of gateway processes, and what the dead ones leave behind.

use std::time::Duration;

use sqlx::PgPool;

use crate::domain::ReplicaId;
use crate::store::rows::{ThreadAndRun, millis, orphan, run_columns, thread_columns};
use crate::store::{Orphan, StoreError};

/// Implements [`Store::renew_replica`](crate::store::Store::renew_replica).
pub(super) async fn renew(
    pool: &PgPool,
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
    .execute(pool)
    .await?;
    Ok(())
}

/// Implements [`Store::retire_replica`](crate::store::Store::retire_replica).
pub(super) async fn retire(pool: &PgPool, id: ReplicaId) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM replicas WHERE id = $1").bind(id.uuid()).execute(pool).await?;
    Ok(())
}

/// Implements [`Store::adopt_orphans`](crate::store::Store::adopt_orphans).
///
/// Replicas that do so at once share the work. One that waited for a row sees its new owner, and leaves it alone
/// if that owner is alive.
pub(super) async fn adopt_orphans(
    pool: &PgPool,
    id: ReplicaId,
    limit: u32,
) -> Result<Vec<Orphan>, StoreError> {
    // Thread ids sort by age, and within a thread the runs must come in order of admission.
    let rows: Vec<ThreadAndRun> = sqlx::query_as(concat!(
        "WITH orphans AS MATERIALIZED (
            SELECT r.id FROM runs r
            WHERE r.status IN ('queued', 'in_progress', 'requires_action', 'cancelling')
                AND NOT EXISTS (SELECT FROM replicas p WHERE p.id = r.owner AND p.expires_at > now())
            ORDER BY r.thread_id, r.seq
            LIMIT $2
            FOR NO KEY UPDATE OF r SKIP LOCKED
        ), taken AS (
            UPDATE runs r SET owner = $1, fence = r.fence + 1 FROM orphans o WHERE r.id = o.id RETURNING r.*
        )
        SELECT ",
        thread_columns!(),
        ", ",
        run_columns!(),
        " FROM taken r JOIN threads t ON t.id = r.thread_id ORDER BY r.thread_id, r.seq",
    ))
    .bind(id.uuid())
    .bind(i64::from(limit))
    .fetch_all(pool)
    .await?;
    rows.into_iter().map(orphan).collect()
}

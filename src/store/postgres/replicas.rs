//! Sessions of gateway processes, and what the dead ones leave behind.

use std::time::Duration;

use sqlx::PgConnection;
use uuid::Uuid;

use crate::domain::{Message, ReplicaId, RunId, RunStatus};
use crate::store::columns::{message_columns, run_columns, thread_columns};
use crate::store::rows::{MessageRow, OrphanRow, RenewedRow, millis};
use crate::store::{InputMessage, Orphan, Renewed, RunLease, StoreError};

/// Implements [`Store::renew_replica`](crate::store::Store::renew_replica).
pub(super) async fn renew(
    connection: &mut PgConnection,
    id: ReplicaId,
    address: &str,
    ttl: Duration,
) -> Result<Renewed, StoreError> {
    let row: RenewedRow = sqlx::query_as(
        "WITH renewed AS (
            INSERT INTO replicas (id, address, started_at, expires_at)
            VALUES ($1, $2, now(), now() + $3 * interval '1 millisecond')
            ON CONFLICT (id) DO UPDATE SET address = excluded.address, expires_at = excluded.expires_at
        )
        SELECT EXISTS (SELECT FROM replicas p WHERE p.id <> $1 AND p.expires_at > now()) AS has_peers,
            clock_timestamp() AS now",
    )
    .bind(id.uuid())
    .bind(address)
    .bind(millis(ttl))
    .fetch_one(&mut *connection)
    .await?;
    Ok(row.into())
}

/// Implements [`Store::retire_replica`](crate::store::Store::retire_replica).
pub(super) async fn retire(connection: &mut PgConnection, id: ReplicaId) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM replicas WHERE id = $1").bind(id.uuid()).execute(&mut *connection).await?;
    Ok(())
}

/// Implements [`Store::release`](crate::store::Store::release). The fence stays: it rises when the run is adopted, and
/// until then nobody writes but whoever gave the run up, if at all.
pub(super) async fn release(connection: &mut PgConnection, leases: &[RunLease]) -> Result<(), StoreError> {
    let (runs, fences): (Vec<Uuid>, Vec<i64>) =
        leases.iter().map(|lease| (lease.run_id.uuid(), lease.fence)).unzip();
    // Runs are locked by id, as by all that lock several.
    sqlx::query(
        "WITH held AS MATERIALIZED (
            SELECT r.id FROM runs r JOIN unnest($1::uuid[], $2::bigint[]) AS l (id, fence) ON l.id = r.id
            WHERE r.id = ANY($1) AND r.fence = l.fence AND r.finished_at IS NULL
            ORDER BY r.id
            FOR NO KEY UPDATE OF r
        )
        UPDATE runs r SET owner = NULL FROM held h WHERE r.id = ANY($1) AND r.id = h.id",
    )
    .bind(runs)
    .bind(fences)
    .execute(connection)
    .await?;
    Ok(())
}

/// `r` has not ended, in the words of the index `runs_by_owner`, which is for what looks runs up by their owner.
macro_rules! unfinished_of_owner {
    () => {
        "COALESCE(r.finished_at, 'infinity') = 'infinity'"
    };
}
pub(super) use unfinished_of_owner;

/// What may be an orphan. `owners` steps from one owner of unfinished runs to the next, of which there are few, so that
/// the runs of those who live are not looked at, however many they are. Of its own the caller looks at all, for strays.
///
/// Each part gives more than are wanted: others may be about to take them too. It is in the order of a whole row, which no
/// index has: else all runs that there ever were might be read in that order until one is found.
const FIND: &str = concat!(
    "WITH RECURSIVE owners AS (
        (SELECT r.owner FROM runs r WHERE ",
    unfinished_of_owner!(),
    " AND r.owner IS NOT NULL ORDER BY r.owner LIMIT 1)
        UNION ALL
        SELECT (
            SELECT r.owner FROM runs r WHERE ",
    unfinished_of_owner!(),
    " AND r.owner > o.owner ORDER BY r.owner LIMIT 1
        )
        FROM owners o WHERE o.owner IS NOT NULL
    )
    (
        SELECT f.id, f.fence FROM owners o
        CROSS JOIN LATERAL (
            SELECT r.id, r.fence FROM runs r WHERE r.owner = o.owner AND ",
    unfinished_of_owner!(),
    " ORDER BY ROW(r.thread_id, r.seq) LIMIT $3
        ) f
        WHERE o.owner <> $1
            AND NOT EXISTS (SELECT FROM replicas p WHERE p.id = o.owner AND p.expires_at > now())
    )
    UNION ALL (
        SELECT r.id, r.fence FROM runs r WHERE r.owner IS NULL AND ",
    unfinished_of_owner!(),
    " ORDER BY ROW(r.thread_id, r.seq) LIMIT $3
    )
    UNION ALL (
        SELECT r.id, r.fence FROM runs r WHERE r.owner = $1 AND ",
    unfinished_of_owner!(),
    " AND (r.fence > 1 OR r.created_at < now() - interval '1 minute')
            -- Not as a condition on the array itself, which older servers go through for each run.
            AND r.id NOT IN (SELECT unnest($2::uuid[]))
        ORDER BY ROW(r.thread_id, r.seq) LIMIT $3
    )",
);

/// Of those that were found, takes what is an orphan still, and has not changed hands meanwhile. Replicas that do so at
/// once share the work.
const TAKE: &str = concat!(
    "WITH orphans AS MATERIALIZED (
        SELECT r.id, r.owner FROM unnest($3::uuid[], $4::bigint[]) AS f (id, fence) JOIN runs r ON r.id = f.id
        WHERE r.id = ANY($3) AND r.fence = f.fence AND r.finished_at IS NULL
            AND (r.owner = $1 OR NOT EXISTS (SELECT FROM replicas p WHERE p.id = r.owner AND p.expires_at > now()))
        ORDER BY r.thread_id, r.seq
        LIMIT $2
        FOR NO KEY UPDATE OF r SKIP LOCKED
    ), taken AS (
        UPDATE runs r SET owner = $1, fence = r.fence + 1 FROM orphans o
        WHERE r.id = ANY($3) AND r.id = o.id
        RETURNING r.*, o.owner AS previous_owner
    )
    SELECT r.previous_owner, r.partial, r.tool_outputs, r.outputs_sent,
        (EXTRACT(epoch FROM r.deadline_at - clock_timestamp()) * 1000)::bigint AS time_left, ",
    thread_columns!(),
    ", ",
    run_columns!(),
    " FROM taken r JOIN threads t ON t.id = r.thread_id ORDER BY r.thread_id, r.seq",
);

/// How many times as many orphans are found as are wanted: so many replicas can share them.
const SHARES: i64 = 16;

/// Implements [`Store::adopt_orphans`](crate::store::Store::adopt_orphans). Mostly there are none, and then it changes
/// nothing and locks nothing.
pub(super) async fn adopt_orphans(
    connection: &mut PgConnection,
    id: ReplicaId,
    working: &[RunId],
    limit: u32,
) -> Result<Vec<Orphan>, StoreError> {
    let working: Vec<Uuid> = working.iter().map(|run| run.uuid()).collect();
    let found: Vec<(Uuid, i64)> = sqlx::query_as(FIND)
        .bind(id.uuid())
        .bind(working)
        .bind(i64::from(limit) * SHARES)
        .fetch_all(&mut *connection)
        .await?;
    if found.is_empty() {
        return Ok(Vec::new());
    }
    let (found, fences): (Vec<_>, Vec<_>) = found.into_iter().unzip();
    // Thread ids sort by age, and within a thread the runs must come in order of admission.
    let rows: Vec<OrphanRow> = sqlx::query_as(TAKE)
        .bind(id.uuid())
        .bind(i64::from(limit))
        .bind(found)
        .bind(fences)
        .fetch_all(&mut *connection)
        .await?;
    let mut orphans = rows.into_iter().map(Orphan::try_from).collect::<Result<Vec<_>, _>>()?;
    give_input(connection, &mut orphans).await?;
    Ok(orphans)
}

/// Gives orphans that had started their messages. Nobody changes these any more: the runs have new fences.
async fn give_input(connection: &mut PgConnection, orphans: &mut [Orphan]) -> Result<(), StoreError> {
    let started = orphans.iter().filter(|orphan| orphan.run.status != RunStatus::Queued);
    let started: Vec<Uuid> = started.map(|orphan| orphan.run.id.uuid()).collect();
    if started.is_empty() {
        return Ok(());
    }
    let said: Vec<MessageRow> = sqlx::query_as(concat!(
        "SELECT ",
        message_columns!(),
        " FROM messages m WHERE m.run_id = ANY($1) AND m.role = 'user' ORDER BY m.position",
    ))
    .bind(started)
    .fetch_all(connection)
    .await?;
    for row in said {
        let message = Message::try_from(row)?;
        if let Some(orphan) = orphans.iter_mut().find(|orphan| Some(orphan.run.id) == message.run_id) {
            orphan.input.push(InputMessage { id: message.id, content: message.content });
        }
    }
    Ok(())
}

//! What runs show while they are at work.

use sqlx::PgConnection;
use uuid::Uuid;

use crate::domain::RunId;
use crate::store::rows::{log_json, storable};
use crate::store::{RunProgress, StoreError};

/// The same array at the same place of each: the run, its fence, its id upstream, the number of its first event, the
/// events, the number after them.
///
/// It locks runs by id, and passes over those that others have locked, so it waits for nobody, and nobody who waits for
/// it waits in a circle. Nor does it wait in `logged`: who writes to the log of a run has that run locked, be it to end
/// it, to let it wait, or to remove it.
///
/// A row that is there already was written by a call whose answer did not come in time. It begins with the same event
/// under the same fence, so the longer one says all. An id that the run had before is older news than what is stored.
const RECORD: &str = "
    WITH told AS MATERIALIZED (
        SELECT p.run_id, p.fence, p.upstream_run_id, p.n, p.event::jsonb AS event, p.until
        FROM unnest($1::uuid[], $2::bigint[], $3::text[], $4::bigint[], $5::text[], $6::bigint[])
            AS p (run_id, fence, upstream_run_id, n, event, until)
    ), held AS MATERIALIZED (
        SELECT r.id FROM told p JOIN runs r ON r.id = p.run_id
        WHERE r.id = ANY($1) AND r.fence = p.fence AND r.finished_at IS NULL
        ORDER BY r.id
        FOR NO KEY UPDATE OF r SKIP LOCKED
    ), logged AS (
        INSERT INTO run_events AS l (run_id, n, event, until, created_at)
        SELECT h.id, p.n, p.event, p.until, clock_timestamp() FROM held h JOIN told p ON p.run_id = h.id
        WHERE p.event <> '[]'
        ON CONFLICT (run_id, n) DO UPDATE SET event = excluded.event, until = excluded.until
            WHERE l.until < excluded.until
    ), moved AS (
        UPDATE runs r SET upstream_run_id = p.upstream_run_id,
            earlier_upstream_runs = CASE WHEN r.upstream_run_id IS NULL THEN r.earlier_upstream_runs
                ELSE COALESCE(r.earlier_upstream_runs, '[]') || to_jsonb(r.upstream_run_id) END
        FROM held h JOIN told p ON p.run_id = h.id
        WHERE r.id = ANY($1) AND r.id = h.id AND p.upstream_run_id IS NOT NULL AND r.upstream_run_id IS DISTINCT FROM p.upstream_run_id
            AND NOT COALESCE(r.earlier_upstream_runs, '[]') ? p.upstream_run_id
    )
    SELECT h.id FROM held h";

/// Implements [`Store::record`](crate::store::Store::record).
pub(super) async fn record(
    connection: &mut PgConnection,
    progress: &[RunProgress],
) -> Result<Vec<RunId>, StoreError> {
    if progress.is_empty() {
        return Ok(Vec::new());
    }
    let events: Vec<String> =
        progress.iter().map(|run| log_json(&run.events.events)).collect::<Result<_, _>>()?;
    let recorded: Vec<Uuid> = sqlx::query_scalar(RECORD)
        .bind(progress.iter().map(|run| run.lease.run_id.uuid()).collect::<Vec<_>>())
        .bind(progress.iter().map(|run| run.lease.fence).collect::<Vec<_>>())
        .bind(progress.iter().map(|run| storable(run.upstream_run_id.as_ref())).collect::<Vec<_>>())
        .bind(progress.iter().map(|run| run.events.first).collect::<Vec<_>>())
        .bind(events)
        .bind(progress.iter().map(|run| run.events.end()).collect::<Vec<_>>())
        .fetch_all(connection)
        .await?;
    Ok(recorded.into_iter().map(RunId::from_uuid).collect())
}

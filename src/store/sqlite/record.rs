//! What runs show while they are at work.

use sqlx::SqliteConnection;

use super::{now, write};
use crate::domain::RunId;
use crate::store::rows::{log_json, storable};
use crate::store::{RunProgress, StoreError};

/// The run `r` has not ended, and the lease is good.
macro_rules! held {
    () => {
        "r.id = $1 AND r.fence = $2 AND r.status IN ('queued', 'in_progress', 'requires_action', 'cancelling')"
    };
}

/// A row that is there already was written by a call whose answer did not come in time. It begins with the same event
/// under the same fence, so the longer one says all. An id that the run had before is older news than what is stored.
pub(super) const RECORD: &str = concat!(
    "INSERT INTO run_events AS l (run_id, n, event, until, created_at)
    SELECT r.id, $4, $5, $6, ",
    now!(),
    " FROM runs r WHERE $5 <> '[]' AND ",
    held!(),
    "
    ON CONFLICT (run_id, n) DO UPDATE SET event = excluded.event, until = excluded.until
        WHERE l.until < excluded.until;

    UPDATE runs AS r SET upstream_run_id = $3,
        earlier_upstream_runs = iif(upstream_run_id IS NULL, earlier_upstream_runs,
            json_insert(COALESCE(earlier_upstream_runs, '[]'), '$[#]', upstream_run_id))
    WHERE $3 IS NOT NULL AND upstream_run_id IS NOT $3 AND NOT EXISTS (
        SELECT 1 FROM json_each(COALESCE(r.earlier_upstream_runs, '[]')) e WHERE e.value = $3
    ) AND ",
    held!(),
    ";

    SELECT EXISTS (SELECT 1 FROM runs r WHERE ",
    held!(),
    ")",
);

/// Implements [`Store::record`](crate::store::Store::record).
pub(super) async fn record(
    connection: &mut SqliteConnection,
    progress: &[RunProgress],
) -> Result<Vec<RunId>, StoreError> {
    let mut tx = write(connection).await?;
    let mut recorded = Vec::with_capacity(progress.len());
    for run in progress {
        let is_held: bool = sqlx::query_scalar(RECORD)
            .bind(run.lease.run_id.uuid())
            .bind(run.lease.fence)
            .bind(storable(run.upstream_run_id.as_ref()))
            .bind(run.events.first)
            .bind(log_json(&run.events.events)?)
            .bind(run.events.end())
            .fetch_one(&mut *tx)
            .await?;
        if is_held {
            recorded.push(run.lease.run_id);
        }
    }
    tx.commit().await?;
    Ok(recorded)
}

//! What runs show while they are at work: the log that streams of them are resumed from.

use sqlx::FromRow;
use sqlx::types::Json;
use uuid::Uuid;

use super::engine::Engine;
use super::params::params;
use super::rows::{log_json, storable};
use super::statement::Statement;
use super::{RunLease, Store, StoreError};
use crate::domain::{EventBatch, LoggedEvent, RunId, UpstreamRunId};

/// On Postgres of all runs at once, on SQLite of one.
///
/// On Postgres it locks runs by id, and passes over those that others have locked, so it waits for nobody,
/// and nobody who waits for it waits in a circle. Nor does it wait in `logged`: who writes to the log of a
/// run has that run locked, be it to end it, to let it wait, or to remove it.
///
/// A row that is there already was written by a call whose answer did not come in time. It begins with the
/// same event under the same fence, so the longer one says all. An id that the run had before is older
/// than what is stored.
static RECORD: Statement = Statement::for_each_engine(
    "events.record",
    // The parameters are arrays, with the same run at the same place of each.
    "WITH told AS MATERIALIZED (
        SELECT p.run_id, p.fence, p.upstream_run_id, p.first_offset, p.events::jsonb AS events, p.end_offset
        FROM unnest(
            :run::uuid[], :fence::bigint[], :upstream_run::text[], :first::bigint[], :events::text[], :end::bigint[]
        ) AS p (run_id, fence, upstream_run_id, first_offset, events, end_offset)
    ), held AS MATERIALIZED (
        SELECT r.id FROM told p JOIN runs r ON r.id = p.run_id
        WHERE r.id {in :run} AND r.fence = p.fence AND r.finished_at IS NULL
        ORDER BY r.id
        FOR NO KEY UPDATE OF r SKIP LOCKED
    ), logged AS (
        INSERT INTO run_events AS l (run_id, first_offset, events, end_offset)
        SELECT h.id, p.first_offset, p.events, p.end_offset FROM held h JOIN told p ON p.run_id = h.id
        WHERE p.events <> '[]'
        ON CONFLICT (run_id, first_offset) DO UPDATE
            SET events = excluded.events, end_offset = excluded.end_offset
            WHERE l.end_offset < excluded.end_offset
    ), moved AS (
        UPDATE runs r SET upstream_run_id = p.upstream_run_id,
            earlier_upstream_run_ids = CASE WHEN r.upstream_run_id IS NULL THEN r.earlier_upstream_run_ids
                ELSE COALESCE(r.earlier_upstream_run_ids, '[]') || to_jsonb(r.upstream_run_id) END
        FROM held h JOIN told p ON p.run_id = h.id
        WHERE r.id {in :run} AND r.id = h.id AND p.upstream_run_id IS NOT NULL
            AND r.upstream_run_id IS DISTINCT FROM p.upstream_run_id
            AND NOT COALESCE(r.earlier_upstream_run_ids, '[]') ? p.upstream_run_id
    )
    SELECT h.id FROM held h",
    "INSERT INTO run_events AS l (run_id, first_offset, events, end_offset)
    SELECT r.id, :first, :events, :end FROM runs r
    WHERE r.id = :run AND r.fence = :fence AND r.finished_at IS NULL AND :events <> '[]'
    ON CONFLICT (run_id, first_offset) DO UPDATE
        SET events = excluded.events, end_offset = excluded.end_offset
        WHERE l.end_offset < excluded.end_offset;

    UPDATE runs AS r SET upstream_run_id = :upstream_run,
        earlier_upstream_run_ids = iif(r.upstream_run_id IS NULL, r.earlier_upstream_run_ids,
            json_insert(COALESCE(r.earlier_upstream_run_ids, '[]'), '$[#]', r.upstream_run_id))
    WHERE r.id = :run AND r.fence = :fence AND r.finished_at IS NULL
        AND :upstream_run IS NOT NULL AND r.upstream_run_id IS NOT :upstream_run AND NOT EXISTS (
            SELECT 1 FROM json_each(COALESCE(r.earlier_upstream_run_ids, '[]')) e WHERE e.value = :upstream_run
        );

    SELECT r.id FROM runs r WHERE r.id = :run AND r.fence = :fence AND r.finished_at IS NULL",
);

/// What ends after a number, or if nothing does, what ends last.
static LIST: Statement = Statement::new(
    "events.list",
    "SELECT e.first_offset, e.events FROM run_events e
    WHERE e.run_id = :run AND e.end_offset > (
        SELECT CASE WHEN l.end_offset > :from THEN :from ELSE l.end_offset - 1 END
        FROM (SELECT max(b.end_offset) AS end_offset FROM run_events b WHERE b.run_id = :run) l
    )
    ORDER BY e.first_offset",
);

pub(super) static STATEMENTS: &[&Statement] = &[&RECORD, &LIST];

impl Store {
    /// Records what runs at work have shown since it was last recorded, and where they are at their upstream:
    /// what whoever takes one over, or follows it on another replica, needs to know. Each run comes once.
    ///
    /// The answer names those of which it was recorded. One that is missing is being ended, or its lease was
    /// lost, or it should be tried again. Harmless to repeat, also with more events at the end: the batch of
    /// a run begins where the last one ends that is known to be recorded.
    pub async fn record(&self, progress: &[RunProgress]) -> Result<Vec<RunId>, StoreError> {
        if progress.is_empty() {
            return Ok(Vec::new());
        }
        let mut c = self.backend.vital_writer().await?;
        let recorded: Vec<(Uuid,)> = match c.engine() {
            Engine::Postgres => {
                let (mut events, mut upstream_runs) = (Vec::new(), Vec::new());
                for run in progress {
                    events.push(Some(self.log_text(run)?));
                    upstream_runs.push(storable(run.upstream_run_id.as_ref()).map(str::to_owned));
                }
                let values = params()
                    .set(
                        "run",
                        progress
                            .iter()
                            .map(|run| run.lease.run_id.uuid())
                            .collect::<Vec<_>>(),
                    )
                    .set(
                        "fence",
                        progress
                            .iter()
                            .map(|run| run.lease.fence)
                            .collect::<Vec<_>>(),
                    )
                    .set("upstream_run", upstream_runs)
                    .set(
                        "first",
                        progress
                            .iter()
                            .map(|run| run.events.first)
                            .collect::<Vec<_>>(),
                    )
                    .set("events", events)
                    .set(
                        "end",
                        progress
                            .iter()
                            .map(|run| run.events.end())
                            .collect::<Vec<_>>(),
                    );
                c.all(&RECORD, values).await?
            }
            Engine::Sqlite => {
                let mut recorded = Vec::with_capacity(progress.len());
                c.begin().await?;
                for run in progress {
                    let values = params()
                        .set("run", run.lease.run_id.uuid())
                        .set("fence", run.lease.fence)
                        .set("upstream_run", storable(run.upstream_run_id.as_ref()))
                        .set("first", run.events.first)
                        .json_text("events", self.log_text(run)?)
                        .set("end", run.events.end());
                    recorded.append(&mut c.all(&RECORD, values).await?);
                }
                c.commit().await?;
                recorded
            }
        };
        Ok(recorded
            .into_iter()
            .map(|(run,)| RunId::from_uuid(run))
            .collect())
    }

    fn log_text(&self, run: &RunProgress) -> Result<String, StoreError> {
        log_json(&self.redaction.events(&run.events).events)
    }

    /// The stored log of a run from number `from` on: batches in order, which may begin before `from`, and
    /// may say again what the one before has said. The last one is always among them: it tells where the log
    /// ends.
    pub async fn events(&self, run: RunId, from: i64) -> Result<Vec<EventBatch>, StoreError> {
        let mut c = self.backend.reader().await?;
        let rows: Vec<EventRow> = c
            .all(&LIST, params().set("run", run.uuid()).set("from", from))
            .await?;
        Ok(rows.into_iter().map(EventBatch::from).collect())
    }
}

/// A row of a run's log.
#[derive(FromRow)]
struct EventRow {
    first_offset: i64,
    events: Json<Vec<LoggedEvent>>,
}

impl From<EventRow> for EventBatch {
    fn from(row: EventRow) -> Self {
        Self {
            first: row.first_offset,
            events: row.events.0,
        }
    }
}

/// What a run at work has shown since it was last [recorded](Store::record).
#[derive(Clone, Debug, PartialEq)]
pub struct RunProgress {
    pub lease: RunLease,
    /// `None`: not known yet, or recorded before.
    pub upstream_run_id: Option<UpstreamRunId>,
    /// May be empty.
    pub events: EventBatch,
}

//! The logs of active runs, from which a stream of a run can be resumed.

use sqlx::FromRow;
use sqlx::types::Json;
use uuid::Uuid;

use super::engine::Engine;
use super::params::params;
use super::rows::{log_json, storable};
use super::statement::Statement;
use super::{RunLease, Store, StoreError};
use crate::domain::{EventBatch, LoggedEvent, RunId, UpstreamRunId};

/// Records the progress of all given runs on Postgres, and of one run on SQLite.
///
/// On Postgres it locks runs by id, and skips those that other transactions have locked. So it
/// waits for no run, and it is part of no deadlock. The insert in `logged` does not wait either:
/// every transaction that writes to the log of a run has locked that run.
///
/// A row that exists already was written by a call whose answer did not come in time. It begins
/// with the same event under the same fence, so the longer of the two rows has everything. An
/// upstream id that the run had before is older than the stored one, and is not stored again.
static RECORD: Statement = Statement::for_each_engine(
    "events.record",
    // The parameters are arrays. Each has the same run at the same index.
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

/// Moves the ids of the run at its upstream to the earlier ones.
static BEGIN_AGAIN: Statement = Statement::for_each_engine(
    "events.begin_again",
    "UPDATE runs AS r SET upstream_run_id = NULL, earlier_upstream_run_ids = (
        SELECT jsonb_agg(i.id) FROM (
            SELECT jsonb_array_elements_text(COALESCE(r.earlier_upstream_run_ids, '[]')) AS id
            UNION SELECT r.upstream_run_id WHERE r.upstream_run_id IS NOT NULL
            UNION SELECT :upstream_run::text WHERE :upstream_run::text IS NOT NULL
        ) i
    )
    WHERE {leased r} AND {at_work r}",
    "UPDATE runs AS r SET upstream_run_id = NULL, earlier_upstream_run_ids = NULLIF((
        SELECT json_group_array(i.id) FROM (
            SELECT e.value AS id FROM json_each(COALESCE(r.earlier_upstream_run_ids, '[]')) e
            UNION SELECT r.upstream_run_id WHERE r.upstream_run_id IS NOT NULL
            UNION SELECT :upstream_run WHERE :upstream_run IS NOT NULL
        ) i
    ), '[]')
    WHERE {leased r} AND {at_work r}",
);

/// Returns the rows that end after the offset `:from` or, if there are none, the last row.
static LIST: Statement = Statement::new(
    "events.list",
    "SELECT e.first_offset, e.events FROM run_events e
    WHERE e.run_id = :run AND e.end_offset > (
        SELECT CASE WHEN l.end_offset > :from THEN :from ELSE l.end_offset - 1 END
        FROM (SELECT max(b.end_offset) AS end_offset FROM run_events b WHERE b.run_id = :run) l
    )
    ORDER BY e.first_offset",
);

pub(super) static STATEMENTS: &[&Statement] = &[&RECORD, &BEGIN_AGAIN, &LIST];

impl Store {
    /// Records the new events of active runs, and their ids at their upstream. A replica that
    /// takes a run over, or follows it, needs both. Each run may occur once.
    ///
    /// Returns the runs that were recorded. If a run is missing, it is being ended, or its lease
    /// was lost, or the caller should try again. The call is harmless to repeat, also with more
    /// events at the end. The batch of a run must begin at the end of the last batch that is known
    /// to be recorded.
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

    /// Records that a run is about to be sent anew, because its last try did nothing at the
    /// upstream. From then on the run has no id there. `failed`: the id of that try, which is
    /// kept until the janitor deletes what the upstream stores under it. Returns `false` if the
    /// lease was lost. Harmless to repeat.
    pub async fn begins_again(
        &self,
        lease: &RunLease,
        failed: Option<&UpstreamRunId>,
    ) -> Result<bool, StoreError> {
        let mut c = self.backend.vital_writer().await?;
        let values = params()
            .set("run", lease.run_id.uuid())
            .set("fence", lease.fence)
            .set("upstream_run", storable(failed));
        Ok(c.execute(&BEGIN_AGAIN, values).await? == 1)
    }

    fn log_text(&self, run: &RunProgress) -> Result<String, StoreError> {
        log_json(&self.redaction.events(&run.events).events)
    }

    /// Returns the stored log of a run from offset `from` on. The batches are in order. The first
    /// may begin before `from`, and batches may overlap. The last batch is always included,
    /// because it marks the end of the log.
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

/// The progress of an active run since it was last [recorded](Store::record).
#[derive(Clone, Debug, PartialEq)]
pub struct RunProgress {
    pub lease: RunLease,
    /// The run's id at the upstream. `None`: it is not known yet, or was recorded before.
    pub upstream_run_id: Option<UpstreamRunId>,
    /// The new events. The batch may be empty.
    pub events: EventBatch,
}

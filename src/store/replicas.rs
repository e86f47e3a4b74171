//! Sessions of replicas, and the runs that dead replicas leave behind.
//!
//! A SQLite file serves one process at a time. There a dead replica is an earlier process on the
//! same file.

use std::time::Duration;

use serde_json::{Value, json as value};
use sqlx::FromRow;
use sqlx::types::Json;
use uuid::Uuid;

use super::params::params;
use super::pool::Connection;
use super::rows::{At, MessageRow, ThreadAndRun, millis};
use super::statement::Statement;
use super::{InputMessage, RunLease, Store, StoreError};
use crate::domain::{
    ContentPart, Message, ReplicaId, Run, RunId, RunStatus, Thread, Timestamp, ToolOutput,
};

static RENEW: Statement = Statement::new(
    "replicas.renew",
    "INSERT INTO replicas (id, address, expires_at) VALUES (:replica, :address, {now} + {ms :ttl})
    ON CONFLICT (id) DO UPDATE SET address = excluded.address, expires_at = excluded.expires_at
    RETURNING EXISTS (SELECT 1 FROM replicas p WHERE p.id <> :replica AND p.expires_at > {now}) AS has_peers,
        {clock} AS now",
);

static RETIRE: Statement = Statement::new(
    "replicas.retire",
    "DELETE FROM replicas WHERE id = :replica",
);

static FORGET: Statement = Statement::on_sqlite("replicas.forget", "DELETE FROM replicas");

/// The fence stays, and grows when the run is adopted. Until then only the replica that gave the
/// run up can still write about it. Runs are locked by id, like in every statement that locks
/// several.
static RELEASE: Statement = Statement::new(
    "replicas.release",
    "WITH leases AS MATERIALIZED (
        SELECT {uuid e.value ->> 'id'} AS id, CAST(e.value ->> 'fence' AS bigint) AS fence FROM {each :leases}
    ), held AS MATERIALIZED (
        SELECT r.id FROM leases l JOIN runs r ON r.id = l.id
        WHERE r.id {in_found SELECT l.id FROM leases l} AND r.fence = l.fence AND r.finished_at IS NULL
        ORDER BY r.id
        {lock r}
    )
    UPDATE runs SET owner = NULL WHERE id {in_found SELECT h.id FROM held h}",
);

static FIND_LOST: Statement = Statement::new(
    "replicas.find_taken_over",
    "SELECT r.id FROM runs r WHERE r.id {in :working} AND r.owner IS DISTINCT FROM :replica",
);

/// Finds runs that may be orphans.
///
/// On Postgres `owners` steps from one owner of unfinished runs to the next; there are few owners.
/// So the runs of live owners are not read, however many they are. All runs of the caller itself
/// are read, to find strays.
///
/// Each part returns 16 times the wanted number, so that many replicas can share them. Each part
/// is ordered by a whole row, which no index has. With an index for that order, Postgres might
/// read all runs in that order until it finds one.
///
/// On SQLite the result has only orphans, since no other process takes any.
static FIND_ORPHANS: Statement = Statement::for_each_engine(
    "replicas.find_orphans",
    "WITH RECURSIVE owners AS (
        (
            SELECT r.owner FROM runs r WHERE {unfinished_of_owner r} AND r.owner IS NOT NULL
            ORDER BY r.owner LIMIT 1
        )
        UNION ALL
        SELECT (
            SELECT r.owner FROM runs r WHERE {unfinished_of_owner r} AND r.owner > o.owner
            ORDER BY r.owner LIMIT 1
        )
        FROM owners o WHERE o.owner IS NOT NULL
    )
    (
        SELECT f.id, f.fence, o.owner FROM owners o
        CROSS JOIN LATERAL (
            SELECT r.id, r.fence FROM runs r WHERE r.owner = o.owner AND {unfinished_of_owner r}
            ORDER BY ROW(r.thread_id, r.seq) LIMIT :limit * 16
        ) f
        WHERE o.owner <> :replica
            AND NOT EXISTS (SELECT 1 FROM replicas p WHERE p.id = o.owner AND p.expires_at > {now})
    )
    UNION ALL (
        SELECT r.id, r.fence, r.owner FROM runs r WHERE r.owner IS NULL AND {unfinished_of_owner r}
        ORDER BY ROW(r.thread_id, r.seq) LIMIT :limit * 16
    )
    UNION ALL (
        SELECT r.id, r.fence, r.owner FROM runs r WHERE r.owner = :replica AND {unfinished_of_owner r}
            AND (r.fence > 1 OR r.created_at < {now} - {ms 60000})
            -- Not a condition on the array itself: older servers scan the array for each run.
            AND r.id {not_in :working}
        ORDER BY ROW(r.thread_id, r.seq) LIMIT :limit * 16
    )",
    "SELECT r.id, r.fence, r.owner FROM runs r INDEXED BY runs_by_owner
    WHERE {unfinished_of_owner r}
        AND CASE
            WHEN r.owner = :replica
            THEN r.id {not_in :working} AND (r.fence > 1 OR r.created_at < {now} - {ms 60000})
            ELSE NOT EXISTS (SELECT 1 FROM replicas p WHERE p.id = r.owner AND p.expires_at > {now})
        END
    ORDER BY r.thread_id, r.seq
    LIMIT :limit",
);

/// Takes over those of the found runs that are still orphans and have not changed hands meanwhile.
/// Replicas that do this at the same time share the work. Thread ids sort by age, and within a
/// thread the runs must come in order of admission.
static TAKE_ORPHANS: Statement = Statement::for_each_engine(
    "replicas.take_orphans",
    "WITH found AS MATERIALIZED (
        SELECT {uuid e.value ->> 'id'} AS id, CAST(e.value ->> 'fence' AS bigint) AS fence FROM {each :found}
    ), orphans AS MATERIALIZED (
        SELECT r.id, r.owner FROM found f JOIN runs r ON r.id = f.id
        WHERE r.id {in_found SELECT f.id FROM found f} AND r.fence = f.fence AND r.finished_at IS NULL
            AND (
                r.owner = :replica
                OR NOT EXISTS (SELECT 1 FROM replicas p WHERE p.id = r.owner AND p.expires_at > {now})
            )
        ORDER BY r.thread_id, r.seq
        LIMIT :limit
        FOR NO KEY UPDATE OF r SKIP LOCKED
    ), taken AS (
        UPDATE runs r SET owner = :replica, fence = r.fence + 1 FROM orphans o
        WHERE r.id {in_found SELECT x.id FROM orphans x} AND r.id = o.id
        RETURNING r.*, o.owner AS previous_owner
    )
    SELECT r.previous_owner, r.partial_reply AS partial, r.tool_outputs, r.tool_outputs_sent AS outputs_sent,
        {ms_until r.deadline_at} AS time_left, {ms_until r.started_at + {ms r.timeout_ms}} AS run_time_left,
        {thread t}, {run r}
    FROM taken r JOIN threads t ON t.id = r.thread_id
    ORDER BY r.thread_id, r.seq",
    "UPDATE runs SET owner = :replica, fence = fence + 1
    WHERE id IN (SELECT {uuid e.value ->> 'id'} FROM {each :found});

    SELECT {uuid e.value ->> 'owner'} AS previous_owner, r.partial_reply AS partial, r.tool_outputs,
        r.tool_outputs_sent AS outputs_sent, {ms_until r.deadline_at} AS time_left,
        {ms_until r.started_at + {ms r.timeout_ms}} AS run_time_left, {thread t}, {run r}
    FROM {each :found} JOIN runs r ON r.id = {uuid e.value ->> 'id'} JOIN threads t ON t.id = r.thread_id
    ORDER BY r.thread_id, r.seq",
);

static READ_INPUT: Statement = Statement::new(
    "replicas.read_input",
    "SELECT {message m} FROM messages m WHERE m.run_id {in :runs} AND m.role = 'user' ORDER BY m.position",
);

pub(super) static STATEMENTS: &[&Statement] = &[
    &RENEW,
    &RETIRE,
    &FORGET,
    &RELEASE,
    &FIND_LOST,
    &FIND_ORPHANS,
    &TAKE_ORPHANS,
    &READ_INPUT,
];

impl Store {
    /// Extends the session of this replica by `ttl` from now. The first call registers the
    /// replica.
    pub async fn renew_replica(
        &self,
        id: ReplicaId,
        address: &str,
        ttl: Duration,
    ) -> Result<Renewed, StoreError> {
        let mut c = self.backend.session_writer().await?;
        let session = params()
            .set("replica", id.uuid())
            .set("address", address)
            .set("ttl", millis(ttl));
        Ok(c.one(&RENEW, session).await?)
    }

    /// Deletes the session of this replica: its runs can be adopted at once.
    pub async fn retire_replica(&self, id: ReplicaId) -> Result<(), StoreError> {
        let mut c = self.backend.session_writer().await?;
        c.execute(&RETIRE, params().set("replica", id.uuid()))
            .await?;
        Ok(())
    }

    /// Gives unfinished runs up, so that they can be adopted at once. Lost leases are skipped.
    pub async fn release(&self, leases: &[RunLease]) -> Result<(), StoreError> {
        let mut c = self.backend.vital_writer().await?;
        let leases: Vec<Value> = leases
            .iter()
            .map(|lease| value!({ "id": lease.run_id.uuid().simple().to_string(), "fence": lease.fence }))
            .collect();
        c.execute(&RELEASE, params().json("leases", Some(&leases))?)
            .await?;
        Ok(())
    }

    /// Returns those of the runs in `working` that other replicas have taken over from this one.
    pub async fn runs_taken_over(
        &self,
        replica: ReplicaId,
        working: &[RunId],
    ) -> Result<Vec<RunId>, StoreError> {
        let mut c = self.backend.vital_reader().await?;
        let working: Vec<Uuid> = working.iter().map(|run| run.uuid()).collect();
        let values = params()
            .set("replica", replica.uuid())
            .set("working", working);
        let lost: Vec<(Uuid,)> = c.all(&FIND_LOST, values).await?;
        Ok(lost
            .into_iter()
            .map(|(run,)| RunId::from_uuid(run))
            .collect())
    }

    /// Takes over up to `limit` unfinished runs that no task works on, oldest first, each with a
    /// higher fence. These are orphans, whose owner is not alive, and strays: runs that the caller
    /// owns and that are not in `working`.
    ///
    /// A lost answer can leave a stray behind. A run that was taken over before is a stray at
    /// once. A run with the first fence may be an admission in progress, so it is left alone for a
    /// minute.
    ///
    /// Usually there are none. Then the call changes and locks nothing.
    pub async fn adopt_orphans(
        &self,
        id: ReplicaId,
        working: &[RunId],
        limit: u32,
    ) -> Result<Vec<OrphanedRun>, StoreError> {
        let mut c = self.backend.vital_writer().await?;
        let working: Vec<Uuid> = working.iter().map(|run| run.uuid()).collect();
        let search = params()
            .set("replica", id.uuid())
            .set("working", working)
            .set("limit", limit);
        let found: Vec<(Uuid, i64, Option<Uuid>)> = c.all(&FIND_ORPHANS, search).await?;
        if found.is_empty() {
            return Ok(Vec::new());
        }
        let found: Vec<Value> = found
            .into_iter()
            .map(|(run, fence, owner)| {
                let owner = owner.map(|owner| owner.simple().to_string());
                value!({ "id": run.simple().to_string(), "fence": fence, "owner": owner })
            })
            .collect();
        let take = params()
            .set("replica", id.uuid())
            .json("found", Some(&found))?
            .set("limit", limit);
        let rows: Vec<OrphanedRunRow> = c.all(&TAKE_ORPHANS, take).await?;
        let mut orphans = rows
            .into_iter()
            .map(OrphanedRun::try_from)
            .collect::<Result<Vec<_>, _>>()?;
        give_input(&mut c, &mut orphans).await?;
        if !self.keeps_content() {
            // A run that waits for outputs needs no earlier content. A run that is to be sent, or
            // may have to be sent again, does.
            for orphan in &mut orphans {
                orphan.content_lost = orphan.outputs.is_some()
                    || matches!(orphan.run.status, RunStatus::Queued | RunStatus::InProgress);
            }
        }
        Ok(orphans)
    }
}

/// Adds the messages of orphans that had started. They cannot change any more, because the runs
/// have new fences.
async fn give_input(c: &mut Connection, orphans: &mut [OrphanedRun]) -> Result<(), StoreError> {
    let started = orphans
        .iter()
        .filter(|orphan| orphan.run.status != RunStatus::Queued);
    let started: Vec<Uuid> = started.map(|orphan| orphan.run.id.uuid()).collect();
    if started.is_empty() {
        return Ok(());
    }
    let said: Vec<MessageRow> = c.all(&READ_INPUT, params().set("runs", started)).await?;
    for row in said {
        let message = Message::try_from(row)?;
        if let Some(orphan) = orphans
            .iter_mut()
            .find(|orphan| Some(orphan.run.id) == message.run_id)
        {
            orphan.input.push(InputMessage {
                id: message.id,
                content: message.content,
            });
        }
    }
    Ok(())
}

/// Deletes all sessions of a SQLite file that was just opened. Its lock proves that their
/// processes are gone, so their runs can be adopted at once.
pub(super) async fn forget_sessions(c: &mut Connection) -> Result<(), StoreError> {
    Ok(c.execute(&FORGET, params()).await.map(drop)?)
}

/// The answer to [`renew_replica`](Store::renew_replica).
#[derive(Clone, Copy, Debug, Eq, FromRow, PartialEq)]
pub struct Renewed {
    /// Whether other replicas are alive.
    pub has_peers: bool,
    /// The database's time.
    #[sqlx(try_from = "At")]
    pub now: Timestamp,
}

/// An unfinished run that was taken over.
#[derive(Clone, Debug, PartialEq)]
pub struct OrphanedRun {
    pub lease: RunLease,
    pub previous_owner: Option<ReplicaId>,
    pub thread: Thread,
    /// The run. If it is queued, it was never sent to the upstream; otherwise it may have been.
    pub run: Run,
    /// The time until the run's deadline, by the database's clock. Zero if the deadline has
    /// passed, or the run has not started. While the run waits for tool outputs, the deadline is
    /// the end of that wait.
    pub time_left: Duration,
    /// The same as `time_left`, without a wait for tool outputs.
    pub run_time_left: Duration,
    /// The messages of a run that had started, as they are in the transcript.
    pub input: Vec<InputMessage>,
    /// The reply so far of a run that waited for tool outputs.
    pub content: Vec<ContentPart>,
    /// Tool outputs that have arrived since the run began to wait for them.
    pub outputs: Option<Vec<ToolOutput>>,
    /// Whether these may have been sent to the upstream.
    pub outputs_sent: bool,
    /// Whether the content that the run has to send is lost, so that it can only end.
    pub content_lost: bool,
}

/// A run that was taken over, with its new fence.
#[derive(FromRow)]
struct OrphanedRunRow {
    previous_owner: Option<Uuid>,
    /// The time until the deadline in milliseconds. `None`: the run has not started.
    time_left: Option<i64>,
    run_time_left: Option<i64>,
    partial: Option<Json<Vec<ContentPart>>>,
    tool_outputs: Option<Json<Vec<ToolOutput>>>,
    outputs_sent: bool,
    #[sqlx(flatten)]
    both: ThreadAndRun,
}

impl TryFrom<OrphanedRunRow> for OrphanedRun {
    type Error = StoreError;

    fn try_from(row: OrphanedRunRow) -> Result<Self, StoreError> {
        let fence = row.both.run.r_fence;
        let time = |ms: Option<i64>| {
            Duration::from_millis(ms.and_then(|ms| u64::try_from(ms).ok()).unwrap_or(0))
        };
        let (thread, run) = (
            Thread::try_from(row.both.thread)?,
            Run::try_from(row.both.run)?,
        );
        Ok(Self {
            lease: RunLease {
                run_id: run.id,
                fence,
            },
            previous_owner: row.previous_owner.map(ReplicaId::from_uuid),
            thread,
            run,
            time_left: time(row.time_left),
            run_time_left: time(row.run_time_left),
            input: Vec::new(),
            content: row.partial.map(|json| json.0).unwrap_or_default(),
            outputs: row.tool_outputs.map(|json| json.0),
            outputs_sent: row.outputs_sent,
            content_lost: false,
        })
    }
}

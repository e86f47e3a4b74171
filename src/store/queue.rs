//! The queue of a thread: starting a queued run, cancelling a run, and taking a queued run over.

use sqlx::FromRow;
use sqlx::types::Json;
use uuid::Uuid;

use super::engine::Engine;
use super::params::params;
use super::pool::Connection;
use super::rows::{Found, RunRow, ThreadAndRun, ThreadRow};
use super::runs::started_before;
use super::statement::Statement;
use super::values::{InputMessage, QueuedStart, RunLease, StartedRun};
use super::{Store, StoreError};
use crate::domain::{ConversationKey, ReplicaId, Run, RunId, RunStatus, Thread};

static START_QUEUED: Statement = Statement::on_postgres(
    "queue.start_queued",
    include_str!("sql/start_queued.postgres.sql"),
);

/// Reads a queued run, and whether it may start. A run that is queued on a thread which is being
/// deleted can only be ended.
static FIND_WAITING: Statement = Statement::on_sqlite(
    "queue.find_waiting",
    "SELECT r.queued_input, NOT {busy_before r} AND t.lifecycle <> 'deleting' AS may_start
    FROM runs r JOIN threads t ON t.id = r.thread_id
    WHERE r.id = :run AND r.fence = :fence AND r.status = 'queued'",
);

static START: Statement = Statement::on_sqlite(
    "queue.start",
    "UPDATE runs SET status = 'in_progress', queued_input = NULL, started_at = {now},
        deadline_at = {now} + timeout_ms
    WHERE id = :run
    RETURNING {run runs}",
);

static COUNT_SAID: Statement = Statement::on_sqlite(
    "queue.count_said",
    "UPDATE threads SET message_count = message_count + json_array_length(:input),
        last_position = last_position + json_array_length(:input), last_active_at = {now}
    WHERE id = :thread
    RETURNING {thread threads}",
);

static SAY: Statement = Statement::on_sqlite(
    "queue.say",
    "INSERT INTO messages (id, thread_id, position, role, content, run_id, created_at)
    SELECT unhex(substr(m.value ->> 'id', 5)), t.id, t.last_position - json_array_length(:input) + 1 + m.key, 'user',
        m.value -> 'content', :run, {now}
    FROM threads t JOIN json_each(:input) m
    WHERE t.id = :thread",
);

/// Finds the active run before a queued one, and whether it is marked already. The `+` keeps the
/// planner from using the index of all runs.
static FIND_ACTIVE_BEFORE: Statement = Statement::new(
    "queue.find_active_before",
    "SELECT r.id, r.status = 'cancelling' AND (r.rollback_pending OR NOT :discard) AS is_marked
    FROM runs r
    WHERE r.thread_id = (
            SELECT w.thread_id FROM runs w WHERE w.id = :run AND w.fence = :fence AND w.queued_input IS NOT NULL
        )
        AND {active r} AND +r.seq < (SELECT w.seq FROM runs w WHERE w.id = :run)",
);

static MARK_CANCELLING: Statement = Statement::new(
    "queue.mark_cancelling",
    "UPDATE runs SET status = 'cancelling', rollback_pending = rollback_pending OR :discard
    WHERE id = :run AND queued_input IS NULL AND finished_at IS NULL
    RETURNING {run runs}",
);

static LOCK_RUN_OF_KEY: Statement = Statement::new(
    "queue.lock_run_of_key",
    "SELECT {run r} FROM runs r JOIN threads t ON t.id = r.thread_id
    WHERE r.id = :run AND {of_key}
    {lock r}",
);

static TAKE_QUEUED: Statement = Statement::new(
    "queue.take_queued",
    "UPDATE runs SET owner = :replica, fence = fence + 1
    WHERE id = :run AND queued_input IS NOT NULL
    RETURNING fence",
);

pub(super) static STATEMENTS: &[&Statement] = &[
    &START_QUEUED,
    &FIND_WAITING,
    &START,
    &COUNT_SAID,
    &SAY,
    &FIND_ACTIVE_BEFORE,
    &MARK_CANCELLING,
    &LOCK_RUN_OF_KEY,
    &TAKE_QUEUED,
];

/// The most attempts to start a run while it keeps changing.
const MAX_ATTEMPTS: u32 = 10;

impl Store {
    /// Starts a queued run if no run of its thread is active and none is queued before it. In the
    /// same step its messages move into the transcript, and its deadline begins to count. A run
    /// does not start any more on a thread that is being deleted.
    ///
    /// The call is harmless to repeat with the same lease. While the run is in progress it gives
    /// the same answer. So a lost answer does not leave a started run without a task.
    pub async fn start_queued(&self, lease: &RunLease) -> Result<QueuedStart, StoreError> {
        let mut c = self.backend.vital_writer().await?;
        match c.engine() {
            Engine::Postgres => Box::pin(start_on_postgres(&mut c, lease)).await,
            Engine::Sqlite => Box::pin(start_on_sqlite(&mut c, lease)).await,
        }
    }

    /// Marks the active run of a queued run's thread to be cancelled, if it was admitted before
    /// the queued one. With `discard`, its messages are also to be removed when it ends.
    ///
    /// Returns the run that is now marked, or was before. `None` if no run is active, or only one
    /// that was admitted later. The call is harmless to repeat. If there is nothing to change, it
    /// writes nothing and locks no run.
    pub async fn cancel_active(
        &self,
        lease: &RunLease,
        discard: bool,
    ) -> Result<Option<RunId>, StoreError> {
        let mut c = self.backend.vital_writer().await?;
        let values = params()
            .set("run", lease.run_id.uuid())
            .set("fence", lease.fence)
            .set("discard", discard);
        let found: Option<(Uuid, bool)> = c.optional(&FIND_ACTIVE_BEFORE, values).await?;
        let Some((run, is_marked)) = found else {
            return Ok(None);
        };
        let run = RunId::from_uuid(run);
        if is_marked {
            return Ok(Some(run));
        }
        // The run may have ended meanwhile.
        Ok(mark_cancelling(&mut c, run, discard).await?.map(|_| run))
    }

    /// Marks a run to be cancelled, if it is active. Returns the run as it is afterwards; `None`
    /// if there is none.
    pub async fn request_cancel(
        &self,
        key: &ConversationKey,
        id: RunId,
    ) -> Result<Option<Run>, StoreError> {
        let mut c = self.backend.writer().await?;
        // The first attempt does not find a run that moves to a fresh thread meanwhile.
        let found = match try_request_cancel(&mut c, key, id).await? {
            None => try_request_cancel(&mut c, key, id).await?,
            found => found,
        };
        found.map(Run::try_from).transpose()
    }

    /// Takes a queued run over from its owner, so that the caller can end it. `None` if the run is
    /// not queued (any more).
    pub async fn take_queued(
        &self,
        replica: ReplicaId,
        id: RunId,
    ) -> Result<Option<RunLease>, StoreError> {
        let mut c = self.backend.writer().await?;
        let values = params()
            .set("replica", replica.uuid())
            .set("run", id.uuid());
        let taken: Option<(i64,)> = c.optional(&TAKE_QUEUED, values).await?;
        Ok(taken.map(|(fence,)| RunLease { run_id: id, fence }))
    }
}

/// A row that reports an attempt to start a run. It has no thread if the run did not start.
#[derive(FromRow)]
struct StartedRow {
    #[sqlx(flatten)]
    both: Found<ThreadAndRun>,
    may_start: bool,
    queued_input: Option<Json<Vec<InputMessage>>>,
}

async fn start_on_postgres(
    c: &mut Connection,
    lease: &RunLease,
) -> Result<QueuedStart, StoreError> {
    for _ in 0..MAX_ATTEMPTS {
        let values = params()
            .set("run", lease.run_id.uuid())
            .set("fence", lease.fence);
        let row = match c.optional::<StartedRow>(&START_QUEUED, values).await {
            Ok(Some(row)) => row,
            Ok(None) => return started_before(c, lease).await,
            // Another run of the thread is active.
            Err(failed) if failed.breaks("runs_active") => return Ok(QueuedStart::NotYet),
            Err(failed) => return Err(failed.into()),
        };
        match row {
            StartedRow {
                both: Found(Some(both)),
                queued_input,
                ..
            } => {
                let input = queued_input.map(|json| json.0).unwrap_or_default();
                let (thread, run) = (both.thread.try_into()?, both.run.try_into()?);
                return Ok(QueuedStart::Started(Box::new(StartedRun {
                    lease: *lease,
                    thread,
                    run,
                    input,
                    intent: None,
                })));
            }
            StartedRow {
                may_start: false, ..
            } => return Ok(QueuedStart::NotYet),
            // The run changed while the statement waited for its row.
            StartedRow {
                may_start: true, ..
            } => {}
        }
    }
    Ok(QueuedStart::NotYet)
}

async fn start_on_sqlite(c: &mut Connection, lease: &RunLease) -> Result<QueuedStart, StoreError> {
    c.begin().await?;
    let claim = start_in_transaction(c, lease).await?;
    c.commit().await?;
    Ok(claim)
}

async fn start_in_transaction(
    c: &mut Connection,
    lease: &RunLease,
) -> Result<QueuedStart, StoreError> {
    let values = params()
        .set("run", lease.run_id.uuid())
        .set("fence", lease.fence);
    let waiting: Option<(Json<Vec<InputMessage>>, bool)> =
        c.optional(&FIND_WAITING, values).await?;
    let Some((Json(input), may_start)) = waiting else {
        return started_before(c, lease).await;
    };
    if !may_start {
        return Ok(QueuedStart::NotYet);
    }
    let run: RunRow = c
        .one(&START, params().set("run", lease.run_id.uuid()))
        .await?;
    let run = Run::try_from(run)?;
    let values = || {
        params()
            .set("thread", run.thread_id.uuid())
            .json("input", Some(&input))
    };
    let thread: ThreadRow = c.one(&COUNT_SAID, values()?).await?;
    c.execute(&SAY, values()?.set("run", run.id.uuid())).await?;
    let thread = Thread::try_from(thread)?;
    Ok(QueuedStart::Started(Box::new(StartedRun {
        lease: *lease,
        thread,
        run,
        input,
        intent: None,
    })))
}

/// Locks the run even if there is nothing to change, so that the answer is not out of date.
async fn try_request_cancel(
    c: &mut Connection,
    key: &ConversationKey,
    id: RunId,
) -> Result<Option<RunRow>, StoreError> {
    c.begin().await?;
    let mut found: Option<RunRow> = c
        .optional(&LOCK_RUN_OF_KEY, params().key(key).set("run", id.uuid()))
        .await?;
    let status = found.as_ref().map(RunRow::status).transpose()?;
    if matches!(
        status,
        Some(RunStatus::InProgress | RunStatus::RequiresAction)
    ) {
        found = mark_cancelling(c, id, false).await?;
    }
    c.commit().await?;
    Ok(found)
}

async fn mark_cancelling(
    c: &mut Connection,
    run: RunId,
    discard: bool,
) -> Result<Option<RunRow>, StoreError> {
    let values = params().set("run", run.uuid()).set("discard", discard);
    Ok(c.optional(&MARK_CANCELLING, values).await?)
}

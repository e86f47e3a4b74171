//! Runs that wait for the outputs of function calls, and requests to active runs.

use std::time::Duration;

use sqlx::FromRow;
use sqlx::types::Json;
use uuid::Uuid;

use super::engine::Engine;
use super::params::params;
use super::pool::Connection;
use super::rows::{HasId, RunRow, ThreadWithActivity, corrupt, json, log_json, millis, word};
use super::statement::Statement;
use super::{Idempotency, RunLease, Store, StoreError};
use crate::domain::{
    ContentPart, ConversationKey, EventBatch, ReplicaId, RequiredAction, Run, RunId, RunStatus,
    Thread, ThreadActivity, ToolOutput, UpstreamRunId, Usage,
};

/// Returns the run as it is now, whether this statement has paused it or not.
///
/// The batch of events shows whether the pause was recorded before: a repetition that arrives
/// after the answer must not make the run wait for it again. A shorter batch in its place is not
/// of a pause, because the batch of a pause ends with the required action. It is of a
/// [recording](Store::record) whose answer did not come in time.
static PAUSE: Statement = Statement::for_each_engine(
    "tools.pause",
    "WITH held AS MATERIALIZED (
        SELECT r.* FROM runs r WHERE {leased r} AND {at_work r}
        {lock r}
    ), logged AS (
        INSERT INTO run_events AS l (run_id, first_offset, events, end_offset)
        SELECT h.id, :first, :events, :end FROM held h WHERE h.status = 'in_progress'
        ON CONFLICT (run_id, first_offset) DO UPDATE
            SET events = excluded.events, end_offset = excluded.end_offset
            WHERE l.end_offset < excluded.end_offset
        RETURNING l.run_id
    ), paused AS (
        UPDATE runs r SET status = 'requires_action', required_action = :action,
            upstream_run_id = COALESCE(:upstream_run, r.upstream_run_id),
            earlier_upstream_run_ids = CASE WHEN r.upstream_run_id <> :upstream_run
                THEN COALESCE(r.earlier_upstream_run_ids, '[]') || to_jsonb(r.upstream_run_id)
                ELSE r.earlier_upstream_run_ids END,
            partial_reply = :content, usage = :usage, tool_outputs = NULL,
            deadline_at = {least r.deadline_at, {clock} + {ms :wait}}
        FROM logged l
        WHERE r.id = :run
        RETURNING r.*
    )
    SELECT {thread t}, {run r}, {queue_depth}, {text r.status} AS active_status,
        COALESCE(r.required_action = :action, false) AS is_same
    FROM (SELECT p.* FROM paused p UNION ALL SELECT h.* FROM held h WHERE NOT EXISTS (SELECT FROM paused)) r
    JOIN threads t ON t.id = (SELECT h.thread_id FROM held h)",
    "INSERT INTO run_events AS l (run_id, first_offset, events, end_offset)
    SELECT r.id, :first, :events, :end FROM runs r WHERE {leased r} AND {at_work r} AND r.status = 'in_progress'
    ON CONFLICT (run_id, first_offset) DO UPDATE
        SET events = excluded.events, end_offset = excluded.end_offset
        WHERE l.end_offset < excluded.end_offset;

    -- If the statement before has logged something.
    UPDATE runs AS r SET status = 'requires_action', required_action = :action,
        upstream_run_id = COALESCE(:upstream_run, r.upstream_run_id),
        earlier_upstream_run_ids = iif(r.upstream_run_id <> :upstream_run,
            json_insert(COALESCE(r.earlier_upstream_run_ids, '[]'), '$[#]', r.upstream_run_id),
            r.earlier_upstream_run_ids),
        partial_reply = :content, usage = :usage, tool_outputs = NULL,
        deadline_at = {least r.deadline_at, {clock} + {ms :wait}}
    WHERE r.id = :run AND changes() = 1;

    SELECT {thread t}, {run r}, {queue_depth}, {text r.status} AS active_status,
        COALESCE(r.required_action = :action, false) AS is_same
    FROM runs r JOIN threads t ON t.id = r.thread_id
    WHERE {leased r} AND {at_work r}",
);

/// On SQLite another statement of the same transaction records the idempotency key.
static ANSWER: Statement = Statement::for_each_engine(
    "tools.answer",
    "WITH answered AS (
        UPDATE runs r SET status = 'in_progress', required_action = NULL, tool_outputs = :outputs,
            tool_outputs_sent = false, deadline_at = r.started_at + {ms r.timeout_ms}
        FROM threads t
        WHERE r.id = :run AND r.required_action = :expected AND r.status <> 'cancelling'
            AND r.deadline_at > {clock} AND t.id = r.thread_id AND {of_key}
        RETURNING r.*
    ), used AS (
        INSERT INTO idempotency_keys (
            tenant, user_key, scope_kind, scope_name, key, run_id, request_hash, created_at
        )
        SELECT :tenant, :user, {scope_kind}, :scope_name, :idempotency_key, r.id, :request_hash, {clock}
        FROM answered r
        WHERE {as text, :idempotency_key} IS NOT NULL
    )
    SELECT {thread t}, {run r}, {queue_depth}, {text r.status} AS active_status
    FROM answered r JOIN threads t ON t.id = (SELECT a.thread_id FROM answered a)",
    "UPDATE runs AS r SET status = 'in_progress', required_action = NULL, tool_outputs = :outputs,
        tool_outputs_sent = false, deadline_at = r.started_at + {ms r.timeout_ms}
    WHERE r.id = :run AND r.required_action = :expected AND r.status <> 'cancelling'
        AND r.deadline_at > {clock}
        AND EXISTS (SELECT 1 FROM threads t WHERE t.id = r.thread_id AND {of_key})
        AND NOT EXISTS (
            SELECT 1 FROM idempotency_keys k
            WHERE k.tenant = :tenant AND k.user_key = :user AND k.scope_kind = :scope_kind
                AND k.scope_name = :scope_name AND k.key = :idempotency_key
        );

    SELECT {thread t}, {run r}, {queue_depth}, {text r.status} AS active_status
    FROM runs r JOIN threads t ON t.id = r.thread_id
    WHERE r.id = :run AND changes() = 1",
);

static IS_KEY_USED: Statement = Statement::new(
    "tools.is_idempotency_key_used",
    "SELECT EXISTS (
        SELECT 1 FROM idempotency_keys t WHERE {of_key} AND t.key = :idempotency_key
    ) AS used",
);

static RECORD_KEY: Statement = Statement::on_sqlite(
    "tools.record_idempotency_key",
    "INSERT INTO idempotency_keys (tenant, user_key, scope_kind, scope_name, key, run_id, request_hash, created_at)
    VALUES (:tenant, :user, {scope_kind}, :scope_name, :idempotency_key, :run, :request_hash, {now})",
);

static SEND_OUTPUTS: Statement = Statement::new(
    "tools.send_outputs",
    "UPDATE runs AS r SET tool_outputs_sent = true WHERE {leased r} AND {at_work r}",
);

static LIST_REQUESTS: Statement = Statement::new(
    "tools.list_requests",
    "SELECT r.id, {text r.status} AS status, r.rollback_pending, r.tool_outputs FROM runs r
    WHERE r.owner = :replica AND {unfinished_of_owner r}
        AND (r.status = 'cancelling' OR (r.tool_outputs IS NOT NULL AND NOT r.tool_outputs_sent))",
);

pub(super) static STATEMENTS: &[&Statement] = &[
    &PAUSE,
    &ANSWER,
    &IS_KEY_USED,
    &RECORD_KEY,
    &SEND_OUTPUTS,
    &LIST_REQUESTS,
];

impl Store {
    /// Lets a run in progress wait for tool outputs, and records its reply and its events so far.
    /// While the run waits, its deadline is the end of the wait, unless its own comes earlier.
    ///
    /// Harmless to repeat with the same pause, even if the outputs have arrived meanwhile: then
    /// the run is in progress with its outputs.
    pub async fn pause(&self, lease: &RunLease, pause: &Pause) -> Result<Paused, StoreError> {
        let Pause {
            required_action,
            upstream_run_id,
            content,
            usage,
            events,
            wait,
        } = pause;
        let values = params()
            .set("run", lease.run_id.uuid())
            .set("fence", lease.fence)
            .json_text("action", json(&self.redaction.action(required_action))?)
            .set(
                "upstream_run",
                upstream_run_id.as_ref().map(UpstreamRunId::as_str),
            )
            .json_text("content", json(&self.redaction.parts(content))?)
            .json("usage", usage.as_ref())?
            .set("wait", millis(*wait))
            .set("first", events.first)
            .json_text("events", log_json(&self.redaction.events(events).events)?)
            .set("end", events.end());
        let mut c = self.backend.vital_writer().await?;
        c.begin_script().await?;
        let row: Option<PausedRow> = c.optional(&PAUSE, values).await?;
        c.commit_script().await?;
        let Some(PausedRow { waiting, is_same }) = row else {
            return Ok(Paused::Lost);
        };
        let waiting = Waiting::try_from(waiting)?;
        Ok(match waiting.run.status {
            RunStatus::Cancelling => Paused::Cancelling,
            RunStatus::RequiresAction if !is_same => Paused::Lost,
            _ => Paused::Waiting(Box::new(waiting)),
        })
    }

    /// Gives outputs to a run that waits for exactly the expected calls. The run is in progress
    /// again. Its owner reads the outputs with [`requests`](Self::requests), or gets them from the
    /// caller.
    pub async fn answer_tools(
        &self,
        key: &ConversationKey,
        id: RunId,
        answer: &ToolAnswer,
    ) -> Result<Answered, StoreError> {
        let idempotency = answer.idempotency.as_ref();
        let values = params()
            .key(key)
            .set("run", id.uuid())
            .json_text("expected", json(&self.redaction.action(&answer.expected))?)
            .json_text("outputs", json(&self.redaction.outputs(&answer.outputs))?)
            .set("idempotency_key", idempotency.map(|used| &used.key))
            .set(
                "request_hash",
                idempotency.map(|used| &used.request_hash[..]),
            );
        let mut c = self.backend.writer().await?;
        c.begin_script().await?;
        let answered: Option<WaitingRow> = match c.optional(&ANSWER, values).await {
            Err(failed) if failed.breaks("idempotency_keys_pkey") => return Ok(Answered::Repeated),
            answered => answered?,
        };
        if answered.is_some() && c.engine() == Engine::Sqlite {
            record_idempotency_key(&mut c, key, idempotency, id).await?;
        }
        c.commit_script().await?;
        match answered {
            Some(row) => Ok(Answered::Resumed(Box::new(row.try_into()?))),
            None if is_idempotency_key_used(&mut c, key, idempotency).await? => {
                Ok(Answered::Repeated)
            }
            None => Ok(Answered::NotWaiting),
        }
    }

    /// Records that the outputs of a run are about to be sent to the upstream. A replica that
    /// takes the run over later cannot know whether they were. Returns `false` if the lease was
    /// lost.
    pub async fn sends_outputs(&self, lease: &RunLease) -> Result<bool, StoreError> {
        let mut c = self.backend.vital_writer().await?;
        let values = params()
            .set("run", lease.run_id.uuid())
            .set("fence", lease.fence);
        Ok(c.execute(&SEND_OUTPUTS, values).await? == 1)
    }

    /// Returns the requests to active runs that the replica owns: runs that are to be cancelled,
    /// and runs with outputs that are not [being sent](Self::sends_outputs) yet. If content is not
    /// stored, it leaves the latter out, because the stored outputs are empty.
    pub async fn requests(&self, replica: ReplicaId) -> Result<Vec<Request>, StoreError> {
        let mut c = self.backend.vital_reader().await?;
        let rows: Vec<RequestRow> = c
            .all(&LIST_REQUESTS, params().set("replica", replica.uuid()))
            .await?;
        let mut requests = rows
            .into_iter()
            .map(Request::try_from)
            .collect::<Result<Vec<_>, _>>()?;
        requests
            .retain(|request| self.keeps_content() || !matches!(request, Request::Resume { .. }));
        Ok(requests)
    }
}

/// Returns whether an idempotency key is in use.
async fn is_idempotency_key_used(
    c: &mut Connection,
    key: &ConversationKey,
    idempotency: Option<&Idempotency>,
) -> Result<bool, StoreError> {
    let Some(idempotency) = idempotency else {
        return Ok(false);
    };
    let values = params().key(key).set("idempotency_key", &idempotency.key);
    let (used,): (bool,) = c.one(&IS_KEY_USED, values).await?;
    Ok(used)
}

/// Records that a run uses an idempotency key.
async fn record_idempotency_key(
    c: &mut Connection,
    key: &ConversationKey,
    idempotency: Option<&Idempotency>,
    run: RunId,
) -> Result<(), StoreError> {
    let Some(idempotency) = idempotency else {
        return Ok(());
    };
    let values = params()
        .key(key)
        .set("idempotency_key", &idempotency.key)
        .set("run", run.uuid())
        .set("request_hash", &idempotency.request_hash[..]);
    c.execute(&RECORD_KEY, values).await?;
    Ok(())
}

#[derive(FromRow)]
struct PausedRow {
    #[sqlx(flatten)]
    waiting: WaitingRow,
    /// Whether the run waits for exactly these calls.
    is_same: bool,
}

#[derive(FromRow)]
struct RequestRow {
    id: Uuid,
    status: String,
    rollback_pending: bool,
    tool_outputs: Option<Json<Vec<ToolOutput>>>,
}

impl TryFrom<RequestRow> for Request {
    type Error = StoreError;

    fn try_from(row: RequestRow) -> Result<Self, StoreError> {
        let run = RunId::from_uuid(row.id);
        match (word(&row.status)?, row.tool_outputs) {
            (RunStatus::Cancelling, _) => Ok(Self::Cancel {
                run,
                discard: row.rollback_pending,
            }),
            (RunStatus::InProgress, Some(Json(outputs))) => Ok(Self::Resume { run, outputs }),
            _ => Err(corrupt("a request to an active run")),
        }
    }
}

/// The state of a run that asks its caller for function calls.
#[derive(Clone, Debug, PartialEq)]
pub struct Pause {
    pub required_action: RequiredAction,
    /// The run's id at the upstream. `None` if it did not arrive: calls that were found in an
    /// upstream thread can be answered without it.
    pub upstream_run_id: Option<UpstreamRunId>,
    /// The reply so far.
    pub content: Vec<ContentPart>,
    pub usage: Option<Usage>,
    pub events: EventBatch,
    /// Longest wait for the outputs.
    pub wait: Duration,
}

/// The outcome of a [`Pause`].
#[derive(Clone, Debug, PartialEq)]
pub enum Paused {
    Waiting(Box<Waiting>),
    /// The run is to be cancelled.
    Cancelling,
    /// The lease was lost, or the run has ended.
    Lost,
}

/// A run that waits for tool outputs, and its thread.
#[derive(Clone, Debug, PartialEq)]
pub struct Waiting {
    pub thread: Thread,
    pub activity: ThreadActivity,
    pub run: Run,
}

/// Outputs for a run that waits for them.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolAnswer {
    /// The calls that the run must still be waiting for.
    pub expected: RequiredAction,
    pub outputs: Vec<ToolOutput>,
    pub idempotency: Option<Idempotency>,
}

/// The outcome of a [`ToolAnswer`].
#[derive(Clone, Debug, PartialEq)]
pub enum Answered {
    /// The run is in progress again.
    Resumed(Box<Waiting>),
    /// The run does not wait for these calls (any more), or its deadline has passed.
    NotWaiting,
    /// The idempotency key is in use.
    Repeated,
}

/// A request to an active run.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    Cancel {
        run: RunId,
        discard: bool,
    },
    Resume {
        run: RunId,
        outputs: Vec<ToolOutput>,
    },
}

/// A run that waits for tool outputs, or did a moment ago.
#[derive(FromRow)]
struct WaitingRow {
    #[sqlx(flatten)]
    thread: ThreadWithActivity,
    #[sqlx(flatten)]
    run: RunRow,
}

impl TryFrom<WaitingRow> for Waiting {
    type Error = StoreError;

    fn try_from(row: WaitingRow) -> Result<Self, StoreError> {
        let (thread, activity) = row.thread.into_parts()?;
        Ok(Self {
            thread,
            activity,
            run: row.run.try_into()?,
        })
    }
}

impl HasId for WaitingRow {
    const ID: &'static str = "r_id";
}

//! Reading runs.

use uuid::Uuid;

use super::paging::{Span, cursor};
use super::params::params;
use super::pool::Connection;
use super::rows::{MessageRow, RunRow, RunWithReply, ThreadAndRun};
use super::statement::Statement;
use super::{InputMessage, QueuedStart, RunLease, StartedRun, Store, StoreError};
use crate::domain::{ConversationKey, Message, Page, PageRequest, Run, RunId, RunStatus, ThreadId};

/// Finds the key's newest thread, and the number of the run that a cursor names. NULL if that run
/// is not in the thread.
static FIND_CURSOR: Statement = Statement::new(
    "runs.find_cursor",
    "SELECT t.id, (SELECT CASE WHEN r.thread_id = t.id THEN r.seq END FROM runs r WHERE r.id = :cursor)
    FROM threads t
    WHERE {newest_of_key}",
);

const LIST: &str = "
    SELECT {run r} FROM runs r
    WHERE r.thread_id = :thread AND r.seq > :above AND r.seq < :below
    ORDER BY r.seq {0}
    LIMIT :limit";

static LIST_UPWARDS: Statement = Statement::variant("runs.list_upwards", LIST, &["ASC"]);
static LIST_DOWNWARDS: Statement = Statement::variant("runs.list_downwards", LIST, &["DESC"]);

/// Lists runs of some threads, from behind the run number `:seq` of the thread `:thread`. Threads
/// before that one are skipped.
static LIST_OF_THREADS: Statement = Statement::new(
    "runs.list_of_threads",
    "SELECT {run r} FROM threads t
        {lateral runs r, FROM runs f
            WHERE f.thread_id = t.id AND f.seq > CASE WHEN t.id = :thread THEN :seq ELSE 0 END
            ORDER BY f.seq
            LIMIT :limit}
    WHERE t.id {in :threads} AND t.id >= :thread
    ORDER BY t.id, r.seq
    LIMIT :limit",
);

static LIST_UNFINISHED: Statement = Statement::new(
    "runs.list_unfinished",
    "SELECT {run r} FROM runs r WHERE r.id {in_found {unfinished = :thread}} ORDER BY r.seq",
);

static READ_WITH_REPLY: Statement = Statement::new(
    "runs.read_with_reply",
    "SELECT {run r}, {message m}
    FROM runs r
    JOIN threads t ON t.id = r.thread_id
    LEFT JOIN messages m ON m.run_id = r.id AND m.role = 'assistant'
    WHERE r.id = :run AND {of_key}",
);

static READ_LEASED: Statement = Statement::new(
    "runs.read_leased",
    "SELECT {thread t}, {run r}
    FROM runs r
    JOIN threads t ON t.id = r.thread_id
    WHERE r.id = :run AND r.fence = :fence",
);

static LIST_SAID: Statement = Statement::new(
    "runs.list_said",
    "SELECT {message m} FROM messages m WHERE m.run_id = :run AND m.role = 'user' ORDER BY m.position",
);

static DELETE_EVENTS_OF_RUNS: Statement = Statement::new(
    "runs.delete_events",
    "DELETE FROM run_events WHERE run_id {in :runs}",
);

static DELETE_KEYS_OF_RUNS: Statement = Statement::new(
    "runs.delete_idempotency_keys",
    "DELETE FROM idempotency_keys WHERE run_id {in :runs}",
);

static DELETE_RUNS: Statement =
    Statement::new("runs.delete", "DELETE FROM runs WHERE id {in :runs}");

pub(super) static STATEMENTS: &[&Statement] = &[
    &FIND_CURSOR,
    &LIST_UPWARDS,
    &LIST_DOWNWARDS,
    &LIST_OF_THREADS,
    &LIST_UNFINISHED,
    &READ_WITH_REPLY,
    &READ_LEASED,
    &LIST_SAID,
    &DELETE_EVENTS_OF_RUNS,
    &DELETE_KEYS_OF_RUNS,
    &DELETE_RUNS,
];

impl Store {
    /// Returns a page of the runs of the key's newest thread, in order of admission; `None` if the
    /// key has no thread.
    ///
    /// # Errors
    /// [`StoreError::UnknownCursor`] if `after` or `before` names no run of the thread.
    pub async fn runs(
        &self,
        key: &ConversationKey,
        page: &PageRequest<RunId>,
    ) -> Result<Option<Page<Run>>, StoreError> {
        let mut c = self.backend.reader().await?;
        let Some((thread, seq)) = newest(&mut c, key, page.after.or(page.before)).await? else {
            return Ok(None);
        };
        let span = Span::new(page, cursor(page, seq)?);
        span.page(list(&mut c, thread, span).await?).map(Some)
    }

    /// Returns the unfinished runs of the key's newest thread, in order of admission; `None` if
    /// the key has no thread.
    pub async fn unfinished(&self, key: &ConversationKey) -> Result<Option<Vec<Run>>, StoreError> {
        let mut c = self.backend.reader().await?;
        let Some((thread, _)) = newest(&mut c, key, None).await? else {
            return Ok(None);
        };
        unfinished_of(&mut c, thread).await.map(Some)
    }

    /// Returns a run of any of the key's threads, archived ones included, and its reply if it has
    /// one.
    pub async fn run(
        &self,
        key: &ConversationKey,
        id: RunId,
    ) -> Result<Option<(Run, Option<Message>)>, StoreError> {
        let mut c = self.backend.reader().await?;
        let row: Option<RunWithReply> = c
            .optional(&READ_WITH_REPLY, params().key(key).set("run", id.uuid()))
            .await?;
        row.map(RunWithReply::into_parts).transpose()
    }

    /// Returns up to `limit` runs of some threads: by thread id, and within a thread in order of
    /// admission. `behind`: the thread and the number of the run behind which the result begins.
    /// Threads with lower ids are skipped.
    pub async fn runs_of(
        &self,
        threads: &[ThreadId],
        behind: (ThreadId, i64),
        limit: u32,
    ) -> Result<Vec<Run>, StoreError> {
        let mut c = self.backend.reader().await?;
        let values = params()
            .set(
                "threads",
                threads.iter().map(|id| id.uuid()).collect::<Vec<_>>(),
            )
            .set("thread", behind.0.uuid())
            .set("seq", behind.1)
            .set("limit", limit);
        let rows: Vec<RunRow> = c.all(&LIST_OF_THREADS, values).await?;
        rows.into_iter().map(Run::try_from).collect()
    }

    /// Returns the unfinished runs of any thread, in order of admission.
    pub async fn unfinished_of(&self, thread: ThreadId) -> Result<Vec<Run>, StoreError> {
        unfinished_of(&mut self.backend.reader().await?, thread).await
    }
}

/// Returns the key's newest thread, and the number of the run that a cursor names.
async fn newest(
    c: &mut Connection,
    key: &ConversationKey,
    cursor: Option<RunId>,
) -> Result<Option<(ThreadId, Option<i64>)>, StoreError> {
    let values = params().key(key).set("cursor", cursor.map(RunId::uuid));
    let found: Option<(Uuid, Option<i64>)> = c.optional(&FIND_CURSOR, values).await?;
    Ok(found.map(|(thread, seq)| (ThreadId::from_uuid(thread), seq)))
}

/// Returns the rows of the runs in a span.
async fn list(c: &mut Connection, thread: ThreadId, span: Span) -> Result<Vec<RunRow>, StoreError> {
    let statement = if span.upwards {
        &LIST_UPWARDS
    } else {
        &LIST_DOWNWARDS
    };
    let values = params()
        .set("thread", thread.uuid())
        .set("above", span.above)
        .set("below", span.below)
        .set("limit", span.fetch);
    Ok(c.all(statement, values).await?)
}

/// Returns the unfinished runs of a thread, in order of admission.
pub(super) async fn unfinished_of(
    c: &mut Connection,
    thread: ThreadId,
) -> Result<Vec<Run>, StoreError> {
    let rows: Vec<RunRow> = c
        .all(&LIST_UNFINISHED, params().set("thread", thread.uuid()))
        .await?;
    rows.into_iter().map(Run::try_from).collect()
}

/// Returns the answer to a repeated [`Store::start_queued`]: the run, if it is in progress under
/// the same lease. Otherwise [`QueuedStart::Lost`].
pub(super) async fn started_before(
    c: &mut Connection,
    lease: &RunLease,
) -> Result<QueuedStart, StoreError> {
    let Some(both) = read_leased(c, lease).await? else {
        return Ok(QueuedStart::Lost);
    };
    let run = Run::try_from(both.run)?;
    if run.status != RunStatus::InProgress {
        return Ok(QueuedStart::Lost);
    }
    let input = said(c, lease.run_id).await?;
    Ok(QueuedStart::Started(Box::new(StartedRun {
        lease: *lease,
        thread: both.thread.try_into()?,
        run,
        input,
        intent: None,
    })))
}

/// Returns the run of a lease, and its thread.
pub(super) async fn read_leased(
    c: &mut Connection,
    lease: &RunLease,
) -> Result<Option<ThreadAndRun>, StoreError> {
    let values = params()
        .set("run", lease.run_id.uuid())
        .set("fence", lease.fence);
    Ok(c.optional(&READ_LEASED, values).await?)
}

/// Returns the user's messages of a run that has started.
pub(super) async fn said(c: &mut Connection, run: RunId) -> Result<Vec<InputMessage>, StoreError> {
    let rows: Vec<MessageRow> = c.all(&LIST_SAID, params().set("run", run.uuid())).await?;
    rows.into_iter().map(InputMessage::try_from).collect()
}

/// Deletes runs, which the caller has locked, with their events and idempotency keys. Their
/// messages stay.
pub(super) async fn delete_runs(c: &mut Connection, ids: Vec<Uuid>) -> Result<u64, StoreError> {
    if ids.is_empty() {
        return Ok(0);
    }
    c.execute(&DELETE_EVENTS_OF_RUNS, params().set("runs", ids.clone()))
        .await?;
    c.execute(&DELETE_KEYS_OF_RUNS, params().set("runs", ids.clone()))
        .await?;
    Ok(c.execute(&DELETE_RUNS, params().set("runs", ids)).await?)
}

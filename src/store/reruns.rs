//! Runs without a message of their own. Such a run takes the last messages of the user as its own
//! when it has started, and answers them again.

use uuid::Uuid;

use super::handle::Store;
use super::paging::Span;
use super::params::params;
use super::pool::Connection;
use super::rows::ThreadAndRun;
use super::runs::{read_leased, said};
use super::statement::Statement;
use super::transcript::listed;
use super::values::{QueuedStart, RunLease, StartedRun};
use super::{MAX_MERGED, StoreError};
use crate::domain::{Rerun, Run, RunId, UpstreamSync};

static LOCK: Statement = Statement::new(
    "reruns.lock",
    "SELECT r.thread_id FROM runs r WHERE {leased r} AND {at_work r} AND r.rerun = 'waiting' {lock r}",
);

/// Finds the newest message of the user, and the position after which the messages begin that
/// belong together with it: no reply is between them, and the upstream thread has all of them or
/// none.
static FIND_LAST: Statement = Statement::new(
    "reruns.find_last",
    "SELECT m.position, {text m.upstream_sync} AS state, COALESCE((
            SELECT o.position FROM messages o
            WHERE o.thread_id = :thread AND o.position < m.position AND (
                o.role <> 'user' OR CASE WHEN o.upstream_sync = 'unknown' THEN 'missing' ELSE o.upstream_sync END
                    <> CASE WHEN m.upstream_sync = 'unknown' THEN 'missing' ELSE m.upstream_sync END
            )
            ORDER BY o.position DESC
            LIMIT 1
        ), 0) AS above
    FROM messages m
    WHERE m.thread_id = :thread AND m.role = 'user'
    ORDER BY m.position DESC
    LIMIT 1",
);

static LIST_LAST: Statement = Statement::new(
    "reruns.list_last",
    "{listed m_position DESC, FROM messages m
        WHERE m.thread_id = :of AND m.position > :above AND m.position < :below
        ORDER BY m.position DESC}",
);

static COUNT_MISSING: Statement = Statement::new(
    "reruns.count_missing",
    "SELECT count(*) FROM messages m
    WHERE m.thread_id = :thread AND m.position >= :first AND m.upstream_sync = 'missing'",
);

static TAKE: Statement = Statement::new(
    "reruns.take",
    "UPDATE messages AS m SET run_id = :run, upstream_sync = 'present', upstream_message_id = NULL, run_outcome = NULL
    WHERE m.thread_id = :thread AND m.position >= :first AND m.position <= :last",
);

/// Withholds replies that the upstream thread lacks: the new reply takes their place.
static WITHHOLD_LACKING: Statement = Statement::new(
    "reruns.withhold_lacking",
    "UPDATE messages AS m SET upstream_sync = 'withheld', upstream_message_id = NULL
    WHERE m.thread_id = :thread AND m.position > :last AND m.upstream_sync <> 'present'",
);

static IS_ANSWERED: Statement = Statement::new(
    "reruns.is_answered",
    "SELECT EXISTS (SELECT 1 FROM messages m WHERE m.thread_id = :thread AND m.position > :last
        AND m.upstream_sync = 'present') AS answered",
);

static COUNT_SENT: Statement = Statement::new(
    "reruns.count_sent",
    "UPDATE threads AS t SET unsynced_messages = t.unsynced_messages - :sent WHERE t.id = :thread",
);

static RECORD: Statement = Statement::new(
    "reruns.record",
    "UPDATE runs SET rerun = :rerun WHERE id = :run",
);

/// Withholds the replies that the new one replaces, once the upstream thread has them no more.
static WITHHOLD_REPLACED: Statement = Statement::new(
    "reruns.withhold_replaced",
    "UPDATE messages AS m SET upstream_sync = 'withheld', upstream_message_id = NULL
    WHERE m.thread_id = (SELECT r.thread_id FROM runs r WHERE {leased r} AND {at_work r})
        AND m.position > (SELECT max(f.position) FROM messages f WHERE f.run_id = :run)
        AND m.upstream_sync = 'present'",
);

pub(super) static STATEMENTS: &[&Statement] = &[
    &LOCK,
    &FIND_LAST,
    &LIST_LAST,
    &COUNT_MISSING,
    &TAKE,
    &WITHHOLD_LACKING,
    &IS_ANSWERED,
    &COUNT_SENT,
    &RECORD,
    &WITHHOLD_REPLACED,
];

impl Store {
    /// Gives a started run without a message of its own the last messages of the user, and records
    /// what the upstream thread had of them. There are up to [`MAX_MERGED`] messages, of a page at
    /// most. Replies after them that the upstream thread lacks are withheld from it.
    ///
    /// Returns the run with its messages, which are then like those of any run. There are none if
    /// the thread has no message of the user. The call is harmless to repeat with the same lease.
    pub async fn take_last_messages(&self, lease: &RunLease) -> Result<QueuedStart, StoreError> {
        let mut c = self.backend.vital_writer().await?;
        c.begin().await?;
        let of_run = params()
            .set("run", lease.run_id.uuid())
            .set("fence", lease.fence);
        let waiting: Option<(Uuid,)> = c.optional(&LOCK, of_run).await?;
        if let Some((thread,)) = waiting {
            take_in(&mut c, lease.run_id, thread).await?;
        }
        let Some(ThreadAndRun { thread, run }) = read_leased(&mut c, lease).await? else {
            c.roll_back().await?;
            return Ok(QueuedStart::Lost);
        };
        let run = Run::try_from(run)?;
        let input = said(&mut c, lease.run_id).await?;
        let thread = thread.try_into()?;
        c.commit().await?;
        if run.status.is_final() {
            return Ok(QueuedStart::Lost);
        }
        Ok(QueuedStart::Started(Box::new(StartedRun {
            lease: *lease,
            thread,
            run,
            input,
            intent: None,
        })))
    }

    /// Withholds the replies to a run's messages that its own reply replaces: its thread has moved
    /// to an upstream thread without them. Harmless to repeat.
    pub async fn withhold_replaced(&self, lease: &RunLease) -> Result<(), StoreError> {
        let mut c = self.backend.vital_writer().await?;
        let values = params()
            .set("run", lease.run_id.uuid())
            .set("fence", lease.fence);
        c.execute(&WITHHOLD_REPLACED, values).await?;
        Ok(())
    }
}

async fn take_in(c: &mut Connection, run: RunId, thread: Uuid) -> Result<(), StoreError> {
    let of_thread = || params().set("thread", thread);
    let found: Option<(i64, String, i64)> = c.optional(&FIND_LAST, of_thread()).await?;
    let Some((last, state, above)) = found else {
        return Ok(());
    };
    let limit = u32::try_from(MAX_MERGED).unwrap_or(u32::MAX);
    let span = Span::down(above, Some(last.saturating_add(1)), limit);
    let page = listed(c, &LIST_LAST, thread, span, limit).await?.page(span);
    let first = page.data.last().map_or(last, |message| message.position);
    let (missing,): (i64,) = c
        .one(&COUNT_MISSING, of_thread().set("first", first))
        .await?;
    let (is_answered,): (bool,) = c.one(&IS_ANSWERED, of_thread().set("last", last)).await?;
    let taken = of_thread()
        .set("run", run.uuid())
        .set("first", first)
        .set("last", last);
    c.execute(&TAKE, taken).await?;
    c.execute(&WITHHOLD_LACKING, of_thread().set("last", last))
        .await?;
    c.execute(&COUNT_SENT, of_thread().set("sent", missing))
        .await?;
    let rerun = match super::rows::word(&state)? {
        _ if is_answered => Rerun::Answered,
        UpstreamSync::Present => Rerun::Present,
        UpstreamSync::Withheld => Rerun::Withheld,
        UpstreamSync::Missing | UpstreamSync::Unknown => Rerun::Missing,
    };
    let found = params().set("run", run.uuid()).set("rerun", rerun.as_str());
    c.execute(&RECORD, found).await?;
    Ok(())
}

//! A run's way from the queue to its end.

use sqlx::SqliteConnection;
use sqlx::types::Json;

use super::read::started_before;
use super::{now, write};
use crate::domain::{Run, Thread, UpstreamRunId, UpstreamThreadId};
use crate::store::rows::{
    FinishedRow, RunRow, ThreadRow, json, message_columns, run_columns, thread_columns,
};
use crate::store::{Claim, Finished, InputMessage, RunEnd, RunLease, StoreError, Turn};

/// Implements [`Store::claim`](crate::store::Store::claim).
pub(super) async fn claim(connection: &mut SqliteConnection, lease: &RunLease) -> Result<Claim, StoreError> {
    let mut tx = write(connection).await?;
    let waiting: Option<(Json<Vec<InputMessage>>, bool)> = sqlx::query_as(
        "SELECT r.input, EXISTS (
            SELECT 1 FROM runs o
            WHERE o.thread_id = r.thread_id AND o.status IN ('in_progress', 'requires_action', 'cancelling')
        ) OR EXISTS (
            SELECT 1 FROM runs o WHERE o.thread_id = r.thread_id AND o.status = 'queued' AND o.seq < r.seq
        )
        FROM runs r
        WHERE r.id = $1 AND r.fence = $2 AND r.status = 'queued'",
    )
    .bind(lease.run_id.uuid())
    .bind(lease.fence)
    .fetch_optional(&mut *tx)
    .await?;
    let input = match waiting {
        None => return started_before(&mut tx, lease).await,
        Some((_, true)) => return Ok(Claim::NotYet),
        Some((Json(input), false)) => input,
    };
    let run: RunRow = sqlx::query_as(concat!(
        "UPDATE runs AS r SET status = 'in_progress', input = NULL, started_at = ",
        now!(),
        ", deadline_at = ",
        now!(),
        " + r.timeout_ms
        WHERE r.id = $1
        RETURNING ",
        run_columns!("runs"),
    ))
    .bind(lease.run_id.uuid())
    .fetch_one(&mut *tx)
    .await?;
    let run = Run::try_from(run)?;
    let thread: ThreadRow = sqlx::query_as(concat!(
        "UPDATE threads AS t SET message_count = t.message_count + $2, last_active_at = ",
        now!(),
        "
        WHERE t.id = $1
        RETURNING ",
        thread_columns!("threads"),
    ))
    .bind(run.thread_id.uuid())
    .bind(count(&input))
    .fetch_one(&mut *tx)
    .await?;
    let thread = Thread::try_from(thread)?;
    say(&mut tx, &run, thread.message_count - count(&input) + 1, &input).await?;
    tx.commit().await?;
    Ok(Claim::Started(Box::new(Turn { lease: *lease, thread, run, input })))
}

/// Implements [`Store::bind_upstream_thread`](crate::store::Store::bind_upstream_thread).
pub(super) async fn bind_upstream_thread(
    connection: &mut SqliteConnection,
    lease: &RunLease,
    id: &UpstreamThreadId,
) -> Result<bool, StoreError> {
    let done = sqlx::query(
        "UPDATE threads SET upstream_thread_id = $3
        WHERE id = (
            SELECT r.thread_id FROM runs r
            WHERE r.id = $1 AND r.fence = $2 AND r.status IN ('in_progress', 'requires_action', 'cancelling')
        )",
    )
    .bind(lease.run_id.uuid())
    .bind(lease.fence)
    .bind(id.as_str())
    .execute(&mut *connection)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// One script, because each trip to the connection's own thread costs more than the statement there.
///
/// All but the last statement are for a run that has not ended and whose lease is good. The last one reads the run
/// if it has ended in the given way, now or by an earlier call.
const FINISH: &str = concat!(
    "INSERT INTO messages (id, thread_id, position, role, content, run_id, created_at)
    SELECT unhex(substr(m.value ->> 'id', 5)), t.id, t.message_count + 1 + m.key, 'user', m.value -> 'content',
        r.id, ",
    now!(),
    "
    FROM runs r JOIN threads t ON t.id = r.thread_id JOIN json_each(r.input) m
    WHERE r.id = $1 AND r.fence = $2 AND r.status = 'queued';

    UPDATE threads SET message_count = message_count + ($8 IS NOT NULL) + (
            SELECT COALESCE(json_array_length(r.input), 0) FROM runs r WHERE r.id = $1
        ),
        upstream_thread_id = COALESCE($7, upstream_thread_id), last_active_at = ",
    now!(),
    "
    WHERE id = (
        SELECT r.thread_id FROM runs r
        WHERE r.id = $1 AND r.fence = $2
            AND r.status IN ('queued', 'in_progress', 'requires_action', 'cancelling')
    );

    INSERT INTO messages (id, thread_id, position, role, content, run_id, upstream_message_id, created_at)
    SELECT $8, t.id, t.message_count, 'assistant', $9, r.id, $10, ",
    now!(),
    "
    FROM runs r JOIN threads t ON t.id = r.thread_id
    WHERE r.id = $1 AND r.fence = $2
        AND r.status IN ('queued', 'in_progress', 'requires_action', 'cancelling')
        AND $8 IS NOT NULL;

    UPDATE runs SET status = $3, error = $4, usage = $5, upstream_run_id = COALESCE($6, upstream_run_id),
        required_action = NULL, input = NULL, finished_at = ",
    now!(),
    "
    WHERE id = $1 AND fence = $2 AND status IN ('queued', 'in_progress', 'requires_action', 'cancelling');

    SELECT ",
    thread_columns!(),
    ", ",
    run_columns!(),
    ", ",
    message_columns!(),
    ", (
        SELECT count(*) FROM runs o WHERE o.thread_id = t.id AND o.status = 'queued'
    ) AS queue_depth, (
        SELECT o.status FROM runs o
        WHERE o.thread_id = t.id AND o.status IN ('in_progress', 'requires_action', 'cancelling')
    ) AS active_status
    FROM runs r
    JOIN threads t ON t.id = r.thread_id
    LEFT JOIN messages m ON m.run_id = r.id AND m.role = 'assistant'
    WHERE r.id = $1 AND r.fence = $2 AND r.status = $3 AND r.finished_at IS NOT NULL",
);

/// Implements [`Store::finish`](crate::store::Store::finish).
pub(super) async fn finish(
    connection: &mut SqliteConnection,
    lease: &RunLease,
    end: &RunEnd,
) -> Result<Option<Finished>, StoreError> {
    let mut tx = write(connection).await?;
    let reply = end.reply.as_ref();
    let row: Option<FinishedRow> = sqlx::query_as(FINISH)
        .bind(lease.run_id.uuid())
        .bind(lease.fence)
        .bind(end.status.as_str())
        .bind(end.error.as_ref().map(json).transpose()?)
        .bind(end.usage.as_ref().map(json).transpose()?)
        .bind(end.upstream_run_id.as_ref().map(UpstreamRunId::as_str))
        .bind(end.upstream_thread_id.as_ref().map(UpstreamThreadId::as_str))
        .bind(reply.map(|reply| reply.id.uuid()))
        .bind(reply.map(|reply| json(&reply.content)).transpose()?)
        .bind(reply.and_then(|reply| reply.upstream_message_id.as_deref()))
        .fetch_optional(&mut *tx)
        .await?;
    tx.commit().await?;
    row.map(Finished::try_from).transpose()
}

/// Puts a run's messages into the transcript, the first at position `first`.
async fn say(
    tx: &mut SqliteConnection,
    run: &Run,
    first: i64,
    messages: &[InputMessage],
) -> Result<(), StoreError> {
    for (position, message) in (first..).zip(messages) {
        sqlx::query(concat!(
            "INSERT INTO messages (id, thread_id, position, role, content, run_id, created_at)
            VALUES ($1, $2, $3, 'user', $4, $5, ",
            now!(),
            ")",
        ))
        .bind(message.id.uuid())
        .bind(run.thread_id.uuid())
        .bind(position)
        .bind(json(&message.content)?)
        .bind(run.id.uuid())
        .execute(&mut *tx)
        .await?;
    }
    Ok(())
}

fn count(messages: &[InputMessage]) -> i64 {
    i64::try_from(messages.len()).unwrap_or(i64::MAX)
}

//! The end of a run.

use sqlx::SqliteConnection;
use sqlx::types::Json;

use super::read::left_to;
use super::{now, write};
use crate::domain::{Context, RunStatus, UpstreamRunId, UpstreamThreadId};
use crate::store::columns::{activity, first_position, message_columns, run_columns, thread_columns};
use crate::store::rows::{FinishedRow, ended, json, log_json};
use crate::store::{Closing, Finished, InputMessage, RunEnd, RunLease, StoreError, Withdrawal, Withdrawn};

/// The run `r` has not ended, the lease is good, and if the run must be discarded the end does that.
macro_rules! ending {
    () => {
        "r.id = $1 AND r.fence = $2 AND r.status IN ('queued', 'in_progress', 'requires_action', 'cancelling')
            AND ($15 OR NOT r.discard)"
    };
}

/// One script, because each trip to the connection's own thread costs more than the statement there.
///
/// All but the last statement are for a run that is [`ending!`]. The last one reads the run if it has ended in the
/// given way, now or by an earlier call. What concerns other messages than the new ones hangs on a parameter first,
/// so that a run which ended well does not look at any.
pub(super) const FINISH: &str = concat!(
    "INSERT INTO run_events AS l (run_id, n, event, until, created_at)
    SELECT r.id, $16, $17, $20, ",
    now!(),
    " FROM runs r WHERE NOT $22 AND ",
    ending!(),
    "
    ON CONFLICT (run_id, n) DO UPDATE SET event = excluded.event, until = excluded.until
        WHERE l.until < excluded.until;

    DELETE FROM run_events WHERE $22 AND $16 > 0 AND run_id = (SELECT r.id FROM runs r WHERE ",
    ending!(),
    ");

    INSERT INTO messages (id, thread_id, position, role, content, run_id, created_at)
    SELECT unhex(substr(m.value ->> 'id', 5)), t.id, t.last_position + 1 + m.key, 'user', m.value -> 'content',
        r.id, ",
    now!(),
    "
    FROM runs r JOIN threads t ON t.id = r.thread_id JOIN json_each(r.input) m
    WHERE NOT $15 AND r.status = 'queued' AND ",
    ending!(),
    ";

    UPDATE messages SET context = $11, ended = $18
    WHERE $19 AND run_id = (SELECT r.id FROM runs r WHERE ",
    ending!(),
    ");

    UPDATE threads SET
        message_count = message_count + ($8 IS NOT NULL) + iif($15,
            -(SELECT count(*) FROM messages m WHERE m.run_id = $1),
            (SELECT COALESCE(json_array_length(r.input), 0) FROM runs r WHERE r.id = $1)
        ),
        last_position = last_position + ($8 IS NOT NULL) + iif($15,
            0, (SELECT COALESCE(json_array_length(r.input), 0) FROM runs r WHERE r.id = $1)
        ),
        backlog = backlog + ($12 IS 'missing')
            + iif($19 AND $11 = 'missing', (SELECT count(*) FROM messages m WHERE m.run_id = $1), 0)
            - iif($13, (
                SELECT count(*) FROM runs r JOIN messages m ON m.thread_id = r.thread_id
                WHERE r.id = $1 AND m.context = 'missing' AND m.position < ",
    first_position!("r"),
    "
            ), 0),
        leftover = COALESCE($14, iif($13, NULL, leftover)),
        upstream_thread_id = COALESCE($7, upstream_thread_id), last_active_at = ",
    now!(),
    "
    WHERE id = (SELECT r.thread_id FROM runs r WHERE ",
    ending!(),
    ");

    UPDATE messages SET context = 'present'
    WHERE $13 AND thread_id = (SELECT r.thread_id FROM runs r WHERE ",
    ending!(),
    ") AND (context = 'missing' OR context = 'unknown')
        AND position < (SELECT ",
    first_position!("r"),
    " FROM runs r WHERE r.id = $1);

    DELETE FROM messages WHERE $15 AND run_id = (SELECT r.id FROM runs r WHERE ",
    ending!(),
    ");

    INSERT INTO messages (
        id, thread_id, position, role, content, run_id, upstream_message_id, context, ended, created_at
    )
    SELECT $8, t.id, t.last_position, 'assistant', $9, r.id, $10, $12, $18, ",
    now!(),
    "
    FROM runs r JOIN threads t ON t.id = r.thread_id
    WHERE $8 IS NOT NULL AND ",
    ending!(),
    ";

    UPDATE runs AS r SET status = $3, error = $4, usage = $5, upstream_run_id = COALESCE($6, upstream_run_id),
        earlier_upstream_runs = iif(upstream_run_id <> $6,
            json_insert(COALESCE(earlier_upstream_runs, '[]'), '$[#]', upstream_run_id), earlier_upstream_runs),
        unheard = unheard + $21, discard = $15, required_action = NULL, partial = NULL, tool_outputs = NULL, input = NULL, finished_at = ",
    now!(),
    "
    WHERE ",
    ending!(),
    ";

    SELECT ",
    thread_columns!(),
    ", ",
    run_columns!(),
    ", ",
    message_columns!(),
    ", ",
 activity!(),
 "
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
) -> Result<Closing, StoreError> {
    let mut tx = write(connection).await?;
    let closing = finish_in(&mut tx, lease, end).await?;
    tx.commit().await?;
    Ok(closing)
}

async fn finish_in(tx: &mut SqliteConnection, lease: &RunLease, end: &RunEnd) -> Result<Closing, StoreError> {
    let reply = end.reply.as_ref().filter(|_| !end.discard);
    let as_begun = end.said == Context::Present && end.status == RunStatus::Completed;
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
        .bind(end.said.as_str())
        .bind(reply.map(|reply| reply.context.as_str()))
        .bind(end.synced)
        .bind(end.leftover.as_ref().map(json).transpose()?)
        .bind(end.discard)
        .bind(end.events.first)
        .bind(log_json(&end.events.events)?)
        .bind(ended(end.status))
        .bind(!as_begun && !end.discard)
        .bind(end.events.end())
        .bind(i32::try_from(end.unheard).unwrap_or(i32::MAX))
        .bind(end.drops_log)
        .fetch_optional(&mut *tx)
        .await?;
    Ok(match row {
        Some(row) => Closing::Finished(Box::new(Finished::try_from(row)?)),
        None if must_discard(tx, lease).await? => Closing::MustDiscard,
        None => Closing::Lost,
    })
}

/// Whether a run that did not end is held back by its mark.
async fn must_discard(tx: &mut SqliteConnection, lease: &RunLease) -> Result<bool, StoreError> {
    let marked: Option<bool> = sqlx::query_scalar(
        "SELECT r.discard FROM runs r
        WHERE r.id = $1 AND r.fence = $2
            AND r.status IN ('queued', 'in_progress', 'requires_action', 'cancelling')",
    )
    .bind(lease.run_id.uuid())
    .bind(lease.fence)
    .fetch_optional(tx)
    .await?;
    Ok(marked == Some(true))
}

/// Implements [`Store::withdraw`](crate::store::Store::withdraw). The writer is alone, so no message joins between the look and the end.
pub(super) async fn withdraw(
    connection: &mut SqliteConnection,
    lease: &RunLease,
    taken: &Withdrawal,
) -> Result<Withdrawn, StoreError> {
    let mut tx = write(connection).await?;
    let waiting: Option<Json<Vec<InputMessage>>> = sqlx::query_scalar(
        "SELECT r.input FROM runs r WHERE r.id = $1 AND r.fence = $2 AND r.input IS NOT NULL",
    )
    .bind(lease.run_id.uuid())
    .bind(lease.fence)
    .fetch_optional(&mut *tx)
    .await?;
    let mut others = waiting.map(|Json(input)| input).unwrap_or_default();
    others.retain(|message| message.id != taken.message);
    let withdrawn = if others.is_empty() {
        match finish_in(&mut tx, lease, &taken.end).await? {
            Closing::Finished(_) => Withdrawn::Ended,
            Closing::MustDiscard | Closing::Lost => Withdrawn::Lost,
        }
    } else {
        left_to(&mut tx, lease, &others, taken).await?
    };
    tx.commit().await?;
    Ok(withdrawn)
}

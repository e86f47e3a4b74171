//! The end of a run, in one statement.

use sqlx::postgres::PgRow;
use sqlx::types::Json;
use sqlx::{Connection, FromRow, PgConnection, Row};
use uuid::Uuid;

use super::read::left_to;
use crate::domain::{Context, RunStatus, UpstreamRunId, UpstreamThreadId};
use crate::store::columns::{activity, first_position, message_columns, run_columns, thread_columns};
use crate::store::rows::{FinishedRow, ended, json, log_json};
use crate::store::{Closing, Finished, InputMessage, RunEnd, RunLease, StoreError, Withdrawal, Withdrawn};

/// `held` is the run, `ending` is empty if it must be discarded and the end does not do that.
///
/// The statement's snapshot is taken before it gets the run's row, and may be out of date by then: if the run moved on
/// meanwhile (a claim whose caller did not wait for it puts messages into the transcript, a rollover takes it to a fresh
/// thread), the snapshot lacks what came with that. `seen` is the run as in the snapshot, so that this shows; then nothing is changed, and it is tried again.
///
/// A part of the log may be there already, if the answer to its [recording](super::record) did not come in time. Where the
/// log is dropped, what the snapshot lacks of it stays: readers know that it is not the whole.
///
/// The one thread is said as a value and not as a join, which might be made of all messages that are unsettled anywhere.
/// What concerns other messages than the new ones hangs on a parameter alone, so that a run which ended well does not
/// look at any. The run comes first, then the messages that the thread counts, then the thread.
const FINISH: &str = concat!(
    "WITH seen AS MATERIALIZED (
        SELECT r.status, r.thread_id FROM runs r WHERE r.id = $1
    ), held AS MATERIALIZED (
        SELECT r.id, r.thread_id, r.discard, r.status, COALESCE(r.input, '[]') AS input FROM runs r
        WHERE r.id = $1 AND r.fence = $2 AND r.finished_at IS NULL
        FOR NO KEY UPDATE
    ), ending AS MATERIALIZED (
        SELECT h.id, h.thread_id, CASE WHEN $15 THEN '[]' ELSE h.input END AS input
        FROM held h JOIN seen s ON s.status = h.status AND s.thread_id = h.thread_id
        WHERE $15 OR NOT h.discard
    ), ended AS (
        UPDATE runs r SET status = $3, error = $4::jsonb, usage = $5::jsonb,
            upstream_run_id = COALESCE($6, r.upstream_run_id),
            earlier_upstream_runs = CASE WHEN r.upstream_run_id <> $6
                THEN COALESCE(r.earlier_upstream_runs, '[]') || to_jsonb(r.upstream_run_id)
                ELSE r.earlier_upstream_runs END,
            unheard = r.unheard + $21, discard = $15, required_action = NULL, partial = NULL, tool_outputs = NULL, input = NULL, finished_at = clock_timestamp()
        FROM ending e
        WHERE r.id = $1
        RETURNING r.*
    ), logged AS (
        INSERT INTO run_events AS l (run_id, n, event, until, created_at)
        SELECT e.id, $16, $17::jsonb, $20, clock_timestamp() FROM ending e WHERE NOT $22
        ON CONFLICT (run_id, n) DO UPDATE SET event = excluded.event, until = excluded.until
            WHERE l.until < excluded.until
    ), dropped AS (
        DELETE FROM run_events l USING ending e WHERE $22 AND $16 > 0 AND l.run_id = e.id
    ), removed AS (
        DELETE FROM messages m USING ending e WHERE $15 AND m.run_id = $1 RETURNING m.id
    ), marked AS (
        UPDATE messages m SET context = $11, ended = $18
        FROM ending e
        WHERE $19 AND m.run_id = $1
        RETURNING m.id
    ), sent AS (
        UPDATE messages m SET context = 'present'
        WHERE $13 AND m.thread_id = (SELECT e.thread_id FROM ending e) AND m.position < (
            SELECT ",
    first_position!("e"),
    " FROM ending e
        ) AND m.context = 'missing'
        RETURNING m.id
    ), found AS (
        UPDATE messages m SET context = 'present'
        WHERE $13 AND m.thread_id = (SELECT e.thread_id FROM ending e) AND m.position < (
            SELECT ",
    first_position!("e"),
    " FROM ending e
        ) AND m.context = 'unknown'
    ), bound AS (
        UPDATE threads t SET
            message_count = t.message_count + jsonb_array_length(e.input) + CASE WHEN $8 IS NULL THEN 0 ELSE 1 END
                - (SELECT count(*) FROM removed),
            last_position = t.last_position + jsonb_array_length(e.input) + CASE WHEN $8 IS NULL THEN 0 ELSE 1 END,
            backlog = t.backlog - (SELECT count(*) FROM sent)
                + CASE WHEN $11 = 'missing' THEN jsonb_array_length(e.input) + (SELECT count(*) FROM marked) ELSE 0 END
                + CASE WHEN $12 = 'missing' THEN 1 ELSE 0 END,
            leftover = COALESCE($14::jsonb, CASE WHEN NOT $13 THEN t.leftover END),
            upstream_thread_id = COALESCE($7, t.upstream_thread_id),
            last_active_at = clock_timestamp()
        FROM ending e
        WHERE t.id = (SELECT o.thread_id FROM ending o)
        RETURNING t.*
    ), said AS (
        INSERT INTO messages (id, thread_id, position, role, content, run_id, context, ended, created_at)
        SELECT substr(m.item ->> 'id', 5)::uuid, t.id,
            t.last_position - CASE WHEN $8 IS NULL THEN 0 ELSE 1 END - jsonb_array_length(e.input) + m.n,
            'user', m.item -> 'content', e.id, $11, $18, clock_timestamp()
        FROM bound t, ending e, jsonb_array_elements(e.input) WITH ORDINALITY AS m (item, n)
    ), replied AS (
        INSERT INTO messages AS m (
            id, thread_id, position, role, content, run_id, upstream_message_id, context, ended, created_at
        )
        SELECT $8, t.id, t.last_position, 'assistant', $9::jsonb, e.id, $10, $12, $18, clock_timestamp()
        FROM bound t, ending e
        WHERE $8 IS NOT NULL
        RETURNING m.*
    )
    SELECT ",
    thread_columns!(),
    ", ",
    run_columns!(),
    ", ",
    message_columns!(),
    ", (
        SELECT count(*) FROM runs o WHERE o.thread_id = t.id AND o.status = 'queued' AND o.id <> r.id
    ) AS queue_depth, (
        SELECT o.status FROM runs o
        WHERE o.thread_id = t.id AND o.status IN ('in_progress', 'requires_action', 'cancelling')
            AND o.id <> r.id
    ) AS active_status, h.discard AND NOT $15 AS must_discard
    FROM held h
    LEFT JOIN ended r ON true
    LEFT JOIN bound t ON true
    LEFT JOIN replied m ON true",
);

/// Times that a run may move on under its end before that gives up.
const MAX_ATTEMPTS: u32 = 10;

/// Implements [`Store::finish`](crate::store::Store::finish).
pub(super) async fn finish(
    connection: &mut PgConnection,
    lease: &RunLease,
    end: &RunEnd,
) -> Result<Closing, StoreError> {
    for _ in 0..MAX_ATTEMPTS {
        if let Some(closing) = try_finish(connection, lease, end).await? {
            return Ok(closing);
        }
    }
    Err(StoreError::Unavailable("the run kept changing".into()))
}

/// `None` if the run moved on meanwhile; nothing was changed.
async fn try_finish(
    connection: &mut PgConnection,
    lease: &RunLease,
    end: &RunEnd,
) -> Result<Option<Closing>, StoreError> {
    let reply = end.reply.as_ref().filter(|_| !end.discard);
    let as_begun = end.said == Context::Present && end.status == RunStatus::Completed;
    let row: Option<PgRow> = sqlx::query(FINISH)
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
        .fetch_optional(&mut *connection)
        .await?;
    let Some(row) = row else {
        return finished_before(connection, lease, end).await.map(Some);
    };
    if row.try_get::<Option<Uuid>, _>("r_id")?.is_none() {
        return Ok(row.try_get::<bool, _>("must_discard")?.then_some(Closing::MustDiscard));
    }
    closed(FinishedRow::from_row(&row)?).map(Some)
}

/// The answer to a repeated `finish`: the lease was lost unless the run ended in the same way under it.
async fn finished_before(
    connection: &mut PgConnection,
    lease: &RunLease,
    end: &RunEnd,
) -> Result<Closing, StoreError> {
    let row: Option<FinishedRow> = sqlx::query_as(concat!(
        "SELECT ",
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
    ))
    .bind(lease.run_id.uuid())
    .bind(lease.fence)
    .bind(end.status.as_str())
    .fetch_optional(&mut *connection)
    .await?;
    row.map_or(Ok(Closing::Lost), closed)
}

fn closed(row: FinishedRow) -> Result<Closing, StoreError> {
    Finished::try_from(row).map(|finished| Closing::Finished(Box::new(finished)))
}

/// Implements [`Store::withdraw`](crate::store::Store::withdraw). The run is locked, so that no message joins it between the look and the end.
pub(super) async fn withdraw(
    connection: &mut PgConnection,
    lease: &RunLease,
    taken: &Withdrawal,
) -> Result<Withdrawn, StoreError> {
    let mut tx = connection.begin().await?;
    let waiting: Option<Json<Vec<InputMessage>>> = sqlx::query_scalar(
        "SELECT r.input FROM runs r WHERE r.id = $1 AND r.fence = $2 AND r.input IS NOT NULL FOR NO KEY UPDATE",
    )
    .bind(lease.run_id.uuid())
    .bind(lease.fence)
    .fetch_optional(&mut *tx)
    .await?;
    let mut others = waiting.map(|Json(input)| input).unwrap_or_default();
    others.retain(|message| message.id != taken.message);
    let withdrawn = if others.is_empty() {
        match finish(&mut tx, lease, &taken.end).await? {
            Closing::Finished(_) => Withdrawn::Ended,
            Closing::MustDiscard | Closing::Lost => Withdrawn::Lost,
        }
    } else {
        left_to(&mut tx, lease, &others, taken).await?
    };
    tx.commit().await?;
    Ok(withdrawn)
}

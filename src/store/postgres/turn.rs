//! A run's way from the queue to its end. Each step is one statement.

use sqlx::types::Json;
use sqlx::{FromRow, PgConnection, Row};

use super::read::started_before;
use crate::domain::{UpstreamRunId, UpstreamThreadId};
use crate::store::rows::{FinishedRow, ThreadAndRun, json, message_columns, run_columns, thread_columns};
use crate::store::{Claim, Finished, InputMessage, RunEnd, RunLease, StoreError, Turn};

/// Implements [`Store::claim`](crate::store::Store::claim).
///
/// The snapshot cannot be out of date in a way that matters: once a run waits, no admission starts a run of its
/// thread (see `admit`), and only the run at the head of the queue can be claimed.
pub(super) async fn claim(connection: &mut PgConnection, lease: &RunLease) -> Result<Claim, StoreError> {
    let row = sqlx::query(concat!(
        "WITH waiting AS MATERIALIZED (
            SELECT r.id, r.input FROM runs r
            WHERE r.id = $1 AND r.fence = $2 AND r.status = 'queued'
            FOR NO KEY UPDATE
        ), started AS (
            UPDATE runs r SET status = 'in_progress', input = NULL, started_at = now(),
                deadline_at = now() + r.timeout_ms * interval '1 millisecond'
            FROM waiting w
            WHERE r.id = w.id AND r.status = 'queued'
                AND NOT EXISTS (
                    SELECT FROM runs o
                    WHERE o.thread_id = r.thread_id AND o.status IN ('in_progress', 'requires_action', 'cancelling')
                )
                AND NOT EXISTS (
                    SELECT FROM runs o
                    WHERE o.thread_id = r.thread_id AND o.status = 'queued' AND o.seq < r.seq
                )
            RETURNING r.*
        ), bound AS (
            UPDATE threads t SET message_count = t.message_count + jsonb_array_length(w.input),
                last_active_at = clock_timestamp()
            FROM started s, waiting w
            WHERE t.id = s.thread_id
            RETURNING t.*
        ), said AS (
            INSERT INTO messages (id, thread_id, position, role, content, run_id, created_at)
            SELECT substr(m.item ->> 'id', 5)::uuid, t.id,
                t.message_count - jsonb_array_length(w.input) + m.n, 'user', m.item -> 'content', w.id,
                clock_timestamp()
            FROM bound t, waiting w, jsonb_array_elements(w.input) WITH ORDINALITY AS m (item, n)
        )
        SELECT ",
        thread_columns!(),
        ", ",
        run_columns!(),
        ", w.input
        FROM waiting w
        LEFT JOIN started r ON true
        LEFT JOIN bound t ON true",
    ))
    .bind(lease.run_id.uuid())
    .bind(lease.fence)
    .fetch_optional(&mut *connection)
    .await?;
    let Some(row) = row else {
        return started_before(connection, lease).await;
    };
    if row.try_get::<Option<i64>, _>("r_seq")?.is_none() {
        return Ok(Claim::NotYet);
    }
    let both = ThreadAndRun::from_row(&row)?;
    let Json(input) = row.try_get::<Json<Vec<InputMessage>>, _>("input")?;
    let turn = Turn { lease: *lease, thread: both.thread.try_into()?, run: both.run.try_into()?, input };
    Ok(Claim::Started(Box::new(turn)))
}

/// Implements [`Store::bind_upstream_thread`](crate::store::Store::bind_upstream_thread).
pub(super) async fn bind_upstream_thread(
    connection: &mut PgConnection,
    lease: &RunLease,
    id: &UpstreamThreadId,
) -> Result<bool, StoreError> {
    // The run is locked, so that nobody takes it over between the check and the write.
    let done = sqlx::query(
        "WITH held AS MATERIALIZED (
            SELECT r.thread_id FROM runs r
            WHERE r.id = $1 AND r.fence = $2 AND r.status IN ('in_progress', 'requires_action', 'cancelling')
            FOR SHARE
        )
        UPDATE threads t SET upstream_thread_id = $3 FROM held h WHERE t.id = h.thread_id",
    )
    .bind(lease.run_id.uuid())
    .bind(lease.fence)
    .bind(id.as_str())
    .execute(&mut *connection)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Implements [`Store::finish`](crate::store::Store::finish).
pub(super) async fn finish(
    connection: &mut PgConnection,
    lease: &RunLease,
    end: &RunEnd,
) -> Result<Option<Finished>, StoreError> {
    let reply = end.reply.as_ref();
    let row: Option<FinishedRow> = sqlx::query_as(concat!(
        "WITH held AS MATERIALIZED (
            SELECT r.id, COALESCE(r.input, '[]') AS input FROM runs r
            WHERE r.id = $1 AND r.fence = $2
                AND r.status IN ('queued', 'in_progress', 'requires_action', 'cancelling')
            FOR NO KEY UPDATE
        ), ended AS (
            UPDATE runs r SET status = $3, error = $4::jsonb, usage = $5::jsonb,
                upstream_run_id = COALESCE($6, r.upstream_run_id), required_action = NULL, input = NULL,
                finished_at = clock_timestamp()
            FROM held h
            WHERE r.id = h.id
            RETURNING r.*
        ), bound AS (
            UPDATE threads t SET
                message_count = t.message_count + jsonb_array_length(h.input) + CASE WHEN $8 IS NULL THEN 0 ELSE 1 END,
                upstream_thread_id = COALESCE($7, t.upstream_thread_id),
                last_active_at = clock_timestamp()
            FROM ended e, held h
            WHERE t.id = e.thread_id
            RETURNING t.*
        ), said AS (
            INSERT INTO messages (id, thread_id, position, role, content, run_id, created_at)
            SELECT substr(m.item ->> 'id', 5)::uuid, t.id,
                t.message_count - CASE WHEN $8 IS NULL THEN 0 ELSE 1 END - jsonb_array_length(h.input) + m.n,
                'user', m.item -> 'content', h.id, clock_timestamp()
            FROM bound t, held h, jsonb_array_elements(h.input) WITH ORDINALITY AS m (item, n)
        ), replied AS (
            INSERT INTO messages AS m (
                id, thread_id, position, role, content, run_id, upstream_message_id, created_at
            )
            SELECT $8, t.id, t.message_count, 'assistant', $9::jsonb, h.id, $10, clock_timestamp()
            FROM bound t, held h
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
        ) AS active_status
        FROM ended r
        JOIN bound t ON true
        LEFT JOIN replied m ON true",
    ))
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
    .fetch_optional(&mut *connection)
    .await?;
    match row {
        Some(row) => row.try_into().map(Some),
        None => finished_before(connection, lease, end).await,
    }
}

/// The answer to a repeated `finish`: `None` unless the run ended in the same way under the same lease.
async fn finished_before(
    connection: &mut PgConnection,
    lease: &RunLease,
    end: &RunEnd,
) -> Result<Option<Finished>, StoreError> {
    let row: Option<FinishedRow> = sqlx::query_as(concat!(
        "SELECT ",
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
    ))
    .bind(lease.run_id.uuid())
    .bind(lease.fence)
    .bind(end.status.as_str())
    .fetch_optional(&mut *connection)
    .await?;
    row.map(Finished::try_from).transpose()
}

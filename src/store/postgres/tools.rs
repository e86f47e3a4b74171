//! Runs that wait for the outputs of function calls.

use sqlx::postgres::PgRow;
use sqlx::{FromRow, PgConnection, Row};

use super::once;
use super::read::is_used;
use super::read::waiting;
use crate::domain::{ConversationKey, RunId, RunStatus, UpstreamRunId};
use crate::store::columns::{queue_depth, run_columns, thread_columns};
use crate::store::rows::{WaitingRow, json, log_json};
use crate::store::{Answered, Pause, Paused, RunLease, StoreError, ToolAnswer, Waiting};

/// Implements [`Store::pause`](crate::store::Store::pause).
///
/// The batch of events tells whether the pause was recorded before: a repetition that comes after the answer must not
/// let the run wait for it again. A shorter batch in its place is none of a pause, for that one ends with what the run
/// asks for: it is a [recording](super::record) whose answer did not come in time.
pub(super) async fn pause(
    connection: &mut PgConnection,
    lease: &RunLease,
    pause: &Pause,
) -> Result<Paused, StoreError> {
    let row: Option<PgRow> = sqlx::query(concat!(
        "WITH held AS MATERIALIZED (
            SELECT r.id, r.status, COALESCE(r.required_action = $3::jsonb, false) AS same FROM runs r
            WHERE r.id = $1 AND r.fence = $2 AND r.input IS NULL AND r.finished_at IS NULL
            FOR NO KEY UPDATE
        ), logged AS (
            INSERT INTO run_events AS l (run_id, n, event, until, created_at)
            SELECT h.id, $7, $8::jsonb, $9, clock_timestamp() FROM held h WHERE h.status = 'in_progress'
            ON CONFLICT (run_id, n) DO UPDATE SET event = excluded.event, until = excluded.until
                WHERE l.until < excluded.until
            RETURNING l.run_id
        ), paused AS (
            UPDATE runs r SET status = 'requires_action', required_action = $3::jsonb,
                upstream_run_id = COALESCE($4, r.upstream_run_id),
                earlier_upstream_runs = CASE WHEN r.upstream_run_id <> $4
                    THEN COALESCE(r.earlier_upstream_runs, '[]') || to_jsonb(r.upstream_run_id)
                    ELSE r.earlier_upstream_runs END,
                partial = $5::jsonb, usage = $6::jsonb, tool_outputs = NULL
            FROM logged l
            WHERE r.id = $1
            RETURNING r.*
        )
        SELECT h.status AS held_status, h.same, ",
        thread_columns!(),
        ", ",
        run_columns!(),
        ", ",
        queue_depth!(),
        ", r.status AS active_status
        FROM held h
        LEFT JOIN paused r ON true
        LEFT JOIN threads t ON t.id = (SELECT p.thread_id FROM paused p)",
    ))
    .bind(lease.run_id.uuid())
    .bind(lease.fence)
    .bind(json(&pause.required_action)?)
    .bind(pause.upstream_run_id.as_ref().map(UpstreamRunId::as_str))
    .bind(json(&pause.content)?)
    .bind(pause.usage.as_ref().map(json).transpose()?)
    .bind(pause.events.first)
    .bind(log_json(&pause.events.events)?)
    .bind(pause.events.end())
    .fetch_optional(&mut *connection)
    .await?;
    let Some(row) = row else { return Ok(Paused::Lost) };
    if row.try_get::<Option<i64>, _>("r_seq")?.is_some() {
        return Ok(Paused::Waiting(Box::new(Waiting::try_from(WaitingRow::from_row(&row)?)?)));
    }
    let (status, same): (String, bool) = (row.try_get("held_status")?, row.try_get("same")?);
    if status == RunStatus::Cancelling.as_str() {
        return Ok(Paused::Cancelling);
    }
    if status == RunStatus::RequiresAction.as_str() && !same {
        return Ok(Paused::Lost);
    }
    let waiting = waiting(connection, lease).await?;
    Ok(waiting.map_or(Paused::Lost, |waiting| Paused::Waiting(Box::new(waiting))))
}

/// Implements [`Store::answer_tools`](crate::store::Store::answer_tools).
pub(super) async fn answer_tools(
    connection: &mut PgConnection,
    key: &ConversationKey,
    id: RunId,
    answer: &ToolAnswer,
) -> Result<Answered, StoreError> {
    let found: Result<Option<WaitingRow>, _> = sqlx::query_as(concat!(
        "WITH answered AS (
            UPDATE runs r SET status = 'in_progress', required_action = NULL, tool_outputs = $7::jsonb,
                outputs_sent = false
            FROM threads t
            WHERE r.id = $5 AND r.required_action = $6::jsonb AND r.status <> 'cancelling'
                AND r.deadline_at > clock_timestamp() AND t.id = r.thread_id
                AND t.tenant = $1 AND t.user_key = $2 AND t.scope_kind = $3 AND t.scope_name = $4
            RETURNING r.*
        ), used AS (
            INSERT INTO idempotency_keys (
                tenant, user_key, scope_kind, scope_name, key, run_id, request_hash, created_at
            )
            SELECT $1, $2, $3, $4, $8, r.id, $9, clock_timestamp() FROM answered r WHERE $8 IS NOT NULL
        )
        SELECT ",
        thread_columns!(),
        ", ",
        run_columns!(),
        ", ",
        queue_depth!(),
        ", r.status AS active_status
        FROM answered r JOIN threads t ON t.id = (SELECT a.thread_id FROM answered a)",
    ))
    .bind(key.tenant.as_str())
    .bind(key.user.as_str())
    .bind(key.scope.kind())
    .bind(key.scope.name())
    .bind(id.uuid())
    .bind(json(&answer.expected)?)
    .bind(json(&answer.outputs)?)
    .bind(answer.idempotency.as_ref().map(|used| &used.key))
    .bind(answer.idempotency.as_ref().map(|used| &used.request_hash[..]))
    .fetch_optional(&mut *connection)
    .await;
    match found {
        Ok(Some(row)) => Ok(Answered::Resumed(Box::new(row.try_into()?))),
        Ok(None) if is_used(connection, key, answer.idempotency.as_ref()).await? => Ok(Answered::Repeated),
        Ok(None) => Ok(Answered::NotWaiting),
        Err(error) if once::is_repeated(&error) => Ok(Answered::Repeated),
        Err(error) => Err(error.into()),
    }
}

//! Runs that wait for the outputs of function calls.

use sqlx::SqliteConnection;

use super::read::is_used;
use super::read::waiting;
use super::{now, once, write};
use crate::domain::{ConversationKey, RunId, RunStatus, UpstreamRunId};
use crate::store::rows::{json, log_json};
use crate::store::{Answered, Pause, Paused, RunLease, StoreError, ToolAnswer};

/// Implements [`Store::pause`](crate::store::Store::pause).
///
/// The batch of events tells whether the pause was recorded before: a repetition that comes after the answer must not
/// let the run wait for it again. A shorter batch in its place is none of a pause, for that one ends with what the run
/// asks for: it is a [recording](super::record) whose answer did not come in time.
pub(super) async fn pause(
    connection: &mut SqliteConnection,
    lease: &RunLease,
    pause: &Pause,
) -> Result<Paused, StoreError> {
    let mut tx = write(connection).await?;
    let required_action = json(&pause.required_action)?;
    let held: Option<(String, bool, bool)> = sqlx::query_as(
        "SELECT r.status, r.required_action IS $3, EXISTS (
            SELECT 1 FROM run_events e WHERE e.run_id = r.id AND e.n = $4 AND e.until >= $5
        )
        FROM runs r
        WHERE r.id = $1 AND r.fence = $2 AND r.status IN ('in_progress', 'requires_action', 'cancelling')",
    )
    .bind(lease.run_id.uuid())
    .bind(lease.fence)
    .bind(&required_action)
    .bind(pause.events.first)
    .bind(pause.events.end())
    .fetch_optional(&mut *tx)
    .await?;
    let Some((status, is_same, is_logged)) = held else { return Ok(Paused::Lost) };
    if status == RunStatus::Cancelling.as_str() {
        return Ok(Paused::Cancelling);
    }
    if status == RunStatus::RequiresAction.as_str() && !is_same {
        return Ok(Paused::Lost);
    }
    if status == RunStatus::InProgress.as_str() && !is_logged {
        sqlx::query(concat!(
            "INSERT INTO run_events (run_id, n, event, until, created_at) VALUES ($1, $6, $7, $8, ",
            now!(),
            ")
            ON CONFLICT (run_id, n) DO UPDATE SET event = excluded.event, until = excluded.until;

            UPDATE runs SET status = 'requires_action', required_action = $2,
                upstream_run_id = COALESCE($3, upstream_run_id),
                earlier_upstream_runs = iif(upstream_run_id <> $3,
                    json_insert(COALESCE(earlier_upstream_runs, '[]'), '$[#]', upstream_run_id), earlier_upstream_runs),
                partial = $4, usage = $5, tool_outputs = NULL
            WHERE id = $1",
        ))
        .bind(lease.run_id.uuid())
        .bind(required_action)
        .bind(pause.upstream_run_id.as_ref().map(UpstreamRunId::as_str))
        .bind(json(&pause.content)?)
        .bind(pause.usage.as_ref().map(json).transpose()?)
        .bind(pause.events.first)
        .bind(log_json(&pause.events.events)?)
        .bind(pause.events.end())
        .execute(&mut *tx)
        .await?;
    }
    let waiting = waiting(&mut tx, lease).await?;
    tx.commit().await?;
    Ok(waiting.map_or(Paused::Lost, |waiting| Paused::Waiting(Box::new(waiting))))
}

/// Implements [`Store::answer_tools`](crate::store::Store::answer_tools).
pub(super) async fn answer_tools(
    connection: &mut SqliteConnection,
    key: &ConversationKey,
    id: RunId,
    answer: &ToolAnswer,
) -> Result<Answered, StoreError> {
    let mut tx = write(connection).await?;
    if is_used(&mut tx, key, answer.idempotency.as_ref()).await? {
        return Ok(Answered::Repeated);
    }
    let fence: Option<i64> = sqlx::query_scalar(concat!(
        "UPDATE runs SET status = 'in_progress', required_action = NULL, tool_outputs = $7, outputs_sent = false
        WHERE id = $5 AND status = 'requires_action' AND required_action = $6 AND deadline_at > ",
        now!(),
        " AND EXISTS (
            SELECT 1 FROM threads t
            WHERE t.id = runs.thread_id AND t.tenant = $1 AND t.user_key = $2 AND t.scope_kind = $3
                AND t.scope_name = $4
        )
        RETURNING fence",
    ))
    .bind(key.tenant.as_str())
    .bind(key.user.as_str())
    .bind(key.scope.kind())
    .bind(key.scope.name())
    .bind(id.uuid())
    .bind(json(&answer.expected)?)
    .bind(json(&answer.outputs)?)
    .fetch_optional(&mut *tx)
    .await?;
    let Some(fence) = fence else { return Ok(Answered::NotWaiting) };
    once::note(&mut tx, key, answer.idempotency.as_ref(), id).await?;
    let waiting = waiting(&mut tx, &RunLease { run_id: id, fence }).await?;
    tx.commit().await?;
    let waiting = waiting.ok_or_else(|| StoreError::Corrupt("a run that was answered".to_owned()))?;
    Ok(Answered::Resumed(Box::new(waiting)))
}

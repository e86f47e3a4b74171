//! A run's way from the queue to its turn, and what its thread is upstream meanwhile.

use sqlx::types::Json;
use sqlx::{FromRow, Row, SqliteConnection};
use uuid::Uuid;

use super::read::{bound_before, started_before};
use super::{now, write};
use crate::domain::{Context, RemnantId, Run, RunId, Thread};
use crate::store::columns::{first_position, run_columns, started_position, thread_columns};
use crate::store::rows::{RunRow, ThreadRow, json};
use crate::store::{Binding, Bound, Claim, InputMessage, RunLease, StoreError, Turn, Withholding};

/// The messages that the thread `$2` lacks upstream, counted.
macro_rules! missing_messages {
    () => {
        "(SELECT count(*) FROM messages m WHERE m.thread_id = $2 AND m.context = 'missing')"
    };
}

/// Implements [`Store::claim`](crate::store::Store::claim).
pub(super) async fn claim(connection: &mut SqliteConnection, lease: &RunLease) -> Result<Claim, StoreError> {
    let mut tx = write(connection).await?;
    let waiting: Option<(Json<Vec<InputMessage>>, bool)> = sqlx::query_as(
        "SELECT r.input, EXISTS (
            SELECT 1 FROM runs o
            WHERE o.thread_id = r.thread_id AND o.status IN ('in_progress', 'requires_action', 'cancelling')
        ) OR EXISTS (
            SELECT 1 FROM runs o WHERE o.thread_id = r.thread_id AND o.status = 'queued' AND (o.rank, o.seq) < (r.rank, r.seq)
        ) OR EXISTS (
            -- What waits on a thread that is being deleted is only to be ended.
            SELECT 1 FROM threads o WHERE o.id = r.thread_id AND o.lifecycle = 'deleting'
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
    let (last_position, thread) = count_up(&mut tx, &run, &input).await?;
    say(&mut tx, &run, last_position - count(&input) + 1, &input).await?;
    tx.commit().await?;
    Ok(Claim::Started(Box::new(Turn { lease: *lease, thread, run, input })))
}

/// Implements [`Store::bind_upstream_thread`](crate::store::Store::bind_upstream_thread).
pub(super) async fn bind_upstream_thread(
    connection: &mut SqliteConnection,
    lease: &RunLease,
    binding: &Binding<'_>,
) -> Result<Bound, StoreError> {
    let mut tx = write(connection).await?;
    let Some(thread) = active(&mut tx, lease).await? else {
        sqlx::query(concat!("UPDATE remnants SET upstream_id = $2, due_at = ", now!(), " WHERE id = $1"))
            .bind(binding.intent.uuid())
            .bind(binding.id.as_str())
            .execute(&mut *tx)
            .await?;
        let bound = bound_before(&mut tx, lease, binding).await?;
        tx.commit().await?;
        return Ok(bound);
    };
    if binding.seeded {
        sqlx::query(concat!(
            "INSERT INTO remnants (id, thread_id, upstream, kind, upstream_id, created_at, due_at)
            SELECT $3, t.id, t.upstream, 'thread', t.upstream_thread_id, ",
            now!(),
            ", ",
            now!(),
            " FROM threads t WHERE t.id = $2 AND t.upstream_thread_id <> $4;

            UPDATE messages SET upstream_message_id = NULL,
                context = iif(context IN ('missing', 'unknown'), 'present', context)
            WHERE thread_id = $2 AND position < (SELECT ",
            first_position!("r"),
            " FROM runs r WHERE r.id = $1)
                AND (context IN ('missing', 'unknown') OR upstream_message_id IS NOT NULL);

            UPDATE threads SET leftover = NULL, carried_users = $5, backlog = ",
            missing_messages!(),
            " WHERE id = $2",
        ))
        .bind(lease.run_id.uuid())
        .bind(thread)
        .bind(RemnantId::new().uuid())
        .bind(binding.id.as_str())
        .bind(i64::from(binding.carried_users))
        .execute(&mut *tx)
        .await?;
    }
    sqlx::query(
        "UPDATE threads SET upstream_thread_id = $2 WHERE id = $1; DELETE FROM remnants WHERE id = $3",
    )
    .bind(thread)
    .bind(binding.id.as_str())
    .bind(binding.intent.uuid())
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(Bound::Done)
}

/// Implements [`Store::settled`](crate::store::Store::settled).
pub(super) async fn settled(
    connection: &mut SqliteConnection,
    lease: &RunLease,
    run: RunId,
    found: Context,
    synced: bool,
) -> Result<bool, StoreError> {
    let mut tx = write(connection).await?;
    let Some(thread) = active(&mut tx, lease).await? else {
        return Ok(false);
    };
    sqlx::query(concat!(
        "UPDATE messages SET context = 'present'
        WHERE $4 AND thread_id = $2 AND context = 'missing' AND position < (SELECT ",
        started_position!("r"),
        " FROM runs r WHERE r.id = $1);

        UPDATE messages SET context = $3 WHERE run_id = $1 AND thread_id = $2 AND context = 'unknown';

        UPDATE threads SET leftover = NULL, backlog = ",
        missing_messages!(),
        " WHERE id = $2",
    ))
    .bind(run.uuid())
    .bind(thread)
    .bind(found.as_str())
    .bind(synced)
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(true)
}

/// Implements [`Store::withhold_earlier`](crate::store::Store::withhold_earlier).
pub(super) async fn withhold_earlier(
    connection: &mut SqliteConnection,
    lease: &RunLease,
    what: &Withholding,
) -> Result<bool, StoreError> {
    let mut tx = write(connection).await?;
    let Some(thread) = active(&mut tx, lease).await? else {
        return Ok(false);
    };
    sqlx::query(concat!(
        "UPDATE messages SET upstream_message_id = NULL, context = 'withheld'
        WHERE thread_id = $2 AND (context <> 'withheld' OR upstream_message_id IS NOT NULL)
            AND (context = 'missing' OR NOT $4)
            AND position < (SELECT min($3, ",
        first_position!("r"),
        ") FROM runs r WHERE r.id = $1);

        UPDATE threads SET carried = min(carried, COALESCE($5, carried)), backlog = ",
        missing_messages!(),
        " WHERE id = $2",
    ))
    .bind(lease.run_id.uuid())
    .bind(thread)
    .bind(what.before.unwrap_or(i64::MAX))
    .bind(what.missing_only)
    .bind(what.carried.map(i64::from))
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(true)
}

/// The thread of an active run, if the lease is good.
async fn active(tx: &mut SqliteConnection, lease: &RunLease) -> Result<Option<Uuid>, StoreError> {
    let thread = sqlx::query_scalar(
        "SELECT r.thread_id FROM runs r
        WHERE r.id = $1 AND r.fence = $2 AND r.status IN ('in_progress', 'requires_action', 'cancelling')",
    )
    .bind(lease.run_id.uuid())
    .bind(lease.fence)
    .fetch_optional(tx)
    .await?;
    Ok(thread)
}

/// Counts the messages of a run that starts; gives the position of the last.
async fn count_up(
    tx: &mut SqliteConnection,
    run: &Run,
    input: &[InputMessage],
) -> Result<(i64, Thread), StoreError> {
    let row = sqlx::query(concat!(
        "UPDATE threads AS t SET message_count = t.message_count + $2, last_position = t.last_position + $2,
            last_active_at = ",
        now!(),
        "
        WHERE t.id = $1
        RETURNING last_position, ",
        thread_columns!("threads"),
    ))
    .bind(run.thread_id.uuid())
    .bind(count(input))
    .fetch_one(tx)
    .await?;
    Ok((row.try_get("last_position")?, ThreadRow::from_row(&row)?.try_into()?))
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

//! A run's way from the queue to its turn, and what its thread is upstream meanwhile. Each step is one statement.

use sqlx::error::DatabaseError;
use sqlx::types::Json;
use sqlx::{FromRow, PgConnection, Row};

use super::read::{bound_before, started_before};
use crate::domain::{Context, RemnantId, RunId};
use crate::store::columns::{first_position, run_columns, started_position, thread_columns};
use crate::store::rows::ThreadAndRun;
use crate::store::{Binding, Bound, Claim, InputMessage, RunLease, StoreError, Turn, Withholding};

/// Times that a run may change under its claim before that comes to nothing.
const MAX_ATTEMPTS: u32 = 10;

/// Implements [`Store::claim`](crate::store::Store::claim).
///
/// Once a run waits, no admission starts a run of its thread (see `admit`), and only the run at the head of the queue
/// can be claimed. The snapshot may be out of date in one way: it may lack a run that came just now and goes first.
/// If both are claimed at once, the index `runs_active` refuses one, which is told to come again; and a run that
/// started although another went before it by then has done so before that one came, as far as anybody can tell.
///
/// `seen` is the run as in the snapshot. It is locked only if it may start, since a lock is a write: whoever waits for a turn
/// asks again and again. While its row was waited for, the run may have moved to a fresh thread or changed hands: then
/// nothing is changed, and it is tried again.
pub(super) async fn claim(connection: &mut PgConnection, lease: &RunLease) -> Result<Claim, StoreError> {
    for _ in 0..MAX_ATTEMPTS {
        if let Some(claim) = try_claim(connection, lease).await? {
            return Ok(claim);
        }
    }
    Ok(Claim::NotYet)
}

/// `None` if the run changed meanwhile; nothing was changed.
async fn try_claim(connection: &mut PgConnection, lease: &RunLease) -> Result<Option<Claim>, StoreError> {
    let found = sqlx::query(concat!(
        "WITH seen AS MATERIALIZED (
            SELECT r.id, r.thread_id, NOT EXISTS (
                    SELECT FROM runs o
                    WHERE o.thread_id = r.thread_id AND o.status IN ('in_progress', 'requires_action', 'cancelling')
                )
                AND NOT EXISTS (
                    SELECT FROM runs o
                    WHERE o.thread_id = r.thread_id AND o.status = 'queued' AND (o.rank, o.seq) < (r.rank, r.seq)
                )
                -- What waits on a thread that is being deleted is only to be ended.
                AND NOT EXISTS (SELECT FROM threads o WHERE o.id = r.thread_id AND o.deletion IS NOT NULL)
                AS may_start
            FROM runs r
            WHERE r.id = $1 AND r.fence = $2 AND r.input IS NOT NULL
        ), held AS MATERIALIZED (
            SELECT r.id, r.thread_id, r.input FROM runs r
            WHERE (SELECT s.may_start FROM seen s) AND r.id = $1 AND r.fence = $2 AND r.input IS NOT NULL
            FOR NO KEY UPDATE
        ), waiting AS MATERIALIZED (
            SELECT h.id, h.input FROM held h JOIN seen s ON s.thread_id = h.thread_id
        ), started AS (
            UPDATE runs r SET status = 'in_progress', input = NULL, (started_at, deadline_at) = (
                    SELECT c.at, c.at + r.timeout_ms * interval '1 millisecond'
                    FROM (SELECT clock_timestamp() AS at) c
                )
            FROM waiting w
            WHERE r.id = $1
            RETURNING r.*
        ), bound AS (
            UPDATE threads t SET message_count = t.message_count + jsonb_array_length(w.input),
                last_position = t.last_position + jsonb_array_length(w.input),
                last_active_at = clock_timestamp()
            FROM started s, waiting w
            WHERE t.id = (SELECT o.thread_id FROM started o)
            RETURNING t.*
        ), said AS (
            INSERT INTO messages (id, thread_id, position, role, content, run_id, created_at)
            SELECT substr(m.item ->> 'id', 5)::uuid, t.id,
                t.last_position - jsonb_array_length(w.input) + m.n, 'user', m.item -> 'content', w.id,
                clock_timestamp()
            FROM bound t, waiting w, jsonb_array_elements(w.input) WITH ORDINALITY AS m (item, n)
        )
        SELECT ",
        thread_columns!(),
        ", ",
        run_columns!(),
        ", s.may_start, w.input
        FROM seen s
        LEFT JOIN waiting w ON true
        LEFT JOIN started r ON true
        LEFT JOIN bound t ON true",
    ))
    .bind(lease.run_id.uuid())
    .bind(lease.fence)
    .fetch_optional(&mut *connection)
    .await;
    let row = match found {
        Ok(Some(row)) => row,
        Ok(None) => return started_before(connection, lease).await.map(Some),
        Err(error) if is_refused(&error) => return Ok(Some(Claim::NotYet)),
        Err(error) => return Err(error.into()),
    };
    if row.try_get::<Option<i64>, _>("r_seq")?.is_none() {
        return Ok((!row.try_get::<bool, _>("may_start")?).then_some(Claim::NotYet));
    }
    let both = ThreadAndRun::from_row(&row)?;
    let Json(input) = row.try_get::<Json<Vec<InputMessage>>, _>("input")?;
    let turn = Turn { lease: *lease, thread: both.thread.try_into()?, run: both.run.try_into()?, input };
    Ok(Some(Claim::Started(Box::new(turn))))
}

/// Whether a statement failed because another run of the thread is active.
fn is_refused(error: &sqlx::Error) -> bool {
    error.as_database_error().and_then(DatabaseError::constraint) == Some("runs_active")
}

/// Implements [`Store::bind_upstream_thread`](crate::store::Store::bind_upstream_thread).
///
/// What was missing is told from the rest, since the thread counts it. If the lease was lost, nothing of the thread is
/// changed, and the intent becomes what is to be deleted. Whether the record has the id anyway is asked by a statement of
/// its own: it must see what an earlier call, or a deletion that went first, has committed.
pub(super) async fn bind_upstream_thread(
    connection: &mut PgConnection,
    lease: &RunLease,
    binding: &Binding<'_>,
) -> Result<Bound, StoreError> {
    // The run is locked, so that nobody takes it over between the check and the write.
    let done = sqlx::query(concat!(
        "WITH held AS MATERIALIZED (
            SELECT r.id, r.thread_id FROM runs r
            WHERE r.id = $1 AND r.fence = $2 AND r.input IS NULL AND r.finished_at IS NULL
            FOR SHARE
        ), sent AS (
            UPDATE messages m SET context = 'present', upstream_message_id = NULL
            WHERE $4 AND m.thread_id = (SELECT h.thread_id FROM held h) AND m.position < (
                SELECT ",
        first_position!("h"),
        " FROM held h
            ) AND m.context = 'missing'
            RETURNING m.id
        ), void AS (
            UPDATE messages m SET upstream_message_id = NULL,
                context = CASE WHEN m.context = 'unknown' THEN 'present' ELSE m.context END
            WHERE $4 AND m.thread_id = (SELECT h.thread_id FROM held h) AND m.position < (
                SELECT ",
        first_position!("h"),
        " FROM held h
            ) AND m.context <> 'missing' AND (m.context = 'unknown' OR m.upstream_message_id IS NOT NULL)
        ), done AS (
            DELETE FROM remnants x USING held h WHERE x.id = $5
        ), unused AS (
            UPDATE remnants x SET upstream_id = $3, due_at = now() WHERE x.id = $5 AND NOT EXISTS (SELECT FROM held)
        ), replaced AS (
            INSERT INTO remnants (id, thread_id, upstream, kind, upstream_id, created_at, due_at)
            SELECT $6, t.id, t.upstream, 'thread', t.upstream_thread_id, now(), now()
            FROM threads t
            WHERE t.id = (SELECT h.thread_id FROM held h) AND $4 AND t.upstream_thread_id <> $3
        )
        UPDATE threads t SET upstream_thread_id = $3, backlog = t.backlog - (SELECT count(*) FROM sent),
            leftover = CASE WHEN NOT $4 THEN t.leftover END,
            carried_users = CASE WHEN $4 THEN $7 ELSE t.carried_users END
        FROM held h
        WHERE t.id = (SELECT o.thread_id FROM held o)",
    ))
    .bind(lease.run_id.uuid())
    .bind(lease.fence)
    .bind(binding.id.as_str())
    .bind(binding.seeded)
    .bind(binding.intent.uuid())
    .bind(RemnantId::new().uuid())
    .bind(i64::from(binding.carried_users))
    .execute(&mut *connection)
    .await?;
    if done.rows_affected() == 1 { Ok(Bound::Done) } else { bound_before(connection, lease, binding).await }
}

/// Implements [`Store::settled`](crate::store::Store::settled).
pub(super) async fn settled(
    connection: &mut PgConnection,
    lease: &RunLease,
    run: RunId,
    found: Context,
    synced: bool,
) -> Result<bool, StoreError> {
    let done = sqlx::query(concat!(
        "WITH held AS MATERIALIZED (
            SELECT r.thread_id FROM runs r
            WHERE r.id = $1 AND r.fence = $2 AND r.input IS NULL AND r.finished_at IS NULL
            FOR SHARE
        ), looked_at AS (
            UPDATE messages m SET context = $4
            WHERE m.run_id = $3 AND m.thread_id = (SELECT h.thread_id FROM held h) AND m.context = 'unknown'
            RETURNING m.id
        ), went_along AS (
            UPDATE messages m SET context = 'present'
            WHERE $5 AND m.thread_id = (SELECT h.thread_id FROM held h) AND m.context = 'missing' AND m.position < (
                SELECT ",
        started_position!("e"),
        " FROM runs e WHERE e.id = $3
            )
            RETURNING m.id
        )
        UPDATE threads t SET leftover = NULL,
            backlog = t.backlog - (SELECT count(*) FROM went_along)
                + CASE WHEN $4 = 'missing' THEN (SELECT count(*) FROM looked_at) ELSE 0 END
        FROM held h
        WHERE t.id = (SELECT o.thread_id FROM held o)",
    ))
    .bind(lease.run_id.uuid())
    .bind(lease.fence)
    .bind(run.uuid())
    .bind(found.as_str())
    .bind(synced)
    .execute(&mut *connection)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Implements [`Store::withhold_earlier`](crate::store::Store::withhold_earlier).
pub(super) async fn withhold_earlier(
    connection: &mut PgConnection,
    lease: &RunLease,
    what: &Withholding,
) -> Result<bool, StoreError> {
    let done = sqlx::query(concat!(
        "WITH held AS MATERIALIZED (
            SELECT r.id, r.thread_id FROM runs r
            WHERE r.id = $1 AND r.fence = $2 AND r.input IS NULL AND r.finished_at IS NULL
            FOR SHARE
        ), missing AS (
            UPDATE messages m SET context = 'withheld', upstream_message_id = NULL
            WHERE m.thread_id = (SELECT h.thread_id FROM held h) AND m.position < (
                SELECT LEAST($3, ",
        first_position!("h"),
        ") FROM held h
            ) AND m.context = 'missing'
            RETURNING m.id
        ), others AS (
            UPDATE messages m SET context = 'withheld', upstream_message_id = NULL
            WHERE NOT $4 AND m.thread_id = (SELECT h.thread_id FROM held h) AND m.position < (
                SELECT LEAST($3, ",
        first_position!("h"),
        ") FROM held h
            ) AND m.context <> 'missing' AND (m.context <> 'withheld' OR m.upstream_message_id IS NOT NULL)
        )
        UPDATE threads t SET backlog = t.backlog - (SELECT count(*) FROM missing), carried = LEAST(t.carried, $5)
        FROM held h
        WHERE t.id = (SELECT o.thread_id FROM held o)",
    ))
    .bind(lease.run_id.uuid())
    .bind(lease.fence)
    .bind(what.before)
    .bind(what.missing_only)
    .bind(what.carried.map(i64::from))
    .execute(&mut *connection)
    .await?;
    Ok(done.rows_affected() == 1)
}

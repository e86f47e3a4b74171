//! Admission.

use sqlx::{FromRow, Row, SqliteConnection};
use uuid::Uuid;

use super::read::is_used;
use super::{expiry, live_on, now, once, write};
use crate::domain::{ConversationKey, MultitaskStrategy, Run, RunStatus, Thread};
use crate::store::columns::{current_of_key, newest_archived_of_key, run_columns, thread_columns};
use crate::store::rows::{RunRow, ThreadAndRun, ThreadRow, json, millis, ttl_millis};
use crate::store::{
    Admission, Admitted, InputMessage, MAX_MERGED, MAX_MERGED_BYTES, RunLease, StoreError, Turn,
};

/// Implements [`Store::admit`](crate::store::Store::admit).
pub(super) async fn admit(
    connection: &mut SqliteConnection,
    admission: &Admission,
) -> Result<Admitted, StoreError> {
    let mut tx = write(connection).await?;
    if is_used(&mut tx, &admission.key, admission.idempotency.as_ref()).await? {
        return Ok(Admitted::Repeated);
    }
    if admission.strategy == MultitaskStrategy::Merge
        && let Some(merged) = merge(&mut tx, admission).await?
    {
        tx.commit().await?;
        return Ok(merged);
    }
    let admitted = match try_admit(&mut tx, admission, None).await? {
        Some(admitted) => admitted,
        None => match refusal(&mut tx, admission).await? {
            Refusal::Final(refused) => return Ok(refused),
            Refusal::Expired(previous) => try_admit(&mut tx, admission, Some(previous))
                .await?
                .ok_or_else(|| StoreError::Corrupt("a fresh thread that admits nothing".to_owned()))?,
        },
    };
    once::note(&mut tx, &admission.key, admission.idempotency.as_ref(), admission.run_id).await?;
    tx.commit().await?;
    Ok(admitted)
}

/// One script, because each trip to the connection's own thread costs more than the statement there.
///
/// The thread counts one more run, or is made; unless it takes no run of this kind: then nothing was changed, which
/// the next statement asks for, and the rest finds no run.
///
/// A run that goes before all that wait gets a rank that is lower than any before: less its own number. A fresh thread
/// names the one before: the one given, or the newest archived one, which is looked up only if there is no current one.
pub(super) const ADMIT: &str = concat!(
    "INSERT INTO threads AS t (
        id, tenant, user_key, scope_kind, scope_name, upstream, lifecycle, previous_thread,
        message_count, last_position, run_count, created_at, last_active_at, max_age_ms, max_idle_ms, due_at
    )
    VALUES ($5, $1, $2, $3, $4, $6, 'current', CASE
            WHEN $20 IS NOT NULL THEN $20
            WHEN NOT EXISTS (SELECT 1 FROM threads t WHERE ",
    current_of_key!(),
    ") THEN ",
    newest_archived_of_key!(),
    "
        END, 1, 1, 1, ",
    now!(),
    ", ",
    now!(),
    ", $18, $19, ",
    now!(),
    " + COALESCE($18, $19, min(COALESCE($7, $17), COALESCE($17, $7))))
    ON CONFLICT (tenant, user_key, scope_kind, scope_name) WHERE lifecycle = 'current'
    DO UPDATE SET
        run_count = t.run_count + 1,
        message_count = t.message_count + (NOT EXISTS (
            SELECT 1 FROM runs r
            WHERE r.thread_id = t.id AND r.status IN ('in_progress', 'requires_action', 'cancelling')
        ) AND NOT EXISTS (
            SELECT 1 FROM runs r WHERE r.thread_id = t.id AND r.status = 'queued'
        )),
        last_position = t.last_position + (NOT EXISTS (
            SELECT 1 FROM runs r
            WHERE r.thread_id = t.id AND r.status IN ('in_progress', 'requires_action', 'cancelling')
        ) AND NOT EXISTS (
            SELECT 1 FROM runs r WHERE r.thread_id = t.id AND r.status = 'queued'
        )),
        ",
    live_on!("$18", "$19"),
    "
    WHERE COALESCE(",
    expiry!("$7", "$17"),
    " > excluded.created_at, 1)
        AND t.upstream = excluded.upstream
        AND ($8 <> 'reject' OR NOT EXISTS (
            SELECT 1 FROM runs r
            WHERE r.thread_id = t.id AND r.status IN ('in_progress', 'requires_action', 'cancelling')
        ) AND NOT EXISTS (
            SELECT 1 FROM runs r WHERE r.thread_id = t.id AND r.status = 'queued'
        ));

    WITH place AS (
        SELECT t.id, t.run_count, ",
    now!(),
    " AS now, EXISTS (
                SELECT 1 FROM runs r
                WHERE r.thread_id = t.id AND r.status IN ('in_progress', 'requires_action', 'cancelling')
            ) OR EXISTS (
                SELECT 1 FROM runs r WHERE r.thread_id = t.id AND r.status = 'queued'
            ) AS busy
        FROM threads t
        WHERE ",
    current_of_key!(),
    " AND changes() = 1
    )
    INSERT INTO runs (
        id, thread_id, seq, rank, status, strategy, assistant, metadata, input, owner, fence, timeout_ms,
        created_at, started_at, deadline_at
    )
    SELECT $9, id, run_count, iif(busy AND $8 IN ('interrupt', 'rollback'), -run_count, 0),
        iif(busy, 'queued', 'in_progress'), $8, $10, $11,
        iif(busy, json_array(json_object('id', $12, 'content', json($13))), NULL), $14, 1, $15,
        now, iif(busy, NULL, now), iif(busy, NULL, now + $15)
    FROM place;

    INSERT INTO messages (id, thread_id, position, role, content, run_id, created_at)
    SELECT $16, t.id, t.last_position, 'user', $13, r.id, r.created_at
    FROM runs r JOIN threads t ON t.id = r.thread_id
    WHERE r.id = $9 AND r.status = 'in_progress';

    SELECT ",
    thread_columns!(),
    ", ",
    run_columns!(),
    ", (
        SELECT count(*) FROM runs o
        WHERE o.thread_id = t.id AND o.status = 'queued' AND (o.rank, o.seq) <= (r.rank, r.seq)
    ) AS position
    FROM runs r JOIN threads t ON t.id = r.thread_id
    WHERE r.id = $9",
);

/// `None` if the key's current thread takes no run of this kind; nothing is written then. `previous`: the thread that a
/// fresh one takes the place of.
async fn try_admit(
    tx: &mut SqliteConnection,
    admission: &Admission,
    previous: Option<Uuid>,
) -> Result<Option<Admitted>, StoreError> {
    let ConversationKey { tenant, user, scope } = &admission.key;
    let (from_now, from_last_activity) = ttl_millis(admission.ttl);
    let row = sqlx::query(ADMIT)
        .bind(tenant.as_str())
        .bind(user.as_str())
        .bind(scope.kind())
        .bind(scope.name())
        .bind(admission.new_thread.uuid())
        .bind(&admission.upstream)
        .bind(admission.limits.max_age.map(millis))
        .bind(admission.strategy.as_str())
        .bind(admission.run_id.uuid())
        .bind(&admission.assistant)
        .bind(json(&admission.metadata)?)
        .bind(admission.message.id.to_string())
        .bind(json(&admission.message.content)?)
        .bind(admission.replica.uuid())
        .bind(millis(admission.timeout))
        .bind(admission.message.id.uuid())
        .bind(admission.limits.max_idle.map(millis))
        .bind(from_now)
        .bind(from_last_activity)
        .bind(previous)
        .fetch_optional(tx)
        .await?;
    let Some(row) = row else {
        return Ok(None);
    };
    let both = ThreadAndRun::from_row(&row)?;
    let lease = RunLease { run_id: admission.run_id, fence: both.run.r_fence };
    let (thread, run) = (Thread::try_from(both.thread)?, Run::try_from(both.run)?);
    if run.status == RunStatus::Queued {
        let position = row.try_get("position")?;
        return Ok(Some(Admitted::Queued { lease, thread: Box::new(thread), run: Box::new(run), position }));
    }
    let message = InputMessage { id: admission.message.id, content: admission.message.content.clone() };
    Ok(Some(Admitted::Started(Box::new(Turn { lease, thread, run, input: vec![message] }))))
}

/// Adds the message to the run that waits last, if it fits there. `None`: it does not, and nothing is written.
async fn merge(tx: &mut SqliteConnection, admission: &Admission) -> Result<Option<Admitted>, StoreError> {
    let ConversationKey { tenant, user, scope } = &admission.key;
    let run: Option<RunRow> = sqlx::query_as(concat!(
        "UPDATE runs SET input = json_insert(input, '$[#]', json_object('id', $8, 'content', json($9)))
        WHERE id = (
            SELECT r.id FROM runs r JOIN threads t ON t.id = r.thread_id
            WHERE ",
        current_of_key!(),
        " AND t.upstream = $5 AND COALESCE(",
        expiry!("$11", "$12"),
        " > ",
        now!(),
        ", 1) AND r.status = 'queued'
            ORDER BY r.rank DESC, r.seq DESC
            LIMIT 1
        ) AND assistant = $6 AND metadata = $7 AND json_array_length(input) < $10
            AND octet_length(input) + octet_length($9) <= $13
        RETURNING ",
        run_columns!("runs"),
    ))
    .bind(tenant.as_str())
    .bind(user.as_str())
    .bind(scope.kind())
    .bind(scope.name())
    .bind(&admission.upstream)
    .bind(&admission.assistant)
    .bind(json(&admission.metadata)?)
    .bind(admission.message.id.to_string())
    .bind(json(&admission.message.content)?)
    .bind(i64::try_from(MAX_MERGED).unwrap_or(i64::MAX))
    .bind(admission.limits.max_age.map(millis))
    .bind(admission.limits.max_idle.map(millis))
    .bind(i64::try_from(MAX_MERGED_BYTES).unwrap_or(i64::MAX))
    .fetch_optional(&mut *tx)
    .await?;
    let Some(run) = run else { return Ok(None) };
    let run = Run::try_from(run)?;
    let (from_now, from_last_activity) = ttl_millis(admission.ttl);
    let thread: ThreadRow = sqlx::query_as(concat!(
        "UPDATE threads AS t SET ",
        live_on!("$2", "$3"),
        " WHERE t.id = $1 RETURNING ",
        thread_columns!("threads"),
    ))
    .bind(run.thread_id.uuid())
    .bind(from_now)
    .bind(from_last_activity)
    .fetch_one(&mut *tx)
    .await?;
    once::note(tx, &admission.key, admission.idempotency.as_ref(), run.id).await?;
    Ok(Some(Admitted::Merged { thread: Box::new(thread.try_into()?), run: Box::new(run) }))
}

/// Why the key's current thread took no run.
enum Refusal {
    Final(Admitted),
    /// It had expired, and is archived now.
    Expired(Uuid),
}

async fn refusal(tx: &mut SqliteConnection, admission: &Admission) -> Result<Refusal, StoreError> {
    let ConversationKey { tenant, user, scope } = &admission.key;
    let (current, upstream, expired): (Uuid, String, bool) = sqlx::query_as(concat!(
        "SELECT t.id, t.upstream, COALESCE(",
        expiry!("$5", "$6"),
        " <= ",
        now!(),
        ", 0) FROM threads t WHERE ",
        current_of_key!(),
    ))
    .bind(tenant.as_str())
    .bind(user.as_str())
    .bind(scope.kind())
    .bind(scope.name())
    .bind(admission.limits.max_age.map(millis))
    .bind(admission.limits.max_idle.map(millis))
    .fetch_one(&mut *tx)
    .await?;
    if !expired {
        let other = upstream != admission.upstream;
        return Ok(Refusal::Final(if other { Admitted::OtherUpstream(upstream) } else { Admitted::Busy }));
    }
    sqlx::query(concat!(
        "UPDATE threads SET lifecycle = 'archived', archived_at = ",
        now!(),
        ", due_at = ",
        now!(),
        " WHERE id = $1",
    ))
    .bind(current)
    .execute(&mut *tx)
    .await?;
    Ok(Refusal::Expired(current))
}

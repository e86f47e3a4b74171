//! Admission.

use sqlx::{Sqlite, SqliteConnection, Transaction};
use uuid::Uuid;

use super::now;
use crate::domain::{ConversationKey, Run, RunStatus, Thread};
use crate::store::rows::{RunRow, ThreadRow, json, millis, run_columns, thread_columns};
use crate::store::{Admission, Admitted, InputMessage, RunLease, StoreError, Turn};

/// Implements [`Store::admit`](crate::store::Store::admit).
pub(super) async fn admit(
    mut tx: Transaction<'static, Sqlite>,
    admission: &Admission,
) -> Result<Admitted, StoreError> {
    let thread = match bind(&mut tx, admission).await? {
        Some(thread) => thread,
        None => match refusal(&mut tx, admission).await? {
            Some(refused) => return Ok(refused),
            None => bind(&mut tx, admission)
                .await?
                .ok_or_else(|| StoreError::Corrupt("a fresh thread that admits nothing".to_owned()))?,
        },
    };
    let run = insert_run(&mut tx, admission, &thread).await?;
    let lease = RunLease { run_id: run.id, fence: FIRST_FENCE };
    if run.status == RunStatus::Queued {
        let position =
            sqlx::query_scalar("SELECT count(*) FROM runs WHERE thread_id = ?1 AND status = 'queued'")
                .bind(thread.id.uuid())
                .fetch_one(&mut *tx)
                .await?;
        tx.commit().await?;
        return Ok(Admitted::Queued { lease, thread: Box::new(thread), run: Box::new(run), position });
    }
    let message = InputMessage { id: admission.message.id, content: admission.message.content.clone() };
    super::turn::say(&mut tx, &run, thread.message_count, std::slice::from_ref(&message)).await?;
    tx.commit().await?;
    Ok(Admitted::Started(Box::new(Turn { lease, thread, run, input: vec![message] })))
}

const FIRST_FENCE: i64 = 1;

/// Counts one more run of the key's current thread, which is made if there is none. `None` if the thread takes no
/// run of this kind; nothing is written then.
async fn bind(tx: &mut SqliteConnection, admission: &Admission) -> Result<Option<Thread>, StoreError> {
    let ConversationKey { tenant, user, scope } = &admission.key;
    let row: Option<ThreadRow> = sqlx::query_as(concat!(
        "INSERT INTO threads AS t (
            id, tenant, user_key, scope_kind, scope_name, upstream, lifecycle,
            message_count, run_count, created_at, last_active_at, expires_at
        )
        VALUES (?5, ?1, ?2, ?3, ?4, ?6, 'current', 1, 1, ",
        now!(),
        ", ",
        now!(),
        ", ",
        now!(),
        " + ?7)
        ON CONFLICT (tenant, user_key, scope_kind, scope_name) WHERE lifecycle = 'current'
        DO UPDATE SET
            run_count = t.run_count + 1,
            message_count = t.message_count + NOT EXISTS (
                SELECT 1 FROM runs r
                WHERE r.thread_id = t.id AND r.status IN ('in_progress', 'requires_action', 'cancelling')
            ) * NOT EXISTS (
                SELECT 1 FROM runs r WHERE r.thread_id = t.id AND r.status = 'queued'
            ),
            last_active_at = excluded.last_active_at
        WHERE (t.expires_at IS NULL OR t.expires_at > ",
        now!(),
        ")
            AND t.upstream = excluded.upstream
            AND (?8 <> 'reject' OR NOT EXISTS (
                SELECT 1 FROM runs r
                WHERE r.thread_id = t.id AND r.status IN ('in_progress', 'requires_action', 'cancelling')
            ) AND NOT EXISTS (
                SELECT 1 FROM runs r WHERE r.thread_id = t.id AND r.status = 'queued'
            ))
        RETURNING ",
        thread_columns!(),
    ))
    .bind(tenant.as_str())
    .bind(user.as_str())
    .bind(scope.kind())
    .bind(scope.name())
    .bind(admission.new_thread.uuid())
    .bind(&admission.upstream)
    .bind(admission.thread_ttl.map(millis))
    .bind(admission.strategy.as_str())
    .fetch_optional(tx)
    .await?;
    row.map(Thread::try_from).transpose()
}

/// Why the key's current thread took no run. `None` if it had expired: then a fresh one is in its place.
async fn refusal(tx: &mut SqliteConnection, admission: &Admission) -> Result<Option<Admitted>, StoreError> {
    let ConversationKey { tenant, user, scope } = &admission.key;
    let (current, upstream, expired): (Uuid, String, bool) = sqlx::query_as(concat!(
        "SELECT t.id, t.upstream, COALESCE(t.expires_at <= ",
        now!(),
        ", 0)
        FROM threads t
        WHERE t.tenant = ?1 AND t.user_key = ?2 AND t.scope_kind = ?3 AND t.scope_name = ?4
            AND t.lifecycle = 'current'",
    ))
    .bind(tenant.as_str())
    .bind(user.as_str())
    .bind(scope.kind())
    .bind(scope.name())
    .fetch_one(&mut *tx)
    .await?;
    if !expired {
        let other = upstream != admission.upstream;
        return Ok(Some(if other { Admitted::OtherUpstream(upstream) } else { Admitted::Busy }));
    }
    sqlx::query("UPDATE threads SET lifecycle = 'archived' WHERE id = ?1")
        .bind(current)
        .execute(&mut *tx)
        .await?;
    sqlx::query(concat!(
        "INSERT INTO threads (
            id, tenant, user_key, scope_kind, scope_name, upstream, lifecycle, previous_thread,
            created_at, last_active_at, expires_at
        )
        VALUES (?1, ?2, ?3, ?4, ?5, ?6, 'current', ?7, ",
        now!(),
        ", ",
        now!(),
        ", ",
        now!(),
        " + ?8)",
    ))
    .bind(admission.new_thread.uuid())
    .bind(tenant.as_str())
    .bind(user.as_str())
    .bind(scope.kind())
    .bind(scope.name())
    .bind(&admission.upstream)
    .bind(current)
    .bind(admission.thread_ttl.map(millis))
    .execute(&mut *tx)
    .await?;
    Ok(None)
}

/// Adds the run: in progress if the thread has no unfinished one, queued otherwise.
async fn insert_run(
    tx: &mut SqliteConnection,
    admission: &Admission,
    thread: &Thread,
) -> Result<Run, StoreError> {
    let input = json(&std::slice::from_ref(&admission.message))?;
    let row: RunRow = sqlx::query_as(concat!(
        "WITH place AS (
            SELECT EXISTS (
                SELECT 1 FROM runs r
                WHERE r.thread_id = ?2 AND r.status IN ('in_progress', 'requires_action', 'cancelling')
            ) OR EXISTS (
                SELECT 1 FROM runs r WHERE r.thread_id = ?2 AND r.status = 'queued'
            ) AS busy, ",
        now!(),
        " AS now
        )
        INSERT INTO runs AS r (
            id, thread_id, seq, status, strategy, assistant, metadata, input, owner, fence, timeout_ms,
            created_at, started_at, deadline_at
        )
        SELECT ?1, ?2, ?3, iif(busy, 'queued', 'in_progress'), ?4, ?5, ?6, iif(busy, ?7, NULL), ?8, ?9, ?10,
            now, iif(busy, NULL, now), iif(busy, NULL, now + ?10)
        FROM place
        RETURNING ",
        run_columns!(),
    ))
    .bind(admission.run_id.uuid())
    .bind(thread.id.uuid())
    .bind(thread.run_count)
    .bind(admission.strategy.as_str())
    .bind(&admission.assistant)
    .bind(json(&admission.metadata)?)
    .bind(input)
    .bind(admission.replica.uuid())
    .bind(FIRST_FENCE)
    .bind(millis(admission.timeout))
    .fetch_one(tx)
    .await?;
    row.try_into()
}

//! Admission: one statement where nothing unusual happens.
//!
//! All ways take the thread's row before they use an idempotency key, so that of two requests with the same key the
//! second finds the first one's use, and neither waits for the other while it holds what that one needs.

use sqlx::postgres::PgRow;
use sqlx::{Connection, FromRow, PgConnection, Row};

use super::read::is_used;
use super::{expiry, live_on, once};
use crate::domain::{ConversationKey, MultitaskStrategy, Run, RunStatus, Thread, ThreadId};
use crate::store::columns::{current_of_key, newest_archived_of_key, run_columns, thread_columns};
use crate::store::rows::{ThreadAndRun, corrupt, json, millis, ttl_millis};
use crate::store::{
    Admission, Admitted, InputMessage, MAX_MERGED, MAX_MERGED_BYTES, RunLease, StoreError, Turn,
};

/// Times that the key's thread may change hands under an admission before it gives up.
const MAX_ATTEMPTS: u32 = 10;

/// Implements [`Store::admit`](crate::store::Store::admit).
pub(super) async fn admit(
    connection: &mut PgConnection,
    admission: &Admission,
) -> Result<Admitted, StoreError> {
    let admitted = match try_admit(connection, admission).await {
        Err(Failure::Repeated) => Admitted::Repeated,
        Err(Failure::Store(error)) => return Err(error),
        Ok(admitted) => admitted,
    };
    let refused = matches!(admitted, Admitted::Busy | Admitted::OtherUpstream(_));
    if refused && is_used(connection, &admission.key, admission.idempotency.as_ref()).await? {
        return Ok(Admitted::Repeated);
    }
    Ok(admitted)
}

async fn try_admit(connection: &mut PgConnection, admission: &Admission) -> Result<Admitted, Failure> {
    if admission.strategy == MultitaskStrategy::Merge
        && let Some(merged) = merge(connection, admission).await?
    {
        return Ok(merged);
    }
    for _ in 0..MAX_ATTEMPTS {
        let attempt = admit_directly(connection, admission, None).await?;
        let settled = match attempt {
            Attempt::Settled(admitted) => Some(admitted),
            Attempt::Open => admit_under_lock(connection, admission).await?,
        };
        if let Some(admitted) = settled {
            return Ok(admitted);
        }
    }
    Err(StoreError::Unavailable("the key's thread kept changing".into()).into())
}

/// Why nothing was stored.
enum Failure {
    Repeated,
    Store(StoreError),
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Self {
        if once::is_repeated(&error) { Self::Repeated } else { Self::Store(error.into()) }
    }
}

enum Attempt {
    Settled(Admitted),
    /// The thread has expired, or changed while the statement waited for it. Nothing was stored.
    Open,
}

/// The whole admission in one statement.
///
/// The statement's snapshot is taken before it gets the thread's row, and may be out of date by then: another
/// admission may have gone first. `seen` is the thread as in the snapshot, `t` in `bound` its row as it is under
/// the lock. An admission is the only step that adds an unfinished run, and it counts up `run_count`. So if both
/// agree on `run_count`, a thread that was free in the snapshot is free, and the run starts. If they do not, the
/// run is queued, which is always safe: should the thread be free after all, the first `claim` starts the run.
///
/// A run that goes before all that wait gets a rank that is lower than any before: less its own number.
///
/// Whether the thread has expired is asked of the clock when its row is had, not of the time at which the statement
/// began to wait for it. A fresh thread names the one before: the one given, the one that the snapshot has but that is not
/// current any more, or else the newest archived one, which is looked up only then. `due_at` is indexed, and a message
/// writes it only if it says for how long the thread is to live: it stays the same value otherwise.
const ADMIT: &str = concat!(
    "WITH seen AS MATERIALIZED (
        SELECT t.id, t.upstream, t.run_count, COALESCE(",
    expiry!("$7", "$19"),
    " <= clock_timestamp(), false) AS expired,
            EXISTS (
                SELECT FROM runs r
                WHERE r.thread_id = t.id AND r.status IN ('in_progress', 'requires_action', 'cancelling')
            ) AS active,
            (SELECT count(*) FROM runs r WHERE r.thread_id = t.id AND r.status = 'queued') AS queued
        FROM threads t
        WHERE ",
    current_of_key!(),
    "
    ), bound AS (
        INSERT INTO threads AS t (
            id, tenant, user_key, scope_kind, scope_name, upstream, lifecycle, previous_thread,
            message_count, last_position, run_count, created_at, last_active_at, max_age_ms, max_idle_ms, due_at
        )
        VALUES (
            $5, $1, $2, $3, $4, $6, 'current', COALESCE($22, (SELECT s.id FROM seen s), ",
    newest_archived_of_key!(),
    "), 1, 1, 1, statement_timestamp(), statement_timestamp(), $20, $21,
            statement_timestamp() + COALESCE($20, $21, LEAST($7, $19)) * interval '1 millisecond'
        )
        ON CONFLICT (tenant, user_key, scope_kind, scope_name) WHERE lifecycle = 'current'
        DO UPDATE SET
            run_count = t.run_count + 1,
            message_count = t.message_count + (
                SELECT count(*) FROM seen s
                WHERE s.id = t.id AND s.run_count = t.run_count AND NOT s.active AND s.queued = 0
            ),
            last_position = t.last_position + (
                SELECT count(*) FROM seen s
                WHERE s.id = t.id AND s.run_count = t.run_count AND NOT s.active AND s.queued = 0
            ),
            ",
    live_on!("$20", "$21"),
    "
        WHERE COALESCE(",
    expiry!("$7", "$19"),
    " > clock_timestamp(), true)
            AND t.upstream = excluded.upstream
            AND ($8 <> 'reject' OR EXISTS (
                SELECT FROM seen s
                WHERE s.id = t.id AND s.run_count = t.run_count AND NOT s.active AND s.queued = 0
            ))
        RETURNING t.*
    ), placed AS MATERIALIZED (
        SELECT b.*, clock_timestamp() AS now,
            b.run_count = 1 AND b.id = $5 OR EXISTS (
                SELECT FROM seen s
                WHERE s.id = b.id AND s.run_count = b.run_count - 1 AND NOT s.active AND s.queued = 0
            ) AS starts
        FROM bound b
    ), admitted AS (
        INSERT INTO runs AS r (
            id, thread_id, seq, rank, status, strategy, assistant, metadata, input, owner, fence, timeout_ms,
            created_at, started_at, deadline_at
        )
        SELECT $9, p.id, p.run_count,
            CASE WHEN NOT p.starts AND $8 IN ('interrupt', 'rollback') THEN -p.run_count ELSE 0 END,
            CASE WHEN p.starts THEN 'in_progress' ELSE 'queued' END, $8, $10, $11::jsonb,
            CASE WHEN NOT p.starts THEN jsonb_build_array(jsonb_build_object('id', $12, 'content', $13::jsonb)) END,
            $14, 1, $15, p.now,
            CASE WHEN p.starts THEN p.now END,
            CASE WHEN p.starts THEN p.now + $15 * interval '1 millisecond' END
        FROM placed p
        RETURNING r.*
    ), said AS (
        INSERT INTO messages (id, thread_id, position, role, content, run_id, created_at)
        SELECT $16, p.id, p.last_position, 'user', $13::jsonb, $9, p.now FROM placed p WHERE p.starts
    ), used AS (
        INSERT INTO idempotency_keys (
            tenant, user_key, scope_kind, scope_name, key, run_id, request_hash, created_at
        )
        SELECT $1, $2, $3, $4, $17, r.id, $18, r.created_at FROM admitted r WHERE $17 IS NOT NULL
    )
    SELECT ",
    thread_columns!(),
    ", ",
    run_columns!(),
    ", s.upstream AS seen_upstream, s.expired AS seen_expired, s.active OR s.queued > 0 AS seen_busy,
        -- Those that waited in the snapshot and those that came since; of the latter, the first has started
        -- if the thread was free.
        CASE WHEN $8 IN ('interrupt', 'rollback') THEN 1 ELSE GREATEST(1, 1 + COALESCE(s.queued, 0) + t.run_count - 1 - COALESCE(s.run_count, 0)
            - CASE WHEN s.active OR s.queued > 0 THEN 0 ELSE 1 END) END AS position
    FROM (SELECT) one
    LEFT JOIN seen s ON true
    LEFT JOIN bound t ON true
    LEFT JOIN admitted r ON true",
);

/// `previous`: the thread that a fresh one takes the place of.
async fn admit_directly(
    connection: &mut PgConnection,
    admission: &Admission,
    previous: Option<ThreadId>,
) -> Result<Attempt, Failure> {
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
        .bind(admission.idempotency.as_ref().map(|used| &used.key))
        .bind(admission.idempotency.as_ref().map(|used| &used.request_hash[..]))
        .bind(admission.limits.max_idle.map(millis))
        .bind(from_now)
        .bind(from_last_activity)
        .bind(previous.map(ThreadId::uuid))
        .fetch_one(connection)
        .await?;

    if row.try_get::<Option<i64>, _>("r_seq")?.is_some() {
        return Ok(Attempt::Settled(admitted(admission, &row)?));
    }
    // Refused by the conditions of the update. What the snapshot says of the reason was true at its time, which
    // lies within this call; if it gives no reason, the thread changed since.
    let upstream: Option<String> = row.try_get("seen_upstream")?;
    let expired = row.try_get::<Option<bool>, _>("seen_expired")?.unwrap_or(false);
    let busy = row.try_get::<Option<bool>, _>("seen_busy")?.unwrap_or(false);
    Ok(match upstream {
        Some(other) if !expired && other != admission.upstream => {
            Attempt::Settled(Admitted::OtherUpstream(other))
        }
        Some(_) if !expired && busy && admission.strategy == MultitaskStrategy::Reject => {
            Attempt::Settled(Admitted::Busy)
        }
        _ => Attempt::Open,
    })
}

/// The way that is always exact: takes the thread's row first, so that the snapshot of the next statement is not
/// out of date. Puts a fresh thread in the place of an expired one.
///
/// `None`: the key's thread is another than it was when the lock was asked for. Nothing was stored.
async fn admit_under_lock(
    connection: &mut PgConnection,
    admission: &Admission,
) -> Result<Option<Admitted>, Failure> {
    let ConversationKey { tenant, user, scope } = &admission.key;
    let mut tx = connection.begin().await?;
    let replaced: Option<(uuid::Uuid, bool)> = sqlx::query_as(concat!(
        "SELECT t.id, COALESCE(",
        expiry!("$5", "$6"),
        " <= clock_timestamp(), false)
        FROM threads t
        WHERE ",
        current_of_key!(),
        " FOR NO KEY UPDATE",
    ))
    .bind(tenant.as_str())
    .bind(user.as_str())
    .bind(scope.kind())
    .bind(scope.name())
    .bind(admission.limits.max_age.map(millis))
    .bind(admission.limits.max_idle.map(millis))
    .fetch_optional(&mut *tx)
    .await?;
    let Some((current, expired)) = replaced else {
        return Ok(None);
    };
    if expired {
        sqlx::query(
            "UPDATE threads SET lifecycle = 'archived', archived_at = now.at, due_at = now.at
            FROM (SELECT clock_timestamp() AS at) now WHERE id = $1",
        )
        .bind(current)
        .execute(&mut *tx)
        .await?;
    }
    // Nobody can be faster with a fresh thread: the old row, which this transaction holds, was the key's current one.
    let previous = expired.then(|| ThreadId::from_uuid(current));
    match admit_directly(&mut tx, admission, previous).await? {
        Attempt::Settled(admitted) => {
            tx.commit().await?;
            Ok(Some(admitted))
        }
        // It expired between the two statements.
        Attempt::Open => Ok(None),
    }
}

/// Adds the message to the run that waits last, if it fits there. `None`: it does not, and nothing was stored.
///
/// Takes the run before the thread, as all do that change a run which is there. If the run is not the last any more
/// by the time that it is locked, it was when the call began, which is good enough; but it must still wait, and on the
/// same thread.
async fn merge(connection: &mut PgConnection, admission: &Admission) -> Result<Option<Admitted>, Failure> {
    let ConversationKey { tenant, user, scope } = &admission.key;
    let (from_now, from_last_activity) = ttl_millis(admission.ttl);
    let row: Option<ThreadAndRun> = sqlx::query_as(concat!(
        "WITH last AS MATERIALIZED (
            SELECT (
                SELECT r.id FROM runs r
                WHERE r.thread_id = t.id AND r.status = 'queued'
                ORDER BY r.rank DESC, r.seq DESC
                LIMIT 1
            ) AS id, ",
        expiry!("$13", "$14"),
        " AS expires_at, t.id AS thread_id
            FROM threads t
            WHERE ",
        current_of_key!(),
        " AND t.upstream = $5
        ), merged AS (
            UPDATE runs r
            SET input = r.input || jsonb_build_array(jsonb_build_object('id', $8, 'content', $9::jsonb))
            FROM last l
            WHERE r.id = (SELECT o.id FROM last o) AND r.input IS NOT NULL AND (r.thread_id = l.thread_id) IS TRUE AND r.assistant = $6
                AND r.metadata = $7::jsonb
                AND jsonb_array_length(r.input) < $10
                AND octet_length(r.input::text) + octet_length($9::text) <= $17 AND COALESCE(l.expires_at > clock_timestamp(), true)
            RETURNING r.*
        ), bound AS (
            UPDATE threads t SET ",
        live_on!("$15", "$16"),
        " WHERE t.id = (SELECT r.thread_id FROM merged r)
            RETURNING t.*
        ), used AS (
            INSERT INTO idempotency_keys (
                tenant, user_key, scope_kind, scope_name, key, run_id, request_hash, created_at
            )
            SELECT $1, $2, $3, $4, $11, r.id, $12, clock_timestamp() FROM merged r, bound t WHERE $11 IS NOT NULL
        )
        SELECT ",
        thread_columns!(),
        ", ",
        run_columns!(),
        " FROM merged r, bound t",
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
    .bind(i32::try_from(MAX_MERGED).unwrap_or(i32::MAX))
    .bind(admission.idempotency.as_ref().map(|used| &used.key))
    .bind(admission.idempotency.as_ref().map(|used| &used.request_hash[..]))
    .bind(admission.limits.max_age.map(millis))
    .bind(admission.limits.max_idle.map(millis))
    .bind(from_now)
    .bind(from_last_activity)
    .bind(i32::try_from(MAX_MERGED_BYTES).unwrap_or(i32::MAX))
    .fetch_optional(connection)
    .await?;
    let Some(both) = row else { return Ok(None) };
    let (thread, run) = (both.thread.try_into()?, both.run.try_into()?);
    Ok(Some(Admitted::Merged { thread: Box::new(thread), run: Box::new(run) }))
}

fn admitted(admission: &Admission, row: &PgRow) -> Result<Admitted, StoreError> {
    let both = ThreadAndRun::from_row(row)?;
    let lease = RunLease { run_id: admission.run_id, fence: both.run.r_fence };
    let (thread, run) = (Thread::try_from(both.thread)?, Run::try_from(both.run)?);
    match run.status {
        RunStatus::InProgress => {
            let message =
                InputMessage { id: admission.message.id, content: admission.message.content.clone() };
            Ok(Admitted::Started(Box::new(Turn { lease, thread, run, input: vec![message] })))
        }
        RunStatus::Queued => Ok(Admitted::Queued {
            lease,
            thread: Box::new(thread),
            run: Box::new(run),
            position: row.try_get("position")?,
        }),
        _ => Err(corrupt("the status of a new run")),
    }
}

//! Requests to delete, and their way to a receipt.

/// The threads `t` of a target that came before the request `$5`: its tenant, user, scope's kind and name are the first
/// parameters. A thread that a rollover has put in the place of an earlier one came with that one: it holds the messages
/// that waited there, and its upstream thread begins with what was said there.
macro_rules! of_target {
    (key) => {
        "t.tenant = $1 AND t.user_key = $2 AND t.scope_kind = $3 AND t.scope_name = $4
            AND COALESCE(t.began_at, t.created_at) <= (SELECT d.requested_at FROM deletions d WHERE d.id = $5)"
    };
    (user) => {
        "t.tenant = $1 AND t.user_key = $2
            AND COALESCE(t.began_at, t.created_at) <= (SELECT d.requested_at FROM deletions d WHERE d.id = $5)"
    };
}

/// Those of them that a request begins with, up to `$7`; `$6`: it erases, and so takes those that are archived too, or are
/// being deleted for less or for nobody.
macro_rules! to_begin_with {
    ($target:ident) => {
        concat!(
            "SELECT t.id FROM threads t WHERE ",
            $crate::store::shared::of_target!($target),
            " AND (t.lifecycle = 'current' OR ($6 AND (
                t.lifecycle = 'archived' OR t.deletion = 'archive' OR t.deletion_id IS NULL
            )))
            ORDER BY t.scope_kind, t.scope_name, t.id
            LIMIT $7"
        )
    };
}

/// What a request would take, with the condition on its threads `t`; `$2`: it erases.
macro_rules! to_be_taken {
    ($($condition:literal)+) => {
        concat!(
            "SELECT count(*) AS threads,
                CAST(COALESCE(sum(x.message_count), 0) AS bigint) AS messages,
                CAST(COALESCE(sum(x.run_count), 0) AS bigint) AS runs,
                CAST(COALESCE(sum(x.unfinished), 0) AS bigint) AS unfinished_runs
            FROM (
                SELECT t.message_count, t.run_count, (SELECT count(*) FROM (",
            unfinished_runs!(" = t.id"),
            ") r) AS unfinished
                FROM threads t
                WHERE t.tenant = $1 AND (t.lifecycle = 'current' OR $2)",
            $($condition)+,
            ") x"
        )
    };
}
pub(in crate::store) use {of_target, to_be_taken, to_begin_with};

macro_rules! deletions {
    ($database:ty) => {
        use std::time::Duration;

        use sqlx::{Connection as _, FromRow as _, Row as _};
        use uuid::Uuid;

        use crate::domain::{
            Deletion, DeletionId, Lifecycle, Page, RemnantId, Removed, RunId, TenantKey, Thread, ThreadId,
        };
        use crate::store::columns::thread_columns;
        use crate::store::rows::{ThreadRow, millis};
        use crate::store::shared::{
            DeletableRow, DeletedThreadRow, DeletionRow, RequestedRow, to_be_taken, to_begin_with,
        };
        use crate::store::{
            Deletable, DeletedThread, DeletionReport, DeletionRequest, DeletionTarget, RemnantName, StoreError,
        };

        type Connection = <$database as sqlx::Database>::Connection;

        /// Times that new runs may come while threads are taken, before that is given up.
        const MAX_ATTEMPTS: u32 = 10;

        /// Implements [`Life::begin_deletion`](crate::store::Life::begin_deletion).
        pub(super) async fn begin_deletion(
            connection: &mut Connection,
            request: &DeletionRequest,
            limit: u32,
        ) -> Result<u64, StoreError> {
            let (user, scope) = match &request.target {
                DeletionTarget::Key(key) => (&key.user, Some(&key.scope)),
                DeletionTarget::User(user) => (user, None),
            };
            let mut tx = write(connection).await?;
            sqlx::query(concat!(
                "INSERT INTO deletions (
                    id, tenant, user_key, user_fingerprint, scope_kind, scope_name, archive, requested_at
                )
                VALUES ($1, $2, $3, $4, $5, $6, $7, ",
                now!(),
                ")
                ON CONFLICT (id) DO NOTHING",
            ))
            .bind(request.id.uuid())
            .bind(request.tenant.as_str())
            .bind(user.as_str())
            .bind(&request.fingerprint)
            .bind(scope.map(|scope| scope.kind()))
            .bind(scope.map(|scope| scope.name()))
            .bind(request.end == Deletion::Archive)
            .execute(&mut *tx)
            .await?;
            let requested: Option<RequestedRow> = sqlx::query_as(concat!(
                "SELECT d.id, d.tenant, d.user_key, d.scope_kind, d.scope_name, d.archive
                FROM deletions d WHERE d.id = $1 AND d.user_key IS NOT NULL",
                locked!("d"),
            ))
            .bind(request.id.uuid())
            .fetch_optional(&mut *tx)
            .await?;
            let begun = match requested {
                Some(requested) => advance(&mut tx, &requested, limit, request.hold).await?,
                None => 0,
            };
            tx.commit().await?;
            Ok(begun)
        }

        /// Begins with threads of a request, and finishes it if there are none and none is under way.
        async fn advance(
            tx: &mut Connection,
            requested: &RequestedRow,
            limit: u32,
            hold: Duration,
        ) -> Result<u64, StoreError> {
            let begun = begin(tx, requested, limit, hold).await?;
            if begun == 0 {
                // What another request erases already is waited for too: then nothing of the target is left.
                sqlx::query(concat!(
                    "UPDATE deletions AS d SET finished_at = ",
                    now!(),
                    ", user_key = NULL, scope_kind = NULL, scope_name = NULL
                    WHERE d.id = $1 AND NOT EXISTS (SELECT 1 FROM threads t WHERE t.deletion_id = d.id)
                        AND (d.archive OR NOT EXISTS (
                            SELECT 1 FROM threads t
                            WHERE t.tenant = d.tenant AND t.user_key = d.user_key
                                AND (d.scope_kind IS NULL
                                    OR (t.scope_kind = d.scope_kind AND t.scope_name = d.scope_name))
                                AND COALESCE(t.began_at, t.created_at) <= d.requested_at
                        ))",
                ))
                .bind(requested.id)
                .execute(tx)
                .await?;
            }
            Ok(begun)
        }

        async fn begin(
            tx: &mut Connection,
            requested: &RequestedRow,
            limit: u32,
            hold: Duration,
        ) -> Result<u64, StoreError> {
            for _ in 0..MAX_ATTEMPTS {
                let mut attempt = tx.begin().await?;
                if let Some(begun) = try_begin(&mut attempt, requested, limit, hold).await? {
                    attempt.commit().await?;
                    return Ok(begun);
                }
                attempt.rollback().await?;
            }
            Err(StoreError::Unavailable("new runs kept coming".into()))
        }

        /// Runs are locked before their threads. `None` if the target has other runs or threads than these once the threads are
        /// locked, so that no more can come, or the threads became others': nothing must be kept then.
        async fn try_begin(
            tx: &mut Connection,
            requested: &RequestedRow,
            limit: u32,
            hold: Duration,
        ) -> Result<Option<u64>, StoreError> {
            let statement = match requested.scope_kind {
                Some(_) => to_begin_with!(key),
                None => to_begin_with!(user),
            };
            let find = || {
                sqlx::query_scalar(statement)
                    .bind(&requested.tenant)
                    .bind(&requested.user_key)
                    .bind(&requested.scope_kind)
                    .bind(&requested.scope_name)
                    .bind(requested.id)
                    .bind(!requested.archive)
                    .bind(i64::from(limit))
            };
            let found: Vec<Uuid> = find().fetch_all(&mut *tx).await?;
            if found.is_empty() {
                return Ok(Some(0));
            }
            let runs: Vec<Uuid> = sqlx::query_scalar(concat!(
                "SELECT r.id FROM runs r WHERE r.id",
                among_found!(unfinished_runs!(among!("$1"))),
                " AND r.finished_at IS NULL ORDER BY r.id",
                locked!("r"),
            ))
            .bind(ids(found.iter().copied()))
            .fetch_all(&mut *tx)
            .await?;
            let threads: Vec<Uuid> = sqlx::query_scalar(concat!(
                "SELECT t.id FROM threads t
                WHERE t.id",
                among!("$1"),
                " AND (t.lifecycle = 'current' OR ($2 AND (
                    t.lifecycle = 'archived' OR t.deletion = 'archive' OR t.deletion_id IS NULL
                )))
                ORDER BY t.id",
                locked!("t"),
            ))
            .bind(ids(found.iter().copied()))
            .bind(!requested.archive)
            .fetch_all(&mut *tx)
            .await?;
            // A rollover that ended while its thread was waited for has put a fresh one in its place.
            let now: Vec<Uuid> = find().fetch_all(&mut *tx).await?;
            let others: bool = sqlx::query_scalar(concat!(
                "SELECT EXISTS (SELECT 1 FROM (",
                unfinished_runs!(among!("$1")),
                ") r WHERE NOT r.id",
                among!("$2"),
                ")",
            ))
            .bind(ids(threads.iter().copied()))
            .bind(ids(runs.iter().copied()))
            .fetch_one(&mut *tx)
            .await?;
            if others || threads.is_empty() || now != found {
                return Ok(None);
            }
            sqlx::query(concat!(
                "UPDATE threads SET removed = CASE WHEN lifecycle <> 'current' THEN removed END,
                    lifecycle = 'deleting', deletion = $2, deletion_id = $3, due_at = ",
                now!(),
                " + ",
                ms!("$4"),
                ", attempts = 0, last_failure = NULL, rolls = false
                WHERE id",
                among!("$1"),
            ))
            .bind(ids(threads.iter().copied()))
            .bind(if requested.archive { Deletion::Archive } else { Deletion::Erase }.as_str())
            .bind(requested.id)
            .bind(millis(hold))
            .execute(&mut *tx)
            .await?;
            sqlx::query(concat!(
                "UPDATE runs SET status = 'cancelling'
                WHERE thread_id",
                among!("$1"),
                " AND status IN ('in_progress', 'requires_action', 'cancelling') AND status <> 'cancelling'",
            ))
            .bind(ids(threads.iter().copied()))
            .execute(tx)
            .await?;
            Ok(Some(threads.len().try_into().unwrap_or(u64::MAX)))
        }

        /// Implements [`Life::deletable`](crate::store::Life::deletable).
        pub(super) async fn deletable(
            connection: &mut Connection,
            tenant: &TenantKey,
            target: &DeletionTarget,
            end: Deletion,
        ) -> Result<Deletable, StoreError> {
            const OF_KEY: &str =
                to_be_taken!(" AND t.user_key = $3 AND t.scope_kind = $4 AND t.scope_name = $5");
            const OF_USER: &str = to_be_taken!(" AND t.user_key = $3");
            let (statement, user, scope) = match target {
                DeletionTarget::Key(key) => (OF_KEY, &key.user, Some(&key.scope)),
                DeletionTarget::User(user) => (OF_USER, user, None),
            };
            let query = sqlx::query_as(statement)
                .bind(tenant.as_str())
                .bind(end == Deletion::Erase)
                .bind(user.as_str());
            let query = match scope {
                Some(scope) => query.bind(scope.kind()).bind(scope.name()),
                None => query,
            };
            let found: DeletableRow = query.fetch_one(connection).await?;
            Ok(found.into())
        }

        /// Implements [`Life::deletion`](crate::store::Life::deletion).
        pub(super) async fn deletion(
            connection: &mut Connection,
            tenant: &TenantKey,
            id: DeletionId,
            after: Option<ThreadId>,
            limit: u32,
        ) -> Result<Option<DeletionReport>, StoreError> {
            let found: Option<DeletionRow> = sqlx::query_as(
                "SELECT d.user_key, d.user_fingerprint, d.requested_at, d.finished_at, d.archive,
                    (SELECT count(*) FROM deleted_threads x WHERE x.deletion_id = d.id) AS done,
                    (SELECT count(*) FROM threads t WHERE t.deletion_id = d.id) AS pending,
                    (SELECT count(*) FROM deleted_threads x WHERE x.deletion_id = d.id AND (
                        x.removed ->> 'outcome' IN ('not_configured', 'not_supported', 'failed')
                        OR x.removed ->> 'left' IS NOT NULL
                        OR CAST(x.removed ->> 'unknown' AS bigint) > 0
                    )) AS incomplete
                FROM deletions d WHERE d.id = $1 AND d.tenant = $2",
            )
            .bind(id.uuid())
            .bind(tenant.as_str())
            .fetch_optional(&mut *connection)
            .await?;
            let Some(found) = found else { return Ok(None) };
            let mut rows: Vec<DeletedThreadRow> = sqlx::query_as(
                "SELECT * FROM (
                    SELECT x.thread_id, x.upstream, x.messages, x.runs, x.removed, x.finished_at, 0 AS attempts,
                        NULL AS last_failure
                    FROM deleted_threads x WHERE x.deletion_id = $1 AND x.thread_id > $2
                    UNION ALL
                    SELECT t.id, t.upstream, t.message_count, t.run_count, t.removed, NULL, t.attempts, t.last_failure
                    FROM threads t WHERE t.deletion_id = $1 AND t.id > $2
                ) x
                ORDER BY x.thread_id
                LIMIT $3",
            )
            .bind(id.uuid())
            .bind(after.map_or(Uuid::nil(), ThreadId::uuid))
            .bind(i64::from(limit) + 1)
            .fetch_all(connection)
            .await?;
            let limit = usize::try_from(limit).unwrap_or(usize::MAX);
            let has_more = rows.len() > limit;
            rows.truncate(limit);
            Ok(Some(DeletionReport {
                id,
                user: found.user_key.and_then(|user| user.try_into().ok()),
                fingerprint: found.user_fingerprint,
                requested_at: found.requested_at.0,
                finished_at: found.finished_at.map(|at| at.0),
                archive: found.archive,
                done: found.done,
                pending: found.pending,
                incomplete: found.incomplete,
                threads: Page { data: rows.into_iter().map(DeletedThread::from).collect(), has_more },
            }))
        }

        /// Implements [`Life::deletion_under_way`](crate::store::Life::deletion_under_way).
        pub(super) async fn deletion_under_way(
            connection: &mut Connection,
            tenant: &TenantKey,
            target: &DeletionTarget,
        ) -> Result<Option<DeletionId>, StoreError> {
            let (user, scope) = match target {
                DeletionTarget::Key(key) => (&key.user, Some(&key.scope)),
                DeletionTarget::User(user) => (user, None),
            };
            let found: Option<Uuid> = sqlx::query_scalar(
                "SELECT d.id FROM deletions d
                WHERE d.tenant = $1 AND d.user_key = $2 AND d.finished_at IS NULL
                    AND (d.scope_kind IS NULL OR (d.scope_kind = $3 AND d.scope_name = $4))
                ORDER BY CASE WHEN EXISTS (SELECT 1 FROM threads t WHERE t.deletion_id = d.id) THEN 0 ELSE 1 END,
                    d.requested_at, d.id
                LIMIT 1",
            )
            .bind(tenant.as_str())
            .bind(user.as_str())
            .bind(scope.map(|scope| scope.kind()))
            .bind(scope.map(|scope| scope.name()))
            .fetch_optional(connection)
            .await?;
            Ok(found.map(DeletionId::from_uuid))
        }

        /// Implements [`Life::removed`](crate::store::Life::removed).
        pub(super) async fn removed(
            connection: &mut Connection,
            thread: ThreadId,
            removed: &Removed,
            forget: &[RemnantName],
        ) -> Result<(), StoreError> {
            let rows = forget.iter().filter_map(|name| match name {
                RemnantName::Row(id) => Some(RemnantId::uuid(*id)),
                RemnantName::Run(_) => None,
            });
            let runs = forget.iter().filter_map(|name| match name {
                RemnantName::Run(id) => Some(RunId::uuid(*id)),
                RemnantName::Row(_) => None,
            });
            let mut tx = write(connection).await?;
            sqlx::query(concat!(
                "UPDATE runs SET upstream_run_id = NULL, earlier_upstream_runs = NULL WHERE id",
                among!("$1")
            ))
            .bind(ids(runs))
            .execute(&mut *tx)
            .await?;
            sqlx::query(concat!("DELETE FROM remnants WHERE thread_id = $1 AND id", among!("$2")))
                .bind(thread.uuid())
                .bind(ids(rows))
                .execute(&mut *tx)
                .await?;
            sqlx::query(
                "UPDATE threads SET removed = $2,
                    upstream_thread_id = CASE WHEN $3 THEN NULL ELSE upstream_thread_id END,
                    leftover = CASE WHEN $3 THEN NULL ELSE leftover END
                WHERE id = $1",
            )
            .bind(thread.uuid())
            .bind(sqlx::types::Json(removed))
            .bind(removed.outcome.is_some())
            .execute(&mut *tx)
            .await?;
            tx.commit().await?;
            Ok(())
        }

        /// Implements [`Life::conclude`](crate::store::Life::conclude).
        ///
        /// The requests of the user come first, so that of two threads that are done at once the second finds the first one
        /// gone, and finishes what both belong to.
        pub(super) async fn conclude(
            connection: &mut Connection,
            thread: ThreadId,
            limit: u32,
        ) -> Result<bool, StoreError> {
            let mut tx = write(connection).await?;
            let requests: Vec<RequestedRow> = sqlx::query_as(concat!(
                "SELECT d.id, d.tenant, d.user_key, d.scope_kind, d.scope_name, d.archive
                FROM deletions d
                WHERE d.tenant = (SELECT t.tenant FROM threads t WHERE t.id = $1)
                    AND d.user_key = (SELECT t.user_key FROM threads t WHERE t.id = $1)
                    AND d.finished_at IS NULL
                ORDER BY d.id",
                locked!("d"),
            ))
            .bind(thread.uuid())
            .fetch_all(&mut *tx)
            .await?;
            let done = conclude_thread(&mut tx, thread, limit).await?;
            if done {
                for requested in &requests {
                    advance(&mut tx, requested, limit, Duration::ZERO).await?;
                }
            }
            tx.commit().await?;
            Ok(done)
        }

        async fn conclude_thread(
            tx: &mut Connection,
            id: ThreadId,
            limit: u32,
        ) -> Result<bool, StoreError> {
            let row = sqlx::query(concat!(
                "SELECT EXISTS (",
                unfinished_runs!(" = t.id"),
                ") AS busy, ",
                thread_columns!(),
                " FROM threads t WHERE t.id = $1",
                locked!("t"),
            ))
            .bind(id.uuid())
            .fetch_optional(&mut *tx)
            .await?;
            // It is gone: an answer was lost.
            let Some(row) = row else { return Ok(true) };
            let busy: bool = row.try_get("busy")?;
            let thread = Thread::try_from(ThreadRow::from_row(&row)?)?;
            if busy || thread.lifecycle != Lifecycle::Deleting || thread.removed.outcome.is_none() {
                return Ok(false);
            }
            let archives = thread.deletion == Some(Deletion::Archive);
            if !archives {
                const MESSAGES: &str = concat!(
                    "DELETE FROM messages WHERE ",
                    rows_of!("m"),
                    " FROM messages m WHERE m.thread_id = $1 ORDER BY m.position LIMIT $2",
                    and_no_more!("m")
                );
                const RUNS: &str = concat!(
                    "DELETE FROM runs WHERE ",
                    rows_of!("r"),
                    " FROM runs r WHERE r.thread_id = $1 ORDER BY r.seq LIMIT $2",
                    and_no_more!("r")
                );
                for statement in [MESSAGES, RUNS] {
                    let done = sqlx::query(statement)
                        .bind(id.uuid())
                        .bind(i64::from(limit))
                        .execute(&mut *tx)
                        .await?;
                    if done.rows_affected() >= u64::from(limit) {
                        return Ok(false);
                    }
                }
            }
            sqlx::query(concat!(
                "INSERT INTO deleted_threads (
                    deletion_id, thread_id, upstream, messages, runs, removed, archived, finished_at
                )
                SELECT d.id, t.id, t.upstream, t.message_count, t.run_count, t.removed, $2, ",
                now!(),
                " FROM threads t, deletions d
                WHERE t.id = $1 AND d.id = (SELECT o.deletion_id FROM threads o WHERE o.id = $1)
                ON CONFLICT (deletion_id, thread_id) DO NOTHING",
            ))
            .bind(id.uuid())
            .bind(archives)
            .execute(&mut *tx)
            .await?;
            let last = if archives {
                concat!(
                    "UPDATE threads SET lifecycle = 'archived', archived_at = ",
                    now!(),
                    ", deletion = NULL, deletion_id = NULL, due_at = ",
                    now!(),
                    ", attempts = 0, last_failure = NULL WHERE id = $1"
                )
            } else {
                "DELETE FROM threads WHERE id = $1"
            };
            sqlx::query(last).bind(id.uuid()).execute(tx).await?;
            Ok(true)
        }
    };
}
pub(in crate::store) use deletions;

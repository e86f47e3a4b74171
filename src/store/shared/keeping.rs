//! What the janitor looks at, and when; expiry, and what is past its time.

macro_rules! keeping {
    ($database:ty) => {
        use std::time::Duration;

        use serde_json::json as value;
        use sqlx::types::Json;
        use uuid::Uuid;

        use crate::domain::{Lifetimes, Limits, RemnantId, ThreadId, Timestamp};
        use crate::store::rows::{At, json, millis};
        use crate::store::shared::{DueRow, upstream_ids};
        use crate::store::{Due, Pruned, Pruning, StoreError};

        type Connection = <$database as sqlx::Database>::Connection;

        macro_rules! due_threads {
            () => {
                concat!(
                    "SELECT ",
                    $crate::store::columns::thread_columns!(),
                    ", ",
                    now!(),
                    " AS now, t.attempts FROM threads t WHERE t.due_at <= ",
                    now!(),
                    " ORDER BY t.due_at LIMIT $1"
                )
            };
        }

        /// Implements [`Life::due`](crate::store::Life::due).
        pub(super) async fn due(connection: &mut Connection, limit: u32) -> Result<Vec<Due>, StoreError> {
            let rows: Vec<DueRow> =
                sqlx::query_as(due_threads!()).bind(i64::from(limit)).fetch_all(connection).await?;
            rows.into_iter().map(Due::try_from).collect()
        }

        /// Implements [`Life::claim_due`](crate::store::Life::claim_due).
        pub(super) async fn claim_due(
            connection: &mut Connection,
            limit: u32,
            lease: Duration,
        ) -> Result<Vec<Due>, StoreError> {
            let mut tx = write(connection).await?;
            let rows: Vec<DueRow> = sqlx::query_as(concat!(due_threads!(), locked_if_free!("t")))
                .bind(i64::from(limit))
                .fetch_all(&mut *tx)
                .await?;
            let mut due = rows.into_iter().map(Due::try_from).collect::<Result<Vec<_>, _>>()?;
            // One statement, one time: the same for all of them.
            let claimed: Option<At> = sqlx::query_scalar(concat!(
                "UPDATE threads SET due_at = ",
                now!(),
                " + ",
                ms!("$2"),
                " WHERE id",
                among!("$1"),
                " RETURNING due_at"
            ))
            .bind(ids(due.iter().map(|due| due.thread.id.uuid())))
            .bind(millis(lease))
            .fetch_all(&mut *tx)
            .await?
            .pop();
            tx.commit().await?;
            for due in &mut due {
                due.claimed = claimed.as_ref().map(|at| at.0);
            }
            Ok(due)
        }

        /// Implements [`Life::schedule`](crate::store::Life::schedule).
        pub(super) async fn schedule(
            connection: &mut Connection,
            thread: ThreadId,
            claimed: Option<Timestamp>,
            after: Option<Duration>,
            failure: Option<&str>,
        ) -> Result<(), StoreError> {
            sqlx::query(concat!(
                "UPDATE threads SET
                    due_at = CASE WHEN due_at = $4 OR ($4 IS NULL AND due_at > ",
                now!(),
                " + ",
                ms!("$2"),
                ") THEN ",
                now!(),
                " + ",
                ms!("$2"),
                " ELSE due_at END,
                    attempts = CASE WHEN $3 IS NULL THEN 0 ELSE attempts + 1 END,
                    last_failure = $3
                WHERE id = $1",
            ))
            .bind(thread.uuid())
            .bind(after.map(millis))
            .bind(failure)
            .bind(claimed.map(At))
            .execute(connection)
            .await?;
            Ok(())
        }

        /// Implements [`Life::review`](crate::store::Life::review). Threads that are not current count towards the limit.
        pub(super) async fn review(
            connection: &mut Connection,
            after: Option<ThreadId>,
            limit: u32,
            lifetimes: &Lifetimes,
        ) -> Result<Option<ThreadId>, StoreError> {
            macro_rules! end {
                () => {
                    expiry!(
                        "(CASE t.scope_kind WHEN 'session' THEN $2 ELSE $4 END)",
                        "(CASE t.scope_kind WHEN 'session' THEN $3 ELSE $5 END)"
                    )
                };
            }
            let mut tx = write(connection).await?;
            let page: Vec<Uuid> =
                sqlx::query_scalar("SELECT t.id FROM threads t WHERE t.id > $1 ORDER BY t.id LIMIT $2")
                    .bind(after.map_or(Uuid::nil(), ThreadId::uuid))
                    .bind(i64::from(limit))
                    .fetch_all(&mut *tx)
                    .await?;
            let last = page.last().copied();
            let late: Vec<Uuid> = sqlx::query_scalar(concat!(
                "SELECT t.id FROM threads t WHERE t.id",
                among!("$1"),
                " AND t.lifecycle NOT IN ('archived', 'deleting') AND (t.due_at > ",
                end!(),
                " OR (t.due_at IS NULL AND ",
                end!(),
                " IS NOT NULL)) ORDER BY t.id",
                locked!("t"),
            ))
            .bind(ids(page))
            .bind(lifetimes.sessions.max_age.map(millis))
            .bind(lifetimes.sessions.max_idle.map(millis))
            .bind(lifetimes.others.max_age.map(millis))
            .bind(lifetimes.others.max_idle.map(millis))
            .fetch_all(&mut *tx)
            .await?;
            if !late.is_empty() {
                sqlx::query(concat!("UPDATE threads AS t SET due_at = ", end!(), " WHERE t.id", among!("$1")))
                    .bind(ids(late))
                    .bind(lifetimes.sessions.max_age.map(millis))
                    .bind(lifetimes.sessions.max_idle.map(millis))
                    .bind(lifetimes.others.max_age.map(millis))
                    .bind(lifetimes.others.max_idle.map(millis))
                    .execute(&mut *tx)
                    .await?;
            }
            tx.commit().await?;
            Ok(last.map(ThreadId::from_uuid))
        }

        /// Implements [`Life::expire`](crate::store::Life::expire).
        pub(super) async fn expire(
            connection: &mut Connection,
            thread: ThreadId,
            limits: Limits,
        ) -> Result<bool, StoreError> {
            let archived = sqlx::query(concat!(
                "UPDATE threads AS t SET lifecycle = 'archived', archived_at = ",
                now!(),
                ", due_at = ",
                now!(),
                ", rolls = false WHERE t.id = $1 AND t.lifecycle NOT IN ('archived', 'deleting') AND ",
                expiry!("$2", "$3"),
                " <= ",
                now!(),
            ))
            .bind(thread.uuid())
            .bind(limits.max_age.map(millis))
            .bind(limits.max_idle.map(millis))
            .execute(&mut *connection)
            .await?;
            if archived.rows_affected() == 1 {
                return Ok(true);
            }
            sqlx::query(concat!(
                "UPDATE threads AS t SET due_at = ",
                expiry!("$2", "$3"),
                " WHERE t.id = $1 AND t.lifecycle NOT IN ('archived', 'deleting')"
            ))
            .bind(thread.uuid())
            .bind(limits.max_age.map(millis))
            .bind(limits.max_idle.map(millis))
            .execute(connection)
            .await?;
            Ok(false)
        }

        /// Implements [`Life::discard`](crate::store::Life::discard). No message goes to an archived thread, so the runs that
        /// are unfinished now are all that can be.
        pub(super) async fn discard(
            connection: &mut Connection,
            thread: ThreadId,
            keep: Duration,
        ) -> Result<bool, StoreError> {
            let mut tx = write(connection).await?;
            sqlx::query(concat!(
                "SELECT r.id FROM runs r WHERE r.id",
                among_found!(unfinished_runs!(" = $1")),
                " AND r.finished_at IS NULL ORDER BY r.id",
                locked!("r"),
            ))
            .bind(thread.uuid())
            .fetch_all(&mut *tx)
            .await?;
            let begun = sqlx::query(concat!(
                "UPDATE threads SET lifecycle = 'deleting', deletion = 'erase', due_at = ",
                now!(),
                ", attempts = 0, last_failure = NULL
                WHERE id = $1 AND lifecycle = 'archived' AND archived_at + ",
                ms!("$2"),
                " <= ",
                now!(),
            ))
            .bind(thread.uuid())
            .bind(millis(keep))
            .execute(&mut *tx)
            .await?;
            let begun = begun.rows_affected() == 1;
            if begun {
                sqlx::query(
                    "UPDATE runs SET status = 'cancelling'
                    WHERE thread_id = $1 AND status IN ('in_progress', 'requires_action', 'cancelling')
                        AND status <> 'cancelling'",
                )
                .bind(thread.uuid())
                .execute(&mut *tx)
                .await?;
            }
            tx.commit().await?;
            Ok(begun)
        }

        // What is past its time, oldest first, up to $2: $1 is for how long it is kept. What does not fit is looked up row
        // by row, never joined, so that the order of the key leads.

        macro_rules! old_keys {
            () => {
                concat!(
                    " FROM idempotency_keys k WHERE k.created_at <= ",
                    now!(),
                    " - ",
                    ms!("$1"),
                    " ORDER BY k.created_at LIMIT $2"
                )
            };
        }

        macro_rules! old_events {
            () => {
                concat!(
                    " FROM run_events e WHERE e.run_id < ",
                    id_after!("$1"),
                    " AND (SELECT r.finished_at FROM runs r WHERE r.id = e.run_id) <= ",
                    now!(),
                    " - ",
                    ms!("$1"),
                    " ORDER BY e.run_id LIMIT $2"
                )
            };
        }

        macro_rules! old_runs {
            () => {
                concat!(
                    " FROM runs r WHERE r.id < ",
                    id_after!("$1"),
                    " AND r.finished_at <= ",
                    now!(),
                    " - ",
                    ms!("$1"),
                    " AND (SELECT t.leftover ->> 'run' FROM threads t WHERE t.id = r.thread_id) IS DISTINCT FROM 'run_' || ",
                    spelled!("r.id"),
                    " ORDER BY r.id LIMIT $2"
                )
            };
        }

        macro_rules! old_receipts {
            () => {
                concat!(
                    " FROM deletions d WHERE d.finished_at <= ",
                    now!(),
                    " - ",
                    ms!("$1"),
                    " ORDER BY d.finished_at LIMIT $2"
                )
            };
        }

        /// Implements [`Life::prune`](crate::store::Life::prune). What goes along with something else comes first, so that it is
        /// counted.
        pub(super) async fn prune(
            connection: &mut Connection,
            pruning: &Pruning,
            limit: u32,
        ) -> Result<Pruned, StoreError> {
            const KEYS: &str = concat!(
                "DELETE FROM idempotency_keys WHERE ",
                rows_of!("k"),
                old_keys!(),
                and_no_more!("k")
            );
            const EVENTS: &str =
                concat!("DELETE FROM run_events WHERE ", rows_of!("e"), old_events!(), and_no_more!("e"));
            const RECEIPTS: &str =
                concat!("DELETE FROM deletions WHERE ", rows_of!("d"), old_receipts!(), and_no_more!("d"));
            // Sessions that ended long ago: nothing refers to them but runs that are orphans anyway.
            const SESSIONS: &str =
                concat!("DELETE FROM replicas WHERE expires_at < ", now!(), " - ", ms!("86400000"));
            let mut tx = write(connection).await?;
            sqlx::query(SESSIONS).execute(&mut *tx).await?;
            let pruned = Pruned {
                idempotency_keys: remove(&mut tx, KEYS, pruning.idempotency_keys, limit).await?,
                events: remove(&mut tx, EVENTS, pruning.events, limit).await?,
                runs: remove_runs(&mut tx, pruning, limit).await?,
                receipts: remove(&mut tx, RECEIPTS, pruning.receipts, limit).await?,
            };
            tx.commit().await?;
            Ok(pruned)
        }

        async fn remove(
            tx: &mut Connection,
            statement: &'static str,
            keep: Option<Duration>,
            limit: u32,
        ) -> Result<u64, StoreError> {
            let Some(keep) = keep else { return Ok(0) };
            // Planned each time: a plan that was made while the table was small reads all of it.
            let done = sqlx::query(statement)
                .bind(millis(keep))
                .bind(i64::from(limit))
                .persistent(false)
                .execute(tx)
                .await?;
            Ok(done.rows_affected())
        }

        /// A run with its thread, that one's upstream, and the ids that it has there.
        type Stored = (Uuid, Uuid, String, Option<String>, Option<Json<Vec<String>>>);

        async fn remove_runs(
            tx: &mut Connection,
            pruning: &Pruning,
            limit: u32,
        ) -> Result<u64, StoreError> {
            let Some(keep) = pruning.runs else { return Ok(0) };
            let old: Vec<Stored> = sqlx::query_as(concat!(
                "SELECT r.id, r.thread_id, (SELECT t.upstream FROM threads t WHERE t.id = r.thread_id),
                    r.upstream_run_id, r.earlier_upstream_runs",
                old_runs!(),
                locked_if_free!("r"),
            ))
            .bind(millis(keep))
            .bind(i64::from(limit))
            .persistent(false)
            .fetch_all(&mut *tx)
            .await?;
            let runs = ids(old.iter().map(|run| run.0));
            let mut remnants = vec![];
            for (_, thread, upstream, newest, earlier) in old {
                if pruning.storing.contains(&upstream) {
                    remnants.extend(upstream_ids(newest, earlier).map(|id| {
                        value!({
                            "id": RemnantId::new().uuid().simple().to_string(),
                            "thread": thread.simple().to_string(),
                            "upstream": upstream,
                            "upstream_id": id,
                        })
                    }));
                }
            }
            if !remnants.is_empty() {
                sqlx::query(concat!(
                    "INSERT INTO remnants (id, thread_id, upstream, kind, upstream_id, created_at)
                    SELECT ",
                    id!("e.value ->> 'id'"),
                    ", ",
                    id!("e.value ->> 'thread'"),
                    ", e.value ->> 'upstream', 'run', e.value ->> 'upstream_id', ",
                    now!(),
                    " FROM ",
                    each!("$1"),
                ))
                .bind(json(&remnants)?)
                .execute(&mut *tx)
                .await?;
            }
            let done = sqlx::query(concat!("DELETE FROM runs WHERE id", among!("$1")))
                .bind(runs)
                .execute(tx)
                .await?;
            Ok(done.rows_affected())
        }

        /// Implements [`Life::prunable`](crate::store::Life::prunable).
        pub(super) async fn prunable(
            connection: &mut Connection,
            pruning: &Pruning,
            limit: u32,
        ) -> Result<Pruned, StoreError> {
            const KEYS: &str = concat!("SELECT count(*) FROM (SELECT 1 AS one", old_keys!(), ") x");
            const EVENTS: &str = concat!("SELECT count(*) FROM (SELECT 1 AS one", old_events!(), ") x");
            const RUNS: &str = concat!("SELECT count(*) FROM (SELECT 1 AS one", old_runs!(), ") x");
            const RECEIPTS: &str = concat!("SELECT count(*) FROM (SELECT 1 AS one", old_receipts!(), ") x");
            let c = connection;
            Ok(Pruned {
                idempotency_keys: count(c, KEYS, pruning.idempotency_keys, limit).await?,
                events: count(c, EVENTS, pruning.events, limit).await?,
                runs: count(c, RUNS, pruning.runs, limit).await?,
                receipts: count(c, RECEIPTS, pruning.receipts, limit).await?,
            })
        }

        async fn count(
            connection: &mut Connection,
            statement: &'static str,
            keep: Option<Duration>,
            limit: u32,
        ) -> Result<u64, StoreError> {
            let Some(keep) = keep else { return Ok(0) };
            let found: i64 = sqlx::query_scalar(statement)
                .bind(millis(keep))
                .bind(i64::from(limit))
                .fetch_one(connection)
                .await?;
            Ok(found.unsigned_abs())
        }
    };
}
pub(in crate::store) use keeping;

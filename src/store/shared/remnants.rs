//! What is, or may be, at an upstream besides the threads' own.

macro_rules! remnants {
    ($database:ty) => {
        use std::time::Duration;

        use sqlx::types::Json;
        use uuid::Uuid;

        use crate::domain::{RemnantId, RunId, ThreadId};
        use crate::store::rows::millis;
        use crate::store::shared::{RemnantRow, upstream_ids};
        use crate::store::{Made, Remnant, RemnantKind, RemnantName, RunLease, StoreError, UNHEARD_OF};

        type Connection = <$database as sqlx::Database>::Connection;

        macro_rules! remnant_columns {
            () => {
                "x.id, x.thread_id, x.upstream, x.kind, x.upstream_id, x.attempts"
            };
        }

        /// Implements [`Life::remnants`](crate::store::Life::remnants). All ids of a run come together, since they are forgotten
        /// together: so there may be more than the limit if a single run has more.
        pub(super) async fn remnants(
            connection: &mut Connection,
            thread: ThreadId,
            with_runs: bool,
            limit: u32,
        ) -> Result<Vec<Remnant>, StoreError> {
            let rows: Vec<RemnantRow> = sqlx::query_as(concat!(
                "SELECT ",
                remnant_columns!(),
                " FROM remnants x WHERE x.thread_id = $1 ORDER BY x.id LIMIT $2",
            ))
            .bind(thread.uuid())
            .bind(i64::from(limit))
            .fetch_all(&mut *connection)
            .await?;
            let mut found = rows.into_iter().map(Remnant::try_from).collect::<Result<Vec<_>, _>>()?;
            let limit = usize::try_from(limit).unwrap_or(usize::MAX);
            if !with_runs || found.len() >= limit {
                return Ok(found);
            }
            let runs: Vec<(Uuid, String, Option<String>, Option<Json<Vec<String>>>)> = sqlx::query_as(
                "SELECT r.id, t.upstream, r.upstream_run_id, r.earlier_upstream_runs
                FROM threads t JOIN runs r ON r.thread_id = t.id
                WHERE t.id = $1 AND (r.upstream_run_id IS NOT NULL OR r.earlier_upstream_runs IS NOT NULL)
                ORDER BY r.seq
                LIMIT $2",
            )
            .bind(thread.uuid())
            .bind(i64::try_from(limit - found.len()).unwrap_or(i64::MAX))
            .fetch_all(connection)
            .await?;
            for (run, upstream, newest, earlier) in runs {
                let of_run: Vec<_> = upstream_ids(newest, earlier)
                    .map(|id| Remnant {
                        name: RemnantName::Run(RunId::from_uuid(run)),
                        thread,
                        upstream: upstream.clone(),
                        kind: RemnantKind::Run,
                        upstream_id: Some(id),
                        attempts: 0,
                    })
                    .collect();
                if !found.is_empty() && found.len() + of_run.len() > limit {
                    break;
                }
                found.extend(of_run);
            }
            Ok(found)
        }

        /// Implements [`Life::intend`](crate::store::Life::intend).
        pub(super) async fn intend(
            connection: &mut Connection,
            lease: &RunLease,
            intent: RemnantId,
        ) -> Result<bool, StoreError> {
            let done = sqlx::query(concat!(
                "WITH lease AS MATERIALIZED (
                    SELECT r.thread_id, r.owner FROM runs r
                    WHERE r.id = $1 AND r.fence = $2 AND r.input IS NULL AND r.finished_at IS NULL",
                held!("r"),
                ")
                INSERT INTO remnants (id, thread_id, upstream, kind, maker, created_at, due_at)
                SELECT $3, t.id, t.upstream, 'thread', l.owner, ",
                now!(),
                ", ",
                now!(),
                " + ",
                ms!("$4"),
                " FROM lease l JOIN threads t ON t.id = l.thread_id
                WHERE true
                ON CONFLICT (id) DO UPDATE SET due_at = excluded.due_at",
            ))
            .bind(lease.run_id.uuid())
            .bind(lease.fence)
            .bind(intent.uuid())
            .bind(millis(UNHEARD_OF))
            .execute(connection)
            .await?;
            Ok(done.rows_affected() == 1)
        }

        /// Implements [`Life::makes_upstream_thread`](crate::store::Life::makes_upstream_thread).
        pub(super) async fn makes_upstream_thread(
            connection: &mut Connection,
            thread: ThreadId,
        ) -> Result<bool, StoreError> {
            let makes = sqlx::query_scalar(concat!(
                "SELECT EXISTS (
                    SELECT 1 FROM remnants x JOIN replicas p ON p.id = x.maker
                    WHERE x.thread_id = $1 AND x.upstream_id IS NULL AND x.due_at > ",
                now!(),
                " AND p.expires_at > ",
                now!(),
                ")"
            ))
            .bind(thread.uuid())
            .fetch_one(connection)
            .await?;
            Ok(makes)
        }

        /// Implements [`Life::resolve`](crate::store::Life::resolve).
        pub(super) async fn resolve(
            connection: &mut Connection,
            intent: RemnantId,
            made: Made<'_>,
        ) -> Result<(), StoreError> {
            let (statement, id) = match made {
                Made::Nothing => ("DELETE FROM remnants WHERE id = $1 AND $2 IS NULL", None),
                Made::Unused(id) => (
                    concat!("UPDATE remnants SET upstream_id = $2, due_at = ", now!(), " WHERE id = $1"),
                    Some(id.as_str()),
                ),
                // What was on its way may take effect late, so the time of the look stays.
                Made::Unknown => ("UPDATE remnants SET maker = NULL WHERE id = $1 AND $2 IS NULL", None),
            };
            sqlx::query(statement).bind(intent.uuid()).bind(id).execute(connection).await?;
            Ok(())
        }

        macro_rules! due_remnants {
            () => {
                concat!(
                    "SELECT ",
                    remnant_columns!(),
                    " FROM remnants x WHERE x.due_at <= ",
                    now!(),
                    " ORDER BY x.due_at LIMIT $1"
                )
            };
        }

        /// Implements [`Life::claim_remnants`](crate::store::Life::claim_remnants).
        pub(super) async fn claim_remnants(
            connection: &mut Connection,
            limit: u32,
            lease: Duration,
        ) -> Result<Vec<Remnant>, StoreError> {
            let mut tx = write(connection).await?;
            let rows: Vec<RemnantRow> = sqlx::query_as(concat!(due_remnants!(), locked_if_free!("x")))
                .bind(i64::from(limit))
                .fetch_all(&mut *tx)
                .await?;
            sqlx::query(concat!(
                "UPDATE remnants SET maker = NULL, due_at = ",
                now!(),
                " + ",
                ms!("$2"),
                " WHERE id",
                among!("$1")
            ))
            .bind(ids(rows.iter().map(RemnantRow::id)))
            .bind(millis(lease))
            .execute(&mut *tx)
            .await?;
            tx.commit().await?;
            rows.into_iter().map(Remnant::try_from).collect()
        }

        /// Implements [`Life::due_remnants`](crate::store::Life::due_remnants).
        pub(super) async fn due_remnants(
            connection: &mut Connection,
            limit: u32,
        ) -> Result<Vec<Remnant>, StoreError> {
            let rows: Vec<RemnantRow> =
                sqlx::query_as(due_remnants!()).bind(i64::from(limit)).fetch_all(connection).await?;
            rows.into_iter().map(Remnant::try_from).collect()
        }

        /// Implements [`Life::schedule_remnant`](crate::store::Life::schedule_remnant).
        pub(super) async fn schedule_remnant(
            connection: &mut Connection,
            id: RemnantId,
            knew: Option<&str>,
            after: Option<Duration>,
        ) -> Result<(), StoreError> {
            let forget = "DELETE FROM remnants WHERE id = $1 AND upstream_id IS NOT DISTINCT FROM $2";
            let put_off = concat!(
                "UPDATE remnants SET attempts = attempts + 1, due_at = ",
                now!(),
                " + ",
                ms!("$3"),
                " WHERE id = $1 AND upstream_id IS NOT DISTINCT FROM $2"
            );
            let query = match after {
                None => sqlx::query(forget).bind(id.uuid()).bind(knew),
                Some(after) => sqlx::query(put_off).bind(id.uuid()).bind(knew).bind(millis(after)),
            };
            query.execute(connection).await?;
            Ok(())
        }

        /// Implements [`Life::keep_remnant`](crate::store::Life::keep_remnant).
        pub(super) async fn keep_remnant(
            connection: &mut Connection,
            id: RemnantId,
            knew: Option<&str>,
        ) -> Result<(), StoreError> {
            let keep = "UPDATE remnants SET due_at = NULL WHERE id = $1 AND upstream_id IS NOT DISTINCT FROM $2";
            sqlx::query(keep).bind(id.uuid()).bind(knew).execute(connection).await?;
            Ok(())
        }

        /// Implements [`Life::unheard_runs`](crate::store::Life::unheard_runs).
        pub(super) async fn unheard_runs(
            connection: &mut Connection,
            thread: ThreadId,
        ) -> Result<u64, StoreError> {
            let count: i64 = sqlx::query_scalar(
                "SELECT CAST(COALESCE(sum(r.unheard), 0) AS bigint) FROM runs r WHERE r.thread_id = $1",
            )
            .bind(thread.uuid())
            .fetch_one(connection)
            .await?;
            Ok(count.try_into().unwrap_or(0))
        }
    };
}
pub(in crate::store) use remnants;

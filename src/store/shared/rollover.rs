//! A fresh thread in the place of a full one, and what others wrote to the upstream thread.

macro_rules! rollovers {
    ($database:ty) => {
        use std::collections::HashSet;

        use serde_json::json as value;
        use uuid::Uuid;

        use super::read::{DOWNWARDS_KNOWN, listed, started_before};
        use crate::domain::{Lifecycle, Message, Page, RunStatus, Thread, ThreadId};
        use crate::store::columns::thread_columns;
        use crate::store::paging::Span;
        use crate::store::rows::{ThreadRow, json, millis};
        use crate::store::{Claim, Foreign, Rolled, Rollover, RunLease, StoreError, Turn};

        type Connection = <$database as sqlx::Database>::Connection;

        /// Times that new runs may come while a thread is taken, before that is given up.
        const MAX_ATTEMPTS: u32 = 10;

        /// Implements [`Life::roll_over`](crate::store::Life::roll_over).
        pub(super) async fn roll_over(
            connection: &mut Connection,
            rollover: &Rollover,
        ) -> Result<Rolled, StoreError> {
            for _ in 0..MAX_ATTEMPTS {
                let mut tx = write(connection).await?;
                if let Some(rolled) = try_roll_over(&mut tx, rollover).await? {
                    tx.commit().await?;
                    return Ok(rolled);
                }
                tx.rollback().await?;
            }
            Err(StoreError::Unavailable("new runs kept coming".into()))
        }

        /// An unfinished run: whose it is, and how it stands.
        #[derive(sqlx::FromRow)]
        struct Unfinished {
            id: Uuid,
            status: String,
            fence: i64,
        }

        impl Unfinished {
            fn is_active(&self) -> bool {
                self.status != RunStatus::Queued.as_str()
            }

            fn works_under(&self, lease: &RunLease) -> bool {
                self.id == lease.run_id.uuid()
                    && self.fence == lease.fence
                    && self.status == RunStatus::InProgress.as_str()
            }
        }

        /// Runs are locked before the thread. `None` if there are others than these once the thread is locked, so that no more
        /// can come: nothing must be kept then.
        async fn try_roll_over(
            tx: &mut Connection,
            rollover: &Rollover,
        ) -> Result<Option<Rolled>, StoreError> {
            let old = rollover.thread;
            let runs: Vec<Unfinished> = sqlx::query_as(concat!(
                "SELECT r.id, r.status, r.fence FROM runs r WHERE r.id",
                among_found!(unfinished_runs!(" = $1")),
                " AND r.finished_at IS NULL ORDER BY r.id",
                locked_whole!("r"),
            ))
            .bind(old.uuid())
            .fetch_all(&mut *tx)
            .await?;
            let lifecycle: Option<String> = sqlx::query_scalar(concat!(
                "SELECT t.lifecycle FROM threads t WHERE t.id = $1",
                locked!("t")
            ))
            .bind(old.uuid())
            .fetch_optional(&mut *tx)
            .await?;
            if lifecycle.as_deref() != Some(Lifecycle::Current.as_str()) {
                return rolled_before(tx, rollover).await.map(Some);
            }
            let others: bool = sqlx::query_scalar(concat!(
                "SELECT EXISTS (SELECT 1 FROM (",
                unfinished_runs!(" = $1"),
                ") r WHERE NOT r.id",
                among!("$2"),
                ")",
            ))
            .bind(old.uuid())
            .bind(ids(runs.iter().map(|run| run.id)))
            .fetch_one(&mut *tx)
            .await?;
            if others {
                return Ok(None);
            }
            match &rollover.by {
                Some(lease) if !runs.iter().any(|run| run.works_under(lease)) => return Ok(Some(Rolled::Lost)),
                None if runs.iter().any(Unfinished::is_active) => {
                    sqlx::query("UPDATE threads SET rolls = true WHERE id = $1")
                        .bind(old.uuid())
                        .execute(&mut *tx)
                        .await?;
                    return Ok(Some(Rolled::Later(Box::new(thread(tx, old).await?))));
                }
                _ => {}
            }
            put_in_place(tx, rollover, runs.len()).await?;
            move_runs(tx, rollover).await?;
            done(tx, rollover).await.map(Some)
        }

        /// The answer to a repeated rollover: it was done if the fresh thread is there, and the run still works.
        async fn rolled_before(tx: &mut Connection, rollover: &Rollover) -> Result<Rolled, StoreError> {
            let found: Option<bool> = sqlx::query_scalar(
                "SELECT $3 IS NULL OR t.id = (SELECT r.thread_id FROM runs r WHERE r.id = $3 AND r.fence = $4)
                FROM threads t WHERE t.id = $1 AND t.previous_thread = $2",
            )
            .bind(rollover.new_thread.uuid())
            .bind(rollover.thread.uuid())
            .bind(rollover.by.map(|lease| lease.run_id.uuid()))
            .bind(rollover.by.map(|lease| lease.fence))
            .fetch_optional(&mut *tx)
            .await?;
            if found == Some(true) { done(tx, rollover).await } else { Ok(Rolled::Lost) }
        }

        async fn done(tx: &mut Connection, rollover: &Rollover) -> Result<Rolled, StoreError> {
            let turn: Option<Box<Turn>> = match &rollover.by {
                None => None,
                Some(lease) => match started_before(tx, lease).await? {
                    Claim::Started(turn) => Some(turn),
                    Claim::NotYet | Claim::Lost => return Ok(Rolled::Lost),
                },
            };
            let thread = thread(tx, rollover.new_thread).await?;
            Ok(Rolled::Done { thread: Box::new(thread), turn })
        }

        async fn thread(tx: &mut Connection, id: ThreadId) -> Result<Thread, StoreError> {
            let row: ThreadRow =
                sqlx::query_as(concat!("SELECT ", thread_columns!(), " FROM threads t WHERE t.id = $1"))
                    .bind(id.uuid())
                    .fetch_one(tx)
                    .await?;
            row.try_into()
        }

        /// Archives the old thread and makes the fresh one, with counters as they are once all has moved.
        ///
        /// Limits are what is left of the old one's. If it has none of its own, the configured ones hold for the fresh one as
        /// for any, but for the age, of which there is less.
        async fn put_in_place(
            tx: &mut Connection,
            rollover: &Rollover,
            runs: usize,
        ) -> Result<(), StoreError> {
            sqlx::query(concat!(
                "UPDATE threads SET lifecycle = 'archived', archived_at = ",
                now!(),
                ", due_at = ",
                now!(),
                ", rolls = false, attempts = 0, last_failure = NULL WHERE id = $1"
            ))
            .bind(rollover.thread.uuid())
            .execute(&mut *tx)
            .await?;
            sqlx::query(concat!(
                "INSERT INTO threads (
                    id, tenant, user_key, scope_kind, scope_name, upstream, lifecycle, previous_thread, metadata,
                    message_count, last_position, backlog, run_count, carried, began_at, created_at, last_active_at,
                    max_age_ms, max_idle_ms
                )
                SELECT $2, t.tenant, t.user_key, t.scope_kind, t.scope_name, t.upstream, 'current', t.id, t.metadata,
                    (SELECT count(*) FROM messages m WHERE m.run_id = $3),
                    (
                        SELECT COALESCE(max(m.position) - min(m.position) + 1, 0) FROM messages m
                        WHERE m.run_id = $3
                    ),
                    (
                        SELECT count(*) FROM messages m
                        WHERE m.run_id = $3 AND (m.context = 'missing') IS TRUE
                    ),
                    $4,
                    (
                        SELECT count(*) FROM (
                            SELECT 1 AS one FROM messages m
                            WHERE m.thread_id = t.id AND m.context <> 'withheld' AND m.run_id IS DISTINCT FROM $3
                            ORDER BY m.position DESC
                            LIMIT $5
                        ) c
                    ),
                    COALESCE(t.began_at, t.created_at), ",
                now!(),
                ", ",
                now!(),
                ", CASE
                    WHEN t.max_age_ms IS NOT NULL THEN ",
                left_of!("t.max_age_ms"),
                " WHEN t.max_idle_ms IS NULL AND $6 IS NOT NULL THEN ",
                left_of!("$6"),
                " END, CASE
                    WHEN t.max_idle_ms IS NOT NULL THEN t.max_idle_ms
                    WHEN t.max_age_ms IS NULL AND $6 IS NOT NULL THEN $7
                END
                FROM threads t WHERE t.id = $1",
            ))
            .bind(rollover.thread.uuid())
            .bind(rollover.new_thread.uuid())
            .bind(rollover.by.map(|lease| lease.run_id.uuid()))
            .bind(i64::try_from(runs).unwrap_or(i64::MAX))
            .bind(i64::from(rollover.carry_over))
            .bind(rollover.limits.max_age.map(millis))
            .bind(rollover.limits.max_idle.map(millis))
            .execute(&mut *tx)
            .await?;
            sqlx::query(concat!(
                "UPDATE threads AS t SET due_at = ",
                expiry!("$2", "$3"),
                " WHERE t.id = $1"
            ))
            .bind(rollover.new_thread.uuid())
            .bind(rollover.limits.max_age.map(millis))
            .bind(rollover.limits.max_idle.map(millis))
            .execute(tx)
            .await?;
            Ok(())
        }

        /// Moves what is unfinished, numbered from 1 in the same order, and the messages of the run at work.
        async fn move_runs(tx: &mut Connection, rollover: &Rollover) -> Result<(), StoreError> {
            sqlx::query(
                "UPDATE threads AS t SET
                    run_count = t.run_count - (SELECT f.run_count FROM threads f WHERE f.id = $2),
                    message_count = t.message_count - (SELECT f.message_count FROM threads f WHERE f.id = $2),
                    backlog = t.backlog - (SELECT f.backlog FROM threads f WHERE f.id = $2)
                WHERE t.id = $1",
            )
            .bind(rollover.thread.uuid())
            .bind(rollover.new_thread.uuid())
            .execute(&mut *tx)
            .await?;
            sqlx::query(concat!(
                "UPDATE runs AS r SET thread_id = $2, seq = m.n, rank = CASE WHEN r.rank < 0 THEN -m.n ELSE 0 END
                FROM (
                    SELECT o.id, row_number() OVER (ORDER BY o.seq) AS n FROM runs o WHERE o.id",
                among_found!(unfinished_runs!(" = $1")),
                ") AS m
                WHERE r.id = m.id",
            ))
            .bind(rollover.thread.uuid())
            .bind(rollover.new_thread.uuid())
            .execute(&mut *tx)
            .await?;
            if let Some(lease) = &rollover.by {
                sqlx::query(
                    "UPDATE messages SET thread_id = $2, position = position + 1 - (
                        SELECT min(f.position) FROM messages f WHERE f.run_id = $1
                    )
                    WHERE run_id = $1",
                )
                .bind(lease.run_id.uuid())
                .bind(rollover.new_thread.uuid())
                .execute(tx)
                .await?;
            }
            Ok(())
        }

        /// Implements [`Life::carried`](crate::store::Life::carried). What is to be erased is not sent any more.
        pub(super) async fn carried(
            connection: &mut Connection,
            thread: ThreadId,
            before: Option<i64>,
            limit: u32,
        ) -> Result<Page<Message>, StoreError> {
            let nothing = Page { data: vec![], has_more: false };
            let previous: Option<(Uuid, i64)> = sqlx::query_as(
                "SELECT p.id, (SELECT t.carried FROM threads t WHERE t.id = $1) AS carried FROM threads p
                WHERE p.id = (SELECT t.previous_thread FROM threads t WHERE t.id = $1 AND t.carried > 0)
                    AND p.deletion IS DISTINCT FROM 'erase'",
            )
            .bind(thread.uuid())
            .fetch_optional(&mut *connection)
            .await?;
            let Some((previous, carried)) = previous else { return Ok(nothing) };
            let first: Option<i64> = sqlx::query_scalar(
                "SELECT m.position FROM messages m WHERE m.thread_id = $1 AND m.context <> 'withheld'
                ORDER BY m.position DESC LIMIT 1 OFFSET $2",
            )
            .bind(previous)
            .bind(carried - 1)
            .fetch_optional(&mut *connection)
            .await?;
            let span = Span::down(first.map_or(0, |first| first - 1), before, limit);
            Ok(listed(connection, DOWNWARDS_KNOWN, previous, span, limit).await?.page(span))
        }

        /// Implements [`Life::insert_foreign`](crate::store::Life::insert_foreign).
        pub(super) async fn insert_foreign(
            connection: &mut Connection,
            thread: ThreadId,
            by: Option<RunLease>,
            messages: &[Foreign],
        ) -> Result<u64, StoreError> {
            let mut tx = write(connection).await?;
            let inserted = try_insert(&mut tx, thread, by, messages).await?;
            tx.commit().await?;
            Ok(inserted)
        }

        /// The thread is locked first, so that no run begins meanwhile; and none is active that would have locked messages.
        /// A run that changes hands gets its new fence without the thread. Its new owner reads what is there only after that,
        /// so what is put in before counts for it too.
        async fn try_insert(
            tx: &mut Connection,
            thread: ThreadId,
            by: Option<RunLease>,
            messages: &[Foreign],
        ) -> Result<u64, StoreError> {
            let last: Option<i64> = sqlx::query_scalar(concat!(
                "SELECT t.last_position FROM threads t WHERE t.id = $1",
                locked!("t")
            ))
            .bind(thread.uuid())
            .fetch_optional(&mut *tx)
            .await?;
            let Some(last) = last else { return Ok(0) };
            let active: Vec<(Uuid, i64)> = sqlx::query_as(
                "SELECT r.id, r.fence FROM runs r
                WHERE r.thread_id = $1 AND r.status IN ('in_progress', 'requires_action', 'cancelling')",
            )
            .bind(thread.uuid())
            .fetch_all(&mut *tx)
            .await?;
            let expected = by.map(|lease| (lease.run_id.uuid(), lease.fence));
            if active != Vec::from_iter(expected) {
                return Ok(0);
            }
            let unknown = unknown(tx, thread, messages).await?;
            let Some(first) = unknown.first() else { return Ok(0) };
            let places: Vec<i64> = unknown.iter().map(|message| message.after.clamp(0, last)).collect();
            // Positions are checked row by row: what comes later goes out of the way first, and each to its place then.
            sqlx::query("UPDATE messages SET position = position + $3 WHERE thread_id = $1 AND position > $2")
                .bind(thread.uuid())
                .bind(first.after.clamp(0, last))
                .bind(FAR)
                .execute(&mut *tx)
                .await?;
            sqlx::query(concat!(
                "UPDATE messages SET position = position - $2 + (
                    SELECT count(*) FROM ",
                each_text!("$3"),
                " WHERE CAST(e.value AS bigint) < position - $2
                )
                WHERE thread_id = $1 AND position > $2",
            ))
            .bind(thread.uuid())
            .bind(FAR)
            .bind(json(&places)?)
            .execute(&mut *tx)
            .await?;
            let rows: Vec<_> = (1..)
                .zip(places.iter().zip(&unknown))
                .map(|(n, (place, message))| {
                    let place: i64 = place + n;
                    value!({
                        "id": message.id.uuid().simple().to_string(),
                        "position": place,
                        "role": message.role.as_str(),
                        "content": message.content,
                        "upstream_message_id": message.upstream_message_id,
                        "created_at": message.created_at.map(|at| at.timestamp_millis()),
                    })
                })
                .collect();
            sqlx::query(concat!(
                "INSERT INTO messages (id, thread_id, position, role, content, upstream_message_id, context, created_at)
                SELECT ",
                id!("e.value ->> 'id'"),
                ", $1, CAST(e.value ->> 'position' AS bigint), e.value ->> 'role', e.value -> 'content',
                    e.value ->> 'upstream_message_id', 'present', COALESCE(",
                at!("e.value ->> 'created_at'"),
                ", ",
                now!(),
                ") FROM ",
                each!("$2"),
            ))
            .bind(thread.uuid())
            .bind(json(&rows)?)
            .execute(&mut *tx)
            .await?;
            let inserted = unknown.len();
            sqlx::query(
                "UPDATE threads SET message_count = message_count + $2, last_position = last_position + $2
                WHERE id = $1",
            )
            .bind(thread.uuid())
            .bind(i64::try_from(inserted).unwrap_or(i64::MAX))
            .execute(tx)
            .await?;
            Ok(inserted.try_into().unwrap_or(u64::MAX))
        }

        /// Beyond all positions.
        const FAR: i64 = 1 << 48;

        /// Those of the messages that the thread does not have, by place.
        async fn unknown<'a>(
            tx: &mut Connection,
            thread: ThreadId,
            messages: &'a [Foreign],
        ) -> Result<Vec<&'a Foreign>, StoreError> {
            let names: Vec<&str> = messages.iter().filter_map(|it| it.upstream_message_id.as_deref()).collect();
            let known: Vec<String> = sqlx::query_scalar(concat!(
                "SELECT m.upstream_message_id FROM messages m
                WHERE m.thread_id = $1 AND m.upstream_message_id IN (SELECT e.value FROM ",
                each_text!("$2"),
                ")"
            ))
            .bind(thread.uuid())
            .bind(json(&names)?)
            .fetch_all(&mut *tx)
            .await?;
            let taken: Vec<Uuid> =
                sqlx::query_scalar(concat!("SELECT m.id FROM messages m WHERE m.id", among!("$1")))
                    .bind(ids(messages.iter().map(|message| message.id.uuid())))
                    .fetch_all(tx)
                    .await?;
            let mut known: HashSet<String> = known.into_iter().collect();
            let mut taken: HashSet<Uuid> = taken.into_iter().collect();
            let mut unknown: Vec<&Foreign> = messages
                .iter()
                .filter(|message| {
                    taken.insert(message.id.uuid())
                        && message.upstream_message_id.as_ref().is_none_or(|name| known.insert(name.clone()))
                })
                .collect();
            unknown.sort_by_key(|message| message.after);
            Ok(unknown)
        }
    };
}
pub(in crate::store) use rollovers;

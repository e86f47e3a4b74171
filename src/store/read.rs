//! What callers look at. The statements are the same for both backends, and so is the code, but for the driver's type:
//! a macro says it once, since the bounds that would make it generic are longer than the functions.

macro_rules! reads {
    ($database:ty) => {
        use sqlx::types::Json;
        use sqlx::{FromRow as _, Row as _};
        use uuid::Uuid;

        use super::dialect::{STEP_BYTES, listed};
        use crate::domain::{
            Baseline, ConversationKey, EventBatch, Message, MessageId, Page, PageRequest, ReplicaId, Run, RunId, RunStatus, ThreadId,
        };
        use crate::store::columns::{
            first_position, lasting_of_key, message_columns, newest_of_key, of_a_run_at_work, queue_depth, run_columns,
            thread_columns,
        };
        use crate::store::paging::{Filling, ListedRow, Span, cursor};
        use crate::store::rows::{EventRow, MessageRow, RunRow, RunWithReply, ThreadAndRun, WaitingRow};
        use crate::store::{
            Binding, Bound, Claim, Idempotency, InputMessage, RunLease, StoreError, ThreadName, Turn, Waiting,
            Withdrawal, Withdrawn,
        };

        /// Implements [`Store::messages`](crate::store::Store::messages).
        pub(super) async fn messages(
            connection: &mut <$database as sqlx::Database>::Connection,
            name: ThreadName<'_>,
            across: bool,
            page: &PageRequest<MessageId>,
        ) -> Result<Option<Page<Message>>, StoreError> {
            let cursor_id = page.after.or(page.before).map(MessageId::uuid);
            if across {
                return messages_across(connection, name, cursor_id, page).await;
            }
            let found: Option<(Uuid, Option<i64>)> = match name {
                ThreadName::Newest(key) => {
                    sqlx::query_as(concat!(
                        "SELECT t.id, (SELECT CASE WHEN m.thread_id = t.id THEN m.position END FROM messages m WHERE m.id = $5)
                        FROM threads t WHERE ",
                        newest_of_key!(),
                    ))
                    .bind(key.tenant.as_str())
                    .bind(key.user.as_str())
                    .bind(key.scope.kind())
                    .bind(key.scope.name())
                    .bind(cursor_id)
                    .fetch_optional(&mut *connection)
                    .await?
                }
                ThreadName::Id(tenant, id) => {
                    sqlx::query_as(
                        "SELECT t.id, (SELECT CASE WHEN m.thread_id = t.id THEN m.position END FROM messages m WHERE m.id = $3)
                        FROM threads t WHERE t.id = $2 AND t.tenant = $1",
                    )
                    .bind(tenant.as_str())
                    .bind(id.uuid())
                    .bind(cursor_id)
                    .fetch_optional(&mut *connection)
                    .await?
                }
            };
            let Some((thread, position)) = found else {
                return Ok(None);
            };
            let span = Span::new(page, cursor(page, position)?);
            let statement = if span.upwards { UPWARDS } else { DOWNWARDS };
            Ok(Some(listed(connection, statement, thread, span, page.limit).await?.page(span)))
        }

        /// Messages of a thread, up to so many, in the direction of a statement. `of`: the thread, or what the statement knows
        /// it by.
        pub(super) async fn listed(
            connection: &mut <$database as sqlx::Database>::Connection,
            statement: &'static str,
            of: Uuid,
            mut span: Span,
            limit: u32,
        ) -> Result<Filling, StoreError> {
            let mut filling = Filling::new(limit);
            while let Some(room) = filling.room() {
                let rows: Vec<ListedRow> = sqlx::query_as(statement)
                    .bind(of)
                    .bind(span.above)
                    .bind(span.below)
                    .bind(room)
                    .bind(STEP_BYTES)
                    .fetch_all(&mut *connection)
                    .await?;
                if let Some(last) = filling.add(rows)? {
                    span = span.behind(last.position);
                }
            }
            Ok(filling)
        }

        /// The messages of the thread `$1` between two positions, up to `$4`, and to the one that reaches `$5` bytes.
        const UPWARDS: &str = listed!(
            "m_position ASC", "$4", "$5",
            "FROM messages m WHERE m.thread_id = $1 AND m.position > $2 AND m.position < $3 ORDER BY m.position ASC"
        );

        /// The same from the other end.
        const DOWNWARDS: &str = listed!(
            "m_position DESC", "$4", "$5",
            "FROM messages m WHERE m.thread_id = $1 AND m.position > $2 AND m.position < $3 ORDER BY m.position DESC"
        );

        /// The same without those that are withheld.
        pub(super) const DOWNWARDS_KNOWN: &str = listed!(
            "m_position DESC", "$4", "$5",
            "FROM messages m WHERE m.thread_id = $1 AND m.position > $2 AND m.position < $3 AND m.context <> 'withheld'
            ORDER BY m.position DESC"
        );

        /// The same for the thread of the run `$1`, without the messages of that run and those behind them.
        const EARLIER: &str = listed!(
            "m_position DESC", "$4", "$5",
            "FROM messages m WHERE m.thread_id = (SELECT r.thread_id FROM runs r WHERE r.id = $1)
                AND m.position > $2 AND m.position < $3
                AND m.position < COALESCE((SELECT min(f.position) FROM messages f WHERE f.run_id = $1), $3)
                AND m.context <> 'withheld'
            ORDER BY m.position DESC"
        );

        /// The same of those alone that the upstream thread lacks.
        const BACKLOG: &str = listed!(
            "m_position DESC", "$4", "$5",
            "FROM messages m WHERE m.thread_id = (SELECT r.thread_id FROM runs r WHERE r.id = $1)
                AND m.position > $2 AND m.position < $3
                AND m.position < COALESCE((SELECT min(f.position) FROM messages f WHERE f.run_id = $1), $3)
                AND m.context = 'missing'
            ORDER BY m.position DESC"
        );

        /// The part of [`messages`] that reads all threads of a key.
        async fn messages_across(
            connection: &mut <$database as sqlx::Database>::Connection,
            name: ThreadName<'_>,
            cursor_id: Option<Uuid>,
            page: &PageRequest<MessageId>,
        ) -> Result<Option<Page<Message>>, StoreError> {
            let [tenant, user, kind, scope] = match name {
                ThreadName::Newest(key) => {
                    [key.tenant.as_str(), key.user.as_str(), key.scope.kind(), key.scope.name()].map(str::to_owned)
                }
                ThreadName::Id(tenant, id) => {
                    let key: Option<(String, String, String, String)> = sqlx::query_as(
                        "SELECT t.tenant, t.user_key, t.scope_kind, t.scope_name FROM threads t
                        WHERE t.id = $2 AND t.tenant = $1",
                    )
                    .bind(tenant.as_str())
                    .bind(id.uuid())
                    .fetch_optional(&mut *connection)
                    .await?;
                    let Some((tenant, user, kind, scope)) = key else { return Ok(None) };
                    [tenant, user, kind, scope]
                }
            };
            let found: Option<(Option<Uuid>, Option<i64>)> = sqlx::query_as(concat!(
                "SELECT m.thread_id, m.position FROM threads t
                LEFT JOIN messages m ON m.id = $5 AND EXISTS (
                    SELECT 1 FROM threads o
                    WHERE o.id = m.thread_id AND o.tenant = $1 AND o.user_key = $2 AND o.scope_kind = $3
                        AND o.scope_name = $4 AND o.lifecycle <> 'deleting'
                )
                WHERE ",
                lasting_of_key!(),
                " LIMIT 1",
            ))
            .bind(&tenant)
            .bind(&user)
            .bind(&kind)
            .bind(&scope)
            .bind(cursor_id)
            .fetch_optional(&mut *connection)
            .await?;
            let Some((thread, position)) = found else { return Ok(None) };
            let span = Span::new(page, cursor(page, position)?);
            let (statement, first, bound) = if span.upwards {
                (ACROSS_UPWARDS, Uuid::nil(), span.above)
            } else {
                (ACROSS_DOWNWARDS, Uuid::max(), span.below)
            };
            let mut behind = (thread.unwrap_or(first), bound);
            let mut filling = Filling::new(page.limit);
            while let Some(room) = filling.room() {
                let rows: Vec<ListedRow> = sqlx::query_as(statement)
                    .bind(&tenant)
                    .bind(&user)
                    .bind(&kind)
                    .bind(&scope)
                    .bind(behind.0)
                    .bind(behind.1)
                    .bind(room)
                    .bind(STEP_BYTES)
                    .fetch_all(&mut *connection)
                    .await?;
                if let Some(last) = filling.add(rows)? {
                    behind = (last.thread_id.uuid(), last.position);
                }
            }
            Ok(Some(filling.page(span)))
        }

        /// Implements [`Store::transcript`](crate::store::Store::transcript).
        pub(super) async fn transcript(
            connection: &mut <$database as sqlx::Database>::Connection,
            thread: ThreadId,
            after: i64,
            limit: u32,
        ) -> Result<Vec<Message>, StoreError> {
            let all = PageRequest::<MessageId> { limit, ascending: true, after: None, before: None };
            let span = Span::new(&all, None).behind(after);
            Ok(listed(connection, UPWARDS, thread.uuid(), span, limit).await?.messages())
        }

        /// Implements [`Store::earlier`](crate::store::Store::earlier).
        pub(super) async fn earlier(
            connection: &mut <$database as sqlx::Database>::Connection,
            run: RunId,
            before: Option<i64>,
            limit: u32,
        ) -> Result<Page<Message>, StoreError> {
            let span = Span::down(0, before, limit);
            Ok(listed(connection, EARLIER, run.uuid(), span, limit).await?.page(span))
        }

        /// Implements [`Store::backlog`](crate::store::Store::backlog).
        pub(super) async fn backlog(
            connection: &mut <$database as sqlx::Database>::Connection,
            run: RunId,
            before: Option<i64>,
            limit: u32,
        ) -> Result<Page<Message>, StoreError> {
            let span = Span::down(0, before, limit);
            Ok(listed(connection, BACKLOG, run.uuid(), span, limit).await?.page(span))
        }

        /// Implements [`Store::runs`](crate::store::Store::runs).
        pub(super) async fn runs(
            connection: &mut <$database as sqlx::Database>::Connection,
            key: &ConversationKey,
            page: &PageRequest<RunId>,
        ) -> Result<Option<Page<Run>>, StoreError> {
            let found: Option<(Uuid, Option<i64>)> = sqlx::query_as(concat!(
                "SELECT t.id, (SELECT CASE WHEN r.thread_id = t.id THEN r.seq END FROM runs r WHERE r.id = $5)
                FROM threads t
                WHERE ",
                newest_of_key!(),
            ))
            .bind(key.tenant.as_str())
            .bind(key.user.as_str())
            .bind(key.scope.kind())
            .bind(key.scope.name())
            .bind(page.after.or(page.before).map(RunId::uuid))
            .fetch_optional(&mut *connection)
            .await?;
            let Some((thread, seq)) = found else {
                return Ok(None);
            };
            let span = Span::new(page, cursor(page, seq)?);
            let statement = if span.upwards {
                concat!(
                    "SELECT ",
                    run_columns!(),
                    " FROM runs r WHERE r.thread_id = $1 AND r.seq > $2 AND r.seq < $3 ORDER BY r.seq ASC LIMIT $4",
                )
            } else {
                concat!(
                    "SELECT ",
                    run_columns!(),
                    " FROM runs r WHERE r.thread_id = $1 AND r.seq > $2 AND r.seq < $3 ORDER BY r.seq DESC LIMIT $4",
                )
            };
            let rows: Vec<RunRow> = sqlx::query_as(statement)
                .bind(thread)
                .bind(span.above)
                .bind(span.below)
                .bind(span.fetch)
                .fetch_all(&mut *connection)
                .await?;
            span.page(rows).map(Some)
        }

        /// Implements [`Store::unfinished`](crate::store::Store::unfinished).
        pub(super) async fn unfinished(
            connection: &mut <$database as sqlx::Database>::Connection,
            key: &ConversationKey,
        ) -> Result<Option<Vec<Run>>, StoreError> {
            let thread: Option<Uuid> = sqlx::query_scalar(concat!(
                "SELECT t.id FROM threads t
                WHERE ",
                newest_of_key!(),
            ))
            .bind(key.tenant.as_str())
            .bind(key.user.as_str())
            .bind(key.scope.kind())
            .bind(key.scope.name())
            .fetch_optional(&mut *connection)
            .await?;
            let Some(thread) = thread else { return Ok(None) };
            super::threads::unfinished_of(connection, ThreadId::from_uuid(thread)).await.map(Some)
        }

        /// Implements [`Store::run`](crate::store::Store::run).
        pub(super) async fn run(
            connection: &mut <$database as sqlx::Database>::Connection,
            key: &ConversationKey,
            id: RunId,
        ) -> Result<Option<(Run, Option<Message>)>, StoreError> {
            let row: Option<RunWithReply> = sqlx::query_as(concat!(
                "SELECT ",
                run_columns!(),
                ", ",
                message_columns!(),
                " FROM runs r
                JOIN threads t ON t.id = r.thread_id
                LEFT JOIN messages m ON m.run_id = r.id AND m.role = 'assistant'
                WHERE r.id = $5
                    AND t.tenant = $1 AND t.user_key = $2 AND t.scope_kind = $3 AND t.scope_name = $4",
            ))
            .bind(key.tenant.as_str())
            .bind(key.user.as_str())
            .bind(key.scope.kind())
            .bind(key.scope.name())
            .bind(id.uuid())
            .fetch_optional(&mut *connection)
            .await?;
            row.map(RunWithReply::into_parts).transpose()
        }

        /// Implements [`Store::sends_outputs`](crate::store::Store::sends_outputs). No read, but the same for both.
        pub(super) async fn sends_outputs(
            connection: &mut <$database as sqlx::Database>::Connection,
            lease: &RunLease,
        ) -> Result<bool, StoreError> {
            mark(connection, lease, concat!("UPDATE runs SET outputs_sent = true", of_a_run_at_work!())).await
        }

        /// Implements [`Store::sends_again`](crate::store::Store::sends_again). No read either.
        pub(super) async fn sends_again(
            connection: &mut <$database as sqlx::Database>::Connection,
            lease: &RunLease,
        ) -> Result<bool, StoreError> {
            mark(connection, lease, concat!("UPDATE runs SET unheard = unheard + 1", of_a_run_at_work!())).await
        }

        /// Notes something of a run at work. `false` if the lease was lost.
        async fn mark(
            connection: &mut <$database as sqlx::Database>::Connection,
            lease: &RunLease,
            statement: &'static str,
        ) -> Result<bool, StoreError> {
            let done = sqlx::query(statement)
                .bind(lease.run_id.uuid())
                .bind(lease.fence)
                .execute(&mut *connection)
                .await?;
            Ok(done.rows_affected() == 1)
        }

        /// Implements [`Store::take_queued`](crate::store::Store::take_queued). No read either.
        pub(super) async fn take_queued(
            connection: &mut <$database as sqlx::Database>::Connection,
            replica: ReplicaId,
            id: RunId,
        ) -> Result<Option<RunLease>, StoreError> {
            let fence: Option<i64> = sqlx::query_scalar(
                "UPDATE runs SET owner = $1, fence = fence + 1 WHERE id = $2 AND input IS NOT NULL RETURNING fence",
            )
            .bind(replica.uuid())
            .bind(id.uuid())
            .fetch_optional(connection)
            .await?;
            Ok(fence.map(|fence| RunLease { run_id: id, fence }))
        }

        /// Whether an idempotency key is in use.
        pub(super) async fn is_used(
            connection: &mut <$database as sqlx::Database>::Connection,
            key: &ConversationKey,
            idempotency: Option<&Idempotency>,
        ) -> Result<bool, StoreError> {
            let Some(idempotency) = idempotency else { return Ok(false) };
            let used = sqlx::query_scalar(
                "SELECT EXISTS (
                    SELECT 1 FROM idempotency_keys k
                    WHERE k.tenant = $1 AND k.user_key = $2 AND k.scope_kind = $3 AND k.scope_name = $4 AND k.key = $5
                )",
            )
            .bind(key.tenant.as_str())
            .bind(key.user.as_str())
            .bind(key.scope.kind())
            .bind(key.scope.name())
            .bind(&idempotency.key)
            .fetch_one(connection)
            .await?;
            Ok(used)
        }

        /// The answer to a repeated `claim`: the run is in progress under the same lease. Otherwise it is not for the caller.
        pub(super) async fn started_before(
            connection: &mut <$database as sqlx::Database>::Connection,
            lease: &RunLease) -> Result<Claim, StoreError> {
            let both: Option<ThreadAndRun> = sqlx::query_as(concat!(
                "SELECT ",
                thread_columns!(),
                ", ",
                run_columns!(),
                " FROM runs r JOIN threads t ON t.id = r.thread_id
                WHERE r.id = $1 AND r.fence = $2",
            ))
            .bind(lease.run_id.uuid())
            .bind(lease.fence)
            .fetch_optional(&mut *connection)
            .await?;
            let Some(both) = both else { return Ok(Claim::Lost) };
            let run = Run::try_from(both.run)?;
            if run.status != RunStatus::InProgress {
                return Ok(Claim::Lost);
            }
            let input = said(connection, lease.run_id).await?;
            let turn = Turn { lease: *lease, thread: both.thread.try_into()?, run, input };
            Ok(Claim::Started(Box::new(turn)))
        }

        /// The answer to a binding that found no lease: whether the record has the id of the upstream thread all the same.
        pub(super) async fn bound_before(
            connection: &mut <$database as sqlx::Database>::Connection,
            lease: &RunLease,
            binding: &Binding<'_>,
        ) -> Result<Bound, StoreError> {
            let recorded: bool = sqlx::query_scalar(
                "SELECT EXISTS (SELECT 1 FROM remnants x WHERE x.id = $1 AND x.upstream_id = $2)
                    OR EXISTS (
                        SELECT 1 FROM threads t
                        WHERE t.id = (SELECT r.thread_id FROM runs r WHERE r.id = $3) AND t.upstream_thread_id = $2
                    )",
            )
            .bind(binding.intent.uuid())
            .bind(binding.id.as_str())
            .bind(lease.run_id.uuid())
            .fetch_one(connection)
            .await?;
            Ok(if recorded { Bound::Lost } else { Bound::Unrecorded })
        }

        /// Leaves a waiting run, which the caller holds, to the messages of others. What it does to a busy thread was the wish of
        /// the one whose message is taken back.
        pub(super) async fn left_to(
            connection: &mut <$database as sqlx::Database>::Connection,
            lease: &RunLease,
            others: &[InputMessage],
            taken: &Withdrawal,
        ) -> Result<Withdrawn, StoreError> {
            sqlx::query("UPDATE runs SET input = $2, strategy = 'merge' WHERE id = $1")
                .bind(lease.run_id.uuid())
                .bind(Json(others))
                .execute(&mut *connection)
                .await?;
            sqlx::query("DELETE FROM idempotency_keys WHERE run_id = $1 AND key = $2")
                .bind(lease.run_id.uuid())
                .bind(&taken.idempotency_key)
                .execute(&mut *connection)
                .await?;
            let row = sqlx::query(concat!(
                "SELECT ",
                thread_columns!(),
                ", ",
                run_columns!(),
                ", (
                    SELECT count(*) FROM runs o
                    WHERE o.thread_id = r.thread_id AND o.status = 'queued' AND (o.rank, o.seq) < (r.rank, r.seq)
                ) AS before
                FROM runs r JOIN threads t ON t.id = r.thread_id WHERE r.id = $1",
            ))
            .bind(lease.run_id.uuid())
            .fetch_one(connection)
            .await?;
            let both = ThreadAndRun::from_row(&row)?;
            Ok(Withdrawn::Shared {
                thread: Box::new(both.thread.try_into()?),
                run: Box::new(both.run.try_into()?),
                position: row.try_get::<i64, _>("before")? + 1,
            })
        }

        /// What the user said in a run that has started.
        pub(super) async fn said(
            connection: &mut <$database as sqlx::Database>::Connection,
            run: RunId,
        ) -> Result<Vec<InputMessage>, StoreError> {
            let said: Vec<MessageRow> = sqlx::query_as(concat!(
                "SELECT ",
                message_columns!(),
                " FROM messages m WHERE m.run_id = $1 AND m.role = 'user' ORDER BY m.position",
            ))
            .bind(run.uuid())
            .fetch_all(connection)
            .await?;
            said.into_iter().map(InputMessage::try_from).collect()
        }

        /// A run that was paused under the lease and has not ended; it may have its outputs by now.
        pub(super) async fn waiting(
            connection: &mut <$database as sqlx::Database>::Connection,
            lease: &RunLease,
        ) -> Result<Option<Waiting>, StoreError> {
            let row: Option<WaitingRow> = sqlx::query_as(concat!(
                "SELECT ",
                thread_columns!(),
                ", ",
                run_columns!(),
                ", ",
 queue_depth!(),
 ", r.status AS active_status
                FROM runs r JOIN threads t ON t.id = r.thread_id
                WHERE r.id = $1 AND r.fence = $2 AND r.input IS NULL AND r.finished_at IS NULL
                    AND r.status <> 'cancelling'",
            ))
            .bind(lease.run_id.uuid())
            .bind(lease.fence)
            .fetch_optional(connection)
            .await?;
            row.map(Waiting::try_from).transpose()
        }

        /// Implements [`Store::events`](crate::store::Store::events).
        pub(super) async fn events(
            connection: &mut <$database as sqlx::Database>::Connection,
            run: RunId,
            from: i64,
        ) -> Result<Vec<EventBatch>, StoreError> {
            let rows: Vec<EventRow> = sqlx::query_as(
                // What ends after `from`, or if nothing does, what ends last.
                "SELECT e.n, e.event FROM run_events e
                WHERE e.run_id = $1 AND e.until > (
                    SELECT CASE WHEN l.until > $2 THEN $2 ELSE l.until - 1 END
                    FROM (SELECT max(b.until) AS until FROM run_events b WHERE b.run_id = $1) l
                )
                ORDER BY e.n",
            )
            .bind(run.uuid())
            .bind(from)
            .fetch_all(connection)
            .await?;
            Ok(rows.into_iter().map(EventBatch::from).collect())
        }

        /// Implements [`Store::baseline`](crate::store::Store::baseline). What stands before a run's messages is
        /// changed by that run alone, so the statements need no common snapshot.
        pub(super) async fn baseline(
            connection: &mut <$database as sqlx::Database>::Connection,
            run: RunId,
        ) -> Result<Baseline, StoreError> {
            let place: Option<(Uuid, i64, i64)> = sqlx::query_as(concat!(
                "SELECT r.thread_id, ",
                first_position!("r"),
                ", t.carried_users FROM runs r JOIN threads t ON t.id = r.thread_id WHERE r.id = $1",
            ))
            .bind(run.uuid())
            .fetch_optional(&mut *connection)
            .await?;
            let Some((thread, first, carried)) = place else {
                return Ok(Baseline::default());
            };
            let anchor: Option<(i64, String)> = sqlx::query_as(
                "SELECT m.position, m.upstream_message_id FROM messages m
                WHERE m.thread_id = $1 AND m.position < $2 AND m.upstream_message_id IS NOT NULL
                    AND m.context = 'present'
                ORDER BY m.position DESC
                LIMIT 1",
            )
            .bind(thread)
            .bind(first)
            .fetch_optional(&mut *connection)
            .await?;
            let (position, anchor) = anchor.unzip();
            let skip: i64 = sqlx::query_scalar(
                "SELECT count(*) FROM messages m
                WHERE m.thread_id = $1 AND m.position > $2 AND m.position < $3 AND m.role = 'user'
                    AND m.context = 'present'",
            )
            .bind(thread)
            .bind(position.unwrap_or(0))
            .bind(first)
            .fetch_one(connection)
            .await?;
            // Without an anchor, what was carried over comes first.
            let skip = if anchor.is_none() { skip + carried } else { skip };
            Ok(Baseline { anchor, skip: u32::try_from(skip).unwrap_or(u32::MAX) })
        }
    };
}
pub(super) use reads;

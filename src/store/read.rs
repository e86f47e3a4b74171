//! What callers look at. The statements are the same for both backends, and so is the code, but for the driver's type:
//! a macro says it once, since the bounds that would make it generic are longer than the functions.

macro_rules! reads {
    ($database:ty) => {
        use uuid::Uuid;

        use crate::domain::{
            ConversationKey, Message, MessageId, Page, PageRequest, Run, RunId, Thread, ThreadActivity, ThreadId,
        };
        use crate::store::rows::{
            MessageRow, RunRow, RunWithReply, Span, ThreadAndRun, ThreadWithActivity, current_of_key, cursor, message_columns,
            run_columns, thread_columns,
        };
        use crate::store::{Claim, InputMessage, RunLease, StoreError, Turn};

        /// Implements [`Store::thread`](crate::store::Store::thread).
        pub(super) async fn thread(
            connection: &mut <$database as sqlx::Database>::Connection,
            key: &ConversationKey,
        ) -> Result<Option<(Thread, ThreadActivity)>, StoreError> {
            let row: Option<ThreadWithActivity> = sqlx::query_as(concat!(
                "SELECT ",
                thread_columns!(),
                ", (
                    SELECT count(*) FROM runs o WHERE o.thread_id = t.id AND o.status = 'queued'
                ) AS queue_depth, (
                    SELECT o.status FROM runs o
                    WHERE o.thread_id = t.id AND o.status IN ('in_progress', 'requires_action', 'cancelling')
                ) AS active_status
                FROM threads t
                WHERE ",
                current_of_key!(),
            ))
            .bind(key.tenant.as_str())
            .bind(key.user.as_str())
            .bind(key.scope.kind())
            .bind(key.scope.name())
            .fetch_optional(&mut *connection)
            .await?;
            row.map(ThreadWithActivity::into_parts).transpose()
        }

        /// Implements [`Store::messages`](crate::store::Store::messages).
        pub(super) async fn messages(
            connection: &mut <$database as sqlx::Database>::Connection,
            key: &ConversationKey,
            page: &PageRequest<MessageId>,
        ) -> Result<Option<Page<Message>>, StoreError> {
            let found: Option<(Uuid, Option<i64>)> = sqlx::query_as(concat!(
                "SELECT t.id, (SELECT m.position FROM messages m WHERE m.id = $5 AND m.thread_id = t.id)
                FROM threads t
                WHERE ",
                current_of_key!(),
                ))
            .bind(key.tenant.as_str())
            .bind(key.user.as_str())
            .bind(key.scope.kind())
            .bind(key.scope.name())
            .bind(page.after.or(page.before).map(MessageId::uuid))
            .fetch_optional(&mut *connection)
            .await?;
            let Some((thread, position)) = found else {
                return Ok(None);
            };
            let span = Span::new(page, cursor(page, position)?);
            let statement = if span.upwards {
                concat!(
                    "SELECT ",
                    message_columns!(),
                    " FROM messages m WHERE m.thread_id = $1 AND m.position > $2 AND m.position < $3
                    ORDER BY m.position ASC LIMIT $4",
                )
            } else {
                concat!(
                    "SELECT ",
                    message_columns!(),
                    " FROM messages m WHERE m.thread_id = $1 AND m.position > $2 AND m.position < $3
                    ORDER BY m.position DESC LIMIT $4",
                )
            };
            let rows: Vec<MessageRow> = sqlx::query_as(statement)
                .bind(thread)
                .bind(span.above)
                .bind(span.below)
                .bind(span.fetch)
                .fetch_all(&mut *connection)
                .await?;
            span.page(rows).map(Some)
        }

        /// Implements [`Store::transcript`](crate::store::Store::transcript).
        pub(super) async fn transcript(
            connection: &mut <$database as sqlx::Database>::Connection,
            thread: ThreadId,
            after: i64,
            limit: u32,
        ) -> Result<Vec<Message>, StoreError> {
            let rows: Vec<MessageRow> = sqlx::query_as(concat!(
                "SELECT ",
                message_columns!(),
                " FROM messages m WHERE m.thread_id = $1 AND m.position > $2 ORDER BY m.position ASC LIMIT $3",
            ))
            .bind(thread.uuid())
            .bind(after)
            .bind(i64::from(limit))
            .fetch_all(&mut *connection)
            .await?;
            rows.into_iter().map(Message::try_from).collect()
        }

        /// Implements [`Store::runs`](crate::store::Store::runs).
        pub(super) async fn runs(
            connection: &mut <$database as sqlx::Database>::Connection,
            key: &ConversationKey,
            page: &PageRequest<RunId>,
        ) -> Result<Option<Page<Run>>, StoreError> {
            let found: Option<(Uuid, Option<i64>)> = sqlx::query_as(concat!(
                "SELECT t.id, (SELECT r.seq FROM runs r WHERE r.id = $5 AND r.thread_id = t.id)
                FROM threads t
                WHERE ",
                current_of_key!(),
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
                current_of_key!(),
                ))
            .bind(key.tenant.as_str())
            .bind(key.user.as_str())
            .bind(key.scope.kind())
            .bind(key.scope.name())
            .fetch_optional(&mut *connection)
            .await?;
            let Some(thread) = thread else { return Ok(None) };
            let rows: Vec<RunRow> = sqlx::query_as(concat!(
                "SELECT ",
                run_columns!(),
                " FROM runs r
                WHERE r.thread_id = $1 AND r.status IN ('queued', 'in_progress', 'requires_action', 'cancelling')
                ORDER BY r.seq",
            ))
            .bind(thread)
            .fetch_all(&mut *connection)
            .await?;
            rows.into_iter().map(Run::try_from).collect::<Result<_, _>>().map(Some)
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
                WHERE r.id = $1 AND r.fence = $2 AND r.status = 'in_progress'",
            ))
            .bind(lease.run_id.uuid())
            .bind(lease.fence)
            .fetch_optional(&mut *connection)
            .await?;
            let Some(both) = both else { return Ok(Claim::Lost) };
            let said: Vec<MessageRow> = sqlx::query_as(concat!(
                "SELECT ",
                message_columns!(),
                " FROM messages m WHERE m.run_id = $1 AND m.role = 'user' ORDER BY m.position",
            ))
            .bind(lease.run_id.uuid())
            .fetch_all(connection)
            .await?;
            let input = said.into_iter().map(InputMessage::try_from).collect::<Result<_, _>>()?;
            let turn = Turn { lease: *lease, thread: both.thread.try_into()?, run: both.run.try_into()?, input };
            Ok(Claim::Started(Box::new(turn)))
        }
    };
}
pub(super) use reads;

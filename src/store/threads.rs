//! Threads as callers and operators look at them and bring them along: what both backends do in the same words, as in
//! `read.rs`.

use uuid::{NoContext, Uuid};

use super::ThreadFilter;
use crate::domain::{ThreadId, Timestamp};

/// By how much the time in a thread's id may be ahead of the database's: ids come from the replicas' clocks.
const SKEW: chrono::TimeDelta = chrono::TimeDelta::days(1);

macro_rules! threads {
    (
        $database:ty,
        // The present.
        now = $now:expr,
        // Holds the row that a statement of a transaction reads.
        lock = $lock:literal
    ) => {
        use std::collections::BTreeSet;

        use serde_json::value::RawValue;
        use sqlx::QueryBuilder;
        use sqlx::types::Json;
        use uuid::Uuid;

        use crate::domain::{
            Context, ConversationKey, Lifecycle, Limits, MessageId, Page, PageRequest, Run, Thread, ThreadActivity, ThreadId,
            ThreadState, UpstreamThreadId, UserKey,
        };
        use crate::store::columns::{
            activity, current_of_key, lasting_of_key, newest_of_key, run_columns, thread_columns,
        };
        use crate::store::paging::Span;
        use crate::store::rows::{At, ReportRow, RunRow, ThreadWithActivity, json, millis};
        use crate::store::threads::{made_before, id_of};
        use crate::store::{Imported, ImportedMessage, ImportedThread, StoreError, ThreadFilter, ThreadName, ThreadReport};

        /// Implements [`Life::report`](crate::store::Life::report).
        pub(super) async fn report(
            connection: &mut <$database as sqlx::Database>::Connection,
            name: ThreadName<'_>,
        ) -> Result<Option<ThreadReport>, StoreError> {
            macro_rules! report_where {
                ($name:expr) => {
                    concat!(
                        "SELECT ",
                        thread_columns!(),
                        ", ",
                        activity!(),
                        ", ",
                        run_columns!(),
                        ", (
                            SELECT n.id FROM threads n WHERE n.previous_thread = t.id AND n.tenant = t.tenant
                            ORDER BY n.id DESC LIMIT 1
                        ) AS next_thread
                        FROM threads t
                        LEFT JOIN runs r ON r.id = (
                            SELECT l.id FROM runs l WHERE l.thread_id = t.id ORDER BY l.seq DESC LIMIT 1
                        )
                        WHERE ",
                        $name,
                    )
                };
            }
            let row: Option<ReportRow> = match name {
                ThreadName::Newest(key) => {
                    sqlx::query_as(report_where!(newest_of_key!()))
                        .bind(key.tenant.as_str())
                        .bind(key.user.as_str())
                        .bind(key.scope.kind())
                        .bind(key.scope.name())
                        .fetch_optional(connection)
                        .await?
                }
                ThreadName::Id(tenant, id) => {
                    sqlx::query_as(report_where!("t.id = $2 AND t.tenant = $1"))
                        .bind(tenant.as_str())
                        .bind(id.uuid())
                        .fetch_optional(connection)
                        .await?
                }
            };
            row.map(ThreadReport::try_from).transpose()
        }

        /// Implements [`Life::thread`](crate::store::Life::thread).
        pub(super) async fn thread(
            connection: &mut <$database as sqlx::Database>::Connection,
            id: ThreadId,
        ) -> Result<Option<Thread>, StoreError> {
            let row: Option<ThreadRow> =
                sqlx::query_as(concat!("SELECT ", thread_columns!(), " FROM threads t WHERE t.id = $1"))
                    .bind(id.uuid())
                    .fetch_optional(connection)
                    .await?;
            row.map(Thread::try_from).transpose()
        }

        /// Implements [`Life::threads`](crate::store::Life::threads).
        ///
        /// Each filter is either a condition on an index or one on the rows that are read in the order of ids anyway. What
        /// is a word of ours is written out, so that the indexes which hold some rows only are found.
        pub(super) async fn threads(
            connection: &mut <$database as sqlx::Database>::Connection,
            filter: &ThreadFilter,
            page: &PageRequest<ThreadId>,
        ) -> Result<Page<(Thread, ThreadActivity)>, StoreError> {
            let cursor = page.after.or(page.before);
            if let Some(id) = cursor {
                let known: bool = sqlx::query_scalar(
                    "SELECT EXISTS (
                        SELECT 1 FROM threads t
                        WHERE t.id = $1 AND t.tenant = $2 AND t.user_key = COALESCE($3, t.user_key)
                    )",
                )
                .bind(id.uuid())
                .bind(filter.tenant.as_str())
                .bind(filter.user.as_ref().map(UserKey::as_str))
                .fetch_one(&mut *connection)
                .await?;
                if !known {
                    return Err(StoreError::UnknownCursor);
                }
            }
            let span = Span::new(page, None);
            let mut query = listing(filter, cursor, &span);
            let rows: Vec<ThreadWithActivity> =
                query.build_query_as().persistent(false).fetch_all(connection).await?;
            span.page(rows)
        }

        /// The statement of a list that goes on behind a thread.
        pub(super) fn listing(
            filter: &ThreadFilter,
            cursor: Option<ThreadId>,
            span: &Span,
        ) -> QueryBuilder<$database> {
            let mut query = QueryBuilder::<$database>::new(concat!(
                "SELECT ",
                thread_columns!(),
                ", ",
                activity!(),
                " FROM threads t WHERE ",
            ));
            query.push("t.tenant = ").push_bind(filter.tenant.as_str());
            if let Some(user) = &filter.user {
                query.push(" AND t.user_key = ").push_bind(user.as_str());
            }
            if let Some(upstream) = &filter.upstream {
                query.push(" AND t.upstream = ").push_bind(upstream.as_str());
            }
            if let Some(lifecycle) = filter.lifecycle {
                query.push(" AND t.lifecycle = '").push(lifecycle.as_str()).push("'");
                if lifecycle != Lifecycle::Current {
                    query.push(" AND t.lifecycle <> 'current'");
                }
            }
            if let Some(state) = filter.state {
                query.push(match state {
                    ThreadState::Idle => {
                        " AND (
                            SELECT o.id FROM runs o
                            WHERE o.thread_id = t.id AND o.status IN ('in_progress', 'requires_action', 'cancelling')
                        ) IS NULL"
                    }
                    ThreadState::Active => {
                        " AND t.id IN (
                            SELECT o.thread_id FROM runs o
                            WHERE o.status IN ('in_progress', 'requires_action', 'cancelling')
                                AND o.status <> 'requires_action'
                        )"
                    }
                    ThreadState::RequiresAction => {
                        " AND t.id IN (
                            SELECT o.thread_id FROM runs o
                            WHERE o.status IN ('in_progress', 'requires_action', 'cancelling')
                                AND o.status = 'requires_action'
                        )"
                    }
                });
            }
            if let Some(before) = filter.created_before {
                query.push(" AND t.created_at < ").push_bind(At(before));
            }
            if let Some(since) = filter.inactive_since {
                query.push(" AND t.last_active_at < ").push_bind(At(since));
            }
            if let Some(bound) = made_before(filter) {
                query.push(" AND t.id < ").push_bind(bound);
            }
            if let Some(id) = cursor {
                query.push(if span.upwards { " AND t.id > " } else { " AND t.id < " }).push_bind(id.uuid());
            }
            query
                .push(if span.upwards { " ORDER BY t.id ASC LIMIT " } else { " ORDER BY t.id DESC LIMIT " })
                .push(span.fetch);
            query
        }

        /// Implements [`Life::runs_of`](crate::store::Life::runs_of).
        pub(super) async fn runs_of(
            connection: &mut <$database as sqlx::Database>::Connection,
            thread: ThreadId,
            after: i64,
            limit: u32,
        ) -> Result<Vec<Run>, StoreError> {
            let rows: Vec<RunRow> = sqlx::query_as(concat!(
                "SELECT ",
                run_columns!(),
                " FROM runs r WHERE r.thread_id = $1 AND r.seq > $2 ORDER BY r.seq LIMIT $3",
            ))
            .bind(thread.uuid())
            .bind(after)
            .bind(i64::from(limit))
            .fetch_all(connection)
            .await?;
            rows.into_iter().map(Run::try_from).collect()
        }

        /// Implements [`Life::unfinished_of`](crate::store::Life::unfinished_of).
        pub(super) async fn unfinished_of(
            connection: &mut <$database as sqlx::Database>::Connection,
            thread: ThreadId,
        ) -> Result<Vec<Run>, StoreError> {
            let rows: Vec<RunRow> = sqlx::query_as(concat!(
                "SELECT ",
                run_columns!(),
                " FROM runs r WHERE r.id",
                among_found!(unfinished_runs!(" = $1")),
                " ORDER BY r.seq",
            ))
            .bind(thread.uuid())
            .fetch_all(connection)
            .await?;
            rows.into_iter().map(Run::try_from).collect()
        }

        /// Implements [`Life::import_thread`](crate::store::Life::import_thread). The insertion is the one step; what is
        /// looked up before and after it says only what was there.
        pub(super) async fn import_thread(
            connection: &mut <$database as sqlx::Database>::Connection,
            thread: &ImportedThread,
        ) -> Result<Imported, StoreError> {
            if thread.id.is_none()
                && let Some(known) = known_by_key(connection, thread).await?
            {
                return Ok(Imported::Known(known));
            }
            let At(now) = sqlx::query_scalar(concat!("SELECT ", $now)).fetch_one(&mut *connection).await?;
            let created_at = thread.created_at.unwrap_or(now);
            let archived_at =
                (thread.lifecycle != Lifecycle::Current).then(|| thread.archived_at.unwrap_or(now));
            let last_active_at = thread.last_active_at.or(archived_at).unwrap_or(now).max(created_at);
            let limits = if thread.limits == Limits::NONE { thread.configured } else { thread.limits };
            let due_at = match archived_at {
                Some(_) => Some(now),
                None => limits.end(created_at, last_active_at),
            };
            let lifecycle = if archived_at.is_some() { Lifecycle::Archived } else { Lifecycle::Current };
            let id = thread.id.unwrap_or_else(|| id_of(created_at));
            let added = sqlx::query(
                "INSERT INTO threads (
                    id, tenant, user_key, scope_kind, scope_name, upstream, upstream_thread_id, lifecycle,
                    previous_thread, metadata, created_at, last_active_at, archived_at, max_age_ms, max_idle_ms, due_at
                )
                VALUES ($5, $1, $2, $3, $4, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)
                ON CONFLICT DO NOTHING",
            )
            .bind(thread.key.tenant.as_str())
            .bind(thread.key.user.as_str())
            .bind(thread.key.scope.kind())
            .bind(thread.key.scope.name())
            .bind(id.uuid())
            .bind(&thread.upstream)
            .bind(thread.upstream_thread_id.as_ref().map(UpstreamThreadId::as_str))
            .bind(lifecycle.as_str())
            .bind(thread.previous_thread.map(ThreadId::uuid))
            .bind(Json(&thread.metadata))
            .bind(At(created_at))
            .bind(At(last_active_at))
            .bind(archived_at.map(At))
            .bind(thread.limits.max_age.map(millis))
            .bind(thread.limits.max_idle.map(millis))
            .bind(due_at.map(At))
            .execute(&mut *connection)
            .await?;
            if added.rows_affected() == 1 {
                return Ok(Imported::Added(id));
            }
            match thread.id {
                Some(id) => {
                    if let Some(report) = report(connection, ThreadName::Id(&thread.key.tenant, id)).await? {
                        let same = report.thread.key == thread.key;
                        return Ok(if same { Imported::Known(id) } else { Imported::OtherKey });
                    }
                }
                // Somebody else added it meanwhile.
                None => {
                    if let Some(known) = known_by_key(connection, thread).await? {
                        return Ok(Imported::Known(known));
                    }
                }
            }
            match current(connection, &thread.key).await? {
                Some(current) => Ok(Imported::Taken(current)),
                // The id is another tenant's.
                None if thread.id.is_some() => Ok(Imported::OtherKey),
                None => Err(StoreError::Unavailable("the key's thread changed meanwhile".into())),
            }
        }

        /// The thread that one without an id is: of the same key and upstream, and with the same upstream thread, if it names
        /// one. A thread whose upstream thread was deleted since is still known by it.
        async fn known_by_key(
            connection: &mut <$database as sqlx::Database>::Connection,
            thread: &ImportedThread,
        ) -> Result<Option<ThreadId>, StoreError> {
            let found: Option<Uuid> = sqlx::query_scalar(concat!(
                "SELECT t.id FROM threads t WHERE ",
                lasting_of_key!(),
                " AND CASE
                    WHEN t.upstream <> $5 THEN false
                    WHEN $6 IS NOT NULL
                    THEN COALESCE(t.upstream_thread_id, t.removed ->> 'upstream_thread_id') = $6
                    ELSE t.lifecycle = $7 AND (t.lifecycle = 'current' OR $8 IS NULL OR t.created_at = $8)
                END
                ORDER BY t.id DESC
                LIMIT 1",
            ))
            .bind(thread.key.tenant.as_str())
            .bind(thread.key.user.as_str())
            .bind(thread.key.scope.kind())
            .bind(thread.key.scope.name())
            .bind(&thread.upstream)
            .bind(thread.upstream_thread_id.as_ref().map(UpstreamThreadId::as_str))
            .bind(thread.lifecycle.as_str())
            .bind(thread.created_at.map(At))
            .fetch_optional(connection)
            .await?;
            Ok(found.map(ThreadId::from_uuid))
        }

        async fn current(
            connection: &mut <$database as sqlx::Database>::Connection,
            key: &ConversationKey,
        ) -> Result<Option<ThreadId>, StoreError> {
            let found: Option<Uuid> =
                sqlx::query_scalar(concat!("SELECT t.id FROM threads t WHERE ", current_of_key!()))
                    .bind(key.tenant.as_str())
                    .bind(key.user.as_str())
                    .bind(key.scope.kind())
                    .bind(key.scope.name())
                    .fetch_optional(connection)
                    .await?;
            Ok(found.map(ThreadId::from_uuid))
        }

        /// Implements [`Life::import_messages`](crate::store::Life::import_messages).
        pub(super) async fn import_messages(
            connection: &mut <$database as sqlx::Database>::Connection,
            thread: ThreadId,
            messages: &[ImportedMessage],
        ) -> Result<u64, StoreError> {
            /// Messages in one statement.
            const AT_ONCE: usize = 100;
            let mut tx = super::write(connection).await?;
            let found: Option<(bool, i64)> = sqlx::query_as(concat!(
                "SELECT t.upstream_thread_id IS NOT NULL, t.last_position FROM threads t
                WHERE t.id = $1 AND t.lifecycle <> 'deleting'",
                $lock,
            ))
            .bind(thread.uuid())
            .fetch_optional(&mut *tx)
            .await?;
            let Some((has_upstream, mut position)) = found else { return Ok(0) };
            let by_default = if has_upstream { Context::Present } else { Context::Missing };
            let (mut added, mut missing) = (0, 0);
            for messages in messages.chunks(AT_ONCE) {
                let mut seen = known_messages(&mut tx, messages).await?;
                let fresh: Vec<_> = messages.iter().filter(|message| seen.insert(message.id)).collect();
                if fresh.is_empty() {
                    continue;
                }
                let mut query = QueryBuilder::<$database>::new(
                    "INSERT INTO messages (
                        thread_id, position, id, role, content, upstream_message_id, context, created_at
                    ) ",
                );
                let mut rows = Vec::with_capacity(fresh.len());
                for message in fresh {
                    position += 1;
                    // What is not known of it can be looked up for a run's messages only.
                    let context = message.context.filter(|context| *context != Context::Unknown).unwrap_or(by_default);
                    let content = RawValue::from_string(json(&message.content)?)
                        .map_err(|error| StoreError::Statement(error.into()))?;
                    rows.push((message, position, context, content));
                }
                query.push_values(rows, |mut row, (message, position, context, content)| {
                    row.push_bind(thread.uuid())
                        .push_bind(position)
                        .push_bind(message.id.uuid())
                        .push_bind(message.role.as_str())
                        .push_bind(Json(content));
                    row.push_bind(message.upstream_message_id.clone()).push_bind(context.as_str());
                    row.push("COALESCE(")
                        .push_bind_unseparated(message.created_at.map(At))
                        .push_unseparated(concat!(", ", $now, ")"));
                });
                query.push(" ON CONFLICT (id) DO NOTHING RETURNING context");
                let contexts: Vec<String> =
                    query.build_query_scalar().persistent(false).fetch_all(&mut *tx).await?;
                added += contexts.len();
                missing += contexts.iter().filter(|context| *context == Context::Missing.as_str()).count();
            }
            if added > 0 {
                sqlx::query(
                    "UPDATE threads SET message_count = message_count + $2, last_position = $3, backlog = backlog + $4
                    WHERE id = $1",
                )
                .bind(thread.uuid())
                .bind(i64::try_from(added).unwrap_or(i64::MAX))
                .bind(position)
                .bind(i64::try_from(missing).unwrap_or(i64::MAX))
                .execute(&mut *tx)
                .await?;
            }
            tx.commit().await?;
            Ok(added as u64)
        }

        /// Those of these messages that are in a transcript.
        async fn known_messages(
            connection: &mut <$database as sqlx::Database>::Connection,
            messages: &[ImportedMessage],
        ) -> Result<BTreeSet<MessageId>, StoreError> {
            let mut query = QueryBuilder::<$database>::new("SELECT m.id FROM messages m WHERE m.id IN (");
            let mut ids = query.separated(", ");
            for message in messages {
                ids.push_bind(message.id.uuid());
            }
            query.push(")");
            let known: Vec<Uuid> = query.build_query_scalar().persistent(false).fetch_all(connection).await?;
            Ok(known.into_iter().map(MessageId::from_uuid).collect())
        }
    };
}
pub(super) use threads;

/// A bound above the ids of all threads that a filter by time means.
pub(super) fn made_before(filter: &ThreadFilter) -> Option<Uuid> {
    // What was not used since was not made since either.
    let before = [filter.created_before, filter.inactive_since].into_iter().flatten().min()?;
    let millis = u128::try_from(before.checked_add_signed(SKEW)?.timestamp_millis()).unwrap_or(0);
    Some(Uuid::from_u128(millis << 80))
}

/// A new id of a thread that was made at a time, so that ids sort by age.
pub(super) fn id_of(created_at: Timestamp) -> ThreadId {
    let seconds = u64::try_from(created_at.timestamp()).unwrap_or(0);
    let time = uuid::Timestamp::from_unix(NoContext, seconds, created_at.timestamp_subsec_nanos());
    ThreadId::from_uuid(Uuid::new_v7(time))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::TenantKey;

    #[test]
    fn the_bound_of_a_time_is_above_the_ids_of_it_and_below_later_ones() {
        let time: Timestamp = "2026-11-22T09:00:00.123Z".parse().unwrap();
        let filter = ThreadFilter {
            tenant: TenantKey::default(),
            user: None,
            upstream: None,
            lifecycle: None,
            state: None,
            created_before: Some(time),
            inactive_since: None,
        };
        let bound = made_before(&filter).unwrap();
        assert!(id_of(time).uuid() < bound);
        assert!(id_of(time + SKEW - chrono::TimeDelta::milliseconds(1)).uuid() < bound);
        assert!(id_of(time + SKEW + chrono::TimeDelta::milliseconds(1)).uuid() > bound);
        assert_eq!(made_before(&ThreadFilter { created_before: None, ..filter }), None);
    }
}

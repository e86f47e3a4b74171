//! Decoding rows into values of the domain, and encoding values, for both engines.
//!
//! Statements name columns `t_…` (thread), `r_…` (run) and `m_…` (message), so that one row can
//! have all three.

use std::fmt::Write as _;
use std::str::FromStr;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::encode::IsNull;
use sqlx::error::BoxDynError;
use sqlx::postgres::{PgArgumentBuffer, PgTypeInfo, PgValueRef, Postgres};
use sqlx::sqlite::{Sqlite, SqliteArgumentsBuffer, SqliteTypeInfo, SqliteValueRef};
use sqlx::types::Json;
use sqlx::{ColumnIndex, Decode, Encode, FromRow, Row, Type};
use uuid::Uuid;

use super::errors::StoreError;
use crate::domain::{
    ContentPart, ConversationKey, Limits, LoggedEvent, Message, MessageId, Metadata, Removed,
    RequiredAction, Run, RunError, RunId, RunRecovery, RunStatus, Scope, TenantKey, Thread,
    ThreadActivity, ThreadId, ThreadState, Timestamp, Ttl, UnsettledRun, UpstreamRunId,
    UpstreamThreadId, Usage, UserKey,
};

/// A point in time: `timestamptz` in Postgres, milliseconds since 1970 in SQLite.
pub(super) struct At(pub(super) Timestamp);

impl Type<Postgres> for At {
    fn type_info() -> PgTypeInfo {
        <DateTime<Utc> as Type<Postgres>>::type_info()
    }
}

impl Decode<'_, Postgres> for At {
    fn decode(value: PgValueRef<'_>) -> Result<Self, BoxDynError> {
        <DateTime<Utc> as Decode<'_, Postgres>>::decode(value).map(Self)
    }
}

impl Encode<'_, Postgres> for At {
    fn encode_by_ref(&self, buffer: &mut PgArgumentBuffer) -> Result<IsNull, BoxDynError> {
        <DateTime<Utc> as Encode<'_, Postgres>>::encode_by_ref(&self.0, buffer)
    }
}

impl Type<Sqlite> for At {
    fn type_info() -> SqliteTypeInfo {
        <i64 as Type<Sqlite>>::type_info()
    }
}

impl Decode<'_, Sqlite> for At {
    fn decode(value: SqliteValueRef<'_>) -> Result<Self, BoxDynError> {
        let millis = <i64 as Decode<'_, Sqlite>>::decode(value)?;
        DateTime::from_timestamp_millis(millis)
            .map(Self)
            .ok_or_else(|| format!("time {millis}").into())
    }
}

impl Encode<'_, Sqlite> for At {
    fn encode_by_ref(&self, buffer: &mut SqliteArgumentsBuffer) -> Result<IsNull, BoxDynError> {
        <i64 as Encode<'_, Sqlite>>::encode_by_ref(&self.0.timestamp_millis(), buffer)
    }
}

#[derive(FromRow)]
#[expect(clippy::struct_field_names, reason = "the names of the columns")]
pub(super) struct ThreadRow {
    t_id: Uuid,
    t_tenant: String,
    t_user_key: String,
    t_scope_kind: String,
    t_scope_name: String,
    t_upstream: String,
    t_upstream_thread_id: Option<String>,
    t_lifecycle: String,
    t_previous_thread_id: Option<Uuid>,
    t_metadata: Json<Metadata>,
    t_message_count: i64,
    t_run_count: i64,
    t_created_at: At,
    t_last_active_at: At,
    t_max_age_ms: Option<i64>,
    t_max_idle_ms: Option<i64>,
    t_archived_at: Option<At>,
    t_deletion: Option<String>,
    t_rollover_pending: bool,
    t_carried_messages: i64,
    t_upstream_cleanup: Option<Json<Removed>>,
    t_unsynced_messages: i64,
    t_unsettled_run: Option<Json<UnsettledRun>>,
    t_input_tokens: i64,
    t_cached_input_tokens: i64,
    t_output_tokens: i64,
    t_reasoning_tokens: i64,
    t_context_tokens: i64,
}

impl TryFrom<ThreadRow> for Thread {
    type Error = StoreError;

    fn try_from(row: ThreadRow) -> Result<Self, StoreError> {
        Ok(Self {
            id: ThreadId::from_uuid(row.t_id),
            key: ConversationKey {
                tenant: TenantKey::try_from(row.t_tenant).map_err(|_| corrupt("tenant"))?,
                user: UserKey::try_from(row.t_user_key).map_err(|_| corrupt("user key"))?,
                scope: Scope::from_parts(&row.t_scope_kind, row.t_scope_name)
                    .ok_or_else(|| corrupt("scope"))?,
            },
            upstream: row.t_upstream,
            upstream_thread_id: row.t_upstream_thread_id.map(UpstreamThreadId),
            lifecycle: word(&row.t_lifecycle)?,
            previous_thread: row.t_previous_thread_id.map(ThreadId::from_uuid),
            metadata: row.t_metadata.0,
            message_count: row.t_message_count,
            run_count: row.t_run_count,
            created_at: row.t_created_at.0,
            last_active_at: row.t_last_active_at.0,
            limits: Limits {
                max_age: row.t_max_age_ms.map(duration),
                max_idle: row.t_max_idle_ms.map(duration),
            },
            archived_at: row.t_archived_at.map(|at| at.0),
            deletion: row.t_deletion.as_deref().map(word).transpose()?,
            rolls: row.t_rollover_pending,
            carried: row.t_carried_messages,
            removed: row
                .t_upstream_cleanup
                .map(|json| json.0)
                .unwrap_or_default(),
            unsynced_messages: row.t_unsynced_messages,
            unsettled_run: row.t_unsettled_run.map(|json| json.0),
            usage: usage_of(
                row.t_input_tokens,
                row.t_cached_input_tokens,
                row.t_output_tokens,
                row.t_reasoning_tokens,
            ),
            context_tokens: row.t_context_tokens,
        })
    }
}

/// Returns the usage of a thread. Its cached and reasoning tokens are zero if no upstream counts
/// them.
fn usage_of(input: i64, cached: i64, output: i64, reasoning: i64) -> Usage {
    let [input, cached, output, reasoning] =
        [input, cached, output, reasoning].map(|tokens| u64::try_from(tokens).unwrap_or(0));
    Usage {
        input_tokens: input,
        output_tokens: output,
        total_tokens: input.saturating_add(output),
        cached_input_tokens: Some(cached),
        reasoning_tokens: Some(reasoning),
    }
}

#[derive(FromRow)]
#[expect(clippy::struct_field_names, reason = "the names of the columns")]
pub(super) struct RunRow {
    r_id: Uuid,
    r_thread_id: Uuid,
    r_seq: i64,
    r_status: String,
    r_strategy: String,
    r_assistant: String,
    r_metadata: Json<Metadata>,
    pub(super) r_fence: i64,
    r_rerun: Option<String>,
    r_upstream_run_id: Option<String>,
    r_required_action: Option<Json<RequiredAction>>,
    r_error: Option<Json<RunError>>,
    r_usage: Option<Json<Usage>>,
    r_recovery: Option<Json<RunRecovery>>,
    r_created_at: At,
    r_started_at: Option<At>,
    r_finished_at: Option<At>,
    r_deadline_at: Option<At>,
    r_rollback_pending: bool,
}

impl RunRow {
    pub(super) fn status(&self) -> Result<RunStatus, StoreError> {
        word(&self.r_status)
    }
}

impl TryFrom<RunRow> for Run {
    type Error = StoreError;

    fn try_from(row: RunRow) -> Result<Self, StoreError> {
        Ok(Self {
            id: RunId::from_uuid(row.r_id),
            thread_id: ThreadId::from_uuid(row.r_thread_id),
            seq: row.r_seq,
            status: word(&row.r_status)?,
            strategy: word(&row.r_strategy)?,
            assistant: row.r_assistant,
            metadata: row.r_metadata.0,
            rerun: row.r_rerun.as_deref().map(word).transpose()?,
            upstream_run_id: row.r_upstream_run_id.map(UpstreamRunId),
            required_action: row.r_required_action.map(|json| json.0),
            error: row.r_error.map(|json| json.0),
            usage: row.r_usage.map(|json| json.0),
            recovery: row.r_recovery.map(|json| json.0),
            created_at: row.r_created_at.0,
            started_at: row.r_started_at.map(|at| at.0),
            finished_at: row.r_finished_at.map(|at| at.0),
            deadline_at: row.r_deadline_at.map(|at| at.0),
            discarded: row.r_rollback_pending,
        })
    }
}

#[derive(FromRow)]
#[expect(clippy::struct_field_names, reason = "the names of the columns")]
pub(super) struct MessageRow {
    pub(super) m_id: Uuid,
    m_thread_id: Uuid,
    m_position: i64,
    m_role: String,
    pub(super) m_content: Json<Vec<ContentPart>>,
    m_run_id: Option<Uuid>,
    m_upstream_message_id: Option<String>,
    m_upstream_sync: String,
    m_run_outcome: Option<String>,
    m_created_at: At,
}

impl TryFrom<MessageRow> for Message {
    type Error = StoreError;

    fn try_from(row: MessageRow) -> Result<Self, StoreError> {
        Ok(Self {
            id: MessageId::from_uuid(row.m_id),
            thread_id: ThreadId::from_uuid(row.m_thread_id),
            position: row.m_position,
            role: word(&row.m_role)?,
            content: row.m_content.0,
            run_id: row.m_run_id.map(RunId::from_uuid),
            upstream_message_id: row.m_upstream_message_id,
            sync: word(&row.m_upstream_sync)?,
            ended: row.m_run_outcome.as_deref().map(word).transpose()?,
            created_at: row.m_created_at.0,
        })
    }
}

/// The activity of a thread, as a statement returns it.
#[derive(FromRow)]
pub(super) struct ActivityRow {
    queue_depth: i64,
    active_status: Option<String>,
}

impl TryFrom<ActivityRow> for ThreadActivity {
    type Error = StoreError;

    fn try_from(row: ActivityRow) -> Result<Self, StoreError> {
        let active = row.active_status.as_deref().map(word).transpose()?;
        Ok(Self {
            state: ThreadState::of(active),
            queue_depth: row.queue_depth,
        })
    }
}

#[derive(FromRow)]
pub(super) struct ThreadWithActivity {
    #[sqlx(flatten)]
    thread: ThreadRow,
    #[sqlx(flatten)]
    activity: ActivityRow,
}

impl ThreadWithActivity {
    pub(super) fn into_parts(self) -> Result<(Thread, ThreadActivity), StoreError> {
        Ok((self.thread.try_into()?, self.activity.try_into()?))
    }
}

impl TryFrom<ThreadWithActivity> for (Thread, ThreadActivity) {
    type Error = StoreError;

    fn try_from(row: ThreadWithActivity) -> Result<Self, StoreError> {
        row.into_parts()
    }
}

/// Part of a row that an outer join may leave empty. Its id is NULL then.
pub(super) struct Found<T>(pub(super) Option<T>);

/// A part of a row, with the name of its id's column.
pub(super) trait HasId {
    const ID: &'static str;
}

impl HasId for RunRow {
    const ID: &'static str = "r_id";
}

impl HasId for MessageRow {
    const ID: &'static str = "m_id";
}

impl HasId for ThreadAndRun {
    const ID: &'static str = "r_id";
}

impl<'r, R, T> FromRow<'r, R> for Found<T>
where
    R: Row,
    &'static str: ColumnIndex<R>,
    T: HasId + FromRow<'r, R>,
    Option<Uuid>: Decode<'r, R::Database> + Type<R::Database>,
{
    fn from_row(row: &'r R) -> sqlx::Result<Self> {
        let found = row.try_get::<Option<Uuid>, _>(T::ID)?.is_some();
        Ok(Self(if found { Some(T::from_row(row)?) } else { None }))
    }
}

/// A run, and its reply if it has one.
#[derive(FromRow)]
pub(super) struct RunWithReply {
    #[sqlx(flatten)]
    run: RunRow,
    #[sqlx(flatten)]
    reply: Found<MessageRow>,
}

impl RunWithReply {
    pub(super) fn into_parts(self) -> Result<(Run, Option<Message>), StoreError> {
        Ok((
            self.run.try_into()?,
            self.reply.0.map(Message::try_from).transpose()?,
        ))
    }
}

/// A run and its thread.
#[derive(FromRow)]
pub(super) struct ThreadAndRun {
    #[sqlx(flatten)]
    pub(super) thread: ThreadRow,
    #[sqlx(flatten)]
    pub(super) run: RunRow,
}

impl From<At> for Timestamp {
    fn from(at: At) -> Self {
        at.0
    }
}

/// Returns the mark for the messages of a run that ended with this status. Messages of a completed
/// run have none.
pub(super) fn ended(status: RunStatus) -> Option<&'static str> {
    (status != RunStatus::Completed).then_some(status.as_str())
}

/// Returns the JSON text of a value. NUL characters, which Postgres cannot store, become U+FFFD: a
/// reply with one must not keep its run from ending. A value that was read back gives the same
/// text again, so texts can be compared.
pub(super) fn json<T: Serialize>(value: &T) -> Result<String, StoreError> {
    nulless_json(value, "\u{fffd}")
}

/// Returns the JSON text of events. NUL characters become U+001A, which is as long: the offsets of
/// events count bytes.
pub(super) fn log_json(events: &[LoggedEvent]) -> Result<String, StoreError> {
    nulless_json(&events, "\\u001a")
}

fn nulless_json<T: Serialize>(value: &T, substitute: &str) -> Result<String, StoreError> {
    let text = serde_json::to_string(value).map_err(|error| StoreError::Statement(error.into()))?;
    Ok(if text.contains("\\u0000") {
        without_nul(&text, substitute)
    } else {
        text
    })
}

/// Returns an upstream's id of a run as a parameter. It leaves out an id with a NUL character,
/// which Postgres cannot store. Such an id would fail the statement for all its runs.
pub(super) fn storable(id: Option<&UpstreamRunId>) -> Option<&str> {
    id.map(UpstreamRunId::as_str)
        .filter(|id| !id.contains('\0'))
}

/// Returns a duration in milliseconds, at most a thousand years, so that a statement can add it to
/// a time.
pub(super) fn millis(duration: Duration) -> i64 {
    const MAX: i64 = 1000 * 365 * 24 * 3600 * 1000;
    i64::try_from(duration.as_millis()).unwrap_or(MAX).min(MAX)
}

/// Returns the caller's limit for a thread as two parameters, of which at most one is set:
/// milliseconds from now, and milliseconds from the last activity.
pub(super) fn ttl_millis(ttl: Option<Ttl>) -> (Option<i64>, Option<i64>) {
    match ttl {
        Some(Ttl::FromNow(ttl)) => (Some(millis(ttl)), None),
        Some(Ttl::FromLastActivity(ttl)) => (None, Some(millis(ttl))),
        None => (None, None),
    }
}

/// The inverse of [`millis`].
fn duration(millis: i64) -> Duration {
    Duration::from_millis(millis.try_into().unwrap_or(0))
}

/// Returns bytes in hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}

pub(super) fn corrupt(what: &str) -> StoreError {
    StoreError::Corrupt(what.to_owned())
}

pub(super) fn word<T: FromStr<Err = String>>(text: &str) -> Result<T, StoreError> {
    text.parse()
        .map_err(|unknown: String| StoreError::Corrupt(format!("the unknown word `{unknown}`")))
}

/// Replaces the escape `\u0000` in a JSON text, but not text that only looks like it behind a
/// `\\`.
fn without_nul(json: &str, substitute: &str) -> String {
    let mut out = String::with_capacity(json.len());
    let mut rest = json;
    while let Some(at) = rest.find('\\') {
        // An escape has at least two characters, all ASCII.
        let (escape, next) = if rest[at..].starts_with("\\u0000") {
            (substitute, 6)
        } else {
            (&rest[at..at + 2], 2)
        };
        out.push_str(&rest[..at]);
        out.push_str(escape);
        rest = &rest[at + next..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_real_nul_characters_are_replaced() {
        let text = "a\0b\\u0000c\\\0\"\\\\\0";
        let back: String = serde_json::from_str(&json(&text).unwrap()).unwrap();
        assert_eq!(back, text.replace('\0', "\u{fffd}"));
        assert_eq!(json(&back).unwrap(), json(&text).unwrap());

        let events = [LoggedEvent::Delta(text.into())];
        let back: Vec<LoggedEvent> = serde_json::from_str(&log_json(&events).unwrap()).unwrap();
        assert_eq!(
            back,
            [LoggedEvent::Delta(text.replace('\0', "\u{1a}").into())]
        );
        assert_eq!(back[0].units(), events[0].units());
    }

    #[test]
    fn a_duration_without_end_is_bounded() {
        assert_eq!(millis(Duration::from_millis(1500)), 1500);
        assert_eq!(millis(Duration::MAX), 31_536_000_000_000);
    }
}

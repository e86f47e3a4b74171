//! Ending a run.

use std::sync::Arc;

use async_trait::async_trait;
use serde::Serialize;
use serde_json::value::RawValue;
use sqlx::{ColumnIndex, Decode, FromRow, Row, Type};
use uuid::Uuid;

use super::backend::Backend;
use super::errors::NotWritten;
use super::errors::StoreError;
use super::lane::{Answer, Answers, Item, Write};
use super::pool::Connection;
use super::redaction::Redaction;
use super::rows::{HasId, RunWithReply, ThreadWithActivity, corrupt, ended, json, log_json};
use super::statement::Statement;
use super::values::RunLease;
use crate::domain::{
    ContentPart, EventBatch, Message, MessageId, Run, RunError, RunStatus, TenantKey, Thread,
    ThreadActivity, UnsettledRun, UpstreamRunId, UpstreamSync, UpstreamThreadId, Usage,
};

static FINISH: Statement = Statement::for_each_engine(
    "finish.finish",
    "SELECT * FROM {function finish}(:items, :alone)",
    include_str!("sql/finish.sqlite.sql"),
);

pub(super) static STATEMENTS: &[&Statement] = &[&FINISH];

/// A run that is to end, with its lease.
pub(super) struct Ending {
    pub(super) lease: RunLease,
    pub(super) end: Arc<RunEnd>,
}

impl Item for Ending {
    type Answer = Closing;

    fn tenant(&self) -> Option<&TenantKey> {
        None
    }

    fn bytes(&self) -> usize {
        let reply = self
            .end
            .reply
            .as_ref()
            .map_or(0, |reply| reply.content.iter().map(ContentPart::size).sum());
        reply + usize::try_from(self.end.events.end() - self.end.events.first).unwrap_or(0)
    }

    fn meets(&self, other: &Self) -> bool {
        self.lease.run_id == other.lease.run_id
    }

    fn may_change(_: &Closing) -> bool {
        false
    }
}

/// Writes the ends of a lane.
pub(super) struct Ends {
    pub(super) backend: Arc<Backend>,
    pub(super) redaction: Redaction,
}

#[async_trait]
impl Write for Ends {
    type Item = Ending;

    async fn together(&self, items: &[Ending]) -> Result<Answers<Ending>, NotWritten> {
        let mut c = self
            .backend
            .vital_writer()
            .await
            .map_err(NotWritten::Unsent)?;
        c.begin_script().await?;
        let ends = items.iter().map(|it| (&it.lease, &*it.end));
        let answers = finish_all(&mut c, self.redaction, ends, false).await?;
        c.commit_script().await?;
        Ok(answers)
    }

    async fn alone(&self, Ending { lease, end }: &Ending) -> Answer<Ending> {
        let mut c = self
            .backend
            .vital_writer()
            .await
            .map_err(NotWritten::Unsent)?;
        c.begin_script().await?;
        let closing = finish_in(&mut c, self.redaction, lease, end).await?;
        c.commit_script().await?;
        Ok(closing)
    }
}

/// Ends one run, and waits for the locks of its rows.
pub(super) async fn finish_in(
    c: &mut Connection,
    redaction: Redaction,
    lease: &RunLease,
    end: &RunEnd,
) -> Result<Closing, NotWritten> {
    let mut answers = finish_all(c, redaction, std::iter::once((lease, end)), true).await?;
    answers
        .pop()
        .flatten()
        .ok_or_else(|| corrupt("no outcome of a run's end").into())
}

async fn finish_all<'a>(
    c: &mut Connection,
    redaction: Redaction,
    items: impl ExactSizeIterator<Item = (&'a RunLease, &'a RunEnd)> + Clone + Send,
    alone: bool,
) -> Result<Answers<Ending>, NotWritten> {
    let fields = items
        .clone()
        .map(|(lease, end)| Fields::of(redaction, lease, end))
        .collect::<Result<Vec<_>, _>>()?;
    let rows: Vec<EndedRow> = c.batch(&FINISH, &fields, alone).await?;
    let answer = |(row, (_, end)): (EndedRow, (_, &RunEnd))| row.closing(end);
    Ok(rows
        .into_iter()
        .zip(items)
        .map(answer)
        .collect::<Result<_, StoreError>>()?)
}

/// The fields of an item: see finish.function.sql.
#[derive(Serialize)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a parameter of its own"
)]
struct Fields<'a> {
    run: Uuid,
    fence: i64,
    status: &'a str,
    error: Option<Box<RawValue>>,
    usage: Option<Box<RawValue>>,
    upstream_run: Option<&'a str>,
    upstream_thread: Option<&'a str>,
    reply: Option<Uuid>,
    reply_content: Option<Box<RawValue>>,
    reply_upstream_id: Option<&'a str>,
    reply_sync: Option<&'a str>,
    context_tokens: Option<u64>,
    said_sync: &'a str,
    run_outcome: Option<&'a str>,
    marks_said: bool,
    synced: bool,
    unsettled_run: Option<Box<RawValue>>,
    discard: bool,
    keeps_said: bool,
    first_offset: i64,
    events: Option<Box<RawValue>>,
    end_offset: i64,
    drops_log: bool,
    unacknowledged: u32,
}

impl<'a> Fields<'a> {
    fn of(redaction: Redaction, lease: &RunLease, end: &'a RunEnd) -> Result<Self, StoreError> {
        let reply = end.reply.as_ref().filter(|_| !end.discard);
        let events = redaction.events(&end.events);
        let drops_log = end.drops_log && redaction.keeps_content();
        Ok(Self {
            run: lease.run_id.uuid(),
            fence: lease.fence,
            status: end.status.as_str(),
            error: raw(end.error.as_ref())?,
            usage: raw(end.usage.as_ref())?,
            context_tokens: end.context_tokens,
            upstream_run: end.upstream_run_id.as_ref().map(UpstreamRunId::as_str),
            upstream_thread: end
                .upstream_thread_id
                .as_ref()
                .map(UpstreamThreadId::as_str),
            reply: reply.map(|reply| reply.id.uuid()),
            reply_content: raw(reply.map(|reply| redaction.parts(&reply.content)).as_ref())?,
            reply_upstream_id: reply.and_then(|reply| reply.upstream_message_id.as_deref()),
            reply_sync: reply.map(|reply| redaction.sync(reply.sync).as_str()),
            said_sync: redaction.sync(end.said).as_str(),
            run_outcome: ended(end.status),
            marks_said: end.marks_said(),
            synced: end.synced,
            unsettled_run: raw(end
                .unsettled_run
                .as_ref()
                .map(|left| redaction.unsettled_run(left))
                .as_ref())?,
            discard: end.discard,
            keeps_said: end.keeps_said,
            first_offset: events.first,
            events: if drops_log {
                None
            } else {
                Some(raw_text(log_json(&events.events)?)?)
            },
            end_offset: events.end(),
            drops_log,
            unacknowledged: end.unacknowledged_requests,
        })
    }
}

/// Returns a value as JSON that the database can store.
fn raw<T: Serialize>(value: Option<&T>) -> Result<Option<Box<RawValue>>, StoreError> {
    value.map(|value| raw_text(json(value)?)).transpose()
}

fn raw_text(text: String) -> Result<Box<RawValue>, StoreError> {
    RawValue::from_string(text).map_err(|error| StoreError::Statement(error.into()))
}

/// A row that reports the outcome of an end: see finish.function.sql. Only a finished end has more
/// than an outcome.
struct EndedRow {
    outcome: String,
    finished: Option<FinishedRow>,
}

impl<'r, R> FromRow<'r, R> for EndedRow
where
    R: Row,
    &'static str: ColumnIndex<R>,
    String: Decode<'r, R::Database> + Type<R::Database>,
    FinishedRow: FromRow<'r, R>,
{
    fn from_row(row: &'r R) -> sqlx::Result<Self> {
        let outcome: String = row.try_get("outcome")?;
        let finished = if outcome == "finished" {
            Some(FinishedRow::from_row(row)?)
        } else {
            None
        };
        Ok(Self { outcome, finished })
    }
}

impl EndedRow {
    /// Returns the outcome; `None`: the item is held. A reply is returned as the caller gave it,
    /// also if its content is not stored.
    fn closing(self, end: &RunEnd) -> Result<Option<Closing>, StoreError> {
        let row = match (&*self.outcome, self.finished) {
            (_, Some(row)) => row,
            ("held", None) => return Ok(None),
            ("must_discard", None) => return Ok(Some(Closing::MustDiscard)),
            ("lost", None) => return Ok(Some(Closing::Lost)),
            (other, None) => return Err(StoreError::Corrupt(format!("a run's end `{other}`"))),
        };
        let mut finished = Finished::try_from(row)?;
        if let (Some(message), Some(reply)) = (&mut finished.message, &end.reply)
            && message.id == reply.id
            && message.content.is_empty()
        {
            message.content.clone_from(&reply.content);
        }
        Ok(Some(Closing::Finished(Box::new(finished))))
    }
}

#[derive(FromRow)]
pub(super) struct FinishedRow {
    #[sqlx(flatten)]
    thread: ThreadWithActivity,
    #[sqlx(flatten)]
    run: RunWithReply,
}

impl TryFrom<FinishedRow> for Finished {
    type Error = StoreError;

    fn try_from(row: FinishedRow) -> Result<Self, StoreError> {
        let (thread, activity) = row.thread.into_parts()?;
        let (run, message) = row.run.into_parts()?;
        Ok(Self {
            thread,
            activity,
            run,
            message,
        })
    }
}

impl HasId for FinishedRow {
    const ID: &'static str = "r_id";
}

/// The end of a run.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub struct RunEnd {
    /// A final status.
    pub status: RunStatus,
    pub error: Option<RunError>,
    pub usage: Option<Usage>,
    /// Tokens of the run's last round, input and output.
    pub context_tokens: Option<u64>,
    pub upstream_run_id: Option<UpstreamRunId>,
    /// The number of requests that may have left something upstream under an id that the gateway
    /// [never received](super::Store::unacknowledged_requests). Requests that were [sent
    /// again](super::Store::sends_again) are not counted here.
    pub unacknowledged_requests: u32,
    /// The thread's upstream thread from now on, if this run changed it.
    pub upstream_thread_id: Option<UpstreamThreadId>,
    /// The reply: the whole of it or, if the run did not complete, the part that arrived.
    pub reply: Option<Reply>,
    /// The upstream state of the run's user messages.
    pub said: UpstreamSync,
    /// All earlier messages that are not withheld are upstream now. Either the [unsynced
    /// messages](super::Store::unsynced_messages) were sent with the run, or the run began a new chain.
    /// Missing and unknown messages become present, and an older unsettled run is void.
    pub synced: bool,
    /// The part of the run's traces upstream that is not known. `None`: the thread keeps its
    /// unsettled run.
    pub unsettled_run: Option<UnsettledRun>,
    /// The run's messages are to be removed. Nothing of them is left upstream, or `unsettled_run`
    /// says what is.
    pub discard: bool,
    /// The user's messages stay even then, because an earlier run brought them into the transcript.
    pub keeps_said: bool,
    /// The rest of the run's log.
    pub events: EventBatch,
    /// The other rows say all that the log says: that the run has started, and the text of its
    /// reply. So `events` is empty, and no log is stored. The part that may have been
    /// [recorded](super::Store::record), up to `events.first`, is removed.
    pub drops_log: bool,
}

impl RunEnd {
    /// Returns whether the run's user messages have another state than at its start.
    fn marks_said(&self) -> bool {
        let as_begun = self.said == UpstreamSync::Present && self.status == RunStatus::Completed;
        !as_begun && (!self.discard || self.keeps_said)
    }
}

/// An assistant's message.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    pub id: MessageId,
    pub content: Vec<ContentPart>,
    pub upstream_message_id: Option<String>,
    pub sync: UpstreamSync,
}

/// The outcome of an attempt to end a run.
#[derive(Clone, Debug, PartialEq)]
pub enum Closing {
    Finished(Box<Finished>),
    /// Nothing changed: the run is marked to be discarded, and the end does not discard it.
    MustDiscard,
    /// Nothing changed: the lease was lost.
    Lost,
}

/// A run that has ended, and its thread afterwards.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    pub thread: Thread,
    pub activity: ThreadActivity,
    pub run: Run,
    pub message: Option<Message>,
}

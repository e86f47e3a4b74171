//! Admission: a message becomes a run, usually in one statement. Also: idempotency keys.
//!
//! Every admission locks the thread's row before it uses an idempotency key. So the second of two
//! requests with the same key finds the first one's use. Neither waits for the other while it
//! holds a lock that the other needs.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::Serialize;
use serde_json::value::RawValue;
use sqlx::FromRow;
use uuid::Uuid;

use super::backend::Backend;
use super::errors::Failed;
use super::errors::NotWritten;
use super::errors::StoreError;
use super::lane::{Answer, Answers, Item, Write};
use super::pool::Connection;
use super::redaction::Redaction;
use super::rows::{Found, RunRow, ThreadAndRun, ThreadRow, corrupt, hex, json, millis, ttl_millis};
use super::statement::Statement;
use super::values::{Idempotency, InputMessage, ORPHAN_AFTER, RunLease, StartedRun};
use crate::domain::{
    ContentPart, ConversationKey, Limits, Metadata, MultitaskStrategy, OrphanId, ReplicaId, Run,
    RunId, RunStatus, TenantKey, Thread, ThreadId, Ttl,
};

static ADMIT: Statement = Statement::for_each_engine(
    "admission.admit",
    "SELECT * FROM {function admit}(:items, :alone)",
    include_str!("sql/admit.sqlite.sql"),
);

pub(super) static STATEMENTS: &[&Statement] = &[&ADMIT];

/// The most attempts of one admission while the key's thread keeps changing.
const MAX_ATTEMPTS: u32 = 10;

impl Item for Arc<Admission> {
    type Answer = Admitted;

    fn tenant(&self) -> Option<&TenantKey> {
        Some(&self.key.tenant)
    }

    fn bytes(&self) -> usize {
        self.message.content.iter().map(ContentPart::size).sum()
    }

    fn meets(&self, other: &Self) -> bool {
        self.key == other.key
    }

    fn may_change(answer: &Admitted) -> bool {
        matches!(
            answer,
            Admitted::Busy
                | Admitted::OtherUpstream(_)
                | Admitted::Repeated
                | Admitted::NoThread
                | Admitted::NoMessage
        )
    }
}

/// Writes the admissions of a lane.
pub(super) struct Admissions {
    pub(super) backend: Arc<Backend>,
    pub(super) redaction: Redaction,
}

#[async_trait]
impl Write for Admissions {
    type Item = Arc<Admission>;

    async fn together(
        &self,
        items: &[Arc<Admission>],
    ) -> Result<Answers<Arc<Admission>>, NotWritten> {
        let mut c = self.backend.writer().await.map_err(NotWritten::Unsent)?;
        Ok(self.admit_all(&mut c, items, false).await?)
    }

    async fn alone(&self, item: &Arc<Admission>) -> Answer<Arc<Admission>> {
        let mut c = self.backend.writer().await.map_err(NotWritten::Unsent)?;
        for _ in 0..MAX_ATTEMPTS {
            match self
                .admit_all(&mut c, std::slice::from_ref(item), true)
                .await
            {
                // Two other writers do not lock the key: an import that creates the key's thread,
                // and an answer to function calls that records an idempotency key. The next
                // attempt finds what they committed.
                Err(Failure::Failed(failed))
                    if failed.breaks("threads_current")
                        || failed.breaks("idempotency_keys_pkey") => {}
                Err(failure) => return Err(failure.into()),
                Ok(mut answers) => {
                    return answers
                        .pop()
                        .flatten()
                        .ok_or_else(|| corrupt("no outcome of an admission").into());
                }
            }
        }
        Err(NotWritten::Refused(StoreError::Unavailable(
            "the key's thread changed during every attempt".into(),
        )))
    }
}

/// The reason why nothing was admitted.
enum Failure {
    Failed(Failed),
    Other(StoreError),
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Other(error)
    }
}

impl From<Failure> for NotWritten {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Failed(failed) => failed.into(),
            Failure::Other(error) => error.into(),
        }
    }
}

impl Admissions {
    async fn admit_all(
        &self,
        c: &mut Connection,
        items: &[Arc<Admission>],
        alone: bool,
    ) -> Result<Answers<Arc<Admission>>, Failure> {
        let encoded = items
            .iter()
            .map(|item| self.encoded(item))
            .collect::<Result<Vec<_>, _>>()?;
        let fields = encoded
            .iter()
            .map(Admit::fields)
            .collect::<Result<Vec<_>, _>>()?;
        c.begin_script().await.map_err(Failure::Failed)?;
        let rows: Vec<AdmittedRow> = c
            .batch(&ADMIT, &fields, alone)
            .await
            .map_err(Failure::Failed)?;
        c.commit_script().await.map_err(Failure::Failed)?;
        let answer = |(row, item): (AdmittedRow, &Arc<Admission>)| match &*row.outcome {
            "held" => Ok(None),
            _ => item.admitted(row).map(Some),
        };
        Ok(rows
            .into_iter()
            .zip(items)
            .map(answer)
            .collect::<Result<_, StoreError>>()?)
    }

    fn encoded<'a>(&self, admission: &'a Admission) -> Result<Admit<'a>, StoreError> {
        Ok(Admit {
            admission,
            content: json(&self.redaction.parts(&admission.message.content))?,
            message_name: admission.message.id.to_string(),
        })
    }
}

/// An admission that is being sent.
struct Admit<'a> {
    admission: &'a Admission,
    /// The stored content of the message, as JSON, and its id as that JSON spells it.
    content: String,
    message_name: String,
}

/// The fields of an item: see admit.function.sql.
#[derive(Serialize)]
struct Fields<'a> {
    tenant: &'a str,
    user_key: &'a str,
    scope_kind: &'a str,
    scope_name: &'a str,
    max_age: Option<i64>,
    max_idle: Option<i64>,
    from_now: Option<i64>,
    from_last_activity: Option<i64>,
    upstream: &'a str,
    assistant: &'a str,
    strategy: &'a str,
    metadata: &'a Metadata,
    again: bool,
    thread: Uuid,
    run: Uuid,
    message: Uuid,
    message_name: &'a str,
    content: &'a RawValue,
    timeout: i64,
    replica: Uuid,
    intent: Option<Uuid>,
    orphan_after: i64,
    idempotency_key: Option<&'a str>,
    request_hash: Option<String>,
    remember: i64,
    max_messages: usize,
    max_bytes: usize,
}

impl Admit<'_> {
    fn fields(&self) -> Result<Fields<'_>, StoreError> {
        let Admission {
            key,
            limits,
            ttl,
            upstream,
            assistant,
            strategy,
            metadata,
            idempotency,
            ..
        } = self.admission;
        let (from_now, from_last_activity) = ttl_millis(*ttl);
        let content = serde_json::from_str(&self.content)
            .map_err(|error| StoreError::Statement(error.into()))?;
        Ok(Fields {
            tenant: key.tenant.as_str(),
            user_key: key.user.as_str(),
            scope_kind: key.scope.kind(),
            scope_name: key.scope.name(),
            max_age: limits.max_age.map(millis),
            max_idle: limits.max_idle.map(millis),
            from_now,
            from_last_activity,
            upstream,
            assistant,
            strategy: strategy.as_str(),
            metadata,
            again: self.admission.again,
            thread: self.admission.new_thread.uuid(),
            run: self.admission.run_id.uuid(),
            message: self.admission.message.id.uuid(),
            message_name: &self.message_name,
            content,
            timeout: millis(self.admission.timeout),
            replica: self.admission.replica.uuid(),
            intent: self.admission.intent.map(OrphanId::uuid),
            orphan_after: millis(ORPHAN_AFTER),
            idempotency_key: idempotency.as_ref().map(|used| &*used.key),
            request_hash: idempotency.as_ref().map(|used| hex(&used.request_hash)),
            remember: millis(self.admission.idempotency_ttl),
            max_messages: MAX_MERGED,
            max_bytes: MAX_MERGED_BYTES,
        })
    }
}

impl Admission {
    /// Returns the outcome that a row reports.
    fn admitted(&self, row: AdmittedRow) -> Result<Admitted, StoreError> {
        let AdmittedRow {
            outcome,
            seen_upstream,
            queue_position,
            both: Found(both),
        } = row;
        let both = match (&*outcome, both) {
            ("busy", _) => return Ok(Admitted::Busy),
            ("repeated", _) => return Ok(Admitted::Repeated),
            ("other_upstream", _) => {
                return Ok(Admitted::OtherUpstream(seen_upstream.unwrap_or_default()));
            }
            ("no_thread", _) => return Ok(Admitted::NoThread),
            ("no_message", _) => return Ok(Admitted::NoMessage),
            ("merged", Some(both)) => return merged_into(both.thread, both.run),
            ("recorded", Some(both)) => both,
            (other, _) => {
                return Err(StoreError::Corrupt(format!(
                    "the outcome `{other}` of an admission"
                )));
            }
        };
        let lease = RunLease {
            run_id: self.run_id,
            fence: 1,
        };
        let (thread, run) = (Thread::try_from(both.thread)?, Run::try_from(both.run)?);
        match run.status {
            RunStatus::InProgress if !self.again => {
                let InputMessage { id, content } = &self.message;
                let input = vec![InputMessage {
                    id: *id,
                    content: content.clone(),
                }];
                let intent = self.intent.filter(|_| thread.id == self.new_thread);
                Ok(Admitted::Started(Box::new(StartedRun {
                    lease,
                    thread,
                    run,
                    input,
                    intent,
                })))
            }
            RunStatus::Queued => {
                let position = queue_position
                    .ok_or_else(|| corrupt("a queued run without a place in the queue"))?;
                Ok(Admitted::Queued {
                    lease,
                    thread: Box::new(thread),
                    run: Box::new(run),
                    position,
                })
            }
            _ => Err(StoreError::Unavailable(
                "the run ended before the answer to its admission arrived".into(),
            )),
        }
    }
}

fn merged_into(thread: ThreadRow, run: RunRow) -> Result<Admitted, StoreError> {
    Ok(Admitted::Merged {
        thread: Box::new(thread.try_into()?),
        run: Box::new(run.try_into()?),
    })
}

/// A row that reports an admission's outcome: see admit.function.sql.
#[derive(FromRow)]
struct AdmittedRow {
    outcome: String,
    #[sqlx(default)]
    seen_upstream: Option<String>,
    queue_position: Option<i64>,
    #[sqlx(flatten)]
    both: Found<ThreadAndRun>,
}

/// A message that needs a run.
#[derive(Clone, Debug)]
pub struct Admission {
    pub key: ConversationKey,
    /// The id of the thread, if one has to be created.
    pub new_thread: ThreadId,
    /// The configured limits of this scope. They hold for a thread without limits of its own.
    pub limits: Limits,
    /// How long the caller wants the thread to live, from now on.
    pub ttl: Option<Ttl>,
    /// The name of the assistant's upstream. A thread stays on the upstream of its first run.
    pub upstream: String,
    pub run_id: RunId,
    pub assistant: String,
    pub strategy: MultitaskStrategy,
    pub metadata: Metadata,
    pub message: InputMessage,
    /// The run has no message of its own and answers the [last messages](super::Store::take_last_messages)
    /// again. Then `message` is empty and only names the request.
    pub again: bool,
    /// How long the run may take after it has started.
    pub timeout: Duration,
    /// The replica that will work on the run.
    pub replica: ReplicaId,
    /// The id of the row that records the intent to create the upstream thread of a fresh thread.
    /// `None`: the thread needs none.
    pub intent: Option<OrphanId>,
    pub idempotency: Option<Idempotency>,
    /// How long the use of an idempotency key is remembered.
    pub idempotency_ttl: Duration,
}

/// The outcome of an [`Admission`].
#[derive(Clone, Debug, PartialEq)]
pub enum Admitted {
    Started(Box<StartedRun>),
    Queued {
        lease: RunLease,
        thread: Box<Thread>,
        run: Box<Run>,
        /// The place in the queue: 1 for the run that starts next.
        position: i64,
    },
    /// The message has joined this queued run.
    Merged {
        thread: Box<Thread>,
        run: Box<Run>,
    },
    /// Refused by the strategy: the thread has unfinished runs.
    Busy,
    /// Refused: the thread lives on the named upstream, not on the assistant's.
    OtherUpstream(String),
    /// Refused: the idempotency key is in use.
    Repeated,
    /// Refused: the key has no thread whose last messages could be answered again, or only one that
    /// has expired.
    NoThread,
    /// Refused: the thread has no message of the user.
    NoMessage,
}

/// The most messages that one queued run collects by [`MultitaskStrategy::Merge`].
pub const MAX_MERGED: usize = 32;

/// The most bytes of content, as JSON, that one queued run collects by merging: 12 MiB.
pub const MAX_MERGED_BYTES: usize = 12 * 1024 * 1024;

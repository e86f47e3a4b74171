//! Taking back a message whose sender heard that it was not accepted.

use sqlx::FromRow;
use sqlx::types::Json;

use super::errors::StoreError;
use super::finish::{Closing, RunEnd, finish_in};
use super::handle::Store;
use super::params::params;
use super::pool::Connection;
use super::rows::ThreadAndRun;
use super::statement::Statement;
use super::values::{InputMessage, RunLease};
use crate::domain::{MessageId, Run, Thread};

/// The run is locked, so that no message joins it between the look and the end.
static LOCK_QUEUED: Statement = Statement::new(
    "finish.lock_queued",
    "SELECT r.queued_input FROM runs r WHERE r.id = :run AND r.fence = :fence AND r.queued_input IS NOT NULL {lock r}",
);

static LEAVE_TO_OTHERS: Statement = Statement::new(
    "finish.leave_to_others",
    "UPDATE runs SET queued_input = :others, strategy = 'merge' WHERE id = :run",
);

static FORGET_KEY: Statement = Statement::new(
    "finish.forget_idempotency_key",
    "DELETE FROM idempotency_keys WHERE run_id = :run AND key = :idempotency_key",
);

static FIND_SHARED: Statement = Statement::new(
    "finish.find_shared",
    "SELECT {thread t}, {run r}, (
        SELECT count(*) FROM runs o
        WHERE o.thread_id = r.thread_id AND o.status = 'queued' AND (o.priority, o.seq) < (r.priority, r.seq)
    ) AS before
    FROM runs r JOIN threads t ON t.id = r.thread_id WHERE r.id = :run",
);

pub(super) static STATEMENTS: &[&Statement] =
    &[&LOCK_QUEUED, &LEAVE_TO_OTHERS, &FORGET_KEY, &FIND_SHARED];

impl Store {
    /// Takes a message back whose sender heard that it was not taken, although its run was recorded. A waiting run that
    /// others have [joined](crate::domain::MultitaskStrategy::Merge) goes on without it, and the message's idempotency key
    /// stands for nothing any more. Else the run ends as [`finish`](Self::finish) ends it. Harmless to repeat.
    pub async fn withdraw(
        &self,
        lease: &RunLease,
        taken: &Withdrawal,
    ) -> Result<Withdrawn, StoreError> {
        let mut c = self.backend.vital_writer().await?;
        c.begin().await?;
        let values = params()
            .set("run", lease.run_id.uuid())
            .set("fence", lease.fence);
        let waiting: Option<(Json<Vec<InputMessage>>,)> = c.optional(&LOCK_QUEUED, values).await?;
        let mut others = waiting.map(|(Json(input),)| input).unwrap_or_default();
        others.retain(|message| message.id != taken.message);
        let withdrawn = if others.is_empty() {
            match finish_in(&mut c, self.redaction, lease, &taken.end).await? {
                Closing::Finished(_) => Withdrawn::Ended,
                Closing::MustDiscard | Closing::Lost => Withdrawn::Lost,
            }
        } else {
            leave_to(&mut c, lease, &others, taken).await?
        };
        c.commit().await?;
        Ok(withdrawn)
    }
}

/// A message that is to be taken back.
#[derive(Clone, Debug, PartialEq)]
pub struct Withdrawal {
    pub message: MessageId,
    pub idempotency_key: Option<String>,
    /// How its run ends if it holds no other message.
    pub end: RunEnd,
}

/// What became of a [`Withdrawal`].
#[derive(Clone, Debug, PartialEq)]
pub enum Withdrawn {
    /// The run has ended.
    Ended,
    /// The run waits on, with the messages of others.
    Shared {
        thread: Box<Thread>,
        run: Box<Run>,
        /// 1 for the run that goes next.
        position: i64,
    },
    /// There is no such run (yet), or the lease was lost.
    Lost,
}

/// A run and its place in the queue.
#[derive(FromRow)]
struct SharedRow {
    #[sqlx(flatten)]
    both: ThreadAndRun,
    before: i64,
}

/// Leaves a waiting run, which the caller holds, to the messages of others. What it does to a busy thread was the wish of the
/// one whose message is taken back.
async fn leave_to(
    c: &mut Connection,
    lease: &RunLease,
    others: &[InputMessage],
    taken: &Withdrawal,
) -> Result<Withdrawn, StoreError> {
    let run = lease.run_id.uuid();
    c.execute(
        &LEAVE_TO_OTHERS,
        params().set("run", run).json("others", Some(&others))?,
    )
    .await?;
    let key = taken.idempotency_key.as_deref();
    c.execute(
        &FORGET_KEY,
        params().set("run", run).set("idempotency_key", key),
    )
    .await?;
    let row: SharedRow = c.one(&FIND_SHARED, params().set("run", run)).await?;
    Ok(Withdrawn::Shared {
        thread: Box::new(row.both.thread.try_into()?),
        run: Box::new(row.both.run.try_into()?),
        position: row.before + 1,
    })
}

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

/// Locks the run, so that no message joins it between this read and its end.
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
    /// Withdraws a message whose sender got an error, although its run was recorded. A queued run
    /// that other messages have [joined](crate::domain::MultitaskStrategy::Merge) continues
    /// without this one, and the message's idempotency key is forgotten. Otherwise the run ends as
    /// by [`finish`](Self::finish). The call is harmless to repeat.
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

/// A message that is to be withdrawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Withdrawal {
    pub message: MessageId,
    pub idempotency_key: Option<String>,
    /// The end of its run, if that has no other message.
    pub end: RunEnd,
}

/// The outcome of a [`Withdrawal`].
#[derive(Clone, Debug, PartialEq)]
pub enum Withdrawn {
    /// The run has ended.
    Ended,
    /// The run is still queued, with the messages of other senders.
    Shared {
        thread: Box<Thread>,
        run: Box<Run>,
        /// The place in the queue: 1 for the run that starts next.
        position: i64,
    },
    /// There is no such run (yet), or the lease was lost.
    Lost,
}

/// A queued run, and the number of queued runs before it.
#[derive(FromRow)]
struct SharedRow {
    #[sqlx(flatten)]
    both: ThreadAndRun,
    before: i64,
}

/// Leaves a queued run, which the caller has locked, to the messages of other senders. Its
/// strategy becomes `merge`: its effect on a busy thread was the wish of the withdrawn message's
/// sender.
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

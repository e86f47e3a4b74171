//! The state of messages at the upstream: missing, present, unknown or withheld.

use uuid::Uuid;

use super::paging::Span;
use super::params::params;
use super::pool::Connection;
use super::statement::Statement;
use super::transcript::listed;
use super::{RunLease, Store, StoreError};
use crate::domain::{Baseline, Message, Page, RunId, UpstreamSync};

static HOLD: Statement = Statement::new(
    "sync.hold_run",
    "SELECT r.thread_id, {first_position r} FROM runs r WHERE {leased r} AND {at_work r}
    {lock_shared r}",
);

static WITHHOLD_MISSING: Statement = Statement::new(
    "sync.withhold_missing",
    "UPDATE messages AS m SET upstream_sync = 'withheld', upstream_message_id = NULL
    WHERE m.thread_id = :thread AND m.position < :before AND m.upstream_sync = 'missing'",
);

static WITHHOLD_OTHERS: Statement = Statement::new(
    "sync.withhold_others",
    "UPDATE messages AS m SET upstream_sync = 'withheld', upstream_message_id = NULL
    WHERE m.thread_id = :thread AND m.position < :before AND m.upstream_sync <> 'missing'
        AND (m.upstream_sync <> 'withheld' OR m.upstream_message_id IS NOT NULL)",
);

static COUNT_WITHHELD: Statement = Statement::new(
    "sync.count_withheld",
    "UPDATE threads AS t SET unsynced_messages = t.unsynced_messages - :withheld,
        carried_messages = {least t.carried_messages, COALESCE(:carried, t.carried_messages)}
    WHERE t.id = :thread",
);

/// Marks missing messages before those of a run as present: they were sent with the run.
static TAKE_ALONG: Statement = Statement::new(
    "sync.take_earlier_messages_along",
    "UPDATE messages AS m SET upstream_sync = 'present'
    WHERE m.thread_id = :thread AND m.upstream_sync = 'missing'
        AND m.position < (SELECT {started_position e} FROM runs e WHERE e.id = :of)",
);

static SETTLE_OWN: Statement = Statement::new(
    "sync.settle_own_messages",
    "UPDATE messages AS m SET upstream_sync = {as upstream_sync, :found}
    WHERE m.run_id = :of AND m.thread_id = :thread AND m.upstream_sync = 'unknown'",
);

static COUNT_TAKEN_ALONG: Statement = Statement::new(
    "sync.count_taken_along",
    "UPDATE threads AS t SET unsynced_messages = t.unsynced_messages - :sent WHERE t.id = :thread",
);

static COUNT_SETTLED: Statement = Statement::new(
    "sync.count_settled",
    "UPDATE threads AS t SET unsettled_run = NULL, unsynced_messages = t.unsynced_messages + :missing
    WHERE t.id = :thread",
);

static SEND_AGAIN: Statement = Statement::new(
    "sync.send_again",
    "UPDATE runs AS r SET unacknowledged_requests = r.unacknowledged_requests + 1 WHERE {leased r} AND {at_work r}",
);

const BEFORE_RUN: &str = "{listed m_position DESC, FROM messages m
    WHERE m.thread_id = (SELECT r.thread_id FROM runs r WHERE r.id = :of)
        AND m.position > :above AND m.position < :below
        AND m.position < COALESCE((SELECT min(f.position) FROM messages f WHERE f.run_id = :of), :below)
        AND m.upstream_sync {0}
    ORDER BY m.position DESC}";

static EARLIER: Statement = Statement::variant("sync.list_earlier", BEFORE_RUN, &["<> 'withheld'"]);

static UNSYNCED: Statement = Statement::variant("sync.list_unsynced", BEFORE_RUN, &["= 'missing'"]);

static FIND_PLACE: Statement = Statement::new(
    "sync.find_place",
    "SELECT r.thread_id, {first_position r}, t.carried_user_messages
    FROM runs r JOIN threads t ON t.id = r.thread_id
    WHERE r.id = :run",
);

static FIND_ANCHOR: Statement = Statement::new(
    "sync.find_anchor",
    "SELECT m.position, m.upstream_message_id FROM messages m
    WHERE m.thread_id = :thread AND m.position < :below AND m.upstream_message_id IS NOT NULL
        AND m.upstream_sync = 'present'
    ORDER BY m.position DESC
    LIMIT 1",
);

static COUNT_BEHIND_ANCHOR: Statement = Statement::new(
    "sync.count_behind_anchor",
    "SELECT count(*) FROM messages m
    WHERE m.thread_id = :thread AND m.position > :above AND m.position < :below AND m.role = 'user'
        AND m.upstream_sync = 'present'",
);

pub(super) static STATEMENTS: &[&Statement] = &[
    &HOLD,
    &WITHHOLD_MISSING,
    &WITHHOLD_OTHERS,
    &COUNT_WITHHELD,
    &TAKE_ALONG,
    &COUNT_TAKEN_ALONG,
    &SETTLE_OWN,
    &COUNT_SETTLED,
    &SEND_AGAIN,
    &EARLIER,
    &UNSYNCED,
    &FIND_PLACE,
    &FIND_ANCHOR,
    &COUNT_BEHIND_ANCHOR,
];

impl Store {
    /// Withholds messages before those of a run, for good: its upstream thread is to continue
    /// without them. Returns `false` if the lease was lost. Harmless to repeat.
    pub async fn withhold_earlier(
        &self,
        lease: &RunLease,
        what: &Withholding,
    ) -> Result<bool, StoreError> {
        let mut c = self.backend.writer().await?;
        c.begin().await?;
        let Some((thread, first)) = hold(&mut c, lease).await? else {
            c.roll_back().await?;
            return Ok(false);
        };
        let before = what.before.map_or(first, |before| before.min(first));
        let these = || params().set("thread", thread).set("before", before);
        // Missing messages are updated separately, because the thread counts them.
        let withheld = c.execute(&WITHHOLD_MISSING, these()).await?;
        if !what.missing_only {
            c.execute(&WITHHOLD_OTHERS, these()).await?;
        }
        let counts = params()
            .set("thread", thread)
            .set("withheld", number(withheld))
            .set("carried", what.carried);
        c.execute(&COUNT_WITHHELD, counts).await?;
        c.commit().await?;
        Ok(true)
    }

    /// Records that the messages which were missing before those of a run were sent with it, and
    /// are in the upstream thread. `run` is the run of the lease, or an earlier one of its thread.
    /// Returns `false` if the lease was lost. Harmless to repeat.
    pub async fn took_along(&self, lease: &RunLease, run: RunId) -> Result<bool, StoreError> {
        let mut c = self.backend.vital_writer().await?;
        c.begin().await?;
        let Some((thread, _)) = hold(&mut c, lease).await? else {
            c.roll_back().await?;
            return Ok(false);
        };
        let these = params().set("thread", thread).set("of", run.uuid());
        let sent = c.execute(&TAKE_ALONG, these).await?;
        let counts = params().set("thread", thread).set("sent", number(sent));
        c.execute(&COUNT_TAKEN_ALONG, counts).await?;
        c.commit().await?;
        Ok(true)
    }

    /// Records the state of the unknown messages of an earlier run of the thread, after its traces
    /// at the upstream were examined. The thread has no unsettled run any more. Returns `false` if
    /// the lease was lost.
    pub async fn record_settlement(
        &self,
        lease: &RunLease,
        run: RunId,
        found: UpstreamSync,
    ) -> Result<bool, StoreError> {
        let found = self.redaction.sync(found);
        let mut c = self.backend.vital_writer().await?;
        c.begin().await?;
        let Some((thread, _)) = hold(&mut c, lease).await? else {
            c.roll_back().await?;
            return Ok(false);
        };
        let own = params()
            .set("thread", thread)
            .set("of", run.uuid())
            .set("found", found.as_str());
        let looked_at = c.execute(&SETTLE_OWN, own).await?;
        let missing = if found == UpstreamSync::Missing {
            looked_at
        } else {
            0
        };
        let counts = params()
            .set("thread", thread)
            .set("missing", number(missing));
        c.execute(&COUNT_SETTLED, counts).await?;
        c.commit().await?;
        Ok(true)
    }

    /// Records that a run's request, whose answer was lost, is about to be sent once more. The
    /// earlier one may have left something upstream under an id that the gateway [never
    /// received](Self::unacknowledged_requests). Returns `false` if the lease was lost.
    pub async fn sends_again(&self, lease: &RunLease) -> Result<bool, StoreError> {
        let mut c = self.backend.vital_writer().await?;
        let values = params()
            .set("run", lease.run_id.uuid())
            .set("fence", lease.fence);
        Ok(c.execute(&SEND_AGAIN, values).await? == 1)
    }

    /// Returns up to `limit` messages of a run's thread that stand before a position and are not
    /// withheld, newest first. `None`: before the run's own messages. The page ends before its
    /// limit, with `has_more`, once it holds [`PAGE_BYTES`](super::PAGE_BYTES).
    pub async fn earlier(
        &self,
        run: RunId,
        before: Option<i64>,
        limit: u32,
    ) -> Result<Page<Message>, StoreError> {
        let mut c = self.backend.reader().await?;
        let span = Span::down(0, before, limit);
        Ok(listed(&mut c, &EARLIER, run.uuid(), span, limit)
            .await?
            .page(span))
    }

    /// Returns those of the [`earlier`](Self::earlier) messages that the run's upstream thread
    /// lacks. There are none if content is not stored.
    pub async fn unsynced_messages(
        &self,
        run: RunId,
        before: Option<i64>,
        limit: u32,
    ) -> Result<Page<Message>, StoreError> {
        if !self.keeps_content() {
            return Ok(Page {
                data: Vec::new(),
                has_more: false,
            });
        }
        let mut c = self.backend.reader().await?;
        let span = Span::down(0, before, limit);
        Ok(listed(&mut c, &UNSYNCED, run.uuid(), span, limit)
            .await?
            .page(span))
    }

    /// Returns where a run's messages begin in the upstream thread, as far as the transcript
    /// shows.
    pub async fn baseline(&self, run: RunId) -> Result<Baseline, StoreError> {
        // Only the run itself changes the messages before its own, so the statements need no
        // common snapshot.
        let mut c = self.backend.vital_reader().await?;
        let place: Option<(Uuid, i64, i64)> = c
            .optional(&FIND_PLACE, params().set("run", run.uuid()))
            .await?;
        let Some((thread, first, carried)) = place else {
            return Ok(Baseline::default());
        };
        let before = || params().set("thread", thread).set("below", first);
        let anchor: Option<(i64, String)> = c.optional(&FIND_ANCHOR, before()).await?;
        let (position, anchor) = anchor.unzip();
        let behind = before().set("above", position.unwrap_or(0));
        let (skip,): (i64,) = c.one(&COUNT_BEHIND_ANCHOR, behind).await?;
        // Without an anchor, the messages that were carried over come first.
        let skip = if anchor.is_none() {
            skip + carried
        } else {
            skip
        };
        Ok(Baseline {
            anchor,
            skip: u32::try_from(skip).unwrap_or(u32::MAX),
        })
    }
}

/// Locks an active run, so that no replica takes it over before the transaction ends. Returns its
/// thread, and the position at which its messages begin; `None` if the lease was lost.
async fn hold(c: &mut Connection, lease: &RunLease) -> Result<Option<(Uuid, i64)>, StoreError> {
    let values = params()
        .set("run", lease.run_id.uuid())
        .set("fence", lease.fence);
    Ok(c.optional(&HOLD, values).await?)
}

/// Returns a number of changed rows as a parameter.
fn number(rows: u64) -> i64 {
    i64::try_from(rows).unwrap_or(i64::MAX)
}

/// The messages before those of a run that are to be [withheld](Store::withhold_earlier).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Withholding {
    /// Withhold the messages before this position; `None`: all before the run's own.
    pub before: Option<i64>,
    /// Withhold only those that the upstream thread lacks. The others are in it, and stay.
    pub missing_only: bool,
    /// The number of messages of the previous thread with which the thread still begins, if it
    /// begins with as many; `None`: the number stays.
    pub carried: Option<u32>,
}

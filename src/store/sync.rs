//! Where threads live at their upstream, and where their messages stand there.

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

/// What was missing before a run went along with it.
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
    /// Withholds messages before those of a run, for good: its upstream thread is to go on without them.
    /// `false` if the lease was lost. Harmless to repeat.
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
        // What was missing is told from the rest, since the thread counts it.
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

    /// Records that what was missing before the messages of a run, this one or an earlier one of its thread, went along with
    /// it and is in the upstream thread. `false` if the lease was lost. Harmless to repeat.
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

    /// Records where the messages of an earlier run of the thread stand, now that what it left upstream was
    /// looked at: those of which it was not known. The thread has no unsettled run any more. `false` if the lease was lost.
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

    /// Records that a request of a run is about to be sent once more whose answer was lost. The one before
    /// may have left something upstream under an id that [nobody heard](Self::unacknowledged_requests). `false` if the
    /// lease was lost.
    pub async fn sends_again(&self, lease: &RunLease) -> Result<bool, StoreError> {
        let mut c = self.backend.vital_writer().await?;
        let values = params()
            .set("run", lease.run_id.uuid())
            .set("fence", lease.fence);
        Ok(c.execute(&SEND_AGAIN, values).await? == 1)
    }

    /// Up to `limit` messages of the thread of a run that stand before a position and are not withheld,
    /// newest first. `None`: before the run's own. The page ends before its limit, with `has_more`, once it
    /// holds [`PAGE_BYTES`](super::PAGE_BYTES).
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

    /// The same of those alone that the upstream thread of the run lacks. None where content is not stored.
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

    /// Where a run's messages begin in the upstream thread, as far as the transcript knows.
    pub async fn baseline(&self, run: RunId) -> Result<Baseline, StoreError> {
        // What stands before a run's messages is changed by that run alone, so the statements need no common
        // snapshot.
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
        // Without an anchor, what was carried over comes first.
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

/// Lets nobody take a run at work over before the transaction ends. Its thread, and where its messages begin;
/// `None` if the lease was lost.
async fn hold(c: &mut Connection, lease: &RunLease) -> Result<Option<(Uuid, i64)>, StoreError> {
    let values = params()
        .set("run", lease.run_id.uuid())
        .set("fence", lease.fence);
    Ok(c.optional(&HOLD, values).await?)
}

/// Rows that a statement has changed, as a parameter.
fn number(rows: u64) -> i64 {
    i64::try_from(rows).unwrap_or(i64::MAX)
}

/// Messages before those of a run that are to be [withheld](Store::withhold_earlier).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Withholding {
    /// Those that stand before this position; `None`: all before the run's own.
    pub before: Option<i64>,
    /// Only those among them that the upstream thread lacks: the rest are in it, and stay.
    pub missing_only: bool,
    /// The thread still begins with so many messages of the thread before, if there are as many; `None`: as it does.
    pub carried: Option<u32>,
}

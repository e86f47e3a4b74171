//! Rollover: a fresh thread in the place of a full one. Also: messages that others wrote to the
//! upstream thread.

use std::collections::HashSet;

use serde_json::json as value;
use sqlx::FromRow;
use uuid::Uuid;

use super::paging::Span;
use super::params::params;
use super::pool::Connection;
use super::redaction::Redaction;
use super::rows::{ThreadRow, millis};
use super::runs::started_before;
use super::statement::Statement;
use super::transcript::{DOWNWARDS_KNOWN, listed};
use super::{QueuedStart, RunLease, StartedRun, Store, StoreError};
use crate::domain::{
    ContentPart, Lifecycle, Limits, Message, MessageId, Page, Role, RunStatus, Thread, ThreadId,
    Timestamp,
};

/// The most attempts to lock a thread while new runs keep arriving.
const MAX_ATTEMPTS: u32 = 10;

/// A distance that is larger than every position.
const FAR: i64 = 1 << 48;

static LOCK_RUNS: Statement = Statement::new(
    "rollover.lock_runs",
    "SELECT r.id, {text r.status} AS status, r.fence FROM runs r
    WHERE r.id {in_found {unfinished = :thread}} AND r.finished_at IS NULL
    ORDER BY r.id
    {lock_whole r}",
);

static LOCK_THREAD: Statement = Statement::new(
    "rollover.lock_thread",
    "SELECT {text t.lifecycle} AS lifecycle, t.last_position FROM threads t WHERE t.id = :thread {lock t}",
);

static FIND_OTHER_RUNS: Statement = Statement::new(
    "rollover.find_other_runs",
    "SELECT EXISTS (SELECT 1 FROM ({unfinished = :thread}) r WHERE r.id {not_in :runs})",
);

static POSTPONE: Statement = Statement::new(
    "rollover.postpone",
    "UPDATE threads SET rollover_pending = true WHERE id = :thread",
);

/// Finds whether the fresh thread exists. If a run did the rollover, the run must be on that
/// thread, under the same lease.
static IS_DONE: Statement = Statement::new(
    "rollover.is_done",
    "SELECT EXISTS (
        SELECT 1 FROM threads t
        WHERE t.id = :new_thread AND t.previous_thread_id = :thread
            AND (
                {as uuid, :run} IS NULL
                OR t.id = (SELECT r.thread_id FROM runs r WHERE r.id = :run AND r.fence = :fence)
            )
    )",
);

static READ_THREAD: Statement = Statement::new(
    "rollover.read_thread",
    "SELECT {thread t} FROM threads t WHERE t.id = :thread",
);

static ARCHIVE: Statement = Statement::new(
    "rollover.archive",
    "UPDATE threads SET lifecycle = 'archived', archived_at = {now}, due_at = {now}, rollover_pending = false,
        attempts = 0, last_failure = NULL
    WHERE id = :thread",
);

/// Adds the fresh thread, with its counters as they are after the move. The condition on `missing`
/// is written so that no index matches it: the few messages of a run are found by the run.
static ADD_THREAD: Statement = Statement::new(
    "rollover.add_thread",
    "INSERT INTO threads (
        id, tenant, user_key, scope_kind, scope_name, upstream, lifecycle, previous_thread_id, metadata,
        message_count, last_position, unsynced_messages, run_count, carried_messages, conversation_started_at,
        created_at, last_active_at, max_age_ms, max_idle_ms
    )
    SELECT :new_thread, t.tenant, t.user_key, t.scope_kind, t.scope_name, t.upstream, 'current', t.id,
        t.metadata,
        (SELECT count(*) FROM messages m WHERE m.run_id = :run),
        (SELECT COALESCE(max(m.position) - min(m.position) + 1, 0) FROM messages m WHERE m.run_id = :run),
        (SELECT count(*) FROM messages m WHERE m.run_id = :run AND (m.upstream_sync = 'missing') IS TRUE),
        :run_count,
        (
            SELECT count(*) FROM (
                SELECT 1 AS one FROM messages m
                WHERE m.thread_id = t.id AND m.upstream_sync <> 'withheld' AND m.run_id IS DISTINCT FROM :run
                ORDER BY m.position DESC
                LIMIT :carry_over
            ) c
        ),
        COALESCE(t.conversation_started_at, t.created_at), {now}, {now},
        CASE
            WHEN t.max_age_ms IS NOT NULL THEN {left_of t.max_age_ms}
            WHEN t.max_idle_ms IS NULL AND {as bigint, :max_age} IS NOT NULL THEN {left_of :max_age}
        END,
        CASE
            WHEN t.max_idle_ms IS NOT NULL THEN t.max_idle_ms
            WHEN t.max_age_ms IS NULL AND {as bigint, :max_age} IS NOT NULL THEN :max_idle
        END
    FROM threads t WHERE t.id = :thread",
);

static SET_DUE: Statement = Statement::new(
    "rollover.set_due",
    "UPDATE threads AS t SET due_at = {expiry :max_age, :max_idle} WHERE t.id = :new_thread",
);

/// Subtracts what the fresh thread has from the counters of the old one.
static TAKE_OFF: Statement = Statement::new(
    "rollover.take_off",
    "UPDATE threads AS t SET
        run_count = t.run_count - (SELECT f.run_count FROM threads f WHERE f.id = :new_thread),
        message_count = t.message_count - (SELECT f.message_count FROM threads f WHERE f.id = :new_thread),
        unsynced_messages = t.unsynced_messages
            - (SELECT f.unsynced_messages FROM threads f WHERE f.id = :new_thread)
    WHERE t.id = :thread",
);

/// Moves the unfinished runs, and numbers them from 1 in the same order.
static MOVE_RUNS: Statement = Statement::new(
    "rollover.move_runs",
    "UPDATE runs AS r SET thread_id = :new_thread, seq = m.n,
        priority = CASE WHEN r.priority < 0 THEN -m.n ELSE 0 END
    FROM (
        SELECT o.id, row_number() OVER (ORDER BY o.seq) AS n FROM runs o
        WHERE o.id {in_found {unfinished = :thread}}
    ) AS m
    WHERE r.id = m.id",
);

static MOVE_MESSAGES: Statement = Statement::new(
    "rollover.move_messages",
    "UPDATE messages SET thread_id = :new_thread,
        position = position + 1 - (SELECT min(f.position) FROM messages f WHERE f.run_id = :run)
    WHERE run_id = :run",
);

/// Finds the previous thread. Messages of a thread that is to be erased are not sent any more.
static FIND_PREVIOUS: Statement = Statement::new(
    "rollover.find_previous",
    "SELECT p.id, (SELECT t.carried_messages FROM threads t WHERE t.id = :thread) AS carried FROM threads p
    WHERE p.id = (SELECT t.previous_thread_id FROM threads t WHERE t.id = :thread AND t.carried_messages > 0)
        AND p.deletion IS DISTINCT FROM 'erase'",
);

static FIND_FIRST_CARRIED: Statement = Statement::new(
    "rollover.find_first_carried",
    "SELECT m.position FROM messages m WHERE m.thread_id = :thread AND m.upstream_sync <> 'withheld'
    ORDER BY m.position DESC LIMIT 1 OFFSET :skip",
);

static FIND_ACTIVE: Statement = Statement::new(
    "rollover.find_active",
    "SELECT r.id, r.fence FROM runs r WHERE r.thread_id = :thread AND {active r}",
);

static FIND_KNOWN: Statement = Statement::new(
    "rollover.find_known",
    "SELECT m.upstream_message_id FROM messages m
    WHERE m.thread_id = :thread AND m.upstream_message_id IN (SELECT e.value FROM {each_text :names})",
);

static FIND_TAKEN: Statement = Statement::new(
    "rollover.find_taken",
    "SELECT m.id FROM messages m WHERE m.id {in :ids}",
);

static MOVE_AWAY: Statement = Statement::new(
    "rollover.move_away",
    "UPDATE messages SET position = position + :far WHERE thread_id = :thread AND position > :first",
);

static MOVE_BACK: Statement = Statement::new(
    "rollover.move_back",
    "UPDATE messages SET position = position - :far + (
        SELECT count(*) FROM {each_text :places} WHERE CAST(e.value AS bigint) < position - :far
    )
    WHERE thread_id = :thread AND position > :far",
);

static ADD_MESSAGES: Statement = Statement::new(
    "rollover.add_messages",
    "INSERT INTO messages (
        id, thread_id, position, role, content, upstream_message_id, upstream_sync, created_at
    )
    SELECT {uuid e.value ->> 'id'}, :thread, CAST(e.value ->> 'position' AS bigint),
        {as message_role, e.value ->> 'role'}, e.value -> 'content', e.value ->> 'upstream_message_id',
        'present', COALESCE({at_ms e.value ->> 'created_at'}, {now})
    FROM {each :rows}",
);

static COUNT_MESSAGES: Statement = Statement::new(
    "rollover.count_messages",
    "UPDATE threads SET message_count = message_count + :added, last_position = last_position + :added
    WHERE id = :thread",
);

pub(super) static STATEMENTS: &[&Statement] = &[
    &LOCK_RUNS,
    &LOCK_THREAD,
    &FIND_OTHER_RUNS,
    &POSTPONE,
    &IS_DONE,
    &READ_THREAD,
    &ARCHIVE,
    &ADD_THREAD,
    &SET_DUE,
    &TAKE_OFF,
    &MOVE_RUNS,
    &MOVE_MESSAGES,
    &FIND_PREVIOUS,
    &FIND_FIRST_CARRIED,
    &FIND_ACTIVE,
    &FIND_KNOWN,
    &FIND_TAKEN,
    &MOVE_AWAY,
    &MOVE_BACK,
    &ADD_MESSAGES,
    &COUNT_MESSAGES,
];

impl Store {
    /// Archives a thread and puts a fresh one in its place. The fresh thread names the old one,
    /// and takes its metadata and the rest of its limits. All unfinished runs move to it; for an
    /// active run, also its messages. [`Rolled`] has the outcomes. The call is harmless to repeat
    /// while the run is in progress.
    pub async fn roll_over(&self, rollover: &Rollover) -> Result<Rolled, StoreError> {
        // Content that is not stored cannot be carried over.
        let carry_over = if self.keeps_content() {
            rollover.carry_over
        } else {
            0
        };
        let rollover = Rollover {
            carry_over,
            ..*rollover
        };
        // This uses a connection for callers: a client may hang up during a rollover, and a run
        // may be cut off.
        let mut c = self.backend.writer().await?;
        for _ in 0..MAX_ATTEMPTS {
            c.begin().await?;
            if let Some(rolled) = try_roll_over(&mut c, &rollover).await? {
                c.commit().await?;
                return Ok(rolled);
            }
            c.roll_back().await?;
        }
        Err(StoreError::Unavailable(
            "new runs arrived during every attempt".into(),
        ))
    }

    /// Returns up to `limit` messages of the previous thread with which a thread begins, newest
    /// first, without withheld ones. They stand before the position `before` of the previous
    /// thread; `None`: they are its last ones.
    ///
    /// The page ends before its limit, with `has_more`, once it holds
    /// [`PAGE_BYTES`](super::PAGE_BYTES). It has fewer messages, or none, once the previous thread
    /// is to be erased. It has none if content is not stored.
    pub async fn carried(
        &self,
        thread: ThreadId,
        before: Option<i64>,
        limit: u32,
    ) -> Result<Page<Message>, StoreError> {
        let nothing = Page {
            data: Vec::new(),
            has_more: false,
        };
        if !self.keeps_content() {
            return Ok(nothing);
        }
        let mut c = self.backend.reader().await?;
        let previous: Option<(Uuid, i64)> = c
            .optional(&FIND_PREVIOUS, params().set("thread", thread.uuid()))
            .await?;
        let Some((previous, carried)) = previous else {
            return Ok(nothing);
        };
        let last_ones = params().set("thread", previous).set("skip", carried - 1);
        let first: Option<(i64,)> = c.optional(&FIND_FIRST_CARRIED, last_ones).await?;
        let span = Span::down(first.map_or(0, |(first,)| first - 1), before, limit);
        Ok(listed(&mut c, &DOWNWARDS_KNOWN, previous, span, limit)
            .await?
            .page(span))
    }

    /// Inserts messages that others wrote to the upstream thread into the transcript, and returns
    /// how many. Each message goes behind the one that it names. Messages behind the same one keep
    /// their order. Messages whose upstream id the thread has already are skipped.
    ///
    /// It inserts none if the thread has an active run other than that of the lease `by`, or if
    /// that lease was lost.
    pub async fn insert_external_messages(
        &self,
        thread: ThreadId,
        by: Option<RunLease>,
        messages: &[ExternalMessage],
    ) -> Result<u64, StoreError> {
        let mut c = self.backend.writer().await?;
        c.begin().await?;
        let inserted = insert(&mut c, self.redaction, thread, by, messages).await?;
        c.commit().await?;
        Ok(inserted)
    }
}

/// An unfinished run, its status and its fence.
#[derive(FromRow)]
struct Unfinished {
    id: Uuid,
    status: String,
    fence: i64,
}

impl Unfinished {
    fn is_active(&self) -> bool {
        self.status != RunStatus::Queued.as_str()
    }

    fn works_under(&self, lease: &RunLease) -> bool {
        self.id == lease.run_id.uuid()
            && self.fence == lease.fence
            && self.status == RunStatus::InProgress.as_str()
    }
}

/// Rolls a thread over. Runs are locked before the thread. Once the thread is locked, no more runs
/// can arrive. Returns `None` if the thread then has other runs than the locked ones. The caller
/// must roll back then.
async fn try_roll_over(
    c: &mut Connection,
    rollover: &Rollover,
) -> Result<Option<Rolled>, StoreError> {
    let old = rollover.thread.uuid();
    let runs: Vec<Unfinished> = c.all(&LOCK_RUNS, params().set("thread", old)).await?;
    let locked: Option<(String, i64)> = c
        .optional(&LOCK_THREAD, params().set("thread", old))
        .await?;
    if locked.is_none_or(|(lifecycle, _)| lifecycle != Lifecycle::Current.as_str()) {
        return rolled_before(c, rollover).await.map(Some);
    }
    let these: Vec<Uuid> = runs.iter().map(|run| run.id).collect();
    let (others,): (bool,) = c
        .one(
            &FIND_OTHER_RUNS,
            params().set("thread", old).set("runs", these),
        )
        .await?;
    if others {
        return Ok(None);
    }
    match &rollover.by {
        Some(lease) if !runs.iter().any(|run| run.works_under(lease)) => {
            return Ok(Some(Rolled::Lost));
        }
        None if runs.iter().any(Unfinished::is_active) => {
            c.execute(&POSTPONE, params().set("thread", old)).await?;
            return Ok(Some(Rolled::Later(Box::new(
                read_thread(c, rollover.thread).await?,
            ))));
        }
        _ => {}
    }
    put_in_place(c, rollover, runs.len()).await?;
    move_runs(c, rollover).await?;
    done(c, rollover).await.map(Some)
}

/// Returns the answer to a repeated rollover. It was done before if the fresh thread exists and
/// the run is still in progress.
async fn rolled_before(c: &mut Connection, rollover: &Rollover) -> Result<Rolled, StoreError> {
    let both = params()
        .set("thread", rollover.thread.uuid())
        .set("new_thread", rollover.new_thread.uuid())
        .set("run", rollover.by.map(|lease| lease.run_id.uuid()))
        .set("fence", rollover.by.map(|lease| lease.fence));
    let (is_done,): (bool,) = c.one(&IS_DONE, both).await?;
    if is_done {
        done(c, rollover).await
    } else {
        Ok(Rolled::Lost)
    }
}

async fn done(c: &mut Connection, rollover: &Rollover) -> Result<Rolled, StoreError> {
    let turn = match &rollover.by {
        None => None,
        Some(lease) => match started_before(c, lease).await? {
            QueuedStart::Started(turn) => Some(turn),
            QueuedStart::NotYet | QueuedStart::Lost => return Ok(Rolled::Lost),
        },
    };
    let thread = read_thread(c, rollover.new_thread).await?;
    Ok(Rolled::Done {
        thread: Box::new(thread),
        turn,
    })
}

async fn read_thread(c: &mut Connection, id: ThreadId) -> Result<Thread, StoreError> {
    let row: ThreadRow = c
        .one(&READ_THREAD, params().set("thread", id.uuid()))
        .await?;
    row.try_into()
}

/// Archives the old thread and creates the fresh one.
///
/// The fresh thread gets the rest of the old one's own limits. If the old thread has none, the
/// configured limits hold for the fresh one as for any thread, except that the age counts from the
/// old thread's creation.
async fn put_in_place(
    c: &mut Connection,
    rollover: &Rollover,
    runs: usize,
) -> Result<(), StoreError> {
    let (max_age, max_idle) = (
        rollover.limits.max_age.map(millis),
        rollover.limits.max_idle.map(millis),
    );
    c.execute(&ARCHIVE, params().set("thread", rollover.thread.uuid()))
        .await?;
    let fresh = params()
        .set("thread", rollover.thread.uuid())
        .set("new_thread", rollover.new_thread.uuid())
        .set("run", rollover.by.map(|lease| lease.run_id.uuid()))
        .set("run_count", i64::try_from(runs).unwrap_or(i64::MAX))
        .set("carry_over", rollover.carry_over)
        .set("max_age", max_age)
        .set("max_idle", max_idle);
    c.execute(&ADD_THREAD, fresh).await?;
    let limits = params()
        .set("new_thread", rollover.new_thread.uuid())
        .set("max_age", max_age)
        .set("max_idle", max_idle);
    c.execute(&SET_DUE, limits).await?;
    Ok(())
}

/// Moves the unfinished runs, and the messages of the active run.
async fn move_runs(c: &mut Connection, rollover: &Rollover) -> Result<(), StoreError> {
    let both = || {
        params()
            .set("thread", rollover.thread.uuid())
            .set("new_thread", rollover.new_thread.uuid())
    };
    c.execute(&TAKE_OFF, both()).await?;
    c.execute(&MOVE_RUNS, both()).await?;
    if let Some(lease) = &rollover.by {
        let messages = params()
            .set("run", lease.run_id.uuid())
            .set("new_thread", rollover.new_thread.uuid());
        c.execute(&MOVE_MESSAGES, messages).await?;
    }
    Ok(())
}

/// Inserts messages into a thread. It locks the thread first, so that no run starts meanwhile. No
/// active run can have locked messages either, except the caller's own.
///
/// A run that changes hands gets its new fence without a lock on the thread. But its new owner
/// reads the transcript only after that, so it sees the messages that were inserted before.
async fn insert(
    c: &mut Connection,
    redaction: Redaction,
    thread: ThreadId,
    by: Option<RunLease>,
    messages: &[ExternalMessage],
) -> Result<u64, StoreError> {
    let of_thread = || params().set("thread", thread.uuid());
    let locked: Option<(String, i64)> = c.optional(&LOCK_THREAD, of_thread()).await?;
    let Some((_, last)) = locked else {
        return Ok(0);
    };
    let active: Vec<(Uuid, i64)> = c.all(&FIND_ACTIVE, of_thread()).await?;
    let expected = by.map(|lease| (lease.run_id.uuid(), lease.fence));
    if active != Vec::from_iter(expected) {
        return Ok(0);
    }
    let unknown = unknown(c, thread, messages).await?;
    let Some(first) = unknown.first() else {
        return Ok(0);
    };
    let place = |message: &ExternalMessage| message.after.clamp(0, last);
    let places: Vec<i64> = unknown.iter().map(|message| place(message)).collect();
    // Positions are checked for uniqueness row by row. So first move the later messages out of the
    // way, then each to its place.
    c.execute(
        &MOVE_AWAY,
        of_thread().set("first", place(first)).set("far", FAR),
    )
    .await?;
    c.execute(
        &MOVE_BACK,
        of_thread().set("far", FAR).json("places", Some(&places))?,
    )
    .await?;
    let rows: Vec<_> = (1..)
        .zip(&unknown)
        .map(|(n, message)| {
            let position: i64 = place(message) + n;
            value!({
                "id": message.id.uuid().simple().to_string(),
                "position": position,
                "role": message.role.as_str(),
                "content": redaction.parts(&message.content),
                "upstream_message_id": message.upstream_message_id,
                "created_at": message.created_at.map(|at| at.timestamp_millis()),
            })
        })
        .collect();
    c.execute(&ADD_MESSAGES, of_thread().json("rows", Some(&rows))?)
        .await?;
    let added = i64::try_from(rows.len()).unwrap_or(i64::MAX);
    c.execute(&COUNT_MESSAGES, of_thread().set("added", added))
        .await?;
    Ok(rows.len().try_into().unwrap_or(u64::MAX))
}

/// Returns the messages that the thread does not have yet, in the order of their places.
async fn unknown<'a>(
    c: &mut Connection,
    thread: ThreadId,
    messages: &'a [ExternalMessage],
) -> Result<Vec<&'a ExternalMessage>, StoreError> {
    let names: Vec<&str> = messages
        .iter()
        .filter_map(|it| it.upstream_message_id.as_deref())
        .collect();
    let which = params()
        .set("thread", thread.uuid())
        .json("names", Some(&names))?;
    let known: Vec<(String,)> = c.all(&FIND_KNOWN, which).await?;
    let ids: Vec<Uuid> = messages.iter().map(|message| message.id.uuid()).collect();
    let taken: Vec<(Uuid,)> = c.all(&FIND_TAKEN, params().set("ids", ids)).await?;
    let mut known: HashSet<String> = known.into_iter().map(|(name,)| name).collect();
    let mut taken: HashSet<Uuid> = taken.into_iter().map(|(id,)| id).collect();
    let mut unknown: Vec<&ExternalMessage> = messages
        .iter()
        .filter(|message| {
            taken.insert(message.id.uuid())
                && message
                    .upstream_message_id
                    .as_ref()
                    .is_none_or(|name| known.insert(name.clone()))
        })
        .collect();
    unknown.sort_by_key(|message| message.after);
    Ok(unknown)
}

/// A request to roll a thread over.
#[derive(Clone, Copy, Debug)]
pub struct Rollover {
    pub thread: ThreadId,
    /// The run that does the rollover at its start; `None`: a caller asked for it.
    pub by: Option<RunLease>,
    pub new_thread: ThreadId,
    /// The number of the old thread's last messages with which the fresh one begins.
    pub carry_over: u32,
    /// The configured limits of its scope. By age, the fresh thread does not live longer than the
    /// old one would have.
    pub limits: Limits,
}

/// The outcome of a rollover.
#[derive(Clone, Debug, PartialEq)]
pub enum Rolled {
    /// The fresh thread and, if a run did the rollover, that run on it.
    Done {
        thread: Box<Thread>,
        turn: Option<Box<StartedRun>>,
    },
    /// A run is active. The rollover happens before the next run.
    Later(Box<Thread>),
    /// The thread is not current any more, or the lease was lost.
    Lost,
}

/// A message that others than the gateway wrote to an upstream thread.
#[derive(Clone, Debug, PartialEq)]
pub struct ExternalMessage {
    pub id: MessageId,
    /// The position of the message behind which it goes; 0: it goes first.
    pub after: i64,
    pub role: Role,
    pub content: Vec<ContentPart>,
    pub upstream_message_id: Option<String>,
    pub created_at: Option<Timestamp>,
}

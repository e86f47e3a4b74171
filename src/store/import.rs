//! Importing threads and messages that another system exported.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use serde::Serialize;
use uuid::fmt::Simple;
use uuid::{ClockSequence, ContextV7, NoContext, Uuid};

use super::params::params;
use super::pool::Connection;
use super::redaction::Redaction;
use super::rows::{At, millis};
use super::statement::Statement;
use super::{Store, StoreError};
use crate::domain::{
    ContentPart, ConversationKey, Lifecycle, Limits, MessageId, Metadata, Role, TenantKey,
    ThreadId, Timestamp, UpstreamSync, UpstreamThreadId,
};

/// Condition: the row `e` has the key of the thread `t`.
const OF_ROW: &[&str] = &["t.tenant = e.value ->> 'tenant' AND t.user_key = e.value ->> 'user'
            AND t.scope_kind = {as scope_kind, e.value ->> 'scope_kind'} AND t.scope_name = e.value ->> 'scope_name'"];

static READ_CLOCK: Statement = Statement::new("import.read_clock", "SELECT {now}");

/// `rows`: see [`ThreadToAdd`]. Without WHERE, SQLite would parse ON as a part of FROM.
static ADD_THREADS: Statement = Statement::new(
    "import.add_threads",
    "INSERT INTO threads (
        id, tenant, user_key, scope_kind, scope_name, upstream, upstream_thread_id, lifecycle,
        previous_thread_id, metadata, created_at, last_active_at, archived_at, max_age_ms, max_idle_ms, due_at
    )
    SELECT {uuid e.value ->> 'id'}, e.value ->> 'tenant', e.value ->> 'user',
        {as scope_kind, e.value ->> 'scope_kind'}, e.value ->> 'scope_name', e.value ->> 'upstream',
        e.value ->> 'upstream_thread_id', {as thread_lifecycle, e.value ->> 'lifecycle'},
        {uuid e.value ->> 'previous_thread'}, e.value -> 'metadata', {at_us e.value ->> 'created_at'},
        {at_us e.value ->> 'last_active_at'}, {at_us e.value ->> 'archived_at'},
        CAST(e.value ->> 'max_age' AS bigint), CAST(e.value ->> 'max_idle' AS bigint),
        {at_us e.value ->> 'due_at'}
    FROM {each :rows}
    WHERE true
    ON CONFLICT DO NOTHING
    RETURNING id",
);

/// `rows`: see [`ThreadToFind`]. A thread whose upstream thread was deleted since is still found
/// by its id.
static FIND_KNOWN_THREADS: Statement = Statement::variant(
    "import.find_known_threads",
    "SELECT CAST(e.value ->> 'place' AS bigint), (
        SELECT t.id FROM threads t
        WHERE {0} AND t.lifecycle <> 'deleting' AND CASE
            WHEN t.upstream <> e.value ->> 'upstream' THEN false
            WHEN e.value ->> 'upstream_thread_id' IS NOT NULL
            THEN COALESCE(t.upstream_thread_id, t.upstream_cleanup ->> 'upstream_thread_id')
                = e.value ->> 'upstream_thread_id'
            ELSE t.lifecycle = {as thread_lifecycle, e.value ->> 'lifecycle'}
                AND (t.lifecycle = 'current' OR e.value ->> 'created_at' IS NULL
                    OR t.created_at = {at_us e.value ->> 'created_at'})
        END
        ORDER BY t.id DESC
        LIMIT 1
    )
    FROM {each :rows}",
    OF_ROW,
);

/// `rows`: see [`ThreadToAdd`]. Returns whether the tenant's thread of that id has the row's key
/// (NULL if there is no such thread), and the current thread of the key.
static FIND_OTHERS: Statement = Statement::variant(
    "import.find_others",
    "SELECT {uuid e.value ->> 'id'}, (
        SELECT {0} FROM threads t WHERE t.id = {uuid e.value ->> 'id'} AND t.tenant = e.value ->> 'tenant'
    ), (
        SELECT t.id FROM threads t WHERE {0} AND t.lifecycle = 'current'
    )
    FROM {each :rows}",
    OF_ROW,
);

static FIND_OF_TENANT: Statement = Statement::new(
    "import.find_of_tenant",
    "SELECT t.id FROM threads t WHERE t.id {in :ids} AND t.tenant = :tenant",
);

/// Locks threads by id, like every statement that locks several.
static LOCK_THREADS: Statement = Statement::new(
    "import.lock_threads",
    "SELECT t.id, t.upstream_thread_id IS NOT NULL, t.last_position FROM threads t
    WHERE t.id {in :ids} AND t.lifecycle <> 'deleting'
    ORDER BY t.id
    {lock t}",
);

static LIST_KNOWN_MESSAGES: Statement = Statement::new(
    "import.list_known_messages",
    "SELECT m.id FROM messages m WHERE m.id {in :ids}",
);

/// `rows`: see [`MessageToAdd`]. Another import may have added a message to another thread
/// meanwhile. That message is skipped, too, and leaves a gap.
static ADD_MESSAGES: Statement = Statement::new(
    "import.add_messages",
    "INSERT INTO messages (
        id, thread_id, position, role, content, upstream_message_id, upstream_sync, created_at
    )
    SELECT {uuid e.value ->> 'id'}, {uuid e.value ->> 'thread'}, CAST(e.value ->> 'position' AS bigint),
        {as message_role, e.value ->> 'role'}, e.value -> 'content', e.value ->> 'upstream_message_id',
        {as upstream_sync, e.value ->> 'upstream_sync'}, COALESCE({at_us e.value ->> 'created_at'}, {now})
    FROM {each :rows}
    WHERE true
    ON CONFLICT (id) DO NOTHING
    RETURNING thread_id, {text upstream_sync}",
);

/// `rows`: see [`ThreadToCount`].
static COUNT_MESSAGES: Statement = Statement::new(
    "import.count_messages",
    "UPDATE threads AS t SET message_count = t.message_count + CAST(e.value ->> 'added' AS bigint),
        last_position = CAST(e.value ->> 'position' AS bigint),
        unsynced_messages = t.unsynced_messages + CAST(e.value ->> 'missing' AS bigint)
    FROM {each :rows}
    WHERE t.id = {uuid e.value ->> 'id'}",
);

pub(super) static STATEMENTS: &[&Statement] = &[
    &READ_CLOCK,
    &ADD_THREADS,
    &FIND_KNOWN_THREADS,
    &FIND_OTHERS,
    &FIND_OF_TENANT,
    &LOCK_THREADS,
    &LIST_KNOWN_MESSAGES,
    &ADD_MESSAGES,
    &COUNT_MESSAGES,
];

impl Store {
    /// Imports threads, one after another, and returns the outcome for each. A thread that exists
    /// already is not changed. The caller bounds their number.
    ///
    /// A thread without an id exists already if its key has or had a thread on the same upstream.
    /// If the import names an upstream thread, that thread must have the same one. Otherwise it
    /// must be the current thread or, for an archived one, have the same age.
    ///
    /// # Errors
    /// The first threads may have been added all the same. The next call reports them as known.
    pub async fn import_threads(
        &self,
        threads: &[&ImportedThread],
    ) -> Result<Vec<Imported>, StoreError> {
        let mut results = Vec::with_capacity(threads.len());
        let mut rest = threads;
        while !rest.is_empty() {
            let (together, later) = rest.split_at(independent(rest));
            let mut c = self.backend.writer().await?;
            results.extend(add_threads(&mut c, together).await?);
            rest = later;
        }
        Ok(results)
    }

    /// Returns which of these threads the tenant has, in any state.
    pub async fn threads_of(
        &self,
        tenant: &TenantKey,
        ids: &BTreeSet<ThreadId>,
    ) -> Result<BTreeSet<ThreadId>, StoreError> {
        let mut c = self.backend.reader().await?;
        let ids: Vec<Uuid> = ids.iter().map(|id| id.uuid()).collect();
        let values = params().set("ids", ids).set("tenant", tenant.as_str());
        let found: Vec<(Uuid,)> = c.all(&FIND_OF_TENANT, values).await?;
        Ok(found
            .into_iter()
            .map(|(id,)| ThreadId::from_uuid(id))
            .collect())
    }

    /// Appends messages to the transcripts of their threads, in their order, and returns how many
    /// it added. It skips messages whose id exists in any thread, and threads that do not exist or
    /// are being deleted. The caller bounds the number of messages.
    ///
    /// A message without a state is `present` at the upstream if the thread has an upstream
    /// thread, else `missing`. Missing messages are sent with the thread's next run. An import
    /// does not count as activity of the thread.
    pub async fn import_messages(
        &self,
        transcripts: &[(ThreadId, Vec<ImportedMessage>)],
    ) -> Result<u64, StoreError> {
        let mut c = self.backend.writer().await?;
        c.begin().await?;
        let ids: BTreeSet<Uuid> = transcripts
            .iter()
            .map(|(thread, _)| thread.uuid())
            .collect();
        let found: Vec<(Uuid, bool, i64)> = c
            .all(&LOCK_THREADS, params().set("ids", Vec::from_iter(ids)))
            .await?;
        let mut threads: BTreeMap<Uuid, ThreadToCount> = found
            .into_iter()
            .map(|(id, has, position)| (id, ThreadToCount::new(id, has, position)))
            .collect();
        let of_threads = |threads: &BTreeMap<Uuid, ThreadToCount>| {
            let there = transcripts
                .iter()
                .filter(|(thread, _)| threads.contains_key(&thread.uuid()));
            there
                .flat_map(|(_, messages)| messages)
                .map(|message| message.id.uuid())
                .collect::<Vec<_>>()
        };
        let known: Vec<(Uuid,)> = c
            .all(
                &LIST_KNOWN_MESSAGES,
                params().set("ids", of_threads(&threads)),
            )
            .await?;
        let mut seen: BTreeSet<Uuid> = known.into_iter().map(|(id,)| id).collect();
        let mut rows = Vec::new();
        for (thread, messages) in transcripts {
            let Some(thread) = threads.get_mut(&thread.uuid()) else {
                continue;
            };
            for message in messages
                .iter()
                .filter(|message| seen.insert(message.id.uuid()))
            {
                rows.push(thread.next(message, self.redaction));
            }
        }
        if rows.is_empty() {
            c.roll_back().await?;
            return Ok(0);
        }
        let added: Vec<(Uuid, String)> = c
            .all(&ADD_MESSAGES, params().json("rows", Some(&rows))?)
            .await?;
        for (thread, sync) in &added {
            if let Some(thread) = threads.get_mut(thread) {
                thread.added += 1;
                thread.missing += i64::from(sync == UpstreamSync::Missing.as_str());
            }
        }
        let counts: Vec<&ThreadToCount> =
            threads.values().filter(|thread| thread.added > 0).collect();
        c.execute(&COUNT_MESSAGES, params().json("rows", Some(&counts))?)
            .await?;
        c.commit().await?;
        Ok(added.len() as u64)
    }
}

/// Returns how many of the first threads can be added in one batch with the same result as one
/// after another. An id belongs to the first thread that has it. The search for a thread without
/// an id must see all threads of its key that come before it, and no others.
fn independent(threads: &[&ImportedThread]) -> usize {
    let mut ids = HashSet::new();
    // For each key: whether all its threads so far have ids.
    let mut keys: HashMap<&ConversationKey, bool> = HashMap::new();
    for (place, thread) in threads.iter().enumerate() {
        let has_id = thread.id.is_some();
        let is_repeated = thread.id.is_some_and(|id| !ids.insert(id));
        let is_looked_up = keys
            .insert(&thread.key, has_id)
            .is_some_and(|have_ids| !(have_ids && has_id));
        if is_repeated || is_looked_up {
            return place;
        }
    }
    threads.len()
}

/// Adds threads none of which depends on another. The insertion decides. The reads before and
/// after it only find what existed.
async fn add_threads(
    c: &mut Connection,
    threads: &[&ImportedThread],
) -> Result<Vec<Imported>, StoreError> {
    let mut results: Vec<Option<Imported>> = vec![None; threads.len()];
    find_known(c, threads, &mut results).await?;
    let (At(now),): (At,) = c.one(&READ_CLOCK, params()).await?;
    let sequence = ContextV7::new();
    let mut rows: Vec<(usize, ThreadToAdd<'_>)> = Vec::new();
    for (place, thread) in threads
        .iter()
        .enumerate()
        .filter(|(place, _)| results[*place].is_none())
    {
        rows.push((place, ThreadToAdd::new(thread, now, &sequence)));
    }
    // Insert in the order of keys, so that no two imports wait for each other. Threads of one key
    // keep their order.
    rows.sort_by_key(|(_, row)| row.key());
    let values: Vec<_> = rows.iter().map(|(_, row)| row).collect();
    let added: Vec<(Uuid,)> = c
        .all(&ADD_THREADS, params().json("rows", Some(&values))?)
        .await?;
    let added: HashSet<Uuid> = added.into_iter().map(|(id,)| id).collect();
    let (added, rows): (Vec<_>, Vec<_>) = rows
        .into_iter()
        .partition(|(_, row)| added.contains(row.id.as_uuid()));
    let added: HashMap<Uuid, usize> = added
        .into_iter()
        .map(|(place, row)| (row.id.into_uuid(), place))
        .collect();
    for (id, place) in &added {
        results[*place] = Some(Imported::Added(ThreadId::from_uuid(*id)));
    }
    if !rows.is_empty() {
        // Another import has added the threads without an id meanwhile.
        find_known(c, threads, &mut results).await?;
        let values: Vec<_> = rows.iter().map(|(_, row)| row).collect();
        let others: Vec<(Uuid, Option<bool>, Option<Uuid>)> = c
            .all(&FIND_OTHERS, params().json("rows", Some(&values))?)
            .await?;
        let others: HashMap<Uuid, _> = others
            .into_iter()
            .map(|(id, is_same, current)| (id, (is_same, current)))
            .collect();
        for (place, row) in rows {
            let (is_same, current) = others.get(row.id.as_uuid()).copied().unwrap_or_default();
            // A thread that this batch added after it does not count.
            let current = current.filter(|id| added.get(id).is_none_or(|current| *current < place));
            let other = match (threads[place].id, is_same, current) {
                (Some(id), Some(true), _) => Some(Imported::Known(id)),
                (_, None, Some(current)) => Some(Imported::Taken(ThreadId::from_uuid(current))),
                // The id belongs to another key or another tenant.
                (Some(_), _, _) => Some(Imported::OtherKey),
                (None, _, _) => None,
            };
            results[place] = results[place].or(other);
        }
    }
    let settled = results.into_iter().collect::<Option<Vec<_>>>();
    settled.ok_or_else(|| StoreError::Unavailable("the key's thread changed: try again".into()))
}

/// Finds the existing threads for those without an id that have no result yet.
async fn find_known(
    c: &mut Connection,
    threads: &[&ImportedThread],
    results: &mut [Option<Imported>],
) -> Result<(), StoreError> {
    let unknown = threads
        .iter()
        .enumerate()
        .filter(|(place, it)| it.id.is_none() && results[*place].is_none());
    let rows: Vec<ThreadToFind<'_>> = unknown
        .map(|(place, thread)| ThreadToFind::new(place, thread))
        .collect();
    if rows.is_empty() {
        return Ok(());
    }
    let found: Vec<(i64, Option<Uuid>)> = c
        .all(&FIND_KNOWN_THREADS, params().json("rows", Some(&rows))?)
        .await?;
    for (place, id) in found {
        if let Some(result) = usize::try_from(place)
            .ok()
            .and_then(|place| results.get_mut(place))
        {
            *result = id.map(|id| Imported::Known(ThreadId::from_uuid(id)));
        }
    }
    Ok(())
}

/// The key of a thread, as a parameter.
#[derive(Serialize)]
struct KeyToFind<'a> {
    tenant: &'a str,
    user: &'a str,
    scope_kind: &'static str,
    scope_name: &'a str,
}

impl<'a> KeyToFind<'a> {
    fn new(key: &'a ConversationKey) -> Self {
        Self {
            tenant: key.tenant.as_str(),
            user: key.user.as_str(),
            scope_kind: key.scope.kind(),
            scope_name: key.scope.name(),
        }
    }
}

/// A thread without an id, as a parameter.
#[derive(Serialize)]
struct ThreadToFind<'a> {
    /// The index among the threads of the call.
    place: usize,
    #[serde(flatten)]
    key: KeyToFind<'a>,
    upstream: &'a str,
    upstream_thread_id: Option<&'a str>,
    lifecycle: &'static str,
    /// In microseconds since 1970.
    created_at: Option<i64>,
}

impl<'a> ThreadToFind<'a> {
    fn new(place: usize, thread: &'a ImportedThread) -> Self {
        Self {
            place,
            key: KeyToFind::new(&thread.key),
            upstream: &thread.upstream,
            upstream_thread_id: thread
                .upstream_thread_id
                .as_ref()
                .map(UpstreamThreadId::as_str),
            lifecycle: thread.lifecycle.as_str(),
            created_at: thread.created_at.map(|at| at.timestamp_micros()),
        }
    }
}

/// A thread, as a parameter. Times are in microseconds since 1970.
#[derive(Serialize)]
struct ThreadToAdd<'a> {
    id: Simple,
    #[serde(flatten)]
    key: KeyToFind<'a>,
    upstream: &'a str,
    upstream_thread_id: Option<&'a str>,
    lifecycle: &'static str,
    previous_thread: Option<Simple>,
    metadata: &'a Metadata,
    created_at: i64,
    last_active_at: i64,
    archived_at: Option<i64>,
    max_age: Option<i64>,
    max_idle: Option<i64>,
    due_at: Option<i64>,
}

impl<'a> ThreadToAdd<'a> {
    /// Fills in what the import leaves out. `sequence` keeps the order of ids that are made at the
    /// same time.
    fn new(thread: &'a ImportedThread, now: Timestamp, sequence: &ContextV7) -> Self {
        let created_at = thread.created_at.unwrap_or(now);
        let archived_at =
            (thread.lifecycle != Lifecycle::Current).then(|| thread.archived_at.unwrap_or(now));
        let last_active_at = thread
            .last_active_at
            .or(archived_at)
            .unwrap_or(now)
            .max(created_at);
        let limits = if thread.limits == Limits::NONE {
            thread.configured
        } else {
            thread.limits
        };
        let (lifecycle, due_at) = match archived_at {
            Some(_) => (Lifecycle::Archived, Some(now)),
            None => (Lifecycle::Current, limits.end(created_at, last_active_at)),
        };
        let id = match (thread.id, thread.created_at) {
            (Some(id), _) => id,
            (None, Some(created_at)) => id_of(created_at),
            (None, None) => id_at(now, sequence),
        };
        Self {
            id: id.uuid().simple(),
            key: KeyToFind::new(&thread.key),
            upstream: &thread.upstream,
            upstream_thread_id: thread
                .upstream_thread_id
                .as_ref()
                .map(UpstreamThreadId::as_str),
            lifecycle: lifecycle.as_str(),
            previous_thread: thread.previous_thread.map(|id| id.uuid().simple()),
            metadata: &thread.metadata,
            created_at: created_at.timestamp_micros(),
            last_active_at: last_active_at.timestamp_micros(),
            archived_at: archived_at.map(|at| at.timestamp_micros()),
            max_age: thread.limits.max_age.map(millis),
            max_idle: thread.limits.max_idle.map(millis),
            due_at: due_at.map(|at| at.timestamp_micros()),
        }
    }

    fn key(&self) -> (&'a str, &'a str, &'static str, &'a str) {
        (
            self.key.tenant,
            self.key.user,
            self.key.scope_kind,
            self.key.scope_name,
        )
    }
}

/// A message, as a parameter.
#[derive(Serialize)]
struct MessageToAdd<'a> {
    id: Simple,
    thread: Simple,
    position: i64,
    role: &'static str,
    content: &'a [ContentPart],
    upstream_message_id: Option<&'a str>,
    upstream_sync: &'static str,
    /// In microseconds since 1970; `None`: now.
    created_at: Option<i64>,
}

/// A thread to which messages are added, as a parameter.
#[derive(Serialize)]
struct ThreadToCount {
    id: Simple,
    #[serde(skip)]
    has_upstream: bool,
    /// The position of its last message.
    position: i64,
    added: i64,
    missing: i64,
}

impl ThreadToCount {
    fn new(id: Uuid, has_upstream: bool, position: i64) -> Self {
        Self {
            id: id.simple(),
            has_upstream,
            position,
            added: 0,
            missing: 0,
        }
    }

    /// Returns the row of its next message.
    fn next<'a>(&mut self, message: &'a ImportedMessage, redaction: Redaction) -> MessageToAdd<'a> {
        self.position += 1;
        let by_default = if self.has_upstream {
            UpstreamSync::Present
        } else {
            UpstreamSync::Missing
        };
        // An unknown state can be settled only for a run's messages.
        let sync = message.sync.filter(|sync| *sync != UpstreamSync::Unknown);
        MessageToAdd {
            id: message.id.uuid().simple(),
            thread: self.id,
            position: self.position,
            role: message.role.as_str(),
            content: redaction.parts(&message.content),
            upstream_message_id: message.upstream_message_id.as_deref(),
            upstream_sync: redaction.sync(sync.unwrap_or(by_default)).as_str(),
            created_at: message.created_at.map(|at| at.timestamp_micros()),
        }
    }
}

/// Returns a new id for a thread that was created at this time, so that ids sort by age.
pub(super) fn id_of(created_at: Timestamp) -> ThreadId {
    id_at(created_at, NoContext)
}

fn id_at(time: Timestamp, sequence: impl ClockSequence<Output = impl Into<u128>>) -> ThreadId {
    let seconds = u64::try_from(time.timestamp()).unwrap_or(0);
    let time = uuid::Timestamp::from_unix(sequence, seconds, time.timestamp_subsec_nanos());
    ThreadId::from_uuid(Uuid::new_v7(time))
}

/// A thread that is to be imported.
#[derive(Clone, Debug)]
pub struct ImportedThread {
    /// The thread's id. Lists are in the order of ids, so a given id should say when the thread
    /// was created. `None`: the thread is recognised by its key, and gets such an id.
    pub id: Option<ThreadId>,
    pub key: ConversationKey,
    pub upstream: String,
    pub upstream_thread_id: Option<UpstreamThreadId>,
    /// `Current` or `Archived`.
    pub lifecycle: Lifecycle,
    pub previous_thread: Option<ThreadId>,
    pub metadata: Metadata,
    /// `None`: now.
    pub created_at: Option<Timestamp>,
    /// `None`: the time at which it was archived, else now. It is never before `created_at`.
    pub last_active_at: Option<Timestamp>,
    /// `None`: now, if it is archived.
    pub archived_at: Option<Timestamp>,
    /// The thread's own limits.
    pub limits: Limits,
    /// The configured limits of its scope, for a thread without limits of its own. They decide
    /// when it is due.
    pub configured: Limits,
}

/// The outcome for an imported thread.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Imported {
    Added(ThreadId),
    /// The thread existed already: it is this one.
    Known(ThreadId),
    /// Refused: the key has another current thread, this one.
    Taken(ThreadId),
    /// Refused: the id belongs to a thread of another key.
    OtherKey,
}

/// A message that is to be imported.
#[derive(Clone, Debug)]
pub struct ImportedMessage {
    pub id: MessageId,
    pub role: Role,
    pub content: Vec<ContentPart>,
    pub upstream_message_id: Option<String>,
    /// The state at the upstream. `None` or `Unknown`: it follows from the thread, since an
    /// unknown state cannot be settled for this message.
    pub sync: Option<UpstreamSync>,
    pub created_at: Option<Timestamp>,
}

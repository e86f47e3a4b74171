//! Imports threads and messages.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::io::{self, BufRead, Read};
use std::panic::resume_unwind;
use std::sync::Arc;
use std::time::Duration;

use chrono::{Datelike, TimeDelta};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tokio::task::JoinSet;

use super::{Counts, MessageLine, ThreadLine};
use crate::config::Config;
use crate::domain::{
    ConversationKey, InvalidContent, Lifecycle, Limits, MessageId, Role, TenantKey, ThreadId,
    Timestamp, UserContent,
};
use crate::store::{Imported, ImportedMessage, ImportedThread, Store, StoreError};
use crate::wording;

/// Longest line in bytes.
const MAX_LINE: usize = 16 << 20;
/// Lines of a batch for the store.
const LINES_AT_ONCE: usize = 1000;
/// Bytes of a batch for the store, without its last line.
const BYTES_AT_ONCE: usize = 1 << 20;
/// U+FEFF in UTF-8.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
/// Longest time by which the time in a thread's id may be ahead of `created_at`.
const SKEW: TimeDelta = TimeDelta::days(1);

/// Counts of the imported and skipped lines.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Summary {
    pub threads_added: u64,
    /// Threads that existed already.
    pub threads_known: u64,
    pub messages_added: u64,
    pub messages_known: u64,
    /// Lines of runs.
    pub runs_passed_over: u64,
    /// Messages of refused threads.
    pub messages_passed_over: u64,
    pub refused: u64,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} threads and {} messages added, {} threads and {} messages were there already, {} lines refused",
            self.threads_added,
            self.messages_added,
            self.threads_known,
            self.messages_known,
            self.refused
        )?;
        if self.messages_passed_over > 0 {
            write!(
                f,
                ", {} messages of refused threads passed over",
                self.messages_passed_over
            )?;
        }
        if self.runs_passed_over > 0 {
            write!(f, ", {} lines of runs passed over", self.runs_passed_over)?;
        }
        Ok(())
    }
}

/// A refused line. The rest of the file is imported.
#[derive(Debug, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct Refused {
    /// The number of the line; the first one is 1.
    pub line: u64,
    pub problem: Problem,
}

/// The problem of a line.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    #[error("it is longer than {MAX_LINE} bytes")]
    TooLong,
    #[error("it is not a JSON object: {}", without_value(.0))]
    NotJson(serde_json::Error),
    #[error("`type` must be `thread`, `run`, `message` or `end`")]
    Type,
    /// The place of the field, and the problem.
    #[error("{}{}", .0, without_value(.1))]
    Field(String, serde_json::Error),
    #[error(
        "`upstream` is missing, and there is no default assistant from which it could be taken"
    )]
    NoUpstream,
    #[error("no upstream `{0}` is configured: correct `upstream`, or configure the upstream first")]
    UnknownUpstream(String),
    #[error("`{0}` must be 1 to 512 bytes without control characters")]
    Upstream(&'static str),
    #[error("`{0}` must be a time from 1970 to 9999, written like 2024-06-14T12:00:00Z")]
    Time(&'static str),
    #[error("`lifecycle` must be `current` or `archived`")]
    Lifecycle,
    #[error("the time in `id` is later than `created_at`: correct one of them, or leave `id` out")]
    IdTooYoung,
    #[error("`content`: {0}")]
    Content(InvalidContent),
    #[error(
        "`role` must be `user` or `assistant`: leave out messages of systems, developers and tools, because a thread \
         holds none of them (fixed instructions for a model belong to `instructions` of its assistant)"
    )]
    Role,
    #[error("a message without `thread_id` must come after the line of its thread")]
    NoThread,
    #[error("there is no thread {0}")]
    UnknownThread(ThreadId),
    #[error("the key has another current thread, {0}, which is left as it is")]
    Taken(ThreadId),
    #[error("`id` belongs to a thread of another key, which is left as it is")]
    OtherKey,
    #[error("nothing may follow the end line")]
    AfterEnd,
    #[error(
        "the end line counts {} threads, {} runs and {} messages, but the file has {}, {} and {}: it is not whole",
        .said.threads, .said.runs, .said.messages, .found.threads, .found.runs, .found.messages
    )]
    NotWhole { said: Counts, found: Counts },
    #[error("the file has ids as an export has, but no end line: it was cut off")]
    CutOff,
}

/// Returns the problem without the value that was found, because the value may be content of a
/// message and the text is logged.
fn without_value(error: &serde_json::Error) -> String {
    let text = error.to_string();
    if let Some(told) = wording::plain(&text) {
        return told;
    }
    let text = wording::without_place(&text);
    let is_quote = |c| matches!(c, '"' | '`');
    match text.find(is_quote).zip(text.rfind(is_quote)) {
        Some((first, last)) if first < last => format!("{}…{}", &text[..first], &text[last + 1..]),
        _ => text.to_owned(),
    }
}

/// The reason why the import stopped.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    #[error("the file cannot be read")]
    Read(#[source] io::Error),
    /// Earlier lines have been imported.
    #[error("the store failed at line {line} or after it")]
    Store {
        line: u64,
        #[source]
        source: StoreError,
    },
}

/// Imports lines, except those that exist already, and passes each refused line to `refused`, in
/// order. A failed import can be repeated with the same lines.
///
/// While the store writes a batch, the next one is read. The input may block its reader, so the
/// store's part runs in a task of its own.
///
/// # Panics
/// If that task panics.
pub async fn import(
    store: Arc<Store>,
    config: &Config,
    input: impl BufRead,
    mut refused: impl FnMut(Refused),
) -> Result<Summary, ImportError> {
    let mut reader = Reader::new(config, input);
    let mut import = Import {
        store,
        summary: Summary::default(),
        thread: None,
    };
    let mut batch = reader.batch().map_err(ImportError::Read)?;
    while !batch.lines.is_empty() {
        let mut task = JoinSet::new();
        task.spawn(async move {
            let refusals = import.take(batch).await;
            (import, refusals)
        });
        let next = reader.batch();
        let done = task.join_next().await.expect("a task was spawned");
        let refusals: Result<Vec<Refused>, ImportError>;
        (import, refusals) = done.unwrap_or_else(|error| resume_unwind(error.into_panic()));
        refusals?.into_iter().for_each(&mut refused);
        batch = next.map_err(ImportError::Read)?;
    }
    let mut summary = import.summary;
    summary.runs_passed_over = reader.counts.runs;
    if reader.has_ids && !reader.ended {
        summary.refused += 1;
        refused(Refused {
            line: reader.line,
            problem: Problem::CutOff,
        });
    }
    Ok(summary)
}

/// A batch of lines for the store, with their numbers.
#[derive(Default)]
struct Batch {
    lines: Vec<(u64, Parsed)>,
    bytes: usize,
    /// Threads that messages name and whose thread line is not directly before them.
    named: HashSet<ThreadId>,
}

/// The content of a line, as far as it is known without the store.
enum Parsed {
    Thread(Result<Box<ImportedThread>, Problem>),
    Message(Of, Result<Box<MessageLine>, Problem>),
    Refused(Problem),
}

/// The thread that a message belongs to.
enum Of {
    /// The thread of the line before.
    Before,
    Named(TenantKey, ThreadId),
}

/// Parses the lines, without the store.
struct Reader<'a, R> {
    config: &'a Config,
    input: R,
    buffer: Vec<u8>,
    /// The number of the last line that was read.
    line: u64,
    /// The counts of the file so far.
    counts: Counts,
    has_ids: bool,
    ended: bool,
    /// The tenant of the last thread line.
    tenant: TenantKey,
    /// The id by which the lines name the thread of the current messages.
    thread: Option<ThreadId>,
    /// A parsed line that belongs to the next batch.
    held: Option<(usize, Parsed)>,
}

impl<'a, R: BufRead> Reader<'a, R> {
    fn new(config: &'a Config, input: R) -> Self {
        Self {
            config,
            input,
            buffer: Vec::new(),
            line: 0,
            counts: Counts::default(),
            has_ids: false,
            ended: false,
            tenant: TenantKey::default(),
            thread: None,
            held: None,
        }
    }

    /// Returns the next batch; an empty one at the end of the file.
    fn batch(&mut self) -> io::Result<Batch> {
        let mut batch = Batch::default();
        while batch.lines.len() < LINES_AT_ONCE && batch.bytes < BYTES_AT_ONCE {
            let next = match self.held.take() {
                None => self.next()?,
                held => held,
            };
            let Some((bytes, parsed)) = next else { break };
            match &parsed {
                // An earlier message of the batch names this thread, and must be checked before
                // the thread exists.
                Parsed::Thread(Ok(thread))
                    if thread.id.is_some_and(|id| batch.named.contains(&id)) =>
                {
                    self.held = Some((bytes, parsed));
                    break;
                }
                Parsed::Message(Of::Named(_, id), _) => {
                    batch.named.insert(*id);
                }
                _ => {}
            }
            batch.lines.push((self.line, parsed));
            batch.bytes += bytes;
        }
        Ok(batch)
    }

    /// Returns the next line that matters to the store, and its bytes.
    fn next(&mut self) -> io::Result<Option<(usize, Parsed)>> {
        loop {
            let mut buffer = std::mem::take(&mut self.buffer);
            buffer.clear();
            let whole = read_line(&mut self.input, &mut buffer)?;
            if buffer.is_empty() {
                return Ok(None);
            }
            self.line += 1;
            // Windows programs begin a UTF-8 file with this mark.
            let marked = buffer
                .strip_prefix(BYTE_ORDER_MARK)
                .filter(|_| self.line == 1);
            let line = marked.unwrap_or(&buffer);
            let said = if whole {
                self.parse(line)
            } else {
                Err(Problem::TooLong)
            };
            let bytes = line.len();
            self.buffer = buffer;
            if let Some(said) = said.unwrap_or_else(|problem| Some(Parsed::Refused(problem))) {
                return Ok(Some((bytes, said)));
            }
        }
    }

    /// Parses a line. Returns `None` if it holds nothing to import.
    fn parse(&mut self, line: &[u8]) -> Result<Option<Parsed>, Problem> {
        if line.trim_ascii().is_empty() {
            return Ok(None);
        }
        if self.ended {
            return Err(Problem::AfterEnd);
        }
        let mut object: Map<String, Value> =
            serde_json::from_slice(line).map_err(Problem::NotJson)?;
        match object.remove("type").as_ref().and_then(Value::as_str) {
            Some("thread") => {
                self.counts.threads += 1;
                self.has_ids |= object.contains_key("id");
                // If this line is refused, the messages after it must not go to the thread
                // before.
                self.thread = None;
                Ok(Some(match fields::<ThreadLine>(object) {
                    Ok(line) => {
                        self.tenant = line.key.tenant.clone();
                        self.thread = line.id;
                        Parsed::Thread(thread(line, self.config).map(Box::new))
                    }
                    Err(problem) => Parsed::Thread(Err(problem)),
                }))
            }
            Some("message") => {
                self.counts.messages += 1;
                let named = match object.get("thread_id").and_then(Value::as_str) {
                    Some(text) => text.parse().ok(),
                    None => None,
                };
                let of = match named {
                    Some(id) if self.thread != named => {
                        self.thread = named;
                        Of::Named(self.tenant.clone(), id)
                    }
                    _ => Of::Before,
                };
                Ok(Some(Parsed::Message(of, message(object).map(Box::new))))
            }
            Some("run") => {
                self.counts.runs += 1;
                Ok(None)
            }
            Some("end") => {
                self.ended = true;
                let said: Counts = fields(object)?;
                if said != self.counts {
                    return Err(Problem::NotWhole {
                        said,
                        found: self.counts,
                    });
                }
                Ok(None)
            }
            _ => Err(Problem::Type),
        }
    }
}

/// Reads up to the next line feed, which is part of the line. Returns `false` if the line is too
/// long, and skips its rest.
fn read_line(input: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<bool> {
    let limit = u64::try_from(MAX_LINE).unwrap_or(u64::MAX);
    input.by_ref().take(limit).read_until(b'\n', line)?;
    if line.len() < MAX_LINE || line.ends_with(b"\n") {
        return Ok(true);
    }
    input.skip_until(b'\n')?;
    Ok(false)
}

/// Passes batches to the store.
struct Import {
    store: Arc<Store>,
    summary: Summary,
    thread: Option<Current>,
}

/// The thread that the current messages belong to.
struct Current {
    /// `None`: the thread was refused, and its messages are skipped.
    id: Option<ThreadId>,
    /// Messages of the thread so far.
    messages: u64,
}

impl Import {
    /// Imports a batch as if its lines came one after another, and returns the refused ones.
    async fn take(&mut self, batch: Batch) -> Result<Vec<Refused>, ImportError> {
        let line = batch.lines.first().map_or(0, |(line, _)| *line);
        self.take_all(batch)
            .await
            .map_err(|source| ImportError::Store { line, source })
    }

    /// Imports all threads first, then all messages, because no thread depends on a message.
    async fn take_all(&mut self, batch: Batch) -> Result<Vec<Refused>, StoreError> {
        let threads: Vec<&ImportedThread> = batch
            .lines
            .iter()
            .filter_map(|(_, it)| it.thread())
            .collect();
        let mut imported = self.store.import_threads(&threads).await?.into_iter();
        let there = self.named(&batch).await?;
        let mut refusals = Vec::new();
        let mut transcripts: Vec<(ThreadId, Vec<ImportedMessage>)> = Vec::new();
        for (line, parsed) in batch.lines {
            let taken = match parsed {
                Parsed::Refused(problem) => Err(problem),
                Parsed::Thread(thread) => self.begin(thread.map(|_| imported.next())),
                Parsed::Message(of, message) => self.place(of, &there).and_then(|place| {
                    let Some((thread, place)) = place else {
                        return Ok(());
                    };
                    let message = imported_message(*message?, thread, place);
                    match transcripts.last_mut() {
                        Some((last, messages)) if *last == thread => messages.push(message),
                        _ => transcripts.push((thread, vec![message])),
                    }
                    Ok(())
                }),
            };
            if let Err(problem) = taken {
                self.summary.refused += 1;
                refusals.push(Refused { line, problem });
            }
        }
        if !transcripts.is_empty() {
            let added = self.store.import_messages(&transcripts).await?;
            let all: usize = transcripts.iter().map(|(_, messages)| messages.len()).sum();
            self.summary.messages_added += added;
            self.summary.messages_known += all as u64 - added;
        }
        Ok(refusals)
    }

    /// Returns those of the threads that messages name which exist.
    async fn named(
        &self,
        batch: &Batch,
    ) -> Result<HashMap<TenantKey, BTreeSet<ThreadId>>, StoreError> {
        let mut named: HashMap<TenantKey, BTreeSet<ThreadId>> = HashMap::new();
        for (_, parsed) in &batch.lines {
            if let Parsed::Message(Of::Named(tenant, id), _) = parsed {
                named.entry(tenant.clone()).or_default().insert(*id);
            }
        }
        for (tenant, ids) in &mut named {
            *ids = self.store.threads_of(tenant, ids).await?;
        }
        Ok(named)
    }

    /// Makes this the thread of the messages that follow.
    fn begin(&mut self, imported: Result<Option<Imported>, Problem>) -> Result<(), Problem> {
        let current = self.thread.insert(Current {
            id: None,
            messages: 0,
        });
        match imported? {
            Some(Imported::Added(id)) => {
                current.id = Some(id);
                self.summary.threads_added += 1;
                Ok(())
            }
            Some(Imported::Known(id)) => {
                current.id = Some(id);
                self.summary.threads_known += 1;
                Ok(())
            }
            Some(Imported::Taken(id)) => Err(Problem::Taken(id)),
            Some(Imported::OtherKey) | None => Err(Problem::OtherKey),
        }
    }

    /// Returns the thread of a message, and the message's position in it; `None` if the thread
    /// was refused.
    fn place(
        &mut self,
        of: Of,
        there: &HashMap<TenantKey, BTreeSet<ThreadId>>,
    ) -> Result<Option<(ThreadId, u64)>, Problem> {
        if let Of::Named(tenant, id) = of
            && self
                .thread
                .as_ref()
                .is_none_or(|current| current.id != Some(id))
        {
            let is_there = there.get(&tenant).is_some_and(|ids| ids.contains(&id));
            self.thread = Some(Current {
                id: is_there.then_some(id),
                messages: 0,
            });
            if !is_there {
                return Err(Problem::UnknownThread(id));
            }
        }
        let current = self.thread.as_mut().ok_or(Problem::NoThread)?;
        current.messages += 1;
        if current.id.is_none() {
            self.summary.messages_passed_over += 1;
        }
        Ok(current.id.map(|id| (id, current.messages)))
    }
}

impl Parsed {
    fn thread(&self) -> Option<&ImportedThread> {
        match self {
            Self::Thread(thread) => thread.as_deref().ok(),
            _ => None,
        }
    }
}

/// Deserialises the fields of a line. An error names its place.
fn fields<T: DeserializeOwned>(object: Map<String, Value>) -> Result<T, Problem> {
    serde_path_to_error::deserialize(Value::Object(object)).map_err(|error| {
        let path = error.path().to_string();
        let place = if path == "." {
            String::new()
        } else {
            format!("`{path}`: ")
        };
        Problem::Field(place, error.into_inner())
    })
}

fn thread(line: ThreadLine, config: &Config) -> Result<ImportedThread, Problem> {
    let ThreadLine {
        key,
        lifecycle,
        upstream_thread_id,
        created_at,
        ..
    } = line;
    if lifecycle == Lifecycle::Deleting {
        return Err(Problem::Lifecycle);
    }
    let by_default = || {
        let assistant = config.assistants.get(config.default_assistant()?)?;
        Some(assistant.upstream.clone())
    };
    let upstream = line
        .upstream
        .or_else(by_default)
        .ok_or(Problem::NoUpstream)?;
    if !is_upstream_text(&upstream) {
        return Err(Problem::Upstream("upstream"));
    }
    // The upstream of an archived thread need not be configured any more.
    if lifecycle == Lifecycle::Current && !config.upstreams.contains_key(&upstream) {
        return Err(Problem::UnknownUpstream(upstream));
    }
    if upstream_thread_id
        .as_ref()
        .is_some_and(|id| !is_upstream_text(id.as_str()))
    {
        return Err(Problem::Upstream("upstream_thread_id"));
    }
    for (name, time) in [
        ("created_at", created_at),
        ("last_active_at", line.last_active_at),
        ("archived_at", line.archived_at),
    ] {
        check_time(name, time)?;
    }
    if let (Some(id), Some(created_at)) = (line.id, created_at)
        && made_at(id).is_none_or(|made_at| made_at - created_at > SKEW)
    {
        return Err(Problem::IdTooYoung);
    }
    let key = ConversationKey {
        tenant: key.tenant,
        user: key.user,
        scope: key.scope.0,
    };
    Ok(ImportedThread {
        id: line.id,
        upstream,
        upstream_thread_id,
        lifecycle,
        previous_thread: line.previous_thread,
        metadata: line.metadata,
        created_at,
        last_active_at: line.last_active_at,
        archived_at: line.archived_at,
        limits: Limits {
            max_age: line.max_age_ms.map(Duration::from_millis),
            max_idle: line.max_idle_ms.map(Duration::from_millis),
        },
        configured: config.lifetimes().of(&key.scope),
        key,
    })
}

fn message(object: Map<String, Value>) -> Result<MessageLine, Problem> {
    let role = object.get("role").and_then(Value::as_str);
    if role.is_some_and(|role| role.parse::<Role>().is_err()) {
        return Err(Problem::Role);
    }
    let mut line: MessageLine = fields(object)?;
    let is_reply = line.role == Role::Assistant && !line.content.is_empty();
    // An exported message comes back as it was.
    if line.id.is_none() && !is_reply {
        line.content = UserContent::try_from(line.content)
            .map_err(Problem::Content)?
            .into_parts();
    }
    if line
        .upstream_message_id
        .as_ref()
        .is_some_and(|id| !is_upstream_text(id))
    {
        return Err(Problem::Upstream("upstream_message_id"));
    }
    check_time("created_at", line.created_at)?;
    Ok(line)
}

fn imported_message(line: MessageLine, thread: ThreadId, place: u64) -> ImportedMessage {
    ImportedMessage {
        id: line.id.unwrap_or_else(|| derived_id(thread, place)),
        role: line.role,
        content: line.content,
        upstream_message_id: line.upstream_message_id,
        sync: line.upstream_sync,
        created_at: line.created_at,
    }
}

/// Returns the id for a message that has none. It is the same at each import of the file.
fn derived_id(thread: ThreadId, place: u64) -> MessageId {
    let mut hash = Sha256::new();
    hash.update(thread.uuid().as_bytes());
    hash.update(place.to_be_bytes());
    let digest = hash.finalize();
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    MessageId::from_uuid(uuid::Builder::from_custom_bytes(bytes).into_uuid())
}

/// Returns the creation time in a thread's id.
fn made_at(id: ThreadId) -> Option<Timestamp> {
    let millis = i64::try_from(id.uuid().as_u128() >> 80).ok()?;
    Timestamp::from_timestamp_millis(millis)
}

/// Checks that both databases can store the time and compute with it.
fn check_time(name: &'static str, time: Option<Timestamp>) -> Result<(), Problem> {
    let fits = time.is_none_or(|time| (1970..=9999).contains(&time.year()));
    if fits {
        Ok(())
    } else {
        Err(Problem::Time(name))
    }
}

fn is_upstream_text(text: &str) -> bool {
    (1..=512).contains(&text.len()) && !text.contains(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_is_not_repeated() {
        for (json, told) in [
            (r#"{"planted\u0000": "x"}"#, "NUL characters; the key …"),
            (
                r#"{"threadkeeper_planted": "x"}"#,
                "metadata keys that begin with …",
            ),
        ] {
            let error = serde_json::from_str::<crate::domain::Metadata>(json).unwrap_err();
            let text = without_value(&error);
            assert!(text.contains(told) && !text.contains("planted"), "{text}");
        }
    }
}

//! Bringing along.

use std::fmt;
use std::io::{self, BufRead, Read};
use std::time::Duration;

use chrono::{Datelike, TimeDelta};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::{Counts, MessageLine, ThreadLine};
use crate::config::Config;
use crate::domain::{
    ConversationKey, InvalidContent, Lifecycle, Limits, MessageId, Role, TenantKey, ThreadId, Timestamp,
    UserContent,
};
use crate::store::{Imported, ImportedMessage, ImportedThread, Store, StoreError, ThreadName};
use crate::wording;

/// The longest line, in bytes.
const MAX_LINE: usize = 16 << 20;
/// Messages that are handed to the store at once, and how many bytes of lines these may have had.
const AT_ONCE: usize = 100;
const BYTES_AT_ONCE: usize = 1 << 20;
/// U+FEFF.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
/// By how much the time in a thread's id may be ahead of the time at which it was made.
const SKEW: TimeDelta = TimeDelta::days(1);

/// What became of the lines.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Summary {
    pub threads_added: u64,
    /// They were there.
    pub threads_known: u64,
    pub messages_added: u64,
    pub messages_known: u64,
    /// Lines of runs.
    pub runs_passed_over: u64,
    /// Messages of threads that were refused.
    pub messages_passed_over: u64,
    pub refused: u64,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} threads and {} messages added, {} threads and {} messages were there already, {} lines refused",
            self.threads_added, self.messages_added, self.threads_known, self.messages_known, self.refused
        )?;
        if self.messages_passed_over > 0 {
            write!(f, ", {} messages of refused threads passed over", self.messages_passed_over)?;
        }
        if self.runs_passed_over > 0 {
            write!(f, ", {} lines of runs passed over", self.runs_passed_over)?;
        }
        Ok(())
    }
}

/// A line that was refused. Whatever else the file holds was taken.
#[derive(Debug, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct Refused {
    /// 1 for the first one.
    pub line: u64,
    pub problem: Problem,
}

/// What is wrong with a line.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    #[error("it is longer than {MAX_LINE} bytes")]
    TooLong,
    #[error("it is not a JSON object: {}", without_value(.0))]
    NotJson(serde_json::Error),
    #[error("`type` must be `thread`, `run`, `message` or `end`")]
    Type,
    /// Where, and what.
    #[error("{}{}", .0, without_value(.1))]
    Field(String, serde_json::Error),
    #[error("`upstream` is missing, and there is no default assistant whose upstream could be meant")]
    NoUpstream,
    #[error("no upstream `{0}` is configured: correct `upstream`, or configure it before")]
    UnknownUpstream(String),
    #[error("`{0}` must be 1 to 512 bytes without control characters")]
    Upstream(&'static str),
    #[error("`{0}` must be a time from 1970 to 9999, written like 2024-06-14T12:00:00Z")]
    Time(&'static str),
    #[error("`lifecycle` must be `current` or `archived`")]
    Lifecycle,
    #[error(
        "`id` says that the thread was made later than `created_at` does: correct one of them, or leave `id` out"
    )]
    IdTooYoung,
    #[error("`content`: {0}")]
    Content(InvalidContent),
    #[error(
        "`role` must be `user` or `assistant`: leave out what systems, developers and tools said, for a thread holds none of \
         it (what a model is told each time belongs to `instructions` of its assistant)"
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

/// What is wrong, without what was found in its place: that may be what somebody said, and this is for logs.
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

/// Why nothing more was read.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    #[error("the file cannot be read")]
    Read(#[source] io::Error),
    #[error("the store failed at line {line}")]
    Store {
        line: u64,
        #[source]
        source: StoreError,
    },
}

/// Reads lines and adds what they say, but for what is there already. `refused` is told of each line that is not taken.
/// To be called again after it failed, with the same lines.
pub async fn import(
    store: &dyn Store,
    config: &Config,
    mut input: impl BufRead,
    refused: impl FnMut(Refused),
) -> Result<Summary, ImportError> {
    let mut import = Import {
        store,
        config,
        refused,
        summary: Summary::default(),
        line: 0,
        counts: Counts::default(),
        has_ids: false,
        ended: false,
        tenant: TenantKey::default(),
        thread: None,
        waiting: Vec::new(),
        waiting_bytes: 0,
    };
    let mut buffer = Vec::new();
    loop {
        buffer.clear();
        let whole = read_line(&mut input, &mut buffer).map_err(ImportError::Read)?;
        if buffer.is_empty() {
            break;
        }
        import.line += 1;
        // Windows begins a file with a mark that says that it is UTF-8.
        let marked = buffer.strip_prefix(BYTE_ORDER_MARK).filter(|_| import.line == 1);
        let line = marked.unwrap_or(&buffer);
        let taken = if whole { import.take(line).await } else { Err(Stop::Refused(Problem::TooLong)) };
        import.settle(taken)?;
    }
    let flushed = import.flush().await;
    import.settle(flushed)?;
    if import.has_ids && !import.ended {
        import.settle(Err(Stop::Refused(Problem::CutOff)))?;
    }
    Ok(import.summary)
}

/// Reads up to the next line feed, which is part of the line. `false` if the line is too long: its rest is skipped.
fn read_line(input: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<bool> {
    let limit = u64::try_from(MAX_LINE).unwrap_or(u64::MAX);
    input.by_ref().take(limit).read_until(b'\n', line)?;
    if line.len() < MAX_LINE || line.ends_with(b"\n") {
        return Ok(true);
    }
    input.skip_until(b'\n')?;
    Ok(false)
}

struct Import<'a, F> {
    store: &'a dyn Store,
    config: &'a Config,
    refused: F,
    summary: Summary,
    /// The one that was read last.
    line: u64,
    /// What the file had so far.
    counts: Counts,
    has_ids: bool,
    ended: bool,
    /// Of the thread line before.
    tenant: TenantKey,
    thread: Option<Current>,
    /// Messages of that thread that the store has not got yet.
    waiting: Vec<ImportedMessage>,
    waiting_bytes: usize,
}

/// The thread that messages are of now.
struct Current {
    /// As the lines name it, and as the store does.
    said: Option<ThreadId>,
    /// `None`: it was refused, and so are its messages.
    id: Option<ThreadId>,
    /// Messages of it so far.
    messages: u64,
}

/// Why a line was not taken.
enum Stop {
    Refused(Problem),
    Store(StoreError),
}

impl From<Problem> for Stop {
    fn from(problem: Problem) -> Self {
        Self::Refused(problem)
    }
}

impl From<StoreError> for Stop {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl<F: FnMut(Refused)> Import<'_, F> {
    fn settle(&mut self, taken: Result<(), Stop>) -> Result<(), ImportError> {
        match taken {
            Ok(()) => Ok(()),
            Err(Stop::Refused(problem)) => {
                self.summary.refused += 1;
                (self.refused)(Refused { line: self.line, problem });
                Ok(())
            }
            Err(Stop::Store(source)) => Err(ImportError::Store { line: self.line, source }),
        }
    }

    async fn take(&mut self, line: &[u8]) -> Result<(), Stop> {
        if line.trim_ascii().is_empty() {
            return Ok(());
        }
        if self.ended {
            return Err(Problem::AfterEnd.into());
        }
        let mut object: Map<String, Value> = serde_json::from_slice(line).map_err(Problem::NotJson)?;
        match object.remove("type").as_ref().and_then(Value::as_str) {
            Some("thread") => {
                self.flush().await?;
                self.counts.threads += 1;
                self.has_ids |= object.contains_key("id");
                // Should the line be refused, the messages after it are not those of the thread before.
                self.thread = Some(Current { said: None, id: None, messages: 0 });
                self.take_thread(fields(object)?).await
            }
            Some("message") => {
                self.counts.messages += 1;
                self.take_message(object, line.len()).await
            }
            Some("run") => {
                self.counts.runs += 1;
                self.summary.runs_passed_over += 1;
                Ok(())
            }
            Some("end") => {
                self.ended = true;
                let said: Counts = fields(object)?;
                if said != self.counts {
                    return Err(Problem::NotWhole { said, found: self.counts }.into());
                }
                Ok(())
            }
            _ => Err(Problem::Type.into()),
        }
    }

    async fn take_thread(&mut self, line: ThreadLine) -> Result<(), Stop> {
        self.tenant = line.key.tenant.clone();
        let current = Current { said: line.id, id: None, messages: 0 };
        let current = self.thread.insert(current);
        let imported = self.store.import_thread(&thread(line, self.config)?).await?;
        let (Imported::Added(id) | Imported::Known(id)) = imported else {
            return Err(match imported {
                Imported::Taken(id) => Problem::Taken(id).into(),
                _ => Problem::OtherKey.into(),
            });
        };
        current.id = Some(id);
        match imported {
            Imported::Added(_) => self.summary.threads_added += 1,
            _ => self.summary.threads_known += 1,
        }
        Ok(())
    }

    async fn take_message(&mut self, object: Map<String, Value>, bytes: usize) -> Result<(), Stop> {
        let named = match object.get("thread_id").and_then(Value::as_str) {
            Some(text) => text.parse().ok(),
            None => None,
        };
        let is_current = named.is_none()
            || self.thread.as_ref().is_some_and(|current| current.said == named || current.id == named);
        if let Some(id) = named.filter(|_| !is_current) {
            self.flush().await?;
            let found = self.store.report(ThreadName::Id(&self.tenant, id)).await?;
            self.thread = Some(Current { said: named, id: found.map(|_| id), messages: 0 });
            if self.thread.as_ref().is_none_or(|current| current.id.is_none()) {
                return Err(Problem::UnknownThread(id).into());
            }
        }
        let Some(current) = &mut self.thread else { return Err(Problem::NoThread.into()) };
        current.messages += 1;
        let (place, Some(thread)) = (current.messages, current.id) else {
            self.summary.messages_passed_over += 1;
            return Ok(());
        };
        let role = object.get("role").and_then(Value::as_str);
        if role.is_some_and(|role| role.parse::<Role>().is_err()) {
            return Err(Problem::Role.into());
        }
        self.waiting.push(message(fields(object)?, thread, place)?);
        self.waiting_bytes += bytes;
        if self.waiting.len() >= AT_ONCE || self.waiting_bytes >= BYTES_AT_ONCE {
            self.flush().await?;
        }
        Ok(())
    }

    /// Hands over the messages that wait.
    async fn flush(&mut self) -> Result<(), Stop> {
        let messages = std::mem::take(&mut self.waiting);
        self.waiting_bytes = 0;
        if let Some(Current { id: Some(thread), .. }) = self.thread
            && !messages.is_empty()
        {
            let added = self.store.import_messages(thread, &messages).await?;
            self.summary.messages_added += added;
            self.summary.messages_known += messages.len() as u64 - added;
        }
        Ok(())
    }
}

/// The fields of a line. What is wrong is told with its place.
fn fields<T: DeserializeOwned>(object: Map<String, Value>) -> Result<T, Problem> {
    serde_path_to_error::deserialize(Value::Object(object)).map_err(|error| {
        let path = error.path().to_string();
        let place = if path == "." { String::new() } else { format!("`{path}`: ") };
        Problem::Field(place, error.into_inner())
    })
}

fn thread(line: ThreadLine, config: &Config) -> Result<ImportedThread, Problem> {
    let ThreadLine { key, lifecycle, upstream_thread_id, created_at, .. } = line;
    if lifecycle == Lifecycle::Deleting {
        return Err(Problem::Lifecycle);
    }
    let by_default = || {
        let assistant = config.assistants.get(config.default_assistant()?)?;
        Some(assistant.upstream.clone())
    };
    let upstream = line.upstream.or_else(by_default).ok_or(Problem::NoUpstream)?;
    if !is_upstream_text(&upstream) {
        return Err(Problem::Upstream("upstream"));
    }
    // What is only read need not be reached any more.
    if lifecycle == Lifecycle::Current && !config.upstreams.contains_key(&upstream) {
        return Err(Problem::UnknownUpstream(upstream));
    }
    if upstream_thread_id.as_ref().is_some_and(|id| !is_upstream_text(id.as_str())) {
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
    let key = ConversationKey { tenant: key.tenant, user: key.user, scope: key.scope.0 };
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

fn message(line: MessageLine, thread: ThreadId, place: u64) -> Result<ImportedMessage, Problem> {
    let content = match (line.id, line.role) {
        // What was taken out comes back as it was.
        (Some(_), _) => line.content,
        (None, Role::Assistant) if !line.content.is_empty() => line.content,
        (None, _) => UserContent::try_from(line.content).map_err(Problem::Content)?.into_parts(),
    };
    if line.upstream_message_id.as_ref().is_some_and(|id| !is_upstream_text(id)) {
        return Err(Problem::Upstream("upstream_message_id"));
    }
    check_time("created_at", line.created_at)?;
    Ok(ImportedMessage {
        id: line.id.unwrap_or_else(|| derived_id(thread, place)),
        role: line.role,
        content,
        upstream_message_id: line.upstream_message_id,
        context: line.context,
        created_at: line.created_at,
    })
}

/// The id of a message that has none: the same each time that the file is read.
fn derived_id(thread: ThreadId, place: u64) -> MessageId {
    let mut hash = Sha256::new();
    hash.update(thread.uuid().as_bytes());
    hash.update(place.to_be_bytes());
    let digest = hash.finalize();
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    MessageId::from_uuid(uuid::Builder::from_custom_bytes(bytes).into_uuid())
}

/// When a thread was made, as its id says it.
fn made_at(id: ThreadId) -> Option<Timestamp> {
    let millis = i64::try_from(id.uuid().as_u128() >> 80).ok()?;
    Timestamp::from_timestamp_millis(millis)
}

/// Both databases can hold such a time, and compute with it.
fn check_time(name: &'static str, time: Option<Timestamp>) -> Result<(), Problem> {
    let fits = time.is_none_or(|time| (1970..=9999).contains(&time.year()));
    if fits { Ok(()) } else { Err(Problem::Time(name)) }
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
            (r#"{"threadkeeper_planted": "x"}"#, "metadata keys that begin with …"),
        ] {
            let error = serde_json::from_str::<crate::domain::Metadata>(json).unwrap_err();
            let text = without_value(&error);
            assert!(text.contains(told) && !text.contains("planted"), "{text}");
        }
    }
}

//! Threads, runs and messages as lines of text, for export and import. Each line is a JSON
//! object.
//!
//! A thread's line comes before those of its runs and messages. The last line counts each kind,
//! so that a truncated file is noticed:
//!
//! ```text
//! {"type":"thread","id":"thr_…","key":{"tenant":"default","user":"alice","scope":"session:tab-1"},…}
//! {"type":"run","id":"run_…","thread_id":"thr_…",…}
//! {"type":"message","id":"msg_…","thread_id":"thr_…","role":"user","content":[{"type":"text","text":"Hello"}],…}
//! {"type":"end","threads":1,"runs":1,"messages":1}
//! ```
//!
//! To import a table of users and upstream threads, one line for each is enough:
//!
//! ```text
//! {"type":"thread","key":{"user":"alice"},"upstream_thread_id":"thread_abc"}
//! {"type":"message","role":"user","content":"Hello"}
//! ```
//!
//! A message without a `thread_id` belongs to the thread before it. A message without an `id`
//! gets one that is derived from its thread and its position among the thread's messages in the
//! file. So the same file can be imported again, and lines can be appended to it.

mod export;
mod import;

use std::borrow::Cow;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{ObjectBuilder, OneOfBuilder, Schema, Type};
use utoipa::{PartialSchema, ToSchema};

use crate::domain::{
    ContentPart, ConversationKey, KeyText, Lifecycle, Message, MessageId, Metadata,
    MultitaskStrategy, Role, Run, RunError, RunId, RunStatus, Scope, TenantKey, Thread, ThreadId,
    UpstreamRunId, UpstreamSync, UpstreamThreadId, Usage, UserKey, text_or_parts,
};

pub use export::{What, export};
pub use import::{ImportError, Problem, Refused, Summary, import};

/// A line of an export.
#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(crate) enum Line {
    Thread(ThreadLine),
    Run(RunLine),
    Message(MessageLine),
    End(Counts),
}

impl ToSchema for Line {
    fn name() -> Cow<'static, str> {
        "ExportLine".into()
    }

    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        ThreadLine::schemas(schemas);
        RunLine::schemas(schemas);
        MessageLine::schemas(schemas);
    }
}

impl PartialSchema for Line {
    /// Written by hand, because the tag is an additional field and each line type denies unknown
    /// fields.
    fn schema() -> RefOr<Schema> {
        fn line<T: PartialSchema>(tag: &str) -> RefOr<Schema> {
            let mut schema = T::schema();
            if let RefOr::T(Schema::Object(object)) = &mut schema {
                let tag = ObjectBuilder::new()
                    .schema_type(Type::String)
                    .enum_values(Some([tag]));
                object.properties.insert("type".to_owned(), tag.into());
                object.required.push("type".to_owned());
            }
            schema
        }
        OneOfBuilder::new()
            .item(line::<ThreadLine>("thread"))
            .item(line::<RunLine>("run"))
            .item(line::<MessageLine>("message"))
            .item(line::<Counts>("end"))
            .into()
    }
}

/// The counts of the end line.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = ExportedCounts)]
pub struct Counts {
    pub threads: u64,
    pub runs: u64,
    pub messages: u64,
}

#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = ExportedThread)]
pub(crate) struct ThreadLine {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(required)]
    id: Option<ThreadId>,
    key: KeyLine,
    /// Default: the upstream of the default assistant.
    #[serde(default)]
    #[schema(required)]
    upstream: Option<String>,
    #[serde(default)]
    #[schema(required)]
    upstream_thread_id: Option<UpstreamThreadId>,
    #[serde(default = "current")]
    #[schema(required)]
    lifecycle: Lifecycle,
    #[serde(default)]
    #[schema(required)]
    previous_thread: Option<ThreadId>,
    #[serde(default)]
    #[schema(required)]
    metadata: Metadata,
    #[serde(default)]
    #[schema(required)]
    created_at: Option<DateTime<Utc>>,
    #[serde(default)]
    #[schema(required)]
    last_active_at: Option<DateTime<Utc>>,
    #[serde(default)]
    #[schema(required)]
    archived_at: Option<DateTime<Utc>>,
    /// Limits of this thread, in the place of the configured ones.
    #[serde(default)]
    #[schema(required)]
    max_age_ms: Option<u64>,
    #[serde(default)]
    #[schema(required)]
    max_idle_ms: Option<u64>,
}

const fn current() -> Lifecycle {
    Lifecycle::Current
}

#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = ExportedKey)]
pub(crate) struct KeyLine {
    #[serde(default)]
    #[schema(required)]
    tenant: TenantKey,
    user: UserKey,
    #[serde(default)]
    #[schema(required, value_type = String, pattern = "^(user|session:.+|topic:.+)$")]
    scope: ScopeText,
}

/// A scope in the form of the API: `user`, `session:<id>`, `topic:<name>`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct ScopeText(Scope);

impl Default for ScopeText {
    fn default() -> Self {
        Self(Scope::User)
    }
}

impl TryFrom<String> for ScopeText {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let (kind, name) = text.split_once(':').unwrap_or((&text, ""));
        if let Some(scope) = Scope::from_parts(kind, name.to_owned()) {
            return Ok(Self(scope));
        }
        let why = match KeyText::try_from(name.to_owned()) {
            Err(why) if ["session", "topic"].contains(&kind) => format!(": {why}"),
            _ => String::new(),
        };
        Err(format!(
            "a scope is `user`, `session:<id>` or `topic:<name>`{why}"
        ))
    }
}

impl From<ScopeText> for String {
    fn from(scope: ScopeText) -> Self {
        scope.0.to_string()
    }
}

/// A run. Exported only: an import skips runs and takes messages.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ExportedRun)]
pub(crate) struct RunLine {
    id: RunId,
    thread_id: ThreadId,
    status: RunStatus,
    strategy: MultitaskStrategy,
    assistant: String,
    metadata: Metadata,
    #[schema(required)]
    upstream_run_id: Option<UpstreamRunId>,
    #[schema(required)]
    error: Option<RunError>,
    #[schema(required)]
    usage: Option<Usage>,
    created_at: DateTime<Utc>,
    #[schema(required)]
    started_at: Option<DateTime<Utc>>,
    #[schema(required)]
    finished_at: Option<DateTime<Utc>>,
}

#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = ExportedMessage)]
pub(crate) struct MessageLine {
    #[serde(default)]
    #[schema(required)]
    id: Option<MessageId>,
    #[serde(default)]
    #[schema(required)]
    thread_id: Option<ThreadId>,
    role: Role,
    #[serde(deserialize_with = "text_or_parts")]
    content: Vec<ContentPart>,
    /// Exported only, like `ended`, because runs are not imported.
    #[serde(default)]
    #[schema(required)]
    run_id: Option<RunId>,
    #[serde(default)]
    #[schema(required)]
    upstream_message_id: Option<String>,
    /// What the upstream thread has of the message.
    #[serde(default)]
    #[schema(required)]
    #[serde(alias = "context")]
    upstream_sync: Option<UpstreamSync>,
    #[serde(default)]
    #[schema(required)]
    ended: Option<RunStatus>,
    #[serde(default)]
    #[schema(required)]
    created_at: Option<DateTime<Utc>>,
}

impl From<Thread> for ThreadLine {
    fn from(thread: Thread) -> Self {
        let millis =
            |limit: std::time::Duration| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let ConversationKey {
            tenant,
            user,
            scope,
        } = thread.key;
        Self {
            id: Some(thread.id),
            key: KeyLine {
                tenant,
                user,
                scope: ScopeText(scope),
            },
            upstream: Some(thread.upstream),
            upstream_thread_id: thread.upstream_thread_id,
            lifecycle: thread.lifecycle,
            previous_thread: thread.previous_thread,
            metadata: thread.metadata,
            created_at: Some(thread.created_at),
            last_active_at: Some(thread.last_active_at),
            archived_at: thread.archived_at,
            max_age_ms: thread.limits.max_age.map(millis),
            max_idle_ms: thread.limits.max_idle.map(millis),
        }
    }
}

impl From<Run> for RunLine {
    fn from(run: Run) -> Self {
        Self {
            id: run.id,
            thread_id: run.thread_id,
            status: run.status,
            strategy: run.strategy,
            assistant: run.assistant,
            metadata: run.metadata,
            upstream_run_id: run.upstream_run_id,
            error: run.error,
            usage: run.usage,
            created_at: run.created_at,
            started_at: run.started_at,
            finished_at: run.finished_at,
        }
    }
}

impl From<Message> for MessageLine {
    fn from(message: Message) -> Self {
        Self {
            id: Some(message.id),
            thread_id: Some(message.thread_id),
            role: message.role,
            content: message.content,
            run_id: message.run_id,
            upstream_message_id: message.upstream_message_id,
            upstream_sync: Some(message.sync),
            ended: message.ended,
            created_at: Some(message.created_at),
        }
    }
}

//! Wire types: the shapes that callers send and see.

use std::fmt;

use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::domain::{
    ContentPart, Message, MessageId, Metadata, MultitaskStrategy, Page, RequiredAction, Role, Run, RunError,
    RunId, RunStatus, Thread, ThreadActivity, ThreadId, ThreadState, Timestamp, UpstreamThreadId, Usage,
};

/// The body of `POST …/messages`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PostMessage {
    pub(super) content: Content,
    pub(super) assistant: Option<String>,
    pub(super) multitask_strategy: Option<MultitaskStrategy>,
    pub(super) stream: Option<bool>,
    pub(super) on_disconnect: Option<OnDisconnect>,
    pub(super) metadata: Option<Metadata>,
    pub(super) timeout_ms: Option<u64>,
}

/// What becomes of the run when its caller leaves.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
pub(super) enum OnDisconnect {
    Continue,
    Cancel,
}

/// A message's content: a string, or a list of parts.
#[derive(Debug)]
pub(super) struct Content(pub(super) Vec<ContentPart>);

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StringOrParts;

        impl<'de> Visitor<'de> for StringOrParts {
            type Value = Content;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of content parts")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Content, E> {
                Ok(Content(vec![ContentPart::Text { text: text.to_owned() }]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, parts: A) -> Result<Content, A::Error> {
                Vec::deserialize(de::value::SeqAccessDeserializer::new(parts)).map(Content)
            }
        }

        deserializer.deserialize_any(StringOrParts)
    }
}

/// A list, or a page of one.
#[derive(Debug, Serialize)]
pub(super) struct ListView<T> {
    data: Vec<T>,
    first_id: Option<String>,
    last_id: Option<String>,
    has_more: bool,
}

impl<T> ListView<T> {
    pub(super) fn new<R>(page: Page<R>, id: impl Fn(&R) -> String, view: impl Fn(R) -> T) -> Self {
        Self {
            first_id: page.data.first().map(&id),
            last_id: page.data.last().map(&id),
            has_more: page.has_more,
            data: page.data.into_iter().map(view).collect(),
        }
    }
}

#[derive(Debug, Serialize)]
pub(super) struct ThreadView {
    id: ThreadId,
    key: KeyView,
    state: ThreadState,
    queue_depth: i64,
    upstream: String,
    upstream_thread_id: Option<UpstreamThreadId>,
    previous_thread: Option<ThreadId>,
    message_count: i64,
    run_count: i64,
    created_at: Timestamp,
    last_active_at: Timestamp,
    expires_at: Option<Timestamp>,
    metadata: Metadata,
}

#[derive(Debug, Serialize)]
struct KeyView {
    tenant: String,
    user: String,
    scope: String,
}

impl ThreadView {
    pub(super) fn new(thread: Thread, activity: ThreadActivity) -> Self {
        Self {
            id: thread.id,
            key: KeyView {
                tenant: thread.key.tenant.as_str().to_owned(),
                user: thread.key.user.as_str().to_owned(),
                scope: thread.key.scope.to_string(),
            },
            state: activity.state,
            queue_depth: activity.queue_depth,
            upstream: thread.upstream,
            upstream_thread_id: thread.upstream_thread_id,
            previous_thread: thread.previous_thread,
            message_count: thread.message_count,
            run_count: thread.run_count,
            created_at: thread.created_at,
            last_active_at: thread.last_active_at,
            expires_at: thread.expires_at,
            metadata: thread.metadata,
        }
    }
}

#[derive(Debug, Serialize)]
pub(super) struct RunView {
    id: RunId,
    thread_id: ThreadId,
    status: RunStatus,
    assistant: String,
    multitask_strategy: MultitaskStrategy,
    created_at: Timestamp,
    started_at: Option<Timestamp>,
    finished_at: Option<Timestamp>,
    deadline_at: Option<Timestamp>,
    usage: Option<Usage>,
    error: Option<RunError>,
    required_action: Option<RequiredAction>,
    metadata: Metadata,
}

impl From<Run> for RunView {
    fn from(run: Run) -> Self {
        Self {
            id: run.id,
            thread_id: run.thread_id,
            status: run.status,
            assistant: run.assistant,
            multitask_strategy: run.strategy,
            created_at: run.created_at,
            started_at: run.started_at,
            finished_at: run.finished_at,
            deadline_at: run.deadline_at,
            usage: run.usage,
            error: run.error,
            required_action: run.required_action,
            metadata: run.metadata,
        }
    }
}

#[derive(Debug, Serialize)]
pub(super) struct MessageView {
    id: MessageId,
    role: Role,
    content: Vec<ContentPart>,
    run_id: Option<RunId>,
    thread_id: ThreadId,
    /// 1 for the thread's first message.
    position: i64,
    created_at: Timestamp,
}

impl From<Message> for MessageView {
    fn from(message: Message) -> Self {
        Self {
            id: message.id,
            role: message.role,
            content: message.content,
            run_id: message.run_id,
            thread_id: message.thread_id,
            position: message.position,
            created_at: message.created_at,
        }
    }
}

/// The answer to a message.
#[derive(Debug, Serialize)]
pub(super) struct TurnView {
    pub(super) thread: ThreadView,
    pub(super) run: RunView,
    pub(super) message: Option<MessageView>,
}

/// One run with its reply, if it has one.
#[derive(Debug, Serialize)]
pub(super) struct RunAndMessageView {
    pub(super) run: RunView,
    pub(super) message: Option<MessageView>,
}

//! Wire types: the JSON shapes that callers send and receive. `/openapi.json` describes them.
//!
//! Times are written as `DateTime<Utc>`, not as its alias `Timestamp`, because the derived schemas
//! look at the name of a type.

mod threads;

use chrono::{DateTime, Utc};
use serde::de;
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{
    AdditionalProperties, ArrayBuilder, ObjectBuilder, OneOfBuilder, Schema, Type,
};
use utoipa::{PartialSchema, ToSchema};

use crate::domain::{
    ContentPart, MAX_PARTS, Message, MessageId, Metadata, MultitaskStrategy, Page, RequiredAction,
    Role, Run, RunError, RunId, RunStatus, ThreadId, ToolOutput, UpstreamSync, Usage,
    text_or_parts,
};

pub(super) use threads::{
    DeletableView, DeletionView, OutlookView, PatchThread, ReportView, TallyView, ThreadView,
    TtlMs, cancelled, list as list_threads,
};

/// The body of `POST …/messages`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct PostMessage {
    pub(super) content: Content,
    /// Name of a configured assistant. If absent, the default assistant. A user's own token may name
    /// the default assistant, and those whose configuration has `user_selectable = true`.
    pub(super) assistant: Option<String>,
    /// What the message does on a busy thread; `enqueue` if absent.
    pub(super) multitask_strategy: Option<MultitaskStrategy>,
    /// `true`: the answer is a stream of events. If absent, the header `Accept` decides.
    pub(super) stream: Option<bool>,
    /// What happens to the run if the caller disconnects; `continue` if absent.
    pub(super) on_disconnect: Option<OnDisconnect>,
    /// Metadata of the run. The gateway keeps it with the run and sends it upstream.
    pub(super) metadata: Option<Metadata>,
    /// Longest time from the start of the run to its end, waits for tool outputs included; at most
    /// `runs.max_timeout`.
    #[schema(minimum = 1)]
    pub(super) timeout_ms: Option<u64>,
    /// Time to live of the thread, from now on; at most `threads.max_ttl`.
    #[schema(minimum = 1)]
    pub(super) ttl_ms: Option<u64>,
}

/// The body of `POST …/runs/{run}/tool_outputs`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct PostOutputs {
    /// One output for each call of the run's `required_action`.
    #[serde(deserialize_with = "outputs")]
    #[schema(value_type = Vec<Output>)]
    pub(super) tool_outputs: Vec<ToolOutput>,
    /// `true`: the answer is a stream of events. If absent, the header `Accept` decides.
    pub(super) stream: Option<bool>,
}

/// The output of a function call.
// Refuses unknown fields. The domain's own type does not, because stored rows may get more fields.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = ToolOutput)]
struct Output {
    /// The id of the call.
    #[schema(pattern = r"^[^\u0000]*$")]
    tool_call_id: String,
    #[schema(pattern = r"^[^\u0000]*$")]
    output: String,
}

fn outputs<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<ToolOutput>, D::Error> {
    let given = Vec::<Output>::deserialize(deserializer)?;
    if given
        .iter()
        .any(|it| it.output.contains('\0') || it.tool_call_id.contains('\0'))
    {
        return Err(de::Error::custom("must not contain NUL characters"));
    }
    Ok(given
        .into_iter()
        .map(
            |Output {
                 tool_call_id,
                 output,
             }| ToolOutput {
                tool_call_id,
                output,
            },
        )
        .collect())
}

/// What happens to the run if its caller disconnects.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, ToSchema)]
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
        text_or_parts(deserializer).map(Self)
    }
}

impl ToSchema for Content {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        ContentPart::schemas(schemas);
    }
}

impl PartialSchema for Content {
    fn schema() -> RefOr<Schema> {
        let mut part = ContentPart::schema();
        if let RefOr::T(Schema::OneOf(kinds)) = &mut part {
            kinds.items.retain_mut(|kind| {
                let RefOr::T(Schema::Object(kind)) = kind else {
                    return true;
                };
                kind.additional_properties = Some(Box::new(AdditionalProperties::FreeForm(false)));
                // The gateway sends these and does not take them.
                for field in ["annotations", "message", "phase"] {
                    kind.properties.remove(field);
                }
                !kind.properties.contains_key("refusal")
                    && !kind.properties.contains_key("generated_image")
            });
        }
        let text = ObjectBuilder::new()
            .schema_type(Type::String)
            .min_length(Some(1))
            .pattern(Some(r"^[^\u0000]*$"));
        let parts = ArrayBuilder::new()
            .items(part)
            .min_items(Some(1))
            .max_items(Some(MAX_PARTS));
        OneOfBuilder::new()
            .description(Some(
                "A string, or a list of parts, at least one with text or an image.",
            ))
            .item(text)
            .item(parts)
            .into()
    }
}

/// A list, or a page of it.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = List)]
pub(super) struct ListView<T> {
    data: Vec<T>,
    #[schema(required)]
    first_id: Option<String>,
    #[schema(required)]
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

#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Run)]
pub(super) struct RunView {
    id: RunId,
    thread_id: ThreadId,
    status: RunStatus,
    assistant: String,
    multitask_strategy: MultitaskStrategy,
    created_at: DateTime<Utc>,
    #[schema(required)]
    started_at: Option<DateTime<Utc>>,
    #[schema(required)]
    finished_at: Option<DateTime<Utc>>,
    #[schema(required)]
    deadline_at: Option<DateTime<Utc>>,
    #[schema(required)]
    usage: Option<Usage>,
    #[schema(required)]
    error: Option<RunError>,
    #[schema(required)]
    required_action: Option<RequiredAction>,
    /// Whether the run was rolled back, so that its messages are not in the transcript.
    rolled_back: bool,
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
            rolled_back: run.discarded,
            metadata: run.metadata,
        }
    }
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Message)]
pub(super) struct MessageView {
    id: MessageId,
    role: Role,
    content: Vec<ContentPart>,
    #[schema(required)]
    run_id: Option<RunId>,
    thread_id: ThreadId,
    /// Place in the transcript, ascending from 1. A gap is where messages were rolled back.
    position: i64,
    status: MessageStatus,
    /// The final status of its run, if that made the message incomplete.
    #[schema(required)]
    incomplete_reason: Option<RunStatus>,
    /// Whether the model sees the message, now or from the next run on.
    visible_to_model: bool,
    created_at: DateTime<Utc>,
}

/// Whether the run of a message completed, as far as the gateway knows.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum MessageStatus {
    Completed,
    Incomplete,
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
            status: if message.ended.is_some() {
                MessageStatus::Incomplete
            } else {
                MessageStatus::Completed
            },
            incomplete_reason: message.ended,
            visible_to_model: message.sync != UpstreamSync::Withheld,
            created_at: message.created_at,
        }
    }
}

/// The answer to a message: the thread, the run, and the reply if there is one.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Turn)]
pub(super) struct RunResponse {
    pub(super) thread: ThreadView,
    pub(super) run: RunView,
    #[schema(required)]
    pub(super) message: Option<MessageView>,
}

/// A run with its reply, if it has one.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = RunAndMessage)]
pub(super) struct RunAndMessageView {
    pub(super) run: RunView,
    #[schema(required)]
    pub(super) message: Option<MessageView>,
}

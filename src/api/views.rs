//! Wire types: the JSON shapes that callers send and receive. `/openapi.json` describes them.
//!
//! Times are written as `DateTime<Utc>`, not as its alias `Timestamp`, because the derived schemas
//! look at the name of a type.

mod threads;

use std::fmt;

use chrono::{DateTime, Utc};
use serde::de::value::SeqAccessDeserializer;
use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{
    AdditionalProperties, ArrayBuilder, ObjectBuilder, OneOfBuilder, Schema, Type,
};
use utoipa::{PartialSchema, ToSchema};

use crate::domain::{
    CallAnswer, ContentPart, MAX_PARTS, Message, MessageId, Metadata, MultitaskStrategy,
    OutputContent, OutputPart, Page, Reader, Recovery, RequiredAction, Role, Run, RunError, RunId,
    RunStatus, ThreadId, ToolCall, ToolCallType, ToolOutput, UpstreamSync, Usage, text_or_parts,
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

/// The body of `POST …/runs`. It may be absent.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct PostRun {
    /// Name of a configured assistant, as for a message.
    pub(super) assistant: Option<String>,
    /// What the run does on a busy thread: any but `merge`; `enqueue` if absent.
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
    /// One answer for each call of the run's `required_action`.
    #[serde(deserialize_with = "outputs")]
    #[schema(value_type = Vec<Answer>)]
    pub(super) tool_outputs: Vec<ToolOutput>,
    /// `true`: the answer is a stream of events. If absent, the header `Accept` decides.
    pub(super) stream: Option<bool>,
}

/// The answer to a call: `output`, or `approve` for a call of type `mcp_approval`.
// Refuses unknown fields. The domain's own type does not, because stored rows may get more fields.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = ToolOutput)]
struct Answer {
    /// The id of the call.
    #[schema(pattern = r"^[^\u0000]*$")]
    tool_call_id: String,
    output: Option<OutputBody>,
    /// Whether the upstream may make the call.
    approve: Option<bool>,
    /// Why the call is not approved, for the model.
    #[schema(pattern = r"^[^\u0000]*$")]
    reason: Option<String>,
    /// The safety checks of a call of type `computer` that the caller acknowledges.
    #[schema(max_items = 64)]
    acknowledged_safety_checks: Option<Vec<Value>>,
}

/// A text, or a list of parts.
struct OutputBody(OutputContent);

impl<'de> Deserialize<'de> for OutputBody {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextOrParts;

        impl<'de> Visitor<'de> for TextOrParts {
            type Value = OutputContent;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of parts")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(OutputContent::Text(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, parts: A) -> Result<Self::Value, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(parts)).map(OutputContent::Parts)
            }
        }

        deserializer.deserialize_any(TextOrParts).map(Self)
    }
}

impl ToSchema for OutputBody {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        OutputPart::schemas(schemas);
    }
}

impl PartialSchema for OutputBody {
    fn schema() -> RefOr<Schema> {
        let text = ObjectBuilder::new()
            .schema_type(Type::String)
            .pattern(Some(r"^[^\u0000]*$"));
        let parts = ArrayBuilder::new()
            .items(OutputPart::schema())
            .min_items(Some(1))
            .max_items(Some(MAX_PARTS));
        OneOfBuilder::new()
            .description(Some("A string, or a list of parts."))
            .item(text)
            .item(parts)
            .into()
    }
}

fn outputs<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<ToolOutput>, D::Error> {
    let given = Vec::<Answer>::deserialize(deserializer)?;
    given
        .into_iter()
        .map(|it| tool_output(it).map_err(de::Error::custom))
        .collect()
}

fn tool_output(given: Answer) -> Result<ToolOutput, &'static str> {
    let Answer {
        tool_call_id,
        output,
        approve,
        reason,
        acknowledged_safety_checks,
    } = given;
    let answer = match (output, approve) {
        (Some(_), None) if reason.is_some() => {
            return Err("`reason` goes with `approve`, not with `output`");
        }
        (Some(_), None) if acknowledged_safety_checks.iter().flatten().count() > MAX_PARTS => {
            return Err("`acknowledged_safety_checks` has at most 64 entries");
        }
        (Some(OutputBody(output)), None) => CallAnswer::Output {
            output,
            acknowledged_safety_checks: acknowledged_safety_checks.unwrap_or_default(),
        },
        (None, Some(_)) if acknowledged_safety_checks.is_some() => {
            return Err("`acknowledged_safety_checks` goes with `output`, not with `approve`");
        }
        (None, Some(approve)) => CallAnswer::Approval { approve, reason },
        (Some(_), Some(_)) => return Err("each has `output` or `approve`, not both"),
        (None, None) => {
            return Err("each needs `output`, or `approve` for a call of type `mcp_approval`");
        }
    };
    let output = ToolOutput {
        tool_call_id,
        kind: ToolCallType::default(),
        answer,
    };
    if let CallAnswer::Output {
        output: OutputContent::Parts(parts),
        ..
    } = &output.answer
    {
        if !(1..=MAX_PARTS).contains(&parts.len()) {
            return Err("an output that is a list has 1 to 64 parts");
        }
        if !parts.iter().all(OutputPart::names_one_place) {
            return Err(
                "an `input_image` needs either `image_url` or `file_id`, and an `input_file` either \
                 `file_id`, `file_url` or `file_data`",
            );
        }
    }
    if serde_json::to_value(&output).is_ok_and(|output| has_nul(&output)) {
        return Err("must not contain NUL characters");
    }
    Ok(output)
}

fn has_nul(value: &Value) -> bool {
    match value {
        Value::String(text) => text.contains('\0'),
        Value::Array(list) => list.iter().any(has_nul),
        Value::Object(map) => map
            .iter()
            .any(|(name, value)| name.contains('\0') || has_nul(value)),
        _ => false,
    }
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
    /// How the run was answered after the upstream had refused it, and what the model no longer
    /// knows.
    #[schema(required)]
    recovered: Option<Recovery>,
    #[schema(required)]
    required_action: Option<RequiredActionView>,
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
            recovered: run.recovery.and_then(|it| it.told().cloned()),
            required_action: run.required_action.map(Into::into),
            rolled_back: run.discarded,
            metadata: run.metadata,
        }
    }
}

/// The calls that a run waits for.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = RequiredAction)]
pub(super) struct RequiredActionView {
    tool_calls: Vec<ToolCallView>,
}

impl From<RequiredAction> for RequiredActionView {
    fn from(action: RequiredAction) -> Self {
        Self {
            tool_calls: action.tool_calls.into_iter().map(Into::into).collect(),
        }
    }
}

/// A call that the caller has to answer.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ToolCall)]
pub(super) struct ToolCallView {
    /// The id that the answer to this call must name.
    id: String,
    r#type: ToolCallType,
    name: String,
    /// The arguments as the model wrote them: usually, not always, a JSON object. Of a call of
    /// type `computer`, `local_shell`, `shell` or `apply_patch`, the action as JSON.
    arguments: String,
    /// The label of the MCP server that an approval is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    server_label: Option<String>,
    /// The safety checks of a call of type `computer`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    pending_safety_checks: Vec<Value>,
}

impl From<ToolCall> for ToolCallView {
    fn from(call: ToolCall) -> Self {
        Self {
            id: call.id,
            r#type: call.kind,
            name: call.name,
            arguments: call.arguments,
            server_label: call.server_label,
            pending_safety_checks: call.pending_safety_checks,
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

impl MessageView {
    /// Shows what this reader may see of the message.
    pub(super) fn new(message: Message, reader: Reader) -> Self {
        let message = message.seen_by(reader);
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

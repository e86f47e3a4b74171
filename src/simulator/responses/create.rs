//! Creates responses.

use std::sync::Arc;

use axum::response::Response as HttpResponse;
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::conversations;
use super::generate::Generation;
use super::items::{given_ids, read_input, refuse_duplicates};
use crate::simulator::behaviour::plan::Plan;
use crate::simulator::behaviour::refusal::{LateHead, Refused};
use crate::simulator::state::items::{self, Context};
use crate::simulator::state::responses::{Response, ResponseStatus, Settings, StoredResponse};
use crate::simulator::state::stats::Accepted;
use crate::simulator::state::{Server, World};
use crate::simulator::wire::call::Call;
use crate::simulator::wire::error::{ApiError, json_body, refuse_if_full};
use crate::simulator::wire::fields::{Fields, Metadata, wrong_type};
use crate::simulator::wire::sse::{EventLog, EventOut};

/// Newest background responses whose events can be replayed.
const MAX_REPLAYABLE: usize = 1000;

const KNOWN: [&str; 30] = [
    "background",
    "context_management",
    "conversation",
    "include",
    "input",
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "metadata",
    "model",
    "moderation",
    "parallel_tool_calls",
    "previous_response_id",
    "prompt",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "reasoning",
    "safety_identifier",
    "service_tier",
    "store",
    "stream",
    "stream_options",
    "temperature",
    "text",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
    "user",
];

/// Creates a response. Dropping the future, or the body of its answer, ends a response that is
/// not in the background.
pub(super) async fn create(server: &Arc<Server>, call: Call) -> Result<HttpResponse, Refused> {
    let mut request = NewResponse::read(call.body)?;
    let fault = of_fault(call.fault.as_deref())?;
    if fault.forget {
        request.previous = None;
    }
    if fault.gone {
        lose(server, &request);
    }
    let (generation, answer) = start(server, request, call.fault.as_deref())?;
    let (drops, late_head) = (
        generation.plan().drop.is_some(),
        generation.plan().late_head,
    );
    server.tasks.spawn(generation.work());
    server.changed();
    if drops {
        return Err(Refused::Dropped); // drops the answer, which ends a response that is not in the background
    }
    let mut response = match answer {
        Answer::Ready(response) => response,
        Answer::WhenDone(done) => done.await.map_err(|_| Refused::Dropped)?,
    };
    if let Some(time) = late_head {
        response.extensions_mut().insert(LateHead(time));
    }
    Ok(response)
}

enum Answer {
    Ready(HttpResponse),
    WhenDone(oneshot::Receiver<HttpResponse>),
}

/// The request for a response.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a field of the request"
)]
struct NewResponse {
    input: Value,
    conversation: Option<String>,
    previous: Option<String>,
    stream: bool,
    store: bool,
    background: bool,
    obfuscation: bool,
    metadata: Metadata,
    settings: Settings,
}

impl NewResponse {
    fn read(body: serde_json::Map<String, Value>) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body, &[&KNOWN[..], &["truncation"]].concat())?;
        let stored_prompt = fields.any("prompt").is_some();
        let model = match fields.text("model")? {
            Some(model) => model,
            None if stored_prompt => "sim-1".to_owned(),
            None => fields.needed_text("model")?,
        };
        if model.starts_with("missing") {
            return Err(ApiError::invalid(format!(
                "The requested model '{model}' does not exist."
            ))
            .param("model")
            .code("model_not_found"));
        }
        let conversation = conversation_id(fields.any("conversation"))?;
        let previous = fields.text("previous_response_id")?;
        if conversation.is_some() && previous.is_some() {
            return Err(ApiError::invalid(
                "Mutually exclusive parameters: give either 'previous_response_id' or 'conversation'.",
            )
            .code("mutually_exclusive_parameters"));
        }
        let store = fields.flag("store")?.unwrap_or(true);
        let background = fields.flag("background")?.unwrap_or(false);
        if background && !store {
            return Err(
                ApiError::invalid("Background responses need 'store' to be true.")
                    .param("background")
                    .code("unsupported_parameter"),
            );
        }
        let options = fields.any("stream_options").unwrap_or_default();
        let mut reasoning = json!({"effort": null, "summary": null});
        if let Some(Value::Object(asked)) = fields.any("reasoning") {
            reasoning
                .as_object_mut()
                .into_iter()
                .for_each(|map| map.extend(asked.clone()));
        }
        Ok(Self {
            input: fields.needed("input")?,
            conversation,
            previous,
            stream: fields.flag("stream")?.unwrap_or(false),
            store,
            background,
            obfuscation: options["include_obfuscation"].as_bool().unwrap_or(true),
            metadata: fields.metadata()?.unwrap_or_default(),
            settings: Settings {
                model,
                instructions: fields.text("instructions")?,
                tools: fields.array("tools", 128)?.unwrap_or_default(),
                tool_choice: fields.any("tool_choice").unwrap_or_else(|| "auto".into()),
                parallel_tool_calls: fields.flag("parallel_tool_calls")?.unwrap_or(true),
                temperature: fields.number("temperature", 2.0)?.unwrap_or(1.0),
                top_p: fields.number("top_p", 1.0)?.unwrap_or(1.0),
                max_output_tokens: fields.integer("max_output_tokens", 16)?,
                max_tool_calls: fields.integer("max_tool_calls", 0)?,
                truncation: fields
                    .text("truncation")?
                    .unwrap_or_else(|| "disabled".to_owned()),
                service_tier: fields
                    .text("service_tier")?
                    .unwrap_or_else(|| "default".to_owned()),
                reasoning,
                text: fields
                    .any("text")
                    .unwrap_or_else(|| json!({"format": {"type": "text"}})),
            },
        })
    }
}

/// Checks the request against the conversation or chain, and accepts it.
fn start(
    server: &Arc<Server>,
    request: NewResponse,
    fault: Option<&str>,
) -> Result<(Generation, Answer), Refused> {
    let given = given_ids(&request.input);
    let input = read_input(server, request.input, "input")?;
    let mut guard = server.world();
    let world = &mut *guard;
    let id = server.id("resp");
    let (base, lane) = base(
        server,
        world,
        request.conversation.as_deref(),
        request.previous.as_deref(),
        &given,
    )?;
    let context = with_input(base, &input, fault)?;
    refuse_if_full(server.config.context_words, context.words)?;
    let plan = plan(&input, fault)?;
    plan.refused()?;
    let lane = lane.unwrap_or_else(|| id.clone());
    let response = Response {
        id,
        object: "response",
        created_at: server.now(),
        status: if request.background {
            ResponseStatus::Queued
        } else {
            ResponseStatus::InProgress
        },
        completed_at: None,
        error: None,
        incomplete_details: None,
        output: Vec::new(),
        conversation: request.conversation.as_ref().map(|id| json!({"id": id})),
        previous_response_id: request.previous,
        background: request.background,
        store: request.store,
        usage: None,
        metadata: request.metadata,
        settings: request.settings,
    };
    let cancel = CancellationToken::new();
    let mut log = None;
    let mut done = None;
    let (out, answer) = match (request.background, request.stream) {
        (true, true) => {
            let events = EventLog::new();
            let answer = events.follow(0, cut_frame(&plan), plan.format.split);
            log = Some(Arc::clone(&events));
            (EventOut::log(events, plan.format), Answer::Ready(answer))
        }
        (true, false) => (EventOut::nobody(), Answer::Ready(json_body(&response))),
        (false, true) => {
            let (out, answer) = EventOut::connection(plan.format);
            (out, Answer::Ready(answer))
        }
        (false, false) => {
            let (sender, receiver) = oneshot::channel();
            done = Some(sender);
            (EventOut::nobody(), Answer::WhenDone(receiver))
        }
    };
    if let Some(id) = &request.conversation {
        conversations::live(world, id)?.begin(&response.id);
    }
    if log.is_some() {
        world.replayable.push_back(response.id.clone());
        if world.replayable.len() > MAX_REPLAYABLE
            && let Some(oldest) = world.replayable.pop_front()
            && let Some(stored) = world.responses.get_mut(&oldest)
        {
            stored.log = None;
        }
    }
    world.counters.begin(&lane, accepted(&response, &input));
    if request.background {
        world.responses.insert(
            response.id.clone(),
            StoredResponse {
                response: response.clone(),
                input: input.clone(),
                context: context.clone(),
                lane: lane.clone(),
                log,
                cancel: cancel.clone(),
                stuck_cancel: plan.stuck_cancel,
            },
        );
    }
    let generation = Generation::new(
        server,
        world.end.clone(),
        response,
        input,
        context,
        lane,
        plan,
        out,
        done,
        cancel,
        request.obfuscation,
    );
    Ok((generation, answer))
}

/// Loses the conversation, or the response on which the new one builds.
fn lose(server: &Server, request: &NewResponse) {
    let mut world = server.world();
    if let Some(id) = &request.conversation {
        world.conversations.remove(id);
    }
    if let Some(id) = &request.previous {
        world.responses.remove(id);
    }
}

fn of_fault(fault: Option<&str>) -> Result<Plan, ApiError> {
    let mut plan = Plan::default();
    plan.apply(fault.unwrap_or_default())
        .map_err(ApiError::invalid)?;
    Ok(plan)
}

fn accepted<'a>(response: &'a Response, input: &[Value]) -> Accepted<'a> {
    let users = input
        .iter()
        .filter(|item| item["type"] == "message" && item["role"] == "user");
    let answers = input.iter().map(items::answered);
    Accepted {
        id: &response.id,
        metadata: &response.metadata,
        user_texts: users.map(items::text).collect(),
        answered_calls: answers
            .filter(|id| !id.is_empty())
            .map(str::to_owned)
            .collect(),
    }
}

/// Returns the context with the input, or why the response cannot be made. A fault that makes the
/// response end with that refusal lets it begin.
fn with_input(
    mut context: Context,
    input: &[Value],
    fault: Option<&str>,
) -> Result<Context, ApiError> {
    if of_fault(fault)?.complaint.is_none() {
        context.accept(input)?;
        return Ok(context);
    }
    for item in input {
        context.absorb(item);
    }
    Ok(context)
}

/// Returns the context before the input, and the lane that it belongs to, if there is one yet.
fn base(
    server: &Server,
    world: &mut World,
    conversation: Option<&str>,
    previous: Option<&str>,
    given: &[String],
) -> Result<(Context, Option<String>), ApiError> {
    if let Some(id) = conversation {
        conversations::live(world, id)?;
        conversations::refuse_if_locked(server, world, id)?;
        let conversation = conversations::live(world, id)?;
        refuse_duplicates(given, conversation.items())?;
        return Ok((conversation.context().clone(), Some(id.to_owned())));
    }
    let Some(id) = previous else {
        return Ok((Context::default(), None));
    };
    let stored = world
        .responses
        .get(id)
        .filter(|stored| stored.response.status.is_final());
    let stored = stored.ok_or_else(|| {
        ApiError::invalid(format!("Previous response with id '{id}' not found."))
            .param("previous_response_id")
            .code("previous_response_not_found")
    })?;
    Ok((stored.context.clone(), Some(stored.lane.clone())))
}

/// Returns the plan of the response: from the newest user message, or else from the outputs of
/// functions, then from a fault. Items before that message are history.
fn plan(input: &[Value], fault: Option<&str>) -> Result<Plan, ApiError> {
    let newest = input.iter().rposition(|item| item["role"] == "user");
    let said = match newest {
        Some(at) => &input[at..=at],
        None => input,
    };
    let mut plan = Plan::default();
    for item in said
        .iter()
        .filter(|item| item["role"] == "user" || !items::answered(item).is_empty())
    {
        let (asked, _) = Plan::of_text(&items::text(item))?;
        if asked != Plan::default() {
            plan = asked;
        }
    }
    if let Some(fault) = fault {
        plan.apply(fault).map_err(ApiError::invalid)?;
    }
    Ok(plan)
}

/// Returns the number of events after which the connection of a background stream breaks: three
/// that announce the response, two that open the first message, and the deltas.
fn cut_frame(plan: &Plan) -> Option<usize> {
    plan.cut.map(|deltas| deltas + 5)
}

fn conversation_id(value: Option<Value>) -> Result<Option<String>, ApiError> {
    let id = match value {
        None => return Ok(None),
        Some(Value::String(id)) => id,
        Some(value @ Value::Object(_)) => {
            Fields::of_value(value, "conversation".to_owned(), &["id"])?.needed_text("id")?
        }
        Some(other) => return Err(wrong_type("conversation", "a string or an object", &other)),
    };
    if id.starts_with("conv_") {
        return Ok(Some(id));
    }
    Err(ApiError::invalid(format!(
        "Invalid 'conversation': '{id}'. Expected an ID that begins with 'conv'."
    ))
    .param("conversation")
    .code("invalid_value"))
}

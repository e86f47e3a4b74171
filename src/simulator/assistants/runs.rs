//! Runs and run steps.

use std::sync::Arc;

use axum::response::Response;
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::generate::Generation;
use super::thread_lock::{end_run, expire_stale, refuse_if_active};
use super::threads;
use crate::simulator::behaviour::plan::{Drop, Plan};
use crate::simulator::behaviour::refusal::{LateHead, Refused};
use crate::simulator::behaviour::words;
use crate::simulator::state::assistants::{Message, Run, RunStatus, Settings, Thread, Work};
use crate::simulator::state::stats::Accepted;
use crate::simulator::state::{Server, World};
use crate::simulator::wire::call::Call;
use crate::simulator::wire::error::{ApiError, json_body, refuse_if_full};
use crate::simulator::wire::fields::{Fields, Metadata};
use crate::simulator::wire::page::Paging;
use crate::simulator::wire::sse::{EventFormat, EventOut};

const SETTINGS: [&str; 13] = [
    "model",
    "instructions",
    "tools",
    "metadata",
    "temperature",
    "top_p",
    "stream",
    "max_prompt_tokens",
    "max_completion_tokens",
    "truncation_strategy",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
];

pub(super) fn create(server: &Arc<Server>, call: Call) -> Result<Response, Refused> {
    let id = call.segment(1).to_owned();
    let known = [
        &SETTINGS[..],
        &[
            "assistant_id",
            "additional_instructions",
            "additional_messages",
            "reasoning_effort",
        ],
    ];
    let mut fields = Fields::of_body(call.body, &known.concat())?;
    let started = {
        let mut world = server.world();
        expire_stale(server, &mut world, &id);
        if plan("", call.fault.as_deref())?.gone {
            threads::remove(&mut world, &id);
        }
        threads::thread(&world, &id)?;
        let request = NewRun::read(&mut fields)?;
        refuse_if_active(server, &mut world, &id, |run| {
            format!("Thread {id} already has an active run {run}.")
        })?;
        let messages =
            threads::new_messages(server, &mut fields, "additional_messages", usize::MAX, &id)?;
        let thread = threads::thread_mut(&mut world, &id)?;
        let text = messages
            .iter()
            .rev()
            .find(|message| message.role == "user")
            .map(Message::text);
        let plan = plan(
            &text.unwrap_or_else(|| thread.last_user_text()),
            call.fault.as_deref(),
        )?;
        thread.refuse_poisoned(&messages)?;
        let words = messages.iter().map(|message| words::count(&message.text()));
        refuse_if_full(
            server.config.context_words,
            thread.words + words.sum::<u64>(),
        )?;
        plan.refused()?;
        let texts = user_texts(&messages);
        for message in messages {
            thread.push(message);
        }
        start(server, &mut world, &id, request, plan, texts, false)
    };
    started.answer(server)
}

pub(super) fn create_with_thread(server: &Arc<Server>, call: Call) -> Result<Response, Refused> {
    let known = [&SETTINGS[..], &["assistant_id", "thread", "tool_resources"]];
    let mut fields = Fields::of_body(call.body, &known.concat())?;
    let request = NewRun::read(&mut fields)?;
    let body = match fields.any("thread") {
        None => serde_json::Map::new(),
        Some(Value::Object(map)) => map,
        Some(other) => {
            return Err(
                crate::simulator::wire::fields::wrong_type("thread", "an object", &other).into(),
            );
        }
    };
    let thread = threads::new_thread(server, body, "thread")?;
    let plan = plan(&thread.last_user_text(), call.fault.as_deref())?;
    plan.refused()?;
    let (id, texts) = (thread.id.clone(), user_texts(&thread.messages));
    threads::insert(server, thread);
    let started = start(server, &mut server.world(), &id, request, plan, texts, true);
    started.answer(server)
}

pub(super) fn submit_tool_outputs(
    server: &Arc<Server>,
    mut call: Call,
) -> Result<Response, Refused> {
    let known = ["tool_outputs", "tool_approvals", "stream"];
    let mut fields = Fields::of_body(std::mem::take(&mut call.body), &known)?;
    let stream = fields.flag("stream")?.unwrap_or(false);
    let given = answers(&mut fields)?;
    let started = {
        let mut world = server.world();
        expire_stale(server, &mut world, call.segment(1));
        let run = run_mut(&mut world, &call)?;
        if run.status != RunStatus::RequiresAction {
            return Err(ApiError::invalid(format!(
                "Runs in status \"{}\" do not accept tool outputs.",
                run.status.name()
            ))
            .into());
        }
        let action = run.required_action.as_ref();
        let list = match action.and_then(|action| action["type"].as_str()) {
            Some("submit_tool_approval") => "tool_approvals",
            _ => "tool_outputs",
        };
        let (_, outputs) = given
            .into_iter()
            .find(|(name, _)| *name == list)
            .ok_or_else(|| fields.missing(list))?;
        complete(&run.work.calls, &outputs)?;
        // The functions of the first plan have been called. The rest of the plan still applies,
        // unless an output has directives.
        let mut plan = Plan {
            tools: Vec::new(),
            ..run.work.plan.clone()
        };
        let mut answers = Vec::new();
        for (_, output) in &outputs {
            let (asked, text) = Plan::of_text(output)?;
            if asked != Plan::default() {
                plan = asked;
            }
            answers.push(text);
        }
        if let Some(fault) = &call.fault {
            plan.apply(fault).map_err(ApiError::invalid)?;
        }
        plan.refused()?;
        let drop = plan.drop;
        run.work.plan = plan;
        run.work.outputs.extend(answers);
        run.work.calls.clear();
        run.work.generating = true;
        run.status = RunStatus::Queued;
        run.required_action = None;
        let step = answered_step(server, run, &outputs);
        let (mut out, response) = open(stream, &run.work.plan);
        if let Some(step) = &step {
            out.emit("thread.run.step.completed", step);
        }
        out.emit("thread.run.queued", run);
        let answer = response.unwrap_or_else(|| json_body(run));
        let generation = Generation::new(server, run, out);
        world.counters.resume(call.segment(1));
        world
            .counters
            .answered(call.segment(3), outputs.into_iter().map(|(call, _)| call));
        Started {
            generation,
            answer,
            drop,
        }
    };
    server.changed();
    started.answer(server)
}

pub(super) fn list(server: &Server, call: &Call) -> Result<Response, ApiError> {
    let paging = Paging::of_query(&call.query, true)?;
    let mut world = server.world();
    expire_stale(server, &mut world, call.segment(1));
    let thread = threads::thread(&world, call.segment(1))?;
    let runs = thread.runs.iter().filter_map(|id| world.runs.get(id));
    paging.answer(runs, |run| &run.id)
}

pub(super) fn get(server: &Server, call: &Call) -> Result<Response, ApiError> {
    let mut world = server.world();
    expire_stale(server, &mut world, call.segment(1));
    Ok(json_body(run_mut(&mut world, call)?))
}

pub(super) fn modify(server: &Server, call: Call) -> Result<Response, ApiError> {
    let mut world = server.world();
    let run = run_mut(&mut world, &call)?;
    if let Some(metadata) = Fields::of_body(call.body, &["metadata"])?.metadata()? {
        run.metadata = metadata;
    }
    Ok(json_body(run))
}

pub(super) fn cancel(server: &Arc<Server>, call: &Call) -> Result<Response, ApiError> {
    let mut world = server.world();
    expire_stale(server, &mut world, call.segment(1));
    let run = run_mut(&mut world, call)?;
    if run.status.is_final() || run.status == RunStatus::Cancelling {
        return Err(ApiError::invalid(format!(
            "Cannot cancel run with status '{}'.",
            run.status.name()
        )));
    }
    run.status = RunStatus::Cancelling;
    run.required_action = None;
    let answer = json_body(run);
    run.work.cancel.cancel();
    if !run.work.generating {
        // No generation works on the run that could end it.
        let generation = Generation::new(server, run, EventOut::nobody());
        server.tasks.spawn(generation.be_cancelled());
    }
    drop(world);
    server.changed();
    Ok(answer)
}

pub(super) fn list_steps(server: &Server, call: &Call) -> Result<Response, ApiError> {
    let paging = Paging::of_query(&call.query, true)?;
    let mut world = server.world();
    expire_stale(server, &mut world, call.segment(1));
    paging.answer(run_mut(&mut world, call)?.work.steps.iter(), |step| {
        &step.id
    })
}

pub(super) fn get_step(server: &Server, call: &Call) -> Result<Response, ApiError> {
    let mut world = server.world();
    expire_stale(server, &mut world, call.segment(1));
    let id = call.segment(5);
    let step = run_mut(&mut world, call)?
        .work
        .steps
        .iter()
        .find(|step| step.id == id);
    step.map(json_body)
        .ok_or_else(|| ApiError::not_found(format!("No run step found with id '{id}'.")))
}

/// Locks a thread with a run that no generation works on. Returns `None` if there is no such
/// thread or it is busy.
pub(in crate::simulator) fn start_foreign_run(server: &Server, thread: &str) -> Option<String> {
    let mut world = server.world();
    expire_stale(server, &mut world, thread);
    world
        .threads
        .get(thread)
        .filter(|thread| thread.active.is_empty())?;
    let mut run = new_run(
        server,
        &world.end,
        thread,
        NewRun::foreign(),
        Plan::default(),
    );
    run.status = RunStatus::InProgress;
    run.started_at = Some(server.now());
    run.work.foreign = true;
    run.work.generating = false;
    let id = run.id.clone();
    world.threads.get_mut(thread)?.push_run(&id);
    world.runs.insert(id.clone(), run);
    Some(id)
}

/// Completes the foreign run of a thread.
pub(in crate::simulator) fn stop_foreign_run(server: &Server, thread: &str) -> bool {
    let mut world = server.world();
    let Some(row) = world.threads.get(thread) else {
        return false;
    };
    let is_foreign = |id: &&String| world.runs.get(id).is_some_and(|run| run.work.foreign);
    let Some(run) = row.active.iter().find(is_foreign).cloned() else {
        return false;
    };
    end_run(server, &mut world, &run, RunStatus::Completed);
    true
}

/// The request for a run.
struct NewRun {
    assistant: String,
    stream: bool,
    metadata: Metadata,
    settings: Settings,
}

impl NewRun {
    fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        let assistant = fields.needed_text("assistant_id")?;
        if !assistant.starts_with("asst_") || assistant.starts_with("asst_missing") {
            return Err(ApiError::not_found(format!(
                "No assistant found with id '{assistant}'."
            )));
        }
        let mut instructions = fields.text("instructions")?.unwrap_or_default();
        if let Some(more) = fields.text("additional_instructions")? {
            instructions = if instructions.is_empty() {
                more
            } else {
                format!("{instructions}\n{more}")
            };
        }
        fields.text("reasoning_effort")?;
        fields.any("tool_resources");
        Ok(Self {
            assistant,
            stream: fields.flag("stream")?.unwrap_or(false),
            metadata: fields.metadata()?.unwrap_or_default(),
            settings: Settings {
                model: fields.text("model")?.unwrap_or_else(|| "sim-1".to_owned()),
                instructions,
                tools: fields.array("tools", 20)?.unwrap_or_default(),
                temperature: fields.number("temperature", 2.0)?.unwrap_or(1.0),
                top_p: fields.number("top_p", 1.0)?.unwrap_or(1.0),
                max_prompt_tokens: fields.integer("max_prompt_tokens", 256)?,
                max_completion_tokens: fields.integer("max_completion_tokens", 256)?,
                truncation_strategy: fields
                    .any("truncation_strategy")
                    .unwrap_or_else(|| json!({"type": "auto", "last_messages": null})),
                tool_choice: fields.any("tool_choice").unwrap_or_else(|| "auto".into()),
                parallel_tool_calls: fields.flag("parallel_tool_calls")?.unwrap_or(true),
                response_format: fields
                    .any("response_format")
                    .unwrap_or_else(|| "auto".into()),
            },
        })
    }

    fn foreign() -> Self {
        let body = json!({"assistant_id": "asst_foreign", "metadata": {"foreign": "true"}});
        let fields = Fields::of_value(body, String::new(), &["assistant_id", "metadata"]);
        fields
            .and_then(|mut fields| Self::read(&mut fields))
            .expect("the body above is a valid request")
    }
}

/// A run that was accepted, before its generation begins.
struct Started {
    generation: Generation,
    answer: Response,
    drop: Option<Drop>,
}

impl Started {
    fn answer(self, server: &Server) -> Result<Response, Refused> {
        let closes = self.drop.is_some();
        server.tasks.spawn(self.generation.work());
        if closes {
            Err(Refused::Dropped)
        } else {
            Ok(self.answer)
        }
    }
}

/// Returns the plan of the run: from the user's text, then from a fault.
fn plan(text: &str, fault: Option<&str>) -> Result<Plan, ApiError> {
    let (mut plan, _) = Plan::of_text(text)?;
    if let Some(fault) = fault {
        plan.apply(fault).map_err(ApiError::invalid)?;
    }
    Ok(plan)
}

fn user_texts(messages: &[Message]) -> Vec<String> {
    messages
        .iter()
        .filter(|message| message.role == "user")
        .map(Message::text)
        .collect()
}

fn start(
    server: &Arc<Server>,
    world: &mut World,
    thread: &str,
    request: NewRun,
    plan: Plan,
    user_texts: Vec<String>,
    with_thread: bool,
) -> Started {
    let (mut out, response) = open(request.stream, &plan);
    let drop = plan.drop;
    let run = new_run(server, &world.end, thread, request, plan);
    let row = world
        .threads
        .get_mut(thread)
        .expect("the caller found or created the thread under this lock");
    if with_thread {
        out.emit("thread.created", &*row as &Thread);
    }
    row.push_run(&run.id);
    out.emit("thread.run.created", &run);
    out.emit("thread.run.queued", &run);
    let answer = response.unwrap_or_else(|| json_body(&run));
    let generation = Generation::new(server, &run, out);
    let (id, metadata, answered_calls) = (&run.id, &run.metadata, Vec::new());
    world.counters.begin(
        thread,
        Accepted {
            id,
            metadata,
            user_texts,
            answered_calls,
        },
    );
    world.runs.insert(run.id.clone(), run);
    server.changed();
    Started {
        generation,
        answer,
        drop,
    }
}

/// Returns the destination of a run's events and, for a stream, the answer that carries them.
fn open(stream: bool, plan: &Plan) -> (EventOut, Option<Response>) {
    if stream {
        let (out, mut response) = EventOut::connection(EventFormat {
            no_event_lines: false, // this protocol cannot be read without them
            ..plan.format
        });
        if let Some(time) = plan.late_head {
            response.extensions_mut().insert(LateHead(time));
        }
        (out, Some(response))
    } else {
        (EventOut::nobody(), None)
    }
}

fn new_run(
    server: &Server,
    end: &CancellationToken,
    thread: &str,
    request: NewRun,
    plan: Plan,
) -> Run {
    let deadline = Instant::now() + server.config.run_expiry;
    Run {
        id: server.id("run"),
        object: "thread.run",
        created_at: server.now(),
        thread_id: thread.to_owned(),
        assistant_id: request.assistant,
        status: RunStatus::Queued,
        required_action: None,
        last_error: None,
        expires_at: Some(server.seconds_at(deadline)),
        started_at: None,
        cancelled_at: None,
        failed_at: None,
        completed_at: None,
        incomplete_details: None,
        usage: None,
        metadata: request.metadata,
        settings: request.settings,
        work: Work {
            deadline,
            cancel: CancellationToken::new(),
            end: end.clone(),
            plan,
            generating: true,
            foreign: false,
            steps: Vec::new(),
            calls: Vec::new(),
            outputs: Vec::new(),
            tokens: 0,
        },
    }
}

/// Answers: the id of a call, and a text.
type Answers = Vec<(String, String)>;

/// Returns the lists of answers that a request has, each with its name.
fn answers(fields: &mut Fields) -> Result<Vec<(&'static str, Answers)>, ApiError> {
    let mut lists = Vec::new();
    for (list, field) in [("tool_outputs", "output"), ("tool_approvals", "approve")] {
        let Some(answers) = fields.array(list, usize::MAX)? else {
            continue;
        };
        let mut read = Vec::new();
        for (n, value) in answers.into_iter().enumerate() {
            let mut answer =
                Fields::of_value(value, format!("{list}[{n}]"), &["tool_call_id", field])?;
            let id = answer.needed_text("tool_call_id")?;
            let text = match field {
                "output" => answer.text(field)?.unwrap_or_default(),
                _ => match answer.flag(field)? {
                    Some(true) => "approved".to_owned(),
                    Some(false) => "declined".to_owned(),
                    None => return Err(answer.missing(field)),
                },
            };
            read.push((id, text));
        }
        lists.push((list, read));
    }
    Ok(lists)
}

/// Checks that the outputs answer all calls at once, and no others.
fn complete(calls: &[String], outputs: &[(String, String)]) -> Result<(), ApiError> {
    let got: Vec<&String> = outputs.iter().map(|(id, _)| id).collect();
    let all = calls.iter().all(|call| got.contains(&call)) && got.len() == calls.len();
    if all {
        return Ok(());
    }
    let quoted = |ids: Vec<&String>| {
        ids.iter()
            .map(|id| format!("'{id}'"))
            .collect::<Vec<_>>()
            .join(", ")
    };
    Err(ApiError::invalid(format!(
        "Expected tool outputs for call_ids [{}], got [{}]",
        quoted(calls.iter().collect()),
        quoted(got)
    )))
}

/// Writes the outputs into the open step and completes it.
fn answered_step(
    server: &Server,
    run: &mut Run,
    outputs: &[(String, String)],
) -> Option<crate::simulator::state::assistants::Step> {
    let step = run
        .work
        .steps
        .iter_mut()
        .rev()
        .find(|step| step.status == "in_progress")?;
    for call in step.step_details["tool_calls"].as_array_mut()? {
        let output = outputs
            .iter()
            .find(|(id, _)| call["id"] == **id)
            .map(|(_, output)| output.as_str());
        call["function"]["output"] = output.into();
    }
    step.status = "completed";
    step.completed_at = Some(server.now());
    Some(step.clone())
}

fn run_mut<'a>(world: &'a mut World, call: &Call) -> Result<&'a mut Run, ApiError> {
    threads::thread(world, call.segment(1))?;
    let id = call.segment(3);
    let run = world
        .runs
        .get_mut(id)
        .filter(|run| run.thread_id == call.segment(1));
    run.ok_or_else(|| ApiError::not_found(format!("No run found with id '{id}'.")))
}

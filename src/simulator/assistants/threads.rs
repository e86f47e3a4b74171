//! Threads and messages.

use axum::response::Response;
use serde_json::{Map, Value, json};

use super::thread_lock::{expire_stale, refuse_if_active};
use crate::simulator::state::assistants::{Message, Thread};
use crate::simulator::state::{Server, World};
use crate::simulator::wire::call::Call;
use crate::simulator::wire::error::{ApiError, json_body};
use crate::simulator::wire::fields::{Fields, within, wrong_type, wrong_value};
use crate::simulator::wire::page::Paging;

const MAX_TEXT: usize = 256_000;
/// Messages with which a thread may be made.
const MAX_FIRST: usize = 32;

pub(super) fn create(server: &Server, call: Call) -> Result<Response, ApiError> {
    let thread = new_thread(server, call.body, "")?;
    let answer = json_body(&thread);
    insert(server, thread);
    Ok(answer)
}

/// Returns the thread for a create-thread body at `at`, without storing it.
pub(super) fn new_thread(
    server: &Server,
    body: Map<String, Value>,
    at: &str,
) -> Result<Thread, ApiError> {
    let mut fields = Fields::of_value(
        Value::Object(body),
        at.to_owned(),
        &["messages", "metadata", "tool_resources"],
    )?;
    let metadata = fields.metadata()?.unwrap_or_default();
    let mut thread = Thread::new(
        server.id("thread"),
        server.now(),
        metadata,
        fields.any("tool_resources"),
    );
    for message in new_messages(server, &mut fields, "messages", MAX_FIRST, &thread.id)? {
        thread.push(message);
    }
    Ok(thread)
}

pub(super) fn insert(server: &Server, thread: Thread) {
    let mut world = server.world();
    world.counters.stats.threads_created += 1;
    world.threads.insert(thread.id.clone(), thread);
    drop(world);
    server.changed();
}

/// Lists all threads.
pub(super) fn list(server: &Server, call: &Call) -> Result<Response, ApiError> {
    let paging = Paging::of_query(&call.query, true)?;
    let world = server.world();
    let all: Vec<&Thread> = world.threads.iter().map(|(_, thread)| thread).collect();
    paging.answer(all.into_iter(), |thread| &thread.id)
}

pub(super) fn get(server: &Server, call: &Call) -> Result<Response, ApiError> {
    let world = server.world();
    Ok(json_body(thread(&world, call.segment(1))?))
}

pub(super) fn modify(server: &Server, call: Call) -> Result<Response, ApiError> {
    let mut world = server.world();
    let thread = thread_mut(&mut world, call.segment(1))?;
    let mut fields = Fields::of_body(call.body, &["metadata", "tool_resources"])?;
    if let Some(metadata) = fields.metadata()? {
        thread.metadata = metadata;
    }
    if let Some(resources) = fields.any("tool_resources") {
        thread.tool_resources = resources;
    }
    Ok(json_body(thread))
}

pub(super) fn delete(server: &Server, call: &Call) -> Result<Response, ApiError> {
    let id = call.segment(1);
    let mut world = server.world();
    expire_stale(server, &mut world, id);
    for run in remove(&mut world, id).ok_or_else(|| no_thread(id))? {
        world
            .counters
            .violation(format!("{id} was deleted while run {run} was active"));
    }
    world.counters.stats.threads_deleted += 1;
    drop(world);
    server.changed();
    Ok(json_body(
        &json!({"id": id, "object": "thread.deleted", "deleted": true}),
    ))
}

/// Removes a thread with its runs. Returns the runs that were active; `None` if there is no such
/// thread.
pub(super) fn remove(world: &mut World, id: &str) -> Option<Vec<String>> {
    let thread = world.threads.remove(id)?;
    for run in &thread.active {
        if let Some(run) = world.runs.remove(run) {
            run.work.cancel.cancel();
            if !run.work.foreign {
                world
                    .counters
                    .end(id, &run.id, run.work.generating, "deleted");
            }
        }
    }
    for run in &thread.runs {
        world.runs.remove(run);
    }
    Some(thread.active)
}

pub(super) fn create_message(server: &Server, mut call: Call) -> Result<Response, ApiError> {
    let body = Value::Object(std::mem::take(&mut call.body));
    let id = call.segment(1);
    let mut world = server.world();
    expire_stale(server, &mut world, id);
    thread(&world, id)?;
    refuse_if_active(server, &mut world, id, |run| {
        format!("Can't add messages to {id} while a run {run} is active.")
    })?;
    let message = new_message(server, body, String::new(), id)?;
    let answer = json_body(&message);
    let thread = thread_mut(&mut world, id)?;
    let blocking = thread.active.first().cloned();
    thread.push(message);
    if let Some(run) = blocking {
        world.counters.stats.messages_added_while_active += 1;
        world.counters.violation(format!(
            "a message was added to {id} while run {run} was active"
        ));
    }
    drop(world);
    server.changed();
    Ok(answer)
}

pub(super) fn list_messages(server: &Server, call: &Call) -> Result<Response, ApiError> {
    let paging = Paging::of_query(&call.query, true)?;
    let world = server.world();
    let thread = thread(&world, call.segment(1))?;
    let run = call.query.get("run_id");
    let wanted = |message: &&Message| run.is_none() || message.run_id.as_ref() == run;
    paging.answer(thread.messages.iter().filter(wanted), |message| &message.id)
}

pub(super) fn get_message(server: &Server, call: &Call) -> Result<Response, ApiError> {
    let mut world = server.world();
    Ok(json_body(message_mut(&mut world, call)?))
}

pub(super) fn modify_message(server: &Server, call: Call) -> Result<Response, ApiError> {
    let mut world = server.world();
    let message = message_mut(&mut world, &call)?;
    if let Some(metadata) = Fields::of_body(call.body, &["metadata"])?.metadata()? {
        message.metadata = metadata;
    }
    Ok(json_body(message))
}

pub(super) fn delete_message(server: &Server, call: &Call) -> Result<Response, ApiError> {
    let mut world = server.world();
    let id = message_mut(&mut world, call)?.id.clone();
    thread_mut(&mut world, call.segment(1))?.remove(&id);
    Ok(json_body(
        &json!({"id": id, "object": "thread.message.deleted", "deleted": true}),
    ))
}

/// Returns the messages in the array `name` of a body, at most `max`, for the thread `thread`.
pub(super) fn new_messages(
    server: &Server,
    fields: &mut Fields,
    name: &str,
    max: usize,
    thread: &str,
) -> Result<Vec<Message>, ApiError> {
    let path = fields.path(name);
    let list = fields.array(name, max)?.unwrap_or_default();
    let numbered = list.into_iter().enumerate();
    numbered
        .map(|(n, value)| new_message(server, value, format!("{path}[{n}]"), thread))
        .collect()
}

fn new_message(
    server: &Server,
    value: Value,
    at: String,
    thread: &str,
) -> Result<Message, ApiError> {
    let mut fields = Fields::of_value(value, at, &["role", "content", "attachments", "metadata"])?;
    let role = fields.needed_text("role")?;
    if role != "user" && role != "assistant" {
        return Err(wrong_value(
            &fields.path("role"),
            &role,
            "'user' and 'assistant'",
        ));
    }
    let path = fields.path("content");
    let content = match fields.needed("content")? {
        Value::String(text) => vec![text_part(&path, &text)?],
        Value::Array(parts) if !parts.is_empty() => {
            let numbered = parts.into_iter().enumerate();
            numbered
                .map(|(n, part)| content_part(part, format!("{path}[{n}]")))
                .collect::<Result<_, _>>()?
        }
        other => return Err(wrong_type(&path, "a string or a non-empty array", &other)),
    };
    Ok(Message {
        id: server.id("msg"),
        object: "thread.message",
        created_at: server.now(),
        thread_id: thread.to_owned(),
        status: "completed",
        incomplete_details: None,
        completed_at: Some(server.now()),
        incomplete_at: None,
        role,
        content,
        assistant_id: None,
        run_id: None,
        attachments: Some(fields.any("attachments").unwrap_or_else(|| json!([]))),
        metadata: fields.metadata()?.unwrap_or_default(),
    })
}

/// Converts a part of a request to the shape of answers.
fn content_part(part: Value, at: String) -> Result<Value, ApiError> {
    let mut fields = Fields::of_value(part, at, &["type", "text", "image_file", "image_url"])?;
    let kind = fields.needed_text("type")?;
    match kind.as_str() {
        "text" => {
            let text = fields.needed_text("text")?;
            text_part(&fields.path("text"), &text)
        }
        "image_file" | "image_url" => {
            let known: &[&str] = if kind == "image_file" {
                &["file_id", "detail"]
            } else {
                &["url", "detail"]
            };
            let mut image = Fields::of_value(fields.needed(&kind)?, fields.path(&kind), known)?;
            let place = image.needed_text(known[0])?;
            let detail = image.text("detail")?.unwrap_or_else(|| "auto".to_owned());
            let mut part = Map::new();
            part.insert(kind.clone(), json!({known[0]: place, "detail": detail}));
            part.insert("type".to_owned(), kind.into());
            Ok(Value::Object(part))
        }
        other => Err(wrong_value(
            &fields.path("type"),
            other,
            "'text', 'image_file' and 'image_url'",
        )),
    }
}

fn text_part(path: &str, text: &str) -> Result<Value, ApiError> {
    within(path, text, MAX_TEXT)?;
    Ok(json!({"type": "text", "text": {"value": text, "annotations": []}}))
}

pub(super) fn thread<'a>(world: &'a World, id: &str) -> Result<&'a Thread, ApiError> {
    world.threads.get(id).ok_or_else(|| no_thread(id))
}

pub(super) fn thread_mut<'a>(world: &'a mut World, id: &str) -> Result<&'a mut Thread, ApiError> {
    world.threads.get_mut(id).ok_or_else(|| no_thread(id))
}

fn message_mut<'a>(world: &'a mut World, call: &Call) -> Result<&'a mut Message, ApiError> {
    let id = call.segment(3);
    thread_mut(world, call.segment(1))?
        .message_mut(id)
        .ok_or_else(|| ApiError::not_found(format!("No message found with id '{id}'.")))
}

fn no_thread(id: &str) -> ApiError {
    ApiError::not_found(format!("No thread found with id '{id}'."))
}

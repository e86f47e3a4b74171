//! Calls on conversations and their items.

use axum::response::Response;
use serde_json::{Value, json};

use super::items::{given_ids, read_input, read_items, refuse_duplicates};
use crate::simulator::state::items::{self, Context};
use crate::simulator::state::responses::Conversation;
use crate::simulator::state::{Server, World};
use crate::simulator::wire::call::Call;
use crate::simulator::wire::error::{ApiError, json_body};
use crate::simulator::wire::fields::Fields;
use crate::simulator::wire::page::Paging;

/// Items of one create call.
const MAX_NEW_ITEMS: usize = 20;

pub(super) fn create(server: &Server, call: Call) -> Result<Response, ApiError> {
    let mut fields = Fields::of_body(call.body, &["items", "metadata"])?;
    let list = fields.array("items", MAX_NEW_ITEMS)?.unwrap_or_default();
    let mut conversation = Conversation {
        id: server.conversation_id(),
        object: "conversation",
        created_at: server.now(),
        metadata: fields.metadata()?.unwrap_or_default(),
        items: Vec::new(),
        context: Context::default(),
        active: Vec::new(),
        locked_until: None,
        foreign: None,
        deleted: false,
    };
    conversation.append(&read_items(server, list, "items")?);
    let answer = json_body(&conversation);
    let mut world = server.world();
    world.counters.stats.conversations_created += 1;
    world
        .conversations
        .insert(conversation.id.clone(), conversation);
    drop(world);
    server.changed();
    Ok(answer)
}

/// Lists all conversations.
pub(super) fn list(server: &Server, call: &Call) -> Result<Response, ApiError> {
    let paging = Paging::of_query(&call.query, true)?;
    let world = server.world();
    let all = world
        .conversations
        .iter()
        .map(|(_, conversation)| conversation);
    let live: Vec<&Conversation> = all.filter(|conversation| !conversation.deleted).collect();
    paging.answer(live.into_iter(), |conversation| &conversation.id)
}

pub(super) fn get(server: &Server, call: &Call) -> Result<Response, ApiError> {
    Ok(json_body(live(&mut server.world(), call.segment(1))?))
}

pub(super) fn update(server: &Server, call: Call) -> Result<Response, ApiError> {
    let mut world = server.world();
    let conversation = live(&mut world, call.segment(1))?;
    let mut fields = Fields::of_body(call.body, &["metadata"])?;
    conversation.metadata = fields
        .metadata()?
        .ok_or_else(|| fields.missing("metadata"))?;
    Ok(json_body(conversation))
}

pub(super) fn delete(server: &Server, call: &Call) -> Result<Response, ApiError> {
    let mut world = server.world();
    let conversation = live(&mut world, call.segment(1))?;
    conversation.deleted = true;
    let active = conversation.active.join(", ");
    let id = conversation.id.clone();
    if !active.is_empty() {
        world.counters.violation(format!(
            "{id} was deleted while response {active} was active"
        ));
    }
    world.counters.stats.conversations_deleted += 1;
    drop(world);
    server.changed();
    Ok(json_body(
        &json!({"id": id, "object": "conversation.deleted", "deleted": true}),
    ))
}

pub(super) fn create_items(server: &Server, call: Call) -> Result<Response, ApiError> {
    let id = call.segment(1).to_owned();
    let mut world = server.world();
    live(&mut world, &id)?;
    refuse_if_locked(server, &mut world, &id)?;
    let mut fields = Fields::of_body(call.body, &["items"])?;
    let list = fields
        .array("items", MAX_NEW_ITEMS)?
        .ok_or_else(|| fields.missing("items"))?;
    let list = Value::Array(list);
    let given = given_ids(&list);
    let new = read_input(server, list, "items")?;
    let conversation = live(&mut world, &id)?;
    refuse_duplicates(&given, &conversation.items)?;
    conversation.append(&new);
    let paging = Paging::whole();
    let answer = paging.answer(new.iter(), |item| items::id(item));
    if let Some(response) = conversation.active.first().cloned() {
        world.counters.stats.messages_added_while_active += 1;
        world.counters.violation(format!(
            "items were added to {id} while response {response} was active"
        ));
    }
    drop(world);
    server.changed();
    answer
}

pub(super) fn list_items(server: &Server, call: &Call) -> Result<Response, ApiError> {
    let paging = Paging::of_query(&call.query, false)?;
    let mut world = server.world();
    paging.answer(live(&mut world, call.segment(1))?.items.iter(), |item| {
        items::id(item)
    })
}

pub(super) fn get_item(server: &Server, call: &Call) -> Result<Response, ApiError> {
    let mut world = server.world();
    let conversation = any(&mut world, call.segment(1))?;
    let at = position(conversation, call.segment(3))?;
    Ok(json_body(&conversation.items[at]))
}

pub(super) fn delete_item(server: &Server, call: &Call) -> Result<Response, ApiError> {
    let id = call.segment(1);
    let mut world = server.world();
    any(&mut world, id)?;
    refuse_if_locked(server, &mut world, id)?;
    let conversation = any(&mut world, id)?;
    let at = position(conversation, call.segment(3))?;
    conversation.items.remove(at);
    conversation.context = Context::of(&conversation.items);
    Ok(json_body(conversation))
}

/// Locks a conversation with the response of another client. Returns `None` if there is no such
/// conversation or it is locked.
pub(in crate::simulator) fn start_foreign_run(
    server: &Server,
    conversation: &str,
) -> Option<String> {
    let mut world = server.world();
    let conversation = world
        .conversations
        .get_mut(conversation)
        .filter(|row| !row.is_locked())?;
    conversation.foreign = Some(server.id("resp"));
    conversation.foreign.clone()
}

/// Ends the foreign response of a conversation.
pub(in crate::simulator) fn stop_foreign_run(server: &Server, conversation: &str) -> bool {
    let mut world = server.world();
    world
        .conversations
        .get_mut(conversation)
        .is_some_and(|row| row.foreign.take().is_some())
}

/// Refuses a call on a locked conversation; the text names no response.
pub(super) fn refuse_if_locked(
    server: &Server,
    world: &mut World,
    id: &str,
) -> Result<(), ApiError> {
    if !server.config.enforce_locks
        || !world
            .conversations
            .get(id)
            .is_some_and(Conversation::is_locked)
    {
        return Ok(());
    }
    world.counters.stats.lock_refusals += 1;
    server.changed();
    Err(ApiError::invalid(
        "Another process is currently operating on this conversation. Please retry in a few seconds.",
    )
    .param("conversation")
    .code("conversation_locked"))
}

/// Returns a conversation that was not deleted.
pub(super) fn live<'a>(world: &'a mut World, id: &str) -> Result<&'a mut Conversation, ApiError> {
    world
        .conversations
        .get_mut(id)
        .filter(|conversation| !conversation.deleted)
        .ok_or_else(|| not_found(id))
}

/// Returns a conversation, deleted or not.
fn any<'a>(world: &'a mut World, id: &str) -> Result<&'a mut Conversation, ApiError> {
    world.conversations.get_mut(id).ok_or_else(|| not_found(id))
}

fn position(conversation: &Conversation, id: &str) -> Result<usize, ApiError> {
    conversation
        .items
        .iter()
        .position(|item| items::id(item) == id)
        .ok_or_else(|| {
            ApiError::not_found(format!("Item with id '{id}' not found in conversation."))
        })
}

fn not_found(id: &str) -> ApiError {
    ApiError::not_found(format!("Conversation with id '{id}' not found."))
}

//! What conversations and responses hold.

use super::items;
use crate::simulator::holding::Search;
use crate::simulator::state::World;

/// The items of deleted conversations, by their ids.
pub(in crate::simulator) fn leaked_items(world: &World) -> Vec<String> {
    let deleted = world.conversations.iter().filter(|(_, conversation)| conversation.is_deleted());
    let leaked = deleted.flat_map(|(_, conversation)| conversation.items());
    leaked.map(|item| items::id(item).to_owned()).collect()
}

pub(in crate::simulator) fn search(world: &World, search: &mut Search<'_>) {
    for (id, conversation) in world.conversations.iter() {
        let kind = if conversation.is_deleted() { "leaked item" } else { "item" };
        if !conversation.is_deleted() {
            search.look(|| format!("conversation {id}"), conversation);
        }
        for item in conversation.items() {
            search.look(|| format!("{kind} {} of conversation {id}", items::id(item)), item);
        }
    }
    for (id, stored) in world.responses.iter() {
        search.look(|| format!("response {id}"), &stored.response);
        search.look(|| format!("input of response {id}"), &stored.input);
        if let Some(log) = &stored.log {
            search.look_into_text(|| format!("events of response {id}"), &log.text());
        }
    }
}

//! The protocol of conversations and responses.

mod conversations;
mod create;
mod generate;
mod items;
mod stored;

use std::sync::Arc;

use axum::response::Response;

use crate::simulator::behaviour::refusal::Refused;
use crate::simulator::state::items::line;
use crate::simulator::state::stats::Line;
use crate::simulator::state::{Server, World};
use crate::simulator::wire::call::Call;
use crate::simulator::wire::operation::Operation;

pub(super) use conversations::{start_foreign_run, stop_foreign_run};

/// Answers a call of the Responses protocol.
pub(super) async fn answer(server: &Arc<Server>, call: Call) -> Result<Response, Refused> {
    match call.operation {
        Operation::CreateResponse => create::create(server, call).await,
        Operation::CancelResponse => Ok(stored::cancel(server, &call).await?),
        Operation::GetResponse => Ok(stored::get(server, &call)?),
        Operation::DeleteResponse => Ok(stored::delete(server, &call)?),
        Operation::ListInputItems => Ok(stored::list_input_items(server, &call)?),
        Operation::CreateConversation => Ok(conversations::create(server, call)?),
        Operation::ListConversations => Ok(conversations::list(server, &call)?),
        Operation::GetConversation => Ok(conversations::get(server, &call)?),
        Operation::UpdateConversation => Ok(conversations::update(server, call)?),
        Operation::DeleteConversation => Ok(conversations::delete(server, &call)?),
        Operation::CreateItems => Ok(conversations::create_items(server, call)?),
        Operation::ListItems => Ok(conversations::list_items(server, &call)?),
        Operation::GetItem => Ok(conversations::get_item(server, &call)?),
        Operation::DeleteItem => Ok(conversations::delete_item(server, &call)?),
        other => unreachable!("{} is not of this protocol", other.name()),
    }
}

/// Returns the messages of the chain that ends in a response, oldest first. Empty if there is no
/// such response.
pub(super) fn chain_lines(world: &World, id: &str) -> Vec<Line> {
    let mut chain = Vec::new();
    let mut next = world.responses.get(id);
    while let Some(stored) = next {
        chain.push(stored);
        next = stored
            .response
            .previous_response_id
            .as_ref()
            .and_then(|id| world.responses.get(id));
    }
    let items = chain
        .iter()
        .rev()
        .flat_map(|stored| stored.input.iter().chain(&stored.response.output));
    items.filter_map(line).collect()
}

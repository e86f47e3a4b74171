//! Calls on existing responses: get, resume, cancel, delete, input items.

use axum::response::Response;
use serde_json::json;

use super::generate::end_response;
use crate::simulator::behaviour::plan::Plan;
use crate::simulator::state::items;
use crate::simulator::state::responses::{ResponseStatus, StoredResponse};
use crate::simulator::state::{Server, World};
use crate::simulator::wire::call::Call;
use crate::simulator::wire::error::{ApiError, json_body};
use crate::simulator::wire::page::Paging;

pub(super) fn get(server: &Server, call: &Call) -> Result<Response, ApiError> {
    let world = server.world();
    let stored = stored(&world, call.segment(1))?;
    if !call.query_flag("stream") {
        return Ok(json_body(&stored.response));
    }
    let refused = |text: &str| {
        ApiError::invalid(text)
            .param("stream")
            .code("invalid_request_error")
    };
    if !stored.response.background {
        return Err(refused(
            "This response cannot be streamed because it was not created with background=true.",
        ));
    }
    let log = stored.log.as_ref().ok_or_else(|| {
        refused(
            "This response cannot be streamed because it was not created with stream=true or the stream TTL has expired.",
        )
    })?;
    let from = match call.query.get("starting_after") {
        None => 0,
        Some(text) => text
            .parse::<usize>()
            .map(|n| n.saturating_add(1))
            .map_err(|_| {
                ApiError::invalid(format!(
                    "Invalid type for 'starting_after': '{text}' is not an integer."
                ))
                .param("starting_after")
                .code("invalid_type")
            })?,
    };
    let mut plan = Plan::default();
    if let Some(fault) = &call.fault {
        plan.apply(fault).map_err(ApiError::invalid)?;
    }
    Ok(log.follow(from, plan.cut, plan.format.split))
}

/// Cancels a background response after the configured delay. If it is dropped before, nothing
/// happens.
pub(super) async fn cancel(server: &Server, call: &Call) -> Result<Response, ApiError> {
    let id = call.segment(1);
    if let Some(answer) = cancel_without_work(&server.world(), id)? {
        return Ok(answer);
    }
    let is_stuck = server
        .world()
        .responses
        .get(id)
        .is_some_and(|stored| stored.stuck_cancel);
    if is_stuck {
        // The end of the connection or of the simulator drops this future.
        std::future::pending::<()>().await;
    }
    if !server.config.cancel_delay.is_zero() {
        tokio::time::sleep(server.config.cancel_delay).await;
    }
    let mut guard = server.world();
    if let Some(answer) = cancel_without_work(&guard, id)? {
        return Ok(answer);
    }
    let world = &mut *guard;
    let stored = world.responses.get_mut(id).ok_or_else(|| not_found(id))?;
    stored.response.status = ResponseStatus::Cancelled;
    let made = std::mem::take(&mut stored.response.output);
    let answer = json_body(&stored.response);
    let (lane, input) = (stored.lane.clone(), stored.input.clone());
    stored.cancel.cancel();
    end_response(
        server,
        world,
        &lane,
        id,
        ResponseStatus::Cancelled.name(),
        &input,
        &made,
    );
    Ok(answer)
}

pub(super) fn delete(server: &Server, call: &Call) -> Result<Response, ApiError> {
    let id = call.segment(1);
    let mut world = server.world();
    if !stored(&world, id)?.response.status.is_final() {
        return Err(ApiError::invalid(
            "Cannot delete a response that is in progress.",
        ));
    }
    world.responses.remove(id);
    Ok(json_body(
        &json!({"id": id, "object": "response.deleted", "deleted": true}),
    ))
}

pub(super) fn list_input_items(server: &Server, call: &Call) -> Result<Response, ApiError> {
    let paging = Paging::of_query(&call.query, false)?;
    let world = server.world();
    paging.answer(stored(&world, call.segment(1))?.input.iter(), |item| {
        items::id(item)
    })
}

/// Returns the answer of a cancel call that changes nothing; `None` if there is a response to
/// cancel.
fn cancel_without_work(world: &World, id: &str) -> Result<Option<Response>, ApiError> {
    let response = &stored(world, id)?.response;
    if !response.background {
        return Err(ApiError::invalid("Cannot cancel a synchronous response."));
    }
    match response.status {
        ResponseStatus::Cancelled => Ok(Some(json_body(response))),
        ResponseStatus::Queued | ResponseStatus::InProgress => Ok(None),
        ended => Err(ApiError::invalid(format!(
            "Cannot cancel a {} response.",
            ended.name()
        ))),
    }
}

fn stored<'a>(world: &'a World, id: &str) -> Result<&'a StoredResponse, ApiError> {
    world.responses.get(id).ok_or_else(|| not_found(id))
}

fn not_found(id: &str) -> ApiError {
    ApiError::not_found(format!("Response with id '{id}' not found."))
}

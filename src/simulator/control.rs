//! `/_simulator/…`: the handle's functions over HTTP, without credentials.

use std::sync::Arc;

use axum::response::{IntoResponse, Response};
use http::Method;
use serde_json::json;

use super::handle::SimulatorHandle;
use crate::simulator::state::Server;
use crate::simulator::state::faults::Fault;
use crate::simulator::wire::error::{ApiError, json_body};

/// Answers a request below `/_simulator`.
pub(super) fn answer(
    server: &Arc<Server>,
    method: &Method,
    path: &[&str],
    body: &[u8],
) -> Response {
    let handle = SimulatorHandle::new(Arc::clone(server));
    let (get, post, delete) = (
        method == Method::GET,
        method == Method::POST,
        method == Method::DELETE,
    );
    match path {
        ["stats"] if get => json_body(&handle.stats()),
        ["threads"] if get => json_body(&handle.threads()),
        ["runs"] if get => json_body(&handle.runs()),
        ["threads", id, "history"] if get => json_body(&handle.thread_history(id)),
        ["responses"] if get => json_body(&handle.stored_responses()),
        ["leaked_items"] if get => json_body(&handle.leaked_items()),
        ["holds_text"] if post => holds_text(&handle, body),
        ["recorded"] if get => json_body(&handle.recorded()),
        ["faults"] if get => json_body(&server.world().faults.list()),
        ["faults"] if post => add_fault(&handle, body),
        ["faults"] if delete => done(|| server.world().faults.clear()),
        ["hold"] if post => done(|| handle.hold()),
        ["release"] if post => done(|| handle.release()),
        ["reset"] if post => done(|| handle.reset()),
        ["threads", id, "foreign_run"] if post => match handle.start_foreign_run(id) {
            Some(run) => json_body(&json!({"thread": id, "run": run})),
            None => ApiError::not_found(format!("No idle thread or conversation '{id}'."))
                .into_response(),
        },
        ["threads", id, "foreign_run"] if delete => {
            json_body(&json!({"thread": id, "stopped": handle.stop_foreign_run(id)}))
        }
        _ => ApiError::not_found(format!("Nothing at '/_simulator/{}'.", path.join("/")))
            .into_response(),
    }
}

fn add_fault(handle: &SimulatorHandle, body: &[u8]) -> Response {
    let added = serde_json::from_slice::<Fault>(body)
        .map_err(|error| error.to_string())
        .and_then(|fault| handle.add_fault(fault));
    match added {
        Ok(()) => json_body(&json!({"ok": true})),
        Err(error) => ApiError::invalid(error).into_response(),
    }
}

/// Searches for a text, which is the body.
fn holds_text(handle: &SimulatorHandle, body: &[u8]) -> Response {
    json_body(&handle.holds_text(&String::from_utf8_lossy(body)))
}

fn done(act: impl FnOnce()) -> Response {
    act();
    json_body(&json!({"ok": true}))
}

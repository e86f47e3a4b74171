//! Assistants v2: threads, messages, runs and run steps.

mod generate;
mod runs;
mod thread_lock;
mod threads;

use std::sync::Arc;

use axum::response::Response;

use crate::simulator::behaviour::refusal::Refused;
use crate::simulator::state::Server;
use crate::simulator::wire::call::Call;
use crate::simulator::wire::operation::Operation;

pub(super) use runs::{start_foreign_run, stop_foreign_run};

/// Answers a call of the Assistants protocol.
pub(super) fn answer(server: &Arc<Server>, call: Call) -> Result<Response, Refused> {
    match call.operation {
        Operation::CreateRun => runs::create(server, call),
        Operation::CreateThreadAndRun => runs::create_with_thread(server, call),
        Operation::SubmitToolOutputs => runs::submit_tool_outputs(server, call),
        Operation::CreateThread => Ok(threads::create(server, call)?),
        Operation::ListThreads => Ok(threads::list(server, &call)?),
        Operation::GetThread => Ok(threads::get(server, &call)?),
        Operation::ModifyThread => Ok(threads::modify(server, call)?),
        Operation::DeleteThread => Ok(threads::delete(server, &call)?),
        Operation::CreateMessage => Ok(threads::create_message(server, call)?),
        Operation::ListMessages => Ok(threads::list_messages(server, &call)?),
        Operation::GetMessage => Ok(threads::get_message(server, &call)?),
        Operation::ModifyMessage => Ok(threads::modify_message(server, call)?),
        Operation::DeleteMessage => Ok(threads::delete_message(server, &call)?),
        Operation::ListRuns => Ok(runs::list(server, &call)?),
        Operation::GetRun => Ok(runs::get(server, &call)?),
        Operation::ModifyRun => Ok(runs::modify(server, call)?),
        Operation::CancelRun => Ok(runs::cancel(server, &call)?),
        Operation::ListSteps => Ok(runs::list_steps(server, &call)?),
        Operation::GetStep => Ok(runs::get_step(server, &call)?),
        other => unreachable!("{} is not of this protocol", other.name()),
    }
}

//! What is left of things when nothing that was said may be in them.

use crate::domain::{Context, EventBatch, Leftover, LoggedEvent, RequiredAction, ToolCall, ToolOutput};
use crate::store::{InputMessage, Reply};

pub(super) fn blank_input(message: &InputMessage) -> InputMessage {
    InputMessage { id: message.id, content: Vec::new() }
}

pub(super) fn blank_calls(calls: &[ToolCall]) -> Vec<ToolCall> {
    let blank = |ToolCall { id, name, arguments: _ }: &ToolCall| ToolCall {
        id: id.clone(),
        name: name.clone(),
        arguments: String::new(),
    };
    calls.iter().map(blank).collect()
}

pub(super) fn blank_action(RequiredAction { tool_calls }: &RequiredAction) -> RequiredAction {
    RequiredAction { tool_calls: blank_calls(tool_calls) }
}

pub(super) fn blank_outputs(outputs: &[ToolOutput]) -> Vec<ToolOutput> {
    let blank = |ToolOutput { tool_call_id, output: _ }: &ToolOutput| ToolOutput {
        tool_call_id: tool_call_id.clone(),
        output: String::new(),
    };
    outputs.iter().map(blank).collect()
}

/// Each event keeps its number.
pub(super) fn blank_events(EventBatch { first, events }: &EventBatch) -> EventBatch {
    let blank = |event: &LoggedEvent| match event {
        LoggedEvent::Queued { position } => LoggedEvent::Queued { position: *position },
        LoggedEvent::Started => LoggedEvent::Started,
        LoggedEvent::RequiresAction(action) => LoggedEvent::RequiresAction(blank_action(action)),
        LoggedEvent::Omitted { .. } | LoggedEvent::Delta(_) => LoggedEvent::Omitted { units: event.units() },
    };
    EventBatch { first: *first, events: events.iter().map(blank).collect() }
}

pub(super) fn blank_leftover(left: &Leftover) -> Leftover {
    Leftover { open_calls: blank_calls(&left.open_calls), ..left.clone() }
}

/// What is missing upstream cannot be sent again.
pub(super) fn lasting(context: Context) -> Context {
    match context {
        Context::Missing => Context::Withheld,
        Context::Present | Context::Withheld | Context::Unknown => context,
    }
}

pub(super) fn blank_reply(reply: &Reply) -> Reply {
    let Reply { id, content: _, upstream_message_id, context } = reply;
    Reply {
        id: *id,
        content: Vec::new(),
        upstream_message_id: upstream_message_id.clone(),
        context: lasting(*context),
    }
}

//! `store.transcript = "off"`: storing runs and messages without their content.
//!
//! A message keeps its row with an empty list of parts. Pieces of text, and the arguments and
//! outputs of function calls, become empty texts. Ids, numbers and counts stay as they are.

use std::borrow::Cow;

use crate::domain::{
    CallAnswer, ContentPart, EventBatch, LoggedEvent, RequiredAction, ToolCall, ToolOutput,
    UnsettledRun, UpstreamSync,
};

/// Whether content is stored.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Redaction {
    Keep,
    Redact,
}

impl Redaction {
    pub(super) fn keeps_content(self) -> bool {
        self == Self::Keep
    }

    pub(super) fn parts(self, content: &[ContentPart]) -> &[ContentPart] {
        if self.keeps_content() { content } else { &[] }
    }

    pub(super) fn action(self, action: &RequiredAction) -> Cow<'_, RequiredAction> {
        self.encode(action, redacted_action)
    }

    pub(super) fn outputs(self, outputs: &[ToolOutput]) -> Cow<'_, [ToolOutput]> {
        if self.keeps_content() {
            return Cow::Borrowed(outputs);
        }
        let redacted = |ToolOutput {
                            tool_call_id,
                            kind,
                            answer: _,
                        }: &ToolOutput| ToolOutput {
            tool_call_id: tool_call_id.clone(),
            kind: *kind,
            answer: CallAnswer::text(""),
        };
        Cow::Owned(outputs.iter().map(redacted).collect())
    }

    /// Redacts a batch of events. Each event keeps its number.
    pub(super) fn events(self, batch: &EventBatch) -> Cow<'_, EventBatch> {
        self.encode(batch, |EventBatch { first, events }| {
            let redacted = |event: &LoggedEvent| match event {
                LoggedEvent::Queued { position } => LoggedEvent::Queued {
                    position: *position,
                },
                LoggedEvent::Started => LoggedEvent::Started,
                LoggedEvent::Recovered(recovery) => LoggedEvent::Recovered(recovery.clone()),
                LoggedEvent::RequiresAction(action) => {
                    LoggedEvent::RequiresAction(redacted_action(action))
                }
                LoggedEvent::Omitted { .. } | LoggedEvent::Delta(_) => LoggedEvent::Omitted {
                    units: event.units(),
                },
            };
            EventBatch {
                first: *first,
                events: events.iter().map(redacted).collect(),
            }
        })
    }

    pub(super) fn unsettled_run(self, left: &UnsettledRun) -> Cow<'_, UnsettledRun> {
        self.encode(left, |left| UnsettledRun {
            open_calls: redacted_calls(&left.open_calls),
            ..left.clone()
        })
    }

    /// Returns the state to record. A message whose content is not stored cannot be sent again, so
    /// a missing one becomes withheld for good.
    pub(super) fn sync(self, sync: UpstreamSync) -> UpstreamSync {
        match sync {
            UpstreamSync::Missing if !self.keeps_content() => UpstreamSync::Withheld,
            sync => sync,
        }
    }

    fn encode<T: Clone>(self, value: &T, redacted: impl FnOnce(&T) -> T) -> Cow<'_, T> {
        match self {
            Self::Keep => Cow::Borrowed(value),
            Self::Redact => Cow::Owned(redacted(value)),
        }
    }
}

/// Returns a required action without content, as it is stored with `store.transcript = "off"`.
pub fn redacted_action(RequiredAction { tool_calls }: &RequiredAction) -> RequiredAction {
    RequiredAction {
        tool_calls: redacted_calls(tool_calls),
    }
}

fn redacted_calls(calls: &[ToolCall]) -> Vec<ToolCall> {
    let redacted = |ToolCall {
                        id,
                        kind,
                        name,
                        arguments: _,
                        server_label,
                        pending_safety_checks: _,
                    }: &ToolCall| ToolCall {
        id: id.clone(),
        kind: *kind,
        name: name.clone(),
        arguments: String::new(),
        server_label: server_label.clone(),
        pending_safety_checks: Vec::new(),
    };
    calls.iter().map(redacted).collect()
}

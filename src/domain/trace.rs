//! The traces of a run: in its log, and at the upstream.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::run::text_enum;
use super::{
    Recovery, RequiredAction, RunId, TextDelta, ToolCall, UpstreamRunId, UpstreamThreadId,
};

/// An event of a run as it is stored, so that the stream can be replayed. What the run's record
/// has anyway (the reply, the end) is not stored again.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LoggedEvent {
    Queued {
        position: i64,
    },
    /// Serialised as an object. As a bare word, it would read like a piece of text that is this
    /// word.
    #[serde(with = "object")]
    Started,
    Recovered(Recovery),
    RequiresAction(RequiredAction),
    /// Skips event numbers: of text that is not stored, or of events that no reader can have seen.
    Omitted {
        units: i64,
    },
    /// More text of the reply.
    #[serde(untagged)]
    Delta(TextDelta),
}

/// Serialises a variant without content as an empty object.
mod object {
    use serde::de::IgnoredAny;
    use serde::ser::SerializeMap;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_map(Some(0))?.end()
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<(), D::Error> {
        IgnoredAny::deserialize(deserializer).map(drop)
    }
}

impl LoggedEvent {
    /// Returns how many event numbers the event takes: a text takes one for each byte, any other
    /// event takes one. So the next owner of a run gives its text the same numbers, whatever the
    /// pieces were before.
    pub fn units(&self) -> i64 {
        match self {
            Self::Queued { .. } | Self::Started | Self::Recovered(_) | Self::RequiresAction(_) => 1,
            Self::Omitted { units } => *units,
            Self::Delta(delta) => i64::try_from(delta.text.len()).unwrap_or(i64::MAX),
        }
    }
}

/// Consecutive events of a run. `first` is the first number of the first event. An event's own
/// number is the last one that it takes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EventBatch {
    pub first: i64,
    pub events: Vec<LoggedEvent>,
}

impl EventBatch {
    /// The number after the last event.
    pub fn end(&self) -> i64 {
        self.first + self.events.iter().map(LoggedEvent::units).sum::<i64>()
    }
}

text_enum!(
    /// What the upstream thread has of a message of the transcript.
    UpstreamSync {
        /// The upstream thread has the message.
        Present = "present",
        /// The upstream thread lacks the message; the next run sends it.
        Missing = "missing",
        /// The message stays in the transcript and is never sent. Its run never reached the model,
        /// or failed there and left nothing of it.
        Withheld = "withheld",
        /// Not known yet. The gateway checks the traces of the message's run before the next run.
        Unknown = "unknown",
    }
);

/// The position in the upstream thread at which a run's messages begin. It tells them from older
/// ones without ids of the gateway.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Baseline {
    /// The upstream's id of the newest message before the run that has an id; `None`: the
    /// beginning of the thread.
    pub anchor: Option<String>,
    /// Number of user messages between the anchor and the run's messages.
    pub skip: u32,
}

/// What a run may have left at the upstream. The gateway checks it before it uses the thread
/// again.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct UnsettledRun {
    pub run: RunId,
    pub thread: Option<UpstreamThreadId>,
    /// The run's id at the upstream, the newest one if there were several; `None` if the server
    /// never sent one.
    pub upstream_run: Option<UpstreamRunId>,
    /// Function calls of the run that no caller will answer.
    pub open_calls: Vec<ToolCall>,
    pub baseline: Baseline,
    /// Number of user messages that the run sent.
    pub inputs: u32,
    /// Whether the run sent unsynced messages too. They are in the upstream thread if the run's
    /// own messages are.
    pub synced: bool,
    /// Whether the gateway removes everything that the run left.
    pub remove: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_comes_back_as_it_was_even_if_its_text_is_a_name() {
        let call = ToolCall {
            id: "call_1".to_owned(),
            name: "f".to_owned(),
            arguments: "{}".to_owned(),
            ..ToolCall::default()
        };
        let mut events = vec![
            LoggedEvent::Queued { position: 2 },
            LoggedEvent::Started,
            LoggedEvent::RequiresAction(RequiredAction {
                tool_calls: vec![call],
            }),
        ];
        for text in [
            "started",
            "queued",
            "requires_action",
            "",
            "{\"started\":{}}",
            "null",
            "[]",
        ] {
            events.push(LoggedEvent::Delta(text.into()));
        }
        let text = serde_json::to_string(&events).unwrap();
        assert!(
            text.contains(r#",{"started":{}},"#) && text.contains(r#","queued","#),
            "{text}"
        );
        assert_eq!(
            serde_json::from_str::<Vec<LoggedEvent>>(&text).unwrap(),
            events
        );
    }
}

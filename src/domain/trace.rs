//! What a run leaves behind: in its log, and at the upstream.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::run::text_enum;
use super::{RequiredAction, RunId, ToolCall, UpstreamRunId, UpstreamThreadId};

/// An event of a run as it is stored, so that its stream can be replayed. What the record tells anyway (the reply, the
/// end) is not stored again.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LoggedEvent {
    Queued {
        position: i64,
    },
    /// Written as an object: as the bare word it would be read from a piece of text that happens to be this word.
    #[serde(with = "object")]
    Started,
    RequiresAction(RequiredAction),
    /// So many numbers are passed over: text that is not stored, or what nobody can have seen.
    Omitted {
        units: i64,
    },
    /// More text of the reply. A bare string, since there are so many.
    #[serde(untagged)]
    Delta(String),
}

/// The contents of a variant that has none.
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
    /// How many numbers it takes: text one for each byte, all else one. So whoever goes on with the text of a run that
    /// changed hands gives it the numbers that it had, in whatever pieces it came before.
    pub fn units(&self) -> i64 {
        match self {
            Self::Queued { .. } | Self::Started | Self::RequiresAction(_) => 1,
            Self::Omitted { units } => *units,
            Self::Delta(text) => i64::try_from(text.len()).unwrap_or(i64::MAX),
        }
    }
}

/// Events of a run in a row. `first` is the first number that the first event takes; the number of an event is the last
/// one that it takes.
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
    /// Where a message of the transcript stands at the upstream.
    UpstreamSync {
        /// The upstream thread holds it.
        Present = "present",
        /// The upstream thread lacks it: it goes along with the next turn.
        Missing = "missing",
        /// Its run never reached the model, or failed there and left nothing of it: it stays in the transcript, and is
        /// never sent.
        Withheld = "withheld",
        /// Not known yet: what its run left is looked at before the next turn.
        Unknown = "unknown",
    }
);

/// Where a run's messages begin in the upstream thread: what is needed to tell them from older ones without ids of
/// our own.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Baseline {
    /// The upstream's id of the newest message before the run that has one; `None`: the thread's beginning.
    pub anchor: Option<String>,
    /// User messages between the anchor and those of the run.
    pub skip: u32,
}

/// What a run may have left at the upstream, to be looked at before the thread is used again.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct UnsettledRun {
    pub run: RunId,
    pub thread: Option<UpstreamThreadId>,
    /// The run's id at the upstream, the newest one if there were several; `None` if it was never told.
    pub upstream_run: Option<UpstreamRunId>,
    /// Function calls that the run asked for and nobody will answer.
    pub open_calls: Vec<ToolCall>,
    pub baseline: Baseline,
    /// User messages that the run sent.
    pub inputs: u32,
    /// Earlier messages that the thread lacked went along: they are there if the run's own are.
    pub synced: bool,
    /// All that the run left is to be removed.
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
            events.push(LoggedEvent::Delta(text.to_owned()));
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

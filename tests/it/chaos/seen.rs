//! What one reader has seen of a run, over all its connections.

use serde_json::Value;

use crate::support::gateway::Event;

#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    pub(super) run: Option<String>,
    /// The number of the last event.
    pub(super) last: Option<i64>,
    /// The text of all deltas.
    pub(super) text: String,
    /// The text of the completed message that was shown.
    pub(super) message: Option<String>,
    /// The name of the run's last event.
    pub(super) end: Option<String>,
}

impl Seen {
    /// Adds the next event. The error says what is wrong with it.
    pub(super) fn take(&mut self, event: &Event) -> Result<(), String> {
        let wrong = |what: &str| {
            Err(format!(
                "{what}: {} {}, after {:?}",
                event.name, event.id, self.last
            ))
        };
        let Some((run, number)) = event.id.rsplit_once(':') else {
            return wrong("an event without an id");
        };
        let Ok(number) = number.parse::<i64>() else {
            return wrong("an event without a number");
        };
        if self.end.is_some() {
            return wrong("an event after the last one");
        }
        if self.run.as_ref().is_some_and(|known| known != run) {
            return wrong("an event of another run");
        }
        if self.last.is_some_and(|last| last >= number) {
            return wrong("an event with an earlier number");
        }
        if self.message.is_some() && !is_end(&event.name) {
            return wrong("an event after the completed message");
        }
        match event.name.as_str() {
            "message.delta" => self.text += event.data["text"].as_str().unwrap_or_default(),
            "message.completed" => self.message = Some(text_of(&event.data["message"])),
            "run.queued" | "run.started" | "run.recovered" | "run.requires_action" => {}
            name if is_end(name) => self.end = Some(name.to_owned()),
            _ => return wrong("an unknown event"),
        }
        self.run = Some(run.to_owned());
        self.last = Some(number);
        Ok(())
    }

    /// The `Last-Event-ID` of a client that reconnects.
    pub(super) fn last_event_id(&self) -> Option<String> {
        Some(format!("{}:{}", self.run.as_ref()?, self.last?))
    }
}

fn is_end(name: &str) -> bool {
    [
        "run.completed",
        "run.incomplete",
        "run.failed",
        "run.cancelled",
        "run.expired",
    ]
    .contains(&name)
}

/// Returns the whole text of a message.
pub(super) fn text_of(message: &Value) -> String {
    let parts = message["content"].as_array().into_iter().flatten();
    parts.filter_map(|part| part["text"].as_str()).collect()
}

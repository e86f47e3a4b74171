//! One message: what is asked for, how often, and what is known of it in the end.

use std::time::Duration;

use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use serde_json::{Value, json};

use super::seen::Seen;

/// How the answer is to come.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Form {
    /// When all is done.
    Json,
    /// After a second at the latest.
    Wait,
    /// At once.
    Async,
    /// As a stream, asked for in the body.
    Stream,
    /// The same, asked for in a header.
    Accept,
}

/// What the user does besides reading.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Whim {
    None,
    /// Leaves the stream after so many events, and comes back.
    Leaves(usize),
    /// Presses Stop after so many events.
    Stops(usize),
    /// Never answers function calls.
    Forgets,
}

/// A message as it is meant.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// Found nowhere else.
    pub(super) token: String,
    pub(super) key: Option<String>,
    pub(super) form: Form,
    pub(super) whim: Whim,
    pub(super) strategy: &'static str,
    directives: String,
    timeout: Option<Duration>,
    assistant: &'static str,
}

/// Whether it was taken, as far as its sender knows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Fate {
    Acknowledged,
    Refused,
    Unknown,
}

/// What is known of a message that was sent.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) plan: Plan,
    pub(super) fate: Fate,
    /// At least one request had no answer.
    pub(super) had_silence: bool,
    pub(super) run: Option<String>,
    /// Of who followed it to its end.
    pub(super) seen: Option<Seen>,
    /// How many deletions its user had asked for before.
    pub(super) generation: usize,
}

impl Plan {
    /// The `number`-th message of a user.
    pub(super) fn new(
        rng: &mut StdRng,
        user: usize,
        number: usize,
        assistant: &'static str,
    ) -> Self {
        let token = format!("<{user}.{number}>");
        let form = *[
            Form::Json,
            Form::Wait,
            Form::Async,
            Form::Stream,
            Form::Stream,
            Form::Accept,
        ]
        .choose(rng)
        .unwrap();
        let mut plan = Self {
            key: rng.random_bool(0.85).then(|| format!("key-{number}")),
            token,
            form,
            whim: Whim::None,
            strategy: "enqueue",
            directives: String::new(),
            timeout: None,
            assistant,
        };
        let (words, pace) = (rng.random_range(5..60), rng.random_range(5..50));
        plan.directives = match rng.random_range(0..100) {
            0..25 => String::new(),
            25..78 => format!("tokens={words} rate={pace}ms"),
            78..82 => "latency=400ms tokens=15".to_owned(),
            82..84 => "fail".to_owned(),
            84..86 => "incomplete tokens=20".to_owned(),
            86..96 => format!("tool=f tokens={words} rate=10ms"),
            _ => {
                plan.timeout = Some(Duration::from_secs(4));
                plan.whim = Whim::Forgets;
                "tool=f".to_owned()
            }
        };
        if plan.whim == Whim::None {
            let events = rng.random_range(0..12);
            plan.whim = match rng.random_range(0..100) {
                0..12 => Whim::Leaves(events),
                12..20 => Whim::Stops(events),
                _ => Whim::None,
            };
        }
        plan
    }

    /// A plain message that has to be answered.
    pub(super) fn plain(user: usize, number: usize, assistant: &'static str) -> Self {
        Self {
            token: format!("<{user}.{number}>"),
            key: Some(format!("key-{number}")),
            form: Form::Json,
            whim: Whim::None,
            strategy: "enqueue",
            directives: String::new(),
            timeout: None,
            assistant,
        }
    }

    pub(super) fn with_strategy(mut self, strategy: &'static str) -> Self {
        self.strategy = strategy;
        self
    }

    /// Its sender only wants to know that it was taken, and asks until that is known.
    pub(super) fn handed_in(self) -> Self {
        let key = format!("key-of-{}", self.token);
        Self {
            form: Form::Async,
            key: Some(key),
            ..self
        }
    }

    pub(super) fn streams(&self) -> bool {
        matches!(self.form, Form::Stream | Form::Accept)
    }

    /// The same each time, or a key would be refused.
    pub(super) fn body(&self) -> Value {
        let directives = if self.directives.is_empty() {
            String::new()
        } else {
            format!(" [[sim: {}]]", self.directives)
        };
        let mut body = json!({
            "content": format!("{} hello{directives}", self.token),
            "assistant": self.assistant,
            "multitask_strategy": self.strategy,
        });
        if let Some(timeout) = self.timeout {
            body["timeout_ms"] = json!(timeout.as_millis());
        }
        if self.form == Form::Stream {
            body["stream"] = true.into();
        }
        body
    }

    /// For stories.
    pub(super) fn describe(&self) -> String {
        format!(
            "{} {:?} {:?} {} key={:?} [{}]",
            self.token, self.form, self.whim, self.strategy, self.key, self.directives
        )
    }
}

impl Sent {
    pub(super) fn new(plan: Plan, generation: usize) -> Self {
        Self {
            plan,
            fate: Fate::Unknown,
            had_silence: false,
            run: None,
            seen: None,
            generation,
        }
    }

    /// All that was sent of it came before the last of so many deletions, and so nothing of it is anywhere.
    pub(super) fn is_erased(&self, deletions: usize) -> bool {
        self.generation < deletions && !self.had_silence
    }
}

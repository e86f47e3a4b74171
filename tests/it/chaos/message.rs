//! One message: what it asks for, what its user does meanwhile, and what is known of it in the
//! end.

use std::time::Duration;

use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use serde_json::{Value, json};

use super::seen::Seen;

/// Messages that the upstream refuses, answers in an odd form, or minds from then on.
const ODDITIES: [&str; 9] = [
    "status=400",
    "status=400 code=content_filter",
    "fail=rate_limit_exceeded retry_after=0.05",
    "fail=server_error retry_after=0.05",
    "empty",
    "halves tokens=15 rate=10ms",
    "unreadable tokens=15 rate=10ms",
    "two_ends",
    "poison",
];

/// The form of answer that the client asks for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Form {
    /// JSON when the run has ended.
    Json,
    /// JSON after a second at the latest.
    Wait,
    /// JSON at once.
    Async,
    /// A stream, which the body asks for.
    Stream,
    /// A stream, which a header asks for.
    Accept,
}

/// What the user does besides reading.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Whim {
    None,
    /// Leaves the stream after this many events, and returns.
    Leaves(usize),
    /// Presses Stop after this many events.
    Stops(usize),
    /// Never answers function calls.
    Forgets,
}

/// A message before it is sent.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// A text that occurs nowhere else.
    pub(super) token: String,
    pub(super) key: Option<String>,
    pub(super) form: Form,
    pub(super) whim: Whim,
    pub(super) strategy: &'static str,
    directives: String,
    timeout: Option<Duration>,
    assistant: &'static str,
}

/// Whether the message was accepted, as far as its sender knows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Fate {
    Acknowledged,
    Refused,
    Unknown,
}

/// What is known of a sent message.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) plan: Plan,
    pub(super) fate: Fate,
    /// At least one request got no answer.
    pub(super) had_silence: bool,
    pub(super) run: Option<String>,
    /// What the reader saw that followed the run to its end.
    pub(super) seen: Option<Seen>,
    /// Number of deletions that the user had requested before.
    pub(super) generation: usize,
}

impl Plan {
    /// Makes the `number`-th message of a user.
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
            25..70 => format!("tokens={words} rate={pace}ms"),
            70..73 => "latency=400ms tokens=15".to_owned(),
            73..75 => "fail".to_owned(),
            75..77 => "incomplete tokens=20".to_owned(),
            77..86 => (*ODDITIES.choose(rng).unwrap()).to_owned(),
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

    /// Makes a plain message that must be answered.
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

    /// Changes the message so that its sender only asks until it knows that it was accepted.
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

    /// The request's body. It is the same for each repeat, since a key with another body is
    /// refused.
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

    /// A description for the report.
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

    /// Whether all requests with this message arrived before the last of `deletions`. Nothing of
    /// it may remain then.
    pub(super) fn is_erased(&self, deletions: usize) -> bool {
        self.generation < deletions && !self.had_silence
    }
}

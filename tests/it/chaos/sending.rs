//! Sends a message until its fate is known, and follows its run to the end.

use std::time::{Duration, Instant};

use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use super::client::{Client, PERSEVERANCE, Reply};
use super::message::{Fate, Form, Plan, Sent, Whim};
use super::seen::Seen;
use crate::support::gateway::{Answer, EventReader};

/// Silence after which a stream counts as broken. The gateway sends something every second.
const SILENCE: Duration = Duration::from_secs(5);

/// Why reading a stream ended.
enum Look {
    /// The run has ended.
    End,
    /// The run asks for these function calls.
    Asked(Value),
    /// The reader leaves.
    Left,
    /// The connection is gone, or of no further use.
    Broken,
    /// The run does not exist any more.
    Gone,
}

/// A user's conversation.
pub(super) struct Conversation {
    pub(super) client: Client,
    pub(super) scope: String,
    /// The conversation may be deleted at any time from now on.
    pub(super) may_be_deleted: bool,
}

impl Conversation {
    /// Sends a message, repeats it where that is safe, and follows its run to the end.
    pub(super) async fn send(&self, plan: Plan, generation: usize) -> Sent {
        let client = &self.client;
        client.tell(format!("sends {}", plan.describe()));
        client.world.count("messages: sent");
        let mut sent = Sent::new(plan, generation);
        let begun = Instant::now();
        let mut attempts = 0;
        loop {
            attempts += 1;
            match client.ask(self.request(&sent.plan)).await {
                Reply::Broken(why) => {
                    client.tell(format!("{} got no answer: {why}", sent.plan.token));
                    sent.had_silence = true;
                }
                Reply::Stream(reader) => {
                    sent.fate = Fate::Acknowledged;
                    if self.follow(&mut sent, Seen::default(), Some(reader)).await {
                        break;
                    }
                    client.tell(format!(
                        "the stream of {} broke off before it named the run",
                        sent.plan.token
                    ));
                }
                Reply::Answer(answer) => {
                    if self.answered(&mut sent, &answer).await {
                        break;
                    }
                }
            }
            if sent.plan.key.is_none() {
                break;
            }
            if begun.elapsed() > PERSEVERANCE {
                client.fault(format!(
                    "{} was never answered, {attempts} times",
                    sent.plan.token
                ));
                break;
            }
            client.world.count("messages: sent again");
            client.pause().await;
        }
        client.tell(format!(
            "{} is {:?}, {:?}",
            sent.plan.token, sent.fate, sent.run
        ));
        client.world.count(match sent.fate {
            Fate::Acknowledged => "messages: acknowledged",
            Fate::Refused => "messages: refused",
            Fate::Unknown => "messages: unknown",
        });
        sent
    }

    /// Sends a message until its fate is known. Does not wait for its run.
    pub(super) async fn hand_in(&self, plan: Plan, generation: usize) -> Sent {
        let client = &self.client;
        client.tell(format!("hands in {}", plan.describe()));
        client.world.count("messages: handed in");
        let mut sent = Sent::new(plan, generation);
        let begun = Instant::now();
        while begun.elapsed() < PERSEVERANCE {
            match client.ask(self.request(&sent.plan)).await {
                Reply::Answer(answer) => {
                    client.tell(format!("answer to {}: {}", sent.plan.token, brief(&answer)));
                    sent.run = answer.body["run"]["id"].as_str().map(str::to_owned);
                    match answer.status.as_u16() {
                        200 | 202 => sent.fate = Fate::Acknowledged,
                        409 | 429 => sent.fate = Fate::Refused,
                        // The message was accepted, and its run has ended meanwhile.
                        422 | 502..=504 if answer.body["run_id"].is_string() => {
                            sent.fate = Fate::Acknowledged;
                        }
                        503 => sent.had_silence |= answer.problem().1 == "maybe-merged",
                        _ => {
                            client.fault(format!(
                                "unexpected answer to {}: {}",
                                sent.plan.token,
                                brief(&answer)
                            ));
                            sent.had_silence = true;
                            return sent;
                        }
                    }
                }
                Reply::Broken(_) => sent.had_silence = true,
                Reply::Stream(_) => client.fault("an unrequested stream"),
            }
            if sent.fate != Fate::Unknown {
                return sent;
            }
            client.pause().await;
        }
        client.fault(format!("{} was never answered", sent.plan.token));
        sent
    }

    fn request(&self, plan: &Plan) -> RequestBuilder {
        let mut request = self
            .client
            .request(Method::POST, &format!("{}/messages", self.scope))
            .json(&plan.body());
        if let Some(key) = &plan.key {
            request = request.header("idempotency-key", key);
        }
        match plan.form {
            Form::Json | Form::Stream => request,
            Form::Wait => request.header("prefer", "wait=1"),
            Form::Async => request.header("prefer", "respond-async"),
            Form::Accept => request.header("accept", "text/event-stream"),
        }
    }

    /// Handles the answer to a message. Returns `false` if the message should be sent again where
    /// that is safe.
    async fn answered(&self, sent: &mut Sent, answer: &Answer) -> bool {
        let token = sent.plan.token.clone();
        self.client
            .tell(format!("answer to {token}: {}", brief(answer)));
        if answer.headers.contains_key("idempotent-replayed") {
            self.client.world.count("messages: replayed");
        }
        let run = answer.body["run"]["id"]
            .as_str()
            .or(answer.body["run_id"].as_str())
            .map(str::to_owned);
        match answer.status.as_u16() {
            200 | 202 => {
                sent.fate = Fate::Acknowledged;
                sent.run = run;
                self.stay(sent, answer).await;
                true
            }
            // Another run was unfinished, or something else held the upstream thread. The gateway
            // keeps nothing of the message then.
            409 | 429 => {
                sent.fate = Fate::Refused;
                true
            }
            // The message was accepted, and the answer is the failure of its run.
            422 | 502..=504 if run.is_some() => {
                sent.fate = Fate::Acknowledged;
                sent.run = run;
                true
            }
            503 => {
                sent.had_silence |= answer.problem().1 == "maybe-merged";
                false
            }
            404 if self.may_be_deleted => {
                sent.had_silence = true;
                true
            }
            _ => {
                self.client
                    .fault(format!("unexpected answer to {token}: {}", brief(answer)));
                sent.had_silence = true;
                true
            }
        }
    }

    /// Follows the run of an answered message to its end.
    async fn stay(&self, sent: &mut Sent, answer: &Answer) {
        let status = answer.body["run"]["status"].as_str().unwrap_or_default();
        if status == "requires_action" && sent.plan.whim != Whim::Forgets {
            let calls = answer.body["run"]["required_action"]["tool_calls"].clone();
            drop(self.give(sent, &calls, false).await);
        }
        if let Whim::Stops(_) = sent.plan.whim
            && answer.status == StatusCode::ACCEPTED
        {
            self.stop(sent).await;
        }
        // Some clients read the events, others only poll for the end.
        if sent.plan.form == Form::Async {
            let seen = Seen {
                run: sent.run.clone(),
                ..Seen::default()
            };
            self.follow(sent, seen, None).await;
        } else {
            self.poll(sent).await;
        }
    }

    async fn poll(&self, sent: &Sent) {
        let Some(run) = &sent.run else { return };
        let path = format!("{}/runs/{run}", self.scope);
        let begun = Instant::now();
        while begun.elapsed() < PERSEVERANCE {
            let Some(answer) = self.client.get(&path).await else {
                return;
            };
            if answer.body["run"]["finished_at"].is_string() || self.is_gone(&answer) {
                return;
            }
            if answer.body["run"]["status"] == "requires_action" && sent.plan.whim != Whim::Forgets
            {
                let calls = answer.body["run"]["required_action"]["tool_calls"].clone();
                drop(self.give(sent, &calls, false).await);
            }
            sleep(Duration::from_millis(250)).await;
        }
        self.client
            .fault(format!("{} never ended: {run}", sent.plan.token));
    }

    fn is_gone(&self, answer: &Answer) -> bool {
        let is_gone = answer.status == StatusCode::NOT_FOUND;
        if is_gone && !self.may_be_deleted {
            self.client.fault(format!(
                "something that exists was not found: {}",
                brief(answer)
            ));
        }
        is_gone
    }

    /// Follows a run to its end over any number of connections. Returns `false` if the client
    /// never learned which run it is.
    async fn follow(
        &self,
        sent: &mut Sent,
        mut seen: Seen,
        mut reader: Option<EventReader>,
    ) -> bool {
        let (client, begun) = (&self.client, Instant::now());
        let mut whim = sent.plan.whim;
        loop {
            if begun.elapsed() > PERSEVERANCE {
                client.fault(format!(
                    "the stream of {} never ended, last seen {:?}",
                    sent.plan.token, seen.last
                ));
                break;
            }
            let look = match &mut reader {
                None => self.reopen(&seen, &mut reader).await,
                Some(reader) => self.read(&mut seen, reader, whim).await,
            };
            sent.run.clone_from(&seen.run);
            match look {
                Some(Look::End) => {
                    client.world.count("streams: followed to the end");
                    sent.seen = Some(seen);
                    break;
                }
                Some(Look::Gone) => break,
                Some(Look::Asked(calls)) => {
                    reader = None;
                    if whim != Whim::Forgets {
                        reader = self.give(sent, &calls, sent.plan.streams()).await;
                    }
                }
                Some(Look::Left) => {
                    reader = None;
                    client.world.count("streams: left");
                    if matches!(whim, Whim::Stops(_)) {
                        self.stop(sent).await;
                    }
                    whim = Whim::None;
                }
                Some(Look::Broken) => {
                    reader = None;
                    if seen.run.is_none() {
                        return false;
                    }
                    client.world.count("streams: resumed");
                    client.tell(format!(
                        "the stream of {} broke after {:?}",
                        sent.plan.token,
                        seen.last_event_id()
                    ));
                }
                None => {}
            }
        }
        true
    }

    /// Asks any replica for the events after the last one seen. Returns `None` if `reader` is set
    /// now, or the caller should try again.
    async fn reopen(&self, seen: &Seen, reader: &mut Option<EventReader>) -> Option<Look> {
        let path = format!("{}/runs/{}/events", self.scope, seen.run.as_ref()?);
        let mut request = self.client.request(Method::GET, &path);
        if let Some(last) = seen.last_event_id() {
            request = request.header("last-event-id", last);
        }
        match self.client.ask(request).await {
            Reply::Stream(stream) => *reader = Some(stream),
            Reply::Answer(answer) if answer.status == StatusCode::NO_CONTENT => {
                self.client.fault(format!(
                    "{path}: the stream has ended for a reader that saw {:?} last, and not the end",
                    seen.last
                ));
                return Some(Look::Gone);
            }
            Reply::Answer(answer) if self.is_gone(&answer) => return Some(Look::Gone),
            Reply::Answer(answer) if answer.status != StatusCode::SERVICE_UNAVAILABLE => {
                self.client
                    .fault(format!("unexpected answer to {path}: {}", brief(&answer)));
                return Some(Look::Gone);
            }
            Reply::Answer(_) | Reply::Broken(_) => self.client.pause().await,
        }
        None
    }

    /// Reads events until the caller has to act. Returns why.
    async fn read(&self, seen: &mut Seen, reader: &mut EventReader, whim: Whim) -> Option<Look> {
        let mut events = 0;
        loop {
            if let Whim::Leaves(after) | Whim::Stops(after) = whim
                && events >= after
                && seen.run.is_some()
            {
                return Some(Look::Left);
            }
            let event = match timeout(SILENCE, reader.next_or_broken()).await {
                Ok(Ok(Some(event))) => event,
                Ok(Ok(None)) => {
                    self.client
                        .world
                        .count("streams: ended without an end event");
                    return Some(Look::Broken);
                }
                Ok(Err(_)) => return Some(Look::Broken),
                Err(_) => {
                    self.client.world.count("streams: fell silent");
                    return Some(Look::Broken);
                }
            };
            events += 1;
            if event.name == "stream.reconnect" {
                self.client.world.count("streams: told to reconnect");
                self.check_hint(seen, &event.data);
                seen.run = seen.run.take().or_else(|| run_of(&event.data));
                return Some(Look::Broken);
            }
            if let Err(why) = seen.take(&event) {
                self.client.fault(format!("{:?}: {why}", seen.run));
            }
            if event.name == "run.requires_action" {
                return Some(Look::Asked(event.data["tool_calls"].clone()));
            }
            if seen.end.is_some() {
                return Some(Look::End);
            }
        }
    }

    /// Checks that the hint to reconnect continues at the reader's last event.
    fn check_hint(&self, seen: &Seen, hint: &Value) {
        let Some(run) = &seen.run else { return };
        let wanted = json!({"events": format!("{}/runs/{run}/events", self.scope), "after": seen.last_event_id()});
        // A stream that has shown no event gives no event to continue after.
        if *hint != wanted && !(hint["after"].is_null() && hint["events"] == wanted["events"]) {
            self.client
                .fault(format!("the hint is {hint} instead of {wanted}"));
        }
    }

    /// Sends a run the outputs of its calls. Returns the stream of the rest, if the answer is
    /// one.
    async fn give(&self, sent: &Sent, calls: &Value, streams: bool) -> Option<EventReader> {
        let run = sent.run.as_ref()?;
        let path = format!("{}/runs/{run}/tool_outputs", self.scope);
        let outputs: Vec<Value> = calls
            .as_array()
            .into_iter()
            .flatten()
            .map(|call| json!({"tool_call_id": call["id"], "output": "4 °C"}))
            .collect();
        // A repeat has the same key. So one set of outputs counts, however often it is sent.
        let key = format!(
            "outputs-{streams}-{}",
            calls[0]["id"].as_str().unwrap_or_default()
        );
        let body = json!({"tool_outputs": outputs, "stream": streams});
        let begun = Instant::now();
        while begun.elapsed() < PERSEVERANCE {
            let request = self
                .client
                .request(Method::POST, &path)
                .header("idempotency-key", &key)
                .json(&body);
            let request = if streams {
                request
            } else {
                request.header("prefer", "respond-async")
            };
            match self.client.ask(request).await {
                Reply::Stream(reader) => return Some(reader),
                // The run may have ended, or have got its outputs before.
                Reply::Answer(answer) if [200, 202, 404, 409].contains(&answer.status.as_u16()) => {
                    self.client.tell(format!(
                        "answer to the outputs of {run}: {}",
                        brief(&answer)
                    ));
                    return None;
                }
                Reply::Answer(answer) if answer.body["run_id"].is_string() => return None,
                Reply::Answer(answer) if answer.status != StatusCode::SERVICE_UNAVAILABLE => {
                    self.client.fault(format!(
                        "unexpected answer to the outputs of {run}: {}",
                        brief(&answer)
                    ));
                    return None;
                }
                Reply::Answer(_) | Reply::Broken(_) => self.client.pause().await,
            }
        }
        self.client.fault(format!("{path} was never answered"));
        None
    }

    /// Cancels a run.
    async fn stop(&self, sent: &Sent) {
        let Some(run) = &sent.run else { return };
        let path = format!("{}/runs/{run}/cancel", self.scope);
        if let Some(answer) = self
            .client
            .retry_until_answered(&path, || self.client.request(Method::POST, &path))
            .await
        {
            self.client.world.count("runs: cancelled by their user");
            self.client
                .tell(format!("cancels {run}: {}", brief(&answer)));
            if answer.status != StatusCode::OK && !self.is_gone(&answer) {
                self.client
                    .fault(format!("unexpected answer to a cancel: {}", brief(&answer)));
            }
        }
    }
}

fn run_of(hint: &Value) -> Option<String> {
    hint["events"]
        .as_str()?
        .strip_suffix("/events")?
        .rsplit('/')
        .next()
        .map(str::to_owned)
}

/// Summarises an answer in a few words.
pub(super) fn brief(answer: &Answer) -> String {
    let body = &answer.body;
    let replayed = if answer.headers.contains_key("idempotent-replayed") {
        " again"
    } else {
        ""
    };
    format!(
        "{}{replayed} {} {} {} {} {}",
        answer.status.as_u16(),
        body["type"].as_str().unwrap_or_default(),
        body["code"].as_str().unwrap_or_default(),
        body["run"]["id"]
            .as_str()
            .or(body["run_id"].as_str())
            .unwrap_or_default(),
        body["run"]["status"].as_str().unwrap_or_default(),
        body["detail"].as_str().unwrap_or_default(),
    )
}

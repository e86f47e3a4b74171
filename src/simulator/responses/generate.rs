//! The generation of a response: its items and their events in the documented order.

use std::sync::Arc;
use std::time::Duration;

use axum::response::Response as HttpResponse;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::simulator::behaviour::plan::{ErrorShape, Outcome, Plan, PlannedCall};
use crate::simulator::behaviour::words;
use crate::simulator::state::items::Context;
use crate::simulator::state::responses::{Response, ResponseStatus, StoredResponse, usage};
use crate::simulator::state::{Server, World};
use crate::simulator::wire::error::json_body;
use crate::simulator::wire::sse::EventOut;

/// The work on one response, from its acceptance to its end.
#[derive(Debug)]
pub(super) struct Generation {
    server: Arc<Server>,
    /// Cancelled when the response's world ends.
    end: CancellationToken,
    response: Response,
    input: Vec<Value>,
    context: Context,
    lane: String,
    plan: Plan,
    out: EventOut,
    /// The receiver of the finished response, if it is not streamed.
    done: Option<oneshot::Sender<HttpResponse>>,
    cancel: CancellationToken,
    obfuscation: bool,
    sequence: u64,
    deltas: usize,
    tokens: u64,
}

/// The reason why the work stopped before its end.
#[derive(Clone, Copy, Debug)]
enum Stop {
    /// A background response was cancelled, and its row says so already.
    Cancelled,
    /// The client left, or its connection was cut.
    Abandoned,
    /// An `error` event is to be sent.
    Failed,
    /// The simulator was reset or stops.
    Gone,
}

#[derive(Serialize)]
struct ResponseEvent<'a> {
    r#type: &'a str,
    response: &'a Response,
    sequence_number: u64,
}

impl Generation {
    /// Makes the work on an accepted response. Nothing happens until [`work`](Self::work) is
    /// polled.
    #[expect(
        clippy::too_many_arguments,
        reason = "a struct would only repeat the fields"
    )]
    pub(super) fn new(
        server: &Arc<Server>,
        end: CancellationToken,
        response: Response,
        input: Vec<Value>,
        context: Context,
        lane: String,
        plan: Plan,
        out: EventOut,
        done: Option<oneshot::Sender<HttpResponse>>,
        cancel: CancellationToken,
        obfuscation: bool,
    ) -> Self {
        Self {
            server: Arc::clone(server),
            end,
            response,
            input,
            context,
            lane,
            plan,
            out,
            done,
            cancel,
            obfuscation,
            sequence: 0,
            deltas: 0,
            tokens: 0,
        }
    }

    pub(super) fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Does the work, sends its events, and answers the waiting client.
    pub(super) async fn work(mut self) {
        if let Err(stop) = self.reply().await {
            self.stop(stop);
        }
        self.out.finish();
    }

    async fn reply(&mut self) -> Result<(), Stop> {
        if self.plan.is_silent() {
            self.out.mute();
        }
        self.announce();
        if self.plan.is_silent() {
            return Err(self.forever().await);
        }
        if self.plan.hold_after.is_none() && self.server.is_held() {
            self.out.flush();
            let server = Arc::clone(&self.server);
            self.unless_stopped(server.released()).await?;
        }
        self.pause(self.plan.latency.unwrap_or(self.server.config.latency))
            .await?;
        if self.plan.complaint.is_some() || self.plan.failure.is_some() {
            self.plan.outcome = Outcome::Fail;
            return self.finish();
        }
        if self.plan.reasoning {
            self.reason();
        }
        if self.plan.empty {
            return self.finish();
        }
        if self.plan.tools.is_empty() {
            for part in 0..=self.plan.more_parts {
                self.message(part).await?;
            }
        } else {
            self.call_tools();
        }
        if self.plan.dangling_reasoning {
            self.reason();
        }
        self.finish()
    }

    fn announce(&mut self) {
        self.emit_response("response.created");
        if self.plan.format.unknown_events {
            self.emit(
                "response.future_event",
                json!({"response_id": self.response.id}),
            );
        }
        if self.response.background {
            self.emit_response("response.queued");
            self.response.status = ResponseStatus::InProgress;
            let mut world = self.server.world();
            if let Some(stored) = world.responses.get_mut(&self.response.id)
                && !stored.response.status.is_final()
            {
                stored.response.status = ResponseStatus::InProgress;
            }
            drop(world);
            self.server.changed();
        }
        self.emit_response("response.in_progress");
    }

    fn reason(&mut self) {
        let item = json!({"type": "reasoning", "id": self.server.id("rs"), "summary": []});
        let index = self.response.output.len();
        self.emit(
            "response.output_item.added",
            json!({"output_index": index, "item": item}),
        );
        self.emit(
            "response.output_item.done",
            json!({"output_index": index, "item": item}),
        );
        self.response.output.push(item);
    }

    fn call_tools(&mut self) {
        let (_, input) = Plan::of_text(&self.context.user_text).unwrap_or_default();
        let arguments = json!({"input": input}).to_string();
        for PlannedCall { kind, name } in self.plan.tools.clone() {
            let index = self.response.output.len();
            let call_id = self.server.id("call");
            let item = match kind {
                "function" => {
                    self.call_function(&name, &arguments);
                    continue;
                }
                "custom" => {
                    json!({"type": "custom_tool_call", "id": self.server.id("ctc"), "call_id": call_id, "name": name, "input": input})
                }
                "mcp_approval" => {
                    json!({"type": "mcp_approval_request", "id": self.server.id("mcpr"), "server_label": "sim", "name": name, "arguments": arguments})
                }
                "computer" => {
                    json!({"type": "computer_call", "id": self.server.id("cu"), "call_id": call_id, "status": "completed",
                           "action": {"type": "screenshot"}, "pending_safety_checks": [{"id": "check_1", "code": "odd", "message": "Odd."}]})
                }
                "apply_patch" => {
                    json!({"type": "apply_patch_call", "id": self.server.id("apc"), "call_id": call_id, "status": "completed",
                           "operation": {"type": "delete_file", "path": name}})
                }
                kind => {
                    json!({"type": format!("{kind}_call"), "id": self.server.id("sh"), "call_id": call_id, "status": "completed",
                           "action": {"type": "exec", "command": [name], "commands": [name], "env": {}}})
                }
            };
            for event in ["response.output_item.added", "response.output_item.done"] {
                self.emit(event, json!({"output_index": index, "item": item}));
            }
            self.response.output.push(item);
        }
    }

    fn call_function(&mut self, name: &str, arguments: &str) {
        let index = self.response.output.len();
        let mut item = json!({
            "type": "function_call", "id": self.server.id("fc"), "call_id": self.server.id("call"),
            "name": name, "arguments": "", "status": "in_progress",
        });
        let id = item["id"].clone();
        self.emit(
            "response.output_item.added",
            json!({"output_index": index, "item": item}),
        );
        for fragment in words::tokens(arguments) {
            self.emit(
                "response.function_call_arguments.delta",
                json!({"item_id": id, "output_index": index, "delta": fragment}),
            );
        }
        self.emit(
            "response.function_call_arguments.done",
            json!({"item_id": id, "output_index": index, "name": name, "arguments": arguments}),
        );
        item["arguments"] = arguments.into();
        item["status"] = "completed".into();
        self.emit(
            "response.output_item.done",
            json!({"output_index": index, "item": item}),
        );
        self.response.output.push(item);
    }

    /// Generates one message, word by word.
    async fn message(&mut self, part: usize) -> Result<(), Stop> {
        let text = self.text(part);
        let index = self.response.output.len();
        let id = self.server.id("msg");
        let item = |status: &str, content: Value| json!({"type": "message", "id": id, "status": status, "role": "assistant", "content": content});
        self.emit(
            "response.output_item.added",
            json!({"output_index": index, "item": item("in_progress", json!([]))}),
        );
        let at = json!({"item_id": id, "output_index": index, "content_index": 0});
        let place = |more: Value| merged(&at, more);
        let part_of = |text: &str, refusal: bool| {
            if refusal {
                json!({"type": "refusal", "refusal": text})
            } else {
                json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
            }
        };
        let refusal = self.plan.refusal;
        self.emit(
            "response.content_part.added",
            place(json!({"part": part_of("", refusal)})),
        );
        let interval = self
            .plan
            .interval
            .unwrap_or(self.server.config.token_interval);
        let tokens = words::fragments(&text, self.plan.format.halves);
        let all = tokens.len();
        let keep = self.budget(all);
        let mut made = String::new();
        for (n, token) in tokens.iter().take(keep).enumerate() {
            if n > 0 {
                self.pause(interval).await?;
            }
            made.push_str(token);
            self.delta(&at, token).await?;
        }
        let made = words::whole(&made);
        if self.plan.outcome == Outcome::Fail {
            return Ok(());
        }
        if refusal {
            self.emit("response.refusal.done", place(json!({"refusal": made})));
        } else {
            self.emit(
                "response.output_text.done",
                place(json!({"text": made, "logprobs": []})),
            );
        }
        self.emit(
            "response.content_part.done",
            place(json!({"part": part_of(&made, refusal)})),
        );
        let status = if keep < all {
            "incomplete"
        } else {
            "completed"
        };
        let item = item(status, json!([part_of(&made, refusal)]));
        self.emit(
            "response.output_item.done",
            json!({"output_index": index, "item": item}),
        );
        self.response.output.push(item);
        if keep < all {
            self.plan.outcome = Outcome::Incomplete;
            self.plan.more_parts = 0;
        }
        Ok(())
    }

    /// Returns how many of `all` tokens are sent.
    fn budget(&self, all: usize) -> usize {
        let asked = if self.plan.outcome == Outcome::Complete {
            all
        } else {
            all / 2
        };
        let limit = self
            .response
            .settings
            .max_output_tokens
            .and_then(|limit| usize::try_from(limit).ok());
        asked.min(limit.unwrap_or(usize::MAX))
    }

    async fn delta(&mut self, at: &Value, token: &str) -> Result<(), Stop> {
        self.tokens += 1;
        self.deltas += 1;
        if self.out.is_listening() {
            let (event, mut more) = if self.plan.refusal {
                ("response.refusal.delta", json!({"delta": token}))
            } else {
                (
                    "response.output_text.delta",
                    json!({"delta": token, "logprobs": []}),
                )
            };
            if self.obfuscation {
                more["obfuscation"] = "x".repeat(16_usize.saturating_sub(token.len())).into();
            }
            self.emit(event, merged(at, more));
        }
        if self.plan.unreadable && self.deltas == 2 {
            let cut = format!("{{\"sequence_number\":{},\"delta\":\"an ev", self.sequence);
            self.out.emit_text("response.output_text.delta", &cut);
            self.sequence += 1;
        }
        if self.plan.cut == Some(self.deltas) && !self.response.background {
            self.out.cut();
            return Err(Stop::Abandoned);
        }
        if self.plan.silent_after == Some(self.deltas) {
            self.out.flush();
            return Err(self.forever().await);
        }
        if self.plan.hold_after == Some(self.deltas) && self.server.is_held() {
            self.out.flush();
            let server = Arc::clone(&self.server);
            self.unless_stopped(server.released()).await?;
        }
        if self.plan.mid_error.is_some() && self.deltas == 2 {
            return Err(Stop::Failed);
        }
        Ok(())
    }

    /// Ends the response with the outcome of the plan, and sends its last event.
    fn finish(&mut self) -> Result<(), Stop> {
        if self.plan.no_terminal && !self.response.background {
            return Err(Stop::Abandoned);
        }
        if self.is_gone() {
            return Err(Stop::Abandoned);
        }
        let status = match self.plan.outcome {
            Outcome::Complete => ResponseStatus::Completed,
            Outcome::Incomplete => ResponseStatus::Incomplete,
            Outcome::Fail => ResponseStatus::Failed,
        };
        self.commit(status)?;
        if !self.plan.no_terminal {
            for _ in 0..=usize::from(self.plan.two_ends) {
                self.emit_response(&format!("response.{}", status.name()));
            }
        }
        if let Some(done) = self.done.take() {
            let _ = done.send(json_body(&self.response)); // the client has just left; the response is stored
        }
        Ok(())
    }

    fn stop(&mut self, stop: Stop) {
        match stop {
            Stop::Gone => self.out.mute(),
            Stop::Abandoned => {
                let mut world = self.server.world();
                if !self.end.is_cancelled() {
                    let kept = self.response.store && self.server.config.append_unfinished;
                    let (input, output) = if kept {
                        (&self.input[..], &self.response.output[..])
                    } else {
                        (&[][..], &[][..])
                    };
                    let (lane, id) = (&self.lane, &self.response.id);
                    end_response(
                        &self.server,
                        &mut world,
                        lane,
                        id,
                        "abandoned",
                        input,
                        output,
                    );
                }
            }
            Stop::Cancelled => {
                self.response.status = ResponseStatus::Cancelled;
                self.response.output.clear();
                if !self.plan.no_terminal {
                    self.emit_response("response.failed");
                }
            }
            Stop::Failed => {
                if self.commit(ResponseStatus::Failed).is_err() {
                    return;
                }
                let error = self.plan.error();
                match self.plan.mid_error {
                    Some(ErrorShape::Bare) => self.out.emit_bare(&json!({"error": error})),
                    Some(ErrorShape::Nested) => self.emit("error", json!({"error": error})),
                    Some(ErrorShape::Flat) | None => self.emit("error", error),
                }
                if let Some(done) = self.done.take() {
                    let _ = done.send(json_body(&self.response)); // as above
                }
            }
        }
    }

    /// Stores the end in the world: the response, its conversation with the lock, the statistics.
    fn commit(&mut self, status: ResponseStatus) -> Result<(), Stop> {
        let mut guard = self.server.world();
        let world = &mut *guard;
        if self.end.is_cancelled() {
            return Err(Stop::Gone);
        }
        let id = &self.response.id;
        if world
            .responses
            .get(id)
            .is_some_and(|stored| stored.response.status == ResponseStatus::Cancelled)
        {
            return Err(Stop::Cancelled);
        }
        let now = self.server.now();
        self.response.status = status;
        let made = std::mem::take(&mut self.response.output);
        match status {
            ResponseStatus::Completed => self.response.completed_at = Some(now),
            ResponseStatus::Incomplete => {
                self.response.incomplete_details = Some(json!({"reason": "max_output_tokens"}));
            }
            _ => {
                let message = self.plan.complaint.map_or_else(
                    || "The model had an error while it made the response.".to_owned(),
                    |complaint| self.context.complaint(complaint),
                );
                let error = self.plan.failed();
                self.response.error = Some(
                    error.unwrap_or_else(|| json!({"code": "server_error", "message": message})),
                );
            }
        }
        world.counters.stats.tokens += self.tokens;
        self.response.usage = Some(usage(self.context.words, self.tokens, 0));
        let input: &[Value] = if self.response.store {
            &self.input
        } else {
            &[]
        };
        let output: &[Value] = if self.response.store { &made } else { &[] };
        end_response(
            &self.server,
            world,
            &self.lane,
            id,
            status.name(),
            input,
            output,
        );
        if status != ResponseStatus::Failed {
            self.response.output = made;
            self.response
                .output
                .iter()
                .for_each(|item| self.context.absorb(item));
        }
        if let Some(stored) = world.responses.get_mut(id) {
            stored.response = self.response.clone();
            stored.context = self.context.clone();
        } else if self.response.store {
            let row = StoredResponse {
                response: self.response.clone(),
                input: std::mem::take(&mut self.input),
                context: self.context.clone(),
                lane: self.lane.clone(),
                log: None,
                cancel: self.cancel.clone(),
                stuck_cancel: self.plan.stuck_cancel,
            };
            world.responses.insert(id.clone(), row);
        }
        Ok(())
    }

    fn text(&self, part: usize) -> String {
        let words = self
            .plan
            .words
            .unwrap_or(0)
            .max(self.server.config.reply_words);
        if part > 0 {
            return words::further_part(part + 1, words);
        }
        let plain = |text: &str| {
            Plan::of_text(text)
                .map(|(_, plain)| plain)
                .unwrap_or_default()
        };
        let outputs: Vec<String> = self
            .context
            .outputs
            .iter()
            .map(|text| plain(text))
            .collect();
        words::reply(
            &plain(&self.context.user_text),
            self.context.turns,
            &outputs,
            words,
        )
    }

    fn emit_response(&mut self, event: &str) {
        let data = ResponseEvent {
            r#type: event,
            response: &self.response,
            sequence_number: self.sequence,
        };
        self.out.emit(event, &data);
        self.sequence += 1;
    }

    fn emit(&mut self, event: &str, mut data: Value) {
        data["type"] = event.into();
        data["sequence_number"] = self.sequence.into();
        self.out.emit(event, &data);
        self.sequence += 1;
    }

    fn is_gone(&self) -> bool {
        self.out.is_gone() || self.done.as_ref().is_some_and(oneshot::Sender::is_closed)
    }

    /// Waits; returns at once for a zero time.
    async fn pause(&mut self, time: Duration) -> Result<(), Stop> {
        if time.is_zero() {
            return if self.cancel.is_cancelled() {
                Err(Stop::Cancelled)
            } else {
                Ok(())
            };
        }
        self.out.flush();
        self.unless_stopped(tokio::time::sleep(time)).await
    }

    async fn forever(&mut self) -> Stop {
        match self.unless_stopped(std::future::pending::<()>()).await {
            Err(stop) => stop,
            Ok(()) => Stop::Gone,
        }
    }

    async fn unless_stopped(&mut self, work: impl Future<Output = ()>) -> Result<(), Stop> {
        let out = &self.out;
        let done = &mut self.done;
        let gone = async move {
            match done {
                Some(done) => done.closed().await,
                None => out.gone().await,
            }
        };
        tokio::select! {
            () = work => Ok(()),
            () = self.cancel.cancelled() => Err(Stop::Cancelled),
            () = self.end.cancelled() => Err(Stop::Gone),
            () = gone => Err(Stop::Abandoned),
        }
    }
}

/// Merges the fields of two objects.
fn merged(at: &Value, more: Value) -> Value {
    let mut all = more;
    if let (Some(all), Some(at)) = (all.as_object_mut(), at.as_object()) {
        all.extend(at.clone());
    }
    all
}

/// Ends a response: releases its conversation's lock, appends its items, and counts it.
pub(super) fn end_response(
    server: &Server,
    world: &mut World,
    lane: &str,
    id: &str,
    status: &str,
    input: &[Value],
    output: &[Value],
) {
    let linger = server.config.lock_linger;
    let locked_until = (!linger.is_zero()).then(|| Instant::now() + linger);
    if let Some(conversation) = world.conversations.get_mut(lane) {
        conversation.end(id, locked_until);
        if ["completed", "incomplete"].contains(&status) || server.config.append_unfinished {
            conversation.append(input.iter().chain(output));
        }
    }
    world.counters.end(lane, id, true, status);
    server.changed();
}

//! The generation of a run: its states, steps and messages, and their events in the documented
//! order.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::thread_lock::{end_run, server_error, usage};
use crate::simulator::behaviour::plan::{ErrorShape, Outcome, Plan};
use crate::simulator::behaviour::words;
use crate::simulator::state::assistants::{Message, Run, RunStatus, Step};
use crate::simulator::state::{Server, World};
use crate::simulator::wire::fields::Metadata;
use crate::simulator::wire::sse::EventOut;

/// The work on one run, from `queued` to its end or to `requires_action`.
#[derive(Debug)]
pub(super) struct Generation {
    server: Arc<Server>,
    run: String,
    thread: String,
    assistant: String,
    plan: Plan,
    deadline: Instant,
    cancel: CancellationToken,
    end: CancellationToken,
    out: EventOut,
    deltas: usize,
    /// The open step and message, with the text so far.
    open: Option<(Step, Option<Message>, String)>,
}

/// The reason why the work stopped before its end.
#[derive(Clone, Copy, Debug)]
enum Stop {
    Cancelled,
    Expired,
    /// An `error` event was sent.
    Failed,
    /// The thread was deleted, or the simulator stops.
    Gone,
}

impl Generation {
    /// Makes the work on `run`, whose events go to `out`. Nothing happens until the future of a
    /// method is polled.
    pub(super) fn new(server: &Arc<Server>, run: &Run, out: EventOut) -> Self {
        Self {
            server: Arc::clone(server),
            run: run.id.clone(),
            thread: run.thread_id.clone(),
            assistant: run.assistant_id.clone(),
            plan: run.work.plan.clone(),
            deadline: run.work.deadline,
            cancel: run.work.cancel.clone(),
            end: run.work.end.clone(),
            out,
            deltas: 0,
            open: None,
        }
    }

    /// Does the work and sends its events.
    pub(super) async fn work(mut self) {
        if self.plan.is_silent() {
            self.out.mute();
        }
        if let Err(stop) = self.reply().await {
            self.stop(stop).await;
        }
        if !self.plan.no_terminal {
            self.out.emit_text("done", "[DONE]");
        }
        self.out.finish();
    }

    /// Ends a run that was `requires_action` and is now `cancelling`.
    pub(super) async fn be_cancelled(mut self) {
        self.stop(Stop::Cancelled).await;
    }

    async fn reply(&mut self) -> Result<(), Stop> {
        self.enter_in_progress()?;
        if self.plan.is_silent() {
            return Err(self.forever().await);
        }
        if self.plan.hold_after.is_none() && self.server.is_held() {
            self.out.flush();
            self.unless_stopped(self.server.released()).await?;
        }
        self.pause(self.plan.latency.unwrap_or(self.server.config.latency))
            .await?;
        if self.plan.failure.is_some() || (self.plan.empty && self.plan.tools.is_empty()) {
            return self.complete();
        }
        if !self.plan.tools.is_empty() {
            return self.ask_for_outputs();
        }
        for part in 0..=self.plan.more_parts {
            self.message(part).await?;
        }
        self.complete()
    }

    fn enter_in_progress(&mut self) -> Result<(), Stop> {
        let now = self.server.now();
        let mut world = self.server.world();
        let run = world.runs.get_mut(&self.run).ok_or(Stop::Gone)?;
        if run.status != RunStatus::Queued {
            return Err(Stop::Cancelled);
        }
        run.status = RunStatus::InProgress;
        run.started_at.get_or_insert(now);
        self.out.emit("thread.run.in_progress", run);
        drop(world);
        self.server.changed();
        Ok(())
    }

    /// Asks for the outputs of functions. The step stays open and the stream ends.
    fn ask_for_outputs(&mut self) -> Result<(), Stop> {
        let mut step = self.new_step(
            "tool_calls",
            json!({"type": "tool_calls", "tool_calls": []}),
        );
        self.announce_step(&step)?;
        let input = {
            let world = self.server.world();
            let text = world
                .threads
                .get(&self.thread)
                .map(crate::simulator::state::assistants::Thread::last_user_text);
            Plan::of_text(&text.unwrap_or_default())
                .map(|(_, plain)| plain)
                .unwrap_or_default()
        };
        let arguments = json!({"input": input}).to_string();
        let mut calls = Vec::new();
        let asks_for_approval = self.plan.tools.iter().any(|it| it.kind == "mcp_approval");
        for (index, call) in self.plan.tools.clone().iter().enumerate() {
            let (id, name) = (self.server.id("call"), &call.name);
            if asks_for_approval {
                calls.push(json!({"id": id, "type": "mcp", "name": name, "arguments": arguments, "server_label": "sim"}));
                continue;
            }
            let mut fragments = words::tokens(&arguments);
            let mut fragment = json!({
                "index": index, "id": id, "type": "function", "function": {"name": name, "arguments": "", "output": null},
            });
            loop {
                self.out.emit(
                    "thread.run.step.delta",
                    &json!({"id": step.id, "object": "thread.run.step.delta", "delta": {
                        "step_details": {"type": "tool_calls", "tool_calls": [fragment]},
                    }}),
                );
                let Some(next) = fragments.next() else { break };
                fragment =
                    json!({"index": index, "type": "function", "function": {"arguments": next}});
            }
            calls.push(
                json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}),
            );
        }
        let details = calls.iter().map(|call| {
            let mut call = call.clone();
            call["function"]["output"] = Value::Null;
            call
        });
        step.step_details["tool_calls"] = details.collect();
        let mut guard = self.server.world();
        let world = &mut *guard;
        let run = world.runs.get_mut(&self.run).ok_or(Stop::Gone)?;
        if run.status != RunStatus::InProgress {
            return Err(Stop::Cancelled);
        }
        run.status = RunStatus::RequiresAction;
        run.work.calls = calls
            .iter()
            .filter_map(|call| call["id"].as_str().map(str::to_owned))
            .collect();
        run.work.generating = false;
        if let Some(stored) = run.work.steps.last_mut() {
            stored.step_details = step.step_details;
        }
        let action = if asks_for_approval {
            "submit_tool_approval"
        } else {
            "submit_tool_outputs"
        };
        run.required_action = Some(json!({"type": action, action: {"tool_calls": calls}}));
        if !self.plan.no_terminal {
            self.out.emit("thread.run.requires_action", run);
        }
        world.counters.pause(&self.thread);
        drop(guard);
        self.server.changed();
        Ok(())
    }

    /// Generates one message, word by word.
    async fn message(&mut self, part: usize) -> Result<(), Stop> {
        let text = self.text(part)?;
        let message = self.new_message();
        let step = self.new_step(
            "message_creation",
            json!({"type": "message_creation", "message_creation": {"message_id": message.id}}),
        );
        self.announce_step(&step)?;
        self.open = Some((step, Some(message.clone()), String::new()));
        {
            let mut world = self.server.world();
            world
                .threads
                .get_mut(&self.thread)
                .ok_or(Stop::Gone)?
                .push(message.clone());
        }
        self.out.emit("thread.message.created", &message);
        self.out.emit("thread.message.in_progress", &message);
        let interval = self
            .plan
            .interval
            .unwrap_or(self.server.config.token_interval);
        let tokens = words::fragments(&text, self.plan.format.halves);
        let all = tokens.len();
        let keep = if self.plan.outcome == Outcome::Complete {
            all
        } else {
            all.div_ceil(2)
        };
        for (n, token) in tokens.iter().take(keep).enumerate() {
            if n > 0 {
                self.pause(interval).await?;
            }
            self.delta(&message.id, token, n == 0).await?;
        }
        self.end_message()
    }

    async fn delta(&mut self, message: &str, token: &str, first: bool) -> Result<(), Stop> {
        if let Some((_, _, so_far)) = &mut self.open {
            so_far.push_str(token);
        }
        let content = if self.plan.refusal {
            json!([{"index": 0, "type": "refusal", "refusal": token}])
        } else if first {
            json!([{"index": 0, "type": "text", "text": {"value": token, "annotations": []}}])
        } else {
            json!([{"index": 0, "type": "text", "text": {"value": token}}])
        };
        self.out.emit(
            "thread.message.delta",
            &json!({"id": message, "object": "thread.message.delta", "delta": {"content": content}}),
        );
        self.deltas += 1;
        if self.plan.unreadable && self.deltas == 2 {
            self.out
                .emit_text("thread.message.delta", "{\"delta\":\"an ev");
        }
        if self.plan.cut == Some(self.deltas) {
            self.out.cut();
        }
        if self.plan.silent_after == Some(self.deltas) {
            self.out.flush();
            self.out.mute();
            return Err(self.forever().await);
        }
        if self.plan.hold_after == Some(self.deltas) && self.server.is_held() {
            self.out.flush();
            self.unless_stopped(self.server.released()).await?;
        }
        if self.plan.mid_error.is_some() && self.deltas == 2 {
            return Err(Stop::Failed);
        }
        if self.cancel.is_cancelled() {
            Err(Stop::Cancelled)
        } else {
            Ok(())
        }
    }

    /// Finishes the open message and its step with the outcome of the plan.
    fn end_message(&mut self) -> Result<(), Stop> {
        match self.plan.outcome {
            Outcome::Complete => self.close("completed", None),
            Outcome::Incomplete => self.close("completed", Some("max_tokens")),
            Outcome::Fail => self.close("failed", Some("run_failed")),
        }
    }

    /// Ends the run with the outcome of the plan.
    fn complete(&mut self) -> Result<(), Stop> {
        let status = match self.plan.outcome {
            Outcome::Complete => RunStatus::Completed,
            Outcome::Incomplete => RunStatus::Incomplete,
            Outcome::Fail => RunStatus::Failed,
        };
        self.finish(status)
    }

    async fn stop(&mut self, stop: Stop) {
        match stop {
            Stop::Gone => self.out.mute(),
            Stop::Failed => {
                let error = self.plan.error();
                self.plan.no_terminal = false;
                let _ = self.close_silently("failed", Some("run_failed"));
                let _ = commit(
                    &self.server,
                    &mut self.server.world(),
                    &self.run,
                    RunStatus::Failed,
                );
                match self.plan.mid_error {
                    Some(ErrorShape::Bare) => self.out.emit_bare(&json!({"error": error})),
                    Some(ErrorShape::Nested) => self.out.emit("error", &json!({"error": error})),
                    Some(ErrorShape::Flat) | None => self.out.emit("error", &error),
                }
            }
            Stop::Expired => {
                let _ = self.close("expired", Some("run_expired"));
                let _ = self.finish(RunStatus::Expired);
            }
            Stop::Cancelled => {
                {
                    let world = self.server.world();
                    if let Some(run) = world.runs.get(&self.run) {
                        self.out.emit("thread.run.cancelling", run);
                    }
                }
                if self.plan.stuck_cancel {
                    self.out.flush();
                    tokio::select! {
                        () = tokio::time::sleep_until(self.deadline) => {}
                        () = self.end.cancelled() => return,
                    }
                    let _ = self.close("expired", Some("run_expired"));
                    end_run(
                        &self.server,
                        &mut self.server.world(),
                        &self.run,
                        RunStatus::Expired,
                    );
                    return;
                }
                let delay = self.server.config.cancel_delay;
                if !delay.is_zero() {
                    self.out.flush();
                    tokio::select! {
                        () = tokio::time::sleep(delay) => {}
                        () = self.end.cancelled() => {}
                    }
                }
                let _ = self.close("cancelled", Some("run_cancelled"));
                let _ = self.finish(RunStatus::Cancelled);
            }
        }
    }

    /// Ends the run and sends its last event.
    fn finish(&mut self, status: RunStatus) -> Result<(), Stop> {
        let mut world = self.server.world();
        commit(&self.server, &mut world, &self.run, status)?;
        let run = world.runs.get_mut(&self.run).ok_or(Stop::Gone)?;
        if let Some(error) = self.plan.failed() {
            run.last_error = Some(error);
        }
        if !self.plan.no_terminal {
            for _ in 0..=usize::from(self.plan.two_ends) {
                self.out.emit(&format!("thread.run.{}", status.name()), run);
            }
        }
        Ok(())
    }

    /// Ends the open message and step, and sends their last events.
    fn close(&mut self, step_status: &'static str, reason: Option<&str>) -> Result<(), Stop> {
        let (step, message) = self.close_silently(step_status, reason)?;
        if let Some(message) = message {
            let event = if reason.is_none() {
                "thread.message.completed"
            } else {
                "thread.message.incomplete"
            };
            self.out.emit(event, &message);
        }
        if let Some(step) = step {
            self.out
                .emit(&format!("thread.run.step.{step_status}"), &step);
        }
        Ok(())
    }

    fn close_silently(
        &mut self,
        step_status: &'static str,
        reason: Option<&str>,
    ) -> Result<(Option<Step>, Option<Message>), Stop> {
        let now = self.server.now();
        let open = self.open.take();
        let mut guard = self.server.world();
        let world = &mut *guard;
        let run = world.runs.get_mut(&self.run).ok_or(Stop::Gone)?;
        let message = open
            .and_then(|(_, message, text)| Some((message?, words::whole(&text))))
            .and_then(|(message, text)| {
                let tokens = words::count(&text);
                run.work.tokens += tokens;
                world.counters.stats.tokens += tokens;
                let thread = world.threads.get_mut(&self.thread)?;
                thread.words += tokens;
                let stored = thread.message_mut(&message.id)?;
                stored.content = match (text.is_empty(), self.plan.refusal) {
                    (true, _) => Vec::new(),
                    (false, true) => vec![json!({"type": "refusal", "refusal": text})],
                    (false, false) => {
                        vec![json!({"type": "text", "text": {"value": text, "annotations": []}})]
                    }
                };
                if let Some(reason) = reason {
                    stored.status = "incomplete";
                    stored.incomplete_at = Some(now);
                    stored.incomplete_details = Some(json!({"reason": reason}));
                } else {
                    stored.status = "completed";
                    stored.completed_at = Some(now);
                }
                Some(stored.clone())
            });
        let usage = usage(
            run.work.tokens,
            world
                .threads
                .get(&self.thread)
                .map_or(0, |thread| thread.words),
        );
        let step = run
            .work
            .steps
            .last_mut()
            .filter(|step| step.status == "in_progress")
            .map(|step| {
                step.status = step_status;
                let time = Some(now);
                match step_status {
                    "completed" => step.completed_at = time,
                    "failed" => {
                        step.failed_at = time;
                        step.last_error = Some(server_error());
                    }
                    "expired" => step.expired_at = time,
                    _ => step.cancelled_at = time,
                }
                step.usage = Some(usage);
                step.clone()
            });
        Ok((step, message))
    }

    /// Returns the text of a message of the reply.
    fn text(&self, part: usize) -> Result<String, Stop> {
        let words = self
            .plan
            .words
            .unwrap_or(0)
            .max(self.server.config.reply_words);
        if part > 0 {
            return Ok(words::further_part(part + 1, words));
        }
        let world = self.server.world();
        let thread = world.threads.get(&self.thread).ok_or(Stop::Gone)?;
        let run = world.runs.get(&self.run).ok_or(Stop::Gone)?;
        let (_, plain) = Plan::of_text(&thread.last_user_text()).unwrap_or_default();
        Ok(words::reply(&plain, thread.turns, &run.work.outputs, words))
    }

    fn announce_step(&mut self, step: &Step) -> Result<(), Stop> {
        {
            let mut world = self.server.world();
            world
                .runs
                .get_mut(&self.run)
                .ok_or(Stop::Gone)?
                .work
                .steps
                .push(step.clone());
        }
        self.out.emit("thread.run.step.created", step);
        if self.out.wants_unknown_events() {
            self.out.emit(
                "thread.run.step.future",
                &json!({"id": step.id, "object": "thread.run.step.future"}),
            );
        }
        self.out.emit("thread.run.step.in_progress", step);
        Ok(())
    }

    fn new_step(&self, kind: &'static str, details: Value) -> Step {
        Step {
            id: self.server.id("step"),
            object: "thread.run.step",
            created_at: self.server.now(),
            assistant_id: self.assistant.clone(),
            thread_id: self.thread.clone(),
            run_id: self.run.clone(),
            r#type: kind,
            status: "in_progress",
            step_details: details,
            last_error: None,
            expired_at: None,
            cancelled_at: None,
            failed_at: None,
            completed_at: None,
            metadata: Metadata::new(),
            usage: None,
        }
    }

    fn new_message(&self) -> Message {
        Message {
            id: self.server.id("msg"),
            object: "thread.message",
            created_at: self.server.now(),
            thread_id: self.thread.clone(),
            status: "in_progress",
            incomplete_details: None,
            completed_at: None,
            incomplete_at: None,
            role: "assistant".to_owned(),
            content: Vec::new(),
            assistant_id: Some(self.assistant.clone()),
            run_id: Some(self.run.clone()),
            attachments: Some(json!([])),
            metadata: Metadata::new(),
        }
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

    async fn unless_stopped(&self, work: impl Future<Output = ()>) -> Result<(), Stop> {
        tokio::select! {
            () = work => Ok(()),
            () = self.cancel.cancelled() => Err(Stop::Cancelled),
            () = tokio::time::sleep_until(self.deadline) => Err(Stop::Expired),
            () = self.end.cancelled() => Err(Stop::Gone),
        }
    }
}

/// Ends a run, unless it is being cancelled.
fn commit(server: &Server, world: &mut World, id: &str, status: RunStatus) -> Result<(), Stop> {
    let run = world.runs.get(id).ok_or(Stop::Gone)?;
    if run.status == RunStatus::Cancelling && status != RunStatus::Cancelled {
        return Err(Stop::Cancelled);
    }
    end_run(server, world, id, status);
    Ok(())
}

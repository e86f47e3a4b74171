//! The adapter for Assistants v2: threads, messages, runs.

mod deleting;
mod history;
mod messages;
mod request;
mod runs;
mod turn;
mod wire;

use std::time::Duration;

use async_trait::async_trait;
use http::Method;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::time::sleep;

use super::calls::Calls;
use super::client::{Answer, UpstreamClient};
use super::finding::find;
use super::patience::a_moment;
use super::relay::{public, relay};
use super::tags::{RUN_TAG, thread_tags};
use super::wire::Created;
use super::{
    AnswerTools, Capabilities, Disposal, EventStream, HistoryPage, Items, Ownership, Pace, Recovered,
    Settled, StartRun, Upstream, UpstreamError,
};
use crate::config::UpstreamConfig;
use crate::domain::{Leftover, Message, ThreadId, UpstreamRunId, UpstreamThreadId};
use request::{history_messages, outputs_body, run_body};
use runs::SECOND_LOOK;
use turn::Turn;
use wire::RunObject;

/// What helps where the server has no threads.
pub(super) const NO_THREADS: &str =
    "set `base_url` of this upstream to where the server has the Assistants API, or `kind = \"responses\"`";

/// An upstream that speaks Assistants v2.
#[derive(Clone, Debug)]
pub struct AssistantsUpstream {
    client: UpstreamClient,
    lock_window: Duration,
}

impl AssistantsUpstream {
    pub fn new(client: UpstreamClient, config: &UpstreamConfig) -> Self {
        Self { client: client.with_header("openai-beta", "assistants=v2"), lock_window: config.lock_window }
    }
}

#[async_trait]
impl Upstream for AssistantsUpstream {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            lock_window: self.lock_window,
            has_threads: true,
            stores_runs: false,
            // The lock of its thread names it.
            goes_on_unread: false,
        }
    }

    async fn create_thread(
        &self,
        owner: &Ownership,
        history: &[Message],
    ) -> Result<Option<UpstreamThreadId>, UpstreamError> {
        let mut body = json!({"metadata": thread_tags(owner)});
        let messages = history_messages(history);
        if !messages.is_empty() {
            body["messages"] = messages.into();
        }
        let made = self.client.make::<Created>(&["threads"], &body).await;
        made.map_err(|error| self.client.needs("/threads", NO_THREADS, error))?.into_thread().map(Some)
    }

    async fn start(&self, request: StartRun<'_>) -> Result<EventStream, UpstreamError> {
        let thread = request.thread.ok_or_else(no_thread)?;
        let path = ["threads", thread.as_str(), "runs"];
        let started = match self.client.events(Method::POST, &path, &[], Some(&run_body(&request))).await {
            Ok(events) => relay(events, Turn::default(), self.client.max_bytes()).await,
            Err(refusal) => Err(refusal),
        };
        match started.map_err(UpstreamError::from) {
            Ok(events) => Ok(public(events)),
            // Sent before, by whoever had the run, and taken after all: it is there, and to be found as what is lost.
            Err(UpstreamError::Busy { blocking_run: Some(blocking) })
                if self.is_run_of(thread, &blocking, request.run).await =>
            {
                Err(UpstreamError::Broken { timeout: false })
            }
            Err(error) => Err(error),
        }
    }

    async fn answer_tools(&self, request: AnswerTools<'_>) -> Result<EventStream, UpstreamError> {
        let thread = request.thread.ok_or_else(no_thread)?;
        let run = request.upstream_run.ok_or_else(no_run)?;
        let path = ["threads", thread.as_str(), "runs", run.as_str(), "submit_tool_outputs"];
        let body = outputs_body(request.outputs);
        let refused = match self.client.events(Method::POST, &path, &[], Some(&body)).await {
            Ok(events) => {
                return Ok(public(relay(events, Turn::default(), self.client.max_bytes()).await?));
            }
            Err(refusal) => refusal.error,
        };
        // A run that takes no outputs has moved on: it has expired, or has got them already. Its own status is the
        // truth then, as if the answer had been lost.
        if matches!(refused, UpstreamError::Refused { status: 400, .. }) {
            match self.run(thread, run).await {
                Ok(Some(run)) if !run.value.waits_for_outputs() => {}
                Ok(_) => return Err(refused),
                // Then it may have got them, and has to be looked for in the same way.
                Err(error) if error.is_ambiguous() => {}
                Err(error) => return Err(error),
            }
            return Err(UpstreamError::Broken { timeout: false });
        }
        Err(refused)
    }

    /// A run can always be asked for, so it does not matter how the request failed.
    async fn recover(&self, sent: &Leftover, _: &UpstreamError) -> Result<Recovered, UpstreamError> {
        let Some(thread) = &sent.thread else { return Ok(Recovered::Absent) };
        match self.trace(thread, sent).await {
            // With the thread all that was sent to it is gone. What was at work there has been seen all the same.
            Err(UpstreamError::ThreadGone) if sent.upstream_run.is_none() => Ok(Recovered::Absent),
            Err(UpstreamError::ThreadGone) => Ok(Recovered::Unknown),
            other => other,
        }
    }

    async fn clear(
        &self,
        thread: &UpstreamThreadId,
        blocking: Option<&UpstreamRunId>,
        cancel: bool,
    ) -> Result<(), UpstreamError> {
        let Some(blocking) = blocking else {
            a_moment().await;
            return Ok(());
        };
        let Some(run) = self.run(thread, blocking).await? else { return Ok(()) };
        if run.value.has_ended() {
            return Ok(());
        }
        let ours = run.value.tag(RUN_TAG).is_some();
        if ours {
            tracing::warn!("ending a run that an earlier turn left behind");
        }
        if ours || cancel {
            self.end(thread, blocking, None).await?;
        } else {
            self.wait_for(thread, run.value, RunObject::has_ended).await?;
        }
        Ok(())
    }

    async fn settle(&self, leftover: &Leftover) -> Result<Settled, UpstreamError> {
        let Some(thread) = &leftover.thread else { return Ok(Settled::default()) };
        match self.settle_on(thread, leftover).await {
            Err(UpstreamError::ThreadGone) => Ok(Settled::default()),
            other => other,
        }
    }

    async fn remove(&self, leftover: &Leftover) -> Result<(), UpstreamError> {
        let Some(thread) = &leftover.thread else { return Ok(()) };
        match self.remove_from(thread, leftover).await {
            Err(UpstreamError::ThreadGone) => Ok(()),
            other => other,
        }
    }

    async fn delete_thread(
        &self,
        thread: &UpstreamThreadId,
        pace: &Pace,
        _: &mut Items,
    ) -> Result<Disposal, UpstreamError> {
        self.delete(thread, pace).await
    }

    /// Runs go with their thread.
    async fn delete_run(&self, _: &UpstreamRunId, _: &Pace) -> Result<Disposal, UpstreamError> {
        Ok(Disposal::AlreadyGone)
    }

    async fn history(
        &self,
        thread: &UpstreamThreadId,
        after: Option<&str>,
        pace: &Pace,
    ) -> Result<Option<HistoryPage>, UpstreamError> {
        self.history_page(thread, after, pace).await
    }

    async fn find_threads(
        &self,
        of: ThreadId,
        pace: &Pace,
    ) -> Result<Option<Vec<UpstreamThreadId>>, UpstreamError> {
        find(self.calls(Some(pace)), "threads", of).await
    }
}

impl AssistantsUpstream {
    async fn trace(&self, thread: &UpstreamThreadId, sent: &Leftover) -> Result<Recovered, UpstreamError> {
        let found = match &sent.upstream_run {
            Some(id) => match self.run(thread, id).await? {
                Some(run) => Some(run.value),
                None => return Ok(Recovered::Unknown),
            },
            None => self.find(thread, sent.run).await?,
        };
        let Some(mut run) = found else {
            // Messages without a run are a request that was taken in part: sending them again would double them.
            let said = self.was_said(thread, sent).await?;
            return Ok(if said { Recovered::Unknown } else { Recovered::Absent });
        };
        if run.waits_for(&sent.open_calls) {
            sleep(SECOND_LOOK).await;
            match self.run(thread, &UpstreamRunId(run.id)).await? {
                Some(again) if again.value.waits_for(&sent.open_calls) => return Ok(Recovered::Absent),
                Some(again) => run = again.value,
                None => return Ok(Recovered::Unknown),
            }
        }
        Ok(Recovered::Running(self.follow(thread, run)))
    }

    async fn settle_on(
        &self,
        thread: &UpstreamThreadId,
        leftover: &Leftover,
    ) -> Result<Settled, UpstreamError> {
        let run = match &leftover.upstream_run {
            Some(run) => Some(run.clone()),
            None => self.find(thread, leftover.run).await?.map(|run| UpstreamRunId(run.id)),
        };
        let Some(run) = run else {
            return Ok(Settled { said: self.was_said(thread, leftover).await?, ..Settled::default() });
        };
        let ended = match self.end(thread, &run, None).await {
            Ok(ended) => ended,
            // A name that the upstream does not know stands for nothing, and must not keep the thread for ever.
            Err(UpstreamError::Refused { status: 404, .. }) if self.run(thread, &run).await?.is_none() => {
                return Ok(Settled { said: self.was_said(thread, leftover).await?, ..Settled::default() });
            }
            Err(error) => return Err(error),
        };
        let reply = self.reply(thread, &run).await?;
        Ok(Settled {
            said: true,
            unsure: false,
            status: ended.run_status(),
            usage: ended.usage(),
            content: reply.content,
            upstream_message_id: reply.message_id,
            thread: None,
        })
    }

    fn calls<'a>(&'a self, pace: Option<&'a Pace>) -> Calls<'a> {
        Calls { client: &self.client, pace }
    }

    /// One call without a body, repeated as long as it fails in a way that may pass.
    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &[&str],
        query: &[(&str, &str)],
    ) -> Result<Answer<T>, UpstreamError> {
        self.calls(None).make(method, path, query).await
    }
}

fn no_run() -> UpstreamError {
    UpstreamError::Protocol("outputs were to be sent to no run".to_owned())
}

fn no_thread() -> UpstreamError {
    UpstreamError::Protocol("a run was to start without a thread".to_owned())
}

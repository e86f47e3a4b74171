//! The adapter for Assistants v2: threads, messages, runs.

mod adapter;
mod deleting;
mod history;
mod messages;
mod request;
mod runs;
mod stream;
mod wire;

use async_trait::async_trait;
use http::Method;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::domain::{
    ContentPart, Message, ThreadId, UnsettledRun, UpstreamRunId, UpstreamThreadId,
};
use crate::upstream::error::{UpstreamError, unless_gone};
use crate::upstream::history::history_page;
use crate::upstream::port::{
    AnswerTools, Capabilities, Disposal, EventStream, HistoryPage, Items, Ownership, Recovered,
    Settled, StartRun, Upstream, without_history,
};
use crate::upstream::rate_limiter::RateLimiter;
use crate::upstream::relay::{public, relay};
use crate::upstream::retry::{jittered_delay, retry_while_refused};
use crate::upstream::tags::{RUN_TAG, thread_tags};
use crate::upstream::thread_lookup::find;
use crate::upstream::wire::Created;
pub use adapter::AssistantsUpstream;

use history::entry;
use request::{history_messages, outputs_body, run_body};
use runs::SECOND_LOOK;
use stream::StreamDecoder;
use wire::{MessageObject, RunObject};

/// Messages with which a thread may be made.
const MESSAGES_PER_THREAD: usize = 32;

/// The remedy where the server has no threads.
pub(super) const NO_THREADS: &str = "set `base_url` of this upstream to where the server has the Assistants API, or `kind = \"responses\"`";

#[async_trait]
impl Upstream for AssistantsUpstream {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            lock_window: self.lock_window,
            has_threads: true,
            stores_runs: false,
            // The lock of the thread names the run, so an unread run can be ended without knowing
            // its id.
            goes_on_unread: false,
            takes_output_parts: false,
            runs_without_input: true,
        }
    }

    fn refuses(&self, content: &[ContentPart]) -> Option<&'static str> {
        let is_unknown = |part: &ContentPart| matches!(part, ContentPart::File { file } if file.file_id.is_none());
        content.iter().any(is_unknown).then_some(
            "this assistant's upstream takes a `file` by its `file_id` only: upload the file there first",
        )
    }

    async fn create_thread(
        &self,
        owner: &Ownership,
        history: &[Message],
    ) -> Result<Option<UpstreamThreadId>, UpstreamError> {
        let mut messages = history_messages(history);
        let rest = messages.split_off(messages.len().min(MESSAGES_PER_THREAD));
        let mut body = json!({"metadata": thread_tags(owner)});
        if !messages.is_empty() {
            body["messages"] = messages.into();
        }
        let made = self.client.make::<Created>(&["threads"], &body).await;
        let thread = made
            .map_err(|error| self.client.needs("/threads", NO_THREADS, error))?
            .into_thread()?;
        match self.add_messages(&thread, &rest).await {
            Ok(()) => Ok(Some(thread)),
            Err(error) => {
                let deleted = self.delete(&thread, &RateLimiter::UNBOUND).await;
                Err(without_history(error, &deleted))
            }
        }
    }

    async fn start(&self, request: StartRun<'_>) -> Result<EventStream, UpstreamError> {
        let thread = request.thread.ok_or_else(no_thread)?;
        let path = ["threads", thread.as_str(), "runs"];
        let started = match self
            .client
            .events(Method::POST, &path, &[], Some(&run_body(&request)))
            .await
        {
            Ok(events) => relay(events, StreamDecoder::default(), &self.client).await,
            Err(refusal) => Err(refusal),
        };
        match started.map_err(UpstreamError::from) {
            Ok(events) => Ok(public(events)),
            // An earlier sender sent the request for this run, and the server accepted it. The
            // caller recovers the run like one whose connection broke.
            Err(UpstreamError::Busy {
                blocking_run: Some(blocking),
            }) if self.is_run_of(thread, &blocking, request.run).await => {
                Err(UpstreamError::Broken { timeout: false })
            }
            Err(error) => Err(error),
        }
    }

    async fn answer_tools(&self, request: AnswerTools<'_>) -> Result<EventStream, UpstreamError> {
        let thread = request.thread.ok_or_else(no_thread)?;
        let run = request.upstream_run.ok_or_else(no_run)?;
        let path = [
            "threads",
            thread.as_str(),
            "runs",
            run.as_str(),
            "submit_tool_outputs",
        ];
        let body = outputs_body(request.outputs);
        let refused = match self
            .client
            .events(Method::POST, &path, &[], Some(&body))
            .await
        {
            Ok(events) => {
                return Ok(public(
                    relay(events, StreamDecoder::default(), &self.client).await?,
                ));
            }
            Err(refusal) => refusal.error,
        };
        // A run that takes no outputs has moved on: it has expired, or has got them already. Then
        // its own status decides, as if the answer had been lost.
        if matches!(refused, UpstreamError::Refused { status: 400, .. }) {
            match self.run(thread, run).await {
                Ok(Some(run)) if !run.value.waits_for_outputs() => {}
                Ok(_) => return Err(refused),
                // The run may have got the outputs, so the caller has to recover it too.
                Err(error) if error.is_ambiguous() => {}
                Err(error) => return Err(error),
            }
            return Err(UpstreamError::Broken { timeout: false });
        }
        Err(refused)
    }

    /// Any failure is handled alike, because the server can always be asked for a run.
    async fn recover(
        &self,
        sent: &UnsettledRun,
        _: &UpstreamError,
    ) -> Result<Recovered, UpstreamError> {
        let Some(thread) = &sent.thread else {
            return Ok(Recovered::Absent);
        };
        match self.trace(thread, sent).await {
            // Everything that was sent to the thread is gone with it. But readers may have seen
            // the reply of a run that was accepted.
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
            jittered_delay().await;
            return Ok(());
        };
        let Some(run) = self.run(thread, blocking).await? else {
            return Ok(());
        };
        if run.value.has_ended() {
            return Ok(());
        }
        let ours = run.value.tag(RUN_TAG).is_some();
        if ours {
            tracing::warn!("ending an active run that an earlier run left behind");
        }
        if ours || cancel {
            self.end(thread, blocking, None).await?;
        } else {
            self.wait_for(thread, run.value, RunObject::has_ended)
                .await?;
        }
        Ok(())
    }

    async fn settle(&self, unsettled_run: &UnsettledRun) -> Result<Settled, UpstreamError> {
        let Some(thread) = &unsettled_run.thread else {
            return Ok(Settled::default());
        };
        unless_gone(
            self.settle_on(thread, unsettled_run).await,
            Settled::default(),
        )
    }

    async fn remove(&self, unsettled_run: &UnsettledRun) -> Result<(), UpstreamError> {
        let Some(thread) = &unsettled_run.thread else {
            return Ok(());
        };
        unless_gone(self.remove_from(thread, unsettled_run).await, ())
    }

    async fn delete_thread(
        &self,
        thread: &UpstreamThreadId,
        limiter: &RateLimiter,
        _: &mut Items,
    ) -> Result<Disposal, UpstreamError> {
        self.delete(thread, limiter).await
    }

    async fn history(
        &self,
        thread: &UpstreamThreadId,
        after: Option<&str>,
        limiter: &RateLimiter,
    ) -> Result<Option<HistoryPage>, UpstreamError> {
        let path = ["threads", thread.as_str(), "messages"];
        history_page(
            self.retrying(Some(limiter)),
            &path,
            after,
            |it: &MessageObject| &it.id,
            entry,
        )
        .await
    }

    async fn find_threads(
        &self,
        of: ThreadId,
        limiter: &RateLimiter,
    ) -> Result<Option<Vec<UpstreamThreadId>>, UpstreamError> {
        find(self.retrying(Some(limiter)), "threads", of).await
    }
}

impl AssistantsUpstream {
    /// Adds messages to a new thread, one by one. Tries a message again only after a refusal:
    /// after any other failure it may be there.
    async fn add_messages(
        &self,
        thread: &UpstreamThreadId,
        messages: &[Value],
    ) -> Result<(), UpstreamError> {
        let path = ["threads", thread.as_str(), "messages"];
        for message in messages {
            retry_while_refused(|| self.client.make::<Value>(&path, message)).await?;
        }
        Ok(())
    }

    async fn trace(
        &self,
        thread: &UpstreamThreadId,
        sent: &UnsettledRun,
    ) -> Result<Recovered, UpstreamError> {
        let found = match &sent.upstream_run {
            Some(id) => match self.run(thread, id).await? {
                Some(run) => Some(run.value),
                None => return Ok(Recovered::Unknown),
            },
            None => self.find(thread, sent.run).await?,
        };
        let Some(mut run) = found else {
            // Messages without a run are a request that was taken in part. Sending the messages
            // again would double them.
            let said = self.was_said(thread, sent).await?;
            return Ok(if said {
                Recovered::Unknown
            } else {
                Recovered::Absent
            });
        };
        if run.waits_for(&sent.open_calls) {
            sleep(SECOND_LOOK).await;
            match self.run(thread, &UpstreamRunId(run.id)).await? {
                Some(again) if again.value.waits_for(&sent.open_calls) => {
                    return Ok(Recovered::Absent);
                }
                Some(again) => run = again.value,
                None => return Ok(Recovered::Unknown),
            }
        }
        Ok(Recovered::Running(self.follow(thread, run)))
    }

    async fn settle_on(
        &self,
        thread: &UpstreamThreadId,
        unsettled_run: &UnsettledRun,
    ) -> Result<Settled, UpstreamError> {
        let run = match &unsettled_run.upstream_run {
            Some(run) => Some(run.clone()),
            None => self
                .find(thread, unsettled_run.run)
                .await?
                .map(|run| UpstreamRunId(run.id)),
        };
        let Some(run) = run else {
            return Ok(Settled {
                said: self.was_said(thread, unsettled_run).await?,
                ..Settled::default()
            });
        };
        let ended = match self.end(thread, &run, None).await {
            Ok(ended) => ended,
            // An id that the upstream does not know means nothing, and must not block the thread
            // for ever.
            Err(UpstreamError::Refused { status: 404, .. })
                if self.run(thread, &run).await?.is_none() =>
            {
                return Ok(Settled {
                    said: self.was_said(thread, unsettled_run).await?,
                    ..Settled::default()
                });
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
}

fn no_run() -> UpstreamError {
    UpstreamError::Protocol(
        "the outputs name no run at the upstream that waits for them".to_owned(),
    )
}

fn no_thread() -> UpstreamError {
    UpstreamError::Protocol("a run cannot start without an upstream thread".to_owned())
}

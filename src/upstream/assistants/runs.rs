//! Runs whose stream nobody reads: finding, following and ending them.

use std::time::Duration;

use futures_util::{StreamExt, stream};
use http::Method;
use serde_json::Value;
use tokio::time::sleep;

use super::adapter::AssistantsUpstream;
use super::wire::RunObject;
use crate::domain::{RunId, RunStatus, UpstreamRunId, UpstreamThreadId};
use crate::upstream::client::Answer;
use crate::upstream::error::UpstreamError;
use crate::upstream::port::{Ended, EventStream, UpstreamEvent};
use crate::upstream::rate_limiter::RateLimiter;
use crate::upstream::relay::out_of_sight;
use crate::upstream::retry::{FIRST_WAIT, next_backoff};
use crate::upstream::tags::RUN_TAG;
use crate::upstream::wire::{List, failure, without_reply};

/// Runs that are searched for a tag. Only one can be active where the server locks threads; the
/// search is for servers that do not.
const RUNS_TO_SEARCH: &str = "20";
/// Wait before the second look at a thread. The effect of a request that was cut off may appear a
/// little later.
pub(super) const SECOND_LOOK: Duration = Duration::from_millis(500);

impl AssistantsUpstream {
    /// Returns the run as it is now; `None` if there is none with this id.
    pub(super) async fn run(
        &self,
        thread: &UpstreamThreadId,
        run: &UpstreamRunId,
    ) -> Result<Option<Answer<RunObject>>, UpstreamError> {
        match self
            .call(
                Method::GET,
                &["threads", thread.as_str(), "runs", run.as_str()],
                &[],
            )
            .await
        {
            Ok(run) => Ok(Some(run)),
            Err(UpstreamError::Refused { status: 404, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns true if the blocking run is the run of this id. Without an immediate answer of the
    /// server it counts as another run.
    pub(super) async fn is_run_of(
        &self,
        thread: &UpstreamThreadId,
        blocking: &UpstreamRunId,
        run: RunId,
    ) -> bool {
        let path = ["threads", thread.as_str(), "runs", blocking.as_str()];
        let held = self.client.json::<RunObject>(Method::GET, &path, &[]).await;
        held.is_ok_and(|held| held.value.tag(RUN_TAG) == Some(run.to_string().as_str()))
    }

    /// Returns the run that carries the gateway's tag for `run`.
    pub(super) async fn find(
        &self,
        thread: &UpstreamThreadId,
        run: RunId,
    ) -> Result<Option<RunObject>, UpstreamError> {
        let tag = run.to_string();
        for look in 0..2 {
            if look > 0 {
                sleep(SECOND_LOOK).await;
            }
            let path = ["threads", thread.as_str(), "runs"];
            let query = [("limit", RUNS_TO_SEARCH), ("order", "desc")];
            let runs: List<RunObject> = self.call(Method::GET, &path, &query).await?.value;
            if let Some(found) = runs
                .data
                .into_iter()
                .find(|run| run.tag(RUN_TAG) == Some(&tag))
            {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// Streams the rest of a run by polling it. The whole text comes at the end.
    pub(super) fn follow(&self, thread: &UpstreamThreadId, run: RunObject) -> EventStream {
        let accepted = UpstreamEvent::Accepted(UpstreamRunId(run.id.clone()));
        let (upstream, thread) = (self.clone(), thread.clone());
        let ended = async move {
            let is_over = |run: &RunObject| run.has_ended() || run.waits_for_outputs();
            let run = upstream.wait_for(&thread, run, is_over).await?;
            upstream
                .ended(&thread, run)
                .await
                .map(|ended| UpstreamEvent::Ended(Box::new(ended)))
        };
        let ended = async move { ended.await.map_err(out_of_sight) };
        stream::iter([Ok(accepted)])
            .chain(stream::once(ended))
            .boxed()
    }

    /// Polls the run until `reached` is true of it.
    pub(super) async fn wait_for(
        &self,
        thread: &UpstreamThreadId,
        mut run: RunObject,
        reached: impl Fn(&RunObject) -> bool,
    ) -> Result<RunObject, UpstreamError> {
        let mut wait = FIRST_WAIT;
        let mut asked = None;
        while !reached(&run) {
            sleep(asked.unwrap_or(wait)).await;
            wait = next_backoff(wait);
            let path = ["threads", thread.as_str(), "runs", run.id.as_str()];
            match self.call(Method::GET, &path, &[]).await {
                Ok(Answer {
                    value, poll_after, ..
                }) => (run, asked) = (value, poll_after),
                // No answer yet. The caller limits the time.
                Err(UpstreamError::Broken { timeout: true }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(run)
    }

    async fn ended(
        &self,
        thread: &UpstreamThreadId,
        run: RunObject,
    ) -> Result<Ended, UpstreamError> {
        let reply = self.reply(thread, &UpstreamRunId(run.id.clone())).await?;
        let status = run.run_status().unwrap_or(RunStatus::Failed);
        let is_empty = status == RunStatus::Completed && reply.content.is_empty();
        let without_reply = is_empty.then(|| without_reply(reply.kinds.iter().map(String::as_str)));
        let mut refusal = run.refusal().filter(|_| status == RunStatus::Failed);
        if refusal.is_some() && !(reply.content.is_empty() && self.has_no_steps(thread, &run).await)
        {
            refusal = None;
        }
        Ok(Ended {
            status,
            error: run
                .unknown_action()
                .or_else(|| failure(status, run.failure_code()))
                .or(without_reply),
            content: reply.content,
            upstream_message_id: reply.message_id,
            usage: run.usage(),
            tool_calls: if run.waits_for_outputs() {
                run.into_tool_calls()
            } else {
                Vec::new()
            },
            thread: None,
            refusal,
        })
    }

    /// Returns true if the run has done nothing: it neither said something nor called a tool. A
    /// server that does not answer says nothing of that.
    async fn has_no_steps(&self, thread: &UpstreamThreadId, run: &RunObject) -> bool {
        let path = ["threads", thread.as_str(), "runs", run.id.as_str(), "steps"];
        let steps = self
            .client
            .json::<List<Value>>(Method::GET, &path, &[("limit", "1")])
            .await;
        steps.is_ok_and(|steps| steps.value.data.is_empty())
    }

    /// Cancels the run and waits until it no longer holds its thread.
    pub(super) async fn end(
        &self,
        thread: &UpstreamThreadId,
        run: &UpstreamRunId,
        limiter: Option<&RateLimiter>,
    ) -> Result<RunObject, UpstreamError> {
        let calls = self.retrying(limiter);
        let path = ["threads", thread.as_str(), "runs", run.as_str()];
        let cancel = ["threads", thread.as_str(), "runs", run.as_str(), "cancel"];
        let mut wait = FIRST_WAIT;
        let mut cancelling = false;
        loop {
            if !cancelling {
                match calls.make::<RunObject>(Method::POST, &cancel, &[]).await {
                    Ok(cancelled) if cancelled.value.has_ended() => return Ok(cancelled.value),
                    // The run changed its status before the cancel arrived, or cannot be
                    // cancelled in it. Its own status decides.
                    Ok(_)
                    | Err(
                        UpstreamError::Refused { status: 400, .. } | UpstreamError::Busy { .. },
                    ) => {}
                    Err(error) => return Err(error),
                }
            }
            let seen = calls.make::<RunObject>(Method::GET, &path, &[]).await?;
            if seen.value.has_ended() {
                return Ok(seen.value);
            }
            sleep(seen.poll_after.unwrap_or(wait)).await;
            wait = next_backoff(wait);
            cancelling = seen.value.is_cancelling();
        }
    }
}

//! Deletes a thread.

use super::adapter::AssistantsUpstream;
use super::wire::RunObject;
use crate::domain::{UpstreamRunId, UpstreamThreadId};
use crate::upstream::error::UpstreamError;
use crate::upstream::port::Disposal;
use crate::upstream::rate_limiter::RateLimiter;
use crate::upstream::retry::jittered_delay;
use crate::upstream::retrying_client::{is_gone, is_missing, is_not_offered};

impl AssistantsUpstream {
    /// Ends the active runs of the thread, and deletes it with its messages.
    pub(super) async fn delete(
        &self,
        thread: &UpstreamThreadId,
        limiter: &RateLimiter,
    ) -> Result<Disposal, UpstreamError> {
        let calls = self.retrying(Some(limiter));
        let path = ["threads", thread.as_str()];
        let Some(is_known) = calls.is_known(&path).await? else {
            return Ok(Disposal::AlreadyGone);
        };
        loop {
            self.end_all(thread, limiter).await?;
            match calls.delete(&path).await {
                // Another run has started in between.
                Err(UpstreamError::Busy { .. }) => jittered_delay().await,
                deleted => return calls.confirm(&path, deleted, is_known).await,
            }
        }
    }

    /// Ends all runs of a thread. Only one can be active where the server locks threads. If the
    /// server cannot list or end runs, the deletion is tried all the same.
    async fn end_all(
        &self,
        thread: &UpstreamThreadId,
        limiter: &RateLimiter,
    ) -> Result<(), UpstreamError> {
        let path = ["threads", thread.as_str(), "runs"];
        let runs = match self
            .retrying(Some(limiter))
            .page::<RunObject>(&path, "desc", None)
            .await
        {
            Ok(runs) => runs.data,
            Err(error) if is_gone(&error) || is_not_offered(&error) => return Ok(()),
            Err(error) => return Err(error),
        };
        for run in runs.into_iter().filter(|run| !run.has_ended()) {
            match self
                .end(thread, &UpstreamRunId(run.id), Some(limiter))
                .await
            {
                Ok(_) => {}
                Err(error) if is_missing(&error) || is_not_offered(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

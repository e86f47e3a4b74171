//! Deleting a thread.

use super::AssistantsUpstream;
use super::wire::RunObject;
use crate::domain::{UpstreamRunId, UpstreamThreadId};
use crate::upstream::calls::{is_gone, is_missing, is_not_offered};
use crate::upstream::patience::a_moment;
use crate::upstream::{Disposal, Pace, UpstreamError};

impl AssistantsUpstream {
    /// Ends what works on the thread and deletes it, its messages with it.
    pub(super) async fn delete(
        &self,
        thread: &UpstreamThreadId,
        pace: &Pace,
    ) -> Result<Disposal, UpstreamError> {
        let calls = self.calls(Some(pace));
        let path = ["threads", thread.as_str()];
        // Once this call had an answer, a later 404 says something of the thread and not of the endpoint.
        let is_known = match calls.get(&path).await {
            Ok(_) => true,
            Err(error) if is_gone(&error) => return Ok(Disposal::AlreadyGone),
            Err(error) if is_not_offered(&error) => false,
            Err(error) => return Err(error),
        };
        loop {
            self.end_all(thread, pace).await?;
            match calls.delete(&path).await {
                // Another run has come in between.
                Err(UpstreamError::Busy { .. }) => a_moment().await,
                deleted => return calls.confirm(&path, deleted, is_known).await,
            }
        }
    }

    /// Ends all runs of a thread. Only one can be active where the server locks. Where they cannot be listed, or ended, the
    /// deletion is tried all the same.
    async fn end_all(&self, thread: &UpstreamThreadId, pace: &Pace) -> Result<(), UpstreamError> {
        let path = ["threads", thread.as_str(), "runs"];
        let runs = match self.calls(Some(pace)).page::<RunObject>(&path, "desc", None).await {
            Ok(runs) => runs.data,
            Err(error) if is_gone(&error) || is_not_offered(&error) => return Ok(()),
            Err(error) => return Err(error),
        };
        for run in runs.into_iter().filter(|run| !run.has_ended()) {
            match self.end(thread, &UpstreamRunId(run.id), Some(pace)).await {
                Ok(_) => {}
                Err(error) if is_missing(&error) || is_not_offered(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

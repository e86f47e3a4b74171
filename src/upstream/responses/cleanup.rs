//! Ends a run's response, finds out which of its items the conversation holds, and removes them.

use std::collections::BTreeSet;
use std::time::Duration;

use http::Method;
use serde_json::Value;
use tokio::time::sleep;

use super::adapter::ResponsesUpstream;
use super::run_items::{id_of, is_said, own_part};
use super::wire::{Output, ResponseObject, answered_calls, open_calls};
use crate::domain::{RunStatus, ToolCall, UnsettledRun, UpstreamRunId, UpstreamThreadId};
use crate::upstream::error::UpstreamError;
use crate::upstream::port::Settled;
use crate::upstream::rate_limiter::RateLimiter;
use crate::upstream::retry::{FIRST_WAIT, next_backoff};
use crate::upstream::retrying_client::{is_missing, is_not_offered};

/// Pages that are read back to a run's baseline.
pub(super) const MAX_PAGES: usize = 10;

/// Time for the server to notice a closed connection before the next response is requested. A
/// chain has no lock, so nothing shows when a response that was cut off has stopped.
const DROP_GRACE: Duration = Duration::from_millis(200);

/// A response that has ended.
pub(super) struct Last {
    status: RunStatus,
    response: ResponseObject,
}

impl ResponsesUpstream {
    pub(super) async fn settle_what_is_there(
        &self,
        unsettled_run: &UnsettledRun,
    ) -> Result<Settled, UpstreamError> {
        let last = match &unsettled_run.upstream_run {
            Some(id) => self.end(id).await?,
            None => None,
        };
        let mut settled = Settled::default();
        let mut output = Output::default();
        let mut ended_well = false;
        let is_over = last.is_some();
        if let Some(Last { status, response }) = last {
            settled.usage = response.usage();
            output = response.into_output();
            ended_well = matches!(status, RunStatus::Completed | RunStatus::Incomplete);
            // A response with open calls has not completed, and nobody answers them any more.
            settled.status = Some(status).filter(|_| output.open_calls.is_empty() || !ended_well);
        }
        if !self.conversations {
            if !is_over {
                sleep(DROP_GRACE).await;
            }
            let moved = ended_well && output.open_calls.is_empty();
            settled.thread = unsettled_run
                .upstream_run
                .as_ref()
                .filter(|_| moved)
                .map(|id| UpstreamThreadId(id.0.clone()));
            settled.said = moved;
            (settled.content, settled.upstream_message_id) = (output.content, output.message_id);
            return Ok(settled);
        }
        let Some(conversation) = &unsettled_run.thread else {
            return Ok(settled);
        };
        let known = [&unsettled_run.open_calls[..], &output.open_calls[..]].concat();
        let anchor = unsettled_run.baseline.anchor.as_deref();
        let newest = match self.newest(conversation, anchor, MAX_PAGES).await {
            Ok(newest) => newest,
            // A server that cannot list items leaves the gateway with what it knows: a response
            // that ended well is in the conversation.
            Err(error)
                if is_not_offered(&error) && (settled.status.is_some() || !known.is_empty()) =>
            {
                self.close(conversation, &unlisted(&known, &BTreeSet::new()))
                    .await?;
                settled.said = ended_well;
                (settled.content, settled.upstream_message_id) =
                    (output.content, output.message_id);
                return Ok(settled);
            }
            Err(error) => return Err(error),
        };
        if !unsettled_run.remove {
            let mut open = open_calls(&newest.items);
            let listed: BTreeSet<&str> = open
                .iter()
                .map(|call| call.id.as_str())
                .chain(answered_calls(&newest.items))
                .collect();
            let unlisted = unlisted(&unsettled_run.open_calls, &listed);
            open.extend(unlisted);
            self.close(conversation, &open).await?;
        }
        let own = own_part(
            newest.since_anchor().ok_or_else(anchor_lost)?,
            unsettled_run.baseline.skip,
        );
        let held = Output::of(own);
        settled.said = is_said(own, unsettled_run.inputs);
        // A response whose id is unknown may still be active, or has only just lost its
        // connection.
        settled.unsure = !settled.said && !is_over;
        (settled.content, settled.upstream_message_id) = (held.content, held.message_id);
        Ok(settled)
    }

    /// Deletes the run's own part of the conversation, newest first, so that the rest is found
    /// again after an interruption.
    pub(super) async fn remove_from(
        &self,
        conversation: &UpstreamThreadId,
        unsettled_run: &UnsettledRun,
    ) -> Result<(), UpstreamError> {
        let newest = self
            .newest(
                conversation,
                unsettled_run.baseline.anchor.as_deref(),
                MAX_PAGES,
            )
            .await?;
        let own = own_part(
            newest.since_anchor().ok_or_else(anchor_lost)?,
            unsettled_run.baseline.skip,
        );
        let ids: Vec<String> = own
            .iter()
            .rev()
            .filter_map(id_of)
            .map(str::to_owned)
            .collect();
        self.delete_items(conversation, &ids).await
    }

    /// Makes sure that a response has ended, and returns it; `None` if it is not stored. A
    /// response that is not in the background stops with its connection.
    async fn end(&self, id: &UpstreamRunId) -> Result<Option<Last>, UpstreamError> {
        if !self.background {
            return Ok(self
                .response(id, None)
                .await?
                .and_then(|response| last(&response)));
        }
        self.cancel(id, None).await
    }

    /// Cancels a response, waits until it has ended, and returns it; `None` if it is not stored.
    pub(super) async fn cancel(
        &self,
        id: &UpstreamRunId,
        limiter: Option<&RateLimiter>,
    ) -> Result<Option<Last>, UpstreamError> {
        let path = ["responses", id.as_str(), "cancel"];
        match self
            .retrying(limiter)
            .make::<Value>(Method::POST, &path, &[])
            .await
        {
            Ok(cancelled) => {
                if let Some(last) = last(&cancelled.value) {
                    return Ok(Some(last));
                }
            }
            // The response ended before the cancel arrived.
            Err(UpstreamError::Refused { status: 400, .. } | UpstreamError::Busy { .. }) => {}
            Err(error) if is_missing(&error) => return Ok(None),
            Err(error) => return Err(error),
        }
        let mut wait = FIRST_WAIT;
        loop {
            let Some(response) = self.response(id, limiter).await? else {
                return Ok(None);
            };
            if let Some(last) = last(&response) {
                return Ok(Some(last));
            }
            sleep(wait).await;
            wait = next_backoff(wait);
        }
    }
}

fn last(response: &Value) -> Option<Last> {
    let status: RunStatus = response["status"].as_str()?.parse().ok()?;
    let response = serde_json::from_value(response.clone())
        .ok()
        .filter(|_| status.is_final())?;
    Some(Last { status, response })
}

/// Returns the calls that the conversation does not list.
fn unlisted(calls: &[ToolCall], listed: &BTreeSet<&str>) -> Vec<ToolCall> {
    let is_unlisted = |call: &&ToolCall| !listed.contains(call.id.as_str());
    calls.iter().filter(is_unlisted).cloned().collect()
}

fn anchor_lost() -> UpstreamError {
    UpstreamError::Protocol(
        "the conversation no longer holds the message that precedes the run".to_owned(),
    )
}

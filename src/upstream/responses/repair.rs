//! Starts a run on a conversation, or a chain, that an earlier run may have damaged.
//!
//! After a call without an answer, or a reasoning item without the item that must follow
//! it, the server refuses every further run, for ever. The repair has three steps:
//!
//! 1. Open calls get an answer, in the same request as the run.
//! 2. If that does not help, the broken items of a conversation are deleted.
//! 3. If that does not help either, the thread counts as gone.

use futures_util::{StreamExt, stream};
use serde_json::Value;

use super::adapter::ResponsesUpstream;
use super::run_items::{broken_tail, kept};
use super::stream::StreamDecoder;
use super::wire::{closing_item, open_calls};
use crate::domain::{UpstreamRunId, UpstreamThreadId};
use crate::upstream::classify::{Damage, Rejection};
use crate::upstream::error::UpstreamError;
use crate::upstream::port::EventStream;
use crate::upstream::relay::{RunEvents, relay, unsent};
use crate::upstream::retry::jittered_delay;
use crate::upstream::retrying_client::is_not_offered;

/// Pages that are searched for the damage. It is near the end, because no message can follow it.
const PAGES_TO_SEARCH: usize = 3;

/// A run that is being started, with the repairs of its thread.
pub(super) struct RepairingRequest {
    upstream: ResponsesUpstream,
    thread: Option<UpstreamThreadId>,
    body: Value,
    /// Items at the beginning of the input that repair the thread. The run's own items follow
    /// them.
    repairs: usize,
    tried: Repair,
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum Repair {
    Nothing,
    /// Answers to the open calls.
    Answers,
    /// Deletion of the broken items.
    Deletion,
}

impl RepairingRequest {
    pub(super) fn new(
        upstream: &ResponsesUpstream,
        thread: Option<&UpstreamThreadId>,
        input: Vec<Value>,
        mut body: Value,
    ) -> Self {
        body["input"] = input.into();
        let (upstream, thread) = (upstream.clone(), thread.cloned());
        Self {
            upstream,
            thread,
            body,
            repairs: 0,
            tried: Repair::Nothing,
        }
    }

    /// Returns the run's own input.
    fn input(&self) -> &[Value] {
        let all = self.body["input"]
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default();
        all.get(self.repairs..).unwrap_or_default()
    }

    /// Replaces the repairing items before the run's own input.
    fn repair_with(&mut self, repairs: Vec<Value>) {
        if let Value::Array(input) = &mut self.body["input"] {
            let count = repairs.len();
            input.splice(..self.repairs, repairs);
            self.repairs = count;
        }
    }

    /// Starts the run. If the server accepts the run and refuses it only at its end, the stream
    /// continues with the stream of another response.
    pub(super) async fn events(mut self) -> Result<EventStream, UpstreamError> {
        let events = self.send().await?;
        let going = stream::try_unfold(Some((self, events)), |going| async move {
            let Some((mut request, mut events)) = going else {
                return Ok(None);
            };
            loop {
                match events.next().await {
                    None => return Ok(None),
                    Some(Ok(event)) => return Ok(Some((event, Some((request, events))))),
                    Some(Err(refusal)) => {
                        request.repair(refusal, true).await?;
                        events = request.send_once_unlocked().await?;
                    }
                }
            }
        });
        Ok(going.boxed())
    }

    async fn send(&mut self) -> Result<RunEvents, UpstreamError> {
        loop {
            let events = match self.upstream.open(&self.body).await {
                Ok(events) => {
                    relay(
                        events,
                        StreamDecoder::for_repair(!self.upstream.conversations)
                            .after(self.upstream.previous(self.thread.as_ref())),
                        &self.upstream.client,
                    )
                    .await
                }
                Err(refusal) => Err(refusal),
            };
            match events {
                Ok(events) => return Ok(events),
                Err(refusal) => self.repair(refusal, false).await?,
            }
        }
    }

    /// Sends when the conversation is free: the refused response may still hold it.
    async fn send_once_unlocked(&mut self) -> Result<RunEvents, UpstreamError> {
        loop {
            match self.send().await {
                Err(UpstreamError::Busy { .. }) => jittered_delay().await,
                other => return other,
            }
        }
    }

    /// Prepares the next try, or returns the error if there is none. `accepted`: the server
    /// refused the run only after it had accepted it.
    async fn repair(&mut self, refusal: Rejection, accepted: bool) -> Result<(), UpstreamError> {
        let (Some(damage), Some(thread)) = (refusal.damage, &self.thread) else {
            return Err(refusal.error);
        };
        let has_tried_all = if self.upstream.conversations {
            self.tried == Repair::Deletion
        } else {
            // No item of a chain can be deleted.
            self.tried != Repair::Nothing || accepted
        };
        if has_tried_all {
            return Err(UpstreamError::ThreadGone);
        }
        tracing::warn!("repairing the upstream thread that an earlier run left damaged");
        // A run that was refused at once left nothing, however the repair ends.
        let failed = |error| if accepted { error } else { unsent(error) };
        let items = match self.items(thread).await {
            Ok(items) => items,
            // A thread that cannot be read cannot be repaired.
            Err(error) if is_not_offered(&error) => return Err(UpstreamError::ThreadGone),
            Err(error) => return Err(failed(error)),
        };
        if accepted {
            let kept = kept(&items, self.input());
            self.upstream.delete_items(thread, &kept).await?;
        }
        let open = open_calls(&items);
        if self.tried == Repair::Nothing && damage == Damage::OpenCall && !open.is_empty() {
            self.repair_with(open.iter().map(closing_item).collect());
            self.tried = Repair::Answers;
            return Ok(());
        }
        let broken = broken_tail(&items, &damage);
        if broken.is_empty() || !self.upstream.conversations {
            return Err(UpstreamError::ThreadGone);
        }
        self.upstream
            .delete_items(thread, &broken)
            .await
            .map_err(failed)?;
        self.repair_with(Vec::new());
        self.tried = Repair::Deletion;
        Ok(())
    }

    /// Returns the newest items of a conversation, or the output of the last response of a chain.
    async fn items(&self, thread: &UpstreamThreadId) -> Result<Vec<Value>, UpstreamError> {
        if self.upstream.conversations {
            let newest = self.upstream.newest(thread, None, PAGES_TO_SEARCH).await?;
            return Ok(newest.items);
        }
        let last = UpstreamRunId(thread.0.clone());
        let response = self.upstream.response(&last, None).await?;
        let output = response.as_ref().and_then(|it| it["output"].as_array());
        Ok(output.cloned().unwrap_or_default())
    }
}

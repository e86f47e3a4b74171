//! Starting a turn on a conversation that an earlier turn may have damaged.
//!
//! A function call without an output, or a reasoning item without what it led to, makes the server refuse every further
//! turn, for ever. First open calls get an output, in the same request as the turn. If that does not help, the broken
//! items are deleted. If that does not help either, the conversation counts as gone.

use futures_util::{StreamExt, stream};
use serde_json::Value;

use super::adapter::ResponsesUpstream;
use super::items::NO_OUTPUT;
use super::run_items::{broken_tail, kept};
use super::stream::StreamDecoder;
use super::wire::{OpenCall, open_calls};
use crate::domain::UpstreamThreadId;
use crate::upstream::classify::{Damage, Rejection};
use crate::upstream::error::UpstreamError;
use crate::upstream::port::EventStream;
use crate::upstream::relay::{RunEvents, relay, unsent};
use crate::upstream::retry::jittered_delay;
use crate::upstream::retrying_client::is_not_offered;

/// Pages in which the damage is looked for. It is near the end: nothing can have been said after it.
const PAGES_TO_SEARCH: usize = 3;

/// A turn on its way into its thread.
pub(super) struct RepairingRequest {
    upstream: ResponsesUpstream,
    thread: Option<UpstreamThreadId>,
    body: Value,
    /// How many items of its input mend the thread: the turn's own come behind them.
    repairs: usize,
    tried: Repair,
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum Repair {
    Nothing,
    /// Outputs for the open calls.
    Outputs,
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

    /// What the turn itself sends.
    fn input(&self) -> &[Value] {
        let all = self.body["input"]
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default();
        all.get(self.repairs..).unwrap_or_default()
    }

    /// Puts other items before what the turn itself sends.
    fn repair_with(&mut self, repairs: Vec<Value>) {
        if let Value::Array(input) = &mut self.body["input"] {
            let count = repairs.len();
            input.splice(..self.repairs, repairs);
            self.repairs = count;
        }
    }

    /// Starts the turn. A server that accepts it first and refuses it as its end is understood too: then the stream
    /// goes on with that of another response.
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
            let limit = self.upstream.client.max_bytes();
            let events = match self.upstream.open(&self.body).await {
                Ok(events) => {
                    relay(
                        events,
                        StreamDecoder::for_repair(!self.upstream.conversations),
                        limit,
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

    /// The response that was refused may still hold the conversation.
    async fn send_once_unlocked(&mut self) -> Result<RunEvents, UpstreamError> {
        loop {
            match self.send().await {
                Err(UpstreamError::Busy { .. }) => jittered_delay().await,
                other => return other,
            }
        }
    }

    /// Makes the next try promising, or says why there is none. `accepted`: it was refused only after it had been
    /// accepted.
    async fn repair(&mut self, refusal: Rejection, accepted: bool) -> Result<(), UpstreamError> {
        let (Some(damage), Some(thread)) = (refusal.damage, &self.thread) else {
            return Err(refusal.error);
        };
        if !self.upstream.conversations || self.tried == Repair::Deletion {
            return Err(UpstreamError::ThreadGone);
        }
        tracing::warn!("mending the conversation, which an earlier turn left damaged");
        // Nothing of a turn is there that was refused at once, whatever becomes of the mending.
        let failed = |error| if accepted { error } else { unsent(error) };
        let items = match self.upstream.newest(thread, None, PAGES_TO_SEARCH).await {
            Ok(newest) => newest.items,
            // What cannot be looked at cannot be mended.
            Err(error) if is_not_offered(&error) => return Err(UpstreamError::ThreadGone),
            Err(error) => return Err(failed(error)),
        };
        if accepted {
            let kept = kept(&items, self.input());
            self.upstream.delete_items(thread, &kept).await?;
        }
        let open = open_calls(&items);
        if self.tried == Repair::Nothing && damage == Damage::OpenCall && !open.is_empty() {
            self.repair_with(
                open.iter()
                    .map(|call: &OpenCall| call.output(NO_OUTPUT))
                    .collect(),
            );
            self.tried = Repair::Outputs;
            return Ok(());
        }
        let broken = broken_tail(&items, &damage);
        if broken.is_empty() {
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
}

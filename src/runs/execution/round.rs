//! One round at the upstream: the request, the stream, and what to do when one of them fails.

use tokio::time::{Instant, sleep};

use super::failure::{Failure, may_send};
use super::prepare::{ensure_thread, prepare, prepare_again, rebuild};
use super::progress::{Delivery, Progress};
use super::recover::recover;
use super::relay::{Telling, relay};
use super::retry::{FIRST_BACK_OFF, Retries};
use super::round_context::{RoundContext, RoundEnd};
use super::store_retry::write_until_ok;
use crate::domain::{MultitaskStrategy, ToolOutput, UpstreamRunId};
use crate::error::Chain;
use crate::runs::backoff::jittered;
use crate::runs::breaker::Permit;
use crate::upstream::{AnswerTools, EventStream, Recovered, StartRun, UpstreamError};

/// What a round sends.
#[derive(Clone, Copy)]
pub(in crate::runs) enum RoundRequest<'a> {
    Message,
    Outputs(&'a [ToolOutput]),
    /// The message, unless another process has sent it: what became of that is to be found out first.
    Unknown,
}

/// Sends what the round is about and relays the reply until the upstream says how the round ended. May be dropped at any
/// await: what is known by then is in the progress.
pub(in crate::runs) async fn run_round(
    round: &RoundContext<'_>,
    progress: &mut Progress,
    request: RoundRequest<'_>,
) -> Result<RoundEnd, Failure> {
    let usage_before = progress.usage;
    let id_before = progress.upstream_run.clone();
    let mut attempt = Round {
        context: round,
        progress,
        permit: None,
    };
    let result = match request {
        RoundRequest::Message => attempt.send_message(None).await,
        RoundRequest::Outputs(outputs) => attempt.send_outputs(outputs).await,
        RoundRequest::Unknown => attempt.resume().await,
    };
    attempt.tell_breaker(&result);
    let mut end = result?;
    // An upstream that counts each round by itself gives each an id of its own.
    if let (Some(before), Some(now)) = (usage_before, end.ended.usage)
        && id_before != attempt.progress.upstream_run
    {
        end.ended.usage = Some(before + now);
    }
    Ok(end)
}

/// What a round knows while it goes on.
struct Round<'a> {
    context: &'a RoundContext<'a>,
    progress: &'a mut Progress,
    /// What the breaker is to be told: how the request fared, whatever it took.
    permit: Option<Permit>,
}

/// What a failure leads to.
enum Next {
    /// The upstream has the run, and this is what it still says.
    Follow(EventStream),
    /// It provably does not have it.
    SendAgain,
}

impl Round<'_> {
    /// `ambiguous_error`: how an earlier request failed that might still come in, although the upstream does not show it.
    async fn send_message(
        &mut self,
        mut ambiguous_error: Option<UpstreamError>,
    ) -> Result<RoundEnd, Failure> {
        self.ask_breaker()?;
        let RoundContext {
            ctx,
            started,
            assistant,
            upstream,
            ..
        } = *self.context;
        let owner = self.context.owner();
        let mut prepared = prepare(self.context, self.progress).await?;
        let mut retries = Retries::new(ctx.config.runs.max_retries);
        loop {
            match ensure_thread(self.context, self.progress, &owner, &mut prepared).await {
                Ok(()) => {}
                Err(Failure::Upstream(error)) => {
                    retries.wait_after(error).await?;
                    continue;
                }
                Err(failure) => return Err(failure),
            }
            let history = &prepared.history.messages;
            self.progress.include_history(history);
            self.progress.delivery = self.progress.delivery.max(Delivery::Sent);
            let thread = self.progress.thread.clone();
            let request = StartRun {
                run: started.run.id,
                thread: thread.as_ref(),
                owner: &owner,
                history,
                assistant,
                input: &started.input,
                metadata: &started.run.metadata,
            };
            may_send(&ctx.registry)?;
            self.sends();
            let error = match upstream.start(request).await {
                Ok(events) => match self.relay(events, Telling::First).await {
                    // A thread that turns out to be broken only after it took the run.
                    Err(Failure::Upstream(error @ UpstreamError::ThreadGone))
                        if self.progress.text.is_empty() =>
                    {
                        error
                    }
                    relayed => return relayed,
                },
                Err(error) => error,
            };
            self.hears_of_failure(&error);
            match error {
                UpstreamError::ThreadGone if !prepared.is_rebuilt => {
                    self.was_refused();
                    prepared = rebuild(self.context, self.progress).await?;
                }
                error => {
                    let was_busy = matches!(error, UpstreamError::Busy { .. });
                    if error.is_ambiguous() {
                        ambiguous_error = Some(error.clone());
                    }
                    if let Next::Follow(events) = self.after(error, &mut retries).await? {
                        return self.relay(events, Telling::Again).await;
                    }
                    // What holds the thread may be this run after all, or what an earlier one left there.
                    if was_busy
                        && let Some(error) = &ambiguous_error
                        && let Some(events) = self.came_in_late(error).await?
                    {
                        return self.relay(events, Telling::Again).await;
                    }
                    if was_busy && !prepared.is_rebuilt && started.thread.unsettled_run.is_some() {
                        prepared = prepare_again(self.context, self.progress, prepared).await?;
                    }
                }
            }
        }
    }

    /// Goes on with a round that another process had begun, or may have.
    async fn resume(&mut self) -> Result<RoundEnd, Failure> {
        let has_threads = self.context.upstream.capabilities().has_threads;
        let lacks_thread = has_threads && self.context.started.thread.upstream_thread_id.is_none();
        if lacks_thread || self.progress.delivery == Delivery::NotSent {
            // The thread is recorded before anything is sent.
            self.progress.delivery = Delivery::NotSent;
            return self.send_message(None).await;
        }
        let lost = UpstreamError::Broken { timeout: false };
        match recover(self.context, self.progress, &lost).await? {
            Recovered::Running(events) => {
                tracing::info!("the upstream has the run; following it");
                self.relay(events, Telling::Again).await
            }
            Recovered::Absent => {
                tracing::info!("the upstream has never seen the message; sending it");
                self.was_refused();
                self.note_second_request().await?;
                self.progress.sent_again = true;
                self.send_message(Some(lost)).await
            }
            Recovered::Unknown => Err(Failure::ReplicaLost),
        }
    }

    async fn send_outputs(&mut self, outputs: &[ToolOutput]) -> Result<RoundEnd, Failure> {
        let RoundContext {
            ctx,
            started,
            assistant,
            upstream,
            ..
        } = *self.context;
        let owner = self.context.owner();
        let mut retries = Retries::new(ctx.config.runs.max_retries);
        let upstream_run = self.progress.upstream_run.clone();
        // Calls that were found in a thread can be answered without the id of what made them.
        if upstream_run.is_none() && !upstream.capabilities().has_threads {
            return Err(Failure::ReplicaLost);
        }
        if std::mem::take(&mut self.progress.is_uncertain) {
            // As if the answer had been lost: it is looked up before anything is sent.
            let lost = UpstreamError::Broken { timeout: false };
            if let Next::Follow(events) = self.after(lost, &mut retries).await? {
                return self.relay(events, Telling::Again).await;
            }
        }
        self.ask_breaker()?;
        // A process that takes the run over must know that the outputs may be there.
        write_until_ok(|| ctx.store.sends_outputs(&started.lease)).await?;
        loop {
            let thread = self.progress.thread.clone();
            let request = AnswerTools {
                run: started.run.id,
                thread: thread.as_ref(),
                owner: &owner,
                upstream_run: upstream_run.as_ref(),
                assistant,
                outputs,
                metadata: &started.run.metadata,
            };
            may_send(&ctx.registry)?;
            self.sends();
            let error = match upstream.answer_tools(request).await {
                Ok(events) => return self.relay(events, Telling::First).await,
                Err(error) => error,
            };
            self.hears_of_failure(&error);
            match self.after(error, &mut retries).await? {
                Next::Follow(events) => return self.relay(events, Telling::Again).await,
                Next::SendAgain => {}
            }
        }
    }

    /// The upstream has taken the request. What becomes of the reply says nothing of other requests.
    async fn relay(&mut self, events: EventStream, telling: Telling) -> Result<RoundEnd, Failure> {
        if let Some(permit) = &mut self.permit {
            permit.answered();
        }
        relay(self.context, self.progress, events, telling).await
    }

    /// Asks the breaker whether a request may be made. What one tries meanwhile is its own.
    fn ask_breaker(&mut self) -> Result<(), Failure> {
        if let Some(breaker) = self
            .context
            .ctx
            .breaker(&self.context.started.thread.upstream)
        {
            let permit = breaker
                .enter()
                .map_err(|retry_after| Failure::BreakerOpen { retry_after })?;
            self.permit = Some(permit);
        }
        Ok(())
    }

    /// The verdict on the request as a whole. There is none if the run was cut off, or if we ourselves gave a call up.
    fn tell_breaker<T>(&mut self, result: &Result<T, Failure>) {
        let Some(permit) = &mut self.permit else {
            return;
        };
        match result {
            Err(Failure::Upstream(error)) if error.tells_outage() => permit.failed(),
            Err(Failure::Upstream(error)) if !matches!(error, UpstreamError::Broken { .. }) => {
                permit.answered();
            }
            Ok(_) | Err(Failure::Conflict { .. }) => permit.answered(),
            Err(_) => {}
        }
    }

    /// A request goes out that may start something. Under which id is not known yet.
    fn sends(&mut self) {
        self.progress.unacknowledged_requests += 1;
        self.context.awaits_id.send_replace(true);
    }

    /// An upstream that says how a request failed has not left anything of it.
    fn hears_of_failure(&mut self, error: &UpstreamError) {
        self.context.awaits_id.send_replace(false);
        if !matches!(
            error,
            UpstreamError::Broken { .. } | UpstreamError::Protocol(_)
        ) {
            self.progress.heard();
        }
    }

    /// Nothing of what was sent is at the upstream; what an earlier round left there is.
    fn was_refused(&mut self) {
        self.progress.busy = false;
        if self.progress.delivery == Delivery::Sent {
            self.progress.delivery = Delivery::NotSent;
        }
    }

    /// Records that the message is sent a second time. A request whose answer broke off may have left something under an id
    /// that nobody heard, although the thread shows nothing of it.
    async fn note_second_request(&mut self) -> Result<(), Failure> {
        let RoundContext {
            ctx,
            started,
            upstream,
            ..
        } = *self.context;
        if self.progress.unacknowledged_requests == 0 || !upstream.capabilities().stores_runs {
            return Ok(());
        }
        write_until_ok(|| ctx.store.sends_again(&started.lease)).await?;
        // Only now: a run that is cut off before says at its end that there was such a request.
        self.progress.heard();
        Ok(())
    }

    /// Decides what to do after a request was refused or broke off. What the upstream answered for may be sent again as
    /// often as is configured; what it did not answer for, once in a run, and never if we ourselves gave it up.
    async fn after(
        &mut self,
        error: UpstreamError,
        retries: &mut Retries,
    ) -> Result<Next, Failure> {
        match error {
            UpstreamError::Busy { blocking_run } => {
                self.was_refused();
                self.wait_for_thread(blocking_run, retries).await?;
                Ok(Next::SendAgain)
            }
            error if error.is_ambiguous() => match recover(self.context, self.progress, &error)
                .await?
            {
                Recovered::Running(events) => {
                    tracing::warn!(error = %Chain(&error), "the upstream has the run all the same; following it");
                    Ok(Next::Follow(events))
                }
                Recovered::Absent => {
                    self.was_refused();
                    if error.breaks_off() && std::mem::replace(&mut self.progress.sent_again, true)
                    {
                        return Err(Failure::Upstream(error));
                    }
                    retries.wait_after(error).await?;
                    self.note_second_request().await?;
                    Ok(Next::SendAgain)
                }
                Recovered::Unknown => Err(Failure::Upstream(error)),
            },
            error => {
                self.was_refused();
                retries.wait_after(error).await?;
                Ok(Next::SendAgain)
            }
        }
    }

    /// Looks once more for a request that the upstream did not show, before it is sent again to a thread that is held.
    async fn came_in_late(
        &mut self,
        failure: &UpstreamError,
    ) -> Result<Option<EventStream>, Failure> {
        self.progress.delivery = self.progress.delivery.max(Delivery::Sent);
        match recover(self.context, self.progress, failure).await? {
            Recovered::Running(events) => Ok(Some(events)),
            Recovered::Absent => {
                self.was_refused();
                Ok(None)
            }
            Recovered::Unknown => Err(Failure::Upstream(failure.clone())),
        }
    }

    /// Something else holds the thread. What the caller wants done on a busy thread is done here too.
    async fn wait_for_thread(
        &mut self,
        blocking_run: Option<UpstreamRunId>,
        retries: &mut Retries,
    ) -> Result<(), Failure> {
        // The run that holds it may be of a process that has the thread by now.
        may_send(&self.context.ctx.registry)?;
        tracing::warn!(
            blocking_run = blocking_run.as_ref().map(UpstreamRunId::as_str),
            "the upstream thread is held by another run"
        );
        self.progress.busy = true;
        let upstream = self.context.upstream;
        let since = *retries.busy_since.get_or_insert_with(Instant::now);
        let strategy = self.context.started.run.strategy;
        // A lock without a name may be what is left of our own last run, for a while.
        let lingers =
            blocking_run.is_none() && since.elapsed() < upstream.capabilities().lock_window;
        if strategy == MultitaskStrategy::Reject && !lingers {
            return Err(Failure::Conflict { blocking_run });
        }
        let Some(thread) = self.progress.thread.clone() else {
            sleep(jittered(FIRST_BACK_OFF)).await;
            return Ok(());
        };
        let cancel = matches!(
            strategy,
            MultitaskStrategy::Interrupt | MultitaskStrategy::Rollback
        );
        if let Err(error) = upstream.clear(&thread, blocking_run.as_ref(), cancel).await {
            tracing::warn!(error = %Chain(&error), "cannot see what holds the upstream thread");
            sleep(jittered(FIRST_BACK_OFF)).await;
        }
        Ok(())
    }
}

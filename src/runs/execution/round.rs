//! One round at the upstream: the request, the stream, and the recovery from their failures.

use tokio::time::{Instant, sleep};

use super::failure::{Failure, may_send};
use super::history::History;
use super::ladder::{Ladder, NextStep, PastShape};
use super::prepare::{Prepared, ensure_thread, past_of, prepare, prepare_again};
use super::progress::{Delivery, Progress};
use super::recover::{recover, unsettled_run};
use super::relay::{Telling, relay};
use super::rerun::needs_no_input;
use super::retry::{FIRST_BACK_OFF, Retries};
use super::round_context::{RoundContext, RoundEnd};
use super::settle::{Removal, take_away};
use super::store_retry::{retry_until_ok, write_until_ok};
use super::trial;
use crate::domain::{MultitaskStrategy, ToolOutput, UpstreamRunId};
use crate::error::Chain;
use crate::runs::backoff::jittered;
use crate::runs::breaker::Permit;
use crate::upstream::{AnswerTools, Ended, EventStream, Recovered, StartRun, UpstreamError, drain};

/// The request of a round.
#[derive(Clone, Copy)]
pub(in crate::runs) enum RoundRequest<'a> {
    Message,
    Outputs(&'a [ToolOutput]),
    /// The message, unless another process has sent it. The gateway must find that out first.
    Unknown,
}

/// Sends the request of the round and relays the reply until the upstream ends the round. The
/// future may be dropped at any await: `progress` has everything that is known by then.
pub(in crate::runs) async fn run_round(
    round: &RoundContext<'_>,
    progress: &mut Progress,
    request: RoundRequest<'_>,
) -> Result<RoundEnd, Failure> {
    let id_before = progress.upstream_run.clone();
    let mut attempt = Round {
        context: round,
        progress,
        permit: None,
        has_input: false,
        failed_try: None,
    };
    let result = match request {
        RoundRequest::Message => attempt.send_message(None, None).await,
        RoundRequest::Outputs(outputs) => attempt.send_outputs(outputs).await,
        RoundRequest::Unknown => attempt.resume().await,
    };
    attempt.tell_breaker(&result);
    let mut end = result?;
    let round_tokens = end.ended.usage.map(|usage| usage.total_tokens);
    attempt.progress.context_tokens = round_tokens.or(attempt.progress.context_tokens);
    // An upstream that counts the usage of each round gives each round an id of its own. So has
    // each try of a run.
    if let (Some(before), Some(now)) = (attempt.progress.usage, end.ended.usage)
        && id_before != attempt.progress.upstream_run
    {
        end.ended.usage = Some(before + now);
    }
    Ok(end)
}

/// The state of a round.
struct Round<'a> {
    context: &'a RoundContext<'a>,
    progress: &'a mut Progress,
    /// The breaker's permit, which gets the verdict on the request with all its tries.
    permit: Option<Permit>,
    /// Whether the upstream thread has the messages of the run: from a try of it that failed, or
    /// because the run answers them again.
    has_input: bool,
    /// The id of the last try that failed without having done anything.
    failed_try: Option<UpstreamRunId>,
}

/// The next step after a failure.
enum Next {
    /// The upstream has the run, and this is the rest of its stream.
    Follow(EventStream),
    /// The upstream provably does not have the run.
    SendAgain,
}

impl Round<'_> {
    /// Sends the message. `ambiguous_error`: the failure of an earlier request that may still
    /// arrive, although the upstream does not show it. `failed`: the end of a try by another
    /// process, which [has done nothing](Self::is_repeatable).
    async fn send_message(
        &mut self,
        mut ambiguous_error: Option<UpstreamError>,
        failed: Option<RoundEnd>,
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
        self.has_input |= needs_no_input(self.context) && !prepared.needs_thread;
        let mut retries = Retries::new(ctx.config.runs.max_retries);
        if let Some(end) = failed
            && let Some(end) = self.run_again(end, &mut prepared, &mut retries).await?
        {
            return Ok(end);
        }
        loop {
            match ensure_thread(self.context, self.progress, &owner, &mut prepared).await {
                Ok(()) => {}
                Err(Failure::Upstream(error)) => {
                    match self.recover_from(&error, &prepared).await? {
                        Some(next) => prepared = next,
                        None => retries.wait_after(error).await?,
                    }
                    continue;
                }
                Err(failure) => return Err(failure),
            }
            let mut history = &prepared.history.messages[..];
            let mut input = &started.input[..];
            if self.has_input {
                (history, input) = (&[], &[]);
            } else if input.iter().any(|message| message.content.is_empty()) {
                return Err(Failure::NothingToRun);
            } else {
                self.progress.include_history(history);
            }
            self.progress.delivery = self.progress.delivery.max(Delivery::Sent);
            let thread = self.progress.thread.clone();
            let request = StartRun {
                run: started.run.id,
                thread: thread.as_ref(),
                owner: &owner,
                history,
                assistant,
                input,
                metadata: &started.run.metadata,
            };
            may_send(&ctx.registry)?;
            self.sends();
            let error = match upstream.start(request).await {
                Ok(events) => match self.relay(events, Telling::First).await {
                    // The thread may turn out to be broken only after it took the run.
                    Err(Failure::Upstream(error))
                        if self.progress.text.is_empty() && Ladder::can_answer(&error) =>
                    {
                        error
                    }
                    relayed => {
                        match self
                            .run_again(relayed?, &mut prepared, &mut retries)
                            .await?
                        {
                            Some(end) => return Ok(end),
                            None => continue,
                        }
                    }
                },
                Err(error) => error,
            };
            self.hears_of_failure(&error);
            if let Some(next) = self.recover_from(&error, &prepared).await? {
                prepared = next;
                continue;
            }
            let was_busy = matches!(error, UpstreamError::Busy { .. });
            if error.is_ambiguous() {
                ambiguous_error = Some(error.clone());
            }
            let followed = match self.after(error, &mut retries).await? {
                Next::Follow(events) => Some(events),
                // This run may hold the thread after all, or an earlier run's traces may.
                Next::SendAgain => match &ambiguous_error {
                    Some(error) if was_busy => self.came_in_late(error).await?,
                    _ => None,
                },
            };
            if let Some(events) = followed {
                let end = self.relay(events, Telling::Again).await?;
                match self.run_again(end, &mut prepared, &mut retries).await? {
                    Some(end) => return Ok(end),
                    None => continue,
                }
            }
            if was_busy && !prepared.is_rebuilt && started.thread.unsettled_run.is_some() {
                prepared = prepare_again(self.context, prepared).await?;
            }
        }
    }

    /// Prepares the next step of the ladder after a refusal. Returns `None` if the refusal has
    /// nothing to do with the thread or its history.
    async fn recover_from(
        &mut self,
        error: &UpstreamError,
        prepared: &Prepared,
    ) -> Result<Option<Prepared>, Failure> {
        let RoundContext { ctx, started, .. } = *self.context;
        if !Ladder::can_answer(error) {
            return Ok(None);
        }
        self.was_refused();
        self.take_input_back(error).await?;
        trial::give_up(ctx, started, self.progress).await?;
        let past = past_of(self.context).await?;
        let known = retry_until_ok(|| ctx.store.last_refusal(started.thread.id)).await?;
        let shape = PastShape {
            messages: past.messages.len(),
            has_media: past.has_media(),
            is_unsent: past.messages.is_empty() && prepared.is_new,
        };
        match self.progress.ladder.next(error, shape, known.as_ref()) {
            NextStep::Try(kept) if ctx.recoveries.take(&started.thread.key) => {
                tracing::warn!(
                    error = %Chain(error),
                    history = kept.as_str(),
                    "the upstream refused the conversation; trying a new thread"
                );
                let cause = self.progress.ladder.cause();
                Ok(Some(Prepared::rebuilt(past, kept, cause)))
            }
            NextStep::BlameMessage => Err(Failure::MessageRefused(error.clone())),
            NextStep::Try(_) | NextStep::GiveUp => Err(Failure::Upstream(error.clone())),
        }
    }

    /// Removes the messages of the run from the upstream thread, if a try that failed left them
    /// there: the next try uses another thread, and this one may stay the thread's own. `refusal`:
    /// the error to fail with if they cannot be removed.
    async fn take_input_back(&mut self, refusal: &UpstreamError) -> Result<(), Failure> {
        let RoundContext {
            ctx,
            started,
            upstream,
            ..
        } = *self.context;
        let had_input = std::mem::take(&mut self.has_input) && self.failed_try.is_some();
        // A thread on trial is deleted as a whole.
        let is_on_trial = self
            .progress
            .recovery
            .as_ref()
            .is_some_and(|it| it.open_trial().is_some());
        if !had_input || is_on_trial {
            return Ok(());
        }
        let left = unsettled_run(ctx, started, self.progress).await?;
        match take_away(ctx, &started.lease, upstream, &left, Removal::IfSaid).await {
            Ok(_) => self.progress.delivery = Delivery::NotSent,
            Err(Failure::Upstream(error)) => {
                tracing::warn!(error = %Chain(&error), "cannot remove the messages of a failed run");
                return Err(Failure::Upstream(refusal.clone()));
            }
            Err(failure) => return Err(failure),
        }
        Ok(())
    }

    /// Returns true if the try failed for a cause that may pass, or that another thread may avoid,
    /// and has done nothing: it said nothing and called no tool.
    fn is_repeatable(&self, ended: &Ended) -> bool {
        ended.refusal.is_some()
            && ended.content.is_empty()
            && ended.tool_calls.is_empty()
            && self.progress.text.is_empty()
    }

    /// Prepares another try of a run that [has done nothing](Self::is_repeatable), so that the
    /// model sees its messages once. Returns the end of any other run, and of the failed try if
    /// there must be no other.
    ///
    /// The failed try is the run's own until the next one is about to be sent. So a process that
    /// takes the run over sees the failure, and repeats the run like this one. From then on the
    /// run has no id, and that process looks for what was sent last.
    async fn run_again(
        &mut self,
        end: RoundEnd,
        prepared: &mut Prepared,
        retries: &mut Retries,
    ) -> Result<Option<RoundEnd>, Failure> {
        let RoundContext {
            ctx,
            started,
            upstream,
            ..
        } = *self.context;
        let Some(error) = end.ended.refusal.clone() else {
            return Ok(Some(end));
        };
        if !self.is_repeatable(&end.ended) {
            return Ok(Some(end));
        }
        let needs_other_thread = Ladder::can_answer(&error);
        if !needs_other_thread && !retries.wait(&error).await {
            return Ok(Some(end));
        }
        let capabilities = upstream.capabilities();
        if capabilities.runs_without_input && !needs_other_thread {
            self.has_input = true;
        } else {
            // The upstream has told the failure, so nothing more of the failed try will arrive.
            if capabilities.has_threads || capabilities.goes_on_unread {
                let left = unsettled_run(ctx, started, self.progress).await?;
                let lease = &started.lease;
                match take_away(ctx, lease, upstream, &left, Removal::IfSaid).await {
                    Ok(settled) if settled.has_history_of(&left) => {
                        prepared.history = History::default();
                    }
                    Ok(_) => {}
                    Err(Failure::Upstream(error)) => {
                        tracing::warn!(error = %Chain(&error), "cannot remove the messages of a failed run");
                        return Ok(Some(end));
                    }
                    Err(failure) => return Err(failure),
                }
            }
            self.has_input = false;
            self.progress.delivery = Delivery::NotSent;
        }
        self.forget_try(end).await?;
        if let Some(next) = self.recover_from(&error, prepared).await? {
            *prepared = next;
        }
        Ok(None)
    }

    /// Takes the id of a failed try from the run, because the next try has another one. The janitor
    /// deletes the response of the failed try later.
    async fn forget_try(&mut self, end: RoundEnd) -> Result<(), Failure> {
        let RoundContext { ctx, started, .. } = *self.context;
        let failed = self.progress.upstream_run.take();
        write_until_ok(|| ctx.store.begins_again(&started.lease, failed.as_ref())).await?;
        // A failed try may be seen twice.
        if failed.is_none() || failed != self.failed_try {
            self.progress.usage = match (self.progress.usage, end.ended.usage) {
                (Some(before), Some(now)) => Some(before + now),
                (before, now) => now.or(before),
            };
        }
        self.failed_try = failed;
        drain(end.rest).await;
        Ok(())
    }

    /// Continues a round that another process began, or may have begun.
    async fn resume(&mut self) -> Result<RoundEnd, Failure> {
        let has_threads = self.context.upstream.capabilities().has_threads;
        let lacks_thread = has_threads && self.progress.thread.is_none();
        if lacks_thread || self.progress.delivery == Delivery::NotSent {
            // The thread is recorded before anything is sent, so nothing was sent.
            self.progress.delivery = Delivery::NotSent;
            return self.send_message(None, None).await;
        }
        let lost = UpstreamError::Broken { timeout: false };
        match recover(self.context, self.progress, &lost).await? {
            Recovered::Running(events) => {
                tracing::info!("the upstream has the run; following it");
                let end = self.relay(events, Telling::Again).await?;
                if !self.is_repeatable(&end.ended) {
                    return Ok(end);
                }
                // What was sent to a thread on trial goes with it.
                let is_on_trial = self
                    .progress
                    .recovery
                    .as_ref()
                    .is_some_and(|it| !it.answered);
                if !is_on_trial {
                    return self.send_message(None, Some(end)).await;
                }
                self.forget_try(end).await?;
                self.progress.delivery = Delivery::NotSent;
                let RoundContext { ctx, started, .. } = *self.context;
                trial::give_up(ctx, started, self.progress).await?;
                self.send_message(None, None).await
            }
            Recovered::Absent => {
                tracing::info!("the upstream does not have the message; sending it");
                self.was_refused();
                self.note_second_request().await?;
                self.progress.sent_again = true;
                let RoundContext { ctx, started, .. } = *self.context;
                trial::give_up(ctx, started, self.progress).await?;
                self.send_message(Some(lost), None).await
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
        // Calls in a thread can be answered without the id of their run.
        if upstream_run.is_none() && !upstream.capabilities().has_threads {
            return Err(Failure::ReplicaLost);
        }
        if std::mem::take(&mut self.progress.is_uncertain) {
            // The same as after a lost answer: look the outputs up before anything is sent.
            let lost = UpstreamError::Broken { timeout: false };
            if let Next::Follow(events) = self.after(lost, &mut retries).await? {
                return self.relay(events, Telling::Again).await;
            }
        }
        self.ask_breaker()?;
        // Record this first, so that a process that takes the run over knows that the upstream may
        // have the outputs.
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

    /// Relays the stream of a request that the upstream accepted. The reply says nothing about
    /// other requests.
    async fn relay(&mut self, events: EventStream, telling: Telling) -> Result<RoundEnd, Failure> {
        if let Some(permit) = &mut self.permit {
            permit.answered();
        }
        relay(self.context, self.progress, events, telling).await
    }

    /// Asks the breaker for a permit. One permit covers all tries of the request.
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

    /// Reports the verdict on the request as a whole. There is no verdict if the run was cut off,
    /// or if the gateway gave a call up.
    fn tell_breaker<T>(&mut self, result: &Result<T, Failure>) {
        let Some(permit) = &mut self.permit else {
            return;
        };
        match result {
            Err(Failure::Upstream(error)) if error.tells_outage() => permit.failed(),
            Err(Failure::Upstream(error)) if !matches!(error, UpstreamError::Broken { .. }) => {
                permit.answered();
            }
            Ok(_) | Err(Failure::Conflict { .. } | Failure::MessageRefused(_)) => permit.answered(),
            Err(_) => {}
        }
    }

    /// Notes that a request goes out that may start something, under an id that is not known yet.
    fn sends(&mut self) {
        self.progress.unacknowledged_requests += 1;
        self.context.awaits_id.send_replace(true);
    }

    /// Notes the failure of a request. An upstream that reports how a request failed has nothing
    /// of it.
    fn hears_of_failure(&mut self, error: &UpstreamError) {
        self.context.awaits_id.send_replace(false);
        if !matches!(
            error,
            UpstreamError::Broken { .. } | UpstreamError::Protocol(_)
        ) {
            self.progress.heard();
        }
    }

    /// Notes that the upstream has nothing of the last request. It may have earlier rounds.
    fn was_refused(&mut self) {
        self.progress.busy = false;
        if self.progress.delivery == Delivery::Sent {
            self.progress.delivery = Delivery::NotSent;
        }
    }

    /// Records that the message is sent a second time. A request whose answer broke off may have
    /// left something under an id that the gateway never received, although the thread shows
    /// nothing of it.
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
        // Only after the write: a run that is cut off before it reports the request at its end.
        self.progress.heard();
        Ok(())
    }

    /// Decides what to do after a request was refused or broke off. A request with an answer is
    /// repeated as often as the settings say. A request without an answer is repeated once in a
    /// run, and never if the gateway gave it up.
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
                    tracing::warn!(error = %Chain(&error), "the upstream has the run; following its stream");
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

    /// Looks once more for a request that the upstream did not show, before it is sent again to a
    /// busy thread.
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

    /// Handles an upstream thread that something else holds. Applies the strategy that the caller
    /// chose for busy threads.
    async fn wait_for_thread(
        &mut self,
        blocking_run: Option<UpstreamRunId>,
        retries: &mut Retries,
    ) -> Result<(), Failure> {
        // The run that holds the thread may be of a process that took the thread over.
        may_send(&self.context.ctx.registry)?;
        tracing::warn!(
            blocking_run = blocking_run.as_ref().map(UpstreamRunId::as_str),
            "another run holds the upstream thread"
        );
        self.progress.busy = true;
        let upstream = self.context.upstream;
        let since = *retries.busy_since.get_or_insert_with(Instant::now);
        let strategy = self.context.started.run.strategy;
        // A lock without a run's id may be what remains, for a while, of the gateway's own last
        // run.
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
            tracing::warn!(error = %Chain(&error), "cannot find out which run holds the upstream thread");
            sleep(jittered(FIRST_BACK_OFF)).await;
        }
        Ok(())
    }
}

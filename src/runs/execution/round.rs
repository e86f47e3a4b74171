//! The upstream side of a round: the thread, the call, the stream, and what to do when one of them fails.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use crate::config::AssistantConfig;
use crate::domain::{KeyNames, Leftover, MultitaskStrategy, ToolOutput, UpstreamRunId};
use crate::error::Chain;
use crate::runs::execution::breaker::Permit;
use crate::runs::execution::failure::Failure;
use crate::runs::execution::prepare::History;
use crate::runs::execution::progress::{Delivery, Progress};
use crate::runs::execution::retry::{FIRST_BACK_OFF, Retries};
use crate::runs::log::writer::RunLogWriter;
use crate::runs::{Runs, jittered};
use crate::store::{StartedRun, StoreError};
use crate::upstream::{
    AnswerTools, Ended, EventStream, Ownership, Recovered, StartRun, Upstream, UpstreamError,
};

/// Looks at what became of one request, before it is given up.
const MAX_LOOKS: u32 = 3;

/// What a round sends.
#[derive(Clone, Copy)]
pub(in crate::runs) enum Round<'a> {
    Message,
    Outputs(&'a [ToolOutput]),
    /// The message, unless another process has sent it: what became of that is to be found out first.
    Unknown,
}

/// One round at the upstream.
pub(in crate::runs) struct Drive<'a> {
    pub(in crate::runs) runs: &'a Runs,
    pub(in crate::runs) upstream: &'a dyn Upstream,
    pub(in crate::runs) assistant: &'a AssistantConfig,
    pub(in crate::runs) turn: &'a StartedRun,
    pub(in crate::runs) log: &'a RunLogWriter,
    pub(in crate::runs) progress: &'a mut Progress,
    /// Whether a request is out of which it is not heard yet under which id it runs.
    pub(in crate::runs) asking: &'a watch::Sender<bool>,
    /// What the breaker is to be told: how the request fared, whatever it took.
    pub(in crate::runs) permit: Option<Permit>,
}

/// What a failure leads to.
enum Next {
    /// The upstream has the run, and this is what it still says.
    RunSubscription(EventStream),
    /// It provably does not have it.
    SendAgain,
}

impl Drive<'_> {
    /// Sends what the round is about and relays the reply until the upstream says how the round ended. May be dropped at
    /// any await: what is known by then is in the progress. The stream comes back to be [drained](crate::runs::execution::relay::drain).
    pub(in crate::runs) async fn round(mut self, round: Round<'_>) -> Result<(Ended, EventStream), Failure> {
        let before = self.progress.usage;
        let id_before = self.progress.upstream_run.clone();
        let result = match round {
            Round::Message => self.message(None).await,
            Round::Outputs(outputs) => self.outputs(outputs).await,
            Round::Unknown => self.taken_over().await,
        };
        self.tell_breaker(&result);
        let (mut ended, events) = result?;
        // An upstream that counts each round by itself gives each an id of its own.
        if let (Some(before), Some(now)) = (before, ended.usage)
            && id_before != self.progress.upstream_run
        {
            ended.usage = Some(before + now);
        }
        Ok((ended, events))
    }

    /// Asks the breaker whether a request may be made. What one tries meanwhile is its own.
    fn enter(&mut self) -> Result<(), Failure> {
        if let Some(breaker) = self.runs.parts.given.breakers.get(&self.turn.thread.upstream) {
            let permit = breaker.enter().map_err(|retry_after| Failure::BreakerOpen { retry_after })?;
            self.permit = Some(permit);
        }
        Ok(())
    }

    /// The upstream has taken the request. What becomes of the reply says nothing of others.
    pub(in crate::runs) fn is_answered(&mut self) {
        if let Some(permit) = &mut self.permit {
            permit.answered();
        }
    }

    /// The verdict on the request as a whole. There is none if the run was cut off, or if we ourselves gave a call up.
    fn tell_breaker<T>(&mut self, result: &Result<T, Failure>) {
        let Some(permit) = &mut self.permit else { return };
        match result {
            Err(Failure::Upstream(error)) if error.tells_outage() => permit.failed(),
            Err(Failure::Upstream(error)) if !matches!(error, UpstreamError::Broken { .. }) => {
                permit.answered();
            }
            Ok(_) | Err(Failure::Conflict { .. }) => permit.answered(),
            Err(_) => {}
        }
    }

    /// `doubt`: how an earlier request failed that might still come in, although the upstream does not show it.
    async fn message(
        &mut self,
        mut ambiguous_error: Option<UpstreamError>,
    ) -> Result<(Ended, EventStream), Failure> {
        self.enter()?;
        let owner = self.owner();
        let is_sound = self.settle_earlier().await?;
        let (mut needs_thread, mut rebuilt) = (self.progress.thread.is_none(), !is_sound);
        let mut history = if rebuilt {
            needs_thread = true;
            self.start_anew().await?
        } else if needs_thread && self.turn.thread.carried > 0 {
            rebuilt = true;
            self.history_before().await?
        } else if self.turn.thread.backlog > 0 || self.turn.thread.leftover.is_some() {
            self.backlog().await?
        } else {
            History::default()
        };
        let mut retries = Retries::new(self.runs);
        loop {
            if needs_thread {
                match self.create_thread(&owner, rebuilt.then_some(&history)).await {
                    Ok(holds_seed) => {
                        needs_thread = false;
                        if rebuilt && holds_seed {
                            history = History::default();
                        }
                    }
                    Err(Failure::Upstream(error)) => {
                        retries.wait_after(error).await?;
                        continue;
                    }
                    Err(failure) => return Err(failure),
                }
            }
            self.progress.include_history(&history.messages);
            self.progress.delivery = self.progress.delivery.max(Delivery::Sent);
            let thread = self.progress.thread.clone();
            let request = StartRun {
                run: self.turn.run.id,
                thread: thread.as_ref(),
                owner: &owner,
                history: &history.messages,
                assistant: self.assistant,
                input: &self.turn.input,
                metadata: &self.turn.run.metadata,
            };
            self.runs.may_send()?;
            self.asks();
            let error = match self.upstream.start(request).await {
                Ok(events) => match self.relay(events, false).await {
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
            self.heard(&error);
            match error {
                UpstreamError::ThreadGone if !rebuilt => {
                    self.refused();
                    history = self.start_anew().await?;
                    (needs_thread, rebuilt) = (true, true);
                }
                error => {
                    let was_busy = matches!(error, UpstreamError::Busy { .. });
                    if error.is_ambiguous() {
                        ambiguous_error = Some(error.clone());
                    }
                    if let Next::RunSubscription(events) = self.after(error, &mut retries).await? {
                        return self.relay(events, true).await;
                    }
                    // What holds the thread may be this run after all, or what an earlier one left there.
                    if was_busy
                        && let Some(ambiguous_error) = &ambiguous_error
                        && let Some(events) = self.came_in_late(ambiguous_error).await?
                    {
                        return self.relay(events, true).await;
                    }
                    if was_busy && !rebuilt && self.turn.thread.leftover.is_some() {
                        // What held it may have come in since it was looked at, and what went along with it.
                        if self.settle_earlier().await? {
                            history = self.backlog().await?;
                        } else {
                            history = self.start_anew().await?;
                            (needs_thread, rebuilt) = (true, true);
                        }
                    }
                }
            }
        }
    }

    /// Goes on with a round that another process had begun, or may have.
    async fn taken_over(&mut self) -> Result<(Ended, EventStream), Failure> {
        let thread = &self.turn.thread;
        let lacks_thread = self.upstream.capabilities().has_threads && thread.upstream_thread_id.is_none();
        if lacks_thread || self.progress.delivery == Delivery::NotSent {
            // The thread is recorded before anything is sent.
            self.progress.delivery = Delivery::NotSent;
            return self.message(None).await;
        }
        let lost = UpstreamError::Broken { timeout: false };
        match self.recover(&lost).await? {
            Some(Recovered::Running(events)) => {
                tracing::info!("the upstream has the run; following it");
                self.relay(events, true).await
            }
            Some(Recovered::Absent) => {
                tracing::info!("the upstream has never seen the message; sending it");
                self.refused();
                self.sends_again().await?;
                self.progress.sent_again = true;
                self.message(Some(lost)).await
            }
            Some(Recovered::Unknown) | None => Err(Failure::ReplicaLost),
        }
    }

    /// Looks once more for a request that the upstream did not show, before it is sent again to a thread that is held.
    async fn came_in_late(&mut self, failure: &UpstreamError) -> Result<Option<EventStream>, Failure> {
        self.progress.delivery = self.progress.delivery.max(Delivery::Sent);
        match self.recover(failure).await? {
            Some(Recovered::Running(events)) => Ok(Some(events)),
            Some(Recovered::Absent) => {
                self.refused();
                Ok(None)
            }
            Some(Recovered::Unknown) | None => Err(Failure::Upstream(failure.clone())),
        }
    }

    async fn outputs(&mut self, outputs: &[ToolOutput]) -> Result<(Ended, EventStream), Failure> {
        let owner = self.owner();
        let mut retries = Retries::new(self.runs);
        let upstream_run = self.progress.upstream_run.clone();
        // Calls that were found in a thread can be answered without the id of what made them.
        if upstream_run.is_none() && !self.upstream.capabilities().has_threads {
            return Err(Failure::ReplicaLost);
        }
        if std::mem::take(&mut self.progress.is_uncertain) {
            // As if the answer had been lost: it is looked up before anything is sent.
            let lost = UpstreamError::Broken { timeout: false };
            if let Next::RunSubscription(events) = self.after(lost, &mut retries).await? {
                return self.relay(events, true).await;
            }
        }
        self.enter()?;
        self.announce_outputs().await?;
        loop {
            let thread = self.progress.thread.clone();
            let request = AnswerTools {
                run: self.turn.run.id,
                thread: thread.as_ref(),
                owner: &owner,
                upstream_run: upstream_run.as_ref(),
                assistant: self.assistant,
                outputs,
                metadata: &self.turn.run.metadata,
            };
            self.runs.may_send()?;
            self.asks();
            let error = match self.upstream.answer_tools(request).await {
                Ok(events) => return self.relay(events, false).await,
                Err(error) => error,
            };
            self.heard(&error);
            match self.after(error, &mut retries).await? {
                Next::RunSubscription(events) => return self.relay(events, true).await,
                Next::SendAgain => {}
            }
        }
    }

    fn owner(&self) -> Ownership {
        let thread = &self.turn.thread;
        let given = &self.runs.parts.given;
        let names = if given.told_keys.contains(&thread.upstream) {
            KeyNames::in_clear(&thread.key)
        } else {
            KeyNames::hidden(&thread.key, &given.fingerprints)
        };
        Ownership { names, thread: thread.id, expires_at: given.lifetimes.expiry(thread) }
    }

    /// Whoever takes the run over must know that the outputs may be there.
    async fn announce_outputs(&self) -> Result<(), Failure> {
        let store = &self.runs.parts.given.store;
        insist(|| store.sends_outputs(&self.turn.lease)).await
    }

    /// A request goes out that may start something, of which it is not heard yet under which id.
    fn asks(&mut self) {
        self.progress.unacknowledged_requests += 1;
        self.asking.send_replace(true);
    }

    /// Whoever says how a request failed has not left anything of it.
    fn heard(&mut self, error: &UpstreamError) {
        self.asking.send_replace(false);
        if !matches!(error, UpstreamError::Broken { .. } | UpstreamError::Protocol(_)) {
            self.progress.heard();
        }
    }

    /// A request whose answer broke off may have left something under an id that nobody heard, although the thread shows
    /// nothing of it.
    async fn sends_again(&mut self) -> Result<(), Failure> {
        if self.progress.unacknowledged_requests == 0 || !self.upstream.capabilities().stores_runs {
            return Ok(());
        }
        let store = &self.runs.parts.given.store;
        insist(|| store.sends_again(&self.turn.lease)).await?;
        // Only now: a run that is cut off before says at its end that there was such a request.
        self.progress.heard();
        Ok(())
    }

    /// Decides what to do after a request was refused or broke off. What the upstream answered for may be sent again as
    /// often as is configured; what it did not answer for, once in a run, and never if we ourselves gave it up.
    async fn after(&mut self, error: UpstreamError, retries: &mut Retries) -> Result<Next, Failure> {
        match error {
            UpstreamError::Busy { blocking_run } => {
                self.refused();
                self.conflict(blocking_run, retries).await?;
                Ok(Next::SendAgain)
            }
            error if error.is_ambiguous() => match self.recover(&error).await? {
                Some(Recovered::Running(events)) => {
                    tracing::warn!(error = %Chain(&error), "the upstream has the run all the same; following it");
                    Ok(Next::RunSubscription(events))
                }
                Some(Recovered::Absent) => {
                    self.refused();
                    if error.breaks_off() && std::mem::replace(&mut self.progress.sent_again, true) {
                        return Err(Failure::Upstream(error));
                    }
                    retries.wait_after(error).await?;
                    self.sends_again().await?;
                    Ok(Next::SendAgain)
                }
                Some(Recovered::Unknown) | None => Err(Failure::Upstream(error)),
            },
            error => {
                self.refused();
                retries.wait_after(error).await?;
                Ok(Next::SendAgain)
            }
        }
    }

    /// Nothing of what was sent is at the upstream; what an earlier round left there is.
    fn refused(&mut self) {
        self.progress.busy = false;
        if self.progress.delivery == Delivery::Sent {
            self.progress.delivery = Delivery::NotSent;
        }
    }

    /// Something else holds the thread: what the caller wants done on a busy thread is done here too.
    async fn conflict(
        &mut self,
        blocking_run: Option<UpstreamRunId>,
        retries: &mut Retries,
    ) -> Result<(), Failure> {
        // Or it is the run of who has the thread by now.
        self.runs.may_send()?;
        tracing::warn!(
            blocking_run = blocking_run.as_ref().map(UpstreamRunId::as_str),
            "the upstream thread is held by another run"
        );
        self.progress.busy = true;
        let since = *retries.busy_since.get_or_insert_with(Instant::now);
        let strategy = self.turn.run.strategy;
        // A lock without a name may be what is left of our own last run, for a while.
        let lingers = blocking_run.is_none() && since.elapsed() < self.upstream.capabilities().lock_window;
        if strategy == MultitaskStrategy::Reject && !lingers {
            return Err(Failure::Conflict { blocking_run });
        }
        let Some(thread) = self.progress.thread.clone() else {
            sleep(jittered(FIRST_BACK_OFF)).await;
            return Ok(());
        };
        let cancel = matches!(strategy, MultitaskStrategy::Interrupt | MultitaskStrategy::Rollback);
        if let Err(error) = self.upstream.clear(&thread, blocking_run.as_ref(), cancel).await {
            tracing::warn!(error = %Chain(&error), "cannot see what holds the upstream thread");
            sleep(jittered(FIRST_BACK_OFF)).await;
        }
        Ok(())
    }

    /// Finds out what became of a request. `None` if the upstream does not say.
    pub(in crate::runs) async fn recover(
        &mut self,
        error: &UpstreamError,
    ) -> Result<Option<Recovered>, Failure> {
        let sent = leftover(self.runs, self.turn, self.progress).await?;
        for look in 0..MAX_LOOKS {
            if look > 0 {
                sleep(jittered(FIRST_BACK_OFF * 2_u32.pow(look))).await;
            }
            match self.upstream.recover(&sent, error).await {
                Ok(recovered) => return Ok(Some(recovered)),
                Err(error) => {
                    tracing::warn!(error = %Chain(&error), "cannot find out what became of a request");
                }
            }
        }
        Ok(None)
    }
}

/// What a turn may have left at the upstream, with what is needed to find it there.
pub(in crate::runs) async fn leftover(
    runs: &Runs,
    turn: &StartedRun,
    progress: &Progress,
) -> Result<Leftover, Failure> {
    let mut baseline = loop {
        match runs.parts.given.store.baseline(turn.run.id).await {
            Ok(baseline) => break baseline,
            Err(error) => wait_out(error).await?,
        }
    };
    baseline.skip += progress.history_users;
    Ok(Leftover {
        run: turn.run.id,
        thread: progress.thread.clone(),
        upstream_run: progress.upstream_run.clone(),
        open_calls: progress.open_calls.clone(),
        baseline,
        inputs: progress.inputs,
        synced: progress.synced,
        remove: false,
    })
}

/// Notes something of a run that this process has, however long the database is away.
pub(in crate::runs) async fn insist<F>(note: impl Fn() -> F) -> Result<(), Failure>
where
    F: Future<Output = Result<bool, StoreError>>,
{
    loop {
        match note().await {
            Ok(true) => return Ok(()),
            Ok(false) => return Err(Failure::LeaseLost),
            Err(error) => wait_out(error).await?,
        }
    }
}

/// Pauses before another try, if there is a point in one. The caller bounds the tries.
pub(in crate::runs) async fn wait_out(error: StoreError) -> Result<(), Failure> {
    tracing::error!(error = %Chain(&error), "the store failed in the middle of a turn");
    if !matches!(error, StoreError::Unavailable(_)) {
        return Err(Failure::Store);
    }
    sleep(jittered(Duration::from_millis(500))).await;
    Ok(())
}

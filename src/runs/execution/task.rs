//! The task of a run, from its admission to its end: the wait for its start, its rounds at the
//! upstream, the waits for tool outputs between them, and its end.

use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::Instrument;

use super::create_thread::resolve;
use super::failure::Failure;
use super::finish::{RunResult, announce, finish_queued_run, finish_run};
use super::outcome::end_without_output;
use super::progress::{Progress, StoredProgress};
use super::queue::{Reservation, Waited, wait_for_start};
use super::rerun::take_messages;
use super::rollover::roll_over_if_full;
use super::round::{RoundRequest, run_round};
use super::round_context::{RoundContext, RoundEnd};
use crate::config::AssistantConfig;
use crate::domain::{RequiredAction, Rerun, Run, RunStatus, Thread, ToolOutput, answer_calls};
use crate::error::Chain;
use crate::runs::backoff::jittered;
use crate::runs::context::Context;
use crate::runs::log::event::RunEvent;
use crate::runs::redaction;
use crate::runs::registry::ActiveRun;
use crate::store::{
    Made, Notification, OrphanedRun, Pause, Paused, RunLease, StartedRun, StoreError, Withdrawn,
};
use crate::upstream::{Upstream, drain};

/// Longest wait for the upstream's id of a run that is cut off before the upstream has sent it.
const ID_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause before the store is asked again to let a run wait for tool outputs.
const PAUSE_RETRY: Duration = Duration::from_millis(500);

/// A run that was just recorded, and its next step.
pub(in crate::runs) struct AdmittedRun {
    pub(in crate::runs) thread: Thread,
    pub(in crate::runs) run: Run,
    pub(in crate::runs) next: Next,
}

/// The next step of a run that was just recorded.
pub(in crate::runs) enum Next {
    Start(Box<StartedRun>),
    /// The run waits; at position 1 it starts next.
    Wait {
        lease: RunLease,
        position: i64,
    },
}

/// Leads a run that was just recorded to its end.
pub(in crate::runs) async fn run_admitted(
    ctx: &Context,
    mut active: ActiveRun,
    mut reservation: Reservation,
    admitted: AdmittedRun,
) {
    let AdmittedRun { thread, run, next } = admitted;
    let waited = match next {
        Next::Start(started) => Waited::Started(started),
        Next::Wait { lease, .. } => {
            // The store keeps the message of a queued run, so it need not stay in memory.
            if ctx.store.keeps_content() {
                reservation.memory.give_back();
            }
            wait_for_start(ctx, &active, Some(&mut reservation), lease, &thread, &run).await
        }
    };
    let Reservation {
        mut ticket,
        tenant_run,
        queued_bytes,
        memory,
    } = reservation;
    drop(queued_bytes);
    let result = match waited {
        Waited::Started(started) => {
            ticket.started();
            run_from_start(ctx, &mut active, *started).await
        }
        Waited::Over(result) => result,
    };
    // Drop the ticket before the notification, so that a task that receives it finds the thread
    // free.
    drop(ticket);
    announce(ctx, &active, result);
    drop((active, memory, tenant_run));
}

/// Leads a queued run that was taken over from another replica to its end. The run has no ticket
/// of this process's queue, so only the store keeps its order.
pub(in crate::runs) async fn resume_queued(
    ctx: &Context,
    mut active: ActiveRun,
    lease: RunLease,
    thread: &Thread,
    run: &Run,
) {
    let result = match wait_for_start(ctx, &active, None, lease, thread, run).await {
        Waited::Started(started) => run_from_start(ctx, &mut active, *started).await,
        Waited::Over(result) => result,
    };
    announce(ctx, &active, result);
}

/// Continues a run whose own message was refused, for the messages that joined it.
pub(in crate::runs) async fn continue_for_others(
    ctx: &Context,
    active: ActiveRun,
    lease: RunLease,
    withdrawn: Withdrawn,
) {
    let Withdrawn::Shared {
        thread,
        run,
        position,
    } = withdrawn
    else {
        return;
    };
    tracing::warn!("the run's own message was refused; the run continues with joined messages");
    active.log.push(RunEvent::Queued { position });
    resume_queued(ctx, active, lease, &thread, &run).await;
}

/// Ends queued runs that were taken over and can never start, in their order.
pub(in crate::runs) async fn close_queued_orphans(
    ctx: &Context,
    queued: Vec<(ActiveRun, OrphanedRun)>,
) {
    for (
        active,
        OrphanedRun {
            lease, thread, run, ..
        },
    ) in queued
    {
        let (status, error) = Failure::ReplicaLost.end();
        let end = end_without_output(status, error);
        let result = finish_queued_run(ctx, &active, &lease, &thread, &run, end).await;
        announce(ctx, &active, result);
    }
}

/// Continues a run that waited for tool outputs, or had just got them, when its process ended.
pub(in crate::runs) async fn resume_waiting(
    ctx: &Context,
    mut active: ActiveRun,
    orphan: OrphanedRun,
    stored: StoredProgress,
) {
    let OrphanedRun {
        lease,
        thread,
        run,
        time_left,
        run_time_left,
        content,
        outputs,
        outputs_sent,
        ..
    } = orphan;
    let begin = match (outputs, run.required_action.clone()) {
        (Some(outputs), _) => Begin::Outputs(outputs),
        (None, required) => Begin::Waiting {
            action: required.unwrap_or(RequiredAction {
                tool_calls: Vec::new(),
            }),
            until: Instant::now() + time_left,
        },
    };
    let started = StartedRun {
        lease,
        thread,
        run,
        input: Vec::new(),
        intent: None,
    };
    let mut progress = Progress::new(&started);
    progress.taken_over(&started.thread, content, stored);
    match &begin {
        Begin::Message | Begin::Unknown | Begin::CutOff(_) => {}
        Begin::Waiting { action, .. } => progress.open_calls.clone_from(&action.tool_calls),
        Begin::Outputs(outputs) => progress.answers(outputs, outputs_sent),
    }
    let deadline = Instant::now() + run_time_left;
    let result = execute(ctx, &mut active, &started, begin, progress, deadline).await;
    announce(ctx, &active, result);
}

/// Continues a run that was active when its process let go of it. Follows the run if the upstream
/// has it, sends its message if the upstream does not have it, and ends the run if neither is
/// possible.
pub(in crate::runs) async fn resume_running(
    ctx: &Context,
    mut active: ActiveRun,
    orphan: OrphanedRun,
    stored: StoredProgress,
) {
    let OrphanedRun {
        lease,
        thread,
        run,
        time_left,
        input,
        content,
        ..
    } = orphan;
    let mut started = StartedRun {
        lease,
        thread,
        run,
        input,
        intent: None,
    };
    let mut begin = Begin::Unknown;
    let is_unsent = started.run.rerun == Some(Rerun::Waiting);
    if is_unsent {
        match take_messages(ctx, &started).await {
            Ok(taken) => (started, begin) = (taken, Begin::Message),
            Err(cut) => begin = Begin::CutOff(cut),
        }
    }
    let mut progress = Progress::new(&started);
    if !is_unsent {
        progress.taken_over(&started.thread, content, stored);
    }
    let deadline = Instant::now() + time_left;
    let result = execute(ctx, &mut active, &started, begin, progress, deadline).await;
    announce(ctx, &active, result);
}

/// Ends a run without a live owner: first what still works at the upstream, then the run. If the
/// upstream can say how the run ended there, it ends so here.
pub(in crate::runs) async fn close_orphan(
    ctx: &Context,
    active: ActiveRun,
    orphan: OrphanedRun,
    stored: StoredProgress,
) {
    let OrphanedRun {
        lease,
        thread,
        run,
        content,
        ..
    } = orphan;
    let failure = if run.status == RunStatus::Cancelling {
        Failure::Cancelled
    } else {
        Failure::ReplicaLost
    };
    let started = StartedRun {
        lease,
        thread,
        run,
        input: Vec::new(),
        intent: None,
    };
    let mut progress = Progress::new(&started);
    progress.taken_over(&started.thread, content, stored);
    let result = finish_run(ctx, &active, &started, Err(failure), progress).await;
    announce(ctx, &active, result);
}

/// The first step of a run's task.
enum Begin {
    /// Send the message.
    Message,
    /// Wait for the outputs of these calls.
    Waiting {
        action: RequiredAction,
        until: Instant,
    },
    /// Send these outputs, which may have been sent already.
    Outputs(Vec<ToolOutput>),
    /// Find out whether the message was sent, and what followed.
    Unknown,
    /// End the run, which was cut off before its first round.
    CutOff(Failure),
}

/// Executes a run that starts, on a fresh thread if its own is full.
async fn run_from_start(ctx: &Context, active: &mut ActiveRun, started: StartedRun) -> RunResult {
    let deadline = Instant::now() + time_left(&started.run);
    let ready = if started.run.rerun.is_some() {
        // It adds no message, so it does not make the thread fuller.
        take_messages(ctx, &started).await
    } else {
        tokio::select! {
            biased;
            cut = cut_off(ctx, active, deadline) => Err(cut),
            rolled = roll_over_if_full(ctx, started.clone()) => Ok(rolled),
        }
    };
    let (started, begin) = match ready {
        Ok(started) => (started, Begin::Message),
        // The upstream has nothing of the run, and the store knows the run's thread.
        Err(cut) => (started, Begin::CutOff(cut)),
    };
    let progress = Progress::new(&started);
    let result = execute(ctx, active, &started, begin, progress, deadline).await;
    // The store may have rolled the thread over just before the cut.
    if let RunResult::Ended(outcome) = &result
        && outcome.thread.id != started.thread.id
    {
        let key = &started.thread.key;
        ctx.queue.moved(key, started.thread.id, outcome.thread.id);
    }
    result
}

/// Executes a run and commits its end, whatever happens on the way.
async fn execute(
    ctx: &Context,
    active: &mut ActiveRun,
    started: &StartedRun,
    begin: Begin,
    mut progress: Progress,
    deadline: Instant,
) -> RunResult {
    let since = Instant::now();
    let StartedRun { thread, run, .. } = started;
    // The configuration may have changed since the run was admitted.
    let assistant = ctx
        .config
        .assistants
        .get(&run.assistant)
        .filter(|it| it.upstream == thread.upstream);
    let result = match (ctx.upstream(&thread.upstream), assistant) {
        // Only another process knew the message's content. The upstream may know messages that are
        // answered again.
        _ if run.rerun.is_none()
            && started
                .input
                .iter()
                .any(|message| message.content.is_empty()) =>
        {
            Err(Failure::ReplicaLost)
        }
        (Some(upstream), Some(assistant)) => {
            let upstream = &**upstream;
            let mut rounds = Rounds {
                ctx,
                upstream,
                assistant,
                started,
                deadline,
                progress: &mut progress,
            };
            match rounds.run_rounds(active, begin).await {
                RoundsEnd::Over(result) => *result,
                RoundsEnd::LetGo => return RunResult::LetGo,
            }
        }
        _ => Err(Failure::NotConfigured),
    };
    if let Err(failure) = &result {
        tracing::warn!(
            upstream.name = thread.upstream,
            failure = failure.name(),
            "the run did not reach its end at the upstream"
        );
    }
    if let Some(intent) = progress.intent.take() {
        // No task has begun to create the thread, and none will.
        let store = Arc::clone(&ctx.store);
        ctx.tasks
            .tracker
            .spawn(async move { resolve(&store, intent, Made::Nothing).await }.in_current_span());
    }
    let result = finish_run(ctx, active, started, result, progress).await;
    match &result {
        RunResult::LetGo => tracing::warn!("let go of the run; another task continues it"),
        RunResult::Ended(outcome) => tracing::info!(
            thread.id = %thread.id,
            assistant = %run.assistant,
            status = %outcome.run.status,
            error = outcome.run.error.as_ref().map(|error| error.code.as_str()),
            duration_ms = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX),
            "run ended"
        ),
    }
    result
}

/// The rounds of one run, and the waits for tool outputs between them.
struct Rounds<'a> {
    ctx: &'a Context,
    upstream: &'a dyn Upstream,
    assistant: &'a AssistantConfig,
    started: &'a StartedRun,
    deadline: Instant,
    progress: &'a mut Progress,
}

/// The end of a run's rounds.
enum RoundsEnd {
    Over(Box<Result<RoundEnd, Failure>>),
    /// Another process continues the run.
    LetGo,
}

/// The end of a wait for tool outputs.
enum OutputsWait {
    Given(Vec<ToolOutput>),
    CutOff(Failure),
    /// This process stops, and the run waits in another one.
    LetGo,
}

impl Rounds<'_> {
    async fn run_rounds(&mut self, active: &mut ActiveRun, begin: Begin) -> RoundsEnd {
        let mut waiting = None;
        let mut outputs = None;
        let mut is_unknown = false;
        match begin {
            Begin::Message => {}
            Begin::CutOff(failure) => return RoundsEnd::Over(Box::new(Err(failure))),
            Begin::Unknown => is_unknown = true,
            Begin::Waiting { action, until } => waiting = Some((action, until)),
            Begin::Outputs(given) => outputs = Some(given),
        }
        loop {
            if let Some((action, until)) = waiting.take() {
                match self.wait_for_outputs(active, &action, until).await {
                    OutputsWait::Given(given) => outputs = Some(given),
                    OutputsWait::CutOff(failure) => return RoundsEnd::Over(Box::new(Err(failure))),
                    OutputsWait::LetGo => return RoundsEnd::LetGo,
                }
            }
            if let Some(outputs) = &outputs {
                answer_calls(&mut self.progress.content, outputs);
            }
            let request = match &outputs {
                Some(outputs) => RoundRequest::Outputs(outputs),
                None if std::mem::take(&mut is_unknown) => RoundRequest::Unknown,
                None => RoundRequest::Message,
            };
            let ended = match self.round(active, request).await {
                Ok(RoundEnd { ended, rest }) if ended.asks() => {
                    drain(rest).await;
                    ended
                }
                end => return RoundsEnd::Over(Box::new(end)),
            };
            let action = RequiredAction {
                tool_calls: ended.tool_calls.clone(),
            };
            self.progress.asked(ended);
            match self.pause(active, &action).await {
                Ok(until) => waiting = Some((action, until)),
                Err(failure) => return RoundsEnd::Over(Box::new(Err(failure))),
            }
        }
    }

    /// Performs one round, unless it is cut off or panics.
    async fn round(
        &mut self,
        active: &ActiveRun,
        request: RoundRequest<'_>,
    ) -> Result<RoundEnd, Failure> {
        let Self {
            ctx,
            upstream,
            assistant,
            started,
            deadline,
            ..
        } = *self;
        let (awaits_id, mut awaited_id) = watch::channel(false);
        let context = RoundContext {
            ctx,
            upstream,
            assistant,
            started,
            log: &active.log,
            awaits_id: &awaits_id,
        };
        let round = run_round(&context, self.progress, request);
        let mut round = pin!(AssertUnwindSafe(round).catch_unwind());
        let cut = tokio::select! {
            biased;
            cut = cut_off(ctx, active, deadline) => cut,
            result = &mut round => return result.unwrap_or(Err(Failure::Panic)),
        };
        if matches!(cut, Failure::LeaseLost | Failure::Stopped) {
            return Err(cut);
        }
        if upstream.capabilities().goes_on_unread {
            // The id by which the upstream run can be ended may be on its way.
            tokio::select! {
                biased;
                () = active.lost.cancelled() => return Err(Failure::LeaseLost),
                () = ctx.tasks.stop.cancelled() => return Err(Failure::Stopped),
                _ = awaited_id.wait_for(|awaits_id| !awaits_id) => {}
                _ = &mut round => {}
                () = sleep(ID_TIMEOUT) => {}
            }
        }
        Err(cut)
    }

    /// Records that the run waits. From here on callers may send the outputs, and a process that
    /// takes the run over has its content. Returns the end of the wait.
    async fn pause(
        &mut self,
        active: &ActiveRun,
        action: &RequiredAction,
    ) -> Result<Instant, Failure> {
        let Self {
            ctx,
            started,
            deadline,
            ..
        } = *self;
        let wait = ctx.config.runs.tool_outputs_timeout;
        let pause = Pause {
            wait,
            required_action: action.clone(),
            upstream_run_id: self.progress.upstream_run.clone(),
            content: self.progress.content.clone(),
            usage: self.progress.usage,
            events: active
                .log
                .unstored(Some(RunEvent::RequiresAction(action.clone().into()))),
        };
        let paused = tokio::select! {
            biased;
            () = active.lost.cancelled() => return Err(Failure::LeaseLost),
            () = ctx.tasks.stop.cancelled() => return Err(Failure::Stopped),
            () = sleep_until(deadline) => return Err(Failure::Deadline),
            paused = record_pause(ctx, &started.lease, &pause) => paused,
        };
        match paused {
            Ok(Paused::Waiting(_)) => {
                active
                    .log
                    .push(RunEvent::RequiresAction(action.clone().into()));
                active.log.all_stored();
                ctx.notifier.notify(Notification::Run(started.run.id));
                Ok(deadline.min(Instant::now() + wait))
            }
            Ok(Paused::Cancelling) => Err(Failure::Cancelled),
            Ok(Paused::Lost) => Err(Failure::LeaseLost),
            Err(error) => {
                tracing::error!(error = %Chain(&error), "cannot record that the run waits for tool outputs");
                Err(Failure::Store)
            }
        }
    }

    /// Waits for outputs of exactly these calls.
    async fn wait_for_outputs(
        &mut self,
        active: &mut ActiveRun,
        action: &RequiredAction,
        until: Instant,
    ) -> OutputsWait {
        let outputs = &mut active.outputs;
        let answered = async {
            loop {
                let given = outputs.borrow_and_update().clone();
                if action.is_answered_by(&given) {
                    return given;
                }
                if outputs.changed().await.is_err() {
                    return std::future::pending().await;
                }
            }
        };
        tokio::select! {
            biased;
            () = active.lost.cancelled() => OutputsWait::CutOff(Failure::LeaseLost),
            () = active.cancel.requested() => OutputsWait::CutOff(Failure::Cancelled),
            given = answered => OutputsWait::Given(given),
            () = sleep_until(until) => OutputsWait::CutOff(Failure::NoOutputs),
            () = self.ctx.tasks.draining.cancelled() => OutputsWait::LetGo,
        }
    }
}

/// Waits until an active run has to stop before its end, and returns the reason.
async fn cut_off(ctx: &Context, active: &ActiveRun, deadline: Instant) -> Failure {
    tokio::select! {
        biased;
        () = active.lost.cancelled() => Failure::LeaseLost,
        () = ctx.tasks.stop.cancelled() => Failure::Stopped,
        () = active.cancel.requested() => Failure::Cancelled,
        () = sleep_until(deadline) => Failure::Deadline,
    }
}

/// Asks the store until it answers. A lost answer does no harm, because the call can be repeated.
async fn record_pause(
    ctx: &Context,
    lease: &RunLease,
    pause: &Pause,
) -> Result<Paused, StoreError> {
    loop {
        match redaction::pause(ctx, lease, pause).await {
            Err(StoreError::Unavailable(_)) => sleep(jittered(PAUSE_RETRY)).await,
            paused => return paused,
        }
    }
}

/// Returns the time until the run's deadline. The store has just set the deadline by its own
/// clock.
fn time_left(run: &Run) -> Duration {
    run.deadline_at
        .zip(run.started_at)
        .and_then(|(deadline, start)| (deadline - start).to_std().ok())
        .unwrap_or_default()
}

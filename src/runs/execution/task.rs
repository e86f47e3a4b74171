//! A turn at work, as a task of its own: its rounds at the upstream, its waits for tool outputs, its end.

use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::Instrument;

use crate::config::AssistantConfig;
use crate::domain::{RequiredAction, Run, RunStatus, ToolOutput};
use crate::error::Chain;
use crate::runs::execution::create_thread::resolve;
use crate::runs::execution::failure::Failure;
use crate::runs::execution::finish::{announce, finish_run};
use crate::runs::execution::progress::Progress;
use crate::runs::execution::relay::drain;
use crate::runs::execution::round::{Drive, Round};
use crate::runs::registry::ActiveRun;
use crate::runs::replica::takeover::Before;
use crate::runs::{Outcome, RunEvent, Runs, jittered};
use crate::store::{Made, News, Orphan, Pause, Paused, RunLease, StartedRun, StoreError};
use crate::upstream::{Ended, EventStream, Upstream};

/// How long the id of a run is waited for that is cut off before it was heard.
const HEARING: Duration = Duration::from_secs(2);

/// What a run that was taken over from another process begins with.
enum Begin {
    /// Its message is to be sent.
    Message,
    /// It waits for the outputs of these calls.
    Waiting(RequiredAction),
    /// Outputs came that may or may not have been sent.
    Outputs(Vec<ToolOutput>),
    /// Its message may or may not have been sent, and all that followed is to be found out.
    Unknown,
    /// It was cut off before it began.
    CutOff(Failure),
}

/// Does the turn and commits its end, whatever happens on the way. `None` if the run goes on in another process.
pub(in crate::runs) async fn work(runs: &Runs, active: &mut ActiveRun, turn: StartedRun) -> Option<Outcome> {
    let deadline = Instant::now() + time_left(&turn.run);
    let rolled = tokio::select! {
        biased;
        cut = cut_off(runs, active, deadline) => Err(cut),
        rolled = runs.rolled(turn.clone()) => Ok(rolled),
    };
    let (turn, begin) = match rolled {
        Ok(turn) => (turn, Begin::Message),
        // Nothing of it is upstream, and the store knows on which thread it is.
        Err(cut) => (turn, Begin::CutOff(cut)),
    };
    let progress = Progress::new(&turn);
    execute(runs, active, &turn, begin, progress, deadline).await
}

/// Goes on with a run that waited for tool outputs, or had just got them, when its process ended.
pub(in crate::runs) async fn resume_waiting(
    runs: Runs,
    mut active: ActiveRun,
    orphan: Orphan,
    before: Before,
) {
    let Orphan { lease, thread, run, time_left, content, outputs, outputs_sent, .. } = orphan;
    let begin = match (outputs, run.required_action.clone()) {
        (Some(outputs), _) => Begin::Outputs(outputs),
        (None, required) => Begin::Waiting(required.unwrap_or(RequiredAction { tool_calls: Vec::new() })),
    };
    let turn = StartedRun { lease, thread, run, input: Vec::new(), intent: None };
    let mut progress = Progress::new(&turn);
    progress.taken_over(&turn.thread, content, before);
    match &begin {
        Begin::Message | Begin::Unknown | Begin::CutOff(_) => {}
        Begin::Waiting(action) => progress.open_calls.clone_from(&action.tool_calls),
        Begin::Outputs(outputs) => progress.answers(outputs, outputs_sent),
    }
    let deadline = Instant::now() + time_left;
    let outcome = execute(&runs, &mut active, &turn, begin, progress, deadline).await;
    announce(&runs, &active, outcome);
}

/// Goes on with a run that was at work when its process let go of it: follows it where the upstream has it, sends its
/// message where that was never seen, and ends it if neither can be.
pub(in crate::runs) async fn resume_at_work(
    runs: Runs,
    mut active: ActiveRun,
    orphan: Orphan,
    before: Before,
) {
    let Orphan { lease, thread, run, time_left, input, content, .. } = orphan;
    let turn = StartedRun { lease, thread, run, input, intent: None };
    let mut progress = Progress::new(&turn);
    progress.taken_over(&turn.thread, content, before);
    let deadline = Instant::now() + time_left;
    let outcome = execute(&runs, &mut active, &turn, Begin::Unknown, progress, deadline).await;
    announce(&runs, &active, outcome);
}

/// Ends a run on which nobody works any more: first whatever still goes on upstream, then the run. If the upstream can
/// tell how it ended there, it ends so here.
pub(in crate::runs) async fn close_orphan(runs: Runs, active: ActiveRun, orphan: Orphan, before: Before) {
    let Orphan { lease, thread, run, content, .. } = orphan;
    let failure = if run.status == RunStatus::Cancelling { Failure::Cancelled } else { Failure::ReplicaLost };
    let turn = StartedRun { lease, thread, run, input: Vec::new(), intent: None };
    let mut progress = Progress::new(&turn);
    progress.taken_over(&turn.thread, content, before);
    let outcome = finish_run(&runs, &active, &turn, Err(failure), progress).await;
    announce(&runs, &active, outcome);
}

async fn execute(
    runs: &Runs,
    active: &mut ActiveRun,
    turn: &StartedRun,
    begin: Begin,
    mut progress: Progress,
    deadline: Instant,
) -> Option<Outcome> {
    let started = Instant::now();
    let parts = &runs.parts.given;
    // The configuration may have changed since the run was admitted.
    let assistant =
        parts.assistants.get(&turn.run.assistant).filter(|it| it.upstream == turn.thread.upstream);
    let upstream = parts.upstreams.get(&turn.thread.upstream);
    let result = match (upstream, assistant) {
        // What it was to say was known to another process alone.
        _ if turn.input.iter().any(|message| message.content.is_empty()) => Err(Failure::ReplicaLost),
        (Some(upstream), Some(assistant)) => {
            let rounds =
                Rounds { runs, upstream: &**upstream, assistant, turn, deadline, progress: &mut progress };
            rounds.go(active, begin).await?
        }
        _ => Err(Failure::NotConfigured),
    };
    if let Err(failure) = &result {
        tracing::warn!(
            upstream.name = turn.thread.upstream,
            failure = failure.name(),
            "the run did not reach its end upstream"
        );
    }
    if let Some(intent) = progress.intent.take() {
        // Nobody began to make it, and nobody will.
        let store = Arc::clone(&parts.store);
        parts.tasks.spawn(async move { resolve(&store, intent, Made::Nothing).await }.in_current_span());
    }
    let Some(outcome) = finish_run(runs, active, turn, result, progress).await else {
        tracing::warn!("let go of the run; others go on with it");
        return None;
    };
    tracing::info!(
        thread.id = %turn.thread.id,
        assistant = %turn.run.assistant,
        status = %outcome.run.status,
        error = outcome.run.error.as_ref().map(|error| error.code.as_str()),
        duration_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        "run ended"
    );
    Some(outcome)
}

/// The rounds of one turn: what is sent, what comes back, and the waits in between.
struct Rounds<'a> {
    runs: &'a Runs,
    upstream: &'a dyn Upstream,
    assistant: &'a AssistantConfig,
    turn: &'a StartedRun,
    deadline: Instant,
    progress: &'a mut Progress,
}

/// How the upstream ended a round, with what is left to read of its answer.
type Rounded = Result<(Ended, EventStream), Failure>;

impl Rounds<'_> {
    /// `None` if the run goes on in another process.
    async fn go(mut self, active: &mut ActiveRun, begin: Begin) -> Option<Rounded> {
        let mut waiting = None;
        let mut outputs = None;
        let mut is_unknown = false;
        match begin {
            Begin::Message => {}
            Begin::CutOff(failure) => return Some(Err(failure)),
            Begin::Unknown => is_unknown = true,
            Begin::Waiting(action) => waiting = Some(action),
            Begin::Outputs(given) => outputs = Some(given),
        }
        loop {
            if let Some(action) = waiting.take() {
                match self.wait(active, &action).await? {
                    Ok(given) => outputs = Some(given),
                    Err(failure) => return Some(Err(failure)),
                }
            }
            let round = match &outputs {
                Some(outputs) => Round::Outputs(outputs),
                None if std::mem::take(&mut is_unknown) => Round::Unknown,
                None => Round::Message,
            };
            let ended = match self.round(active, round).await {
                Ok((ended, rest)) if ended.asks() => {
                    drain(Some(rest)).await;
                    ended
                }
                end => return Some(end),
            };
            let action = RequiredAction { tool_calls: ended.tool_calls.clone() };
            self.progress.asked(ended);
            match self.pause(active, &action).await {
                Ok(()) => waiting = Some(action),
                Err(failure) => return Some(Err(failure)),
            }
        }
    }

    /// One request and what it leads to.
    async fn round(&mut self, active: &ActiveRun, round: Round<'_>) -> Rounded {
        let parts = &self.runs.parts.given;
        let (asking, mut asks) = watch::channel(false);
        let drive = Drive {
            runs: self.runs,
            upstream: self.upstream,
            assistant: self.assistant,
            turn: self.turn,
            log: &active.log,
            progress: self.progress,
            asking: &asking,
            permit: None,
        };
        let mut round = pin!(AssertUnwindSafe(drive.round(round)).catch_unwind());
        let cut = tokio::select! {
            biased;
            cut = cut_off(self.runs, active, self.deadline) => cut,
            result = &mut round => return result.unwrap_or(Err(Failure::Panic)),
        };
        if matches!(cut, Failure::LeaseLost | Failure::Stopped) {
            return Err(cut);
        }
        if self.upstream.capabilities().goes_on_unread {
            // The id by which it can be ended may be on its way.
            tokio::select! {
                biased;
                () = active.lost.cancelled() => return Err(Failure::LeaseLost),
                () = parts.stop.cancelled() => return Err(Failure::Stopped),
                _ = asks.wait_for(|asks| !asks) => {}
                _ = &mut round => {}
                () = sleep(HEARING) => {}
            }
        }
        Err(cut)
    }

    /// Lets the run wait: from here on the outputs may come, and whoever takes the run over knows what it said.
    async fn pause(&mut self, active: &ActiveRun, action: &RequiredAction) -> Result<(), Failure> {
        let pause = Pause {
            required_action: action.clone(),
            upstream_run_id: self.progress.upstream_run.clone(),
            content: self.progress.content.clone(),
            usage: self.progress.usage,
            events: active.log.unstored(Some(RunEvent::RequiresAction(action.clone().into()))),
        };
        let parts = &self.runs.parts.given;
        let paused = tokio::select! {
            biased;
            () = active.lost.cancelled() => return Err(Failure::LeaseLost),
            () = parts.stop.cancelled() => return Err(Failure::Stopped),
            () = sleep_until(self.deadline) => return Err(Failure::Deadline),
            paused = patiently_pause(self.runs, &self.turn.lease, &pause) => paused,
        };
        match paused {
            Ok(Paused::Waiting(_)) => {
                active.log.push(RunEvent::RequiresAction(action.clone().into()));
                active.log.all_stored();
                self.runs.parts.notifier.notify(News::Run(self.turn.run.id));
                Ok(())
            }
            Ok(Paused::Cancelling) => Err(Failure::Cancelled),
            Ok(Paused::Lost) => Err(Failure::LeaseLost),
            Err(error) => {
                tracing::error!(error = %Chain(&error), "cannot let the run wait for its tool outputs");
                Err(Failure::Store)
            }
        }
    }

    /// Waits for outputs of exactly these calls. `None` when this process stops: the run waits on in another one.
    async fn wait(
        &mut self,
        active: &mut ActiveRun,
        action: &RequiredAction,
    ) -> Option<Result<Vec<ToolOutput>, Failure>> {
        let parts = &self.runs.parts.given;
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
            () = active.lost.cancelled() => Some(Err(Failure::LeaseLost)),
            () = active.cancel.requested() => Some(Err(Failure::Cancelled)),
            given = answered => Some(Ok(given)),
            () = sleep_until(self.deadline) => Some(Err(Failure::Deadline)),
            () = parts.draining.cancelled() => None,
        }
    }
}

/// Resolves when a run at work has to stop before its end, with the reason.
async fn cut_off(runs: &Runs, active: &ActiveRun, deadline: Instant) -> Failure {
    tokio::select! {
        biased;
        () = active.lost.cancelled() => Failure::LeaseLost,
        () = runs.parts.given.stop.cancelled() => Failure::Stopped,
        () = active.cancel.requested() => Failure::Cancelled,
        () = sleep_until(deadline) => Failure::Deadline,
    }
}

/// Asks the store until it answers; an answer that is lost on its way does no harm.
async fn patiently_pause(runs: &Runs, lease: &RunLease, pause: &Pause) -> Result<Paused, StoreError> {
    loop {
        match runs.pause(lease, pause).await {
            Err(StoreError::Unavailable(_)) => sleep(jittered(Duration::from_millis(500))).await,
            paused => return paused,
        }
    }
}

/// How long the run may take, from now: the store has just set its deadline by its own clock.
fn time_left(run: &Run) -> Duration {
    run.deadline_at
        .zip(run.started_at)
        .and_then(|(deadline, start)| (deadline - start).to_std().ok())
        .unwrap_or_default()
}

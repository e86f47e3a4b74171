//! How runs end: what they leave upstream, where their messages stand then, and the commit before the announcement.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::time::sleep;

use crate::domain::{
    ContentPart, Context, EventBatch, Leftover, MessageId, MultitaskStrategy, Run, RunError, RunErrorCode,
    RunStatus, Step, Thread, ThreadActivity, ThreadState, UpstreamThreadId,
};
use crate::error::Chain;
use crate::runs::execution::failure::{Failure, internal, stopped};
use crate::runs::execution::prepare::{Removal, take_away};
use crate::runs::execution::progress::{Delivery, Progress};
use crate::runs::execution::relay::{drain, plain};
use crate::runs::execution::round::leftover;
use crate::runs::registry::{ActiveRun, Refused};
use crate::runs::{Outcome, RunEvent, Runs, jittered};
use crate::store::{
    Closing, Finished, News, Reply, RunEnd, RunLease, StartedRun, StoreError, Withdrawal, Withdrawn,
};
use crate::upstream::{Ended, EventStream, Settled};

/// How long to try to end what a run left upstream once the process is told to stop.
const LAST_SETTLE_TIMEOUT: Duration = Duration::from_secs(2);
/// How often the database may refuse an end before a simpler one is tried.
const MAX_REFUSALS: u32 = 3;
/// Pauses between tries to write an end. They double.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Ends a turn that came to an end upstream, or failed on the way there: first what it left upstream, then, with the
/// knowledge of what is there, the run. `None` if that is left to whoever goes on with the run.
pub(in crate::runs) async fn finish_run(
    runs: &Runs,
    active: &ActiveRun,
    turn: &StartedRun,
    result: Result<(Ended, EventStream), Failure>,
    mut progress: Progress,
) -> Option<Outcome> {
    let (result, rest) = match result {
        Ok((ended, rest)) => (Ok(ended), Some(rest)),
        // Who did not want to wait is not told so by the deadline either, nor is anything kept then.
        Err(Failure::Deadline) if progress.busy && turn.run.strategy == MultitaskStrategy::Reject => {
            (Err(Failure::Conflict { blocking_run: None }), None)
        }
        Err(failure) => (Err(failure), None),
    };
    let retry_after = result.as_ref().err().and_then(Failure::retry_after);
    // An end that the upstream tells itself has been told to the readers word by word.
    let mut shown = result.is_err().then(|| progress.shown());
    if matches!(result, Err(Failure::LeaseLost)) {
        return None;
    }
    let mut verdict = LocalOutcome::of(result, &mut progress);
    verdict.discard |= active.cancel.discards() && verdict.status == RunStatus::Cancelled;
    let mut traces = if verdict.is_clean() {
        UpstreamState::Clean
    } else {
        look_after(runs, active, turn, &progress, &verdict).await?
    };
    let finished = loop {
        let mut end =
            decide_outcome(&verdict, &traces, &progress, EventBatch { first: 0, events: Vec::new() });
        if let Some(rest) = shown.take().and_then(|shown| unshown(&shown, end.reply.as_ref()?)) {
            active.log.push(RunEvent::Delta(rest.into()));
        }
        match told_by(&end).filter(|_| runs.store().keeps_content()).and_then(|text| active.log.retold(&text))
        {
            Some(none) => (end.events, end.drops_log) = (none, true),
            None => end.events = active.log.rest(),
        }
        match finish_in_store(runs, &turn.lease, end).await {
            Closed::Finished(finished) => break Ok(finished),
            // It was to be removed all along, which only the store knew.
            Closed::MustDiscard => {
                (verdict.discard, verdict.status, verdict.error) = (true, RunStatus::Cancelled, None);
                traces = look_after(runs, active, turn, &progress, &verdict).await?;
            }
            other => break Err(other),
        }
    };
    let outcome = match finished {
        Ok(finished) => {
            let Finished { thread, activity, run, message } = *finished;
            Outcome { thread, activity, run, message, retry_after }
        }
        Err(Closed::Stopped) => unwritten(runs, &turn.thread, &turn.run)?,
        Err(_) => return None,
    };
    drain(rest).await;
    Some(outcome)
}

/// Ends a run that never started. `None` if that is left to others.
pub(in crate::runs) async fn finish_queued_run(
    runs: &Runs,
    active: &ActiveRun,
    lease: &RunLease,
    thread: &Thread,
    run: &Run,
    end: RunEnd,
) -> Option<Outcome> {
    let mut end = RunEnd { events: active.log.rest(), discard: active.cancel.discards(), ..end };
    loop {
        return match finish_in_store(runs, lease, end.clone()).await {
            Closed::Finished(finished) => {
                let Finished { thread, activity, run, message } = *finished;
                Some(Outcome { thread, activity, run, message, retry_after: None })
            }
            // It started just now, without this process knowing, and was to be removed at once.
            Closed::MustDiscard if !end.discard => {
                end.discard = true;
                continue;
            }
            Closed::Stopped => unwritten(runs, thread, run),
            Closed::LeaseLost | Closed::MustDiscard => None,
        };
    }
}

/// How a turn ended as far as the gateway saw it.
#[derive(Clone, Debug)]
struct LocalOutcome {
    status: RunStatus,
    error: Option<RunError>,
    /// A cancel, a deadline or a broken connection cut it off: the upstream may know of a better end.
    cut_off: bool,
    /// Where the thread stands upstream from now on, if the run moved it.
    thread: Option<UpstreamThreadId>,
    upstream_message_id: Option<String>,
    discard: bool,
}

impl LocalOutcome {
    /// Moves what was said into the progress.
    fn of(result: Result<Ended, Failure>, progress: &mut Progress) -> Self {
        let ended = match result {
            Ok(ended) => ended,
            Err(failure) => {
                let cut_off = failure.cuts_off();
                let discard = matches!(failure, Failure::Conflict { .. });
                let (status, error) = failure.end(progress.busy);
                let text = std::mem::take(&mut progress.text);
                if text.is_empty() {
                    progress.rounds_before = progress.content.len();
                } else {
                    progress.said(vec![ContentPart::Text { text }], None);
                }
                return Self { status, error, cut_off, thread: None, upstream_message_id: None, discard };
            }
        };
        let (status, error) = if let Ok(status) = RunStatus::InProgress.on(Step::End(ended.status)) {
            (status, ended.error)
        } else {
            let message =
                format!("the upstream ended the run with the status {}, which is none", ended.status);
            (RunStatus::Failed, Some(RunError { code: RunErrorCode::UpstreamFailed, message }))
        };
        if status != RunStatus::Completed {
            progress.open_calls = ended.tool_calls;
        }
        progress.said(ended.content, ended.usage);
        Self {
            status,
            error,
            cut_off: false,
            thread: ended.thread,
            upstream_message_id: ended.upstream_message_id,
            discard: false,
        }
    }

    fn is_clean(&self) -> bool {
        self.status == RunStatus::Completed && !self.discard
    }
}

/// What is known of a run's traces upstream.
#[derive(Clone, Debug)]
enum UpstreamState {
    /// All of it is there, as it should be.
    Clean,
    /// Nothing was taken.
    None,
    /// It was looked at. `removed`: and taken away.
    Seen { settled: Settled, removed: bool },
    /// It could not be looked at, or not taken away: to be done before the thread is used again.
    Unknown(Leftover),
}

/// Ends what the run left upstream, within a bound, and takes it away if it is to be discarded. `None` if the run was let
/// go of meanwhile: then others look after that.
async fn look_after(
    runs: &Runs,
    active: &ActiveRun,
    turn: &StartedRun,
    progress: &Progress,
    verdict: &LocalOutcome,
) -> Option<UpstreamState> {
    if runs.parts.registry.has_lapsed() {
        return None;
    }
    tokio::select! {
        biased;
        () = active.lost.cancelled() => None,
        traces = look(runs, turn, progress, verdict) => Some(traces),
    }
}

async fn look(runs: &Runs, turn: &StartedRun, progress: &Progress, verdict: &LocalOutcome) -> UpstreamState {
    if progress.delivery == Delivery::NotSent {
        return UpstreamState::None;
    }
    let parts = &runs.parts.given;
    let Some(upstream) = parts.upstreams.get(&turn.thread.upstream) else { return UpstreamState::None };
    // Without this the run cannot be ended, so it waits as long as the store takes.
    let stopped = async {
        parts.stop.cancelled().await;
        sleep(LAST_SETTLE_TIMEOUT).await;
    };
    let left = tokio::select! {
        left = leftover(runs, turn, progress) => left.ok(),
        () = stopped => None,
    };
    let Some(left) = left else { return UpstreamState::None };
    let left = Leftover { remove: verdict.discard, ..left };
    // A panic in here must not keep the run from ending.
    let look = take_away(runs, &turn.lease, &**upstream, &left, Removal::IfDiscarded);
    let seen = tokio::select! {
        seen = AssertUnwindSafe(look).catch_unwind() => seen,
        () = within(runs) => {
            tracing::warn!("what the run left upstream could not be ended in time");
            return UpstreamState::Unknown(left);
        }
    };
    match seen {
        // To be looked at once more before the thread is used again.
        Ok(Ok(settled)) if settled.unsure => UpstreamState::Unknown(left),
        Ok(Ok(settled)) => UpstreamState::Seen { settled, removed: left.remove },
        Ok(Err(failure)) => {
            tracing::warn!(error = failure.name(), "what the run left upstream could not be ended");
            UpstreamState::Unknown(left)
        }
        Err(_) => {
            tracing::error!("ending what the run left upstream panicked");
            UpstreamState::Unknown(left)
        }
    }
}

/// Resolves when the time to look after a run's traces is over.
async fn within(runs: &Runs) {
    let parts = &runs.parts.given;
    let last_moment = async {
        parts.stop.cancelled().await;
        sleep(LAST_SETTLE_TIMEOUT).await;
    };
    tokio::select! {
        () = sleep(parts.runs.settle_timeout) => {}
        () = last_moment => {}
    }
}

/// The end of a run, from what the gateway saw of it and what is left of it upstream. Pure.
///
/// The rules: a message whose run never reached the model is withheld from it for good; so is one whose run the
/// upstream reported as failed, unless the thread holds it, lest it break every turn to come. What else the thread lacks
/// goes along with the next turn, so that in the end the upstream thread and the transcript say the same.
fn decide_outcome(
    verdict: &LocalOutcome,
    traces: &UpstreamState,
    progress: &Progress,
    events: EventBatch,
) -> RunEnd {
    let mut end = RunEnd {
        status: verdict.status,
        error: verdict.error.clone(),
        usage: progress.usage,
        upstream_run_id: progress.upstream_run.clone(),
        unheard: progress.unacknowledged_requests,
        upstream_thread_id: verdict.thread.clone(),
        reply: None,
        said: Context::Present,
        synced: progress.synced,
        leftover: None,
        discard: verdict.discard,
        events,
        drops_log: false,
    };
    let mut content = progress.content.clone();
    let mut upstream_message_id = verdict.upstream_message_id.clone();
    let mut reply_context = Context::Present;
    match traces {
        UpstreamState::Clean => {}
        UpstreamState::None => {
            (end.said, reply_context, end.synced) = (Context::Withheld, Context::Withheld, false);
            (end.upstream_thread_id, upstream_message_id) = (None, None);
        }
        UpstreamState::Unknown(left) => {
            (end.said, reply_context, end.synced) = (Context::Unknown, Context::Unknown, false);
            (end.leftover, end.upstream_thread_id) = (Some(left.clone()), None);
            // What is not known to be there is no mark to go by.
            upstream_message_id = None;
        }
        UpstreamState::Seen { settled, removed } => {
            let late = verdict.cut_off && settled.status == Some(RunStatus::Completed) && !verdict.discard;
            if late {
                // It was done before the cancel, or whatever cut it off, came: then it is done here too.
                (end.status, end.error) = (RunStatus::Completed, None);
            }
            end.usage = settled.usage.or(end.usage);
            end.synced &= settled.said;
            // Where the run's own turn is not, the next one must not build on.
            let moved = settled.thread.clone().or(end.upstream_thread_id);
            end.upstream_thread_id = moved.filter(|_| settled.said);
            end.said = if settled.said {
                Context::Present
            } else if (verdict.status == RunStatus::Failed && !verdict.cut_off)
                || progress.delivery < Delivery::Accepted
            {
                Context::Withheld
            } else {
                Context::Missing
            };
            if settled.said && !settled.content.is_empty() {
                // On a chain it is that of the last round alone.
                content = if settled.thread.is_none() { Vec::new() } else { content_before(progress) };
                content.extend(settled.content.iter().cloned());
                upstream_message_id.clone_from(&settled.upstream_message_id);
            } else {
                reply_context = match end.said {
                    Context::Present => Context::Missing,
                    other => other,
                };
                upstream_message_id = None;
            }
            if *removed {
                // A chain that does not move has not taken in what went along either.
                end.synced &= settled.thread.is_none();
                end.upstream_thread_id = None;
            }
        }
    }
    if !verdict.discard && !content.is_empty() {
        end.reply =
            Some(Reply { id: MessageId::new(), content, upstream_message_id, context: reply_context });
    }
    end
}

/// What readers have yet to see of a reply: the upstream may have more of one that was cut off here. Whoever reads the
/// deltas alone shall have the whole text too.
fn unshown(shown: &str, reply: &Reply) -> Option<String> {
    let text: String = reply.content.iter().filter_map(plain).collect();
    text.strip_prefix(shown).filter(|rest| !rest.is_empty()).map(str::to_owned)
}

/// The text that the record tells of a run which ends well.
fn told_by(end: &RunEnd) -> Option<String> {
    let reply = end.reply.as_ref().filter(|_| end.status == RunStatus::Completed && !end.discard)?;
    Some(reply.content.iter().filter_map(plain).collect())
}

/// What the rounds before the last one said.
fn content_before(progress: &Progress) -> Vec<ContentPart> {
    progress.content[..progress.rounds_before].to_vec()
}

/// What became of the attempt to commit an end.
enum Closed {
    Finished(Box<Finished>),
    MustDiscard,
    /// The run is not ours to end.
    LeaseLost,
    /// The process is told to stop while the database is away.
    Stopped,
}

/// Commits the end, for as long as it takes: a run that has ended upstream must not stay open here. An end
/// that the database refuses time and again is replaced by a bare failure.
async fn finish_in_store(runs: &Runs, lease: &RunLease, end: RunEnd) -> Closed {
    let parts = &runs.parts.given;
    let mut end = Arc::new(end);
    let mut pause = FIRST_PAUSE;
    let mut refusals = 0;
    loop {
        let error = match parts.store.finish(lease, Arc::clone(&end)).await {
            Ok(Closing::Finished(finished)) => return Closed::Finished(finished),
            Ok(Closing::MustDiscard) => return Closed::MustDiscard,
            Ok(Closing::Lost) => return Closed::LeaseLost,
            Err(error) => error,
        };
        tracing::error!(error = %Chain(&error), "cannot record the end of a run yet");
        if parts.stop.is_cancelled() {
            return Closed::Stopped;
        }
        refusals += u32::from(!matches!(error, StoreError::Unavailable(_)));
        if refusals == MAX_REFUSALS {
            // One that is to be removed has to stay so, or the store asks for that again.
            let (unheard, discard, leftover) = (end.unheard, end.discard, end.leftover.clone());
            let bare = end_without_output(RunStatus::Failed, Some(internal()));
            end = Arc::new(RunEnd { unheard, leftover, discard, ..bare });
        } else if refusals == 2 * MAX_REFUSALS {
            end = Arc::new(RunEnd { leftover: None, ..(*end).clone() });
        }
        sleep(jittered(pause)).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Takes the message of a run back of which it is not known whether it was recorded: its sender heard that it was not, and
/// may say the same again. Asks for as long as the database is away; what it refuses stays as it is.
pub(in crate::runs) async fn withdraw(runs: &Runs, lease: &RunLease, refused: &Refused) -> Withdrawn {
    let parts = &runs.parts.given;
    let (status, error) = Failure::NotRecorded.end(false);
    let taken = Withdrawal {
        message: refused.message,
        idempotency_key: refused.idempotency_key.clone(),
        end: RunEnd { discard: true, ..end_without_output(status, error) },
    };
    let (mut pause, mut refusals) = (FIRST_PAUSE, 0);
    loop {
        match runs.withdraw_in_store(lease, &taken).await {
            Ok(withdrawn) => return withdrawn,
            Err(error) => {
                tracing::error!(error = %Chain(&error), "cannot take a refused message back yet");
                refusals += u32::from(!matches!(error, StoreError::Unavailable(_)));
            }
        }
        if refusals >= MAX_REFUSALS || parts.stop.is_cancelled() {
            return Withdrawn::Lost;
        }
        sleep(jittered(pause)).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// The outcome of a run whose end could not be written before the process had to stop. `None` if others can go on with
/// it.
fn unwritten(runs: &Runs, thread: &Thread, run: &Run) -> Option<Outcome> {
    let outcome = || Outcome {
        thread: thread.clone(),
        activity: ThreadActivity { state: ThreadState::Active, queue_depth: 0 },
        run: Run { status: RunStatus::Failed, error: Some(stopped()), ..run.clone() },
        message: None,
        retry_after: None,
    };
    (!runs.parts.given.store.keeps_content()).then(outcome)
}

/// Tells all who follow the run how it ended, and those who wait for its thread that it has. `None`: it has not ended
/// here, and is given up for whoever goes on with it.
pub(in crate::runs) fn announce(runs: &Runs, active: &ActiveRun, outcome: Option<Outcome>) {
    let notifier = &runs.parts.notifier;
    let Some(outcome) = outcome else { return notifier.release(active.lease) };
    let (thread, run) = (outcome.thread.id, outcome.run.id);
    let others_wait = outcome.activity.queue_depth > 0;
    if let Some(message) = &outcome.message {
        active.log.push(RunEvent::MessageCompleted(Arc::new(message.clone())));
    }
    active.log.push(RunEvent::Ended(Arc::new(outcome)));
    if active.log.is_public() {
        notifier.notify(News::Run(run));
    }
    if others_wait {
        notifier.notify(News::Thread(thread));
    }
}

/// The end of a run of which nothing went upstream.
pub(in crate::runs) fn end_without_output(status: RunStatus, error: Option<RunError>) -> RunEnd {
    RunEnd {
        status,
        error,
        usage: None,
        upstream_run_id: None,
        unheard: 0,
        upstream_thread_id: None,
        reply: None,
        said: Context::Withheld,
        synced: false,
        leftover: None,
        discard: false,
        events: EventBatch { first: 0, events: Vec::new() },
        drops_log: false,
    }
}

#[cfg(test)]
mod tests;

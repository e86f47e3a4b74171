//! A run's way through admission and its place in line to its turn, and the turn itself, as a task of its own.

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};
use tracing::Instrument;

use super::drive::{Progress, drain, drive};
use super::end::{
    Closed, Failure, announce, cancelled_end, end_of, failed_end, finish, finish_in_store, internal,
    lease_lost, partial, settle, stopped,
};
use super::replica::Working;
use super::{Outcome, RunEvent, Runs, Submitted, jittered};
use crate::domain::{ConversationKey, Run, RunError, RunErrorCode, RunStatus, Thread};
use crate::error::{Chain, Error};
use crate::locks::Place;
use crate::store::{Admission, Admitted, Claim, RunEnd, RunLease, Turn};
use crate::upstream::Leftover;

/// How often a run that is first in its line asks the store again while other replicas hold its thread; and at most,
/// for one without a place in line.
const CLAIM_POLL: Duration = Duration::from_millis(100);
const LONGEST_CLAIM_POLL: Duration = Duration::from_secs(1);
/// When to look again for an admission whose answer was lost; the last time is past any statement's time limit.
const VOID_AFTER: [Duration; 4] =
    [Duration::ZERO, Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(20)];

/// Records a message, waits for its turn and works on it. `answer` hears of the admission.
pub(super) async fn conduct(
    runs: Runs,
    working: Working,
    mut place: Place<ConversationKey>,
    admission: Admission,
    answer: oneshot::Sender<Result<Submitted, Error>>,
) {
    let span = tracing::info_span!("run", run.id = %admission.run_id, key = %admission.key.fingerprint());
    async move {
        let start = match admit(&runs, &mut place, &admission).await {
            Ok(start) => start,
            Err((error, is_ambiguous)) => {
                drop((answer.send(Err(error)), place));
                if is_ambiguous {
                    void(&runs, RunLease { run_id: admission.run_id, fence: 1 }).await;
                }
                return;
            }
        };
        place.recorded();
        working.feed.push(match start.next {
            Next::Work(_) => RunEvent::Started,
            Next::Wait { position, .. } => RunEvent::Queued { position },
        });
        let submitted = Submitted { thread: start.thread, run: start.run, feed: working.feed.feed() };
        // A caller that has left hears nothing; the run goes on.
        drop(answer.send(Ok(submitted.clone())));
        let turn = match start.next {
            Next::Work(turn) => Ok(*turn),
            Next::Wait { lease, .. } => {
                wait_for_turn(&runs, &working, Some(&mut place), lease, &submitted.thread, &submitted.run)
                    .await
            }
        };
        let outcome = match turn {
            Ok(turn) => work(&runs, &working, &turn).await,
            Err(outcome) => *outcome,
        };
        // First the place, then the news: whoever hears it finds the thread free.
        drop(place);
        announce(&working.feed, outcome);
    }
    .instrument(span)
    .await;
}

/// Waits for the turn of a queued run that was taken over from another replica, and works on it. The store alone
/// keeps its order: it has no place in this process's line.
pub(super) async fn resume_queued(runs: Runs, working: Working, lease: RunLease, thread: Thread, run: Run) {
    let outcome = match wait_for_turn(&runs, &working, None, lease, &thread, &run).await {
        Ok(turn) => work(&runs, &working, &turn).await,
        Err(outcome) => *outcome,
    };
    announce(&working.feed, outcome);
}

/// Ends a run on which nobody works any more: first whatever still goes on upstream, then the run.
pub(super) async fn bury(runs: Runs, working: Working, lease: RunLease, thread: Thread, run: Run) {
    let leftover = Leftover {
        thread: thread.upstream_thread_id.clone(),
        run: run.id,
        upstream_run: run.upstream_run_id.clone(),
        open_calls: Vec::new(),
    };
    if let Some(upstream) = runs.parts.given.upstreams.get(&thread.upstream) {
        settle(&runs, &**upstream, &leftover).await;
    }
    let error = RunError {
        code: RunErrorCode::ReplicaLost,
        message: "the gateway process that worked on the run died; the reply, if there was one, is lost"
            .to_owned(),
    };
    let failed =
        RunEnd { upstream_run_id: run.upstream_run_id.clone(), ..failed_end(RunStatus::Failed, error) };
    announce(&working.feed, finish(&runs, &lease, failed, &thread, &run, None).await);
}

/// A recorded run and what it does next.
struct Start {
    thread: Thread,
    run: Run,
    next: Next,
}

enum Next {
    Work(Box<Turn>),
    Wait { lease: RunLease, position: i64 },
}

/// The error comes with whether the run may have been recorded all the same.
async fn admit(
    runs: &Runs,
    place: &mut Place<ConversationKey>,
    admission: &Admission,
) -> Result<Start, (Error, bool)> {
    let parts = &runs.parts.given;
    if timeout(parts.admission_timeout, place.to_record()).await.is_err() {
        return Err((Error::StoreUnavailable(None), false));
    }
    match parts.store.admit(admission).await {
        Ok(Admitted::Started(turn)) => {
            Ok(Start { thread: turn.thread.clone(), run: turn.run.clone(), next: Next::Work(turn) })
        }
        Ok(Admitted::Queued { lease, thread, run, position }) => {
            Ok(Start { thread: *thread, run: *run, next: Next::Wait { lease, position } })
        }
        Ok(Admitted::Busy) => Err((Error::ThreadBusy, false)),
        Ok(Admitted::OtherUpstream(thread)) => {
            Err((Error::OtherUpstream { thread, assistant: admission.assistant.clone() }, false))
        }
        Err(error) => Err((error.into(), true)),
    }
}

/// Ends a run of which it is not known whether it was, or still will be, recorded: its sender heard that it was not.
/// What appears later than this looks is found as a stray.
async fn void(runs: &Runs, lease: RunLease) {
    let message = "the database failed while the message was recorded; its sender was told so".to_owned();
    let end = failed_end(RunStatus::Failed, RunError { message, ..internal() });
    for pause in VOID_AFTER {
        tokio::select! {
            biased;
            () = runs.parts.given.draining.cancelled() => {}
            () = sleep(pause) => {}
        }
        let done = finish_in_store(runs, &lease, end.clone()).await;
        if matches!(done, Closed::Finished(_)) || runs.parts.given.draining.is_cancelled() {
            return;
        }
    }
}

/// Waits in line, then until the store lets the run start. The outcome, if it ended instead.
async fn wait_for_turn(
    runs: &Runs,
    working: &Working,
    mut place: Option<&mut Place<ConversationKey>>,
    lease: RunLease,
    thread: &Thread,
    run: &Run,
) -> Result<Turn, Box<Outcome>> {
    let parts = &runs.parts.given;
    let longest = if place.is_some() { CLAIM_POLL } else { LONGEST_CLAIM_POLL };
    let claimed = async {
        if let Some(place) = &mut place {
            place.turn().await;
        }
        let mut pause = CLAIM_POLL;
        loop {
            match parts.store.claim(&lease).await {
                Ok(Claim::Started(turn)) => return Some(turn),
                Ok(Claim::Lost) => return None,
                Ok(Claim::NotYet) => {}
                Err(error) => {
                    tracing::warn!(
                        error = %Chain(&error),
                        "cannot start a waiting run yet"
                    );
                    pause = LONGEST_CLAIM_POLL;
                }
            }
            sleep(jittered(pause)).await;
            pause = (pause * 2).min(longest);
        }
    };
    let end = tokio::select! {
        biased;
        () = parts.stop.cancelled() => None,
        () = working.cancel.cancelled() => Some(cancelled_end()),
        claimed = claimed => {
            let Some(turn) = claimed else { return Err(Box::new(lease_lost(runs, thread, run).await)) };
            working.feed.push(RunEvent::Started);
            return Ok(*turn);
        }
    };
    let end = match (end, place) {
        (Some(cancelled), _) => cancelled,
        (None, place) => {
            // All that wait end now: in line, so that their messages come into the transcript in their order.
            if let Some(place) = place {
                place.turn().await;
            }
            failed_end(RunStatus::Failed, stopped())
        }
    };
    Err(Box::new(finish(runs, &lease, end, thread, run, None).await))
}

/// Does the turn and commits its end, whatever happens on the way.
async fn work(runs: &Runs, working: &Working, turn: &Turn) -> Outcome {
    let started = Instant::now();
    let parts = &runs.parts.given;
    let Turn { lease, thread, run, .. } = turn;
    // The configuration may have changed since the run was admitted.
    let assistant = parts.assistants.get(&run.assistant).filter(|it| it.upstream == thread.upstream);
    let upstream = parts.upstreams.get(&thread.upstream);
    let mut progress = Progress::default();
    let result = match (upstream, assistant) {
        (Some(upstream), Some(assistant)) => {
            let drive = drive(runs, &**upstream, assistant, turn, &mut progress, &working.feed);
            tokio::select! {
                biased;
                () = parts.stop.cancelled() => Err(Failure::Stopped),
                () = working.cancel.cancelled() => Err(Failure::Cancelled),
                () = sleep(time_left(run)) => Err(Failure::Deadline),
                result = AssertUnwindSafe(drive).catch_unwind() => result.unwrap_or(Err(Failure::Panic)),
            }
        }
        _ => Err(Failure::NotConfigured),
    };
    if let Err(failure) = &result {
        tracing::warn!(failure = failure.name(), "the run did not reach its end upstream");
    }
    let (mut end, retry_after, unclean, open_calls, rest) = match result {
        Ok((ended, rest)) => {
            let (unclean, calls) = (ended.status != RunStatus::Completed, ended.tool_calls.clone());
            (end_of(ended), None, unclean, calls, Some(rest))
        }
        Err(failure) => {
            let (unclean, retry_after) = (failure.may_leave_something(), failure.retry_after());
            (failure.end(progress.busy), retry_after, unclean, Vec::new(), None)
        }
    };
    let leftover = Leftover {
        thread: progress.thread.or_else(|| thread.upstream_thread_id.clone()),
        run: run.id,
        upstream_run: progress.upstream_run.clone(),
        open_calls,
    };
    if let (true, Some(upstream)) = (unclean, upstream) {
        settle(runs, &**upstream, &leftover).await;
    }
    end.upstream_run_id = progress.upstream_run;
    end.reply = end.reply.or_else(|| partial(progress.text));
    let (status, error) = (end.status, end.error.as_ref().map(|error| error.code.as_str()));
    let (outcome, ()) = tokio::join!(finish(runs, lease, end, thread, run, retry_after), drain(rest));
    tracing::info!(
        thread.id = %thread.id,
        assistant = %run.assistant,
        %status,
        error,
        duration_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        "run ended"
    );
    outcome
}

/// How long the run may take, from now: the store has just set its deadline by its own clock.
fn time_left(run: &Run) -> Duration {
    run.deadline_at
        .zip(run.started_at)
        .and_then(|(deadline, start)| (deadline - start).to_std().ok())
        .unwrap_or_default()
}

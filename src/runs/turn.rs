//! A run's way through admission and its place in line to its turn, and the turn itself, as a task of its own.

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};
use tracing::Instrument;

use super::drive::{Progress, drive};
use super::end::{
    Failure, end_of, failed_end, finish, finish_in_store, lease_lost, partial, settle, stopped,
};
use super::feed::FeedWriter;
use super::{RunEvent, Runs, Submitted, jittered};
use crate::domain::{ConversationKey, Run, RunError, RunErrorCode, RunStatus, Thread};
use crate::error::Error;
use crate::locks::Place;
use crate::store::{Admission, Admitted, Claim, RunEnd, RunLease, Turn};
use crate::upstream::Leftover;

/// How often a waiting run asks the store again while other replicas hold its thread.
const CLAIM_POLL: Duration = Duration::from_millis(100);

/// Records a message, waits for its turn and works on it. `answer` hears of the admission.
pub(super) async fn conduct(
    runs: Runs,
    mut place: Place<ConversationKey>,
    admission: Admission,
    answer: oneshot::Sender<Result<Submitted, Error>>,
) {
    let span = tracing::info_span!("run", run.id = %admission.run_id, key = %admission.key.fingerprint());
    async move {
        // A caller that has left hears nothing; the run goes on.
        let feed = FeedWriter::default();
        match admit(&runs, &mut place, &admission, &feed).await {
            Err(error) => drop(answer.send(Err(error))),
            Ok(Start { thread, run, next }) => {
                place.recorded();
                let submitted = Submitted { thread, run, feed: feed.feed() };
                drop(answer.send(Ok(submitted.clone())));
                let turn = match next {
                    Next::Work(turn) => Some(*turn),
                    Next::Wait(lease) => {
                        wait_for_turn(&runs, Some(&mut place), lease, submitted.thread, submitted.run, &feed)
                            .await
                    }
                };
                if let Some(turn) = turn {
                    work(&runs, &turn, &feed).await;
                }
            }
        }
        drop(place);
    }
    .instrument(span)
    .await;
}

/// Waits for the turn of a queued run that was taken over from another replica, and works on it. The store alone
/// keeps its order: it has no place in this process's line.
pub(super) async fn resume_queued(runs: Runs, lease: RunLease, thread: Thread, run: Run) {
    let feed = FeedWriter::default();
    if let Some(turn) = wait_for_turn(&runs, None, lease, thread, run, &feed).await {
        work(&runs, &turn, &feed).await;
    }
}

/// Ends a run whose replica died while it was at work: first whatever still goes on upstream, then the run.
pub(super) async fn bury(runs: Runs, lease: RunLease, thread: Thread, run: Run) {
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
    finish(&runs, &lease, failed, &thread, &run, None, &FeedWriter::default()).await;
}

/// A recorded run and what it does next.
struct Start {
    thread: Thread,
    run: Run,
    next: Next,
}

enum Next {
    Work(Box<Turn>),
    Wait(RunLease),
}

async fn admit(
    runs: &Runs,
    place: &mut Place<ConversationKey>,
    admission: &Admission,
    feed: &FeedWriter,
) -> Result<Start, Error> {
    let parts = &runs.parts.given;
    if timeout(parts.admission_timeout, place.to_record()).await.is_err() {
        return Err(Error::StoreUnavailable(None));
    }
    match parts.store.admit(admission).await {
        Ok(Admitted::Started(turn)) => {
            feed.push(RunEvent::Started);
            Ok(Start { thread: turn.thread.clone(), run: turn.run.clone(), next: Next::Work(turn) })
        }
        Ok(Admitted::Queued { lease, thread, run, position }) => {
            feed.push(RunEvent::Queued { position });
            Ok(Start { thread: *thread, run: *run, next: Next::Wait(lease) })
        }
        Ok(Admitted::Busy) => Err(Error::ThreadBusy),
        Ok(Admitted::OtherUpstream(thread)) => {
            Err(Error::OtherUpstream { thread, assistant: admission.assistant.clone() })
        }
        Err(error) => {
            // The statement may have been carried out although its answer was lost. The caller hears that it was
            // not, so it must not run: a task of its own sees to that, and holds no place in line meanwhile,
            // since the store orders whatever else comes.
            parts
                .tasks
                .spawn(void(runs.clone(), RunLease { run_id: admission.run_id, fence: 1 }).in_current_span());
            Err(error.into())
        }
    }
}

/// Ends a run of which it is not known whether it was ever recorded.
async fn void(runs: Runs, lease: RunLease) {
    let error = RunError {
        code: RunErrorCode::Internal,
        message: "the database failed while the message was recorded; its sender was told so".to_owned(),
    };
    let end = failed_end(RunStatus::Failed, error);
    drop(finish_in_store(&runs, &lease, end).await);
}

/// Waits in line, then until the store lets the run start. `None` if it ended instead.
async fn wait_for_turn(
    runs: &Runs,
    place: Option<&mut Place<ConversationKey>>,
    lease: RunLease,
    thread: Thread,
    run: Run,
    feed: &FeedWriter,
) -> Option<Turn> {
    let parts = &runs.parts.given;
    let claimed = async {
        if let Some(place) = place {
            place.turn().await;
        }
        loop {
            match parts.store.claim(&lease).await {
                Ok(Claim::Started(turn)) => return Some(turn),
                Ok(Claim::Lost) => return None,
                Ok(Claim::NotYet) => sleep(jittered(CLAIM_POLL)).await,
                Err(error) => {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "cannot start a waiting run yet"
                    );
                    sleep(jittered(CLAIM_POLL * 5)).await;
                }
            }
        }
    };
    tokio::select! {
        biased;
        () = parts.stop.cancelled() => {
            let end = failed_end(RunStatus::Failed, stopped());
            finish(runs, &lease, end, &thread, &run, None, feed).await;
            None
        }
        claimed = claimed => {
            if let Some(turn) = claimed {
                feed.push(RunEvent::Started);
                Some(*turn)
            } else {
                lease_lost(runs, &thread, &run, feed).await;
                None
            }
        }
    }
}

/// Does the turn and ends it, whatever happens on the way.
async fn work(runs: &Runs, turn: &Turn, feed: &FeedWriter) {
    let started = Instant::now();
    let parts = &runs.parts.given;
    let Turn { lease, thread, run, .. } = turn;
    let upstream = parts.upstreams.get(&thread.upstream).zip(parts.assistants.get(&run.assistant));
    let mut progress = Progress::default();
    let result = match upstream {
        None => Err(Failure::NotConfigured),
        Some((upstream, _)) => {
            let limit = deadline_of(run);
            let drive = AssertUnwindSafe(drive(runs, &**upstream, turn, &mut progress, feed)).catch_unwind();
            tokio::select! {
                biased;
                () = parts.stop.cancelled() => Err(Failure::Stopped),
                () = sleep(limit) => Err(Failure::Deadline),
                result = drive => result.unwrap_or(Err(Failure::Panic)),
            }
        }
    };
    if let Err(failure) = &result {
        tracing::warn!(failure = failure.name(), "the run did not reach its end upstream");
    }
    let (mut end, retry_after, unclean, open_calls) = match result {
        Ok(ended) => {
            let unclean = ended.status != RunStatus::Completed;
            let calls = ended.tool_calls.clone();
            (end_of(ended), None, unclean, calls)
        }
        Err(failure) => {
            let unclean = failure.may_leave_something();
            let retry_after = failure.retry_after();
            (failure.end(progress.busy), retry_after, unclean, Vec::new())
        }
    };
    let leftover = Leftover {
        thread: progress.thread.clone().or_else(|| thread.upstream_thread_id.clone()),
        run: run.id,
        upstream_run: progress.upstream_run.clone(),
        open_calls,
    };
    if let (true, Some((upstream, _))) = (unclean, upstream) {
        settle(runs, &**upstream, &leftover).await;
    }
    end.upstream_run_id = progress.upstream_run;
    end.reply = end.reply.or_else(|| partial(progress.text));
    let (status, error) = (end.status, end.error.as_ref().map(|error| error.code.as_str()));
    finish(runs, lease, end, thread, run, retry_after, feed).await;
    tracing::info!(
        thread.id = %thread.id,
        assistant = %run.assistant,
        %status,
        error,
        duration_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        "run ended"
    );
}

/// How long the run may take, from now: the store has just set its deadline by its own clock.
fn deadline_of(run: &Run) -> Duration {
    run.deadline_at
        .zip(run.started_at)
        .and_then(|(deadline, start)| (deadline - start).to_std().ok())
        .unwrap_or_default()
}

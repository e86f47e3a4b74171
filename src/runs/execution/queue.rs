//! A run's way through admission and its place in line to its turn, as a task of its own.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};
use tracing::Instrument;

use crate::domain::{ConversationKey, MultitaskStrategy, Run, RunStatus, Step, TenantKey, Thread, ThreadId};
use crate::error::{Chain, Error};
use crate::locks::{Permit, Share, Ticket};
use crate::runs::execution::failure::{Failure, stopped};
use crate::runs::execution::finish::{announce, end_without_output, finish_queued_run, withdraw};
use crate::runs::execution::task::work;
use crate::runs::registry::{ActiveRun, Refused};
use crate::runs::service::subscription::RunSubscription;
use crate::runs::{Outcome, RunEvent, Runs, Submitted, jittered, span_of};
use crate::store::{Admission, Admitted, Claim, News, NotWritten, Orphan, RunLease, StartedRun, Withdrawn};

/// How soon a run that is first in its line asks the store again while a run of another line is active on its thread. It
/// doubles up to the longest, for whoever ends that one tells it.
const FIRST_CLAIM_POLL: Duration = Duration::from_millis(100);
const LONGEST_CLAIM_POLL: Duration = Duration::from_secs(1);
/// How often an idempotency key may be in use, and stand for nothing when it is looked up.
const MAX_REPEATS: u32 = 3;
/// When to look again for an admission whose answer was lost; the last time is past any statement's time limit.
const TAKE_BACK_AFTER: [Duration; 4] =
    [Duration::ZERO, Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(20)];

/// What a message holds on its way to its run.
pub(in crate::runs) struct Held {
    pub(in crate::runs) place: Ticket<ConversationKey, ThreadId>,
    pub(in crate::runs) seat: Permit<TenantKey>,
    /// Of the bytes that may wait on a thread.
    pub(in crate::runs) queued: Permit<ConversationKey>,
    /// Of the memory for what callers send.
    pub(in crate::runs) share: Share,
}

/// Records a message, waits for its turn and works on it. `answer` hears of the admission.
pub(in crate::runs) async fn run_task(
    runs: Runs,
    mut active: ActiveRun,
    held: Held,
    admission: Arc<Admission>,
    answer: oneshot::Sender<Result<Submitted, Error>>,
) {
    let Held { mut place, seat: _seat, queued, mut share } = held;
    let span = span_of(admission.run_id, &admission.key, &runs.parts.given.fingerprints);
    async move {
        let start = match admit(&runs, &mut place, &admission).await {
            Ok(Ok(start)) => start,
            Ok(Err(run_of_others)) => {
                drop(place);
                // Whoever left need not hear it.
                return drop(answer.send(Ok(*run_of_others)));
            }
            Err((error, is_ambiguous)) => {
                let refused = Refused::of(&admission);
                if is_ambiguous {
                    runs.parts.registry.refuse(admission.run_id, refused.clone());
                }
                drop((answer.send(Err(error)), place));
                if is_ambiguous {
                    take_back(runs, active, RunLease { run_id: admission.run_id, fence: 1 }, &refused).await;
                }
                return;
            }
        };
        place.recorded(start.thread.id);
        active.log.push(match start.next {
            Next::Work(_) => RunEvent::Started,
            Next::Wait { position, .. } => RunEvent::Queued { position },
        });
        let Start { thread, run, next } = start;
        let follow = RunSubscription::live(&runs, &thread, run.id, active.log.reader());
        let submitted = Submitted { thread: thread.clone(), run: run.clone(), follow, replayed: false };
        // A caller that has left hears nothing; the run goes on.
        drop(answer.send(Ok(submitted)));
        drop(admission);
        let turn = match next {
            Next::Work(turn) => Ok(*turn),
            Next::Wait { lease, .. } => {
                // What waits is in the store alone, if that keeps it.
                if runs.store().keeps_content() {
                    share.give_back();
                }
                let line = Some((&mut place, &mut share));
                wait_for_turn(&runs, &active, line, lease, &thread, &run).await
            }
        };
        drop(queued);
        let outcome = match turn {
            Ok(turn) => {
                place.started();
                work(&runs, &mut active, turn).await
            }
            Err(outcome) => outcome.map(|outcome| *outcome),
        };
        // First the place, then the news: whoever hears it finds the thread free.
        drop(place);
        announce(&runs, &active, outcome);
    }
    .instrument(span)
    .await;
}

/// Waits for the turn of a queued run that was taken over from another replica, and works on it. The store alone
/// keeps its order: it has no place in this process's line.
pub(in crate::runs) async fn resume_queued(runs: Runs, mut active: ActiveRun, orphan: Orphan) {
    let Orphan { lease, thread, run, .. } = orphan;
    let outcome = match wait_for_turn(&runs, &active, None, lease, &thread, &run).await {
        Ok(turn) => work(&runs, &mut active, turn).await,
        Err(outcome) => outcome.map(|outcome| *outcome),
    };
    announce(&runs, &active, outcome);
}

/// Ends queued runs that were taken over and can never start, in their order.
pub(in crate::runs) async fn give_up(runs: Runs, queued: Vec<(ActiveRun, Orphan)>) {
    for (active, Orphan { lease, thread, run, .. }) in queued {
        let (status, error) = Failure::ReplicaLost.end(false);
        let end = end_without_output(status, error);
        let outcome = finish_queued_run(&runs, &active, &lease, &thread, &run, end).await;
        announce(&runs, &active, outcome);
    }
}

/// A recorded run and what it does next.
struct Start {
    thread: Thread,
    run: Run,
    next: Next,
}

enum Next {
    Work(Box<StartedRun>),
    Wait { lease: RunLease, position: i64 },
}

/// The run, or that of others which the message has joined or repeats. The error comes with whether the run may have been
/// recorded all the same.
async fn admit(
    runs: &Runs,
    place: &mut Ticket<ConversationKey, ThreadId>,
    admission: &Arc<Admission>,
) -> Result<Result<Start, Box<Submitted>>, (Error, bool)> {
    let parts = &runs.parts.given;
    if timeout(parts.admission_timeout, place.to_record()).await.is_err() {
        return Err((Error::StoreUnavailable(None), false));
    }
    let mut admitted = runs.admit(admission).await;
    for _ in 0..MAX_REPEATS {
        let Ok(Admitted::Repeated) = admitted else { break };
        match runs.repeated(&admission.key, admission.idempotency.as_ref()).await {
            Ok(Some(earlier)) => return Ok(Err(Box::new(earlier))),
            // What its key stood for has been deleted since.
            Ok(None) => admitted = runs.admit(admission).await,
            Err(error) => return Err((error, false)),
        }
    }
    match admitted {
        Ok(Admitted::Started(turn)) => {
            Ok(Ok(Start { thread: turn.thread.clone(), run: turn.run.clone(), next: Next::Work(turn) }))
        }
        Ok(Admitted::Queued { lease, thread, run, position }) => {
            Ok(Ok(Start { thread: *thread, run: *run, next: Next::Wait { lease, position } }))
        }
        Ok(Admitted::Merged { thread, run }) => {
            let follow = RunSubscription::of(runs, &thread, run.id);
            let submitted = Submitted { thread: *thread, run: *run, follow, replayed: false };
            Ok(Err(Box::new(submitted)))
        }
        Ok(Admitted::Repeated) => Err((Error::StoreUnavailable(None), false)),
        Ok(Admitted::Busy) => Err((Error::ThreadBusy, false)),
        Ok(Admitted::OtherUpstream(thread)) => {
            Err((Error::OtherUpstream { thread, assistant: admission.assistant.clone() }, false))
        }
        Err(NotWritten::Lost(error)) if admission.strategy == MultitaskStrategy::Merge => {
            Err((Error::MaybeMerged(error), true))
        }
        Err(NotWritten::Lost(error)) => Err((error.into(), true)),
        Err(NotWritten::Unsent(error) | NotWritten::Refused(error)) => Err((error.into(), false)),
    }
}

/// Takes a message back of which it is not known whether it was, or still will be, recorded: its sender heard that it was
/// not. What appears later than this looks is found as a stray.
async fn take_back(runs: Runs, active: ActiveRun, lease: RunLease, refused: &Refused) {
    for pause in TAKE_BACK_AFTER {
        tokio::select! {
            biased;
            () = runs.parts.given.draining.cancelled() => {}
            () = sleep(pause) => {}
        }
        match withdraw(&runs, &lease, refused).await {
            Withdrawn::Lost if runs.parts.given.draining.is_cancelled() => return,
            Withdrawn::Lost => {}
            withdrawn => {
                runs.parts.registry.was_refused(lease.run_id);
                let active = runs.parts.registry.goes_on_for_others(active);
                return go_on_for_others(runs, active, lease, withdrawn).await;
            }
        }
    }
}

/// Works on a run that others have joined although its own message was refused.
pub(in crate::runs) async fn go_on_for_others(
    runs: Runs,
    mut active: ActiveRun,
    lease: RunLease,
    withdrawn: Withdrawn,
) {
    let Withdrawn::Shared { thread, run, position } = withdrawn else { return };
    tracing::warn!("the run's own message was refused; it goes on with those that joined it");
    active.log.push(RunEvent::Queued { position });
    let outcome = match wait_for_turn(&runs, &active, None, lease, &thread, &run).await {
        Ok(turn) => work(&runs, &mut active, turn).await,
        Err(outcome) => outcome.map(|outcome| *outcome),
    };
    announce(&runs, &active, outcome);
}

/// Waits in line, then for memory, then until the store lets the run start. The outcome, if it ended instead; `None` if others go on with
/// it.
async fn wait_for_turn(
    runs: &Runs,
    active: &ActiveRun,
    mut line: Option<(&mut Ticket<ConversationKey, ThreadId>, &mut Share)>,
    lease: RunLease,
    thread: &Thread,
    run: &Run,
) -> Result<StartedRun, Option<Box<Outcome>>> {
    let why = {
        let mut pause = FIRST_CLAIM_POLL;
        let mut freed = runs.parts.notifier.subscribe(News::Thread(thread.id));
        displace(runs, run, &lease).await;
        loop {
            if let Some((place, share)) = &mut line {
                let turn = async {
                    place.turn().await;
                    share.take_again().await;
                };
                tokio::select! {
                    biased;
                    why = called_off(runs, active) => break why,
                    () = turn => {}
                }
            }
            // Not to be dropped half-way: the run may have started by then.
            match runs.claim(&lease).await {
                Ok(Claim::Started(turn)) => {
                    active.log.push(RunEvent::Started);
                    return Ok(*turn);
                }
                Ok(Claim::Lost) => return Err(None),
                Ok(Claim::NotYet) => displace(runs, run, &lease).await,
                Err(error) => {
                    tracing::warn!(
                        error = %Chain(&error),
                        "cannot start a waiting run yet"
                    );
                    pause = LONGEST_CLAIM_POLL;
                }
            }
            tokio::select! {
                biased;
                why = called_off(runs, active) => break why,
                () = freed.changed() => {}
                () = sleep(jittered(pause)) => pause = (pause * 2).min(LONGEST_CLAIM_POLL),
            }
        }
    };
    let end = match why {
        CalledOff::LetGo => return Err(None),
        CalledOff::Cancelled => {
            end_without_output(RunStatus::Queued.on(Step::Cancel).unwrap_or(RunStatus::Cancelled), None)
        }
        CalledOff::Stopped => {
            // All that wait end now: in line, so that their messages come into the transcript in their order.
            if let Some((place, _)) = line {
                place.turn().await;
            }
            end_without_output(RunStatus::Failed, Some(stopped()))
        }
    };
    Err(finish_queued_run(runs, active, &lease, thread, run, end).await.map(Box::new))
}

/// Why a run need not wait any longer.
enum CalledOff {
    /// The process stops.
    Stopped,
    /// Somebody wants it to end.
    Cancelled,
    /// Others have taken it over, or shall.
    LetGo,
}

/// Resolves when a run need not wait any longer.
async fn called_off(runs: &Runs, active: &ActiveRun) -> CalledOff {
    tokio::select! {
        biased;
        () = active.lost.cancelled() => CalledOff::LetGo,
        () = runs.parts.given.stop.cancelled() => CalledOff::Stopped,
        () = active.cancel.requested() => CalledOff::Cancelled,
        () = others_take_over(runs) => CalledOff::LetGo,
    }
}

/// Resolves when this process stops and other replicas can go on with what waits.
async fn others_take_over(runs: &Runs) {
    if !runs.store().keeps_content() {
        std::future::pending::<()>().await;
    }
    runs.parts.given.draining.cancelled().await;
    runs.parts.notifier.has_peers().await;
}

/// Has the run that is active before this one cancelled, if that is what this one's strategy wants. What cannot be
/// asked now is asked again with the next try to start.
async fn displace(runs: &Runs, run: &Run, lease: &RunLease) {
    let discard = match run.strategy {
        MultitaskStrategy::Interrupt => false,
        MultitaskStrategy::Rollback => true,
        MultitaskStrategy::Enqueue | MultitaskStrategy::Reject | MultitaskStrategy::Merge => return,
    };
    match runs.parts.given.store.displace(lease, discard).await {
        // Another replica's run is ended by that replica, which looks for such requests.
        Ok(Some(active)) => match runs.parts.registry.handle(active) {
            Some(handle) => handle.cancel.request(discard),
            None => runs.parts.notifier.notify(News::Asked(active)),
        },
        Ok(None) => {}
        Err(error) => {
            tracing::warn!(error = %Chain(&error), "cannot have the active run cancelled yet");
        }
    }
}

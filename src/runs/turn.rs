//! One run from admission to its end, as a task of its own.
//!
//! `conduct` takes a message through admission and its place in line; `work` does the turn: the upstream call,
//! bounded by the deadline, and the end, committed before it is announced.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use rand::RngExt;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};
use tracing::Instrument;

use super::{Feed, Outcome, RunEvent, Runs, Submitted};
use crate::domain::{
    ContentPart, ConversationKey, Message, MessageId, Run, RunError, RunErrorCode, RunStatus, Thread,
    ThreadActivity, ThreadState, ToolCall, UpstreamRunId, UpstreamThreadId,
};
use crate::error::Error;
use crate::locks::Place;
use crate::store::{Admission, Admitted, Claim, Finished, Reply, RunEnd, RunLease, Turn};
use crate::upstream::{Ended, Leftover, Ownership, StartRun, Upstream, UpstreamError, UpstreamEvent};

/// What each streamed piece of a reply counts at least towards the limit on replies, bytes: the log of a run keeps
/// the pieces apart.
const MIN_PIECE_COST: usize = 64;
/// Messages read at a time when an upstream thread is made again.
const HISTORY_PAGE: u32 = 500;
/// How often a waiting run asks the store again while other replicas hold its thread.
const CLAIM_POLL: Duration = Duration::from_millis(100);
/// How long to try to end what a run left upstream once the process is told to stop.
const LAST_SETTLE_TIMEOUT: Duration = Duration::from_secs(2);

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
        let feed = Feed::new();
        match admit(&runs, &mut place, &admission, &feed).await {
            Err(error) => drop(answer.send(Err(error))),
            Ok(Start { thread, run, next }) => {
                place.recorded();
                let submitted = Submitted { thread, run, feed: Arc::clone(&feed) };
                drop(answer.send(Ok(submitted.clone())));
                let turn = match next {
                    Next::Work(turn) => Some(*turn),
                    Next::Wait(lease) => {
                        wait_for_turn(&runs, Some(&mut place), lease, submitted.thread, submitted.run, &feed)
                            .await
                    }
                };
                if let Some(turn) = turn {
                    work(&runs, turn, &feed).await;
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
    let feed = Feed::new();
    if let Some(turn) = wait_for_turn(&runs, None, lease, thread, run, &feed).await {
        work(&runs, turn, &feed).await;
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
    finish(&runs, &lease, &failed, thread, run, None, &Feed::new()).await;
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
    feed: &Feed,
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
    drop(finish_in_store(&runs, &lease, &end).await);
}

/// Waits in line, then until the store lets the run start. `None` if it ended instead.
async fn wait_for_turn(
    runs: &Runs,
    place: Option<&mut Place<ConversationKey>>,
    lease: RunLease,
    thread: Thread,
    run: Run,
    feed: &Feed,
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
            finish(runs, &lease, &end, thread, run, None, feed).await;
            None
        }
        claimed = claimed => {
            if let Some(turn) = claimed {
                feed.push(RunEvent::Started);
                Some(*turn)
            } else {
                lease_lost(thread, run, feed);
                None
            }
        }
    }
}

/// Does the turn and ends it, whatever happens on the way.
async fn work(runs: &Runs, turn: Turn, feed: &Feed) {
    let started = Instant::now();
    let parts = &runs.parts.given;
    let Turn { lease, thread, run, .. } = &turn;
    let upstream = parts.upstreams.get(&thread.upstream).zip(parts.assistants.get(&run.assistant));
    let mut progress = Progress::default();
    let result = match upstream {
        None => Err(Failure::NotConfigured),
        Some((upstream, _)) => {
            let limit = deadline_of(run);
            let drive = AssertUnwindSafe(drive(runs, &**upstream, &turn, &mut progress, feed)).catch_unwind();
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
    finish(runs, lease, &end, thread.clone(), run.clone(), retry_after, feed).await;
    tracing::info!(
        thread.id = %thread.id,
        assistant = %run.assistant,
        status = %end.status,
        error = end.error.as_ref().map(|error| error.code.as_str()),
        duration_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        "run ended"
    );
}

/// What is known of a turn while it goes on; it survives when the turn is cut off.
#[derive(Default)]
struct Progress {
    thread: Option<UpstreamThreadId>,
    upstream_run: Option<UpstreamRunId>,
    text: String,
    cost: usize,
    /// The upstream says that something else holds the thread.
    busy: bool,
}

/// Why a turn did not reach its end at the upstream.
enum Failure {
    Upstream(UpstreamError),
    LeaseLost,
    Store,
    Deadline,
    Stopped,
    ReplyTooLarge,
    NotConfigured,
    Panic,
}

async fn drive(
    runs: &Runs,
    upstream: &dyn Upstream,
    turn: &Turn,
    progress: &mut Progress,
    feed: &Feed,
) -> Result<Ended, Failure> {
    let parts = &runs.parts.given;
    let assistant = parts.assistants.get(&turn.run.assistant).ok_or(Failure::NotConfigured)?;
    progress.thread.clone_from(&turn.thread.upstream_thread_id);
    let mut history = Vec::new();
    if progress.thread.is_none() {
        create_thread(runs, upstream, turn, progress, &history).await?;
    }
    let mut created_again = false;
    let mut pause = Duration::from_millis(250);
    let mut events = loop {
        let request = StartRun {
            run: turn.run.id,
            thread: progress.thread.as_ref(),
            history: &history,
            assistant,
            input: &turn.input,
            metadata: &turn.run.metadata,
        };
        match upstream.start(request).await {
            Ok(events) => break events,
            Err(UpstreamError::Busy { blocking_run }) => {
                tracing::warn!(
                    blocking_run = blocking_run.map(|id| id.0),
                    "the upstream thread is held by another run"
                );
                progress.busy = true;
                sleep(jittered(pause)).await;
                pause = (pause * 2).min(Duration::from_secs(4));
            }
            Err(UpstreamError::ThreadGone) if !created_again => {
                created_again = true;
                history = history_before(runs, turn).await?;
                tracing::warn!(
                    messages = history.len(),
                    "the upstream thread is gone; making it again from the transcript"
                );
                create_thread(runs, upstream, turn, progress, &history).await?;
            }
            Err(error) => return Err(Failure::Upstream(error)),
        }
    };
    progress.busy = false;
    while let Some(event) = events.next().await {
        match event.map_err(Failure::Upstream)? {
            UpstreamEvent::Accepted(id) => progress.upstream_run = Some(id),
            UpstreamEvent::Text(text) => {
                progress.cost += text.len().max(MIN_PIECE_COST);
                if progress.cost > parts.runs.max_reply_bytes {
                    return Err(Failure::ReplyTooLarge);
                }
                progress.text.push_str(&text);
                feed.push(RunEvent::Delta(text.into()));
            }
            UpstreamEvent::Ended(ended) => {
                let size: usize = ended.content.iter().map(content_size).sum();
                if size > parts.runs.max_reply_bytes {
                    return Err(Failure::ReplyTooLarge);
                }
                // Lets the connection be used again; the stream bounds it.
                events.for_each(|_| std::future::ready(())).await;
                return Ok(*ended);
            }
        }
    }
    Err(Failure::Upstream(UpstreamError::Broken { timeout: false }))
}

/// Makes the upstream thread and records it before it is used. Leaves `progress.thread` unset where threads are chains
/// of responses.
async fn create_thread(
    runs: &Runs,
    upstream: &dyn Upstream,
    turn: &Turn,
    progress: &mut Progress,
    history: &[Message],
) -> Result<(), Failure> {
    let Thread { id, key, expires_at, .. } = &turn.thread;
    let owner = Ownership { key: key.clone(), thread: *id, expires_at: *expires_at };
    progress.thread = upstream.create_thread(&owner, history).await.map_err(Failure::Upstream)?;
    let Some(id) = &progress.thread else { return Ok(()) };
    match runs.parts.given.store.bind_upstream_thread(&turn.lease, id).await {
        Ok(true) => Ok(()),
        Ok(false) => Err(Failure::LeaseLost),
        Err(error) => {
            tracing::error!(error = &error as &dyn std::error::Error, upstream.thread = %id, "cannot record an upstream thread");
            Err(Failure::Store)
        }
    }
}

/// The thread's transcript up to this run.
async fn history_before(runs: &Runs, turn: &Turn) -> Result<Vec<Message>, Failure> {
    let mut history: Vec<Message> = Vec::new();
    loop {
        let after = history.last().map_or(0, |message| message.position);
        let page = runs.parts.given.store.transcript(turn.thread.id, after, HISTORY_PAGE).await.map_err(
            |error| {
                tracing::error!(error = &error as &dyn std::error::Error, "cannot read the transcript");
                Failure::Store
            },
        )?;
        let is_last = page.len() < HISTORY_PAGE as usize;
        history.extend(page);
        if is_last {
            history.retain(|message| message.run_id != Some(turn.run.id));
            return Ok(history);
        }
    }
}

/// Ends what the run left upstream, within a bound; what cannot be ended is logged.
async fn settle(runs: &Runs, upstream: &dyn Upstream, leftover: &Leftover) {
    let parts = &runs.parts.given;
    let whole = parts.runs.settle_timeout;
    let limit = if parts.stop.is_cancelled() { whole.min(LAST_SETTLE_TIMEOUT) } else { whole };
    match timeout(limit, upstream.settle(leftover)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "what the run left upstream could not be ended"
            );
        }
        Err(_) => tracing::warn!("what the run left upstream could not be ended in time"),
    }
}

/// Commits the end, then announces it.
async fn finish(
    runs: &Runs,
    lease: &RunLease,
    end: &RunEnd,
    thread: Thread,
    run: Run,
    retry_after: Option<Duration>,
    feed: &Feed,
) {
    let Some(finished) = finish_in_store(runs, lease, end).await else {
        lease_lost(thread, run, feed);
        return;
    };
    let Finished { thread, activity, run, message } = finished;
    if let Some(message) = &message {
        feed.push(RunEvent::MessageCompleted(Arc::new(message.clone())));
    }
    feed.push(RunEvent::Ended(Arc::new(Outcome { thread, activity, run, message, retry_after })));
}

/// Commits the end of a run, for as long as it takes: a run that has ended upstream must not stay open here.
/// `None` if it is not ours to end, or if the process is told to stop while the database is away.
async fn finish_in_store(runs: &Runs, lease: &RunLease, end: &RunEnd) -> Option<Finished> {
    let parts = &runs.parts.given;
    let mut pause = Duration::from_millis(50);
    loop {
        match parts.store.finish(lease, end).await {
            Ok(finished) => return finished,
            Err(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "cannot record the end of a run yet"
                );
                if parts.stop.is_cancelled() {
                    return None;
                }
                sleep(jittered(pause)).await;
                pause = (pause * 2).min(Duration::from_secs(2));
            }
        }
    }
}

fn lease_lost(thread: Thread, mut run: Run, feed: &Feed) {
    tracing::error!("the lease of a run was lost");
    run.status = RunStatus::Failed;
    run.error = Some(RunError {
        code: RunErrorCode::ReplicaLost,
        message: "another gateway process took the run over; ask for the run to learn how it ends".to_owned(),
    });
    let activity = ThreadActivity { state: ThreadState::Active, queue_depth: 0 };
    feed.push(RunEvent::Ended(Arc::new(Outcome { thread, activity, run, message: None, retry_after: None })));
}

fn end_of(ended: Ended) -> RunEnd {
    let reply = (!ended.content.is_empty()).then(|| Reply {
        id: MessageId::new(),
        content: ended.content,
        upstream_message_id: ended.upstream_message_id,
    });
    let (status, error) = match ended.status {
        RunStatus::RequiresAction => (RunStatus::Failed, Some(tool_calls_not_supported(&ended.tool_calls))),
        status if status.is_final() => (status, ended.error),
        status => {
            let message = format!("the upstream ended the run with the status {status}, which is none");
            (RunStatus::Failed, Some(RunError { code: RunErrorCode::UpstreamFailed, message }))
        }
    };
    RunEnd {
        status,
        error,
        usage: ended.usage,
        upstream_run_id: None,
        upstream_thread_id: ended.thread,
        reply,
    }
}

fn tool_calls_not_supported(calls: &[ToolCall]) -> RunError {
    let names: Vec<_> = calls.iter().map(|call| call.name.as_str()).collect();
    RunError {
        code: RunErrorCode::ToolCallsNotSupported,
        message: format!(
            "the model asked for function calls ({}), which this version cannot hand to the caller: remove the functions from the assistant",
            names.join(", ")
        ),
    }
}

fn failed_end(status: RunStatus, error: RunError) -> RunEnd {
    RunEnd {
        status,
        error: Some(error),
        usage: None,
        upstream_run_id: None,
        upstream_thread_id: None,
        reply: None,
    }
}

fn stopped() -> RunError {
    RunError {
        code: RunErrorCode::GatewayStopped,
        message: "the gateway was stopped before the run ended".to_owned(),
    }
}

fn partial(text: String) -> Option<Reply> {
    (!text.is_empty()).then(|| Reply {
        id: MessageId::new(),
        content: vec![ContentPart::Text { text }],
        upstream_message_id: None,
    })
}

fn content_size(part: &ContentPart) -> usize {
    match part {
        ContentPart::Text { text } => text.len(),
        ContentPart::Refusal { refusal } => refusal.len(),
        ContentPart::ImageUrl { image_url } => image_url.url.len(),
        ContentPart::ImageFile { image_file } => image_file.file_id.len(),
    }
}

/// How long the run may take, from now: the store has just set its deadline by its own clock.
fn deadline_of(run: &Run) -> Duration {
    run.deadline_at
        .zip(run.started_at)
        .and_then(|(deadline, start)| (deadline - start).to_std().ok())
        .unwrap_or_default()
}

/// Between half of `pause` and all of it.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(rand::rng().random_range(0.5..=1.0))
}

impl Failure {
    fn name(&self) -> String {
        match self {
            Self::Upstream(error) => error.to_string(),
            Self::LeaseLost => "lease lost".to_owned(),
            Self::Store => "the store failed".to_owned(),
            Self::Deadline => "deadline".to_owned(),
            Self::Stopped => "the gateway is stopping".to_owned(),
            Self::ReplyTooLarge => "the reply is too large".to_owned(),
            Self::NotConfigured => "not configured".to_owned(),
            Self::Panic => "panic".to_owned(),
        }
    }

    /// The upstream may still work on the run, or keep traces of it.
    fn may_leave_something(&self) -> bool {
        match self {
            Self::Upstream(error) => error.is_ambiguous(),
            Self::Deadline | Self::Stopped | Self::ReplyTooLarge | Self::Panic => true,
            Self::LeaseLost | Self::Store | Self::NotConfigured => false,
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Upstream(
                UpstreamError::RateLimited { retry_after, quota: false }
                | UpstreamError::Unavailable { retry_after, .. },
            ) => *retry_after,
            _ => None,
        }
    }

    /// The end of the run. `busy`: it was waiting for the upstream thread to be free.
    fn end(self, busy: bool) -> RunEnd {
        let (code, message) = match self {
            Self::Upstream(error) => {
                let code = match error {
                    UpstreamError::ThreadGone => RunErrorCode::UpstreamThreadGone,
                    UpstreamError::Busy { .. } => RunErrorCode::UpstreamBusy,
                    UpstreamError::Broken { .. } => RunErrorCode::StreamBroken,
                    _ => RunErrorCode::UpstreamError,
                };
                (code, error.to_string())
            }
            Self::Deadline if busy => (
                RunErrorCode::UpstreamBusy,
                "the upstream thread was held by another run until the deadline".to_owned(),
            ),
            Self::Deadline => {
                let message = "the run did not end before its deadline".to_owned();
                return failed_end(
                    RunStatus::Expired,
                    RunError { code: RunErrorCode::DeadlineExceeded, message },
                );
            }
            Self::Stopped => return failed_end(RunStatus::Failed, stopped()),
            Self::ReplyTooLarge => {
                (RunErrorCode::ReplyTooLarge, "the reply grew past the configured limit".to_owned())
            }
            Self::NotConfigured => (
                RunErrorCode::NotConfigured,
                "the run's assistant or the thread's upstream is no longer configured".to_owned(),
            ),
            Self::LeaseLost | Self::Store | Self::Panic => {
                (RunErrorCode::Internal, "something went wrong inside the gateway".to_owned())
            }
        };
        failed_end(RunStatus::Failed, RunError { code, message })
    }
}

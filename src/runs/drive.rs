//! The upstream side of a turn: the thread, the call, the stream.

use std::time::Duration;

use futures_util::StreamExt;
use tokio::time::sleep;

use super::end::Failure;
use super::feed::FeedWriter;
use super::{RunEvent, Runs, jittered};
use crate::config::AssistantConfig;
use crate::domain::{ContentPart, Message, Thread, UpstreamRunId, UpstreamThreadId};
use crate::error::Chain;
use crate::store::{StoreError, Turn};
use crate::upstream::{Ended, EventStream, Ownership, StartRun, Upstream, UpstreamError, UpstreamEvent};

/// What each streamed piece of a reply counts at least towards the limit on replies, bytes: the log of a run keeps
/// the pieces apart.
const MIN_PIECE_COST: usize = 64;
/// Messages read at a time when an upstream thread is made again.
const HISTORY_PAGE: u32 = 500;

/// What is known of a turn while it goes on; it survives when the turn is cut off.
#[derive(Default)]
pub(super) struct Progress {
    pub(super) thread: Option<UpstreamThreadId>,
    pub(super) upstream_run: Option<UpstreamRunId>,
    pub(super) text: String,
    cost: usize,
    /// The upstream says that something else holds the thread.
    pub(super) busy: bool,
}

/// Sends the input and relays the reply until the upstream says how the run ended. May be dropped at any await: what
/// is known by then is in `progress`. The stream comes back to be [drained](drain).
pub(super) async fn drive(
    runs: &Runs,
    upstream: &dyn Upstream,
    assistant: &AssistantConfig,
    turn: &Turn,
    progress: &mut Progress,
    feed: &FeedWriter,
) -> Result<(Ended, EventStream), Failure> {
    let parts = &runs.parts.given;
    progress.thread.clone_from(&turn.thread.upstream_thread_id);
    let Thread { id, key, expires_at, .. } = &turn.thread;
    let owner = Ownership { key: key.clone(), thread: *id, expires_at: *expires_at };
    let mut history = Vec::new();
    if progress.thread.is_none() {
        create_thread(runs, upstream, turn, &owner, &history, progress).await?;
    }
    let mut created_again = false;
    let mut pause = Duration::from_millis(250);
    let mut events = loop {
        let request = StartRun {
            run: turn.run.id,
            thread: progress.thread.as_ref(),
            owner: &owner,
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
                create_thread(runs, upstream, turn, &owner, &history, progress).await?;
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
                return Ok((*ended, events));
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
    owner: &Ownership,
    history: &[Message],
    progress: &mut Progress,
) -> Result<(), Failure> {
    progress.thread = upstream.create_thread(owner, history).await.map_err(Failure::Upstream)?;
    let Some(id) = &progress.thread else { return Ok(()) };
    loop {
        match runs.parts.given.store.bind_upstream_thread(&turn.lease, id).await {
            Ok(true) => return Ok(()),
            Ok(false) => return Err(Failure::LeaseLost),
            Err(error) => wait_out(error).await?,
        }
    }
}

/// The thread's transcript up to this run.
async fn history_before(runs: &Runs, turn: &Turn) -> Result<Vec<Message>, Failure> {
    let mut history: Vec<Message> = Vec::new();
    loop {
        let after = history.last().map_or(0, |message| message.position);
        match runs.parts.given.store.transcript(turn.thread.id, after, HISTORY_PAGE).await {
            Ok(page) if page.is_empty() => break,
            Ok(page) => history.extend(page),
            Err(error) => wait_out(error).await?,
        }
    }
    history.retain(|message| message.run_id != Some(turn.run.id));
    Ok(history)
}

/// Pauses before another try, if there is a point in one. The run's deadline bounds the tries.
async fn wait_out(error: StoreError) -> Result<(), Failure> {
    tracing::error!(error = %Chain(&error), "the store failed in the middle of a turn");
    if !matches!(error, StoreError::Unavailable(_)) {
        return Err(Failure::Store);
    }
    sleep(jittered(Duration::from_millis(500))).await;
    Ok(())
}

/// Reads what is left of an answer, so that its connection can be used again. The stream itself bounds that.
pub(super) async fn drain(rest: Option<EventStream>) {
    if let Some(rest) = rest {
        rest.for_each(|_| std::future::ready(())).await;
    }
}

fn content_size(part: &ContentPart) -> usize {
    match part {
        ContentPart::Text { text } => text.len(),
        ContentPart::Refusal { refusal } => refusal.len(),
        ContentPart::ImageUrl { image_url } => image_url.url.len(),
        ContentPart::ImageFile { image_file } => image_file.file_id.len(),
    }
}

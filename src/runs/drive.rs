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
/// Pauses before a request is sent again, where the upstream names none.
const FIRST_BACK_OFF: Duration = Duration::from_millis(500);
const LONGEST_BACK_OFF: Duration = Duration::from_secs(8);
/// An upstream that wants a longer pause is not waited for: the caller hears of it.
const LONGEST_RETRY_AFTER: Duration = Duration::from_mins(1);
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
    let (mut needs_thread, mut created_again) = (progress.thread.is_none(), false);
    let mut retries = Retries { left: parts.runs.max_retries, made: 0 };
    let mut pause = Duration::from_millis(250);
    let mut events = loop {
        if needs_thread {
            match create_thread(runs, upstream, turn, &owner, &history, progress).await {
                Ok(()) => needs_thread = false,
                Err(Failure::Upstream(error)) => {
                    retries.wait_after(error).await?;
                    continue;
                }
                Err(failure) => return Err(failure),
            }
        }
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
                history = history_before(runs, turn).await?;
                tracing::warn!(
                    messages = history.len(),
                    "the upstream thread is gone; making it again from the transcript"
                );
                (needs_thread, created_again) = (true, true);
            }
            Err(error) => {
                progress.busy = false;
                retries.wait_after(error).await?;
            }
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

/// Sending again what was refused. Only what was provably not taken is: a user's message must not reach the upstream
/// twice.
struct Retries {
    left: u32,
    made: u32,
}

impl Retries {
    /// Waits as long as the upstream asks, else a while that grows.
    ///
    /// # Errors
    /// The error itself, if the request must not or shall not be sent again.
    async fn wait_after(&mut self, error: UpstreamError) -> Result<(), Failure> {
        let Some(wait) = self.pause(&error) else { return Err(Failure::Upstream(error)) };
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        tracing::warn!(error = %Chain(&error), wait_ms, "the upstream did not take the request; trying again");
        sleep(wait).await;
        Ok(())
    }

    fn pause(&mut self, error: &UpstreamError) -> Option<Duration> {
        let asked = match error {
            UpstreamError::Connect => None,
            UpstreamError::RateLimited { retry_after, quota: false } => *retry_after,
            _ => return None,
        };
        self.left = self.left.checked_sub(1)?;
        let back_off = FIRST_BACK_OFF.saturating_mul(2_u32.saturating_pow(self.made)).min(LONGEST_BACK_OFF);
        self.made += 1;
        match asked {
            Some(wait) => (wait <= LONGEST_RETRY_AFTER).then_some(wait),
            None => Some(jittered(back_off)),
        }
    }
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_back_off_stays_within_its_bounds_and_ends(left in 0..70_u32, asked in proptest::option::of(0..200_u64)) {
            let mut retries = Retries { left, made: 0 };
            let retry_after = asked.map(Duration::from_secs);
            let error = UpstreamError::RateLimited { retry_after, quota: false };
            let pauses: Vec<_> = std::iter::from_fn(|| retries.pause(&error)).take(100).collect();
            match retry_after {
                Some(wait) if wait > LONGEST_RETRY_AFTER => prop_assert!(pauses.is_empty()),
                Some(wait) => prop_assert_eq!(pauses, vec![wait; left as usize]),
                None => {
                    prop_assert_eq!(pauses.len(), left as usize);
                    for pause in pauses {
                        prop_assert!(pause >= FIRST_BACK_OFF / 2 && pause <= LONGEST_BACK_OFF);
                    }
                }
            }
        }
    }

    #[test]
    fn what_may_have_been_taken_is_not_sent_again() {
        for error in [
            UpstreamError::RateLimited { retry_after: None, quota: true },
            UpstreamError::Unavailable { status: 503, retry_after: Some(Duration::ZERO) },
            UpstreamError::Broken { timeout: false },
            UpstreamError::Protocol(String::new()),
            UpstreamError::Refused { status: 400, code: None },
            UpstreamError::ThreadGone,
        ] {
            assert_eq!(Retries { left: 9, made: 0 }.pause(&error), None, "{error:?}");
        }
    }
}

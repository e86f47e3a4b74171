//! Cancelling runs: those of this process by telling their tasks, others through the store.

use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{sleep, timeout};
use tracing::Instrument;

use crate::domain::{ConversationKey, EventBatch, Message, Run, RunId, RunStatus, Step, ThreadId};
use crate::error::Error;
use crate::runs::execution::finish::end_without_output;
use crate::runs::registry::others_from;
use crate::runs::{NO_THREAD, Runs, jittered};
use crate::store::{News, RunEnd, StoreError};

/// How much longer than the settling a cancel waits for the end of its run.
const SLACK: Duration = Duration::from_secs(2);
/// How often the store is asked about a run of another process.
const POLL: Duration = Duration::from_millis(200);

/// Which of a thread's runs are meant.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Which {
    /// The one at work.
    Active,
    /// Those that wait.
    Queued,
    /// Both.
    All,
}

impl Runs {
    /// Cancels a run and waits, within a bound, for its end. A run that has ended is given as it is: a cancel that
    /// comes too late is no error.
    pub async fn cancel(&self, key: &ConversationKey, id: RunId) -> Result<(Run, Option<Message>), Error> {
        let (run, message) = self.run(key, id).await?;
        if run.status.is_final() {
            return Ok((run, message));
        }
        self.end_all(key, &[run]).await?;
        self.run(key, id).await
    }

    /// Cancels unfinished runs of the current thread and waits, within a bound, for their end; those that wait go
    /// first, so that none of them starts in between. Gives them as they are then, in order of admission.
    pub async fn cancel_some(&self, key: &ConversationKey, which: Which) -> Result<Vec<Run>, Error> {
        let unfinished = self.store().unfinished(key).await?.ok_or(NO_THREAD)?;
        let meant: Vec<Run> = unfinished
            .into_iter()
            .filter(|run| match which {
                Which::Active => run.status.is_active(),
                Which::Queued => run.status == RunStatus::Queued,
                Which::All => true,
            })
            .collect();
        self.end_all(key, &meant).await?;
        let mut ended = Vec::with_capacity(meant.len());
        for run in meant {
            ended.push(self.run(key, run.id).await?.0);
        }
        Ok(ended)
    }

    /// Has these runs cancelled, those that wait first and of these the last one first, and waits for their end.
    pub async fn end_all(&self, key: &ConversationKey, runs: &[Run]) -> Result<(), Error> {
        let (active, waiting): (Vec<&Run>, Vec<&Run>) = runs.iter().partition(|run| run.status.is_active());
        let mut ends = Vec::with_capacity(runs.len());
        for run in waiting.into_iter().rev().chain(active) {
            self.ask_to_end(key, run).await?;
            ends.push(self.has_ended(key, run.id));
        }
        // A request to another replica is seen there when it renews its session, if it did not hear of it.
        let limit = self.parts.given.runs.settle_timeout + SLACK + self.parts.given.attend_every;
        if timeout(limit, join_all(ends)).await.is_err() {
            tracing::warn!("a cancelled run did not end in time");
        }
        Ok(())
    }

    /// Asks for the end of a run; one that waits and is not this process's is ended on the spot.
    async fn ask_to_end(&self, key: &ConversationKey, run: &Run) -> Result<(), Error> {
        let store = self.store();
        let handle = self.parts.registry.handle(run.id);
        if run.status == RunStatus::Queued && handle.is_none() {
            // A caller who leaves must not leave the run taken and not ended.
            let ending = self.clone().end_waiting(run.id, run.thread_id).in_current_span();
            let ended = self.parts.given.tasks.spawn(ending).await;
            if ended.map_err(|error| Error::Internal(Some(error.into())))?? {
                return Ok(());
            }
        }
        // Recorded first: whoever takes the run over knows that it is to end.
        if run.status.is_active() || handle.is_none() {
            store.request_cancel(key, run.id).await?;
        }
        match handle {
            Some(handle) => handle.cancel.request(false),
            None => self.parts.notifier.notify(News::Asked(run.id)),
        }
        Ok(())
    }

    /// Takes a run that waits in the line of another process and ends it. `false` if it does not wait any more.
    async fn end_waiting(self, run: RunId, thread: ThreadId) -> Result<bool, StoreError> {
        let parts = &self.parts;
        let _taking = parts.registry.taking.lock().await;
        let Some(lease) = self.store().take_queued(parts.given.replica, run).await? else { return Ok(false) };
        let status = RunStatus::Queued.on(Step::Cancel).unwrap_or(RunStatus::Cancelled);
        // Beyond all that its owner can have shown.
        let events = EventBatch { first: others_from(&lease), events: Vec::new() };
        self.store().finish(&lease, RunEnd { events, ..end_without_output(status, None) }).await?;
        // Its owner has lost it, and its readers go on by the store.
        for news in [News::Asked(run), News::Run(run), News::Thread(thread)] {
            parts.notifier.notify(news);
        }
        Ok(true)
    }

    /// Resolves when the run has ended.
    async fn has_ended(&self, key: &ConversationKey, id: RunId) {
        if let Some(handle) = self.parts.registry.handle(id)
            && handle.log.ended().await.is_some()
        {
            return;
        }
        let mut news = self.parts.notifier.subscribe(News::Run(id));
        loop {
            match self.store().run(key, id).await {
                Ok(Some((run, _))) if !run.status.is_final() => {}
                Ok(_) => return,
                Err(_) => sleep(POLL).await,
            }
            tokio::select! {
                () = news.changed() => {}
                () = sleep(jittered(POLL)) => {}
            }
        }
    }
}

//! What the upstream thread of a run holds before it, and what it has to be told of that.

use std::sync::Arc;

use super::drive::{Drive, insist, wait_out};
use super::failure::Failure;
use super::making::Making;
use crate::domain::{Context, Message, Role, Thread};
use crate::upstream::{Ownership, Settled, UpstreamError};

/// Messages read at a time when an upstream thread is made again.
const HISTORY_PAGE: u32 = 500;

impl Drive<'_> {
    /// What an earlier run may have left is looked at before anything is sent: its remains are taken away, and what
    /// the transcript holds of it goes along with this turn. `false` if the thread is in no state to tell.
    pub(super) async fn settle_earlier(&self) -> Result<bool, Failure> {
        let Some(left) = &self.turn.thread.leftover else { return Ok(true) };
        let was_there = match self.take_away_earlier().await {
            Err(Failure::Upstream(UpstreamError::Protocol(_))) => return Ok(false),
            was_there => was_there?,
        };
        let reached_the_model = left.upstream_run.is_some() || was_there.said;
        let found = if reached_the_model { Context::Missing } else { Context::Withheld };
        // A chain goes on from before that run, and there nothing went along with it.
        let synced = left.synced && was_there.said && was_there.thread.is_none();
        let store = &self.runs.parts.given.store;
        insist(|| store.settled(&self.turn.lease, left.run, found, synced)).await?;
        Ok(true)
    }

    /// Gives the upstream thread up. What a new one has to be told.
    pub(super) async fn start_anew(&mut self) -> Result<History, Failure> {
        let history = self.history_before().await?;
        tracing::warn!(
            messages = history.messages.len(),
            "the upstream thread is gone or broken; making it again from the transcript"
        );
        self.progress.thread = None;
        Ok(history)
    }

    /// Ends and removes what an earlier run left at the upstream, if it may have left something. What was there.
    async fn take_away_earlier(&self) -> Result<Settled, Failure> {
        let Some(left) = &self.turn.thread.leftover else { return Ok(Settled::default()) };
        self.may_send()?;
        let settled = self.upstream.settle(left).await.map_err(Failure::Upstream)?;
        if settled.said || left.remove {
            // What stands there now may be another's.
            self.may_send()?;
            self.upstream.remove(left).await.map_err(Failure::Upstream)?;
        }
        Ok(settled)
    }

    /// What the upstream thread lacks of the transcript.
    pub(super) async fn backlog(&self) -> Result<Vec<Message>, Failure> {
        loop {
            match self.runs.parts.given.store.backlog(self.turn.run.id).await {
                Ok(messages) => return Ok(with_content(messages)),
                Err(error) => wait_out(error).await?,
            }
        }
    }

    /// What a new upstream thread begins with: what is carried over from the thread before, and the transcript up to
    /// this run, as far as the model may know it.
    pub(super) async fn history_before(&self) -> Result<History, Failure> {
        let store = &self.runs.parts.given.store;
        let Thread { id, carried, .. } = self.turn.thread;
        let mut messages = loop {
            if carried == 0 {
                break Vec::new();
            }
            match store.carried(id).await {
                Ok(carried) => break with_content(carried),
                Err(error) => wait_out(error).await?,
            }
        };
        let carried_users = count_users(&messages);
        let mut after = 0;
        loop {
            match store.transcript(id, after, HISTORY_PAGE).await {
                Ok(page) => {
                    let Some(last) = page.last() else { break };
                    after = last.position;
                    messages.extend(page);
                }
                Err(error) => wait_out(error).await?,
            }
        }
        let own = Some(self.turn.run.id);
        messages.retain(|message| message.run_id != own && message.context != Context::Withheld);
        if messages.iter().any(|message| message.content.is_empty()) {
            return self.nothing_before().await;
        }
        Ok(History { messages, carried_users })
    }

    /// Where not all that was said is stored, a new upstream thread begins with nothing: a story with gaps is another one.
    async fn nothing_before(&self) -> Result<History, Failure> {
        let store = &self.runs.parts.given.store;
        insist(|| store.withhold_earlier(&self.turn.lease)).await?;
        Ok(History::default())
    }

    /// Makes the upstream thread and records it before it is used. Whether there is one that holds the seed: where
    /// threads are chains of responses the first run makes it.
    pub(super) async fn create_thread(
        &mut self,
        owner: &Ownership,
        seed: Option<&History>,
    ) -> Result<bool, Failure> {
        if !self.upstream.capabilities().has_threads {
            self.progress.thread = None;
            return Ok(false);
        }
        let given = &self.runs.parts.given;
        let Some(upstream) = given.upstreams.get(&self.turn.thread.upstream) else {
            return Err(Failure::NotConfigured);
        };
        self.may_send()?;
        let making = Making {
            store: Arc::clone(&given.store),
            upstream: Arc::clone(upstream),
            lease: self.turn.lease,
            owner: owner.clone(),
            seed: seed.map(|seed| (seed.messages.clone(), seed.carried_users)),
        };
        self.progress.thread = Some(making.carry_out(&given.tasks).await?);
        Ok(true)
    }
}

/// Messages that an upstream thread lacks, oldest first.
#[derive(Default)]
pub(super) struct History {
    pub(super) messages: Vec<Message>,
    /// How many of the user's among them come from the thread before.
    pub(super) carried_users: u32,
}

/// Without those that were said while nothing that is said was stored.
pub(super) fn with_content(mut messages: Vec<Message>) -> Vec<Message> {
    messages.retain(|message| !message.content.is_empty());
    messages
}

fn count_users(messages: &[Message]) -> u32 {
    let users = messages.iter().filter(|message| message.role == Role::User).count();
    u32::try_from(users).unwrap_or(u32::MAX)
}

//! A fresh thread in the place of a full one, before a turn or when a caller wants it.

use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::{NO_THREAD, Runs, jittered};
use crate::domain::{ConversationKey, Thread, ThreadId};
use crate::error::{Chain, Error};
use crate::store::{Claim, Rolled, Rollover, RunLease, StoreError, ThreadName, Turn};
use crate::upstream::RateLimiter;

/// What became of a caller's wish for a fresh thread.
#[derive(Clone, Debug)]
pub enum Renewed {
    /// The fresh thread; the same one if it is empty.
    Now(Thread),
    /// A run is active on this one: it happens before the next turn.
    Later(Thread),
}

impl Runs {
    /// Archives the key's thread and starts a fresh one, at once or before the next turn.
    pub async fn roll_over(&self, key: &ConversationKey) -> Result<Renewed, Error> {
        let thread = self.thread(ThreadName::Newest(key)).await?.thread;
        if thread.message_count == 0 && thread.run_count == 0 {
            return Ok(Renewed::Now(thread));
        }
        self.reconcile(&thread, None, &RateLimiter::UNBOUND).await?;
        match self.roll_over_in_store(&self.rollover(&thread, None)).await? {
            Rolled::Done { thread: fresh, .. } => {
                self.parts.locks.moved(key, thread.id, fresh.id);
                Ok(Renewed::Now(*fresh))
            }
            Rolled::Later(thread) => Ok(Renewed::Later(*thread)),
            Rolled::Lost => Err(NO_THREAD),
        }
    }

    /// Rolls the thread of a turn over that is about to begin, if it is time for that. The turn as it is then.
    ///
    /// Nothing of the turn is upstream yet, and no other run is active, so nothing is cut in two. What fails here is
    /// tried again before the next turn. May be dropped at any await.
    pub(super) async fn rolled(&self, turn: Turn) -> Turn {
        let before = turn.thread.id;
        let turn = self.rolled_if_full(turn).await;
        // Those who wait have moved along.
        if turn.thread.id != before {
            self.parts.locks.moved(&turn.thread.key, before, turn.thread.id);
        }
        turn
    }

    async fn rolled_if_full(&self, turn: Turn) -> Turn {
        let threads = &self.parts.given.threads;
        let before = turn.thread.message_count - i64::try_from(turn.input.len()).unwrap_or(i64::MAX);
        let is_full = threads.max_messages.is_some_and(|most| before >= i64::from(most.get()));
        if before <= 0 || !(is_full || turn.thread.rolls) {
            return turn;
        }
        let limit = self.parts.given.runs.settle_timeout;
        match timeout(limit, self.reconcile(&turn.thread, Some(turn.lease), &RateLimiter::UNBOUND)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => {
                tracing::warn!(error = %Chain(&error), "cannot roll the thread over now");
                return turn;
            }
            Err(_) => {
                tracing::warn!(
                    "cannot roll the thread over now: the upstream did not tell its history in time"
                );
                return turn;
            }
        }
        match self.roll_over_in_store(&self.rollover(&turn.thread, Some(turn.lease))).await {
            Ok(Rolled::Done { thread, turn: Some(turn) }) => {
                tracing::info!(thread.id = %thread.id, "rolled the thread over");
                *turn
            }
            Ok(_) => self.turn_now(turn).await,
            Err(error) => {
                tracing::warn!(error = %Chain(&error), "cannot roll the thread over now");
                self.turn_now(turn).await
            }
        }
    }

    fn rollover(&self, thread: &Thread, by: Option<RunLease>) -> Rollover {
        Rollover {
            thread: thread.id,
            by,
            new_thread: ThreadId::new(),
            carry_over: self.parts.given.threads.carry_over_messages,
            limits: self.parts.given.lifetimes.of(&thread.key.scope),
        }
    }

    /// The turn as the store has it: an answer that was lost may have moved it.
    async fn turn_now(&self, turn: Turn) -> Turn {
        loop {
            match self.claim(&turn.lease).await {
                Ok(Claim::Started(now)) => return *now,
                // Whoever writes next hears that the lease was lost.
                Ok(Claim::NotYet | Claim::Lost) => return turn,
                Err(StoreError::Unavailable(_)) => sleep(jittered(Duration::from_millis(500))).await,
                Err(error) => {
                    tracing::error!(error = %Chain(&error), "cannot read a turn again");
                    return turn;
                }
            }
        }
    }
}

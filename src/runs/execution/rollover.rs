//! Rollover: replaces a full thread with a fresh one before a run begins.

use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::history::estimated_tokens;
use crate::domain::{Thread, ThreadId};
use crate::error::Chain;
use crate::runs::backoff::jittered;
use crate::runs::context::Context;
use crate::runs::reconcile::reconcile;
use crate::runs::redaction;
use crate::store::{QueuedStart, Rolled, Rollover, RunLease, StartedRun, StoreError};
use crate::upstream::RateLimiter;

/// Replaces the thread of a run that is about to begin with a fresh one, if the thread is full.
/// Returns the run as it is then.
///
/// The upstream has nothing of this run, and no other run is active, so the rollover splits no
/// run. The next run repeats a failed rollover. The future may be dropped at any await.
pub(in crate::runs) async fn roll_over_if_full(ctx: &Context, started: StartedRun) -> StartedRun {
    let before = started.thread.id;
    let started = rolled(ctx, started).await;
    // The queued runs have moved to the fresh thread too.
    if started.thread.id != before {
        ctx.queue
            .moved(&started.thread.key, before, started.thread.id);
    }
    started
}

async fn rolled(ctx: &Context, started: StartedRun) -> StartedRun {
    let threads = &ctx.config.threads;
    let before =
        started.thread.message_count - i64::try_from(started.input.len()).unwrap_or(i64::MAX);
    let has_most_messages = threads
        .max_messages
        .is_some_and(|most| before >= i64::from(most.get()));
    let has_most_tokens = threads
        .max_tokens
        .is_some_and(|most| tokens_of(&started) >= i64::from(most.get()));
    let is_full = has_most_messages || has_most_tokens;
    if before <= 0 || !(is_full || started.thread.rolls) {
        return started;
    }
    let limit = ctx.config.runs.settle_timeout;
    match timeout(
        limit,
        reconcile(
            ctx,
            &started.thread,
            Some(started.lease),
            &RateLimiter::UNBOUND,
        ),
    )
    .await
    {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => {
            tracing::warn!(error = %Chain(&error), "cannot roll the thread over now");
            return started;
        }
        Err(_) => {
            tracing::warn!(
                "cannot roll the thread over now: the upstream did not return its messages in time"
            );
            return started;
        }
    }
    match redaction::roll_over(ctx, &rollover_of(ctx, &started.thread, Some(started.lease))).await {
        Ok(Rolled::Done {
            thread,
            turn: Some(started),
        }) => {
            tracing::info!(thread.id = %thread.id, "rolled the thread over");
            *started
        }
        Ok(_) => reread(ctx, started).await,
        Err(error) => {
            tracing::warn!(error = %Chain(&error), "cannot roll the thread over now");
            reread(ctx, started).await
        }
    }
}

/// Estimates the tokens that the model has to read for a run.
fn tokens_of(started: &StartedRun) -> i64 {
    let input = started.input.iter().map(|message| &message.content);
    let new: usize = input.map(|content| estimated_tokens(content)).sum();
    let new = i64::try_from(new).unwrap_or(i64::MAX);
    started.thread.context_tokens.saturating_add(new)
}

/// Returns the request to the store for a rollover of this thread.
pub(in crate::runs) fn rollover_of(
    ctx: &Context,
    thread: &Thread,
    by: Option<RunLease>,
) -> Rollover {
    Rollover {
        thread: thread.id,
        by,
        new_thread: ThreadId::new(),
        carry_over: ctx.config.threads.carry_over_messages,
        limits: ctx.config.lifetimes.of(&thread.key.scope),
    }
}

/// Reads the run again, because a rollover whose answer was lost may have moved it.
async fn reread(ctx: &Context, started: StartedRun) -> StartedRun {
    loop {
        match redaction::start_queued(ctx, &started.lease).await {
            Ok(QueuedStart::Started(now)) => return *now,
            // The next write finds out that the lease is lost.
            Ok(QueuedStart::NotYet | QueuedStart::Lost) => return started,
            Err(StoreError::Unavailable(_)) => sleep(jittered(Duration::from_millis(500))).await,
            Err(error) => {
                tracing::error!(error = %Chain(&error), "cannot read a run again");
                return started;
            }
        }
    }
}

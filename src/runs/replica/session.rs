//! This process among its peers: it keeps its session alive, and does what others ask of its runs.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};

use super::flusher::keep_flushing;
use super::messaging::{deliver, deliver_once, listen};
use super::takeover::take_over;
use crate::domain::set_clock;
use crate::error::Chain;
use crate::runs::context::Context;
use crate::store::{Notification, Request, StoreError};

/// Longest time for the last word to the store.
const RETIRE_TIMEOUT: Duration = Duration::from_secs(2);
/// How often all are asked to let go while the session has lapsed: a run may just have begun.
const LET_GO_EVERY: Duration = Duration::from_millis(50);

/// Says that this replica is alive for another `ttl`; the first call registers it and must have succeeded
/// before the first run is submitted.
///
/// The session counts as lapsed here a tenth of `ttl` before it does in the database, and is counted from before the
/// call: what has to stop by then has stopped when others may begin.
///
/// # Errors
/// The store failed, or did not answer within a third of `ttl`.
pub(in crate::runs) async fn renew(
    ctx: &Context,
    address: &str,
    ttl: Duration,
) -> Result<(), StoreError> {
    let begun = Instant::now();
    let renewed = timeout(ttl / 3, ctx.store.renew_replica(ctx.replica, address, ttl)).await;
    let renewed =
        renewed.unwrap_or_else(|_| Err(StoreError::Unavailable("no answer in time".into())))?;
    ctx.notifier.set_peers(renewed.has_peers);
    set_clock(renewed.now);
    ctx.registry.renewed(begun + ttl * 9 / 10);
    Ok(())
}

/// Keeps the session, takes over what nobody works on, and exchanges with the other replicas what they need to
/// know, until the stop.
pub(in crate::runs) async fn keep_session(ctx: &Arc<Context>, address: &str, ttl: Duration) {
    let work = async {
        tokio::join!(
            keep_renewing(ctx, address, ttl),
            watch_session(ctx),
            attend(ctx, ttl),
            take_over(ctx, ttl),
            keep_flushing(ctx),
            listen(ctx),
            deliver(ctx),
        )
    };
    tokio::select! {
        biased;
        () = ctx.tasks.stop.cancelled() => {}
        _ = work => {}
    }
}

async fn keep_renewing(ctx: &Context, address: &str, ttl: Duration) {
    let mut ticks = interval(ttl / 3);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut stops = false;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            // It says, too, whether there are others: who started while this one did not hear yet has told that in vain.
            () = ctx.notifier.missed.notified() => {}
            // Who stops wants to know whether there are others to go on.
            () = ctx.tasks.draining.cancelled(), if !stops => stops = true,
        }
        let lapsed = ctx.registry.has_lapsed();
        if lapsed {
            // If the store was away, the others could not renew either, and are not dead.
            ctx.registry.trust_from(Instant::now() + ttl);
        }
        match renew(ctx, address, ttl).await {
            Ok(()) if lapsed => {
                tracing::warn!(
                    "this replica has a session again; others may have taken over its runs"
                );
            }
            Ok(()) => {}
            Err(error) => {
                tracing::error!(error = %Chain(&error), "cannot renew this replica's session");
            }
        }
    }
}

/// Has all runs let go when the session lapses: from then on others may go on with them.
async fn watch_session(ctx: &Context) {
    let registry = &ctx.registry;
    loop {
        sleep_until(registry.good_until()).await;
        if !registry.has_lapsed() {
            continue;
        }
        tracing::error!(
            runs = registry.runs().len(),
            "this replica's session could not be renewed in time; letting go of its runs"
        );
        while registry.has_lapsed() {
            registry.let_go();
            sleep(LET_GO_EVERY).await;
        }
    }
}

/// Gives the session up: whatever this replica still owns can be adopted at once.
pub(in crate::runs) async fn retire(ctx: &Context) {
    let last = async {
        // What cannot be told is found by the others all the same.
        let _ = deliver_once(ctx).await;
        ctx.store.retire_replica(ctx.replica).await?;
        ctx.store.notify_replicas(&[Notification::Orphans]).await
    };
    match timeout(RETIRE_TIMEOUT, last).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::warn!(error = %Chain(&error), "cannot give up this replica's session");
        }
        Err(_) => tracing::warn!("cannot give up this replica's session in time"),
    }
}

/// Has all tasks let go of their runs, for other replicas or the next process to go on with, if these can know what
/// that takes.
pub(in crate::runs) fn let_go(ctx: &Context) {
    if ctx.store.keeps_content() {
        ctx.registry.let_go();
    }
}

/// Does what others ask of the runs that this process works on, when it hears of it and as often as it renews its
/// session.
async fn attend(ctx: &Context, ttl: Duration) {
    let limit = ttl / 3;
    loop {
        look_for_requests(ctx, limit).await;
        give_up_lost(ctx, limit).await;
        tokio::select! {
            () = ctx.notifier.asked.notified() => {}
            () = sleep(limit) => {}
        }
    }
}

async fn look_for_requests(ctx: &Context, limit: Duration) {
    let requests = match timeout(limit, ctx.store.requests(ctx.replica)).await {
        Ok(Ok(requests)) => requests,
        Ok(Err(error)) => {
            return tracing::error!(error = %Chain(&error), "cannot ask what others want of our runs");
        }
        Err(_) => return tracing::error!("cannot ask in time what others want of our runs"),
    };
    for request in requests {
        match request {
            Request::Cancel { run, discard } => {
                if let Some(handle) = ctx.registry.handle(run) {
                    handle.cancel.request(discard);
                }
            }
            Request::Resume { run, outputs } => {
                if let Some(handle) = ctx.registry.handle(run) {
                    handle.answer(outputs);
                }
            }
        }
    }
}

/// Tells the tasks of runs that others have taken over, one that was to be cancelled in line among them.
async fn give_up_lost(ctx: &Context, limit: Duration) {
    let active = ctx.registry.runs();
    if active.is_empty() {
        return;
    }
    // What cannot be asked now is asked again with the next renewal.
    if let Ok(Ok(lost)) = timeout(limit, ctx.store.runs_taken_over(ctx.replica, &active)).await {
        for handle in lost.into_iter().filter_map(|run| ctx.registry.handle(run)) {
            handle.let_go();
        }
    }
}

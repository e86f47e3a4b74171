//! The session of this replica, and the requests of other replicas about this replica's runs.

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

/// Longest time of the last calls to the store.
const RETIRE_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause between two orders to let go while the session has lapsed. A run may just have begun.
const LET_GO_EVERY: Duration = Duration::from_millis(50);

/// Renews the session of this replica for another `ttl`. The first call registers the replica; it
/// must succeed before the first run is submitted.
///
/// Here the session lapses a tenth of `ttl` before it does in the database, and its time counts
/// from before the call. So this replica has stopped its runs when other replicas may take them
/// over.
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

/// Keeps the session, takes over orphans and strays, and exchanges notifications with the other
/// replicas, until the stop.
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
            // The renewal also finds new replicas, whose announcements this replica may have
            // missed.
            () = ctx.notifier.missed.notified() => {}
            // A replica that stops needs to know whether another one can continue its runs.
            () = ctx.tasks.draining.cancelled(), if !stops => stops = true,
        }
        let lapsed = ctx.registry.has_lapsed();
        if lapsed {
            // If the database was down, the other replicas could not renew either, and are not
            // dead.
            ctx.registry.trust_from(Instant::now() + ttl);
        }
        match renew(ctx, address, ttl).await {
            Ok(()) if lapsed => {
                tracing::warn!(
                    "this replica has a session again; another replica may have taken over its runs"
                );
            }
            Ok(()) => {}
            Err(error) => {
                tracing::error!(error = %Chain(&error), "cannot renew this replica's session");
            }
        }
    }
}

/// Makes all tasks let go of their runs when the session lapses. From then on other replicas may
/// take the runs over.
async fn watch_session(ctx: &Context) {
    let registry = &ctx.registry;
    loop {
        sleep_until(registry.good_until()).await;
        if !registry.has_lapsed() {
            continue;
        }
        tracing::error!(
            runs = registry.runs().len(),
            "this replica's session could not be renewed in time; its tasks let go of their runs"
        );
        while registry.has_lapsed() {
            registry.let_go();
            sleep(LET_GO_EVERY).await;
        }
    }
}

/// Ends the session: another process can adopt this replica's runs at once.
pub(in crate::runs) async fn retire(ctx: &Context) {
    let last = async {
        // If the delivery fails, the other replicas find the released runs by polling.
        let _ = deliver_once(ctx).await;
        ctx.store.retire_replica(ctx.replica).await?;
        ctx.store.notify_replicas(&[Notification::Orphans]).await
    };
    match timeout(RETIRE_TIMEOUT, last).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::warn!(error = %Chain(&error), "cannot end this replica's session");
        }
        Err(_) => tracing::warn!("cannot end this replica's session in time"),
    }
}

/// Makes all tasks let go of their runs, so that other replicas or the next process can
/// continue them. Does nothing if the store does not keep the content that this takes.
pub(in crate::runs) fn let_go(ctx: &Context) {
    if ctx.store.keeps_content() {
        ctx.registry.let_go();
    }
}

/// Carries out the requests of other replicas about this process's runs: after each notification,
/// and as often as the session is renewed.
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
            return tracing::error!(error = %Chain(&error), "cannot read requests from other replicas");
        }
        Err(_) => return tracing::error!("cannot read requests from other replicas in time"),
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

/// Stops the tasks of runs that another replica has taken over, also of runs that were cancelled
/// in the queue.
async fn give_up_lost(ctx: &Context, limit: Duration) {
    let active = ctx.registry.runs();
    if active.is_empty() {
        return;
    }
    // If the query fails, the next renewal repeats it.
    if let Ok(Ok(lost)) = timeout(limit, ctx.store.runs_taken_over(ctx.replica, &active)).await {
        for handle in lost.into_iter().filter_map(|run| ctx.registry.handle(run)) {
            handle.let_go();
        }
    }
}

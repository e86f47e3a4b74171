//! Writes what runs show while they go on: one write for all of them, not one for each event. A run that is over by then
//! has cost nothing more than its end. A run that goes on is written less and less often, unless somebody follows it on
//! another replica.

use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::error::Chain;
use crate::runs::context::Context;
use crate::runs::log::writer::{OFTEN, RunLog, Unrecorded};
use crate::store::{Notification, RunProgress};

/// Longest time for one write.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// Runs recorded in one write.
const BATCH: usize = 256;

/// Records, time and again, what the runs of this process have shown. Never ends; may be dropped.
pub(in crate::runs) async fn keep_flushing(ctx: &Context) {
    let mut ticks = interval(OFTEN);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        flush(ctx, RunLog::overdue).await;
    }
}

/// Records all that the runs of this process have shown up to now.
pub(in crate::runs) async fn flush_now(ctx: &Context) {
    flush(ctx, RunLog::unrecorded).await;
}

/// Records what this finds of each run.
async fn flush(ctx: &Context, find: fn(&RunLog) -> Option<Unrecorded>) {
    let handles = ctx.registry.handles().into_iter();
    let found = handles.filter_map(|handle| {
        let (upstream_run_id, events) = find(&handle.log)?;
        Some(RunProgress {
            lease: handle.lease,
            upstream_run_id,
            events,
        })
    });
    for batch in found.collect::<Vec<_>>().chunks(BATCH) {
        flush_batch(ctx, batch).await;
    }
}

async fn flush_batch(ctx: &Context, batch: &[RunProgress]) {
    let recorded = match timeout(WRITE_TIMEOUT, ctx.store.record(batch)).await {
        Ok(Ok(recorded)) => recorded,
        Ok(Err(error)) => {
            return tracing::warn!(error = %Chain(&error), "cannot record what runs have shown yet");
        }
        Err(_) => return tracing::warn!("cannot record in time what runs have shown"),
    };
    for RunProgress {
        lease,
        upstream_run_id,
        events,
    } in batch
    {
        if !recorded.contains(&lease.run_id) {
            continue;
        }
        let handle = ctx.registry.handle(lease.run_id);
        if let Some(handle) = handle.filter(|handle| handle.lease == *lease) {
            handle.log.recorded(upstream_run_id.as_ref(), events);
        }
        ctx.notifier.notify(Notification::Run(lease.run_id));
    }
}

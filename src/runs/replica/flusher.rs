//! The flusher: it writes the events of all active runs in batches. A run that ends before the
//! next write costs only the write of its end. A longer run is written less and less often, unless
//! a reader on another replica follows it.

use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::error::Chain;
use crate::runs::context::Context;
use crate::runs::log::writer::{OFTEN, RunLog, Unrecorded};
use crate::store::{Notification, RunProgress};

/// Longest time of one write.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// Most runs in one write.
const BATCH: usize = 256;

/// Writes new events of this process's runs again and again. Never returns; the future may be
/// dropped.
pub(in crate::runs) async fn keep_flushing(ctx: &Context) {
    let mut ticks = interval(OFTEN);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        flush(ctx, RunLog::overdue).await;
    }
}

/// Writes all events that this process's runs have shown up to now.
pub(in crate::runs) async fn flush_now(ctx: &Context) {
    flush(ctx, RunLog::unrecorded).await;
}

/// Writes what `find` returns of each run.
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
            return tracing::warn!(error = %Chain(&error), "cannot write the events of active runs yet");
        }
        Err(_) => return tracing::warn!("cannot write the events of active runs in time"),
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

//! Recording what runs show while they go on: one write for all of them, a few times a second, not one for each event.
//! A run that is over by then has cost nothing more than its end.

use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval, timeout};

use super::Runs;
use crate::error::Chain;
use crate::store::{News, RunProgress};

/// How often what is new is recorded, and how old it must be.
const TICK: Duration = Duration::from_millis(100);
/// Longest time for one write.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// Runs recorded in one write.
const BATCH: usize = 256;

impl Runs {
    /// Records, time and again, what the runs of this process have shown. Never ends; may be dropped.
    pub(super) async fn record(&self) {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.record_older_than(TICK).await;
        }
    }

    /// Records all that the runs of this process have shown up to now.
    pub async fn record_now(&self) {
        self.record_older_than(Duration::ZERO).await;
    }

    async fn record_older_than(&self, age: Duration) {
        for batch in self.overdue(age).chunks(BATCH) {
            self.record_batch(batch).await;
        }
    }

    fn overdue(&self, age: Duration) -> Vec<RunProgress> {
        let handles = self.parts.standing.handles();
        let overdue = handles.into_iter().filter_map(|handle| {
            let (upstream_run_id, events) = handle.feed.overdue(age)?;
            Some(RunProgress { lease: handle.lease, upstream_run_id, events })
        });
        overdue.collect()
    }

    async fn record_batch(&self, batch: &[RunProgress]) {
        let recorded = match timeout(WRITE_TIMEOUT, self.store().record(batch)).await {
            Ok(Ok(recorded)) => recorded,
            Ok(Err(error)) => {
                return tracing::warn!(error = %Chain(&error), "cannot record what runs have shown yet");
            }
            Err(_) => return tracing::warn!("cannot record in time what runs have shown"),
        };
        for RunProgress { lease, upstream_run_id, events } in batch {
            if !recorded.contains(&lease.run_id) {
                continue;
            }
            let handle = self.parts.standing.handle(lease.run_id);
            if let Some(handle) = handle.filter(|handle| handle.lease == *lease) {
                handle.feed.recorded(upstream_run_id.as_ref(), events);
            }
            self.parts.desk.tell(News::Run(lease.run_id));
        }
    }
}

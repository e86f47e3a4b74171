//! Measures how long the runs of a killed replica stand still.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::world::{Teller, World};

/// Longest time until the takeover, whatever other faults are active.
const BOUND: Duration = Duration::from_mins(1);

/// The runs of a replica that is about to be killed.
pub(super) struct Watch {
    runs: Vec<String>,
    fences: String,
    /// The number of the kill, if no other fault was active.
    only: Option<usize>,
}

impl Watch {
    /// Reads the runs of the replica at this address. Returns `None` while the database is away.
    pub(super) async fn begin(world: &World, address: &str) -> Option<Self> {
        let _is_up = world.server.try_read().ok()?;
        let sql = format!(
            "SELECT r.id::text || ' ' || r.fence FROM runs r JOIN replicas p ON p.id = r.owner \
             WHERE p.address = '{address}' AND r.finished_at IS NULL"
        );
        let rows = world.scene.database.texts(&sql).await;
        let mut runs = Vec::new();
        let mut fences = Vec::new();
        for row in rows {
            let (run, fence) = row.split_once(' ').unwrap();
            fences.push(format!("(r.id = '{run}' AND r.fence = {fence})"));
            runs.push(run.to_owned());
        }
        Some(Self {
            runs,
            fences: fences.join(" OR "),
            only: world.only_trouble(),
        })
    }

    /// Waits until all these runs have ended or changed hands.
    pub(super) async fn end(self, world: Arc<World>) {
        let killed = Instant::now();
        if self.runs.is_empty() {
            return;
        }
        let waiting = format!(
            "SELECT count(*) FROM runs r WHERE r.finished_at IS NULL AND ({})",
            self.fences
        );
        loop {
            let is_up = world.server.read().await;
            let left = world.scene.database.number(&waiting).await;
            drop(is_up);
            let took = killed.elapsed();
            if left == 0 {
                world.add("runs: taken over after a kill", self.runs.len());
                world.took("takeover", took);
                if self.only.is_some() && self.only == world.only_trouble() {
                    world.took("takeover without other trouble", took);
                }
                world.tell(
                    Teller::FaultInjector,
                    format!(
                        "{} runs of a killed replica continued after {took:?}",
                        self.runs.len()
                    ),
                );
                return;
            }
            if took > BOUND {
                let what = format!("{left} of the runs {:?} were never taken over", self.runs);
                return world.fault(Teller::FaultInjector, what);
            }
            sleep(Duration::from_millis(50)).await;
        }
    }
}

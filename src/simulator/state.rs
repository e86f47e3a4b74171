//! The content of the simulated server, and what its parts share.

pub(super) mod assistants;
pub(super) mod faults;
pub(super) mod items;
pub(super) mod responses;
pub(super) mod stats;
pub(super) mod table;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::simulator::config::SimulatorConfig;
use assistants::{Run, Thread};
use faults::Faults;
use responses::{Conversation, StoredResponse};
use stats::Counters;
use table::Table;

/// The simulated server, shared by its connections, generations and handles.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) config: SimulatorConfig,
    world: Mutex<World>,
    /// Counts the changes that a test may wait for.
    changes: watch::Sender<u64>,
    /// While true, runs wait before their first token.
    gate: watch::Sender<bool>,
    /// Generations and connections.
    pub(super) tasks: TaskTracker,
    /// Cancelled when the simulator stops.
    pub(super) stop: CancellationToken,
    ids: AtomicU64,
    /// Distinguishes the ids of one simulator from those of another.
    nonce: u32,
    started: Instant,
    started_at: i64,
}

/// Everything that is stored.
#[derive(Debug)]
pub(super) struct World {
    pub(super) threads: Table<Thread>,
    pub(super) runs: Table<Run>,
    pub(super) conversations: Table<Conversation>,
    pub(super) responses: Table<StoredResponse>,
    /// Responses whose events are kept for replay, oldest first.
    pub(super) replayable: VecDeque<String>,
    pub(super) counters: Counters,
    pub(super) faults: Faults,
    /// Ends all generations of this world.
    pub(super) end: CancellationToken,
}

impl Server {
    pub(super) fn new(config: SimulatorConfig) -> Self {
        let (stop, started) = (CancellationToken::new(), Instant::now());
        Self {
            world: Mutex::new(World::new(config.max_kept, started, stop.child_token())),
            changes: watch::Sender::new(0),
            gate: watch::Sender::new(false),
            tasks: TaskTracker::new(),
            stop,
            ids: AtomicU64::new(0),
            nonce: rand::random(),
            started,
            started_at: wall_clock(),
            config,
        }
    }

    /// Locks the world. Never hold the guard across an await.
    pub(super) fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes everything except the configuration. Active runs end without a trace.
    pub(super) fn reset(&self) {
        let new = World::new(self.config.max_kept, self.started, self.stop.child_token());
        let old = std::mem::replace(&mut *self.world(), new);
        old.end.cancel();
        self.release();
        self.changed();
    }

    /// Returns the seconds since the epoch, by the simulated server's clock.
    pub(super) fn now(&self) -> i64 {
        self.seconds_at(Instant::now())
    }

    pub(super) fn seconds_at(&self, instant: Instant) -> i64 {
        let past = instant.saturating_duration_since(self.started).as_secs();
        self.started_at.saturating_add_unsigned(past)
    }

    /// Returns a new id: `prefix_` and 24 hex digits, in order of creation.
    pub(super) fn id(&self, prefix: &str) -> String {
        let number = self.ids.fetch_add(1, Ordering::Relaxed);
        format!("{prefix}_{:08x}{number:016x}", self.nonce)
    }

    /// Returns a new conversation id: 48 hex digits.
    pub(super) fn conversation_id(&self) -> String {
        let number = self.ids.fetch_add(1, Ordering::Relaxed);
        format!("conv_{:032x}{number:016x}", self.nonce)
    }

    pub(super) fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    pub(super) fn hold(&self) {
        self.gate.send_replace(true);
    }

    pub(super) fn release(&self) {
        self.gate.send_replace(false);
    }

    pub(super) fn is_held(&self) -> bool {
        *self.gate.borrow()
    }

    /// Waits until runs may continue. May be dropped.
    pub(super) async fn released(&self) {
        let mut gate = self.gate.subscribe();
        if gate.wait_for(|held| !*held).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl World {
    /// `since`: the start of the simulator.
    fn new(cap: usize, since: Instant, end: CancellationToken) -> Self {
        Self {
            threads: Table::new(cap),
            runs: Table::new(cap),
            conversations: Table::new(cap),
            responses: Table::new(cap),
            replayable: VecDeque::new(),
            counters: Counters::new(since, cap),
            faults: Faults::default(),
            end,
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the simulator plays a foreign server, whose clock is its own"
)]
fn wall_clock() -> i64 {
    let since_epoch = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    i64::try_from(since_epoch.as_secs()).unwrap_or(i64::MAX)
}

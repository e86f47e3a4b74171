//! What the simulated server holds, and what its parts share.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::assistants::{Run, Thread};
use super::config::SimulatorConfig;
use super::faults::Faults;
use super::responses::{Conversation, StoredResponse};
use super::stats::Counters;

/// The one simulated server: shared by its connections, its generations and its handles.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) config: SimulatorConfig,
    world: Mutex<World>,
    /// Changes with every change of the world that a test may wait for.
    changes: watch::Sender<u64>,
    /// While true, runs wait before their first token.
    gate: watch::Sender<bool>,
    /// Generations and connections.
    pub(super) tasks: TaskTracker,
    /// Cancelled when the simulator stops.
    pub(super) stop: CancellationToken,
    ids: AtomicU64,
    /// Tells the ids of one simulator from those of another.
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

    /// The world, for a short time: never held across an await.
    pub(super) fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets everything but the configuration. Runs that still work end without a trace.
    pub(super) fn reset(&self) {
        let new = World::new(self.config.max_kept, self.started, self.stop.child_token());
        let old = std::mem::replace(&mut *self.world(), new);
        old.end.cancel();
        self.release();
        self.changed();
    }

    /// Seconds since the epoch, by the simulated server's clock.
    pub(super) fn now(&self) -> i64 {
        self.seconds_at(Instant::now())
    }

    pub(super) fn seconds_at(&self, instant: Instant) -> i64 {
        let past = instant.saturating_duration_since(self.started).as_secs();
        self.started_at.saturating_add_unsigned(past)
    }

    /// A new id: `prefix_` and 24 hex digits, in the order of their making.
    pub(super) fn id(&self, prefix: &str) -> String {
        let number = self.ids.fetch_add(1, Ordering::Relaxed);
        format!("{prefix}_{:08x}{number:016x}", self.nonce)
    }

    /// A new conversation id: 48 hex digits.
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

    /// Resolves as soon as runs may go on. May be dropped.
    pub(super) async fn released(&self) {
        let mut gate = self.gate.subscribe();
        if gate.wait_for(|held| !*held).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl World {
    /// `since`: when the simulator was started.
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

/// Rows by id, in the order of their making, at most so many: past it the oldest idle ones are forgotten.
#[derive(Debug)]
pub(super) struct Table<T> {
    rows: HashMap<String, T>,
    order: VecDeque<String>,
    cap: usize,
}

/// A row that may be in use.
pub(super) trait Row {
    /// It must not be forgotten.
    fn is_busy(&self) -> bool;
}

impl<T: Row> Table<T> {
    fn new(cap: usize) -> Self {
        Self { rows: HashMap::new(), order: VecDeque::new(), cap: cap.max(1) }
    }

    pub(super) fn get(&self, id: &str) -> Option<&T> {
        self.rows.get(id)
    }

    pub(super) fn get_mut(&mut self, id: &str) -> Option<&mut T> {
        self.rows.get_mut(id)
    }

    pub(super) fn remove(&mut self, id: &str) -> Option<T> {
        let row = self.rows.remove(id);
        if self.order.len() > 2 * self.rows.len() + 64 {
            self.order.retain(|id| self.rows.contains_key(id));
        }
        row
    }

    /// Rows and ids, oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&String, &T)> {
        self.order.iter().filter_map(|id| self.rows.get_key_value(id))
    }

    pub(super) fn insert(&mut self, id: String, row: T) {
        self.order.push_back(id.clone());
        self.rows.insert(id, row);
        // Busy rows move to the young end; a bound keeps a world of busy rows from being searched for ever.
        for _ in 0..8 {
            if self.rows.len() <= self.cap {
                break;
            }
            let Some(oldest) = self.order.pop_front() else { break };
            match self.rows.get(&oldest) {
                Some(row) if row.is_busy() => self.order.push_back(oldest),
                Some(_) => {
                    self.rows.remove(&oldest);
                }
                None => {}
            }
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "the simulator plays a foreign server, whose clock is its own")]
fn wall_clock() -> i64 {
    let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    i64::try_from(since_epoch.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Numbered(bool);

    impl Row for Numbered {
        fn is_busy(&self) -> bool {
            self.0
        }
    }

    #[test]
    fn a_full_table_forgets_the_oldest_idle_row() {
        let mut table = Table::new(2);
        table.insert("busy".to_owned(), Numbered(true));
        for id in ["a", "b", "c"] {
            table.insert(id.to_owned(), Numbered(false));
        }
        assert!(table.get("busy").is_some() && table.get("a").is_none() && table.get("c").is_some());
        assert_eq!(table.iter().count(), 2);
    }
}

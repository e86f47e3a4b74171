//! One run at a time, inside this process: a line of places for each key, first come first served.
//!
//! A place is had in two steps: first the right to record the run in the store ([`Place::to_record`]), in the order of
//! joining, so that the store's order of admission is ours, then the turn itself ([`Place::turn`]), in the order of the
//! line. Both orders are the same but for places that [go next](LockMap::join_next). Dropping a place at any moment
//! gives it up and wakes whoever is next. A line vanishes with its last place.
//!
//! Between processes the store's unique index holds the same promise; this line keeps waiting runs off it.

mod gate;
mod seats;
mod width;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::future::poll_fn;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

pub use gate::{Gate, Overrun, Pass, Turn};
pub use seats::{NoSeat, Seat, Seats};

/// The lines of all keys. Clones share them.
pub struct LockMap<K> {
    lines: Arc<Mutex<HashMap<K, Line>>>,
    max_waiting: usize,
}

/// The line is as long as it may get.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct QueueFull {
    /// Places behind the first.
    pub max_waiting: usize,
}

impl<K: Clone + Eq + Hash> LockMap<K> {
    /// Lines of one place that may have its turn and `max_waiting` behind it.
    pub fn new(max_waiting: usize) -> Self {
        Self { lines: Arc::default(), max_waiting }
    }

    /// Joins the end of the key's line.
    ///
    /// # Errors
    /// [`QueueFull`] if `max_waiting` places wait already.
    pub fn join(&self, key: K) -> Result<Place<K>, QueueFull> {
        self.join_at(key, |line| line.places.len())
    }

    /// Joins the key's line before all places that have not [started](Place::started).
    ///
    /// # Errors
    /// [`QueueFull`] if `max_waiting` places wait already.
    pub fn join_next(&self, key: K) -> Result<Place<K>, QueueFull> {
        self.join_at(key, |line| line.places.iter().take_while(|slot| slot.started).count())
    }

    /// Joins the key's line if nobody is in it.
    pub fn join_idle(&self, key: K) -> Option<Place<K>> {
        let mut lines = lock(&self.lines);
        if lines.contains_key(&key) { None } else { Some(self.place(&mut lines, key, |_| 0)) }
    }

    fn join_at(&self, key: K, at: impl FnOnce(&Line) -> usize) -> Result<Place<K>, QueueFull> {
        let mut lines = lock(&self.lines);
        let waiting = lines.get(&key).map_or(0, |line| line.places.len());
        if waiting > self.max_waiting {
            return Err(QueueFull { max_waiting: self.max_waiting });
        }
        Ok(self.place(&mut lines, key, at))
    }

    /// Keys with somebody in line.
    pub fn len(&self) -> usize {
        lock(&self.lines).len()
    }

    /// Nobody is in any line.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn place(&self, lines: &mut HashMap<K, Line>, key: K, at: impl FnOnce(&Line) -> usize) -> Place<K> {
        let line = lines.entry(key.clone()).or_default();
        let ticket = line.next_ticket;
        line.next_ticket += 1;
        let at = at(line);
        line.places.insert(at, Slot { ticket, recorded: false, started: false, waker: None });
        Place { lines: Arc::clone(&self.lines), key, ticket }
    }
}

impl<K> Clone for LockMap<K> {
    fn clone(&self) -> Self {
        Self { lines: Arc::clone(&self.lines), max_waiting: self.max_waiting }
    }
}

impl<K> fmt::Debug for LockMap<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockMap").field("lines", &lock(&self.lines).len()).finish_non_exhaustive()
    }
}

/// A place in a line. Once [`turn`](Self::turn) has returned it is the first; it stays so until it is dropped if it
/// [started](Self::started), else until one comes that goes next.
#[must_use = "dropping a place gives it up"]
pub struct Place<K: Eq + Hash> {
    lines: Arc<Mutex<HashMap<K, Line>>>,
    key: K,
    ticket: u64,
}

impl<K: Eq + Hash> Place<K> {
    /// Waits until every place that joined before this one has been recorded or given up. May be dropped and called
    /// again.
    pub async fn to_record(&mut self) {
        poll_fn(|cx| self.poll(cx, |line, ticket| line.first_unrecorded() == Some(ticket))).await;
    }

    /// Says that the run of this place is recorded: the next in line may record its own.
    pub fn recorded(&mut self) {
        self.change(|line| {
            if let Some(slot) = line.slot(self.ticket) {
                slot.recorded = true;
            }
        });
    }

    /// Says that the run of this place has started: nobody goes before it any more. The store starts one at a time, so
    /// this one is the first from now on, even if another has gone before it in the meantime.
    pub fn started(&mut self) {
        self.change(|line| {
            let Some(at) = line.places.iter().position(|slot| slot.ticket == self.ticket) else { return };
            if let Some(mut slot) = line.places.remove(at) {
                slot.started = true;
                line.places.push_front(slot);
            }
        });
    }

    /// Waits until this place is the first. May be dropped and called again.
    pub async fn turn(&mut self) {
        poll_fn(|cx| {
            self.poll(cx, |line, ticket| line.places.front().is_some_and(|slot| slot.ticket == ticket))
        })
        .await;
    }

    /// Changes the line and wakes whom that can have set free.
    fn change(&self, change: impl FnOnce(&mut Line)) {
        let woken = {
            let mut lines = lock(&self.lines);
            let Some(line) = lines.get_mut(&self.key) else { return };
            change(line);
            if line.places.is_empty() {
                lines.remove(&self.key);
                return;
            }
            line.take_next()
        };
        woken.into_iter().flatten().for_each(Waker::wake);
    }

    fn poll(&self, cx: &Context<'_>, may_go: impl Fn(&Line, u64) -> bool) -> Poll<()> {
        let mut lines = lock(&self.lines);
        // A place is in its line until it is dropped.
        let Some(line) = lines.get_mut(&self.key) else { return Poll::Ready(()) };
        if may_go(line, self.ticket) {
            return Poll::Ready(());
        }
        if let Some(slot) = line.slot(self.ticket) {
            slot.waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }
}

impl<K: Eq + Hash> Drop for Place<K> {
    fn drop(&mut self) {
        self.change(|line| line.places.retain(|slot| slot.ticket != self.ticket));
    }
}

impl<K: Eq + Hash> fmt::Debug for Place<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Place").field("ticket", &self.ticket).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Line {
    places: VecDeque<Slot>,
    next_ticket: u64,
}

struct Slot {
    ticket: u64,
    recorded: bool,
    started: bool,
    waker: Option<Waker>,
}

impl Line {
    fn slot(&mut self, ticket: u64) -> Option<&mut Slot> {
        self.places.iter_mut().find(|slot| slot.ticket == ticket)
    }

    fn first_unrecorded(&self) -> Option<u64> {
        self.places.iter().filter(|slot| !slot.recorded).map(|slot| slot.ticket).min()
    }

    /// The wakers of the two places that a change can have set free: the first, and the oldest unrecorded. Waking
    /// one that may not go yet is harmless: it asks again.
    fn take_next(&mut self) -> [Option<Waker>; 2] {
        let recorder = self.first_unrecorded().and_then(|ticket| self.slot(ticket)?.waker.take());
        let mut woken = Vec::from_iter(recorder);
        // Nearly always there is one.
        let mut lanes = Vec::new();
        for slot in &mut self.places {
            // Behind one that is not recorded yet nobody has a turn.
            let Some(lane) = slot.lane else { break };
            if !lanes.contains(&lane) {
                lanes.push(lane);
                woken.extend(slot.waker.take());
            }
        }
        woken
    }
}

/// The map is consistent at every unlock, so a panic elsewhere while it was locked leaves nothing to mend.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;

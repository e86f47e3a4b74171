//! One run at a time, inside this process: a line of places for each key, first come first served.
//!
//! A place is had in two steps: first the right to record the run in the store ([`Place::to_record`]), in the order of
//! joining, so that the store's order of admission is ours, then the turn itself ([`Place::turn`]), in the order of the
//! line. Both orders are the same but for places that [go next](LockMap::join_next). Dropping a place at any moment
//! gives it up and wakes whoever is next. A line vanishes with its last place.
//!
//! A key may have runs on several threads: the one before has expired or is being deleted, and its run goes on. The
//! store tells with each record which thread the run is on. That is the place's *track*, and a place waits only for
//! those before it in its own track, and for those of which the track is not known yet.
//!
//! Between processes the store's unique index holds the same promise; this line keeps waiting runs off it.

mod budget;
mod seats;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::future::poll_fn;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

pub use budget::{Budget, Share};
pub use seats::{NoSeat, Seat, Seats};

/// The lines of all keys `K`, in tracks `L`. Clones share them.
pub struct LockMap<K, L> {
    lines: Lines<K, L>,
    max_waiting: usize,
}

type Lines<K, L> = Arc<Mutex<HashMap<K, Line<L>>>>;

/// The line is as long as it may get.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct QueueFull {
    /// Places behind the first.
    pub max_waiting: usize,
}

impl<K: Clone + Eq + Hash, L: Copy + Eq> LockMap<K, L> {
    /// Lines of one place that may have its turn and `max_waiting` behind it.
    pub fn new(max_waiting: usize) -> Self {
        Self { lines: Arc::default(), max_waiting }
    }

    /// Joins the end of the key's line.
    ///
    /// # Errors
    /// [`QueueFull`] if `max_waiting` places wait already.
    pub fn join(&self, key: K) -> Result<Place<K, L>, QueueFull> {
        self.join_at(key, |line| line.places.len())
    }

    /// Joins the key's line before all places that have not [started](Place::started).
    ///
    /// # Errors
    /// [`QueueFull`] if `max_waiting` places wait already.
    pub fn join_next(&self, key: K) -> Result<Place<K, L>, QueueFull> {
        self.join_at(key, |line| line.places.iter().take_while(|slot| slot.started).count())
    }

    /// All that were in one track of the key's line are in another one now.
    pub fn moved(&self, key: &K, from: L, to: L) {
        let mut lines = lock(&self.lines);
        let Some(line) = lines.get_mut(key) else { return };
        // Nobody gets free by it: those before a place in its old track are before it in the new one.
        for slot in line.places.iter_mut().filter(|slot| slot.track == Some(from)) {
            slot.track = Some(to);
        }
    }

    fn join_at(&self, key: K, at: impl FnOnce(&Line<L>) -> usize) -> Result<Place<K, L>, QueueFull> {
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

    fn place(
        &self,
        lines: &mut HashMap<K, Line<L>>,
        key: K,
        at: impl FnOnce(&Line<L>) -> usize,
    ) -> Place<K, L> {
        let line = lines.entry(key.clone()).or_default();
        let ticket = line.next_ticket;
        line.next_ticket += 1;
        let at = at(line);
        line.places.insert(at, Slot { ticket, track: None, started: false, waker: None });
        Place { lines: Arc::clone(&self.lines), key, ticket }
    }
}

impl<K, L> Clone for LockMap<K, L> {
    fn clone(&self) -> Self {
        Self { lines: Arc::clone(&self.lines), max_waiting: self.max_waiting }
    }
}

impl<K, L> fmt::Debug for LockMap<K, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockMap").field("lines", &lock(&self.lines).len()).finish_non_exhaustive()
    }
}

/// A place in a line. Once [`turn`](Self::turn) has returned it is the first of its track; it stays so until it is dropped if
/// it [started](Self::started), else until one comes that goes next.
#[must_use = "dropping a place gives it up"]
pub struct Place<K: Eq + Hash, L: Copy + Eq> {
    lines: Lines<K, L>,
    key: K,
    ticket: u64,
}

impl<K: Eq + Hash, L: Copy + Eq> Place<K, L> {
    /// Waits until every place that joined before this one has been recorded or given up. May be dropped and called
    /// again.
    pub async fn to_record(&mut self) {
        poll_fn(|cx| self.poll(cx, |line, ticket| line.first_unrecorded() == Some(ticket))).await;
    }

    /// Says that the run of this place is recorded, and in which track: the next in line may record its own.
    pub fn recorded(&mut self, track: L) {
        self.change(|line| {
            if let Some(slot) = line.slot(self.ticket) {
                slot.track = Some(track);
            }
        });
    }

    /// Says that the run of this place has started: nobody goes before it any more. The store starts one at a time, so
    /// this one is the first of its track from now on, even if another has gone before it in the meantime.
    pub fn started(&mut self) {
        self.change(|line| {
            let Some(at) = line.places.iter().position(|slot| slot.ticket == self.ticket) else { return };
            if let Some(mut slot) = line.places.remove(at) {
                slot.started = true;
                line.places.push_front(slot);
            }
        });
    }

    /// Waits until this place is the first of its track, and the tracks of all before it are known. May be dropped and called
    /// again.
    pub async fn turn(&mut self) {
        poll_fn(|cx| self.poll(cx, Line::has_turn)).await;
    }

    /// Changes the line and wakes those whom that can have set free.
    fn change(&self, change: impl FnOnce(&mut Line<L>)) {
        let woken = {
            let mut lines = lock(&self.lines);
            let Some(line) = lines.get_mut(&self.key) else { return };
            change(line);
            if line.places.is_empty() {
                lines.remove(&self.key);
                return;
            }
            line.take_free()
        };
        woken.into_iter().for_each(Waker::wake);
    }

    fn poll(&self, cx: &Context<'_>, may_go: impl Fn(&Line<L>, u64) -> bool) -> Poll<()> {
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

impl<K: Eq + Hash, L: Copy + Eq> Drop for Place<K, L> {
    fn drop(&mut self) {
        self.change(|line| line.places.retain(|slot| slot.ticket != self.ticket));
    }
}

impl<K: Eq + Hash, L: Copy + Eq> fmt::Debug for Place<K, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Place").field("ticket", &self.ticket).finish_non_exhaustive()
    }
}

struct Line<L> {
    places: VecDeque<Slot<L>>,
    next_ticket: u64,
}

struct Slot<L> {
    ticket: u64,
    /// `None`: not recorded yet.
    track: Option<L>,
    started: bool,
    waker: Option<Waker>,
}

impl<L> Default for Line<L> {
    fn default() -> Self {
        Self { places: VecDeque::new(), next_ticket: 0 }
    }
}

impl<L: Copy + Eq> Line<L> {
    fn slot(&mut self, ticket: u64) -> Option<&mut Slot<L>> {
        self.places.iter_mut().find(|slot| slot.ticket == ticket)
    }

    fn first_unrecorded(&self) -> Option<u64> {
        self.places.iter().filter(|slot| slot.track.is_none()).map(|slot| slot.ticket).min()
    }

    fn has_turn(&self, ticket: u64) -> bool {
        let Some(at) = self.places.iter().position(|slot| slot.ticket == ticket) else { return true };
        let track = self.places[at].track;
        self.places.iter().take(at).all(|before| before.track.is_some() && before.track != track)
    }

    /// The wakers of the places that a change can have set free: the first of each track, and the oldest unrecorded. Waking
    /// one that may not go yet is harmless: it asks again.
    fn take_free(&mut self) -> Vec<Waker> {
        let recorder = self.first_unrecorded().and_then(|ticket| self.slot(ticket)?.waker.take());
        let mut woken = Vec::from_iter(recorder);
        // Nearly always there is one.
        let mut tracks = Vec::new();
        for slot in &mut self.places {
            // Behind one that is not recorded yet nobody has a turn.
            let Some(track) = slot.track else { break };
            if !tracks.contains(&track) {
                tracks.push(track);
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

//! One run at a time, inside this process: a queue for each key, first come first served.
//!
//! A ticket gives two rights, one after the other. The first is to record the run in the store ([`Ticket::to_record`]), in the
//! order of joining, so that the store's order of admission is ours. The second is the turn ([`Ticket::turn`]), in the order of
//! the queue. Both orders are the same but for tickets that [go next](KeyedQueue::join_next). Dropping a ticket at any moment
//! gives it up and wakes the next one. A queue vanishes with its last ticket.
//!
//! A key may have runs on several threads: the one before has expired or is being deleted, and its run goes on. The
//! store tells with each record which thread the run is on. That is the ticket's *track*, and a ticket waits only for
//! those before it in its own track, and for those of which the track is not known yet.
//!
//! Between processes the store's unique index holds the same promise; this queue keeps waiting runs off it.

mod budget;
mod semaphore;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::future::poll_fn;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

pub use budget::{Budget, Share};
pub use semaphore::{KeyedSemaphore, NoPermit, Permit};

/// The queues of all keys `K`, in tracks `L`. Clones share them.
pub struct KeyedQueue<K, L> {
    queues: Queues<K, L>,
    max_waiting: usize,
}

type Queues<K, L> = Arc<Mutex<HashMap<K, Queue<L>>>>;

/// The queue is as long as it may get.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct QueueFull {
    /// Tickets behind the first.
    pub max_waiting: usize,
}

impl<K: Clone + Eq + Hash, L: Copy + Eq> KeyedQueue<K, L> {
    /// Queues of one ticket that may have its turn and `max_waiting` behind it.
    pub fn new(max_waiting: usize) -> Self {
        Self {
            queues: Arc::default(),
            max_waiting,
        }
    }

    /// Joins the end of the key's queue.
    ///
    /// # Errors
    /// [`QueueFull`] if `max_waiting` tickets wait already.
    pub fn join(&self, key: K) -> Result<Ticket<K, L>, QueueFull> {
        self.join_at(key, |queue| queue.entries.len())
    }

    /// Joins the key's queue before all tickets that have not [started](Ticket::started).
    ///
    /// # Errors
    /// [`QueueFull`] if `max_waiting` tickets wait already.
    pub fn join_next(&self, key: K) -> Result<Ticket<K, L>, QueueFull> {
        self.join_at(key, |queue| {
            queue
                .entries
                .iter()
                .take_while(|entry| entry.started)
                .count()
        })
    }

    /// All that were in one track of the key's queue are in another one now.
    pub fn moved(&self, key: &K, from: L, to: L) {
        let mut queues = lock(&self.queues);
        let Some(queue) = queues.get_mut(key) else {
            return;
        };
        // Nobody gets free by it: those before a ticket in its old track are before it in the new one.
        for entry in queue
            .entries
            .iter_mut()
            .filter(|entry| entry.track == Some(from))
        {
            entry.track = Some(to);
        }
    }

    fn join_at(
        &self,
        key: K,
        at: impl FnOnce(&Queue<L>) -> usize,
    ) -> Result<Ticket<K, L>, QueueFull> {
        let mut queues = lock(&self.queues);
        let waiting = queues.get(&key).map_or(0, |queue| queue.entries.len());
        if waiting > self.max_waiting {
            return Err(QueueFull {
                max_waiting: self.max_waiting,
            });
        }
        Ok(self.ticket(&mut queues, key, at))
    }

    /// Keys with a ticket in their queue.
    pub fn len(&self) -> usize {
        lock(&self.queues).len()
    }

    /// No queue has a ticket.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn ticket(
        &self,
        queues: &mut HashMap<K, Queue<L>>,
        key: K,
        at: impl FnOnce(&Queue<L>) -> usize,
    ) -> Ticket<K, L> {
        let queue = queues.entry(key.clone()).or_default();
        let number = queue.next_number;
        queue.next_number += 1;
        let at = at(queue);
        queue.entries.insert(
            at,
            Entry {
                number,
                track: None,
                started: false,
                waker: None,
            },
        );
        Ticket {
            queues: Arc::clone(&self.queues),
            key,
            number,
        }
    }
}

impl<K, L> Clone for KeyedQueue<K, L> {
    fn clone(&self) -> Self {
        Self {
            queues: Arc::clone(&self.queues),
            max_waiting: self.max_waiting,
        }
    }
}

impl<K, L> fmt::Debug for KeyedQueue<K, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyedQueue")
            .field("queues", &lock(&self.queues).len())
            .finish_non_exhaustive()
    }
}

/// A ticket in a queue. Once [`turn`](Self::turn) has returned it is the first of its track; it stays so until it is dropped if
/// it [started](Self::started), else until one comes that goes next.
#[must_use = "dropping a ticket gives it up"]
pub struct Ticket<K: Eq + Hash, L: Copy + Eq> {
    queues: Queues<K, L>,
    key: K,
    number: u64,
}

impl<K: Eq + Hash, L: Copy + Eq> Ticket<K, L> {
    /// Waits until every ticket that joined before this one has been recorded or given up. May be dropped and called
    /// again.
    pub async fn to_record(&mut self) {
        poll_fn(|cx| self.poll(cx, |queue, number| queue.first_unrecorded() == Some(number))).await;
    }

    /// Says that the run of this ticket is recorded, and in which track: the next in queue may record its own.
    pub fn recorded(&mut self, track: L) {
        self.change(|queue| {
            if let Some(entry) = queue.entry(self.number) {
                entry.track = Some(track);
            }
        });
    }

    /// Says that the run of this ticket has started: nobody goes before it any more. The store starts one at a time, so
    /// this one is the first of its track from now on, even if another has gone before it in the meantime.
    pub fn started(&mut self) {
        self.change(|queue| {
            let Some(at) = queue
                .entries
                .iter()
                .position(|entry| entry.number == self.number)
            else {
                return;
            };
            if let Some(mut entry) = queue.entries.remove(at) {
                entry.started = true;
                queue.entries.push_front(entry);
            }
        });
    }

    /// Waits until this ticket is the first of its track, and the tracks of all before it are known. May be dropped and called
    /// again.
    pub async fn turn(&mut self) {
        poll_fn(|cx| self.poll(cx, Queue::has_turn)).await;
    }

    /// Changes the queue and wakes the tickets that this can have set free.
    fn change(&self, change: impl FnOnce(&mut Queue<L>)) {
        let woken = {
            let mut queues = lock(&self.queues);
            let Some(queue) = queues.get_mut(&self.key) else {
                return;
            };
            change(queue);
            if queue.entries.is_empty() {
                queues.remove(&self.key);
                return;
            }
            queue.take_free()
        };
        woken.into_iter().for_each(Waker::wake);
    }

    fn poll(&self, cx: &Context<'_>, may_go: impl Fn(&Queue<L>, u64) -> bool) -> Poll<()> {
        let mut queues = lock(&self.queues);
        // A ticket is in its queue until it is dropped.
        let Some(queue) = queues.get_mut(&self.key) else {
            return Poll::Ready(());
        };
        if may_go(queue, self.number) {
            return Poll::Ready(());
        }
        if let Some(entry) = queue.entry(self.number) {
            entry.waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }
}

impl<K: Eq + Hash, L: Copy + Eq> Drop for Ticket<K, L> {
    fn drop(&mut self) {
        self.change(|queue| queue.entries.retain(|entry| entry.number != self.number));
    }
}

impl<K: Eq + Hash, L: Copy + Eq> fmt::Debug for Ticket<K, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket")
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}

struct Queue<L> {
    entries: VecDeque<Entry<L>>,
    next_number: u64,
}

struct Entry<L> {
    number: u64,
    /// `None`: not recorded yet.
    track: Option<L>,
    started: bool,
    waker: Option<Waker>,
}

impl<L> Default for Queue<L> {
    fn default() -> Self {
        Self {
            entries: VecDeque::new(),
            next_number: 0,
        }
    }
}

impl<L: Copy + Eq> Queue<L> {
    fn entry(&mut self, number: u64) -> Option<&mut Entry<L>> {
        self.entries.iter_mut().find(|entry| entry.number == number)
    }

    fn first_unrecorded(&self) -> Option<u64> {
        self.entries
            .iter()
            .filter(|entry| entry.track.is_none())
            .map(|entry| entry.number)
            .min()
    }

    fn has_turn(&self, number: u64) -> bool {
        let Some(at) = self.entries.iter().position(|entry| entry.number == number) else {
            return true;
        };
        let track = self.entries[at].track;
        self.entries
            .iter()
            .take(at)
            .all(|before| before.track.is_some() && before.track != track)
    }

    /// The wakers of the tickets that a change can have set free: the first of each track, and the oldest unrecorded. Waking
    /// one that may not go yet is harmless: it asks again.
    fn take_free(&mut self) -> Vec<Waker> {
        let recorder = self
            .first_unrecorded()
            .and_then(|number| self.entry(number)?.waker.take());
        let mut woken = Vec::from_iter(recorder);
        // Nearly always there is one.
        let mut tracks = Vec::new();
        for entry in &mut self.entries {
            // Behind one that is not recorded yet nobody has a turn.
            let Some(track) = entry.track else { break };
            if !tracks.contains(&track) {
                tracks.push(track);
                woken.extend(entry.waker.take());
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

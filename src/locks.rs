//! A fair queue for each key inside this process, so that one run of a thread works at a time.
//!
//! A ticket gives two rights, one after the other:
//!
//! - The right to record the run in the store ([`Ticket::to_record`]). Tickets get it in the order
//!   of joining, so that the store admits runs in that order.
//! - The right to start ([`Ticket::turn`]). Tickets get it in the order of the queue.
//!
//! The two orders differ only by tickets that [go next](KeyedQueue::join_next). A ticket can be
//! dropped at any moment; that gives up its place and wakes the next ticket. A queue is removed
//! with its last ticket.
//!
//! A key may have runs on several threads: the previous thread may have expired or may be in
//! deletion while its run continues. The store's answer to each record names the thread of the
//! run. That thread is the ticket's *track*. A ticket waits only for earlier tickets of its own
//! track, and for those whose track is not known yet.
//!
//! Between processes, the store's unique index enforces the same rule. This queue keeps the runs
//! that wait inside one process away from that index.

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

/// The queues of all keys `K`, with tracks `L`. Clones share them.
pub struct KeyedQueue<K, L> {
    queues: Queues<K, L>,
    max_waiting: usize,
}

type Queues<K, L> = Arc<Mutex<HashMap<K, Queue<L>>>>;

/// The queue is at its longest.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct QueueFull {
    /// Most tickets behind the first.
    pub max_waiting: usize,
}

impl<K: Clone + Eq + Hash, L: Copy + Eq> KeyedQueue<K, L> {
    /// Creates queues with one ticket at the front and at most `max_waiting` behind it.
    pub fn new(max_waiting: usize) -> Self {
        Self {
            queues: Arc::default(),
            max_waiting,
        }
    }

    /// Joins the end of the key's queue.
    ///
    /// # Errors
    /// [`QueueFull`] if `max_waiting` tickets already wait.
    pub fn join(&self, key: K) -> Result<Ticket<K, L>, QueueFull> {
        self.join_at(key, |queue| queue.entries.len())
    }

    /// Joins the key's queue before all tickets that have not [started](Ticket::started).
    ///
    /// # Errors
    /// [`QueueFull`] if `max_waiting` tickets already wait.
    pub fn join_next(&self, key: K) -> Result<Ticket<K, L>, QueueFull> {
        self.join_at(key, |queue| {
            queue
                .entries
                .iter()
                .take_while(|entry| entry.started)
                .count()
        })
    }

    /// Moves all tickets of one track of the key's queue to another track.
    pub fn moved(&self, key: &K, from: L, to: L) {
        let mut queues = lock(&self.queues);
        let Some(queue) = queues.get_mut(key) else {
            return;
        };
        // No ticket may start because of this: the tickets before it in the old track are before
        // it in the new one.
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

    /// Returns the number of keys with a ticket in their queue.
    pub fn len(&self) -> usize {
        lock(&self.queues).len()
    }

    /// Returns whether no queue has a ticket.
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

/// A place in a queue. When [`turn`](Self::turn) returns, the ticket is the first of its track. A
/// ticket that [started](Self::started) stays first until it is dropped. Any other stays first
/// until a ticket that goes next joins.
#[must_use = "dropping a ticket gives it up"]
pub struct Ticket<K: Eq + Hash, L: Copy + Eq> {
    queues: Queues<K, L>,
    key: K,
    number: u64,
}

impl<K: Eq + Hash, L: Copy + Eq> Ticket<K, L> {
    /// Waits until every earlier ticket is recorded or dropped. The future may be dropped and
    /// called again.
    pub async fn to_record(&mut self) {
        poll_fn(|cx| self.poll(cx, |queue, number| queue.first_unrecorded() == Some(number))).await;
    }

    /// Notes that this ticket's run is recorded, and in which track. The next ticket may then
    /// record its run.
    pub fn recorded(&mut self, track: L) {
        self.change(|queue| {
            if let Some(entry) = queue.entry(self.number) {
                entry.track = Some(track);
            }
        });
    }

    /// Notes that the run of this ticket has started, so no ticket goes before it any more. The
    /// store starts one run at a time. So this ticket becomes the first of its track, even if
    /// another one went before it meanwhile.
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

    /// Waits until this ticket is the first of its track and the tracks of all tickets before it
    /// are known. The future may be dropped and called again.
    pub async fn turn(&mut self) {
        poll_fn(|cx| self.poll(cx, Queue::has_turn)).await;
    }

    /// Changes the queue and wakes the tickets that may go because of that.
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
        // A ticket is in its queue until it is dropped, so a missing queue means no wait.
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

    /// Returns the wakers of the tickets that a change may let go: the first of each track, and
    /// the oldest unrecorded one. A ticket that wakes too early asks again, so waking it is
    /// harmless.
    fn take_free(&mut self) -> Vec<Waker> {
        let recorder = self
            .first_unrecorded()
            .and_then(|number| self.entry(number)?.waker.take());
        let mut woken = Vec::from_iter(recorder);
        // Nearly always there is one track.
        let mut tracks = Vec::new();
        for entry in &mut self.entries {
            // No ticket may start behind one whose track is not known.
            let Some(track) = entry.track else { break };
            if !tracks.contains(&track) {
                tracks.push(track);
                woken.extend(entry.waker.take());
            }
        }
        woken
    }
}

/// The map is consistent at every unlock, so a panic elsewhere leaves it intact and the poison can
/// be ignored.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;

//! So many at a time, in all and of each kind, so that what is taken stays quick.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Seats, of which there are only so many: in all, and for each key.
#[derive(Debug)]
pub struct Seats<K> {
    all: usize,
    each: usize,
    taken: Arc<Mutex<Taken<K>>>,
}

#[derive(Debug)]
struct Taken<K> {
    all: usize,
    by_key: HashMap<K, usize>,
}

/// Why there is no seat.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum NoSeat {
    /// None at all.
    Full,
    /// None for this key, which has that many.
    KeyFull(usize),
}

/// A seat, until it is dropped.
#[derive(Debug)]
pub struct Seat<K: Eq + Hash> {
    key: K,
    /// So many at once.
    count: usize,
    taken: Arc<Mutex<Taken<K>>>,
}

impl<K: Clone + Eq + Hash> Seats<K> {
    /// `usize::MAX` is no limit.
    pub fn new(all: usize, each: usize) -> Self {
        Self { all, each, taken: Arc::new(Mutex::new(Taken { all: 0, by_key: HashMap::new() })) }
    }

    /// A seat for the key, at once or not at all.
    pub fn take(&self, key: &K) -> Result<Seat<K>, NoSeat> {
        self.take_many(key, 1)
    }

    /// So many seats for the key as one, at once or not at all.
    pub fn take_many(&self, key: &K, count: usize) -> Result<Seat<K>, NoSeat> {
        let mut taken = lock(&self.taken);
        let own = taken.by_key.get(key).copied().unwrap_or_default().saturating_add(count);
        if own > self.each {
            return Err(NoSeat::KeyFull(self.each));
        }
        let all = taken.all.saturating_add(count);
        if all > self.all {
            return Err(NoSeat::Full);
        }
        taken.all = all;
        taken.by_key.insert(key.clone(), own);
        Ok(Seat { key: key.clone(), count, taken: Arc::clone(&self.taken) })
    }
}

impl<K: Eq + Hash> Drop for Seat<K> {
    fn drop(&mut self) {
        let mut taken = lock(&self.taken);
        taken.all -= self.count;
        if let Some(own) = taken.by_key.get_mut(&self.key) {
            *own -= self.count;
            if *own == 0 {
                taken.by_key.remove(&self.key);
            }
        }
    }
}

/// Nothing in here panics half-way through a change.
fn lock<K>(taken: &Mutex<Taken<K>>) -> MutexGuard<'_, Taken<K>> {
    taken.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seats_are_free_again_once_they_are_left() {
        let seats = Seats::new(3, 2);
        let (one, _two) = (seats.take(&"a").unwrap(), seats.take(&"a").unwrap());
        assert_eq!(seats.take(&"a").unwrap_err(), NoSeat::KeyFull(2));
        let third = seats.take(&"b").unwrap();
        assert_eq!(seats.take(&"b").unwrap_err(), NoSeat::Full);
        drop(one);
        let _again = seats.take(&"a").unwrap();
        drop(third);
        assert!(seats.take(&"b").is_ok());
        assert_eq!(lock(&seats.taken).by_key.len(), 1, "nothing is kept of who has none");
    }
}

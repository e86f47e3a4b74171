//! Permits that bound concurrent work, in all and for each key, so that accepted work stays quick.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A limited number of permits, in all and for each key.
#[derive(Debug)]
pub struct KeyedSemaphore<K> {
    all: usize,
    each: usize,
    taken: Arc<Mutex<Taken<K>>>,
}

#[derive(Debug)]
struct Taken<K> {
    all: usize,
    by_key: HashMap<K, usize>,
}

/// The limit that a request for a permit would exceed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum NoPermit {
    /// The limit of all keys together.
    Full,
    /// The limit for each key, which has this value.
    KeyFull(usize),
}

/// One or more permits of a key; its drop gives them back.
#[derive(Debug)]
pub struct Permit<K: Eq + Hash> {
    key: K,
    /// Number of permits that it stands for.
    count: usize,
    taken: Arc<Mutex<Taken<K>>>,
}

impl<K: Clone + Eq + Hash> KeyedSemaphore<K> {
    /// Creates a semaphore with limits in all and for each key. `usize::MAX` is no limit.
    pub fn new(all: usize, each: usize) -> Self {
        Self {
            all,
            each,
            taken: Arc::new(Mutex::new(Taken {
                all: 0,
                by_key: HashMap::new(),
            })),
        }
    }

    /// Takes a permit for the key, without waiting.
    pub fn take(&self, key: &K) -> Result<Permit<K>, NoPermit> {
        self.take_many(key, 1)
    }

    /// Takes `count` permits for the key as one, without waiting.
    pub fn take_many(&self, key: &K, count: usize) -> Result<Permit<K>, NoPermit> {
        let mut taken = lock(&self.taken);
        let own = taken
            .by_key
            .get(key)
            .copied()
            .unwrap_or_default()
            .saturating_add(count);
        if own > self.each {
            return Err(NoPermit::KeyFull(self.each));
        }
        let all = taken.all.saturating_add(count);
        if all > self.all {
            return Err(NoPermit::Full);
        }
        taken.all = all;
        taken.by_key.insert(key.clone(), own);
        Ok(Permit {
            key: key.clone(),
            count,
            taken: Arc::clone(&self.taken),
        })
    }
}

impl<K: Eq + Hash> Drop for Permit<K> {
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

/// No code panics between the two halves of a change, so the poison can be ignored.
fn lock<K>(taken: &Mutex<Taken<K>>) -> MutexGuard<'_, Taken<K>> {
    taken.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permits_are_free_again_once_they_are_dropped() {
        let semaphore = KeyedSemaphore::new(3, 2);
        let (one, _two) = (semaphore.take(&"a").unwrap(), semaphore.take(&"a").unwrap());
        assert_eq!(semaphore.take(&"a").unwrap_err(), NoPermit::KeyFull(2));
        let third = semaphore.take(&"b").unwrap();
        assert_eq!(semaphore.take(&"b").unwrap_err(), NoPermit::Full);
        drop(one);
        let _again = semaphore.take(&"a").unwrap();
        drop(third);
        assert!(semaphore.take(&"b").is_ok());
        assert_eq!(
            lock(&semaphore.taken).by_key.len(),
            1,
            "nothing is kept of a key without permits"
        );
    }
}

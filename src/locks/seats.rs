//! How many runs this process takes at a time, so that what it has taken stays quick.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::domain::TenantKey;
use crate::error::Error;

/// Seats for runs, of which there are only so many.
#[derive(Debug)]
pub(super) struct Seats {
    all: NonZeroUsize,
    /// Of these, for each tenant.
    each: Option<NonZeroUsize>,
    taken: Arc<Mutex<Taken>>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_tenant: HashMap<TenantKey, usize>,
}

/// A seat, until it is dropped.
#[derive(Debug)]
pub(super) struct Seat {
    tenant: TenantKey,
    taken: Arc<Mutex<Taken>>,
}

impl Seats {
    pub(super) fn new(all: NonZeroUsize, each: Option<NonZeroUsize>) -> Self {
        Self { all, each, taken: Arc::default() }
    }

    /// A seat for a run of the tenant.
    ///
    /// # Errors
    /// [`Error::TooManyRuns`] if the tenant has all of its own; [`Error::Overloaded`] if there is none at all.
    pub(super) fn take(&self, tenant: &TenantKey) -> Result<Seat, Error> {
        let mut taken = lock(&self.taken);
        let own = taken.by_tenant.get(tenant).copied().unwrap_or_default();
        if let Some(limit) = self.each.map(NonZeroUsize::get).filter(|limit| own >= *limit) {
            return Err(Error::TooManyRuns { limit });
        }
        if taken.all >= self.all.get() {
            return Err(Error::Overloaded);
        }
        taken.all += 1;
        taken.by_tenant.insert(tenant.clone(), own + 1);
        Ok(Seat { tenant: tenant.clone(), taken: Arc::clone(&self.taken) })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut taken = lock(&self.taken);
        taken.all -= 1;
        if let Some(own) = taken.by_tenant.get_mut(&self.tenant) {
            *own -= 1;
            if *own == 0 {
                taken.by_tenant.remove(&self.tenant);
            }
        }
    }
}

/// Nothing in here panics half-way through a change.
fn lock(taken: &Mutex<Taken>) -> MutexGuard<'_, Taken> {
    taken.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seats_are_free_again_once_they_are_left() {
        let seats = Seats::new(NonZeroUsize::new(3).unwrap(), NonZeroUsize::new(2));
        let (a, b) = (TenantKey::default(), TenantKey::try_from("b".to_owned()).unwrap());
        let (one, _two) = (seats.take(&a).unwrap(), seats.take(&a).unwrap());
        assert!(matches!(seats.take(&a), Err(Error::TooManyRuns { limit: 2 })));
        let third = seats.take(&b).unwrap();
        assert!(matches!(seats.take(&b), Err(Error::Overloaded)));
        drop(one);
        let _again = seats.take(&a).unwrap();
        drop(third);
        assert!(seats.take(&b).is_ok());
        assert_eq!(lock(&seats.taken).by_tenant.len(), 1, "nothing is kept of who has none");
    }
}

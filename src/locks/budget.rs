//! A memory budget for the bodies that callers send: a bounded number of bytes, first come, first
//! served.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes for each permit of the semaphore.
const UNIT: usize = 1024;

/// Most bytes in memory at once. Clones share them.
#[derive(Clone, Debug)]
pub struct Budget {
    units: Arc<Semaphore>,
    all: u32,
}

/// Bytes taken from a budget; its drop gives them back. The default is no bytes.
#[derive(Debug, Default)]
pub struct Share {
    budget: Option<Budget>,
    permit: Option<OwnedSemaphorePermit>,
    units: u32,
}

impl Budget {
    pub fn new(bytes: usize) -> Self {
        let all = units(bytes);
        Self {
            units: Arc::new(Semaphore::new(all as usize)),
            all,
        }
    }

    /// Waits for the bytes behind all earlier callers. A request for more than the budget takes
    /// the whole budget. The future may be dropped.
    pub async fn take(&self, bytes: usize) -> Share {
        let mut share = Share {
            budget: Some(self.clone()),
            permit: None,
            units: units(bytes).min(self.all),
        };
        share.take_again().await;
        share
    }
}

impl Share {
    /// Keeps at most `bytes` and gives the rest back.
    pub fn shrink(&mut self, bytes: usize) {
        let surplus = self.units.saturating_sub(units(bytes));
        if let Some(permit) = &mut self.permit {
            drop(permit.split(surplus as usize));
            self.units -= surplus;
        }
    }

    /// Gives the bytes back. [`take_again`](Self::take_again) can take them again later.
    pub fn give_back(&mut self) {
        self.permit = None;
    }

    /// Waits for the bytes that the share gave back, behind all earlier callers. The future may be
    /// dropped and called again.
    pub async fn take_again(&mut self) {
        if let (Some(budget), None) = (&self.budget, &self.permit) {
            // The only error is a closed semaphore, and no code closes it.
            self.permit = Arc::clone(&budget.units)
                .acquire_many_owned(self.units)
                .await
                .ok();
        }
    }

    /// Returns whether the share never took bytes.
    pub const fn is_none(&self) -> bool {
        self.budget.is_none()
    }
}

/// Returns the number of permits that cover the bytes.
fn units(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT).min(Semaphore::MAX_PERMITS)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn a_share_is_free_again_once_it_is_dropped_shrunk_or_given_back() {
        let budget = Budget::new(10 * UNIT);
        let mut one = budget.take(6 * UNIT).await;
        assert!(budget.take(5 * UNIT).now_or_never().is_none());
        one.shrink(5 * UNIT);
        let mut two = budget.take(5 * UNIT).now_or_never().unwrap();
        two.give_back();
        let three = budget.take(1).now_or_never().unwrap();
        assert!(
            two.take_again().now_or_never().is_none(),
            "a byte takes a whole unit"
        );
        drop(three);
        two.take_again().now_or_never().unwrap();
        assert!(budget.take(1).now_or_never().is_none());
    }

    #[tokio::test]
    async fn more_than_there_is_waits_for_all() {
        let budget = Budget::new(2 * UNIT);
        let all = budget.take(usize::MAX).now_or_never().unwrap();
        assert!(budget.take(1).now_or_never().is_none());
        drop(all);
        assert!(budget.take(1).now_or_never().is_some());
    }
}

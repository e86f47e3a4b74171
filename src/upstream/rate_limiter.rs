//! Limits the rate of background calls to an upstream.

use std::num::NonZeroU32;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::{Interval, MissedTickBehavior, interval};

/// Grants permits one at a time, and at most a fixed number a second. All background work shares
/// it.
#[derive(Debug)]
pub struct RateLimiter(Option<Mutex<Interval>>);

impl RateLimiter {
    /// For calls that a caller waits for.
    pub const UNBOUND: Self = Self(None);

    /// Must be called inside a tokio runtime.
    pub fn new(calls_per_second: NonZeroU32) -> Self {
        let mut ticks = interval(Duration::from_secs(1) / calls_per_second.get());
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self(Some(Mutex::new(ticks)))
    }

    /// Waits for a permit.
    pub async fn acquire(&self) {
        if let Some(ticks) = &self.0 {
            ticks.lock().await.tick().await;
        }
    }
}

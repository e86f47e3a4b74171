//! A bound on how fast work that nobody waits for calls an upstream.

use std::num::NonZeroU32;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::{Interval, MissedTickBehavior, interval};

/// Lets one call through at a time, so many a second at most. Shared by all that work in the background.
#[derive(Debug)]
pub struct RateLimiter(Option<Mutex<Interval>>);

impl RateLimiter {
    /// For work that somebody waits for.
    pub const UNBOUND: Self = Self(None);

    /// Must be made inside a tokio runtime.
    pub fn new(calls_per_second: NonZeroU32) -> Self {
        let mut ticks = interval(Duration::from_secs(1) / calls_per_second.get());
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self(Some(Mutex::new(ticks)))
    }

    /// Resolves when it is the caller's turn.
    pub async fn acquire(&self) {
        if let Some(ticks) = &self.0 {
            ticks.lock().await.tick().await;
        }
    }
}

//! The pause between two tries.

use std::time::Duration;

use rand::RngExt;

/// Returns a random duration from half of `pause` to all of it, so that tasks that failed together
/// do not retry together.
pub(in crate::runs) fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(rand::rng().random_range(0.5..=1.0))
}

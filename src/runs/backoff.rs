//! Pauses between two tries.

use std::time::Duration;

use rand::RngExt;

/// Between half of `pause` and all of it, so that those who failed together do not try again together.
pub(in crate::runs) fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(rand::rng().random_range(0.5..=1.0))
}

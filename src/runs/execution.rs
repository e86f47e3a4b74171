//! One run, from its admission to its end.

pub(super) mod breaker;
pub(super) mod create_thread;
pub(super) mod failure;
pub(super) mod finish;
pub(super) mod prepare;
pub(super) mod progress;
pub(super) mod queue;
pub(super) mod relay;
pub(super) mod retry;
pub(super) mod rollover;
pub(super) mod round;
pub(super) mod task;

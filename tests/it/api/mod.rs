//! The real binary, over HTTP.

mod cancel;
mod commands;
mod crash;
mod events;
mod failures;
mod idempotency;
mod logs;
mod problems;
mod queue;
mod random;
mod recovery;
mod shutdown;
mod strategies;
mod tools;
mod turns;

//! The real binary, over HTTP.

mod cancel;
mod commands;
mod crash;
mod failures;
mod logs;
mod problems;
mod queue;
mod shutdown;
mod turns;

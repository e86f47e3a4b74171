//! The real binary, over HTTP.

mod cancel;
mod commands;
mod crash;
mod deletion;
mod discreet;
mod erasure;
mod events;
mod expiry;
mod failures;
mod idempotency;
mod killed;
mod logs;
mod operators;
mod portability;
mod problems;
mod queue;
mod random;
mod recovery;
mod replicas;
mod rollover;
mod scale;
mod shutdown;
mod statistics;
mod strategies;
mod tools;
mod turns;

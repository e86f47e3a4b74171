//! One integration binary: one link, one set of servers.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod simulator;
mod specs;
mod support;

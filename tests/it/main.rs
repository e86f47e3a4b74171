//! The integration tests: one binary, one link, one database cluster.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, wherever its code stands")]

mod store_contract;
mod support;

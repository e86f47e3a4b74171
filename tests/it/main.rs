//! The integration tests. They are one binary, so that cargo links once and all tests share one
//! Postgres cluster.

#![expect(
    clippy::unwrap_used,
    reason = "a test fails by panicking, its helpers too"
)]
#![expect(
    clippy::too_many_lines,
    reason = "a test tells one story from its beginning to its end"
)]

mod api;
mod architecture;
mod chaos;
mod docs;
mod examples;
mod image;
mod runs;
mod server;
mod simulator;
mod specs;
mod store_contract;
mod support;
mod upstream;

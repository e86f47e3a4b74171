//! The integration tests: one binary, one link, one database cluster.

mod store_contract;
mod support;

//! Fixtures and helpers of the integration tests: gateways, databases, the simulator, proxies,
//! checks.

pub(crate) mod chance;
pub(crate) mod clock;
pub(crate) mod cluster;
pub(crate) mod contract;
mod database;
pub(crate) mod gate;
pub(crate) mod gateway;
pub(crate) mod history;
pub(crate) mod link;
pub(crate) mod openapi;
pub(crate) mod picky;
pub(crate) mod pooler;
mod postgres;
pub(crate) mod recording_proxy;
pub(crate) mod routes;
pub(crate) mod scene;
pub(crate) mod secret_scan;
pub(crate) mod wire;

pub(crate) use database::TestDatabase;

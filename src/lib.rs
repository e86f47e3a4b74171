//! Threadkeeper: an HTTP gateway between chatbot frontends and a hosted conversation API.
//!
//! `ARCHITECTURE.md` is the map. A module uses the modules below it in this list, never those above.

pub mod cli;

pub mod app;

pub mod dev;

pub mod health;

pub mod api;

pub mod server;

pub mod telemetry;

pub mod lifecycle;

pub mod runs;

pub mod auth;

pub mod error;

pub mod locks;

pub mod upstream;

pub mod export_import;

pub mod store;

pub mod simulator;

pub mod config;

mod wording;

pub mod domain;

#[cfg(test)]
mod testing;

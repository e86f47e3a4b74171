//! What the tests stand on.

mod database;
mod postgres;

pub(crate) use database::TestDatabase;

//! Written next.
#[derive(Debug)]
pub struct SqliteStore;

//! Written next.
#[derive(Debug)]
pub struct PostgresStore;

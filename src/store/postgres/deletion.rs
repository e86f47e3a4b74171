//! Requests to delete, and their way to a receipt.

use super::dialect::{among, among_found, and_no_more, ids, locked, ms, now, rows_of, write};
use crate::store::columns::unfinished_runs;
use crate::store::shared::deletions;

deletions!(sqlx::Postgres);

//! Requests to delete, and their way to a receipt.

use super::dialect::{among, and_no_more, ids, locked, ms, now, rows_of, write};
use crate::store::shared::deletions;

deletions!(sqlx::Sqlite);

//! What the janitor looks at, and when; and what is past its time.

use super::dialect::{
    among, among_found, and_no_more, each, id, id_after, ids, locked, locked_if_free, ms, now, rows_of,
    spelled, write,
};
use super::expiry;
use crate::store::columns::unfinished_runs;
use crate::store::shared::keeping;

keeping!(sqlx::Postgres);

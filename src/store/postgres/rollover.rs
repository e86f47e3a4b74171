//! A fresh thread in the place of a full one, and what others wrote to the upstream thread.

use super::dialect::{
    among, among_found, at, each, each_text, id, ids, left_of, locked, locked_whole, now, write,
};
use super::expiry;
use crate::store::columns::unfinished_runs;
use crate::store::shared::rollovers;

rollovers!(sqlx::Postgres);

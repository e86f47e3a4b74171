//! What is, or may be, at an upstream besides the threads' own.

use super::dialect::{among, held, ids, locked_if_free, ms, now, write};
use crate::store::shared::remnants;

remnants!(sqlx::Sqlite);

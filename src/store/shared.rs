//! The life of threads, in statements that are the same for both backends but for a few words, and so is the code: a
//! macro says it once, as in [`read`](super::read). The words that differ are macros too, those of `dialect.rs` in each
//! backend, and are looked up where the code is put.
//!
//! All of this is background work or rare. So it takes several statements in a transaction where that is plainer, and
//! those that would wait for each other agree on an order: requests to delete by id, runs by id, messages, threads by id.

mod deletion;
mod keeping;
mod keys;
mod remnants;
mod rollover;
mod rows;

pub(super) use deletion::{deletions, of_target, to_be_taken, to_begin_with};
pub(super) use keeping::keeping;
pub(super) use keys::keys;
pub(super) use remnants::remnants;
pub(super) use rollover::rollovers;
pub(super) use rows::{
    DeletableRow, DeletedThreadRow, DeletionRow, DueRow, KeyRow, RemnantRow, RequestedRow, upstream_ids,
};

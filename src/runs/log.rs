//! The log of a run.

pub(super) mod writer;

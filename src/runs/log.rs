//! The log of a run: what happens during it, and where each event stands.

pub(super) mod event;
pub(super) mod offset;
pub(super) mod stored;
pub(super) mod writer;

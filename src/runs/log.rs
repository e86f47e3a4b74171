//! The log of a run: its events, their offsets, the writer, and the stored part.

pub(super) mod event;
pub(super) mod offset;
pub(super) mod stored;
pub(super) mod writer;

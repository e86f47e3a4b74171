//! What this process does as one of several.

pub(super) mod flusher;
pub(super) mod session;
pub(super) mod takeover;

//! What this process does as one of several: it keeps its session, takes over what no process works on, writes what its runs
//! show, and exchanges notifications with the others.

pub(super) mod session;

pub(super) mod flusher;
pub(super) mod messaging;
pub(super) mod takeover;

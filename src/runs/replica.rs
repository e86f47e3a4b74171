//! What this process does as one of several: it keeps its session, takes over runs, writes events,
//! and exchanges notifications with other replicas.

pub(super) mod session;

pub(super) mod flusher;
pub(super) mod messaging;
pub(super) mod takeover;

//! What a caller may ask: to submit a message, to answer function calls, to cancel, to read and to
//! follow runs, and to change a thread.

pub(super) mod cancel;
pub(super) mod submit;
pub(super) mod threads;
pub(super) mod tool_outputs;

pub(super) mod idempotency;

pub(super) mod subscription;

pub(super) mod read;

//! What a caller may ask of runs.

pub(super) mod cancel;
pub(super) mod subscription;
pub(super) mod tool_outputs;

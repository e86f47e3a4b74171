//! The behaviour that a request or run is asked for: directives, hostile answers, the text of
//! replies.

pub(super) mod hostile;
pub(super) mod plan;
pub(super) mod refusal;
pub(super) mod words;

//! What a turn or a request is told to do: directives, hostile answers, the words of replies.

pub(super) mod hostile;
pub(super) mod plan;
pub(super) mod refusal;
pub(super) mod words;

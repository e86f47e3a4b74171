//! Written next.
#[derive(Debug)]
pub struct AssistantsUpstream;

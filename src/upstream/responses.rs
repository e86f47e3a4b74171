//! Written next.
#[derive(Debug)]
pub struct ResponsesUpstream;

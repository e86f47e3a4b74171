//! Written next.
#[derive(Debug)]
pub struct UpstreamClient;

//! What the tests share.

pub(crate) mod openapi;
pub(crate) mod wire;

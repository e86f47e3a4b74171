//! Reading requests and writing answers, for both protocols.

pub(super) mod call;
pub(super) mod error;
pub(super) mod fields;
pub(super) mod operation;
pub(super) mod page;
pub(super) mod sse;

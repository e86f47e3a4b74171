//! A parsed request.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::simulator::wire::operation::Operation;

/// A request of one of the protocols.
#[derive(Debug)]
pub(in crate::simulator) struct Call {
    pub(in crate::simulator) operation: Operation,
    /// The path's segments below `/v1`.
    pub(in crate::simulator) path: Vec<String>,
    pub(in crate::simulator) query: BTreeMap<String, String>,
    pub(in crate::simulator) body: Map<String, Value>,
    /// The directives of the fault that was queued for this request.
    pub(in crate::simulator) fault: Option<String>,
}

impl Call {
    /// Returns a segment of the path by its index: `/v1/threads/{1}/runs/{3}`.
    pub(in crate::simulator) fn segment(&self, place: usize) -> &str {
        self.path.get(place).map_or("", String::as_str)
    }

    pub(in crate::simulator) fn query_flag(&self, name: &str) -> bool {
        self.query.get(name).is_some_and(|value| value == "true")
    }
}

//! The port to a hosted conversation API, and its adapters. [`Upstream`] lists what a new adapter
//! writes.
//!
//! A file uses only files below it in this list, never those above it. `tests/it/architecture.rs`
//! checks that.

mod probe;

// The adapters, which do not use each other.
mod assistants;

mod responses;

// Shared by the adapters.
mod history;

mod thread_lookup;

mod tags;

mod retrying_client;

mod streamed_parts;

#[cfg(test)]
mod mutation;

mod relay;

// The port.
mod port;

mod rate_limiter;

// One server over HTTP.
mod wire;

mod client;

mod sse;

mod classify;

mod refusal_cause;

mod error_detail;

mod report;

mod memory_limit;

mod surrogates;

mod retry;

mod error;

pub use assistants::AssistantsUpstream;
pub use client::{InvalidUpstream, UpstreamClient};
pub use error::{RefusalCause, UpstreamError};
pub use port::{
    AnswerTools, Capabilities, Disposal, Ended, EventStream, HistoryEntry, HistoryPage, Items,
    Ownership, Recovered, Settled, StartRun, Upstream, UpstreamEvent, drain,
};
pub use probe::{Finding, Probe, Verdict, probe};
pub use rate_limiter::RateLimiter;
pub use responses::ResponsesUpstream;

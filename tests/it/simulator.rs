//! The simulator at its socket: its promises to the tests that use it.

mod assistants;
mod faults;
mod responses;

//! The simulator at its socket: what it promises to those who test against it.

mod assistants;
mod faults;
mod responses;

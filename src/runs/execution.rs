//! One run, from its admission to its end.
//!
//! [`task`] leads the run, [`round`] sends its messages, [`finish`] ends it. The modules below
//! stand in groups, and each uses only modules of the groups after its own.

pub(super) mod withdraw;

pub(super) mod task;

pub(super) mod queue;
pub(super) mod rollover;
pub(super) mod round;

pub(super) mod finish;
pub(super) mod prepare;
pub(super) mod relay;

pub(super) mod create_thread;
pub(super) mod outcome;
pub(super) mod recover;
pub(super) mod rerun;
pub(super) mod settle;
pub(super) mod trial;

pub(super) mod progress;
pub(super) mod retry;
pub(super) mod round_context;
pub(super) mod store_retry;

pub(super) mod failure;
pub(super) mod history;

pub(super) mod ladder;

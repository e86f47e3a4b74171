//! A run without a message of its own: it answers the last messages of the user again.

use super::failure::Failure;
use super::round_context::RoundContext;
use super::store_retry::retry_until_ok;
use crate::domain::Rerun;
use crate::runs::context::Context;
use crate::runs::redaction;
use crate::store::{QueuedStart, StartedRun};

/// Gives a run that waits for them the last messages of the user. The caller must not drop the
/// future: the messages may be the run's by then.
///
/// # Errors
/// The thread has no message of the user, or the run is no longer this process's.
pub(in crate::runs) async fn take_messages(
    ctx: &Context,
    started: &StartedRun,
) -> Result<StartedRun, Failure> {
    let lease = &started.lease;
    match retry_until_ok(|| redaction::take_last_messages(ctx, lease)).await? {
        QueuedStart::Started(now) if now.input.is_empty() => Err(Failure::NothingToRun),
        QueuedStart::Started(now) => Ok(*now),
        QueuedStart::NotYet | QueuedStart::Lost => Err(Failure::LeaseLost),
    }
}

/// Returns true if the upstream thread ends with the messages, and a run there needs no input.
pub(in crate::runs) fn needs_no_input(round: &RoundContext<'_>) -> bool {
    round.started.run.rerun == Some(Rerun::Present)
        && round.upstream.capabilities().runs_without_input
}

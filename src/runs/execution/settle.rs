//! Settles a run's traces at the upstream.

use super::failure::{Failure, may_send};
use super::store_retry::write_until_ok;
use crate::domain::UnsettledRun;
use crate::runs::context::Context;
use crate::store::RunLease;
use crate::upstream::{Settled, Upstream, UpstreamError};

/// When a run's messages are removed from the upstream thread.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in crate::runs) enum Removal {
    /// If the run is discarded.
    IfDiscarded,
    /// If the run is discarded, or if any of its messages are there.
    IfSaid,
}

/// Ends what still works of a run at the upstream, removes its messages there if `removal` says
/// so, and returns what was there.
///
/// The history that was sent with the run stays. Once the run's own messages are gone, nothing at
/// the upstream shows that the history is there. So this function records that before it removes
/// them.
pub(in crate::runs) async fn take_away(
    ctx: &Context,
    lease: &RunLease,
    upstream: &dyn Upstream,
    left: &UnsettledRun,
    removal: Removal,
) -> Result<Settled, Failure> {
    may_send(&ctx.registry)?;
    let settled = upstream.settle(left).await.map_err(Failure::Upstream)?;
    let is_removed = left.remove || (removal == Removal::IfSaid && settled.said);
    if !is_removed {
        return Ok(settled);
    }
    if settled.has_history_of(left) {
        write_until_ok(|| ctx.store.took_along(lease, left.run)).await?;
    }
    // Check again: what is in the thread now may be another process's.
    may_send(&ctx.registry)?;
    let removed = upstream.remove(left).await.map_err(|error| match error {
        // The messages stay there, so the next run uses another thread.
        UpstreamError::Refused {
            status: 404 | 405 | 501,
            ..
        } => UpstreamError::Protocol("the upstream does not delete messages".to_owned()),
        error => error,
    });
    removed.map_err(Failure::Upstream)?;
    Ok(settled)
}

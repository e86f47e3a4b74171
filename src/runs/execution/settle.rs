//! Ending what a run left at the upstream.

use super::failure::{Failure, may_send};
use super::store_retry::write_until_ok;
use crate::domain::UnsettledRun;
use crate::runs::context::Context;
use crate::store::RunLease;
use crate::upstream::{Settled, Upstream, UpstreamError};

/// When what a run left is taken away.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in crate::runs) enum Removal {
    /// If the run is to be discarded.
    IfDiscarded,
    /// Also if any of it is there.
    IfSaid,
}

/// Ends what a run left at the upstream, and takes it away. What was there.
///
/// The history that was sent with the run stays, and once the run's own messages are gone nothing at the upstream tells that
/// it is there. So that is recorded before they are removed.
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
    // A chain goes on from before that run, and has taken in nothing that was sent with it.
    if left.synced && settled.said && settled.thread.is_none() {
        write_until_ok(|| ctx.store.took_along(lease, left.run)).await?;
    }
    // What stands there now may be another's.
    may_send(&ctx.registry)?;
    let removed = upstream.remove(left).await.map_err(|error| match error {
        // It stays there, so what comes next goes to another thread.
        UpstreamError::Refused {
            status: 404 | 405 | 501,
            ..
        } => UpstreamError::Protocol("the upstream does not delete messages".to_owned()),
        error => error,
    });
    removed.map_err(Failure::Upstream)?;
    Ok(settled)
}

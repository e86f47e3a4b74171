//! Finding out what became of a request that failed half-way.

use tokio::time::sleep;

use super::failure::Failure;
use super::progress::Progress;
use super::retry::FIRST_BACK_OFF;
use super::round_context::RoundContext;
use super::store_retry::retry_until_ok;
use crate::domain::UnsettledRun;
use crate::error::Chain;
use crate::runs::backoff::jittered;
use crate::runs::context::Context;
use crate::store::StartedRun;
use crate::upstream::{Recovered, UpstreamError};

/// Looks at what became of one request, before it is given up.
const MAX_LOOKS: u32 = 3;

/// Finds out what became of a request. [`Recovered::Unknown`] also if the upstream does not say.
pub(in crate::runs) async fn recover(
    round: &RoundContext<'_>,
    progress: &Progress,
    error: &UpstreamError,
) -> Result<Recovered, Failure> {
    let sent = unsettled_run(round.ctx, round.started, progress).await?;
    for look in 0..MAX_LOOKS {
        if look > 0 {
            sleep(jittered(FIRST_BACK_OFF * 2_u32.pow(look))).await;
        }
        match round.upstream.recover(&sent, error).await {
            Ok(recovered) => return Ok(recovered),
            Err(error) => {
                tracing::warn!(error = %Chain(&error), "cannot find out what became of a request");
            }
        }
    }
    Ok(Recovered::Unknown)
}

/// What a run may have left at the upstream, with what is needed to find it there.
pub(in crate::runs) async fn unsettled_run(
    ctx: &Context,
    started: &StartedRun,
    progress: &Progress,
) -> Result<UnsettledRun, Failure> {
    let run = started.run.id;
    let mut baseline = retry_until_ok(|| ctx.store.baseline(run)).await?;
    baseline.skip += progress.history_users;
    Ok(UnsettledRun {
        run,
        thread: progress.thread.clone(),
        upstream_run: progress.upstream_run.clone(),
        open_calls: progress.open_calls.clone(),
        baseline,
        inputs: progress.inputs,
        synced: progress.synced,
        remove: false,
    })
}

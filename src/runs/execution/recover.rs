//! Recovers a request that failed half-way: asks the upstream what became of it.

use tokio::time::sleep;

use super::failure::Failure;
use super::progress::Progress;
use super::retry::FIRST_BACK_OFF;
use super::round_context::RoundContext;
use super::store_retry::retry_until_ok;
use crate::domain::{Baseline, RunRecovery, UnsettledRun};
use crate::error::Chain;
use crate::runs::backoff::jittered;
use crate::runs::context::Context;
use crate::store::StartedRun;
use crate::upstream::{Recovered, UpstreamError};

/// Most tries to look a request up.
const MAX_LOOKS: u32 = 3;

/// Asks the upstream what became of a request. Returns [`Recovered::Unknown`] also if the upstream
/// does not answer.
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
                tracing::warn!(error = %Chain(&error), "cannot look a request up at the upstream");
            }
        }
    }
    Ok(Recovered::Unknown)
}

/// Returns what a run may have left at the upstream, with the data to find it there.
pub(in crate::runs) async fn unsettled_run(
    ctx: &Context,
    started: &StartedRun,
    progress: &Progress,
) -> Result<UnsettledRun, Failure> {
    let run = started.run.id;
    let trial = progress.recovery.as_ref().and_then(RunRecovery::open_trial);
    let mut baseline = match trial {
        // The store's baseline is that of the thread's old upstream thread.
        Some(trial) => Baseline {
            anchor: None,
            skip: trial.users,
        },
        None => retry_until_ok(|| ctx.store.baseline(run)).await?,
    };
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

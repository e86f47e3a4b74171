//! Withdraws a message that may have been recorded although its caller got the error that it was
//! not.

use std::time::Duration;

use tokio::time::sleep;

use super::failure::Failure;
use super::outcome::end_without_output;
use super::task::continue_for_others;
use crate::error::Chain;
use crate::runs::backoff::jittered;
use crate::runs::context::Context;
use crate::runs::redaction;
use crate::runs::registry::{ActiveRun, Refused};
use crate::store::{RunEnd, RunLease, StoreError, Withdrawal, Withdrawn};

/// Most refusals of the database. After them, the message stays as it is.
const MAX_REFUSALS: u32 = 3;
/// First and longest pause between two tries. The pause doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Pauses before each look for an admission whose answer was lost. The last one exceeds every
/// statement's time limit.
const TAKE_BACK_AFTER: [Duration; 4] = [
    Duration::ZERO,
    Duration::from_secs(1),
    Duration::from_secs(5),
    Duration::from_secs(20),
];

/// Withdraws a message whose caller got the error that it was not recorded, and which may be
/// recorded now or later. A run that appears after the last look is a stray, which the next
/// takeover finds.
pub(in crate::runs) async fn take_back(
    ctx: &Context,
    active: ActiveRun,
    lease: RunLease,
    refused: &Refused,
) {
    for pause in TAKE_BACK_AFTER {
        tokio::select! {
            biased;
            () = ctx.tasks.draining.cancelled() => {}
            () = sleep(pause) => {}
        }
        match withdraw(ctx, &lease, refused).await {
            Withdrawn::Lost if ctx.tasks.draining.is_cancelled() => return,
            Withdrawn::Lost => {}
            withdrawn => {
                ctx.registry.was_refused(lease.run_id);
                let active = ctx.registry.goes_on_for_others(active);
                return continue_for_others(ctx, active, lease, withdrawn).await;
            }
        }
    }
}

/// Withdraws the message of a run that may be recorded. Its caller got the error that it was not,
/// and may send it again. Retries while the database is unavailable. If the database refuses the
/// withdrawal, the message stays.
pub(in crate::runs) async fn withdraw(
    ctx: &Context,
    lease: &RunLease,
    refused: &Refused,
) -> Withdrawn {
    let (status, error) = Failure::NotRecorded.end();
    let taken = Withdrawal {
        message: refused.message,
        idempotency_key: refused.idempotency_key.clone(),
        end: RunEnd {
            discard: true,
            ..end_without_output(status, error)
        },
    };
    let (mut pause, mut refusals) = (FIRST_PAUSE, 0);
    loop {
        match redaction::withdraw(ctx, lease, &taken).await {
            Ok(withdrawn) => return withdrawn,
            Err(error) => {
                tracing::error!(error = %Chain(&error), "cannot withdraw a refused message yet");
                refusals += u32::from(!matches!(error, StoreError::Unavailable(_)));
            }
        }
        if refusals >= MAX_REFUSALS || ctx.tasks.stop.is_cancelled() {
            return Withdrawn::Lost;
        }
        sleep(jittered(pause)).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

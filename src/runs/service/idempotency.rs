//! Requests that repeat an idempotency key.

use std::sync::Arc;

use super::subscription::{RunSubscription, Submitted};
use crate::domain::ConversationKey;
use crate::error::Error;
use crate::runs::context::Context;
use crate::store::{Idempotency, Repeated};

/// Returns the run of an idempotency key that was used before.
pub(in crate::runs) async fn repeated(
    ctx: &Arc<Context>,
    key: &ConversationKey,
    idempotency: Option<&Idempotency>,
) -> Result<Option<Submitted>, Error> {
    let earlier = earlier(ctx, key, idempotency).await?;
    // Its caller got the error that it was not recorded, and the gateway is still withdrawing it.
    if earlier
        .as_ref()
        .is_some_and(|earlier| ctx.registry.is_refused(earlier.run.id))
    {
        return Err(Error::StoreUnavailable(None));
    }
    Ok(earlier.map(|Repeated { thread, run, .. }| {
        let follow = RunSubscription::of(ctx, &thread, run.id);
        Submitted {
            thread,
            run,
            follow,
            replayed: true,
        }
    }))
}

/// Returns the earlier request of an idempotency key.
///
/// # Errors
/// [`Error::IdempotencyMismatch`] if the earlier request was a different one.
pub(in crate::runs) async fn earlier(
    ctx: &Context,
    key: &ConversationKey,
    idempotency: Option<&Idempotency>,
) -> Result<Option<Repeated>, Error> {
    let Some(used) = idempotency else {
        return Ok(None);
    };
    let remember = ctx.config.runs.idempotency_ttl;
    let mut earlier = ctx.store.repeated(key, &used.key, remember).await?;
    match &mut earlier {
        Some(earlier) if earlier.request_hash != used.request_hash => {
            return Err(Error::IdempotencyMismatch);
        }
        Some(earlier) => ctx.registry.give_arguments(&mut earlier.run),
        None => {}
    }
    Ok(earlier)
}

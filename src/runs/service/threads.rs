//! Changes a thread: its metadata, its lifetime, and its replacement by a fresh one.

use std::time::Duration;

use super::read;
use crate::config::TtlFrom;
use crate::domain::{ConversationKey, Metadata, NewLife, Scope, Thread, Ttl};
use crate::error::Error;
use crate::runs::context::{Context, NO_THREAD};
use crate::runs::execution::rollover::rollover_of;
use crate::runs::reconcile::reconcile;
use crate::runs::redaction;
use crate::store::{Rolled, ThreadName, ThreadReport, ThreadUpdate};
use crate::upstream::RateLimiter;

/// The result of a caller's request for a fresh thread.
#[derive(Clone, Debug)]
pub enum Renewed {
    /// The fresh thread, or the same thread if it was empty.
    Now(Thread),
    /// The thread, which has an active run: the rollover happens before the next run.
    Later(Thread),
}

/// Changes the key's current thread: all of its metadata, its lifetime, or both. `None` changes
/// nothing.
pub(in crate::runs) async fn update_thread(
    ctx: &Context,
    key: &ConversationKey,
    metadata: Option<Metadata>,
    life: Option<NewLife>,
) -> Result<ThreadReport, Error> {
    let update = ThreadUpdate {
        metadata,
        life,
        limits: ctx.config.lifetimes.of(&key.scope),
    };
    let thread = ctx
        .store
        .update_thread(key, &update)
        .await?
        .ok_or(NO_THREAD)?;
    read::thread(ctx, ThreadName::Id(&key.tenant, thread.id)).await
}

/// Returns the lifetime that a caller's `ttl_ms` means for a thread of the key.
///
/// # Errors
/// The length is zero, or longer than a caller may ask for.
pub(in crate::runs) fn ttl(
    ctx: &Context,
    key: &ConversationKey,
    ttl: Duration,
) -> Result<Ttl, Error> {
    let (sessions, max) = (&ctx.config.sessions, ctx.config.threads.max_ttl);
    if ttl.is_zero() || ttl > max {
        return Err(Error::Invalid(format!(
            "`ttl_ms` must be between 1 and {}",
            max.as_millis()
        )));
    }
    Ok(match (&key.scope, sessions.ttl_from) {
        (Scope::Session(_), TtlFrom::LastActivity) => Ttl::FromLastActivity(ttl),
        _ => Ttl::FromNow(ttl),
    })
}

/// Archives the key's thread and starts a fresh one, at once or before the next run.
pub(in crate::runs) async fn roll_over(
    ctx: &Context,
    key: &ConversationKey,
) -> Result<Renewed, Error> {
    let thread = read::thread(ctx, ThreadName::Newest(key)).await?.thread;
    if thread.message_count == 0 && thread.run_count == 0 {
        return Ok(Renewed::Now(thread));
    }
    reconcile(ctx, &thread, None, &RateLimiter::UNBOUND).await?;
    match redaction::roll_over(ctx, &rollover_of(ctx, &thread, None)).await? {
        Rolled::Done { thread: fresh, .. } => {
            ctx.queue.moved(key, thread.id, fresh.id);
            Ok(Renewed::Now(*fresh))
        }
        Rolled::Later(thread) => Ok(Renewed::Later(*thread)),
        Rolled::Lost => Err(NO_THREAD),
    }
}

//! Notifications from and to the other replicas.

use std::time::Duration;

use futures_util::StreamExt;
use tokio::time::{sleep, timeout};

use crate::error::Chain;
use crate::runs::backoff::jittered;
use crate::runs::context::Context;
use crate::runs::notifications::Outbox;
use crate::store::{Notification, Store, StoreError};

/// Longest time of one delivery.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause after a failed delivery.
const AFTER_FAILURE: Duration = Duration::from_millis(500);

/// Receives the notifications of other replicas until the store is closed.
pub(in crate::runs) async fn listen(ctx: &Context) {
    let mut notifications = ctx.store.notifications();
    while let Some(notification) = notifications.next().await {
        if notification != Notification::Missed {
            ctx.notifier.meet_peers();
        }
        match notification {
            Notification::Asked(run) if ctx.registry.handle(run).is_some() => {
                ctx.notifier.asked.notify_one();
            }
            Notification::Asked(_) => {}
            Notification::Followed(run) => {
                if let Some(handle) = ctx.registry.handle(run) {
                    handle.log.followed();
                }
            }
            notification => ctx.notifier.receive(notification),
        }
    }
}

/// Sends this process's notifications to the other replicas, and releases runs. The next delivery
/// takes what arrives meanwhile. Never returns; the future may be dropped.
pub(in crate::runs) async fn deliver(ctx: &Context) {
    loop {
        ctx.notifier.posted().await;
        while deliver_once(ctx).await.is_err() {
            sleep(jittered(AFTER_FAILURE)).await;
        }
    }
}

/// Delivers the content of the outbox. Sends no notifications while no other replica is known to
/// be alive. A new replica announces itself, and polls until its announcement arrives.
pub(in crate::runs) async fn deliver_once(ctx: &Context) -> Result<(), ()> {
    let has_peers = ctx.notifier.knows_peers();
    let mut delivery = ctx.notifier.take();
    let sent = timeout(
        DELIVERY_TIMEOUT,
        send(&ctx.store, &mut delivery.outbox, has_peers),
    )
    .await;
    sent.unwrap_or_else(|_| Err(StoreError::Unavailable("no answer in time".into())))
        .map_err(|error| {
            tracing::warn!(error = %Chain(&error), "cannot notify the other replicas yet");
        })
}

/// Sends the outbox in two steps. An error leaves the unsent part in it.
async fn send(store: &Store, outbox: &mut Outbox, has_peers: bool) -> Result<(), StoreError> {
    if !outbox.released.is_empty() {
        store.release(&outbox.released).await?;
        outbox.released.clear();
        outbox.notifications.insert(Notification::Orphans);
    }
    if has_peers && !outbox.notifications.is_empty() {
        store
            .notify_replicas(&outbox.notifications.iter().copied().collect::<Vec<_>>())
            .await?;
    }
    outbox.notifications.clear();
    Ok(())
}

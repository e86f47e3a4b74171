//! The making of an upstream thread, which goes on to its record even if its turn is cut off meanwhile: an id that nobody
//! writes down is lost at most servers.

use std::sync::Arc;

use tokio_util::task::TaskTracker;
use tracing::Instrument;

use super::drive::wait_out;
use super::failure::Failure;
use crate::domain::{Message, RemnantId, UpstreamThreadId};
use crate::error::Chain;
use crate::store::{Binding, RunLease, Store};
use crate::upstream::{Ownership, Upstream, UpstreamError};

/// An upstream thread that is to be made.
pub(super) struct Making {
    pub(super) store: Arc<dyn Store>,
    pub(super) upstream: Arc<dyn Upstream>,
    pub(super) lease: RunLease,
    pub(super) owner: Ownership,
    /// The messages that it is to hold, and how many of the user's among them come from the thread before.
    pub(super) seed: Option<(Vec<Message>, u32)>,
}

impl Making {
    /// Makes it and records it. Dropping this future does not stop that.
    ///
    /// That it is about to be made is recorded first: one of which nobody hears again is looked for.
    pub(super) async fn carry_out(self, tasks: &TaskTracker) -> Result<UpstreamThreadId, Failure> {
        let made = tasks.spawn(async move { self.make().await }.in_current_span()).await;
        made.unwrap_or(Err(Failure::Panic))
    }

    async fn make(self) -> Result<UpstreamThreadId, Failure> {
        let intent = RemnantId::new();
        loop {
            match self.store.intend(&self.lease, intent).await {
                Ok(true) => break,
                Ok(false) => return Err(Failure::LeaseLost),
                Err(error) => wait_out(error).await?,
            }
        }
        let (messages, carried_users) = self.seed.as_ref().map_or((&[][..], 0), |(all, users)| (all, *users));
        let made = match self.upstream.create_thread(&self.owner, messages).await {
            Ok(made) => made.ok_or_else(|| UpstreamError::Protocol("it made no thread".to_owned())),
            Err(error) => Err(error),
        };
        let made = match made {
            Ok(made) => made,
            Err(error) => {
                // An intent that is not known to have come to nothing is for the janitor.
                if !error.is_ambiguous()
                    && let Err(error) = self.store.resolve(intent, None).await
                {
                    tracing::warn!(error = %Chain(&error), "cannot forget that an upstream thread was to be made");
                }
                return Err(Failure::Upstream(error));
            }
        };
        let binding = Binding { id: &made, intent, seeded: self.seed.is_some(), carried_users };
        loop {
            match self.store.bind_upstream_thread(&self.lease, &binding).await {
                Ok(true) => return Ok(made),
                Ok(false) => return Err(Failure::LeaseLost),
                Err(error) => wait_out(error).await?,
            }
        }
    }
}

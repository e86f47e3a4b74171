//! The context of a round.

use tokio::sync::watch;

use crate::config::AssistantConfig;
use crate::domain::KeyNames;
use crate::runs::context::Context;
use crate::runs::log::writer::RunLogWriter;
use crate::store::StartedRun;
use crate::upstream::{Ended, EventStream, Ownership, Upstream};

/// The parts that a round uses and does not change.
pub(in crate::runs) struct RoundContext<'a> {
    pub(in crate::runs) ctx: &'a Context,
    pub(in crate::runs) upstream: &'a dyn Upstream,
    pub(in crate::runs) assistant: &'a AssistantConfig,
    pub(in crate::runs) started: &'a StartedRun,
    pub(in crate::runs) log: &'a RunLogWriter,
    /// Whether the gateway waits for the upstream's id of a request that it has sent.
    pub(in crate::runs) awaits_id: &'a watch::Sender<bool>,
}

/// The upstream's end of a round.
pub(in crate::runs) struct RoundEnd {
    pub(in crate::runs) ended: Ended,
    /// The unread rest of the answer, to be [drained](crate::upstream::drain).
    pub(in crate::runs) rest: EventStream,
}

impl RoundContext<'_> {
    /// Returns the owner of the thread, with the names that the upstream may know.
    pub(in crate::runs) fn owner(&self) -> Ownership {
        let (ctx, thread) = (self.ctx, &self.started.thread);
        let gets_keys = ctx
            .upstreams
            .get(&thread.upstream)
            .is_some_and(|upstream| upstream.gets_keys);
        let names = if gets_keys {
            KeyNames::in_clear(&thread.key)
        } else {
            KeyNames::hidden(&thread.key, &ctx.config.fingerprints)
        };
        Ownership {
            names,
            thread: thread.id,
            expires_at: ctx.config.lifetimes.expiry(thread),
        }
    }
}

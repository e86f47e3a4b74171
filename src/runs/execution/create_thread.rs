//! Creates an upstream thread. Its task continues until the thread is recorded, even if the run is
//! cut off. Most servers offer no way to find a thread whose id is lost.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{sleep, timeout};
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use super::failure::Failure;
use super::history::count_users;
use super::store_retry::back_off;
use crate::domain::{Message, OrphanId, RunRecovery, Trial, UpstreamThreadId};
use crate::error::Chain;
use crate::runs::backoff::jittered;
use crate::store::{Binding, Bound, Made, ORPHAN_AFTER, RunLease, Store};
use crate::upstream::{Items, Ownership, RateLimiter, Upstream, UpstreamError};

/// Longest time of a creation. Afterwards its intent is the janitor's, which looks for it only
/// after the end of the creation.
const LONGEST_MAKING: Duration = ORPHAN_AFTER.saturating_sub(Duration::from_mins(2));
/// Tries to delete an upstream thread that no record names; below, the pause after the first try.
/// The pause doubles.
const DELETE_TRIES: u32 = 8;
const FIRST_DELETE_PAUSE: Duration = Duration::from_secs(1);
/// Tries to record the result of an intent.
const RESOLVE_TRIES: u32 = 4;

/// An upstream thread to be created.
pub(in crate::runs) struct ThreadCreation {
    pub(in crate::runs) store: Arc<Store>,
    pub(in crate::runs) upstream: Arc<dyn Upstream>,
    pub(in crate::runs) lease: RunLease,
    pub(in crate::runs) owner: Ownership,
    /// The id of an intent that is already recorded.
    pub(in crate::runs) intent: Option<OrphanId>,
    pub(in crate::runs) seed: Seed,
    /// The recovery that the upstream thread is made for. Then it is on trial, and nothing is bound
    /// yet.
    pub(in crate::runs) recovery: Option<RunRecovery>,
}

/// The first messages of an upstream thread.
#[derive(Default)]
pub(in crate::runs) struct Seed {
    pub(in crate::runs) messages: Arc<Vec<Message>>,
    /// The number of user messages among them that come from the previous thread.
    pub(in crate::runs) carried_users: u32,
}

/// An upstream thread that was made, and the run's recovery if the thread is on trial.
type Created = (UpstreamThreadId, Option<RunRecovery>);

impl ThreadCreation {
    /// Creates the upstream thread and records it. Dropping this future does not stop that.
    ///
    /// Records the intent first, so that the janitor finds a thread whose creation has no known
    /// result.
    pub(in crate::runs) async fn run(self, tasks: &TaskTracker) -> Result<Created, Failure> {
        let made = tasks
            .spawn(async move { self.make().await }.in_current_span())
            .await;
        made.unwrap_or(Err(Failure::Panic))
    }

    async fn make(self) -> Result<Created, Failure> {
        let intent = match self.intent {
            Some(intent) => intent,
            None => self.intend().await?,
        };
        let made = match timeout(
            LONGEST_MAKING,
            self.upstream
                .create_thread(&self.owner, &self.seed.messages),
        )
        .await
        {
            Ok(Ok(made)) => {
                made.ok_or_else(|| UpstreamError::Protocol("the answer names no thread".to_owned()))
            }
            Ok(Err(error)) => Err(error),
            Err(_) => Err(UpstreamError::Broken { timeout: true }),
        };
        let made = match made {
            Ok(made) => made,
            Err(error) => {
                // The janitor handles an intent whose result is not known.
                let came_to = if error.is_ambiguous() {
                    Made::Unknown
                } else {
                    Made::Nothing
                };
                self.resolve(intent, came_to).await;
                return Err(Failure::Upstream(error));
            }
        };
        let Seed {
            messages,
            carried_users,
        } = &self.seed;
        let recovery = self.recovery.as_ref().map(|recovery| RunRecovery {
            trial: Some(Trial {
                thread: made.clone(),
                orphan: intent,
                users: count_users(messages),
                carried_users: *carried_users,
            }),
            ..recovery.clone()
        });
        let binding = Binding {
            id: made.clone(),
            intent,
            seeded: false,
            carried_users: 0,
        };
        loop {
            let recorded = if let Some(recovery) = &recovery {
                self.store.record_recovery(&self.lease, recovery).await
            } else {
                let (lease, binding) = (&self.lease, binding.clone());
                self.store.bind_upstream_thread(lease, binding).await
            };
            match recorded {
                Ok(Bound::Done) => return Ok((made, recovery)),
                Ok(Bound::Lost) => return Err(Failure::LeaseLost),
                Ok(Bound::Unrecorded) => {
                    self.delete(&made).await;
                    return Err(Failure::LeaseLost);
                }
                Err(error) => {
                    if let Err(failure) = back_off(error).await {
                        self.resolve(intent, Made::Unused(&made)).await;
                        return Err(failure);
                    }
                }
            }
        }
    }

    /// Records the intent to create the thread.
    async fn intend(&self) -> Result<OrphanId, Failure> {
        let intent = OrphanId::new();
        loop {
            match self.store.intend(&self.lease, intent).await {
                Ok(true) => return Ok(intent),
                // The lease is lost. An earlier try whose answer was lost may have recorded the
                // intent.
                Ok(false) => {
                    self.resolve(intent, Made::Nothing).await;
                    return Err(Failure::LeaseLost);
                }
                Err(error) => back_off(error).await?,
            }
        }
    }

    async fn resolve(&self, intent: OrphanId, made: Made<'_>) {
        resolve(&self.store, intent, made).await;
    }

    /// Deletes an upstream thread whose gateway thread was erased during the creation: no record
    /// has its id.
    async fn delete(&self, made: &UpstreamThreadId) {
        let mut pause = FIRST_DELETE_PAUSE;
        for tries_left in (0..DELETE_TRIES).rev() {
            let deleted = self
                .upstream
                .delete_thread(made, &RateLimiter::UNBOUND, &mut Items::default())
                .await;
            let Err(error) = deleted else { return };
            tracing::error!(
                error = %Chain(&error),
                upstream.thread_id = made.as_str(),
                tries_left,
                "cannot delete an upstream thread that was made for an erased thread"
            );
            sleep(jittered(pause)).await;
            pause *= 2;
        }
    }
}

/// Records the result of an intent. If that fails, the janitor handles it as an intent without a
/// known result.
pub(in crate::runs) async fn resolve(store: &Store, intent: OrphanId, made: Made<'_>) {
    for _ in 0..RESOLVE_TRIES {
        let Err(error) = store.resolve(intent, made).await else {
            return;
        };
        if back_off(error).await.is_err() {
            break;
        }
    }
    tracing::warn!("cannot record the result of making an upstream thread");
}

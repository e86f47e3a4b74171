//! The steps of a run that go to the database in batches: its admission, its binding to an upstream thread, its end.
//!
//! Each is an item for a [`Lane`](super::lane::Lane). What becomes of it there stands in the file of its topic.

use std::sync::Arc;

use super::admission::{Admission, Admitted};
use super::binding::{Binding, Bound, Leased};
use super::errors::{NotWritten, StoreError};
use super::finish::{Closing, Ending, RunEnd};
use super::handle::Store;
use super::values::RunLease;

impl Store {
    /// Records a new run in one step. It finds or creates the key's current thread, and admits the
    /// run. If the current thread has expired, it is archived, and a fresh thread that names it
    /// takes its place.
    ///
    /// The run starts at once if the thread has no unfinished run. Otherwise its
    /// [strategy](crate::domain::MultitaskStrategy) decides:
    /// - `Enqueue` queues it last.
    /// - `Interrupt` and `Rollback` queue it before all queued runs. Ending the active run is up to
    ///   [`cancel_active`](Self::cancel_active).
    /// - `Merge` adds the message to the last queued run, if that run has the same assistant and
    ///   metadata and room for another message. Otherwise it queues the run as `Enqueue` does.
    /// - `Reject` refuses it, and nothing is stored.
    ///
    /// A run that starts puts its message into the transcript in the same step.
    ///
    /// An idempotency key that is in use is refused with [`Admitted::Repeated`], and nothing is
    /// stored. [`repeated`](Self::repeated) says when a use expires.
    ///
    /// The admission shares a batch with others, if there are any. It waits at most
    /// `store.max_wait` before it is sent. Once it was sent, the store asks again for a lost
    /// answer.
    pub async fn admit(
        &self,
        admission: impl Into<Arc<Admission>>,
    ) -> Result<Admitted, NotWritten> {
        self.admissions.write(admission.into()).await
    }

    /// Records the upstream thread of a run's thread, and that what was [intended](Self::intend)
    /// is done.
    ///
    /// If the lease was lost, the thread does not change. The new upstream thread then becomes an
    /// orphan, if its intent is still recorded. The binding shares a batch with others, if there
    /// are any. It is harmless to repeat.
    pub async fn bind_upstream_thread(
        &self,
        lease: &RunLease,
        binding: Binding,
    ) -> Result<Bound, StoreError> {
        Ok(self
            .bindings
            .write(Leased {
                lease: *lease,
                binding,
            })
            .await?)
    }

    /// Ends a run in one step: status, reply, counters, log. The messages of a run that never
    /// started move into the transcript too, so that no message of a user is dropped. If the run
    /// is discarded, its messages are removed instead.
    ///
    /// The end shares a batch with others, if there are any. It is harmless to repeat with the
    /// same lease and end, and gives the same answer.
    pub async fn finish(
        &self,
        lease: &RunLease,
        end: impl Into<Arc<RunEnd>>,
    ) -> Result<Closing, StoreError> {
        Ok(self
            .ends
            .write(Ending {
                lease: *lease,
                end: end.into(),
            })
            .await?)
    }
}

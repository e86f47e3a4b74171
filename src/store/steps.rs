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
    /// Records a new run: resolves the key's current thread or creates it (an expired one is archived, and a fresh one that
    /// names it takes its place), and admits the run, all in one step.
    ///
    /// The run starts at once if the thread has no unfinished run. Otherwise its strategy decides:
    /// [`Enqueue`](MultitaskStrategy::Enqueue) queues it last; [`Interrupt`](MultitaskStrategy::Interrupt) and
    /// [`Rollback`](MultitaskStrategy::Rollback) queue it before all that wait (what is active is for
    /// [`displace`](Self::displace) to end); [`Merge`](MultitaskStrategy::Merge) adds the message to the last run in the
    /// queue if that has the same assistant and metadata and room for another message, and queues it as `Enqueue` does if
    /// not; [`Reject`](MultitaskStrategy::Reject) refuses it, and nothing is stored. A run that starts puts its message into
    /// the transcript in the same step.
    ///
    /// An idempotency key that is in use is refused with [`Admitted::Repeated`], and nothing is stored. A use is forgotten as
    /// [`repeated`](Self::repeated) says.
    ///
    /// It goes along with the admissions of others, if there are any, and waits for at most `store.max_wait` before it is sent.
    /// Once it was sent, a lost answer is asked for again.
    pub async fn admit(
        &self,
        admission: impl Into<Arc<Admission>>,
    ) -> Result<Admitted, NotWritten> {
        self.admissions.write(admission.into()).await
    }

    /// Records where the thread of a run lives upstream, and that what was [intended](Self::intend) is done.
    ///
    /// If the lease was lost, nothing of the thread changes, and what was made becomes an orphan where its
    /// intent is still recorded. Goes along with those of others, if there are any. Harmless to repeat.
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

    /// Ends a run: status, reply, counters, log, in one step. A run that never started has its messages moved into the
    /// transcript too, so that nothing a user said is dropped. A run that is discarded has its messages removed instead.
    ///
    /// Goes along with the ends of others, if there are any. Repeating the call with the same lease and end is harmless and
    /// answers the same.
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

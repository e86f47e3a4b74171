//! What every call about the database begins with.

use std::fmt;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::admission::Admissions;
use super::backend::Backend;
use super::binding::Bindings;
use super::finish::Ends;
use super::lane::Lane;
use super::redaction::Redaction;

/// A handle on the database. Share it behind an `Arc`.
pub struct Store {
    pub(super) backend: Arc<Backend>,
    pub(super) admissions: Lane<Admissions>,
    pub(super) bindings: Lane<Bindings>,
    pub(super) ends: Lane<Ends>,
    pub(super) redaction: Redaction,
    pub(super) closed: CancellationToken,
}

impl fmt::Debug for Store {
    /// Leaves the connection options out: the driver's text of them has the password in it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let engine = match &*self.backend {
            Backend::Postgres { .. } => "Postgres",
            Backend::Sqlite { .. } => "Sqlite",
        };
        f.debug_struct("Store")
            .field("engine", &engine)
            .field("redaction", &self.redaction)
            .finish_non_exhaustive()
    }
}

//! Who sent a request.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;

use crate::domain::Principal;
use crate::error::Error;

/// Who asks.
#[derive(Clone, Debug)]
pub(super) struct Caller(pub(super) Principal);

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Error> {
        // A route without a guard is a defect, not an open door.
        parts
            .extensions
            .get::<Self>()
            .cloned()
            .ok_or(Error::Internal(None))
    }
}

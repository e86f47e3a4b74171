//! The caller of a request.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;

use crate::domain::Principal;
use crate::error::Error;

/// The caller, as the guard identified it.
#[derive(Clone, Debug)]
pub(super) struct Caller(pub(super) Principal);

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Error> {
        // A route without a guard is a defect of the gateway. It must not be open to everybody.
        parts
            .extensions
            .get::<Self>()
            .cloned()
            .ok_or(Error::Internal(None))
    }
}

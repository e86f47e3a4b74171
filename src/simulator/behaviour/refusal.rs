//! Why a request has no answer of its own, and what is answered in place of it.

use std::time::Duration;

use axum::response::{IntoResponse, Response};

use crate::simulator::behaviour::hostile::Hostility;
use crate::simulator::wire::error::ApiError;
use crate::simulator::wire::operation::Operation;

/// The connection is to be closed without an answer.
#[derive(Debug, thiserror::Error)]
#[error("the simulator was told to close the connection")]
pub(in crate::simulator) struct Dropped;

/// Why a call has no answer of its own.
#[derive(Debug)]
pub(in crate::simulator) enum Refused {
    Error(ApiError),
    Hostile(Hostility),
    /// An answer that tells an error although its status does not.
    Told(Box<Response>),
    Dropped,
}

/// The head of an answer is held back for so long.
#[derive(Clone, Copy, Debug)]
pub(in crate::simulator) struct LateHead(pub(in crate::simulator) Duration);

impl Refused {
    pub(in crate::simulator) fn answer(self, operation: Operation) -> Result<Response, Dropped> {
        match self {
            Self::Error(error) => Ok(error.into_response()),
            Self::Hostile(hostility) => Ok(hostility.answer(operation)),
            Self::Told(answer) => Ok(*answer),
            Self::Dropped => Err(Dropped),
        }
    }
}

impl From<ApiError> for Refused {
    fn from(error: ApiError) -> Self {
        Self::Error(error)
    }
}

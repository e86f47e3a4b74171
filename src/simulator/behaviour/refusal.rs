//! The reasons why a request gets no normal answer, and the answers in its place.

use std::time::Duration;

use axum::response::{IntoResponse, Response};

use crate::simulator::behaviour::hostile::Hostility;
use crate::simulator::wire::error::ApiError;
use crate::simulator::wire::operation::Operation;

/// An error that closes the connection without an answer.
#[derive(Debug, thiserror::Error)]
#[error("a directive asked the simulator to close the connection")]
pub(in crate::simulator) struct Dropped;

/// The reason why a call gets no normal answer.
#[derive(Debug)]
pub(in crate::simulator) enum Refused {
    Error(ApiError),
    Hostile(Hostility),
    /// An answer with a good status that holds an error.
    Told(Box<Response>),
    Dropped,
}

/// Time for which the head of an answer is held back.
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

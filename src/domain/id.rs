//! Ids: ours are UUIDv7 behind a prefix (`thr_`, `run_`, `msg_`, …), the upstream's are opaque text.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A text that is not an id of the expected kind.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("an id of this kind is `{prefix}` and 32 lower-case hex digits")]
pub struct InvalidId {
    prefix: &'static str,
}

macro_rules! prefixed_id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Deserialize, Serialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Uuid);

        impl $name {
            /// A new id, sortable by the time of its making (UUIDv7).
            #[expect(clippy::new_without_default, reason = "a default that differs each time would surprise")]
            pub fn new() -> Self {
                Self(Uuid::now_v7())
            }

            pub const fn from_uuid(uuid: Uuid) -> Self {
                Self(uuid)
            }

            pub const fn uuid(self) -> Uuid {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}{}", $prefix, self.0.simple())
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            /// Accepts exactly what `Display` writes, so that an id has one spelling.
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                text.strip_prefix($prefix)
                    .and_then(|hex| Uuid::try_parse(hex).ok())
                    .map(Self)
                    .filter(|id| id.to_string() == text)
                    .ok_or(InvalidId { prefix: $prefix })
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;

            fn try_from(text: String) -> Result<Self, InvalidId> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.to_string()
            }
        }
    };
}

prefixed_id!(
    /// A conversation of the gateway.
    ThreadId,
    "thr_"
);
prefixed_id!(
    /// One turn of a conversation.
    RunId,
    "run_"
);
prefixed_id!(
    /// One entry of a transcript.
    MessageId,
    "msg_"
);
prefixed_id!(
    /// One running gateway process.
    ReplicaId,
    "rep_"
);
prefixed_id!(
    /// A request to delete.
    DeletionId,
    "del_"
);
prefixed_id!(
    /// Something at an upstream besides the threads' own.
    RemnantId,
    "rem_"
);

macro_rules! upstream_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
        #[serde(transparent)]
        pub struct $name(pub String);

        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

upstream_id!(
    /// Where a conversation stands at its upstream: an Assistants thread, a conversation, or, where the server
    /// has no conversations, the last response of the chain. Opaque; assigned by the server.
    UpstreamThreadId
);
upstream_id!(
    /// A run or response at the upstream. Opaque; assigned by the server.
    UpstreamRunId
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_has_one_spelling() {
        let id = RunId::new();
        assert_eq!(id.to_string().parse(), Ok(id));
        for wrong in [
            id.to_string().to_uppercase(),
            format!("thr_{}", id.uuid().simple()),
            format!("run_{}", id.uuid()),
        ] {
            assert!(wrong.parse::<RunId>().is_err(), "{wrong}");
        }
    }
}

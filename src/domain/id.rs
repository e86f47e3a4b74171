//! Ids. The gateway's ids are UUIDv7 behind a prefix (`thr_`, `run_`, `msg_`, …); the upstream's
//! are opaque text.

use std::fmt;
use std::str::FromStr;

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{ObjectBuilder, Schema, Type};
use utoipa::{PartialSchema, ToSchema};
use uuid::{ContextV7, Uuid};

use super::Timestamp;

/// Milliseconds by which this machine's clock is behind the database's.
static CORRECTION: Correction = Correction(AtomicI64::new(0));
/// Orders the ids that this process makes within one millisecond.
static SEQUENCE: LazyLock<Mutex<ContextV7>> = LazyLock::new(Mutex::default);
/// Milliseconds of clock difference that are not corrected: ids need no finer clock, and their
/// time must not jump.
const TOLERANCE_MS: i64 = 500;

/// Sets the clock that dates new ids. So ids sort by the time of their creation at every replica,
/// even if a machine's clock is wrong.
pub fn set_clock(now: Timestamp) {
    if CORRECTION.set(now, own_clock()) {
        // A `ContextV7` does not go back in time, so a new one is needed.
        *SEQUENCE.lock().unwrap_or_else(PoisonError::into_inner) = ContextV7::new();
    }
}

/// Returns the database's time as far as this process knows it: the machine's clock, corrected by
/// [`set_clock`].
///
/// For code that cannot ask the database: new ids, and the checks of tokens. About half a second
/// off at most.
pub fn now() -> Timestamp {
    let millis = i64::try_from(CORRECTION.apply(own_clock()).as_millis()).unwrap_or(i64::MAX);
    Timestamp::from_timestamp_millis(millis).unwrap_or(Timestamp::MAX_UTC)
}

/// Milliseconds to add to the machine's clock.
struct Correction(AtomicI64);

impl Correction {
    /// Corrects a clock that reads `own` when the time is `now`. Returns whether the correction
    /// changed.
    fn set(&self, now: Timestamp, own: Duration) -> bool {
        let behind = now.timestamp_millis() - i64::try_from(own.as_millis()).unwrap_or(i64::MAX);
        let known = self.0.load(Ordering::Relaxed);
        let is_off = (behind - known).abs() >= TOLERANCE_MS;
        if is_off {
            self.0.store(
                if behind.abs() < TOLERANCE_MS {
                    0
                } else {
                    behind
                },
                Ordering::Relaxed,
            );
        }
        is_off
    }

    fn apply(&self, own: Duration) -> Duration {
        let behind = self.0.load(Ordering::Relaxed);
        let off = Duration::from_millis(behind.unsigned_abs());
        if behind < 0 {
            own.saturating_sub(off)
        } else {
            own + off
        }
    }
}

/// Returns the machine's time since 1970. Callers must correct it before use.
#[expect(
    clippy::disallowed_methods,
    reason = "ids and tokens do not ask the database; it is corrected"
)]
fn own_clock() -> Duration {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
}

fn new_uuid() -> Uuid {
    let now = CORRECTION.apply(own_clock());
    let sequence = SEQUENCE.lock().unwrap_or_else(PoisonError::into_inner);
    Uuid::new_v7(uuid::Timestamp::from_unix(
        &*sequence,
        now.as_secs(),
        now.subsec_nanos(),
    ))
}

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
            /// Returns a new id (UUIDv7), which sorts by the time of its creation.
            #[expect(clippy::new_without_default, reason = "a default that differs each time would surprise")]
            pub fn new() -> Self {
                Self(new_uuid())
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

            /// Accepts exactly the text that `Display` writes, so that an id has one spelling.
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

        impl ToSchema for $name {}

        impl PartialSchema for $name {
            fn schema() -> RefOr<Schema> {
                let pattern = concat!("^", $prefix, "[0-9a-f]{32}$");
                ObjectBuilder::new().schema_type(Type::String).pattern(Some(pattern)).into()
            }
        }
    };
}

prefixed_id!(
    /// A thread: the gateway's own conversation.
    ThreadId,
    "thr_"
);
prefixed_id!(
    /// The public id of an API key.
    KeyId,
    "key_"
);
prefixed_id!(
    /// A run: a message and its reply.
    RunId,
    "run_"
);
prefixed_id!(
    /// A message of a transcript.
    MessageId,
    "msg_"
);
prefixed_id!(
    /// A gateway process.
    ReplicaId,
    "rep_"
);
prefixed_id!(
    /// A request to delete.
    DeletionId,
    "del_"
);
prefixed_id!(
    /// An upstream orphan: an upstream thread that no thread uses, or may use.
    OrphanId,
    "rem_"
);

macro_rules! upstream_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Deserialize, Eq, Hash, PartialEq, Serialize, ToSchema)]
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
    /// The upstream copy of a conversation: an Assistants thread, a conversation, or, where the
    /// server has no conversations, the last response of the chain. Opaque; assigned by the
    /// server.
    UpstreamThreadId
);
upstream_id!(
    /// A run or response at the upstream. Opaque; assigned by the server.
    UpstreamRunId
);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_text_is_no_id_or_its_only_spelling(
            text in "\\PC{0,50}|(run|thr|RUN)_?[0-9a-fA-F-]{30,38}|run_[0-9a-f]{32}",
        ) {
            if let Ok(id) = text.parse::<RunId>() {
                prop_assert_eq!(id.to_string(), text.as_str());
            }
            prop_assert_eq!(RunId::try_from(text.clone()), text.parse());
            let json = serde_json::to_string(&text).unwrap();
            prop_assert_eq!(serde_json::from_str::<RunId>(&json).ok(), text.parse().ok());
        }

        #[test]
        fn ids_are_told_apart_as_texts(a: u128, b: u128) {
            let id = |n| RunId::from_uuid(Uuid::from_u128(n));
            prop_assert_eq!(id(a).to_string().parse(), Ok(id(a)));
            prop_assert_eq!(id(a).cmp(&id(b)), id(a).to_string().cmp(&id(b).to_string()));
        }
    }

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

    /// The corrections give the ids of a machine that is an hour ahead, and of one an hour behind,
    /// the database's time.
    #[test]
    fn a_wrong_clock_is_set_right() {
        let time = |seconds: u64| Duration::from_secs(1_800_000_000 + seconds);
        let database =
            |own: Duration| Timestamp::from_timestamp_millis(own.as_millis().try_into().unwrap());
        let hour = Duration::from_hours(1);
        for own in [time(0) + hour, time(0).checked_sub(hour).unwrap()] {
            let correction = Correction(AtomicI64::new(0));
            assert_eq!(
                correction.apply(own),
                own,
                "as long as nothing else is known"
            );
            assert!(correction.set(database(time(0)).unwrap(), own));
            assert_eq!(correction.apply(own), time(0));
            assert_eq!(correction.apply(own + hour), time(0) + hour);
            // A difference below the tolerance, as the latency of the database causes it, changes
            // nothing.
            let late = time(10).checked_sub(Duration::from_millis(499)).unwrap();
            assert!(!correction.set(database(late).unwrap(), own + Duration::from_secs(10)));
            assert_eq!(correction.apply(own), time(0));
            // An administrator corrects the machine's clock.
            assert!(correction.set(database(time(20)).unwrap(), time(20)));
            assert_eq!(correction.apply(time(30)), time(30));
        }
        let right = Correction(AtomicI64::new(0));
        let late = time(0) + Duration::from_millis(499);
        assert!(!right.set(database(late).unwrap(), time(0)));
        assert_eq!(right.apply(time(1)), time(1));
    }
}

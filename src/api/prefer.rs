//! The `Prefer` header (RFC 7240): how long a caller wants to wait.

use std::fmt;
use std::time::Duration;

use axum::http::{HeaderMap, HeaderName};

pub(super) const PREFER: HeaderName = HeaderName::from_static("prefer");
pub(super) const PREFERENCE_APPLIED: HeaderName = HeaderName::from_static("preference-applied");

/// Says that a run is that of an earlier request with the same idempotency key.
pub(super) const REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

/// What a caller prefers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Prefer {
    /// To hear when all is done.
    Done,
    /// To hear at once that it was taken: `respond-async`.
    Async,
    /// To wait so long, and to be told then that it was taken: `wait=<seconds>`.
    Wait(Duration),
}

impl Prefer {
    /// Reads the header. Preferences that are not known, or cannot be read, are passed over, as the RFC wants it. A
    /// wait counts more than `respond-async`, which then says what to do after it; of several the shortest.
    pub(super) fn of(headers: &HeaderMap) -> Self {
        let preferences = headers
            .get_all(PREFER)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .filter_map(|preference| {
                let preference = preference.split(';').next()?.trim();
                match preference.split_once('=') {
                    None if preference.eq_ignore_ascii_case("respond-async") => Some(Self::Async),
                    Some((name, value)) if name.trim().eq_ignore_ascii_case("wait") => {
                        let seconds = value.trim().trim_matches('"').parse().ok()?;
                        Some(Self::Wait(Duration::from_secs(seconds)))
                    }
                    _ => None,
                }
            })
            .collect::<Vec<_>>();
        let shortest = preferences
            .iter()
            .copied()
            .filter(|it| *it != Self::Async)
            .min_by_key(|it| it.patience());
        shortest
            .or(preferences.first().copied())
            .unwrap_or(Self::Done)
    }

    /// How long to wait at most.
    pub(super) fn patience(self) -> Option<Duration> {
        match self {
            Self::Done => None,
            Self::Async => Some(Duration::ZERO),
            Self::Wait(wait) => Some(wait),
        }
    }
}

impl fmt::Display for Prefer {
    /// As the header would say it; empty for what is no preference.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => Ok(()),
            Self::Async => f.write_str("respond-async"),
            Self::Wait(wait) => write!(f, "wait={}", wait.as_secs()),
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_header_is_read(lines in prop::collection::vec(
            prop_oneof![
                prop::collection::vec(any::<u8>(), 0..60),
                "(wait|respond-async|[a-z;=\", ]{0,4})( ?= ?\"?[0-9]{0,22}\"?)?[,;]?.{0,4}".prop_map(String::into_bytes),
            ],
            0..5,
        )) {
            let mut headers = HeaderMap::new();
            for value in lines.iter().filter_map(|line| HeaderValue::from_bytes(line).ok()) {
                headers.append(PREFER, value);
            }
            let prefer = Prefer::of(&headers);
            // What is said to have been applied means the same.
            let mut applied = HeaderMap::new();
            applied.insert(PREFER, HeaderValue::from_str(&prefer.to_string()).unwrap());
            prop_assert_eq!(Prefer::of(&applied), prefer);
        }
    }

    #[test]
    fn preferences_are_read_and_the_rest_is_passed_over() {
        let wait = |seconds| Prefer::Wait(Duration::from_secs(seconds));
        for (lines, expected) in [
            (&[][..], Prefer::Done),
            (&["respond-async"], Prefer::Async),
            (&["Respond-Async; foo=bar"], Prefer::Async),
            (&["wait=5"], wait(5)),
            (&["wait = \"5\""], wait(5)),
            (&["handling=lenient, wait=7"], wait(7)),
            (&["wait=7", "wait=3"], wait(3)),
            (&["respond-async, wait=10"], wait(10)),
            (&["wait=soon"], Prefer::Done),
            (&["return=minimal"], Prefer::Done),
        ] {
            let mut headers = HeaderMap::new();
            for line in lines {
                headers.append(PREFER, HeaderValue::from_static(line));
            }
            assert_eq!(Prefer::of(&headers), expected, "{lines:?}");
        }
    }
}

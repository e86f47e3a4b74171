//! Retries of refused requests.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::failure::Failure;
use crate::error::Chain;
use crate::runs::backoff::jittered;
use crate::upstream::UpstreamError;

/// Pauses before a request is sent again, where the upstream names no pause.
pub(in crate::runs) const FIRST_BACK_OFF: Duration = Duration::from_millis(500);
const LONGEST_BACK_OFF: Duration = Duration::from_secs(8);
/// Longest pause that the gateway accepts from an upstream. If the upstream asks for more, the run
/// fails with that answer.
const LONGEST_RETRY_AFTER: Duration = Duration::from_mins(1);

/// The tries that one request has left. The gateway repeats a request only if the upstream
/// provably did not take it: a user's message must not reach the upstream twice.
pub(in crate::runs) struct Retries {
    left: u32,
    made: u32,
    /// Time since which something else holds the thread.
    pub(in crate::runs) busy_since: Option<Instant>,
}

impl Retries {
    pub(in crate::runs) fn new(max_retries: u32) -> Self {
        Self {
            left: max_retries,
            made: 0,
            busy_since: None,
        }
    }

    /// Waits for the pause that the upstream asks for, or else for a growing back-off.
    ///
    /// # Errors
    /// The error itself, if the request must not be sent again.
    pub(in crate::runs) async fn wait_after(
        &mut self,
        error: UpstreamError,
    ) -> Result<(), Failure> {
        if self.wait(&error).await {
            Ok(())
        } else {
            Err(Failure::Upstream(error))
        }
    }

    /// Waits like [`wait_after`](Self::wait_after). Returns `false` at once if the request must
    /// not be sent again.
    pub(in crate::runs) async fn wait(&mut self, error: &UpstreamError) -> bool {
        let Some(wait) = self.pause(error) else {
            return false;
        };
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        tracing::warn!(error = %Chain(error), wait_ms, "the upstream did not run the request; retrying");
        sleep(wait).await;
        true
    }

    /// Returns the pause before a request that was provably not taken is sent again; `None` if a
    /// repeat would not help.
    fn pause(&mut self, error: &UpstreamError) -> Option<Duration> {
        let asked = match error {
            UpstreamError::Connect | UpstreamError::Broken { timeout: false } => None,
            UpstreamError::RateLimited {
                retry_after,
                quota: false,
                ..
            }
            | UpstreamError::Unavailable {
                retry_after,
                no_retry: false,
                ..
            } => *retry_after,
            _ => return None,
        };
        self.left = self.left.checked_sub(1)?;
        let back_off = FIRST_BACK_OFF
            .saturating_mul(2_u32.saturating_pow(self.made))
            .min(LONGEST_BACK_OFF);
        self.made += 1;
        match asked {
            Some(wait) => (wait <= LONGEST_RETRY_AFTER).then_some(wait),
            None => Some(jittered(back_off)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::upstream::RefusalCause;

    fn retries(left: u32) -> Retries {
        Retries {
            left,
            made: 0,
            busy_since: None,
        }
    }

    proptest! {
        #[test]
        fn a_back_off_stays_within_its_bounds_and_ends(left in 0..70_u32, asked in proptest::option::of(0..200_u64)) {
            let mut retries = retries(left);
            let retry_after = asked.map(Duration::from_secs);
            let error = UpstreamError::RateLimited { status: 429, retry_after, quota: false, code: None };
            let pauses: Vec<_> = std::iter::from_fn(|| retries.pause(&error)).take(100).collect();
            match retry_after {
                Some(wait) if wait > LONGEST_RETRY_AFTER => prop_assert!(pauses.is_empty()),
                Some(wait) => prop_assert_eq!(pauses, vec![wait; left as usize]),
                None => {
                    prop_assert_eq!(pauses.len(), left as usize);
                    for pause in pauses {
                        prop_assert!(pause >= FIRST_BACK_OFF / 2 && pause <= LONGEST_BACK_OFF);
                    }
                }
            }
        }
    }

    #[test]
    fn what_no_repeat_will_mend_is_not_sent_again() {
        for error in [
            UpstreamError::RateLimited {
                status: 429,
                retry_after: None,
                quota: true,
                code: None,
            },
            UpstreamError::Broken { timeout: true },
            UpstreamError::Unavailable {
                status: 503,
                retry_after: None,
                no_retry: true,
                code: None,
            },
            UpstreamError::Protocol(String::new()),
            UpstreamError::Refused {
                status: 400,
                code: None,
                missing: false,
                cause: RefusalCause::Unknown,
            },
            UpstreamError::ThreadGone,
        ] {
            assert_eq!(retries(9).pause(&error), None, "{error:?}");
        }
    }
}

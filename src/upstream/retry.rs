//! Repeats calls that are safe to repeat. No call that starts a run passes here.

use std::time::Duration;

use rand::RngExt;

use crate::upstream::error::UpstreamError;

/// Wait before the second try, or between two questions about unfinished work. It doubles each
/// time.
pub(super) const FIRST_WAIT: Duration = Duration::from_millis(250);
/// Longest wait between two tries.
pub(super) const LONGEST_WAIT: Duration = Duration::from_secs(2);
/// Shortest wait between two questions that a server may ask for.
pub(super) const SHORTEST_WAIT: Duration = Duration::from_millis(20);
/// Consecutive failures after which there is no further try.
const MAX_FAILURES: u32 = 5;

/// Repeats `call` while it fails in a way that may pass. Gives up after five failures, or after
/// one that will not pass.
pub(super) async fn with_retries<T, F>(mut call: impl FnMut() -> F) -> Result<T, UpstreamError>
where
    F: Future<Output = Result<T, UpstreamError>>,
{
    let mut wait = FIRST_WAIT;
    let mut failures = 0;
    loop {
        let error = match call().await {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        failures += 1;
        if failures >= MAX_FAILURES || !may_pass(&error) {
            return Err(error);
        }
        tokio::time::sleep(asked_wait(&error).unwrap_or(wait)).await;
        wait = next_backoff(wait);
    }
}

/// Repeats `call` like [`with_retries`], and also for as long as something else holds the thread.
pub(super) async fn retry_while_busy<T, F>(mut call: impl FnMut() -> F) -> Result<T, UpstreamError>
where
    F: Future<Output = Result<T, UpstreamError>>,
{
    let mut wait = FIRST_WAIT;
    loop {
        match with_retries(&mut call).await {
            Err(UpstreamError::Busy { .. }) => {}
            other => return other,
        }
        tokio::time::sleep(wait).await;
        wait = next_backoff(wait);
    }
}

/// Repeats `call` for as long as the server refuses it for the moment. After any other failure the
/// call may have had its effect.
pub(super) async fn retry_while_refused<T, F>(
    mut call: impl FnMut() -> F,
) -> Result<T, UpstreamError>
where
    F: Future<Output = Result<T, UpstreamError>>,
{
    let mut wait = FIRST_WAIT;
    loop {
        match call().await {
            Err(
                UpstreamError::Busy { .. }
                | UpstreamError::Connect
                | UpstreamError::RateLimited { quota: false, .. },
            ) => {}
            other => return other,
        }
        tokio::time::sleep(wait).await;
        wait = next_backoff(wait);
    }
}

/// Waits between 0.5 and 1 second, so that callers that wait for the same event do not all try at
/// once.
pub(super) async fn jittered_delay() {
    let part = rand::rng().random_range(0.5..=1.0);
    tokio::time::sleep(Duration::from_secs(1).mul_f64(part)).await;
}

/// Returns the wait that follows `wait`.
pub(super) fn next_backoff(wait: Duration) -> Duration {
    (wait * 2).min(LONGEST_WAIT)
}

/// Returns true if another try may succeed.
pub(super) const fn may_pass(error: &UpstreamError) -> bool {
    match error {
        UpstreamError::RateLimited { quota, .. } => !*quota,
        UpstreamError::Unavailable { no_retry, .. } => !*no_retry,
        UpstreamError::Connect | UpstreamError::Broken { .. } => true,
        UpstreamError::Busy { .. }
        | UpstreamError::ThreadGone
        | UpstreamError::Refused { .. }
        | UpstreamError::NotOffered { .. }
        | UpstreamError::Protocol(_) => false,
    }
}

/// Returns how long the server, or a proxy in front of it, asks to wait.
pub(super) const fn asked_wait(error: &UpstreamError) -> Option<Duration> {
    match error {
        UpstreamError::RateLimited { retry_after, .. }
        | UpstreamError::Unavailable { retry_after, .. } => *retry_after,
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::upstream::error::RefusalCause;

    fn unavailable(no_retry: bool) -> UpstreamError {
        UpstreamError::Unavailable {
            status: 503,
            retry_after: Some(Duration::from_secs(9)),
            no_retry,
            code: None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn only_what_may_pass_is_tried_again_and_not_for_ever() {
        for (error, tries) in [
            (UpstreamError::Connect, 5),
            (unavailable(false), 5),
            (unavailable(true), 1),
            (
                UpstreamError::RateLimited {
                    status: 429,
                    retry_after: None,
                    quota: true,
                    code: None,
                },
                1,
            ),
            (
                UpstreamError::Refused {
                    status: 401,
                    code: None,
                    missing: false,
                    cause: RefusalCause::Unknown,
                },
                1,
            ),
            (UpstreamError::ThreadGone, 1),
        ] {
            let calls = Cell::new(0);
            let outcome = with_retries(|| {
                calls.set(calls.get() + 1);
                let error = error.clone();
                async move { Err::<(), _>(error) }
            })
            .await;
            assert_eq!(calls.get(), tries, "{error:?}");
            assert_eq!(format!("{:?}", outcome.unwrap_err()), format!("{error:?}"));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn waits_double_unless_the_server_names_one() {
        let started = tokio::time::Instant::now();
        let asked = UpstreamError::RateLimited {
            status: 429,
            retry_after: Some(Duration::from_secs(7)),
            quota: false,
            code: None,
        };
        let failures = Cell::new(vec![asked, UpstreamError::Connect, UpstreamError::Connect]);
        with_retries(|| {
            let mut left = failures.take();
            let next = left.pop();
            failures.set(left);
            async move { next.map_or(Ok(()), Err) }
        })
        .await
        .unwrap();
        assert_eq!(started.elapsed(), Duration::from_millis(250 + 500 + 7000));
    }
}

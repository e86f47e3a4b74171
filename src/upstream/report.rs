//! Logs failed calls to an upstream: which upstream, and why. Never logs a URL, and the server's
//! prose only if the operator asks for it.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::upstream::error::UpstreamError;

/// Time for which the same failure is not logged again, so that an outage is one line and not one
/// for each try.
const REPEAT_AFTER: Duration = Duration::from_secs(10);
/// Different failures that are logged within that time.
const MOST: usize = 8;

/// The log of one upstream's failures.
#[derive(Debug)]
pub(super) struct Report {
    upstream: String,
    recent: Mutex<Vec<Recent>>,
}

#[derive(Debug)]
struct Recent {
    what: String,
    logged: Instant,
    /// Failures since then that were not logged.
    repeats: u64,
}

impl Report {
    pub(super) fn new(upstream: &str) -> Self {
        Self {
            upstream: upstream.to_owned(),
            recent: Mutex::default(),
        }
    }

    /// Translates a call without an answer, or with an incomplete one, and logs its cause. A
    /// timeout of TCP is a broken connection. The only other timeout of the HTTP client is for
    /// connecting.
    ///
    /// The HTTP client sends a request again by itself if a kept-alive connection closed before
    /// any of it was written. Once bytes were written, nothing proves that the server did not
    /// read them.
    pub(super) fn failure(&self, error: &reqwest::Error) -> UpstreamError {
        // The causes name reasons (refused, unknown name, bad certificate), never the request.
        let cause = chain(error).skip(1).collect::<Vec<_>>().join(": ");
        let meaning = if error.is_connect() || is_unwritten(error) {
            UpstreamError::Connect
        } else {
            UpstreamError::Broken { timeout: false }
        };
        if let Some(repeats) = self.is_due(&cause) {
            tracing::warn!(
                upstream.name = self.upstream,
                cause,
                hint = hint(&cause),
                repeats,
                "{meaning}"
            );
        }
        meaning
    }

    /// Logs, for the operator, that the server refused a call or failed at it. `code` is the
    /// server's error code, `hint` what the operator may do, and `words` the server's own words,
    /// if the operator asked for them.
    pub(super) fn refusal(
        &self,
        http_status: u16,
        code: Option<&str>,
        error: &UpstreamError,
        hint: Option<&str>,
        words: Option<&str>,
    ) {
        let what = format!("{http_status} {}", code.unwrap_or_default());
        if let Some(repeats) = self.is_due(&what) {
            tracing::warn!(
                upstream.name = self.upstream,
                http.status = http_status,
                code,
                hint,
                upstream.words = words,
                repeats,
                "{}",
                kind(error)
            );
        }
    }

    /// Returns `None` if the failure was logged a short time ago. Otherwise returns how often it
    /// has happened unlogged since then.
    fn is_due(&self, what: &str) -> Option<u64> {
        let (mut recent, now) = (
            self.recent.lock().unwrap_or_else(PoisonError::into_inner),
            Instant::now(),
        );
        if let Some(known) = recent.iter_mut().find(|known| known.what == what) {
            if now.duration_since(known.logged) < REPEAT_AFTER {
                known.repeats += 1;
                return None;
            }
            known.logged = now;
            return Some(std::mem::take(&mut known.repeats));
        }
        recent.retain(|known| now.duration_since(known.logged) < REPEAT_AFTER);
        if recent.len() >= MOST {
            return None;
        }
        recent.push(Recent {
            what: what.to_owned(),
            logged: now,
            repeats: 0,
        });
        Some(0)
    }
}

/// Returns true if the connection closed before any byte of the request was written.
fn is_unwritten(error: &(dyn std::error::Error + 'static)) -> bool {
    std::iter::successors(Some(error), |cause| cause.source())
        .filter_map(|cause| cause.downcast_ref::<hyper::Error>())
        .any(hyper::Error::is_canceled)
}

const fn kind(error: &UpstreamError) -> &'static str {
    match error {
        UpstreamError::Unavailable { .. } => "the upstream failed",
        UpstreamError::RateLimited { quota: true, .. } => "the quota at the upstream is used up",
        UpstreamError::RateLimited { .. } => "the upstream limits the rate",
        _ => "the upstream refused a request",
    }
}

/// Returns what an operator may do about the cause.
fn hint(cause: &str) -> Option<&'static str> {
    const HINTS: [(&str, &str); 5] = [
        (
            "InvalidContentType",
            "the server does not speak TLS at this port: should `base_url` begin with http://?",
        ),
        (
            "UnknownIssuer",
            "the server's certificate comes from an unknown CA: SSL_CERT_FILE may name a bundle of certificates",
        ),
        (
            "NotValidForName",
            "the server's certificate is for another host than that of `base_url`",
        ),
        (
            "failed to lookup address",
            "the host of `base_url` cannot be resolved",
        ),
        (
            "Connection refused",
            "nothing listens at the host and port of `base_url`",
        ),
    ];
    HINTS
        .iter()
        .find(|(word, _)| cause.contains(word))
        .map(|(_, hint)| *hint)
}

/// The texts of an error and its causes.
pub(super) fn chain<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> impl Iterator<Item = String> + 'a {
    std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string)
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_same_failure_is_logged_once_in_a_while_and_counted() {
        let report = Report::new("u");
        assert_eq!(
            [report.is_due("a"), report.is_due("a"), report.is_due("b")],
            [Some(0), None, Some(0)]
        );
        advance(REPEAT_AFTER).await;
        assert_eq!([report.is_due("a"), report.is_due("a")], [Some(1), None]);
    }

    #[tokio::test(start_paused = true)]
    async fn failures_that_all_differ_are_no_flood() {
        let report = Report::new("u");
        for _ in 0..3 {
            let logged = (0..1000).filter(|n: &u32| report.is_due(&n.to_string()).is_some());
            assert_eq!(logged.count(), MOST);
            advance(REPEAT_AFTER).await;
        }
    }
}

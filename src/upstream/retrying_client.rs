//! Sends calls without a body that are safe to repeat. Background work passes them through a rate
//! limiter.

use std::sync::atomic::{AtomicBool, Ordering};

use http::Method;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::time::sleep;

use crate::upstream::client::{Answer, UpstreamClient};
use crate::upstream::error::UpstreamError;
use crate::upstream::memory_limit::SizeBudget;
use crate::upstream::port::Disposal;
use crate::upstream::rate_limiter::RateLimiter;
use crate::upstream::retry::{FIRST_WAIT, next_backoff, retry_while_busy, with_retries};
use crate::upstream::wire::List;

/// Page sizes. Every server must support the largest. A page that is too large to read is asked
/// for again with the next smaller size.
const PAGES: [&str; 4] = ["100", "25", "5", "1"];
/// Checks after a deletion, by the last of which it must have taken effect.
const LOOKS: u32 = 4;

/// Sends the calls. Each try waits for a permit of the limiter, and is repeated while it fails in
/// a way that may pass.
#[derive(Clone, Copy, Debug)]
pub(super) struct RetryingClient<'a> {
    pub(super) client: &'a UpstreamClient,
    /// `None`: calls do not wait.
    pub(super) limiter: Option<&'a RateLimiter>,
}

impl RetryingClient<'_> {
    pub(super) async fn make<T: DeserializeOwned>(
        self,
        method: Method,
        path: &[&str],
        query: &[(&str, &str)],
    ) -> Result<Answer<T>, UpstreamError> {
        with_retries(|| async {
            self.acquire().await;
            self.client.json(method.clone(), path, query).await
        })
        .await
    }

    pub(super) async fn get(self, path: &[&str]) -> Result<Value, UpstreamError> {
        self.make(Method::GET, path, &[])
            .await
            .map(|answer| answer.value)
    }

    /// Returns a page of a list, as large as can be read.
    pub(super) async fn page<T: DeserializeOwned>(
        self,
        path: &[&str],
        order: &str,
        after: Option<&str>,
    ) -> Result<List<T>, UpstreamError> {
        let [first, shorter @ ..] = PAGES;
        let mut page = self.page_of(first, path, order, after).await;
        for limit in shorter {
            // An answer that is too long fails as a protocol error.
            if !matches!(page, Err(UpstreamError::Protocol(_))) {
                break;
            }
            page = self.page_of(limit, path, order, after).await;
        }
        page
    }

    async fn page_of<T: DeserializeOwned>(
        self,
        limit: &str,
        path: &[&str],
        order: &str,
        after: Option<&str>,
    ) -> Result<List<T>, UpstreamError> {
        let cursor = after.map(|id| ("after", id));
        let query: Vec<_> = [("limit", limit), ("order", order)]
            .into_iter()
            .chain(cursor)
            .collect();
        self.make(Method::GET, path, &query)
            .await
            .map(|answer| answer.value)
    }

    /// Returns a page of a list and charges it to a budget: all pages of a list together get the
    /// limit of one answer.
    pub(super) async fn page_within<T: DeserializeOwned>(
        self,
        path: &[&str],
        query: &[(&str, &str)],
        after: Option<&str>,
        budget: &mut SizeBudget,
    ) -> Result<List<T>, UpstreamError> {
        let [longest, ..] = PAGES;
        let cursor = after.map(|id| ("after", id));
        let query: Vec<_> = [("limit", longest)]
            .into_iter()
            .chain(query.iter().copied())
            .chain(cursor)
            .collect();
        let answer = self.make::<List<T>>(Method::GET, path, &query).await?;
        budget.add(answer.size)?;
        Ok(answer.value)
    }

    /// Checks an object before its deletion. Returns `None` if the object is gone already.
    /// Returns `true` if the server supports this call, so that a later 404 is about the object
    /// and not the endpoint.
    pub(super) async fn is_known(self, path: &[&str]) -> Result<Option<bool>, UpstreamError> {
        match self.get(path).await {
            Ok(_) => Ok(Some(true)),
            Err(error) if is_gone(&error) => Ok(None),
            Err(error) if is_not_offered(&error) => Ok(Some(false)),
            Err(error) => Err(error),
        }
    }

    pub(super) async fn delete(self, path: &[&str]) -> Result<(), UpstreamError> {
        let deletion = Deletion::default();
        let deleted = with_retries(|| deletion.attempt(self, path)).await;
        deletion.outcome(deleted)
    }

    /// Deletes as soon as nothing holds the thread.
    pub(super) async fn delete_once_unlocked(self, path: &[&str]) -> Result<(), UpstreamError> {
        let deletion = Deletion::default();
        let deleted = retry_while_busy(|| deletion.attempt(self, path)).await;
        deletion.outcome(deleted)
    }

    /// Makes sure that a deleted object is gone. `deleted`: the result of the deletion.
    /// `is_known`: the server answered this check before, so that every 404 is about the object.
    pub(super) async fn confirm(
        self,
        path: &[&str],
        deleted: Result<(), UpstreamError>,
        is_known: bool,
    ) -> Result<Disposal, UpstreamError> {
        let mut wait = FIRST_WAIT;
        let deleted = match deleted {
            Err(error) if is_missing(&error) => Err(error),
            Err(error) if is_not_offered(&error) => return Ok(Disposal::NotSupported),
            Err(error) => return Err(error),
            Ok(()) => Ok(()),
        };
        for look in 0..LOOKS {
            if look > 0 {
                sleep(wait).await;
                wait = next_backoff(wait);
            }
            match self.get(path).await {
                Ok(_) => {}
                Err(error) if is_missing(&error) || is_not_offered(&error) => {
                    return Ok(match deleted {
                        Err(refusal) if !is_known => unseen(&refusal, &error),
                        _ => Disposal::Deleted,
                    });
                }
                Err(error) => return Err(error),
            }
        }
        match deleted {
            Err(refusal) if !is_gone(&refusal) => Ok(Disposal::NotSupported),
            _ => Err(UpstreamError::Protocol(
                "the server confirmed a deletion, but the object is still there".to_owned(),
            )),
        }
    }

    /// Returns the result of deleting an object that was not checked before. A refusal that
    /// leaves the result open is followed by a check.
    pub(super) async fn disposal(
        self,
        path: &[&str],
        deleted: Result<(), UpstreamError>,
    ) -> Result<Disposal, UpstreamError> {
        let refusal = match deleted {
            Ok(()) => return Ok(Disposal::Deleted),
            Err(error) if is_missing(&error) || is_not_offered(&error) => error,
            Err(error) => return Err(error),
        };
        match self.get(path).await {
            // An answer that cannot be read shows that the object is there.
            Ok(_) | Err(UpstreamError::Protocol(_)) => Ok(Disposal::NotSupported),
            Err(error) if is_missing(&error) || is_not_offered(&error) => {
                Ok(unseen(&refusal, &error))
            }
            Err(error) => Err(error),
        }
    }

    async fn acquire(self) {
        if let Some(limiter) = self.limiter {
            limiter.acquire().await;
        }
    }
}

/// The tries of one deletion.
#[derive(Debug, Default)]
struct Deletion {
    /// A try failed ambiguously, so it may have deleted the object.
    unsure: AtomicBool,
}

impl Deletion {
    async fn attempt(
        &self,
        client: RetryingClient<'_>,
        path: &[&str],
    ) -> Result<(), UpstreamError> {
        client.acquire().await;
        let done = client.client.done(Method::DELETE, path).await;
        if done.as_ref().is_err_and(UpstreamError::is_ambiguous) {
            self.unsure.store(true, Ordering::Relaxed);
        }
        done
    }

    /// Returns the result of all tries: a later try does not find an object that an earlier one
    /// deleted.
    fn outcome(&self, last: Result<(), UpstreamError>) -> Result<(), UpstreamError> {
        match last {
            Err(error) if is_gone(&error) && self.unsure.load(Ordering::Relaxed) => Ok(()),
            other => other,
        }
    }
}

/// Returns the result of a deletion that neither its own answer nor the check after it proves to
/// be supported. The object is gone only if one of the two says so.
const fn unseen(deletion: &UpstreamError, look: &UpstreamError) -> Disposal {
    if is_gone(deletion) || is_gone(look) {
        Disposal::AlreadyGone
    } else {
        Disposal::NotSupported
    }
}

/// Returns true if the server says that no object with that id exists. For a response the text is
/// the same as for the end of a chain.
pub(super) const fn is_gone(error: &UpstreamError) -> bool {
    matches!(
        error,
        UpstreamError::ThreadGone | UpstreamError::Refused { missing: true, .. }
    )
}

/// Returns true if no object with that id exists, provided that the server supports the call.
pub(super) const fn is_missing(error: &UpstreamError) -> bool {
    is_gone(error) || matches!(error, UpstreamError::Refused { status: 404, .. })
}

/// Returns true if the server does not support the call at all.
pub(super) const fn is_not_offered(error: &UpstreamError) -> bool {
    matches!(
        error,
        UpstreamError::Refused {
            status: 404 | 405 | 501,
            ..
        }
    )
}

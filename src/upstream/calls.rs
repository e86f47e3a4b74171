//! Calls without a body that are harmless to repeat, at a pace where nobody waits for them.

use std::sync::atomic::{AtomicBool, Ordering};

use http::Method;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::time::sleep;

use super::client::{Answer, UpstreamClient};
use super::patience::{FIRST_WAIT, longer, once_unlocked, patiently};
use super::wire::List;
use super::{Pace, UpstreamError};

/// Lengths of a page, the longest that a server must give first. What is too much to read at once is asked for in
/// smaller parts.
const PAGES: [&str; 4] = ["100", "25", "5", "1"];
/// Looks after a deletion until it must have taken effect.
const LOOKS: u32 = 4;

/// The way to make them. Each try waits for its turn, and is repeated while it fails in a way that may pass.
#[derive(Clone, Copy, Debug)]
pub(super) struct Calls<'a> {
    pub(super) client: &'a UpstreamClient,
    /// `None`: at once.
    pub(super) pace: Option<&'a Pace>,
}

impl Calls<'_> {
    pub(super) async fn make<T: DeserializeOwned>(
        self,
        method: Method,
        path: &[&str],
        query: &[(&str, &str)],
    ) -> Result<Answer<T>, UpstreamError> {
        patiently(|| async {
            self.turn().await;
            self.client.json(method.clone(), path, query).await
        })
        .await
    }

    pub(super) async fn get(self, path: &[&str]) -> Result<Value, UpstreamError> {
        self.make(Method::GET, path, &[]).await.map(|answer| answer.value)
    }

    /// A page of a list, as long as can be read.
    pub(super) async fn page<T: DeserializeOwned>(
        self,
        path: &[&str],
        order: &str,
        after: Option<&str>,
    ) -> Result<List<T>, UpstreamError> {
        let [first, shorter @ ..] = PAGES;
        let mut page = self.page_of(first, path, order, after).await;
        for limit in shorter {
            // An answer that is too long is one that cannot be read.
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
        let query: Vec<_> = [("limit", limit), ("order", order)].into_iter().chain(cursor).collect();
        self.make(Method::GET, path, &query).await.map(|answer| answer.value)
    }

    pub(super) async fn delete(self, path: &[&str]) -> Result<(), UpstreamError> {
        let deletion = Deletion::default();
        let deleted = patiently(|| deletion.attempt(self, path)).await;
        deletion.outcome(deleted)
    }

    /// The same, as soon as nothing holds the thread.
    pub(super) async fn delete_once_unlocked(self, path: &[&str]) -> Result<(), UpstreamError> {
        let deletion = Deletion::default();
        let deleted = once_unlocked(|| deletion.attempt(self, path)).await;
        deletion.outcome(deleted)
    }

    /// Makes sure that what was to be deleted is gone. `deleted`: what the deletion came to. That the server has the call
    /// must be known: only then does every 404 say that there is nothing.
    pub(super) async fn confirm(
        self,
        path: &[&str],
        deleted: Result<(), UpstreamError>,
    ) -> Result<(), UpstreamError> {
        let mut wait = FIRST_WAIT;
        let deleted = match deleted {
            Err(error) if !is_missing(&error) => return Err(error),
            other => other,
        };
        for look in 0..LOOKS {
            if look > 0 {
                sleep(wait).await;
                wait = longer(wait);
            }
            match self.get(path).await {
                Ok(_) => {}
                Err(error) if is_missing(&error) || is_not_offered(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        deleted.and_then(|()| Err(UpstreamError::Protocol("what was deleted is still there".to_owned())))
    }

    async fn turn(self) {
        if let Some(pace) = self.pace {
            pace.turn().await;
        }
    }
}

/// The tries of one deletion.
#[derive(Debug, Default)]
struct Deletion {
    /// One of them may have had an effect that was not told.
    unsure: AtomicBool,
}

impl Deletion {
    async fn attempt(&self, calls: Calls<'_>, path: &[&str]) -> Result<(), UpstreamError> {
        calls.turn().await;
        let done = calls.client.done(Method::DELETE, path).await;
        if done.as_ref().is_err_and(UpstreamError::is_ambiguous) {
            self.unsure.store(true, Ordering::Relaxed);
        }
        done
    }

    /// What the tries came to: what an earlier one may have deleted is not found by a later one.
    fn outcome(&self, last: Result<(), UpstreamError>) -> Result<(), UpstreamError> {
        match last {
            Err(UpstreamError::ThreadGone) if self.unsure.load(Ordering::Relaxed) => Ok(()),
            other => other,
        }
    }
}

/// There is nothing of that id, if the server has the call. The text for a response is that for the end of a chain,
/// too.
pub(super) const fn is_missing(error: &UpstreamError) -> bool {
    matches!(error, UpstreamError::ThreadGone | UpstreamError::Refused { status: 404, .. })
}

/// The server does not have the call at all.
pub(super) const fn is_not_offered(error: &UpstreamError) -> bool {
    matches!(error, UpstreamError::Refused { status: 404 | 405 | 501, .. })
}

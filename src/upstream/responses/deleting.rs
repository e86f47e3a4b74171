//! Deletes conversations with their items, and responses.

use std::collections::HashSet;

use serde_json::Value;
use tokio::time::sleep;

use super::adapter::ResponsesUpstream;
use super::run_items::id_of;
use crate::domain::{UpstreamRunId, UpstreamThreadId};
use crate::upstream::error::UpstreamError;
use crate::upstream::port::{Disposal, Items};
use crate::upstream::rate_limiter::RateLimiter;
use crate::upstream::retry::{FIRST_WAIT, next_backoff};
use crate::upstream::retrying_client::{is_gone, is_not_offered};

/// Consecutive lists that still show deleted items, until the server counts as one that does not
/// delete them.
const MAX_STALE_LOOKS: u32 = 4;
/// Pages of items that are counted where none of them can be deleted.
const MAX_COUNTED_PAGES: u32 = 50;

impl ResponsesUpstream {
    /// Deletes a conversation, after its items, because they would outlive it. The items of a
    /// conversation that is already gone cannot be found.
    pub(super) async fn delete_conversation(
        &self,
        conversation: &UpstreamThreadId,
        limiter: &RateLimiter,
        items: &mut Items,
    ) -> Result<Disposal, UpstreamError> {
        let calls = self.retrying(Some(limiter));
        let path = ["conversations", conversation.as_str()];
        let Some(is_known) = calls.is_known(&path).await? else {
            return Ok(Disposal::AlreadyGone);
        };
        match self.delete_all_items(conversation, limiter, items).await {
            Err(error) if !is_gone(&error) => return Err(error),
            _ => {}
        }
        let deleted = calls.delete_once_unlocked(&path).await;
        calls.confirm(&path, deleted, is_known).await
    }

    /// Deletes items until the list is empty, as soon as nothing holds the conversation. Items
    /// that cannot be listed cannot be deleted.
    async fn delete_all_items(
        &self,
        conversation: &UpstreamThreadId,
        limiter: &RateLimiter,
        items: &mut Items,
    ) -> Result<(), UpstreamError> {
        let calls = self.retrying(Some(limiter));
        let list = ["conversations", conversation.as_str(), "items"];
        let mut done = HashSet::new();
        let (mut stale_looks, mut wait, mut is_refused) = (0, FIRST_WAIT, false);
        loop {
            // Always from the start, because a deleted item cannot serve as the cursor.
            let listed = match calls.page::<Value>(&list, "asc", None).await {
                Ok(listed) => listed.data,
                Err(error) if is_not_offered(&error) => return Ok(()),
                Err(error) => return Err(error),
            };
            if listed.is_empty() {
                return Ok(());
            }
            let ids: HashSet<&str> = listed.iter().filter_map(id_of).collect();
            // An item that is no longer listed is gone and is forgotten.
            done.retain(|id: &String| ids.contains(id.as_str()));
            let left: Vec<&str> = listed
                .iter()
                .filter_map(id_of)
                .filter(|id| !done.contains(*id))
                .collect();
            if left.is_empty() {
                stale_looks += 1;
                if stale_looks >= MAX_STALE_LOOKS {
                    if is_refused {
                        return self.count_left(conversation, limiter, items).await;
                    }
                    return Err(UpstreamError::Protocol(
                        "deleted items are still listed".to_owned(),
                    ));
                }
                sleep(wait).await;
                wait = next_backoff(wait);
                continue;
            }
            (stale_looks, wait) = (0, FIRST_WAIT);
            for id in left {
                let item = ["conversations", conversation.as_str(), "items", id];
                match calls.delete_once_unlocked(&item).await {
                    Ok(()) => items.deleted += 1,
                    Err(error @ UpstreamError::ThreadGone) => return Err(error),
                    Err(error) if is_gone(&error) => {}
                    // Either the item is gone, or the server does not support the call. The next
                    // list tells which.
                    Err(UpstreamError::Refused { status: 404, .. }) => is_refused = true,
                    Err(error) if is_not_offered(&error) => {
                        return self.count_left(conversation, limiter, items).await;
                    }
                    Err(error) => return Err(error),
                }
                done.insert(id.to_owned());
            }
        }
    }

    /// Counts the items that the server lists but does not delete.
    async fn count_left(
        &self,
        conversation: &UpstreamThreadId,
        limiter: &RateLimiter,
        items: &mut Items,
    ) -> Result<(), UpstreamError> {
        let list = ["conversations", conversation.as_str(), "items"];
        let mut after: Option<String> = None;
        for _ in 0..MAX_COUNTED_PAGES {
            let found = self
                .retrying(Some(limiter))
                .page::<Value>(&list, "asc", after.as_deref())
                .await?;
            items.left += u64::try_from(found.data.len()).unwrap_or(u64::MAX);
            let next = found.next(|item| id_of(item).unwrap_or_default());
            if next.is_none() || next == after {
                break;
            }
            after = next;
        }
        Ok(())
    }

    /// Deletes the end of a chain, and makes sure that it is gone. The earlier responses of the
    /// chain are deleted separately.
    pub(super) async fn delete_chain(
        &self,
        thread: &UpstreamThreadId,
        limiter: &RateLimiter,
    ) -> Result<Disposal, UpstreamError> {
        let disposal = self
            .delete_response(&UpstreamRunId(thread.0.clone()), limiter)
            .await?;
        if disposal == Disposal::Deleted {
            return self
                .retrying(Some(limiter))
                .confirm(&["responses", thread.as_str()], Ok(()), false)
                .await;
        }
        Ok(disposal)
    }

    /// Deletes a stored response. A response that is still active in the background is ended
    /// first.
    pub(super) async fn delete_response(
        &self,
        id: &UpstreamRunId,
        limiter: &RateLimiter,
    ) -> Result<Disposal, UpstreamError> {
        let calls = self.retrying(Some(limiter));
        let path = ["responses", id.as_str()];
        let mut deleted = calls.delete(&path).await;
        if matches!(
            deleted,
            Err(UpstreamError::Refused {
                status: 400,
                missing: false,
                ..
            } | UpstreamError::Busy { .. })
        ) {
            match self.cancel(id, Some(limiter)).await {
                Err(error) if !is_not_offered(&error) => return Err(error),
                _ => {}
            }
            deleted = calls.delete_once_unlocked(&path).await;
        }
        calls.disposal(&path, deleted).await
    }
}

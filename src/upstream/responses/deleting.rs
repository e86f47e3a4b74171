//! Deleting conversations with their items, and responses.

use std::collections::HashSet;

use serde_json::Value;
use tokio::time::sleep;

use super::part::id_of;
use super::{ResponsesUpstream, is_not_offered};
use crate::domain::{UpstreamRunId, UpstreamThreadId};
use crate::upstream::patience::{FIRST_WAIT, longer};
use crate::upstream::{Pace, UpstreamError};

/// Looks in a row at items that must have been deleted, until the server counts as one that does not delete them.
const MAX_STALE_LOOKS: u32 = 4;

impl ResponsesUpstream {
    /// Deletes a conversation, and its items before it, since they outlive it. `false` if there is none; what it may
    /// have left of items cannot be found then.
    pub(super) async fn delete_conversation(
        &self,
        conversation: &UpstreamThreadId,
        pace: &Pace,
        items: &mut u64,
    ) -> Result<bool, UpstreamError> {
        let calls = self.calls(Some(pace));
        let path = ["conversations", conversation.as_str()];
        // Once this call had an answer, a later 404 says something of the conversation and not of the endpoint.
        match calls.get(&path).await {
            Ok(_) => {}
            Err(UpstreamError::ThreadGone) => return Ok(false),
            Err(error) => return Err(error),
        }
        match self.delete_all_items(conversation, pace, items).await {
            Ok(()) | Err(UpstreamError::ThreadGone) => {}
            Err(error) => return Err(error),
        }
        let deleted = calls.delete_once_unlocked(&path).await;
        calls.confirm(&path, deleted).await.map(|()| true)
    }

    /// Deletes items until none is listed, as soon as nothing holds the conversation. Where they cannot be listed, none
    /// can be deleted.
    async fn delete_all_items(
        &self,
        conversation: &UpstreamThreadId,
        pace: &Pace,
        count: &mut u64,
    ) -> Result<(), UpstreamError> {
        let calls = self.calls(Some(pace));
        let list = ["conversations", conversation.as_str(), "items"];
        let mut done = HashSet::new();
        let (mut stale_looks, mut wait, mut refusal) = (0, FIRST_WAIT, None);
        loop {
            // Always from the start: what was deleted is no cursor.
            let listed = match calls.page::<Value>(&list, "asc", None).await {
                Ok(listed) => listed.data,
                Err(error) if is_not_offered(&error) => return Ok(()),
                Err(error) => return Err(error),
            };
            if listed.is_empty() {
                return Ok(());
            }
            let ids: HashSet<&str> = listed.iter().filter_map(id_of).collect();
            // What is not listed any more is gone, and need not be remembered.
            done.retain(|id: &String| ids.contains(id.as_str()));
            let left: Vec<&str> = listed.iter().filter_map(id_of).filter(|id| !done.contains(*id)).collect();
            if left.is_empty() {
                stale_looks += 1;
                if stale_looks >= MAX_STALE_LOOKS {
                    let still_there = || UpstreamError::Protocol("deleted items are still listed".to_owned());
                    return Err(refusal.unwrap_or_else(still_there));
                }
                sleep(wait).await;
                wait = longer(wait);
                continue;
            }
            (stale_looks, wait) = (0, FIRST_WAIT);
            for id in left {
                let item = ["conversations", conversation.as_str(), "items", id];
                match calls.delete_once_unlocked(&item).await {
                    Ok(()) => *count += 1,
                    // There is no such item any more, or no such call: the next look tells which.
                    Err(error @ UpstreamError::Refused { status: 404, .. }) => refusal = Some(error),
                    Err(error) => return Err(error),
                }
                done.insert(id.to_owned());
            }
        }
    }

    /// Deletes the end of a chain, and makes sure that it is gone. What stands before it are responses of their own.
    pub(super) async fn delete_chain(
        &self,
        thread: &UpstreamThreadId,
        pace: &Pace,
    ) -> Result<bool, UpstreamError> {
        let deleted = self.delete_response(&UpstreamRunId(thread.0.clone()), pace).await?;
        if deleted {
            self.calls(Some(pace)).confirm(&["responses", thread.as_str()], Ok(())).await?;
        }
        Ok(deleted)
    }

    /// Deletes a stored response; one that still works in the background is ended before. `false` if there is none.
    pub(super) async fn delete_response(
        &self,
        id: &UpstreamRunId,
        pace: &Pace,
    ) -> Result<bool, UpstreamError> {
        let calls = self.calls(Some(pace));
        let path = ["responses", id.as_str()];
        let mut deleted = calls.delete(&path).await;
        if matches!(deleted, Err(UpstreamError::Refused { status: 400, .. } | UpstreamError::Busy { .. })) {
            self.cancel(id, Some(pace)).await?;
            deleted = calls.delete_once_unlocked(&path).await;
        }
        match deleted {
            Ok(()) => Ok(true),
            Err(UpstreamError::ThreadGone) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

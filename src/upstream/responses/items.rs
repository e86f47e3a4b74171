//! Reads, adds and deletes the items of a conversation.

use http::Method;
use serde_json::{Value, json};

use super::adapter::ResponsesUpstream;
use super::run_items::id_of;
use super::wire::closing_item;
use crate::domain::{ToolCall, UpstreamThreadId};
use crate::upstream::error::UpstreamError;
use crate::upstream::retry::{retry_while_busy, retry_while_refused};
use crate::upstream::retrying_client::is_gone;
use crate::upstream::wire::List;

/// Items of a full page.
const PAGE: usize = 100;
/// Items that one request to a conversation may add.
pub(super) const ITEMS_PER_REQUEST: usize = 20;

/// The newest items of a conversation, oldest first.
#[derive(Debug, Default)]
pub(super) struct Newest {
    pub(super) items: Vec<Value>,
    /// The index of the first item after the anchor; `None` if the anchor was not found.
    pub(super) since: Option<usize>,
}

impl Newest {
    /// Returns the items after the anchor.
    pub(super) fn since_anchor(&self) -> Option<&[Value]> {
        self.since.map(|start| &self.items[start..])
    }
}

impl ResponsesUpstream {
    /// Reads pages, newest first, until the item `anchor` or the conversation's beginning. All
    /// pages together get the size limit of one answer.
    pub(super) async fn newest(
        &self,
        conversation: &UpstreamThreadId,
        anchor: Option<&str>,
        max_pages: usize,
    ) -> Result<Newest, UpstreamError> {
        let path = ["conversations", conversation.as_str(), "items"];
        let mut newest_first: Vec<Value> = Vec::new();
        let mut budget = self.client.size_budget();
        let mut met = None;
        let mut is_whole = false;
        for _ in 0..max_pages {
            let after = newest_first.last().and_then(id_of).map(str::to_owned);
            let newest = [("order", "desc")];
            let page = self
                .retrying(None)
                .page_within::<Value>(&path, &newest, after.as_deref(), &mut budget)
                .await?;
            let List { data, has_more } = page;
            let is_last = data.is_empty() || !has_more.unwrap_or(data.len() >= PAGE);
            let before = newest_first.len();
            newest_first.extend(data);
            met = newest_first[before..]
                .iter()
                .position(|item| anchor.is_some() && id_of(item) == anchor)
                .map(|at| before + at);
            is_whole = is_last;
            if is_last || met.is_some() {
                break;
            }
        }
        let count = newest_first.len();
        let since = met
            .map(|at| count - at)
            .or((anchor.is_none() && is_whole).then_some(0));
        newest_first.reverse();
        Ok(Newest {
            items: newest_first,
            since,
        })
    }

    /// Adds the answer that closes each of the calls.
    pub(super) async fn close(
        &self,
        conversation: &UpstreamThreadId,
        calls: &[ToolCall],
    ) -> Result<(), UpstreamError> {
        let outputs: Vec<Value> = calls.iter().map(closing_item).collect();
        self.add_items(conversation, &outputs).await
    }

    /// Adds items as soon as nothing holds the conversation. Tries again only after a refusal:
    /// after any other failure the items may be there.
    pub(super) async fn add_items(
        &self,
        conversation: &UpstreamThreadId,
        items: &[Value],
    ) -> Result<(), UpstreamError> {
        let path = ["conversations", conversation.as_str(), "items"];
        for some in items.chunks(ITEMS_PER_REQUEST) {
            let body = json!({"items": some});
            retry_while_refused(|| self.client.make::<Value>(&path, &body)).await?;
        }
        Ok(())
    }

    /// Deletes items in this order, as soon as nothing holds the conversation. A missing item
    /// counts as deleted.
    ///
    /// # Errors
    /// [`UpstreamError::Refused`] if the server does not offer it, among others.
    pub(super) async fn delete_items(
        &self,
        conversation: &UpstreamThreadId,
        ids: &[String],
    ) -> Result<(), UpstreamError> {
        for id in ids {
            let path = ["conversations", conversation.as_str(), "items", id];
            match retry_while_busy(|| self.client.json::<Value>(Method::DELETE, &path, &[])).await {
                Ok(_) => {}
                // A missing conversation is no error here: the next call to it finds out.
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

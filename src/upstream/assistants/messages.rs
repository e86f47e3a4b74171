//! The messages of a thread: reading those of a run, and removing them.

use http::Method;
use serde_json::Value;

use super::adapter::AssistantsUpstream;
use super::wire::MessageObject;
use crate::domain::{ContentPart, UnsettledRun, UpstreamRunId, UpstreamThreadId, append_messages};
use crate::upstream::error::UpstreamError;
use crate::upstream::retry::retry_while_busy;
use crate::upstream::retrying_client::is_gone;
use crate::upstream::tags::RUN_TAG;

/// Pages that are read at most. A run leaves few messages, and few follow it.
const MAX_PAGES: usize = 10;

/// The reply of a run.
#[derive(Debug, Default)]
pub(super) struct Reply {
    pub(super) content: Vec<ContentPart>,
    /// The types of all parts.
    pub(super) kinds: Vec<String>,
    /// The id of the last message.
    pub(super) message_id: Option<String>,
}

impl AssistantsUpstream {
    /// Returns the part of a run's reply that the thread holds, unfinished messages included.
    pub(super) async fn reply(
        &self,
        thread: &UpstreamThreadId,
        run: &UpstreamRunId,
    ) -> Result<Reply, UpstreamError> {
        let only_its_own = [("run_id", run.as_str()), ("order", "asc")];
        let messages = self
            .messages(thread, &only_its_own, MAX_PAGES, |_| false)
            .await?;
        let mut reply = Reply::default();
        for message in messages {
            // Not every server supports the parameter `run_id`.
            let is_another_s = message
                .run_id
                .as_deref()
                .is_some_and(|id| id != run.as_str());
            if message.is_reply() && !is_another_s {
                reply.message_id = Some(message.id.clone());
                reply.kinds.extend(message.kinds().map(str::to_owned));
                append_messages(&mut reply.content, message.into_parts());
            }
        }
        Ok(reply)
    }

    /// Returns true if one of the newest messages carries the tag of the run.
    pub(super) async fn was_said(
        &self,
        thread: &UpstreamThreadId,
        sent: &UnsettledRun,
    ) -> Result<bool, UpstreamError> {
        let tag = sent.run.to_string();
        let newest = self
            .messages(thread, &[("order", "desc")], 1, |_| false)
            .await?;
        Ok(newest
            .iter()
            .any(|message| message.tag(RUN_TAG) == Some(&tag)))
    }

    /// Deletes the run's messages, which carry the gateway's tag, and those of its reply, which
    /// carry the run's id.
    pub(super) async fn remove_from(
        &self,
        thread: &UpstreamThreadId,
        unsettled_run: &UnsettledRun,
    ) -> Result<(), UpstreamError> {
        let tag = unsettled_run.run.to_string();
        let run = match &unsettled_run.upstream_run {
            Some(run) => Some(run.0.clone()),
            None => self
                .find(thread, unsettled_run.run)
                .await?
                .map(|run| run.id),
        };
        let anchor = unsettled_run.baseline.anchor.as_deref();
        let newest_first = [("order", "desc")];
        let messages = self
            .messages(thread, &newest_first, MAX_PAGES, |it| {
                Some(it.id.as_str()) == anchor
            })
            .await?;
        let is_ours = |message: &MessageObject| {
            message.tag(RUN_TAG) == Some(&tag) || (run.is_some() && message.run_id == run)
        };
        for message in messages.iter().filter(|message| is_ours(message)) {
            let path = ["threads", thread.as_str(), "messages", message.id.as_str()];
            let delete = || self.client.json::<Value>(Method::DELETE, &path, &[]);
            match retry_while_busy(delete).await {
                Err(error @ UpstreamError::ThreadGone) => return Err(error),
                Err(error) if !is_gone(&error) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Reads pages until a message for which `last` is true, which is left out, or until the list
    /// ends. All pages together get the size limit of one answer.
    async fn messages(
        &self,
        thread: &UpstreamThreadId,
        query: &[(&str, &str)],
        max_pages: usize,
        last: impl Fn(&MessageObject) -> bool,
    ) -> Result<Vec<MessageObject>, UpstreamError> {
        let path = ["threads", thread.as_str(), "messages"];
        let mut all: Vec<MessageObject> = Vec::new();
        let mut budget = self.client.size_budget();
        for _ in 0..max_pages {
            let after = all.last().map(|message| message.id.clone());
            let page = self
                .retrying(None)
                .page_within::<MessageObject>(&path, query, after.as_deref(), &mut budget)
                .await?;
            let is_last_page = page.has_more != Some(true) || page.data.is_empty();
            for message in page.data {
                if last(&message) {
                    return Ok(all);
                }
                all.push(message);
            }
            if is_last_page {
                break;
            }
        }
        Ok(all)
    }
}

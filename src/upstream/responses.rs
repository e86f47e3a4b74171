//! The adapter for Conversations + Responses, and for servers that have responses alone: there a thread is a chain,
//! and its id that of the last response which ended well.

mod deleting;
mod history;
mod items;
mod mending;
mod part;
mod recovery;
mod request;
mod settling;
mod source;
mod turn;
mod wire;

use std::time::Duration;

use async_trait::async_trait;
use http::Method;
use serde_json::{Value, json};

use super::calls::{Calls, is_missing, is_not_offered};
use super::classify::Refusal;
use super::client::{SseStream, UpstreamClient};
use super::finding::find;
use super::patience::a_moment;
use super::relay::{public, relay, unsent};
use super::tags::thread_tags;
use super::wire::Created;
use super::{
    AnswerTools, Capabilities, Disposal, EventStream, HistoryPage, Items, Ownership, Pace, Recovered,
    Settled, StartRun, Upstream, UpstreamError,
};
use crate::config::UpstreamConfig;
use crate::domain::{Leftover, Message, ThreadId, UpstreamRunId, UpstreamThreadId};
use mending::Attempt;
use request::{Terms, history_items, output_items};
use source::resuming;
use turn::Turn;
use wire::custom_calls;

/// Items that one request to a conversation may add.
const ITEMS_PER_REQUEST: usize = 20;

/// What helps where the server has no conversations.
pub(super) const NO_CONVERSATIONS: &str =
    "set `conversations = false` for this upstream, so that each thread is a chain of responses";

/// An upstream that speaks Responses.
#[derive(Clone, Debug)]
pub struct ResponsesUpstream {
    client: UpstreamClient,
    /// The server has conversations; else each thread is a chain of responses.
    conversations: bool,
    background: bool,
    lock_window: Duration,
}

impl ResponsesUpstream {
    pub fn new(client: UpstreamClient, config: &UpstreamConfig) -> Self {
        Self {
            client,
            conversations: config.conversations,
            background: config.background,
            lock_window: config.lock_window,
        }
    }
}

#[async_trait]
impl Upstream for ResponsesUpstream {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            lock_window: self.lock_window,
            has_threads: self.conversations,
            stores_runs: true,
            goes_on_unread: self.background,
        }
    }

    async fn create_thread(
        &self,
        owner: &Ownership,
        history: &[Message],
    ) -> Result<Option<UpstreamThreadId>, UpstreamError> {
        if !self.conversations {
            return Ok(None);
        }
        let (first, rest) = history.split_at(history.len().min(ITEMS_PER_REQUEST));
        let mut body = json!({"metadata": thread_tags(owner)});
        let first = history_items(first);
        if !first.is_empty() {
            body["items"] = first.into();
        }
        let made = self.client.make::<Created>(&["conversations"], &body).await;
        let conversation =
            made.map_err(|error| self.client.needs("/conversations", NO_CONVERSATIONS, error))?;
        drop(body);
        let conversation = conversation.into_thread()?;
        let Err(error) = self.add_history(&conversation, rest).await else { return Ok(Some(conversation)) };
        // One that holds but a part of the history is of no use.
        match self.delete_thread(&conversation, &Pace::UNBOUND, &mut Items::default()).await {
            Ok(Disposal::Deleted | Disposal::AlreadyGone) => Err(error),
            Ok(Disposal::NotSupported) | Err(_) => {
                Err(UpstreamError::Protocol("a conversation could not be filled".to_owned()))
            }
        }
    }

    async fn start(&self, request: StartRun<'_>) -> Result<EventStream, UpstreamError> {
        if self.conversations && request.thread.is_none() {
            return Err(UpstreamError::Protocol("a run was to start without a conversation".to_owned()));
        }
        let (input, terms) = (request::input(&request), Terms::of_start(&request));
        Attempt::new(self, request.thread, input, self.body(request.thread, &terms)).events().await
    }

    /// The outputs of custom tools have a form of their own, and nothing that the caller knows tells these calls apart:
    /// where the assistant has such tools, the response that made the calls is asked, or the conversation.
    async fn answer_tools(&self, request: AnswerTools<'_>) -> Result<EventStream, UpstreamError> {
        let asked = request.upstream_run.map(|id| UpstreamThreadId(id.0.clone()));
        let thread = if self.conversations { request.thread } else { asked.as_ref() };
        if thread.is_none() {
            return Err(UpstreamError::Protocol("outputs were to be sent to no response".to_owned()));
        }
        let has_custom_tools = request.assistant.tools.iter().any(|tool| tool["type"] == "custom");
        let custom =
            if has_custom_tools { self.custom_calls(&request).await.map_err(unsent)? } else { Vec::new() };
        let mut body = self.body(thread, &Terms::of_answer(&request));
        body["input"] = output_items(request.outputs, &custom).into();
        self.read(self.open(&body).await?).await
    }

    async fn recover(&self, sent: &Leftover, failure: &UpstreamError) -> Result<Recovered, UpstreamError> {
        self.trace(sent, failure).await
    }

    /// A conversation does not tell what holds it, so there is nothing to end: only time helps.
    async fn clear(
        &self,
        _: &UpstreamThreadId,
        _: Option<&UpstreamRunId>,
        _: bool,
    ) -> Result<(), UpstreamError> {
        a_moment().await;
        Ok(())
    }

    async fn settle(&self, leftover: &Leftover) -> Result<Settled, UpstreamError> {
        match self.settle_what_is_there(leftover).await {
            Err(UpstreamError::ThreadGone) => Ok(Settled::default()),
            other => other,
        }
    }

    async fn remove(&self, leftover: &Leftover) -> Result<(), UpstreamError> {
        let Some(conversation) = leftover.thread.as_ref().filter(|_| self.conversations) else {
            return Ok(());
        };
        match self.remove_from(conversation, leftover).await {
            Err(UpstreamError::ThreadGone) => Ok(()),
            other => other,
        }
    }

    async fn delete_thread(
        &self,
        thread: &UpstreamThreadId,
        pace: &Pace,
        items: &mut Items,
    ) -> Result<Disposal, UpstreamError> {
        if self.conversations {
            self.delete_conversation(thread, pace, items).await
        } else {
            self.delete_chain(thread, pace).await
        }
    }

    async fn delete_run(&self, run: &UpstreamRunId, pace: &Pace) -> Result<Disposal, UpstreamError> {
        self.delete_response(run, pace).await
    }

    async fn history(
        &self,
        thread: &UpstreamThreadId,
        after: Option<&str>,
        pace: &Pace,
    ) -> Result<Option<HistoryPage>, UpstreamError> {
        if !self.conversations {
            return Ok(None);
        }
        self.history_page(thread, after, pace).await
    }

    async fn find_threads(
        &self,
        of: ThreadId,
        pace: &Pace,
    ) -> Result<Option<Vec<UpstreamThreadId>>, UpstreamError> {
        if !self.conversations {
            return Ok(Some(Vec::new()));
        }
        find(self.calls(Some(pace)), "conversations", of).await
    }
}

impl ResponsesUpstream {
    /// One request at a time, so that no more of it is in memory a second time.
    async fn add_history(
        &self,
        conversation: &UpstreamThreadId,
        history: &[Message],
    ) -> Result<(), UpstreamError> {
        for some in history.chunks(ITEMS_PER_REQUEST) {
            self.add_items(conversation, &history_items(some)).await?;
        }
        Ok(())
    }

    fn calls<'a>(&'a self, pace: Option<&'a Pace>) -> Calls<'a> {
        Calls { client: &self.client, pace }
    }

    /// Sends the request for a response. In the background its stream survives breaks.
    async fn open(&self, body: &Value) -> Result<SseStream, Refusal> {
        let events = self.client.events(Method::POST, &["responses"], &[], Some(body)).await?;
        Ok(if self.background { resuming(self.client.clone(), events) } else { events })
    }

    /// What the events of a response mean.
    async fn read(&self, events: SseStream) -> Result<EventStream, UpstreamError> {
        let turn = Turn::new(!self.conversations);
        Ok(public(relay(events, turn, self.client.max_bytes()).await?))
    }

    /// Which of the calls that are to be answered are those of custom tools.
    async fn custom_calls(&self, request: &AnswerTools<'_>) -> Result<Vec<String>, UpstreamError> {
        let asking = match request.upstream_run {
            Some(id) => self.response(id, None).await?,
            None => None,
        };
        if let Some(asking) = asking {
            return Ok(custom_calls(asking["output"].as_array().map(Vec::as_slice).unwrap_or_default()));
        }
        let Some(conversation) = request.thread.filter(|_| self.conversations) else { return Ok(Vec::new()) };
        match self.newest(conversation, None, 1).await {
            Ok(newest) => Ok(custom_calls(&newest.items)),
            Err(error) if is_not_offered(&error) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// The response as it is stored; `None` if it is not, which is so for one that is not in the background until it
    /// has ended well.
    async fn response(
        &self,
        id: &UpstreamRunId,
        pace: Option<&Pace>,
    ) -> Result<Option<Value>, UpstreamError> {
        match self.calls(pace).get(&["responses", id.as_str()]).await {
            Ok(response) => Ok(Some(response)),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

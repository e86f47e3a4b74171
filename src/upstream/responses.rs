//! The adapter for Conversations + Responses, and for servers that have only responses. There a
//! thread is a chain, and its id is that of the last response that ended well.

mod adapter;
mod cleanup;
mod deleting;
mod history;
mod items;
mod recovery;
mod repair;
mod request;
mod run_items;
mod stream;
mod stream_resume;
mod wire;

use std::iter::Peekable;
use std::sync::atomic::Ordering;

use async_trait::async_trait;
use serde_json::{Value, json};

use crate::domain::{Message, ThreadId, UnsettledRun, UpstreamRunId, UpstreamThreadId};
use crate::upstream::error::{UpstreamError, unless_gone};
use crate::upstream::history::history_page;
use crate::upstream::port::{
    AnswerTools, Capabilities, Disposal, EventStream, HistoryPage, Items, Ownership, Recovered,
    Settled, StartRun, Upstream, without_history,
};
use crate::upstream::rate_limiter::RateLimiter;
use crate::upstream::tags::thread_tags;
use crate::upstream::thread_lookup::find;
use crate::upstream::wire::Created;
pub use adapter::ResponsesUpstream;

use history::entry;
use items::ITEMS_PER_REQUEST;
use repair::RepairingRequest;
use request::{Terms, history_items};
use run_items::id_of;
use wire::{answer_item, is_call_of_history};

/// The remedy where the server has no conversations.
pub(super) const NO_CONVERSATIONS: &str =
    "set `conversations = false` for this upstream, so that each thread is a chain of responses";

#[async_trait]
impl Upstream for ResponsesUpstream {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            lock_window: self.lock_window,
            has_threads: self.conversations,
            stores_runs: true,
            goes_on_unread: self.background,
            takes_output_parts: true,
            runs_without_input: false,
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
        let mut items = history_items(history).peekable();
        let mut body = json!({"metadata": thread_tags(owner)});
        let first = some_of(&mut items);
        if !first.is_empty() {
            body["items"] = first.into();
        }
        let made = self.client.make::<Created>(&["conversations"], &body).await;
        let conversation =
            made.map_err(|error| self.client.needs("/conversations", NO_CONVERSATIONS, error))?;
        drop(body);
        let conversation = conversation.into_thread()?;
        let Err(error) = self.add_history(&conversation, items).await else {
            return Ok(Some(conversation));
        };
        let deleted = self
            .delete_thread(&conversation, &RateLimiter::UNBOUND, &mut Items::default())
            .await;
        Err(without_history(error, &deleted))
    }

    async fn start(&self, request: StartRun<'_>) -> Result<EventStream, UpstreamError> {
        if self.conversations && request.thread.is_none() {
            return Err(UpstreamError::Protocol(
                "a run cannot start without a conversation".to_owned(),
            ));
        }
        if self.previous(request.thread).is_some() && self.ignores_previous.load(Ordering::Relaxed)
        {
            return Err(UpstreamError::ThreadGone);
        }
        let (input, terms) = (request::input(&request), Terms::of_start(&request));
        RepairingRequest::new(
            self,
            request.thread,
            input,
            self.body(request.thread, &terms),
        )
        .events()
        .await
    }

    async fn answer_tools(&self, request: AnswerTools<'_>) -> Result<EventStream, UpstreamError> {
        let asked = request
            .upstream_run
            .map(|id| UpstreamThreadId(id.0.clone()));
        let thread = if self.conversations {
            request.thread
        } else {
            asked.as_ref()
        };
        if thread.is_none() {
            return Err(UpstreamError::Protocol(
                "the outputs name no response that waits for them".to_owned(),
            ));
        }
        let mut body = self.body(thread, &Terms::of_answer(&request));
        body["input"] = request.outputs.iter().map(answer_item).collect();
        self.read(self.open(&body).await?, self.previous(thread))
            .await
    }

    async fn recover(
        &self,
        sent: &UnsettledRun,
        failure: &UpstreamError,
    ) -> Result<Recovered, UpstreamError> {
        self.trace(sent, failure).await
    }

    async fn settle(&self, unsettled_run: &UnsettledRun) -> Result<Settled, UpstreamError> {
        unless_gone(
            self.settle_what_is_there(unsettled_run).await,
            Settled::default(),
        )
    }

    async fn remove(&self, unsettled_run: &UnsettledRun) -> Result<(), UpstreamError> {
        let Some(conversation) = unsettled_run.thread.as_ref().filter(|_| self.conversations)
        else {
            return Ok(());
        };
        unless_gone(self.remove_from(conversation, unsettled_run).await, ())
    }

    async fn delete_thread(
        &self,
        thread: &UpstreamThreadId,
        limiter: &RateLimiter,
        items: &mut Items,
    ) -> Result<Disposal, UpstreamError> {
        if self.conversations {
            self.delete_conversation(thread, limiter, items).await
        } else {
            self.delete_chain(thread, limiter).await
        }
    }

    async fn delete_run(
        &self,
        run: &UpstreamRunId,
        limiter: &RateLimiter,
    ) -> Result<Disposal, UpstreamError> {
        self.delete_response(run, limiter).await
    }

    async fn history(
        &self,
        thread: &UpstreamThreadId,
        after: Option<&str>,
        limiter: &RateLimiter,
    ) -> Result<Option<HistoryPage>, UpstreamError> {
        if !self.conversations {
            return Ok(None);
        }
        let path = ["conversations", thread.as_str(), "items"];
        history_page(
            self.retrying(Some(limiter)),
            &path,
            after,
            |item| id_of(item).unwrap_or_default(),
            |item| entry(&item),
        )
        .await
    }

    async fn find_threads(
        &self,
        of: ThreadId,
        limiter: &RateLimiter,
    ) -> Result<Option<Vec<UpstreamThreadId>>, UpstreamError> {
        if !self.conversations {
            return Ok(Some(Vec::new()));
        }
        find(self.retrying(Some(limiter)), "conversations", of).await
    }
}

impl ResponsesUpstream {
    /// Builds and sends one request at a time, so that only a small part of the history is in
    /// memory twice.
    async fn add_history(
        &self,
        conversation: &UpstreamThreadId,
        mut items: Peekable<impl Iterator<Item = Value> + Send>,
    ) -> Result<(), UpstreamError> {
        loop {
            let some = some_of(&mut items);
            if some.is_empty() {
                return Ok(());
            }
            self.add_items(conversation, &some).await?;
        }
    }
}

/// Takes as many items as one request may add. A call stays together with its output.
fn some_of(items: &mut Peekable<impl Iterator<Item = Value>>) -> Vec<Value> {
    let mut some = Vec::new();
    while some.len() < ITEMS_PER_REQUEST {
        let is_last = some.len() + 1 == ITEMS_PER_REQUEST;
        let Some(item) = items.next_if(|next| !(is_last && is_call_of_history(next))) else {
            break;
        };
        some.push(item);
    }
    some
}

//! The adapter for Conversations + Responses, and for servers that have responses alone: there a thread is a chain,
//! and its id that of the last response which ended well.

mod turn;
mod wire;

use std::collections::BTreeSet;

use async_trait::async_trait;
use http::Method;
use serde_json::{Value, json};

use super::classify::OPEN_CALL;
use super::client::{Answer, UpstreamClient};
use super::patience::{FIRST_WAIT, longer, patiently};
use super::relay::relay;
use super::tags::{parameters, run_tags, thread_tags};
use super::wire::Created;
use super::{EventStream, Leftover, Ownership, StartRun, Upstream, UpstreamError};
use crate::config::UpstreamKind;
use crate::domain::{Message, ToolCall, UpstreamThreadId};
use turn::Turn;
use wire::{ItemList, OpenCall, answered_calls, history_item, message_item, open_calls};

/// Items that one request may add.
const ITEMS_PER_REQUEST: usize = 20;
/// The newest items, in which open calls are looked for: the longest page that a server must give.
const ITEMS_TO_SEARCH: &str = "100";
/// What stands for the output of a function that nobody called.
const NO_OUTPUT: &str = r#"{"error":"the call was not answered"}"#;

/// An upstream that speaks Responses.
#[derive(Clone, Debug)]
pub struct ResponsesUpstream {
    client: UpstreamClient,
    conversations: bool,
}

impl ResponsesUpstream {
    /// `conversations`: the server has them; else each thread is a chain of responses.
    pub fn new(client: UpstreamClient, conversations: bool) -> Self {
        Self { client, conversations }
    }
}

#[async_trait]
impl Upstream for ResponsesUpstream {
    async fn create_thread(
        &self,
        owner: &Ownership,
        history: &[Message],
    ) -> Result<Option<UpstreamThreadId>, UpstreamError> {
        if !self.conversations {
            return Ok(None);
        }
        let items: Vec<Value> = history.iter().map(history_item).collect();
        let (first, rest) = items.split_at(items.len().min(ITEMS_PER_REQUEST));
        let mut body = json!({"metadata": thread_tags(owner)});
        if !first.is_empty() {
            body["items"] = first.into();
        }
        let conversation: Created =
            self.client.json(Method::POST, &["conversations"], &[], Some(&body)).await?.value;
        let conversation = conversation.into_thread()?;
        for some in rest.chunks(ITEMS_PER_REQUEST) {
            let path = ["conversations", conversation.as_str(), "items"];
            self.add_items(&path, &json!({"items": some})).await?;
        }
        Ok(Some(conversation))
    }

    async fn start(&self, request: StartRun<'_>) -> Result<EventStream, UpstreamError> {
        if self.conversations && request.thread.is_none() {
            return Err(UpstreamError::Protocol("a run was to start without a conversation".to_owned()));
        }
        let body = response_body(&request, self.conversations);
        let started = self.respond(&body).await;
        let Some(conversation) = request.thread.filter(|_| self.conversations) else { return started };
        match started {
            // A turn that broke off has left a call open, perhaps after it was settled. Nothing of this one is stored,
            // so once the call is closed it can be sent again.
            Err(UpstreamError::Refused { code: Some(code), .. }) if code == OPEN_CALL => {
                tracing::warn!("closing the function calls that an earlier turn left without output");
                self.close_calls(conversation, &[]).await?;
                self.respond(&body).await
            }
            started => started,
        }
    }

    /// There is nothing to cancel, for a response stops with its connection. What can be left are open calls: in a
    /// conversation they are closed, in a chain the response that made them is no part of the thread.
    async fn settle(&self, leftover: &Leftover) -> Result<(), UpstreamError> {
        let Some(conversation) = leftover.thread.as_ref().filter(|_| self.conversations) else {
            return Ok(());
        };
        match self.close_calls(conversation, &leftover.open_calls).await {
            Err(UpstreamError::ThreadGone) => Ok(()),
            other => other,
        }
    }
}

impl ResponsesUpstream {
    async fn respond(&self, body: &Value) -> Result<EventStream, UpstreamError> {
        let events = self.client.events(&["responses"], body).await?;
        relay(events, Turn::new(!self.conversations)).await
    }

    /// Gives an output to each call of the conversation that has none, and to those `known` to have none. Calls that
    /// have one are left alone, so that settling twice does not answer twice.
    async fn close_calls(
        &self,
        conversation: &UpstreamThreadId,
        known: &[ToolCall],
    ) -> Result<(), UpstreamError> {
        let path = ["conversations", conversation.as_str(), "items"];
        let query = [("limit", ITEMS_TO_SEARCH), ("order", "desc")];
        let answer: Result<Answer<ItemList>, _> =
            patiently(|| self.client.json(Method::GET, &path, &query, None)).await;
        let items = match answer {
            Ok(answer) => answer.value.data,
            // A server that cannot list leaves us with what we know.
            Err(UpstreamError::Refused { status: 404 | 405 | 501, .. }) if !known.is_empty() => Vec::new(),
            Err(error) => return Err(error),
        };
        let mut open = open_calls(&items);
        open.reverse();
        let listed: BTreeSet<&str> =
            open.iter().map(|open| open.call.id.as_str()).chain(answered_calls(&items)).collect();
        let unlisted: Vec<OpenCall> = known
            .iter()
            .filter(|call| !listed.contains(call.id.as_str()))
            .map(|call| OpenCall { call: call.clone(), custom: false })
            .collect();
        open.extend(unlisted);
        for some in open.chunks(ITEMS_PER_REQUEST) {
            let outputs: Vec<Value> = some.iter().map(|call| call.output(NO_OUTPUT)).collect();
            self.add_items(&path, &json!({"items": outputs})).await?;
        }
        Ok(())
    }

    /// Adds items as soon as nothing holds the conversation. Only a refusal is followed by another try: after any
    /// other failure the items may be there.
    async fn add_items(&self, path: &[&str], body: &Value) -> Result<(), UpstreamError> {
        let mut wait = FIRST_WAIT;
        loop {
            match self.client.json::<Value>(Method::POST, path, &[], Some(body)).await {
                Ok(_) => return Ok(()),
                Err(
                    UpstreamError::Busy { .. }
                    | UpstreamError::Connect
                    | UpstreamError::RateLimited { quota: false, .. },
                ) => {}
                Err(error) => return Err(error),
            }
            tokio::time::sleep(wait).await;
            wait = longer(wait);
        }
    }
}

/// The request that appends the input and starts the response.
fn response_body(request: &StartRun<'_>, conversations: bool) -> Value {
    let assistant = request.assistant;
    let mut body = parameters(assistant, UpstreamKind::Responses);
    let mut set = |name: &str, value: Value| body.insert(name.to_owned(), value);
    if let Some(model) = &assistant.model {
        set("model", model.as_str().into());
    }
    // The server keeps neither instructions nor tools from one response to the next.
    if let Some(instructions) = &assistant.instructions {
        set("instructions", instructions.as_str().into());
    }
    if !assistant.tools.is_empty() {
        set("tools", assistant.tools.clone().into());
    }
    if let Some(thread) = request.thread {
        let name = if conversations { "conversation" } else { "previous_response_id" };
        set(name, thread.as_str().into());
    }
    let history = if request.thread.is_none() { request.history } else { &[] };
    let input = request.input.iter().map(|message| message_item(&message.content));
    set("input", history.iter().map(history_item).chain(input).collect());
    let mut metadata = run_tags(request.run, request.metadata);
    if !conversations {
        metadata.extend(thread_tags(request.owner));
    }
    set("metadata", metadata.into());
    set("store", true.into());
    set("stream", true.into());
    set("stream_options", json!({"include_obfuscation": false}));
    Value::Object(body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::AssistantConfig;
    use crate::domain::{ContentPart, MessageId, Metadata, RunId};
    use crate::store::InputMessage;
    use crate::upstream::tags::an_owner;

    #[test]
    fn a_response_is_started_with_what_the_gateway_owns_and_what_is_configured() {
        let run = RunId::new();
        let owner = an_owner();
        let thread = UpstreamThreadId("conv_1".to_owned());
        let mut assistant = AssistantConfig { model: Some("m".to_owned()), ..AssistantConfig::default() };
        let text = |text: &str| InputMessage {
            id: MessageId::new(),
            content: vec![ContentPart::Text { text: text.to_owned() }],
        };
        let input = [text("one"), text("two")];
        let metadata = Metadata::default();
        let body = |assistant: &AssistantConfig, thread: Option<&UpstreamThreadId>, conversations: bool| {
            response_body(
                &StartRun {
                    run,
                    thread,
                    owner: &owner,
                    history: &[],
                    assistant,
                    input: &input,
                    metadata: &metadata,
                },
                conversations,
            )
        };
        let first = json!({
            "model": "m",
            "input": [
                {"type": "message", "role": "user", "content": "one"},
                {"type": "message", "role": "user", "content": "two"},
            ],
            "metadata": {"threadkeeper_run": run.to_string()},
            "store": true,
            "stream": true,
            "stream_options": {"include_obfuscation": false},
        });
        // A chain has no thread upstream, so each response says whose it is.
        let mut next = first.clone();
        let tags = next["metadata"].as_object_mut().unwrap();
        tags.extend(thread_tags(&owner));
        assert_eq!(tags.len() + 10, 16, "with the most that a caller may add");
        assert_eq!(body(&assistant, None, false), next);
        next["previous_response_id"] = "conv_1".into();
        assert_eq!(body(&assistant, Some(&thread), false), next);

        assistant.instructions = Some("be brief".to_owned());
        assistant.tools = vec![json!({"type": "web_search"})];
        let parameters = json!({
            "temperature": 0.5, "top_p": null, "stream": false, "store": false, "background": true, "input": "x",
            "conversation": "conv_9", "previous_response_id": "resp_9",
        });
        assistant.parameters = parameters.as_object().unwrap().clone();
        let mut most = first;
        most["conversation"] = "conv_1".into();
        most["instructions"] = "be brief".into();
        most["tools"] = json!([{"type": "web_search"}]);
        most["temperature"] = 0.5.into();
        assert_eq!(body(&assistant, Some(&thread), true), most);
    }
}

//! The adapter for Assistants v2: threads, messages, runs.

mod turn;
mod wire;

use std::time::Duration;

use async_trait::async_trait;
use http::Method;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::client::{Answer, UpstreamClient};
use super::patience::{FIRST_WAIT, LONGEST_WAIT, longer, patiently};
use super::relay::relay;
use super::tags::{RUN_TAG, message_tags, parameters, run_tags, thread_tags};
use super::wire::Created;
use super::{EventStream, Leftover, Ownership, StartRun, Upstream, UpstreamError};
use crate::config::UpstreamKind;
use crate::domain::{Message, RunId, UpstreamRunId, UpstreamThreadId};
use turn::Turn;
use wire::{RunList, RunObject, content};

/// Runs to look through for ours. Only one can be active where the server locks; this is for those that do not.
const RUNS_TO_SEARCH: &str = "20";
/// A run whose request was cut off may appear a little later.
const SECOND_LOOK: Duration = Duration::from_millis(500);

/// An upstream that speaks Assistants v2.
#[derive(Clone, Debug)]
pub struct AssistantsUpstream {
    client: UpstreamClient,
}

impl AssistantsUpstream {
    pub fn new(client: UpstreamClient) -> Self {
        Self { client: client.with_header("openai-beta", "assistants=v2") }
    }
}

#[async_trait]
impl Upstream for AssistantsUpstream {
    async fn create_thread(
        &self,
        owner: &Ownership,
        history: &[Message],
    ) -> Result<Option<UpstreamThreadId>, UpstreamError> {
        let mut body = json!({"metadata": thread_tags(owner)});
        let messages: Vec<Value> = history
            .iter()
            .map(|message| json!({"role": message.role, "content": content(&message.content)}))
            .collect();
        if !messages.is_empty() {
            body["messages"] = messages.into();
        }
        let thread: Created = self.client.json(Method::POST, &["threads"], &[], Some(&body)).await?.value;
        thread.into_thread().map(Some)
    }

    async fn start(&self, request: StartRun<'_>) -> Result<EventStream, UpstreamError> {
        let Some(thread) = request.thread else {
            return Err(UpstreamError::Protocol("a run was to start without a thread".to_owned()));
        };
        let events = self.client.events(&["threads", thread.as_str(), "runs"], &run_body(&request)).await?;
        relay(events, Turn::default()).await
    }

    async fn settle(&self, leftover: &Leftover) -> Result<(), UpstreamError> {
        let Some(thread) = &leftover.thread else { return Ok(()) };
        let settled = match &leftover.upstream_run {
            Some(run) => self.end(thread, run).await,
            None => match self.find(thread, leftover.run).await {
                Ok(Some(run)) => self.end(thread, &run).await,
                Ok(None) => Ok(()),
                Err(error) => Err(error),
            },
        };
        match settled {
            Err(UpstreamError::ThreadGone) => Ok(()),
            other => other,
        }
    }
}

impl AssistantsUpstream {
    /// The run that carries our tag, unless it has ended.
    async fn find(
        &self,
        thread: &UpstreamThreadId,
        run: RunId,
    ) -> Result<Option<UpstreamRunId>, UpstreamError> {
        let tag = Value::String(run.to_string());
        for look in 0..2 {
            if look > 0 {
                tokio::time::sleep(SECOND_LOOK).await;
            }
            let path = ["threads", thread.as_str(), "runs"];
            let query = [("limit", RUNS_TO_SEARCH), ("order", "desc")];
            let runs: RunList = self.call(Method::GET, &path, &query).await?.value;
            let ours = |run: &RunObject| run.metadata.as_ref().and_then(|it| it.get(RUN_TAG)) == Some(&tag);
            if let Some(found) = runs.data.into_iter().find(ours) {
                return Ok((!found.has_ended()).then_some(UpstreamRunId(found.id)));
            }
        }
        Ok(None)
    }

    /// Cancels the run and waits until it no longer holds its thread.
    async fn end(&self, thread: &UpstreamThreadId, run: &UpstreamRunId) -> Result<(), UpstreamError> {
        let path = ["threads", thread.as_str(), "runs", run.as_str()];
        let cancel = ["threads", thread.as_str(), "runs", run.as_str(), "cancel"];
        let mut poll = FIRST_WAIT;
        let mut answer = None;
        loop {
            let cancelling = answer.as_ref().is_some_and(RunObject::is_cancelling);
            if !cancelling {
                match self.call::<RunObject>(Method::POST, &cancel, &[]).await {
                    Ok(cancelled) if cancelled.value.has_ended() => return Ok(()),
                    // The run moved before the cancel came, or cannot be cancelled where it stands: its own status
                    // tells which.
                    Ok(_) | Err(UpstreamError::Refused { status: 400, .. } | UpstreamError::Busy { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            let seen = self.call::<RunObject>(Method::GET, &path, &[]).await?;
            if seen.value.has_ended() {
                return Ok(());
            }
            tokio::time::sleep(seen.poll_after.unwrap_or(poll).min(LONGEST_WAIT)).await;
            poll = longer(poll);
            answer = Some(seen.value);
        }
    }

    /// One call without a body.
    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &[&str],
        query: &[(&str, &str)],
    ) -> Result<Answer<T>, UpstreamError> {
        patiently(|| self.client.json(method.clone(), path, query, None)).await
    }
}

/// The request that appends the input and starts the run.
fn run_body(request: &StartRun<'_>) -> Value {
    let assistant = request.assistant;
    let mut body = parameters(assistant, UpstreamKind::Assistants);
    let mut set = |name: &str, value: Value| body.insert(name.to_owned(), value);
    if let Some(id) = &assistant.assistant_id {
        set("assistant_id", id.as_str().into());
    }
    if let Some(model) = &assistant.model {
        set("model", model.as_str().into());
    }
    if let Some(instructions) = &assistant.instructions {
        set("instructions", instructions.as_str().into());
    }
    if !assistant.tools.is_empty() {
        set("tools", assistant.tools.clone().into());
    }
    let messages: Vec<Value> = request
        .input
        .iter()
        .map(|message| {
            json!({
                "role": "user",
                "content": content(&message.content),
                "metadata": message_tags(request.run, message.id),
            })
        })
        .collect();
    set("additional_messages", messages.into());
    set("metadata", run_tags(request.run, request.metadata).into());
    set("stream", true.into());
    Value::Object(body)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::config::AssistantConfig;
    use crate::domain::{ContentPart, MessageId, Metadata};
    use crate::store::InputMessage;
    use crate::upstream::tags::an_owner;

    #[test]
    fn a_run_is_started_with_what_the_gateway_owns_and_what_is_configured() {
        let (run, message, thread) =
            (RunId::new(), MessageId::new(), UpstreamThreadId("thread_1".to_owned()));
        let mut assistant =
            AssistantConfig { assistant_id: Some("asst_1".to_owned()), ..AssistantConfig::default() };
        let input =
            [InputMessage { id: message, content: vec![ContentPart::Text { text: "hello".to_owned() }] }];
        let pairs = BTreeMap::from([("a".to_owned(), "b".to_owned())]);
        let metadata = Metadata::try_from(pairs).unwrap();
        let owner = an_owner();
        let body = |assistant: &AssistantConfig| {
            run_body(&StartRun {
                run,
                thread: Some(&thread),
                owner: &owner,
                history: &[],
                assistant,
                input: &input,
                metadata: &metadata,
            })
        };
        let least = json!({
            "assistant_id": "asst_1",
            "additional_messages": [{
                "role": "user", "content": "hello",
                "metadata": {"threadkeeper_run": run.to_string(), "threadkeeper_message": message.to_string()},
            }],
            "metadata": {"threadkeeper_run": run.to_string(), "a": "b"},
            "stream": true,
        });
        assert_eq!(body(&assistant), least);

        assistant.model = Some("m".to_owned());
        assistant.instructions = Some("be brief".to_owned());
        assistant.tools = vec![json!({"type": "code_interpreter"})];
        let parameters = json!({
            "temperature": 0.5, "top_p": null, "stream": false, "additional_messages": [], "metadata": {"x": "y"},
            "model": "other",
        });
        assistant.parameters = parameters.as_object().unwrap().clone();
        let mut most = least;
        most["model"] = "m".into();
        most["instructions"] = "be brief".into();
        most["tools"] = json!([{"type": "code_interpreter"}]);
        most["temperature"] = 0.5.into();
        assert_eq!(body(&assistant), most);
    }
}

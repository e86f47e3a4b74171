//! Builds the bodies of requests.

use serde_json::{Value, json};

use super::adapter::ResponsesUpstream;
use super::wire::{history_of, message_item};
use crate::config::{AssistantConfig, UpstreamKind};
use crate::domain::{Message, Metadata, RunId, UpstreamThreadId};
use crate::upstream::port::{AnswerTools, Ownership, StartRun};
use crate::upstream::tags::{body_of, run_tags, thread_tags};

/// The settings of a response, whatever its input. The server keeps none of them from one
/// response to the next.
pub(super) struct Terms<'a> {
    run: RunId,
    owner: &'a Ownership,
    assistant: &'a AssistantConfig,
    metadata: &'a Metadata,
}

impl<'a> Terms<'a> {
    pub(super) fn of_start(request: &StartRun<'a>) -> Self {
        let StartRun {
            run,
            owner,
            assistant,
            metadata,
            ..
        } = *request;
        Self {
            run,
            owner,
            assistant,
            metadata,
        }
    }

    pub(super) fn of_answer(request: &AnswerTools<'a>) -> Self {
        let AnswerTools {
            run,
            owner,
            assistant,
            metadata,
            ..
        } = *request;
        Self {
            run,
            owner,
            assistant,
            metadata,
        }
    }
}

impl ResponsesUpstream {
    /// Returns the request for a response, without its input.
    pub(super) fn body(&self, thread: Option<&UpstreamThreadId>, terms: &Terms<'_>) -> Value {
        let assistant = terms.assistant;
        let mut body = body_of(assistant, UpstreamKind::Responses);
        let mut set = |name: &str, value: Value| body.insert(name.to_owned(), value);
        if let Some(thread) = thread {
            let name = if self.conversations {
                "conversation"
            } else {
                "previous_response_id"
            };
            set(name, thread.as_str().into());
        }
        let mut metadata = run_tags(terms.run, terms.metadata);
        if !self.conversations {
            // A chain has no upstream thread that could carry the owner.
            metadata.extend(thread_tags(terms.owner));
        }
        set("metadata", metadata.into());
        if self.background {
            set("background", true.into());
        }
        set("store", true.into());
        set("stream", true.into());
        set("stream_options", json!({"include_obfuscation": false}));
        Value::Object(body)
    }
}

/// Returns history and input as items.
pub(super) fn input(request: &StartRun<'_>) -> Vec<Value> {
    let mut items: Vec<Value> = history_items(request.history).collect();
    items.extend(
        request
            .input
            .iter()
            .map(|message| message_item(&message.content)),
    );
    items
}

/// Returns the messages of earlier runs as items. A message without content is left out, because
/// no server accepts it.
pub(super) fn history_items(history: &[Message]) -> impl Iterator<Item = Value> {
    history
        .iter()
        .filter(|message| !message.content.is_empty())
        .flat_map(history_of)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::UpstreamConfig;
    use crate::domain::{ContentPart, MessageId, Role};
    use crate::store::InputMessage;
    use crate::upstream::client::UpstreamClient;
    use crate::upstream::tags::{a_message, an_owner};

    fn upstream(conversations: bool, background: bool) -> ResponsesUpstream {
        let url = "http://localhost".parse().unwrap();
        let config = UpstreamConfig {
            conversations,
            background,
            ..UpstreamConfig::new(UpstreamKind::Responses, url)
        };
        ResponsesUpstream::new(UpstreamClient::new("test", &config).unwrap(), &config)
    }

    fn inputs() -> [InputMessage; 2] {
        ["one", "two"].map(|text| InputMessage {
            id: MessageId::new(),
            content: vec![ContentPart::text(text)],
        })
    }

    #[test]
    fn a_response_is_started_with_what_the_gateway_owns_and_what_is_configured() {
        let run = RunId::new();
        let owner = an_owner();
        let thread = UpstreamThreadId("conv_1".to_owned());
        let mut assistant = AssistantConfig {
            model: Some("m".to_owned()),
            ..AssistantConfig::default()
        };
        let metadata = Metadata::default();
        let body = |assistant: &AssistantConfig,
                    thread: Option<&UpstreamThreadId>,
                    on: &ResponsesUpstream| {
            on.body(
                thread,
                &Terms {
                    run,
                    owner: &owner,
                    assistant,
                    metadata: &metadata,
                },
            )
        };
        let first = json!({
            "model": "m",
            "metadata": {"threadkeeper_run": run.to_string()},
            "store": true,
            "stream": true,
            "stream_options": {"include_obfuscation": false},
        });
        let (plain, chain) = (upstream(true, false), upstream(false, false));
        let mut next = first.clone();
        let tags = next["metadata"].as_object_mut().unwrap();
        tags.extend(thread_tags(&owner));
        assert_eq!(tags.len() + 10, 16, "with the most that a caller may add");
        assert_eq!(body(&assistant, None, &chain), next);
        next["previous_response_id"] = "conv_1".into();
        assert_eq!(body(&assistant, Some(&thread), &chain), next);

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
        assert_eq!(body(&assistant, Some(&thread), &plain), most);
        most["background"] = true.into();
        assert_eq!(body(&assistant, Some(&thread), &upstream(true, true)), most);
    }

    #[test]
    fn earlier_messages_go_before_the_input() {
        let (owner, assistant, metadata) =
            (an_owner(), AssistantConfig::default(), Metadata::default());
        let mut history = [
            a_message(Role::User, "before"),
            a_message(Role::Assistant, "yes"),
            a_message(Role::User, ""),
        ];
        history[2].content.clear();
        let input = inputs();
        let request = StartRun {
            run: RunId::new(),
            thread: None,
            owner: &owner,
            history: &history,
            assistant: &assistant,
            input: &input,
            metadata: &metadata,
        };
        let item =
            |role: &str, text: &str| json!({"type": "message", "role": role, "content": text});
        let expected = [
            item("user", "before"),
            item("assistant", "yes"),
            item("user", "one"),
            item("user", "two"),
        ];
        assert_eq!(super::input(&request), expected);
    }
}

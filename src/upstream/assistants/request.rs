//! Builds the bodies of requests.

use serde_json::{Value, json};

use super::wire::message;
use crate::config::UpstreamKind;
use crate::domain::{CallAnswer, Message, Role, ToolOutput, messages_of};
use crate::upstream::port::StartRun;
use crate::upstream::tags::{body_of, message_tags, run_tags};

/// Returns the request that appends history and input and starts the run.
pub(super) fn run_body(request: &StartRun<'_>) -> Value {
    let assistant = request.assistant;
    let mut body = body_of(assistant, UpstreamKind::Assistants);
    let mut set = |name: &str, value: Value| body.insert(name.to_owned(), value);
    if let Some(id) = &assistant.assistant_id {
        set("assistant_id", id.as_str().into());
    }
    let mut messages = history_messages(request.history);
    messages.extend(request.input.iter().map(|input| {
        let tags = message_tags(Some(request.run), input.id);
        message(Role::User, &input.content, tags.into())
    }));
    if !messages.is_empty() {
        set("additional_messages", messages.into());
    }
    set("metadata", run_tags(request.run, request.metadata).into());
    set("stream", true.into());
    Value::Object(body)
}

/// Returns the request that answers all calls of a run.
pub(super) fn outputs_body(outputs: &[ToolOutput]) -> Value {
    let mut body = json!({"stream": true});
    for output in outputs {
        let id = &output.tool_call_id;
        let (list, answer) = match &output.answer {
            CallAnswer::Output { output, .. } => (
                "tool_outputs",
                json!({"tool_call_id": id, "output": output}),
            ),
            CallAnswer::Approval { approve, .. } => (
                "tool_approvals",
                json!({"tool_call_id": id, "approve": approve}),
            ),
        };
        match &mut body[list] {
            Value::Array(answers) => answers.push(answer),
            none => *none = json!([answer]),
        }
    }
    body
}

/// Returns the messages of earlier runs, each with the tag of its run. A message without content
/// is left out, because no server accepts it.
pub(super) fn history_messages(history: &[Message]) -> Vec<Value> {
    let mut messages = Vec::new();
    for earlier in history {
        for parts in messages_of(&earlier.content) {
            let tags = message_tags(earlier.run_id, earlier.id);
            messages.push(message(earlier.role, parts, tags.into()));
        }
    }
    messages
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::config::AssistantConfig;
    use crate::domain::{ContentPart, MessageId, Metadata, RunId, UpstreamThreadId};
    use crate::store::InputMessage;
    use crate::upstream::tags::{a_message, an_owner};

    #[test]
    fn a_run_is_started_with_what_the_gateway_owns_and_what_is_configured() {
        let (run, message, thread) = (
            RunId::new(),
            MessageId::new(),
            UpstreamThreadId("thread_1".to_owned()),
        );
        let mut assistant = AssistantConfig {
            assistant_id: Some("asst_1".to_owned()),
            ..AssistantConfig::default()
        };
        let input = [InputMessage {
            id: message,
            content: vec![ContentPart::text("hello")],
        }];
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
    #[test]
    fn earlier_messages_go_first_with_their_own_tags() {
        let (run, earlier) = (RunId::new(), RunId::new());
        let (owner, assistant, metadata) =
            (an_owner(), AssistantConfig::default(), Metadata::default());
        let mut history = [
            a_message(Role::User, "before"),
            a_message(Role::Assistant, "yes"),
            a_message(Role::Assistant, ""),
        ];
        history[0].run_id = Some(earlier);
        history[2].content.clear();
        let input = [InputMessage {
            id: MessageId::new(),
            content: vec![ContentPart::text("now")],
        }];
        let body = run_body(&StartRun {
            run,
            thread: None,
            owner: &owner,
            history: &history,
            assistant: &assistant,
            input: &input,
            metadata: &metadata,
        });
        let expected = json!([
            {"role": "user", "content": "before", "metadata": {
                "threadkeeper_run": earlier.to_string(), "threadkeeper_message": history[0].id.to_string(),
            }},
            {"role": "assistant", "content": "yes", "metadata": {
                "threadkeeper_message": history[1].id.to_string(),
            }},
            {"role": "user", "content": "now", "metadata": {
                "threadkeeper_run": run.to_string(), "threadkeeper_message": input[0].id.to_string(),
            }},
        ]);
        assert_eq!(body["additional_messages"], expected);
    }
}

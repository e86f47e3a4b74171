//! A call of a tool that the model made, as the transcript keeps it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::tool_call::{CallAnswer, OutputContent, OutputPart, ToolCall, ToolCallType};

/// Most bytes of an output that the transcript keeps, and of the arguments of a call that the
/// upstream answers itself. What is longer is cut, with a note.
pub(super) const MAX_KEPT: usize = 64 * 1024;
/// Most bytes that all outputs of a run together have in the transcript. After that, notes stand
/// for outputs.
pub(super) const MAX_ALL_OUTPUTS: usize = 1024 * 1024;
/// Most bytes of arguments, and of an output, in a note for the model.
const MAX_TOLD: usize = 500;

/// A call that the model made in a run, and its output.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MadeCall {
    /// The upstream's id of the call.
    pub id: String,
    /// The type of a call that a client answers, such as `function`, or the name of a tool that the
    /// upstream runs itself, such as `web_search`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The name of the function; absent where the tool has none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// The arguments as the model wrote them: usually, not always, a JSON object.
    pub arguments: String,
    /// `null`: nobody answered the call, the upstream does not tell the output, or the caller is a
    /// user with a token of their own.
    pub output: Option<String>,
}

impl From<&ToolCall> for MadeCall {
    fn from(call: &ToolCall) -> Self {
        Self {
            id: call.id.clone(),
            kind: call.kind.as_str().to_owned(),
            name: call.name.clone(),
            arguments: call.arguments.clone(),
            output: None,
        }
    }
}

impl MadeCall {
    /// Returns the type of a call that is sent again as a call. A note stands for any other one.
    pub fn sendable(&self) -> Option<ToolCallType> {
        let kind = self.kind.parse().ok()?;
        let is_plain = matches!(kind, ToolCallType::Function | ToolCallType::Custom);
        (is_plain && !self.name.is_empty()).then_some(kind)
    }

    /// Returns the bytes of its texts, without the output.
    pub fn size_asked(&self) -> usize {
        self.id.len() + self.kind.len() + self.name.len() + self.arguments.len()
    }

    /// Returns the bytes of its texts.
    pub fn size(&self) -> usize {
        self.size_asked() + self.output.as_ref().map_or(0, String::len)
    }

    /// Returns what the model reads in the place of a call that cannot be sent as one.
    pub fn note(&self) -> String {
        let name = if self.name.is_empty() {
            &self.kind
        } else {
            &self.name
        };
        let arguments = told(&self.arguments);
        match &self.output {
            Some(output) => {
                format!(
                    "[Called the tool {name} with {arguments}. Output: {}]",
                    told(output)
                )
            }
            None => format!("[Called the tool {name} with {arguments}.]"),
        }
    }
}

/// Returns the text of an answer, as the transcript keeps it.
pub(super) fn kept_answer(answer: &CallAnswer) -> String {
    match answer {
        CallAnswer::Output { output, .. } => match output {
            OutputContent::Text(text) => kept(text),
            OutputContent::Parts(parts) => {
                let texts: Vec<&str> = parts.iter().map(part).collect();
                kept(&texts.join("\n"))
            }
        },
        CallAnswer::Approval { approve: true, .. } => "approved".to_owned(),
        CallAnswer::Approval { reason, .. } => match reason {
            Some(reason) => kept(&format!("declined: {reason}")),
            None => "declined".to_owned(),
        },
    }
}

/// Returns the text of a part. A picture may have megabytes.
fn part(part: &OutputPart) -> &str {
    match part {
        OutputPart::InputText { text } => text,
        OutputPart::InputImage { .. } => "[a picture]",
        OutputPart::InputFile { .. } => "[a file]",
    }
}

/// Returns the text, cut after 64 KiB.
pub fn kept(text: &str) -> String {
    let cut = text.floor_char_boundary(MAX_KEPT);
    if cut == text.len() {
        return text.to_owned();
    }
    format!("{}[… cut, {} bytes in all]", &text[..cut], text.len())
}

fn told(text: &str) -> String {
    let cut = text.floor_char_boundary(MAX_TOLD);
    if cut == text.len() {
        return text.to_owned();
    }
    format!("{}…", &text[..cut])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_output_is_cut_at_a_character() {
        assert_eq!(kept("ä"), "ä");
        let long = format!("a{}", "ä".repeat(MAX_KEPT));
        let cut = kept(&long);
        assert!(cut.len() < MAX_KEPT + 64);
        assert!(
            cut.ends_with("ä[… cut, 131073 bytes in all]"),
            "{}",
            &cut[cut.len() - 60..]
        );
    }

    #[test]
    fn note_tells_call_and_output() {
        let mut call = MadeCall {
            id: "call_1".to_owned(),
            kind: "function".to_owned(),
            name: "get_weather".to_owned(),
            arguments: "{}".to_owned(),
            output: None,
        };
        assert_eq!(call.note(), "[Called the tool get_weather with {}.]");
        call.output = Some("4 °C".to_owned());
        assert_eq!(
            call.note(),
            "[Called the tool get_weather with {}. Output: 4 °C]"
        );
        assert_eq!(call.sendable(), Some(ToolCallType::Function));
        call.kind = "web_search".to_owned();
        assert_eq!(call.sendable(), None);
    }

    #[test]
    fn pictures_of_an_output_are_kept_as_notes() {
        let picture = OutputPart::InputImage {
            image_url: Some("data:image/png;base64,AAAA".to_owned()),
            file_id: None,
            detail: None,
        };
        let text = OutputPart::InputText {
            text: "a chart".to_owned(),
        };
        let answer = CallAnswer::Output {
            output: OutputContent::Parts(vec![text, picture]),
            acknowledged_safety_checks: Vec::new(),
        };
        assert_eq!(kept_answer(&answer), "a chart\n[a picture]");
    }
}

//! Checks the tools of an assistant. A tool that no server takes is a problem. A tool that some servers
//! may take is a doubt.

use serde_json::{Map, Value};

use super::UpstreamKind;
use super::names::nearest;

/// A mistake in a tool.
pub(super) enum Finding {
    /// Every run would fail. The texts are the mistake and the form to write.
    Problem(&'static str, &'static str),
    /// The published API has no such tool, but a server may know more.
    Doubt(String),
}

/// Types of tools in the published API, with the fields that each needs besides `type`.
const OF_RESPONSES: [(&str, &[&str]); 18] = [
    ("function", &["name"]),
    ("custom", &["name"]),
    ("file_search", &["vector_store_ids"]),
    ("computer", &[]),
    (
        "computer_use_preview",
        &["environment", "display_width", "display_height"],
    ),
    ("web_search", &[]),
    ("web_search_2025_08_26", &[]),
    ("web_search_preview", &[]),
    ("web_search_preview_2025_03_11", &[]),
    ("mcp", &["server_label"]),
    ("code_interpreter", &["container"]),
    ("programmatic_tool_calling", &[]),
    ("image_generation", &[]),
    ("local_shell", &[]),
    ("shell", &[]),
    ("namespace", &["name", "description", "tools"]),
    ("tool_search", &[]),
    ("apply_patch", &[]),
];
const OF_ASSISTANTS: [(&str, &[&str]); 3] = [
    ("function", &["function"]),
    ("file_search", &[]),
    ("code_interpreter", &[]),
];

/// The fields of which an MCP tool needs one.
const MCP_PLACES: [&str; 3] = ["server_url", "connector_id", "tunnel_id"];

const FLAT: &str = "{ type = \"function\", name = \"…\", description = \"…\", parameters = { type = \"object\", … } }";
const NESTED: &str =
    "{ type = \"function\", function = { name = \"…\", description = \"…\", parameters = { … } } }";

/// Returns the mistake in a tool of an assistant at an upstream of this kind.
pub(super) fn examine(kind: UpstreamKind, tool: &Map<String, Value>) -> Option<Finding> {
    let form = match kind {
        UpstreamKind::Responses => FLAT,
        UpstreamKind::Assistants => NESTED,
    };
    let Some(kind_of_tool) = tool.get("type").and_then(Value::as_str) else {
        return Some(Finding::Problem("has no `type`", form));
    };
    let has_name = |of: &Map<String, Value>| of.get("name").is_some_and(Value::is_string);
    let nested = tool.get("function").and_then(Value::as_object);
    match (kind, kind_of_tool) {
        (UpstreamKind::Responses, "function") if nested.is_some() && !has_name(tool) => {
            let what = "is a function in the form of Chat Completions and Assistants, which servers of \
                        kind \"responses\" do not read";
            return Some(Finding::Problem(what, FLAT));
        }
        (UpstreamKind::Assistants, "function") if nested.is_none() && has_name(tool) => {
            let what = "is a function in the form of Responses, which servers of kind \"assistants\" do \
                        not read";
            return Some(Finding::Problem(what, NESTED));
        }
        (UpstreamKind::Responses, "function" | "custom") if !has_name(tool) => {
            return Some(Finding::Problem("has no `name`", form));
        }
        (UpstreamKind::Assistants, "function") if !nested.is_some_and(has_name) => {
            return Some(Finding::Problem("has no `function` with a `name`", NESTED));
        }
        _ => {}
    }
    let known: &[(&str, &[&str])] = match kind {
        UpstreamKind::Responses => &OF_RESPONSES,
        UpstreamKind::Assistants => &OF_ASSISTANTS,
    };
    let Some((_, needs)) = known.iter().find(|(name, _)| *name == kind_of_tool) else {
        let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
        let meant = nearest(kind_of_tool, &names);
        let meant = meant.map_or_else(String::new, |name| format!(": did you mean \"{name}\"?"));
        return Some(Finding::Doubt(format!(
            "has a `type` that the published API does not know, so the upstream may refuse every run{meant}"
        )));
    };
    if kind_of_tool == "mcp" && !MCP_PLACES.iter().any(|field| tool.contains_key(*field)) {
        return Some(Finding::Doubt(
            "has none of `server_url`, `connector_id` and `tunnel_id`, and without one the published \
             API refuses every run"
                .to_owned(),
        ));
    }
    let lacking = needs.iter().find(|field| !tool.contains_key(**field))?;
    Some(Finding::Doubt(format!(
        "has no `{lacking}`, and without it the published API refuses every run"
    )))
}

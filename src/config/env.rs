//! The environment as a layer of settings: finds the gateway's variables, and sets what they name.

use std::collections::BTreeMap;

use secrecy::zeroize::Zeroizing;
use serde_json::Value;

use super::names::{ANY_NAME, FILE_SUFFIX, PREFIX, did_you_mean, known_settings, variable};
use super::problem::{ConfigProblems, Origin, Problem};
use super::tree::Tree;

/// Names with the prefix that are not settings.
const RESERVED: [&str; 1] = ["THREADKEEPER_CONFIG"];

/// Puts the variables that are settings over the settings of the tree.
pub(super) fn overlay(tree: &mut Tree, env: Vec<(String, String)>, problems: &mut ConfigProblems) {
    let env = env.into_iter().filter(|(_, value)| !value.is_empty());
    let env: BTreeMap<String, Zeroizing<String>> =
        env.map(|(name, value)| (name, value.into())).collect();
    let mut ours = BTreeMap::<Vec<String>, (&str, &str)>::new();
    for (name, value) in &env {
        let Some(rest) = name.strip_prefix(PREFIX) else {
            continue;
        };
        if RESERVED.contains(&name.as_str()) || is_injected(rest, value) {
            continue;
        }
        match setting_path(rest) {
            Ok(path) => {
                if let Some((other, _)) = ours.insert(path, (name, value)) {
                    let what = format!("sets the same as {other}: their names differ only in case");
                    problems.push(variable_problem(name, what, None));
                }
            }
            Err((what, hint)) => problems.push(variable_problem(name, what, hint)),
        }
    }
    let store_url = ["store", "url"].map(str::to_owned).to_vec();
    let store_url_file = ["store", "url_file"].map(str::to_owned).to_vec();
    if let Some(value) = env.get("DATABASE_URL")
        && !ours.contains_key(&store_url)
        && !ours.contains_key(&store_url_file)
    {
        ours.insert(store_url, ("DATABASE_URL", value));
    }
    // A variable replaces both spellings of the file, so the other one is removed first.
    for path in ours.keys() {
        if let Some(twin) = twin(path)
            && tree.get(&twin).is_some()
        {
            tree.remove(&twin);
        }
    }
    for (path, (name, value)) in ours {
        if value.contains(char::REPLACEMENT_CHARACTER) {
            problems.push(variable_problem(
                name,
                "is not valid UTF-8".to_owned(),
                None,
            ));
            continue;
        }
        put(
            tree,
            &path,
            written(&path, value),
            Origin::Variable(name.to_owned()),
            problems,
        );
    }
}

/// Returns the value of a variable: text, which its field reads later. Within `parameters`, which have no
/// typed fields, JSON if it is JSON.
fn written(path: &[String], text: &str) -> Value {
    let is_free = path.len() > 3 && path[0] == "assistants" && path[2] == "parameters";
    let json = is_free.then(|| serde_json::from_str(text).ok()).flatten();
    json.unwrap_or_else(|| Value::from(text))
}

/// Puts a value over those of lower layers.
pub(super) fn put(
    tree: &mut Tree,
    path: &[String],
    value: Value,
    origin: Origin,
    problems: &mut ConfigProblems,
) {
    let Err(depth) = tree.insert(path, value, Some(origin.clone())) else {
        return;
    };
    let whole = &path[..depth];
    let hint = tree
        .origin(whole)
        .map(|other| format!("{other} sets it to one value"));
    problems.push(Problem {
        path: path.join("."),
        origin: Some(origin),
        what: format!("{} has no fields", whole.join(".")),
        hint,
    });
}

/// Returns the other spelling of a setting: `store.url` for `store.url_file`, and the reverse. So too for
/// `direct_url`, `api_key` and `secret`.
fn twin(path: &[String]) -> Option<Vec<String>> {
    let (last, above) = path.split_last()?;
    let other = match last.strip_suffix(FILE_SUFFIX) {
        Some(plain) => plain.to_owned(),
        None if matches!(last.as_str(), "url" | "direct_url" | "api_key" | "secret") => {
            format!("{last}{FILE_SUFFIX}")
        }
        None => return None,
    };
    Some(above.iter().cloned().chain([other]).collect())
}

fn variable_problem(name: &str, what: String, hint: Option<String>) -> Problem {
    Problem {
        path: String::new(),
        origin: Some(Origin::Variable(name.to_owned())),
        what,
        hint,
    }
}

/// Returns whether an orchestrator injected the variable. Orchestrators give each container variables about
/// the services around it: `<SERVICE>_SERVICE_HOST`, `<SERVICE>_PORT_8080_TCP_ADDR`, … Those of a service
/// called `threadkeeper` or `threadkeeper-postgres` have the gateway's prefix.
fn is_injected(rest: &str, value: &str) -> bool {
    if rest.contains("__") {
        return false;
    }
    let framed = format!("_{rest}_");
    let is_port_detail = framed.split_once("_PORT_").is_some_and(|(_, detail)| {
        let mut parts = detail.split('_');
        parts
            .next()
            .is_some_and(|port| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()))
            && parts
                .next()
                .is_some_and(|protocol| matches!(protocol, "TCP" | "UDP" | "SCTP"))
    });
    framed.ends_with("_SERVICE_HOST_")
        || framed.contains("_SERVICE_PORT_")
        || rest == "PORT"
        || rest.starts_with("PORT_")
        || is_port_detail
        || (framed.ends_with("_PORT_") && value.contains("://"))
}

type Refusal = (String, Option<String>);

fn setting_path(rest: &str) -> Result<Vec<String>, Refusal> {
    let path: Vec<String> = rest.split("__").map(str::to_ascii_lowercase).collect();
    if path.iter().any(String::is_empty) {
        return Err((
            "has an empty level between its underscores".to_owned(),
            None,
        ));
    }
    if path.len() > 1 {
        return Ok(path);
    }
    let hint = spelling_of(&path[0]).map_or_else(
        || "a setting is named like THREADKEEPER_STORE__URL".to_owned(),
        |name| did_you_mean(&name),
    );
    Err((
        "is not a setting: two underscores separate the levels".to_owned(),
        Some(hint),
    ))
}

/// Returns the variable that `flat` probably means: a path with single underscores, or a field name alone.
fn spelling_of(flat: &str) -> Option<String> {
    let below = |section: &str| flat.strip_prefix(section)?.strip_prefix('_');
    let exact = known_settings()
        .iter()
        .find_map(|setting| match setting.as_slice() {
            [section, name, field] if name == ANY_NAME => {
                let name = below(section)?
                    .strip_suffix(field.as_str())?
                    .strip_suffix('_')?;
                Some(variable(&[section, name, field]))
            }
            _ => (setting.join("_") == flat).then(|| variable(setting)),
        });
    let lone = || {
        known_settings()
            .iter()
            .find(|setting| setting.len() == 2 && setting[1] == flat)
    };
    exact.or_else(|| lone().map(|setting| variable(setting)))
}

//! Turns written settings into typed ones, and reports every value that does not fit.

use serde_json::Value;
use serde_path_to_error::{Path, Segment};

use super::Config;
use super::names::{ANY_NAME, did_you_mean, known_settings, names_expected, nearest, variable};
use super::problem::{ConfigProblems, Problem};
use super::rate::A_RATE;
use super::tree::{Tree, kind};

/// Hint for an address to listen on.
pub const LISTEN_FORM: &str = "write an IP address and a port: \"127.0.0.1:8080\" for this machine alone, \
                               \"0.0.0.0:8080\" for all interfaces";

/// Number of wrong values that are reported. It only keeps a defect of the loader from looping for ever.
const MAX_ROUNDS: usize = 10_000;
const TRUE_OR_FALSE: &str = "true or false";
const A_LIST: &str = "a list";
const A_TABLE: &str = "a table";
/// One of the words of an enum.
const A_WORD: &str = "a word";
const SETTINGS: &str = "a table of settings, each with its own name";

/// Reads the tree into types. Reports and removes each value that does not fit, until the rest fits.
pub(super) fn decode(tree: &mut Tree, problems: &mut ConfigProblems) -> Config {
    for path in lists_for_tables(tree.root(), Vec::new()) {
        let what = format!("expected {SETTINGS}, found {A_LIST}");
        problems.push(problem(tree, &path, what, None));
        tree.remove(&path);
    }
    for _ in 0..MAX_ROUNDS {
        match serde_path_to_error::deserialize(tree.root()) {
            Ok(config) => return config,
            Err(error) => {
                let path = keys(error.path());
                if !set_aside(tree, &path, &error.into_inner().to_string(), problems) {
                    break;
                }
            }
        }
    }
    if problems.is_empty() {
        let what = "the configuration cannot be read".to_owned();
        problems.push(Problem {
            path: String::new(),
            origin: None,
            what,
            hint: None,
        });
    }
    Config::default()
}

/// Returns the paths of lists in the place of tables, which serde would read as the fields of a struct.
fn lists_for_tables(value: &Value, path: Vec<String>) -> Vec<Vec<String>> {
    let fits = |(known, key): (&String, &String)| known == key || known == ANY_NAME;
    let is_above =
        |known: &Vec<String>| known.len() > path.len() && known.iter().zip(&path).all(fits);
    match value {
        Value::Array(_) if known_settings().iter().any(is_above) => vec![path],
        Value::Object(fields) => {
            let below = |(key, field): (&String, &Value)| {
                lists_for_tables(field, [path.as_slice(), std::slice::from_ref(key)].concat())
            };
            fields.iter().flat_map(below).collect()
        }
        _ => Vec::new(),
    }
}

/// Returns the keys and indexes that lead to a value.
fn keys(path: &Path) -> Vec<String> {
    let key = |segment: &Segment| match segment {
        Segment::Map { key } => Some(key.clone()),
        Segment::Seq { index } => Some(index.to_string()),
        Segment::Enum { .. } | Segment::Unknown => None,
    };
    path.iter().map_while(key).collect()
}

/// Handles the first value that serde refuses, so that the next reading gets past it. Returns whether that
/// worked.
fn set_aside(
    tree: &mut Tree,
    path: &[String],
    refusal: &str,
    problems: &mut ConfigProblems,
) -> bool {
    if let Some(field) = refusal.strip_prefix("missing field `") {
        return missing(tree, path, field.trim_end_matches('`'), problems);
    }
    let unfit = refusal
        .strip_prefix("invalid ")
        .and_then(|rest| rest.rsplit_once(", expected "));
    let is_word = refusal.starts_with("unknown variant `");
    let expected = unfit
        .map(|(_, expected)| in_words(expected))
        .or_else(|| is_word.then(|| A_WORD.to_owned()));
    // serde lists the words that a field takes only if the value is a text.
    if matches!(
        expected.as_deref(),
        Some("string or map" | "map with a single key" | "unit")
    ) {
        return tree.replace(path, Value::from(""));
    }
    let text = tree
        .raw(path)
        .or_else(|| tree.get(path)?.as_str().filter(|_| is_word));
    if let Some(value) = text.and_then(|text| reread(text, expected.as_deref()?)) {
        return tree.replace(path, value);
    }
    let written = tree.get(path);
    let (what, hint) = if refusal.starts_with("unknown field `") {
        (
            "there is no such setting".to_owned(),
            setting_meant(path, &names_expected(refusal)),
        )
    } else if is_word {
        let known = names_expected(refusal);
        let words: Vec<String> = known.iter().map(|word| format!("\"{word}\"")).collect();
        let meant = written
            .and_then(Value::as_str)
            .and_then(|word| nearest(word, &known));
        (
            format!("expected one of {}", words.join(", ")),
            meant.map(|word| did_you_mean(&format!("\"{word}\""))),
        )
    } else if let (Some((fault, _)), Some(mut expected)) = (unfit, expected) {
        let form = form(&expected);
        match written {
            Some(Value::String(_)) if tree.raw(path).is_some() && expected == A_LIST => {
                expected += " written as JSON, [\"a\", \"b\"]";
            }
            Some(Value::String(_)) if tree.raw(path).is_some() && expected == A_TABLE => {
                expected += " written as JSON, {\"a\": \"b\"}";
            }
            Some(value) if fault.starts_with("type") && !value.is_string() => {
                expected = format!("{expected}, found {}", kind(value));
            }
            _ => {}
        }
        (format!("expected {expected}"), form)
    } else if refusal == "invalid socket address syntax" {
        let what = "is not an address to listen on; host names are not looked up";
        (what.to_owned(), Some(LISTEN_FORM.to_owned()))
    } else {
        // The own message of a type, unless it repeats the value.
        let echoes = |text: &str| !text.is_empty() && refusal.contains(text);
        let is_echo = written.and_then(Value::as_str).is_some_and(echoes);
        (
            if is_echo {
                "is not a valid value"
            } else {
                refusal
            }
            .to_owned(),
            form(refusal),
        )
    };
    problems.push(problem(tree, path, what, hint));
    tree.remove(path)
}

fn missing(tree: &mut Tree, table: &[String], field: &str, problems: &mut ConfigProblems) -> bool {
    let path = [table, &[field.to_owned()]].concat();
    if !problems.covers(&path.join(".")) {
        let hint = format!("set it in the file, or as {}", variable(&path));
        problems.push(problem(tree, &path, "is missing".to_owned(), Some(hint)));
    }
    // With a stand-in, the rest of the table can be read.
    let stand_in = match field {
        "kind" => "responses",
        "base_url" => "http://missing.invalid",
        _ => return tree.remove(table),
    };
    tree.insert(&path, Value::from(stand_in), None).is_ok()
}

fn problem(tree: &Tree, path: &[String], what: String, hint: Option<String>) -> Problem {
    Problem {
        path: path.join("."),
        origin: tree.origin(path).cloned(),
        what,
        hint,
    }
}

/// Returns the setting that was probably meant: one of the same table, or one of the same name elsewhere.
fn setting_meant(path: &[String], known: &[&str]) -> Option<String> {
    let name = path.last()?;
    let elsewhere = || {
        known_settings()
            .iter()
            .find(|setting| setting.last() == Some(name))
    };
    let meant = nearest(name, known)
        .map(str::to_owned)
        .or_else(|| Some(elsewhere()?.join(".")))?;
    Some(did_you_mean(&format!("`{meant}`")))
}

/// Returns what serde expects, in the words of the configuration.
fn in_words(expected: &str) -> String {
    match expected {
        "u64" | "usize" => "a whole number, 0 or more".to_owned(),
        "u32" => format!("a whole number from 0 to {}", u32::MAX),
        "a nonzero u32" | "a nonzero usize" => "a whole number, 1 or more".to_owned(),
        "a boolean" => TRUE_OR_FALSE.to_owned(),
        "a string" | "path string" => "text".to_owned(),
        "a map" => A_TABLE.to_owned(),
        "a sequence" => A_LIST.to_owned(),
        _ if expected.starts_with("struct ") => SETTINGS.to_owned(),
        other => other.to_owned(),
    }
}

/// Reads the text of a variable, or a word, as the type that its field expects.
fn reread(text: &str, expected: &str) -> Option<Value> {
    let trimmed = text.trim();
    let json = || serde_json::from_str::<Value>(text).ok();
    match expected {
        A_WORD => (trimmed != text).then(|| Value::from(trimmed)),
        TRUE_OR_FALSE => match trimmed.to_ascii_lowercase().as_str() {
            "true" | "1" => Some(Value::from(true)),
            "false" | "0" => Some(Value::from(false)),
            _ => None,
        },
        A_LIST => json().filter(Value::is_array),
        A_TABLE => json().filter(Value::is_object),
        _ if expected.starts_with("a whole number") => trimmed
            .replace('_', "")
            .parse::<u64>()
            .ok()
            .map(Value::from),
        _ => None,
    }
}

/// Returns a hint how to write the thing that a type's own message names.
fn form(text: &str) -> Option<String> {
    let forms = [
        ("duration", "write it with its unit, such as \"30s\""),
        (
            A_RATE,
            "write it like \"10/m\" or \"20/s burst 100\"; write less than one a second as a number a minute",
        ),
    ];
    forms
        .iter()
        .find(|(of, _)| text.contains(of))
        .map(|(_, form)| (*form).to_owned())
}

//! Names of settings: in a file, in the environment, and misspelt ones.

use std::sync::LazyLock;

use serde::Deserialize;
use serde_json::json;

use super::Config;

/// Prefix of the variables of settings.
pub(super) const PREFIX: &str = "THREADKEEPER_";
/// Suffix of a setting that names a file with the value.
pub(super) const FILE_SUFFIX: &str = "_file";
/// Placeholder for the name of an upstream, an assistant or a key.
pub(super) const ANY_NAME: &str = "<name>";

/// Returns the paths of all settings.
pub(super) fn known_settings() -> &'static [Vec<String>] {
    static KNOWN: LazyLock<Vec<Vec<String>>> = LazyLock::new(|| settings_below(Vec::new()));
    &KNOWN
}

/// Returns the paths of the settings below a path. serde lists the fields of a struct when it refuses an
/// unknown field.
fn settings_below(path: Vec<String>) -> Vec<Vec<String>> {
    let probe = path
        .iter()
        .rev()
        .fold(json!({ "": null }), |inner, key| json!({ key: inner }));
    let refusal = Config::deserialize(&probe)
        .err()
        .map_or_else(String::new, |error| error.to_string());
    let names = if refusal.starts_with("unknown field") {
        names_expected(&refusal)
    } else if refusal.contains(", expected struct ") {
        vec![ANY_NAME]
    } else {
        return vec![path];
    };
    let below = |name: &str| settings_below([path.as_slice(), &[name.to_owned()]].concat());
    names.into_iter().flat_map(below).collect()
}

/// Returns the names that serde would take, from its refusal of an unknown one.
pub(super) fn names_expected(refusal: &str) -> Vec<&str> {
    let list = refusal
        .rsplit_once("`, expected ")
        .map_or("", |(_, list)| list);
    list.split('`').skip(1).step_by(2).collect()
}

/// Returns the variable for the setting at `path`.
pub(super) fn variable(path: &[impl AsRef<str>]) -> String {
    let levels: Vec<String> = path
        .iter()
        .map(|level| level.as_ref().to_ascii_uppercase())
        .collect();
    format!("{PREFIX}{}", levels.join("__"))
}

pub(super) fn did_you_mean(name: &str) -> String {
    format!("did you mean {name}?")
}

/// Returns the known name that was probably meant.
pub(super) fn nearest<'a>(written: &str, known: &[&'a str]) -> Option<&'a str> {
    let written = written.to_ascii_lowercase().replace('-', "_");
    let (distance, best) = known
        .iter()
        .map(|name| {
            (
                strsim::osa_distance(&written, &name.replace('-', "_")),
                *name,
            )
        })
        .min_by_key(|(distance, _)| *distance)?;
    if distance <= (written.len() / 3).max(1) {
        return Some(best);
    }
    let related = |name: &&&str| {
        written.len().min(name.len()) >= 3
            && (name.starts_with(&*written)
                || written.starts_with(**name)
                || name.ends_with(&format!("_{written}")))
    };
    known.iter().find(related).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_found_and_far_ones_are_not() {
        let known = [
            "listen",
            "max_connections",
            "max_body_bytes",
            "timeout",
            "api_key",
        ];
        for (written, meant) in [
            ("lissten", Some("listen")),
            ("max-connections", Some("max_connections")),
            ("MAX_CONNECTIONS", Some("max_connections")),
            ("apikey", Some("api_key")),
            ("key", Some("api_key")),
            ("time", Some("timeout")),
            ("colour", None),
        ] {
            assert_eq!(nearest(written, &known), meant, "{written}");
        }
        assert_eq!(nearest("x", &[]), None);
    }

    #[test]
    fn all_settings_are_known_and_every_struct_refuses_other_fields() {
        let known: Vec<String> = known_settings().iter().map(|path| path.join(".")).collect();
        for setting in [
            "sessions.ttl",
            "sessions.ttl_from",
            "server.cors_origins",
            "limits.user_messages",
            "auth.stored_keys",
            "auth.jwt.audience",
            "auth.keys.<name>.scope",
            "upstreams.<name>.headers",
            "assistants.<name>.parameters",
        ] {
            assert!(known.iter().any(|known| known == setting), "{setting}");
        }
        // A struct that takes any field would look like one setting.
        for path in known_settings() {
            assert!(
                path.len() > 1 && path.last().is_some_and(|last| last != ANY_NAME),
                "{path:?}"
            );
        }
    }
}

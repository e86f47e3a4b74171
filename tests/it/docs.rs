//! Checks the documents: links have a target, every setting has a line in the reference, and
//! every page is in the table of contents.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Returns every Markdown file of the project, except for build products.
fn pages() -> Vec<PathBuf> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                found.push(path);
            }
        }
    }
    let mut found: Vec<_> = fs::read_dir(root())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect();
    for folder in ["docs", ".github"] {
        if root().join(folder).is_dir() {
            walk(&root().join(folder), &mut found);
        }
    }
    found.sort();
    found
}

/// Returns the lines of a page without its code blocks, and with blanked code spans.
fn prose(text: &str) -> Vec<String> {
    let mut in_code = false;
    let mut lines = Vec::new();
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        } else if !in_code {
            lines.push(line.split('`').step_by(2).collect::<Vec<_>>().join("code"));
        }
    }
    lines
}

/// Returns the targets of a page's links.
fn links(text: &str) -> Vec<String> {
    let lines = prose(text);
    let targets = lines
        .iter()
        .flat_map(|line| line.match_indices("](").map(|(at, _)| &line[at + 2..]));
    targets
        .map(|rest| rest.split(')').next().unwrap_or_default().to_owned())
        .collect()
}

/// Returns the anchors of a page's headings, as code forges and mdBook make them.
fn anchors(text: &str) -> HashSet<String> {
    let mut in_code = false;
    let mut found = HashSet::new();
    for line in text.lines() {
        if line.starts_with("```") {
            in_code = !in_code;
        }
        let title = line.trim_start_matches('#');
        if in_code || title.len() == line.len() || !title.starts_with(' ') {
            continue;
        }
        let kept = title
            .trim()
            .chars()
            .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
        found.insert(kept.collect::<String>().to_lowercase().replace(' ', "-"));
    }
    found
}

#[test]
fn links_between_documents_lead_to_files_and_headings() {
    let mut broken = Vec::new();
    for page in pages() {
        let text = fs::read_to_string(&page).unwrap();
        for link in links(&text) {
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = if file.is_empty() {
                page.clone()
            } else {
                page.parent().unwrap().join(file)
            };
            let told = format!("{} -> {link}", page.strip_prefix(root()).unwrap().display());
            let Ok(target) = target.canonicalize() else {
                broken.push(told);
                continue;
            };
            let docs = root().join("docs").canonicalize().unwrap();
            if page.canonicalize().unwrap().starts_with(&docs) && !target.starts_with(&docs) {
                broken.push(format!(
                    "{told} (the site of docs/ has no such page: name the file instead)"
                ));
            }
            let is_missing = || !anchors(&fs::read_to_string(&target).unwrap()).contains(anchor);
            if !anchor.is_empty() && is_missing() {
                broken.push(format!("{told} (no such heading)"));
            }
        }
    }
    assert!(
        broken.is_empty(),
        "links without a target:\n{}",
        broken.join("\n")
    );
}

#[test]
fn every_page_is_in_the_table_of_contents() {
    let docs = root().join("docs");
    let listed: HashSet<_> = links(&fs::read_to_string(docs.join("SUMMARY.md")).unwrap())
        .into_iter()
        .collect();
    for page in pages() {
        if let Ok(name) = page.strip_prefix(&docs) {
            let name = name.to_str().unwrap().replace('\\', "/");
            assert!(
                name == "SUMMARY.md" || listed.contains(&name),
                "docs/SUMMARY.md does not list {name}"
            );
        }
    }
}

#[test]
fn documents_stay_short() {
    for page in pages() {
        let name = page
            .strip_prefix(root())
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned();
        let most = match name.as_str() {
            "README.md" => 150,
            "ARCHITECTURE.md" => 200,
            _ => 300,
        };
        let lines = fs::read_to_string(&page).unwrap().lines().count();
        assert!(
            lines <= most,
            "{name} has {lines} lines; the limit is {most}: move a question to its own page"
        );
    }
}

#[test]
fn every_status_and_error_code_of_runs_has_a_row() {
    let document = threadkeeper::api::openapi();
    for (schema, page) in [
        ("RunErrorCode", "docs/errors.md"),
        ("RunStatus", "docs/http-api.md"),
    ] {
        let text = fs::read_to_string(root().join(page)).unwrap();
        let rows: Vec<_> = text.lines().filter(|line| line.starts_with('|')).collect();
        let values = &document["components"]["schemas"][schema]["enum"];
        for value in values.as_array().unwrap() {
            let name = format!("`{}`", value.as_str().unwrap());
            let is_named = rows
                .iter()
                .any(|row| row.split('|').nth(1).unwrap().contains(&name));
            assert!(is_named, "{page} has no row for {name}");
        }
    }
}

/// `config/gateway.toml` names every setting, which a test in `src/config.rs` checks. So the
/// reference is compared with that file.
#[test]
fn every_setting_is_in_the_reference() {
    let reference = fs::read_to_string(root().join("docs/configuration.md")).unwrap();
    let settings = fs::read_to_string(root().join("config/gateway.toml")).unwrap();
    let mut section = String::new();
    for line in settings.lines() {
        let line = line.strip_prefix('#').unwrap_or(line);
        if let Some(name) = line
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
        {
            section = match name.split('.').collect::<Vec<_>>()[..] {
                ["upstreams", _] => "upstreams.<name>".to_owned(),
                ["assistants", _] => "assistants.<name>".to_owned(),
                ["auth", "keys", _] => "auth.keys.<name>".to_owned(),
                _ => name.to_owned(),
            };
        } else if let Some((key, _)) = line.split_once(" = ")
            && key.chars().all(|c| c.is_ascii_lowercase() || c == '_')
        {
            let full = format!("`{section}.{key}`");
            let mut rows = reference
                .lines()
                .filter(|row| row.starts_with(&format!("| `{section}.")));
            let is_named =
                rows.any(|row| row.contains(&full) || row.contains(&format!(", `{key}`")));
            assert!(is_named, "docs/configuration.md does not name {full}");
        }
    }
}

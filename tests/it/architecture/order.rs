//! The order of the files inside a module: the list in its own file says it, and no files name each other in a circle.

use std::collections::{BTreeMap, BTreeSet};

use super::code;

/// The modules whose file lists what it consists of from top to bottom.
const ORDERED: &[&str] = &["simulator", "upstream"];

#[test]
fn groups_of_a_module_name_only_what_stands_below_them() {
    let files = code();
    for module in ORDERED {
        let (_, list) = files.iter().find(|(file, _)| *file == format!("{module}.rs")).unwrap();
        let order: Vec<&str> = list
            .lines()
            .filter_map(|line| line.trim_start_matches("pub ").strip_prefix("mod ")?.strip_suffix(';'))
            .collect();
        for (file, code) in &files {
            let Some(path) = file.strip_prefix(&format!("{module}/")) else { continue };
            let group = path.split('/').next().unwrap().trim_end_matches(".rs");
            let own = order.iter().position(|name| *name == group);
            let own = own.unwrap_or_else(|| panic!("{file}: {module}.rs does not list {group}"));
            for target in references(&module_of(file), without_tests(code), &files) {
                let rank = order.iter().position(|name| {
                    target == format!("{module}::{name}")
                        || target.starts_with(&format!("{module}::{name}::"))
                });
                assert!(
                    rank.is_none_or(|rank| rank >= own),
                    "{file} names {target}, which {module}.rs lists above it"
                );
                assert_ne!(target, *module, "{file} names {module}.rs, which stands above it");
            }
        }
    }
}

#[test]
fn files_of_a_module_form_no_circle() {
    let files = code();
    let within = |name: &str| ORDERED.iter().any(|module| name.split("::").next() == Some(module));
    let mut graph: BTreeMap<String, BTreeSet<String>> = files
        .iter()
        .map(|(file, code)| (module_of(file), references(&module_of(file), without_tests(code), &files)))
        .filter(|(name, _)| within(name))
        .collect();
    // Takes away what names nothing that is left, until nothing changes. What stays is a circle, or leads to one.
    loop {
        let left: BTreeSet<String> = graph.keys().cloned().collect();
        graph.retain(|_, targets| targets.iter().any(|target| left.contains(target)));
        if graph.len() == left.len() {
            break;
        }
    }
    let circles: Vec<_> = graph
        .iter()
        .map(|(name, targets)| {
            let on: Vec<_> = targets.iter().filter(|target| graph.contains_key(*target)).collect();
            format!("{name} -> {on:?}")
        })
        .collect();
    assert!(circles.is_empty(), "{circles:#?}");
}

/// The path of the module in a file: `store/pool.rs` -> `store::pool`.
fn module_of(file: &str) -> String {
    file.trim_end_matches(".rs").replace('/', "::")
}

/// Tests may name what stands above.
fn without_tests(code: &str) -> &str {
    code.split("#[cfg(test)]\nmod tests {").next().unwrap()
}

/// The files that the code of the module `own` names, but for itself.
fn references(own: &str, code: &str, files: &[(String, String)]) -> BTreeSet<String> {
    let modules: BTreeSet<String> = files.iter().map(|(file, _)| module_of(file)).collect();
    paths(code)
        .iter()
        .filter_map(|path| {
            let parent = own.rsplit_once("::").map_or("", |(parent, _)| parent);
            let full = match path.split_first()? {
                (&"crate", rest) => rest.join("::"),
                (&"super", rest) => format!("{parent}::{}", rest.join("::")),
                (&"self", rest) => format!("{own}::{}", rest.join("::")),
                (child, _) if modules.contains(&format!("{own}::{child}")) => {
                    format!("{own}::{}", path.join("::"))
                }
                _ => return None,
            };
            // The longest beginning of the path that is a file.
            let full = full.trim_matches(':');
            let ends = full.match_indices("::").map(|(at, _)| at).chain([full.len()]);
            ends.map(|end| &full[..end]).filter(|name| modules.contains(*name)).last().map(str::to_owned)
        })
        .filter(|target| target != own)
        .collect()
}

/// All paths of two or more parts in the code, with groups in braces spelled out.
fn paths(code: &str) -> Vec<Vec<&str>> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut all = Vec::new();
    let mut rest = code;
    while let Some(at) = rest.find("::") {
        let begin = rest[..at].rfind(|c| !is_word(c)).map_or(0, |before| before + 1);
        // `pub(in crate::simulator)` says who may name an item, and names nothing.
        let is_visibility = rest[..begin].ends_with("pub(in ");
        let (mut prefix, mut text) = (vec![&rest[begin..at]], &rest[at + 2..]);
        loop {
            let end = text.find(|c| !is_word(c)).unwrap_or(text.len());
            if end > 0 {
                prefix.push(&text[..end]);
            }
            text = &text[end..];
            match text.strip_prefix("::") {
                Some(more) => text = more,
                None => break,
            }
        }
        if let Some(group) = text.strip_prefix('{') {
            let (inside, after) = to_closing_brace(group);
            for part in split_at_commas(inside) {
                let inner = paths(part);
                if inner.is_empty() {
                    let word = part.split_whitespace().next().unwrap_or_default();
                    all.push([prefix.clone(), vec![&part[..word.len()]]].concat());
                }
                all.extend(inner.into_iter().map(|path| [prefix.clone(), path].concat()));
            }
            text = after;
        } else if !is_visibility {
            all.push(prefix);
        }
        rest = text;
    }
    all
}

fn to_closing_brace(text: &str) -> (&str, &str) {
    let mut depth = 1;
    for (at, c) in text.char_indices() {
        depth += i32::from(c == '{') - i32::from(c == '}');
        if depth == 0 {
            return (&text[..at], &text[at + 1..]);
        }
    }
    (text, "")
}

fn split_at_commas(text: &str) -> Vec<&str> {
    let mut depth = 0;
    let parts = text.split(move |c| {
        depth += i32::from(c == '{') - i32::from(c == '}');
        c == ',' && depth == 0
    });
    parts.map(str::trim).filter(|part| !part.is_empty()).collect()
}

#[test]
fn paths_are_read_from_code() {
    let code = "use crate::a::{b, c::{D, self}};\npub(in crate::a) fn x() { super::y::z(1) }";
    let expected = vec![
        vec!["crate", "a", "b"],
        vec!["crate", "a", "c", "D"],
        vec!["crate", "a", "c", "self"],
        vec!["super", "y", "z"],
    ];
    assert_eq!(paths(code), expected);
}

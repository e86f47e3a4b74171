//! The rules between modules, as a test: who may name what.

mod tree;

use std::fs;
use std::path::{Path, PathBuf};

use tree::Tree;

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

/// Each source file with its path below `src`, `/` between folders, and its code without comments.
fn code() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    sources(&root)
        .into_iter()
        .map(|path| {
            let name = path
                .strip_prefix(&root)
                .unwrap()
                .to_str()
                .unwrap()
                .replace('\\', "/");
            let text = fs::read_to_string(&path).unwrap();
            let code = text
                .lines()
                .filter(|line| !line.trim_start().starts_with("//"))
                .collect::<Vec<_>>()
                .join("\n");
            (name, code)
        })
        .collect()
}

/// The module that a file belongs to: `store/postgres.rs` -> `store`.
fn module(file: &str) -> &str {
    file.split('/').next().unwrap().trim_end_matches(".rs")
}

#[test]
fn libraries_are_used_only_in_allowed_modules() {
    let allowed: &[(&str, &[&str])] = &[
        // What it logs goes by its name.
        ("sqlx::", &["store", "telemetry.rs"]),
        (
            "reqwest::",
            &["upstream/client", "upstream/report", "auth/jwks"],
        ),
        ("jsonwebtoken::", &["auth/"]),
        ("axum::", &["api", "server.rs", "simulator", "app.rs"]),
        ("utoipa::", &["api", "domain", "export_import.rs"]),
        ("clap::", &["main.rs", "cli.rs", "simulator/config.rs"]),
        ("tikv_jemallocator::", &["main.rs"]),
    ];
    for (file, code) in code() {
        for (library, places) in allowed {
            let fits =
                places.iter().any(|place| file.starts_with(place)) || !code.contains(library);
            assert!(fits, "{file} names {library}: only {places:?} may");
        }
    }
}

#[test]
fn module_dependencies_point_one_way() {
    /// Top to bottom: a module uses only what stands to its right.
    const ORDER: &[&str] = &[
        "main",
        "cli",
        "app",
        "dev",
        "health",
        "api",
        "server",
        "telemetry",
        "lifecycle",
        "runs",
        "auth",
        "error",
        "locks",
        "upstream",
        "export_import",
        "store",
        "simulator",
        "config",
        "wording",
        "domain",
        "testing",
    ];
    let tree = Tree::read();
    for (file, code) in code() {
        assert!(
            !code.contains("crate::{"),
            "{file}: one `use crate::…` for each module, so that this test can read it"
        );
        let from = module(&file);
        if !["main", "cli", "dev", "lib", "simulator"].contains(&from) {
            let uses = ["crate::simulator", "threadkeeper::simulator"]
                .iter()
                .any(|path| code.contains(path));
            assert!(
                !uses,
                "{file}: the gateway does not know the simulator; only the commands do"
            );
        }
        if from == "simulator" {
            let uses_gateway = code
                .match_indices("crate::")
                .any(|(at, _)| !code[at..].starts_with("crate::simulator"));
            assert!(
                !uses_gateway,
                "{file}: the simulator knows nothing of the gateway"
            );
        }
    }
    tree.assert_top_order(ORDER);
}

/// The rooms of `runs/` stand in an order as the top modules do.
#[test]
fn rooms_of_runs_point_one_way() {
    const ORDER: &[&str] = &[
        "service",
        "replica",
        "execution",
        "reconcile",
        "redaction",
        "context",
        "registry",
        "log",
        "notifications",
        "breaker",
        "recovery_budget",
        "backoff",
    ];
    let tree = Tree::read();
    tree.assert_order("runs", ORDER);
}

/// So do the files of modules that list them from top to bottom.
#[test]
fn files_of_module_use_only_those_listed_below() {
    let tree = Tree::read();
    for module in ["simulator", "upstream"] {
        let list = code()
            .into_iter()
            .find(|(file, _)| *file == format!("{module}.rs"))
            .unwrap()
            .1;
        let order: Vec<&str> = list
            .lines()
            .filter_map(|line| {
                line.trim_start_matches("pub ")
                    .strip_prefix("mod ")?
                    .strip_suffix(';')
            })
            .collect();
        tree.assert_order(module, &order);
    }
}

/// Files do not import each other in a circle. What a file only passes on (`pub use`) is no import of it.
#[test]
fn files_form_no_import_circles() {
    let tree = Tree::read();
    let circles: Vec<_> = tree
        .circles()
        .iter()
        .map(|circle| tree.way_around(circle).join(" -> "))
        .collect();
    assert!(
        circles.is_empty(),
        "these files import each other: {circles:#?}"
    );
}

/// Statements are whole: nothing is glued together where they stand, and each that is defined is in its file's list.
#[test]
fn sql_statements_are_whole_and_listed() {
    for (file, code) in code()
        .into_iter()
        .filter(|(file, _)| file.starts_with("store"))
    {
        for word in [
            "macro_rules!",
            "concat!",
            "format!(\"SELECT",
            "QueryBuilder",
        ] {
            assert!(!code.contains(word), "{file}: {word}");
        }
        let defined = code
            .split("\nstatic ")
            .skip(1)
            .filter_map(|rest| rest.split_once(": Statement ="));
        for (name, _) in defined {
            let listed = code
                .split_once("STATEMENTS: &[&Statement]")
                .map_or("", |(_, list)| list);
            let listed = listed.split_once("];").map_or("", |(list, _)| list);
            assert!(
                listed.contains(&format!("&{name},"))
                    || listed.contains(&format!("&{name}]"))
                    || listed.ends_with(&format!("&{name}")),
                "{file}: {name} is not in STATEMENTS"
            );
        }
    }
}

/// A binary that does not know a migration goes by what it says of older ones.
#[test]
fn migrations_declare_compatible_binaries() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations");
    for engine in ["postgres", "sqlite"] {
        for entry in fs::read_dir(root.join(engine)).unwrap() {
            let path = entry.unwrap().path();
            let number: u32 = path.file_name().unwrap().to_str().unwrap()[..4]
                .parse()
                .unwrap();
            let text = fs::read_to_string(&path).unwrap();
            let says = format!(
                "INSERT INTO schema_versions (version, compatible_since) VALUES ({number}, "
            );
            assert!(
                text.contains(&says),
                "{}: `{says}…)` is missing",
                path.display()
            );
        }
    }
}

#[test]
fn migrations_match_for_both_stores() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations");
    let names = |backend: &str| {
        let mut names: Vec<_> = fs::read_dir(root.join(backend))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names("postgres"), names("sqlite"));
}

//! The rules between modules, as a test: who may name what.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};

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
            let name = path.strip_prefix(&root).unwrap().to_str().unwrap().replace('\\', "/");
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
fn libraries_are_named_where_they_belong() {
    let allowed: &[(&str, &[&str])] = &[
        // What it logs goes by its name.
        ("sqlx::", &["store", "telemetry.rs"]),
        ("reqwest::", &["upstream/client", "upstream/report", "auth/jwks"]),
        ("jsonwebtoken::", &["auth/"]),
        ("axum::", &["api", "server.rs", "simulator", "app.rs"]),
        ("utoipa::", &["api", "domain", "records.rs"]),
        ("clap::", &["main.rs", "cli.rs", "simulator/config.rs"]),
        ("tikv_jemallocator::", &["main.rs"]),
    ];
    for (file, code) in code() {
        for (library, places) in allowed {
            let fits = places.iter().any(|place| file.starts_with(place)) || !code.contains(library);
            assert!(fits, "{file} names {library}: only {places:?} may");
        }
    }
}

#[test]
fn dependencies_point_one_way() {
    /// Top to bottom: a module uses only what stands to its right.
    const ORDER: &[&str] = &[
        "main", "cli", "app", "dev", "health", "api", "server", "telemetry", "life", "runs", "auth", "error",
        "locks", "upstream", "records", "store", "simulator", "config", "wording", "domain", "testing",
    ];
    let tree = Tree::read();
    for (file, code) in code() {
        assert!(
            !code.contains("crate::{"),
            "{file}: one `use crate::…` for each module, so that this test can read it"
        );
        if module(&file) == "simulator" {
            let uses_gateway =
                code.match_indices("crate::").any(|(at, _)| !code[at..].starts_with("crate::simulator"));
            assert!(!uses_gateway, "{file}: the simulator knows nothing of the gateway");
        }
    }
    tree.assert_order(&[], ORDER);
}

/// The rooms of `runs/` stand in an order as the top modules do.
#[test]
fn rooms_of_runs_point_one_way() {
    const ORDER: &[&str] = &[
        "service", "replica", "execution", "reconcile", "redaction", "context", "registry", "log",
        "notifications", "breaker", "backoff",
    ];
    let tree = Tree::read();
    tree.assert_order(&["runs"], ORDER);
    for file in tree.files.iter().filter(|file| file.name.starts_with("runs/")) {
        assert!(!tree.imports(file).contains("runs.rs"), "{}: nothing in runs/ uses the facade", file.name);
    }
}

/// Files do not import each other in a circle. What a file only passes on (`pub use`) is no import of it.
#[test]
fn files_do_not_import_each_other_in_a_circle() {
    /// The circles that are left, each with the files (or the folder) that it is within, and what it hangs on.
    const LEFT: &[(&[&str], &str)] = &[
        (
            &["store.rs", "store/"],
            "store.rs holds `Store` and lists the statements of the topics, which use it",
        ),
        (&["api.rs", "api/"], "api.rs holds the routes and the state that their handlers reach"),
        (&["upstream/assistants.rs", "upstream/assistants/"], "the adapter, and the files of its methods"),
        (&["upstream/responses.rs", "upstream/responses/"], "the adapter, and the files of its methods"),
        (&["config.rs", "config/"], "the loader, its checks, and the problems that name the usual file"),
        (&["simulator.rs", "simulator/"], "all of it uses the hub"),
        (&["domain/life.rs", "domain/records.rs"], "`Deletion` and `Lifecycle`"),
    ];
    let tree = Tree::read();
    for circle in tree.circles() {
        let is_left = LEFT
            .iter()
            .any(|(places, _)| circle.iter().all(|file| places.iter().any(|place| file.starts_with(place))));
        assert!(is_left, "these files import each other: {}", tree.way_around(&circle).join(" -> "));
    }
}

/// A file and the paths that it names.
struct Source {
    name: String,
    /// Where its module stands in the crate.
    module: Vec<String>,
    /// From the crate's root.
    named: Vec<Vec<String>>,
    /// The same of its tests. They may close a circle, but not point upwards.
    named_in_tests: Vec<Vec<String>>,
    /// What it only passes on, by its last name.
    passed_on: BTreeMap<String, Vec<String>>,
}

/// All files, and what they name.
struct Tree {
    files: Vec<Source>,
}

impl Tree {
    fn read() -> Self {
        let code: Vec<_> = code()
            .into_iter()
            .filter(|(name, _)| name != "lib.rs")
            .map(|(name, code)| {
                let module: Vec<_> = name.trim_end_matches(".rs").split('/').map(str::to_owned).collect();
                (name, module, code)
            })
            .collect();
        let modules: BTreeSet<Vec<String>> = code.iter().map(|(_, module, _)| module.clone()).collect();
        let files = code.into_iter().map(|(name, module, code)| {
            let is_test = name.ends_with("/tests.rs");
            let begin = if is_test { Some(0) } else { code.find("\n#[cfg(test)]\nmod tests {") };
            let (code, tests) = code.split_at(begin.unwrap_or(code.len()));
            let (named, passed_on) = names(&modules, &module, code);
            let (named_in_tests, _) = names(&modules, &module, tests);
            Source { name, module, named, named_in_tests, passed_on }
        });
        Self { files: files.collect() }
    }

    /// The file that a path leads to: the one that defines it, not one that passes it on.
    fn file(&self, path: &[String]) -> Option<&Source> {
        let at = (1..=path.len()).rev().find_map(|length| {
            let file = self.files.iter().find(|file| file.module == path[..length])?;
            Some((file, path.get(length)))
        });
        let (file, name) = at?;
        let passed_on = name.and_then(|name| file.passed_on.get(name)).filter(|to| *to != path);
        passed_on.map_or(Some(file), |to| self.file(to).or(Some(file)))
    }

    fn imports(&self, file: &Source) -> BTreeSet<&str> {
        let to = file.named.iter().filter_map(|path| self.file(path));
        to.map(|to| to.name.as_str()).filter(|to| *to != file.name).collect()
    }

    /// Modules below `above` use only what stands to their right in the order.
    fn assert_order(&self, above: &[&str], order: &[&str]) {
        let rank = |name: &String| order.iter().position(|other| other == name);
        for file in &self.files {
            let Some(own) = below(above, &file.module) else { continue };
            let own = rank(own).unwrap_or_else(|| panic!("{}: add its module to the order", file.name));
            for path in file.named.iter().chain(&file.named_in_tests).chain(file.passed_on.values()) {
                let to = below(above, path).and_then(rank);
                assert!(
                    to.is_none_or(|to| to >= own),
                    "{} uses {}, which stands above it",
                    file.name,
                    path.join("::")
                );
            }
        }
    }

    fn graph(&self) -> BTreeMap<&str, BTreeSet<&str>> {
        self.files.iter().map(|file| (file.name.as_str(), self.imports(file))).collect()
    }

    /// Sets of files each of which leads to all others of its set.
    fn circles(&self) -> Vec<BTreeSet<&str>> {
        let graph = self.graph();
        let reached: BTreeMap<&str, BTreeSet<&str>> = graph
            .keys()
            .map(|from| {
                let (mut reached, mut next) = (BTreeSet::new(), vec![*from]);
                while let Some(file) = next.pop() {
                    next.extend(graph[file].iter().filter(|to| reached.insert(**to)));
                }
                (*from, reached)
            })
            .collect();
        let mut circles: Vec<BTreeSet<&str>> = Vec::new();
        for (file, to) in &reached {
            if to.contains(file) && !circles.iter().any(|circle| circle.contains(file)) {
                circles.push(to.iter().copied().filter(|other| reached[other].contains(file)).collect());
            }
        }
        circles
    }

    /// A shortest way from the first file of a circle back to it.
    fn way_around<'a>(&'a self, circle: &BTreeSet<&'a str>) -> Vec<&'a str> {
        let graph = self.graph();
        let first = *circle.first().unwrap();
        let mut ways = VecDeque::from([vec![first]]);
        while let Some(way) = ways.pop_front() {
            for to in &graph[way.last().unwrap()] {
                let longer = [&way[..], &[*to]].concat();
                if *to == first {
                    return longer;
                }
                if circle.contains(to) && !way.contains(to) {
                    ways.push_back(longer);
                }
            }
        }
        unreachable!("a circle leads back to each of its files")
    }
}

/// What code names, and what it only passes on, from the crate's root.
fn names(
    modules: &BTreeSet<Vec<String>>,
    module: &[String],
    code: &str,
) -> (Vec<Vec<String>>, BTreeMap<String, Vec<String>>) {
    let (uses, rest) = split_uses(code);
    let from_root = |path: &[String]| from_root(modules, module, path);
    let mut named: Vec<_> = paths_in(&rest).iter().filter_map(|path| from_root(path)).collect();
    let mut passed_on = BTreeMap::new();
    for (is_public, tree) in uses {
        for path in expand(&tree).iter().filter_map(|path| from_root(path)) {
            if is_public {
                passed_on.insert(path.last().unwrap().clone(), path);
            } else {
                named.push(path);
            }
        }
    }
    (named, passed_on)
}

/// The first name of a path below this module, if it is below it.
fn below<'a>(above: &[&str], path: &'a [String]) -> Option<&'a String> {
    path.iter().zip(above).all(|(name, above)| name == above).then(|| path.get(above.len())).flatten()
}

/// Each `use` of a file, with whether it passes on what it names, and the code without them.
fn split_uses(code: &str) -> (Vec<(bool, String)>, String) {
    let (mut uses, mut rest) = (Vec::new(), String::new());
    let mut lines = code.lines();
    while let Some(line) = lines.next() {
        let trimmed = line.trim_start();
        let Some((before, first)) = trimmed
            .split_once("use ")
            .filter(|(before, _)| before.is_empty() || (before.starts_with("pub") && before.ends_with(' ')))
        else {
            rest.push_str(line);
            rest.push('\n');
            continue;
        };
        let mut tree = first.to_owned();
        while !tree.contains(';') {
            tree.push_str(lines.next().expect("a `use` ends"));
        }
        uses.push((!before.is_empty(), tree.split(';').next().unwrap().to_owned()));
    }
    (uses, rest)
}

/// The paths of a `use`: `a::{b, c::d}` -> `a::b`, `a::c::d`.
fn expand(tree: &str) -> Vec<Vec<String>> {
    let tree = tree.split(" as ").next().filter(|_| !tree.contains('{')).unwrap_or(tree).trim();
    let Some((before, list)) = tree.split_once('{') else {
        return vec![tree.split("::").map(str::to_owned).collect()];
    };
    let list = list.trim_end().strip_suffix('}').unwrap_or(list);
    let (mut parts, mut depth) = (vec![String::new()], 0);
    for letter in list.chars() {
        match letter {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(String::new());
                continue;
            }
            _ => {}
        }
        parts.last_mut().unwrap().push(letter);
    }
    let before: Vec<String> = before.split("::").map(|name| name.trim().to_owned()).collect();
    let before = &before[..before.len() - 1];
    let parts = parts.iter().filter(|part| !part.trim().is_empty()).flat_map(|part| expand(part));
    parts
        .map(|part| {
            let rest = if part == ["self"] { &[][..] } else { &part[..] };
            [before, rest].concat()
        })
        .collect()
}

/// The paths that stand in code: names with `::` between them. `pub(in …)` names a path and uses nothing.
fn paths_in(code: &str) -> Vec<Vec<String>> {
    let mut pieces = code.split("pub(in ");
    let first = pieces.next().unwrap();
    let code = pieces.fold(first.to_owned(), |code, piece| code + piece.split_once(')').unwrap().1);
    code.split(|letter: char| !(letter.is_alphanumeric() || letter == '_' || letter == ':'))
        .filter(|path| path.contains("::"))
        .map(|path| path.split("::").filter(|name| !name.is_empty()).map(str::to_owned).collect())
        .filter(|path: &Vec<String>| !path.is_empty())
        .collect()
}

/// A path as it is from the crate's root. `None`: it leads elsewhere, or to something within the file.
fn from_root(modules: &BTreeSet<Vec<String>>, here: &[String], path: &[String]) -> Option<Vec<String>> {
    let supers = path.iter().take_while(|name| *name == "super").count();
    let (above, rest) = match path.first()?.as_str() {
        "crate" | "threadkeeper" => (&[][..], &path[1..]),
        "self" => (here, &path[1..]),
        "super" => (here.get(..here.len().checked_sub(supers)?)?, &path[supers..]),
        child if modules.contains(&[here, &[child.to_owned()]].concat()) => (here, path),
        _ => return None,
    };
    Some([above, rest].concat()).filter(|path| !path.is_empty())
}

/// Statements are whole: nothing is glued together where they stand, and each that is defined is in its file's list.
#[test]
fn statements_are_whole_and_listed() {
    for (file, code) in code().into_iter().filter(|(file, _)| file.starts_with("store")) {
        for word in ["macro_rules!", "concat!", "format!(\"SELECT", "QueryBuilder"] {
            assert!(!code.contains(word), "{file}: {word}");
        }
        let defined = code.split("\nstatic ").skip(1).filter_map(|rest| rest.split_once(": Statement ="));
        for (name, _) in defined {
            let listed = code.split_once("STATEMENTS: &[&Statement]").map_or("", |(_, list)| list);
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
fn migrations_say_which_binaries_they_serve() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations");
    for engine in ["postgres", "sqlite"] {
        for entry in fs::read_dir(root.join(engine)).unwrap() {
            let path = entry.unwrap().path();
            let number: u32 = path.file_name().unwrap().to_str().unwrap()[..4].parse().unwrap();
            let text = fs::read_to_string(&path).unwrap();
            let says = format!("INSERT INTO schema_versions (version, compatible_since) VALUES ({number}, ");
            assert!(text.contains(&says), "{}: `{says}…)` is missing", path.display());
        }
    }
}

#[test]
fn migrations_are_the_same_for_both_stores() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations");
    let names = |backend: &str| {
        let mut names: Vec<_> =
            fs::read_dir(root.join(backend)).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names("postgres"), names("sqlite"));
}

//! The files of the library and the files that each of them uses, read from their text.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::code;

/// A file and the paths that it names.
pub(super) struct Source {
    name: String,
    /// The path of its module within the crate.
    module: Vec<String>,
    /// Named paths, from the crate's root.
    named: Vec<Vec<String>>,
    /// Paths that its tests name. They may be part of a cycle, but must not point upwards.
    named_in_tests: Vec<Vec<String>>,
    /// Paths that it only re-exports, by their last name.
    passed_on: BTreeMap<String, Vec<String>>,
}

/// All files, and the paths that they name.
pub(super) struct Tree {
    files: Vec<Source>,
}

impl Tree {
    pub(super) fn read() -> Self {
        let code: Vec<_> = code()
            .into_iter()
            .filter(|(name, _)| name != "lib.rs")
            .map(|(name, code)| {
                let module: Vec<_> = name
                    .trim_end_matches(".rs")
                    .split('/')
                    .map(str::to_owned)
                    .collect();
                (name, module, code)
            })
            .collect();
        let modules: BTreeSet<Vec<String>> =
            code.iter().map(|(_, module, _)| module.clone()).collect();
        let files = code.into_iter().map(|(name, module, code)| {
            let is_test = name.ends_with("/tests.rs");
            let begin = if is_test {
                Some(0)
            } else {
                code.find("\n#[cfg(test)]\nmod tests {")
            };
            let (code, tests) = code.split_at(begin.unwrap_or(code.len()));
            let (named, passed_on) = names(&modules, &module, code);
            let (named_in_tests, _) = names(&modules, &module, tests);
            Source {
                name,
                module,
                named,
                named_in_tests,
                passed_on,
            }
        });
        Self {
            files: files.collect(),
        }
    }

    /// Returns the file that defines a path, not one that re-exports it.
    fn file(&self, path: &[String]) -> Option<&Source> {
        let at = (1..=path.len()).rev().find_map(|length| {
            let file = self
                .files
                .iter()
                .find(|file| file.module == path[..length])?;
            Some((file, path.get(length)))
        });
        let (file, name) = at?;
        let passed_on = name
            .and_then(|name| file.passed_on.get(name))
            .filter(|to| *to != path);
        passed_on.map_or(Some(file), |to| self.file(to).or(Some(file)))
    }

    fn imports(&self, file: &Source) -> BTreeSet<&str> {
        let to = file.named.iter().filter_map(|path| self.file(path));
        to.map(|to| to.name.as_str())
            .filter(|to| *to != file.name)
            .collect()
    }

    /// Asserts that top modules use only modules to their right in the order.
    pub(super) fn assert_top_order(&self, order: &[&str]) {
        self.assert_below(&[], order);
    }

    /// Asserts the same for the modules in a module, and that none of them uses the module's own
    /// file, which is above them.
    pub(super) fn assert_order(&self, module: &str, order: &[&str]) {
        self.assert_below(&[module], order);
        let hub = format!("{module}.rs");
        for file in self
            .files
            .iter()
            .filter(|file| file.name.starts_with(&format!("{module}/")))
        {
            assert!(
                !self.imports(file).contains(hub.as_str()),
                "{} uses {hub}, which stands above it",
                file.name
            );
        }
    }

    fn assert_below(&self, above: &[&str], order: &[&str]) {
        let rank = |name: &String| order.iter().position(|other| other == name);
        for file in &self.files {
            let Some(own) = below(above, &file.module) else {
                continue;
            };
            let own =
                rank(own).unwrap_or_else(|| panic!("{}: add its module to the order", file.name));
            for path in file
                .named
                .iter()
                .chain(&file.named_in_tests)
                .chain(file.passed_on.values())
            {
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
        self.files
            .iter()
            .map(|file| (file.name.as_str(), self.imports(file)))
            .collect()
    }

    /// Returns sets of files, in each of which every file leads to all others.
    pub(super) fn circles(&self) -> Vec<BTreeSet<&str>> {
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
                circles.push(
                    to.iter()
                        .copied()
                        .filter(|other| reached[other].contains(file))
                        .collect(),
                );
            }
        }
        circles
    }

    /// Returns a shortest way from the first file of a cycle back to it.
    pub(super) fn way_around<'a>(&'a self, circle: &BTreeSet<&'a str>) -> Vec<&'a str> {
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
        unreachable!("each file of a cycle leads back to itself")
    }
}

/// Returns the paths that code names, and those that it only re-exports, from the crate's root.
fn names(
    modules: &BTreeSet<Vec<String>>,
    module: &[String],
    code: &str,
) -> (Vec<Vec<String>>, BTreeMap<String, Vec<String>>) {
    let (uses, rest) = split_uses(code);
    let from_root = |path: &[String]| from_root(modules, module, path);
    let mut named: Vec<_> = paths_in(&rest)
        .iter()
        .filter_map(|path| from_root(path))
        .collect();
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

/// Returns the first name of a path below this module, if the path is below it.
fn below<'a>(above: &[&str], path: &'a [String]) -> Option<&'a String> {
    path.iter()
        .zip(above)
        .all(|(name, above)| name == above)
        .then(|| path.get(above.len()))
        .flatten()
}

/// Returns each `use` of a file, with whether it re-exports, and the code without them.
fn split_uses(code: &str) -> (Vec<(bool, String)>, String) {
    let (mut uses, mut rest) = (Vec::new(), String::new());
    let mut lines = code.lines();
    while let Some(line) = lines.next() {
        let trimmed = line.trim_start();
        let Some((before, first)) = trimmed.split_once("use ").filter(|(before, _)| {
            before.is_empty() || (before.starts_with("pub") && before.ends_with(' '))
        }) else {
            rest.push_str(line);
            rest.push('\n');
            continue;
        };
        let mut tree = first.to_owned();
        while !tree.contains(';') {
            tree.push_str(lines.next().expect("a `use` ends"));
        }
        uses.push((
            !before.is_empty(),
            tree.split(';').next().unwrap().to_owned(),
        ));
    }
    (uses, rest)
}

/// Returns the paths of a `use`: `a::{b, c::d}` -> `a::b`, `a::c::d`.
fn expand(tree: &str) -> Vec<Vec<String>> {
    let tree = tree
        .split(" as ")
        .next()
        .filter(|_| !tree.contains('{'))
        .unwrap_or(tree)
        .trim();
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
    let before: Vec<String> = before
        .split("::")
        .map(|name| name.trim().to_owned())
        .collect();
    let before = &before[..before.len() - 1];
    let parts = parts
        .iter()
        .filter(|part| !part.trim().is_empty())
        .flat_map(|part| expand(part));
    parts
        .map(|part| {
            let rest = if part == ["self"] { &[][..] } else { &part[..] };
            [before, rest].concat()
        })
        .collect()
}

/// Returns the paths in code: names with `::` between them. The path in `pub(in …)` does not
/// count.
fn paths_in(code: &str) -> Vec<Vec<String>> {
    let mut pieces = code.split("pub(in ");
    let first = pieces.next().unwrap();
    let code = pieces.fold(first.to_owned(), |code, piece| {
        code + piece.split_once(')').unwrap().1
    });
    code.split(|letter: char| !(letter.is_alphanumeric() || letter == '_' || letter == ':'))
        .filter(|path| path.contains("::"))
        .map(|path| {
            path.split("::")
                .filter(|name| !name.is_empty())
                .map(str::to_owned)
                .collect()
        })
        .filter(|path: &Vec<String>| !path.is_empty())
        .collect()
}

/// Returns a path from the crate's root, or `None` if it leads elsewhere or to something within
/// the file.
fn from_root(
    modules: &BTreeSet<Vec<String>>,
    here: &[String],
    path: &[String],
) -> Option<Vec<String>> {
    let supers = path.iter().take_while(|name| *name == "super").count();
    let (above, rest) = match path.first()?.as_str() {
        "crate" | "threadkeeper" => (&[][..], &path[1..]),
        "self" => (here, &path[1..]),
        "super" => (
            here.get(..here.len().checked_sub(supers)?)?,
            &path[supers..],
        ),
        child if modules.contains(&[here, &[child.to_owned()]].concat()) => (here, path),
        _ => return None,
    };
    Some([above, rest].concat()).filter(|path| !path.is_empty())
}

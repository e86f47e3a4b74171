//! Checks the container image without building it: its Dockerfile has what a build of the binary needs.

use std::fs;
use std::path::{Component, Path, PathBuf};

use toml::de::DeTable;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(file: &str) -> String {
    fs::read_to_string(root().join(file)).unwrap()
}

fn table(text: &str) -> DeTable<'_> {
    DeTable::parse(text).unwrap().into_inner()
}

/// Returns the instructions of the stage that compiles, each on one line and without comments.
fn build_stage() -> Vec<String> {
    let text = read("Dockerfile").replace("\\\n", " ");
    let instructions = text
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'));
    let mut stages = 0;
    let first = instructions.take_while(|line| {
        stages += usize::from(line.starts_with("FROM "));
        stages < 2
    });
    first.map(str::to_owned).collect()
}

/// Returns the files and folders that the instructions copy into the image.
fn copied(instructions: &[String]) -> Vec<&str> {
    let mut found = Vec::new();
    for copy in instructions
        .iter()
        .filter_map(|line| line.strip_prefix("COPY "))
    {
        let (sources, _target) = copy.rsplit_once(' ').unwrap();
        found.extend(sources.split(' '));
    }
    found
}

/// Returns the arguments of each call of a macro in a text, if they begin with a literal.
fn literals<'a>(text: &'a str, name: &str) -> Vec<&'a str> {
    let call = format!("{name}!(\"");
    let calls = text.match_indices(&call);
    calls
        .map(|(at, call)| text[at + call.len()..].split('"').next().unwrap())
        .collect()
}

/// Returns a path without `..`.
fn resolved(path: &Path) -> PathBuf {
    let mut whole = PathBuf::new();
    for part in path.components() {
        if part == Component::ParentDir {
            whole.pop();
        } else {
            whole.push(part);
        }
    }
    whole
}

/// Returns the files and folders outside of a source file that the compiler reads for it, except in its tests.
fn embedded(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(embedded(&path));
            continue;
        }
        if path.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let code = text.split("\n#[cfg(test)]\nmod tests {").next().unwrap();
        for name in ["include_str", "include_bytes", "include"] {
            let files = literals(code, name);
            found.extend(files.iter().map(|file| resolved(&folder.join(file))));
        }
        let folders = literals(code, "migrate");
        found.extend(folders.iter().map(|folder| root().join(folder)));
    }
    found
}

#[test]
fn image_is_built_with_rust_of_toolchain_file() {
    let text = read("rust-toolchain.toml");
    let toolchain = table(&text);
    let channel = toolchain["toolchain"].get_ref()["channel"]
        .get_ref()
        .as_str()
        .unwrap();
    let (release, _patch) = channel.rsplit_once('.').unwrap();
    let from = &build_stage()[0];
    assert!(
        from.starts_with(&format!("FROM rust:{release}-")),
        "rust-toolchain.toml says {channel}, the Dockerfile says {from}"
    );
}

#[test]
fn image_build_copies_all_that_is_compiled() {
    let stage = build_stage();
    let copied = copied(&stage);
    let mut needed = embedded(&root().join("src"));
    assert!(!needed.is_empty(), "the library embeds its migrations");
    needed.extend(["Cargo.toml", "Cargo.lock", "build.rs", "src"].map(|name| root().join(name)));
    for path in needed {
        let path = path.strip_prefix(root()).unwrap();
        assert!(
            copied.iter().any(|copied| path.starts_with(copied)),
            "a build reads {}, but the Dockerfile copies {copied:?} alone",
            path.display()
        );
    }
}

/// A file that `.dockerignore` holds back ends the build. One that it lets through in vain makes the context
/// bigger.
#[test]
fn dockerignore_lets_through_what_dockerfile_copies() {
    let stage = build_stage();
    let mut copied = copied(&stage);
    let ignore = read(".dockerignore");
    let mut lines = ignore.lines();
    assert_eq!(lines.next(), Some("*"));
    let mut open: Vec<_> = lines.map(|line| line.strip_prefix('!').unwrap()).collect();
    copied.sort_unstable();
    open.sort_unstable();
    assert_eq!(open, copied);
}

/// The layer of the dependencies is made before the sources are copied. `cargo build` wants a file for each
/// library and binary that `Cargo.toml` names. It wants none for tests and benchmarks.
#[test]
fn layer_of_dependencies_has_placeholder_for_each_target() {
    let stage = build_stage();
    let before = stage
        .iter()
        .take_while(|line| !line.starts_with("COPY src "));
    let commands: Vec<_> = before.filter(|line| line.starts_with("RUN ")).collect();
    let text = read("Cargo.toml");
    let manifest = table(&text);
    let library = manifest["lib"].get_ref().get("path");
    let binaries = manifest["bin"].get_ref().as_array().unwrap();
    let mut paths = vec![library.map_or("src/lib.rs", |path| path.get_ref().as_str().unwrap())];
    paths.extend(
        binaries
            .iter()
            .map(|bin| bin.get_ref()["path"].get_ref().as_str().unwrap()),
    );
    for path in paths {
        assert!(
            commands.iter().any(|command| command.contains(path)),
            "no command before `COPY src` makes {path}, which Cargo.toml names"
        );
    }
}

//! Collects the problems of a configuration.

use super::problem::{ConfigProblems, Problem};
use super::tree::Tree;

/// Collects problems with their origin.
pub(super) struct Checker<'a> {
    pub(super) tree: &'a Tree,
    pub(super) problems: &'a mut ConfigProblems,
}

impl Checker<'_> {
    /// An empty `hint` is none. Nothing happens if the setting has a problem already.
    pub(super) fn report(&mut self, path: &[&str], what: impl Into<String>, hint: &str) {
        if self.is_broken(path) {
            return;
        }
        self.problems.push(Problem {
            path: path.join("."),
            origin: self.tree.origin(path).cloned(),
            what: what.into(),
            hint: (!hint.is_empty()).then(|| hint.to_owned()),
        });
    }

    /// The setting has a problem already, so its value means nothing.
    pub(super) fn is_broken(&self, path: &[&str]) -> bool {
        self.problems.covers(&path.join("."))
    }

    /// Part of the setting has a problem, so the setting was left out.
    pub(super) fn is_broken_inside(&self, path: &[&str]) -> bool {
        let inside = format!("{}.", path.join("."));
        self.problems
            .iter()
            .any(|problem| problem.path.starts_with(&inside))
    }
}

//! Problems of a configuration, with hints how to mend them. No text repeats a value, because it may be a
//! secret.

use std::fmt;
use std::sync::Arc;

/// The file that is read if none is named and it exists.
pub const USUAL_FILE: &str = "/etc/threadkeeper/gateway.toml";

/// The place at which a setting was written.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Origin {
    /// `line` counts from 1.
    File { name: Arc<str>, line: usize },
    /// An environment variable, by name.
    Variable(String),
    /// A command line flag, with its dashes.
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { name, line } => write!(f, "{name}, line {line}"),
            Self::Variable(name) => f.write_str(name),
            Self::Flag(name) => f.write_str(name),
        }
    }
}

/// One problem of a configuration.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Problem {
    /// Path of the setting, such as `store.url`. Empty if the problem is not about one setting.
    pub path: String,
    /// Place of the setting. `None` if it was not written: it is missing, or its default is wrong.
    pub origin: Option<Origin>,
    /// The rule that was broken.
    pub what: String,
    /// How to mend it.
    pub hint: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.path.as_str(), &self.origin) {
            ("", None) => {}
            ("", Some(origin)) => write!(f, "{origin}: ")?,
            (path, None) => write!(f, "{path}: ")?,
            (path, Some(origin)) => write!(f, "{path} ({origin}): ")?,
        }
        f.write_str(&self.what)?;
        match &self.hint {
            Some(hint) => write!(f, "; {hint}"),
            None => Ok(()),
        }
    }
}

/// All problems of a configuration. Never empty when returned as an error.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ConfigProblems {
    all: Vec<Problem>,
    /// No file was read, which may be the cause of the problems.
    pub(super) without_file: bool,
}

impl ConfigProblems {
    pub fn iter(&self) -> std::slice::Iter<'_, Problem> {
        self.all.iter()
    }

    pub fn len(&self) -> usize {
        self.all.len()
    }

    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Adds a problem. Drops it if its line has a syntax error, because it follows from that.
    pub(super) fn push(&mut self, problem: Problem) {
        let follows = |known: &Problem| {
            known.path.is_empty()
                && !problem.path.is_empty()
                && matches!(known.origin, Some(Origin::File { .. }))
                && known.origin == problem.origin
        };
        if !self.all.iter().any(follows) {
            self.all.push(problem);
        }
    }

    /// Returns whether `path`, or a table above it, has a problem already. Problems that follow from it are
    /// not reported.
    pub(super) fn covers(&self, path: &str) -> bool {
        self.all.iter().any(|known| {
            !known.path.is_empty()
                && path
                    .strip_prefix(known.path.as_str())
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        })
    }

    pub(super) fn retain(&mut self, keep: impl FnMut(&Problem) -> bool) {
        self.all.retain(keep);
    }

    pub(super) fn into_result<T>(self, value: T) -> Result<T, Self> {
        if self.is_empty() {
            Ok(value)
        } else {
            Err(self)
        }
    }
}

impl<'a> IntoIterator for &'a ConfigProblems {
    type Item = &'a Problem;
    type IntoIter = std::slice::Iter<'a, Problem>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl fmt::Display for ConfigProblems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.len() {
            1 => f.write_str("1 problem in the configuration:")?,
            n => write!(f, "{n} problems in the configuration:")?,
        }
        for problem in self {
            write!(f, "\n  - {problem}")?;
        }
        if self.without_file {
            write!(
                f,
                "\nNo file was read: name one with --config or THREADKEEPER_CONFIG, or put it at {USUAL_FILE}."
            )?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigProblems {}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(path: &str, origin: Option<Origin>) -> Problem {
        Problem {
            path: path.to_owned(),
            origin,
            what: "is wrong".to_owned(),
            hint: Some("mend it".to_owned()),
        }
    }

    #[test]
    fn each_problem_is_one_line_with_its_origin() {
        let mut problems = ConfigProblems::default();
        problems.push(problem(
            "store.url",
            Some(Origin::File {
                name: "a.toml".into(),
                line: 3,
            }),
        ));
        problems.push(problem(
            "runs.timeout",
            Some(Origin::Variable("THREADKEEPER_RUNS__TIMEOUT".to_owned())),
        ));
        problems.push(problem("", None));
        assert_eq!(
            problems.to_string(),
            "3 problems in the configuration:\n  \
             - store.url (a.toml, line 3): is wrong; mend it\n  \
             - runs.timeout (THREADKEEPER_RUNS__TIMEOUT): is wrong; mend it\n  \
             - is wrong; mend it"
        );
    }

    #[test]
    fn a_problem_covers_what_lies_below_it_and_nothing_else() {
        let mut problems = ConfigProblems::default();
        problems.push(problem("", None));
        problems.push(problem("store", None));
        assert!(problems.covers("store"));
        assert!(problems.covers("store.url"));
        assert!(!problems.covers("stores"));
        assert!(!problems.covers("runs"));
    }
}

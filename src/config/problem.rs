//! What is wrong with a configuration, told so that it can be mended. No text here repeats a value: it may be a
//! secret.

use std::fmt;
use std::sync::Arc;

/// The file that is read where none is named, if it is there.
pub const USUAL_FILE: &str = "/etc/threadkeeper/gateway.toml";

/// Where a setting was written.
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

/// One thing to mend.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Problem {
    /// The setting's path, `store.url`. Empty where the problem is not about one setting.
    pub path: String,
    /// `None` where nothing was written: a setting is missing, or a default is at fault.
    pub origin: Option<Origin>,
    /// What is wrong.
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

/// Everything that is wrong with a configuration. Never empty when returned as an error.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ConfigProblems {
    all: Vec<Problem>,
    /// No file was read: perhaps that is what is wrong.
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

    /// What is said of a line that could not be read to its end follows from that, and is dropped.
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

    /// A problem with `path`, or with a table above it, is known already: what follows from it is not worth a line.
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

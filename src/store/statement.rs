//! Named SQL statements with named parameters.
//!
//! A text is SQL with two additions. `:name` is a parameter, which is sent as `$1`, `$2`, … in the
//! order of first use. `{word …}` is one of the [`words`](super::words): text that the engines
//! spell differently, or that many statements share. `threadkeeper sql` prints the statements as
//! an engine gets them.

use std::sync::OnceLock;

use super::engine::Engine;
use super::functions::with_function_names;
use super::words::expand;

/// A named statement.
#[derive(Debug)]
pub(super) struct Statement {
    pub(super) name: &'static str,
    postgres: &'static str,
    sqlite: &'static str,
    /// The pieces that replace `{0}`, `{1}`, … in the text, for statements that differ in a
    /// direction or a condition.
    variant: &'static [&'static str],
    /// Whether a connection keeps its plan.
    pub(super) is_prepared: bool,
    sent: [OnceLock<Sent>; 2],
}

/// A statement as an engine gets it.
#[derive(Debug)]
pub struct Sent {
    pub name: &'static str,
    /// The SQL text, with the name in front as a comment.
    pub sql: String,
    /// The names of `$1`, `$2`, ….
    pub parameters: Vec<String>,
}

impl Statement {
    /// Makes a statement for Postgres only.
    pub(super) const fn on_postgres(name: &'static str, text: &'static str) -> Self {
        Self::build(name, text, "", &[], true)
    }

    /// Makes a statement for SQLite only.
    pub(super) const fn on_sqlite(name: &'static str, text: &'static str) -> Self {
        Self::build(name, "", text, &[], true)
    }

    /// Makes a statement with one text for both engines.
    pub(super) const fn new(name: &'static str, text: &'static str) -> Self {
        Self::build(name, text, text, &[], true)
    }

    /// Makes a statement with a text for each engine. On SQLite it may be a script, whose last
    /// statement gives the rows.
    pub(super) const fn for_each_engine(
        name: &'static str,
        postgres: &'static str,
        sqlite: &'static str,
    ) -> Self {
        Self::build(name, postgres, sqlite, &[], true)
    }

    /// Makes a statement of a text that several statements share, with these pieces in the place
    /// of `{0}`, `{1}`, ….
    pub(super) const fn variant(
        name: &'static str,
        text: &'static str,
        pieces: &'static [&'static str],
    ) -> Self {
        Self::build(name, text, text, pieces, true)
    }

    /// Makes a variant that is planned each time: a plan that was made while a table was small
    /// would read all of it. On Postgres it is executed in a transaction, its own if none is open.
    pub(super) const fn unprepared(
        name: &'static str,
        text: &'static str,
        pieces: &'static [&'static str],
    ) -> Self {
        Self::build(name, text, text, pieces, false)
    }

    const fn build(
        name: &'static str,
        postgres: &'static str,
        sqlite: &'static str,
        variant: &'static [&'static str],
        is_prepared: bool,
    ) -> Self {
        Self {
            name,
            postgres,
            sqlite,
            variant,
            is_prepared,
            sent: [OnceLock::new(), OnceLock::new()],
        }
    }

    /// Returns whether the statement has a text for this engine.
    pub(super) fn is_for(&self, engine: Engine) -> bool {
        !self.text(engine).is_empty()
    }

    fn text(&self, engine: Engine) -> &'static str {
        match engine {
            Engine::Postgres => self.postgres,
            Engine::Sqlite => self.sqlite,
        }
    }

    /// Returns the statement as this engine gets it. Its name comes first, as a comment, so that
    /// the server's statistics show it.
    pub(super) fn sent(&self, engine: Engine) -> &Sent {
        self.sent[engine as usize].get_or_init(|| {
            let mut text = self.text(engine).to_owned();
            for (place, piece) in self.variant.iter().enumerate() {
                text = text.replace(&format!("{{{place}}}"), piece);
            }
            number_parameters(
                self.name,
                expand(engine, &with_function_names(&text)).trim(),
            )
        })
    }
}

/// Replaces each `:name` by `$n`. `::` is a cast, and quoted texts stay as they are.
fn number_parameters(name: &'static str, text: &str) -> Sent {
    let mut sql = format!("/* {name} */ ");
    let mut parameters: Vec<String> = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find([':', '\'']) {
        let (before, from) = rest.split_at(at);
        sql.push_str(before);
        let taken = if let Some(quoted) = from.strip_prefix('\'') {
            let end = quoted.find('\'').map_or(from.len(), |end| end + 2);
            sql.push_str(&from[..end]);
            end
        } else if from.starts_with("::") {
            sql.push_str("::");
            2
        } else {
            let is_of_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
            let end = from[1..]
                .find(|c| !is_of_name(c))
                .map_or(from.len(), |end| end + 1);
            let parameter = &from[1..end];
            let known = parameters.iter().position(|it| it == parameter);
            let number = known.unwrap_or_else(|| {
                parameters.push(parameter.to_owned());
                parameters.len() - 1
            });
            sql.push('$');
            sql.push_str(&(number + 1).to_string());
            end
        };
        rest = &from[taken..];
    }
    sql.push_str(rest);
    Sent {
        name,
        sql,
        parameters,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_numbered_by_first_use() {
        static FIND: Statement = Statement::variant(
            "runs.find",
            "SELECT ':x'::text, :b {0} :a -- :c, it's\nFROM runs WHERE a = :b",
            &["<"],
        );
        for engine in [Engine::Postgres, Engine::Sqlite] {
            let sent = FIND.sent(engine);
            assert_eq!(
                sent.sql,
                "/* runs.find */ SELECT ':x'::text, $1 < $2\nFROM runs WHERE a = $1"
            );
            assert_eq!(sent.parameters, ["b", "a"]);
        }
    }
}

//! Functions in the database: the steps that every turn takes, each for many runs in one call.
//!
//! A function is a text of ours that Postgres keeps compiled. Its name ends in a hash of that text, so another version of this
//! program has functions of its own beside these: `migrate` adds those that are missing and replaces none. Parameters and
//! results are of built-in types, and it does what its caller may do.

use std::sync::OnceLock;

use sha2::{Digest, Sha256};

use super::engine::Engine;
use super::rows::hex;
use super::words::expand;

/// A function.
#[derive(Debug)]
pub(super) struct Function {
    pub(super) name: &'static str,
    parameters: &'static str,
    columns: &'static str,
    body: &'static str,
    made: OnceLock<Made>,
}

#[derive(Debug)]
struct Made {
    name: String,
    /// What follows the name where it is made.
    text: String,
}

/// All of them.
pub(super) static FUNCTIONS: &[&Function] = &[&ADMIT, &BIND, &FINISH];

static ADMIT: Function = Function::new(
    "admit",
    "items jsonb, alone boolean",
    "outcome text, seen_upstream text, queue_position bigint, {thread_types}, {run_types}",
    include_str!("sql/admit.function.sql"),
);

static BIND: Function = Function::new(
    "bind",
    "items jsonb, alone boolean",
    "outcome text",
    include_str!("sql/bind.function.sql"),
);

static FINISH: Function = Function::new(
    "finish",
    "items jsonb, alone boolean",
    "outcome text, queue_depth bigint, active_status text, {thread_types}, {run_types}, {message_types}",
    include_str!("sql/finish.function.sql"),
);

impl Function {
    const fn new(
        name: &'static str,
        parameters: &'static str,
        columns: &'static str,
        body: &'static str,
    ) -> Self {
        Self {
            name,
            parameters,
            columns,
            body,
            made: OnceLock::new(),
        }
    }

    /// Its name in the database.
    pub(super) fn name_in_database(&self) -> &str {
        &self.made().name
    }

    /// The statement that makes it in a schema. The schema's name is spelled as in SQL.
    pub(super) fn definition(&self, schema: &str) -> String {
        let Made { name, text } = self.made();
        // Whatever the caller's search path says, it means the tables beside it.
        let path = format!("SET search_path = {schema}, pg_temp");
        format!(
            "CREATE FUNCTION {schema}.{name}{}",
            text.replacen("SET search_path", &path, 1)
        )
    }

    fn made(&self) -> &Made {
        self.made.get_or_init(|| {
            let text = format!(
                "({}) RETURNS TABLE ({}) LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path AS $function$\n\
                 #variable_conflict use_column\n{}\n$function$",
                self.parameters,
                expand(Engine::Postgres, self.columns),
                expand(Engine::Postgres, self.body).trim()
            );
            let name = format!("threadkeeper_{}_{}", self.name, hex(&Sha256::digest(&text)[..6]));
            Made { name, text }
        })
    }
}

/// The statements that make the functions of ours that a statement calls, in the schema `public`.
pub fn functions_called_by(sql: &str) -> impl Iterator<Item = String> {
    FUNCTIONS
        .iter()
        .filter(move |function| sql.contains(function.name_in_database()))
        .map(|function| function.definition("public"))
}

/// Puts the names that functions have in the database in the place of `{function …}`.
pub(super) fn with_function_names(text: &str) -> String {
    FUNCTIONS.iter().fold(text.to_owned(), |text, function| {
        let word = format!("{{function {}}}", function.name);
        if text.contains(&word) {
            text.replace(&word, function.name_in_database())
        } else {
            text
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_text_has_another_name() {
        let of = |body| {
            Function::new("f", "a int", "b int", body)
                .made()
                .name
                .clone()
        };
        assert_eq!(of("BEGIN END"), of("BEGIN END"));
        assert_ne!(of("BEGIN END"), of("BEGIN NULL; END"));
        assert!(of("BEGIN END").starts_with("threadkeeper_f_") && of("BEGIN END").len() < 63);
    }

    #[test]
    fn definition_names_its_schema_twice() {
        let text = ADMIT.definition("\"a b\"");
        assert!(
            text.starts_with("CREATE FUNCTION \"a b\".threadkeeper_admit_"),
            "{text}"
        );
        assert!(
            text.contains(" SET search_path = \"a b\", pg_temp AS $function$"),
            "{text}"
        );
    }
}

//! Postgres functions: the steps that every run takes. One call of a function takes many runs.
//!
//! Postgres keeps a function compiled. The name of a function ends in a hash of its text, so each
//! version of this program has its own functions beside those of others. `migrate` adds the
//! missing ones and replaces none. Parameters and results have built-in types. A function runs
//! with the rights of its caller.

use std::sync::OnceLock;

use sha2::{Digest, Sha256};

use super::engine::Engine;
use super::rows::hex;
use super::words::expand;

/// A Postgres function of the gateway.
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
    /// The rest of the `CREATE FUNCTION` statement, after the name.
    text: String,
}

/// All functions that this version calls.
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

    /// Returns its name in the database.
    pub(super) fn name_in_database(&self) -> &str {
        &self.made().name
    }

    /// Returns the statement that creates it in a schema. `schema` is quoted as in SQL.
    pub(super) fn definition(&self, schema: &str) -> String {
        let Made { name, text } = self.made();
        // The function uses the tables of its own schema, whatever the caller's search path is.
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

/// Returns the statements that create, in the schema `public`, the functions that `sql` calls.
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

//! Sending statements over a borrowed connection.

use std::future::Future;

use serde::Serialize;
use sqlx::FromRow;
use sqlx::migrate::{MigrateError, Migrator};
use sqlx::postgres::PgRow;
use sqlx::sqlite::SqliteRow;
use tokio::time::{Instant, timeout_at};
use tracing::Instrument;

use super::engine::Engine;
use super::errors::{Failed, passes};
use super::params::{Params, params};
use super::pool::{Connection, Raw, State};
use super::statement::Statement;

/// A row type that both engines can decode.
pub(super) trait AnyRow:
    for<'r> FromRow<'r, PgRow> + for<'r> FromRow<'r, SqliteRow> + Send + Unpin
{
}

impl<T> AnyRow for T where
    T: for<'r> FromRow<'r, PgRow> + for<'r> FromRow<'r, SqliteRow> + Send + Unpin
{
}

impl Connection {
    pub(super) fn engine(&self) -> Engine {
        match self.raw() {
            Raw::Postgres(_) => Engine::Postgres,
            Raw::Sqlite(_) => Engine::Sqlite,
        }
    }

    /// Returns all rows of a statement.
    pub(super) async fn all<T: AnyRow>(
        &mut self,
        statement: &'static Statement,
        params: Params<'_>,
    ) -> Result<Vec<T>, Failed> {
        let sent = statement.sent(self.engine());
        let keeps = statement.is_prepared;
        let needs_transaction = self.needs_transaction(statement);
        if needs_transaction {
            self.begin().await?;
        }
        let (raw, deadline) = self.begin_call();
        let rows = async {
            match raw {
                Raw::Postgres(c) => {
                    let query = sqlx::query_as_with(
                        &*sent.sql,
                        params.for_postgres(sent).map_err(sqlx::Error::Encode)?,
                    );
                    query.persistent(keeps).fetch_all(c).await
                }
                Raw::Sqlite(c) => {
                    let query = sqlx::query_as_with(
                        &*sent.sql,
                        params.for_sqlite(sent).map_err(sqlx::Error::Encode)?,
                    );
                    query.persistent(keeps).fetch_all(c).await
                }
            }
        };
        let rows = within(deadline, statement.name, rows).await;
        let rows = self.end_call(statement.name, rows)?;
        if needs_transaction {
            self.commit().await?;
        }
        Ok(rows)
    }

    /// Executes a step for many items: a function on Postgres, a script on SQLite. Returns one row
    /// for each item, in their order.
    pub(super) async fn batch<T: AnyRow>(
        &mut self,
        step: &'static Statement,
        items: &[impl Serialize],
        alone: bool,
    ) -> Result<Vec<T>, Failed> {
        let failed = |cause| Failed {
            statement: step.name,
            cause,
        };
        let text = serde_json::to_string(items)
            .map_err(|error| failed(sqlx::Error::Encode(error.into())))?;
        let rows = self
            .all(step, params().json_text("items", text).set("alone", alone))
            .await?;
        if rows.len() != items.len() {
            return Err(failed(sqlx::Error::Decode(
                "the number of rows differs from the number of items".into(),
            )));
        }
        Ok(rows)
    }

    /// Returns the row of a statement that gives at most one.
    pub(super) async fn optional<T: AnyRow>(
        &mut self,
        statement: &'static Statement,
        params: Params<'_>,
    ) -> Result<Option<T>, Failed> {
        Ok(self.all(statement, params).await?.pop())
    }

    /// Returns the row of a statement that gives exactly one.
    pub(super) async fn one<T: AnyRow>(
        &mut self,
        statement: &'static Statement,
        params: Params<'_>,
    ) -> Result<T, Failed> {
        let row = self.optional(statement, params).await?;
        row.ok_or(Failed {
            statement: statement.name,
            cause: sqlx::Error::RowNotFound,
        })
    }

    /// Executes a statement that gives no rows. Returns how many rows it changed; for a script,
    /// the sum of its statements.
    pub(super) async fn execute(
        &mut self,
        statement: &'static Statement,
        params: Params<'_>,
    ) -> Result<u64, Failed> {
        let sent = statement.sent(self.engine());
        let keeps = statement.is_prepared;
        let needs_transaction = self.needs_transaction(statement);
        if needs_transaction {
            self.begin().await?;
        }
        let (raw, deadline) = self.begin_call();
        let done = async {
            match raw {
                Raw::Postgres(c) => {
                    let query = sqlx::query_with(
                        &*sent.sql,
                        params.for_postgres(sent).map_err(sqlx::Error::Encode)?,
                    );
                    Ok(query.persistent(keeps).execute(c).await?.rows_affected())
                }
                Raw::Sqlite(c) => {
                    let query = sqlx::query_with(
                        &*sent.sql,
                        params.for_sqlite(sent).map_err(sqlx::Error::Encode)?,
                    );
                    Ok(query.persistent(keeps).execute(c).await?.rows_affected())
                }
            }
        };
        let done = within(deadline, statement.name, done).await;
        let done = self.end_call(statement.name, done)?;
        if needs_transaction {
            self.commit().await?;
        }
        Ok(done)
    }

    /// Returns whether the statement must run in a transaction of its own.
    ///
    /// The driver sends an unnamed statement in two calls: the first prepares it, the second
    /// executes it. A pooler that lends a server connection for one transaction may lend another
    /// one to the second call. That connection has no such statement, or one of another client. A
    /// transaction keeps both calls on one connection.
    fn needs_transaction(&self, statement: &Statement) -> bool {
        !statement.is_prepared && self.depth == 0 && self.engine() == Engine::Postgres
    }

    /// Begins a transaction that may write, or a savepoint in the open one. Changes that are not
    /// committed leave nothing behind, also if the connection is dropped.
    pub(super) async fn begin(&mut self) -> Result<(), Failed> {
        let text = match (self.depth, self.engine()) {
            (0, Engine::Postgres) => "BEGIN",
            (0, Engine::Sqlite) => "BEGIN IMMEDIATE",
            (_, _) => "SAVEPOINT attempt",
        };
        self.control("begin", text).await?;
        self.depth += 1;
        Ok(())
    }

    /// Commits the savepoint or transaction that was begun last.
    pub(super) async fn commit(&mut self) -> Result<(), Failed> {
        let text = if self.depth > 1 {
            "RELEASE SAVEPOINT attempt"
        } else {
            "COMMIT"
        };
        self.control("commit", text).await?;
        self.depth = self.depth.saturating_sub(1);
        Ok(())
    }

    /// Begins a transaction for a script. On Postgres the step is one statement, which needs none.
    pub(super) async fn begin_script(&mut self) -> Result<(), Failed> {
        if self.engine() == Engine::Sqlite {
            self.begin().await
        } else {
            Ok(())
        }
    }

    /// Commits what [`begin_script`](Self::begin_script) began.
    pub(super) async fn commit_script(&mut self) -> Result<(), Failed> {
        if self.engine() == Engine::Sqlite {
            self.commit().await
        } else {
            Ok(())
        }
    }

    /// Rolls the savepoint or transaction back that was begun last.
    pub(super) async fn roll_back(&mut self) -> Result<(), Failed> {
        let text = if self.depth > 1 {
            "ROLLBACK TO SAVEPOINT attempt; RELEASE SAVEPOINT attempt"
        } else {
            "ROLLBACK"
        };
        self.control("rollback", text).await?;
        self.depth = self.depth.saturating_sub(1);
        Ok(())
    }

    /// Brings the schema of a SQLite file up to date.
    pub(super) async fn migrate(&mut self, migrator: &Migrator) -> Result<(), MigrateError> {
        let (raw, _) = self.begin_call();
        if let Raw::Sqlite(c) = raw {
            migrator.run(c).await?;
        }
        self.state = State::InStep;
        Ok(())
    }

    async fn control(&mut self, name: &'static str, text: &'static str) -> Result<(), Failed> {
        let (raw, deadline) = self.begin_call();
        let done = within(deadline, name, raw.control(text)).await;
        self.end_call(name, done)
    }

    /// Ends a call and returns its result. After an error that is not a plain answer of the
    /// database, the connection is not used again.
    fn end_call<T>(
        &mut self,
        statement: &'static str,
        result: sqlx::Result<T>,
    ) -> Result<T, Failed> {
        let is_answer = match &result {
            Ok(_) => true,
            Err(sqlx::Error::Database(cause)) => !passes(&**cause),
            Err(_) => false,
        };
        self.state = if is_answer {
            State::InStep
        } else {
            State::Failed
        };
        result.map_err(|cause| {
            self.tell_health(&cause);
            Failed { statement, cause }
        })
    }
}

impl Raw {
    /// Begins or ends a transaction. Only SQLite prepares the statement: Postgres parses it as
    /// fast as it would find it.
    pub(super) async fn control(&mut self, text: &'static str) -> sqlx::Result<()> {
        match self {
            Self::Postgres(c) => sqlx::raw_sql(text).execute(c).await.map(drop),
            Self::Sqlite(c) => sqlx::query(text).execute(c).await.map(drop),
        }
    }
}

/// Runs a call with a deadline, within a span that names the statement.
async fn within<T>(
    deadline: Instant,
    statement: &'static str,
    call: impl Future<Output = sqlx::Result<T>>,
) -> sqlx::Result<T> {
    let span = tracing::debug_span!("statement", "db.query.name" = statement);
    let late = |_| Err(sqlx::Error::Io(std::io::ErrorKind::TimedOut.into()));
    timeout_at(deadline, call.instrument(span))
        .await
        .unwrap_or_else(late)
}

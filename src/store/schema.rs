//! The schema: migrating it, and deciding which schemas this binary works with.
//!
//! During a rolling upgrade old and new binaries share one database. So each migration records the
//! oldest binary that it still serves (`schema_versions`). An old binary that finds itself served
//! accepts the newer schema. `docs/database.md` says how to write a migration.

use sqlx::migrate::{MigrateError, Migrator};
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{ConnectOptions as _, Connection as _, Executor as _, FromRow};

use super::backend::Backend;
use super::engine::Engine;
use super::errors::Failed;
use super::errors::denial;
use super::functions::FUNCTIONS;
use super::params::params;
use super::pool::Connection;
use super::statement::Statement;
use super::{Store, StoreError};

static POSTGRES: Migrator = sqlx::migrate!("migrations/postgres");
static SQLITE: Migrator = sqlx::migrate!("migrations/sqlite");

/// The column `functions` counts those of [`FUNCTIONS`] that exist in the database.
static READ_VERSIONS: Statement = Statement::for_each_engine(
    "schema.read_versions",
    "SELECT m.version, m.checksum, m.success, v.compatible_since, f.functions
    FROM _sqlx_migrations m LEFT JOIN schema_versions v ON v.version = m.version, (
        SELECT count(*) AS functions FROM unnest({as text[], :functions}) AS f (name)
        WHERE to_regproc(f.name) IS NOT NULL
    ) f
    ORDER BY m.version",
    "SELECT m.version, m.checksum, m.success, v.compatible_since, 0 AS functions
    FROM _sqlx_migrations m LEFT JOIN schema_versions v ON v.version = m.version
    ORDER BY m.version",
);

/// Works with every schema that the migrator has touched.
static COUNT_MIGRATIONS: Statement = Statement::new(
    "schema.count_migrations",
    "SELECT count(*) AS migrations FROM _sqlx_migrations",
);

/// Reads the role and the schema of this connection, quoted as in SQL.
static READ_ROLE: Statement = Statement::on_postgres(
    "schema.read_role",
    "SELECT quote_ident(current_user) AS role, COALESCE(quote_ident(current_schema()), '<schema>') AS schema",
);

pub(super) static STATEMENTS: &[&Statement] = &[&READ_VERSIONS, &COUNT_MIGRATIONS, &READ_ROLE];

impl Store {
    /// Checks that the database answers and that this binary works with its schema.
    pub async fn ready(&self) -> Result<(), StoreError> {
        let mut c = self.backend.reader().await?;
        match read_versions(&mut c).await? {
            Schema::Versions(versions) if is_complete(&versions, c.engine())? => Ok(()),
            Schema::Versions(_) => Err(StoreError::Schema(
                "the schema of the database is older than this program: run `threadkeeper migrate`"
                    .to_owned(),
            )),
            Schema::Missing => Err(StoreError::Schema(
                "the database has no tables yet: run `threadkeeper migrate`".to_owned(),
            )),
            Schema::Former => Err(former_schema()),
        }
    }

    /// Brings the schema up to date. Replicas that migrate at the same time wait for each other.
    /// If nothing is to be done, it only reads, because the role may lack the right to change the
    /// schema.
    ///
    /// # Errors
    /// - [`StoreError::Schema`] if the database is newer than this program and does not serve it,
    ///   or older than every version that this program can migrate.
    /// - [`StoreError::Open`] if the role may not change the schema.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        let mut c = self.backend.writer().await?;
        let migrator = migrator(c.engine());
        match read_versions(&mut c).await? {
            Schema::Versions(versions) if is_complete(&versions, c.engine())? => return Ok(()),
            Schema::Former => return Err(former_schema()),
            Schema::Versions(_) | Schema::Missing => {}
        }
        let Backend::Postgres { direct, .. } = &*self.backend else {
            return Ok(c.migrate(migrator).await?);
        };
        match migrate_postgres(direct, migrator).await {
            Err(MigrateFailed::Migrating(error)) => match denial(&error) {
                Some(what) => Err(StoreError::Open(may_not_migrate(&mut c, &what).await)),
                None => Err(error.into()),
            },
            Err(MigrateFailed::Connecting(cause)) => Err(Failed {
                statement: "migrate",
                cause,
            }
            .into()),
            Ok(()) => Ok(()),
        }
    }
}

fn migrator(engine: Engine) -> &'static Migrator {
    match engine {
        Engine::Postgres => &POSTGRES,
        Engine::Sqlite => &SQLITE,
    }
}

enum MigrateFailed {
    Connecting(sqlx::Error),
    Migrating(MigrateError),
}

/// Runs the migrations on a connection of its own: a migration may take longer than
/// `statement_timeout`, which bounds all other statements.
async fn migrate_postgres(
    direct: &PgConnectOptions,
    migrator: &Migrator,
) -> Result<(), MigrateFailed> {
    let mut connection = direct.connect().await.map_err(MigrateFailed::Connecting)?;
    connection
        .execute("SET statement_timeout = 0")
        .await
        .map_err(MigrateFailed::Connecting)?;
    migrator
        .run(&mut connection)
        .await
        .map_err(MigrateFailed::Migrating)?;
    add_functions(&mut connection)
        .await
        .map_err(|error| MigrateFailed::Migrating(MigrateError::Execute(error)))?;
    connection.close().await.map_err(MigrateFailed::Connecting)
}

/// Adds the missing functions to the schema of the tables. Functions of other versions stay.
async fn add_functions(connection: &mut PgConnection) -> sqlx::Result<()> {
    let mut transaction = connection.begin().await?;
    // Replicas that migrate at the same time wait for each other here.
    transaction
        .execute("SELECT pg_advisory_xact_lock(hashtextextended('threadkeeper functions', 0))")
        .await?;
    let (schema,): (String,) = sqlx::query_as("SELECT quote_ident(current_schema())")
        .fetch_one(&mut *transaction)
        .await?;
    for function in FUNCTIONS {
        let (is_there,): (bool,) = sqlx::query_as("SELECT to_regproc($1) IS NOT NULL")
            .bind(format!("{schema}.{}", function.name_in_database()))
            .fetch_one(&mut *transaction)
            .await?;
        if !is_there {
            transaction
                .execute(sqlx::AssertSqlSafe(function.definition(&schema)))
                .await?;
        }
    }
    transaction.commit().await
}

/// Returns the text of an error: which right the role of this connection lacks, and how to mend
/// that. `what` is the server's own message.
async fn may_not_migrate(c: &mut Connection, what: &str) -> String {
    let names: Result<(String, String), Failed> = c.one(&READ_ROLE, params()).await;
    let (role, schema) = names.unwrap_or_else(|_| ("<role>".to_owned(), "<schema>".to_owned()));
    format!(
        "the schema of the database is not up to date, and the role {role} may not change it ({what}): run `threadkeeper \
         migrate` with the role that owns the tables, or, if there are no tables yet, GRANT CREATE ON SCHEMA {schema} TO {role}"
    )
}

/// The schema that a database has.
enum Schema {
    Missing,
    /// A schema from before version 1. No migration continues it.
    Former,
    Versions(Vec<Version>),
}

/// A migration that was applied to the database.
#[derive(FromRow)]
struct Version {
    #[sqlx(rename = "version")]
    number: i64,
    checksum: Vec<u8>,
    success: bool,
    /// The oldest schema version whose binaries work with this one.
    compatible_since: Option<i64>,
    /// The number of [`FUNCTIONS`] that exist in the database.
    functions: i64,
}

async fn read_versions(c: &mut Connection) -> Result<Schema, StoreError> {
    let functions: Vec<_> = FUNCTIONS
        .iter()
        .map(|it| Some(it.name_in_database().to_owned()))
        .collect();
    match c
        .all(&READ_VERSIONS, params().set("functions", functions))
        .await
    {
        Ok(versions) if versions.is_empty() => Ok(Schema::Missing),
        Ok(versions) => Ok(Schema::Versions(versions)),
        Err(failed) if failed.lacks_table() => {
            match c.one::<(i64,)>(&COUNT_MIGRATIONS, params()).await {
                Ok((0,)) => Ok(Schema::Missing),
                Ok(_) => Ok(Schema::Former),
                Err(failed) if failed.lacks_table() => Ok(Schema::Missing),
                Err(failed) => Err(failed.into()),
            }
        }
        Err(failed) => Err(failed.into()),
    }
}

/// Returns whether there is a schema that this binary works with, or will work with after
/// migrating it. The gateway changes nothing in a database with any other schema.
pub(super) async fn is_ours(c: &mut Connection) -> Result<bool, StoreError> {
    Ok(match read_versions(c).await? {
        Schema::Versions(versions) => is_up_to_date(&versions, migrator(c.engine())).is_ok(),
        Schema::Missing | Schema::Former => false,
    })
}

fn former_schema() -> StoreError {
    StoreError::Schema(
        "the tables of the database were made by a version before 0.2, which this version does not migrate. To keep the \
         conversations, run `threadkeeper export` with the old version and `threadkeeper import` with this one, into a new \
         database (docs/upgrading.md)"
            .to_owned(),
    )
}

/// Returns whether a database with these versions has every table and function that this binary
/// needs.
fn is_complete(versions: &[Version], engine: Engine) -> Result<bool, StoreError> {
    let has_functions = versions
        .iter()
        .all(|it| usize::try_from(it.functions) == Ok(FUNCTIONS.len()));
    Ok(is_up_to_date(versions, migrator(engine))? && (has_functions || engine == Engine::Sqlite))
}

/// Returns whether a database with these versions needs no migration. A newer schema that serves
/// this binary needs none.
fn is_up_to_date(versions: &[Version], migrator: &Migrator) -> Result<bool, StoreError> {
    let known = |version| {
        migrator
            .iter()
            .find(move |migration| migration.version == version)
    };
    let newest = migrator
        .iter()
        .map(|migration| migration.version)
        .max()
        .unwrap_or(0);
    let mut applied = 0;
    for Version {
        number: version,
        checksum,
        success,
        compatible_since,
        ..
    } in versions
    {
        match known(*version) {
            _ if !success => return Err(MigrateError::Dirty(*version).into()),
            Some(known) if *known.checksum != **checksum => {
                return Err(MigrateError::VersionMismatch(*version).into());
            }
            Some(_) => applied += 1,
            None if compatible_since.is_some_and(|since| since <= newest) => {}
            None => return Err(MigrateError::VersionMissing(*version).into()),
        }
    }
    Ok(applied == migrator.iter().count())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(versions: &[(i64, Option<i64>)]) -> Result<bool, StoreError> {
        let known = |version| SQLITE.iter().find(|migration| migration.version == version);
        let versions: Vec<Version> = versions
            .iter()
            .map(|(version, compatible_since)| Version {
                number: *version,
                checksum: known(*version).map_or_else(Vec::new, |known| known.checksum.to_vec()),
                success: true,
                compatible_since: *compatible_since,
                functions: 0,
            })
            .collect();
        is_up_to_date(&versions, &SQLITE)
    }

    fn newest() -> i64 {
        SQLITE
            .iter()
            .map(|migration| migration.version)
            .max()
            .unwrap()
    }

    #[test]
    fn schema_of_this_binary_is_up_to_date() {
        let versions: Vec<_> = (1..=newest()).map(|version| (version, Some(1))).collect();
        assert!(applied(&versions).unwrap());
        assert!(!applied(&versions[1..]).unwrap());
    }

    #[test]
    fn newer_schema_is_accepted_if_it_names_this_binary() {
        let with = |since| {
            let mut versions: Vec<_> = (1..=newest()).map(|version| (version, Some(1))).collect();
            versions.push((newest() + 1, since));
            applied(&versions)
        };
        assert!(with(Some(newest())).unwrap());
        assert!(with(Some(1)).unwrap());
        for since in [Some(newest() + 1), None] {
            let text = with(since).unwrap_err().to_string();
            assert!(text.contains("newer than this program"), "{text}");
        }
    }

    #[test]
    fn migration_in_another_form_is_refused() {
        let other = Version {
            number: 1,
            checksum: vec![1],
            success: true,
            compatible_since: Some(1),
            functions: 0,
        };
        let text = is_up_to_date(&[other], &SQLITE).unwrap_err().to_string();
        assert!(text.contains("another form"), "{text}");
    }
}

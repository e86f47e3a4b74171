//! A separate database for each test, on either backend.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use sqlx::migrate::Migrator;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor};
use tempfile::TempDir;
use threadkeeper::config::StoreConfig;
use threadkeeper::domain::Timestamp;
use threadkeeper::store::{Engine, Store, statements};
use tokio::sync::OnceCell;
use uuid::Uuid;

use super::cluster::Cluster;
use super::postgres as shared;

static MIGRATOR: Migrator = sqlx::migrate!("migrations/postgres");

/// A fresh, migrated database. Dropping the value drops the database.
pub(crate) struct TestDatabase {
    place: Place,
}

enum Place {
    /// `server` is `None` if the database belongs to a [cluster](Cluster), whose drop removes it.
    Postgres {
        server: Option<Box<PgConnectOptions>>,
        name: String,
        url: String,
    },
    Sqlite {
        folder: TempDir,
    },
}

impl TestDatabase {
    /// Makes a database on the server of `DATABASE_URL` (its role needs CREATEDB), or on the
    /// cluster of this test run.
    pub(crate) async fn postgres() -> Self {
        let url = std::env::var("DATABASE_URL")
            .ok()
            .filter(|url| url.starts_with("postgres"));
        let own = url.is_none();
        let url = url.unwrap_or_else(|| shared::url().to_owned());
        let server: PgConnectOptions = url.parse().expect("DATABASE_URL is a Postgres URL");
        let server = server.log_statements(tracing::log::LevelFilter::Trace);
        let template = template(&server, &url).await;
        let name = format!("threadkeeper_test_{}", Uuid::now_v7().simple());
        let mut connection = connect(&server).await;
        // Copying files is faster on a cluster that never syncs to disk.
        let strategy = if own { "STRATEGY FILE_COPY" } else { "" };
        connection
            .execute(AssertSqlSafe(format!(
                "CREATE DATABASE {name} TEMPLATE {template} {strategy}"
            )))
            .await
            .expect("a database can be made");
        let mut of_test = url::Url::parse(&url).expect("a connection URL is a URL");
        of_test.set_path(&name);
        Self {
            place: Place::Postgres {
                server: Some(Box::new(server)),
                name,
                url: of_test.into(),
            },
        }
    }

    /// Makes a Postgres database with the migrations up to `version` only.
    pub(crate) async fn postgres_at(migrator: &Migrator, version: i64) -> Self {
        let database = Self::postgres().await;
        database
            .execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
            .await;
        up_to(migrator, version)
            .run(&mut database.pg().await)
            .await
            .expect("the migrations apply");
        database
    }

    /// Makes a SQLite database with the migrations up to `version` only.
    pub(crate) async fn sqlite_at(migrator: &Migrator, version: i64) -> Self {
        let folder = TempDir::new_in(shared::scratch()).expect("a temporary folder");
        let database = Self {
            place: Place::Sqlite { folder },
        };
        let options: SqliteConnectOptions = database.url().parse().expect("the URL that we made");
        let mut file = options
            .create_if_missing(true)
            .connect()
            .await
            .expect("a new file opens");
        up_to(migrator, version)
            .run(&mut file)
            .await
            .expect("the migrations apply");
        database
    }

    /// Makes a database on a test's own cluster.
    pub(crate) async fn on(cluster: &Cluster) -> Self {
        let name = format!("threadkeeper_test_{}", Uuid::now_v7().simple());
        let server: PgConnectOptions = cluster
            .url("postgres")
            .parse()
            .expect("the URL that we made");
        let make = AssertSqlSafe(format!("CREATE DATABASE {name}"));
        connect(&server)
            .await
            .execute(make)
            .await
            .expect("a database can be made");
        let url = cluster.url(&name);
        let database = Self {
            place: Place::Postgres {
                server: None,
                name,
                url,
            },
        };
        migrate(&database.url()).await;
        database
    }

    /// Makes a SQLite file, in memory if there is enough of it.
    pub(crate) async fn sqlite() -> Self {
        Self::sqlite_in(&shared::scratch()).await
    }

    /// Makes a SQLite file somewhere below `folder`.
    pub(crate) async fn sqlite_in(folder: &Path) -> Self {
        let folder = TempDir::new_in(folder).expect("a temporary folder");
        let database = Self {
            place: Place::Sqlite { folder },
        };
        let store = Store::open(&database.config())
            .await
            .expect("a new file opens");
        store.migrate().await.expect("the migrations apply");
        store.close().await;
        database
    }

    /// The value of `store.url`. Other processes of this user can use it, too.
    pub(crate) fn url(&self) -> String {
        match &self.place {
            Place::Postgres { url, .. } => url.clone(),
            Place::Sqlite { folder } => {
                format!("sqlite:{}", folder.path().join("threadkeeper.db").display())
            }
        }
    }

    /// Default settings with this database's URL. The wait is long, since a busy machine must not
    /// cause refusals.
    pub(crate) fn config(&self) -> StoreConfig {
        let max_wait = Duration::from_secs(30);
        StoreConfig {
            url: Some(self.url().into()),
            max_wait,
            ..StoreConfig::default()
        }
    }

    /// Opens a store on this database. On Postgres each call acts as another replica. On SQLite
    /// only one store can be open at a time.
    pub(crate) async fn store(&self) -> Arc<Store> {
        match &self.place {
            Place::Postgres { .. } => Arc::new(
                Store::open(&self.config())
                    .await
                    .expect("the test server answers"),
            ),
            Place::Sqlite { .. } => {
                Arc::new(Store::open(&self.config()).await.expect("the file opens"))
            }
        }
    }

    /// Moves creation, use, archiving and due times of all threads back by `by`.
    pub(crate) async fn age_threads(&self, by: Duration) {
        let by = self.interval(by);
        self.execute(&format!(
            "UPDATE threads SET created_at = created_at - {by}, last_active_at = last_active_at - {by}, \
             archived_at = archived_at - {by}, due_at = due_at - {by}"
        ))
        .await;
    }

    /// Archives all current threads, as of their last use.
    pub(crate) async fn archive_threads(&self) {
        let archive = "UPDATE threads SET lifecycle = 'archived', archived_at = last_active_at \
                       WHERE lifecycle = 'current'";
        self.execute(archive).await;
    }

    /// Sets the ages of a user's threads: created `age` ago, last used `idle` ago.
    pub(crate) async fn date_threads(&self, user: &str, age: Duration, idle: Duration) {
        let (made, active) = (self.before(self.now(), age), self.before(self.now(), idle));
        let date = format!(
            "UPDATE threads SET created_at = {made}, last_active_at = {active} WHERE user_key = '{user}'"
        );
        self.execute(&date).await;
    }

    /// Returns when the janitor is due to look at the user's current thread.
    pub(crate) async fn due_at(&self, user: &str) -> Option<Timestamp> {
        let micros = self.micros("due_at");
        let due = format!(
            "SELECT COALESCE({micros}, -1) FROM threads WHERE user_key = '{user}' AND lifecycle = 'current'"
        );
        let micros = self.number(&due).await;
        (micros >= 0).then(|| chrono::DateTime::from_timestamp_micros(micros).expect("a time"))
    }

    /// Returns the time of the database's clock.
    pub(crate) async fn clock(&self) -> Timestamp {
        let micros = self
            .number(&format!("SELECT {}", self.micros(self.now())))
            .await;
        chrono::DateTime::from_timestamp_micros(micros).expect("a time")
    }

    /// SQL for a time as microseconds since 1970.
    fn micros(&self, time: &str) -> String {
        match &self.place {
            Place::Postgres { .. } => format!("(EXTRACT(epoch FROM {time}) * 1000000)::bigint"),
            Place::Sqlite { .. } => format!("{time} * 1000"),
        }
    }

    /// SQL for the present time.
    pub(crate) fn now(&self) -> &'static str {
        match &self.place {
            Place::Postgres { .. } => "clock_timestamp()",
            Place::Sqlite { .. } => "CAST(round(unixepoch('now', 'subsec') * 1000) AS INTEGER)",
        }
    }

    /// SQL for the moment `by` before a time.
    pub(crate) fn before(&self, time: &str, by: Duration) -> String {
        format!("{time} - {}", self.interval(by))
    }

    /// Moves the use of all idempotency keys back by `by`.
    pub(crate) async fn age_idempotency_keys(&self, by: Duration) {
        let ms = by.as_millis();
        let shift = match &self.place {
            Place::Postgres { .. } => format!("- {ms} * interval '1 millisecond'"),
            Place::Sqlite { .. } => format!("- {ms}"),
        };
        self.execute(&format!(
            "UPDATE idempotency_keys SET created_at = created_at {shift}"
        ))
        .await;
    }

    /// Moves the admission of all runs back by `by`.
    pub(crate) async fn age_runs(&self, by: Duration) {
        let by = self.interval(by);
        self.execute(&format!("UPDATE runs SET created_at = created_at - {by}"))
            .await;
    }

    /// Moves the start and the end of all runs back by `by`.
    pub(crate) async fn age_starts(&self, by: Duration) {
        let by = self.interval(by);
        self.execute(&format!(
            "UPDATE runs SET started_at = started_at - {by}, finished_at = finished_at - {by}"
        ))
        .await;
    }

    /// Moves admission, start and end of all runs back by `by`, and the times within their ids
    /// too.
    pub(crate) async fn backdate_runs(&self, by: Duration) {
        let ms = by.as_millis();
        let times = self.interval(by);
        self.execute(&format!(
            "UPDATE runs SET created_at = created_at - {times}, started_at = started_at - {times}, \
             finished_at = finished_at - {times}"
        ))
        .await;
        // The first 48 bits of an id are its time. SQLite has no function that reads hexadecimal
        // digits, so the recursion looks up the value of each.
        let (before, id) = match &self.place {
            Place::Postgres { .. } => (
                "SET session_replication_role = replica",
                format!(
                    "(lpad(to_hex(('x' || lpad(substr(replace(old::text, '-', ''), 1, 12), 16, '0'))::bit(64)::bigint \
                     - {ms}), 12, '0') || substr(replace(old::text, '-', ''), 13))::uuid"
                ),
            ),
            Place::Sqlite { .. } => (
                "PRAGMA foreign_keys = OFF",
                format!(
                    "unhex(printf('%012x', (WITH RECURSIVE d (n, v) AS (SELECT 1, 0 UNION ALL SELECT n + 1, v * 16 + \
                     instr('0123456789ABCDEF', substr(hex(old), n, 1)) - 1 FROM d WHERE n <= 12) \
                     SELECT v FROM d WHERE n = 13) - {ms}) || substr(hex(old), 13))"
                ),
            ),
        };
        let columns = [
            ("run_events", "run_id"),
            ("messages", "run_id"),
            ("idempotency_keys", "run_id"),
            ("runs", "id"),
        ];
        let updates = columns.map(|(table, column)| {
            format!(
                "UPDATE {table} SET {column} = {}",
                id.replace("old", column)
            )
        });
        self.execute(&format!("{before}; {}", updates.join("; ")))
            .await;
    }

    /// Moves the use of one idempotency key back by `by`.
    pub(crate) async fn age_keys(&self, by: Duration, key: &str) {
        let by = self.interval(by);
        self.execute(&format!(
            "UPDATE idempotency_keys SET created_at = created_at - {by} WHERE key = '{key}'"
        ))
        .await;
    }

    /// Moves the due times of all threads and upstream orphans back by `by`.
    pub(crate) async fn age_due_times(&self, by: Duration) {
        let by = self.interval(by);
        self.execute(&format!(
            "UPDATE threads SET due_at = due_at - {by} WHERE due_at IS NOT NULL;
            UPDATE upstream_orphans SET due_at = due_at - {by}"
        ))
        .await;
    }

    /// SQL for a duration that can be subtracted from a time.
    fn interval(&self, by: Duration) -> String {
        let ms = by.as_millis();
        match &self.place {
            Place::Postgres { .. } => format!("{ms} * interval '1 millisecond'"),
            Place::Sqlite { .. } => ms.to_string(),
        }
    }

    /// Executes statements that must succeed.
    pub(crate) async fn execute(&self, sql: &str) {
        self.try_execute(sql)
            .await
            .expect("the test's statement works");
    }

    /// Locks a table against all other sessions until the returned connection is dropped.
    /// Postgres only.
    pub(crate) async fn lock(&self, table: &str) -> PgConnection {
        let mut connection = self.pg().await;
        let lock = AssertSqlSafe(format!(
            "BEGIN; LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE"
        ));
        connection
            .execute(lock)
            .await
            .expect("a table can be locked");
        connection
    }

    /// Executes statements directly, not through the store.
    pub(crate) async fn try_execute(&self, sql: &str) -> Result<(), sqlx::Error> {
        let sql = sqlx::raw_sql(AssertSqlSafe(sql));
        match &self.place {
            Place::Postgres { .. } => sql.execute(&mut self.pg().await).await.map(drop),
            Place::Sqlite { .. } => sql.execute(&mut self.lite().await).await.map(drop),
        }
    }

    /// Returns the whole number that a query selects.
    pub(crate) async fn number(&self, sql: &str) -> i64 {
        let sql = AssertSqlSafe(sql);
        match &self.place {
            Place::Postgres { .. } => {
                sqlx::query_scalar(sql)
                    .fetch_one(&mut self.pg().await)
                    .await
            }
            Place::Sqlite { .. } => {
                sqlx::query_scalar(sql)
                    .fetch_one(&mut self.lite().await)
                    .await
            }
        }
        .expect("the test's query works")
    }

    /// Returns the texts that a query selects, one for each row.
    pub(crate) async fn texts(&self, sql: &str) -> Vec<String> {
        let sql = AssertSqlSafe(sql);
        match &self.place {
            Place::Postgres { .. } => {
                sqlx::query_scalar(sql)
                    .fetch_all(&mut self.pg().await)
                    .await
            }
            Place::Sqlite { .. } => {
                sqlx::query_scalar(sql)
                    .fetch_all(&mut self.lite().await)
                    .await
            }
        }
        .expect("the test's query works")
    }

    /// Returns the statements of a script, each with SQLite's query plan for it.
    pub(crate) async fn sqlite_plans<'a>(&self, script: &'a str) -> Vec<(&'a str, Vec<String>)> {
        let connection = &mut self.lite().await;
        let mut plans = Vec::new();
        for statement in script.split(';') {
            if statement.contains("CREATE TEMP TABLE") {
                sqlx::raw_sql(AssertSqlSafe(statement))
                    .execute(&mut *connection)
                    .await
                    .expect("a table");
                continue;
            }
            let explain = AssertSqlSafe(format!("EXPLAIN QUERY PLAN {statement}"));
            let steps: Vec<(i64, i64, i64, String)> = sqlx::query_as(explain)
                .fetch_all(&mut *connection)
                .await
                .expect("a plan");
            plans.push((statement, steps.into_iter().map(|step| step.3).collect()));
        }
        plans
    }

    /// Returns everything that is stored, each piece with its place: the bytes of each value of
    /// each column, and on SQLite the files too.
    pub(crate) async fn everything(&self) -> Vec<(String, Vec<u8>)> {
        let mut all = Vec::new();
        match &self.place {
            Place::Postgres { .. } => {
                let mut connection = self.pg().await;
                let columns: Vec<(String, String, bool)> = sqlx::query_as(
                    "SELECT table_name::text, column_name::text, data_type = 'bytea'
                    FROM information_schema.columns WHERE table_schema = 'public'",
                )
                .fetch_all(&mut connection)
                .await
                .expect("the catalogue can be read");
                for (table, column, is_bytes) in columns {
                    let value = if is_bytes {
                        format!("\"{column}\"")
                    } else {
                        format!("convert_to(\"{column}\"::text, 'UTF8')")
                    };
                    let sql = format!("SELECT {value} FROM \"{table}\"");
                    let values: Vec<Option<Vec<u8>>> = sqlx::query_scalar(AssertSqlSafe(sql))
                        .fetch_all(&mut connection)
                        .await
                        .expect("each column has a text");
                    all.extend(
                        values
                            .into_iter()
                            .flatten()
                            .map(|value| (format!("{table}.{column}"), value)),
                    );
                }
            }
            Place::Sqlite { folder } => {
                let mut connection = self.lite().await;
                let columns: Vec<(String, String)> = sqlx::query_as(
                    "SELECT t.name, c.name FROM sqlite_schema t JOIN pragma_table_info(t.name) c
                    WHERE t.type = 'table'",
                )
                .fetch_all(&mut connection)
                .await
                .expect("the schema can be read");
                for (table, column) in columns {
                    let sql = format!("SELECT CAST(\"{column}\" AS BLOB) FROM \"{table}\"");
                    let values: Vec<Option<Vec<u8>>> = sqlx::query_scalar(AssertSqlSafe(sql))
                        .fetch_all(&mut connection)
                        .await
                        .expect("each column has bytes");
                    all.extend(
                        values
                            .into_iter()
                            .flatten()
                            .map(|value| (format!("{table}.{column}"), value)),
                    );
                }
                for file in std::fs::read_dir(folder.path()).expect("the folder can be listed") {
                    let path = file.expect("the folder can be listed").path();
                    all.push((
                        path.display().to_string(),
                        std::fs::read(&path).expect("the file can be read"),
                    ));
                }
            }
        }
        all
    }

    /// Returns the places of the database's tables that contain `needle`.
    pub(crate) async fn holding(&self, needle: &str) -> Vec<String> {
        let holds = |value: &[u8]| {
            value
                .windows(needle.len())
                .any(|part| part == needle.as_bytes())
        };
        let all = self.everything().await.into_iter();
        let columns = all.filter(|(place, value)| !place.contains('/') && holds(value));
        columns
            .map(|(column, value)| format!("{column}: {}", String::from_utf8_lossy(&value)))
            .collect()
    }

    pub(crate) async fn pg(&self) -> PgConnection {
        let options: PgConnectOptions = self.url().parse().expect("the URL that we made");
        connect(&options.log_statements(tracing::log::LevelFilter::Trace)).await
    }

    async fn lite(&self) -> SqliteConnection {
        let options: SqliteConnectOptions = self.url().parse().expect("the URL that we made");
        let options = options.busy_timeout(Duration::from_secs(5));
        SqliteConnection::connect_with(&options)
            .await
            .expect("the file opens")
    }
}

impl Drop for TestDatabase {
    fn drop(&mut self) {
        let Place::Postgres {
            server: Some(server),
            name,
            ..
        } = &self.place
        else {
            return;
        };
        let (server, name) = (server.clone(), name.clone());
        // This may be a runtime's thread, which must not block. A new thread may.
        let dropper = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime
                .expect("a runtime for the clean-up")
                .block_on(async {
                    let mut connection = connect(&server).await;
                    connection
                        .execute(AssertSqlSafe(format!(
                            "DROP DATABASE IF EXISTS {name} WITH (FORCE)"
                        )))
                        .await
                        .expect("the test's database can be dropped");
                });
        });
        let result = dropper.join();
        // A second panic during unwinding would hide the first one.
        assert!(
            result.is_ok() || std::thread::panicking(),
            "the database {:?} is left over",
            self.url()
        );
    }
}

fn up_to(migrator: &Migrator, version: i64) -> Migrator {
    Migrator::with_migrations(
        migrator
            .iter()
            .filter(|it| it.version <= version)
            .cloned()
            .collect(),
    )
}

async fn connect(options: &PgConnectOptions) -> PgConnection {
    match PgConnection::connect_with(options).await {
        Ok(connection) => connection,
        Err(error) => panic!("the test server does not answer: {error}"),
    }
}

/// Migrates the database and installs its functions, as the gateway does.
async fn migrate(url: &str) {
    let config = StoreConfig {
        url: Some(url.into()),
        ..StoreConfig::default()
    };
    let store = Store::open(&config).await.expect("the database opens");
    store.migrate().await.expect("the migrations apply");
    store.close().await;
}

/// Returns the name of a migrated database to copy. Each version of the migrations has its own.
async fn template(server: &PgConnectOptions, url: &str) -> &'static str {
    static NAME: OnceCell<String> = OnceCell::const_new();
    NAME.get_or_init(|| async {
        let mut hash = sha2::Sha256::default();
        for migration in MIGRATOR.iter() {
            sha2::Digest::update(&mut hash, &migration.checksum);
        }
        // The migrated database also has the functions that these statements name.
        for statement in statements(Engine::Postgres) {
            sha2::Digest::update(&mut hash, &statement.sql);
        }
        let digest = sha2::Digest::finalize(hash);
        let hex = Uuid::from_slice(&digest[..16]).expect("16 bytes").simple();
        let name = format!("threadkeeper_template_{hex}");
        make_template(server, url, &name)
            .await
            .expect("the migrations apply");
        name
    })
    .await
}

/// Builds the template under another name first, so that a killed test leaves no unfinished
/// template.
async fn make_template(
    server: &PgConnectOptions,
    url: &str,
    name: &str,
) -> Result<(), sqlx::Error> {
    /// Number of the advisory lock, which is the same in all test processes. It was chosen at
    /// random.
    const LOCK: i64 = 0x7468_7264_6b70_7274;
    let mut connection = connect(server).await;
    sqlx::query("SELECT pg_advisory_lock($1)")
        .bind(LOCK)
        .execute(&mut connection)
        .await?;
    let found: bool =
        sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)")
            .bind(name)
            .fetch_one(&mut connection)
            .await?;
    if !found {
        let draft = format!("{name}_draft");
        connection
            .execute(AssertSqlSafe(format!(
                "DROP DATABASE IF EXISTS {draft} WITH (FORCE)"
            )))
            .await?;
        connection
            .execute(AssertSqlSafe(format!("CREATE DATABASE {draft}")))
            .await?;
        let mut url = url::Url::parse(url).expect("a connection URL is a URL");
        url.set_path(&draft);
        migrate(url.as_str()).await;
        connection
            .execute(AssertSqlSafe(format!(
                "ALTER DATABASE {draft} RENAME TO {name}"
            )))
            .await?;
    }
    // The lock ends with the session.
    connection.close().await
}

//! A gateway with a database role that has few privileges.

use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, Connection, Executor};
use tempfile::TempDir;

use crate::support::TestDatabase;
use crate::support::cluster::Cluster;
use crate::support::gateway::Gateway;
use crate::support::scene::{Backend, Protocol, Scene};
use threadkeeper::simulator::SimulatorConfig;

/// Returns the URL of the same database for a role that owns nothing.
fn as_the_app(url: &str) -> String {
    url.replace("postgres://postgres@", "postgres://app@")
}

fn run(command: &[&str], url: &str) -> (bool, String) {
    let output = Gateway::command(command)
        .env("DATABASE_URL", url)
        .output()
        .unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    (output.status.success(), text)
}

/// Checks that a text contains nothing of the server's own error format.
#[track_caller]
fn assert_plain(text: &str) {
    assert!(
        !text.contains(" at line "),
        "the text names the server's source code: {text}"
    );
    assert_eq!(text.matches("permission denied").count(), 1, "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn gateway_runs_under_unprivileged_database_role() {
    let cluster = Cluster::start();
    let admin: PgConnectOptions = cluster.url("postgres").parse().unwrap();
    let mut admin = PgConnection::connect_with(&admin).await.unwrap();
    admin.execute("CREATE ROLE app LOGIN").await.unwrap();
    admin.execute("CREATE DATABASE fresh").await.unwrap();
    admin.close().await.unwrap();
    let of = async |url: &str, statement: &str| {
        let mut owner = PgConnection::connect(url).await.unwrap();
        owner.execute(AssertSqlSafe(statement)).await.unwrap();
        owner.close().await.unwrap();
    };

    // The database is empty, and the role cannot create tables. The error says which role can.
    let fresh = cluster.url("fresh");
    of(&fresh, "REVOKE CREATE ON SCHEMA public FROM PUBLIC").await;
    for command in [&["migrate"][..], &["keys", "list"]] {
        let (ok, text) = run(command, &as_the_app(&fresh));
        assert!(
            !ok && text.contains("run `threadkeeper migrate` with the role that owns"),
            "{text}"
        );
        assert!(
            text.contains("GRANT CREATE ON SCHEMA public TO app"),
            "{text}"
        );
        assert_plain(&text);
    }
    of(&fresh, "GRANT CREATE ON SCHEMA public TO app").await;
    let (ok, text) = run(&["migrate"], &as_the_app(&fresh));
    assert!(ok, "the suggested command helps: {text}");

    // All tables exist, but the role may not read them. The error says what it needs.
    let database = TestDatabase::on(&cluster).await;
    let url = database.url();
    of(&url, "REVOKE CREATE ON SCHEMA public FROM PUBLIC").await;
    let (ok, text) = run(&["keys", "list"], &as_the_app(&url));
    assert!(
        !ok && text.contains("needs USAGE on the schema, and SELECT, INSERT, UPDATE and DELETE"),
        "{text}"
    );
    assert_plain(&text);

    // With read and write privileges everything works.
    of(
        &url,
        "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO app",
    )
    .await;
    for command in [
        &["migrate"][..],
        &["keys", "create"],
        &["keys", "list"],
        &["export"],
    ] {
        let (ok, text) = run(command, &as_the_app(&url));
        assert!(ok, "{command:?}: {text}");
    }
    let simulator = SimulatorConfig::default();
    let scene = Scene::on(database, Protocol::Responses, Backend::Postgres, simulator).await;
    let file = TempDir::new().unwrap();
    let path = file.path().join("gateway.toml");
    std::fs::write(&path, scene.config("").replace(&url, &as_the_app(&url))).unwrap();
    let mut serve = Gateway::command(&["serve", "--listen", "127.0.0.1:0", "--config"]);
    serve.arg(&path);
    let gateway = Gateway::spawn(serve, file).await;
    gateway.say("/v1/users/alice", "hi").await;
    assert_eq!(gateway.delete("/v1/users/alice").await.status, 200);
    drop(gateway);

    // The next version has a migration that only the owner can apply.
    of(
        &url,
        "DELETE FROM _sqlx_migrations WHERE version = (SELECT max(version) FROM _sqlx_migrations)",
    )
    .await;
    let (ok, text) = run(&["keys", "list"], &as_the_app(&url));
    assert!(
        !ok && text.contains("run `threadkeeper migrate` with the role that owns the tables"),
        "{text}"
    );
    // A newer version has migrated the database.
    of(
        &url,
        "INSERT INTO _sqlx_migrations VALUES (9999, 'later', now(), true, '', 1)",
    )
    .await;
    let (ok, text) = run(&["migrate"], &as_the_app(&url));
    assert!(!ok && text.contains("newer than this program"), "{text}");
}

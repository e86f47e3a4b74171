//! Data of older schemas, and newer schemas beside older binaries.
//!
//! `tests/fixtures/schema` has, for each version of the schema and each engine, what a gateway of
//! that version stored: a few runs, a session, a rolled-over topic, a run that waits for a tool's
//! output and one that is queued behind it, a receipt, a key. The file of a later version has only
//! what is added to the one before.

use sqlx::migrate::Migrator;
use threadkeeper::store::{Pruned, Pruning, StoreError};

use super::*;

static POSTGRES: Migrator = sqlx::migrate!("migrations/postgres");
static SQLITE: Migrator = sqlx::migrate!("migrations/sqlite");

/// The fixture of an engine: the data of the first version, and what each later version adds.
macro_rules! fixture {
    ($engine:literal, $first:literal $(, $later:literal)*) => {
        concat!(
            include_str!(concat!("../../fixtures/schema/", $first, ".", $engine, ".sql")),
            $(include_str!(concat!("../../fixtures/schema/", $later, ".", $engine, ".sql")),)*
        )
    };
}

/// The fixtures of each version, for Postgres and for SQLite.
const FIXTURES: &[(i64, &str, &str)] = &[
    (1, fixture!("postgres", "0001"), fixture!("sqlite", "0001")),
    (
        2,
        fixture!("postgres", "0001", "0002"),
        fixture!("sqlite", "0001", "0002"),
    ),
];

#[test]
fn every_schema_version_has_fixture() {
    for migrator in [&POSTGRES, &SQLITE] {
        let versions: Vec<i64> = migrator.iter().map(|migration| migration.version).collect();
        assert_eq!(
            versions,
            FIXTURES
                .iter()
                .map(|(version, ..)| *version)
                .collect::<Vec<_>>()
        );
    }
}

#[tokio::test]
async fn postgres_data_of_every_schema_version_is_readable() {
    for (version, stored, _) in FIXTURES {
        let database = TestDatabase::postgres_at(&POSTGRES, *version).await;
        database.execute(stored).await;
        is_read(&database, *version).await;
    }
}

#[tokio::test]
async fn sqlite_data_of_every_schema_version_is_readable() {
    for (version, _, stored) in FIXTURES {
        let database = TestDatabase::sqlite_at(&SQLITE, *version).await;
        database.execute(stored).await;
        is_read(&database, *version).await;
    }
}

/// Replicas of two versions work side by side, each with its own functions.
#[tokio::test]
async fn migrate_adds_missing_functions_beside_other_versions() {
    let database = TestDatabase::postgres().await;
    let store = database.store().await;
    let functions =
        "SELECT proname::text FROM pg_proc WHERE proname LIKE 'threadkeeper\\_%' ORDER BY proname";
    let ours = database.texts(functions).await;
    assert_eq!(ours.len(), 3, "{ours:?}");
    let others = "threadkeeper_admit_000000000000";
    let made = format!(
        "CREATE FUNCTION {others}(items jsonb) RETURNS bigint LANGUAGE sql AS 'SELECT 1::bigint'"
    );
    database.execute(&made).await;
    database
        .execute(&format!("DROP FUNCTION {}", ours[0]))
        .await;
    let missing = store.ready().await.unwrap_err();
    assert!(
        matches!(&missing, StoreError::Schema(text) if text.contains("run `threadkeeper migrate`")),
        "{missing:?}"
    );
    store.migrate().await.unwrap();
    store.ready().await.unwrap();
    exchange(&store, &user("alice")).await;
    let mut all = database.texts(functions).await;
    assert_eq!(all.remove(0), others);
    assert_eq!(all, ours);
    store.close().await;
}

/// Migrates the database, and reads everything that was stored.
async fn is_read(database: &TestDatabase, version: i64) {
    let store = database.store().await;
    store.migrate().await.unwrap();
    store.ready().await.unwrap();
    check_invariants(database).await;

    let alice = user("alice");
    let said = transcript(&store, &alice).await;
    assert_eq!(
        said.iter()
            .filter(|line| line.starts_with("user: "))
            .collect::<Vec<_>>(),
        ["user: Hello", "user: Hello again"]
    );
    let repeated = store
        .repeated(&alice, "k1", Duration::from_hours(1_000_000))
        .await
        .unwrap();
    let repeated = repeated.unwrap().run;
    assert_eq!(repeated.status, RunStatus::Completed);
    let recovered = repeated.recovery.and_then(|it| it.told().cloned());
    assert_eq!(recovered.is_some(), version >= 2);
    let (alices, _) = newest_thread(&store, &alice).await.unwrap();
    assert_eq!(
        store.last_refusal(alices.id).await.unwrap().is_some(),
        version >= 2
    );
    let bob = topic("bob", "cats & dogs");
    let page = store
        .messages(ThreadName::Newest(&bob), true, &first_page())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        page.data.len(),
        4,
        "the transcript includes the thread before"
    );
    let (current, _) = newest_thread(&store, &bob).await.unwrap();
    assert!(current.previous_thread.is_some());

    let carol = user("carol");
    let unfinished = store.unfinished(&carol).await.unwrap().unwrap();
    assert_eq!(
        unfinished.iter().map(|run| run.status).collect::<Vec<_>>(),
        [RunStatus::RequiresAction, RunStatus::Queued]
    );
    assert_eq!(
        unfinished[0].required_action.as_ref().unwrap().tool_calls[0].name,
        "look"
    );
    assert!(!store.events(unfinished[0].id, 0).await.unwrap().is_empty());
    let (carols, _) = newest_thread(&store, &carol).await.unwrap();
    assert_eq!(
        store.upstream_orphans(carols.id, false, 10).await.unwrap()[0]
            .upstream_id
            .as_deref(),
        Some("conv_left")
    );
    // The replica of these runs is gone.
    database.execute("DELETE FROM replicas").await;
    let orphans = store
        .adopt_orphans(ReplicaId::new(), &[], 10)
        .await
        .unwrap();
    assert_eq!(orphans.len(), 2);
    for orphan in orphans {
        closed(store.finish(&orphan.lease, completed(None)).await.unwrap());
    }
    let more = Admission {
        upstream: "sim".to_owned(),
        ..admission(&carol)
    };
    let turn = started(store.admit(more.clone()).await.unwrap());
    closed(
        store
            .finish(&turn.lease, completed(Some("hi")))
            .await
            .unwrap(),
    );
    check_invariants(database).await;

    assert_eq!(store.good_keys().await.unwrap()[0].prefix, "tk_fixture");
    assert_ne!(store.fingerprint_key([0; 32]).await.unwrap(), [0; 32]);
    let receipts = Pruning {
        receipts: Some(Duration::ZERO),
        ..Pruning::default()
    };
    assert_eq!(
        store.prunable(&receipts, 10).await.unwrap(),
        Pruned {
            receipts: 1,
            ..Pruned::default()
        }
    );
    store.close().await;
}

on_every_backend!(
    newer_schema_serves_compatible_binaries,
    unversioned_schema_is_refused_untouched
);

/// During a rolling upgrade the old replicas continue on the new schema, and may start again.
async fn newer_schema_serves_compatible_binaries(database: &TestDatabase, store: &Store) {
    let newest = FIXTURES.len();
    let later = newest + 1;
    database
        .execute(&format!(
            "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) \
             SELECT {later}, 'later', success, checksum, 0 FROM _sqlx_migrations WHERE version = {newest}; \
             INSERT INTO schema_versions (version, compatible_since) VALUES ({later}, {newest}); \
             ALTER TABLE threads ADD COLUMN added_later text"
        ))
        .await;
    store.ready().await.unwrap();
    store.migrate().await.unwrap();
    exchange(store, &user("alice")).await;

    // The contraction ends the compatibility.
    database
        .execute(&format!(
            "UPDATE schema_versions SET compatible_since = {later} WHERE version = {later}"
        ))
        .await;
    for refused in [store.ready().await, store.migrate().await] {
        assert!(
            matches!(&refused, Err(StoreError::Schema(text)) if text.contains("newer than this program")),
            "{refused:?}"
        );
    }
}

async fn unversioned_schema_is_refused_untouched(database: &TestDatabase, store: &Store) {
    exchange(store, &user("alice")).await;
    store
        .renew_replica(ReplicaId::new(), "127.0.0.1:1", Duration::from_hours(1))
        .await
        .unwrap();
    database.execute("DROP TABLE schema_versions").await;
    store.close().await;
    let store = database.store().await;
    for refused in [store.ready().await, store.migrate().await] {
        assert!(
            matches!(&refused, Err(StoreError::Schema(text)) if text.contains("docs/upgrading.md")),
            "{refused:?}"
        );
    }
    assert_eq!(database.number("SELECT count(*) FROM messages").await, 2);
    assert_eq!(database.number("SELECT count(*) FROM replicas").await, 1);
    store.close().await;
}

//! Clients that disconnect before the answer.

use std::time::Duration;

use sqlx::{Connection, Executor, PgConnection};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::gateway::Gateway;
use crate::support::scene::{Backend, Protocol, Scene};

const SCOPE: &str = "/v1/users/alice";
/// Settings with four database connections. Half of them are reserved for work that must not
/// wait.
const SETTINGS: [(&str, &str); 2] = [
    ("THREADKEEPER_STORE__MAX_CONNECTIONS", "4"),
    ("THREADKEEPER_STORE__ACQUIRE_TIMEOUT", "1s"),
];
const FOR_CALLERS: i64 = 2;
/// Most connections of the gateway: four, one for the session, and one for notifications.
const MOST: i64 = 6;
const OURS: &str = "FROM pg_stat_activity WHERE application_name = 'threadkeeper' AND datname = current_database()";

/// SQL for the callers' statements that contain `part` and wait for a lock.
fn stuck(part: &str) -> String {
    format!("{OURS} AND wait_event_type = 'Lock' AND query LIKE '%{part}%'")
}

/// Sends requests that wait in the database, one after another, and disconnects from each.
async fn hang_up(scene: &Scene, gateway: &Gateway, request: &str, stuck: &str) {
    let count = async |what: &str| {
        scene
            .database
            .number(&format!("SELECT count(*) {what}"))
            .await
    };
    for n in 1..=4 * FOR_CALLERS {
        let mut socket = TcpStream::connect(gateway.address()).await.unwrap();
        let request = format!("{request} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n");
        socket.write_all(request.as_bytes()).await.unwrap();
        // Waits until the statement waits for the lock, or the gateway has refused the request
        // for want of a connection.
        let told = async {
            while timeout(Duration::from_millis(20), socket.readable())
                .await
                .is_err()
            {
                if count(stuck).await >= n {
                    break;
                }
            }
        };
        timeout(Duration::from_secs(20), told)
            .await
            .expect("the request waits or is refused in time");
        socket.shutdown().await.unwrap();
        // The gateway has dropped the request.
        socket.read_to_end(&mut Vec::new()).await.unwrap();
        let connections = count(OURS).await;
        assert!(
            connections <= MOST,
            "{connections} connections after {n} clients have hung up"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_hanging_up_leak_no_database_connections() {
    let scene = Scene::new(Protocol::Responses, Backend::Postgres).await;
    let gateway = Gateway::start_with(&scene.config(""), &SETTINGS).await;
    gateway.say(SCOPE, "hello").await;
    let lock = scene.database.lock("messages").await;
    let stuck = stuck("FROM messages");
    hang_up(&scene, &gateway, &format!("GET {SCOPE}/messages"), &stuck).await;
    let stuck = scene
        .database
        .texts(&format!("SELECT pid::text {stuck}"))
        .await;
    assert_eq!(i64::try_from(stuck.len()).unwrap(), FOR_CALLERS);

    drop(lock);
    gateway.get(&format!("{SCOPE}/messages")).await.ok();
    let same = format!("SELECT count(*) {OURS} AND pid IN ({})", stuck.join(", "));
    let same = scene.database.number(&same).await;
    assert_eq!(same, FOR_CALLERS, "the connections are used again");
}

/// A rollover waits for the lock of its thread, which a finishing run also takes. Waiting
/// rollovers must not use the connections that finish runs.
#[tokio::test(flavor = "multi_thread")]
async fn abandoned_rollovers_leak_no_database_connections() {
    let scene = Scene::new(Protocol::Responses, Backend::Postgres).await;
    let gateway = Gateway::start_with(&scene.config(""), &SETTINGS).await;
    gateway.say(SCOPE, "hello").await;
    let mut holder = PgConnection::connect(&scene.database.url()).await.unwrap();
    holder
        .execute("BEGIN; SELECT FROM threads FOR UPDATE")
        .await
        .unwrap();
    let stuck = stuck("SELECT t.lifecycle FROM threads t");
    hang_up(
        &scene,
        &gateway,
        &format!("POST {SCOPE}/thread/rollover"),
        &stuck,
    )
    .await;
    holder.execute("ROLLBACK").await.unwrap();
    gateway.say(SCOPE, "hello again").await;
}
